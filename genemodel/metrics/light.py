"""Scores of an embedding that need only numpy, scipy and scikit-learn.

They answer in seconds, so they run in the demo, in tests and during fine-tuning; the neutral judges
(scib-metrics) live in ``genemodel.metrics.scib``. Biology and batch are always reported
together: either of the two can be made perfect by destroying the other.

Axes: C cells, D embedding width, K neighbours, B batches, T cell types.
Cells whose label is missing (``None``, ``NaN``, an empty string) take no part in a score of labels.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from sklearn.cluster import KMeans
from sklearn.metrics import (
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_samples,
)

from genemodel.errors import ConfigError, DataError
from genemodel.expression.components import principal_components
from genemodel.expression.neighbours import nearest_elsewhere, nearest_others
from genemodel.expression.normalise import log_normalised
from genemodel.expression.variable_genes import variable_counts

__all__ = [
    "batch_silhouette",
    "biology_and_batch",
    "cluster_agreement",
    "cross_batch_neighbours",
    "graph_connectivity",
    "knn_accuracy",
    "knn_predict",
    "lisi",
    "lost_types",
    "neighbours",
    "pca_of_lognorm",
    "pcr",
    "pcr_comparison",
    "same_batch_share",
    "silhouette",
]

type Labels = Sequence[object] | np.ndarray | pd.Series


def _embedding(embedding_CD: np.ndarray, *columns: tuple[str, Labels]) -> np.ndarray:
    values_CD = np.asarray(embedding_CD)
    if values_CD.ndim != 2 or values_CD.shape[0] < 2:
        raise DataError(
            f"The embedding has shape {values_CD.shape}; a matrix (cells, dimensions) with at "
            "least two cells is needed."
        )
    if not np.isfinite(values_CD).all():
        bad = int((~np.isfinite(values_CD)).any(axis=1).sum())
        raise DataError(
            f"The embedding has NaN or infinite values in {bad:,} cells; embed them again."
        )
    for name, column in columns:
        if len(column) != len(values_CD):
            raise DataError(
                f"{name} has {len(column):,} entries and the embedding has {len(values_CD):,} "
                "cells; pass the column of the same cells in the same order."
            )
    return values_CD.astype(np.float32, copy=False)


def _codes(column: Labels) -> tuple[np.ndarray, list[str]]:
    """Return codes (-1 for None and NaN) and names; what texts mean was settled before."""
    values = pd.Series(np.asarray(column, dtype=object))
    values = values.where(~values.isna(), None)
    present = values.notna()
    values[present] = values[present].astype(str)
    codes, names = pd.factorize(values, sort=True)
    return codes.astype(np.int64), [str(name) for name in names]


def _labelled(
    embedding_CD: np.ndarray, label: Labels, batch: Labels | None = None
) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray, list[str]]:
    columns = [("label", label)] + ([] if batch is None else [("batch", batch)])
    values_CD = _embedding(embedding_CD, *columns)
    label_C, label_names = _codes(label)
    batch_C, batch_names = (
        _codes(batch) if batch is not None else (np.zeros(len(label_C), np.int64), ["all"])
    )
    keep_C = (label_C >= 0) & (batch_C >= 0)
    if keep_C.sum() < 2:
        raise DataError(
            "Fewer than two cells have both a label and a batch; nothing can be scored."
        )
    return values_CD[keep_C], label_C[keep_C], label_names, batch_C[keep_C], batch_names


def neighbours(embedding_CD: np.ndarray, k: int = 15) -> tuple[np.ndarray, np.ndarray]:
    """Return the k nearest other cells of every cell (`expression.neighbours`).

    Returns
    -------
    (C, K) int64, (C, K) float32
        Indices and distances, nearest first. A cell is never its own neighbour, also where cells
        coincide.
    """
    return nearest_others(_embedding(embedding_CD), k)


def cross_batch_neighbours(embedding_CD: np.ndarray, batch: Labels, k: int = 15) -> np.ndarray:
    """Return the k nearest cells of *other* batches, (C, K) int64, -1 where there are fewer."""
    values_CD = _embedding(embedding_CD, ("batch", batch))
    batch_C, _ = _codes(batch)
    found = np.full((len(values_CD), k), -1, np.int64)
    known = np.flatnonzero(batch_C >= 0)
    index_CK, _ = nearest_elsewhere(values_CD[known], batch_C[known], k)
    found[known] = np.where(index_CK >= 0, known[index_CK], -1)
    return found


def _vote(label_C: np.ndarray, index_CK: np.ndarray, n_labels: int) -> np.ndarray:
    """Return the majority label of the neighbours; a tie goes to the nearer one."""
    n, k = index_CK.shape
    votes = np.zeros((n, max(1, n_labels)))
    rows = np.arange(n)
    for j in range(k):
        at = index_CK[:, j]
        valid = (at >= 0) & (label_C[at] >= 0)
        # The earlier of two equal votes wins: a share smaller than any vote, falling with the rank.
        votes[rows[valid], label_C[at[valid]]] += 1.0 + 1e-3 * 2.0 ** -(j + 1)
    return np.where(votes.any(axis=1), votes.argmax(axis=1), -1)


def knn_predict(
    embedding_CD: np.ndarray, label: Labels, *, batch: Labels | None = None, k: int = 15
) -> np.ndarray:
    """Predict every cell's label from its neighbours, itself left out.

    Parameters
    ----------
    embedding_CD
        (C, D) embedding.
    label
        Known labels.
    batch
        If given, only cells of other batches vote.
    k
        Neighbours that vote; ties go to the label of the nearer neighbour.

    Returns
    -------
    (C,) object
        Predicted labels, ``None`` where no labelled neighbour exists.
    """
    values_CD = _embedding(embedding_CD, ("label", label))
    label_C, names = _codes(label)
    if batch is None:
        index_CK, _ = neighbours(values_CD, k)
    else:
        index_CK = cross_batch_neighbours(values_CD, batch, k)
    predicted_C = _vote(label_C, index_CK, len(names))
    return np.array([names[c] if c >= 0 else None for c in predicted_C], dtype=object)


def knn_accuracy(
    embedding_CD: np.ndarray,
    label: Labels,
    *,
    batch: Labels | None = None,
    k: int = 15,
    average: Literal["cell", "label"] = "cell",
) -> float:
    """Return the share of cells whose label is that of most of their neighbours.

    Parameters
    ----------
    embedding_CD, label, batch, k
        See :func:`knn_predict`. With ``batch``, only other batches vote and labels that occur in
        one batch alone are left out, because nothing could vote for them.
    average
        ``"cell"`` counts every cell alike, ``"label"`` every label alike (balanced accuracy).

    Returns
    -------
    float
        Between 0 and 1; NaN if no cell can be judged.
    """
    values_CD, label_C, names, batch_C, _ = _labelled(embedding_CD, label, batch)
    if batch is None:
        index_CK, _ = neighbours(values_CD, k)
        judged_C = np.ones(len(label_C), bool)
    else:
        index_CK = cross_batch_neighbours(values_CD, batch_C, k)
        judged_C = _in_other_batches(label_C, batch_C)
    hit_C = _vote(label_C, index_CK, len(names)) == label_C
    return _average(hit_C[judged_C].astype(float), label_C[judged_C], average)


def _in_other_batches(label_C: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
    n_batches = pd.Series(batch_C).groupby(label_C).nunique()
    return n_batches.reindex(label_C).to_numpy() > 1


def _average(value_C: np.ndarray, label_C: np.ndarray, average: str) -> float:
    if len(value_C) == 0:
        return float("nan")
    if average == "label":
        return float(pd.Series(value_C).groupby(label_C).mean().mean())
    return float(value_C.mean())


def _sample(n: int, most: int, seed: int) -> np.ndarray:
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, most, replace=False))


def silhouette(
    embedding_CD: np.ndarray, label: Labels, *, most: int = 5000, seed: int = 0
) -> float:
    """Return the mean silhouette width of labels, -1 to 1 (NaN with fewer than two labels).

    At most ``most`` cells, drawn with ``seed``, take part: the work grows with their square.
    """
    values_CD, label_C, _, _, _ = _labelled(embedding_CD, label)
    at = _sample(len(values_CD), most, seed)
    values_CD, label_C = values_CD[at], label_C[at]
    if not 2 <= len(np.unique(label_C)) < len(label_C):
        return float("nan")
    return float(silhouette_samples(values_CD, label_C).mean())


def batch_silhouette(
    embedding_CD: np.ndarray, batch: Labels, label: Labels, *, most: int = 5000, seed: int = 0
) -> float:
    """Return how little a batch stands out within its cell type.

    The mean over types of 1 - |silhouette| of the batches; 1 means that they cannot be told apart
    (as scIB's batch ASW). NaN if no type has two batches.
    """
    values_CD, label_C, _, batch_C, _ = _labelled(embedding_CD, label, batch)
    at = _sample(len(values_CD), most, seed)
    widths = _batch_widths(values_CD[at], batch_C[at], label_C[at])
    return float(np.mean(list(widths.values()))) if widths else float("nan")


def _batch_widths(
    values_CD: np.ndarray, batch_C: np.ndarray, label_C: np.ndarray
) -> dict[int, float]:
    widths = {}
    for t in np.unique(label_C):
        of_type = label_C == t
        if 2 <= len(np.unique(batch_C[of_type])) < of_type.sum():
            widths[int(t)] = float(
                np.mean(1 - np.abs(silhouette_samples(values_CD[of_type], batch_C[of_type])))
            )
    return widths


def same_batch_share(
    embedding_CD: np.ndarray, batch: Labels, label: Labels | None = None, *, k: int = 15
) -> pd.DataFrame:
    """Compare the share of neighbours from a cell's own batch with chance.

    Chance is what random mixing would give with the batch sizes at hand, so uneven batches do not
    matter. With ``label``, neighbours are sought within each cell type, so uneven composition does
    not matter either.

    Returns
    -------
    DataFrame
        Rows: every label and ``"all"`` (weighted by cells); columns: n, n_batches, observed,
        expected, ratio. A ratio of 1 is perfect mixing. Labels in a single batch have NaN.
    """
    everything = np.zeros(len(embedding_CD), int) if label is None else label
    values_CD, label_C, names, batch_C, _ = _labelled(embedding_CD, everything, batch)
    rows: dict[str, dict[str, float]] = {}
    for t in np.unique(label_C):
        of_type = np.flatnonzero(label_C == t)
        batches = batch_C[of_type]
        row: dict[str, float] = {
            "n": len(of_type),
            "n_batches": len(np.unique(batches)),
            "observed": np.nan,
            "expected": np.nan,
        }
        if row["n_batches"] > 1:
            index_CK, _ = neighbours(values_CD[of_type], k)
            row["observed"] = float((batches[index_CK] == batches[:, None]).mean())
            size_C = np.bincount(batches)[batches]
            row["expected"] = float(((size_C - 1) / (len(of_type) - 1)).mean())
        rows[names[t]] = row
    table = pd.DataFrame.from_dict(rows, orient="index")
    judged = table[table["n_batches"] > 1]
    weight = judged["n"] / judged["n"].sum()
    whole = {
        "n": len(label_C),
        "n_batches": len(np.unique(batch_C)),
        "observed": float((judged["observed"] * weight).sum()) if len(judged) else np.nan,
        "expected": float((judged["expected"] * weight).sum()) if len(judged) else np.nan,
    }
    if label is None:
        table = pd.DataFrame.from_dict({"all": whole}, orient="index")
    else:
        table.loc["all"] = whole
    # One cell of a batch within a type cannot have a neighbour of its own batch: chance is zero
    # there.
    table["ratio"] = table["observed"] / table["expected"].replace(0.0, np.nan)
    return table.astype({"n": int, "n_batches": int})


def _connectivity(index_CK: np.ndarray, label_C: np.ndarray) -> dict[int, float]:
    n, k = index_CK.shape
    graph = sparse.csr_matrix(
        (np.ones(n * k, np.int8), (np.repeat(np.arange(n), k), index_CK.ravel())), shape=(n, n)
    )
    shares = {}
    for t in np.unique(label_C):
        of_type = np.flatnonzero(label_C == t)
        _, part = connected_components(graph[of_type][:, of_type], directed=False)
        shares[int(t)] = float(np.bincount(part).max() / len(of_type))
    return shares


def graph_connectivity(embedding_CD: np.ndarray, label: Labels, *, k: int = 15) -> float:
    """Return the mean share of a label's cells in its largest connected component."""
    values_CD, label_C, _, _, _ = _labelled(embedding_CD, label)
    index_CK, _ = neighbours(values_CD, k)
    return float(np.mean(list(_connectivity(index_CK, label_C).values())))


def cluster_agreement(
    embedding_CD: np.ndarray,
    label: Labels,
    *,
    method: Literal["kmeans", "leiden"] = "kmeans",
    k: int = 15,
    seed: int = 0,
) -> dict[str, float]:
    """Cluster the embedding and compare with the labels.

    Parameters
    ----------
    embedding_CD, label
        Embedding and labels.
    method
        ``"kmeans"`` with as many clusters as labels; ``"leiden"`` on the k-nearest-neighbour graph,
        at the resolution of 0.2, 0.4 ... 2.0 that agrees best (needs the package igraph).
    k
        Neighbours of the graph for ``"leiden"``.
    seed
        Seed of the clustering.

    Returns
    -------
    dict
        ``nmi`` and ``ari``.
    """
    values_CD, label_C, _, _, _ = _labelled(embedding_CD, label)
    n_labels = len(np.unique(label_C))
    if method == "kmeans":
        found = [KMeans(n_labels, n_init=5, random_state=seed).fit_predict(values_CD)]
    elif method == "leiden":
        found = _leiden(values_CD, k, seed)
    else:
        raise ConfigError(
            f"cluster_agreement: method={method!r} is unknown; use 'kmeans' or 'leiden'."
        )
    scores = [
        {
            "nmi": float(normalized_mutual_info_score(label_C, clusters_C)),
            "ari": float(adjusted_rand_score(label_C, clusters_C)),
        }
        for clusters_C in found
    ]
    return max(scores, key=lambda score: score["nmi"])


def _leiden(values_CD: np.ndarray, k: int, seed: int) -> list[np.ndarray]:
    import random

    try:
        import igraph
    except ImportError as error:
        raise ConfigError(
            "cluster_agreement: method='leiden' needs the package igraph; pip install igraph, or "
            "use method='kmeans'."
        ) from error
    index_CK, _ = neighbours(values_CD, k)
    n = len(values_CD)
    pairs = np.column_stack([np.repeat(np.arange(n), index_CK.shape[1]), index_CK.ravel()])
    pairs = np.unique(np.sort(pairs, axis=1), axis=0)
    graph = igraph.Graph(n=n, edges=pairs)
    found = []
    igraph.set_random_number_generator(random.Random(seed))
    try:
        for resolution in np.arange(0.2, 2.01, 0.2):
            parts = graph.community_leiden(
                "modularity", resolution=float(resolution), n_iterations=2
            )
            found.append(np.asarray(parts.membership))
    finally:
        igraph.set_random_number_generator(random)
    return found


def _simpson(index_CK: np.ndarray, code_C: np.ndarray, n_codes: int) -> np.ndarray:
    share_CB = np.zeros((len(code_C), n_codes))
    for j in range(index_CK.shape[1]):
        share_CB[np.arange(len(code_C)), code_C[index_CK[:, j]]] += 1.0 / index_CK.shape[1]
    return 1.0 / (share_CB**2).sum(axis=1)


def lisi(
    embedding_CD: np.ndarray,
    column: Labels,
    *,
    k: int = 30,
    kind: Literal["batch", "label"] = "batch",
) -> float:
    """Return a simple local inverse Simpson index, scaled so that 1 is best.

    The effective number of batches (or labels) among the k nearest neighbours, all weighing the
    same (LISI weighs them by a Gaussian). ``kind="batch"`` gives (index - 1) / (batches - 1);
    ``kind="label"`` gives (labels - index) / (labels - 1). NaN with a single category.
    """
    values_CD, code_C, names, _, _ = _labelled(embedding_CD, column)
    present = len(np.unique(code_C))
    if present < 2:
        return float("nan")
    index_CK, _ = neighbours(values_CD, k)
    mean = float(_simpson(index_CK, code_C, len(names)).mean())
    return (mean - 1) / (present - 1) if kind == "batch" else (present - mean) / (present - 1)


def pcr(embedding_CD: np.ndarray, batch: Labels) -> float:
    """Return the share of an embedding's variance that the batch explains, 0 to 1.

    Principal component regression over all components: the R² of every component on the batch,
    weighted by its variance. The sum does not depend on the axes, so no decomposition is needed.
    """
    values_CD, batch_C, _, _, _ = _labelled(embedding_CD, batch)
    centred_CD = values_CD.astype(np.float64) - values_CD.mean(axis=0, dtype=np.float64)
    total = float((centred_CD**2).sum())
    if total == 0.0:
        return 0.0
    between = sum(
        float((centred_CD[batch_C == b].mean(axis=0) ** 2).sum() * (batch_C == b).sum())
        for b in np.unique(batch_C)
    )
    return between / total


def pcr_comparison(before_CD: np.ndarray, after_CD: np.ndarray, batch: Labels) -> float:
    """Return by how much integration lowered :func:`pcr`: (before - after) / before, at least 0."""
    before, after = pcr(before_CD, batch), pcr(after_CD, batch)
    return max(0.0, (before - after) / before) if before > 0 else 0.0


def lost_types(
    embedding_CD: np.ndarray,
    batch: Labels,
    label: Labels,
    *,
    before_CD: np.ndarray | None = None,
    k: int = 15,
    least: int = 10,
) -> pd.DataFrame:
    """Find cell types that vanished into another type when batches were merged.

    For type t of batch b and another type u, ``mixing`` compares the share of u's cells of *other*
    batches among the neighbours (counted against all of t's own cells) with the share under
    complete mixing: 0 means apart, 1 means indistinguishable. The type with the highest mixing is
    named. Types that were hard to tell apart from the start are not lost: where ``before_CD`` is
    given, a type counts as lost only if the two were apart before (mixing below 0.25, within a
    batch that has both and across batches).

    Parameters
    ----------
    embedding_CD
        (C, D) embedding after integration.
    batch, label
        Batch and cell type per cell.
    before_CD
        (C, D') embedding before integration, for instance PCA.
    k
        Neighbours looked at.
    least
        A type with fewer cells in a batch is not judged.

    Returns
    -------
    DataFrame
        One row per judged (batch, label): n, only_here (no other batch has the type), own_share
        (share of its own type among its cross-batch neighbours), into (the type it mixes with
        most), mixing, mixing_before (NaN without ``before_CD``), lost. The worst rows come first.
    """
    values_CD, label_C, names, batch_C, batch_names = _labelled(embedding_CD, label, batch)
    index_CK, _ = neighbours(values_CD, k)
    cross_CK = cross_batch_neighbours(values_CD, batch_C, k)
    index_before = None
    if before_CD is not None:
        earlier_CD, *_ = _labelled(before_CD, label, batch)
        index_before, _ = neighbours(earlier_CD, k)
        within = _within_batch_mixing(earlier_CD, label_C, batch_C, len(names), k, least)
    rows = []
    for b in np.unique(batch_C):
        for t in np.unique(label_C[batch_C == b]):
            cells = np.flatnonzero((batch_C == b) & (label_C == t))
            if len(cells) < least or not (batch_C != b).any():
                continue
            mixing_T = _cross_mixing(index_CK, cells, t, b, label_C, batch_C, len(names), least)
            u = int(np.argmax(mixing_T))
            mixing_before = np.nan
            if index_before is not None:
                across = _cross_mixing(
                    index_before, cells, t, b, label_C, batch_C, len(names), least
                )[u]
                mixing_before = float(max(across, within[t, u]))
            there = cross_CK[cells]
            rows.append(
                {
                    "batch": batch_names[b],
                    "label": names[t],
                    "n": len(cells),
                    "only_here": not ((label_C == t) & (batch_C != b)).any(),
                    "own_share": float((label_C[there] == t)[there >= 0].mean()),
                    "into": names[u] if mixing_T[u] > 0 else "",
                    "mixing": float(mixing_T[u]),
                    "mixing_before": mixing_before,
                    "lost": bool(mixing_T[u] >= 0.5 and not mixing_before >= 0.25),
                }
            )
    columns = [
        "batch",
        "label",
        "n",
        "only_here",
        "own_share",
        "into",
        "mixing",
        "mixing_before",
        "lost",
    ]
    table = pd.DataFrame(rows, columns=columns)
    return table.sort_values(["lost", "mixing"], ascending=False, kind="stable", ignore_index=True)


def _mixing(own: np.ndarray, other: np.ndarray, n_own: int, n_other: int) -> float:
    """Return the observed share of ``other`` over its share under complete mixing, capped at 1."""
    seen = own.sum() + other.sum()
    if seen == 0 or n_other == 0:
        return 0.0
    return float(min(1.0, (other.sum() / seen) / (n_other / max(n_own - 1 + n_other, 1))))


def _cross_mixing(
    index_CK: np.ndarray,
    cells: np.ndarray,
    t: int,
    b: int,
    label_C: np.ndarray,
    batch_C: np.ndarray,
    n_labels: int,
    least: int,
) -> np.ndarray:
    near_label, near_batch = label_C[index_CK[cells]], batch_C[index_CK[cells]]
    own = near_label == t
    n_own = int((label_C == t).sum())
    mixing_T = np.zeros(n_labels)
    for u in np.unique(near_label):
        n_other = int(((label_C == u) & (batch_C != b)).sum())
        if u != t and n_other >= least:
            mixing_T[u] = _mixing(own, (near_label == u) & (near_batch != b), n_own, n_other)
    return mixing_T


def _within_batch_mixing(
    values_CD: np.ndarray,
    label_C: np.ndarray,
    batch_C: np.ndarray,
    n_labels: int,
    k: int,
    least: int,
) -> np.ndarray:
    """Return how much types t and u mixed within a batch that has both: the most over batches."""
    mixing_TT = np.zeros((n_labels, n_labels))
    for b in np.unique(batch_C):
        here = np.flatnonzero(batch_C == b)
        if len(here) < 2 * least:
            continue
        index_CK, _ = neighbours(values_CD[here], k)
        labels = label_C[here]
        size_T = np.bincount(labels, minlength=n_labels)
        for t in np.flatnonzero(size_T >= least):
            near = labels[index_CK[labels == t]]
            for u in np.unique(near):
                if u != t and size_T[u] >= least:
                    value = _mixing(near == t, near == u, int(size_T[t]), int(size_T[u]))
                    mixing_TT[t, u] = max(mixing_TT[t, u], value)
    return mixing_TT


def biology_and_batch(
    embedding_CD: np.ndarray,
    batch: Labels,
    label: Labels,
    *,
    before_CD: np.ndarray | None = None,
    k: int = 15,
    most: int = 5000,
    seed: int = 0,
) -> pd.DataFrame:
    """Report biology kept and batch removed side by side, per cell type and overall.

    Parameters
    ----------
    embedding_CD, batch, label
        Embedding (C, D), batch and cell type per cell.
    before_CD
        Embedding before integration; lets ``lost_into`` spare types that never were apart.
    k
        Neighbours.
    most, seed
        Cells used for silhouettes, and the seed of their choice.

    Returns
    -------
    DataFrame
        One row per cell type and a last row ``"all"``. Biology: ``knn_accuracy`` (recall of the
        type by a leave-one-out vote), ``knn_accuracy_across`` (only other batches vote),
        ``silhouette``, ``connectivity``. Batch: ``same_batch_ratio`` (1 is perfect mixing),
        ``ilisi`` (1 is best), ``batch_silhouette`` (1 is best). Guard: ``lost_into`` names the type
        into which it vanished.
    """
    values_CD, label_C, names, batch_C, _ = _labelled(embedding_CD, label, batch)
    types = np.unique(label_C)
    index_CK, _ = neighbours(values_CD, k)
    hit_C = (_vote(label_C, index_CK, len(names)) == label_C).astype(float)
    hit_across_C = (
        _vote(label_C, cross_batch_neighbours(values_CD, batch_C, k), len(names)) == label_C
    ).astype(float)
    hit_across_C[~_in_other_batches(label_C, batch_C)] = np.nan
    at = _sample(len(values_CD), most, seed)
    width_C = np.full(len(label_C), np.nan)
    if 2 <= len(np.unique(label_C[at])) < len(at):
        width_C[at] = silhouette_samples(values_CD[at], label_C[at])
    batch_width = _batch_widths(values_CD[at], batch_C[at], label_C[at])
    connected = _connectivity(index_CK, label_C)
    ratio = same_batch_share(values_CD, batch_C, [names[t] for t in label_C], k=k)["ratio"]
    earlier_CD = None if before_CD is None else _labelled(before_CD, label, batch)[0]
    lost = lost_types(values_CD, batch_C, [names[t] for t in label_C], before_CD=earlier_CD, k=k)
    # Without any row the column is of no type, and would be taken for names of columns.
    lost = lost[lost["lost"].astype(bool)]
    rows: dict[str, dict[str, object]] = {}
    for t in types:
        of_type = label_C == t
        ilisi = np.nan
        n_batches = len(np.unique(batch_C[of_type]))
        if n_batches > 1:
            near_CK, _ = neighbours(values_CD[of_type], k)
            codes = np.unique(batch_C[of_type], return_inverse=True)[1]
            ilisi = (float(_simpson(near_CK, codes, n_batches).mean()) - 1) / (n_batches - 1)
        rows[names[t]] = {
            "n": int(of_type.sum()),
            "n_batches": n_batches,
            "knn_accuracy": float(hit_C[of_type].mean()),
            "knn_accuracy_across": float(hit_across_C[of_type].mean()),
            "silhouette": _mean(width_C[of_type]),
            "connectivity": connected[int(t)],
            "same_batch_ratio": float(ratio[names[t]]),
            "ilisi": ilisi,
            "batch_silhouette": batch_width.get(int(t), np.nan),
            "lost_into": ", ".join(sorted(set(lost.loc[lost["label"] == names[t], "into"]))),
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    per_type = table.copy()
    table.loc["all"] = {
        "n": len(label_C),
        "n_batches": len(np.unique(batch_C)),
        "knn_accuracy": float(hit_C.mean()),
        "knn_accuracy_across": _mean(hit_across_C),
        "silhouette": _mean(width_C),
        "connectivity": float(per_type["connectivity"].mean()),
        "same_batch_ratio": float(ratio["all"]),
        "ilisi": _mean(per_type["ilisi"].to_numpy(float)),
        "batch_silhouette": _mean(per_type["batch_silhouette"].to_numpy(float)),
        "lost_into": f"{(per_type['lost_into'] != '').sum()} lost",
    }
    return table


def _mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def pca_of_lognorm(
    counts_CG: sparse.csr_matrix, *, n_comps: int = 50, n_hvg: int = 2000, seed: int = 0
) -> np.ndarray:
    """Return the standard reference embedding: PCA of log-normalised counts of variable genes.

    Counts per 10,000 of all genes, log1p, the ``n_hvg`` most variable genes, centred PCA without
    scaling.

    Parameters
    ----------
    counts_CG
        (C, G) raw counts.
    n_comps, n_hvg
        Components and variable genes; fewer where the data have fewer.
    seed
        Of the start vector of the decomposition.

    Returns
    -------
    (C, n_comps) float32
        The same for the same seed, signs included.
    """
    counts_CG = sparse.csr_matrix(counts_CG)
    library_C = np.asarray(counts_CG.sum(axis=1)).ravel().astype(np.float64)
    if (library_C <= 0).any():
        raise DataError(
            f"{int((library_C <= 0).sum()):,} cells have no counts; drop them before computing a "
            "PCA."
        )
    chosen = variable_counts(counts_CG, n_hvg)
    if len(chosen) < 2 or counts_CG.shape[0] < 3:
        raise DataError(
            f"PCA of {counts_CG.shape[0]:,} cells and {len(chosen)} varying genes is not possible; "
            "pass more."
        )
    values_CG = log_normalised(counts_CG[:, chosen], library_C, dtype=np.float64)
    scores = principal_components(values_CG.astype(np.float32), n_comps, seed)
    return scores.astype(np.float32, copy=False)
