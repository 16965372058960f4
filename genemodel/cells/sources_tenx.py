"""Files of Cell Ranger and of programs that write like it: HDF5 and matrix-market folders."""

import csv
import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.contract import Candidate, choose_counts
from genemodel.cells.genomes import GENOME
from genemodel.cells.matrices import Rows, SequentialRows, SparseRows, numeric, refuse_damage
from genemodel.cells.source import OpenOptions, Source
from genemodel.errors import DataError
from genemodel.genes.recognition import refuse_turned
from genemodel.genes.species import ASSEMBLY_NAME, SPECIES, species_name
from genemodel.settings import some

# Lines of a matrix-market file parsed at once, and the most that are sorted in memory.
_LINES = 4_000_000
_SORTED_LINES = 100_000_000


def is_tenx(file: Any) -> bool:
    """Whether an HDF5 file has the layout of Cell Ranger, version 2 or 3."""
    return bool(_groups(file))


def _groups(file: Any) -> list[str]:
    import h5py

    return [
        name
        for name, group in file.items()
        if isinstance(group, h5py.Group) and {"barcodes", "data", "indices", "indptr"} <= set(group)
    ]


def _strings(dataset: Any) -> list[str]:
    return [v.decode() if isinstance(v, bytes) else str(v) for v in dataset[:]]


def open_hdf5(file: Any, path: Path, options: OpenOptions) -> Source:
    """Open a 10x HDF5 file (``matrix`` of version 3, or one group per genome of version 2)."""
    where = path.name
    groups = _groups(file)
    if groups == ["matrix"] or ("matrix" in groups and "features" in file["matrix"]):
        group, genome = file["matrix"], options.genome
    else:
        chosen = options.genome if options.genome is not None else groups[0]
        if chosen not in groups or (options.genome is None and len(groups) > 1):
            found = "asks for genome " + repr(chosen) if options.genome else "does not say which"
            raise DataError(
                f"{where}: holds {len(groups)} genomes ({', '.join(groups)}) and the call {found}. "
                f"Set genome= to one of them"
            )
        group, genome = file[chosen], None
    with refuse_damage(where):
        barcodes = _strings(group["barcodes"])
        genes = _features(group, where)
        if GENOME not in genes and species_name(group.name.strip("/")) in SPECIES:
            genes[GENOME] = group.name.strip("/")  # version 2
        arrays = group["data"], group["indices"], group["indptr"]
    # Cell Ranger stores genes × cells by columns, which is cells × genes by rows.
    rows: Rows = numeric(SparseRows(*arrays, (len(barcodes), len(genes)), where), where)
    cells = pd.DataFrame(index=pd.Index(barcodes, dtype=str))
    return _source(rows, genes, cells, genome, path, "10x h5", options, file.close)


def _features(group: Any, where: str) -> pd.DataFrame:
    # Version 3 has a group of features; version 2, and CellBender's first ones, two arrays.
    features = group["features"] if "features" in group else group
    named = {"id": ("id", "genes", "gene_ids"), "gene_symbol": ("name", "gene_names")}
    found = {
        column: _strings(features[key])
        for column, keys in named.items()
        for key in keys
        if key in features
    }
    if not found:
        raise DataError(
            f"{where}: names no genes (features/id, features/name, genes or gene_names)"
        )
    ids, symbols = (found.get(key) for key in ("id", "gene_symbol"))
    table = {"gene_symbol": symbols or ids}
    for column in ("feature_type", "genome"):
        if column in features and len(features[column].shape) == 1:
            table[column] = _strings(features[column])
    return pd.DataFrame(table, index=pd.Index(ids or symbols, dtype=str))


