"""Cells through a backbone: packed ahead in threads, fetched late, halved where memory runs out.

Axes: B cells of a batch, C cells of a chunk, D width, F columns of a result, V vocabulary.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import BATCHES_AHEAD, PACKING_THREADS, pack, rank_scale
from genemodel.batches.packing import plan_bins
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.transfer import on_device
from genemodel.batches.window import Window
from genemodel.bundle.bundle import Bundle
from genemodel.errors import ConfigError
from genemodel.inference.counts import VocabularyChunk, precision, window_of
from genemodel.model.devices import is_out_of_memory
from genemodel.model.gene_model import Encoded, GeneModel

logger = logging.getLogger(__name__)

type Compile = bool | Literal["auto"]
type ReadOut = Callable[[Tensor, CellBatch], Tensor]
"""From the cell vectors (B, D) of a batch's real cells to what is wanted of them, (B, F)."""
type See = Callable[[Encoded, CellBatch], None]
"""Looks at all that a pass has made of a batch, tokens included."""

# Results under way before the oldest is waited for: by then the device has long had other work.
RESULTS_UNDER_WAY = 8
# Least places for cells of a batch; from there they double.
FEWEST_PLACES = 8
# Compiling takes about a minute for the handful of shapes. At the few thousand cells a second that
# a small model reaches on a GPU, fewer cells than these are through before it has paid.
COMPILE_FROM_CELLS = 200_000


def compiles(setting: Compile, device: torch.device, n_cells: int) -> bool:
    """Say whether a backbone is compiled for this many cells.

    It depends on all cells of a data set, never on those of one device: the last bit of a vector
    may differ between the two ways, and must not depend on how many devices share the work.
    """
    if setting == "auto":
        return device.type == "cuda" and n_cells >= COMPILE_FROM_CELLS
    return setting


def compiled(model: GeneModel) -> Callable[[CellBatch, int | None], Encoded]:
    """Return the compiled forward pass; one graph for each number of places."""
    return torch.compile(model, dynamic=False)


@dataclass
class _Part:
    """A chunk with what packing needs, and its result while that fills."""

    chunk: VocabularyChunk
    window: Window
    length_C: np.ndarray
    waiting: int
    result_CF: np.ndarray

    @classmethod
    def of(cls, chunk: VocabularyChunk, tokens: TokenSettings, columns: int) -> Self:
        window = window_of(chunk)
        result_CF = np.full((len(window), columns), np.nan, np.float32)
        waiting = int((chunk.library_C > 0).sum())
        return cls(chunk, window, window.lengths_C(tokens), waiting, result_CF)

    def usable(self) -> np.ndarray:
        """Rows of the cells with a known gene, the longest first: like lengths fill bins well."""
        usable = np.flatnonzero(self.chunk.library_C > 0)
        return usable[np.argsort(-self.length_C[usable], kind="stable")]


@dataclass(frozen=True)
class _Job:
    """Rows of a chunk that go together, and the limits they were planned under."""

    part: _Part
    rows: np.ndarray
    budget: int
    cells: int

    @property
    def longest(self) -> int:
        """Tokens of the longest cell."""
        return int(self.part.length_C[self.rows].max())


@dataclass(frozen=True)
class _Result:
    """A batch's result on its way to the host."""

    job: _Job
    host_BF: Tensor
    arrived: torch.cuda.Event | None

    def fill(self) -> None:
        """Wait for it, and write it to its rows."""
        if self.arrived is not None:
            self.arrived.synchronize()
        self.job.part.result_CF[self.job.rows] = self.host_BF.numpy()
        self.job.part.waiting -= self.job.rows.size


@dataclass
class _Limits:
    """Most tokens and cells of a batch; both are halved when memory runs out, and stay so."""

    budget: int
    cells: int
    halvings: int = 0
    said: int = field(default=0, repr=False)

    def tokens_for(self, longest: int) -> int:
        """Tokens of a batch whose longest cell has this many."""
        return max(self.budget >> self.halvings, longest)

    @property
    def most_cells(self) -> int:
        """Cells of a batch."""
        return max(1, self.cells >> self.halvings)

    def allow(self, job: _Job) -> bool:
        """Whether a job that was planned before is small enough by now."""
        return job.budget <= self.tokens_for(job.longest) and job.rows.size <= self.most_cells

    def halve(self, job: _Job) -> bool:
        """Halve until the job has to be made smaller; False where it cannot be."""
        while self.allow(job):
            if self.tokens_for(job.longest) == job.longest and self.most_cells == 1:
                return False
            self.halvings += 1
        return True


