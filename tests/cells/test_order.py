"""The order of cells is a pure function, and a permutation."""

import numpy as np

from genemodel.cells.order import EpochOrder, Layout


def sequence(order):
    return np.concatenate([order.cells(w)[0] for w in range(order.n_windows)])


def test_an_epoch_is_a_permutation_and_depends_on_its_address_only():
    first = sequence(EpochOrder(10_001, seed=1, epoch=0, layout=Layout(block=16, window_blocks=8)))
    assert sorted(first.tolist()) == list(range(10_001))
    again = sequence(EpochOrder(10_001, seed=1, epoch=0, layout=Layout(block=16, window_blocks=8)))
    np.testing.assert_array_equal(first, again)
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert (sequence(EpochOrder(10_001, **other, layout=Layout(block=16, window_blocks=8))) != first).any()


def test_a_window_mixes_sources_that_lie_apart():
    """Cells of ten equal sources: every window sees all of them in roughly equal shares."""
    order = EpochOrder(100_000, seed=0, epoch=3)
    source = sequence(order)[:8192] // 10_000
    share = np.bincount(source, minlength=10) / 8192
    assert share.min() > 0.02 and share.max() < 0.25


def test_without_shuffling_storage_order_is_kept():
    order = EpochOrder(1000, seed=5, epoch=2, shuffle=False)
    np.testing.assert_array_equal(sequence(order), np.arange(1000))
