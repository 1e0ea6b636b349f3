"""Scorers recover what simulated agents were made with."""

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize
from scipy.special import expit, logit

from micro.evaluation import cogbench
from micro.evaluation.cogbench import balloon, temporal_discounting
from micro.evaluation.cogbench.fits import MAX_BETA, Visits, learning_rate, logistic, optimism


class Simulated:
    """An agent that answers by a rule (state, query, random generator) -> index or number."""

    def __init__(self, rule, seed=0):
        self.name, self.rule = "simulated", rule
        self.generator = np.random.default_rng(seed)

    def answer(self, queries, runs):
        return [query.reply(self.rule(query.state, query, self.generator)) for query in queries]


def played(name, rule, runs=None, preset="clean", seed=0):
    table, replies = cogbench.play(name, Simulated(rule), runs=runs, preset=preset, seed=seed)
    assert replies["unreadable"] == 0
    return table


# ------------------------------------------------------------------ 1 probabilistic reasoning
def believer(prior_weight, likelihood_weight):
    def rule(state, query, generator):
        likelihood = state["share"] if state["red"] else 1 - state["share"]
        return expit(prior_weight * logit(state["prior"]) + likelihood_weight * logit(likelihood))

    return rule


@pytest.mark.parametrize("preset", ["clean", "published"])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.6, 0.3), (-0.4, 1.5)])
def test_weights_of_prior_and_likelihood_are_recovered(weights, preset):
    score = cogbench.score("probabilistic_reasoning", played("probabilistic_reasoning", believer(*weights)), preset)
    assert score["prior weighting"] == pytest.approx(weights[0], abs=2e-3)
    assert score["likelihood weighting"] == pytest.approx(weights[1], abs=2e-3)
    assert (score["performance"] > 0.9999) == (weights == (1.0, 1.0))


def test_the_largest_errors_count_in_the_performance():
    table = pd.DataFrame({"run": range(40), "informative_lh": True, "prior": 0.5, "lh": 0.5, "red_observation": True})
    table["left_pred"] = 0.5
    table.loc[3, "left_pred"] = 0.9
    for preset in ("clean", "published"):
        assert cogbench.score("probabilistic_reasoning", table, preset)["performance"] == pytest.approx(1 - 0.4 / 40)


def test_answers_of_zero_and_one_are_clipped():
    table = pd.DataFrame(
        {"run": [0, 1], "prior": 0.5, "lh": 0.9, "left_pred": [1.0, 0.0], "red_observation": [True, False]}
    ).assign(informative_lh=True)
    score = cogbench.score("probabilistic_reasoning", table)
    assert score["likelihood weighting"] == pytest.approx(logit(1 - 1e-5) / logit(0.9))


def test_answers_outside_zero_and_one_are_clipped_and_counted():
    table = pd.DataFrame(
        {"run": range(4), "prior": 0.5, "lh": 0.9, "left_pred": [1.7, -0.2, 0.9, 0.1], "informative_lh": True}
    ).assign(red_observation=[True, False, True, False])
    score = cogbench.score("probabilistic_reasoning", table)
    assert score.details["answers_outside_0_1"] == 2
    inside = table.assign(left_pred=table["left_pred"].clip(0, 1))
    assert score == cogbench.score("probabilistic_reasoning", inside)
    assert score["performance"] == pytest.approx(1 - 0.2 / 4)
    for lost in (None, float("inf"), "a half"):
        wrong = table.assign(left_pred=[0.5, 0.5, lost, 0.5])
        with pytest.raises(ValueError, match="probabilistic_reasoning: column 'left_pred', row 2: expected a number"):
            cogbench.score("probabilistic_reasoning", wrong)


