"""Scores of methods: bars, tables, confusion, accuracy by type, estimates with intervals."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots.drawing import _GREY, _OURS, _axes, _clean, _natural, _new, palette

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Panels in a row that a page of 944 pixels shows without shrinking their letters.
_ACROSS = 4


def _short(value: float) -> str:
    """Three decimals for a score, one for tens of seconds, none for thousands."""
    return f"{value:,.{3 if abs(value) < 10 else 1 if abs(value) < 1000 else 0}f}"


def metric_bars(
    table: pd.DataFrame,
    *,
    highlight: Sequence[str] = (),
    errors: pd.DataFrame | None = None,
    notes: Mapping[str, str] | None = None,
) -> "np.ndarray":
    """Draw one panel of horizontal bars per metric, one bar per method.

    Parameters
    ----------
    table
        Methods in rows, metrics in columns.
    highlight
        Methods drawn in the strong colour (ours); all by default.
    errors
        Standard deviations, shaped as ``table``.
    notes
        Metric to what stands below its panel, for instance which direction is better.
    """
    if table.empty:
        raise DataError("The table of metrics is empty; nothing can be drawn.")
    columns = list(table.columns)
    strong = set(highlight) or set(table.index)
    rows, across = math.ceil(len(columns) / _ACROSS), min(_ACROSS, len(columns))
    figure, axes = _new(rows, across, width=2.4, height=1.0, panels=len(columns))
    figure.set_size_inches(1.3 + 2.3 * across, rows * (0.9 + 0.3 * len(table)))
    for ax in axes.ravel()[len(columns) :]:
        ax.set_visible(False)
    place = np.arange(len(table))[::-1]
    for ax, column in zip(axes.ravel(), columns, strict=False):
        values = table[column].to_numpy(float)
        colours = [_OURS if name in strong else _GREY for name in table.index]
        spread = None if errors is None else errors[column].to_numpy(float)
        ax.barh(
            place, np.nan_to_num(values), color=colours, height=0.7, xerr=spread, ecolor="#444444"
        )
        low, high = min(0.0, float(np.nanmin(values))), max(0.0, float(np.nanmax(values)))
        for y, value in zip(place, values, strict=True):
            text = _short(value) if np.isfinite(value) else "not computed"
            ax.text(
                max(value, 0) if np.isfinite(value) else 0, y, f" {text}", va="center", fontsize=7
            )
        ax.set_xlim(low * 1.05, (high or 1.0) * 1.32)
        ax.set_yticks(
            place, list(table.index) if ax in axes[:, 0] else [""] * len(table), fontsize=8
        )
        ax.tick_params(axis="x", labelsize=7)
        ax.tick_params(axis="y", length=0)
        ax.set_title(str(column).replace("_", " "), fontsize=9)
        if notes and column in notes:
            ax.set_xlabel(notes[column], fontsize=8)
        _clean(ax)
    return axes.ravel()[: len(columns)]


def _cell(x: float, y: float, colour: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="white", lw=1.5)


def confusion(
    true: Sequence[object] | np.ndarray | pd.Series,
    predicted: Sequence[object] | np.ndarray | pd.Series,
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw which label became which: rows are true labels and sum to 1."""
    from matplotlib.ticker import PercentFormatter

    if len(true) != len(predicted):
        raise DataError(
            f"{len(true):,} true and {len(predicted):,} predicted labels; pass the same cells."
        )
    table = pd.crosstab(
        pd.Series(np.asarray(true, dtype=object), name="true").fillna("not given").astype(str),
        pd.Series(np.asarray(predicted, dtype=object), name="predicted")
        .fillna("unknown")
        .astype(str),
    )
    rows = sorted(table.index, key=_natural)
    columns = sorted(table.columns, key=lambda name: (name not in table.index, _natural(name)))
    count = table.loc[rows, columns]
    shares = count.to_numpy(float, copy=True)
    shares /= shares.sum(axis=1, keepdims=True)
    ax = _axes(ax, 1.6 + 0.38 * len(columns), 1.2 + 0.3 * len(rows))
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(len(rows)):
        for j in range(len(columns)):
            value = shares[i, j]
            if value >= 0.05:
                ax.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5,
                        color="white" if value > 0.6 else "black")  # fmt: skip
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=7)
    labels = [f"{name} ({n:,})" for name, n in count.sum(axis=1).items()]
    ax.set_yticks(range(len(rows)), labels, fontsize=7)
    ax.set_xlabel("predicted")
    ax.set_ylabel("true (cells)")
    ax.set_title(f"per cent of the true label, {len(true):,} cells", fontsize=9)
    ax.figure.colorbar(image, ax=ax, shrink=0.6, format=PercentFormatter(1.0))
    return ax


def interval_rows(
    estimates: Mapping[str, tuple[Any, Any, Any]],
    names: Sequence[str],
    *,
    xlabel: str = "estimate",
    title: str = "",
    ax: "Axes | None" = None,
) -> "Axes":
    """Draw estimates with their intervals, a row per name, methods side by side within it.

    Parameters
    ----------
    estimates
        Method to (estimate, low, high), each as long as ``names``.
    names
        Rows, from top to bottom.
    xlabel, title
        What is estimated.
    ax
        Axes to draw into.
    """
    if not estimates or not len(names):
        raise DataError("There are no estimates; nothing can be drawn.")
    ax = _axes(ax, 5.6, 0.9 + 0.3 * len(names))
    place = np.arange(len(names))[::-1]
    step = 0.7 / len(estimates)
    for j, (colour, (method, parts)) in enumerate(
        zip(palette(len(estimates)), estimates.items(), strict=True)
    ):
        middle, low, high = (np.asarray(part, float).ravel() for part in parts)
        if not len(middle) == len(low) == len(high) == len(names):
            raise DataError(
                f"{method}: {len(middle)} estimates, {len(low)} lower and {len(high)} upper ends "
                f"for {len(names)} names; pass one of each for every name."
            )
        y = place + 0.35 - (j + 0.5) * step
        ax.hlines(y, low, high, color=colour, lw=1.8)
        ax.plot(middle, y, ls="", marker="o", ms=4, color=colour, label=method)
    left, right = ax.get_xlim()
    if left < 0 < right:
        ax.axvline(0, color="#888888", lw=1, ls="--", zorder=0)
    ax.set_yticks(place, list(names), fontsize=8)
    ax.set_ylim(-0.6, len(names) - 0.4)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(xlabel)
    ax.set_title(title, fontsize=9)
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _clean(ax)
    return ax
