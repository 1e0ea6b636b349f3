"""Experiment 1, probabilistic reasoning: how much a belief weighs the prior, and how much the evidence."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from micro.evaluation.cogbench.experiment import Evidence, Experiment, Game, Query, ask
from micro.evaluation.cogbench.fits import least_squares
from micro.evaluation.cogbench.tables import flags, numbers, ordered, sums

WIDE = (0.1, 0.2, 0.3, 0.7, 0.8, 0.9)
NARROW = (0.4, 0.5, 0.5, 0.6)
CLIP = 1e-5


class ProbabilisticReasoning(Experiment):
    """Two urns, a wheel that picks one, a ball: what is the probability of the left urn?

    Each run asks once with informative likelihoods and even priors, and once the other way round.
    """

    name: ClassVar[str] = "probabilistic_reasoning"
    columns: ClassVar[tuple[str, ...]] = ("run", "informative_lh", "prior", "lh", "left_pred", "red_observation")
    metrics: ClassVar[tuple[str, ...]] = ("prior weighting", "likelihood weighting", "performance")
    runs: ClassVar[int] = 200
    questions: ClassVar[int | None] = 2

    def play(self, run: int, generator: np.random.Generator, preset: str) -> Game:
        rows = []
        for informative in (True, False):
            prior = float(generator.choice(NARROW if informative else WIDE))
            share = float(generator.choice(WIDE if informative else NARROW))
            left, right = generator.permutation(["F", "J"]).tolist()
            is_left = generator.random() < prior
            red = bool(generator.random() < (share if is_left else 1 - share))
            answer = yield Query(
                _prompt(prior, share, left, right, red), state={"prior": prior, "share": share, "red": red}
            )
            rows.append(
                {
                    "run": run,
                    "informative_lh": informative,
                    "prior": prior,
                    "lh": share,
                    "left_pred": answer,
                    "red_observation": red,
                }
            )
        return rows

    def evidence(self, frame: Any, preset: str) -> Evidence:
        """Least squares of the answer's logit on the logits of prior and likelihood, no intercept, both conditions.

        Performance: one minus the mean absolute distance to Bayes' rule, over all answers (for both presets: the
        published trimming of the largest errors is found in the human value only). Answers outside 0..1 count as the
        nearest of both, and the details say how many there were.
        """
        frame, run = ordered(frame)
        prior, share, answer = (numbers(frame, name) for name in ("prior", "lh", "left_pred"))
        for name, values in (("prior", prior), ("lh", share)):
            if ((values <= 0) | (values >= 1)).any():
                raise ValueError(f"column {name!r}: expected probabilities between 0 and 1, exclusively")
        outside = int(((answer < 0) | (answer > 1)).sum())
        answer = np.clip(answer, 0, 1)
        likelihood = np.where(flags(frame, "red_observation") == 1, share, 1 - share)
        joint = prior * likelihood
        errors = np.abs(answer - joint / (joint + (1 - prior) * (1 - likelihood)))
        X = np.stack([_logit(prior), _logit(likelihood)], 1)
        weights = least_squares(X, _logit(np.clip(answer, CLIP, 1 - CLIP)), run)
        error, count = sums(run, errors), sums(run, np.ones(len(errors)))
        return Evidence(
            self.metrics,
            len(error),
            lambda w: np.append(weights(w), 1 - (w @ error) / (w @ count)),
            {"rows": len(frame), "answers_outside_0_1": outside},
        )


def _logit(p: Any) -> Any:
    return np.log(p) - np.log1p(-p)


def _prompt(prior: float, share: float, left: str, right: str, red: bool) -> str:
    ten, hundred = round(prior * 10), round(share * 100)
    body = (
        f"A game master keeps two urns on a table: urn {left} stands on the left and urn {right} on the right.\n"
        f"Urn {left} holds {hundred} red and {100 - hundred} blue balls. "
        f"Urn {right} holds {100 - hundred} red and {hundred} blue balls.\n"
        f"To pick an urn, the game master spins a wheel with ten equal sections: {ten} of them are marked {left} and "
        f"{10 - ten} are marked {right}. You cannot see where the wheel stops.\n"
        "Out of the urn that the wheel picked, the game master draws one ball without looking and shows it to you: "
        f"the ball is {'red' if red else 'blue'}."
    )
    question = f"How probable is it that this ball came from urn {left}?"
    hint = "(Answer with a number between 0 and 1 that has two decimals.)"
    return ask(body, question, hint, f"The probability that it came from urn {left} is 0.")
