"""``micro generate``: text from a model, steered and with its routing shown."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer


def generate(
    folder: Annotated[Path, typer.Argument(help="Model folder, ours or in the official layout.")],
    prompt: Annotated[str | None, typer.Argument(help="Text to continue; with --chat, what the user says.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the chat template; without PROMPT, talk line by line.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message, with --chat.")] = None,
    ablate: Annotated[str | None, typer.Option(help="Comma list of experts to ablate.")] = None,
    keep: Annotated[str | None, typer.Option(help="Comma list of experts to keep.")] = None,
    bias: Annotated[str | None, typer.Option(help="Added to router logits: logic=1.5,social=-2.")] = None,
    force: Annotated[str | None, typer.Option(help="Expert for every token.")] = None,
    experts_per_token: Annotated[int | None, typer.Option(help="Default: the model's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.")] = 200,
    temperature: Annotated[float | None, typer.Option(help="Sample at this temperature; default: greedy.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample from this share of the probability.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from this many tokens.")] = None,
    num_beams: Annotated[int, typer.Option(help="Beams; 1 = no beam search.")] = 1,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, ...; default: that of the file.")] = None,
    engine: Annotated[bool, typer.Option("--engine", help="Use the C++ engine: the same answers, faster.")] = False,
    show_routing: Annotated[bool, typer.Option("--show-routing", help="Colour tokens by expert.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print text, tokens and routing as JSON.")] = False,
) -> None:
    """Generate text; answers appear as they are made."""
    from micro.cli.analysis_common import expert_set
    from micro.cli.values import numbers_by_name

    if prompt is None and not chat:
        raise ValueError("give a PROMPT, or --chat to talk line by line")
    if prompt is None and json:
        raise ValueError("--json needs a PROMPT")
    if system is not None and not chat:
        raise ValueError("--system belongs to --chat")
    controls = {
        "ablate": expert_set(ablate),
        "keep": expert_set(keep),
        "bias": numbers_by_name(bias, "--bias"),
        "force": force,
        "experts_per_token": experts_per_token,
    }
    if engine and num_beams != 1:
        raise ValueError("--engine has no beam search; leave --num-beams out")
    sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    drawn = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    chosen = {name: value for name, value in drawn.items() if value is not None}
    sampling |= {"do_sample": bool(chosen), **chosen}
    if repetition_penalty is not None:
        sampling["repetition_penalty"] = repetition_penalty
    given = {n: v for n, v in controls.items() if v is not None}
    session = Session(folder, dtype, sampling, given, seed, show_routing, engine)
    history = [{"role": "system", "content": system}] if system is not None else []
    if prompt is not None:
        answer = session.answer(session.encode(prompt, history, chat), quiet=json)
        if json:
            import json as format_json

            typer.echo(format_json.dumps({"prompt": prompt, **session.as_dict(answer)}, ensure_ascii=False))
        return
    for line in _lines():
        answer = session.answer(session.encode(line, history, chat=True))
        history += [{"role": "user", "content": line}, {"role": "assistant", "content": answer.text}]


def _lines() -> Any:
    """What the user types, until end of input; a question mark is shown on a terminal."""
    while True:
        if sys.stdin.isatty():
            typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.strip()


def open_engine(folder: Path, dtype: Any) -> Any:
    """The engine over a folder with its tokenizer: ours is mapped, an official one is loaded first."""
    from micro.cli.analysis_common import load_model
    from micro.convert.folders import read_json
    from micro.engine import Engine

    config = folder / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "micro":
        engine = Engine.open(folder, dtype=dtype)
        if engine.tokenizer is not None:
            return engine
    model, tokenizer = load_model(folder)
    return model.engine(dtype=dtype, tokenizer=tokenizer)


@dataclass
class Answer:
    """One answer: its text, ids of prompt and answer, and the routing of both where it was asked for."""

    text: str
    ids: list[int]
    prompt_length: int
    routing: Any


class Session:
    """A loaded model with the options of one command."""

    def __init__(
        self,
        folder: Path,
        dtype: str | None,
        sampling: dict[str, Any],
        controls: dict[str, Any],
        seed: int,
        show_routing: bool,
        engine: bool,
    ) -> None:
        import torch

        from micro.cli.analysis_common import load_model
        from micro.convert.upcycle import resolve_dtype

        wanted = None if dtype is None else resolve_dtype(dtype)
        self.engine: Any = None
        self.model: Any = None
        if engine:
            self.engine = open_engine(folder, wanted)
            self.tokenizer = self.engine.tokenizer
        else:
            self.model, self.tokenizer = load_model(folder)
            self.model = self.model if wanted is None else self.model.to(wanted)
        self.config = (self.engine or self.model).config
        self.sampling, self.controls, self.show_routing, self.seed = sampling, controls, show_routing, seed
        torch.manual_seed(seed)

    def encode(self, text: str, history: list[dict[str, str]], chat: bool) -> Any:
        """Token ids [1,S] of a plain text, or of the conversation with ``text`` as what the user says next."""
        if not chat:
            return self.tokenizer(text, return_tensors="pt")["input_ids"]
        if not self.tokenizer.chat_template:
            raise ValueError("--chat: the tokenizer of this folder has no chat template; leave --chat out")
        messages = [*history, {"role": "user", "content": text}]
        return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]

    def answer(self, ids: Any, *, quiet: bool = False) -> Answer:
        """Generate after ``ids`` and print the answer unless ``quiet``: as it comes, or coloured at the end."""
        if ids.shape[1] == 0:
            raise ValueError("the prompt has no tokens; give some text")
        streamer = None
        if not quiet and not self.show_routing and self.sampling["num_beams"] == 1:
            from transformers import TextStreamer

            streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        whole, routing = self.whole_answer(ids, streamer)
        text = self.tokenizer.decode(whole[ids.shape[1] :], skip_special_tokens=True)
        answer = Answer(text, whole, ids.shape[1], routing)
        if not quiet and self.show_routing:
            typer.echo(self.coloured(answer))
        elif not quiet and streamer is None:
            typer.echo(text)
        return answer

    def whole_answer(self, ids: Any, streamer: Any) -> tuple[list[int], Any]:
        """Ids of prompt and answer, and their routing; the streamer sees tokens as they are made."""
        if self.engine is not None:
            return self.engine_answer(ids, streamer)
        import torch

        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=streamer,
            output_routing=True,
            **self.sampling,
            **self.controls,
        )
        return out.sequences[0].tolist(), out.routing

    def engine_answer(self, ids: Any, streamer: Any) -> tuple[list[int], Any]:
        """As :meth:`whole_answer`, by the engine. Every answer of a conversation draws with a seed of its own."""
        import torch

        names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
        sampling = {name: self.sampling[name] for name in names if name in self.sampling}
        if self.sampling["do_sample"]:
            sampling.setdefault("temperature", 1.0)

        def show(row: int, token: int) -> None:
            streamer.put(torch.tensor([token]))

        if streamer is not None:
            streamer.put(ids)
        out = self.engine.generate(
            ids,
            seed=self.seed,
            on_token=None if streamer is None else show,
            output_routing=True,
            **sampling,
            **self.controls,
        )
        self.seed += 1
        if streamer is not None:
            streamer.end()
        return out.prompts[0] + out.tokens[0], out.routing

    def coloured(self, answer: Answer) -> str:
        """The answer's tokens in the colour of the expert that most layers chose, with usage below.

        The last token was never processed, so it has no routing and is left plain.
        """
        from micro.analysis.routes.views import trace_view
        from micro.report.palette import expert_marks

        view = trace_view("", self.tokenizer, answer.ids, answer.routing, prompt=answer.prompt_length)
        view.experts = names = list(self.config.expert_names)
        last = "" if answer.ids[-1] in self.tokenizer.all_special_ids else self.tokenizer.decode(answer.ids[-1:])
        text = view.to_ansi() + last
        if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
            import re

            text = re.sub(r"\x1b\[[0-9;]*m", "", text)
        usage = self.usage(answer)
        shares = ", ".join(f"{m} {n} {usage[n]:.0%}" for m, n in zip(expert_marks(names), names, strict=True))
        return f"{text}\n\nanswer tokens by layer choices: {shares}"

    def usage(self, answer: Answer) -> dict[str, float]:
        """Share of each expert in the choices of all layers at the answer's tokens (of the prompt's where none is)."""
        part = answer.routing.slots(answer.prompt_length, answer.routing.ids.shape[2])
        part = part if part.ids.shape[2] else answer.routing
        names = self.config.expert_names
        return dict(zip(names, (float(share) for share in part.usage()), strict=True))

    def as_dict(self, answer: Answer) -> dict[str, Any]:
        """What ``--json`` prints: the answer's tokens with the expert most layers chose (None: never processed)."""
        from micro.analysis.routes.views import trace_view
        from micro.data.previews import token_texts

        names = list(self.config.expert_names)
        votes = trace_view("", self.tokenizer, answer.ids, answer.routing).votes()
        texts = token_texts(answer.ids, self.tokenizer)
        tokens = [
            {"text": texts[i], "id": answer.ids[i], "expert": names[votes[i]] if i < len(votes) else None}
            for i in range(answer.prompt_length, len(answer.ids))
        ]
        return {"text": answer.text, "tokens": tokens, "usage": self.usage(answer), "controls": self.controls}