def _source(
    rows: Rows,
    genes: pd.DataFrame,
    cells: pd.DataFrame,
    genome: str | None,
    path: Path,
    kind: str,
    options: OpenOptions,
    closer: Any,
) -> Source:
    """Make the source."""
    where = path.name
    if options.layer not in (None, "X"):
        raise DataError(
            f"{where}: a {kind} source has no layers, layer={options.layer} was asked: leave it out"
        )
    options.refuse_transpose(where, kind)
    present = [str(c) for c in cells.columns]
    obs = options.plan.apply(
        cells.index, present, cells.__getitem__, where, options.name,
        genes=lambda: genes, genome=genome, sample=None if present else options.name,
    )  # fmt: skip
    refuse_turned(
        obs.index, genes.index, where,
        "Its files of the names of cells and genes are exchanged: rename them",
    )  # fmt: skip
    counts = choose_counts(
        [Candidate("matrix", "X", rows, genes)],
        layer=None,
        where=where,
        allow_fractional=options.allow_fractional,
        n_cells=len(obs),
        column=options.column,
        genome=genome,
    )
    return Source(options.name, where, path.name, kind, counts, obs, closer)


# -- matrix-market folders -----------------------------------------------------------------------


_CELLS = re.compile(r"barcode|cell|_rows|colnames|obs_?names", re.IGNORECASE)
_GENES = re.compile(r"feature|gene|_cols|rownames|var_?names", re.IGNORECASE)
_MATRIX = re.compile(r"(?:[._]?(?:count[._])?matrix)?\.mtx(?:\.gz)?$", re.IGNORECASE)
# Cells come first in what these programs write; it shows only where a matrix is square.
_CELLS_FIRST = re.compile(r"cells_x_genes|quants_mat|count_matrix|DGE", re.IGNORECASE)


def is_market(name: str) -> bool:
    """Whether a file is named like a matrix-market file."""
    return bool(_MATRIX.search(name))


def open_folder(path: Path, options: OpenOptions) -> Source:
    """Open a matrix-market file with the names of its cells and genes beside it.

    Parameters
    ----------
    path
        A folder of one such matrix (Cell Ranger, STARsolo, Parse, kallisto, alevin), or the matrix
        itself, beside files whose names begin as its own does (GEO).
    options
        How to read it.
    """
    folder = path if path.is_dir() else path.parent
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    matrices = [n for n in names if is_market(n)]
    if path.is_dir():
        chosen = [n for n in matrices if n.lower() in ("matrix.mtx", "matrix.mtx.gz")] or matrices
        if len(chosen) > 1:
            raise DataError(
                f"{path.name}: holds {len(chosen)} matrices ({some(chosen, 6)}). Give the path of "
                f"each that is meant, such as {path / chosen[0]}"
            )
        matrix = path / chosen[0]
    else:
        matrix = path
    alone = len(matrices) == 1 or matrix.name.lower().startswith("matrix.mtx")
    cells_file = _beside(matrix, names, _CELLS, _GENES, alone, "barcodes.tsv")
    genes_file = _beside(matrix, names, _GENES, _CELLS, alone, "features.tsv or genes.tsv")
    market = MatrixMarket(matrix, f"{folder.name}/{matrix.name}")
    cells = _Lines.read(cells_file, f"{folder.name}/{cells_file.name}")
    genes = _Lines.read(genes_file, f"{folder.name}/{genes_file.name}")
    fits = [
        cells_first
        for cells_first in ((True, False) if _CELLS_FIRST.search(matrix.name) else (False, True))
        if genes.may_have(market.shape[int(cells_first)])
        and cells.may_have(market.shape[int(not cells_first)])
    ]
    if not fits:
        raise DataError(
            f"{path.name}: {matrix.name} is {market.shape[0]:,} × {market.shape[1]:,}, but there "
            f"are {len(genes.rows):,} features and {len(cells.rows):,} barcodes. The three files "
            "do not belong together"
        )
    cells_first = fits[0]
    var = _features_of(genes, market.shape[int(cells_first)])
    if GENOME not in var and ASSEMBLY_NAME.fullmatch(folder.name):
        var[GENOME] = folder.name  # Cell Ranger 2: filtered_gene_bc_matrices/hg19
    obs = cells.table(market.shape[int(not cells_first)])
    if len(cells.rows) == len(obs):
        obs = obs.iloc[:, :0]
    shape = len(obs), len(var)
    rows = SequentialRows(
        shape, lambda: market.blocks(cells_first, shape), market.where, np.float64
    )
    return _source(rows, var, obs, options.genome, path, "10x mtx", options, None)


