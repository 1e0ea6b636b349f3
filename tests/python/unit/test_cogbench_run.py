"""S_BRE, agents, runs that resume, results and the command."""

import copy
import json

import numpy as np
import pandas as pd
import pytest
import torch
from small_models import small_model

from micro import interventions as iv
from micro import steering
from micro.cli import main
from micro.evaluation import cogbench
from micro.evaluation.cogbench.baselines import BEHAVIOUR, PERFORMANCE
from micro.evaluation.cogbench.run import random_values

GPT4 = {
    "behaviour": dict(
        zip(
            BEHAVIOUR,
            [0.605221, 0.287137, -0.313176, 0.002876, 0.735378, 0.407609, 0.444693, 0.159535, 10.0, 9.465556],
            strict=True,
        )
    ),
    "performance": dict(zip(PERFORMANCE, [0.849314, 53.465695, 57.361788, 0.586458, 0.534000, 5.472222], strict=True)),
}
RELATIVE = [0.6919, 0.2997, 0.7262, 0.1143, 0.7066, 0.1195, 2.7199, 6.2538, 0.7487, 0.5221]
RELATIVE_PERFORMANCE = [0.9024, 2.5617, 1.5056, 1.5799, 1.2602, 0.3850]


class Counting(cogbench.RandomAgent):
    """The random agent, with its questions counted and some of its replies lost."""

    def __init__(self, seed=0, lost=None):
        super().__init__(seed)
        self.asked, self.lost = 0, lost

    def answer(self, queries, runs):
        self.asked += len(queries)
        replies = super().answer(queries, runs)
        return replies if self.lost is None else [self.lost] * len(replies)


def strip(result):
    return {key: value for key, value in result.to_dict().items() if key != "settings"}


# ------------------------------------------------------------------ S_BRE
def test_golden_s_bre():
    found = cogbench.s_bre(GPT4)
    assert found.behaviour == pytest.approx(0.4457, abs=1e-4)
    assert found.performance == pytest.approx(0.6281, abs=1e-4)
    assert found.mean == pytest.approx((0.4457 + 0.6281) / 2, abs=1e-4)
    assert list(found.relative["behaviour"].values()) == pytest.approx(RELATIVE, abs=1e-4)
    assert list(found.relative["performance"].values()) == pytest.approx(RELATIVE_PERFORMANCE, abs=1e-4)
    assert found.missing == ()


def test_humans_score_one_and_chance_scores_zero():
    for values, wanted in ((cogbench.HUMAN, 1), (cogbench.RANDOM, 0)):
        found = cogbench.s_bre(values)
        assert found.behaviour == pytest.approx(wanted)
        assert found.performance == pytest.approx(wanted)


def test_s_bre_takes_scores_by_experiment_and_lists_what_is_missing():
    found = cogbench.s_bre({"balloon": {"risk taking": 9.465556, "performance": 5.472222}})
    assert found.behaviour == pytest.approx(0.5221, abs=1e-4)
    assert found.performance == pytest.approx(0.3850, abs=1e-4)
    assert len(found.missing) == 14
    assert cogbench.s_bre({"temporal_discounting": {"temporal discounting": 10.0}}).performance is None


def test_errors_of_s_bre():
    with pytest.raises(ValueError, match="did you mean 'risk taking'"):
        cogbench.s_bre({"balloon": {"risk takin": 1.0}})
    with pytest.raises(ValueError, match="expected finite numbers"):
        cogbench.s_bre({"balloon": {"risk taking": float("nan")}})
    with pytest.raises(ValueError, match="has no length"):
        cogbench.relative_error(1.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="random has no value for 'risk taking'"):
        cogbench.s_bre({"balloon": {"risk taking": 1.0}}, random={"behaviour": {}, "performance": {}})


def test_the_human_value_of_reasoning_depends_on_the_preset():
    assert cogbench.human_values("published") == cogbench.HUMAN
    assert cogbench.human_values("clean")["performance"]["probabilistic_reasoning"] == 0.827709


# ------------------------------------------------------------------ reading replies
def query(*options, default=None):
    return cogbench.Query("Machine ", options, default)


@pytest.mark.parametrize(
    "reply, clean, published",
    [
        ("J", 1, 1),
        (" F\n", 0, 0),
        ("F.", 0, None),
        ("f", 0, None),
        ("Fish", None, None),
        ("xJ", None, 1),
        ("", None, None),
        ("\n\n", None, None),
        ("12", None, None),
    ],
)
def test_letters_are_read_at_the_start_and_by_published_rules_at_the_end(reply, clean, published):
    assert query("F", "J").read(reply) == clean
    assert query("F", "J").read(reply, "published") == published


