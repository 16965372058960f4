"""Every engine against brute force; what is its own, of another group, or mutual."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from genemodel.expression import neighbours as room
from genemodel.expression.groups import rows_by_group
from genemodel.expression.neighbours import (
    mutual_pairs,
    nearest,
    nearest_elsewhere,
    nearest_others,
)


def blobs(n, width=10, seed=0):
    rng = np.random.default_rng(seed)
    centre = 2 * rng.normal(size=(20, width))
    return (centre[rng.integers(0, 20, n)] + rng.normal(size=(n, width))).astype(np.float32)


def slow(query, reference, k):
    distance = np.linalg.norm(query[:, None].astype(float) - reference[None], axis=2)
    return np.argsort(distance, axis=1, kind="stable")[:, :k], np.sort(distance, axis=1)[:, :k]


def by_torch(query, reference, k):
    return room._by_torch(query, reference, k, torch.device("cpu"))


@pytest.mark.parametrize("engine", [room._by_numpy, room._by_scikit_learn, by_torch])
@pytest.mark.parametrize("far", [0.0, 300.0])
def test_engines_equal_the_slow_version_also_far_from_the_origin(engine, far):
    query, reference = blobs(70) + np.float32(far), blobs(150, seed=1) + np.float32(far)
    index, distance = engine(query, reference, 9)
    expected, expected_distance = slow(query, reference, 9)
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(distance, expected_distance, rtol=1e-4)
    assert index.dtype == np.int64 and distance.dtype == np.float32


def test_torch_works_in_blocks_and_leaves_the_precision_as_it_was(monkeypatch):
    monkeypatch.setattr(room, "_BLOCK", 1000)
    torch.set_float32_matmul_precision("high")
    try:
        index, _ = by_torch(blobs(90), blobs(90), 5)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    np.testing.assert_array_equal(index, slow(blobs(90), blobs(90), 5)[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_finds_the_same_as_the_processor():
    values = blobs(25_000, 50)
    index, _ = nearest(values, values, 15)
    expected = room._by_scikit_learn(values[:500], values, 15)[0]
    assert (index[:500] == expected).mean() > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(("width", "recall"), [(10, 0.99), (50, 0.97)])
def test_the_approximate_search_finds_nearly_all_neighbours(width, recall):
    """6,000 cells, searched in themselves and by others: the true 15 of 500 of them."""
    values, others = blobs(6_000, width), blobs(2_000, width, seed=1)
    for query in (values, others):
        index, distance = room._by_pynndescent(query, values, 15)
        exact = NearestNeighbors(n_neighbors=15, algorithm="brute").fit(values)
        far, near = exact.kneighbors(query[:500])
        found = np.mean([len(set(a) & set(b)) / 15 for a, b in zip(index, near, strict=False)])
        assert found > recall
        assert distance[:500].mean() == pytest.approx(far.mean(), rel=0.01)


def test_below_the_limit_nothing_approximate_is_used(monkeypatch):
    def refuse(*_):
        raise AssertionError("approximate")

    monkeypatch.setattr(room, "_by_pynndescent", refuse)
    values = blobs(600)
    index, _ = nearest(values, values, 4)
    np.testing.assert_array_equal(index, slow(values, values, 4)[0])
    monkeypatch.setattr(room, "EXACT_BELOW", 500)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(AssertionError, match="approximate"):
        nearest(values, values, 4)


def test_fewer_cells_than_neighbours_and_no_cells_at_all():
    values = blobs(3)
    assert nearest(values, values, 9)[0].shape == (3, 3)
    assert nearest(values[:0], values, 2)[0].shape == (0, 2)
    assert nearest_others(values, 9)[0].shape == (3, 2)


def test_a_cell_is_never_its_own_neighbour_among_duplicates():
    index, distance = nearest_others(np.zeros((20, 3)), 5)
    assert index.shape == (20, 5) and not (index == np.arange(20)[:, None]).any()
    assert not distance.any()


@pytest.mark.parametrize("limit", [20_000, 10])
@pytest.mark.parametrize("n_groups", [2, 3, 7])
def test_the_nearest_elsewhere_are_those_of_other_groups(monkeypatch, limit, n_groups):
    """Searched group by group, or by the bits of their numbers: the same."""
    values, group = blobs(120, 4), np.random.default_rng(0).integers(0, n_groups, 120) * 5 + 2
    distance = np.linalg.norm(values[:, None] - values[None], axis=2)
    distance[group[:, None] == group[None]] = np.inf
    monkeypatch.setattr(room, "EXACT_BELOW", limit)
    monkeypatch.setattr(room, "is_exact", lambda *_: True)
    index, found = nearest_elsewhere(values, group, 6)
    np.testing.assert_array_equal(index, np.argsort(distance, axis=1)[:, :6])
    np.testing.assert_allclose(found, np.sort(distance, axis=1)[:, :6], rtol=1e-4)


@pytest.mark.parametrize("limit", [20_000, 2])
def test_the_nearest_elsewhere_say_where_there_are_too_few(monkeypatch, limit):
    monkeypatch.setattr(room, "EXACT_BELOW", limit)
    monkeypatch.setattr(room, "is_exact", lambda *_: True)
    index, distance = nearest_elsewhere(np.arange(4.0)[:, None], np.array([0, 0, 0, 1]), 2)
    assert index.tolist() == [[3, -1], [3, -1], [3, -1], [2, 1]]
    assert np.isinf(distance[:3, 1]).all()
    assert (nearest_elsewhere(np.arange(4.0)[:, None], np.zeros(4), 2)[0] == -1).all()


def test_mutual_pairs_equal_the_slow_version():
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(30, 3)), rng.normal(size=(25, 3))
    forward, backward = slow(left, right, 4)[0], slow(right, left, 4)[0]
    np.testing.assert_array_equal(nearest(left, right, 4)[0], forward)
    expected = {(i, j) for i in range(30) for j in forward[i] if i in backward[j]}
    assert set(zip(*mutual_pairs(left, right, 4), strict=True)) == expected
    assert nearest(left, right[:2], 5)[0].shape == (30, 2)


def test_groups_have_all_their_rows_in_order():
    code = np.array([4, -1, 4, 0, -1, 4])
    found = rows_by_group(code)
    assert [group for group, _ in found] == [-1, 0, 4]
    assert [rows.tolist() for _, rows in found] == [[1, 4], [3], [0, 2, 5]]
    assert rows_by_group(code[:0]) == []
