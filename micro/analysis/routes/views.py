"""Coloured tokens of one text or record, ready for the page or the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from micro.analysis.batches import IGNORED
from micro.analysis.modes import evaluating
from micro.data.previews import token_texts
from micro.experts import default_names
from micro.report.tokens import TokenView

if TYPE_CHECKING:
    from torch import Tensor

    from micro.data import Record
    from micro.modeling import MiCRoForCausalLM


def trace_view(title: str, tokenizer: Any, ids: list[int], trace: Any, *, row: int = 0, prompt: int = 0) -> TokenView:
    """View of one row of a :class:`~micro.modeling.RoutingTrace`; ids beyond the trace are left out."""
    slots = min(len(ids), trace.probs.shape[2])
    probs = trace.probs[:, row, :slots].float().cpu().numpy()
    names = trace.expert_names or default_names(probs.shape[-1])
    return TokenView(title, token_texts(ids[:slots], tokenizer), probs, names, prompt_length=prompt)


def record_view(model: MiCRoForCausalLM, tokenizer: Any, record: Record, title: str = "", **controls: Any) -> TokenView:
    """Teacher-forced routing of one labelled record, with its labels.

    Raises:
        ValueError: the record cannot be encoded.
    """
    from micro.data import encode

    row = encode(record, tokenizer)
    if row is None:
        raise ValueError("record_view: this record was dropped by encode (no answer left)")
    view = text_view(model, tokenizer, row["input_ids"], title or record.messages()[-2]["content"], **controls)
    answer = [label != IGNORED for label in row["labels"]]
    view.prompt_length = answer.index(True) if True in answer else len(answer)
    view.labels = [int(e) if a else -1 for e, a in zip(row["routing_labels"], answer, strict=True)]
    return view


def text_view(
    model: MiCRoForCausalLM, tokenizer: Any, ids: list[int] | Tensor, title: str, **controls: Any
) -> TokenView:
    """Teacher-forced routing of given token ids."""
    tensor = torch.as_tensor(ids).reshape(1, -1)
    with evaluating(model):
        trace = model.model(input_ids=tensor.to(model.device), use_cache=False, output_routing=True, **controls).routing
    view = trace_view(title, tokenizer, tensor[0].tolist(), trace)
    view.experts = list(model.config.expert_names or view.experts)
    return view
