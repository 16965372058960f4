"""Cells in the plane, coloured by what is known of them."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.expression.components import principal_components
from genemodel.expression.neighbours import nearest
from genemodel.reports.plots.drawing import _axes, _new, category_colours

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def umap_of(
    embedding_CD: np.ndarray, *, n_neighbors: int = 15, seed: int = 0, most: int = 5000
) -> tuple[np.ndarray, np.ndarray]:
    """Lay an embedding out in the plane with UMAP, the same way every time.

    Parameters
    ----------
    embedding_CD
        (C, D) embedding.
    n_neighbors
        Neighbours of the graph.
    seed
        Seed of the layout and of the choice of cells.
    most
        Cells laid out; more are sampled.

    Returns
    -------
    (c, 2) float32, (c,) int64
        Coordinates, and the indices of the cells laid out, ascending.
    """
    from umap import umap_

    values_CD = np.asarray(embedding_CD, dtype=np.float32)
    if values_CD.ndim != 2 or len(values_CD) < 5:
        raise DataError(
            f"An embedding of shape {values_CD.shape} cannot be laid out; at least 5 cells are "
            "needed."
        )
    if not np.isfinite(values_CD).all():
        raise DataError("The embedding has NaN or infinite values; embed the cells again.")
    at = np.arange(len(values_CD))
    if len(at) > most:
        at = np.sort(np.random.default_rng(seed).choice(len(at), most, replace=False))
    values_CD = values_CD[at]
    k = min(n_neighbors, len(at) - 1)
    # The exact graph: at this size it is quick, and it spares the compilation of the approximate
    # search.
    index_CK, distance_CK = nearest(values_CD, values_CD, k)
    start_C2 = principal_components(values_CD, 2, seed)
    start_C2 *= 10 / max(float(np.abs(start_C2).max()), 1e-12)
    graph = _fuzzy_graph(index_CK, distance_CK)
    state = np.random.RandomState(seed)
    a, b = umap_.find_ab_params(1.0, 0.4)
    layout_C2, _ = umap_.simplicial_set_embedding(
        values_CD, graph, 2, 1.0, a, b, 1.0, 5, 200, start_C2.astype(np.float32), state,
        "euclidean", {}, False, {}, False,
    )  # fmt: skip
    return np.asarray(layout_C2, dtype=np.float32), at


def _fuzzy_graph(index_CK: np.ndarray, distance_CK: np.ndarray) -> Any:
    """Return UMAP's fuzzy graph of exact neighbours (the first is the cell itself).

    umap computes the same in compiled code whose compilation takes longer than all the rest.
    """
    from scipy import sparse

    n, k = index_CK.shape
    distance_CK = distance_CK.astype(np.float64)
    # rho: distance to the nearest cell that is not a duplicate.
    rho_C = np.where(distance_CK > 0, distance_CK, np.inf).min(axis=1)
    rho_C[~np.isfinite(rho_C)] = 0.0
    beyond_CK = np.clip(distance_CK - rho_C[:, None], 0.0, None)
    low_C, high_C, sigma_C = np.zeros(n), np.full(n, np.inf), np.ones(n)
    for _ in range(64):
        # sigma: such that the weights to the other cells add up to log2(k).
        total_C = np.exp(-beyond_CK[:, 1:] / sigma_C[:, None]).sum(axis=1)
        above = total_C > np.log2(k)
        high_C, low_C = np.where(above, sigma_C, high_C), np.where(above, low_C, sigma_C)
        open_ended = ~np.isfinite(high_C)
        sigma_C = np.where(open_ended, 2 * low_C, (low_C + np.where(open_ended, 0, high_C)) / 2)
    sigma_C = np.maximum(sigma_C, 1e-3 * np.maximum(distance_CK.mean(axis=1), 1e-12))
    weight_CK = np.exp(-beyond_CK / sigma_C[:, None])
    weight_CK[index_CK == np.arange(n)[:, None]] = 0.0
    directed = sparse.csr_matrix(
        (weight_CK.ravel(), (np.repeat(np.arange(n), k), index_CK.ravel())), shape=(n, n)
    )
    back = directed.T.tocsr()
    graph = (directed + back - directed.multiply(back)).tocsr()
    graph.eliminate_zeros()
    return graph.astype(np.float32)


def _size(n: int) -> float:
    """Marker area that fills the panel alike at 200 and at 50,000 cells."""
    return float(np.clip(22_000 / max(n, 1), 1.0, 16.0))


def _is_number(values: pd.Series) -> bool:
    return pd.api.types.is_float_dtype(values.dtype) or (
        pd.api.types.is_integer_dtype(values.dtype) and values.nunique() > 30
    )


def embedding_panel(
    xy_C2: np.ndarray,
    values: Sequence[object] | np.ndarray | pd.Series,
    *,
    title: str = "",
    ax: "Axes | None" = None,
    legend: bool = True,
    colours: Mapping[str, str] | None = None,
    words: float = 1.0,
) -> "Axes":
    """Draw cells in the plane, coloured by a category or a number; ``words`` scales all text.

    Categories beyond 20 are also named on the plot, because nobody can tell 30 colours apart.
    """
    ax = _axes(ax)
    values = pd.Series(np.asarray(values))
    xy_C2 = _unit(xy_C2)
    # Drawing in random order keeps the last category from hiding the others.
    order = np.random.default_rng(0).permutation(len(values))
    size = _size(len(values))
    if _is_number(values):
        number = values.to_numpy(float)
        low, high = np.nanpercentile(number, [1, 99])
        points = ax.scatter(
            xy_C2[order, 0],
            xy_C2[order, 1], c=number[order], s=size, lw=0, cmap="viridis", vmin=low, vmax=high,
            rasterized=True, plotnonfinite=False,
        )  # fmt: skip
        if legend:
            # Beside its own panel: room that the legend of another panel takes is not between them.
            ax.figure.colorbar(points, cax=ax.inset_axes((1.03, 0.2, 0.04, 0.6)))
    else:
        names = values.where(values.notna(), "not given").astype(str)
        colours = dict(colours or category_colours(names))
        ax.scatter(
            xy_C2[order, 0],
            xy_C2[order, 1],
            c=names.map(colours).to_numpy()[order],
            s=size,
            lw=0,
            rasterized=True,
        )
        if len(colours) > 20:
            from matplotlib.patheffects import withStroke

            for name in names.unique():
                x, y = np.median(xy_C2[(names == name).to_numpy()], axis=0)
                label = ax.text(x, y, name, fontsize=5.5 * words, ha="center", va="center")
                label.set_path_effects([withStroke(linewidth=1.5, foreground="white")])
        if legend:
            category_legend(ax, colours, words=words)
    ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05), xticks=[], yticks=[], aspect="equal")
    ax.set_title(
        f"{title}\n{len(values):,} cells" if title else f"{len(values):,} cells", fontsize=9 * words
    )
    for spine in ax.spines.values():
        spine.set_color("#CCCCCC")
    return ax


def category_legend(ax: "Axes", colours: Mapping[str, str], *, words: float = 1.0) -> None:
    """Put the legend of a categorical panel to its right."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], ls="", marker="o", ms=4.5, mew=0, color=colour, label=name)
        for name, colour in colours.items()
    ]
    columns = math.ceil(len(handles) / 16)
    ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False,
        fontsize=words * (7 if len(handles) <= 32 else 6), ncols=columns, handletextpad=0.2,
        columnspacing=0.8, borderaxespad=0.2,
    )  # fmt: skip


