"""The correction: what batches share comes together, what one batch has alone stays apart."""

import logging
import tracemalloc

import numpy as np
import pytest

from genemodel.expression.groups import rows_by_group
from genemodel.expression.neighbours import nearest
from genemodel.integration import shared_clusters
from genemodel.integration.overcorrection import private_populations, vanished
from genemodel.integration.shared_clusters import (
    SharedClusterCorrection,
    _mass,
    _paired_at_once,
    _paired_by_batch,
    shared_evidence,
)


def points(seed=0, n=90, private=True):
    """Three shared blobs shifted in batch 1, and a fourth that batch 0 has alone."""
    rng = np.random.default_rng(seed)
    centre = 4.0 * np.eye(4, 6)
    kind = np.tile([0, 1, 2], 2 * n // 3)
    batch = np.repeat([0, 1], n)
    if private:
        kind, batch = np.append(kind, np.full(40, 3)), np.append(batch, np.zeros(40, int))
    shift = np.array([0, 0, 0, 0, 1.0, 0.6])
    z = centre[kind] + 0.8 * rng.normal(size=(len(kind), 6)) + batch[:, None] * shift
    return z, batch, kind


def gap(z, batch, kind):
    """Mean distance of the batches' centres over the shared kinds."""
    parts = [z[(kind == k) & (batch == 0)].mean(0) - z[(kind == k) & (batch == 1)].mean(0)
             for k in range(3)]  # fmt: skip
    return float(np.mean([np.linalg.norm(part) for part in parts]))


def test_evidence_is_low_where_one_batch_is_alone():
    z, batch, kind = points()
    unit = z / np.linalg.norm(z, axis=1, keepdims=True)
    evidence = shared_evidence(unit, batch, 5)
    assert evidence[kind == 3].mean() < 0.3 < 0.6 < evidence[kind < 3].mean()


def test_shared_blobs_meet_and_the_private_one_stays():
    z, batch, kind = points()
    correction = SharedClusterCorrection()
    moved = correction.fit_transform(z, batch)
    assert gap(moved, batch, kind) < 0.5 * gap(z, batch, kind)
    near, _ = nearest(moved[kind == 3], moved, 15)
    assert (kind[near] == 3).mean() > 0.95
    again = SharedClusterCorrection().fit_transform(z, batch)
    np.testing.assert_array_equal(moved, again)
    private = private_populations(kind, batch, correction.evidence_C, trusted=False)
    assert private.tolist() == [3]
    assert vanished(z, moved, kind, private) == []


def test_known_and_new_batches_are_mapped_onto_the_fitted_cells():
    z, batch, kind = points()
    correction = SharedClusterCorrection()
    moved = correction.fit_transform(z, batch)
    again = correction.map_known(z, batch)
    assert gap(again, batch, kind) < 0.6 * gap(z, batch, kind)
    np.testing.assert_allclose(correction.map_known(z[50:60], batch[50:60]), again[50:60])
    new, _, new_kind = points(seed=4, private=False)
    new, new_kind = new[90:] + np.array([0, 0, 0, 0, -2.0, 0.5]), new_kind[90:]
    mapped = correction.map_batch(new)

    def off(cells):
        centres = [moved[kind == k].mean(0) - cells[new_kind == k].mean(0) for k in range(3)]
        return np.mean([np.linalg.norm(c) for c in centres])

    assert off(mapped) < 0.7 * off(new)


def test_batches_that_share_nothing_are_left_alone(caplog):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(80, 4)) * 0.05
    batch = np.repeat([0, 1], 40)
    z[batch == 0, 0] += 5
    z[batch == 1, 1] += 5
    correction = SharedClusterCorrection(floor=1 - 1e-9)
    with caplog.at_level(logging.WARNING):
        moved = correction.fit_transform(z, batch)
    np.testing.assert_array_equal(moved, z)
    assert "No population is shared" in caplog.text
    np.testing.assert_array_equal(correction.map_known(z, batch), z)
    assert np.isfinite(correction.map_batch(z[:10])).all()


def test_a_private_population_that_was_moved_onto_another_is_named():
    z, batch, kind = points()
    merged = z.copy()
    merged[kind == 3] += z[kind == 1].mean(0) - z[kind == 3].mean(0)
    found = vanished(z, merged, kind, np.array([3]))
    assert [(one.population, one.into) for one in found] == [(3, 1)]
    assert found[0].foreign_before < 0.1 and found[0].foreign_after > 0.5
    assert vanished(z, z, kind, np.array([3])) == []
    # With labels a type of one batch is private even where neighbours suggest otherwise.
    sure = np.ones(len(z))
    assert private_populations(kind, batch, sure, trusted=True).tolist() == [3]
    assert private_populations(kind, batch, sure, trusted=False).tolist() == []


@pytest.mark.parametrize("n_batches", [2, 4])
def test_offsets_shrink_to_the_common_one_where_a_cluster_has_no_weight(n_batches):
    rng = np.random.default_rng(0)
    z, batch = rng.normal(size=(60, 3)), np.arange(60) % n_batches
    z += batch[:, None]
    weight = np.zeros((60, 2))
    weight[:, 0] = 1.0
    offset = SharedClusterCorrection()._offsets(z, weight, np.ones(60), batch, n_batches)
    np.testing.assert_allclose(offset[1], offset[0], rtol=0.15, atol=0.15)
    assert np.abs(offset[0]).max() > 0.3


