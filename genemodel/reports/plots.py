"""Figures from plain arrays: what a reader wants to see before believing a number.

Every function draws into given Axes or makes its own figure, says how many cells or genes it shows,
and returns the Axes. Legends stand outside, points are small and rasterised, colours stay apart for
colour-blind readers, and panels that are to be compared share their limits.

matplotlib and umap are imported where they are used: importing this module costs nothing.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import ConfigError, DataError
from genemodel.expression.components import principal_components
from genemodel.expression.neighbours import nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "annotation_bars",
    "calibration",
    "confusion",
    "curve_names",
    "embedding_grid",
    "embedding_panel",
    "embedding_panels",
    "held_out_scatter",
    "interval_rows",
    "loss_curves",
    "mean_variance",
    "metric_bars",
    "metric_table",
    "palette",
    "source_panels",
    "throughput_curves",
    "umap_of",
    "zero_fraction",
]

# Okabe and Ito's colours without black, the darkest first.
_OKABE_ITO = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C510A", "#F0E442",
)  # fmt: skip
_GREY = "#B5B5B5"
_OURS, _THEIRS = "#0072B2", "#D55E00"
# Linear RGB as a deuteranope sees it (Viénot, Brettel and Mollon 1999).
_DEUTERANOPE = np.array(
    [[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]
)


# Axes to draw into instead of a new figure, those that are left; see `into`.
_GIVEN: ContextVar["list[Axes] | None"] = ContextVar("given axes", default=None)


@contextmanager
def into(axes: "Sequence[Axes]") -> Iterator[None]:
    """Have the plots drawn within use these axes, one a panel, instead of figures of their own.

    Raises
    ------
    ConfigError
        They are more or fewer than the panels.
    """
    left = list(axes)
    token = _GIVEN.set(left)
    try:
        yield
    finally:
        _GIVEN.reset(token)
    if left:
        used = len(axes) - len(left)
        raise ConfigError(f"ax holds {len(axes)} axes, and this plot has {used} panels.")


def _new(
    rows: int = 1,
    columns: int = 1,
    *,
    width: float = 4.2,
    height: float = 3.4,
    panels: int | None = None,
) -> "tuple[Figure, np.ndarray]":
    """Make a figure of a grid, of which the first ``panels`` (all by default) are drawn into.

    Of axes that were given, the figure that is returned is an empty one: size, title and layout of
    theirs are their owner's.
    """
    from matplotlib import pyplot as plt
    from matplotlib.figure import Figure

    given = _GIVEN.get()
    if given is not None:
        panels = rows * columns if panels is None else panels
        if len(given) < panels:
            raise ConfigError(
                f"ax holds too few axes: this plot has {panels} panels more, and {len(given)} "
                "are left. Give one for each, or none for a figure of its own."
            )
        apart = Figure()
        axes = np.empty(rows * columns, object)
        axes[:panels], given[:panels] = given[:panels], []
        for place in range(panels, rows * columns):
            axes[place] = apart.add_subplot()
        return apart, axes.reshape(rows, columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained"
    )
    return figure, axes


def _axes(ax: "Axes | None", width: float = 4.2, height: float = 3.4) -> "Axes":
    return _new(width=width, height=height)[1][0, 0] if ax is None else ax


def _clean(ax: "Axes") -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _lab(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return _lab_of_linear(linear)


def _lab_of_linear(linear: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = np.clip(linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089]), 0, None)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack(
        [116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1
    )


@functools.cache
def palette(n: int) -> tuple[str, ...]:
    """Return n colours that stay apart, also for a colour-blind reader.

    The first eight follow Okabe and Ito. Each further one is, of a grid of colours neither too
    light nor too dark for a white page, the one farthest from all before it in CIELAB, counting the
    smaller of the distances for normal and (doubled) for deuteranopic sight.
    """
    chosen = list(_OKABE_ITO[:n])
    if n <= len(_OKABE_ITO):
        return tuple(chosen)
    level = np.linspace(0, 1, 12)
    grid = np.stack(np.meshgrid(level, level, level, indexing="ij"), axis=-1).reshape(-1, 3)
    lab = _lab(grid)
    # CIELAB overstates differences between glaring colours, so those are left out.
    grid = grid[(lab[:, 0] > 28) & (lab[:, 0] < 82) & (np.hypot(lab[:, 1], lab[:, 2]) < 80)]
    fixed = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in chosen])

    def views(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return _lab_of_linear(linear), _lab_of_linear(np.clip(linear @ _DEUTERANOPE.T, 0, 1))

    normal, blind = views(grid)
    nearest = np.full(len(grid), np.inf)

    def take(one_normal: np.ndarray, one_blind: np.ndarray) -> None:
        # Deuteranopes have fewer colours to choose from, so half the distance must do for them.
        apart = np.minimum(
            np.linalg.norm(normal - one_normal, axis=1),
            2.0 * np.linalg.norm(blind - one_blind, axis=1),
        )
        np.minimum(nearest, apart, out=nearest)

    for pair in zip(*views(fixed), strict=True):
        take(*pair)
    while len(chosen) < n:
        at = int(nearest.argmax())
        chosen.append("#" + "".join(f"{round(255 * v):02X}" for v in grid[at]))
        take(normal[at], blind[at])
    return tuple(chosen)


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


def category_colours(names: Sequence[object] | pd.Series) -> dict[str, str]:
    """Give every category a colour, in sorted order (numbers inside names count as numbers)."""
    unique = sorted(pd.Series(names).dropna().astype(str).unique(), key=_natural)
    real = [name for name in unique if name != "not given"]
    return {
        **dict(zip(real, palette(len(real)), strict=True)),
        **dict.fromkeys(set(unique) - set(real), _GREY),
    }


def _natural(name: str) -> list[tuple[int, int | str]]:
    parts: list[tuple[int, int | str]] = []
    digits = ""
    for character in name + " ":
        if character.isdigit():
            digits += character
            continue
        if digits:
            parts.append((0, int(digits)))
            digits = ""
        parts.append((1, character))
    return parts


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
    missing = [column for column in columns if column not in obs]
    if missing:
        raise DataError(
            f"obs has no column {missing[0]!r}; it has "
            f"{', '.join(map(str, obs.columns)) or 'none'}."
        )
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
    missing = [column for column in columns if column not in obs]
    if missing:
        raise DataError(
            f"obs has no column {missing[0]!r}; it has "
            f"{', '.join(map(str, obs.columns)) or 'none'}."
        )
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


def held_out_scatter(
    observed: np.ndarray, predicted: np.ndarray, *, ax: "Axes | None" = None, most: int = 50_000
) -> "Axes":
    """Draw held-out against predicted values on logarithmic axes, with both correlations.

    Correlations are over all entries; the plot shows at most ``most`` of them, zeros included.
    """
    from scipy import stats

    observed, predicted = _pair(observed, predicted)
    pearson = stats.pearsonr(np.log1p(observed), np.log1p(predicted)).statistic
    spearman = stats.spearmanr(observed, predicted).statistic
    ax = _axes(ax, 4.0, 3.6)
    rng = np.random.default_rng(0)
    at = rng.choice(len(observed), most, replace=False) if len(observed) > most else slice(None)
    x, y = np.log1p(predicted[at]), np.log1p(observed[at])
    # Counts are whole: without a little spread all points of one count lie on one line.
    y = y + rng.uniform(-0.04, 0.04, len(y))
    top = 1.03 * max(float(x.max()), float(y.max()), 0.5)
    ax.scatter(x, y, s=3, lw=0, alpha=0.25, color=_OURS, rasterized=True)
    ax.plot([0, top], [0, top], color="#888888", lw=1, ls="--")
    ax.set(xlim=(-0.06 * top, top), ylim=(-0.06 * top, top), aspect="equal")
    ax.set_xlabel("log(1 + predicted)")
    ax.set_ylabel("log(1 + held out)")
    ax.set_title(
        f"Pearson {pearson:.3f} (log), Spearman {spearman:.3f}\nn = {len(observed):,}", fontsize=9
    )
    _clean(ax)
    return ax


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
    figure, axes = _new(1, len(columns), width=2.4, height=1.0)
    figure.set_size_inches(1.3 + 2.3 * len(columns), 0.9 + 0.3 * len(table))
    place = np.arange(len(table))[::-1]
    for ax, column in zip(axes[0], columns, strict=True):
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
            place, list(table.index) if ax is axes[0, 0] else [""] * len(table), fontsize=8
        )
        ax.tick_params(axis="x", labelsize=7)
        ax.tick_params(axis="y", length=0)
        ax.set_title(str(column).replace("_", " "), fontsize=9)
        if notes and column in notes:
            ax.set_xlabel(notes[column], fontsize=8)
        _clean(ax)
    return axes[0]


def metric_table(table: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Draw a table of scores whose cells are shaded from worst to best of their column (0 to 1)."""
    from matplotlib import colormaps

    if table.empty:
        raise DataError("The table of metrics is empty; nothing can be drawn.")
    ax = _axes(ax, 1.2 + 0.85 * table.shape[1], 0.7 + 0.32 * len(table))
    shades = colormaps["Blues"]
    values = table.to_numpy(float)
    for j in range(values.shape[1]):
        column = values[:, j]
        low, high = np.nanmin(column), np.nanmax(column)
        for i, value in enumerate(column):
            place = 0.5 if high == low else (value - low) / (high - low)
            known = np.isfinite(value)
            ax.add_patch(_cell(j, i, shades(0.08 + 0.55 * place) if known else "#F4F4F4"))
            best = known and value == high
            ax.text(
                j + 0.5, i + 0.5, f"{value:.3f}" if known else "–", ha="center", va="center",
                fontsize=8, fontweight="bold" if best else "normal",
            )  # fmt: skip
    ax.set(xlim=(0, values.shape[1]), ylim=(len(table), 0))
    ax.set_xticks(
        np.arange(values.shape[1]) + 0.5, [str(c).replace("_", " ") for c in table.columns]
    )
    ax.tick_params(
        axis="x",
        labelrotation=35,
        labelsize=8,
        length=0,
        top=True,
        labeltop=True,
        bottom=False,
        labelbottom=False,
    )
    for label in ax.get_xticklabels():
        label.set(ha="left")
    ax.set_yticks(np.arange(len(table)) + 0.5, list(table.index), fontsize=8)
    ax.tick_params(axis="y", length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return ax


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


def annotation_bars(per_type: pd.DataFrame, *, ax: "Axes | None" = None) -> "Axes":
    """Draw accuracy per cell type for several methods.

    Parameters
    ----------
    per_type
        Cell types in rows, methods in columns, values between 0 and 1.
    ax
        Axes to draw into.
    """
    if per_type.empty:
        raise DataError("The table of accuracies is empty; nothing can be drawn.")
    ax = _axes(ax, 5.4, 0.9 + 0.28 * len(per_type) * max(1, 0.55 * per_type.shape[1]))
    height = 0.8 / per_type.shape[1]
    place = np.arange(len(per_type))[::-1]
    for j, (colour, method) in enumerate(
        zip(palette(per_type.shape[1]), per_type.columns, strict=True)
    ):
        ax.barh(
            place + 0.4 - (j + 0.5) * height,
            per_type[method],
            height=0.9 * height,
            color=colour,
            label=str(method),
        )
    ax.set_yticks(place, list(per_type.index), fontsize=8)
    ax.set_xlim(0, 1)
    ax.set_xlabel("accuracy")
    ax.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _clean(ax)
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
