"""Counts against what was held out of them: intervals, scatter, variance, zeros."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots.drawing import _OURS, _axes, _clean, _new, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def calibration(
    nominal: Sequence[float] | np.ndarray,
    coverage: Sequence[float] | np.ndarray | Mapping[str, Sequence[float]],
    *,
    by_decile: pd.Series | pd.DataFrame | Mapping[object, float] | None = None,
    decile_nominal: float = 0.9,
    n: int | None = None,
) -> "np.ndarray":
    """Draw how often predicted intervals hold what was held out.

    Parameters
    ----------
    nominal
        Nominal levels of the intervals, for instance 0.5, 0.8, 0.9.
    coverage
        Observed coverage at each level, or several methods by name.
    by_decile
        Coverage of the ``decile_nominal`` interval per expression decile, or other groups; a table
        has a column for each method.
    n
        Number of counts behind the figure.

    Returns
    -------
    array of Axes
        One, or two with ``by_decile``.
    """
    nominal = np.asarray(nominal, float)
    methods = coverage if isinstance(coverage, Mapping) else {"predicted": coverage}
    _, axes = _new(1, 1 if by_decile is None else 2, width=4.0, height=3.5)
    ax = axes[0, 0]
    ax.plot([0, 1], [0, 1], color="#888888", lw=1, ls="--", label="exact")
    colours = dict(zip(map(str, methods), palette(len(methods)), strict=True))
    for name, values in methods.items():
        values = np.asarray(values, float)
        if values.shape != nominal.shape:
            raise DataError(
                f"{name}: {values.size} coverages for {nominal.size} nominal levels; pass one for "
                "each."
            )
        ax.plot(nominal, values, color=colours[str(name)], marker="o", ms=4, lw=1.4, label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("observed coverage of held-out counts")
    ax.set_title("interval coverage" + (f" (n = {n:,} counts)" if n else ""), fontsize=9)
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    _clean(ax)
    if by_decile is not None:
        ax = axes[0, 1]
        table = by_decile if isinstance(by_decile, pd.DataFrame) else pd.DataFrame({"": by_decile})
        ax.axhspan(decile_nominal - 0.05, decile_nominal + 0.05, color="#E8EEF4", lw=0)
        ax.axhline(decile_nominal, color="#888888", lw=1, ls="--")
        for name in table.columns:
            colour = colours.get(str(name), _OURS)
            ax.plot(range(len(table)), table[name], color=colour, marker="o", ms=4, lw=1.4)
        ax.set_xticks(range(len(table)), [str(i) for i in table.index])
        ax.set_ylim(min(decile_nominal - 0.1, float(table.min(axis=None)) - 0.02), 1.0)
        ax.set_xlabel("expression decile (1 = lowest)")
        ax.set_ylabel(f"coverage of {100 * decile_nominal:.0f} % intervals")
        ax.set_title("by expression decile", fontsize=9)
        _clean(ax)
    return axes.ravel()


def _pair(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, float).ravel(), np.asarray(second, float).ravel()
    if first.shape != second.shape or len(first) < 2:
        raise DataError(
            f"{len(first):,} observed and {len(second):,} predicted values; pass the same entries, "
            "at least 2."
        )
    return first, second


def mean_variance(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, ax: "Axes | None" = None
) -> "Axes":
    """Draw the variance of genes against their mean, observed and predicted.

    Parameters
    ----------
    curves
        Name to (mean_G, variance_G); the first is drawn in grey as the observation.
    ax
        Axes to draw into.
    """
    ax = _axes(ax, 4.0, 3.6)
    colours = ("#9A9A9A", *palette(max(1, len(curves) - 1)))
    n = 0
    top = low = 1.0
    for colour, (name, (mean_G, variance_G)) in zip(colours, curves.items(), strict=False):
        mean_G, variance_G = _pair(mean_G, variance_G)
        seen = (mean_G > 0) & (variance_G > 0)
        n = max(n, int(seen.sum()))
        ax.scatter(
            mean_G[seen],
            variance_G[seen],
            s=3,
            lw=0,
            alpha=0.5,
            color=colour,
            rasterized=True,
            label=name,
        )
        top, low = max(top, float(mean_G[seen].max())), min(low, float(mean_G[seen].min()))
    line = np.array([low, top])
    ax.plot(line, line, color="#444444", lw=1, ls="--", label="Poisson (variance = mean)")
    ax.set(xscale="log", yscale="log")
    ax.set_xlabel("mean of a gene (counts per cell)")
    ax.set_ylabel("variance")
    ax.set_title(f"{n:,} genes", fontsize=9)
    ax.legend(frameon=False, fontsize=8, markerscale=3)
    _clean(ax)
    return ax


def zero_fraction(
    observed_G: np.ndarray, predicted_G: np.ndarray, *, ax: "Axes | None" = None
) -> "Axes":
    """Draw the share of zeros per gene, observed against predicted."""
    observed_G, predicted_G = _pair(observed_G, predicted_G)
    ax = _axes(ax, 3.8, 3.6)
    ax.scatter(observed_G, predicted_G, s=4, lw=0, alpha=0.4, color=_OURS, rasterized=True)
    ax.plot([0, 1], [0, 1], color="#888888", lw=1, ls="--")
    off = float(np.abs(observed_G - predicted_G).mean())
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set_xlabel("observed share of zeros")
    ax.set_ylabel("predicted share of zeros")
    ax.set_title(f"{len(observed_G):,} genes, mean difference {off:.3f}", fontsize=9)
    _clean(ax)
    return ax
