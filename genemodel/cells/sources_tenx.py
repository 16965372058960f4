"""Files of Cell Ranger and of programs that write like it: HDF5 and matrix-market folders."""

import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.contract import Candidate, choose_counts
from genemodel.cells.matrices import (
    Rows,
    SelectedColumns,
    SequentialRows,
    SparseRows,
    numeric,
    refuse_damage,
)
from genemodel.cells.sources import OpenOptions, Source
from genemodel.errors import DataError

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
        genes = _features(group)
        arrays = group["data"], group["indices"], group["indptr"]
    # Cell Ranger stores genes × cells by columns, which is cells × genes by rows.
    rows: Rows = numeric(SparseRows(*arrays, (len(barcodes), len(genes)), where), where)
    return _source(rows, genes, barcodes, genome, path, "10x h5", options, file.close)


def _features(group: Any) -> pd.DataFrame:
    if "features" in group:
        features = group["features"]
        table = {"gene_symbol": _strings(features["name"])}
        for column in ("feature_type", "genome"):
            if column in features:
                table[column] = _strings(features[column])
        return pd.DataFrame(table, index=pd.Index(_strings(features["id"]), dtype=str))
    return pd.DataFrame(
        {"gene_symbol": _strings(group["gene_names"])},
        index=pd.Index(_strings(group["genes"]), dtype=str),
    )


def _source(
    rows: Rows,
    genes: pd.DataFrame,
    barcodes: list[str],
    genome: str | None,
    path: Path,
    kind: str,
    options: OpenOptions,
    closer: Any,
) -> Source:
    """Keep the genes (not antibodies, guides …) and make the source."""
    where = path.name
    if options.layer not in (None, "X"):
        raise DataError(f"{where}: a {kind} source has no layers, layer={options.layer} was asked")
    kept = np.ones(len(genes), bool)
    if genome is not None:
        known = sorted(set(genes["genome"])) if "genome" in genes.columns else []
        if genome not in known:
            raise DataError(
                f"{where}: has no genome {genome!r}; it has {', '.join(known) or 'no genome names'}"
            )
        kept = (genes["genome"] == genome).to_numpy()
    if not kept.all():
        rows = SelectedColumns(rows, np.flatnonzero(kept))
        genes = genes[kept]
    obs = options.plan.without_columns(barcodes, where, options.name)
    counts = choose_counts(
        [Candidate("matrix", "X", rows, genes)],
        layer=None,
        where=where,
        allow_fractional=options.allow_fractional,
        n_cells=len(obs),
    )
    return Source(options.name, where, path.name, kind, counts, obs, closer)


# -- matrix-market folders -----------------------------------------------------------------------


def open_folder(path: Path, options: OpenOptions) -> Source:
    """Open a folder with matrix.mtx, barcodes.tsv and features.tsv or genes.tsv, gzipped or not."""
    matrix = _one_of(path, "matrix.mtx")
    barcodes_file = _one_of(path, "barcodes.tsv")
    features_file = _one_of(path, "features.tsv", "genes.tsv")
    with refuse_damage(f"{path.name}/{barcodes_file.name}"):
        barcodes = [line.split("\t")[0] for line in _lines(barcodes_file)]
    with refuse_damage(f"{path.name}/{features_file.name}"):
        fields = [line.split("\t") for line in _lines(features_file)]
    genes = pd.DataFrame(
        {"gene_symbol": [f[1] if len(f) > 1 else f[0] for f in fields]},
        index=pd.Index([f[0] for f in fields], dtype=str),
    )
    if fields and all(len(f) > 2 for f in fields):
        genes["feature_type"] = [f[2] for f in fields]
    market = MatrixMarket(matrix, f"{path.name}/{matrix.name}")
    if market.shape == (len(genes), len(barcodes)):
        cells_first = False
    elif market.shape == (len(barcodes), len(genes)):
        cells_first = True
    else:
        raise DataError(
            f"{path.name}: matrix.mtx is {market.shape[0]:,} × {market.shape[1]:,}, but there are "
            f"{len(genes):,} features and {len(barcodes):,} barcodes. The three files do not "
            "belong together"
        )
    shape = len(barcodes), len(genes)
    rows = SequentialRows(
        shape, lambda: market.blocks(cells_first, shape), market.where, np.float64
    )
    return _source(rows, genes, barcodes, options.genome, path, "10x mtx", options, None)


def _one_of(folder: Path, *names: str) -> Path:
    for name in names:
        for ending in ("", ".gz"):
            if (folder / (name + ending)).is_file():
                return folder / (name + ending)
    raise DataError(
        f"{folder.name}: has matrix.mtx but no {' or '.join(names)} (nor .gz) beside it: copy the "
        "complete folder"
    )


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb"))


def _lines(path: Path) -> list[str]:
    with _open(path) as file:
        return file.read().decode("utf-8").splitlines()


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
