"""Plots of AnnData, runs and corpora: the public names under ``genemodel.pl``.

Every function returns matplotlib Axes, so that the figure can be changed, and takes ``ax``,
``show`` and ``save`` as scanpy's do: ``gm.pl.embedding(adata, color="batch", save="cells.pdf")``.
"""

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import ConfigError, DataError
from genemodel.inference.obs_keys import EMBEDDED, INTEGRATED
from genemodel.networks.attention import KEY as ATTENTION
from genemodel.networks.attention import from_uns
from genemodel.reports import plots
from genemodel.reports.attention_plot import attention_map
from genemodel.reports.gene_plots import attribution_bars, gene_map
from genemodel.reports.perturbation_plot import perturbation_panels
from genemodel.reports.response_plot import response_panels
from genemodel.reports.trajectory_plot import trajectory_panels
from genemodel.settings import some

if TYPE_CHECKING:
    import anndata as ad
    from matplotlib.axes import Axes

    from genemodel.corpus.corpus import Corpus
    from genemodel.networks.attention import AttentionResult
    from genemodel.perturbation.result import PerturbationResult
    from genemodel.reports.comparison import EvaluationResult
    from genemodel.trajectories.result import TrajectoryResult

__all__ = [
    "annotation",
    "attention",
    "attributions",
    "calibration",
    "corpus",
    "coverage",
    "embedding",
    "gene_vectors",
    "integration",
    "intervals",
    "perturbation",
    "response",
    "scores",
    "training",
    "trajectory",
]

_SCORES = {
    "integrate": ("bio", "batch", "total", "batch_unlabelled", "ilisi", "pcr"),
    "impute": ("mse_ratio", "poisson_ratio", "pearson_cell", "pearson_gene"),
}


_SHOWN = """\
ax
    Axes to draw into, one or a sequence of one a panel; default a new figure.
show
    Show the figure, as in a script; a notebook shows it by itself.
save
    File to write it to, ``.png``, ``.svg`` or ``.pdf``.
"""


def _plot[R](draw: Callable[..., R]) -> Callable[..., R]:
    """Give a function that draws what every plot takes: ``ax``, ``show`` and ``save``."""

    @functools.wraps(draw)
    def plot(
        *given: Any,
        ax: "Axes | Sequence[Axes] | np.ndarray | None" = None,
        show: bool = False,
        save: str | os.PathLike[str] | None = None,
        **named: Any,
    ) -> R:
        from matplotlib import pyplot as plt

        if ax is None:
            drawn = draw(*given, **named)
        else:
            with plots.into(list(np.ravel(np.asarray(ax, object)))):
                drawn = draw(*given, **named)
        first: Axes = np.ravel(np.asarray(drawn, object))[0]
        if save is not None:
            file = Path(save)
            if not file.suffix or not file.absolute().parent.is_dir():
                raise ConfigError(
                    f"save={file}: name a file in a folder that is there, with .png, .svg or .pdf."
                )
            first.get_figure(root=True).savefig(file, bbox_inches="tight", dpi=200)  # type: ignore[union-attr]
        if show:
            plt.show()
        return drawn

    signature = inspect.signature(draw)
    taken = inspect.signature(plot, follow_wrapped=False).parameters
    own = [*signature.parameters.values(), *(taken[name] for name in ("ax", "show", "save"))]
    plot.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    text = inspect.cleandoc(draw.__doc__ or "")
    plot.__doc__ = text.replace("\n\nReturns\n---", f"\n{_SHOWN}\nReturns\n---", 1)
    return plot


def _kept(result: Any, key: str, call: str) -> Any:
    """Take what a call left in an AnnData; None where its result itself is given."""
    uns = getattr(result, "uns", None)
    if uns is None:
        return None
    if key not in uns:
        raise DataError(
            f"adata.uns has no {key!r}; it has {', '.join(map(str, uns)) or 'nothing'}. "
            f"Compute it first with genemodel.{call}."
        )
    return uns[key]


