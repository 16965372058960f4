"""Scores of an integrated embedding: is the biology kept, is the batch gone.

The totals are those of scib-metrics (bio conservation, batch correction, 0.6 × bio + 0.4 × batch),
computed with its metric functions and its defaults, without its plotting front end. Beside them
stand scores of `genemodel.metrics.light` that need no convention to be read, and a
table per cell type.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.expression.neighbours import nearest
from genemodel.inference.collapse import effective_rank
from genemodel.metrics import light as light_metrics

if TYPE_CHECKING:
    from scib_metrics.nearest_neighbors import NeighborsResults

logger = logging.getLogger(__name__)

BIO = ("isolated_labels", "kmeans_nmi", "kmeans_ari", "silhouette_label", "clisi")
BATCH = ("bras", "ilisi", "kbet", "graph_connectivity", "pcr")
OURS = (
    "knn_accuracy",
    "knn_accuracy_across",
    "asw_label",
    "leiden_nmi",
    "leiden_ari",
    "kbet_all_cells",
    "same_batch_ratio",
    "pcr_share",
    "effective_rank",
)
# What a metric may raise on labels, batches or coordinates that it has no value for.
_UNDEFINED = (ArithmeticError, LookupError, RuntimeError, ValueError)
_BIO_WEIGHT = 0.6  # the weights of the scIB study
_NEIGHBOURS = (15, 50, 90)  # for the graph, kBET and LISI, as scib-metrics' benchmark takes them


def score_embeddings(
    embeddings: Mapping[str, np.ndarray],
    batch: Sequence[Any] | np.ndarray | pd.Series | None,
    label: Sequence[Any] | np.ndarray | pd.Series | None = None,
    *,
    pre: np.ndarray | None = None,
    extra: bool = False,
    n_jobs: int = 1,
    on_step: Callable[[str, str], None] | None = None,
) -> pd.DataFrame:
    """Score several embeddings of the same cells with scib-metrics.

    Parameters
    ----------
    embeddings
        Name to array of shape (n_cells, any width), one row per cell in the same order; scored as
        float32, so that an array scores the same before and after it was stored.
    batch
        Batch of each cell. ``None`` or a single batch: the batch metrics are left out.
    label
        Cell type of each cell. ``None``: only what needs no label is scored. Cells whose label is
        missing (``None`` or ``nan``) are left out of the scoring, and counted in the log. A text is
        a label, whatever it says: what stands for a missing one was settled by who read the cells.
    pre
        The uncorrected embedding (PCA) that "PCR comparison" measures the gain against; by default
        ``embeddings["none"]`` or ``embeddings["pca"]``.
    extra
        Add the columns of `OURS` (a few seconds per embedding).
    n_jobs
        Threads of the neighbour search.
    on_step
        Called with (embedding name, metric name) before each metric, to show progress.

    Returns
    -------
    pandas.DataFrame
        One row per embedding; columns ``isolated_labels … pcr`` (0–1, higher is better), then
        ``bio`` = mean of the first five, ``batch`` = mean of the next five, ``total`` = 0.6 bio +
        0.4 batch. What cannot be computed is ``nan``. Without labels, or where no label occurs in
        two batches, ``batch`` and ``total`` stay ``nan``, because the parts of ``batch`` cannot
        all be had; ``batch_unlabelled`` = mean of iLISI, PCR and kBET over all cells takes its
        place and must not be compared with ``batch``. ``attrs["n_cells"]`` is the number of cells
        scored, ``attrs["undefined"]`` says of what has no value why.

    Raises
    ------
    DataError
        Rows that do not match, values that are not finite, or nothing to score against.

    Notes
    -----
    Luecken et al. 2022 (scIB) for the metrics and weights; scib-metrics for the implementation.
    Fewer than 91 cells: the neighbourhoods shrink to all the other cells.
    """
    names = list(embeddings)
    if not names:
        raise DataError("score_embeddings got no embedding: pass at least one name -> array")
    batch_C, label_C, keep_C = _cells_to_score(batch, label, len(embeddings[names[0]]))
    arrays = {name: _checked(name, embeddings[name], keep_C) for name in names}
    pre_CD = _reference(arrays, pre, keep_C) if batch_C is not None else None
    undefined = undefined_of(batch_C, label_C)
    rows = {}
    failed: dict[str, str] = {}
    for name, array_CD in arrays.items():

        def step(metric: str, name: str = name) -> None:
            if on_step is not None:
                on_step(name, metric)

        step("neighbours")
        neighbours = _neighbours(array_CD, n_jobs)
        measure = _Measure(step, name, dict(undefined))
        row = _scib(array_CD, neighbours, batch_C, label_C, pre_CD, measure)
        if extra:
            row |= _ours(array_CD, neighbours, batch_C, label_C, measure)
        rows[name] = row
        failed |= {f"{name}: {metric}": why for metric, why in measure.failed.items()}
    table = pd.DataFrame.from_dict(rows, orient="index").astype(float)
    table.index.name = "method"
    table = _with_totals(table, by_label="kbet" not in undefined)
    table.attrs["n_cells"] = int(keep_C.sum())
    table.attrs["undefined"] = undefined | failed
    return table


def undefined_of(batch_C: np.ndarray | None, label_C: np.ndarray | None) -> dict[str, str]:
    """Say which metrics these batches and labels give no value to, and why."""
    if batch_C is None or label_C is None:
        return {}
    sizes = pd.crosstab(label_C, batch_C)
    batches_T, cells_T = (sizes > 0).sum(axis=1), sizes.sum(axis=1)
    if ((batches_T > 1) & (batches_T < cells_T)).any():
        return {}
    why = "no label occurs in two batches" if (batches_T < 2).all() else (
        "wherever a label occurs in two batches, each of its cells is of another one"
    )  # fmt: skip
    found = dict.fromkeys(("bras", "kbet", "batch", "total"), why)
    return found if (batches_T > 1).any() else found | {"knn_accuracy_across": why}


class _Measure:
    """Takes one metric after the other; one that has no value is nan, and its reason is kept."""

    def __init__(
        self, step: Callable[[str], None], name: str, undefined: Mapping[str, str]
    ) -> None:
        self.step, self.name, self.undefined = step, name, undefined
        self.failed: dict[str, str] = {}

    def __call__(self, metric: str, compute: Callable[[], Any]) -> Any:
        """Return what ``compute`` gives, or nan."""
        self.step(metric)
        if metric in self.undefined:
            return float("nan")
        try:
            return compute()
        except _UNDEFINED as error:
            reason = (str(error).strip() or type(error).__name__).partition("\n")[0][:200]
            self.failed[metric] = reason
            logger.warning("%s: %s has no value: %s", self.name, metric, reason)
            return float("nan")


def score_cell_types(
    embeddings: Mapping[str, np.ndarray],
    batch: Sequence[Any] | np.ndarray | pd.Series,
    label: Sequence[Any] | np.ndarray | pd.Series,
    *,
    pre: np.ndarray | None = None,
) -> pd.DataFrame:
    """Score biology kept and batch removed for each cell type: a lost type shows here.

    Parameters
    ----------
    embeddings, batch, label, pre
        As in `score_embeddings`.

    Returns
    -------
    pandas.DataFrame
        The rows of `genemodel.metrics.light.biology_and_batch` with the columns
        ``method`` and ``cell_type`` before them; the cell type "all" is the whole.
    """
    if not embeddings:
        raise DataError("score_cell_types got no embedding: pass at least one name -> array")
    parts = []
    for name, array in embeddings.items():
        part = light_metrics.biology_and_batch(np.asarray(array), batch, label, before_CD=pre)
        part = part.rename_axis("cell_type").reset_index()
        part.insert(0, "method", name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _cells_to_score(
    batch: Sequence[Any] | np.ndarray | pd.Series | None,
    label: Sequence[Any] | np.ndarray | pd.Series | None,
    n_cells: int,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray]:
    """Batch and label of the cells that take part, as strings, and which cells those are."""
    keep_C = np.ones(n_cells, dtype=bool)
    values = {}
    for what, given in (("batch", batch), ("label", label)):
        if given is None:
            continue
        series = pd.Series(np.asarray(given, dtype=object))
        if len(series) != n_cells:
            raise DataError(
                f"{what} has {len(series)} entries but the embeddings have {n_cells} rows: "
                "pass one value per cell, in the order of the embeddings"
            )
        missing_C = series.isna().to_numpy()
        if what == "batch" and missing_C.any():
            raise DataError(
                f"batch is missing for {int(missing_C.sum())} of {n_cells} cells: "
                "drop these cells or give them a batch"
            )
        keep_C &= ~missing_C
        values[what] = series.astype(str).to_numpy(dtype=object)
    if not keep_C.all():
        logger.info(
            "%d of %d cells have no label and are left out of the scoring",
            int((~keep_C).sum()),
            n_cells,
        )
    batch_C = values["batch"][keep_C] if "batch" in values else None
    label_C = values["label"][keep_C] if "label" in values else None
    if label_C is not None and len(np.unique(label_C)) < 2:
        logger.info("all cells carry the same label: scored as if without labels")
        label_C = None
    if batch_C is not None and len(np.unique(batch_C)) < 2:
        logger.info("all cells carry the same batch: the batch metrics are left out")
        batch_C = None
    if batch_C is None and label_C is None:
        raise DataError(
            "nothing to score against: neither two batches nor two labels among the "
            f"{int(keep_C.sum())} cells; name a batch column or a label column that varies"
        )
    return batch_C, label_C, keep_C


def _checked(name: str, array: np.ndarray, keep_C: np.ndarray) -> np.ndarray:
    array_CD = np.asarray(array, dtype=np.float32)
    if array_CD.ndim != 2 or len(array_CD) != len(keep_C):
        raise DataError(
            f"embedding {name!r} has shape {array_CD.shape}; expected ({len(keep_C)}, width), "
            "one row per cell"
        )
    bad = int((~np.isfinite(array_CD)).any(axis=1).sum())
    if bad:
        raise DataError(
            f"embedding {name!r} has values that are not finite in {bad} of {len(array_CD)} rows: "
            "the method did not converge; leave it out or mend it"
        )
    return np.ascontiguousarray(array_CD[keep_C])


def _reference(
    arrays: Mapping[str, np.ndarray], pre: np.ndarray | None, keep_C: np.ndarray
) -> np.ndarray:
    if pre is not None:
        return _checked("pre", pre, keep_C)
    for name in ("none", "pca"):
        if name in arrays:
            return arrays[name]
    raise DataError(
        "PCR comparison needs the uncorrected embedding: pass pre=, or an embedding named "
        f"'none' or 'pca' (got {', '.join(map(repr, arrays))})"
    )


def _neighbours(array_CD: np.ndarray, n_jobs: int) -> "NeighborsResults":
    """Find 90 neighbours, approximately as in scib-metrics; exactly for fewer than 512 cells."""
    from scib_metrics.nearest_neighbors import NeighborsResults, pynndescent

    n_neighbours = min(max(_NEIGHBOURS), len(array_CD) - 1)
    if len(array_CD) >= 512:
        return pynndescent(array_CD, n_neighbors=n_neighbours, random_state=0, n_jobs=n_jobs)
    index_CK, distance_CK = nearest(array_CD, array_CD, n_neighbours)
    return NeighborsResults(indices=index_CK, distances=distance_CK)


def _nearest(neighbours: "NeighborsResults", n: int) -> "NeighborsResults":
    return neighbours.subset_neighbors(n=min(n, neighbours.indices.shape[1]))


@contextlib.contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what logging.info() does to a root logger without handlers: it installs one for good."""
    root = logging.getLogger()
    before = list(root.handlers)
    try:
        yield
    finally:
        for handler in [handler for handler in root.handlers if handler not in before]:
            root.removeHandler(handler)


