"""RoutingTrace: numbers that can be counted by hand, parts, files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import random_ids, small_model

from micro.modeling import RoutingTrace


def by_hand(k: int = 1, dtype: torch.dtype = torch.float32) -> RoutingTrace:
    """Two layers, two rows, three slots, the first of row 1 padded; p peaks at (slot + layer) % 4."""
    ids = torch.zeros(2, 2, 3, 4)
    for layer in range(2):
        for slot in range(3):
            ids[layer, :, slot, (slot + layer) % 4] = 3.0
    probs = ids.softmax(-1)
    q, chosen = probs.topk(k, -1)
    mask = torch.tensor([[True, True, True], [False, True, True]])
    weights = (q / q.sum(-1, keepdim=True)).to(dtype)
    return RoutingTrace(chosen.int(), weights, probs, ids, ids.clone(), mask, start=2, prompt_length=4)


def test_usage_counts_real_tokens() -> None:
    trace = by_hand()
    per_layer = torch.tensor([[1, 2, 2, 0], [0, 1, 2, 2]]) / 5
    assert torch.allclose(trace.usage("layer"), per_layer)
    assert torch.allclose(trace.usage(), per_layer.mean(0))
    token = trace.usage("token")
    assert token.shape == (2, 3, 4)
    assert token[0, 0].tolist() == [0.5, 0.5, 0, 0]
    assert token[1, 0].tolist() == [0, 0, 0, 0]
    assert torch.allclose(by_hand(2).usage("token")[0, 0], by_hand().probs[:, 0, 0].mean(0))
    with pytest.raises(ValueError, match="expected None"):
        trace.usage("head")  # type: ignore[arg-type]


def test_printing_shows_shapes_and_no_tensors() -> None:
    text = repr(by_hand())
    assert "layers=2, rows=2, slots=3, k=1, start=2, prompt_length=4" in text
    assert "tensor" not in text


def test_entropy() -> None:
    trace = by_hand()
    p = trace.probs[0, 0, 0].double()
    want = float(-(p * p.log()).sum())
    assert trace.entropy().tolist() == pytest.approx([want, want], rel=1e-6)
    trace.probs = torch.zeros_like(trace.probs)
    trace.probs[..., 1] = 1
    assert trace.entropy().tolist() == [0, 0]
    trace.probs = torch.full_like(trace.probs, 0.25)
    assert trace.entropy().tolist() == pytest.approx([math.log(4)] * 2)


def test_parts() -> None:
    trace = by_hand()
    assert (trace.prompt.start, trace.prompt.ids.shape[2]) == (2, 2)
    assert (trace.answer.start, trace.answer.ids.shape[2]) == (4, 1)
    joined = RoutingTrace.cat([trace.prompt, trace.answer], 4)
    assert torch.equal(joined.probs, trace.probs) and joined.start == 2
    with pytest.raises(ValueError, match="ends before slot 4, the next begins at 2"):
        RoutingTrace.cat([trace.prompt, trace.prompt], 4)
    assert torch.equal(trace.rows(torch.tensor([1, 1, 0])).mask[2], trace.mask[0])


def test_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = by_hand(2).to_frame()
    assert isinstance(frame, pandas.DataFrame)
    assert len(frame) == 2 * 5 * 2
    first = frame.iloc[0]
    assert (first.layer, first.row, first.slot, first["rank"], first.expert, first["name"]) == (0, 0, 2, 0, 0, "logic")
    assert set(frame.slot) == {2, 3, 4}
    assert frame[frame.slot == 4].part.unique().tolist() == ["answer"]
    assert not ((frame.row == 1) & (frame.slot == 2)).any(), "padding is left out"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_files(tmp_path: Path, dtype: torch.dtype) -> None:
    trace = by_hand(2, dtype)
    trace.save(tmp_path / "trace")
    again = RoutingTrace.load(tmp_path / "trace.npz")
    for name in ("ids", "weights", "probs", "logits", "raw_logits", "mask"):
        mine, theirs = getattr(trace, name), getattr(again, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert (again.start, again.prompt_length, again.expert_names) == (2, 4, trace.expert_names)
    assert [p.name for p in tmp_path.iterdir()] == ["trace.npz"]
    assert np.load(tmp_path / "trace.npz", allow_pickle=False)["ids"].shape == (2, 2, 3, 2)


def test_broken_files(tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no zip at all")
    with pytest.raises(ValueError, match=r"bad\.npz: no routing trace"):
        RoutingTrace.load(bad)
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match=r"other\.npz: no routing trace"):
        RoutingTrace.load(tmp_path / "other.npz")
    by_hand().save(bad)
    bad.write_bytes(bad.read_bytes()[:-200])
    with pytest.raises(ValueError, match="no routing trace"):
        RoutingTrace.load(bad)


def test_shapes_are_checked() -> None:
    trace = by_hand()
    with pytest.raises(ValueError, match="mask is"):
        RoutingTrace(trace.ids, trace.weights, trace.probs, trace.logits, trace.raw_logits, trace.mask[:1])
    with pytest.raises(ValueError, match="must be"):
        RoutingTrace(trace.ids[0], trace.weights, trace.probs, trace.logits, trace.raw_logits, trace.mask)


def test_a_trace_holds_no_graph_and_covers_the_call() -> None:
    model = small_model()
    out = model(random_ids(2, 5), output_routing=True, experts_per_token=3)
    trace = out.routing
    assert trace.ids.shape == (2, 2, 5, 3) and trace.ids.dtype == torch.int32
    assert (trace.start, trace.prompt_length) == (0, 5)
    assert not trace.probs.requires_grad and not trace.weights.requires_grad
    assert out.router_logits[0].requires_grad
    assert torch.equal(trace.logits.flatten(1, 2), torch.stack(out.router_logits))
