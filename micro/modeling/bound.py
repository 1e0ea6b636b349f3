"""Steering of one forward pass: controls cut to its slots, checked, shaped as :func:`micro.ops.route` takes them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from micro.modeling.call import LayerControls
from micro.modeling.controls import ExpertNames, window
from micro.modeling.steer import Steering


class BoundSteering:
    """``layer(l)`` gives what layer l needs, ``bias(l)`` its bias. Everything is checked at construction."""

    def __init__(
        self, steering: Steering, rows: int, slots: int, start: int, real: Tensor | None, like: Tensor
    ) -> None:
        self.steering, self.rows, self.slots, self.start = steering, rows, slots, start
        self.real, self.device, self.num_experts = real, like.device, steering.config.num_experts
        self._wide = torch.promote_types(like.dtype, torch.float32)
        self._ablate: Tensor | None = None
        self._bias: Tensor | None = None
        self._force: Tensor | None = None
        self.labels = self._resolved_labels()
        self._given, self._given_mask = self._given_rows()
        self._replay, self._replay_mask = self._replayed()
        if steering.ablate or steering.bias:
            self._bias = self._window("bias", torch.add)
            self._ablate = self._all_ablated()
        if steering.force:
            self._force = self._window("force", lambda outer, inner: torch.where(inner >= 0, inner, outer))
        self._check()
        self._forced_rows = self._force_as_rows()
        self._forced_logits = None if self._forced_rows is None else self._forced_rows.log()
        self._of_all_layers: dict[int, Tensor] = {}

    # ------------------------------------------------------------------ what layers take
    def layer(self, index: int) -> LayerControls:
        """Controls of one layer; the caller may change the object."""
        if self.steering.free:
            return LayerControls()
        rows = self._given
        if rows is None and self._forced_rows is not None:
            # A forced layer needs no router: p is one-hot.
            rows = self._flat(self._forced_rows, index)
            assert rows is not None
            rows = rows.expand(self.rows * self.slots, -1)
        force = self._flat(self._force, index)
        return LayerControls(
            rows=rows,
            row_mask=self._given_mask,
            ablate=self._flat(self._ablate, index),
            force=None if force is None else force.int(),
            replay=None if self._replay is None else self._replay[index],
            replay_mask=self._replay_mask,
            run_router=rows is None or self._given_mask is not None,
        )

    def bias(self, index: int) -> Tensor | None:
        """Bias of one layer, [T|1,E]."""
        return self._flat(self._bias, index)

    def reported(self, index: int) -> tuple[Tensor, Tensor] | None:
        """Effective logits and probabilities [T,E] of a layer whose router decides nothing: the given rows, or 0 / -inf
        rows under force. None where the router decides (model.md 4.3).
        """
        if self._given is not None:
            return None if self._given_mask is not None else (self._given, self._given)
        if self._forced_rows is None:
            return None
        rows = self._flat(self._forced_rows, index)
        assert rows is not None
        logits = self._flat(self._forced_logits, index)
        assert logits is not None
        return logits.expand(self.rows * self.slots, -1), rows.expand(self.rows * self.slots, -1)

    def _flat(self, value: Tensor | None, layer: int) -> Tensor | None:
        """One layer of a control [B|1,L|1,S|1,...] as [T|1,...]; made once where all layers share it."""
        if value is None:
            return None
        if value.shape[1] > 1:
            return self._tokens(value[:, layer])
        if id(value) not in self._of_all_layers:
            self._of_all_layers[id(value)] = self._tokens(value[:, 0])
        return self._of_all_layers[id(value)]

    def _tokens(self, value: Tensor) -> Tensor:
        """[B|1,S|1,...] as [T|1,...]."""
        if value.shape[0] == 1 and value.shape[1] == 1:
            return value[0].to(self.device)
        return value.expand(self.rows, self.slots, *[-1] * (value.dim() - 2)).flatten(0, 1).to(self.device)

    def _force_as_rows(self) -> Tensor | None:
        """One-hot rows [B|1,L|1,S|1,E] if every token of every layer is forced."""
        if self._force is None or self._replay is not None or self.steering.by_labels or bool((self._force < 0).any()):
            return None
        return F.one_hot(self._force, self.num_experts).to(self._wide)

    # ------------------------------------------------------------------ windows of the controls
    def _span(self) -> tuple[int, int]:
        """This call's slots, counted from the S axes' first slot. In a plain forward S axes cover exactly its slots."""
        first = 0 if self.steering.prompt is None else self.start - self.steering.origin
        return first, first + self.slots

    def _window(self, name: str, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        steering, merged = self.steering, None
        for control in getattr(steering, name):
            part = window(name, control, *self._span(), steering.prompt, steering.step_reader(self.rows))
            part = part.to(self.device)
            if part.shape[0] not in (1, self.rows):
                raise ValueError(f"{name}: given for {part.shape[0]} rows, the call has {self.rows}")
            merged = part if merged is None else merge(merged, part)
        return merged

    def _all_ablated(self) -> Tensor | None:
        """Ablated experts, those with a bias of -inf among them."""
        ablate = self._window("ablate", torch.logical_or)
        if self._bias is None:
            return ablate
        bias = self._bias.detach()
        if bool((bias.isnan() | (bias == torch.inf)).any()):
            raise ValueError("bias: +inf and NaN have no meaning; -inf ablates, any other number is added to the logit")
        gone = bias == -torch.inf
        if bool(gone.any()):
            self._bias = self._bias.masked_fill(gone, 0.0)
            ablate = gone if ablate is None else ablate | gone
        return ablate

    def _slots_of(self, value: Tensor, everywhere: bool, name: str) -> tuple[Tensor, Tensor | None]:
        """From [B,...] (everywhere) or [B,S',...]: [B,S,...] of this call, and where given (bool [B,S], None = all)."""
        value = value.to(self.device)
        if value.shape[0] != self.rows:
            raise ValueError(f"{name}: given for {value.shape[0]} rows, the call has {self.rows}")
        if everywhere:
            return value[:, None].expand(self.rows, self.slots, *value.shape[1:]), None
        first, last = self._span()
        if self.steering.prompt is None and value.shape[1] != self.slots:
            raise ValueError(f"{name}: given for {value.shape[1]} slots, the call has {self.slots}")
        part = value[:, first:last]
        if part.shape[1] == self.slots:
            return part, None
        out = value.new_zeros(self.rows, self.slots, *value.shape[2:])
        out[:, : part.shape[1]] = part
        inside = torch.zeros(self.rows, self.slots, dtype=torch.bool, device=self.device)
        inside[:, : part.shape[1]] = True
        return out, inside

    # ------------------------------------------------------------------ labels, rows, replay
    def _resolved_labels(self) -> Tensor | None:
        """Labels of this call, int64 [B,S], -1 where none is given. The user's -1 is the language expert."""
        labels = self.steering.labels
        if labels is None:
            return None
        labels, inside = self._slots_of(labels, labels.dim() == 1, "routing_labels")
        language = ExpertNames(self.steering.config).language()
        bad = self._counts(inside) & (
            (labels < -1) | (labels >= self.num_experts) | (labels == -1) & (language is None)
        )
        if bool(bad.any()):
            row, slot = bad.nonzero()[0].tolist()
            wrong = int(labels[row, slot])
            why = " (it means the expert named language, and there is none)" if wrong == -1 else ""
            raise ValueError(
                f"routing_labels: label {wrong}{why} at row {row}, slot {self.start + slot}; expected "
                f"0..{self.num_experts - 1}" + ("" if language is None else " or -1 (language)")
            )
        fill = -1 if language is None else language
        labels = torch.where((labels < 0) | (labels >= self.num_experts), fill, labels)
        return labels if inside is None else torch.where(inside, labels, -1)

    def _counts(self, inside: Tensor | None) -> Tensor:
        """Slots at which a mistake is one: real, and with something given."""
        shape = (self.rows, self.slots)
        real = torch.ones(shape, dtype=torch.bool, device=self.device) if self.real is None else self.real
        return real if inside is None else real & inside

    def _given_rows(self) -> tuple[Tensor | None, Tensor | None]:
        """Rows used in place of probabilities [T,E], and where [T] (None = everywhere)."""
        steering = self.steering
        if not steering.by_labels:
            return None, None
        if steering.weights is not None:
            rows, inside = self._slots_of(steering.weights, steering.weights.dim() == 2, "routing_weights")
            self._check_rows(rows, inside)
            rows = rows.to(self._wide)
        else:
            assert self.labels is not None
            inside = self._label_mask()
            rows = F.one_hot(self.labels.clamp(min=0), self.num_experts).to(self._wide)
        if inside is not None and not bool(inside.any()):
            return None, None
        if self.real is not None and steering.weights is not None:
            rows = torch.where(self.real[..., None], rows, 1.0)  # any valid row: controls at padding are ignored
        return rows.flatten(0, 1), None if inside is None else inside.flatten()

    def _label_mask(self) -> Tensor | None:
        """Where labels are given in this call; padded slots count as given."""
        labels = self.steering.labels
        assert labels is not None
        if labels.dim() == 1 or self.steering.prompt is None or self._span()[1] <= labels.shape[1]:
            return None
        return (torch.arange(*self._span(), device=self.device) < labels.shape[1]).expand(self.rows, -1)

    def _check_rows(self, rows: Tensor, inside: Tensor | None) -> None:
        bad = ~torch.isfinite(rows).all(-1) | (rows < 0).any(-1) | (rows.sum(-1) <= 0)
        bad &= self._counts(inside)
        if bool(bad.any()):
            row, slot = bad.nonzero()[0].tolist()
            raise ValueError(
                f"routing_weights: row {row}, slot {self.start + slot} is {rows[row, slot].tolist()}; "
                "expected finite numbers >= 0 with a positive sum"
            )

    def _replayed(self) -> tuple[Tensor | None, Tensor | None]:
        """Choices to take, int32 [L,T,K], and where [T] (None = everywhere)."""
        trace = self.steering.replay
        if trace is None:
            return None, None
        layers, rows, slots, k = trace.ids.shape
        if rows != self.rows or k != self.steering.k:
            raise ValueError(
                f"replay: the trace has {rows} rows and {k} experts per token, the call {self.rows} and "
                f"{self.steering.k}"
            )
        first, last = self.start - trace.start, self.start + self.slots - trace.start
        if first < 0 or (self.steering.prompt is None and last > slots):
            raise ValueError(
                f"replay: the trace covers slots {trace.start}..{trace.start + slots - 1}, "
                f"the call {self.start}..{self.start + self.slots - 1}"
            )
        if first >= slots:
            return None, None
        part = trace.ids[:, :, first:last].to(self.device, torch.int32)
        inside = part.shape[2]
        if inside < self.slots:
            part = F.pad(part, (0, 0, 0, self.slots - inside))
        mask = None
        if inside < self.slots:
            mask = (torch.arange(self.slots, device=self.device) < inside).repeat(self.rows)
        return part.reshape(layers, self.rows * self.slots, k), mask

    # ------------------------------------------------------------------ checks (model.md 4.4)
    def _check(self) -> None:
        ablate, force = self._ablate, self._force
        if ablate is not None:
            self._refuse(ablate.all(-1), "every expert is ablated")
        if force is not None:
            if bool(((force < -1) | (force >= self.num_experts)).any()):
                raise ValueError(f"force: an expert id is outside 0..{self.num_experts - 1} (-1 = free)")
            if ablate is not None:
                hit = (F.one_hot(force.clamp(min=0), self.num_experts).bool() & ablate).any(-1) & (force >= 0)
                self._refuse(hit, "the forced expert is ablated")
        if self._given is not None:
            if self._bias is not None:
                raise ValueError("bias has no meaning where labels or routing_weights route; pass route_by='router'")
            if ablate is not None:
                given = self._given.view(self.rows, 1, self.slots, -1) > 0
                if self._given_mask is not None:
                    given = given & self._given_mask.view(self.rows, 1, self.slots, 1)
                self._refuse((given & ablate).any(-1), "a label or routing weight asks for an ablated expert")
        if self._replay is not None:
            self._check_replay(self._replay)

    def _check_replay(self, ids: Tensor) -> None:
        """A replayed choice that steering rules out would leave a token without output."""
        chosen = F.one_hot(ids.long(), self.num_experts).any(2).bool()
        chosen = chosen.view(-1, self.rows, self.slots, self.num_experts).transpose(0, 1)
        inside = torch.ones((), dtype=torch.bool, device=self.device)
        if self._replay_mask is not None:
            inside = self._replay_mask.view(self.rows, 1, self.slots)
        if self._ablate is not None:
            self._refuse(~(chosen & ~self._ablate).any(-1) & inside, "every replayed expert is ablated")
        if self._force is not None:
            forced = F.one_hot(self._force.clamp(min=0), self.num_experts).bool()
            miss = ~(chosen & forced).any(-1) & (self._force >= 0)
            self._refuse(miss & inside, "the forced expert is not among the replayed ones")

    def _refuse(self, bad: Tensor, what: str) -> None:
        """Raise if ``bad`` [B|1,L|1,S|1] holds at a real slot; names the first row, layer and slot."""
        if not bool(bad.any()):
            return
        bad = bad.expand(self.rows, -1, self.slots)
        if self.real is not None:
            bad = bad & self.real[:, None]
        if bool(bad.any()):
            row, layer, slot = bad.nonzero()[0].tolist()
            every = "" if bad.shape[1] > 1 else " (every layer)"
            raise ValueError(f"steering: {what} at row {row}, layer {layer}{every}, slot {self.start + slot}")
