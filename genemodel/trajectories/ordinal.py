"""Ordinal regression: where a cell stands between the first and the last of some ordered classes.

The cumulative logit model (McCullagh 1980): P(time ≤ k) = σ(θ_k − w·x), with thresholds θ in order,
so that one direction explains all steps. A cell's time is read off that direction, linear between
the middles of two times that were learnt: so it may be of a time never seen. (The expectation over
times jumps from one that was learnt to the next: docs/decisions.md.)

Axes: C cells, D components, T times.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
from scipy.special import expit

MOST_STEPS = 500
# The least that a class may have, so that its logarithm stays finite.
_LEAST = 1e-12


@dataclass(frozen=True)
class OrdinalRegression:
    """A fitted model.

    Attributes
    ----------
    mean_D, scale_D
        What components are brought to mean 0 and deviation 1 by.
    weight_D
        Direction of time, of standardised components.
    threshold_T
        Between one time and the next, ascending, (T − 1,).
    centre_T
        Mean place of the cells of every time, ascending.
    value_T
        Times as numbers.
    """

    mean_D: np.ndarray
    scale_D: np.ndarray
    weight_D: np.ndarray
    threshold_T: np.ndarray
    centre_T: np.ndarray
    value_T: np.ndarray

    @classmethod
    def fit(cls, x_CD: np.ndarray, code_C: np.ndarray, value_T: np.ndarray, penalty: float) -> Self:
        """Fit to cells of known time, every time weighing the same.

        Parameters
        ----------
        x_CD
            Components.
        code_C
            Number of the time, 0 to T − 1; every one of them occurs.
        value_T
            Times as numbers, for :meth:`predict`.
        penalty
            Of the squared weights, a cell.
        """
        from scipy.optimize import minimize

        x_CD = np.asarray(x_CD, np.float64)
        mean_D, scale_D = x_CD.mean(0), x_CD.std(0)
        scale_D = np.where(scale_D > 0, scale_D, 1.0)
        x_CD = (x_CD - mean_D) / scale_D
        n_T = np.bincount(code_C, minlength=len(value_T)).astype(float)
        weight_C = 1.0 / (len(value_T) * n_T[code_C])
        width = x_CD.shape[1]
        # Even classes: thresholds at the quantiles of the logistic distribution.
        share_T = np.arange(1, len(value_T)) / len(value_T)
        start_T = np.log(share_T / (1 - share_T))
        start = np.concatenate([np.zeros(width), start_T[:1], np.log(np.diff(start_T))])

        def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
            threshold_T = _thresholds(p[width:])
            score_C = x_CD @ p[:width]
            above_C, below_C, slope_above_C, slope_below_C = _cuts(score_C, code_C, threshold_T)
            share_C = np.maximum(above_C - below_C, _LEAST)
            cost = -float(weight_C @ np.log(share_C)) + 0.5 * penalty * float(p[:width] @ p[:width])
            each_C = weight_C / share_C
            weight_D = x_CD.T @ (each_C * (slope_above_C - slope_below_C)) + penalty * p[:width]
            gradient_T = np.zeros(len(value_T) + 1)  # of thresholds 0 … T, the outer two infinite
            np.add.at(gradient_T, code_C + 1, -each_C * slope_above_C)
            np.add.at(gradient_T, code_C, each_C * slope_below_C)
            inner_T = gradient_T[1:-1]
            # A threshold is the first and the steps up to it.
            from_here_T = inner_T[::-1].cumsum()[::-1]
            steps_T = from_here_T[1:] * np.exp(p[width + 1 :])
            return cost, np.concatenate([weight_D, from_here_T[:1], steps_T])

        found = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": MOST_STEPS})
        weight_D = found.x[:width]
        centre_T = np.bincount(code_C, x_CD @ weight_D, len(value_T)) / n_T
        # Where two times cannot be told apart their middles may change places.
        centre_T = np.maximum.accumulate(centre_T)
        return cls(mean_D, scale_D, weight_D, _thresholds(found.x[width:]), centre_T, value_T)

    def score(self, x_CD: np.ndarray) -> np.ndarray:
        """Place on the direction of time, (C,)."""
        return (np.asarray(x_CD, np.float64) - self.mean_D) / self.scale_D @ self.weight_D

    def probabilities(self, x_CD: np.ndarray) -> np.ndarray:
        """Probability of every time, (C, T)."""
        below_CT = expit(self.threshold_T - self.score(x_CD)[:, None])
        return np.diff(below_CT, axis=1, prepend=0.0, append=1.0)

    def predict(self, x_CD: np.ndarray) -> np.ndarray:
        """Time of every cell, (C,), none before the first or after the last."""
        return np.interp(self.score(x_CD), self.centre_T, self.value_T)


def _thresholds(p: np.ndarray) -> np.ndarray:
    return np.concatenate([p[:1], p[0] + np.exp(p[1:]).cumsum()])


def _cuts(
    score_C: np.ndarray, code_C: np.ndarray, threshold_T: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Distribution function at both thresholds of a cell's time, and its slopes there."""
    edge_T = np.concatenate([[-np.inf], threshold_T, [np.inf]])
    above_C = expit(edge_T[code_C + 1] - score_C)
    below_C = expit(edge_T[code_C] - score_C)
    return above_C, below_C, above_C * (1 - above_C), below_C * (1 - below_C)
