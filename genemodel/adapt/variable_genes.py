"""Choosing the genes that an integration reads, within batches.

Axes: C cells, G genes.
"""

import numpy as np
from scipy import sparse

from genemodel.adapt.integration_net import TARGET


def select_genes(counts_CG: sparse.csr_matrix, batch_C: np.ndarray, n_genes: int) -> np.ndarray:
    """Choose the genes that vary more than others of their level, within batches.

    Within every batch the log dispersion (variance / mean of counts per 10,000) of a gene is
    compared with the genes of similar mean (20 bins; z-score in the bin). Genes are ordered by
    the number of batches in which they are among the `n_genes` first, then by their mean z-score,
    so that a difference *between* batches cannot select a gene. A dispersion relative to genes of
    the same level needs no count model and therefore suits read counts as well as molecules
    (variance of Pearson residuals was tried: it lost .08 on full-length read counts).

    Parameters
    ----------
    counts_CG
        Raw counts.
    batch_C
        Batch code of each cell.
    n_genes
        How many genes to return; all genes when the matrix has no more.

    Returns
    -------
    np.ndarray
        Ascending column numbers.
    """
    n_columns = counts_CG.shape[1]
    if n_columns <= n_genes:
        return np.arange(n_columns)
    codes, size = np.unique(batch_C, return_counts=True)
    parts = [np.flatnonzero(batch_C == code) for code in codes[size >= 20]]
    chosen_G, score_G = np.zeros(n_columns), np.zeros(n_columns)
    for cells in parts or [np.arange(len(batch_C))]:
        part_G = _relative_dispersion(counts_CG[cells])
        score_G += part_G
        chosen_G[np.argsort(-part_G, kind="stable")[:n_genes]] += 1
    return np.sort(np.lexsort((-score_G, -chosen_G))[:n_genes])


def _relative_dispersion(part_CG: sparse.csr_matrix, n_bins: int = 20) -> np.ndarray:
    """z-score of the log dispersion among genes of similar mean; unseen genes last."""
    library_C = np.maximum(np.asarray(part_CG.sum(1), dtype=np.float64).ravel(), 1.0)
    scaled_CG = (sparse.diags(TARGET / library_C) @ part_CG).tocsr()
    mean_G = np.asarray(scaled_CG.mean(0)).ravel()
    square_G = np.asarray(scaled_CG.multiply(scaled_CG).mean(0)).ravel()
    n_cells = part_CG.shape[0]
    variance_G = (square_G - mean_G**2) * n_cells / max(n_cells - 1, 1)
    seen_G = (mean_G > 0) & (variance_G > 0)
    score_G = np.full(len(mean_G), -10.0)
    if not seen_G.any():
        return score_G
    level = np.log1p(mean_G[seen_G])
    dispersion = np.log(variance_G[seen_G] / mean_G[seen_G])
    edge = np.linspace(level.min(), level.max(), n_bins + 1)[1:-1]
    slot = np.digitize(level, edge)
    total = np.maximum(np.bincount(slot, minlength=n_bins), 1)
    centre = np.bincount(slot, dispersion, n_bins) / total
    spread = np.sqrt(np.bincount(slot, (dispersion - centre[slot]) ** 2, n_bins) / total)
    alone = total < 3
    centre[alone], spread[alone] = 0.0, np.maximum(np.abs(centre[alone]), 1.0)
    score_G[seen_G] = (dispersion - centre[slot]) / np.maximum(spread[slot], 1e-6)
    return score_G
