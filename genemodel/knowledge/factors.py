"""Vectors of genes from what they belong to or are linked with, without a trained model.

Two ways, and when which. **Singular vectors** (:func:`singular`) of a matrix gene × set keep what
sets have in common: right where sets overlap, as pathways and networks do. **Random signs**
(:func:`random_signs`) give every set a fixed vector of ±1 and a gene the sum over its sets: inner
products between genes stay what they are in the full matrix, up to noise of 1 / √dimensions, for
*all* sets alike. Gene families hardly overlap, so their matrix is almost block-diagonal, a block's
singular value is the size of the family, and P singular vectors know the P largest families and
nothing of the others.

Axes: N genes, G sets, P dimensions.
"""

import hashlib

import numpy as np
import scipy.sparse as sp

from genemodel.expression.components import singular_vectors

# Power iterations of the randomised decomposition; spectra of gene sets fall off slowly.
_PASSES = 6
# Squared length below which what is left of a gene is rounding.
_NOTHING = 1e-6


def weighted(member_NG: sp.csr_matrix) -> sp.csr_matrix:
    """Weigh sets by how few genes they have (inverse frequency) and genes to unit length.

    A set of all genes says nothing; two genes that share a small one are close. A gene without
    sets stays empty.
    """
    n_genes = member_NG.shape[0]
    in_set_G = np.asarray((member_NG != 0).sum(0)).ravel()
    idf_G = np.log(n_genes / np.maximum(in_set_G, 1)) + 1e-3
    return unit_rows(member_NG @ sp.diags(idf_G))


def unit_rows(x_NG: sp.csr_matrix) -> sp.csr_matrix:
    """Scale rows to unit length; empty ones stay so."""
    length_N = np.sqrt(np.asarray(x_NG.multiply(x_NG).sum(1)).ravel())
    return sp.csr_matrix(sp.diags(1 / np.where(length_N > 0, length_N, 1)) @ x_NG)


def singular(x_NG: sp.csr_matrix, dimensions: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Leading left singular vectors × their sizes, and the share of each row that they keep."""
    k = min(dimensions, min(x_NG.shape) - 1)
    left_NK, size_K, _ = singular_vectors(x_NG, k, passes=_PASSES, seed=seed)
    vector_NP = np.zeros((x_NG.shape[0], dimensions), np.float32)
    vector_NP[:, :k] = left_NK * size_K
    whole_N = np.asarray(x_NG.multiply(x_NG).sum(1)).ravel()
    kept_N = (vector_NP.astype(np.float64) ** 2).sum(1) / np.maximum(whole_N, 1e-30)
    return vector_NP, kept_N


def random_signs(x_NG: sp.csr_matrix, names: list[str], dimensions: int) -> np.ndarray:
    """Sum over a gene's sets of a vector of ±1 / √P that the set's name decides.

    The same set has the same vector in every table, whatever other sets there are.
    """
    sign_GP = np.empty((len(names), dimensions), np.float32)
    for row, name in enumerate(names):
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
        sign_GP[row] = np.random.default_rng(seed).integers(0, 2, dimensions) * 2.0 - 1.0
    return np.asarray(x_NG @ sign_GP, np.float32) / np.float32(dimensions**0.5)


def of_sets(
    member_NG: sp.csr_matrix, names: list[str], dimensions: int, method: str, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Vectors of genes from the sets they belong to.

    Returns
    -------
    Vectors (N, P) of unit length, which genes have one, and a line on how.
    """
    x_NG = weighted(member_NG)
    has_N = np.diff(x_NG.indptr) > 0
    if method == "random":
        vector_NP, how = random_signs(x_NG, names, dimensions), "random signs of each set"
    else:
        vector_NP, kept_N = singular(x_NG, dimensions, seed)
        how = f"singular vectors, {kept_N[has_N].mean():.1%} of a gene's squared length kept"
    return *_unit(vector_NP, has_N), how


def of_edges(
    weight_NN: sp.csr_matrix, dimensions: int, *, directed: bool, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Vectors of genes from their links, each weighed by the degrees of both ends.

    Directed edges give half of the dimensions to what a gene acts on, half to what acts on it;
    undirected ones are one spectral embedding. Without weighing by degree, the leading vectors are
    the few hubs. Signs of weights are kept.

    Returns
    -------
    Vectors (N, P) of unit length, which genes have one, and a line on how.
    """
    if not directed:
        weight_NN = sp.csr_matrix(weight_NN + weight_NN.T)
    size = abs(weight_NN)
    out_N, in_N = (np.asarray(size.sum(axis)).ravel() for axis in (1, 0))
    x_NN = sp.csr_matrix(
        sp.diags(1 / np.sqrt(np.maximum(out_N, 1e-12)))
        @ weight_NN
        @ sp.diags(1 / np.sqrt(np.maximum(in_N, 1e-12)))
    )
    has_N = (out_N > 0) | (in_N > 0)
    if not directed:
        vector_NP, kept_N = singular(x_NN, dimensions, seed)
    else:
        half = dimensions // 2
        acts_NP, kept_N = singular(x_NN, dimensions - half, seed)
        acted_NP, kept_in_N = singular(sp.csr_matrix(x_NN.T), half, seed)
        vector_NP = np.concatenate([acts_NP, acted_NP], 1)
        kept_N = np.where(out_N > 0, kept_N, kept_in_N)
    how = f"spectral, degrees weighed, {kept_N[has_N].mean():.1%} of a gene's links kept"
    return *_unit(vector_NP, has_N), how


def _unit(vector_NP: np.ndarray, has_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale to unit length; a gene of which next to nothing was kept is not known."""
    length_N = np.linalg.norm(vector_NP, axis=1)
    known_N = has_N & (length_N**2 > _NOTHING)
    return vector_NP / np.where(known_N, length_N, 1)[:, None] * known_N[:, None], known_N
