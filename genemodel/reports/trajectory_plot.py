"""The figure of an ordered column, from its tables."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots import _GREY, _OURS, _THEIRS, _clean, _new
from genemodel.trajectories.populations import FLOORS, OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def trajectory_panels(
    tables: Mapping[str, Any], summary: Mapping[str, Any], *, most: int = 20
) -> "np.ndarray":
    """Draw a panel for every table there is.

    Parameters
    ----------
    tables, summary
        As a result has them.
    most
        Genes of the last panel.
    """
    kinds = []
    if "placing_long" in tables:
        kinds = list(dict.fromkeys(tables["placing_long"]["held_out"].astype(str)))
    n = len(kinds) + ("populations_long" in tables) + ("genes" in tables)
    if not n:
        raise DataError("The result has no table; nothing can be drawn.")
    genes = tables["genes"].head(most) if "genes" in tables else pd.DataFrame()
    figure, axes = _new(1, n, width=4.4, height=max(3.2, 1.1 + 0.19 * len(genes)))
    panels = iter(axes[0])
    unit = "units of the column" if summary["measured"] else "steps"
    for kind in kinds:
        long = tables["placing_long"]
        own = long[long["held_out"].astype(str) == kind]
        ours = [str(summary["placed_by"])]
        _by_method(next(panels), own, "error", f"error, {kind} held out ({unit})", ours)
    if "populations_long" in tables:
        ax = next(panels)
        _by_method(ax, tables["populations_long"], "energy", "energy distance to a time held out",
                   [OURS])  # fmt: skip
    if "genes" in tables:
        _changes(next(panels), figure, genes)
    figure.suptitle(
        f"{summary['cells']:,} cells at {len(summary['times'])} times; a dot is "
        f"{'a donor' if summary['donor_key'] else 'all cells, no donors were named'}", fontsize=9,
    )  # fmt: skip
    return np.asarray(axes[0])


def _by_method(ax: "Axes", long: pd.DataFrame, value: str, label: str, ours: list[str]) -> None:
    """One row a method, a dot a donor, a bar at their mean; the best on top."""
    by_donor = long.groupby(["method", "donor"], observed=True)[value].mean()
    mean = by_donor.groupby("method").mean()
    floors = [name for name in mean.index if name in FLOORS]
    others = mean.drop(floors).sort_values(ascending=False)
    order = [*others.index, *mean[floors].sort_values(ascending=False).index]
    for place, name in enumerate(order):
        colour = _OURS if name in ours else _GREY if name in floors else _THEIRS
        own = by_donor.loc[name].to_numpy(float)
        ax.plot(own, np.full(own.size, place), ls="", marker="o", ms=3.5, alpha=0.55, color=colour)
        ax.plot([mean[name]], [place], ls="", marker="|", ms=14, mew=2.2, color=colour)
    ax.set_yticks(range(len(order)), order, fontsize=8)
    ax.set_ylim(-0.6, len(order) - 0.4)
    ax.set_xlim(left=min(0.0, float(by_donor.min())))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel(label, fontsize=9)
    _clean(ax)


def _changes(ax: "Axes", figure: Any, genes: pd.DataFrame) -> None:
    """Mean change of log expression at every step, the genes that go with time most."""
    columns = [name for name in genes if str(name).startswith("Change_")]
    shown = genes.sort_values("Time_correlation", ascending=False, kind="stable")
    change = shown[columns].to_numpy(float)
    most = float(np.abs(change).max()) or 1.0
    image = ax.imshow(change, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    steps = [str(name).removeprefix("Change_").replace("_to_", " → ") for name in columns]
    ax.set_xticks(range(len(columns)), steps, rotation=45, ha="right", fontsize=7)
    labels = [
        f"{name} ({r:+.2f})"
        for name, r in zip(shown["Gene"].astype(str), shown["Time_correlation"], strict=True)
    ]
    ax.set_yticks(range(len(shown)), labels, fontsize=7)
    ax.tick_params(length=0)
    ax.set_title("genes that go with time (correlation)", fontsize=9)
    figure.colorbar(image, ax=ax, label="change of log expression", shrink=0.7)