def _beside(
    matrix: Path,
    names: Sequence[str],
    wanted: re.Pattern[str],
    other: re.Pattern[str],
    alone: bool,
    usual: str,
) -> Path:
    """Find the file of cell or gene names that belongs to a matrix."""
    start = _MATRIX.sub("", matrix.name)
    found = []
    for name in names:
        if is_market(name) or name == matrix.name or name.startswith("."):
            continue
        own = bool(start) and name.startswith(start)
        rest = name[len(start) :] if own else name
        # cell_gene_…: the word that comes first decides.
        here, there = wanted.search(rest), other.search(rest)
        # spliced.mtx and unspliced.mtx share what bears no name of either.
        shared = bool(re.fullmatch(r"(?:barcodes|features|genes)\.tsv(?:\.gz)?", name))
        if here and (own or alone or shared) and not (there and there.start() < here.start()):
            plain = re.search(r"(?:barcodes|features|genes)\.[ct]sv", name, re.IGNORECASE)
            found.append((not own, not plain, len(name), name))
    if not found:
        raise DataError(
            f"{matrix.parent.name}: has {matrix.name} but no {usual} (nor .gz) beside it"
            + (f" whose name begins with {start!r}" if start and not alone else "")
            + ": copy the complete folder"
        )
    return matrix.parent / min(found)[-1]


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if is_gzip(path) else path.open("rb"))


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed, whatever it is called."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


@dataclass(frozen=True)
class _Lines:
    """Lines of a text file in fields, with or without a header."""

    rows: list[list[str]]
    where: str

    @classmethod
    def read(cls, path: Path, where: str) -> Self:
        with refuse_damage(where), _open(path) as file:
            lines = file.read().decode("utf-8-sig").splitlines()
            lines = [line for line in lines if line.strip() and not line.startswith("#")]
            if lines and "\t" not in lines[0] and "," in lines[0]:
                rows = list(csv.reader(lines))
            else:
                # No quoting here: a gene name may hold one quote.
                rows = [[field.strip('"') for field in line.split("\t")] for line in lines]
        return cls(rows, where)

    def may_have(self, n: int) -> bool:
        """Whether these are the names of ``n`` things."""
        return len(self.rows) in (n, n + 1)

    def table(self, n: int) -> pd.DataFrame:
        """Rows after the header, if there is one; index = the first field."""
        header = self.rows[0] if len(self.rows) == n + 1 else []
        rows = self.rows[1:] if header else self.rows
        width = min(map(len, rows), default=1)
        if any(len(row) != len(rows[0]) for row in rows) and header:
            raise DataError(f"{self.where}: its lines have different numbers of fields")
        names = header[:width] if header else [str(i) for i in range(width)]
        table = pd.DataFrame([row[:width] for row in rows], columns=names, dtype=object)
        table.index = pd.Index(table.iloc[:, 0].astype(str), name=None)
        return table.iloc[:, 1:] if header else table


def _features_of(lines: _Lines, n: int) -> pd.DataFrame:
    """Make the var table of features.tsv (id, symbol, type) or of a table with a header."""
    table = lines.table(n)
    if len(lines.rows) == n + 1:
        return table
    genes = pd.DataFrame(
        {"gene_symbol": table.iloc[:, min(1, table.shape[1] - 1)]}, index=table.index
    )
    if table.shape[1] > 2:
        genes["feature_type"] = table.iloc[:, 2]
    return genes