@pytest.mark.parametrize(
    "reply, number", [("73", 0.73), (" 5.", 0.5), ("07 ", 0.07), ("x", None), ("", None), (".5", None)]
)
def test_decimals_are_read(reply, number):
    assert query().read(reply) == number


def test_options_of_one_digit():
    assert query("1", "2").read("2 because") == 1
    assert query("1", "2").read("12") is None


def test_unreadable_replies_are_counted_and_drawn():
    table, replies = cogbench.play("two_step", Counting(lost="?"), runs=20)
    assert replies == {"questions": 800, "unreadable": 800}
    assert 0.4 < (table["action1"] == "X").mean() < 0.6
    table, replies = cogbench.play("restless_bandit", Counting(lost="J"), runs=2)
    assert replies == {"questions": 320, "unreadable": 160}
    assert (table["confidence"] == 0).all()
    assert (table["choice"] == 1).all()


# ------------------------------------------------------------------ environments
PREFIXES = {
    "probabilistic_reasoning": r"is 0\.$",
    "horizon": "Machine $",
    "restless_bandit": r"(?:Machine |Machine [FJ] with confidence 0\.)$",
    "instrumental": "Machine $",
    "two_step": "(?:Planet|Alien) $",
    "temporal_discounting": "I prefer option $",
    "balloon": "Option $",
}


@pytest.mark.parametrize("name", cogbench.EXPERIMENTS)
def test_prompts_end_with_the_forced_prefix_and_environments_repeat(name):
    texts = []

    class Listening(cogbench.RandomAgent):
        def answer(self, queries, runs):
            texts.extend(query.text for query in queries)
            return super().answer(queries, runs)

    tables = [cogbench.play(name, Listening(5), runs=2, seed=9)[0] for _ in range(2)]
    pd.testing.assert_frame_equal(*tables)
    assert set(cogbench.EXPERIMENTS[name].columns) <= set(tables[0].columns)
    assert texts[: len(texts) // 2] == texts[len(texts) // 2 :]
    told = pd.Series(texts)
    assert told.str.contains(PREFIXES[name]).all()
    assert told.str.contains(r"\n\nQ: [^\n]+\? \(Answer with [^\n]+\)\n\nA: ").all()
    assert told.str.count("\n\nQ: ").eq(1).all()
    if name != "temporal_discounting":
        other, _ = cogbench.play(name, Listening(5), runs=2, seed=10)
        assert not other.equals(tables[0])


# ------------------------------------------------------------------ models
def test_a_tiny_model_plays_everything_and_the_engine_answers_like_the_model(player, short, tmp_path):
    model, tokenizer = player
    runs = 3
    results = {}
    for engine in (True, False):
        agent = cogbench.ModelAgent(model, tokenizer, engine=engine, batch_size=2)
        results[engine] = cogbench.run(agent, runs=runs, draws=50, baseline="published")
    assert strip(results[True]) == strip(results[False])
    result = results[True]
    assert list(result.scores) == list(cogbench.EXPERIMENTS)
    assert [m for s in result.scores.values() for m in s if m != "performance"] == list(BEHAVIOUR)
    assert sum("performance" in s for s in result.scores.values()) == 6
    assert result.missing == []
    assert model.training is False


def test_a_batch_and_padding_change_no_answer(player):
    model, tokenizer = player
    queries = [cogbench.Query("The ball is " * n, ()) for n in (1, 5, 3, 9)]
    alone = [cogbench.ModelAgent(model, tokenizer, engine=False, batch_size=1).answer(queries, range(4))]
    for engine in (False, True):
        alone.append(cogbench.ModelAgent(model, tokenizer, engine=engine).answer(queries, range(4)))
    assert alone[0] == alone[1] == alone[2]


def test_what_the_engine_has_read_changes_no_answer(player):
    model, tokenizer = player
    asked = [
        ([0, 1, 2], ["One ball is red", "Two balls are red", "A"]),
        ([0, 1, 2], ["One ball is red and one", "Two balls are red", "B"]),
        ([2, 0], ["B is here", "One ball is blue"]),
        ([0], ["One"]),
        ([0, 5], ["One", "Five"]),
    ]
    reading = cogbench.ModelAgent(model, tokenizer, engine=True, max_new_tokens=4)
    plain = cogbench.ModelAgent(model, tokenizer, engine=False, max_new_tokens=4)
    for runs, texts in asked:
        queries = [cogbench.Query(text) for text in texts]
        assert reading.answer(queries, runs) == plain.answer(queries, runs)


def test_the_space_of_a_forced_beginning_is_left_to_the_model_unless_published(player):
    model, tokenizer = player
    read = []

    class Listening:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, text):
            read.append(text)
            return tokenizer(text)

    for preset, end in (("clean", "\n\nA: Machine"), ("published", "\n\nA: Machine ")):
        cogbench.run(model, Listening(), experiments="horizon", preset=preset, runs=1, draws=2, baseline="published")
        assert read
        assert all(text.endswith(end) for text in read)
        read.clear()


