"""Nearest cells, exactly where that is quick and nearly exactly where it is not.

=============================================  =============================================
Query × reference below 20,000 × 20,000        exact: scikit-learn's brute force
more, on a machine with a CUDA device          exact: torch, block by block
more, without                                  pynndescent, some 99 % of the neighbours
=============================================  =============================================

Memory grows with cells × neighbours, never with cells × cells. Distances are Euclidean.

Axes: C cells that ask, R cells that are found, D width, K neighbours.
"""

import logging
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

EXACT_BELOW = 20_000
"""Cells up to which all are compared with all: seconds on two cores."""
# Graph of pynndescent and how far its search looks beyond what it has found: 99 % of the true
# neighbours in 10 dimensions and 98 % in 50, against .96 with its defaults (tests/expression).
_GRAPH, _SLACK = 30, 0.2
# A walk on the graph starts among the reference's own cells; from far away it may end in the wrong
# place. So a few cells are looked up exactly as well, and where too little was found, all are.
_CHECKED, _LEAST_RECALL = 200, 0.95
# Distances that are taken at most for it: 100,000 cells with all of 100,000, minutes on two cores.
_MOST_DISTANCES = 10**10
# Distances between two sets that are sooner taken than scikit-learn's search is set up: a hundred
# batches mean ten thousand searches.
_FEW = 1 << 16
# Distances that a GPU holds at once: 1 GB.
_BLOCK = 1 << 28
# Candidates beyond K whose distances are taken again, so that rounding decides nothing.
_SPARE = 8

type Found = tuple[np.ndarray, np.ndarray]


def is_exact(n_query: int, n_reference: int) -> bool:
    """Say whether so many cells are compared with all of so many on any machine."""
    return n_query * n_reference < EXACT_BELOW**2


def nearest(query_CD: np.ndarray, reference_RD: np.ndarray, k: int) -> Found:
    """Find the k nearest reference cells of every query cell.

    Parameters
    ----------
    query_CD, reference_RD
        Vectors, finite. Give the same array twice to search a set in itself: a cell is then among
        its own neighbours.
    k
        Neighbours; fewer where there are fewer reference cells.

    Returns
    -------
    index_CK
        Rows of the reference, int64, nearest first.
    distance_CK
        float32.
    """
    itself = query_CD is reference_RD
    k = min(k, len(reference_RD))
    if not len(query_CD) or k < 1:
        return np.zeros((len(query_CD), k), np.int64), np.zeros((len(query_CD), k), np.float32)
    if not itself and len(query_CD) * len(reference_RD) <= _FEW:
        return _by_numpy(query_CD, reference_RD, k)
    if is_exact(len(query_CD), len(reference_RD)):
        return _by_scikit_learn(query_CD, reference_RD, k)
    # float64 is worth its time where all distances are taken anyhow, and not above.
    reference_RD = np.ascontiguousarray(reference_RD, dtype=np.float32)
    query_CD = reference_RD if itself else np.ascontiguousarray(query_CD, dtype=np.float32)
    import torch

    if torch.cuda.is_available():
        return _by_torch(query_CD, reference_RD, k, torch.device("cuda"))
    return _by_pynndescent(query_CD, reference_RD, k)


def nearest_others(values_CD: np.ndarray, k: int) -> Found:
    """Find the k nearest other cells of every cell, fewer where there are fewer.

    A cell is never its own neighbour, also where cells coincide.
    """
    found = nearest(values_CD, values_CD, min(k, len(values_CD) - 1) + 1)
    return without(found, np.arange(len(values_CD)))


def without(found: Found, itself_C: np.ndarray) -> Found:
    """Take from every row of neighbours the cell itself: (C, K) becomes (C, K - 1).

    Where many cells coincide a cell may be missing from its own list: then the farthest one goes.
    """
    index_CK, distance_CK = found
    own_CK = index_CK == itself_C[:, None]
    own_CK[~own_CK.any(axis=1), -1] = True
    shape = (len(index_CK), index_CK.shape[1] - 1)
    return index_CK[~own_CK].reshape(shape), distance_CK[~own_CK].reshape(shape)


