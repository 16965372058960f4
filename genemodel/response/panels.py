"""Scores of units as scores of a panel, between the mean response (0) and a repeat (1).

Axes: U units, V values of a unit, B bootstrap draws.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from genemodel.metrics.response import METRICS, discrimination, scaled

# Least distance between mean response and a repeat that a score may be divided by (of the
# challenge's own data the smallest is 0.28), in score and in standard errors.
MIN_ROOM, ERRORS = 0.1, 1.5
MEAN, REPLICATE = "mean response", "replicate split"
# Parts of the expression error, whose panel value is the ratio of their sums.
ERROR, NOTHING = "_error", "_nothing"
VALUES = (*(name for name in METRICS if name != "expression_error"), ERROR, NOTHING)


def values_of(rows: Sequence[Mapping[str, float]], ranked_U: np.ndarray) -> np.ndarray:
    """Scores of units as an array (U, V), in the order of ``VALUES``."""
    return np.array([
        [rank if name == "discrimination" else row[name] for name in VALUES]
        for row, rank in zip(rows, ranked_U, strict=True)
    ])  # fmt: skip


def panel(values_UV: np.ndarray) -> dict[str, float]:
    """Give the six scores over all units: means of what is defined, and a ratio of sums."""
    known_UV = np.isfinite(values_UV)
    n_V, sum_V = known_UV.sum(0), np.where(known_UV, values_UV, 0.0).sum(0)
    by_name = {
        name: float(sum_V[v] / n_V[v]) if n_V[v] else np.nan for v, name in enumerate(VALUES)
    }  # fmt: skip
    error, nothing = sum_V[VALUES.index(ERROR)], sum_V[VALUES.index(NOTHING)]
    by_name["expression_error"] = float(error / nothing) if nothing > 0 else np.nan
    return {name: by_name[name] for name in METRICS}


def ranked(
    predicted_UG: np.ndarray, measured_UG: np.ndarray, kept_G: np.ndarray, context_U: np.ndarray
) -> np.ndarray:
    """Discriminate among what is held out together in one context.

    Contexts differ by more than perturbations do. Where each has one unit, among all of them.
    """
    codes, place_U = np.unique(context_U, return_inverse=True)
    if len(codes) == len(context_U):
        return discrimination(predicted_UG, measured_UG, kept_G)
    found_U = np.full(len(context_U), np.nan)
    for x in range(len(codes)):
        at = place_U == x
        found_U[at] = discrimination(predicted_UG[at], measured_UG[at], kept_G)
    return found_U


def telling(values: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    """Name the scores that tell methods apart: a repeat is clearly better than the mean response.

    By ``MIN_ROOM``, and by more than chance among units gives; the expression error also needs an
    effect to be measured against.
    """
    mean_UV, repeat_UV = values[MEAN], values[REPLICATE]
    raw = {name: panel(values[name]) for name in (MEAN, REPLICATE)}
    found = []
    for name, way in METRICS.items():
        sign = 1 if way == "high" else -1
        room = sign * (raw[REPLICATE][name] - raw[MEAN][name])
        if name == "expression_error":
            over_U = repeat_UV[:, VALUES.index(NOTHING)]
            by_chance = bool(over_U.mean() <= ERRORS * _error(over_U))
        else:
            one, other = (_error(x_UV[:, VALUES.index(name)]) for x_UV in (mean_UV, repeat_UV))
            by_chance = bool(room <= ERRORS * np.hypot(one, other))
        if np.isfinite(room) and room > MIN_ROOM and not by_chance:
            found.append(name)
    return tuple(found)


def _error(value_U: np.ndarray) -> float:
    known = value_U[np.isfinite(value_U)]
    return float(known.std(ddof=1) / np.sqrt(len(known))) if len(known) > 1 else np.inf


def scaled_panel(
    values: Mapping[str, np.ndarray], names: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """Give each method the six, scaled, and ``total``, their mean.

    Parameters
    ----------
    values
        Scores by method.
    names
        Those that count, others are NaN; default :func:`telling`.
    """
    names = telling(values) if names is None else names
    raw = {name: panel(values_UV) for name, values_UV in values.items()}
    found = {}
    for name, one in raw.items():
        parts = scaled(one, raw[MEAN], raw[REPLICATE])
        parts = {key: value if key in names else np.nan for key, value in parts.items()}
        known = [value for value in parts.values() if np.isfinite(value)]
        found[name] = parts | {"total": float(np.mean(known)) if known else np.nan}
    return found
