"""Principal components and singular vectors of cells, centred or not.

Axes: C cells, G genes, K components, P power iterations' width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

NARROW = 100
"""Columns up to which a dense decomposition is as quick as an iterative one, and exact."""


def principal_components(values_CG: Any, n_components: int, seed: int) -> np.ndarray:
    """Scores of the first principal components, centred and not scaled.

    scikit-learn's PCA, which centres a sparse matrix without making it dense (scanpy's
    ``pp.pca`` is the same with an AnnData around it).

    Parameters
    ----------
    values_CG
        Array or CSR matrix.
    n_components
        Of them; fewer where the data have fewer.
    seed
        Of the start of an iterative decomposition. The same seed gives the same signs.

    Returns
    -------
    numpy.ndarray
        (C, K), of the dtype of the values.
    """
    from sklearn.decomposition import PCA

    most = min(values_CG.shape)
    if isinstance(values_CG, np.ndarray) and values_CG.shape[1] <= NARROW:
        solver, n_components = "full", min(n_components, most)
    else:
        solver, n_components = "arpack", min(n_components, most - 1)
    return PCA(n_components, svd_solver=solver, random_state=seed).fit_transform(values_CG)


def singular_vectors(
    values_CG: Any, n_components: int, *, passes: int, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leading singular vectors and values by a randomised decomposition, not centred.

    Parameters
    ----------
    values_CG
        Array or CSR matrix.
    n_components
        K.
    passes
        Power iterations.
    seed
        Of the random projection.

    Returns
    -------
    tuple of numpy.ndarray
        Left (C, K), sizes (K,), right (K, G).
    """
    from sklearn.utils.extmath import randomized_svd

    return randomized_svd(values_CG, n_components, n_iter=passes, random_state=seed)


def right_singular_vectors(
    times: Callable[[np.ndarray], np.ndarray],
    transposed_times: Callable[[np.ndarray], np.ndarray],
    n_columns: int,
    n_components: int,
    *,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Find the leading right singular vectors of a matrix that is known by its products only.

    scikit-learn's randomised decomposition takes matrices and scipy's ``svds`` iterates one vector
    at a time; a matrix whose centring would make it dense wants a few products with many vectors.

    Parameters
    ----------
    times, transposed_times
        The matrix × an array (G, P), and its transpose × an array (C, P).
    n_columns
        G.
    n_components
        K, below the number of rows.
    seed
        Of the random projection.

    Returns
    -------
    tuple of numpy.ndarray
        Vectors (G, K) and sizes (K,).

    Notes
    -----
    Halko, Martinsson & Tropp (2011): random projection, power iterations, small decomposition.
    """
    start_GP = np.random.default_rng(seed).normal(size=(n_columns, n_components + 8))
    basis_CP = np.linalg.qr(times(start_GP.astype(np.float32)))[0]
    for _ in range(4):  # the spectrum of counts is flat: two leave the later ones 8 % short
        basis_CP = np.linalg.qr(times(np.linalg.qr(transposed_times(basis_CP))[0]))[0]
    _, size, right_PG = np.linalg.svd(transposed_times(basis_CP).T, full_matrices=False)
    return right_PG[:n_components].T, size[:n_components]
