"""The step-by-step variant: a model may reason before it answers, and its final answer counts.

Source: CogBench's variants with reasoning (Coda-Forno et al. 2024; model.md 9.9: "Step-by-step variants allow 350
tokens"). Prompt and reading are our own, since the protocol leaves them open:

- The prompt has the situation and the question of the direct variant. It asks for steps first and for a line
  "Final answer: " with the beginning that the direct variant forces ("Machine ", "... is 0."), and ends with "A: Let us
  think step by step."
- The answer is the first line of the reply that begins with "Final answer:" and can be read; marks of emphasis around
  it do not matter. What stands elsewhere does not count, however much it looks like an answer, and nothing does behind
  the beginning of another question ("Q:"). A reply without such a line is unreadable and counts as a random choice, as
  in the direct variant (a confidence as 0).
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
_SHARE = re.compile(r"(?<![\d.,-])(?:0?\.\d+|[01](?:\.0*)?)(?![\d.,]*\d|\s*%)")


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
        """The word behind the asked beginning or at the start of the line; else the only option that is named."""
        words = [option.casefold() for option in self.options]
        _, asked, behind = said.casefold().partition(self.prefix.strip().casefold())
        first = _WORD.search(behind if asked and self.prefix.strip() else said.casefold())
        if first and first.group() in words:
            return words.index(first.group())
        named = {word for word in _WORD.findall(said) if word in self.options}
        return self.options.index(named.pop()) if len(named) == 1 else None

    def _share(self, said: str) -> float | None:
        """The number from 0 to 1 behind the asked beginning; else the only one in the line."""
        beginning = self.prefix.removesuffix("0.").strip().casefold()
        _, asked, behind = said.casefold().partition(beginning)
        numbers = _SHARE.findall(behind if asked and beginning else said)
        if not numbers or (len(numbers) > 1 and not (asked and beginning)):
            return None
        return float(numbers[0])


def reasoned(query: Query) -> Reasoned:
    """The same question with room to reason."""
    asked, _, prefix = query.text.rpartition(ANSWER)
    instruction = (
        f'Think step by step first. Then end with a line of its own that begins with "{MARK} {prefix.rstrip()}" and '
        "holds nothing else but your answer."
    )
    return Reasoned(f"{asked} {instruction}{ANSWER}{_BEGIN}", query.options, query.default, query.state, prefix)