# ------------------------------------------------------------------ 2 horizon
def explorer(slope, directed, slope_by_horizon):
    """Chooses the machine seen once (unequal games) or machine 1 (equal games) by a logistic rule."""

    def rule(state, query, generator):
        rows = state["rows"]
        if len(rows) > 4:
            return int(generator.integers(2))
        ones = sum(row["choice"] for row in rows[:4])
        target = 1 if ones in (1, 2) else 0
        delta = state["means"][target] - state["means"][1 - target]
        h = 1 if state["left"] == 6 else -1
        eta = slope * delta + slope_by_horizon * delta * h + (directed * h if ones != 2 else 0)
        return target if generator.random() < expit(eta) else 1 - target

    return rule


def test_directed_and_random_exploration_are_recovered():
    table = played("horizon", explorer(0.08, 0.7, -0.03), runs=3000)
    score = cogbench.score("horizon", table)
    assert score["directed exploration"] == pytest.approx(0.7, abs=0.2)  # standard error about 0.06
    assert score["random exploration"] == pytest.approx(0.03, abs=0.01)
    assert score["performance"] == pytest.approx(table["reward"].mean())
    assert score.details["directed_fit_converged"]
    assert table.groupby("run").size().isin([5, 10]).all()


@pytest.mark.parametrize(
    "rule", [lambda state, query, generator: 0, lambda state, query, generator: int(np.argmax(state["means"]))]
)
def test_separated_choices_score_zero(rule):
    score = cogbench.score("horizon", played("horizon", rule, runs=300))
    assert score["random exploration"] == 0
    assert score.details["random_fit_converged"] is False


def test_logistic_regression_finds_the_maximum_of_the_likelihood():
    generator = np.random.default_rng(0)
    X = np.column_stack([generator.normal(size=(300, 2)) * [10, 0.1], np.ones(300)])
    y = (generator.random(300) < expit(X @ [0.1, 2, -0.3])).astype(float)
    w = generator.integers(0, 3, 300).astype(float)
    found = logistic(X, y, w)
    best = minimize(lambda b: w @ np.logaddexp(0, -(2 * y - 1) * (X @ b)), np.zeros(3), method="BFGS", tol=1e-10)
    assert found == pytest.approx(best.x, abs=1e-4)


def test_logistic_regression_without_a_maximum():
    x = np.array([-2.0, -1, 0, 0, 1, 2])
    X = np.column_stack([x, np.ones(6)])
    assert logistic(X, (x > 0.5).astype(float)) is None  # separated
    assert logistic(X, np.array([0.0, 0, 0, 1, 1, 1])) is None  # separated but for ties
    assert logistic(X, np.zeros(6)) is None
    assert logistic(np.column_stack([X, X[:, 0]]), np.array([0.0, 1, 0, 1, 0, 1])) is None  # collinear


# ------------------------------------------------------------------ 3 restless bandit
def knower(state, query, generator):
    if state["asked"] == "choice":
        return int(generator.integers(2))
    return 0.99 if state["choice"] == state["better"] else 0.0


def test_perfect_knowledge_of_being_right_scores_one_and_published_tables_hide_it():
    clean, published = (played("restless_bandit", knower, preset=preset) for preset in ("clean", "published"))
    changed = clean[clean["accurate"] != published["accurate"]]
    assert changed["trial"].tolist() == [20, 40, 60, 79] * 10  # the last trial of all four blocks
    for table, shifted in ((clean, 1.0), (published, 1 - 4 / 80)):
        score = cogbench.score("restless_bandit", table)
        assert score["meta-cognition"] == pytest.approx(1)
        assert score.details["runs_with_published_slip"] == (10 if table is published else 0)
        assert score.details["runs_with_contradicting_accuracy"] == 0
        as_it_stands = cogbench.score("restless_bandit", table, "published")
        assert as_it_stands["meta-cognition"] == pytest.approx(shifted)
        assert as_it_stands["performance"] == pytest.approx(clean["reward"].mean())
        assert as_it_stands.details["changed_accuracies"] == 0


