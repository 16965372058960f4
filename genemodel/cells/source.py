"""An opened source of cells, whatever its format: checked counts in blocks, and their obs.

Every cell is given, empty ones too. Which file becomes one and how is for
:mod:`genemodel.cells.sources`, whose readers of the several formats make these.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import pandas as pd
import scipy.sparse as sp

from genemodel.cells.contract import Candidate, Counts, choose_counts
from genemodel.cells.obs_columns import NOTES, ColumnPlan
from genemodel.errors import ConfigError

if TYPE_CHECKING:
    from genemodel.cells.sources import SourceFile

CHUNK_CELLS = 8192


@dataclass(frozen=True)
class Chunk:
    """Consecutive cells of a source: ``counts_CG`` int32 CSR, and their ``obs``."""

    start: int
    counts_CG: sp.csr_matrix
    obs: pd.DataFrame


@dataclass
class Source:
    """An opened source of cells.

    Attributes
    ----------
    name
        File stem, or what the caller said; the ``dataset`` of cells that name none.
    where
        The file, for messages.
    file
        Name of the file or folder without its path; empty for data in memory.
    kind
        ``h5ad``, ``zarr``, ``10x h5``, ``10x mtx``, ``loom``, ``csv``, ``AnnData`` or ``stream``.
    counts
        Reader of the checked counts.
    obs
        One row per cell, index = cell names; columns renamed to those of the corpus, missing
        values as None.
    """

    name: str
    where: str
    file: str
    kind: str
    counts: Counts
    obs: pd.DataFrame
    closer: Callable[[], None] | None = field(default=None, repr=False)
    opened_from: "SourceFile | None" = field(default=None, repr=False)
    """How another process opens the same; None where the cells are in this one's memory."""
    licence: str = ""
    citation: str = ""
    """What the file or the caller says; empty where neither does."""
    column: str | None = None
    """Column of ``var`` that the caller said holds the gene names."""

    @property
    def n_cells(self) -> int:
        """C, all cells, empty ones included."""
        return self.counts.shape[0]

    @property
    def genes(self) -> pd.DataFrame:
        """The ``var`` table of the counts, index = gene names."""
        return self.counts.genes

    @property
    def notes(self) -> tuple[str, ...]:
        """What a curator should know about the counts and the labels, in words."""
        return (*self.counts.notes, *self.obs.attrs.get(NOTES, ()))

    def chunks(
        self, chunk_cells: int = CHUNK_CELLS, start: int = 0, stop: int | None = None
    ) -> Iterator[Chunk]:
        """Yield cells in order, at most ``chunk_cells`` at a time (fewer where cells are rich).

        Parameters
        ----------
        chunk_cells
            Cells held at once.
        start, stop
            First cell, and the one behind the last; by default all.

        Raises
        ------
        DataError
            A value that is not a count, or damage, is met on the way.
        """
        last = self.n_cells if stop is None else stop
        while start < last:
            end = self.counts.rows.stop_of(start, min(chunk_cells, last - start))
            yield Chunk(start, self.counts.read(start, end), self.obs.iloc[start:end])
            start = end

    def close(self) -> None:
        """Close the file."""
        if self.closer is not None:
            self.closer()
            self.closer = None

    def __enter__(self) -> Self:
        """Return the source itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the file."""
        self.close()


@dataclass(frozen=True)
class OpenOptions:
    """How to read a source; see :func:`open_source`."""

    layer: str | None
    plan: ColumnPlan
    allow_fractional: bool
    genome: str | None
    transpose: bool
    name: str
    column: str | None = None

    def counts(self, candidates: list[Candidate], where: str, n_cells: int) -> Counts:
        """Take the matrix that they name, proven; see :func:`choose_counts`."""
        return choose_counts(
            candidates, layer=self.layer, where=where, allow_fractional=self.allow_fractional,
            n_cells=n_cells, column=self.column, genome=self.genome,
        )  # fmt: skip

    def refuse_transpose(self, where: str, kind: str) -> None:
        """Refuse to turn a kind of file that says itself which of its sides are the genes."""
        if self.transpose:
            raise ConfigError(
                f"{where}: transpose=true turns a table, an h5ad or a zarr; a {kind} source says "
                "which of its sides are genes: leave it out"
            )
