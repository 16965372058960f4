"""Metrics of the user's own: ``gm.evaluate(..., metrics={"mine": function})``.

A metric is a function of arrays and returns a number. What it is given depends on the task::

    integrate   (embedding_CD, obs)          obs: the cells' columns, a DataFrame
    impute      (denoised_CG, held_out_CG)   expected counts; the molecules set aside
    annotate    (given_Q, true_Q)            labels; "unknown" where a method gave none

It scores every method on the same cells as the built-in metrics, and stands behind them in every
table. The command line takes none: a configuration that can name a function is a program.

Axes: C cells, G genes, D embedding width, Q cells of a query.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from genemodel.errors import ConfigError
from genemodel.evaluation.methods import FAILURES
from genemodel.reports.comparison import COLUMNS

type Function = Callable[..., float]


@dataclass(frozen=True)
class Metric:
    """A function that scores, and which way is better.

    Attributes
    ----------
    function
        Arrays to a number; see :mod:`genemodel.evaluation.own_metrics`.
    better
        "high", "low", or None where neither is.
    """

    function: Function
    better: Literal["high", "low"] | None = "high"


def checked(metrics: "Mapping[str, Function | Metric]", task: str) -> dict[str, Metric]:
    """Refuse what is no metric, before any method runs.

    Raises
    ------
    ConfigError
        A name that a built-in metric bears, or a value that cannot be called.
    """
    found: dict[str, Metric] = {}
    for name, given in metrics.items():
        metric = given if isinstance(given, Metric) else Metric(given)
        if not callable(metric.function):
            raise ConfigError(
                f"metrics: {name!r} is {metric.function!r}; give a function that returns a number"
            )
        if metric.better not in ("high", "low", None):
            raise ConfigError(
                f"metrics: better of {name!r} is {metric.better!r}; high, low or None"
            )
        if name in COLUMNS[task] or name in ("seconds", "peak_mb", "n_seeds"):
            raise ConfigError(f"metrics: {name!r} is a metric of task={task} already; rename yours")
        found[name] = metric
    return found


def scored(metrics: Mapping[str, Metric], *given: Any) -> tuple[dict[str, float], dict[str, str]]:
    """Give the value of every metric, and of those without one the reason."""
    values: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name, metric in metrics.items():
        try:
            values[name] = float(metric.function(*given))
        except FAILURES as error:
            values[name] = math.nan
            failed[name] = f"{type(error).__name__}: {error}"
    return values, failed
