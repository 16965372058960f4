"""From a corpus to packed micro-batches: read, rank and pack in threads, in a resumable order.

Micro-batches form one global sequence, the same for every world size (``order`` says which);
rank ``r`` of ``w`` takes every w-th, from the r-th after the start. Lengths alone say what goes
into a micro-batch, and they are in the corpus's index. So a rank plans all windows of all lanes,
which takes 0.2 µs a cell and tells it where every lane stands, and reads and ranks only what it
takes itself. With L lanes every cell is decoded by w ÷ gcd(w, L) ranks: by one where w divides L.

Each micro-batch comes with the :class:`Position` after it, so that what is saved counts consumed
work and never what happened to be prefetched. Where it is too large for a device it comes in
pieces, which changes neither the sequence nor a position.
"""

import contextlib
import logging
import math
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from genemodel.batches.batch import CellBatch
from genemodel.batches.order import EpochOrder, Layout, Position
from genemodel.batches.packing import deal, plan_bins, tail_pieces
from genemodel.batches.published import lay_out_published
from genemodel.batches.tokens import Style, TokenSettings, pack_cells
from genemodel.batches.views import View, joined, lay_out, shown_cells
from genemodel.batches.window import Window
from genemodel.corpus.reading import CountsBlock
from genemodel.errors import DataError
from genemodel.genes.vocabulary import CELL, PAD

logger = logging.getLogger(__name__)

# Two threads hide numba's ranking behind reading on the smallest machine; more cores take more.
PACKING_THREADS = 2
# 25 ms of work at 3,000 cells/s and 16k tokens. 16 cost an eighth of the speed: they leave the
# cache.
BATCHES_AHEAD = 6
# Micro-batches looked ahead for each that is packed, until enough is being read: all at once would
# hold up the first one, and whoever shares Python's lock.
_CATCH_UP = 4


def inverse_medians(medians_V: np.ndarray) -> np.ndarray:
    """1 ÷ median as float32; a gene never seen in the corpus counts as median 1.

    Parameters
    ----------
    medians_V
        Non-zero medians, NaN where the gene was never seen.
    """
    return (1.0 / _known(medians_V)).astype(np.float32)


def rank_scale(medians_V: np.ndarray, style: Style) -> np.ndarray:
    """Make what :func:`pack` ranks by: 1 ÷ median as float32, or the medians of a published style.

    Those are float64 and are divided by as published, because there the last bit may decide a rank.
    """
    if style == "native":
        return inverse_medians(medians_V)
    return _known(medians_V).astype(np.float64)


def _known(medians_V: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(medians_V) & (medians_V > 0), medians_V, 1.0)


