"""Populations of one batch among a relative of others: found by their genes, spared, told of."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genemodel.integration import private_populations, sparing
from genemodel.integration.private_populations import private_populations_of
from genemodel.integration.shared_clusters import SharedClusterCorrection
from genemodel.integration.sparing import corrected, names_for_readers, rows_of, told

N_GENES = 120
MARKERS = np.arange(100, 112)


def cells(seed=0, *, n=150, both=False, batches=2, gap=1.2):
    """Two types in all batches, and beside the first a relative, in batch 0 alone or in both.

    A cell lies at its type and at two states; genes 0 to 39 tell the types, 100 to 111 the
    relative, 40 to 79 a state of the first type that every batch has.
    """
    rng = np.random.default_rng(seed)
    kind, batch = np.tile([0, 1], n * batches // 2), np.repeat(np.arange(batches), n)
    with_relative = range(batches) if both else [0]
    kind = np.concatenate([kind, np.full(60 * len(with_relative), 2)])
    batch = np.concatenate([batch, np.repeat(list(with_relative), 60)])
    state = rng.normal(size=len(kind))
    rate = np.full((len(kind), N_GENES), 1.0) * rng.gamma(2, 0.5, N_GENES)
    rate[:, :40] *= np.exp(1.2 * (kind == 1))[:, None]
    rate[:, 40:80] *= np.exp(0.4 * state)[:, None]
    rate[:, MARKERS] *= np.exp(1.0 * (kind == 2))[:, None]
    # A batch bends all genes, which must not look like a population.
    rate *= np.exp(0.4 * rng.normal(size=(batches, N_GENES)))[batch]
    counts = sparse.csr_matrix(rng.poisson(3 * rate).astype(np.float32))
    place = np.zeros((len(kind), 4))
    place[:, 0], place[:, 1], place[:, 2] = 8 * (kind == 1), state, gap * (kind == 2)
    place += 0.4 * rng.normal(size=place.shape)
    return counts, batch, kind, place


def merged(place, batch, kind, both=False):
    """As a correction leaves it: half of the first type of batch 1 lies at the relative."""
    place = place.copy()
    if not both:
        moved = np.flatnonzero((batch > 0) & (kind == 0))[::2]
        place[moved, 2] += 1.2
    return place


def test_a_relative_that_one_batch_alone_has_is_found_by_its_genes():
    counts, batch, kind, place = cells()
    (found,) = private_populations_of(counts, batch, merged(place, batch, kind), seed=0)
    assert found.batch == 0 and np.isin(found.genes, MARKERS).all()
    assert (kind[found.cells] == 2).mean() > 0.8 and np.isin(
        np.flatnonzero(kind == 2), found.cells
    ).mean() > 0.8
    assert found.shown < 0.4 and found.own_before > 0.6 and found.abroad > 0.4


@pytest.mark.parametrize("seed", [0, 1])
def test_what_both_batches_have_and_what_lies_apart_raise_no_alarm(seed):
    counts, batch, kind, place = cells(seed, both=True)
    assert private_populations_of(counts, batch, place, seed=seed) == []
    # The relative that no one has laid onto another: nothing was lost.
    counts, batch, kind, place = cells(seed, gap=4.0)
    assert private_populations_of(counts, batch, place, seed=seed) == []
