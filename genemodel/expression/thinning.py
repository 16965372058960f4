"""Fewer molecules of the same cells: each is kept with a probability, whatever the others do.

Axes: C cells, G genes, N stored counts.
"""

import numpy as np
import scipy.sparse as sp


def thin(
    count_N: np.ndarray, keep_N: float | np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Keep each molecule with probability ``keep_N``.

    Parameters
    ----------
    count_N
        Whole counts, of any dtype.
    keep_N
        Probability, one number or one per count.
    generator
        Source of randomness.

    Returns
    -------
    numpy.ndarray
        Of the dtype of ``count_N``.
    """
    drawn_N = generator.binomial(count_N.astype(np.int64), keep_N)
    return drawn_N.astype(count_N.dtype, copy=False)


def split_molecules(
    count_CG: sp.csr_matrix,
    keep: float | np.ndarray,
    generator: np.random.Generator,
    *,
    dtype: type[np.number] = np.float32,
) -> tuple[sp.csr_matrix, sp.csr_matrix]:
    """Split every molecule at random into a kept and a held-out part.

    Parameters
    ----------
    count_CG
        Non-negative integer counts, CSR (C, G); any dtype.
    keep
        Probability of keeping a molecule, one number or one per cell (C,).
    generator
        Source of randomness.
    dtype
        Of the result.

    Returns
    -------
    tuple of csr_matrix
        Kept and held-out counts, explicit zeros removed. For Poisson counts the two are independent
        given the true rates, with exposures ``keep`` and ``1 - keep``.
    """
    count_CG = sp.csr_matrix(count_CG)
    stored_C = np.diff(count_CG.indptr)
    keep_N = np.repeat(np.broadcast_to(keep, stored_C.shape), stored_C)
    value_N = np.asarray(count_CG.data)
    kept_N = thin(value_N, keep_N, generator)
    parts = []
    for part_N in (kept_N, value_N - kept_N):
        part = sp.csr_matrix(
            (part_N.astype(dtype), count_CG.indices.copy(), count_CG.indptr.copy()),
            shape=count_CG.shape,
        )
        part.eliminate_zeros()
        parts.append(part)
    return parts[0], parts[1]
