"""Losses, throughput and what else a run writes down by step."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots.drawing import _OURS, _THEIRS, _clean, _new

if TYPE_CHECKING:
    pass


def curve_names(curves: pd.DataFrame) -> list[str]:
    """Return the objectives of a table of curves: what follows ``train/`` or ``val/``."""
    names: dict[str, None] = {}
    for column in curves.columns:
        part, _, name = str(column).partition("/")
        if part in ("train", "val") and name and name != "total":
            names[name] = None
    return list(names)


def loss_curves(
    curves: pd.DataFrame, trivial: Mapping[str, float] | None = None, *, names: Sequence[str] = ()
) -> "np.ndarray":
    """Draw training and held-out loss of every objective against its best trivial predictor.

    Parameters
    ----------
    curves
        One row per log entry: ``step``, ``train/NAME``, ``val/NAME``; empty cells are skipped.
    trivial
        Loss of the trivial predictor per objective (a dashed line).
    names
        Objectives to draw; all by default.

    Returns
    -------
    array of Axes
        One per objective.
    """
    if "step" not in curves:
        raise DataError(
            f"The curves have no column 'step'; they have {', '.join(map(str, curves.columns))}."
        )
    names = list(names) or curve_names(curves)
    if not names:
        raise DataError("The curves have no column train/NAME or val/NAME; nothing can be drawn.")
    columns = min(3, len(names))
    rows = math.ceil(len(names) / columns)
    _, axes = _new(rows, columns, width=3.9, height=2.9, panels=len(names))
    for ax in axes.ravel()[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.ravel(), names, strict=False):
        shown = []
        for part, colour, style in (
            ("train", "#8DB8DC", {"lw": 1.0}),
            ("val", _OURS, {"lw": 1.6, "marker": "o", "ms": 3.5}),
        ):
            column = f"{part}/{name}"
            if column not in curves:
                continue
            points = curves[["step", column]].dropna()
            label = "training" if part == "train" else "held-out cells"
            ax.plot(points["step"], points[column], color=colour, label=label, **style)
            # The first steps are far above the rest and would flatten everything of interest.
            settled = points.loc[points["step"] >= 0.02 * curves["step"].max(), column]
            shown.append(settled if len(settled) else points[column])
        if trivial and name in trivial:
            ax.axhline(trivial[name], color=_THEIRS, ls="--", lw=1.2, label="trivial predictor")
            shown.append(pd.Series([trivial[name]]))
        values = pd.concat(shown)
        low, high = float(values.min()), float(values.max())
        margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
        ax.set(title=name.replace("_", " "), xlabel="step", ylim=(low - margin, high + margin))
        ax.set_ylabel("loss" if ax is axes[0, 0] else "")
        _clean(ax)
    axes[0, 0].legend(frameon=False, fontsize=8)
    return axes.ravel()[: len(names)]


def throughput_curves(curves: pd.DataFrame) -> "np.ndarray":
    """Draw learning rate, throughput, fill and waiting for data by step, as far as logged."""
    units = {
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_s": "tokens / s",
        "cells_per_s": "cells / s",
        "data_wait": "waiting for data (share)",
        "fill": "fill of packed batches (share)",
    }
    present = [name for name in units if name in curves and curves[name].notna().any()]
    if not present:
        raise DataError(f"The curves have none of {', '.join(units)}; nothing can be drawn.")
    figure, axes = _new(
        math.ceil(len(present) / 3),
        min(3, len(present)),
        width=3.9,
        height=2.3,
        panels=len(present),
    )
    figure.set_layout_engine("constrained", h_pad=0.1)
    for ax in axes.ravel()[len(present) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.ravel(), present, strict=False):
        points = curves[["step", name]].dropna()
        ax.plot(points["step"], points[name], color=_OURS, lw=1.2)
        ax.set_title(units[name], fontsize=9)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=8)
        ax.set_ylim(0, 1.15 * float(points[name].max()) or 1.0)
        _clean(ax)
    return axes.ravel()[: len(present)]
