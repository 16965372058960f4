"""Which cells share a micro-batch: a plan from lengths alone, before anything is tokenised."""

import math

import numpy as np
from numba import njit

# A bin looks this many waiting cells ahead for one that still fits. 256 keeps the fill above 0.99
# at 16k tokens while a cell never moves far from its place in the shuffled order.
LOOK_AHEAD = 256

# Places of a micro-batch come in steps of this many: corpora of like cells share a compiled shape.
PLACE_STEP = 8


def tail_pieces(budget: int, context: int) -> int:
    """Most pieces of the dummy tail: it is cut so that no piece is longer than a cell may be."""
    return -(-budget // context)


def places_for(budget: int, context: int, mean_length: float) -> int:
    """Places of a micro-batch: near twice its typical number of cells, the tail's included.

    Parameters
    ----------
    budget, context
        Tokens of a micro-batch, and most tokens of a cell.
    mean_length
        Mean tokens of the cells, cut to the context.

    Notes
    -----
    On a GPU the attention kernel starts thread blocks for the context at every place, also at an
    empty one, so places cost; but once they are used up, a bin is closed before it is full. Cells
    have the places but for those that the longest tail needs, which is one place for every cell
    of full length: twice the typical number leaves between one and two times of it.
    """
    wanted = max(2 * budget / mean_length, tail_pieces(budget, context) + 1)
    return math.ceil(wanted / PLACE_STEP) * PLACE_STEP


@njit(nogil=True, cache=True)
def _plan(length_C, budget, max_cells, look_ahead, order_C, bins_C1):  # type: ignore[no-untyped-def]
    n = length_C.shape[0]
    # Waiting cells are a linked list in order of arrival: cell c is node c + 1, node 0 the head.
    following = np.arange(1, n + 2)
    placed = 0
    n_bins = 0
    bins_C1[0] = 0
    while placed < n:
        room = budget
        in_bin = 0
        before = 0
        while True:
            last = min(n, placed + look_ahead)
            node = following[before]
            # First come, first served: the earliest waiting cell that fits.
            while node <= last and length_C[node - 1] > room:
                before = node
                node = following[node]
            if node > last or in_bin >= max_cells:
                break
            order_C[placed] = node - 1
            placed += 1
            in_bin += 1
            room -= length_C[node - 1]
            following[before] = following[node]
        n_bins += 1
        bins_C1[n_bins] = placed
    return n_bins


def plan_bins(
    length_C: np.ndarray, budget: int, max_cells: int, look_ahead: int = LOOK_AHEAD
) -> list[np.ndarray]:
    """Distribute cells over bins of ``budget`` tokens, in order, filling gaps from a look-ahead.

    Parameters
    ----------
    length_C
        Tokens of every cell, at most ``budget`` each.
    budget, max_cells
        Most tokens and most cells of a bin.
    look_ahead
        How many waiting cells are considered for a gap.

    Returns
    -------
    One array of positions into ``length_C`` a bin; every cell is in exactly one. Deterministic.
    """
    if max_cells < 1:
        # Compiled code would go on making empty bins, past the end of its arrays.
        raise AssertionError(f"bins of {max_cells} cells")
    length_C = np.ascontiguousarray(length_C, np.int64)
    if length_C.size and length_C.max() > budget:
        raise AssertionError(f"a cell of {length_C.max()} tokens in bins of {budget}")
    order_C = np.empty(length_C.size, np.int64)
    bins_C1 = np.empty(length_C.size + 1, np.int64)
    n_bins = _plan(length_C, budget, max_cells, look_ahead, order_C, bins_C1)
    return [order_C[bins_C1[b] : bins_C1[b + 1]] for b in range(n_bins)]


def deal(length_C: np.ndarray, pieces: int) -> list[np.ndarray]:
    """Deal the cells of a bin into pieces, the longest first, one after another.

    Returns
    -------
    Positions into ``length_C``, ascending within a piece; empty where there are fewer cells than
    pieces.

    Notes
    -----
    Numbers of cells differ by at most 1 between pieces, and tokens by at most the longest cell:
    each round gives a piece no less than the piece after it, and no more than that got in the
    round before. So no piece has more tokens than total ÷ pieces + longest.
    """
    longest_first = np.argsort(-length_C, kind="stable")
    return [np.sort(longest_first[i::pieces]) for i in range(pieces)]
