"""From a corpus to packed micro-batches: read, rank and pack in threads, in a resumable order.

Micro-batches form one global sequence, the same for every world size; rank ``r`` of ``w`` takes
those whose running number is ``r`` modulo ``w``. Each comes with the :class:`Position` after it,
so that what is saved counts consumed work and never what happened to be prefetched.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from genemodel.cells.batch import CellBatch
from genemodel.cells.order import EpochOrder, Position
from genemodel.cells.packing import plan_bins, tail_pieces
from genemodel.cells.tokens import TokenSettings, pack_cells
from genemodel.errors import DataError
from genemodel.genes.vocabulary import CELL, PAD

if TYPE_CHECKING:
    from genemodel.cells.corpus import Corpus

logger = logging.getLogger(__name__)

# Two threads hide numba's ranking behind reading on the smallest machine; more cores take more.
PACKING_THREADS = 2
BATCHES_AHEAD = 6


@dataclass(frozen=True)
class Window:
    """Counts and labels of cells that may be packed together; C cells, N genes end to end.

    Cell c owns ``gene_N[begin_C[c]:end_C[c]]``, ascending, and its counts beside it.
    """

    begin_C: np.ndarray
    end_C: np.ndarray
    gene_N: np.ndarray
    count_N: np.ndarray
    library_C: np.ndarray
    species_C: np.ndarray
    batch_C: np.ndarray
    panel_C: np.ndarray
    cell_C: np.ndarray

    def __len__(self) -> int:
        return self.cell_C.shape[0]

    def lengths_C(self, settings: TokenSettings) -> np.ndarray:
        """Tokens of every cell under ``settings``, the cell token included."""
        return np.minimum(self.end_C - self.begin_C, settings.context - 1) + 1


def inverse_medians(medians_V: np.ndarray) -> np.ndarray:
    """1 ÷ median as float32; a gene never seen in the corpus counts as median 1.

    Parameters
    ----------
    medians_V
        Non-zero medians, NaN where the gene was never seen.
    """
    medians_V = np.where(np.isfinite(medians_V) & (medians_V > 0), medians_V, 1.0)
    return (1.0 / medians_V).astype(np.float32)


def pack(
    window: Window,
    cells: np.ndarray,
    inverse_median_V: np.ndarray,
    settings: TokenSettings,
    *,
    budget: int | None = None,
    max_cells: int | None = None,
    epoch: int = 0,
) -> CellBatch:
    """Make one micro-batch of the window's rows ``cells`` (they must fit; see ``plan_bins``)."""
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
    n_full = int((window.end_C[cells] - window.begin_C[cells]).sum())
    full_gene_N, full_cell_N = np.empty(n_full, np.int64), np.empty(n_full, np.int64)
    full_count_N = np.empty(n_full, np.float32)
    n_tokens = pack_cells(
        window.begin_C[cells],
        window.end_C[cells],
        window.gene_N,
        window.count_N,
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
    assert starts_C1[-1] == budget, f"{cells.size} cells and their tail in {places} places"

    def placed(values: np.ndarray, dtype: type, dummy: float) -> torch.Tensor:
        out: np.ndarray = np.full(places, dummy, dtype)
        out[: cells.size] = values[cells]
        return torch.from_numpy(out)

    return CellBatch(
        gene_T=torch.from_numpy(gene_T),
        value_T=torch.from_numpy(value_T),
        rank_T=torch.from_numpy(rank_T),
        segment_T=torch.from_numpy(segment_T),
        starts_C1=torch.from_numpy(starts_C1),
        species_C=placed(window.species_C, np.int64, 0),
        library_C=placed(window.library_C, np.float32, 1.0),
        batch_C=placed(window.batch_C, np.int64, -1),
        panel_C=placed(window.panel_C, np.int64, -1),
        cell_C=placed(window.cell_C, np.int64, -1),
        full_gene_N=torch.from_numpy(full_gene_N),
        full_count_N=torch.from_numpy(full_count_N),
        full_cell_N=torch.from_numpy(full_cell_N),
        length_C=np.diff(starts_C1[: cells.size + 1]).astype(np.int64),
        n_cells=int(cells.size),
        n_tokens=int(n_tokens),
        longest=min(settings.context, budget),
        epoch=epoch,
    )


class CellStream:
    """Endless, or one epoch of, packed micro-batches of a corpus.

    Parameters
    ----------
    corpus
        An open :class:`~genemodel.cells.corpus.Corpus`.
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
        Where to start: what a previous stream had consumed.
    rank, world_size
        Which share of the global sequence to yield.
    endless
        Start the next epoch when one ends.
    shuffle
        False keeps storage order.
    """

    def __init__(
        self,
        corpus: "Corpus",
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
    ) -> None:
        if len(cells) == 0:
            raise DataError(
                f"No cells to read from corpus {corpus.path}: the hold-out split left this side "
                "empty. Hold out fewer groups, or add sources to the corpus."
            )
        self.corpus = corpus
        self.cells = np.asarray(cells, np.int64)
        self.settings = settings.placed(_mean_length(corpus, settings.context))
        self.seed = seed
        self.inverse_median_V = inverse_median_V
        self.position = position or Position()
        self.rank, self.world_size = rank, world_size
        self.endless, self.shuffle = endless, shuffle
        if batch_codes is None:
            batch_codes = np.full(len(corpus), -1, np.int64)
        self._labels = (
            corpus.library_C,
            _species_codes(corpus),
            batch_codes,
            corpus.source_C,
        )
        self.waited_s = 0.0  # time the consumer spent waiting, for the log

    def read_window(self, order: EpochOrder, window: int) -> Window:
        """Read the cells of one window, in the order they will be packed."""
        wanted = np.concatenate([self.cells[a:b] for a, b in order.spans(window)])
        return read_cells(self.corpus, wanted, order.shuffled(window, wanted.size), self._labels)

    def __iter__(self) -> Iterator[tuple[CellBatch, Position]]:
        """Yield micro-batches with the position after each."""
        with (
            ThreadPoolExecutor(1, "genemodel-read") as reader,
            ThreadPoolExecutor(PACKING_THREADS, "genemodel-pack") as packers,
        ):
            queue: deque[tuple[Future[CellBatch], Position]] = deque()
            try:
                for submit, after in self._schedule(reader):
                    queue.append((packers.submit(submit), after))
                    if len(queue) > BATCHES_AHEAD:
                        yield self._wait(queue)
                while queue:
                    yield self._wait(queue)
            finally:
                for future, _ in queue:
                    future.cancel()

    def _wait(self, queue: deque[tuple[Future[CellBatch], Position]]) -> tuple[CellBatch, Position]:
        future, after = queue.popleft()
        begin = time.perf_counter()
        batch = future.result()
        self.waited_s += time.perf_counter() - begin
        return batch, after

    def _schedule(
        self, reader: ThreadPoolExecutor
    ) -> Iterator[tuple[Callable[[], CellBatch], Position]]:
        """Yield one rank's micro-batches, each with the position after its *round* over all ranks.

        Ranks stop after whole rounds, so a position in the middle of one would give some rank a
        micro-batch twice.
        """
        mine: Callable[[], CellBatch] | None = None
        after = self.position
        for packing, after in self._sequence(reader):
            if (after.taken - 1) % self.world_size == self.rank:
                mine = packing
            if after.taken % self.world_size == 0 and mine is not None:
                yield mine, after
                mine = None
        if mine is not None:
            yield mine, after

    def _sequence(
        self, reader: ThreadPoolExecutor
    ) -> Iterator[tuple[Callable[[], CellBatch], Position]]:
        """Yield the global sequence of micro-batches, the same on every rank."""
        taken = self.position.taken
        first_batch = self.position.batch
        windows = self._windows()
        epoch, w, order = next(windows)
        pending: Future[Window] = reader.submit(self.read_window, order, w)
        while True:
            following = next(windows, None)
            begin = time.perf_counter()
            window = pending.result()
            self.waited_s += time.perf_counter() - begin
            if following is not None:
                pending = reader.submit(self.read_window, following[2], following[1])
            bins = plan_bins(
                window.lengths_C(self.settings), self.settings.budget, self.settings.max_cells
            )
            for b in range(first_batch, len(bins)):
                taken += 1
                if b + 1 < len(bins):
                    after = Position(epoch, w, b + 1, taken)
                elif w + 1 < order.n_windows:
                    after = Position(epoch, w + 1, 0, taken)
                else:
                    after = Position(epoch + 1, 0, 0, taken)
                yield _packing(window, bins[b], self, epoch), after
            first_batch = 0
            if following is None:
                return
            epoch, w, order = following

    def _windows(self) -> Iterator[tuple[int, int, EpochOrder]]:
        epoch, first = self.position.epoch, self.position.window
        while True:
            order = EpochOrder(self.cells.size, self.seed, epoch, self.shuffle)
            for w in range(first, order.n_windows):
                yield epoch, w, order
            if not self.endless:
                return
            epoch, first = epoch + 1, 0


def _mean_length(corpus: "Corpus", context: int) -> float:
    """Mean tokens over the whole corpus: training and held-out cells get micro-batches alike."""
    return float(np.minimum(corpus.n_genes_C, context - 1).mean()) + 1


def _packing(
    window: Window, rows: np.ndarray, stream: CellStream, epoch: int
) -> Callable[[], CellBatch]:
    return lambda: pack(window, rows, stream.inverse_median_V, stream.settings, epoch=epoch)


def _species_codes(corpus: "Corpus") -> np.ndarray:
    """Species of every cell as its position in ``vocabulary.species``."""
    codes_C, names = corpus.codes("species")
    position = {name: i for i, name in enumerate(corpus.vocabulary.species)}
    table = np.array([position[name] for name in names], np.int64)
    return table[codes_C]


def read_cells(
    corpus: "Corpus",
    cells: np.ndarray,
    order: np.ndarray,
    labels: Sequence[np.ndarray],
) -> Window:
    """Read ``cells`` and put them into ``order``.

    Parameters
    ----------
    corpus
        Where to read.
    cells
        Permanent cell numbers, block after block; ascending within a block.
    order
        Positions into ``cells``: row i of the window is ``cells[order[i]]``.
    labels
        library, species, technical batch and panel of every cell of the corpus.
    """
    # A run is read as one range; holes of up to 32 cells are cheaper to read than to skip.
    step = np.diff(cells)
    runs = np.split(cells, np.flatnonzero((step <= 0) | (step > 32)) + 1)
    block = corpus.read_blocks([(int(run[0]), int(run[-1]) + 1) for run in runs])
    sizes = np.array([run[-1] + 1 - run[0] for run in runs])
    rows = np.concatenate(
        [run - run[0] + first for run, first in zip(runs, np.cumsum(sizes) - sizes, strict=True)]
    )[order]
    cells = cells[order]
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
