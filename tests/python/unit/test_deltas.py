import json
import sys

import numpy as np
import pytest
import torch
from dense_models import dense, official_config, write_official
from dense_models import official_tensors as official_files
from matplotlib.figure import Figure

import micro
from micro import deltas as md
from micro.convert.tensors import official_tensors
from micro.deltas.interference import factors, interference_of
from micro.deltas.merged import write_tensors
from micro.deltas.ties import _thresholds, merge

EXPERTS = ("logic", "social", "world", "language")


def mixture_of(base, seed=1, size=0.05, equal=False, kind="block"):
    """The base upcycled, and random deltas planted into its experts."""
    model = micro.upcycle(base, kind=kind, verify=False)
    generator = torch.Generator().manual_seed(seed)
    planted = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".blocks." not in name:
                continue
            shape = parameter.shape[1:] if equal else parameter.shape
            noise = torch.randn(shape, generator=generator).to(parameter.dtype) * size
            parameter.add_(noise)
            planted[name.split(".")[2], name.split(".")[4]] = parameter.detach().clone()
    return model, planted


@pytest.fixture(scope="module")
def base():
    return dense()


@pytest.fixture(scope="module")
def mixture(base):
    return mixture_of(base)[0]


@pytest.fixture(scope="module")
def deltas(base, mixture):
    return md.ExpertDeltas(mixture, base)


def block_state(model):
    return {k: v for k, v in model.state_dict().items() if ".layers." in k}


def assert_equal_states(got, want):
    assert got.keys() == want.keys()
    for key in want:
        assert torch.equal(got[key], want[key]), key


# ------------------------------------------------------------------ task vectors
def test_a_delta_is_the_expert_minus_the_base(base, mixture, deltas):
    state, tensors = base.state_dict(), official_tensors(mixture)
    assert len(deltas.groups) == 2 * 9
    for group in deltas.groups:
        tau = deltas.tau(group)
        assert tau.dtype == torch.float64
        for e, key in enumerate(group.keys):
            assert torch.equal(tau[e], tensors[key].double() - state[group.dense].double())


def test_without_a_base_deltas_are_from_the_mean_and_say_so(mixture):
    deltas = md.ExpertDeltas(mixture)
    assert deltas.base_name == "mean of the experts"
    mean = micro.collapse(mixture, "mean").state_dict()
    for group in deltas.groups:
        assert torch.equal(deltas.base(group), mean[group.dense])
        assert float(deltas.tau(group).sum(0).abs().max()) < 1e-6
    assert md.compare(deltas).unrelated_cosine == pytest.approx(-1 / 3)


@pytest.mark.parametrize("kind", ["block", "ffn"])
@pytest.mark.parametrize("family", ["llama", "olmo2"])
def test_zero_scale_returns_the_bits_of_the_base(family, kind):
    base = dense(family)
    deltas = md.ExpertDeltas(mixture_of(base, kind=kind)[0], base)
    for merged in (
        md.ties(deltas, scale=0.0, shared=0.0),
        md.add(deltas, "logic", scale=0.0, shared=0.0),
        md.decorrelated(deltas, scale=0.0, shared=0.0),
    ):
        assert_equal_states(merged.dense().state_dict(), base.state_dict())


def test_adding_one_delta_gives_the_expert(mixture, deltas):
    for index, name in enumerate(EXPERTS):
        got = md.add(deltas, name).dense().state_dict()
        assert_equal_states(got, micro.collapse(mixture, "expert", expert=index).state_dict())


def test_combination_negation_and_analogy_are_sums_of_deltas(base, deltas):
    state = base.state_dict()
    negated = md.negate(deltas, ["social"], scale=0.5)
    sums = md.combine(deltas, {"logic": 2, "language": -1, "world": 0}, scale=0.25)
    analogy = md.analogy(deltas, "logic", "social", "logic")  # logic + (social - logic)
    for group in deltas.groups:
        tau, theta = deltas.tau(group), state[group.dense].double()
        assert torch.equal(negated.tensor(group), (theta - 0.5 * tau[1]).float())
        assert torch.equal(sums.tensor(group), (theta + 0.25 * (2 * tau[0] - tau[3])).float())
        assert torch.equal(analogy.tensor(group), (theta + tau[1]).float())
    assert sums.settings["coefficients"] == {"logic": 2.0, "language": -1.0}


