"""Removing what batch effect is left in a latent, from populations that batches share.

Axes: C cells, D latent, B batches, K soft clusters, N pairs of neighbours.
"""

import logging
from dataclasses import dataclass, field

import numpy as np
from scipy import sparse

from genemodel.expression.groups import rows_by_group
from genemodel.expression.neighbours import mutual_pairs, nearest, nearest_elsewhere

logger = logging.getLogger(__name__)


PAIRED_BELOW, PAIRED_UP_TO = 50_000, 4
"""Cells below which, and batches up to which, every two batches are searched in each other: ten
seconds on a core with 50,000 cells, and four times that with every doubling."""


def shared_evidence(
    unit_CD: np.ndarray, batch_C: np.ndarray, k: int, smooth: int = 15
) -> np.ndarray:
    """How well it is proven, for every cell, that its population exists in another batch.

    The share of the `smooth` nearest cells of its own batch (itself among them) that have a
    mutual nearest neighbour in any other batch: near 1 inside a shared population and low in a
    population that only one batch has, since the other batch's cells choose nearer partners.

    Every two batches are compared below 50,000 cells; above, where that would take the square of
    the cells, a cell's partners are sought among the nearest of all other batches at once.
    """
    unit_CD = np.ascontiguousarray(unit_CD, dtype=np.float32)
    cells = [rows for _, rows in rows_by_group(batch_C)]
    few = len(unit_CD) < PAIRED_BELOW or len(cells) <= PAIRED_UP_TO
    paired_C = (_paired_by_batch if few else _paired_at_once)(unit_CD, batch_C, cells, k)
    evidence_C = np.zeros(len(unit_CD))
    for own in cells:
        own_CD = unit_CD[own]
        evidence_C[own] = paired_C[own][nearest(own_CD, own_CD, smooth)[0]].mean(1)
    return evidence_C


def _paired_by_batch(
    unit_CD: np.ndarray, batch_C: np.ndarray, cells: list[np.ndarray], k: int
) -> np.ndarray:
    """Tell the cells that have a mutual nearest neighbour, from every two batches."""
    paired_C = np.zeros(len(unit_CD), dtype=bool)
    for number, left in enumerate(cells):
        for right in cells[number + 1 :]:
            row, column = mutual_pairs(unit_CD[left], unit_CD[right], k)
            paired_C[left[row]] = True
            paired_C[right[column]] = True
    return paired_C


def _paired_at_once(
    unit_CD: np.ndarray, batch_C: np.ndarray, cells: list[np.ndarray], k: int
) -> np.ndarray:
    """Tell the cells that are among the k of their batch nearest to one of their k nearest abroad.

    These pairs are some of those of `_paired_by_batch`: the nearest of all other batches are among
    the nearest of their own one. Whether the choice is mutual is asked within the batch, as there,
    so that a batch which lies farther from the others than they from each other has partners too.
    """
    abroad_CK = nearest_elsewhere(unit_CD, batch_C, k)[0]
    paired_C = np.zeros(len(unit_CD), dtype=bool)
    for own in cells:
        partner_N, at_N = np.unique(abroad_CK[own], return_inverse=True)
        home_NK = nearest(unit_CD[partner_N], unit_CD[own], k)[0]
        itself_N = np.repeat(np.arange(len(own)), k)
        mutual_N = (home_NK[at_N.ravel()] == itself_N[:, None]).any(1)
        paired_C[own[itself_N[mutual_N]]] = True
        paired_C[partner_N[at_N.ravel()[mutual_N]]] = True
    return paired_C


