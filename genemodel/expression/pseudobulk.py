"""Cells of a group added up: the profile of their sum, and how far it could lie by chance.

Axes: C cells, G genes.
"""

import numpy as np
import scipy.sparse as sp

BULK_DEPTH = 5e4
"""Counts a pseudobulk is brought to before the logarithm: ``bulk_target_sum`` of VCC 2026."""
# Values of a dense block of the jackknife: 80 MB.
_BLOCK = 10_000_000


def bulk_profile(sum_G: np.ndarray, depth: float = BULK_DEPTH) -> np.ndarray:
    """Give log(1 + counts at one depth) of summed counts; of nothing, zeros."""
    total = np.asarray(sum_G, np.float64).sum(-1, keepdims=True)
    return np.log1p(depth * sum_G / np.where(total > 0, total, 1.0))


def jackknife_variance(
    counts_CG: sp.csr_matrix,
    weight_C: np.ndarray | None = None,
    depth: float = BULK_DEPTH,
) -> np.ndarray:
    """Variance of every gene of :func:`bulk_profile` from leaving out one cell after the other.

    Parameters
    ----------
    counts_CG
        The group's cells, CSR.
    weight_C
        Weights of the cells in the sum; by default one each.
    depth
        As of the profile.

    Returns
    -------
    numpy.ndarray
        (G,); zeros for fewer than two cells.

    Notes
    -----
    Efron & Stein's delete-one jackknife, (n − 1)/n Σ (vᵢ − v̄)².
    """
    n, n_genes = counts_CG.shape
    if n < 2:
        return np.zeros(n_genes)
    weighted_CG = sp.csr_matrix(counts_CG, dtype=np.float64)
    if weight_C is not None:
        weighted_CG = sp.csr_matrix(sp.diags(weight_C) @ weighted_CG)
    library_C = np.asarray(weighted_CG.sum(1)).ravel()
    sum_G = np.asarray(weighted_CG.sum(0)).ravel()
    left_C = library_C.sum() - library_C
    scale_C = depth / np.where(left_C > 0, left_C, 1.0)
    around_G = bulk_profile(sum_G, depth)  # small differences are squared, not large values
    first_G, second_G = np.zeros(n_genes), np.zeros(n_genes)
    rows = max(1, _BLOCK // max(1, n_genes))
    for start in range(0, n, rows):
        part = weighted_CG[start : start + rows].toarray()
        part -= sum_G
        part *= -scale_C[start : start + rows, None]
        np.log1p(np.maximum(part, 0.0, out=part), out=part)
        part -= around_G
        first_G += part.sum(0)
        second_G += np.einsum("cg,cg->g", part, part)
    return (n - 1) / n * np.maximum(second_G - first_G**2 / n, 0.0)