def test_shared_weights_go_from_the_base_to_the_mixture(base):
    mixture, _ = mixture_of(base)
    with torch.no_grad():
        mixture.model.embed_tokens.weight.add_(1.0)
    deltas = md.ExpertDeltas(mixture, base)
    before = base.state_dict()["model.embed_tokens.weight"]
    for shared in (0.0, 0.5, 1.0):
        got = md.add(deltas, "logic", shared=shared).dense().state_dict()["model.embed_tokens.weight"]
        assert torch.allclose(got, before + shared, atol=1e-6)


def test_negation_hurts_what_the_expert_learned_and_little_else():
    base = dense(seed=3)
    model = micro.upcycle(base, verify=False)
    generator = torch.Generator().manual_seed(0)
    tasks = torch.randint(3, 97, (2, 4, 16), generator=generator)  # rows to learn by heart for two experts
    blocks = [p for n, p in model.named_parameters() if ".blocks." in n]
    optimizer = torch.optim.SGD(blocks, lr=0.05)
    for _ in range(15):
        for e, ids in enumerate(tasks):
            model.train()(input_ids=ids, labels=ids, force=EXPERTS[e]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    deltas = md.ExpertDeltas(model.eval(), base)

    def loss(dense_model, ids):
        with torch.no_grad():
            return float(dense_model(input_ids=ids, labels=ids).loss)

    before = [loss(base, ids) for ids in tasks]
    added, negated = md.add(deltas, "logic").dense(), md.negate(deltas, "logic").dense()
    assert loss(added, tasks[0]) < before[0] - 0.3
    rise = [loss(negated, ids) - b for ids, b in zip(tasks, before, strict=True)]
    assert rise[0] > 0.3
    assert abs(rise[1]) < 0.5 * rise[0]


def test_an_expert_of_another_run_is_grafted(base, deltas):
    other = mixture_of(base, seed=9)[0]
    model = md.graft(deltas, md.ExpertDeltas(other, base), "world").into("social")
    theirs = dict(other.named_expert_parameters("world"))
    ours = dict(deltas.mixture.model.named_parameters())
    for name, parameter in model.named_parameters():
        if ".blocks." in name:
            assert torch.equal(parameter[1], theirs[name])
            assert torch.equal(parameter[[0, 2, 3]], ours[name][[0, 2, 3]])
        else:
            assert torch.equal(parameter, ours[name])


# ------------------------------------------------------------------ TIES
def slow_ties(tau, density):
    """The definition in loops: tau [n, entries]."""
    n, size = tau.shape
    kept = np.zeros_like(tau)
    for t in range(n):
        k = max(1, round(density * size))
        for p in np.argsort(-np.abs(tau[t]), kind="stable")[:k]:
            kept[t, p] = tau[t, p]
    out = np.zeros(size)
    for p in range(size):
        elected = np.sign(kept[:, p].sum())
        agreeing = [v for v in kept[:, p] if np.sign(v) == elected and elected != 0]
        out[p] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return out


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5, 1.0])
def test_ties_agrees_bit_by_bit_with_the_definition(density):
    tau = torch.randn(3, 40, 30, generator=torch.Generator().manual_seed(0)).double()
    tau = tau.float().double()  # thresholds are compared in float32
    limits = None if density == 1 else _thresholds(lambda: iter([tau]), density)
    want = slow_ties(tau.flatten(1).numpy(), density)
    assert np.array_equal(merge(tau, limits).flatten().numpy(), want)


def test_thresholds_are_the_kth_largest_over_a_stream():
    generator = torch.Generator().manual_seed(4)
    parts = [torch.randn(2, n, generator=generator) * 10.0 ** (n % 7 - 3) for n in (5, 700, 1, 4000)]
    parts.append(torch.zeros(2, 100))
    everything = torch.cat(parts, 1).abs()
    for density in (1e-9, 0.01, 0.3, 0.999, 1.0):
        k = max(1, round(density * everything.shape[1]))
        want = everything.sort(1, descending=True).values[:, k - 1]
        assert torch.equal(_thresholds(lambda: iter(parts), density), want)


