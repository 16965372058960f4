"""Text tables and loom files."""

import csv
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.contract import Candidate, choose_counts
from genemodel.cells.matrices import (
    DenseRows,
    Rows,
    SequentialRows,
    numeric,
    refuse_damage,
    rows_of,
)
from genemodel.cells.sources import OpenOptions, Source
from genemodel.errors import DataError

# Values of a text table parsed at once; all of a table with genes as rows must fit.
_BLOCK_VALUES = 8_000_000
_TURNED_VALUES = 200_000_000
_GENE_NAMES = ("Accession", "accession", "gene_ids", "ensembl_id", "Gene", "gene", "var_names")
_CELL_NAMES = ("CellID", "cell_id", "cellid", "obs_names", "barcode", "barcodes")


def open_table(path: Path, options: OpenOptions) -> Source:
    """Open a csv or tsv: a header with gene names, then one cell per line with its name first."""
    where = path.name
    if options.layer not in (None, "X"):
        raise DataError(f"{where}: a text table has no layers, layer={options.layer} was asked")
    with refuse_damage(where):
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open("rt") as file:
            lines = [file.readline() for _ in range(2)]
    separator = "\t" if "\t" in lines[0] else ";" if ";" in lines[0] else ","
    header, first = (next(csv.reader([line], delimiter=separator), []) for line in lines)
    if len(header) < 2 or len(first) < 2:
        raise DataError(
            f"{where}: is no table: its first lines are {lines[0][:60]!r} and {lines[1][:60]!r}. "
            "Expected are a header with gene names and one line per cell"
        )
    # R writes no name above the column of row names.
    names = header if len(first) == len(header) + 1 else header[1:]
    table = _Table(path, separator, names)
    with refuse_damage(where):
        row_names = table.row_names()
    if options.transpose:
        genes, cells = row_names, names
        rows: Rows = rows_of(table.turned(), where)
    else:
        genes, cells = names, row_names
        rows = SequentialRows((len(cells), len(genes)), table.blocks, where)
    obs = options.plan.without_columns(cells, where, options.name)
    counts = choose_counts(
        [Candidate("table", "X", rows, pd.DataFrame(index=pd.Index(genes, dtype=str)))],
        layer=None,
        where=where,
        allow_fractional=options.allow_fractional,
        n_cells=len(obs),
    )
    return Source(options.name, where, path.name, "csv", counts, obs)


class _Table:
    """A table of numbers in text, parsed in blocks of lines."""

    def __init__(self, path: Path, separator: str, names: list[str]) -> None:
        self._path, self._separator, self._names = path, separator, names

    def _read(self, **options: Any) -> Any:
        return pd.read_csv(self._path, sep=self._separator, header=None, skiprows=1, **options)

    def row_names(self) -> list[str]:
        names = self._read(usecols=[0], dtype=str, keep_default_na=False)
        return [str(v) for v in names.iloc[:, 0]]

    def blocks(self) -> Iterator[sp.csr_matrix]:
        lines = max(1, _BLOCK_VALUES // len(self._names))
        for block in self._read(chunksize=lines, index_col=0):
            if block.shape[1] != len(self._names):
                raise DataError(
                    f"{self._path.name}: the header names {len(self._names):,} columns, lines have "
                    f"{block.shape[1]:,}. Make the table again"
                )
            texts = [n for n, kind in enumerate(block.dtypes) if kind.kind not in "iufb"]
            if texts:
                column = self._names[texts[0]]
                numbers = pd.to_numeric(block.iloc[:, texts[0]], errors="coerce")
                wrong = block.iloc[:, texts[0]][numbers.isna()].iloc[0]
                raise DataError(
                    f"{self._path.name}: column {column!r} holds text ({wrong!r} in line of "
                    f"{block.index[int(np.argmax(numbers.isna()))]!r}), not numbers. Leave "
                    "columns that are no genes out"
                )
            yield sp.csr_matrix(block.to_numpy(dtype=np.float64))

    def turned(self) -> sp.csr_matrix:
        """Return the complete table with its columns as rows."""
        parts, held = [], 0
        with refuse_damage(self._path.name):
            for block in self.blocks():
                parts.append(block)
                held += block.nnz
                if held > _TURNED_VALUES:
                    raise DataError(
                        f"{self._path.name}: is too large to turn in memory. Convert it once: "
                        "anndata.io.read_csv(path).T.write_h5ad(...)"
                    )
        return sp.vstack(parts, format="csr").T.tocsr() if parts else sp.csr_matrix((0, 0))


def open_loom(file: Any, path: Path, options: OpenOptions) -> Source:
    """Open a loom file: genes × cells, dense, attributes of rows and columns beside it."""
    where = path.name

    def texts(dataset: Any) -> np.ndarray:
        values = dataset[:]
        if values.dtype.kind in "OS":
            return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values])
        return np.asarray(values)

    with refuse_damage(where):
        n_genes, n_cells = file["matrix"].shape
        rows_of_file, columns = file["row_attrs"], file["col_attrs"]
        genes = pd.DataFrame(
            {k: texts(v) for k, v in rows_of_file.items() if v.shape == (n_genes,)}
        )
        name = next((n for n in _GENE_NAMES if n in genes.columns), None)
        if name is None:
            raise DataError(
                f"{where}: names no genes: row_attrs has {', '.join(rows_of_file) or 'nothing'}, "
                f"expected is one of {', '.join(_GENE_NAMES)}"
            )
        genes.index = pd.Index(genes[name].astype(str))
        present = [k for k, v in columns.items() if v.shape == (n_cells,)]
        key = next((n for n in _CELL_NAMES if n in present), None)
        cells = texts(columns[key]) if key else np.arange(n_cells)
        obs = options.plan.apply(
            pd.Index(cells.astype(str)), present, lambda c: texts(columns[c]), where, options.name
        )

    def matrix(dataset: Any, place: str) -> Rows:
        return numeric(DenseRows(dataset, place, transposed=True), place)

    candidates = [Candidate("matrix", "X", matrix(file["matrix"], f"{where}, matrix"), genes)]
    for layer in file.get("layers", {}):
        place = f"layers[{layer!r}]"
        candidates.append(
            Candidate(place, layer, matrix(file["layers"][layer], f"{where}, {place}"), genes)
        )
    counts = choose_counts(
        candidates,
        layer=options.layer,
        where=where,
        allow_fractional=options.allow_fractional,
        n_cells=len(obs),
    )
    return Source(options.name, where, path.name, "loom", counts, obs, file.close)
