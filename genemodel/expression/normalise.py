"""Counts at one depth, and their logarithms: the same on CSR matrices, arrays and tensors.

Axes: C cells, G genes, N stored counts.
"""

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import scipy.sparse as sp

if TYPE_CHECKING:
    from torch import Tensor

    type Counts = sp.csr_matrix | np.ndarray | Tensor

DEPTH = 1e4
"""Counts per cell after scaling: CP10K, the convention of scanpy, Seurat and Geneformer."""


def depth_factor(library_C: Any, depth: float = DEPTH) -> Any:
    """Give what brings each cell to ``depth``; a cell without counts is taken to have one.

    Parameters
    ----------
    library_C
        Counts of every cell, array or tensor of any shape.
    depth
        Counts per cell afterwards.

    Returns
    -------
    As ``library_C``.
    """
    if isinstance(library_C, np.ndarray):
        return depth / np.where(library_C > 0, library_C, 1)
    return depth / library_C.masked_fill(library_C <= 0, 1)


def normalised(
    counts_CG: "Counts",
    library_C: np.ndarray | None = None,
    *,
    depth: float = DEPTH,
    dtype: type[np.floating] = np.float32,
) -> Any:
    """Scale each cell to the same depth.

    Parameters
    ----------
    counts_CG
        CSR matrix, array or tensor; it is not changed.
    library_C
        Counts of every cell where they are not the sums of its row (genes were left out); for a
        matrix or an array only.
    depth
        Counts per cell afterwards.
    dtype
        Of the result; a tensor keeps its own.

    Returns
    -------
    As ``counts_CG``.

    Notes
    -----
    Libraries are summed and divided in float64 and rounded once. In float32 that is to the last bit
    what float32 gives, since whole numbers below 2²⁴ and their quotients round the same way.
    """
    if sp.issparse(counts_CG) or isinstance(counts_CG, np.ndarray):
        if library_C is None:
            library_C = np.asarray(cast(Any, counts_CG).sum(1, dtype=np.float64)).ravel()
        factor_C = depth_factor(np.asarray(library_C, dtype=np.float64), depth).astype(dtype)
        if isinstance(counts_CG, np.ndarray):
            return counts_CG.astype(dtype, copy=False) * factor_C[:, None]
        scaled_CG = sp.csr_matrix(counts_CG, dtype=dtype, copy=True)
        scaled_CG.data *= np.repeat(factor_C, np.diff(scaled_CG.indptr))
        return scaled_CG
    return counts_CG * depth_factor(counts_CG.sum(1, keepdim=True), depth)


def log_normalised(
    counts_CG: "Counts",
    library_C: np.ndarray | None = None,
    *,
    depth: float = DEPTH,
    dtype: type[np.floating] = np.float32,
) -> Any:
    """Give log(1 + counts at one depth), with the parameters of :func:`normalised`."""
    scaled_CG = normalised(counts_CG, library_C, depth=depth, dtype=dtype)
    if sp.issparse(scaled_CG):
        np.log1p(scaled_CG.data, out=scaled_CG.data)
        return scaled_CG
    if isinstance(scaled_CG, np.ndarray):
        return np.log1p(scaled_CG, out=scaled_CG)
    return scaled_CG.log1p()
