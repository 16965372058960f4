"""Scores of an integrated embedding: is the biology kept, is the batch gone.

The totals are those of scib-metrics (bio conservation, batch correction, 0.6 × bio + 0.4 × batch),
computed with its metric functions and its defaults, without its plotting front end. Beside
them stand a few of ours that need no convention to be read: nearest-neighbour accuracy within and
across batches, plain silhouettes, Leiden agreement, and a table per cell type.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.errors import DataError

if TYPE_CHECKING:
    from scib_metrics.nearest_neighbors import NeighborsResults

logger = logging.getLogger(__name__)

BIO = ("isolated_labels", "kmeans_nmi", "kmeans_ari", "silhouette_label", "clisi")
BATCH = ("bras", "ilisi", "kbet", "graph_connectivity", "pcr")
TOTALS = ("bio", "batch", "total")
OURS = (
    "knn_accuracy",
    "knn_accuracy_cross_batch",
    "asw_label",
    "asw_batch",
    "leiden_nmi",
    "leiden_ari",
    "kbet_all_cells",
    "same_batch_neighbours",
)
_BIO_WEIGHT = 0.6  # the weights of the scIB study
_NEIGHBOURS = (15, 50, 90)  # for the graph, kBET and LISI, as scib-metrics' benchmark takes them
_KNN = 15


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
        Name to array of shape (n_cells, any width), one row per cell in the same order.
    batch
        Batch of each cell. ``None`` or a single batch: the batch metrics are left out.
    label
        Cell type of each cell. ``None``: only what needs no label is scored. Cells whose label is
        missing (``None`` or ``nan``) are left out of the scoring altogether, and counted in the log.
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
        One row per embedding; columns ``isolated_labels … pcr`` (all in 0–1, higher is better), then
        ``bio`` = mean of the first five, ``batch`` = mean of the next five, ``total`` = 0.6 bio +
        0.4 batch. What cannot be computed is ``nan``. Without labels ``batch`` stays ``nan``, because
        its five parts cannot all be had; ``batch_unlabelled`` = mean of iLISI, PCR and kBET over all
        cells takes its place and must not be compared with ``batch``.
        ``attrs["n_cells"]`` is the number of cells scored.

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
    rows = {}
    for name, array_CD in arrays.items():

        def step(metric: str, name: str = name) -> None:
            if on_step is not None:
                on_step(name, metric)

        step("neighbours")
        neighbours = _neighbours(array_CD, n_jobs)
        row = _scib(array_CD, neighbours, batch_C, label_C, pre_CD, step)
        if extra:
            row |= _ours(array_CD, neighbours, batch_C, label_C, step)
        rows[name] = row
    table = pd.DataFrame.from_dict(rows, orient="index").astype(float)
    table.index.name = "method"
    table.attrs["n_cells"] = int(keep_C.sum())
    return _with_totals(table)


def score_cell_types(
    embeddings: Mapping[str, np.ndarray],
    batch: Sequence[Any] | np.ndarray | pd.Series | None,
    label: Sequence[Any] | np.ndarray | pd.Series,
    *,
    n_jobs: int = 1,
) -> pd.DataFrame:
    """Biology kept and batch removed, for each cell type: where a method loses a type, it shows here.

    Parameters
    ----------
    embeddings, batch, label, n_jobs
        As in `score_embeddings`.

    Returns
    -------
    pandas.DataFrame
        One row per (method, cell type): ``n_cells``, ``n_batches``; ``recall`` = share of its cells
        that 15-nearest-neighbour voting calls by its name; ``same_label`` = share of neighbours of the
        same type; ``mixing`` = share of neighbours *of the same type* from another batch ÷ the share
        that random mixing within the type gives (1 = mixed, 0 = apart; ``nan`` with one batch);
        ``absorbed_by`` = the type that most of its misnamed cells are taken for.
    """
    if not embeddings:
        raise DataError("score_cell_types got no embedding: pass at least one name -> array")
    n_cells = len(next(iter(embeddings.values())))
    batch_C, label_C, keep_C = _cells_to_score(batch, label, n_cells)
    if label_C is None:
        raise DataError("score_cell_types needs labels: pass label=")
    parts = []
    for name, array in embeddings.items():
        index_CK = _others(_neighbours(_checked(name, array, keep_C), n_jobs).indices, _KNN)
        part = _per_type(index_CK, batch_C, label_C)
        part.insert(0, "method", name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def knn_vote(index_CK: np.ndarray, label_C: np.ndarray) -> np.ndarray:
    """Most frequent label among each cell's neighbours; a tie goes to the first label in sorted order.

    An index of -1 is no neighbour; a cell without any gets the first label.
    """
    codes_C, names = pd.factorize(label_C, sort=True)
    rows_C = np.arange(len(index_CK))
    votes_CL = np.zeros((len(index_CK), len(names)), dtype=np.int32)
    for index_C in index_CK.T:
        there_C = index_C >= 0
        votes_CL[rows_C[there_C], codes_C[index_C[there_C]]] += 1
    return np.asarray(names)[votes_CL.argmax(axis=1)]


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
    """The 90 nearest neighbours, approximate as in scib-metrics; exact for fewer than 512 cells."""
    from scib_metrics.nearest_neighbors import NeighborsResults, pynndescent

    n_neighbours = min(max(_NEIGHBOURS), len(array_CD) - 1)
    if len(array_CD) >= 512:
        return pynndescent(array_CD, n_neighbors=n_neighbours, random_state=0, n_jobs=n_jobs)
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=n_neighbours, algorithm="brute").fit(array_CD)
    distance_CK, index_CK = search.kneighbors(array_CD)
    return NeighborsResults(indices=index_CK, distances=distance_CK.astype(np.float32))


def _nearest(neighbours: "NeighborsResults", n: int) -> "NeighborsResults":
    return neighbours.subset_neighbors(n=min(n, neighbours.indices.shape[1]))


def _scib(
    array_CD: np.ndarray,
    neighbours: "NeighborsResults",
    batch_C: np.ndarray | None,
    label_C: np.ndarray | None,
    pre_CD: np.ndarray | None,
    step: Callable[[str], None],
) -> dict[str, float]:
    """The metrics of scib-metrics' benchmark, by its functions and with its neighbour counts."""
    import scib_metrics as scib

    near15, near50, near90 = (_nearest(neighbours, n) for n in _NEIGHBOURS)
    row = dict.fromkeys((*BIO, *BATCH), float("nan"))
    if label_C is not None:
        step("isolated_labels")
        batch_or_one_C = batch_C if batch_C is not None else np.zeros(len(label_C), dtype=int)
        row["isolated_labels"] = scib.isolated_labels(array_CD, label_C, batch_or_one_C)
        step("kmeans")
        agreement = scib.nmi_ari_cluster_labels_kmeans(array_CD, label_C)
        row["kmeans_nmi"], row["kmeans_ari"] = agreement["nmi"], agreement["ari"]
        step("silhouette_label")
        row["silhouette_label"] = scib.silhouette_label(array_CD, label_C)
        step("clisi")
        row["clisi"] = scib.clisi_knn(near90, label_C)
        step("graph_connectivity")
        row["graph_connectivity"] = scib.graph_connectivity(near15, label_C)
    if batch_C is not None:
        step("ilisi")
        row["ilisi"] = scib.ilisi_knn(near90, batch_C)
        step("pcr")
        row["pcr"] = scib.pcr_comparison(pre_CD, array_CD, batch_C, categorical=True)
    if batch_C is not None and label_C is not None:
        step("bras")
        row["bras"] = scib.bras(array_CD, label_C, batch_C)
        step("kbet")
        row["kbet"] = scib.kbet_per_label(near50, batch_C, label_C)
    if batch_C is not None and label_C is None:
        step("kbet")
        row["kbet_all_cells"] = scib.kbet(near50, batch_C)[0]
    if batch_C is None:
        row["graph_connectivity"] = float("nan")  # counted among the batch metrics
    return {name: float(value) for name, value in row.items()}