def test_controls_reach_the_model_and_its_name(player):
    model, tokenizer = player
    queries = [cogbench.Query(f"Number {n}: Machine ", ()) for n in range(12)]
    plain = cogbench.ModelAgent(model, tokenizer)
    steered = cogbench.ModelAgent(model, tokenizer, controls={"keep": "social"})
    assert plain.answer(queries, range(12)) != steered.answer(queries, range(12))
    assert plain.name != steered.name
    assert plain.name != cogbench.ModelAgent(small_model(seed=4, vocab_size=512), tokenizer).name


def named(model, tokenizer, **options):
    return cogbench.ModelAgent(model, tokenizer, engine=False, **options).name


def test_the_name_of_a_model_changes_with_any_of_its_weights_and_with_its_config(player):
    tokenizer = player[1]

    def model():
        return small_model(dtype=torch.float32, vocab_size=512)

    plain = named(model(), tokenizer)
    assert named(model(), tokenizer) == plain
    with torch.no_grad():
        for name, _ in model().named_parameters():
            changed = model()
            changed.get_parameter(name).reshape(-1)[-1].add_(1e-3)  # of the last expert
            assert named(changed, tokenizer) != plain, name
    assert named(small_model(dtype=torch.float32, vocab_size=512, num_experts_per_tok=2), tokenizer) != plain


def test_controls_are_told_by_their_content(player):
    base = torch.zeros(1, 1, 1, 4)
    near = base.clone()
    near[..., 2] = 1e-6  # not seen in four digits
    names = [named(*player, controls={"bias": bias}) for bias in (base, base.clone(), near, base.double())]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    mixed = [{"ablate": ["logic", "social"], "experts_per_token": 1}, {"experts_per_token": 1}]
    assert named(*player, controls=mixed[0]) == named(*player, controls=dict(reversed(mixed[0].items())))
    assert named(*player, controls=mixed[0]) != named(*player, controls=mixed[1])
    phases = [steering.Phases(prompt=p, answer="logic") for p in (base, base.clone(), near)]
    names = [named(*player, controls={"bias": phase}) for phase in phases]
    assert names[0] == names[1] != names[2]


def test_another_model_does_not_resume_a_table(player, short, tmp_path):
    options = {"experiments": "horizon", "runs": 1, "draws": 2, "baseline": "published", "output": tmp_path}
    model, tokenizer = player
    cogbench.run(model, tokenizer, **options)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].blocks.down_proj.weight[-1].add_(0.5)
    with pytest.raises(ValueError, match="made with another agent"):
        cogbench.run(other, tokenizer, **options)


def test_a_kept_table_knows_the_blocks_that_were_open(player, tmp_path):
    model, tokenizer = player
    options = {"experiments": "horizon", "runs": 1, "draws": 2, "baseline": "published"}
    kept = tmp_path / "kept"
    with model.intervene(iv.zero("units", experts="logic")):
        with pytest.raises(ValueError, match=r"a block of model\.intervene is open"):
            cogbench.run(model, tokenizer, output=kept, **options)
        cogbench.run(model, tokenizer, **options)
    with pytest.raises(TypeError, match="cannot be compared between runs"):
        cogbench.run(model, tokenizer, output=kept, controls={"force": lambda row, step: None}, **options)
    assert not kept.exists()
    free = cogbench.run(model, tokenizer, output=kept, **options)
    with steering.ablate("logic"), pytest.raises(ValueError, match="made with another steering"):
        cogbench.run(model, tokenizer, output=kept, **options)
    assert strip(cogbench.run(model, tokenizer, output=kept, **options)) == strip(free)
    with steering.ablate("logic"):
        steered = [cogbench.run(model, tokenizer, output=tmp_path / "steered", **options) for _ in range(2)]
    assert steered[0].settings["steering"] == [["ablate", "logic"]]
    assert strip(steered[0]) == strip(steered[1])
    with pytest.raises(ValueError, match="made with another steering"):
        cogbench.run(model, tokenizer, output=tmp_path / "steered", **options)