def nearest_elsewhere(values_CD: np.ndarray, group_C: np.ndarray, k: int) -> Found:
    """Find the k nearest cells of *other* groups; -1 at an infinite distance where there are fewer.

    Up to :data:`EXACT_BELOW` cells every group is searched for in all the others. Above, most cells
    have k of other groups among their nearest of all, which one search finds. For the rest the
    groups are numbered and searched once per bit of the numbers, those with a 0 among those with a
    1 and back: two groups differ in at least one bit, so that every cell of another group is seen,
    in log2(groups) searches instead of one a group.

    Parameters
    ----------
    values_CD
        Vectors.
    group_C
        Code of each cell's group.
    k
        Neighbours.
    """
    n_cells = len(values_CD)
    index_CK = np.full((n_cells, k), -1, np.int64)
    distance_CK = np.full((n_cells, k), np.inf, np.float32)
    number_C = np.unique(group_C, return_inverse=True)[1]
    n_groups = int(number_C.max(initial=-1)) + 1
    left_C = np.ones(n_cells, bool)
    if n_cells < EXACT_BELOW:
        sides = [number_C == number for number in range(n_groups)]
        pairs = [(inside_C, ~inside_C) for inside_C in sides]
    else:
        values_CD = np.ascontiguousarray(values_CD, dtype=np.float32)
        near_CW, far_CW = nearest(values_CD, values_CD, max(_GRAPH, 2 * k))
        own_CW = number_C[near_CW] == number_C[:, None]
        left_C = (~own_CW).sum(1) < k
        order_CK = np.argsort(own_CW, axis=1, kind="stable")[~left_C, :k]
        index_CK[~left_C] = np.take_along_axis(near_CW[~left_C], order_CK, 1)
        distance_CK[~left_C] = np.take_along_axis(far_CW[~left_C], order_CK, 1)
        bits = [number_C >> bit & 1 == 1 for bit in range((n_groups - 1).bit_length())]
        pairs = [pair for one_C in bits for pair in ((one_C, ~one_C), (~one_C, one_C))]
    for inside_C, outside_C in pairs:
        asking, there = np.flatnonzero(inside_C & left_C), np.flatnonzero(outside_C)
        if not len(there) or not len(asking):
            continue
        near_CK, far_CK = nearest(values_CD[asking], values_CD[there], k)
        index_CK[asking], distance_CK[asking] = _nearer(
            (index_CK[asking], distance_CK[asking]), (there[near_CK], far_CK)
        )
    return index_CK, distance_CK


def _nearer(one: Found, other: Found) -> Found:
    """Join two lists of neighbours a cell and keep the nearest, each once."""
    k = one[0].shape[1]
    index_CK, distance_CK = (np.concatenate(pair, 1) for pair in zip(one, other, strict=True))
    order_CK = np.argsort(index_CK, 1, kind="stable")
    index_CK = np.take_along_axis(index_CK, order_CK, 1)
    distance_CK = np.take_along_axis(distance_CK, order_CK, 1)
    repeated_CK = np.zeros(index_CK.shape, bool)
    repeated_CK[:, 1:] = index_CK[:, 1:] == index_CK[:, :-1]
    distance_CK[repeated_CK] = np.inf
    index_CK[repeated_CK] = -1
    order_CK = np.argsort(distance_CK, 1, kind="stable")[:, :k]
    return np.take_along_axis(index_CK, order_CK, 1), np.take_along_axis(distance_CK, order_CK, 1)


def mutual_pairs(
    left_CD: np.ndarray, right_CD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row of left, row of right) that are each among the other's ``k`` nearest."""
    forward_CK = nearest(left_CD, right_CD, k)[0]
    backward_CK = nearest(right_CD, left_CD, k)[0]
    n_left, n_right = len(left_CD), len(right_CD)
    there_N = np.repeat(np.arange(n_left), forward_CK.shape[1]) * n_right + forward_CK.ravel()
    back_N = backward_CK.ravel() * n_right + np.repeat(np.arange(n_right), backward_CK.shape[1])
    return np.divmod(np.intersect1d(there_N, back_N, assume_unique=True), n_right)


# -- engines -------------------------------------------------------------------------------------