def test_equal_deltas_return_themselves(base):
    mixture, _ = mixture_of(base, equal=True)
    deltas = md.ExpertDeltas(mixture, base)
    want = micro.collapse(mixture, "expert", expert=0).state_dict()
    assert_equal_states(md.ties(deltas, density=1.0).dense().state_dict(), want)


def test_the_model_trim_reads_all_tensors_together(deltas):
    everything = torch.cat([deltas.tau(group).flatten(1) for group in deltas.groups], 1).float().double()
    k = round(0.1 * everything.shape[1])
    limits = everything.abs().sort(1, descending=True).values[:, k - 1]
    merged = md.ties(deltas, density=0.1)
    for group in deltas.groups:
        assert torch.equal(merged.delta(group), merge(deltas.tau(group), limits))
    per_tensor = md.ties(deltas, density=0.1, trim="tensor")
    group = deltas.groups[0]
    assert not torch.equal(per_tensor.delta(group), merged.delta(group))


# ------------------------------------------------------------------ singular vectors
def orthogonal_taus(n=3, a=24, b=20, k=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(m, n * k, generator=generator, dtype=torch.float64))[0] for m in (a, b))
    s = torch.rand(n * k, generator=generator, dtype=torch.float64) + 0.5
    parts = [slice(i * k, (i + 1) * k) for i in range(n)]
    return torch.stack([(u[:, p] * s[p]) @ v[:, p].mT for p in parts])


def test_orthogonal_deltas_do_not_interfere_and_equal_ones_do():
    tau = orthogonal_taus()
    found = factors(tau, 4)
    assert interference_of(found.u, found.s, found.v) < 1e-10
    same = factors(tau[:1].repeat(3, 1, 1), 4)
    # (J - 1)^2 of the 3 x 3 matrix of ones J sums to n (n-1)^2
    assert interference_of(same.u, same.s, same.v) == pytest.approx(3 * 4 * float(same.s[0].sum()), rel=1e-9)


def plant(base, taus):
    """A mixture whose q_proj of layer 1 has the given deltas, and no other."""
    model = micro.upcycle(base, verify=False)
    with torch.no_grad():
        model.model.layers[1].blocks.q_proj.weight.add_(taus)
    return model


def test_merging_of_orthogonal_deltas_is_their_exact_sum():
    base = dense().double()
    taus = orthogonal_taus(4, 32, 32, 3)
    deltas = md.ExpertDeltas(plant(base, taus), base)
    merged = md.decorrelated(deltas)
    group = next(deltas.select([1], ["q_proj"]))
    assert torch.allclose(merged.delta(group), taus.sum(0), atol=1e-12)
    row = md.interference(deltas, layers=[1], matrices=["q_proj"], rank=3).rows[0]
    assert row["interference"] < 1e-10 < row["random_low"] <= row["random"] <= row["random_high"]
    assert row["energy"] == pytest.approx([1.0] * 4)


def test_random_deltas_interfere_as_random_directions_do(deltas):
    report = md.interference(deltas, matrices=["q_proj", "up_proj"], rank=4, controls=20, seed=3)
    for row in report.rows:
        assert 0.5 * row["random_low"] < row["interference"] < 1.5 * row["random_high"]


def test_the_error_of_low_rank_is_that_of_eckart_and_young(deltas):
    report = md.LowRank(deltas, fraction=0.25).report(matrices=["up_proj"])
    group = next(deltas.select([0], ["up_proj"]))
    for e, tau in enumerate(deltas.tau(group).numpy()):
        s = np.linalg.svd(tau, compute_uv=False)
        row = report.rows[0]
        assert row["rank"] == 8
        assert row["relative_error"][e] == pytest.approx(np.sqrt((s[8:] ** 2).sum() / (s**2).sum()), rel=1e-5)
        assert row["spectral_error"][e] == pytest.approx(s[8], rel=1e-5)
    assert report.size == pytest.approx(1 + 4 * 8 * (32 + 48) / (32 * 48))


