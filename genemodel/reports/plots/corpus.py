"""The sources of a corpus: how large, how deep."""

from collections.abc import Mapping, Sequence

import numpy as np

from genemodel.errors import DataError
from genemodel.reports.plots.drawing import _OURS, _clean, _new


def source_panels(
    names: Sequence[str],
    cells_S: np.ndarray,
    quantiles: Mapping[str, np.ndarray],
    title: str = "",
) -> "np.ndarray":
    """Draw the size of every source and quantiles of its cells.

    Parameters
    ----------
    names, cells_S
        Source and its number of cells.
    quantiles
        Quantity to (S, 3): low, median, high; drawn on a logarithmic axis.
    title
        Title of the figure.
    """
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    if not len(names):
        raise DataError("There are no sources; nothing can be drawn.")
    figure, axes = _new(1, 1 + len(quantiles), width=3.0)
    figure.set_size_inches(2.2 + 2.6 * (1 + len(quantiles)), 1.1 + 0.26 * len(names))
    place = np.arange(len(names))[::-1]
    axes[0, 0].barh(place, cells_S, color=_OURS, height=0.7)
    for y, n in zip(place, cells_S, strict=True):
        axes[0, 0].text(n, y, f" {n:,}", va="center", fontsize=7)
    axes[0, 0].set_xlim(0, 1.25 * max(1, int(np.max(cells_S))))
    axes[0, 0].set_yticks(place, list(names), fontsize=8)
    axes[0, 0].set_xlabel("cells")
    for ax, (label, values_S3) in zip(axes[0, 1:], quantiles.items(), strict=True):
        # A source of empty cells would have no place on a logarithmic axis.
        low, middle, high = np.maximum(np.asarray(values_S3, float), 0.5).T
        ax.hlines(place, low, high, color="#8DB8DC", lw=3)
        ax.plot(middle, place, ls="", marker="o", ms=5, color=_OURS)
        ax.set_xscale("log")
        ax.set_xlim(0.8 * low.min(), 1.25 * high.max())
        ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.set_yticks(place, [""] * len(names))
        ax.set_xlabel(f"{label} (median, 5 to 95 %)")
    for ax in axes[0]:
        ax.set_ylim(-0.7, len(names) - 0.3)
        ax.tick_params(axis="x", labelsize=7)
        ax.tick_params(axis="y", length=0)
        _clean(ax)
    figure.suptitle(title, fontsize=10)
    return axes[0]
