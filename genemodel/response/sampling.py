"""Cells that have a predicted effect: raw counts, made of control cells.

Axes: C cells, G genes.
"""

import numpy as np
import scipy.sparse as sp


def cells_with_effect(
    control_CG: sp.csr_matrix,
    control_G: np.ndarray,
    effect_G: np.ndarray,
    n: int,
    rng: np.random.Generator,
    *,
    depth: float,
    weight_C: np.ndarray | None = None,
) -> sp.csr_matrix:
    """Draw control cells, and thin or add molecules until their mean profile has the effect.

    A gene that falls keeps each molecule with the ratio of its rates; one that rises gets further
    molecules at a Poisson rate, cells without any of it too. Depth and all other variation stay
    those of the control cells.

    Parameters
    ----------
    control_CG
        Raw counts of control cells, CSR.
    control_G, effect_G
        Their log profile (:func:`~genemodel.expression.pseudobulk.bulk_profile`), and what is added
        to it.
    n
        Cells to make.
    rng
        Source of chance.
    depth
        Of the profile.
    weight_C
        How often each control cell is drawn.

    Returns
    -------
    scipy.sparse.csr_matrix
        (n, G), whole numbers.
    """
    chance = None if weight_C is None else weight_C / weight_C.sum()
    rows = rng.choice(control_CG.shape[0], n, p=chance)
    made_CG = sp.csr_matrix(control_CG[rows], dtype=np.int64)
    before_G = np.expm1(control_G) / depth
    # No gene is less than none or more than everything.
    after_G = np.expm1(np.clip(control_G + effect_G, 0.0, np.log1p(depth)))
    total = after_G.sum()
    after_G = after_G / total if total > 0 else before_G
    library_C = np.asarray(made_CG.sum(1)).ravel()
    kept_G = np.ones(len(before_G))
    np.divide(after_G, before_G, out=kept_G, where=before_G > 0)
    made_CG.data = rng.binomial(made_CG.data, np.minimum(kept_G, 1.0)[made_CG.indices])
    further_G = np.maximum(after_G - before_G, 0.0)
    n_C = rng.poisson(library_C * further_G.sum())
    if n_C.sum():
        gene_N = rng.choice(len(further_G), int(n_C.sum()), p=further_G / further_G.sum())
        cell_N = np.repeat(np.arange(n), n_C)
        added = sp.coo_matrix((np.ones(len(gene_N), np.int64), (cell_N, gene_N)), made_CG.shape)
        made_CG = sp.csr_matrix(made_CG + added.tocsr())
    made_CG.eliminate_zeros()
    return made_CG
