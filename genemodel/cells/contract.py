"""The counts contract: what genemodel reads must be raw counts, and proves to be.

Raw counts are whole numbers ≥ 0: molecules or reads per gene and cell. A model that ranks genes by
count ÷ median, and decodes counts, is silently wrong on anything else, so nothing else passes. A
sample of cells gives the early refusal with its reason and the way out; then every block is
checked again while it is read, so that one corrupt value deep in a file is found too.

Axes: C cells, G genes of the file.
"""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.diagnosis import LARGEST, Finding, diagnose, equal_sums
from genemodel.cells.features import genes_among
from genemodel.cells.genomes import genome_of
from genemodel.cells.matrices import Rows, SelectedColumns, rows_of
from genemodel.errors import ConfigError, DataError
from genemodel.genes.recognition import are_numbers, name_column, refuse_turned

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

# Cells of the first look: three stretches, because files are often sorted by batch.
LOOK_CELLS = 192


@dataclass
class Tally:
    """What reading has met so far."""

    explicit_zeros: int = 0
    rounded: int = 0
    largest: int = 0


@dataclass
class Counts:
    """A matrix that holds raw counts, read in checked blocks.

    Attributes
    ----------
    name
        Where it stands: ``X``, ``layers['counts']``, ``raw``.
    where
        File and name, for messages.
    rows
        The reader beneath.
    genes
        The ``var`` table that belongs to it (that of ``raw`` may differ), index = gene names.
    allow_fractional
        Round expected counts instead of refusing them.
    notes
        What a curator should know, in words.
    tally
        Counted while reading.
    """

    name: str
    where: str
    rows: Rows
    genes: pd.DataFrame
    allow_fractional: bool = False
    notes: tuple[str, ...] = ()
    tally: Tally = field(default_factory=Tally)
    column_G: npt.NDArray[np.int64] | None = None
    """Columns of the file that these genes are; None where all its features are genes."""

    @property
    def shape(self) -> tuple[int, int]:
        """(C, G)."""
        return self.rows.shape

    def read(self, start: int, stop: int) -> sp.csr_matrix:
        """Read the counts of cells ``start`` to ``stop``.

        Returns
        -------
        scipy.sparse.csr_matrix
            (stop − start, G) int32; genes ascending, none twice, no explicit zeros.

        Raises
        ------
        DataError
            A value of the block is not a count; the message names the first such cell.
        """
        block = self.rows.read(start, stop)
        zeros, rounded, largest = _prove(block, start, self.where, self.allow_fractional)
        # Sorting happens in place, and a view may be of the user's own arrays.
        own = (a if a.base is None else a.copy() for a in (block.indices, block.indptr))
        block = sp.csr_matrix((block.data.astype(np.int32), *own), shape=block.shape)
        # Before zeros go: rounding may have made some.
        if zeros or rounded:
            block.eliminate_zeros()
        block.sum_duplicates()
        self.tally.explicit_zeros += zeros
        self.tally.rounded += rounded
        self.tally.largest = max(self.tally.largest, largest)
        return block


def _prove(
    block: sp.csr_matrix, first_cell: int, where: str, allow_fractional: bool
) -> tuple[int, int, int]:
    """Refuse a block that holds anything but counts; rounds in place where that is allowed."""
    from genemodel.cells.kernels import scan

    nans, infinite, negative, fractional, zeros, largest = scan(block.data)
    if not (nans or infinite or negative or fractional or largest > LARGEST):
        return zeros, 0, int(largest)
    finding = diagnose(block)
    if allow_fractional and finding.can_be_rounded:
        block.data = np.rint(block.data)
        return int((block.data == 0).sum()), fractional, int(np.rint(largest))
    values = block.data
    if values.dtype.kind == "f":
        wrong = ~(np.isfinite(values) & (values >= 0) & (values <= LARGEST))
        if not wrong.any():
            wrong = values != np.rint(values)
    else:
        wrong = (values < 0) | (values > LARGEST)
    at = int(np.argmax(wrong))
    cell = int(np.searchsorted(block.indptr, at, side="right")) - 1
    raise DataError(
        f"{where}: holds {finding.text}, not raw counts; the first is {values[at]:.6g} in cell "
        f"number {first_cell + cell:,} (counted from 0). {_way_out(finding)}"
    )


