"""Removing what batch effect is left in a latent, from populations that batches share.

Axes: C cells, D latent, B batches, K soft clusters, N pairs of neighbours.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import sparse

logger = logging.getLogger(__name__)


def nearest_rows(query_CD: np.ndarray, reference_CD: np.ndarray, k: int) -> np.ndarray:
    """Row numbers of the `k` nearest reference rows (Euclidean), exact, in blocks of 1,024."""
    query = torch.from_numpy(np.ascontiguousarray(query_CD, dtype=np.float32))
    reference = torch.from_numpy(np.ascontiguousarray(reference_CD, dtype=np.float32))
    k = min(k, len(reference))
    blocks = [
        torch.cdist(query[start : start + 1024], reference).topk(k, largest=False).indices
        for start in range(0, len(query), 1024)
    ]
    return torch.cat(blocks).numpy()


def mutual_pairs(
    left_CD: np.ndarray, right_CD: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (row of left, row of right) that are each among the other's `k` nearest."""
    forward_CK = nearest_rows(left_CD, right_CD, k)
    backward_CK = nearest_rows(right_CD, left_CD, k)
    n_left, n_right = len(left_CD), len(right_CD)
    left_N = np.repeat(np.arange(n_left), forward_CK.shape[1])
    one = sparse.csr_matrix(
        (np.ones(forward_CK.size, dtype=bool), (left_N, forward_CK.ravel())), (n_left, n_right)
    )
    right_N = np.repeat(np.arange(n_right), backward_CK.shape[1])
    two = sparse.csr_matrix(
        (np.ones(backward_CK.size, dtype=bool), (backward_CK.ravel(), right_N)), (n_left, n_right)
    )
    return one.multiply(two).nonzero()


def shared_evidence(
    unit_CD: np.ndarray, batch_C: np.ndarray, k: int, smooth: int = 15
) -> np.ndarray:
    """How well it is proven, for every cell, that its population exists in another batch.

    The share of the `smooth` nearest cells of its own batch (itself among them) that have a
    mutual nearest neighbour in any other batch: near 1 inside a shared population and low in a
    population that only one batch has, since the other batch's cells choose nearer partners.
    """
    cells = [np.flatnonzero(batch_C == code) for code in np.unique(batch_C)]
    paired_C = np.zeros(len(unit_CD), dtype=bool)
    for number, left in enumerate(cells):
        for right in cells[number + 1 :]:
            row, column = mutual_pairs(unit_CD[left], unit_CD[right], k)
            paired_C[left[row]] = True
            paired_C[right[column]] = True
    evidence_C = np.zeros(len(unit_CD))
    for own in cells:
        near_CK = nearest_rows(unit_CD[own], unit_CD[own], smooth)
        evidence_C[own] = paired_C[own][near_CK].mean(1)
    return evidence_C


