"""Six scores of a predicted response to a perturbation, as in the Virtual Cell Challenge 2026.

Written from the published definitions (cell-eval2, ``vcc2026``): discrimination, expression error,
direction fidelity, direction reach, agreement of the genes that respond, and fold changes.

Axes: C cells, G genes, U units (a perturbation in a context), R another set of units.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from genemodel.expression.normalise import normalised

# Constants of the published profile.
DE_DEPTH = 1e6
MIN_CPM = 5.0  # mean in the control cells below which a gene is not tested
ALPHA = 0.05
EPSILON = 1e-9
PURITY = 0.9
MIN_GATE = 10
FLOOR = -6.0

METRICS: dict[str, str] = {
    "discrimination": "high",
    "expression_error": "low",
    "direction_fidelity": "high",
    "direction_reach": "high",
    "responding_genes": "high",
    "fold_change_error": "low",
}
"""Names of the six, and the better direction of each."""


@dataclass(frozen=True)
class Compared:
    """Genes of two groups of cells compared: fold change and evidence, NaN where not tested."""

    lfc_G: np.ndarray
    p_G: np.ndarray
    fdr_G: np.ndarray

    @property
    def significant_G(self) -> np.ndarray:
        """Bool (G,)."""
        return np.nan_to_num(self.fdr_G, nan=1.0) < ALPHA

    def without(self, gone_G: np.ndarray) -> "Compared":
        """Forget genes; their p-values took part in the correction of the others."""
        kept = [np.where(gone_G, np.nan, x) for x in (self.lfc_G, self.p_G, self.fdr_G)]
        return Compared(*kept)


def compare(treated_CG: sp.csr_matrix, control_CG: sp.csr_matrix, tested_G: np.ndarray) -> Compared:
    """Compare raw counts of two groups: Wilcoxon's rank sum and log2 fold change, gene by gene.

    Parameters
    ----------
    treated_CG, control_CG
        Raw counts, CSR.
    tested_G
        Genes to test; see :func:`genes_to_test`.
    """
    treated_CG, control_CG = (
        normalised(x, depth=DE_DEPTH, dtype=np.float64) for x in (treated_CG, control_CG)
    )
    mean_a_G, mean_b_G = (np.asarray(x.mean(0)).ravel() for x in (treated_CG, control_CG))
    lfc_G = np.log2((mean_a_G + EPSILON) / (mean_b_G + EPSILON))
    p_G = rank_sum_p(treated_CG, control_CG)
    nan = np.full(len(lfc_G), np.nan)
    fdr_G = nan.copy()
    fdr_G[tested_G] = benjamini_hochberg(p_G[tested_G])
    return Compared(np.where(tested_G, lfc_G, nan), np.where(tested_G, p_G, nan), fdr_G)


def normal_test(effect_G: np.ndarray, variance_G: np.ndarray) -> Compared:
    """Test effects on profiles against their variance, in place of cells."""
    from scipy.stats import norm

    z_G = np.zeros(len(effect_G))
    np.divide(effect_G, np.sqrt(variance_G), out=z_G, where=variance_G > 0)
    p_G = 2 * norm.sf(np.abs(z_G))
    return Compared(effect_G, p_G, benjamini_hochberg(p_G))


def genes_to_test(control_CG: sp.csr_matrix) -> np.ndarray:
    """Genes with more than 5 counts per million in the control cells, bool (G,)."""
    scaled_CG = normalised(control_CG, depth=DE_DEPTH, dtype=np.float64)
    return np.asarray(scaled_CG.mean(0)).ravel() > MIN_CPM


def rank_sum_p(a_CG: sp.csr_matrix, b_CG: sp.csr_matrix) -> np.ndarray:
    """Two-sided p of Wilcoxon's rank sum by the normal approximation, with ties, for every gene.

    Only values that are stored are sorted: zeros are one tie that stands before all others.

    Parameters
    ----------
    a_CG, b_CG
        Non-negative values, CSR.
    """
    from scipy.stats import norm

    n_a, n_b = a_CG.shape[0], b_CG.shape[0]
    n = n_a + n_b
    both = sp.vstack([a_CG, b_CG], format="csr").tocsc()
    both.eliminate_zeros()
    n_genes = both.shape[1]
    gene_N = np.repeat(np.arange(n_genes), np.diff(both.indptr))
    order = np.lexsort((both.data, gene_N))
    value_N, of_a_N = both.data[order], both.indices[order] < n_a
    zeros_G = n - np.diff(both.indptr)
    if len(value_N):
        new_N = np.r_[True, (np.diff(value_N) != 0) | (np.diff(gene_N) != 0)]
        tie_N = np.cumsum(new_N) - 1
        size_T = np.bincount(tie_N)
        place_N = np.arange(len(value_N)) - both.indptr[gene_N]
        rank_T = np.bincount(tie_N, place_N) / size_T + 1
        rank_N = zeros_G[gene_N] + rank_T[tie_N]
        gene_T = gene_N[new_N]
        ties_G = np.bincount(gene_T, size_T.astype(float) ** 3 - size_T, n_genes)
    else:
        rank_N, ties_G = np.zeros(0), np.zeros(n_genes)
    held_a_G = np.bincount(gene_N[of_a_N], minlength=n_genes)
    sum_a_G = np.bincount(gene_N[of_a_N], rank_N[of_a_N], n_genes)
    sum_a_G = sum_a_G + (n_a - held_a_G) * (zeros_G + 1) / 2
    ties_G = ties_G + zeros_G.astype(float) ** 3 - zeros_G
    u_G = sum_a_G - n_a * (n_a + 1) / 2
    variance_G = n_a * n_b / 12 * ((n + 1) - ties_G / (n * (n - 1)))
    distance_G = np.maximum(np.abs(u_G - n_a * n_b / 2) - 0.5, 0.0)
    z_G = np.zeros(n_genes)
    np.divide(distance_G, np.sqrt(np.maximum(variance_G, 0)), out=z_G, where=variance_G > 1e-9)
    return np.minimum(2 * norm.sf(z_G), 1.0)


def benjamini_hochberg(p_N: np.ndarray) -> np.ndarray:
    """Adjust p-values for how many there are."""
    from scipy.stats import false_discovery_control

    return false_discovery_control(p_N) if len(p_N) else p_N


def discrimination(
    predicted_UG: np.ndarray, measured_UG: np.ndarray, kept_G: np.ndarray
) -> np.ndarray:
    """Rank of the own measured effect among all, by cosine: 1 first, 0 last, (U,); NaN for one.

    Parameters
    ----------
    predicted_UG, measured_UG
        Effects of the same units.
    kept_G
        Genes that count: none that is a target.
    """
    n = len(predicted_UG)
    if n < 2:
        return np.full(n, np.nan)
    a, b = predicted_UG[:, kept_G], measured_UG[:, kept_G]
    size = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)
    cosine = np.divide(a @ b.T, size, out=np.zeros((n, n)), where=size > 0)
    # Ties are equal to the last few bits only.
    distance_UU = np.round(1 - cosine, 12)
    own_U1 = np.diag(distance_UU)[:, None]
    ahead_U = (distance_UU < own_U1).sum(1)
    tied_U = (distance_UU == own_U1).sum(1) - 1
    return 1 - (ahead_U + tied_U / 2) / (n - 1)


def expression_error(
    predicted_G: np.ndarray,
    measured_G: np.ndarray,
    noise_G: np.ndarray,
    kept_G: np.ndarray,
    predicted_noise_G: np.ndarray | None = None,
) -> tuple[float, float]:
    """Squared error without what noise adds to it, and that of predicting no change.

    The score of a panel is the ratio of their sums: 0 is perfect, 1 no skill.

    Parameters
    ----------
    predicted_G, measured_G
        Effects.
    noise_G
        Variance of the measured effect: of its cells and of its controls.
    kept_G
        Genes that count: all but the own target.
    predicted_noise_G
        Variance of the prediction where it is a second measurement.
    """
    error_G = (predicted_G - measured_G) ** 2 - noise_G
    if predicted_noise_G is not None:
        error_G = error_G - predicted_noise_G
    nothing_G = measured_G**2 - noise_G
    return float(error_G[kept_G].mean()), float(nothing_G[kept_G].mean())


def differential(
    predicted: Compared, measured: Compared, gate: Compared | None = None
) -> dict[str, float]:
    """Give the four scores of responding genes, of one unit; NaN where one is not defined.

    Parameters
    ----------
    predicted, measured
        Without the target gene.
    gate
        Where the fold changes' genes and sizes come from, if not from ``measured``: the whole
        measurement, where one half of it is compared with the other.
    """
    gate = measured if gate is None else gate
    called_G, real_G = predicted.significant_G, measured.significant_G
    known_G = np.isfinite(measured.lfc_G) & (measured.lfc_G != 0)
    agree_G = known_G & (np.sign(predicted.lfc_G) == np.sign(measured.lfc_G))
    n_real, n_called = int(real_G.sum()), int((called_G & known_G).sum())
    most = max(n_real, n_called)
    fidelity = float((called_G & agree_G).sum() / most) if most else np.nan
    either = int((called_G | real_G).sum())
    return {
        "direction_fidelity": fidelity,
        "direction_reach": _reach(predicted, real_G, known_G, agree_G),
        "responding_genes": float((called_G & real_G).sum() / either) if either else 1.0,
        "fold_change_error": _fold_changes(predicted, measured, gate),
    }


def _reach(
    predicted: Compared, real_G: np.ndarray, known_G: np.ndarray, agree_G: np.ndarray
) -> float:
    pool = np.flatnonzero(real_G & known_G)
    if not real_G.any():
        return np.nan
    order = np.lexsort((
        pool, -np.nan_to_num(np.abs(predicted.lfc_G[pool])),
        np.nan_to_num(predicted.p_G[pool], nan=1.0), np.nan_to_num(predicted.fdr_G[pool], nan=1.0),
        ~predicted.significant_G[pool],
    ))  # fmt: skip
    right = agree_G[pool[order]]
    pure = np.flatnonzero(np.cumsum(right) / np.arange(1, len(right) + 1) >= PURITY - 1e-12)
    return float((pure[-1] + 1) / real_G.sum()) if len(pure) else 0.0


def _fold_changes(predicted: Compared, measured: Compared, gate: Compared) -> float:
    at = gate.significant_G & np.isfinite(gate.lfc_G)
    size = float(np.abs(gate.lfc_G[at]).sum())
    if at.sum() < MIN_GATE or not size:
        return np.nan
    difference = np.nan_to_num(predicted.lfc_G[at]) - np.nan_to_num(measured.lfc_G[at])
    return float(np.abs(difference).sum() / size)


def scaled(
    values: Mapping[str, float], baseline: Mapping[str, float], replicate: Mapping[str, float]
) -> dict[str, float]:
    """Place every score between the mean response (0) and a repeat of the experiment (1).

    NaN where the repeat is not better than the baseline. As in the challenge nothing is cut off but
    what is far below, at −6.
    """
    found = {}
    for name, way in METRICS.items():
        b, r, u = (x.get(name, np.nan) for x in (baseline, replicate, values))
        better = (r > b) if way == "high" else (r < b)
        found[name] = max((u - b) / (r - b), FLOOR) if better and np.isfinite(u) else np.nan
    return found
