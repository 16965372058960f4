"""Scores of units as scores of a panel, between the mean response (0) and a repeat (1).

Axes: U units, V values of a unit, B bootstrap draws.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from genemodel.metrics.response import METRICS, MIN_ROOM, scaled

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


def scaled_panel(
    values: Mapping[str, np.ndarray], margin: float = MIN_ROOM
) -> dict[str, dict[str, float]]:
    """Method -> the six, scaled, and ``total``, their mean."""
    raw = {name: panel(values_UV) for name, values_UV in values.items()}
    found = {}
    for name, one in raw.items():
        parts = scaled(one, raw[MEAN], raw[REPLICATE], margin)
        known = [value for value in parts.values() if np.isfinite(value)]
        found[name] = parts | {"total": float(np.mean(known)) if known else np.nan}
    return found