@dataclass
class SharedClusterCorrection:
    """Offsets per soft cluster and batch that move shared populations onto each other.

    The alternation follows the idea of Harmony (Korsunsky et al. 2019, Nature Methods 16:1289):
    soft clusters on the sphere whose assignment is tilted towards batches that are rare in the
    cluster, then a ridge regression of the latent on the batch within every cluster, until it
    settles. What is different: (1) a cell takes part with the evidence that its population is
    shared (`shared_evidence`); a population of one batch is neither tilted into another cluster
    nor used to estimate an offset; (2) a cluster's offsets shrink towards the offset of the whole
    batch instead of towards zero, so that a private population follows the common shift.

    Attributes
    ----------
    theta
        Strength of the tilt.
    sigma
        Softness of the clusters (cosine distance).
    ridge
        Cells' worth of prior with which an offset is shrunk.
    k
        Mutual nearest neighbours.
    floor
        Evidence up to this value counts as none.
    cells_per_cluster, max_clusters
        Number of clusters = cells / cells_per_cluster, at most max_clusters.
    rounds
        Most alternations; it stops when the latent moves by less than 0.1 %.
    max_reference
        Corrected cells kept for `map_batch`.
    seed
        Seed of the clustering and of the order of the assignments.
    centre_KD, mean_KD, offset_KBD, reference_CD, evidence_C
        What `fit_transform` found: cluster directions, corrected cluster means, offsets, a sample
        of corrected cells, and the evidence per fitted cell (0 = private population).
    """

    theta: float = 2.0
    sigma: float = 0.1
    ridge: float = 1.0
    k: int = 10
    floor: float = 0.5
    cells_per_cluster: int = 30
    max_clusters: int = 100
    rounds: int = 10
    max_reference: int = 5000
    seed: int = 0
    centre_KD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    offset_KBD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0, 0)))
    mean_KD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    reference_CD: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    evidence_C: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def fit_transform(self, z_CD: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
        """Fit on all cells and return their corrected latent (float64, (C, D))."""
        z_CD = z_CD.astype(np.float64)
        n_cells, n_batches = len(z_CD), int(batch_C.max()) + 1
        n_clusters = min(self.max_clusters, max(2, n_cells // self.cells_per_cluster))
        rng = np.random.default_rng(self.seed)
        evidence_C = self._evidence(_unit(z_CD), batch_C)
        self.evidence_C = evidence_C
        onehot_CB = np.eye(n_batches)[batch_C]
        weight_CB = evidence_C[:, None] * onehot_CB
        if weight_CB.sum() == 0:
            logger.warning(
                "No population is shared between the batches: the embedding is left uncorrected."
            )
            self.centre_KD = _centres(_unit(z_CD), n_clusters, self.seed)
            self.offset_KBD = np.zeros((n_clusters, n_batches, z_CD.shape[1]))
            self.mean_KD = np.zeros_like(self.centre_KD)
            self.reference_CD = z_CD[rng.permutation(n_cells)[: self.max_reference]].astype("f4")
            return z_CD
        expected_B = weight_CB.sum(0) / weight_CB.sum()
        centre_KD = _centres(_unit(z_CD), n_clusters, self.seed)
        corrected_CD = z_CD
        member_CK = np.zeros((0, 0))
        for _ in range(self.rounds):
            unit_CD = _unit(corrected_CD)
            for _ in range(4):
                near_CK = _softness(unit_CD, centre_KD, self.sigma)
                if not member_CK.size:
                    member_CK = near_CK / near_CK.sum(1, keepdims=True)
                observed_KB = member_CK.T @ weight_CB
                for block in np.array_split(rng.permutation(n_cells), 20):
                    observed_KB -= member_CK[block].T @ weight_CB[block]
                    wanted_KB = np.outer(observed_KB.sum(1), expected_B)
                    tilt_KB = np.log((wanted_KB + 1) / (observed_KB + 1))
                    power_C = (self.theta * evidence_C[block])[:, None]
                    tilted_CK = near_CK[block] * np.exp(power_C * tilt_KB[:, batch_C[block]].T)
                    member_CK[block] = tilted_CK / tilted_CK.sum(1, keepdims=True)
                    observed_KB += member_CK[block].T @ weight_CB[block]
                centre_KD = _unit(member_CK.T @ unit_CD)
            self.offset_KBD = self._offsets(z_CD, member_CK * evidence_C[:, None], onehot_CB)
            before_CD = corrected_CD
            corrected_CD = z_CD - _moved(member_CK, self.offset_KBD, batch_C)
            change = np.linalg.norm(corrected_CD - before_CD) / np.linalg.norm(before_CD)
            if change < 1e-3:
                break
        self.centre_KD = centre_KD
        weight_CK = member_CK * evidence_C[:, None]
        mass_K = np.maximum(weight_CK.sum(0), 1e-9)[:, None]
        self.mean_KD = weight_CK.T @ corrected_CD / mass_K
        kept = rng.permutation(n_cells)[: self.max_reference]
        self.reference_CD = corrected_CD[kept].astype(np.float32)
        return corrected_CD

    def map_known(self, z_CD: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
        """Correct cells of batches that the correction was fitted on, cell by cell.

        The fitted offsets are applied with memberships by distance alone, so that a cell's result
        does not depend on which other cells come with it.
        """
        z_CD = z_CD.astype(np.float64)
        corrected_CD = z_CD
        for _ in range(3):
            near_CK = _softness(_unit(corrected_CD), self.centre_KD, self.sigma)
            member_CK = near_CK / near_CK.sum(1, keepdims=True)
            corrected_CD = z_CD - _moved(member_CK, self.offset_KBD, batch_C)
        return corrected_CD

    def map_batch(self, z_CD: np.ndarray) -> np.ndarray:
        """Correct the cells of one batch that was not there when the correction was fitted.

        Centres and reference cells stand still; the new cells are assigned to the clusters, and
        those with evidence against the reference cells estimate the offset from the cluster's
        corrected mean, shrunk towards the batch's common offset.
        """
        z_CD = z_CD.astype(np.float64)
        corrected_CD = z_CD
        for _ in range(3):
            unit_CD = _unit(corrected_CD)
            joined_CD = np.vstack([unit_CD, _unit(self.reference_CD)])
            code_C = np.repeat([0, 1], [len(unit_CD), len(self.reference_CD)])
            evidence_C = self._evidence(joined_CD, code_C)[: len(unit_CD)]
            near_CK = _softness(unit_CD, self.centre_KD, self.sigma)
            member_CK = near_CK / near_CK.sum(1, keepdims=True)
            weight_CK = member_CK * evidence_C[:, None]
            mass_K = weight_CK.sum(0)
            if mass_K.sum() == 0:
                return z_CD
            gap_KD = weight_CK.T @ z_CD / np.maximum(mass_K, 1e-9)[:, None] - self.mean_KD
            common_D = (mass_K[:, None] * gap_KD).sum(0) / mass_K.sum()
            shrink_K = (mass_K / (mass_K + self.ridge))[:, None]
            corrected_CD = z_CD - member_CK @ (common_D + shrink_K * (gap_KD - common_D))
        return corrected_CD

    def _evidence(self, unit_CD: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
        raw_C = shared_evidence(unit_CD, batch_C, self.k)
        return np.clip((raw_C - self.floor) / (1 - self.floor), 0, 1)

    def _offsets(
        self, z_CD: np.ndarray, weight_CK: np.ndarray, onehot_CB: np.ndarray
    ) -> np.ndarray:
        """Ridge offsets (K, B, D): a first pass towards zero gives the batch's common offset."""
        mass_KB = weight_CK.T @ onehot_CB
        n_clusters, n_batches = mass_KB.shape
        sum_KBD = np.stack([(onehot_CB * weight_CK[:, [k]]).T @ z_CD for k in range(n_clusters)])
        common_BD = np.zeros((n_batches, z_CD.shape[1]))
        offset_KBD = np.zeros_like(sum_KBD)
        for _ in range(2):
            for k in range(n_clusters):
                system = np.zeros((n_batches + 1, n_batches + 1))
                system[0, 0] = mass_KB[k].sum() + 1e-6
                system[0, 1:] = system[1:, 0] = mass_KB[k]
                system[1:, 1:] = np.diag(mass_KB[k] + self.ridge)
                right = np.vstack([sum_KBD[k].sum(0), sum_KBD[k] + self.ridge * common_BD])
                offset_KBD[k] = np.linalg.solve(system, right)[1:]
            share_KB = mass_KB / np.maximum(mass_KB.sum(0), 1e-9)
            common_BD = np.einsum("kb,kbd->bd", share_KB, offset_KBD)
        return offset_KBD


def _unit(rows_CD: np.ndarray) -> np.ndarray:
    return rows_CD / np.maximum(np.linalg.norm(rows_CD, axis=1, keepdims=True), 1e-8)


def _centres(unit_CD: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    fitted = KMeans(n_clusters, n_init=1, max_iter=25, random_state=seed).fit(unit_CD)
    return _unit(fitted.cluster_centers_)


def _softness(unit_CD: np.ndarray, centre_KD: np.ndarray, sigma: float) -> np.ndarray:
    distance_CK = 2 * (1 - unit_CD @ centre_KD.T)
    return np.exp(-(distance_CK - distance_CK.min(1, keepdims=True)) / sigma)


def _moved(member_CK: np.ndarray, offset_KBD: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
    """Offset of every cell: its clusters' offsets for its batch, batch by batch (no C x K x D)."""
    moved_CD = np.zeros((len(batch_C), offset_KBD.shape[2]))
    for code in range(offset_KBD.shape[1]):
        own = batch_C == code
        moved_CD[own] = member_CK[own] @ offset_KBD[:, code]
    return moved_CD