@dataclass(repr=False)
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

    # The first three, the cells of a cluster, the most clusters and the rounds are Harmony's
    # defaults (Korsunsky et al. 2019). k: five lose .004 of the total, 20 .016 of biology
    # (docs/experiments.md, 24 November 2026). floor: of the first recipe, not varied alone.
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

    def __repr__(self) -> str:
        clusters, batches, latent = self.offset_KBD.shape
        fitted = f"{clusters} clusters, {batches:,} batches, {latent} dimensions"
        return f"SharedClusterCorrection({fitted if clusters else 'not fitted'})"

    def fit_transform(
        self, z_CD: np.ndarray, batch_C: np.ndarray, private_C: np.ndarray | None = None
    ) -> np.ndarray:
        """Fit on all cells and return their corrected latent (float64, (C, D)).

        Cells of ``private_C`` (bool) are of populations that their batch alone has, whatever their
        neighbours suggest: no evidence.
        """
        z_CD = z_CD.astype(np.float64)
        n_cells, n_batches = len(z_CD), int(batch_C.max()) + 1
        n_clusters = min(self.max_clusters, max(2, n_cells // self.cells_per_cluster))
        rng = np.random.default_rng(self.seed)
        evidence_C = self.evidence(_unit(z_CD), batch_C)
        if private_C is not None:
            evidence_C[private_C] = 0
        self.evidence_C = evidence_C
        if evidence_C.sum() == 0:
            logger.warning(
                "No population is shared between the batches: the embedding is left uncorrected."
            )
            self.centre_KD = _centres(_unit(z_CD), n_clusters, self.seed)
            self.offset_KBD = np.zeros((n_clusters, n_batches, z_CD.shape[1]))
            self.mean_KD = np.zeros_like(self.centre_KD)
            self.reference_CD = z_CD[rng.permutation(n_cells)[: self.max_reference]].astype("f4")
            return z_CD
        expected_B = np.bincount(batch_C, evidence_C, n_batches) / evidence_C.sum()
        centre_KD = _centres(_unit(z_CD), n_clusters, self.seed)
        corrected_CD = z_CD
        member_CK = np.zeros((0, 0))
        for _ in range(self.rounds):
            unit_CD = _unit(corrected_CD)
            for _ in range(4):
                near_CK = _softness(unit_CD, centre_KD, self.sigma)
                if not member_CK.size:
                    member_CK = near_CK / near_CK.sum(1, keepdims=True)
                observed_KB = _mass(member_CK, evidence_C, batch_C, n_batches)
                for block in np.array_split(rng.permutation(n_cells), 20):
                    of_block = evidence_C[block], batch_C[block], n_batches
                    observed_KB -= _mass(member_CK[block], *of_block)
                    wanted_KB = np.outer(observed_KB.sum(1), expected_B)
                    tilt_KB = np.log((wanted_KB + 1) / (observed_KB + 1))
                    power_C = (self.theta * evidence_C[block])[:, None]
                    tilted_CK = near_CK[block] * np.exp(power_C * tilt_KB[:, batch_C[block]].T)
                    member_CK[block] = tilted_CK / tilted_CK.sum(1, keepdims=True)
                    observed_KB += _mass(member_CK[block], *of_block)
                centre_KD = _unit(member_CK.T @ unit_CD)
            self.offset_KBD = self._offsets(z_CD, member_CK, evidence_C, batch_C, n_batches)
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
            evidence_C = self.evidence(joined_CD, code_C)[: len(unit_CD)]
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

    def evidence(self, unit_CD: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
        """Tell, for every cell, the evidence above the floor (`shared_evidence`), from 0 to 1."""
        raw_C = shared_evidence(unit_CD, batch_C, self.k)
        return np.clip((raw_C - self.floor) / (1 - self.floor), 0, 1)

    def _offsets(
        self,
        z_CD: np.ndarray,
        member_CK: np.ndarray,
        evidence_C: np.ndarray,
        batch_C: np.ndarray,
        n_batches: int,
    ) -> np.ndarray:
        """Ridge offsets (K, B, D): a first pass towards zero gives the batch's common offset.

        In every cluster the latent is regressed on an intercept, which nothing shrinks, and one
        offset a batch. The system is an arrow (a diagonal and one row), so it is solved for the
        intercept first.
        """
        mass_KB = _mass(member_CK, evidence_C, batch_C, n_batches)
        sum_KBD = np.zeros((*mass_KB.shape, z_CD.shape[1]))
        for code, own in rows_by_group(batch_C):
            sum_KBD[:, code] = (member_CK[own] * evidence_C[own, None]).T @ z_CD[own]
        common_BD = np.zeros(sum_KBD.shape[1:])
        offset_KBD = np.zeros_like(sum_KBD)
        held_KB = mass_KB + self.ridge
        share_KB = mass_KB / held_KB
        # Σ mass - Σ mass² ÷ (mass + ridge), without the cancellation.
        pivot_K = (share_KB * self.ridge).sum(1) + 1e-6
        for _ in range(2):
            right_KBD = sum_KBD + self.ridge * common_BD
            rest_KD = sum_KBD.sum(1) - np.einsum("kb,kbd->kd", share_KB, right_KBD)
            level_KD = rest_KD / pivot_K[:, None]
            offset_KBD = (right_KBD - mass_KB[:, :, None] * level_KD[:, None]) / held_KB[:, :, None]
            weight_KB = mass_KB / np.maximum(mass_KB.sum(0), 1e-9)
            common_BD = np.einsum("kb,kbd->bd", weight_KB, offset_KBD)
        return offset_KBD


def _mass(
    member_CK: np.ndarray, evidence_C: np.ndarray, batch_C: np.ndarray, n_batches: int
) -> np.ndarray:
    """Evidence of every batch in every cluster, (K, B)."""
    n_cells = len(batch_C)
    into_BC = sparse.csr_matrix(
        (evidence_C, (batch_C, np.arange(n_cells))), shape=(n_batches, n_cells)
    )
    return (into_BC @ member_CK).T


def _unit(rows_CD: np.ndarray) -> np.ndarray:
    return rows_CD / np.maximum(np.linalg.norm(rows_CD, axis=1, keepdims=True), 1e-8)


def _centres(unit_CD: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    from sklearn.cluster import KMeans

    fitted = KMeans(n_clusters, n_init=1, max_iter=25, random_state=seed).fit(unit_CD)
    return _unit(fitted.cluster_centers_)


def _softness(unit_CD: np.ndarray, centre_KD: np.ndarray, sigma: float) -> np.ndarray:
    near_CK = unit_CD @ centre_KD.T
    # In place: with a million cells one array of cells × clusters takes 0.8 GB.
    np.subtract(1, near_CK, out=near_CK)
    near_CK *= 2
    near_CK -= near_CK.min(1, keepdims=True)
    near_CK /= -sigma
    return np.exp(near_CK, out=near_CK)


def _moved(member_CK: np.ndarray, offset_KBD: np.ndarray, batch_C: np.ndarray) -> np.ndarray:
    """Offset of every cell: its clusters' offsets for its batch, batch by batch (no C x K x D)."""
    moved_CD = np.zeros((len(batch_C), offset_KBD.shape[2]))
    for code, own in rows_by_group(batch_C):
        moved_CD[own] = member_CK[own] @ offset_KBD[:, code]
    return moved_CD