def _unit(xy_C2: np.ndarray) -> np.ndarray:
    """Fit into the unit square, so that all panels share their limits.

    The axes of a layout mean nothing by themselves: the narrower one is stretched, at most twofold.
    """
    xy_C2 = np.asarray(xy_C2, dtype=float)
    low, high = xy_C2.min(axis=0), xy_C2.max(axis=0)
    span_2 = np.maximum(high - low, 1e-12)
    span_2 = np.maximum(span_2, span_2.max() / 2)
    return (xy_C2 - (low + high) / 2) / span_2 + 0.5


def _check_columns(obs: pd.DataFrame, columns: Sequence[str]) -> None:
    missing = [column for column in columns if column not in obs]
    if missing:
        raise DataError(
            f"obs has no column {missing[0]!r}; it has "
            f"{', '.join(map(str, obs.columns)) or 'none'}."
        )


def embedding_grid(
    layouts: Mapping[str, np.ndarray | tuple[np.ndarray, np.ndarray]],
    obs: pd.DataFrame,
    columns: Sequence[str] = ("cell_type", "batch", "species"),
) -> "np.ndarray":
    """Draw several layouts side by side, one row per obs column.

    Parameters
    ----------
    layouts
        Title to coordinates: (C, 2), or what :func:`umap_of` returns (coordinates and cell
        indices).
    obs
        One row per cell.
    columns
        Columns of ``obs`` to colour by; a row shares its colours and its one legend.

    Returns
    -------
    array of Axes
        Shape (columns, layouts).
    """
    _check_columns(obs, columns)
    if not layouts or not columns:
        raise DataError("A grid of embeddings needs at least one layout and one obs column.")
    figure, axes = _new(len(columns), len(layouts), width=3.0, height=3.1)
    # A wide figure is shown smaller on a page, so its words must be larger.
    words = 1.0 if len(layouts) < 3 else 1.3
    figure.set_size_inches(3.0 * len(layouts) + 1.7 * words, 3.1 * len(columns))
    for j, (title, layout) in enumerate(layouts.items()):
        xy_C2, at = layout if isinstance(layout, tuple) else (layout, np.arange(len(layout)))
        if (
            len(at)
            and at.max() >= len(obs)
            or (not isinstance(layout, tuple) and len(at) != len(obs))
        ):
            raise DataError(
                f"The layout {title!r} has {len(at):,} cells and obs has {len(obs):,}; pass the "
                "same cells."
            )
        for i, column in enumerate(columns):
            values = obs[column].iloc[at]
            colours = None
            last = j == len(layouts) - 1
            if not _is_number(values):
                colours = category_colours(
                    obs[column].where(obs[column].notna(), "not given").astype(str)
                )
            embedding_panel(
                xy_C2, values, title=title, ax=axes[i, j], legend=last, colours=colours, words=words
            )
            if j == 0:
                axes[i, j].set_ylabel(column.replace("_", " "), fontsize=10 * words)
            if i > 0:
                axes[i, j].set_title("")
    return axes