@_plot
def embedding(
    adata: "ad.AnnData",
    key: str | None = None,
    *,
    color: str | Sequence[str] = ("cell_type", "batch", "species"),
    seed: int = 0,
) -> np.ndarray:
    """Draw a UMAP of an embedding, one panel per obs column.

    Parameters
    ----------
    adata
        Cells.
    key
        Embedding in ``adata.obsm``; default ``X_integrated`` where there is one, else
        ``X_genemodel``. One with two columns is drawn as it is; any other is laid out by UMAP with
        a fixed seed (at most 5,000 cells, sampled).
    color
        Columns of ``adata.obs``. Of the default ones those that are missing are left out.
    seed
        Seed of the layout.

    Returns
    -------
    array of Axes
        One per column.
    """
    columns = [color] if isinstance(color, str) else list(color)
    if tuple(columns) == ("cell_type", "batch", "species"):
        columns = [column for column in columns if column in adata.obs] or columns[:1]
    key = _own(adata) if key is None else key
    layout = _layout(adata, key, seed)
    return plots.embedding_panels(layout, adata.obs, columns, title=key)


@_plot
def integration(
    adata: "ad.AnnData",
    *,
    before: str = "X_pca",
    after: str | None = None,
    batch_key: str = "batch",
    label_key: str | None = "cell_type",
    seed: int = 0,
) -> np.ndarray:
    """Draw cells before and after integration side by side, by cell type and by batch.

    Parameters
    ----------
    adata
        Cells.
    before, after
        Embeddings in ``adata.obsm``; the default of ``after`` is that of :func:`embedding`.
    batch_key, label_key
        Columns of ``adata.obs``; ``label_key=None`` leaves the cell types out.
    seed
        Seed of both layouts.

    Returns
    -------
    array of Axes
        Shape (columns, 2): left before, right after.
    """
    columns = [batch_key] if label_key is None else [label_key, batch_key]
    after = _own(adata) if after is None else after
    layouts = {
        f"before ({before})": _layout(adata, before, seed),
        f"after ({after})": _layout(adata, after, seed),
    }
    return plots.embedding_grid(layouts, adata.obs, columns)


def _own(adata: "ad.AnnData") -> str:
    """Name the embedding that is ours."""
    return INTEGRATED if INTEGRATED in adata.obsm else EMBEDDED