def _scib(
    array_CD: np.ndarray,
    neighbours: "NeighborsResults",
    batch_C: np.ndarray | None,
    label_C: np.ndarray | None,
    pre_CD: np.ndarray | None,
    measure: _Measure,
) -> dict[str, float]:
    """Compute what scib-metrics' benchmark does, by its functions and with its neighbour counts."""
    import scib_metrics as scib

    near15, near50, near90 = (_nearest(neighbours, n) for n in _NEIGHBOURS)
    row = dict.fromkeys((*BIO, *BATCH), float("nan"))
    if label_C is not None:
        batch_or_one_C = batch_C if batch_C is not None else np.zeros(len(label_C), dtype=int)
        with _root_logger_kept():
            row["isolated_labels"] = measure(
                "isolated_labels", lambda: scib.isolated_labels(array_CD, label_C, batch_or_one_C)
            )
        agreement = measure("kmeans", lambda: scib.nmi_ari_cluster_labels_kmeans(array_CD, label_C))
        row["kmeans_nmi"], row["kmeans_ari"] = _agreement(agreement)
        row["silhouette_label"] = measure(
            "silhouette_label", lambda: scib.silhouette_label(array_CD, label_C)
        )
        row["clisi"] = measure("clisi", lambda: scib.clisi_knn(near90, label_C))
    if batch_C is not None:
        row["ilisi"] = measure("ilisi", lambda: scib.ilisi_knn(near90, batch_C))
        row["pcr"] = measure(
            "pcr", lambda: scib.pcr_comparison(pre_CD, array_CD, batch_C, categorical=True)
        )
    if batch_C is not None and label_C is not None:
        row["graph_connectivity"] = measure(  # counted among the batch metrics
            "graph_connectivity", lambda: scib.graph_connectivity(near15, label_C)
        )
        row["bras"] = measure("bras", lambda: scib.bras(array_CD, label_C, batch_C))
        row["kbet"] = measure("kbet", lambda: scib.kbet_per_label(near50, batch_C, label_C))
    if batch_C is not None and (label_C is None or "kbet" in measure.undefined):
        row["kbet_all_cells"] = measure("kbet_all_cells", lambda: scib.kbet(near50, batch_C)[0])
    return {name: float(value) for name, value in row.items()}


