"""Depth and logarithm against scanpy, and the same on matrices, arrays and tensors."""

import numpy as np
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from genemodel.expression.normalise import DEPTH, depth_factor, log_normalised, normalised


@pytest.fixture
def counts():
    rng = np.random.default_rng(0)
    counts_CG = rng.poisson(rng.gamma(0.3, 4.0, (40, 25))).astype(np.float32)
    counts_CG[3] = 0
    return sparse.csr_matrix(counts_CG)


def test_scanpy_gives_the_same(counts):
    import scanpy as sc

    theirs = AnnData(counts.copy())
    sc.pp.normalize_total(theirs, target_sum=DEPTH)
    np.testing.assert_allclose(normalised(counts).toarray(), theirs.X.toarray(), rtol=1e-6)
    sc.pp.log1p(theirs)
    np.testing.assert_allclose(log_normalised(counts).toarray(), theirs.X.toarray(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_matrix_array_and_tensor_agree(counts, dtype):
    before = counts.toarray()
    matrix = log_normalised(counts, dtype=dtype).toarray()
    array = log_normalised(before.astype(dtype), dtype=dtype)
    tensor = log_normalised(torch.from_numpy(before.astype(dtype)))
    assert matrix.dtype == array.dtype == tensor.numpy().dtype == dtype
    np.testing.assert_array_equal(matrix, array)
    np.testing.assert_allclose(tensor.numpy(), array, rtol=4 * np.finfo(dtype).eps)
    np.testing.assert_array_equal(counts.toarray(), before)  # nothing is changed in place


def test_depth_does_not_matter_and_an_empty_cell_stays_empty(counts):
    deeper = sparse.csr_matrix(counts * np.float32(8))
    np.testing.assert_array_equal(
        log_normalised(deeper).toarray(), log_normalised(counts).toarray()
    )
    assert not log_normalised(counts)[3].count_nonzero()
    total = np.asarray(normalised(counts, depth=7.0).sum(1)).ravel()
    np.testing.assert_allclose(np.delete(total, 3), 7.0, rtol=1e-5)


def test_a_library_of_more_genes_than_are_given_is_used(counts):
    library = np.asarray(counts.sum(1)).ravel()
    some = log_normalised(counts[:, :10], library).toarray()
    np.testing.assert_array_equal(some, log_normalised(counts).toarray()[:, :10])


def test_float32_is_what_float32_alone_gives():
    """Dividing in float64 and rounding once changes no bit, for libraries below 2^24."""
    library = np.random.default_rng(0).integers(1, 1 << 24, 100_000)
    wide = depth_factor(library.astype(np.float64)).astype(np.float32)
    np.testing.assert_array_equal(wide, np.float32(DEPTH) / library.astype(np.float32))
