"""Steering of one forward pass: controls cut to its slots, checked, shaped as :func:`micro.ops.route` takes them.

Nothing here waits for a CUDA device. A control stays where its user put it until it has been checked: one on the host
(names, numbers, lists, tensors) is refused with the row, layer and slot that are wrong, one that lies on the device by
an assertion that the device makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
        self._to_device()

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
            return value[0]
        return value.expand(self.rows, self.slots, *[-1] * (value.dim() - 2)).flatten(0, 1)

    def _force_as_rows(self) -> Tensor | None:
        """One-hot rows [B|1,L|1,S|1,E] if every token of every layer is forced."""
        if self._force is None or self._replay is not None or self.steering.by_labels or bool((self._force < 0).any()):
            return None
        return F.one_hot(self._force, self.num_experts).to(self._wide)

    def _to_device(self) -> None:
        """What layers take, beside the model; without waiting for it."""
        for name in ("labels", "_given", "_given_mask", "_replay", "_replay_mask", "_ablate", "_bias", "_force"):
            setattr(self, name, _moved(getattr(self, name), self.device))
        self._forced_rows = _moved(self._forced_rows, self.device)
        self._forced_logits = _moved(self._forced_logits, self.device)
        if self._given is not None and self.real is not None and self.steering.weights is not None:
            # Any valid row: controls at padding are ignored.
            self._given = torch.where(self.real.flatten()[:, None], self._given, 1.0)

    # ------------------------------------------------------------------ windows of the controls
    def _span(self) -> tuple[int, int]:
        """This call's slots, counted from the S axes' first slot. In a plain forward S axes cover exactly its slots."""
        first = 0 if self.steering.prompt is None else self.start - self.steering.origin
        return first, first + self.slots

    def _window(self, name: str, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor | None:
        steering, merged = self.steering, None
        for control in getattr(steering, name):
            part = window(name, control, *self._span(), steering.prompt, steering.step_reader(self.rows))
            if part.shape[0] not in (1, self.rows):
                raise ValueError(f"{name}: given for {part.shape[0]} rows, the call has {self.rows}")
            merged = part if merged is None else merge(*_together(merged, part))
        return merged

    def _all_ablated(self) -> Tensor | None:
        """Ablated experts, those with a bias of -inf among them."""
        ablate = self._window("ablate", torch.logical_or)
        if self._bias is None:
            return ablate
        bias = self._bias.detach()
        message = "bias: +inf and NaN have no meaning; -inf ablates, any other number is added to the logit"
        wrong = (bias.isnan() | (bias == torch.inf)).any()
        if not _on_host(wrong):
            torch._assert_async(~wrong, message)
        elif bool(wrong):
            raise ValueError(message)
        gone = bias == -torch.inf
        if not _on_host(gone) or bool(gone.any()):
            self._bias = self._bias.masked_fill(gone, 0.0)
            ablate = gone if ablate is None else torch.logical_or(*_together(ablate, gone))
        return ablate

    def _slots_of(self, value: Tensor, everywhere: bool, name: str) -> tuple[Tensor, Tensor | None]:
        """From [B,...] (everywhere) or [B,S',...]: [B,S,...] of this call, and where given (bool [B,S] on the host,
        None = all).
        """
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
        inside = torch.zeros(self.rows, self.slots, dtype=torch.bool)
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
        bad = (labels < -1) | (labels >= self.num_experts) | (labels == -1) & (language is None)
        expected = f"expected 0..{self.num_experts - 1}" + ("" if language is None else " or -1 (language)")
        if (found := self._first(bad, inside, f"routing_labels: a label is wrong; {expected}")) is not None:
            wrong = int(labels[found])
            why = " (it means the expert named language, and there is none)" if wrong == -1 else ""
            row, slot = found
            raise ValueError(f"routing_labels: label {wrong}{why} at row {row}, slot {self.start + slot}; {expected}")
        fill = -1 if language is None else language
        labels = torch.where((labels < 0) | (labels >= self.num_experts), fill, labels)
        return labels if inside is None else torch.where(_moved(inside, labels.device), labels, -1)

    def _first(self, bad: Tensor, inside: Tensor | None, message: str) -> tuple[int, int] | None:
        """Row and slot of the first mistake of bool [B,S] that is one: at a real token, with something given. Mistakes
        on a device cannot be looked at without waiting; they become its assertion, with ``message``.
        """
        if inside is not None:
            bad = bad & _moved(inside, bad.device)
        if _on_host(bad) and not bool(bad.any()):
            return None
        if self.real is not None:
            bad = bad & self.real.to(bad.device)
        if not _on_host(bad):
            torch._assert_async(~bad.any(), message)
            return None
        if not bool(bad.any()):
            return None
        row, slot = bad.nonzero()[0].tolist()
        return row, slot

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
        return rows.flatten(0, 1), None if inside is None else inside.flatten()

    def _label_mask(self) -> Tensor | None:
        """Where labels are given in this call; padded slots count as given."""
        labels = self.steering.labels
        assert labels is not None
        if labels.dim() == 1 or self.steering.prompt is None or self._span()[1] <= labels.shape[1]:
            return None
        return (torch.arange(*self._span()) < labels.shape[1]).expand(self.rows, -1)

    def _check_rows(self, rows: Tensor, inside: Tensor | None) -> None:
        bad = ~torch.isfinite(rows).all(-1) | (rows < 0).any(-1) | (rows.sum(-1) <= 0)
        expected = "expected finite numbers >= 0 with a positive sum"
        if (found := self._first(bad, inside, f"routing_weights: a row is wrong; {expected}")) is not None:
            row, slot = found
            raise ValueError(
                f"routing_weights: row {row}, slot {self.start + slot} is {rows[found].tolist()}; {expected}"
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
        part = trace.ids[:, :, first:last].to(torch.int32)
        inside = part.shape[2]
        if inside < self.slots:
            part = F.pad(part, (0, 0, 0, self.slots - inside))
        mask = None
        if inside < self.slots:
            mask = (torch.arange(self.slots) < inside).repeat(self.rows)
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
                forced, gone = _together(self._forced_of(force), ablate)
                self._refuse((forced & gone).any(-1), "the forced expert is ablated")
        if self._given is not None:
            if self._bias is not None:
                raise ValueError("bias has no meaning where labels or routing_weights route; pass route_by='router'")
            if ablate is not None:
                given, gone = _together(self._given.view(self.rows, 1, self.slots, -1) > 0, ablate)
                if self._given_mask is not None:
                    given = given & _moved(self._given_mask, given.device).view(self.rows, 1, self.slots, 1)
                self._refuse((given & gone).any(-1), "a label or routing weight asks for an ablated expert")
        if self._replay is not None:
            self._check_replay(self._replay)

    def _check_replay(self, ids: Tensor) -> None:
        """A replayed choice that steering rules out would leave a token without output."""
        chosen = F.one_hot(ids.long(), self.num_experts).any(2).bool()
        chosen = chosen.view(-1, self.rows, self.slots, self.num_experts).transpose(0, 1)
        if self._replay_mask is not None:
            # Elsewhere anything may be chosen.
            chosen = chosen | ~_moved(self._replay_mask, ids.device).view(self.rows, 1, self.slots, 1)
        if self._ablate is not None:
            taken, gone = _together(chosen, self._ablate)
            self._refuse(~(taken & ~gone).any(-1), "every replayed expert is ablated")
        if self._force is not None:
            taken, forced = _together(chosen, self._forced_of(self._force))
            free = _moved(self._force < 0, forced.device)
            self._refuse(~(taken & forced).any(-1) & ~free, "the forced expert is not among the replayed ones")

    def _forced_of(self, force: Tensor) -> Tensor:
        """One-hot bool [..., E] of the forced expert; nothing where force is -1."""
        return F.one_hot(force.clamp(min=0), self.num_experts).bool() & (force >= 0)[..., None]

    def _refuse(self, bad: Tensor, what: str) -> None:
        """Raise if ``bad`` [B|1,L|1,S|1] holds at a real slot; names the first row, layer and slot."""
        if _on_host(bad) and not bool(bad.any()):
            return
        bad = bad.expand(self.rows, -1, self.slots)
        if self.real is not None:
            bad = bad & self.real[:, None].to(bad.device)
        if not _on_host(bad):
            torch._assert_async(~bad.any(), f"steering: {what}")
        elif bool(bad.any()):
            row, layer, slot = bad.nonzero()[0].tolist()
            every = "" if bad.shape[1] > 1 else " (every layer)"
            raise ValueError(f"steering: {what} at row {row}, layer {layer}{every}, slot {self.start + slot}")


def _on_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _moved(tensor: Tensor | None, device: torch.device) -> Any:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _together(*tensors: Tensor) -> list[Tensor]:
    """Tensors on one device: the host, if all of them are there."""
    elsewhere = [t.device for t in tensors if not _on_host(t)]
    return [_moved(t, elsewhere[0]) for t in tensors] if elsewhere else list(tensors)
