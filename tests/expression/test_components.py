"""Components against dense decompositions and scanpy."""

import numpy as np
import pytest
from scipy import sparse

from genemodel.expression.components import (
    principal_components,
    right_singular_vectors,
    singular_vectors,
)


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    low = rng.normal(size=(90, 4)) * [8, 5, 3, 2] @ rng.normal(size=(4, 130))
    return (low + 0.3 * rng.normal(size=(90, 130))).astype(np.float32)


@pytest.mark.parametrize("kind", [np.asarray, sparse.csr_matrix, lambda x: x[:, :60]])
def test_principal_components_are_those_of_a_dense_decomposition(values, kind):
    given = kind(values)
    dense = np.asarray(given.todense() if sparse.issparse(given) else given, dtype=np.float64)
    left, size, _ = np.linalg.svd(dense - dense.mean(0), full_matrices=False)
    found = principal_components(given, 3, 0)
    np.testing.assert_allclose(np.abs(found), np.abs(left * size)[:, :3], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(found, principal_components(given, 3, 0))


def test_principal_components_are_those_of_scanpy_and_never_more_than_there_are(values):
    import scanpy as sc

    matrix = sparse.csr_matrix(values)
    theirs = sc.pp.pca(matrix, n_comps=4, random_state=0)
    np.testing.assert_allclose(principal_components(matrix, 4, 0), theirs, rtol=1e-5, atol=1e-5)
    assert principal_components(matrix, 500, 0).shape == (90, 89)
    assert principal_components(values[:, :3], 500, 0).shape == (90, 3)


def test_singular_vectors_are_those_of_a_dense_decomposition(values):
    _, size, right = np.linalg.svd(values.astype(float), full_matrices=False)
    left_CK, size_K, right_KG = singular_vectors(sparse.csr_matrix(values), 3, passes=4, seed=0)
    np.testing.assert_allclose(size_K, size[:3], rtol=1e-4)
    np.testing.assert_allclose(np.abs(right_KG), np.abs(right[:3]), atol=2e-3)
    np.testing.assert_allclose((left_CK * size_K) @ right_KG, values @ right[:3].T @ right[:3],
                               atol=0.05)  # fmt: skip
    found, found_size = right_singular_vectors(
        lambda b: values @ b, lambda b: values.T @ b, 130, 3, seed=0
    )
    np.testing.assert_allclose(found_size, size[:3], rtol=1e-4)
    np.testing.assert_allclose(np.abs(found.T), np.abs(right[:3]), atol=2e-3)