def pack(
    window: Window,
    cells: np.ndarray,
    inverse_median_V: np.ndarray,
    settings: TokenSettings,
    *,
    budget: int | None = None,
    max_cells: int | None = None,
    epoch: int = 0,
    view: View | None = None,
    n_tokens: int | None = None,
) -> CellBatch:
    """Make one micro-batch of the window's rows ``cells`` (they must fit; see ``plan_bins``).

    With a view the tokens, and the library, are of the molecules that are shown. Genes at or above
    ``n_tokens`` are no tokens; they are only among the ``full`` ones. ``inverse_median_V`` is what
    :func:`rank_scale` makes.
    """
    budget = settings.budget if budget is None else budget
    max_cells = settings.max_cells if max_cells is None else max_cells
    # The tail can take a place for every cell of full length, whatever the cells leave of it.
    places = max_cells + tail_pieces(budget, settings.context)
    gene_T = np.empty(budget, np.int64)
    value_T = np.empty(budget, np.float32)
    rank_T = np.empty(budget, np.int64)
    segment_T = np.empty(budget, np.int64)
    starts_C1 = np.empty(places + 1, np.int32)
    library = np.ascontiguousarray(window.library_C[cells], np.float32)
    total_C = window.total_C[cells].astype(np.float64)
    begin_C, end_C = window.begin_C[cells], window.end_C[cells]
    gene_N, count_N = window.gene_N, window.count_N
    n_full = int((end_C - begin_C).sum())
    full_gene_N, full_cell_N = np.empty(n_full, np.int64), np.empty(n_full, np.int64)
    full_count_N = np.empty(n_full, np.float32)
    there_N = shown_N = None
    if view is not None or n_tokens is not None:
        view = view or View(0)
        there_N, shown_N = view.apply(begin_C, end_C, gene_N, count_N, window.cell_C[cells], epoch)
        begin_C, end_C, gene_N, count_N, library = shown_cells(
            begin_C, end_C, gene_N, shown_N, n_tokens
        )
        total_C = library.astype(np.float64)
    if settings.style == "native":
        n_tokens = pack_cells(
            begin_C,
            end_C,
            gene_N,
            count_N,
            inverse_median_V,
            library,
            settings.context - 1,
            CELL,
            PAD,
            gene_T,
            value_T,
            rank_T,
            segment_T,
            starts_C1,
            full_gene_N,
            full_count_N,
            full_cell_N,
        )
    else:
        n_tokens = lay_out_published(
            settings, begin_C, end_C, gene_N, count_N, inverse_median_V, total_C,
            gene_T=gene_T, value_T=value_T, rank_T=rank_T, segment_T=segment_T,
            starts_C1=starts_C1,
        )  # fmt: skip
        if there_N is None:
            lay_out(begin_C, end_C, gene_N, full_gene_N, full_cell_N)
            full_count_N[:] = joined(begin_C, end_C, count_N, n_full)
    assert starts_C1[-1] == budget, f"{cells.size} cells and their tail in {places} places"
    if there_N is not None:
        # Of the cells as they are, not as they are shown.
        begin_C, end_C = window.begin_C[cells], window.end_C[cells]
        lay_out(begin_C, end_C, window.gene_N, full_gene_N, full_cell_N)
        full_count_N = there_N

    def placed(values: np.ndarray, dtype: type, dummy: float) -> torch.Tensor:
        out: np.ndarray = np.full(places, dummy, dtype)
        out[: cells.size] = values
        return torch.from_numpy(out)

    return CellBatch(
        gene_T=torch.from_numpy(gene_T),
        value_T=torch.from_numpy(value_T),
        rank_T=torch.from_numpy(rank_T),
        segment_T=torch.from_numpy(segment_T),
        starts_C1=torch.from_numpy(starts_C1),
        species_C=placed(window.species_C[cells], np.int64, 0),
        library_C=placed(library, np.float32, 1.0),
        batch_C=placed(window.batch_C[cells], np.int64, -1),
        panel_C=placed(window.panel_C[cells], np.int64, -1),
        cell_C=placed(window.cell_C[cells], np.int64, -1),
        full_gene_N=torch.from_numpy(full_gene_N),
        full_count_N=torch.from_numpy(full_count_N),
        full_cell_N=torch.from_numpy(full_cell_N),
        length_C=np.diff(starts_C1[: cells.size + 1]).astype(np.int64),
        n_cells=int(cells.size),
        n_tokens=int(n_tokens),
        longest=min(settings.context, budget),
        epoch=epoch,
        shown_count_N=None if shown_N is None else torch.from_numpy(shown_N),
    )


class Cells(Protocol):
    """What a stream reads: a corpus on disk, or cells in memory."""

    @property
    def path(self) -> Path | str:
        """Where they are, for messages."""

    def __len__(self) -> int:
        """Count the cells."""

    def label(self, name: Literal["library", "n_genes", "source", "species"]) -> Any:
        """Give one number of every cell."""

    def read_blocks(self, ranges: Sequence[tuple[int, int]]) -> CountsBlock:
        """Read ranges of cells, one after the other."""