def embedding_panels(
    layout: "tuple[np.ndarray, np.ndarray]",
    obs: pd.DataFrame,
    columns: Sequence[str],
    *,
    title: str = "",
    across: int = 2,
) -> "np.ndarray":
    """Draw one layout several times, coloured by one obs column after the other.

    Parameters
    ----------
    layout
        What :func:`umap_of` returns: coordinates and the indices of the cells laid out.
    obs
        One row per cell.
    columns
        Columns of ``obs`` to colour by; every panel has a legend or a colour bar of its own.
    title
        What is laid out.
    across
        Panels in a row.

    Returns
    -------
    array of Axes
        One per column.
    """
    if len(columns) == 1:
        return embedding_grid({title: layout}, obs, columns).ravel()
    _check_columns(obs, columns)
    if not columns:
        raise DataError("An embedding is drawn by at least one obs column; none was named.")
    xy_C2, at = layout
    rows = math.ceil(len(columns) / across)
    _, axes = _new(rows, across, width=4.6, height=3.2, panels=len(columns))
    for ax in axes.ravel()[len(columns) :]:
        ax.set_visible(False)
    for ax, column in zip(axes.ravel(), columns, strict=False):
        embedding_panel(xy_C2, obs[column].iloc[at], title=title, ax=ax)
        ax.set_ylabel(column.replace("_", " "), fontsize=10)
    return axes.ravel()[: len(columns)]
