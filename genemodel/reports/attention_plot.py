"""The figure of attention between genes, from its matrix."""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots import _new

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Names of more genes cannot be read.
_MOST_NAMES = 80


def attention_map(matrix: pd.DataFrame, *, relative: bool, title: str, cluster: bool) -> "Axes":
    """Draw a heat map: rows look at columns.

    Parameters
    ----------
    matrix
        Row looks at column; NaN where no cell holds both, drawn grey.
    relative
        What the numbers are, for the legend.
    title
        Above the figure.
    cluster
        Put genes beside each other that look alike.
    """
    value_GG = matrix.to_numpy(float)
    n = len(value_GG)
    beside_GG = np.isfinite(value_GG) & ~np.eye(n, dtype=bool)
    if not beside_GG.any():
        raise DataError("No cell holds two of the genes; nothing can be drawn.")
    if cluster and n > 2:
        order = _alike(value_GG)
        matrix = matrix.iloc[order, order]
        value_GG = value_GG[np.ix_(order, order)]
        beside_GG = beside_GG[np.ix_(order, order)]
    size = float(np.clip(1.6 + 0.16 * n, 3.4, 12.0))
    ax: Axes = _new(width=size + 0.8, height=size)[1].ravel()[0]
    # A gene looks at itself as at no other: it does not set the colours.
    low, high = np.quantile(value_GG[beside_GG], [0.01, 0.99])
    image = ax.imshow(
        np.ma.masked_invalid(value_GG), cmap="viridis", vmin=low, vmax=max(high, low + 1e-12),
        interpolation="nearest", aspect="equal",
    )  # fmt: skip
    image.cmap.set_bad("#D9D9D9")
    if n <= _MOST_NAMES:
        names = list(map(str, matrix.index))
        ax.set_xticks(range(n), names, rotation=90, fontsize=7)
        ax.set_yticks(range(n), names, fontsize=7)
    else:
        ax.set_xticks([])
        ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("gene that is looked at")
    ax.set_ylabel("gene that looks")
    bar = ax.figure.colorbar(image, ax=ax, shrink=0.7, extend="both")
    bar.set_label("attention ÷ its mean in the cell" if relative else "share of attention")
    bar.outline.set_visible(False)
    ax.set_title(title, fontsize=9)
    return ax


def _alike(value_GG: np.ndarray) -> np.ndarray:
    """Order genes by average linkage of their rows and columns."""
    from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
    from scipy.spatial.distance import pdist

    off_GG = np.where(np.eye(len(value_GG), dtype=bool), np.nan, value_GG)
    filled_GG = np.where(np.isfinite(off_GG), off_GG, np.nanmean(off_GG))
    both_GF = np.concatenate([filled_GG, filled_GG.T], axis=1)
    distance = pdist(both_GF)
    return leaves_list(optimal_leaf_ordering(linkage(distance, "average"), distance))
