"""The order of cells is a pure function, and a permutation."""

import dataclasses
import json

import numpy as np
import pytest

from genemodel.batches import order as order_module
from genemodel.batches.order import (
    BLOCK,
    MANY_CELLS,
    MOST_LANES,
    WINDOW_BLOCKS,
    EpochOrder,
    Layout,
    Position,
)
from genemodel.errors import DataError


def sequence(order):
    return np.concatenate([order.cells(w)[0] for w in range(order.n_windows)])


def test_an_epoch_is_a_permutation_and_depends_on_its_address_only():
    layout = Layout(block=16, window_blocks=8)
    first = sequence(EpochOrder(10_001, seed=1, epoch=0, layout=layout))
    assert sorted(first.tolist()) == list(range(10_001))
    again = sequence(EpochOrder(10_001, seed=1, epoch=0, layout=layout))
    np.testing.assert_array_equal(first, again)
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 1}):
        assert (sequence(EpochOrder(10_001, **other, layout=layout)) != first).any()


@pytest.mark.parametrize("n_cells", [1, 15, 16, 1000, 4097])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_every_cell_is_in_one_part_of_one_window(n_cells, lanes):
    layout = Layout(lanes, block=4, window_blocks=16, part_blocks=4)
    for seed, epoch in ((0, 0), (3, 1), (3, 5)):
        order = EpochOrder(n_cells, seed, epoch, layout=layout)
        assert sorted(sequence(order).tolist()) == list(range(n_cells))
        for w in range(order.n_windows):
            cells, starts = order.cells(w)
            sizes = np.diff(starts)
            assert starts[0] == 0 and starts[-1] == cells.size and sizes.min() > 0
            # One and a half parts at most: what bounds the memory of a process.
            assert sizes.max() <= 4 * 6
            # A part is shuffled within itself: its cells are those of whole blocks.
            blocks = set(order.blocks(w).tolist())
            for begin, end in zip(starts[:-1], starts[1:], strict=True):
                here = set((cells[begin:end] // 4).tolist())
                assert here <= blocks
                blocks -= here


def test_lanes_reach_their_parts_at_different_times():
    layout = Layout(8, block=4, window_blocks=64, part_blocks=8)
    order = EpochOrder(4 * 64 * 8, seed=0, epoch=0, layout=layout)
    assert len({int(order.cells(w)[1][1]) for w in range(8)}) == 8


def test_the_layout_is_a_function_of_the_number_of_cells():
    assert Layout.of(1) == Layout.of(MANY_CELLS - 1) == Layout()
    previous = 1
    for n in (MANY_CELLS, 200_000, 524_288, 10**6, 10**8):
        lanes = Layout.of(n).lanes
        assert previous <= lanes <= MOST_LANES and lanes & (lanes - 1) == 0
        # No lane is left without a window of the epoch.
        assert lanes <= n // (WINDOW_BLOCKS * BLOCK)
        previous = lanes
    assert previous == MOST_LANES


def test_a_window_mixes_sources_that_lie_apart():
    """Cells of ten equal sources: every window sees all of them in roughly equal shares."""
    order = EpochOrder(100_000, seed=0, epoch=3)
    source = sequence(order)[:8192] // 10_000
    share = np.bincount(source, minlength=10) / 8192
    assert share.min() > 0.02 and share.max() < 0.25


def test_windows_of_another_epoch_hold_other_cells():
    first, second = (
        set(EpochOrder(20_000, seed=0, epoch=epoch).cells(0)[0].tolist()) for epoch in (0, 1)
    )
    # 8,192 of 20,000 cells: chance alone leaves some 41 % of them together.
    assert 0.1 < len(first & second) / len(first) < 0.8


def test_windows_are_shuffled_each_in_its_own_way():
    layout = Layout(block=64, window_blocks=1, part_blocks=1)
    ways = {
        tuple((EpochOrder(64 * 8, 0, epoch, layout=layout).cells(w)[0] % 64).tolist())
        for epoch in (0, 1)
        for w in range(8)
    }
    assert len(ways) == 16


def test_without_shuffling_storage_order_is_kept():
    order = EpochOrder(1000, seed=5, epoch=2, shuffle=False)
    np.testing.assert_array_equal(sequence(order), np.arange(1000))


def test_an_epoch_is_permuted_once():
    order_module._permuted_blocks.cache_clear()
    order = EpochOrder(100_000, seed=0, epoch=0)
    sequence(order)
    assert order_module._permuted_blocks.cache_info().misses == 1


def test_a_position_survives_json():
    for position in (Position(), Position(7, ((0, 3, 1), (1, 0, 0)))):
        stored = json.loads(json.dumps(dataclasses.asdict(position)))
        assert Position.of(stored) == position == Position(**stored)


def test_a_position_of_version_1_has_one_lane():
    old = {"epoch": 1, "window": 2, "batch": 3, "taken": 40}
    assert Position.of(old) == Position(40, ((1, 2, 3),))
    assert Position.of(dict.fromkeys(old, 0)) == Position()


@pytest.mark.parametrize(
    "values",
    [
        {"taken": 3},
        {"taken": 0, "lanes": [[0, 0, 0]]},
        {"taken": "3", "lanes": [[0, 0, 0]]},
        {"taken": 3, "lanes": [[0, 0]]},
        {"taken": 3, "lanes": [[0, -1, 0]]},
        {"taken": 3, "lanes": 4},
        {"taken": 3, "lanes": [[0, 0, 0]], "cursor": 1},
    ],
)
def test_what_is_no_position_is_refused(values):
    with pytest.raises(DataError, match="not a position"):
        Position.of(values)