class MatrixMarket:
    """A coordinate matrix in text, parsed in blocks of lines."""

    def __init__(self, path: Path, where: str) -> None:
        self.path, self.where = path, where
        with refuse_damage(where), _open(path) as file:
            banner = file.readline().decode("utf-8", "replace").strip()
            self._skipped = 1
            line = file.readline()
            self._skipped += 1
            while line.startswith(b"%") or (line and not line.strip()):
                line = file.readline()
                self._skipped += 1
        words = banner.lower().split()
        if len(words) < 5 or words[0] != "%%matrixmarket":
            raise DataError(
                f"{where}: is not a matrix-market file (first line {banner[:60]!r}). Copy or make "
                "it again"
            )
        if words[2] != "coordinate" or words[3] not in ("integer", "real") or words[4] != "general":
            raise DataError(
                f"{where}: is a matrix-market file of kind {' '.join(words[2:])!r}; counts are "
                "'coordinate integer general' (or real). Make it again from the count matrix"
            )
        sizes = line.split()
        if len(sizes) != 3 or not all(s.isdigit() for s in sizes):
            raise DataError(f"{where}: states no size (line {self._skipped}: {line[:60]!r})")
        self.shape = int(sizes[0]), int(sizes[1])
        self.n_values = int(sizes[2])

    def _parsed(self) -> Iterator[npt.NDArray[np.float64]]:
        """(lines, 3) blocks: row, column (from 1), value."""
        seen = 0
        with _open(self.path) as file:
            for _ in range(self._skipped):
                file.readline()
            reader = (
                pd.read_csv(
                    file, sep=r"\s+", header=None, chunksize=_LINES, dtype=np.float64, engine="c"
                )
                if self.n_values
                else ()
            )
            for block in reader:
                if block.shape[1] != 3:
                    raise DataError(
                        f"{self.where}: lines have {block.shape[1]} fields, not row, column, value"
                    )
                seen += len(block)
                yield block.to_numpy()
        if seen != self.n_values:
            raise DataError(
                f"{self.where}: announces {self.n_values:,} values and holds {seen:,}. The file is "
                "cut off: copy or make it again"
            )

    def blocks(self, cells_first: bool, shape: tuple[int, int]) -> Iterator[sp.csr_matrix]:
        """CSR blocks of cells, in order."""
        cell_at = 0 if cells_first else 1
        done = 0  # cells given
        held: list[npt.NDArray[np.float64]] = []
        n_held = 0
        sorted_so_far = True
        last = 0.0
        for block in self._parsed():
            cells = block[:, cell_at]
            self._check(block, cells_first, shape)
            if cells.size and (cells[0] < last or (np.diff(cells) < 0).any()):
                sorted_so_far = False
                if done:
                    raise self._unsorted()
            last = cells[-1] if cells.size else last
            held.append(block)
            n_held += len(block)
            if not sorted_so_far:
                if n_held > _SORTED_LINES:
                    raise self._unsorted()
                continue
            # The last cell of the block may go on in the next one.
            ready = np.concatenate(held) if len(held) > 1 else block
            complete = int(last) - 1
            cut = int(np.searchsorted(ready[:, cell_at], complete, side="right"))
            if complete > done and cut:
                yield self._csr(ready[:cut], cells_first, done, complete, shape[1])
                held, n_held, done = [ready[cut:]], len(ready) - cut, complete
            else:
                held = [ready]
        rest = np.concatenate(held) if held else np.empty((0, 3))
        if done < shape[0]:
            yield self._csr(rest, cells_first, done, shape[0], shape[1])

    def _unsorted(self) -> DataError:
        return DataError(
            f"{self.where}: its values are not sorted by cell and too many to sort in memory. "
            "Convert it once: anndata.read_mtx(path).T.write_h5ad(...)"
        )

    def _check(
        self, block: npt.NDArray[np.float64], cells_first: bool, shape: tuple[int, int]
    ) -> None:
        limits = shape if cells_first else shape[::-1]
        for axis in (0, 1):
            column = block[:, axis]
            if len(column) and not (column.min() >= 1 and column.max() <= limits[axis]):
                raise DataError(
                    f"{self.where}: a {('row', 'column')[axis]} number lies outside 1 … "
                    f"{limits[axis]:,}. The file is damaged: copy or make it again"
                )

    @staticmethod
    def _csr(
        block: npt.NDArray[np.float64], cells_first: bool, first: int, stop: int, n_genes: int
    ) -> sp.csr_matrix:
        cells, genes = (block[:, 0], block[:, 1]) if cells_first else (block[:, 1], block[:, 0])
        return sp.csr_matrix(
            (block[:, 2], (cells.astype(np.int64) - 1 - first, genes.astype(np.int64) - 1)),
            shape=(stop - first, n_genes),
        )
