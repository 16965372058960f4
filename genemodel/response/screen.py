"""Perturbed and control cells as units with effects, each measured against controls of its own.

Controls are dealt into two halves. What is learned from is measured against one, what is predicted
is judged against the other: with one control group the same chance differences stand in everything,
and whatever predicts them looks good.

Axes: C cells, G genes, U units, X contexts, P perturbations, B batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp

from genemodel.expression.pseudobulk import BULK_DEPTH, bulk_profile, jackknife_variance


@dataclass(frozen=True)
class Unit:
    """Cells of one perturbation at one dose in one context.

    Attributes
    ----------
    perturbation, context, donor
        Codes.
    dose
        Its rank among the doses; 0 where there is one.
    rows
        Its cells.
    """

    perturbation: int
    context: int
    donor: int
    dose: int
    rows: np.ndarray


@dataclass(frozen=True)
class Screen:
    """Cells, and what was done to them.

    Attributes
    ----------
    counts_CG
        Raw counts, CSR.
    genes
        Names of the genes.
    perturbations, contexts, donors
        Names by code; the control is no perturbation.
    doses
        Values by rank, as text.
    units
        All that have enough cells.
    controls
        Control cells of every context.
    batch_C
        Code of the batch.
    targets
        Columns of each perturbation's own genes.
    members
        The perturbations that each is made of: itself, or those of a combination; −1 for one that
        is not in the screen.
    """

    counts_CG: sp.csr_matrix
    genes: list[str]
    perturbations: list[str]
    contexts: list[str]
    donors: list[str]
    doses: list[str]
    units: list[Unit]
    controls: list[np.ndarray]
    batch_C: np.ndarray
    targets: list[tuple[int, ...]]
    members: list[tuple[int, ...]]

    @cached_property
    def depth(self) -> float:
        """Counts that pseudobulks are brought to: no more than half the smallest group has.

        Above, one molecule of a shallow group would be worth many, and its logarithm mostly noise.
        """
        groups = [*(u.rows for u in self.units), *self.controls]
        least = min(float(self.counts_CG[rows].sum()) for rows in groups) / 2
        return float(min(BULK_DEPTH, max(least, 1.0)))

    def profile(self, sum_G: np.ndarray) -> np.ndarray:
        """Log profile of summed counts, at that depth."""
        return bulk_profile(sum_G, self.depth)

    def noise(self, rows: np.ndarray, weight_C: np.ndarray | None = None) -> np.ndarray:
        """Variance of the profile of some cells, (G,)."""
        return jackknife_variance(self.counts_CG[rows], weight_C, self.depth)

    @property
    def target_G(self) -> np.ndarray:
        """Genes that are a target of any perturbation, bool (G,)."""
        found = np.zeros(len(self.genes), bool)
        found[[g for genes in self.targets for g in genes]] = True
        return found

    def own_G(self, perturbation: int) -> np.ndarray:
        """Genes that are a target of this one, bool (G,)."""
        found = np.zeros(len(self.genes), bool)
        found[list(self.targets[perturbation])] = True
        return found

    def whole(self) -> "Origin":
        """All controls, to predict what was not measured."""
        return Origin(self, self.controls)


class Origin:
    """Control cells that effects are measured from.

    Parameters
    ----------
    screen
        All cells.
    rows
        Those of every context that are used.
    """

    def __init__(self, screen: Screen, rows: Sequence[np.ndarray]) -> None:
        self.screen, self.rows = screen, list(rows)
        self._weighted: dict[tuple[int, bytes], tuple[np.ndarray, np.ndarray]] = {}
        plain = [self._of(x, None) for x in range(len(self.rows))]
        self.control_XG = np.stack([profile_G for profile_G, _ in plain])
        self.noise_XG = np.stack([noise_G for _, noise_G in plain])

    def halves(self, seed: int) -> "tuple[Origin, Origin]":
        """Deal the controls of every context and batch into two halves."""
        rng = np.random.default_rng(seed)
        one, other = [], []
        for rows in self.rows:
            first: list[np.ndarray] = []
            second: list[np.ndarray] = []
            for batch in np.unique(self.screen.batch_C[rows]):
                dealt = rng.permutation(rows[self.screen.batch_C[rows] == batch])
                # An odd cell goes to the half that has fewer.
                half = (
                    len(dealt) + (sum(x.size for x in first) <= sum(x.size for x in second))
                ) // 2
                first.append(dealt[:half])
                second.append(dealt[half:])
            one.append(np.sort(np.concatenate(first)))
            other.append(np.sort(np.concatenate(second)))
        return Origin(self.screen, one), Origin(self.screen, other)

    def counts(self, context: int) -> sp.csr_matrix:
        """Give the counts of the control cells of a context."""
        return self.screen.counts_CG[self.rows[context]]

    def effect(self, unit: Unit, rows: np.ndarray | None = None) -> np.ndarray:
        """Effect on the log profile, against controls weighted to the unit's batches, (G,)."""
        rows = unit.rows if rows is None else rows
        treated_G = self.screen.profile(np.asarray(self.screen.counts_CG[rows].sum(0)).ravel())
        return treated_G - self.against(unit.context, rows)[0]

    def against(self, context: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Profile of the controls as these cells need them, and its variance."""
        weight_C = self.weights(context, rows)
        if weight_C is None:
            return self.control_XG[context], self.noise_XG[context]
        key = (context, np.round(weight_C, 6).tobytes())
        if key not in self._weighted:
            self._weighted[key] = self._of(context, weight_C)
        return self._weighted[key]

    def weights(self, context: int, rows: np.ndarray) -> np.ndarray | None:
        """Weights that give the controls the batches of these cells; None where all are one."""
        mine, theirs = self.screen.batch_C[rows], self.screen.batch_C[self.rows[context]]
        n_batches = int(self.screen.batch_C.max()) + 1
        here_B, there_B = (np.bincount(x, minlength=n_batches) for x in (mine, theirs))
        shared_B = (here_B > 0) & (there_B > 0)
        if not shared_B.any() or (shared_B.sum() == 1 and (there_B > 0).sum() == 1):
            return None  # nothing to weight by, or nothing to weight
        weight_B = np.zeros(n_batches)
        weight_B[shared_B] = here_B[shared_B] / there_B[shared_B]
        return weight_B[theirs]

    def _of(self, context: int, weight_C: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        counts_CG = self.counts(context)
        weight = np.ones(counts_CG.shape[0]) if weight_C is None else weight_C
        sum_G = np.asarray(counts_CG.T @ weight).ravel()
        return self.screen.profile(sum_G), self.screen.noise(self.rows[context], weight_C)
