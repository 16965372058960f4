"""Whether perturbed cells differ from controls at all, beyond what shuffled labels give.

Two distances are looked at, and the stronger evidence counts, shuffled likewise: of all genes,
where a few move, and of the main directions in which cells vary, where a whole programme does.

Axes: C cells, G genes, L labels, B permutations, K components.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from genemodel.expression.components import principal_components
from genemodel.expression.normalise import log_normalised
from genemodel.metrics.response import ALPHA, benjamini_hochberg
from genemodel.response.screen import Screen

# Cells a test looks at: with more it is no longer a question of chance, only of time.
_TREATED, _CONTROLS = 500, 1000
# Cells of a guide that have a profile to speak of.
_GUIDE_CELLS = 10
_COMPONENTS = 10


@dataclass(frozen=True)
class NullTest:
    """What shuffled labels say.

    Attributes
    ----------
    p_U, fdr_U
        Of every unit against the controls of its context; the rate is over the context's units.
    p_guides_X
        Of every context: whether guides of one target are more alike than guides of two; NaN where
        there is nothing to shuffle.
    """

    p_U: np.ndarray
    fdr_U: np.ndarray
    p_guides_X: np.ndarray

    def null_contexts(self, context_U: np.ndarray) -> list[int]:
        """Contexts where no unit is told from the controls."""
        told = set(context_U[self.fdr_U < ALPHA].tolist())
        return sorted(set(context_U.tolist()) - told)


def null_test(screen: Screen, guide_C: np.ndarray | None, permutations: int, seed: int) -> NullTest:
    """Shuffle labels of cells, within contexts and batches, and guides among targets."""
    rng = np.random.default_rng(seed)
    context_U = np.array([u.context for u in screen.units])
    p_U, fdr_U = np.ones(len(screen.units)), np.ones(len(screen.units))
    guides = []
    for x in range(len(screen.contexts)):
        cells = _Cells.of(screen, x, seed)
        at_U = np.flatnonzero(context_U == x)
        for u in at_U:
            p_U[u] = cells.against_controls(screen.units[u].rows, permutations, rng)
        fdr_U[at_U] = benjamini_hochberg(p_U[at_U])
        guides.append(np.nan if guide_C is None else cells.guides(guide_C, permutations, rng))
    return NullTest(p_U, fdr_U, np.array(guides))


def p_of_shuffled(value_BS: np.ndarray) -> float:
    """P of the first row of statistics among all, by the better of them.

    Parameters
    ----------
    value_BS
        Several statistics of the real labels, then of shuffled ones; larger is further.
    """
    # How many are as far, of each statistic; then the smallest of these, shuffled likewise.
    as_far_BS = (value_BS[None] >= value_BS[:, None] - 1e-12).sum(1)
    best_B = as_far_BS.min(1)
    return float((best_B <= best_B[0]).mean())


def _roots(sum_LG: np.ndarray) -> np.ndarray:
    """Square roots of fractions, whose chance deviation is alike for all genes."""
    total_L1 = sum_LG.sum(1, keepdims=True)
    return np.sqrt(sum_LG / np.where(total_L1 > 0, total_L1, 1.0))


@dataclass(frozen=True)
class _Cells:
    """Cells of a context: counts, components, and where each stands among all cells."""

    screen: Screen
    context: int
    component_CK: np.ndarray  # of all cells; those of other contexts are 0

    @classmethod
    def of(cls, screen: Screen, context: int, seed: int) -> "_Cells":
        mine = [u.rows for u in screen.units if u.context == context]
        rows = np.unique(np.concatenate([screen.controls[context], *mine]))
        logged_CG = log_normalised(screen.counts_CG[rows])
        component_CK = np.zeros((screen.counts_CG.shape[0], _COMPONENTS))
        found_CK = principal_components(logged_CG, _COMPONENTS, seed)
        component_CK[rows, : found_CK.shape[1]] = found_CK
        return cls(screen, context, component_CK)

    def against_controls(
        self, treated: np.ndarray, permutations: int, rng: np.random.Generator
    ) -> float:
        treated = _some(treated, _TREATED, rng)
        controls = _some(self.screen.controls[self.context], _CONTROLS, rng)
        rows = np.concatenate([treated, controls])
        counts_CG = sp.csr_matrix(self.screen.counts_CG[rows], dtype=np.float64)
        component_CK = self.component_CK[rows]
        is_treated_C = np.arange(len(rows)) < len(treated)
        batch_C = self.screen.batch_C[rows]
        chosen_BC = np.stack(
            [is_treated_C, *(is_treated_C[_within(batch_C, rng)] for _ in range(permutations))]
        ).astype(np.float64)
        total_G = np.asarray(counts_CG.sum(0)).ravel()
        sum_BG = np.asarray((counts_CG.T @ chosen_BC.T).T)
        sum_BK = chosen_BC @ component_CK
        apart_BK = sum_BK / len(treated) - (component_CK.sum(0) - sum_BK) / len(controls)
        genes_B = np.square(_roots(sum_BG) - _roots(total_G - sum_BG)).sum(1)
        return p_of_shuffled(np.stack([genes_B, np.square(apart_BK).sum(1)], 1))

    def guides(self, guide_C: np.ndarray, permutations: int, rng: np.random.Generator) -> float:
        """P of guides of one target being alike, where guides are dealt among targets at random."""
        sums, means, target = [], [], []
        for unit in self.screen.units:
            if unit.context != self.context:
                continue
            for guide in np.unique(guide_C[unit.rows]):
                rows = unit.rows[guide_C[unit.rows] == guide]
                if guide >= 0 and len(rows) >= _GUIDE_CELLS:
                    sums.append(np.asarray(self.screen.counts_CG[rows].sum(0)).ravel())
                    means.append(self.component_CK[rows].mean(0))
                    target.append(unit.perturbation)
        target_L = np.array(target)
        if len(target_L) < 4 or np.bincount(target_L).max() < 2 or len(np.unique(target_L)) < 2:
            return float("nan")
        alike = []
        for profile_LG in (_roots(np.stack(sums).astype(np.float64)), np.stack(means)):
            centred_LG = profile_LG - profile_LG.mean(0)
            alike_LL = centred_LG @ centred_LG.T
            np.fill_diagonal(alike_LL, 0.0)
            alike.append(alike_LL)

        def pairs(label_L: np.ndarray) -> list[float]:
            same_LL = label_L[:, None] == label_L[None]
            return [float(alike_LL[same_LL].sum()) for alike_LL in alike]

        return _shuffled(pairs, target_L, lambda: rng.permutation(len(target_L)), permutations)


def _shuffled(
    statistics: Callable[[np.ndarray], list[float]],
    label: np.ndarray,
    places: Callable[[], np.ndarray],
    permutations: int,
) -> float:
    every = [label, *(label[places()] for _ in range(permutations))]
    return p_of_shuffled(np.array([statistics(one) for one in every]))


def _some(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return rows if len(rows) <= most else rng.choice(rows, most, replace=False)


def _within(batch_C: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffle places within batches."""
    to = np.arange(len(batch_C))
    for batch in np.unique(batch_C):
        at = np.flatnonzero(batch_C == batch)
        to[at] = rng.permutation(at)
    return to
