"""Populations of one batch that now lie among a relative of other batches, found without labels.

A batch has no batch effect within itself. So each is cut into populations by itself, where its
cells lay before the correction, and for each of them it is asked what genes tell it from the cells
of its own batch around it (found with some cells, measured with others). Cells of other batches
that lie beside a *shared* population differ by the same genes from those beside its surroundings,
and so they do where the cut goes through noise, which the encoder hears in every batch alike.
Beside a population that they do not have they differ by much less, although they are as near. Only
differences within a batch are compared, so no batch effect takes part.

Axes: C cells, D width, G genes, P cells of a population, Q cells around it, N populations, K
neighbours, T telling genes, F folds, W weightings, U cells of other batches that are met.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import sparse

from genemodel.expression.components import principal_components
from genemodel.expression.groups import rows_by_group
from genemodel.expression.neighbours import nearest, nearest_others, without
from genemodel.expression.normalise import log_normalised, normalised

# What is looked at, however many cells and batches there are: the largest batches, some cells of
# each, and some of all others beside them.
MOST_BATCHES, MOST_CELLS, MOST_OTHERS = 50, 1000, 10_000
# Fewer cells of a batch are not cut, fewer of a population not judged.
_LEAST_CELLS, _LEAST_OF_POPULATION = 60, 30
# A population is not most of its batch: its surroundings would be what is private.
_LARGEST_SHARE = 0.6
_NEIGHBOURS, _COMPONENTS = 30, 20
# Genes that tell a population from its surroundings; fewer are ruled by one gene of a few cells
# (haemoglobin in ambient RNA), more by noise.
_TELLING = 50
_NAMED, _FOLDS = 5, 10
# The side of a cut that others have less of, before and after the correction, is the private one.
# A population is named where all of this holds; chosen on the development sets and on the case of
# docs/experiments.md ("A type of one batch alone").
_LEAST_T = 6.0  # its genes tell it in cells that they were not found in
_LEAST_KEPT = 0.3  # the embedding tells it from its surroundings within its own batch
_MOST_SHOWN = 0.7  # share of that which other batches show at the same place
_MOST_OF_TYPICAL = 0.8  # and of what they show at the batch's other populations (median)
_LEAST_Z = 2.5  # by so many standard errors
_LEAST_ABROAD = 0.35  # share of its neighbours that are of other batches: it is merged,
_MOST_OF_EXPECTED = 0.9  # but there are fewer of them than of all cells, since it adds its own


@dataclass(frozen=True)
class PrivatePopulation:
    """A population that one batch alone has, among cells of others.

    Attributes
    ----------
    batch
        Its batch.
    looked_at, cells
        Rows of the cells of its batch that were looked at, and those of them that are of it,
        ascending.
    genes
        Columns of the genes that are highest in it against its surroundings, first ones first.
    own_before
        Share of its own among its nearest cells, in the components of its batch alone.
    abroad
        Share of its nearest cells in the embedding that are of other batches.
    shown
        What its genes differ by between the cells of other batches beside it and beside its
        surroundings, as a share of what they differ by among its own batch's cells there: about 1
        where they have the population too.
    z
        Standard errors by which that is below 1.
    """

    batch: int
    looked_at: np.ndarray
    cells: np.ndarray
    genes: tuple[int, ...]
    own_before: float
    abroad: float
    shown: float
    z: float


def private_populations_of(
    counts_CG: sparse.csr_matrix,
    batch_C: np.ndarray,
    latent_CD: np.ndarray,
    embedding_CD: np.ndarray,
    *,
    seed: int,
) -> list[PrivatePopulation]:
    """Find populations of one batch alone whose neighbours are now of others.

    Parameters
    ----------
    counts_CG
        Raw counts.
    batch_C
        Batch code.
    latent_CD, embedding_CD
        Where the cells lay before the correction, by which batches are cut, and lie now.
    seed
        Of the folds and of what is looked at.

    Returns
    -------
    list of PrivatePopulation
        In the order of their batches; no cell is in two.
    """
    rng = np.random.default_rng(seed)
    latent_CD = np.ascontiguousarray(latent_CD, np.float32)
    embedding_CD = np.ascontiguousarray(embedding_CD, np.float32)
    others = np.sort(rng.permutation(len(batch_C))[:MOST_OTHERS])
    parts = [(len(own), code, own) for code, own in rows_by_group(batch_C)]
    parts = [part for part in parts if part[0] >= _LEAST_CELLS]
    parts = sorted(parts, key=lambda part: -part[0])[:MOST_BATCHES]
    found = []
    for _, code, own in sorted(parts, key=lambda part: part[1]):
        own = np.sort(rng.permutation(own)[:MOST_CELLS])
        abroad = others[batch_C[others] != code]
        if len(abroad) < _LEAST_CELLS:
            continue
        place = _Place(counts_CG, batch_C, latent_CD, embedding_CD, own, abroad, others, rng)
        found += _apart(list(place.found(code, _populations(latent_CD[own]))))
    return found


class _Measured(NamedTuple):
    """What tells a population, as a share of the whole difference; weights of it and around it."""

    t: float
    kept: float
    shown: float
    z: float
    genes: tuple[int, ...]
    share_C: np.ndarray
    weight_C: np.ndarray


class _Place:
    """One batch with what lies around its cells."""

    def __init__(
        self,
        counts_CG: sparse.csr_matrix,
        batch_C: np.ndarray,
        latent_CD: np.ndarray,
        embedding_CD: np.ndarray,
        own: np.ndarray,
        abroad: np.ndarray,
        others: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        self.own, self.counts_CG = own, counts_CG[own]
        self.own_CD = embedding_CD[own]
        self.value_CG = normalised(self.counts_CG, depth=1e4).toarray()
        self.square_CG = np.square(self.value_CG)
        self.fold_C = rng.permutation(len(own)) % _FOLDS
        self.home_CK = nearest_others(self.own_CD, _NEIGHBOURS)[0]
        near_CK = nearest(self.own_CD, embedding_CD[abroad], _NEIGHBOURS)[0]
        met_U, self.abroad_CK = np.unique(near_CK, return_inverse=True)
        self.abroad_CK = self.abroad_CK.reshape(near_CK.shape)
        self.met_UG = normalised(counts_CG[abroad[met_U]], depth=1e4)
        self.batch_U = batch_C[abroad[met_U]]
        self.expected = len(abroad) / len(others)
        self._places, self._others = (embedding_CD, latent_CD), others
        self._foreign_O = batch_C[others] != batch_C[own[0]]

    @functools.cached_property
    def abroad_C(self) -> tuple[np.ndarray, np.ndarray]:
        """Share of other batches among a cell's nearest of all, now and before the correction.

        Sought only where a population may be private: it takes most of the time.
        """
        at_C = np.searchsorted(self._others, self.own)
        at_C[at_C == len(self._others)] = 0
        at_C[self._others[at_C] != self.own] = -1
        now_C, before_C = (
            self._foreign_O[
                without(nearest(place_CD[self.own], place_CD[self._others], _NEIGHBOURS + 1), at_C)[
                    0
                ]
            ].mean(1)
            for place_CD in self._places
        )
        return now_C, before_C

    def found(self, code: int, populations: list[np.ndarray]) -> Iterator[PrivatePopulation]:
        """Judge populations of the batch, each given by rows of its cells."""
        told = [
            (member_P, one)
            for member_P in populations
            if (one := self.measure(member_P)) is not None
            and one.t >= _LEAST_T
            and one.kept >= _LEAST_KEPT
        ]
        # Two chemistries may show less of everything: then less is asked for.
        typical = float(np.median([one.shown / one.kept for _, one in told])) if told else 1.0
        most = min(_MOST_SHOWN, _MOST_OF_TYPICAL * typical)
        for member_P, one in told:
            private = one.shown <= most * one.kept and one.z >= _LEAST_Z
            if not private:
                continue
            now_C, before_C = self.abroad_C
            abroad, around = float(one.share_C @ now_C), float(one.weight_C @ now_C)
            most_abroad = min(around, _MOST_OF_EXPECTED * self.expected)
            fewer = float(one.share_C @ before_C) < float(one.weight_C @ before_C)
            if not fewer or not _LEAST_ABROAD <= abroad < most_abroad:
                continue
            inside_C = np.isin(np.arange(len(self.own)), member_P)
            alone_CD = principal_components(log_normalised(self.counts_CG), _COMPONENTS, 0)
            before = float(inside_C[nearest_others(alone_CD, _NEIGHBOURS)[0][member_P]].mean())
            yield PrivatePopulation(
                code, self.own, self.own[member_P], one.genes, before, abroad,
                max(0.0, one.shown / one.kept), one.z,
            )  # fmt: skip

    def measure(self, member_P: np.ndarray) -> "_Measured | None":
        """Compare a population with the cells of its batch around it, here and abroad."""
        inside_C = np.isin(np.arange(len(self.own)), member_P)
        outside = np.flatnonzero(~inside_C)
        around = outside[nearest(self.own_CD[member_P], self.own_CD[outside], _NEIGHBOURS)[0]]
        weight_C = np.bincount(around.ravel(), minlength=len(self.own)) / around.size
        share_C = inside_C / len(member_P)
        gene_FT, weight_FT, z_G = self._telling(share_C, weight_C)
        score_C = np.zeros(len(self.own))
        for fold, (gene_T, weight_T) in enumerate(zip(gene_FT, weight_FT, strict=True)):
            asked = self.fold_C == fold
            score_C[asked] = self.value_CG[asked][:, gene_T] @ weight_T
        gap, error = _step(score_C, share_C, weight_C)
        if gap <= 0:
            return None
        kept = float((share_C - weight_C) @ score_C[self.home_CK].mean(1))
        # Other batches' cells took no part in finding the genes: all folds score them at once.
        weight_G = np.bincount(gene_FT.ravel(), weight_FT.ravel() / _FOLDS, self.counts_CG.shape[1])
        score_U = np.asarray(self.met_UG @ weight_G).ravel()
        shown, error_abroad = self._abroad(score_U, member_P, weight_C)
        named = np.argsort(-z_G, kind="stable")[:_NAMED]
        return _Measured(
            gap / max(error, 1e-12), kept / gap, shown / gap,
            (kept - shown) / max(float(np.hypot(error, error_abroad)), 1e-12),
            tuple(int(gene) for gene in named), share_C, weight_C,
        )  # fmt: skip

    def _telling(
        self, share_C: np.ndarray, weight_C: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Genes that tell a population from its surroundings and their weights, (F, T) each.

        Of every fold without the cells of the fold; and the mean z of all genes.
        """
        left_FC = self.fold_C != np.arange(_FOLDS)[:, None]
        part_WC = np.concatenate([share_C * left_FC, weight_C * left_FC])
        part_WC = (part_WC / np.maximum(part_WC.sum(1, keepdims=True), 1e-12)).astype(np.float32)
        mean_WG, square_WG = part_WC @ self.value_CG, part_WC @ self.square_CG
        spread_WG = np.maximum(square_WG - np.square(mean_WG), 0)
        error_WG = spread_WG / np.maximum((part_WC > 0).sum(1), 1)[:, None]
        step_FG = mean_WG[:_FOLDS] - mean_WG[_FOLDS:]
        # 1e-3 of ten thousand molecules: a gene that nobody shows tells nothing.
        z_FG = step_FG / np.sqrt(error_WG[:_FOLDS] + error_WG[_FOLDS:] + 1e-3)
        weight_FG = step_FG / ((spread_WG[:_FOLDS] + spread_WG[_FOLDS:]) / 2 + 1e-3)
        gene_FT = np.argsort(-np.abs(z_FG), axis=1, kind="stable")[:, :_TELLING]
        return gene_FT, np.take_along_axis(weight_FG, gene_FT, 1), z_FG.mean(0)

    def _abroad(
        self, score_U: np.ndarray, member_P: np.ndarray, weight_C: np.ndarray
    ) -> tuple[float, float]:
        """Difference between other batches' cells beside a population and around it.

        Batch by batch, weighted with those met beside it, and with those met around it: some
        other batches may lack what is on either side, and the larger difference counts.
        """
        n_batches = int(self.batch_U.max()) + 1
        beside_U = np.bincount(self.abroad_CK[member_P].ravel(), minlength=len(score_U))
        around = np.flatnonzero(weight_C)
        around_U = np.bincount(
            self.abroad_CK[around].ravel(), np.repeat(weight_C[around], _width(self.abroad_CK)),
            len(score_U),
        )  # fmt: skip
        mass_B = np.bincount(self.batch_U, beside_U, n_batches)
        other_B = np.bincount(self.batch_U, around_U, n_batches)
        both_B = (mass_B > 0) & (other_B > 0)
        if not both_B.any():
            return 0.0, 0.0
        beside_B = np.bincount(self.batch_U, beside_U * score_U, n_batches)[both_B]
        around_B = np.bincount(self.batch_U, around_U * score_U, n_batches)[both_B]
        step_B = beside_B / mass_B[both_B] - around_B / other_B[both_B]
        step = max(
            float(met_B[both_B] @ step_B / met_B[both_B].sum()) for met_B in (mass_B, other_B)
        )
        error = sum(
            float(score_U[weight_U > 0].var()) / max(int((weight_U > 0).sum()), 1)
            for weight_U in (beside_U, around_U)
        )
        return step, float(np.sqrt(error))


