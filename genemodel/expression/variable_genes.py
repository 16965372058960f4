"""Choosing the genes that vary more than others of their level, within batches or over all cells.

Two criteria, for two purposes: `select_genes` for models that are told batches, `variable_counts`
for the plain reference embedding. The published methods in ``evaluation`` have scanpy's.

Axes: C cells, G genes.
"""

import numpy as np
from scipy import sparse

from genemodel.expression.groups import rows_by_group
from genemodel.expression.normalise import normalised


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
    parts = [rows for _, rows in rows_by_group(batch_C) if len(rows) >= 20]
    chosen_G, score_G = np.zeros(n_columns), np.zeros(n_columns)
    for cells in parts or [np.arange(len(batch_C))]:
        part_G = _relative_dispersion(counts_CG[cells])
        score_G += part_G
        chosen_G[np.argsort(-part_G, kind="stable")[:n_genes]] += 1
    return np.sort(np.lexsort((-score_G, -chosen_G))[:n_genes])


def _relative_dispersion(part_CG: sparse.csr_matrix, n_bins: int = 20) -> np.ndarray:
    """z-score of the log dispersion among genes of similar mean; unseen genes last."""
    scaled_CG = normalised(part_CG, dtype=np.float64)
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


def variable_counts(counts_CG: sparse.csr_matrix, n_genes: int) -> np.ndarray:
    """Return the indices (ascending) of the genes whose counts vary most beyond their mean.

    The variance of counts is regressed on the mean (cubic in logarithms); genes are ranked by the
    variance of counts standardised with the fitted deviation and clipped at sqrt(C), which is the
    idea of Seurat v3 with a polynomial in place of loess.
    """
    counts_CG = sparse.csr_matrix(counts_CG)
    n_cells, n_all = counts_CG.shape
    mean_G = np.asarray(counts_CG.mean(axis=0)).ravel()
    square_G = np.asarray(counts_CG.multiply(counts_CG).mean(axis=0)).ravel()
    variance_G = np.clip(square_G - mean_G**2, 0, None) * n_cells / max(n_cells - 1, 1)
    usable_G = (variance_G > 0) & (mean_G > 0)
    if usable_G.sum() <= max(n_genes, 5):
        return np.flatnonzero(usable_G)
    x_G, y_G = np.log10(mean_G[usable_G]), np.log10(variance_G[usable_G])
    fitted_G = np.zeros(n_all)
    fitted_G[usable_G] = 10 ** (0.5 * np.polynomial.Polynomial.fit(x_G, y_G, 3)(x_G))
    by_gene = counts_CG.tocsc().astype(np.float64)
    gene_N = np.repeat(np.arange(n_all), np.diff(by_gene.indptr))
    deviation_G = np.where(usable_G, fitted_G, 1.0)
    z_N = np.minimum((by_gene.data - mean_G[gene_N]) / deviation_G[gene_N], np.sqrt(n_cells))
    zeros_G = n_cells - np.diff(by_gene.indptr)
    score_G = np.bincount(gene_N, z_N**2, minlength=n_all) + zeros_G * (mean_G / deviation_G) ** 2
    score_G[~usable_G] = -1.0
    # A stable sort keeps the choice the same where two genes tie.
    return np.sort(np.argsort(-score_G, kind="stable")[:n_genes])
