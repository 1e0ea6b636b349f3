"""A MiCRo model for lm-evaluation-harness, with steering among its model arguments.

    lm = MiCRoLM(pretrained="my-micro", ablate="social,logic")
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])
    lm_eval.simple_evaluate(model="micro", model_args="pretrained=my-micro,ablate=social,logic", tasks=[...])

The second form works once this module is imported. Importing it needs lm-eval (extra ``eval``).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from micro.errors import choices, require
from micro.evaluation.candidates import CandidateScorer, encode_pair, split_controls
from micro.evaluation.completing import Completer, Sampling
from micro.progress import Progress

require("lm_eval", "eval", "micro.evaluation.MiCRoLM")

from lm_eval.api.model import TemplateLM  # noqa: E402
from lm_eval.api.registry import register_model  # noqa: E402
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string  # noqa: E402

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

MAX_GEN_TOKS = 256  # where a task does not say how long an answer may be, as in the harness
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
EXPERT_SEPARATORS = str.maketrans("+;", ",,")


@register_model("micro")
class MiCRoLM(TemplateLM):  # type: ignore[misc]
    """``lm_eval.api.model.LM`` over a MiCRo model: candidates by :class:`CandidateScorer`, answers by the engine.

    Args:
        pretrained: a folder (ours or official) or a loaded model.
        tokenizer: default that of the folder; needed with a loaded model.
        ablate, keep: experts, as a list or as text separated by ``,`` or ``+``.
        bias: ``{"logic": 1.5}``, or text: ``logic:1.5,social:-2``.
        force: one expert.
        experts_per_token: default the model's.
        batch_size: answers that are generated together; "auto" is 16.
        max_tokens: slots of a batch of candidates.
        max_length: tokens of prompt and answer together; default the model's. Longer prompts lose their beginning.
        max_gen_toks: longest answer where a task does not say.
        engine: generate with the C++ engine; default: where the model is on the CPU. It is packed from the weights
            at the first answer, and knows nothing of torch hooks; inside ``model.intervene`` the model itself writes.
        add_bos_token: as in the harness: whether texts begin with BOS; default the tokenizer's habit.
        dtype, device: of the model that is loaded.
        progress: show bars on stderr.

    Raises:
        ValueError: an argument that does not exist, an unknown expert, or a loaded model without tokenizer.
    """

    backend = "causal"

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        ablate: Any = None,
        keep: Any = None,
        bias: Any = None,
        force: Any = None,
        experts_per_token: int | None = None,
        batch_size: int | str = "auto",
        max_tokens: int = 2048,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        engine: bool | None = None,
        add_bos_token: bool | None = None,
        dtype: str | None = None,
        device: str | None = None,
        seed: int = 0,
        progress: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        # The harness hands these to every model.
        others = {name: value for name, value in others.items() if name != "max_batch_size" and value is not None}
        if others:
            raise ValueError(
                f"MiCRoLM: unknown argument {next(iter(others))!r}; {choices(next(iter(others)), ARGUMENTS)}"
            )
        self.model, self.tokenizer = _load(pretrained, tokenizer, dtype, device)
        self._device = self.model.device
        given = {
            "ablate": experts(ablate),
            "keep": experts(keep),
            "bias": biases(bias),
            "force": None if force == "" else force,
            "experts_per_token": None if experts_per_token is None else int(experts_per_token),
        }
        self.controls = {name: value for name, value in given.items() if value is not None}
        split_controls(self.model.config, self.controls)  # a wrong expert is found before a task is loaded
        self.batch_size = 16 if batch_size in ("auto", None) else int(batch_size)
        self.max_tokens, self.seed, self.progress = int(max_tokens), int(seed), progress
        self.max_length = int(max_length or getattr(self.model.config, "max_position_embeddings", None) or 2048)
        self.max_gen_toks = int(max_gen_toks)
        self.add_bos_token = add_bos_token
        self.truncated = 0  # prompts that lost their beginning
        self._engine = engine
        self._completer: Completer | None = None

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> MiCRoLM:
        """As in the harness; commas inside a value belong to it: ``ablate=social,logic,batch_size=4``."""
        parts: list[str] = []
        for part in arg_string.split(","):
            if parts and "=" not in part:
                parts[-1] += f"+{part}"
            else:
                parts.append(part)
        arguments = simple_parse_args_string(",".join(parts))
        extra = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**extra, **arguments})

    # ------------------------------------------------------------------ tokens
    @property
    def eot_token_id(self) -> int:
        """End of text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or end of text."""
        found = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else int(found)

    @property
    def tokenizer_name(self) -> str:
        """For the harness' cache of requests."""
        return str(getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text. A text that begins with BOS gets no second one."""
        special = self.add_bos_token if add_special_tokens is None else add_special_tokens
        begin = self.tokenizer.decode([self.prefix_token_id])
        if add_special_tokens is None and begin and string.startswith(begin):
            special = False
        options = {} if special is None else {"add_special_tokens": special}
        ids = list(self.tokenizer(string, **options)["input_ids"])
        return ids[-left_truncate_len:] if left_truncate_len else ids

    def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the prompt that the model was trained on."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """As the harness does it: the text is cut where the context's own tokens end. Where that leaves no token of the
        continuation (its beginning merged with the context), from the first token that differs.
        """
        first, second = super()._encode_pair(context, continuation)
        if not second:
            first, second = map(list, encode_pair(self.tok_encode, context, continuation))
        return first, second

    # ------------------------------------------------------------------ scores
    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        pairs = [self._fitting(context, continuation) for _, context, continuation in requests]
        scorer = CandidateScorer(
            self.model,
            controls=self.controls,
            max_tokens=self.max_tokens,
            progress=self.progress and not disable_tqdm,
        )
        answers = [(score.logprob, score.greedy) for score in scorer.score_ids(pairs)]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _fitting(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """A pair without the beginning that the model cannot read."""
        if len(continuation) > self.max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens, the model reads {self.max_length}")
        room = self.max_length + 1 - len(continuation)
        self.truncated += len(context) > room
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of ``max_length`` tokens, each token predicted once."""
        windows: list[Any] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            found = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in found:
                windows.append((None, *make_disjoint_window(window)))
                owners.append(i)
        sums = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            sums[owner] += logprob
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    # ------------------------------------------------------------------ answers
    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a stop string (not included), the end of the text or the longest length."""
        if self._completer is None:
            self._completer = Completer(self.model, self.tokenizer, controls=self.controls, engine=self._engine)
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(sorted(request.args[1].items(), key=repr)), []).append(i)
        answers = [""] * len(requests)
        shown = self.progress and not disable_tqdm
        with Progress("answers", len(requests), unit="answers", enabled=None if shown else False) as bar:
            for members in groups.values():
                until, sampling = self._settings(dict(requests[members[0]].args[1]))
                room = self.max_length - sampling.max_new_tokens
                if room < 1:
                    raise ValueError(
                        f"answers of {sampling.max_new_tokens} tokens leave no room for a prompt: the model reads "
                        f"{self.max_length}; ask for fewer (max_gen_toks)"
                    )
                prompts = sorted(((i, self.tok_encode(requests[i].args[0])) for i in members), key=_longest_first)
                self.truncated += sum(len(ids) > room for _, ids in prompts)
                for start in range(0, len(prompts), self.batch_size):
                    part = prompts[start : start + self.batch_size]
                    texts = self._completer.complete(
                        [ids[-room:] for _, ids in part], until, sampling, seeds=[self.seed + i for i, _ in part]
                    )
                    for (i, _), text in zip(part, texts, strict=True):
                        answers[i] = text
                        self.cache_hook.add_partial("generate_until", requests[i].args, text)
                    bar.advance(len(part))
        return answers

    def _settings(self, given: dict[str, Any]) -> tuple[list[str], Sampling]:
        """Stop strings and sampling of a task's ``generation_kwargs``."""
        until = given.pop("until", None) or []
        until = [until] if isinstance(until, str) else list(until)
        lengths = [given.pop(name) for name in LENGTH_NAMES if name in given]
        length = next((int(n) for n in lengths if n is not None), self.max_gen_toks)
        if given.pop("do_sample", bool(given.get("temperature"))):
            given.setdefault("temperature", 1.0)
        else:
            given = {name: value for name, value in given.items() if name not in ("temperature", "top_p", "top_k")}
        return until, Sampling.of(given, length)


def _longest_first(prompt: tuple[int, list[int]]) -> int:
    """What does not fit into memory fails at once."""
    return -len(prompt[1])


ARGUMENTS = [name for name in MiCRoLM.__init__.__annotations__ if name not in ("others", "return")]


def _load(pretrained: Any, tokenizer: Any, dtype: str | None, device: str | None) -> tuple[Any, Any]:
    """(model in eval mode, tokenizer)."""
    if isinstance(pretrained, str | os.PathLike):
        import micro

        model = micro.load(os.fspath(pretrained), dtype=getattr(torch, dtype) if dtype and dtype != "auto" else None)
        if tokenizer is None:
            tokenizer = pretrained
    else:
        model = pretrained
        if not hasattr(model, "config") or not hasattr(model, "lm_head"):
            raise TypeError(f"MiCRoLM: pretrained is a folder or a MiCRo model, got {type(pretrained).__name__}")
    if tokenizer is None:
        raise ValueError("MiCRoLM: a loaded model needs its tokenizer; pass tokenizer=...")
    if isinstance(tokenizer, str | os.PathLike):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    if tokenizer.eos_token_id is None:
        raise ValueError("MiCRoLM: the tokenizer has no end-of-text token; set tokenizer.eos_token")
    if device is not None:
        torch.nn.Module.to(model, device)
    return model.train(False), tokenizer


def experts(value: Any) -> Any:
    """Experts as model arguments write them: ``social+logic`` or ``social,logic``; other forms pass as they are."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.translate(EXPERT_SEPARATORS).split(",") if name.strip()] or None


def biases(value: Any) -> Any:
    """``logic:1.5,social:-2`` as a dictionary; other forms pass as they are."""
    if not isinstance(value, str):
        return value
    found = {}
    for part in value.translate(EXPERT_SEPARATORS).split(","):
        name, colon, number = part.partition(":")
        try:
            found[name.strip()] = float(number)
        except ValueError:
            colon = ""
        if not colon:
            raise ValueError(f"MiCRoLM: bias {part.strip()!r} must be NAME:NUMBER, as in logic:1.5,social:-2")
    return found or None
