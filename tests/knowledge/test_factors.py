import numpy as np
import pytest
import scipy.sparse as sp

from genemodel.knowledge import factors


@pytest.fixture(scope="module")
def disjoint():
    """300 genes in 100 sets of three."""
    return sp.csr_matrix(np.kron(np.eye(100), np.ones((3, 1)))), [f"s{i}" for i in range(100)]


def closeness(vector_NP):
    """Cosine within sets of three, and between sets."""
    same = np.kron(np.eye(100, dtype=bool), np.ones((3, 3), bool))
    cosine = vector_NP @ vector_NP.T
    off = ~np.eye(len(same), dtype=bool)
    return cosine[same & off], cosine[~same]


def test_random_signs_know_every_set_and_singular_vectors_as_many_as_dimensions(disjoint):
    member, names = disjoint
    signs, known, _ = factors.of_sets(member, names, 64, "random", 0)
    within, between = closeness(signs)
    assert known.all() and within.min() > 0.999
    assert abs(between).mean() < 2 / 64**0.5
    few, known, how = factors.of_sets(member, names, 16, "svd", 0)
    # Sixteen vectors hold sixteen of a hundred equal blocks' worth, and no more.
    assert "16.0%" in how
    whole, known, _ = factors.of_sets(member, names, 99, "svd", 0)
    within, between = closeness(whole[known])[0], None
    assert within.min() > 0.9


def test_the_vector_of_a_set_does_not_depend_on_the_others(disjoint):
    member, names = disjoint
    all_of_them = factors.random_signs(member, names, 32)
    first = factors.random_signs(sp.csr_matrix(member[:, :10]), names[:10], 32)
    np.testing.assert_array_equal(all_of_them[:30], first[:30])


def test_small_sets_weigh_more_and_rows_have_unit_length():
    member = sp.csr_matrix(np.array([[1, 1], [1, 1], [1, 0], [1, 0], [0, 0]], float))
    x = factors.weighted(member).toarray()
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), [1, 1, 1, 1, 0])
    assert x[0, 1] > x[0, 0]


def test_links_are_found_in_both_directions_and_hubs_do_not_rule():
    """Two modules, a regulator each, and a hub that acts on all: modules stay apart."""
    n = 42
    weight = np.zeros((n, n))
    weight[0, 2:22] = 1
    weight[1, 22:] = 1
    weight[2, 3:] = 1
    vector, known, how = factors.of_edges(sp.csr_matrix(weight), 8, directed=True, seed=0)
    assert known[:3].all() and known[3:].all() and "spectral" in how
    left, right = vector[3:22], vector[22:]
    assert (left @ left.T).min() > (left @ right.T).max()
    np.testing.assert_allclose(np.linalg.norm(vector, axis=1), 1, rtol=1e-5)


def test_signs_of_edges_are_kept():
    weight = np.zeros((5, 5))
    weight[0, 2], weight[0, 3], weight[1, 4] = 1, -1, 1
    vector, known, _ = factors.of_edges(sp.csr_matrix(weight), 4, directed=True, seed=0)
    assert vector[2] @ vector[3] == pytest.approx(-1, abs=1e-4)
    same, _, _ = factors.of_edges(sp.csr_matrix(abs(weight)), 4, directed=True, seed=0)
    assert same[2] @ same[3] == pytest.approx(1, abs=1e-4)
    assert known.all()


def test_an_undirected_edge_may_be_written_either_way():
    rng = np.random.default_rng(0)
    weight = np.triu(rng.random((20, 20)) < 0.2, 1).astype(float)
    one, known, _ = factors.of_edges(sp.csr_matrix(weight), 6, directed=False, seed=0)
    other, _, _ = factors.of_edges(sp.csr_matrix(weight.T), 6, directed=False, seed=0)
    np.testing.assert_allclose(one @ one.T, other @ other.T, atol=1e-5)
    assert not known[~(weight + weight.T).any(1)].any()