def _width(index_CK: np.ndarray) -> int:
    return int(index_CK.shape[1])


def _populations(own_CD: np.ndarray) -> list[np.ndarray]:
    """Cut a batch into nested populations, rows of each, the small ones first.

    A branch that is hardly larger than one within it is not taken.
    """
    from scipy.cluster.hierarchy import linkage

    n_cells = len(own_CD)
    branches: list[np.ndarray] = [np.array([row]) for row in range(n_cells)]
    taken: list[int] = [0] * n_cells
    out = []
    for left, right, _, _ in linkage(own_CD, "ward"):
        rows = np.concatenate([branches[int(left)], branches[int(right)]])
        inner = max(taken[int(left)], taken[int(right)])
        if _LEAST_OF_POPULATION <= len(rows) <= _LARGEST_SHARE * n_cells and (
            len(rows) >= 1.1 * inner
        ):
            out.append(np.sort(rows))
            inner = len(rows)
        branches.append(rows)
        taken.append(inner)
    return out


def _step(score_C: np.ndarray, share_C: np.ndarray, weight_C: np.ndarray) -> tuple[float, float]:
    """Difference of two weighted means, and its standard error."""
    mean, base = float(share_C @ score_C), float(weight_C @ score_C)
    spread = share_C @ np.square(score_C - mean) / max((share_C > 0).sum(), 1)
    spread += weight_C @ np.square(score_C - base) / max((weight_C > 0).sum(), 1)
    return mean - base, float(np.sqrt(spread))


def _apart(judged: list[PrivatePopulation]) -> list[PrivatePopulation]:
    """Of populations that share cells keep the surest."""
    kept: list[PrivatePopulation] = []
    for one in sorted(judged, key=lambda one: -one.z):
        if all(not np.isin(one.cells, other.cells).any() for other in kept):
            kept.append(one)
    return kept