def two_blocks(accurate, choice=None, sizes=(4, 3)):
    """One run; confidence is what ``accurate`` says, so that it scores one exactly where nothing is repaired."""
    block = np.repeat(np.arange(len(sizes)), sizes)
    return pd.DataFrame(
        {
            "run": 0,
            "trial": range(len(block)),
            "block": block,
            "block_trial": [i for size in sizes for i in range(size)],
            "choice": choice or [0] * len(block),
            "reward": 50,
            "confidence": [0.0 if not a else 0.9 for a in accurate],
            "accurate": accurate,
        }
    )


@pytest.mark.parametrize(
    "accurate, choice, sizes, repaired, contradicting",
    [
        ([1, 1, 1, 0, 0, 0, 1], None, (4, 3), 2, 0),  # the last of both blocks names the other machine
        ([1, 0, 1, 0, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0], (4, 3), 2, 0),  # said of either machine
        ([1, 1, 1, 0, 0, 0, 0], None, (4, 3), 0, 1),  # the last of one block only
        ([1, 0, 1, 0, 0, 0, 1], None, (4, 3), 0, 1),  # rows before the last contradict each other
        ([1, 1, 1, 0, 0, 1], None, (4, 2), 0, 1),  # a block of two rows: either may be wrong
        ([1, 1, 1, 1, 0, 0, 0], None, (4, 3), 0, 0),
        ([1, 1, 1, 0, 1], None, (4, 1), 0, 1),
    ],
)
def test_clean_repairs_a_run_only_if_all_its_blocks_carry_the_slip(accurate, choice, sizes, repaired, contradicting):
    table = two_blocks(accurate, choice, sizes)
    score = cogbench.score("restless_bandit", table)
    assert score.details["changed_accuracies"] == repaired
    assert score.details["runs_with_contradicting_accuracy"] == contradicting
    assert score["meta-cognition"] == pytest.approx(1 - repaired / len(accurate))
    assert cogbench.score("restless_bandit", table, "published")["meta-cognition"] == pytest.approx(1)


def test_confidence_without_range_is_not_rescaled():
    table = played("restless_bandit", lambda s, q, g: int(g.integers(2)) if q.options else 0.4, runs=4)
    right = table["accurate"].to_numpy()
    score = cogbench.score("restless_bandit", table)
    assert score["meta-cognition"] == pytest.approx(1 - np.mean((right - 0.4) ** 2))


def test_accuracies_that_contradict_themselves_are_taken_as_they_stand():
    table = played("restless_bandit", knower, runs=1)
    table["accurate"] = np.random.default_rng(7).integers(0, 2, len(table))
    score = cogbench.score("restless_bandit", table)
    assert score.details["runs_with_contradicting_accuracy"] == 1
    scaled = table["confidence"] / 0.99
    assert score["meta-cognition"] == pytest.approx(1 - np.mean((table["accurate"] - scaled) ** 2))


def test_means_swap_between_blocks():
    table = played("restless_bandit", lambda s, q, g: s["better"] if s["asked"] == "choice" else 0.5)
    assert table["accurate"].all()
    assert table["reward"].mean() == pytest.approx(60, abs=1)
    assert (table.groupby(["run", "block"])["choice"].nunique() == 1).all()
    assert (table.groupby("run")["choice"].nunique() == 2).all()
    assert table.groupby(["run", "block"]).size().unstack().iloc[0].tolist() == [21, 20, 20, 19]


# ------------------------------------------------------------------ 4 instrumental learning
def learner(up, down, beta):
    def rule(state, query, generator):
        q = np.full(2, 0.5)
        for row in state["rows"]:
            if row["task"] == state["task"]:
                error = row["reward"] - q[row["choice"]]
                q[row["choice"]] += (up if error > 0 else down) * error
        return int(generator.random() < expit(beta * (q[1] - q[0])))

    return rule


