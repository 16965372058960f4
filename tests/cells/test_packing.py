"""The packing plan: every cell once, within budget, full."""

import numpy as np
import pytest

from genemodel.cells.packing import plan_bins


@pytest.mark.parametrize("seed", range(3))
def test_every_cell_is_in_exactly_one_bin_within_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2048, 777)
    bins = plan_bins(lengths, 4096, 64)
    assert sorted(np.concatenate(bins).tolist()) == list(range(777))
    assert max(lengths[b].sum() for b in bins) <= 4096
    assert max(len(b) for b in bins) <= 64


def test_fill_is_at_least_099_at_16k_tokens():
    lengths = np.clip(np.random.default_rng(0).lognormal(7.0, 0.55, 8192), 50, 2048).astype(int)
    bins = plan_bins(lengths, 16_384, 512)
    fill = lengths.sum() / (len(bins) * 16_384)
    assert fill >= 0.99


def test_cells_stay_near_their_place():
    lengths = np.random.default_rng(0).integers(500, 1500, 5000)
    order = np.concatenate(plan_bins(lengths, 16_384, 512))
    assert np.abs(order - np.arange(5000)).max() < 1000


def test_the_cell_limit_binds_for_tiny_cells():
    assert [len(b) for b in plan_bins(np.full(10, 2), 1000, 4)] == [4, 4, 2]


def test_no_cells_no_bins():
    assert plan_bins(np.array([], int), 100, 4) == []


def test_bins_without_room_for_a_cell_are_refused():
    with pytest.raises(AssertionError, match="bins of -3 cells"):
        plan_bins(np.array([4, 5]), 100, -3)