@pytest.mark.parametrize("engine", [True, False])
def test_open_blocks_reach_the_answers_and_do_not_stay(player, engine):
    model, tokenizer = player
    queries = [cogbench.Query(f"Number {n}: Machine ", ()) for n in range(12)]
    agent = cogbench.ModelAgent(model, tokenizer, engine=engine)
    free = agent.answer(queries, range(12))
    with model.intervene(iv.zero("block_output")):
        still = agent.answer(queries, range(12))
    assert agent.answer(queries, range(12)) == free != still
    with steering.keep("social"):
        steered = agent.answer(queries, range(12))
    wanted = cogbench.ModelAgent(model, tokenizer, engine=False, controls={"keep": "social"}).answer(queries, range(12))
    assert steered == wanted != free
    assert agent.answer(queries, range(12)) == free


def test_a_prompt_that_is_too_long_is_an_error(player):
    model, tokenizer = player
    with pytest.raises(ValueError, match="the model reads 4096 at most"):
        cogbench.ModelAgent(model, tokenizer).answer([cogbench.Query("ball " * 5000)], [0])


# ------------------------------------------------------------------ runs and results
NAMES = ["horizon", "temporal_discounting", "balloon"]


def test_a_run_resumes_and_reads_back(tmp_path, short):
    options = {"runs": 12, "draws": 60, "baseline_runs": 20, "output": tmp_path / "out"}
    first = Counting()
    cogbench.run(first, experiments="horizon", **options)
    again = Counting()
    result = cogbench.run(again, experiments=NAMES, **options)
    questions = {name: result.replies[name]["questions"] for name in NAMES}
    assert first.asked == questions["horizon"]
    assert again.asked == questions["temporal_discounting"] + questions["balloon"]
    assert result.baseline == "own"
    third = Counting()
    assert strip(cogbench.run(third, experiments=NAMES, **options)) == strip(result)
    assert third.asked == 0
    loaded = cogbench.CogBenchResult.load(tmp_path / "out")
    assert loaded == result
    assert str(loaded) == str(result)
    for name in NAMES:
        assert dict(cogbench.score(name, tmp_path / "out" / f"{name}.csv")) == loaded.scores[name]
        assert cogbench.score(name, loaded.tables[name]) == loaded.scores[name]
    with pytest.raises(ValueError, match="made with another runs; name another output folder"):
        cogbench.run(Counting(), experiments="horizon", **(options | {"runs": 13}))
    with pytest.raises(ValueError, match="made with another agent"):
        cogbench.run(Counting(1), experiments="horizon", **options)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_random_agent_that_goes_on_plays_as_one_that_was_never_stopped(batch_size, tmp_path, short):
    class Stops(cogbench.RandomAgent):
        def __init__(self, seed=3, left=10**9):
            super().__init__(seed)
            self.left = left
            if batch_size:
                self.batch_size = batch_size

        def answer(self, queries, runs):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().answer(queries, runs)

    options = {"experiments": ["probabilistic_reasoning", "horizon", "two_step"], "runs": 5, "draws": 5}
    options["baseline"] = "published"
    whole = cogbench.run(Stops(), **options)
    options["output"] = tmp_path
    for left in (4, 40, 10**9):
        try:
            result = cogbench.run(Stops(left=left), **options)
        except KeyboardInterrupt:
            assert left < 10**9
    for name, table in whole.tables.items():
        pd.testing.assert_frame_equal(result.tables[name], table)
    others = [cogbench.play("two_step", cogbench.RandomAgent(seed), runs=5)[0] for seed in (3, 4)]
    assert not others[0].equals(others[1])
    assert others[0].groupby("run")["action1"].apply("".join).nunique() > 1  # runs differ


def test_a_result_prints_a_table_and_draws_from_its_file(tmp_path, short):
    result = cogbench.run(cogbench.RandomAgent(0), runs=6, draws=40, baseline_runs=8)
    result.save(tmp_path)
    loaded = cogbench.CogBenchResult.load(tmp_path / "cogbench.json")
    table = loaded.table()
    assert len(table) == 16
    assert (table["low"] <= table["high"]).all()
    for text in ("S_BRE behaviour", "S_BRE performance", "its own random agent", "replies were unreadable"):
        assert text in str(loaded)
    figure = loaded.plot()
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()][-1] == "balloon"
    assert len(pd.read_csv(tmp_path / "cogbench.csv")) == 16
    assert json.loads((tmp_path / "cogbench.json").read_text())["kind"] == "cogbench"