def many_visits(up, down, beta, visits=300, seed=0):
    """Choices in four casinos, more of them than the protocol has."""
    generator = np.random.default_rng(seed)
    means = np.array([(0.2, 0.8), (0.8, 0.2), (0.4, 0.6), (0.7, 0.5)])
    choice, reward = np.zeros((visits, 4), np.int64), np.zeros((visits, 4))
    q = np.full((4, 2), 0.5)
    for t in range(visits):
        for c in range(4):
            k = choice[t, c] = int(generator.random() < expit(beta * (q[c, 1] - q[c, 0])))
            reward[t, c] = float(generator.random() < means[c, k])
            error = reward[t, c] - q[c, k]
            q[c, k] += (up if error > 0 else down) * error
    return Visits(choice, reward, np.ones(choice.shape, bool))


def test_the_likelihood_of_learning_is_that_of_a_plain_loop():
    visits = many_visits(0.3, 0.1, 4, visits=20)
    for up, down, beta in ((0.3, 0.1, 4.0), (0.9, 0.9, MAX_BETA), (0.0, 1.0, 0.0)):
        total = 0.0
        for c in range(4):
            q = [0.5, 0.5]
            for k, r in zip(visits.choice[:, c], visits.reward[:, c], strict=True):
                total -= np.log(np.clip(expit(beta * (q[k] - q[1 - k])), 1e-5, 1 - 1e-5))
                q[k] += (up if r > q[k] else down) * (r - q[k])
        got = visits.loss(np.array([0.5, up]), np.array([0.5, down]), np.array([1.0, beta]))[1]
        assert got == pytest.approx(total, rel=1e-12)


def test_learning_rate_and_optimism_are_recovered():
    one = learning_rate(many_visits(0.3, 0.3, 5), 0)
    assert one.value == pytest.approx(0.3, abs=0.08)
    assert one.beta == pytest.approx(5, rel=0.2)
    assert one.low <= 0.3 <= one.high
    assert one.high - one.low < 0.3
    two = optimism(many_visits(0.5, 0.15, 5), 0)
    assert two.value == pytest.approx(0.35, abs=0.15)
    few = optimism(many_visits(0.5, 0.15, 5, visits=60), 0)
    assert few.low <= 0.35 <= few.high


def test_no_point_of_a_grid_is_better_than_the_fit():
    visits = many_visits(0.4, 0.2, 3, visits=24)
    alpha, beta = (part.ravel() for part in np.meshgrid(np.linspace(0, 1, 51), np.logspace(-2, 5, 71)))
    assert learning_rate(visits, 1).loss <= visits.loss(alpha, alpha, beta).min() + 1e-6
    up, down = (part.ravel() for part in np.meshgrid(np.linspace(0, 1, 31), np.linspace(0, 1, 31)))
    assert optimism(visits, 1).loss <= visits.loss(up, down, np.full(len(up), 3.0)).min() + 1e-6


def test_choices_by_chance_leave_the_likelihood_flat_and_fits_repeat():
    table = played("instrumental", lambda state, query, generator: int(generator.integers(2)), runs=2)
    first, second = (cogbench.score("instrumental", table) for _ in range(2))
    assert first == second
    assert first.details["flatness"]["learning rate"] > 0.9
    assert first["performance"] == table["reward"].mean()


def test_second_copies_of_visits_are_dropped_by_clean_only():
    clean, published = (played("instrumental", learner(0.4, 0.4, 6), 1, preset) for preset in ("clean", "published"))
    assert (len(clean), len(published)) == (96, 192)
    scores = [cogbench.score("instrumental", table) for table in (clean, published)]
    assert scores[0] == scores[1]
    assert scores[1].details["second_copies_dropped"] == 96
    first, second = published[::2].reset_index(drop=True), published[1::2].reset_index(drop=True)
    pd.testing.assert_frame_equal(first, clean)
    pd.testing.assert_frame_equal(second.drop(columns="task"), clean.drop(columns="task"))  # the actual visit's means
    assert second["task"].tolist()[:-1] == clean["task"].tolist()[1:]
    assert cogbench.score("instrumental", clean, "published") == scores[0]
    doubled = cogbench.score("instrumental", published, "published")
    assert doubled["learning rate"] != scores[0]["learning rate"]
    assert doubled["performance"] == scores[0]["performance"]
    numbered = published.assign(trial=np.arange(192))
    assert cogbench.score("instrumental", numbered) == scores[0]