def test_a_low_rank_expert_stays_within_its_bound(deltas):
    low = md.LowRank(deltas, rank=6)
    group = next(deltas.select([1], ["down_proj"]))
    bound = low.report(layers=[1], matrices=["down_proj"]).rows[0]["spectral_error"]
    full, cut = deltas.stack(group).double(), low.tensors(group).double()
    x = torch.randn(group.shape[1], 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for e in range(4):
        error = ((full[e] - cut[e]) @ x).norm(dim=0)
        assert float((error / x.norm(dim=0)).max()) <= bound[e] * (1 + 1e-4)
    assert torch.equal(md.LowRank(deltas, fraction=1.0).tensors(group), deltas.stack(group))


def test_the_randomised_decomposition_finds_planted_directions(monkeypatch):
    monkeypatch.setattr(sys.modules["micro.deltas.interference"], "RANDOMISED_FROM", 16)
    tau = orthogonal_taus(2, 80, 90, 5) + 1e-6 * torch.randn(2, 80, 90, dtype=torch.float64)
    few, exact = factors(tau, 5), torch.linalg.svd(tau)
    assert torch.allclose(few.s, exact.S[:, :5], rtol=1e-6)
    assert torch.equal(few.s, factors(tau, 5).s)


# ------------------------------------------------------------------ comparison
def test_norms_and_cosines_of_planted_deltas():
    base = dense().double()
    one, other = orthogonal_taus(2, 32, 32, 4)
    taus = torch.stack([one, 3 * one, -one, other])
    report = md.compare(md.ExpertDeltas(plant(base, taus), base))
    row = next(r for r in report.rows if r["layer"] == 1 and r["matrix"] == "q_proj")
    assert row["norm"] == pytest.approx([float(t.norm()) for t in taus], rel=1e-9)
    cosine = np.array(row["cosine"])
    assert cosine[0] == pytest.approx([1, 1, -1, 0], abs=1e-9)
    assert np.array(report.overall["cosine"])[0] == pytest.approx([1, 1, -1, 0], abs=1e-9)
    untouched = next(r for r in report.rows if r["layer"] == 0)
    assert untouched["norm"] == [0, 0, 0, 0]
    assert untouched["changed"] == [0, 0, 0, 0]
    assert report.by_layer()[1]["norm"] == pytest.approx(row["norm"])


def test_unrelated_deltas_have_cosines_near_zero(deltas):
    report = md.compare(deltas)
    cosine = np.array(report.overall["cosine"])[np.triu_indices(4, 1)]
    assert np.abs(cosine).max() < 5 / np.sqrt(report.overall["entries"])


def test_results_are_saved_loaded_and_drawn(deltas, tmp_path):
    low = md.LowRank(deltas, rank=2).report(layers=[0])
    for result in (md.compare(deltas), md.interference(deltas, layers=[0, 1], rank=2), low):
        result.save(tmp_path)
        again = type(result).load(tmp_path)
        assert again == result
        assert isinstance(again.plot(), Figure)
        assert len(str(result).splitlines()) >= 2
        assert len((tmp_path / f"{result.name}.csv").read_text().splitlines()) == len(result.table()) + 1


# ------------------------------------------------------------------ folders
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_folders_are_read_and_written_tensor_by_tensor(tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    base = dense(dtype=dtype)
    mixture, _ = mixture_of(base)
    mixture.save_pretrained(tmp_path / "mixture")
    base.save_pretrained(tmp_path / "base")
    on_disk = md.ExpertDeltas(tmp_path / "mixture", tmp_path / "base")
    in_memory = md.ties(md.ExpertDeltas(mixture, base), density=0.3)
    merged = md.ties(on_disk, density=0.3)
    assert on_disk.mixture.model is None
    folder = merged.save_dense(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    assert_equal_states(loaded.state_dict(), in_memory.dense().state_dict())
    assert json.loads((folder / "deltas.json").read_text())["density"] == 0.3

    into = micro.load(merged.save_into("world", tmp_path / "into"))
    assert_equal_states(into.state_dict(), in_memory.into("world").state_dict())
    assert_equal_states(in_memory.into("world").state_dict(), merged.into("world").state_dict())
    cut = md.LowRank(on_disk, rank=3)
    assert_equal_states(micro.load(cut.save(tmp_path / "low")).state_dict(), cut.model().state_dict())
    assert not list(tmp_path.glob(".*"))


def test_a_mixture_that_was_just_upcycled_is_a_base_too(base, mixture, deltas):
    fresh = micro.upcycle(base, verify=False)
    again = md.ExpertDeltas(mixture, fresh)
    assert torch.equal(again.tau(again.groups[3]), deltas.tau(deltas.groups[3]))
    with pytest.raises(ValueError, match="share no base"):
        md.ExpertDeltas(mixture, mixture_of(base, seed=5)[0]).tau(deltas.groups[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_base_and_factors_make_the_mixture_again(tmp_path, dtype):
    base = dense(dtype=dtype)
    low = md.LowRank(md.ExpertDeltas(mixture_of(base)[0], base), rank=4)
    folder = md.save_compact(low, tmp_path / "compact")
    got, want = md.load_compact(folder).state_dict(), low.model().state_dict()
    for key in want:
        if any(word in key for word in ("norm", "embed", "head", "router")):
            assert torch.equal(got[key], want[key]), key
        assert float((got[key] - want[key]).abs().max()) <= (1e-6 if dtype == torch.float32 else 0.02), key
    low.save(tmp_path / "whole")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("compact", "whole")]
    assert sizes[0] < 0.65 * sizes[1]
    (folder / "compact.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="format 2 is not 1"):
        md.load_compact(folder)


@pytest.mark.parametrize(
    "family, kind, revision", [("llama", "block", "r1"), ("olmo2", "block", "r1"), ("llama", "ffn", "r2")]
)
def test_official_folders_are_read(tmp_path, family, kind, revision):
    tensors = official_files(family, kind)
    folder = write_official(tmp_path / "official", official_config(family, kind, revision), tensors, shards=2)
    deltas = md.ExpertDeltas(folder)
    key = deltas.groups[0].keys[2]
    assert torch.equal(deltas.stack(deltas.groups[0])[2], tensors[key])
    out = md.add(deltas, "logic").save_dense(tmp_path / "dense")
    want = micro.collapse(folder, "expert", expert="logic").state_dict()
    from transformers import AutoModelForCausalLM

    got = AutoModelForCausalLM.from_pretrained(out, dtype="auto").state_dict()
    for name in want:
        assert torch.allclose(got[name], want[name], atol=1e-6), name
    into = micro.load(md.negate(deltas, "world").save_into("world", tmp_path / "into"))
    assert torch.equal(official_tensors(into)[deltas.groups[1].keys[0]], tensors[deltas.groups[1].keys[0]])
    fields = json.loads((tmp_path / "into" / "config.json").read_text())
    assert (fields["architectures"], fields["dtype"]) == (["MiCRoForCausalLM"], "float32")


def test_shards_hold_all_tensors(tmp_path):
    from safetensors.torch import load_file

    tensors = {f"t{i}": torch.randn(10, i + 1) for i in range(5)}
    entries = [(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    write_tensors(tmp_path, entries, torch.float32, shard_bytes=300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 150
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])
    with pytest.raises(ValueError, match=r"made a tensor \[2\], expected \[3\]"):
        write_tensors(tmp_path, [("x", (3,), lambda: torch.zeros(2))], torch.float32)


# ------------------------------------------------------------------ refusals
def test_bad_input_is_named(base, mixture, deltas, tmp_path):
    with pytest.raises(ValueError, match=r"is not what .* was cloned from"):
        md.ExpertDeltas(mixture, dense(intermediate_size=64))
    with pytest.raises(ValueError, match="it has more than 2 layers"):
        md.ExpertDeltas(mixture, dense(num_hidden_layers=3))
    with pytest.raises(TypeError, match="expected a MiCRoForCausalLM"):
        md.ExpertDeltas(base)
    with pytest.raises(ValueError, match="unknown expert 'maths'"):
        md.negate(deltas, "maths")
    with pytest.raises(ValueError, match=r"density must lie in \(0, 1\], got 20"):
        md.ties(deltas, density=20)
    with pytest.raises(ValueError, match="trim must be"):
        md.ties(deltas, trim="layer")
    with pytest.raises(ValueError, match="must be finite"):
        md.combine(deltas, {"logic": float("nan")})
    with pytest.raises(ValueError, match="either fraction or rank"):
        md.LowRank(deltas)
    with pytest.raises(ValueError, match=r"unknown \['qproj'\]"):
        md.compare(deltas, matrices=["qproj"])
    with pytest.raises(ValueError, match="at least two experts"):
        md.interference(deltas, ["logic"])
    with pytest.raises(ValueError, match="fit beside each other"):
        md.decorrelated(deltas, rank=9)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        md.add(deltas, "logic").save_dense(tmp_path)