def _by_numpy(query_CD: np.ndarray, reference_RD: np.ndarray, k: int) -> Found:
    query_CD, reference_RD = query_CD.astype(np.float64), reference_RD.astype(np.float64)
    # |q|² is the same for all candidates of a cell.
    near_CR = query_CD @ (-2 * reference_RD.T)
    near_CR += np.einsum("rd,rd->r", reference_RD, reference_RD)
    index_CK = np.argpartition(near_CR, k - 1, axis=1)[:, :k]
    # By differences, so that equal cells are at a distance of 0 and not of a rounding.
    square_CK = np.square(reference_RD[index_CK] - query_CD[:, None]).sum(2)
    order_CK = np.argsort(square_CK, axis=1, kind="stable")
    distance_CK = np.sqrt(np.take_along_axis(square_CK, order_CK, 1))
    return np.take_along_axis(index_CK, order_CK, 1), distance_CK.astype(np.float32)


def _by_scikit_learn(query_CD: np.ndarray, reference_RD: np.ndarray, k: int) -> Found:
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(reference_RD)
    distance_CK, index_CK = search.kneighbors(query_CD)
    return index_CK.astype(np.int64, copy=False), distance_CK.astype(np.float32, copy=False)


def _by_torch(
    query_CD: np.ndarray, reference_RD: np.ndarray, k: int, device: "torch.device"
) -> Found:
    """Compare all with all on a device; candidates by products, the order by differences."""
    import torch

    precision = torch.get_float32_matmul_precision()
    # TF32, which training may have turned on, has too few digits to tell neighbours.
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad():
            reference = torch.from_numpy(reference_RD).to(device)
            centre = reference.mean(0)
            reference = reference - centre
            square_R = reference.square().sum(1)
            rows = max(1, _BLOCK // len(reference))
            parts: list[tuple[np.ndarray, np.ndarray]] = []
            for start in range(0, len(query_CD), rows):
                query = torch.from_numpy(query_CD[start : start + rows]).to(device) - centre
                # |q|² is the same for all candidates of a cell.
                near_CR = torch.addmm(square_R, query, reference.T, alpha=-2)
                spare = min(k + _SPARE, len(reference))
                candidate_CK = near_CR.topk(spare, largest=False, sorted=False).indices
                distance_CK = (reference[candidate_CK] - query[:, None]).norm(dim=2)
                distance_CK, order_CK = distance_CK.topk(k, largest=False)
                index_CK = candidate_CK.gather(1, order_CK)
                parts.append((index_CK.cpu().numpy(), distance_CK.cpu().numpy()))
    finally:
        torch.set_float32_matmul_precision(precision)
    index, distance = zip(*parts, strict=True)
    return np.concatenate(index), np.concatenate(distance)


def _by_pynndescent(query_CD: np.ndarray, reference_RD: np.ndarray, k: int) -> Found:
    from pynndescent import NNDescent

    graph = max(_GRAPH, k + 1)
    search = NNDescent(reference_RD, n_neighbors=graph, random_state=0)
    if query_CD is reference_RD:
        index_CK, distance_CK = (array_CK[:, :k] for array_CK in search.neighbor_graph)
    else:
        index_CK, distance_CK = search.query(query_CD, k, epsilon=_SLACK)
    # A dead end of the graph, as among many equal cells, leaves places empty.
    missed = np.flatnonzero((index_CK < 0).any(1))
    index_CK, distance_CK = index_CK.astype(np.int64), distance_CK.astype(np.float32)
    if len(missed):
        index_CK[missed], distance_CK[missed] = _by_scikit_learn(query_CD[missed], reference_RD, k)
    found = _recall(index_CK, query_CD, reference_RD, k)
    if found >= _LEAST_RECALL:
        return index_CK, distance_CK
    affordable = len(query_CD) * len(reference_RD) <= _MOST_DISTANCES
    logger.warning(
        "The search finds %.0f %% of the nearest cells only, as between sets that lie apart: %s.",
        100 * found,
        "all are compared with all instead" if affordable else "too many cells to compare all",
    )
    return _by_scikit_learn(query_CD, reference_RD, k) if affordable else (index_CK, distance_CK)


def _recall(index_CK: np.ndarray, query_CD: np.ndarray, reference_RD: np.ndarray, k: int) -> float:
    """Share of the true neighbours among those found, for a sample of the query."""
    some = np.random.default_rng(0).choice(
        len(query_CD), min(_CHECKED, len(query_CD)), replace=False
    )
    true_SK, _ = _by_scikit_learn(query_CD[some], reference_RD, k)
    hits = [np.isin(a, b).mean() for a, b in zip(index_CK[some], true_SK, strict=True)]
    return float(np.mean(hits))