# ------------------------------------------------------------------ 5 two-step
def test_model_basedness_is_recovered():
    def rule(state, query, generator):
        if state["asked"] == "alien" or not state["rows"]:
            return int(generator.integers(2))
        last = state["rows"][-1]
        r, c = 2 * last["reward"] - 1, 1 if last["state"] == last["action1"] else -1
        stay = generator.random() < 0.5 + 0.1 * r + 0.05 * c + 0.25 * r * c
        return "XY".index(last["action1"]) if stay else 1 - "XY".index(last["action1"])

    table = played("two_step", rule, runs=300)
    score = cogbench.score("two_step", table)
    assert score["model-basedness"] == pytest.approx(0.25, abs=0.03)  # standard error below 0.01
    assert score["performance"] == table["reward"].mean()
    assert (table["state"] == table["action1"]).mean() == pytest.approx(0.7, abs=0.03)
    chances = table[["probsA", "probsB", "probsC", "probsD"]]
    assert ((chances >= 0.25) & (chances <= 0.75)).all().all()


def test_days_of_different_runs_are_no_pair():
    table = pd.DataFrame(
        {
            "run": [0, 0, 1, 1],
            "trial": [0, 1, 0, 1],
            "action1": ["X", "X", "Y", "X"],
            "state": ["X", "Y", "Y", "X"],
            "action2": ["D", "J", "K", "F"],
            "reward": [1, 0, 0, 1],
        }
    )
    assert cogbench.score("two_step", table).details["pairs_of_days"] == 2


# ------------------------------------------------------------------ 6 temporal discounting
def patience(percent):
    """Waits for at least so many percent in a staircase; takes what comes first in the four questions."""

    def rule(state, query, generator):
        return int(state["asked"] == "staircase" and state["percent"] >= percent)

    return rule


@pytest.mark.parametrize(
    "percent, score", [(999, 15), (150, 3 * 4 + 4), (120, 3 * 3 + 4), (110, 3 * 2 + 4), (102, 3 * 1 + 4), (101, 4)]
)
def test_staircases_measure_patience(percent, score):
    table = played("temporal_discounting", patience(percent))
    assert cogbench.score("temporal_discounting", table) == {"temporal discounting": score}


def test_always_waiting_scores_nothing_and_the_most_is_nineteen():
    assert played("temporal_discounting", lambda s, q, g: 1)["score"].tolist() == [0]

    def late(state, query, generator):  # impatient but for the first staircase's last question
        return int(state["asked"] == "staircase" and state["percent"] == 150 and state["base"] == 500)

    assert played("temporal_discounting", late)["score"].tolist() == [4 + 5 + 4 + 4]


def test_amounts_are_whole_dollars():
    for percent in (101, 102, 110, 120, 150):
        text = " ".join(part for pair in temporal_discounting._anomalies(percent).values() for part in pair)
        assert f"{5 * percent} dollars" in text
        assert f"{5 * (percent - 100)} dollars" in text
        assert f"{5 * (2 * percent - 100)} dollars" in text


# ------------------------------------------------------------------ 7 balloon
def inflater(pumps):
    return lambda state, query, generator: (
        state["inflate"] if state["pumps"] < min(pumps, state["limit"]) else 1 - state["inflate"]
    )


def test_balloons_burst_uniformly_and_pay_nothing():
    table = played("balloon", inflater(999), runs=15)
    score = cogbench.score("balloon", table)
    assert score["performance"] == 0
    assert table["exploded"].all()
    eight = table.loc[table["max_pumps"] == 8, "pumps"]
    counts = np.bincount(eight, minlength=9)
    assert counts[0] == 0
    assert len(counts) == 9
    assert counts[1:] == pytest.approx(len(eight) / 8, abs=5 * np.sqrt(len(eight) / 8))
    assert score["risk taking"] == pytest.approx(np.mean([64.5, 16.5, 4.5]), rel=0.1)