def many_batches(n=3000, n_batches=12, seed=0):
    """Six shared populations, and one that a far-off batch has alone; one batch is far from all."""
    rng = np.random.default_rng(seed)
    kind, batch = rng.integers(0, 6, n), rng.integers(0, n_batches, n)
    kind[:150], batch[:150] = 6, 3
    shift = 0.4 * rng.normal(size=(n_batches, 8))
    shift[7] *= 4
    z = 4.0 * np.eye(7, 8)[kind] + 0.6 * rng.normal(size=(n, 8)) + shift[batch]
    return z, batch, kind


def test_partners_sought_at_once_tell_shared_from_private_as_pairs_of_batches_do(monkeypatch):
    """What is searched above 50,000 cells, on few enough for both."""
    z, batch, kind = many_batches()
    unit = (z / np.linalg.norm(z, axis=1, keepdims=True)).astype(np.float32)
    cells = [rows for _, rows in rows_by_group(batch)]
    every = _paired_by_batch(unit, batch, cells, 10)
    once = _paired_at_once(unit, batch, cells, 10)
    assert not (once & ~every).any()  # a pair that is found is one
    pairwise = shared_evidence(unit, batch, 10)
    few = np.isin(batch, (0, 1, 2))
    of_few = shared_evidence(unit[few], batch[few], 10)
    monkeypatch.setattr(shared_clusters, "PAIRED_BELOW", 100)
    at_once = shared_evidence(unit, batch, 10)
    # private, shared, far and shared
    for cells in (kind == 6, kind < 6, (kind < 6) & (batch == 7)):
        assert at_once[cells].mean() == pytest.approx(pairwise[cells].mean(), abs=0.1)
    assert at_once[kind == 6].mean() < 0.3 < 0.5 < at_once[(kind < 6) & (batch == 7)].mean()
    # Few batches are compared two by two at any size.
    np.testing.assert_array_equal(shared_evidence(unit[few], batch[few], 10), of_few)


def test_offsets_solve_the_whole_regression():
    """The arrow is solved by its intercept: the same as the dense system of every cluster."""
    rng = np.random.default_rng(0)
    n, n_batches, n_clusters = 80, 5, 3
    z, batch = rng.normal(size=(n, 4)), rng.integers(0, n_batches - 1, n)  # the last has no cell
    member, evidence = rng.dirichlet(np.ones(n_clusters), n), rng.random(n)
    found = SharedClusterCorrection(ridge=0.7)._offsets(z, member, evidence, batch, n_batches)
    onehot = np.eye(n_batches)[batch]
    common = np.zeros((n_batches, 4))
    for _ in range(2):
        offset = []
        for k in range(n_clusters):
            weight = member[:, k] * evidence
            design = np.column_stack([np.ones(n), onehot])
            system = design.T @ (weight[:, None] * design)
            system += np.diag([1e-6, *np.full(n_batches, 0.7)])
            right = design.T @ (weight[:, None] * z)
            right[1:] += 0.7 * common
            offset.append(np.linalg.solve(system, right)[1:])
        mass = (member * evidence[:, None]).T @ onehot
        share = mass / np.maximum(mass.sum(0), 1e-9)
        common = np.einsum("kb,kbd->bd", share, np.stack(offset))
    np.testing.assert_allclose(found, offset, rtol=1e-8, atol=1e-10)


def test_nothing_of_cells_times_batches_is_made():
    """A thousand batches of ten: memory beyond the cells stays that of cells × clusters."""
    rng = np.random.default_rng(0)
    n, n_batches = 10_000, 1000
    z, batch = rng.normal(size=(n, 3)), rng.permutation(n) % n_batches
    correction = SharedClusterCorrection(rounds=1, max_clusters=4)
    correction._evidence = lambda unit, code: np.ones(len(unit))  # what it costs is tested above
    tracemalloc.start()
    correction.fit_transform(z, batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * n * n_batches / 4  # one dense array of them would be 80 MB


class Noting(SharedClusterCorrection):
    """Note how unevenly batches share the clusters that offsets are estimated in."""

    def _offsets(self, z_CD, member_CK, evidence_C, batch_C, n_batches):
        mass = _mass(member_CK, evidence_C, batch_C, n_batches)
        even = np.outer(mass.sum(1), mass.sum(0)) / mass.sum()
        self.uneven = [*getattr(self, "uneven", []), np.abs(mass - even).sum() / mass.sum()]
        return super()._offsets(z_CD, member_CK, evidence_C, batch_C, n_batches)


def test_the_tilt_mixes_the_batches_in_the_clusters():
    z, batch, _ = points()
    plain, tilted = Noting(theta=0.0), Noting()
    for correction in (plain, tilted):
        correction.fit_transform(z, batch)
    assert tilted.uneven[0] < 0.5 * plain.uneven[0]


def test_cells_without_evidence_move_no_offset():
    rng = np.random.default_rng(0)
    z, batch = rng.normal(size=(60, 3)), np.arange(60) % 2
    member, evidence = rng.dirichlet(np.ones(3), 60), (np.arange(60) < 40).astype(float)
    correction = SharedClusterCorrection()
    before = correction._offsets(z, member, evidence, batch, 2)
    z[40:] += 100
    np.testing.assert_allclose(correction._offsets(z, member, evidence, batch, 2), before)


def test_evidence_begins_at_the_floor():
    correction = SharedClusterCorrection(floor=0.4)
    raw = np.array([0.0, 0.4, 0.7, 1.0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_clusters, "shared_evidence", lambda *_: raw)
        np.testing.assert_allclose(correction.evidence(None, None), [0, 0, 0.5, 1])
