"""The order of cells: a pure function of (seed, epoch, window), dealt to lanes.

An epoch permutes *blocks* of consecutive cells and cuts the permuted blocks into *windows*. The
windows of all epochs, one after the other, are dealt to *lanes*: window number g of the run
belongs to lane g modulo L. Each lane packs its own windows into micro-batches, one window at a
time, and micro-batch number i of the run is the next one of lane i modulo L. So whoever wants
every L-th micro-batch has to read every L-th window only, which is what a rank of many does. L is
a function of the number of cells, never of the number of ranks: rank, world size and threads take
no part in the sequence. Every window occurs once in its epoch, and so does every cell.

Windows are as large in many lanes as in one, because a window's last micro-batch is not full and
the look-ahead of the packing ends there (1,024 cells a window would fill 64k tokens to 97 % only).
But a process that serves all lanes cannot hold all their windows. So a window is read and shuffled
in *parts*, and packed in one piece: with the look-ahead a micro-batch takes its cells from one
part or two. The first parts differ in size from lane to lane, or all lanes would need their next
part at the same moment.

Blocks keep reading sequential; a pool of 64 random blocks or more, in one window or over the
lanes, mixes sources as well as a full shuffle for practical purposes.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from genemodel.errors import DataError

# Raised when the same seed and cells would give another sequence of micro-batches than before.
ORDER_VERSION = 2

BLOCK = 128  # cells read together; larger blocks read no faster
WINDOW_BLOCKS = 64  # 8,192 cells from 64 places: ~100 MB at 1,500 genes a cell
# A process that serves all lanes holds a part and a quarter of each: 64 × 1.25 × 1,024 cells of
# 1,500 genes at 8 bytes are 1 GB.
PART_BLOCKS = 8
MOST_LANES = 64
# Fewer cells than 16 windows: so few are read soon enough by every rank.
MANY_CELLS = 16 * WINDOW_BLOCKS * BLOCK
_EPOCHS_KEPT = 4  # permutations; lanes stand in two epochs at most, validation in a third


@dataclass(frozen=True)
class Layout:
    """How the cells of a run are cut; a function of their number alone.

    Attributes
    ----------
    lanes
        L, a power of two.
    block
        Consecutive cells that stay together.
    window_blocks
        Blocks packed in one piece.
    part_blocks
        Blocks of a window that are read and shuffled together.
    """

    lanes: int = 1
    block: int = BLOCK
    window_blocks: int = WINDOW_BLOCKS
    part_blocks: int = WINDOW_BLOCKS

    @classmethod
    def of(cls, n_cells: int) -> Self:
        """One lane for few cells; else as many as there are windows in an epoch, at most 64."""
        if n_cells < MANY_CELLS:
            return cls()
        windows = n_cells // (WINDOW_BLOCKS * BLOCK)
        return cls(min(MOST_LANES, 1 << (windows.bit_length() - 1)), part_blocks=PART_BLOCKS)


@dataclass(frozen=True)
class Position:
    """How far a stream has been *consumed*; a few integers that restart it anywhere.

    ``taken`` counts micro-batches over the whole run and all ranks. ``lanes`` holds (epoch,
    window, batch) of every lane: the window it is in, counted within the epoch, and how many of
    its micro-batches are consumed. No lanes: the beginning. It is the same on every rank and does
    not depend on how many there are.
    """

    taken: int = 0
    lanes: tuple[tuple[int, int, int], ...] = ()

    def __post_init__(self) -> None:
        # JSON gives lists.
        lanes = tuple((int(e), int(w), int(b)) for e, w, b in self.lanes)
        object.__setattr__(self, "lanes", lanes)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` gave; also the four integers of version 1, as one lane.

        Raises
        ------
        DataError
            Something else.
        """
        try:
            if set(values) == {"epoch", "window", "batch", "taken"}:
                lane = (values["epoch"], values["window"], values["batch"])
                position = cls(values["taken"], (lane,) if values["taken"] else ())
            else:
                position = cls(**values)
            whole = [position.taken, *(n for lane in position.lanes for n in lane)]
            fits = all(isinstance(n, int) and n >= 0 for n in whole)
        except (TypeError, ValueError):
            fits = False
        if not fits or bool(position.taken) != bool(position.lanes):
            raise DataError(
                f"{dict(values)!r} is not a position in the order of cells: the checkpoint is "
                "damaged or of a newer version. Go on from another one, or start the run anew"
            )
        return position


@dataclass(frozen=True)
class EpochOrder:
    """Windows of cells for one epoch.

    Attributes
    ----------
    n_cells
        Cells in play; positions 0 … n_cells − 1 stand for the allowed cells in storage order.
    seed, epoch
        The address of the randomness.
    shuffle
        False keeps storage order (inference).
    layout
        How the cells are cut.
    """

    n_cells: int
    seed: int
    epoch: int
    shuffle: bool = True
    layout: Layout = field(default_factory=Layout)

    @property
    def n_blocks(self) -> int:
        """Blocks of an epoch; the last may be short."""
        return -(-self.n_cells // self.layout.block)

    @property
    def n_windows(self) -> int:
        """Windows of an epoch; the last may be short."""
        return -(-self.n_blocks // self.layout.window_blocks)

    def blocks(self, window: int) -> np.ndarray:
        """Numbers of the blocks that make up ``window``."""
        size = self.layout.window_blocks
        if not self.shuffle:
            return np.arange(window * size, min((window + 1) * size, self.n_blocks))
        permuted = _permuted_blocks(self.seed, self.epoch, self.n_blocks)
        return permuted[window * size : (window + 1) * size]

    def cells(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Order in which the cells of ``window`` are packed.

        Returns
        -------
        cell_C
            Positions 0 … n_cells − 1, part after part, shuffled within each.
        starts_P1
            First place of every part in ``cell_C``, and the end.
        """
        place_BC = self.blocks(window)[:, None] * self.layout.block + np.arange(self.layout.block)
        real_BC = place_BC < self.n_cells
        cell_C = place_BC[real_BC]
        ends_B1 = np.concatenate([[0], np.cumsum(real_BC.sum(1))])
        starts_P1 = ends_B1[self._cuts(window, len(place_BC))]
        if self.shuffle:
            generator = _generator(self.seed, self.epoch, window + 1)
            for begin, end in zip(starts_P1[:-1], starts_P1[1:], strict=True):
                cell_C[begin:end] = cell_C[begin:end][generator.permutation(end - begin)]
        return cell_C, starts_P1

    def _cuts(self, window: int, n_blocks: int) -> list[int]:
        """Blocks at which the parts of a window begin, and the end."""
        size, lanes = self.layout.part_blocks, self.layout.lanes
        half = size // 2
        lane = (self.epoch * self.n_windows + window) % lanes
        # Between half a part and one and a half, evenly over the lanes; no last part below half.
        first = size if lanes == 1 else max(1, half + lane * size // lanes)
        return [0, *range(first, n_blocks - half, size), n_blocks]


@functools.lru_cache(_EPOCHS_KEPT)
def _permuted_blocks(seed: int, epoch: int, n_blocks: int) -> np.ndarray:
    permuted = _generator(seed, epoch, 0).permutation(n_blocks)
    permuted.flags.writeable = False
    return permuted


def _generator(seed: int, epoch: int, stream: int) -> np.random.Generator:
    # SeedSequence mixes the address; PCG64 under a fixed seed is stable across numpy versions.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])))
