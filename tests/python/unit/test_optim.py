import copy

import pytest
import torch
from near import assert_near

from micro.optim import AdamW, is_decayed, parameter_groups


def model(dtype=torch.float32):
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5), torch.nn.Linear(5, 1)).to(dtype)


def run(net, optimizer, steps=6, after=None, clip=None):
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        x = torch.randn(8, 6, generator=generator).to(next(net.parameters()).dtype)
        optimizer.zero_grad()
        (net(x) - x.sum(-1, keepdim=True)).square().mean().backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        if after:
            after()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_equals_torch(dtype, clip):
    ours, theirs = model(dtype), model(dtype)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.1}
    run(ours, AdamW(ours.parameters(), **options, max_grad_norm=clip))
    run(theirs, torch.optim.AdamW(theirs.parameters(), **options), clip=clip)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(a.detach(), b.detach(), factor=10)


def test_groups_and_schedulers_set_their_own_rates():
    ours, theirs = model(), model()
    for net, kind in ((ours, AdamW), (theirs, torch.optim.AdamW)):
        optimizer = kind(parameter_groups(net, 0.1), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: n / 3 if n < 3 else 0.5)
        run(net, optimizer, after=schedule.step)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(a.detach(), b.detach(), factor=10)


def test_small_updates_of_bfloat16_parameters_add_up_in_the_master():
    """A step far below the rounding of the parameter moves it after enough steps."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = AdamW([weight], lr=1e-4, weight_decay=0.0)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    master = optimizer.state[weight]["master"]
    assert master.dtype == torch.float32
    assert torch.equal(weight, master.bfloat16())
    torch.testing.assert_close(master, torch.full((4,), 1 - 40e-4))
    assert (weight < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(dtype, tmp_path):
    whole, first = model(dtype), model(dtype)
    run(whole, optimizer := AdamW(whole.parameters(), lr=1e-2, max_grad_norm=1.0))
    run(whole, optimizer)

    run(first, optimizer := AdamW(first.parameters(), lr=1e-2, max_grad_norm=1.0))
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt")
    second = model(dtype)
    second.load_state_dict(saved["model"])
    resumed = AdamW(second.parameters(), lr=5.0)
    resumed.max_grad_norm = 1.0
    resumed.load_state_dict(saved["optimizer"])
    run(second, resumed)
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_loading_does_not_share_memory():
    net = model()
    run(net, optimizer := AdamW(net.parameters()))
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other = AdamW(net.parameters())
    other.load_state_dict(state)
    run(net, other)
    assert torch.equal(state["state"][0]["exp_avg"], before["state"][0]["exp_avg"])


def test_the_state_of_torch_can_be_continued():
    ours, theirs = model(), model()
    run(theirs, old := torch.optim.AdamW(theirs.parameters(), lr=1e-2))
    ours.load_state_dict(theirs.state_dict())
    new = AdamW(ours.parameters(), lr=1e-2)
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    run(theirs, old)
    run(ours, new)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_near(a.detach(), b.detach(), factor=10)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(bad):
    net = model()
    run(net, optimizer := AdamW(net.parameters(), max_grad_norm=1.0))
    weights, state = copy.deepcopy(list(net.parameters())), copy.deepcopy(optimizer.state_dict())
    next(net.parameters()).grad[0, 0] = bad
    optimizer.step()
    assert optimizer.skipped_steps == 1
    for a, b in zip(net.parameters(), weights, strict=True):
        assert torch.equal(a, b)
    for key, saved in state["state"].items():
        for name, value in saved.items():
            assert torch.equal(torch.as_tensor(optimizer.state_dict()["state"][key][name]), torch.as_tensor(value))


def test_ten_in_a_row_are_too_many_and_a_good_one_starts_the_count_again():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight])
    good, bad = torch.ones(2), torch.tensor([1.0, torch.nan])
    for gradient in [bad] * 9 + [good] + [bad] * 9:
        weight.grad = gradient
        optimizer.step()
    assert optimizer.skipped_steps == 18
    with pytest.raises(FloatingPointError, match="nan in 10 steps in a row"):
        weight.grad = bad
        optimizer.step()


def test_frozen_parameters_have_no_state_and_none_at_all_is_no_error():
    net = model()
    net[0].weight.requires_grad_(False)
    run(net, optimizer := AdamW(net.parameters()))
    assert net[0].weight not in optimizer.state
    assert len(optimizer.state) == 5
    optimizer.zero_grad()
    optimizer.step()


def test_a_closure_is_called_once_with_gradients():
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = AdamW([weight], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2
    assert (weight < 1).all()


@pytest.mark.parametrize(
    "name, decayed",
    [
        ("model.layers.3.blocks.q_proj.weight", True),
        ("model.layers.3.blocks.input_norm.weight", False),
        ("model.layers.3.blocks.k_norm.weight", False),
        ("model.layers.3.post_attention_layernorm.weight", False),
        ("model.layers.3.router.in_proj.weight", True),
        ("model.norm.weight", False),
        ("norm.weight", False),
        ("model.embed_tokens.weight", True),
        ("lm_head.weight", True),
        ("lm_head.bias", False),
        ("weight", True),
    ],
)
def test_norm_gains_and_biases_do_not_decay(name, decayed):
    assert is_decayed(name) == decayed


def test_parameter_groups_leave_frozen_parameters_out():
    net = torch.nn.ModuleDict({"proj": torch.nn.Linear(2, 2), "input_norm": torch.nn.LayerNorm(2)})
    net["proj"].bias.requires_grad_(False)
    decay, rest = parameter_groups(net, 0.2)
    assert decay["params"] == [net["proj"].weight]
    assert decay["weight_decay"] == 0.2
    assert len(rest["params"]) == 2
    assert rest["weight_decay"] == 0
    with pytest.raises(ValueError, match="no trainable parameter"):
        parameter_groups(net.requires_grad_(False), 0.2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"lr": -1.0}, "lr must lie in"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] must lie in \[0, 1.0\), got 1.0"),
        ({"eps": float("nan")}, "eps must lie in"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must lie in"),
    ],
)
def test_a_wrong_number_is_named(change, words):
    with pytest.raises(ValueError, match=words):
        AdamW([torch.nn.Parameter(torch.ones(1))], **change)


def test_sparse_gradients_and_half_are_refused():
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="dense gradients"):
        AdamW(embedding.parameters()).step()
    weight = torch.nn.Parameter(torch.ones(2).half())
    weight.grad = torch.ones_like(weight)
    with pytest.raises(TypeError, match="float32, float64 or bfloat16"):
        AdamW([weight]).step()
