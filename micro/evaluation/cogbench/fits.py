"""Fits of the scorers: least squares and logistic regression over runs, Rescorla-Wagner learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from micro.analysis.statistics import Array
from micro.evaluation.cogbench.tables import Integers, sums

MAX_BETA = 1e5
FLOOR = 1e-5  # smallest probability of a choice
# Half the 95 % quantile of chi-squared with one degree of freedom: what the log-likelihood may lack at a value that the
# data do not exclude.
PROFILE_DROP = 1.920729


def least_squares(X: Array, y: Array, run: Integers) -> Callable[[Array], Array]:
    """Coefficients as a function of the runs' weights. X [rows, columns], y [rows], run [rows].

    Normal equations are summed per run once; directions that the data leave open get zero, as with a pseudo-inverse.
    """
    squares = sums(run, X[:, :, None] * X[:, None, :])
    products = sums(run, X * y[:, None])

    def coefficients(weights: Array) -> Array:
        gram = np.tensordot(weights, squares, 1)
        found: Array = np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ (weights @ products)
        return found

    return coefficients


def logistic(X: Array, y: Array, weights: Array | None = None, *, iterations: int = 35) -> Array | None:
    """Coefficients of a logistic regression by maximum likelihood (Newton with step halving, no penalty).

    Args:
        X: design [rows, columns].
        y: 0 or 1 [rows].
        weights: how often each row counts.
        iterations: at most.

    Returns:
        Coefficients [columns], or None without a maximum: separated data, collinear columns, no convergence.
    """
    w = np.ones(len(y)) if weights is None else weights
    X, y, w = X[w > 0], y[w > 0], w[w > 0]
    beta = np.zeros(X.shape[1])
    if len(y) == 0 or np.linalg.matrix_rank(X) < X.shape[1]:
        return None
    sign = 2 * y - 1
    loss = float(w @ np.logaddexp(0, -sign * (X @ beta)))
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-np.clip(X @ beta, -700, 700)))
        hessian = (X * (w * p * (1 - p))[:, None]).T @ X
        try:
            step = np.linalg.solve(hessian, X.T @ (w * (y - p)))
        except np.linalg.LinAlgError:
            return None
        if not np.isfinite(step).all():
            return None
        # Under separation every step moves the predictor by about one, so that this never holds.
        if np.abs(X @ step).max() < 1e-8:
            return beta + step
        for _ in range(30):
            trial = float(w @ np.logaddexp(0, -sign * (X @ (beta + step))))
            if trial <= loss + 1e-12 * abs(loss):  # what rounding may add
                break
            step = step / 2
        beta, loss = beta + step, trial
    return None


@dataclass(frozen=True)
class Visits:
    """Choices of one run, one column per casino, visits of a casino in order. Arrays [visits, casinos].

    ``choice`` 0 or 1; ``reward``; ``counts`` False where a casino has fewer visits than the others.
    """

    choice: Integers
    reward: Array
    counts: NDArray[np.bool_]

    @classmethod
    def of(cls, task: Array, choice: Array, reward: Array) -> Visits:
        """From rows in order."""
        columns = [np.flatnonzero(task == value) for value in np.unique(task)]
        shape = max(map(len, columns)), len(columns)
        chosen, rewards, counts = np.zeros(shape, np.int64), np.zeros(shape), np.zeros(shape, bool)
        for c, rows in enumerate(columns):
            chosen[: len(rows), c], rewards[: len(rows), c], counts[: len(rows), c] = choice[rows], reward[rows], True
        return cls(chosen, rewards, counts)

    def loss(self, up: Array, down: Array, beta: Array) -> Array:
        """Negative log-likelihood [candidates] of a Rescorla-Wagner learner with a softmax choice, in nats.

        up, down: learning rates for errors above and below zero [candidates]; beta: inverse temperatures [candidates].
        Values start at one half, those of a casino are its own.
        """
        casinos = np.arange(self.choice.shape[1])
        q = np.full((2, len(casinos), len(beta)), 0.5)
        total = np.zeros(len(beta))
        for choice, reward, counts in zip(self.choice, self.reward, self.counts, strict=True):
            mine = q[choice, casinos]
            p = 1 / (1 + np.exp(np.minimum(beta * (q[1 - choice, casinos] - mine), 700)))
            total -= np.log(np.clip(p, FLOOR, 1 - FLOOR))[counts].sum(0)
            error = reward[:, None] - mine
            q[choice, casinos] = mine + np.where(error > 0, up, down) * error
        return total


@dataclass(frozen=True)
class LearningFit:
    """Best parameters, their loss in nats, and how far the data leave the metric open.

    ``low`` and ``high``: the range of the metric whose profile likelihood lies within 1.92 nats of the best (a 95 %
    likelihood interval, searched on a grid); a range of almost the whole scale means that the likelihood is flat.
    """

    value: float
    beta: float
    loss: float
    low: float
    high: float


def _beta(u: Array) -> Array:
    """[0, 1] -> [0, MAX_BETA] on a logarithmic scale, so that the search sees small and large values alike."""
    result: Array = np.expm1(u * np.log1p(MAX_BETA))
    return result


def learning_rate(visits: Visits, seed: int) -> LearningFit:
    """One learning rate for all errors."""
    best, loss = _minimise(lambda x: visits.loss(x[0], x[0], _beta(x[1])), 2, seed)
    alpha, u = _grid(_axis(best[0], 41, 0.1), _axis(best[1], 41, 0.06))
    low, high = _open_range(alpha, visits.loss(alpha, alpha, _beta(u)), float(best[0]), loss)
    return LearningFit(float(best[0]), float(_beta(best[1])), loss, low, high)


def optimism(visits: Visits, seed: int) -> LearningFit:
    """Learning rate of errors above zero minus that of errors below zero."""
    best, loss = _minimise(lambda x: visits.loss(x[0], x[1], _beta(x[2])), 3, seed)
    up, down, u = _grid(_axis(best[0], 13, 0.2), _axis(best[1], 13, 0.2), _axis(best[2], 17, 0.06))
    value = float(best[0] - best[1])
    low, high = _open_range(up - down, visits.loss(up, down, _beta(u)), value, loss)
    return LearningFit(value, float(_beta(best[2])), loss, low, high)


def _minimise(loss: Callable[[Array], Array], parameters: int, seed: int) -> tuple[Array, float]:
    """Seeded differential evolution over the unit cube, all candidates of a generation at once."""
    from micro.errors import require

    optimize = require("scipy.optimize", "eval", "the instrumental experiment of CogBench")

    def vectorised(x: Array) -> Array | float:
        values = loss(x.reshape(parameters, -1))
        return values if x.ndim > 1 else float(values[0])

    found = optimize.differential_evolution(
        vectorised,
        [(0.0, 1.0)] * parameters,
        maxiter=100,
        tol=1e-6,
        seed=np.random.default_rng(seed),
        vectorized=True,
        updating="deferred",
    )
    return np.asarray(found.x), float(found.fun)


def _axis(best: float, points: int, reach: float) -> Array:
    """Points over [0, 1], and more of them around the best value."""
    near = np.clip(best + np.linspace(-reach, reach, points // 2), 0, 1)
    return np.unique(np.concatenate([np.linspace(0, 1, points), near]))


def _grid(*axes: Array) -> tuple[Array, ...]:
    return tuple(part.ravel() for part in np.meshgrid(*axes))


def _open_range(metric: Array, losses: Array, best: float, loss: float) -> tuple[float, float]:
    near = metric[losses <= min(loss, float(losses.min())) + PROFILE_DROP]
    return min([best, *near.tolist()]), max([best, *near.tolist()])
