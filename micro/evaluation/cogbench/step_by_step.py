"""The step-by-step variant: a model may reason before it answers, and its final answer counts.

Source: CogBench's variants with reasoning (Coda-Forno et al. 2024; model.md 9.9: "Step-by-step variants allow 350
tokens"). Prompt and reading are our own, since the protocol leaves them open:

- The prompt has the situation and the question of the direct variant. It asks for steps first and for a line
  "Final answer: " with the beginning that the direct variant forces ("Machine ", "... is 0."), and ends with "A: Let us
  think step by step."
- The answer is the first line of the reply that begins with "Final answer:" and can be read; marks of emphasis around
  it do not matter. What stands elsewhere does not count, however much it looks like an answer, and nothing does behind
  the beginning of another question ("Q:").
- No answers are the asked beginning alone ("... is 0."), ratios ("1 in 4"), percentages, and options that are negated
  or named as alternatives ("F or J").
- A reply without a line that can be read counts as a random choice, as in the direct variant (a confidence as 0).
- A model writes until that line is whole, to the end of text, or 350 tokens. If there is no such line by then (small
  models seldom write one), the line is begun for it and it fills in two tokens, as in the direct variant.
- The second query of a restless-bandit trial names the machine that was chosen in the line it asks for.
- Both presets read replies in this way: the published slips of reading belong to replies of two tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from micro.evaluation.cogbench.experiment import ANSWER, Answer, Query

REASONING_TOKENS = 350
VARIANTS = ("direct", "step by step")
MARK = "Final answer:"
_BEGIN = "Let us think step by step."
_EMPHASIS = r"[ \t*_#>`\"']*"
_FINAL = re.compile(rf"^{_EMPHASIS}final answer{_EMPHASIS}:{_EMPHASIS}\n?{_EMPHASIS}(?P<said>[^\n]*)", re.I | re.M)
_NEXT_QUESTION = re.compile(r"\n\s*Q:")
_WORD = re.compile(r"[^\W_]+")
_NO_SHARE_BEHIND = r"(?![\d.,]*\d|\s*(?:%|per\s?cent\b|[/:]|in\b|out\s+of\b))"
_SHARE = re.compile(rf"(?<![\d.,-])(?:0?\.\d+|1(?:\.0*)?|0(?!\.)){_NO_SHARE_BEHIND}", re.I)
# "is 0." and then the decimals, as a model may go on behind the asked beginning.
_DECIMALS = re.compile(rf"[\s*_:=]*0\.(?!\d)[ \t]*(?P<digits>\d+{_NO_SHARE_BEHIND})?", re.I)
_NUMBER = r"\.?\d[\d.,]*"
_RATIO = re.compile(rf"(?<![\d.,]){_NUMBER}(?:\s*[/:]\s*{_NUMBER}|\s+(?:in|out\s+of|of|to)\s+{_NUMBER})+", re.I)
_NEGATED = re.compile(r"\b(?:not|neither|nor|never|cannot)\b|n['\u2019]t\b", re.I)
_ANOTHER = re.compile(r"[\s*_\"'`.,]*(?:(?:or|nor|and)\b|[/&])", re.I)


@dataclass(frozen=True)
class Reasoned(Query):
    """A question whose reply reasons first. ``prefix``: the beginning that its final answer is asked to have."""

    prefix: str = ""

    def read(self, reply: str, preset: str = "clean") -> Answer | None:
        """The answer in the first final line that has one; None if there is none. Both presets read alike."""
        for found in _FINAL.finditer(_NEXT_QUESTION.split(reply, maxsplit=1)[0]):
            answer = self._option(found["said"]) if self.options else self._share(found["said"])
            if answer is not None:
                return answer
        return None

    def ended(self, reply: str) -> bool:
        """Whether nothing that follows can change the answer: a whole final line is there, or the next question."""
        if _NEXT_QUESTION.search(reply):
            return True
        return self.read(reply[: reply.rfind("\n") + 1]) is not None

    def begun(self, reply: str) -> str:
        """The reasoning of a reply, with the final line begun behind it."""
        thoughts = _NEXT_QUESTION.split(reply, maxsplit=1)[0].rstrip()
        return f"{thoughts}\n{MARK} {self.prefix}".rstrip(" ")

    def reply(self, answer: float) -> str:
        """A reply that gives this answer, for agents that do not write."""
        return f"\n{MARK} {self.prefix}{super().reply(answer)}"

    def _option(self, said: str) -> int | None:
        """The word behind the asked beginning or at the start of the line; else the only option that is named.

        None where a negation stands before it, or another option beside it ("F or J").
        """
        words = [option.casefold() for option in self.options]
        line, beginning = said.casefold(), self.prefix.strip().casefold()
        start = line.find(beginning) + len(beginning) if beginning in line else 0
        first = _WORD.search(line, start)
        if first and first.group() in words:
            if _NEGATED.search(line, 0, first.start()) or _another(line[first.end() :], words):
                return None
            return words.index(first.group())
        named = [word for word in _WORD.finditer(said) if word.group() in self.options]
        if len({word.group() for word in named}) != 1 or _NEGATED.search(said, 0, named[0].start()):
            return None
        return self.options.index(named[0].group())

    def _share(self, said: str) -> float | None:
        """The number from 0 to 1 behind the asked beginning; else the only one in the line. Ratios are none."""
        beginning = self.prefix.removesuffix("0.").strip().casefold()
        _, asked, behind = said.casefold().partition(beginning) if beginning else ("", "", "")
        said = _RATIO.sub("?", behind if asked else said)
        if asked and (repeated := _DECIMALS.match(said)):
            return float(f"0.{repeated['digits']}") if repeated["digits"] else None
        numbers = _SHARE.findall(said)
        if not numbers or (len(numbers) > 1 and not asked):
            return None
        return float(numbers[0])


def _another(behind: str, words: list[str]) -> bool:
    """Whether what stands behind an option goes on to another one: " or machine j", "/j"."""
    joined = _ANOTHER.match(behind)
    following = _WORD.findall(behind, joined.end())[:3] if joined else []
    return any(word in words for word in following) and not any(_NEGATED.fullmatch(word) for word in following)


def reasoned(query: Query) -> Reasoned:
    """The same question with room to reason."""
    asked, _, prefix = query.text.rpartition(ANSWER)
    instruction = (
        f'Think step by step first. Then end with a line of its own that begins with "{MARK} {prefix.rstrip()}" and '
        "holds nothing else but your answer."
    )
    return Reasoned(f"{asked} {instruction}{ANSWER}{_BEGIN}", query.options, query.default, query.state, prefix)