def _agreement(found: Any) -> tuple[float, float]:
    """Normalised mutual information and adjusted Rand index, nan where there are none."""
    return (found["nmi"], found["ari"]) if isinstance(found, dict) else (float("nan"),) * 2


def _with_totals(table: pd.DataFrame, *, by_label: bool = True) -> pd.DataFrame:
    """Append the aggregates; a single part that failed is skipped, as scib-metrics does.

    ``by_label``: labels occur in several batches, so that mixing within a label has a value.
    """
    labelled = table["clisi"].notna().any()
    batched = table["ilisi"].notna().any()
    nan = pd.Series(float("nan"), index=table.index)
    whole = labelled and batched and by_label
    table["bio"] = table[list(BIO)].mean(axis=1) if labelled else nan
    table["batch"] = table[list(BATCH)].mean(axis=1) if whole else nan
    table["total"] = _BIO_WEIGHT * table["bio"] + (1 - _BIO_WEIGHT) * table["batch"]
    if batched and not whole:
        table["batch_unlabelled"] = table[["ilisi", "pcr", "kbet_all_cells"]].mean(axis=1)
    return table


def _ours(
    array_CD: np.ndarray,
    neighbours: "NeighborsResults",
    batch_C: np.ndarray | None,
    label_C: np.ndarray | None,
    measure: _Measure,
) -> dict[str, float]:
    """Compute plain scores: the silhouette is the raw -1 … 1."""
    import scib_metrics as scib

    row = dict.fromkeys(OURS, float("nan"))
    row["effective_rank"] = effective_rank(array_CD)
    if label_C is not None:
        row["knn_accuracy"] = measure(
            "knn_accuracy", lambda: light_metrics.knn_accuracy(array_CD, label_C)
        )
        row["asw_label"] = measure("asw_label", lambda: light_metrics.silhouette(array_CD, label_C))
        near15 = _nearest(neighbours, 15)
        row["leiden_nmi"], row["leiden_ari"] = _agreement(
            measure("leiden", lambda: scib.nmi_ari_cluster_labels_leiden(near15, label_C))
        )
    if batch_C is not None:
        mixing = measure(
            "same_batch_ratio", lambda: light_metrics.same_batch_share(array_CD, batch_C, label_C)
        )
        if isinstance(mixing, pd.DataFrame):
            row["same_batch_ratio"] = float(mixing["ratio"].to_numpy()[-1])
        row["pcr_share"] = measure("pcr_share", lambda: light_metrics.pcr(array_CD, batch_C))
        near50 = _nearest(neighbours, 50)
        row["kbet_all_cells"] = measure("kbet_all_cells", lambda: scib.kbet(near50, batch_C)[0])
    if batch_C is not None and label_C is not None:
        row["knn_accuracy_across"] = measure(
            "knn_accuracy_across",
            lambda: light_metrics.knn_accuracy(array_CD, label_C, batch=batch_C),
        )
    return {name: float(value) for name, value in row.items()}