def _layout(adata: "ad.AnnData", key: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if key not in adata.obsm:
        raise DataError(
            f"adata.obsm has no {key!r}; it has {', '.join(adata.obsm) or 'nothing'}. Compute it "
            f"first (genemodel.embed writes {EMBEDDED!r}, genemodel.integrate {INTEGRATED!r}) or "
            "name another with key=, before= or after=."
        )
    values_CD = np.asarray(adata.obsm[key])
    if values_CD.ndim == 2 and values_CD.shape[1] == 2:
        return values_CD, np.arange(len(values_CD))
    return plots.umap_of(values_CD, seed=seed)


@_plot
def training(run: str | os.PathLike[str]) -> np.ndarray:
    """Draw the curves of a training run: losses against trivial predictors, rate, speed.

    Parameters
    ----------
    run
        Directory of the run, with ``metrics.csv`` and ``validation.csv``.

    Returns
    -------
    array of Axes
        One per objective, then learning rate, gradient norm and speed.
    """
    folder = Path(run)
    metrics, validation = folder / "metrics.csv", folder / "validation.csv"
    if not metrics.is_file():
        raise DataError(
            f"{folder} holds no metrics.csv, so it is not the directory of a training run; pass "
            "the directory that `genemodel pretrain` or `genemodel finetune` named as out."
        )
    tables = [_read(metrics)] + ([_read(validation)] if validation.is_file() else [])
    curves = pd.concat(tables, ignore_index=True)
    trivial = {}
    for column in curves.columns:
        part, _, name = str(column).partition("/")
        known = curves[column].dropna()
        if part == "val_trivial" and len(known):
            trivial[name] = float(known.iloc[-1])
    losses = plots.loss_curves(curves, trivial)
    return np.concatenate([losses, plots.throughput_curves(tables[0])])


def _read(path: Path) -> pd.DataFrame:
    try:
        table = pd.read_csv(path)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a readable table of curves: {error}.") from error
    if "step" not in table:
        raise DataError(
            f"{path} has no column 'step'; it has {', '.join(map(str, table.columns))}."
        )
    return table


@_plot
def calibration(
    nominal: Sequence[float] | np.ndarray,
    coverage: Sequence[float] | np.ndarray | Mapping[str, Sequence[float]],
    *,
    by_decile: pd.Series | None = None,
    decile_nominal: float = 0.9,
    n: int | None = None,
) -> np.ndarray:
    """Draw how often predicted intervals hold what was held out.

    Parameters
    ----------
    nominal
        Nominal levels of the intervals, for instance ``[0.5, 0.8, 0.9]``.
    coverage
        Observed coverage at each level; a mapping draws several methods.
    by_decile
        Coverage of the ``decile_nominal`` interval per expression decile.
    decile_nominal
        Nominal level of ``by_decile``.
    n
        Number of counts behind the figure.

    Returns
    -------
    array of Axes
        One, or two with ``by_decile``.
    """
    return plots.calibration(
        nominal, coverage, by_decile=by_decile, decile_nominal=decile_nominal, n=n
    )


@_plot
def coverage(result: "EvaluationResult") -> np.ndarray:
    """Draw the coverage of prediction intervals of every imputation method that was compared.

    Parameters
    ----------
    result
        From ``genemodel.evaluate(..., task="impute")``.

    Returns
    -------
    array of Axes
        Observed against nominal coverage of every method, and that of its 90 % intervals per
        expression decile: zeros hide a wrong method on the left, the highest deciles show it.
    """
    if result.coverage is None:
        raise DataError(
            "This comparison has no coverage of intervals: it is one of embeddings. Use "
            "gm.evaluate(..., task='impute')."
        )
    whole = result.coverage[result.coverage["entries"] == "all"]
    wide = whole.pivot_table(index="level", columns="method", values="coverage", sort=False)
    wide = wide.sort_index()[[name for name in result.summary().index if name in wide]]
    curves = {str(name): wide[name].to_numpy(float) for name in wide}
    at = result.coverage[result.coverage["level"] == 0.9]
    deciles = at[~at["entries"].isin(["all", "nonzero"])].pivot_table(
        index="entries", columns="method", values="coverage", sort=False
    )
    return plots.calibration(
        wide.index.to_numpy(float), curves, by_decile=None if deciles.empty else deciles[list(wide)]
    )


@_plot
def scores(result: "EvaluationResult", *, metrics: Sequence[str] | None = None) -> np.ndarray:
    """Draw the scores of a comparison, one panel per metric; ours in the strong colour.

    Parameters
    ----------
    result
        From ``genemodel.evaluate``.
    metrics
        Columns of ``result.summary()``; by default those that a reader needs first.

    Returns
    -------
    array of Axes
        One per metric.
    """
    table = result.summary()
    if metrics is None:
        known = [name for name in _SCORES[result.task] if name in table]
        # Without labels there is no total, and the parts of the batch score stand for themselves.
        shown = known[:3] if "total" in known and table["total"].notna().any() else known
        metrics = [name for name in shown if table[name].notna().any()]
    missing = [name for name in metrics if name not in table]
    if missing:
        raise DataError(
            f"The comparison has no metric {missing[0]!r}; it has {', '.join(map(str, table))}."
        )
    better = {name: direction for name, (_, direction) in result.columns().items()}
    ours = result.table.loc[result.table["kind"] == "ours", "method"]
    spread = result.spread()[list(metrics)]
    return plots.metric_bars(
        table[list(metrics)],
        highlight=list(dict.fromkeys(ours)),
        errors=spread if spread.notna().any(axis=None) else None,
        notes={name: f"{way}er is better" for name, way in better.items() if way is not None},
    )


@_plot
def annotation(
    adata: "ad.AnnData", *, label_key: str = "cell_type", key: str = "genemodel_label"
) -> "Axes":
    """Draw which known cell type became which label.

    Parameters
    ----------
    adata
        Cells that ``genemodel.annotate`` has labelled.
    label_key
        obs column of the known cell types.
    key
        obs column of the labels given.

    Returns
    -------
    Axes
        Rows are known types, columns are labels; a row adds up to 100 %.
    """
    for name in (label_key, key):
        if name not in adata.obs:
            raise DataError(
                f"adata.obs has no column {name!r}; it has "
                f"{', '.join(map(str, adata.obs.columns)) or 'none'}."
            )
    return plots.confusion(adata.obs[label_key], adata.obs[key])


@_plot
def intervals(
    estimates: Mapping[str, tuple[Any, Any, Any]],
    names: Sequence[str],
    *,
    xlabel: str = "estimate",
    title: str = "",
) -> "Axes":
    """Draw estimates with their intervals, a row per gene, several ways to estimate side by side.

    Parameters
    ----------
    estimates
        Way to estimate -> (estimate, low, high), each with one value per gene.
    names
        The genes, from top to bottom.
    xlabel, title
        What is estimated.

    Returns
    -------
    Axes
    """
    return plots.interval_rows(estimates, names, xlabel=xlabel, title=title)


@_plot
def perturbation(
    result: "PerturbationResult | ad.AnnData", *, key: str = "genemodel_perturb", most: int = 20
) -> np.ndarray:
    """Draw what an in-silico perturbation did: evidence against shift, and the strongest genes.

    Parameters
    ----------
    result
        From ``genemodel.perturb``, or the AnnData that it wrote to.
    key
        Key of ``adata.uns``.
    most
        Genes of the right panel.

    Returns
    -------
    array of Axes
        p against matched genes over the shift; the genes with most evidence beside the shift of
        their matched genes, and beside their own with all other genes held in place.
    """
    kept = _kept(result, key, "perturb")
    statistics = result.statistics if kept is None else kept["statistics"]
    return perturbation_panels(statistics, most=most)


@_plot
def attributions(
    table: pd.DataFrame,
    *,
    labels: Sequence[str] | None = None,
    most: int = 15,
) -> np.ndarray:
    """Draw the genes that a model's answer rests on, as bars.

    Parameters
    ----------
    table
        From ``genemodel.attribute``.
    labels
        Labels that are drawn, a panel each; default all, at most 12.
    most
        Genes of each, the strongest by the mean over cells.

    Returns
    -------
    array of Axes
        One per label; blue speaks for it, orange against it.
    """
    return attribution_bars(table, labels=labels, most=most)


@_plot
def gene_vectors(
    table: pd.DataFrame,
    color: "Mapping[str, object] | pd.Series | pd.DataFrame | str | None" = None,
    *,
    seed: int = 0,
    most: int = 5000,
) -> np.ndarray:
    """Draw vectors of genes in the plane, coloured by what is known of them.

    Parameters
    ----------
    table
        From ``genemodel.gene_vectors``.
    color
        Labels of genes by Ensembl id or symbol (a mapping, Series, or DataFrame for several
        panels), or a column of the table; default the number of cells that hold a gene.
    seed
        Seed of the layout.
    most
        Genes laid out: labelled ones, then those of most cells.

    Returns
    -------
    array of Axes
        One per colouring.
    """
    return gene_map(table, color, seed=seed, most=most)


@_plot
def attention(
    result: "AttentionResult | ad.AnnData",
    *,
    layer: int | None = None,
    head: int | None = None,
    genes: Sequence[str] = (),
    cluster: bool = True,
    key: str = ATTENTION,
) -> "Axes":
    """Draw which genes look at which, as a heat map: rows look at columns.

    Parameters
    ----------
    result
        From ``genemodel.attention``, or the AnnData that it wrote to.
    layer, head
        One of those that were kept apart (``per_head=True``); default their mean.
    genes
        Some of the genes, by the names in the result; default all.
    cluster
        Put genes beside each other that look alike; otherwise in the order of the result.
    key
        Key of ``adata.uns``.

    Returns
    -------
    Axes
    """
    kept = _kept(result, key, "attention")
    if kept is not None:
        result = from_uns(kept)
    matrix = result.matrix(layer, head)
    if missing := [name for name in genes if name not in matrix.index]:
        raise DataError(
            f"genes: {missing[0]!r} is not in the result; it has "
            f"{some(list(map(str, matrix.index)))}."
        )
    if len(genes):
        matrix = matrix.loc[list(genes), list(genes)]
    where = [f"{name} {at}" for name, at in (("layer", layer), ("head", head)) if at is not None]
    title = f"attention, {', '.join(where) or 'mean of heads'}, {result.summary['cells']:,} cells"
    return attention_map(
        matrix, relative=bool(result.summary["relative"]), title=title, cluster=cluster
    )


@_plot
def trajectory(
    result: "TrajectoryResult | ad.AnnData", *, key: str = "genemodel_time", most: int = 20
) -> np.ndarray:
    """Draw how well cells are placed, how far a predicted population is off, and which genes go.

    Parameters
    ----------
    result
        From ``genemodel.trajectory``, or the AnnData that it wrote to.
    key
        Key of ``adata.uns``.
    most
        Genes of the last panel.

    Returns
    -------
    array of Axes
        A panel for each part there is: error by method and donor; energy distance by method and
        donor; the genes that go with time most, and their change at every step.
    """
    kept = _kept(result, key, "trajectory")
    if kept is None:
        return trajectory_panels(result.tables(), result.summary, most=most)
    return trajectory_panels(kept, kept["summary"], most=most)


@_plot
def response(result: Any, *, most: int = 6) -> np.ndarray:
    """Draw predicted over measured effects of what was held out, one panel a perturbation.

    Parameters
    ----------
    result
        From ``genemodel.respond``.
    most
        Panels, the largest measured effects first.

    Returns
    -------
    array of Axes
        One point a gene; grey where cells are not told from controls.
    """
    return response_panels(result.predicted, result.measured, result.tests, most=most)


@_plot
def corpus(corpus: "Corpus", *, most_sources: int = 30) -> np.ndarray:
    """Draw cells, depth and genes per cell of every source of a corpus.

    Parameters
    ----------
    corpus
        An open corpus.
    most_sources
        Sources drawn, the largest first.

    Returns
    -------
    array of Axes
        Cells per source, counts per cell, genes per cell (median, and the middle 90 %).
    """
    if most_sources < 1:
        raise ConfigError(f"gm.pl.corpus: most_sources={most_sources}; it must be at least 1.")
    source_C = np.asarray(corpus.source_C)
    size_S = np.bincount(source_C, minlength=len(corpus.sources))
    shown = np.argsort(-size_S, kind="stable")[:most_sources]
    names = [f"{corpus.sources[s].name} ({corpus.sources[s].species})" for s in shown]
    quantiles: dict[str, Any] = {}
    for label, values_C in (
        ("counts per cell", np.asarray(corpus.library_C)),
        ("genes per cell", np.asarray(corpus.n_genes_C)),
    ):
        quantiles[label] = np.array(
            [np.quantile(values_C[source_C == s], [0.05, 0.5, 0.95]) for s in shown]
        )
    title = f"{len(corpus):,} cells, {len(corpus.sources):,} sources"
    if len(shown) < len(corpus.sources):
        title += f" (largest {len(shown)} shown)"
    return plots.source_panels(names, size_S[shown], quantiles, title)