def _with_totals(table: pd.DataFrame) -> pd.DataFrame:
    """Append the aggregates; a single part that failed is skipped, as scib-metrics does."""
    labelled = table["clisi"].notna().any()
    batched = table["ilisi"].notna().any()
    nan = pd.Series(float("nan"), index=table.index)
    table["bio"] = table[list(BIO)].mean(axis=1) if labelled else nan
    table["batch"] = table[list(BATCH)].mean(axis=1) if labelled and batched else nan
    table["total"] = _BIO_WEIGHT * table["bio"] + (1 - _BIO_WEIGHT) * table["batch"]
    if batched and not labelled:
        table["batch_unlabelled"] = table[["ilisi", "pcr", "kbet_all_cells"]].mean(axis=1)
    return table


def _others(index_CK: np.ndarray, k: int) -> np.ndarray:
    """The first k neighbours that are not the cell itself."""
    itself_CK = index_CK == np.arange(len(index_CK))[:, None]
    order_CK = np.argsort(itself_CK, axis=1, kind="stable")[:, : min(k, index_CK.shape[1] - 1)]
    return np.take_along_axis(index_CK, order_CK, axis=1)


def _ours(
    array_CD: np.ndarray,
    neighbours: "NeighborsResults",
    batch_C: np.ndarray | None,
    label_C: np.ndarray | None,
    step: Callable[[str], None],
) -> dict[str, float]:
    """Plain scores that need no scaling convention; silhouettes here are the raw -1 … 1."""
    import scib_metrics as scib
    from sklearn.metrics import silhouette_score

    row = dict.fromkeys(OURS, float("nan"))
    index_CK = _others(neighbours.indices, _KNN)
    sample = min(len(array_CD), 5_000)  # the silhouette is quadratic in the number of cells
    if label_C is not None:
        step("knn_accuracy")
        row["knn_accuracy"] = float((knn_vote(index_CK, label_C) == label_C).mean())
        step("asw_label")
        row["asw_label"] = silhouette_score(array_CD, label_C, sample_size=sample, random_state=0)
        step("leiden")
        agreement = scib.nmi_ari_cluster_labels_leiden(_nearest(neighbours, 15), label_C)
        row["leiden_nmi"], row["leiden_ari"] = agreement["nmi"], agreement["ari"]
    if batch_C is not None:
        row["same_batch_neighbours"] = float((batch_C[index_CK] == batch_C[:, None]).mean())
        step("asw_batch")
        row["asw_batch"] = silhouette_score(array_CD, batch_C, sample_size=sample, random_state=0)
        step("kbet_all_cells")
        row["kbet_all_cells"] = scib.kbet(_nearest(neighbours, 50), batch_C)[0]
    if batch_C is not None and label_C is not None:
        step("knn_accuracy_cross_batch")
        called_C = knn_vote(cross_batch_neighbours(array_CD, batch_C, _KNN), label_C)
        possible_C = _types_elsewhere(batch_C, label_C)
        row["knn_accuracy_cross_batch"] = float((called_C == label_C)[possible_C].mean())
    return {name: float(value) for name, value in row.items()}