def test_pumps_are_counted_with_the_bursting_one():
    table = played("balloon", inflater(3), runs=20)
    score = cogbench.score("balloon", table)
    planned = np.mean([np.mean([min(3, burst) for burst in range(1, limit + 1)]) for limit in balloon.LIMITS])
    paid = np.mean([3 * (limit - 3) / limit for limit in balloon.LIMITS])
    assert score["risk taking"] == pytest.approx(planned, abs=0.05)
    assert score["performance"] == pytest.approx(paid, abs=0.15)


def steps_of(table, skips=False):
    """One row per pump and, with ``skips``, one for the answer that ends a balloon without a burst."""
    rows = []
    for row in table.to_dict("records"):
        answers = list(range(1, row["pumps"] + 1))
        answers += [row["pumps"]] if (skips and not row["exploded"]) or not answers else []
        rows += [
            {**row, "balloon": row["trial"], "step": k, "pumps": pumps, "reward": last * row["reward"]}
            for k, pumps in enumerate(answers)
            for last in [k == len(answers) - 1]
        ]
    return pd.DataFrame(rows)


def hesitant(state, query, generator):
    """Leaves some balloons alone and some after different numbers of pumps."""
    return state["inflate"] if generator.random() < 0.7 else 1 - state["inflate"]


STEPS = {
    "trial counts steps of a balloon": lambda s: s.assign(trial=s["step"]),
    "trial counts all steps": lambda s: s.assign(trial=s.groupby("run").cumcount()),
    "trial counts balloons": lambda s: s.assign(trial=s["balloon"]),
    "balloon_idx counts balloons": lambda s: s.assign(
        balloon_idx=s["balloon"], balloon_trial=s["step"], trial=s["step"]
    ),
    "balloon_trial counts steps": lambda s: s.assign(balloon_trial=s["step"], trial=s["balloon"]),
}


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("what", STEPS)
def test_a_table_of_steps_scores_as_one_of_balloons(what, skips):
    table = played("balloon", hesitant, runs=3)
    steps = STEPS[what](steps_of(table, skips))
    assert len(steps) > 1.5 * len(table)
    wanted = cogbench.score("balloon", table)
    assert wanted.details["balloons"] == len(table) == 135
    score = cogbench.score("balloon", steps)
    assert score == wanted
    assert score.details["balloons"] == 135
    if what == "trial counts all steps":
        assert cogbench.score("balloon", steps.sample(frac=1, random_state=0)) == wanted


def test_rows_of_balloons_are_no_steps():
    table = played("balloon", hesitant, runs=3)
    first = table[table["run"] == 0].sort_values("pumps")  # as if one balloon had been pumped up
    for rows in (first, pd.concat([table, table]), table.assign(balloon_trial=0), first.assign(pumps=0, reward=0)):
        score = cogbench.score("balloon", rows)
        assert score.details["balloons"] == len(rows)
        assert score["risk taking"] == pytest.approx(rows["pumps"].mean())


# ------------------------------------------------------------------ the random agent, against published values
def test_the_random_agent_scores_as_the_published_one():
    def of(name, runs=None):
        return cogbench.score(name, cogbench.play(name, cogbench.RandomAgent(3), runs=runs, seed=3)[0])

    assert of("probabilistic_reasoning", 500)["performance"] == pytest.approx(0.655862, abs=0.02)
    assert of("restless_bandit")["meta-cognition"] == pytest.approx(0.663820, abs=0.03)
    assert of("two_step")["model-basedness"] == pytest.approx(0.000926, abs=0.04)
    assert of("temporal_discounting", 1000)["temporal discounting"] == pytest.approx(9.106, abs=0.35)
    balloons = of("balloon", 40)
    assert balloons["risk taking"] == pytest.approx(0.991919, abs=0.1)
    assert balloons["performance"] == pytest.approx(0.884848, abs=0.1)