class CellStream:
    """Endless, or one epoch of, packed micro-batches of a corpus.

    Parameters
    ----------
    corpus
        An open :class:`~genemodel.corpus.corpus.Corpus`, or
        :class:`~genemodel.batches.held.HeldCells`.
    cells
        Sorted permanent numbers of the cells to use (a side of a hold-out split).
    settings
        Context and token budget.
    seed
        Address of the order's randomness.
    batch_codes
        Technical batch of every cell of the corpus, −1 unknown; default all unknown.
    inverse_median_V
        1 ÷ non-zero median of every token.
    position
        Where to start: what streams of any world size had consumed.
    rank, world_size
        Which share of the global sequence to yield.
    endless
        Start the next epoch when one ends. One epoch has one lane.
    shuffle
        False keeps storage order.
    limit
        End after so many *global* micro-batches, counted from ``position``: the same ones for
        every world size. Where it, or the epoch, does not fill a round, the last ranks get one
        micro-batch less.
    layout
        How the cells are cut into lanes and windows; by default what their number asks for.
    pieces
        Every micro-batch comes as so many smaller ones of a constant shape, one after another and
        each with the position after the last of them. A piece without a cell is possible.
    view
        Which molecules are shown; default all.
    n_tokens
        Genes at or above it are no tokens.
    genes_V
        Genes that are read at all, bool; default all.

    Raises
    ------
    DataError
        No cells; a position of other cells; while iterating, a damaged or missing file, by name.

    Attributes
    ----------
    waited_s
        Seconds that whoever iterates has waited for micro-batches so far.
    """

    def __init__(
        self,
        corpus: Cells,
        cells: np.ndarray,
        settings: TokenSettings,
        *,
        seed: int,
        inverse_median_V: np.ndarray,
        batch_codes: np.ndarray | None = None,
        position: Position | None = None,
        rank: int = 0,
        world_size: int = 1,
        endless: bool = True,
        shuffle: bool = True,
        limit: int | None = None,
        layout: Layout | None = None,
        pieces: int = 1,
        view: View | None = None,
        n_tokens: int | None = None,
        genes_V: np.ndarray | None = None,
    ) -> None:
        if len(cells) == 0:
            raise DataError(
                f"No cells to read from corpus {corpus.path}: the hold-out split left this side "
                "empty. Hold out fewer groups, or add sources to the corpus."
            )
        self.corpus = corpus
        self.cells = np.asarray(cells, np.int64)
        self.settings = settings.placed(_mean_length(corpus, settings))
        self.pieces, self.view, self.n_tokens, self.genes_V = pieces, view, n_tokens, genes_V
        self.seed = seed
        self.inverse_median_V = inverse_median_V
        self.position = position or Position()
        self.rank, self.world_size = rank, world_size
        self.endless, self.shuffle, self.limit = endless, shuffle, limit
        if layout is None:
            layout = Layout.of(self.cells.size) if endless else Layout()
        self.layout = layout
        if batch_codes is None:
            batch_codes = np.broadcast_to(np.int64(-1), len(corpus))
        self._labels = (
            corpus.label("library"), corpus.label("species"), batch_codes, corpus.label("source"),
        )  # fmt: skip
        self._check_position()
        self.waited_s = 0.0

    def order(self, epoch: int) -> EpochOrder:
        """Order of the cells in an epoch."""
        return EpochOrder(self.cells.size, self.seed, epoch, self.shuffle, self.layout)

    def __iter__(self) -> Generator[tuple[CellBatch, Position]]:
        """Yield micro-batches, or their pieces, with the position after each micro-batch."""
        with contextlib.closing(self._batches()) as batches:
            while True:
                begin = time.perf_counter()
                found = next(batches, None)
                self.waited_s += time.perf_counter() - begin
                if found is None:
                    return
                yield found

    def _batches(self) -> Generator[tuple[CellBatch, Position]]:
        """Keep reading ahead of packing, and packing ahead of whoever iterates."""
        pools = [
            ThreadPoolExecutor(n, f"genemodel-{name}")
            for name, n in (("pack", PACKING_THREADS), ("read", 1), ("plan", 1))
        ]
        packers, reader, planner = pools
        # As many cells are read ahead as one undivided window has.
        parts_ahead = max(1, self.layout.window_blocks // self.layout.part_blocks)
        coming: deque[_MicroBatch] = deque()
        packing: deque[tuple[Future[list[CellBatch]], Position]] = deque()
        unread = 0
        try:
            schedule = self._schedule(reader, planner)
            while True:
                for _ in range(_CATCH_UP):
                    if unread >= parts_ahead or (found := next(schedule, None)) is None:
                        break
                    coming.append(found)
                    unread += found.opens
                if not coming:
                    break
                due = coming.popleft()
                unread -= due.opens
                packing.append((packers.submit(due.pack, self), due.after))
                del due
                if len(packing) > BATCHES_AHEAD:
                    yield from _pieces_of(*packing.popleft())
            while packing:
                yield from _pieces_of(*packing.popleft())
        finally:
            for pool in pools:
                pool.shutdown(wait=False, cancel_futures=True)
            for pool in pools:
                pool.shutdown()

    def _schedule(
        self, reader: ThreadPoolExecutor, planner: ThreadPoolExecutor
    ) -> "Iterator[_MicroBatch]":
        """Yield one rank's micro-batches, each with the position after its *round* over all ranks.

        Ranks stop after whole rounds, so a position in the middle of one would give some rank a
        micro-batch twice. Rounds begin at the start position, whatever its number.
        """
        begin, world, ring = self.position.taken, self.world_size, self.layout.lanes
        lanes = [_Lane(self, planner, number) for number in range(ring)]
        # A rank meets a lane again after every lane and every rank has had its turn.
        stride = world // math.gcd(world, ring)
        mine: _MicroBatch | None = None
        step = 0
        while self.limit is None or step < self.limit:
            lane = lanes[(begin + step) % ring]
            if lane.ended:
                break
            if step % world == self.rank:
                left = None if self.limit is None else -(-(self.limit - step) // ring)
                mine = lane.take(reader, stride, left)
            lane.advance()
            step += 1
            if step % world == 0 and mine is not None:
                mine.after = Position(begin + step, tuple([lane.state for lane in lanes]))
                yield mine
                mine = None
        if mine is not None:
            mine.after = Position(begin + step, tuple([lane.state for lane in lanes]))
            yield mine

    def _check_position(self) -> None:
        """Refuse a position that cannot lie in the order of these cells."""
        lanes, ring = self.position.lanes, self.layout.lanes
        n_windows = self.order(0).n_windows
        fits = not lanes or len(lanes) == ring
        for number, (epoch, window, _) in enumerate(lanes if fits else ()):
            fits &= window < n_windows and (epoch * n_windows + window) % ring == number
        if not fits:
            raise DataError(
                f"corpus {self.corpus.path}: {self.cells.size:,} cells are read in {ring} lane(s) "
                f"of {n_windows:,} windows an epoch, but the position to go on from "
                f"({len(lanes)} lane(s), {self.position.taken:,} micro-batches taken) does not "
                "lie among them: it is of other cells or of another version. Go on with the "
                "corpus and the hold-out that the run started with, or start it anew"
            )

    def plan(self, number: int) -> "_Plan":
        """Decide from lengths alone what goes into the micro-batches of one window of the run."""
        epoch, window = divmod(number, self.order(0).n_windows)
        place_C, starts_P1 = self.order(epoch).cells(window)
        cell_C = self.cells[place_C]
        length_C = self.settings.lengths(self.corpus.label("n_genes")[cell_C])
        bins = plan_bins(length_C, self.settings.budget, self.settings.max_cells)
        return _Plan(epoch, cell_C, starts_P1, bins)

    def read_part(self, cells: np.ndarray) -> Window:
        """Read cells, in the order they will be packed."""
        window = read_cells(self.corpus, cells, self._labels)
        return window if self.genes_V is None else window.only(self.genes_V)


def _pieces_of(
    future: Future[list[CellBatch]], after: Position
) -> Iterator[tuple[CellBatch, Position]]:
    for piece in future.result():
        yield piece, after


def _mean_length(corpus: Cells, settings: TokenSettings) -> float:
    """Mean tokens over the whole corpus: training and held-out cells get micro-batches alike."""
    return float(settings.lengths(corpus.label("n_genes")).mean())


@dataclass(frozen=True)
class _Plan:
    """One window: its cells in packing order, where its parts begin, and its micro-batches."""

    epoch: int
    cell_C: np.ndarray
    starts_P1: np.ndarray
    bins: list[np.ndarray]


@dataclass
class _MicroBatch:
    """A micro-batch of this rank whose cells are read or being read.

    ``pieces`` are the parts it takes cells from, with their rows, in order. ``opens`` counts parts
    that it is the first to need.
    """

    pieces: list[tuple[Future[Window], np.ndarray]]
    opens: int
    epoch: int
    after: Position

    def pack(self, stream: CellStream) -> list[CellBatch]:
        """Wait for its parts, and pack it, or each of the pieces it is dealt into."""
        if len(self.pieces) == 1:
            ((part, rows),) = self.pieces
            window = part.result()
        else:
            window = Window.joined([part.result().take(rows) for part, rows in self.pieces])
            rows = np.arange(len(window))
        settings = stream.settings.piece(stream.pieces)
        size_C = window.end_C[rows] - window.begin_C[rows]
        dealt = deal(settings.lengths(size_C), stream.pieces)
        return [
            pack(
                window,
                rows[piece],
                stream.inverse_median_V,
                settings,
                epoch=self.epoch,
                view=stream.view,
                n_tokens=stream.n_tokens,
            )
            for piece in dealt
        ]


class _Lane:
    """Every L-th window of the run, from where the position says; one is planned ahead.

    Attributes
    ----------
    state
        Epoch, window and next micro-batch: the lane's share of a position.
    ended
        Whether one epoch was asked for and is over.
    """

    def __init__(self, stream: CellStream, planner: ThreadPoolExecutor, number: int) -> None:
        self._stream, self._planner = stream, planner
        self._n_windows = stream.order(0).n_windows
        lanes = stream.position.lanes
        epoch, window, batch = lanes[number] if lanes else (*divmod(number, self._n_windows), 0)
        self._window = epoch * self._n_windows + window
        self._end = math.inf if stream.endless else (epoch + 1) * self._n_windows
        self._share: _Share | None = None
        self._planned = self._ahead(self._window)
        self._plan: _Plan | None = None
        self.state = (epoch, window, batch)

    def _ahead(self, window: int) -> Future[_Plan] | None:
        return self._planner.submit(self._stream.plan, window) if window < self._end else None

    @property
    def ended(self) -> bool:
        return self._window >= self._end

    @property
    def plan(self) -> _Plan:
        """Plan of the window that the lane is in."""
        if self._plan is None:
            assert self._planned is not None
            self._plan = self._planned.result()
            if self.state[2] >= len(self._plan.bins):
                raise DataError(
                    f"the position to go on from is micro-batch {self.state[2]} of a window that "
                    f"has {len(self._plan.bins)}: it is of other cells or settings. Start anew"
                )
            self._planned = self._ahead(self._window + self._stream.layout.lanes)
        return self._plan

    def take(self, reader: ThreadPoolExecutor, stride: int, left: int | None) -> _MicroBatch:
        """Take the next micro-batch; the rank will take every ``stride``-th of the lane."""
        if self._share is None:
            mine = self.plan.bins[self.state[2] :: stride]
            if left is not None:
                mine = mine[: -(-left // stride)]
            self._share = _Share(self._stream, reader, self.plan, mine)
        return self._share.take()

    def advance(self) -> None:
        """Leave the next micro-batch behind."""
        epoch, window, batch = self.state
        if batch + 1 < len(self.plan.bins):
            self.state = (epoch, window, batch + 1)
            return
        self._window += self._stream.layout.lanes
        self.state = (*divmod(self._window, self._n_windows), 0)
        self._plan = self._share = None


class _Share:
    """What one rank takes of one window: parts are read when first needed, let go when last.

    Parameters
    ----------
    stream, reader
        Where to read.
    plan
        The window.
    bins
        Its micro-batches that this rank takes, in order.
    """

    def __init__(
        self,
        stream: CellStream,
        reader: ThreadPoolExecutor,
        plan: _Plan,
        bins: Sequence[np.ndarray],
    ) -> None:
        self._stream, self._reader, self._plan = stream, reader, plan
        place_M = np.concatenate(bins)
        self._starts_B1 = np.cumsum([0, *(len(rows) for rows in bins)])
        self._next = 0
        n_parts = plan.starts_P1.size - 1
        self._parts: list[Future[Window] | None] = [None] * n_parts
        self._part_M = np.searchsorted(plan.starts_P1, place_M, "right") - 1
        # Only its own cells are read: row r of a part's window is the r-th of them in the part.
        wanted_C = np.zeros(plan.cell_C.size, bool)
        wanted_C[place_M] = True
        before_C1 = np.concatenate([[0], np.cumsum(wanted_C)])
        self._row_M = (before_C1[place_M] - before_C1[plan.starts_P1[self._part_M]]).astype(int)
        self._wanted_C = wanted_C
        first_B = self._starts_B1[:-1]
        self._low_B = np.minimum.reduceat(self._part_M, first_B)
        self._high_B = np.maximum.reduceat(self._part_M, first_B)
        self._last_P = np.full(n_parts, -1)
        self._last_P[self._part_M] = np.repeat(np.arange(len(bins)), np.diff(self._starts_B1))

    def take(self) -> _MicroBatch:
        b = self._next
        self._next += 1
        span = slice(self._starts_B1[b], self._starts_B1[b + 1])
        low, high = int(self._low_B[b]), int(self._high_B[b])
        rows, part_M = self._row_M[span], self._part_M[span]
        opens, pieces = 0, []
        # Bins keep the order of cells, so those of one part stand together.
        for p in range(low, high + 1):
            here = rows if low == high else rows[part_M == p]
            if here.size:
                part, opened = self._part(p, b)
                opens += opened
                pieces.append((part, here))
        return _MicroBatch(pieces, opens, self._plan.epoch, Position())

    def _part(self, p: int, b: int) -> tuple[Future[Window], int]:
        """One part, and whether its reading begins now."""
        part, opened = self._parts[p], 0
        if part is None:
            here = slice(self._plan.starts_P1[p], self._plan.starts_P1[p + 1])
            cells = self._plan.cell_C[here][self._wanted_C[here]]
            part, opened = self._reader.submit(self._stream.read_part, cells), 1
        self._parts[p] = None if b == self._last_P[p] else part
        return part, opened


def read_cells(corpus: Cells, cells: np.ndarray, labels: Sequence[np.ndarray]) -> Window:
    """Read cells into the rows of a window.

    Parameters
    ----------
    corpus
        Where to read.
    cells
        Permanent cell numbers, each once, in any order: row i of the window is ``cells[i]``.
    labels
        library, species, technical batch and panel of every cell of the corpus.
    """
    by_number = np.argsort(cells)
    ascending = cells[by_number]
    # A run is read as one range; holes of up to 32 cells are cheaper to read than to skip.
    runs = np.split(ascending, np.flatnonzero(np.diff(ascending) > 32) + 1)
    block = corpus.read_blocks([(int(run[0]), int(run[-1]) + 1) for run in runs])
    sizes = np.array([run[-1] + 1 - run[0] for run in runs])
    rows = np.empty(cells.size, np.int64)
    rows[by_number] = np.concatenate(
        [run - run[0] + first for run, first in zip(runs, np.cumsum(sizes) - sizes, strict=True)]
    )
    library_C, species_C, batch_C, panel_C = (values[cells] for values in labels)
    return Window(
        begin_C=block.starts_C1[rows].astype(np.int64),
        end_C=block.starts_C1[rows + 1].astype(np.int64),
        gene_N=block.gene_N,
        count_N=block.count_N,
        library_C=library_C,
        species_C=species_C,
        batch_C=batch_C,
        panel_C=panel_C,
        cell_C=cells,
    )
