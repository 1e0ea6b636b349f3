"""CogBench with room to reason: the final answer counts, whatever else the reply holds."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from micro.cli import main
from micro.evaluation import cogbench


class Thinker:
    """Knows its answers beforehand (by run and turn), and writes a lot of other answers around them."""

    def __init__(self, seed=0):
        self.name, self.turns, self.seed, self.texts = f"thinker {seed}", {}, seed, []

    def answer(self, queries, runs):
        return [self._one(query, run) for query, run in zip(queries, runs, strict=True)]

    def _one(self, query, run):
        turn = self.turns[run] = self.turns.get(run, -1) + 1
        self.texts.append(query.text)
        answer = query.guess(np.random.default_rng([self.seed, run, turn]))
        plain = cogbench.Query.reply(query, answer)
        if not isinstance(query, cogbench.Reasoned):
            return plain
        others = [option for option in query.options if option != plain] or ["0.12", "0.99", "1"]
        distracting = " ".join(f"{query.prefix}{other} paid 61, and 0.35 of 20 is 7." for other in others)
        return (
            f" First, {distracting}\nThe final answer: {others[0]} would be rash.\n"
            f"Final answer: {query.prefix.rstrip(' 0.')}\n"
            f"**Final answer:** {query.prefix}{plain}.\n"
            f"Final answer: {query.prefix}{others[0]}\n\nQ: And now?\n\nA: Final answer: {others[0]}"
        )


@pytest.mark.parametrize("preset", ["clean", "published"])
@pytest.mark.parametrize("name", cogbench.EXPERIMENTS)
def test_an_agent_that_reasons_plays_as_one_that_answers_at_once(name, preset, short):
    options = {"runs": 3, "seed": 4, "preset": preset}
    direct = Thinker(7)
    wanted, _ = cogbench.play(name, direct, **options)
    thinker = Thinker(7)
    table, replies = cogbench.play(name, thinker, step_by_step=True, **options)
    pd.testing.assert_frame_equal(table, wanted)
    assert replies["unreadable"] == 0 and replies["questions"] == len(direct.texts)
    for text, plain in zip(thinker.texts, direct.texts, strict=True):
        before, _, prefix = plain.rpartition("\n\nA: ")
        assert text.startswith(before + " Think step by step first.")
        assert f'"Final answer: {prefix.rstrip()}"' in text
        assert text.endswith("\n\nA: Let us think step by step.") and text.count("\n\nA: ") == 1


def test_a_parameter_that_was_planted_is_recovered_through_reasoning():
    class Bayesian:
        """States the posterior, after naming prior and likelihood."""

        name = "bayesian"

        def answer(self, queries, runs):
            return [self._reply(query) for query in queries]

        def _reply(self, query):
            prior, share = query.state["prior"], query.state["share"]
            share = share if query.state["red"] else 1 - share
            posterior = prior * share / (prior * share + (1 - prior) * (1 - share))
            decimals = f"{posterior:.6f}"[2:]
            return (
                f" The prior is {prior:.2f}, the likelihood {share:.2f}; 1 - {prior:.2f} for the other.\n"
                f"Final answer: {query.prefix}{decimals}"
            )

    table, replies = cogbench.play("probabilistic_reasoning", Bayesian(), runs=60, step_by_step=True)
    found = cogbench.score("probabilistic_reasoning", table)
    assert replies["unreadable"] == 0
    assert found["prior weighting"] == pytest.approx(1, abs=1e-3)
    assert found["likelihood weighting"] == pytest.approx(1, abs=1e-3)
    assert found["performance"] == pytest.approx(1, abs=1e-3)


# ------------------------------------------------------------------ reading
def letters(*options, prefix="Machine "):
    return cogbench.reasoned(cogbench.Query(f"Two machines.\n\nQ: Which one? (F or J.)\n\nA: {prefix}", options))


def share(prefix="The probability is 0."):
    return cogbench.reasoned(cogbench.Query(f"An urn.\n\nQ: How sure?\n\nA: {prefix}", ()))


@pytest.mark.parametrize(
    "reply, answer",
    [
        (" F is worse.\nFinal answer: Machine J", 1),
        ("Final answer: Machine F", 0),
        ("\nfinal answer: machine j because Machine F is worse", 1),
        ("\n> **Final answer**: *Machine J*.\n", 1),
        ("\nFinal answer:\nMachine F\n", 0),
        ("\nFinal answer: J.", 1),
        ("\nFinal answer: I choose machine J, not F", 1),
        ("\nFinal answer: the letter J", 1),
        ("\nFinal answer: not F but J", None),
        ("\nFinal answer: not F", None),
        ("\nFinal answer: not Machine F but Machine J", None),
        ("\nFinal answer: I wouldn't take machine F", None),
        ("\nFinal answer: neither machine F nor J", None),
        ("\nFinal answer: Machine F or Machine J", None),
        ("\nFinal answer: either machine F, or J", None),
        ("\nFinal answer: Machine F/J", None),
        ("\nFinal answer: Machine J and not F", 1),
        ("\nFinal answer: Machine J or nothing", 1),
        ("\nFinal answer: Fish", None),
        ("\nFinal answer:", None),
        ("\nFinal answer: Machine\nFinal answer: Machine J\nFinal answer: Machine F", 1),
        (" I say J. The final answer: Machine J", None),  # no line of its own
        (" Machine J\n\nQ: Which one?\nFinal answer: Machine F", None),
        ("", None),
    ],
)
def test_letters_of_the_first_readable_final_line_count(reply, answer):
    for preset in ("clean", "published"):
        assert letters("F", "J").read(reply, preset) == answer


def test_options_of_one_digit_among_numbers():
    query = letters("1", "2", prefix="I prefer option ")
    assert query.read(" 1 dollar is 2.\nFinal answer: I prefer option 2 (500 dollars).") == 1
    assert query.read("\nFinal answer: Option 1") == 0
    assert query.read("\nFinal answer: 12") is None


@pytest.mark.parametrize(
    "reply, number",
    [
        (" 0.4 and 0.9\nFinal answer: The probability is 0.73.", 0.73),
        ("\nFinal answer: The probability is .5", 0.5),
        ("\nFinal answer: 0.07", 0.07),
        ("\nFinal answer: The probability is 1.", 1.0),
        ("\nFinal answer: The probability is 0.25, that is 25 %", 0.25),
        ("\nFinal answer: 73 %", None),
        ("\nFinal answer: 1 %", None),
        ("\nFinal answer: 1.5", None),
        ("\nFinal answer: 0,73", None),
        ("\nFinal answer: 0.4 or 0.6", None),
        ("\nFinal answer: The probability is", None),
        ("\nFinal answer: -0.3", None),
        ("\nFinal answer: The probability is 0.", None),  # the line as it was asked for
        ('\nFinal answer: The probability is 0."', None),
        ("\nFinal answer: The probability is 0. There is 1 ball", None),
        ("\nFinal answer: The probability is 0. 7", 0.7),
        ("\nFinal answer: The probability is 0. 1/2", None),
        ("\nFinal answer: The probability is 0", 0.0),
        ("\nFinal answer: The probability is 0.00", 0.0),
        ("\nFinal answer: The probability is 1.00.", 1.0),
        ("\nFinal answer: 0.", None),
        ("\nFinal answer: The probability is 1/2", None),
        ("\nFinal answer: The probability is 3 / 1", None),
        ("\nFinal answer: The probability is 1 in 4", None),
        ("\nFinal answer: 1 in four", None),
        ("\nFinal answer: The probability is 1 out of 4", None),
        ("\nFinal answer: The probability is 1:3", None),
        ("\nFinal answer: The probability is 1 percent", None),
        ("\nFinal answer: The probability is 1/2, that is 0.5", 0.5),
    ],
)
def test_a_number_from_0_to_1_is_read(reply, number):
    assert share().read(reply) == number


@pytest.mark.parametrize("tail", ["", "\n\n", " I think", "%", " .", "7", " 7", "73.", "07 ", " 5 of 10 balls"])
def test_a_line_that_was_begun_is_read_as_the_direct_variant_reads_it(tail):
    direct = cogbench.Query("An urn.\n\nQ: How sure?\n\nA: The probability is 0.")
    query = cogbench.reasoned(direct)
    reply = query.begun(" Let me see.") + tail
    wanted = None if "of" in tail else direct.read(tail)  # a ratio
    assert query.read(reply) == wanted
    assert query.ended(reply + "\n") is (wanted is not None)


def test_long_replies_are_read_at_once():
    for text in ("0" * 3000 + "%", "1." * 1500, "1/" * 1500, ". 0" * 1000, "not F or " * 300):
        for query in (share(), letters("F", "J")):
            assert query.read(f"\nFinal answer: {query.prefix}{text}") is None


def test_a_reply_is_over_with_its_final_line_or_another_question():
    query = letters("F", "J")
    for text, over in (
        (" F or J\n", False),
        ("\nFinal answer: Machine J", False),  # more of the word may follow
        ("\nFinal answer: Machine J\n", True),
        ("\nFinal answer: Machine\n", False),
        ("\nFinal answer: \nMachine J", False),
        (" So be it.\n\nQ: And", True),
    ):
        assert query.ended(text) is over, text
    assert not cogbench.Query("A: ").ended("\nFinal answer: Machine J\n")


def test_unreadable_replies_are_counted_and_drawn_at_random():
    class Rambling(Thinker):
        def _one(self, query, run):
            return " Machine F paid 61 and Machine J 40, so 0.9 for F." * 3

    table, replies = cogbench.play("restless_bandit", Rambling(), runs=4, step_by_step=True)
    assert replies == {"questions": 640, "unreadable": 640}
    assert 0.4 < table["choice"].mean() < 0.6 and (table["confidence"] == 0).all()


# ------------------------------------------------------------------ runs
FEW = {"experiments": ["horizon", "temporal_discounting"], "runs": 2, "draws": 5, "baseline": "published"}


def test_the_result_names_the_variant_and_resumes(tmp_path):
    out = {"output": tmp_path / "out", "step_by_step": True}
    result = cogbench.run(Thinker(), **FEW, **out)
    assert result.variant == result.settings["variant"] == "step by step"
    assert "preset clean, step by step" in str(result)
    assert "step by step" in result.plot().axes[0].get_title()
    again = Thinker()
    assert cogbench.run(again, **FEW, **out).to_dict() == result.to_dict()
    assert again.texts == []
    assert cogbench.CogBenchResult.load(tmp_path / "out") == result
    with pytest.raises(ValueError, match="made with another variant"):
        cogbench.run(Thinker(), **FEW, output=tmp_path / "out")
    (tmp_path / "out" / "temporal_discounting.json").unlink()
    cogbench.run(again, **FEW, **out)
    assert 2 * 4 <= len(again.texts) <= 2 * 13  # that experiment alone
    direct = cogbench.run(Thinker(), **FEW, output=tmp_path / "direct")
    assert direct.variant == "direct" and "variant" not in direct.settings
    assert json.loads((tmp_path / "direct" / "horizon.json").read_text())["settings"].keys() == {
        "agent", "preset", "runs", "seed"
    }  # fmt: skip
    content = direct.to_dict()
    del content["variant"]  # a file of an earlier version
    assert cogbench.CogBenchResult.from_dict(content).variant == "direct"


@pytest.mark.parametrize("name", ["horizon", "probabilistic_reasoning", "instrumental"])
def test_an_experiment_that_was_stopped_goes_on_with_the_next_runs(name, tmp_path, short):
    class Pairs(Thinker):
        batch_size = 2

    class Stops(Pairs):
        def answer(self, queries, runs):
            if 5 in runs:
                raise KeyboardInterrupt
            return super().answer(queries, runs)

    options = {"experiments": name, "runs": 7, "draws": 5, "baseline": "published", "step_by_step": True}
    whole = cogbench.run(Pairs(), **options)
    options["output"] = tmp_path
    with pytest.raises(KeyboardInterrupt):
        cogbench.run(Stops(), **options)
    assert len(list(tmp_path.rglob("*.json"))) == 2  # runs 0 to 3
    other = Pairs()
    other.name = "somebody else"
    for wrong, message in ((other, "another agent"), (Pairs(), "another variant")):
        with pytest.raises(ValueError, match=message):
            cogbench.run(wrong, **{**options, "step_by_step": wrong is other})
    again = Pairs()
    result = cogbench.run(again, **options)
    assert set(again.turns) == {4, 5, 6}
    assert result.to_dict() == whole.to_dict()
    pd.testing.assert_frame_equal(result.tables[name], whole.tables[name])
    assert not (tmp_path / "parts").exists()


def test_a_random_agent_has_nothing_to_think_about():
    tables = [cogbench.play("two_step", cogbench.RandomAgent(3), runs=5, step_by_step=steps) for steps in (False, True)]
    pd.testing.assert_frame_equal(tables[0][0], tables[1][0])
    assert tables[1][1]["unreadable"] == 0


def test_engine_and_model_reason_alike_and_other_lengths_are_other_tables(player, tmp_path):
    model, tokenizer = player
    found = {}
    for engine in (True, False):
        agent = cogbench.ModelAgent(model, tokenizer, engine=engine, max_new_tokens=9, batch_size=2)
        found[engine] = cogbench.run(agent, **FEW, step_by_step=True)
    first, second = (result.to_dict() for result in found.values())
    assert first == second
    options = {**FEW, "step_by_step": True, "output": tmp_path}
    kept = cogbench.run(model, tokenizer, **options, reasoning_tokens=9)
    assert kept.settings["reasoning_tokens"] == 9
    assert kept.scores == found[True].scores
    with pytest.raises(ValueError, match="made with another reasoning_tokens"):
        cogbench.run(model, tokenizer, **options, reasoning_tokens=5)
    with pytest.raises(ValueError, match="reasoning_tokens must be at least 1"):
        cogbench.run(model, tokenizer, **options, reasoning_tokens=0)


class Scripted:
    """A tokenizer that reads every reply as the beginning of a script, four characters a token."""

    def __init__(self, tokenizer, script):
        self.tokenizer, self.script, self.longest = tokenizer, script, 0

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, text):
        return self.tokenizer(text)

    def decode(self, ids, **_):
        ids = [i for i in ids if i not in self.tokenizer.all_special_ids]
        self.longest = max(self.longest, len(ids))
        return self.script[: 4 * len(ids)]


@pytest.mark.parametrize("engine", [True, False])
def test_writing_stops_behind_the_final_answer(player, engine):
    model, tokenizer = player
    script = " Machine F paid 61.\nFinal answer: Machine J\nAnd so on, and so on, and so on, for ever and ever."
    scripted = Scripted(tokenizer, script)
    agent = cogbench.ModelAgent(model, scripted, engine=engine, max_new_tokens=40)
    queries = [letters("F", "J"), letters("F", "J")]
    replies = agent.answer(queries, range(2))
    assert [query.read(reply) for query, reply in zip(queries, replies, strict=True)] == [1, 1]
    assert scripted.longest == 1 + script.index("\nAnd") // 4
    direct = Scripted(tokenizer, script)
    agent = cogbench.ModelAgent(model, direct, engine=engine, max_new_tokens=40)
    agent.answer([cogbench.Query("Two machines. A: ", ("F", "J"))] * 2, range(2))
    assert direct.longest > scripted.longest


@pytest.mark.parametrize("engine", [True, False])
def test_a_final_line_that_is_missing_is_begun_and_filled_in(player, engine):
    model, tokenizer = player
    asked = []

    class Listening(Scripted):
        def __call__(self, text):
            asked.append(text)
            return self.tokenizer(text)

        def decode(self, ids, **_):
            if len(asked) > 2:  # the second time two tokens are written
                return {1: " J", 2: " J\n"}[len(ids)]
            return super().decode(ids)

    scripted = Listening(tokenizer, " Machine F paid 61, Machine J 40.\n\nQ: Another one?\n\nFinal answer: Machine F\n")
    agent = cogbench.ModelAgent(model, scripted, engine=engine, max_new_tokens=30)
    query = letters("F", "J")
    replies = agent.answer([query, cogbench.Query("Machine ", ("F", "J"))], range(2))
    assert len(asked) == 3
    assert asked[2] == query.text + " Machine F paid 61, Machine J 40.\nFinal answer: Machine"
    assert (
        replies[0].startswith(" Machine F paid 61, Machine J 40.\nFinal answer: Machine J")
        and query.read(replies[0]) == 1
    )
    assert "Final answer: Machine J" not in replies[1]
    assert share().begun(" Let me see\n\nQ: What?").endswith("see\nFinal answer: The probability is 0.")


@pytest.mark.parametrize("engine", [True, False])
def test_whether_a_final_line_is_begun_does_not_depend_on_the_batch(player, engine):
    model, tokenizer = player
    queries = [letters("F", "J"), letters("F", "J"), letters("1", "2", prefix="Option ")]
    queries[1] = dataclasses.replace(queries[1], text="A long story. " * 30 + queries[1].text)
    longest = max(len(tokenizer(query.text)["input_ids"]) for query in queries)
    found = []
    for batch_size in (1, 2, 3):
        agent = cogbench.ModelAgent(model, tokenizer, engine=engine, max_new_tokens=12, batch_size=batch_size)
        agent._limit = longest + 12  # no room to ask again for the answer in the long row
        found.append([agent.answer(queries, range(3)), agent.answer(queries[::-1], range(3))[::-1]])
        for replies in found[-1]:
            assert ["Final answer:" in reply for reply in replies] == [True, False, True]
    assert found[0] == found[1] == found[2] and found[0][0] == found[0][1]


def test_a_length_of_reasoning_that_would_be_ignored_is_refused(player, tmp_path, capsys):
    model, tokenizer = player
    with pytest.raises(ValueError, match="give step_by_step"):
        cogbench.run(model, tokenizer, **FEW, reasoning_tokens=9)
    for agent in (cogbench.RandomAgent(), cogbench.ModelAgent(model, tokenizer)):
        with pytest.raises(ValueError, match="an agent has its own length"):
            cogbench.run(agent, **FEW, reasoning_tokens=9, step_by_step=True)
    arguments = ["evaluate", "cogbench", "random", "--experiments", "horizon", "--runs", "2", "-o", str(tmp_path)]
    assert main.run([*arguments, "--reasoning-tokens", "9"]) == 2
    assert "--step-by-step" in capsys.readouterr().err


def test_an_agent_of_no_given_length_reasons_at_length(player):
    model, tokenizer = player
    lengths = []

    class Listening(cogbench.ModelAgent):
        def _generate(self, prompts, runs, length, ended):
            lengths.append(length)
            return [tokenizer(" F\nFinal answer: Option 1\n")["input_ids"] for _ in prompts]

    options = {**FEW, "experiments": "temporal_discounting"}
    agent = Listening(model, tokenizer, engine=False)
    result = cogbench.run(agent, **options, step_by_step=True)
    assert set(lengths) >= {350} and result.settings["reasoning_tokens"] == 350
    lengths.clear()
    cogbench.run(agent, **options)
    assert set(lengths) == {2}
    agent = Listening(model, tokenizer, engine=False, max_new_tokens=40)
    assert cogbench.run(agent, **options, step_by_step=True).settings["reasoning_tokens"] == 40


def test_a_prompt_and_its_reasoning_must_fit(player):
    model, tokenizer = player
    agent = cogbench.ModelAgent(model, tokenizer, max_new_tokens=4090)
    with pytest.raises(ValueError, match="its reply included"):
        agent.answer([letters("F", "J")], [0])


def test_the_command(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["evaluate", "cogbench", "random", "--experiments", "horizon", "--runs", "8", "-o", str(out)]
    assert main.run([*arguments, "--baseline", "published", "--step-by-step"]) == 0
    assert "step by step" in capsys.readouterr().out
    assert json.loads((out / "cogbench.json").read_text())["variant"] == "step by step"
    assert main.run([*arguments, "--baseline", "published"]) == 2
    assert "made with another variant" in capsys.readouterr().err
    assert main.run([*arguments, "--step-by-step", "--reasoning-tokens", "0"]) == 2