def _types_elsewhere(batch_C: np.ndarray, label_C: np.ndarray) -> np.ndarray:
    """Cells whose type is also found in another batch: the others cannot be called across."""
    batches_of = pd.Series(batch_C).groupby(label_C).nunique()
    return np.asarray(batches_of.reindex(label_C).to_numpy() > 1)


def cross_batch_neighbours(array_CD: np.ndarray, batch_C: np.ndarray, k: int) -> np.ndarray:
    """The k exact nearest neighbours of each cell among the cells of all other batches.

    Where fewer than k cells are outside a cell's batch the row is filled with -1.
    """
    from sklearn.neighbors import NearestNeighbors

    index_CK = np.full((len(array_CD), k), -1, dtype=np.int64)
    for batch in np.unique(batch_C):
        inside_N = np.flatnonzero(batch_C == batch)
        outside_N = np.flatnonzero(batch_C != batch)
        n = min(k, len(outside_N))
        search = NearestNeighbors(n_neighbors=n).fit(array_CD[outside_N])
        index_CK[inside_N, :n] = outside_N[search.kneighbors(array_CD[inside_N])[1]]
    return index_CK


def _per_type(
    index_CK: np.ndarray, batch_C: np.ndarray | None, label_C: np.ndarray
) -> pd.DataFrame:
    called_C = knn_vote(index_CK, label_C)
    same_label_CK = label_C[index_CK] == label_C[:, None]
    rows = []
    for label in np.unique(label_C):
        of_type_C = label_C == label
        wrong = pd.Series(called_C[of_type_C & (called_C != label)]).value_counts()
        rows.append(
            {
                "cell_type": label,
                "n_cells": int(of_type_C.sum()),
                "n_batches": len(np.unique(batch_C[of_type_C])) if batch_C is not None else 1,
                "recall": float((called_C[of_type_C] == label).mean()),
                "same_label": float(same_label_CK[of_type_C].mean()),
                "mixing": _mixing(index_CK, same_label_CK, batch_C, of_type_C),
                "absorbed_by": str(wrong.index[0]) if len(wrong) else "",
            }
        )
    return pd.DataFrame(rows)


def _mixing(
    index_CK: np.ndarray,
    same_label_CK: np.ndarray,
    batch_C: np.ndarray | None,
    of_type_C: np.ndarray,
) -> float:
    """Share of same-type neighbours from another batch ÷ the share under random mixing."""
    if batch_C is None:
        return float("nan")
    share = pd.Series(batch_C[of_type_C]).value_counts(normalize=True).to_numpy()
    random = 1.0 - float((share**2).sum())
    same_type_NK = same_label_CK[of_type_C]
    if random == 0.0 or not same_type_NK.any():
        return float("nan")
    other_NK = batch_C[index_CK[of_type_C]] != batch_C[of_type_C][:, None]
    return float(other_NK[same_type_NK].mean()) / random
