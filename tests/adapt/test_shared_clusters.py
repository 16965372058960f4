"""The correction: what batches share comes together, what one batch has alone stays apart."""

import logging

import numpy as np
import pytest

from genemodel.adapt.overcorrection import private_populations, vanished
from genemodel.adapt.shared_clusters import (
    SharedClusterCorrection,
    shared_evidence,
)
from genemodel.expression.neighbours import nearest


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