def _way_out(finding: Finding) -> str:
    if finding.can_be_rounded:
        return (
            "If these are expected counts (RSEM, salmon, ambient correction), "
            "allow_fractional=true rounds them; otherwise use the raw counts"
        )
    return "Use the file with raw counts, or name the layer that holds them: layer="


def look(rows: Rows) -> sp.csr_matrix:
    """Return a few cells from the beginning, the middle and the end (where these are at hand)."""
    n = rows.shape[0]
    each = LOOK_CELLS // 3
    if n <= LOOK_CELLS or rows.from_the_start:
        starts = [0]
        each = min(n, LOOK_CELLS)
    else:
        starts = [0, (n - each) // 2, n - each]
    parts = []
    for start in starts:
        at = start
        while at < start + each:
            stop = rows.stop_of(at, start + each - at)
            parts.append(rows.read(at, stop))
            at = stop
    if not parts:
        return sp.csr_matrix(rows.shape, dtype=np.float32)
    return sp.vstack(parts, format="csr") if len(parts) > 1 else parts[0]


def examine(rows: Rows) -> Finding:
    """Say what a matrix holds, from a first look."""
    if rows.shape[0] == 0 or rows.shape[1] == 0:
        return Finding("empty", f"no cells or no genes ({rows.shape[0]:,} × {rows.shape[1]:,})")
    finding = diagnose(look(rows))
    if finding.kind == "zero" and rows.shape[0] > LOOK_CELLS:
        # The first look may have met empty droplets only: those are dropped, not refused.
        return Finding("counts", "raw counts")
    return finding


@dataclass(frozen=True)
class Candidate:
    """One matrix of a file that may hold the counts: its name, how to set it, how to read it."""

    name: str
    setting: str
    matrix: Any
    genes: Any
    """The var table, or a function that reads it."""
    transposed: bool = False
    """Genes are the rows of the matrix."""

    def rows(self, place: str) -> Rows:
        """Reader of its cells."""
        return rows_of(self.matrix, place, transposed=self.transposed)


def choose_counts(
    candidates: list[Candidate],
    *,
    layer: str | None,
    where: str,
    allow_fractional: bool,
    n_cells: int | None = None,
    column: str | None = None,
    genome: str | None = None,
) -> Counts:
    """Take the matrix that ``layer`` names, prove it, and name the others where it is refused.

    ``column`` of var holds the names of genes; ``genome`` is the one whose genes are taken.
    """
    wanted = "X" if layer is None else layer
    chosen = next((c for c in candidates if c.setting == wanted), None)
    if chosen is None:
        raise DataError(
            f"{where}: has no layer {wanted!r}; it has "
            f"{', '.join(c.setting for c in candidates) or 'no matrix at all'}. "
            f"{_alternatives(candidates, wanted, allow_fractional)}"
        )
    place = f"{where}, {chosen.name}"
    genes = chosen.genes() if callable(chosen.genes) else chosen.genes
    try:
        rows = chosen.rows(place)
    except DataError as error:
        raise _with_alternatives(error, candidates, wanted, allow_fractional) from error
    if len(genes) != rows.shape[1]:
        raise DataError(
            f"{place}: has {rows.shape[1]:,} columns, its var table {len(genes):,} genes. The "
            "file does not fit together: make it again"
        )
    kept_G, notes = genes_among(genes, where)
    if genome is not None:
        of_genome_G = _of_genome(genes, genome, where)
        kept_G = of_genome_G if kept_G is None else kept_G & of_genome_G
    column_G = None if kept_G is None else np.flatnonzero(kept_G)
    if column_G is not None:
        rows, genes = SelectedColumns(rows, column_G), genes.iloc[column_G]
    genes = _named(genes, where, column)
    try:
        finding = examine(rows)
    except DataError as error:
        raise _with_alternatives(error, candidates, wanted, allow_fractional) from error
    if n_cells is not None and rows.shape[0] != n_cells:
        raise DataError(
            f"{place}: has {rows.shape[0]:,} rows, obs has {n_cells:,}. The file does not fit "
            "together: make it again"
        )
    if finding.kind == "empty":
        raise DataError(f"{place}: holds {finding.text}. Leave this file out")
    if not finding.is_counts and not (allow_fractional and finding.can_be_rounded):
        advice = _alternatives(candidates, wanted, allow_fractional)
        if finding.can_be_rounded:
            advice = f"{_way_out(finding)}. {advice if len(candidates) > 1 else ''}".rstrip()
        raise DataError(f"{place}: holds {finding.text}, not raw counts. {advice}")
    notes += _notes(rows)
    if not finding.is_counts:
        notes += (_rounding(rows, finding),)
    for note in notes:
        log.warning("%s: %s", place, note)
    return Counts(chosen.name, place, rows, genes, allow_fractional, notes, column_G=column_G)


def _alternatives(candidates: list[Candidate], refused: str, allow_fractional: bool) -> str:
    """Name the matrices that would do; where none does, what they hold."""
    good, others = [], []
    for candidate in candidates:
        if candidate.setting == refused:
            continue
        try:
            finding = examine(candidate.rows(candidate.name))
        except DataError:
            others.append(f"{candidate.name}: not readable")
            continue
        if finding.is_counts or (allow_fractional and finding.can_be_rounded):
            good.append(candidate)
        else:
            others.append(f"{candidate.name}: {finding.text}")
    if not good and not others:
        return "Please use the file with raw counts"
    if good:
        return "; ".join(f"{c.name} holds raw counts: set layer={c.setting}" for c in good)
    return f"None of the others will do ({'; '.join(others)}): use the file with raw counts"


def _with_alternatives(
    error: DataError, candidates: list[Candidate], refused: str, allow_fractional: bool
) -> DataError:
    """Add the other matrices of the file to a refusal, where there are any."""
    if len(candidates) < 2:
        return error
    return DataError(f"{error}. {_alternatives(candidates, refused, allow_fractional)}")


def _of_genome(genes: pd.DataFrame, genome: str, where: str) -> npt.NDArray[np.bool_]:
    """Tell the genes of one genome of a reference of several."""
    names = genome_of(genes)
    known = [] if names is None else sorted(set(names.dropna()))
    if names is None or genome not in known:
        raise DataError(
            f"{where}: has no genome {genome!r}; it has {', '.join(known) or 'no genome names'}. "
            "Set genome= to one of them, or leave it out"
        )
    return (names == genome).to_numpy(bool)


def _named(genes: pd.DataFrame, where: str, column: str | None) -> pd.DataFrame:
    """Return the var table with gene names as its index: of a column, or where that has numbers."""
    if column == "index":
        return genes
    if column is not None:
        if list(genes.columns).count(column) != 1:
            known = ", ".join(map(str, genes.columns)) or "no columns"
            raise DataError(
                f"{where}: var has {'no' if column not in genes.columns else 'more than one'} "
                f"column {column!r} (column={column}); it has {known}, and 'index'"
            )
    elif not len(genes) or not are_numbers(genes.index):
        return genes
    else:
        column = name_column(genes)
        if column is None:
            return genes  # who needs names refuses: see refuse_numbers
        log.info("%s: var_names are numbers; the gene names stand in var[%r]", where, column)
    texts = genes[column]
    named = texts.notna() & (texts.astype(str) != "")
    names = np.where(named, texts.astype(str), genes.index.astype(str))
    genes = genes.copy()
    genes.index = pd.Index(names.astype(object), name=column)
    return genes


def refuse_numbers(genes: pd.DataFrame, where: str) -> None:
    """Refuse numbers as gene names: another data set would be matched by position.

    Raises
    ------
    DataError
        No column of var holds names; where one does, it is the index already.
    """
    if len(genes) and are_numbers(genes.index):
        columns = ", ".join(map(str, genes.columns)) or "none"
        raise DataError(
            f"{where}: var_names are numbers ({', '.join(map(str, genes.index[:3]))} …), no genes, "
            f"and no column of var is known to hold gene names (it has {columns}). Name the one "
            "that does with column=, or put ids or symbols into adata.var_names"
        )


def _rounding(rows: Rows, finding: Finding) -> str:
    """Say how much rounding changes, in the cells looked at."""
    values = look(rows).data.astype(np.float64)
    before, after = values.sum(), np.rint(values).sum()
    return (
        f"{finding.text}, rounded to the nearest whole number (halves to the even one): the "
        f"counts of the cells looked at go from {before:,.0f} to {after:,.0f} in all"
    )


def _notes(rows: Rows) -> tuple[str, ...]:
    """Oddities that are no reason to refuse."""
    sample = look(rows)
    notes = []
    if rows.dtype.kind == "b" or (sample.nnz and sample.data.max() == 1 and sample.nnz > 1000):
        notes.append(
            "the cells looked at hold only 0 and 1: detection, not counts; genes cannot be ranked"
        )
    total = equal_sums(sp.csr_matrix(sample, dtype=np.float64)) if sample.shape[0] > 9 else None
    if total is not None and total > 100:
        about = float(f"{total:.3g}")
        notes.append(
            f"every cell sums to about {about:,.0f}: rounded normalised values or downsampled "
            "counts"
        )
    return tuple(notes)


def find_counts(
    adata: "AnnData",
    *,
    layer: str | None = None,
    allow_fractional: bool = False,
    where: str = "AnnData",
    column: str | None = None,
    genome: str | None = None,
    transpose: bool = False,
) -> Counts:
    """Prove that an AnnData holds raw counts, and give a reader for them.

    Parameters
    ----------
    adata
        In memory or backed.
    layer
        ``None`` or ``"X"`` for ``X``, ``"raw"`` for ``adata.raw``, else the name of a layer. No
        other matrix is ever taken instead.
    allow_fractional
        Accept expected counts (RSEM, salmon) and round them; how many is in ``tally.rounded``.
    where
        Name of the object in messages.
    column, genome
        Column of var that holds the gene names; the genome whose genes are taken.
    transpose
        Refused: see Raises.

    Returns
    -------
    Counts

    Raises
    ------
    ConfigError
        It is to be transposed, which would not be the object that results are written to.
    DataError
        The matrix holds anything but whole numbers ≥ 0: the message says what it is (log1p, CPM,
        scaled, NaN …) and which layers would do.
    """
    if transpose:
        raise ConfigError(
            f"{where}: transpose=true turns what is read from a file. An AnnData in memory, which "
            "results are written to, turns with adata = adata.T"
        )
    candidates = [Candidate("X", "X", adata.X, adata.var)]
    candidates += [
        Candidate(f"layers[{name!r}]", name, adata.layers[name], adata.var)
        for name in adata.layers
        if name is not None
    ]
    if adata.raw is not None:
        raw = adata.raw
        candidates = [c for c in candidates if c.setting != "raw"]
        candidates.append(Candidate("raw", "raw", raw.X, raw.var))
    refuse_turned(adata.obs_names, adata.var_names, where)
    return choose_counts(
        candidates,
        layer=layer,
        where=where,
        allow_fractional=allow_fractional,
        n_cells=adata.n_obs,
        column=column,
        genome=genome,
    )