def test_intervals_cover_the_value_and_one_run_has_none():
    result = cogbench.run(cogbench.RandomAgent(2), experiments=["two_step", "temporal_discounting"], draws=200)
    low, high = result.intervals["two_step"]["performance"]
    value = result.scores["two_step"]["performance"]
    assert low < value < high
    reward = result.tables["two_step"].groupby("run")["reward"].mean()
    assert high - low == pytest.approx(2 * 1.96 * reward.std() / np.sqrt(len(reward)), rel=0.3)
    assert "temporal_discounting" not in result.intervals
    assert (
        cogbench.run(cogbench.RandomAgent(2), experiments="temporal_discounting").s_bre_intervals["behaviour"] is None
    )


def test_presets_choose_human_and_random_values():
    tables = {"probabilistic_reasoning": cogbench.play("probabilistic_reasoning", cogbench.RandomAgent(1))[0]}
    clean, published = (cogbench.summarise(tables, preset=preset, draws=20) for preset in ("clean", "published"))
    assert (clean.baseline, published.baseline) == ("own", "published")
    assert clean.human["performance"]["probabilistic_reasoning"] == 0.827709
    assert published.human["performance"]["probabilistic_reasoning"] == 0.870241
    assert published.random == cogbench.RANDOM
    own = random_values(["probabilistic_reasoning"], seed=1)
    assert clean.random == own
    assert clean.scores == published.scores


# ------------------------------------------------------------------ bad input
def test_errors_of_run(player):
    agent = cogbench.RandomAgent()
    for wrong, message in (
        ({"experiments": "ballon"}, "did you mean 'balloon'"),
        ({"experiments": []}, "experiments is empty"),
        ({"preset": "clear"}, "preset must be 'clean' or 'published'"),
        ({"runs": 0}, "runs of probabilistic_reasoning must be a whole number"),
        ({"runs": {"balloons": 3}}, "did you mean 'balloon'"),
        ({"baseline": "mine"}, "baseline must be 'own' or 'published'"),
        ({"controls": {"ablate": "social"}}, "controls steer a model"),
    ):
        with pytest.raises(ValueError, match=message):
            cogbench.run(agent, **wrong)
    with pytest.raises(TypeError, match="tokenizer is missing"):
        cogbench.run(player[0])
    with pytest.raises(TypeError, match="model must be a causal language model or an agent, got int"):
        cogbench.run(3)


def test_errors_of_score(tmp_path):
    table = pd.DataFrame({"run": [0, 0], "trial": [0, 1], "action1": ["X", "X"], "state": ["X", "Y"]})
    full = table.assign(action2="D", reward=[1, 0])
    assert cogbench.score("two_step", full).details["pairs_of_days"] == 1
    for wrong, message in (
        (table, "two_step: the table has no column 'action2', 'reward'; needed are run"),
        (full[:0], "two_step: the table has no rows"),
        (full.assign(state=["X", "Z"]), "two_step: column 'state', row 1: expected X or Y, got 'Z'"),
        (full.assign(reward=[1, 2]), "two_step: column 'reward', row 1: expected 0 or 1, got 2"),
        (full.assign(reward=[None, 1]), "two_step: column 'reward', row 0: expected a number"),
        (full.assign(run=[0, 1]), "two_step: no run has two days"),
    ):
        with pytest.raises(ValueError, match=message):
            cogbench.score("two_step", wrong)
    with pytest.raises(ValueError, match="did you mean 'two_step'"):
        cogbench.score("twostep", full)
    with pytest.raises(TypeError, match="must be a pandas DataFrame or the path of a CSV file, got dict"):
        cogbench.score("two_step", {})
    with pytest.raises(FileNotFoundError):
        cogbench.score("two_step", tmp_path / "none.csv")
    plays = cogbench.play("horizon", cogbench.RandomAgent(), runs=2)[0]
    with pytest.raises(ValueError, match=r"horizon: game 0 \(counted from 0\) has"):
        cogbench.score("horizon", plays[1:])
    with pytest.raises(ValueError, match="temporal_discounting: column 'score': expected numbers from 0 to 19"):
        cogbench.score("temporal_discounting", pd.DataFrame({"run": [0], "score": [20]}))


def test_the_command(tmp_path, capsys, short):
    out = tmp_path / "out"
    arguments = ["evaluate", "cogbench", "random", "--experiments", "horizon,balloon", "--runs", "8", "-o", str(out)]
    assert main.run([*arguments, "--baseline", "published"]) == 0
    assert "S_BRE performance" in capsys.readouterr().out
    assert {"cogbench.json", "cogbench.csv", "cogbench.png", "cogbench.svg", "horizon.csv"} <= {
        p.name for p in out.iterdir()
    }
    assert main.run([*arguments, "--baseline", "published", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["preset"] == "clean"
    assert main.run(["evaluate", "cogbench", "random", "--experiments", "ballon", "-o", str(out)]) == 2
    assert "did you mean 'balloon'" in capsys.readouterr().err