class Forward:
    """Runs the cells of chunks through a model, in input order and in bounded memory.

    Reading, projecting and packing run in threads ahead of the device; nothing waits for a single
    batch's result. When memory runs out, the batch is cut in two and the rest of the run keeps to
    the size that works: a cell's vector does not depend on the cells beside it.

    Parameters
    ----------
    bundle
        The model; its place is the device.
    read_out
        What is wanted of a cell's vector; called under the model's precision, without gradients.
    columns
        F, the width of what it returns.
    batch_size
        Most cells at once; default as many as fit the model's token budget.
    compile
        Compile the backbone first.
    blocks
        Stop after so many blocks; default as many as vectors of cells need.
    see
        Called once with every batch that went through, in this thread.

    Raises
    ------
    ConfigError
        ``batch_size`` is below 1.
    """

    def __init__(
        self,
        bundle: Bundle,
        read_out: ReadOut,
        columns: int,
        *,
        batch_size: int | None = None,
        compile: bool = False,
        blocks: int | None = None,
        see: See | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise ConfigError(
                f"batch_size is {batch_size}: at least one cell must go at once; leave it out for "
                "as many as fit."
            )
        tokens = bundle.tokens
        budget, cells = tokens.budget, tokens.max_cells
        if batch_size is not None:
            budget, cells = min(budget, batch_size * tokens.context), min(cells, batch_size)
        self.bundle, self.device, self.columns = bundle, bundle.device, columns
        self._read_out, self._see = read_out, see
        self._blocks = bundle.model.cell_stop if blocks is None else blocks
        self._encode = compiled(bundle.model) if compile else bundle.model
        self._inverse_median_V = rank_scale(bundle.medians_V, bundle.tokens.style)
        self._limits = _Limits(budget, cells)

    def over(
        self,
        chunks: Iterable[VocabularyChunk],
        done: Callable[[int], object] = lambda cells: None,
    ) -> Iterator[tuple[VocabularyChunk, np.ndarray]]:
        """Yield every chunk with its result, float32 (C, F); NaN for a cell without known gene.

        Parameters
        ----------
        chunks
            Taken in a thread, one ahead of those that are packed.
        done
            Told the number of cells of every batch that has come back, and of cells without any
            known gene.
        """
        self.bundle.model.eval()
        parts: deque[_Part] = deque()
        under_way: deque[_Result] = deque()
        with (
            ThreadPoolExecutor(1, "genemodel-read") as reader,
            ThreadPoolExecutor(PACKING_THREADS, "genemodel-pack") as packers,
        ):
            packed = self._packed(self._parts(chunks, reader), parts, packers)
            # Closed before the packers are, which its thread asks for more.
            with closing(iter(on_device(packed, self.device))) as moved:
                for batch, job in moved:
                    for result in self._results(job, batch):
                        under_way.append(result)
                        if len(under_way) > RESULTS_UNDER_WAY:
                            done(_fill_next(under_way))
                            yield from _complete(parts, done)
            while under_way:
                done(_fill_next(under_way))
            yield from _complete(parts, done)

    def _parts(
        self, chunks: Iterable[VocabularyChunk], reader: ThreadPoolExecutor
    ) -> Iterator[_Part]:
        """Read one chunk ahead."""
        source = iter(chunks)

        def read() -> _Part | None:
            chunk = next(source, None)
            return None if chunk is None else _Part.of(chunk, self.bundle.tokens, self.columns)

        pending = reader.submit(read)
        while (part := pending.result()) is not None:
            pending = reader.submit(read)
            yield part

    def _packed(
        self,
        incoming: Iterable[_Part],
        parts: deque[_Part],
        packers: ThreadPoolExecutor,
    ) -> Iterator[tuple[CellBatch, _Job]]:
        """Yield packed batches and what each is; ``parts`` gets the chunks they are of."""
        ahead: deque[tuple[_Job, Future[CellBatch]]] = deque()

        def following() -> tuple[CellBatch, _Job]:
            job, future = ahead.popleft()
            return future.result(), job

        for part in incoming:
            parts.append(part)
            for job in self._plan(part, part.usable()):
                ahead.append((job, packers.submit(self._pack, job)))
                if len(ahead) > BATCHES_AHEAD:
                    yield following()
        while ahead:
            yield following()

    def _plan(self, part: _Part, rows: np.ndarray) -> list[_Job]:
        """Distribute rows over batches within the present limits."""
        if not rows.size:
            return []
        length_B = part.length_C[rows]
        budget, cells = self._limits.tokens_for(int(length_B.max())), self._limits.most_cells
        return [
            _Job(part, rows[chosen], budget, cells) for chosen in plan_bins(length_B, budget, cells)
        ]

    def _pack(self, job: _Job) -> CellBatch:
        batch = pack(
            job.part.window,
            job.rows,
            self._inverse_median_V,
            self.bundle.tokens,
            budget=job.budget,
            max_cells=places(job.rows.size, job.cells),
        )
        # The genes beyond the context are there for count decoding: nobody reads them here.
        return replace(
            batch,
            full_gene_N=batch.full_gene_N[:0],
            full_count_N=batch.full_count_N[:0],
            full_cell_N=batch.full_cell_N[:0],
        )

    def _results(self, job: _Job, batch: CellBatch) -> Iterator[_Result]:
        """Run a batch, in pieces where it is too large."""
        failure = ""
        if self._limits.allow(job):
            try:
                result = self._run(job, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                failure = str(error) or type(error).__name__
            else:
                self._say_what_fits(job)
                yield result
                return
        # Here the traceback is gone, which held everything that the failed pass had computed.
        if failure:
            self._make_room(job, failure)
        for smaller in self._plan(job.part, job.rows):
            yield from self._results(smaller, self._pack(smaller).to(self.device))

    def _make_room(self, job: _Job, failure: str) -> None:
        if not self._limits.halve(job):
            raise ConfigError(
                f"{self.device} is out of memory with a single cell of {job.longest:,} tokens "
                f"({failure.splitlines()[0][:200]}): free memory on it, or choose another device."
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _say_what_fits(self, job: _Job) -> None:
        limits = self._limits
        if limits.halvings == limits.said:
            return
        limits.said = limits.halvings
        logger.warning(
            "%s is out of memory with batches of %s tokens: from here on at most %s tokens and %s "
            "cells go at once, which changes no result.",
            self.device, f"{limits.budget:,}", f"{job.budget:,}", f"{limits.most_cells:,}",
        )  # fmt: skip

    @torch.inference_mode()
    def _run(self, job: _Job, batch: CellBatch) -> _Result:
        with _current(self.device):
            with precision(self.device):
                encoded = self._encode(batch, self._blocks)
                cell_BD = encoded.cell_CD[: job.rows.size]
                result_BF = self._read_out(cell_BD, batch)
            if self._see is not None:
                self._see(encoded, batch)
            result_BF = result_BF.float()
            if not result_BF.is_cuda:
                return _Result(job, result_BF, None)
            host_BF = torch.empty(result_BF.shape, dtype=torch.float32, pin_memory=True)
            host_BF.copy_(result_BF, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            return _Result(job, host_BF, arrived)


def places(n_cells: int, most: int) -> int:
    """Return for how many cells a batch has room: 8, 16, 32 …, so that few shapes are compiled.

    Cells come sorted by length, so their number in a batch wanders from budget ÷ context upwards:
    with the usual 16,384 tokens over at most seven of these, three for most data.
    """
    room = FEWEST_PLACES
    while room < n_cells:
        room *= 2
    return max(n_cells, min(room, most))


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one: compiled kernels and events go there."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _fill_next(under_way: deque[_Result]) -> int:
    result = under_way.popleft()
    result.fill()
    return int(result.job.rows.size)


def _complete(
    parts: deque[_Part], done: Callable[[int], object]
) -> Iterator[tuple[VocabularyChunk, np.ndarray]]:
    """Take the chunks off whose cells are all there."""
    while parts and not parts[0].waiting:
        part = parts.popleft()
        if empty := int((part.chunk.library_C <= 0).sum()):
            done(empty)
        yield part.chunk, part.result_CF
