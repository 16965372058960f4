"""Text tables and loom files."""

import csv
import functools
import gzip
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.contract import Candidate
from genemodel.cells.matrices import (
    DenseRows,
    Rows,
    SequentialRows,
    numeric,
    refuse_damage,
    rows_of,
)
from genemodel.cells.source import OpenOptions, Source
from genemodel.cells.sources_tenx import is_gzip
from genemodel.errors import DataError
from genemodel.genes.recognition import are_barcodes, name_column, refuse_turned, share_of_genes

log = logging.getLogger(__name__)

# Values of a text table parsed at once; all of a table with genes as rows must fit.
_BLOCK_VALUES = 8_000_000
_TURNED_VALUES = 200_000_000
# Lines from which columns of texts are told from columns of numbers.
_SAMPLE = 50
# Share of known genes from which on names say which way a table lies.
_KNOWN = 0.1
# What featureCounts, Ensembl and people put between the names of genes and their counts.
_ANNOTATION = frozenset(
    {
        "chr", "chrom", "chromosome", "seqnames", "start", "end", "strand", "length", "width",
        "gene_name", "genename", "gene_symbol", "symbol", "hgnc_symbol", "mgi_symbol",
        "external_gene_name", "gene_short_name", "gene_id", "geneid", "ensembl_id", "entrezid",
        "entrez_id", "entrezgene", "entrezgene_id", "gene_type", "gene_biotype", "biotype",
        "description", "gene_description", "feature_type", "feature_types", "source",
    }
)  # fmt: skip
_GENE_COLUMNS = frozenset(
    {
        "gene", "genes", "geneid", "gene_id", "gene_ids", "gene_name", "genename", "gene_names",
        "gene_symbol", "symbol", "symbols", "feature", "features", "ensembl", "ensembl_id",
        "ensembl_gene_id", "hgnc_symbol", "mgi_symbol", "external_gene_name", "gene_short_name",
    }
)  # fmt: skip
_GENE_NAMES = ("Accession", "accession", "gene_ids", "ensembl_id", "Gene", "gene", "var_names")
_CELL_NAMES = ("CellID", "cell_id", "cellid", "obs_names", "barcode", "barcodes")


def open_table(path: Path, options: OpenOptions) -> Source:
    """Open a text table: genes as columns or as rows, or a line per cell and gene.

    Lines of ``#`` before the header are skipped. Columns of texts behind the names (symbols and
    positions of genes, labels of cells) are no counts: they become columns of var or obs.
    """
    where = path.name
    if options.layer not in (None, "X"):
        raise DataError(
            f"{where}: a text table has no layers, layer={options.layer} was asked: leave it out"
        )
    with refuse_damage(where):
        table = _Table.of(path)
        is_long = table.is_long()
    if is_long:
        with refuse_damage(where):
            return _open_long(table, options)
    with refuse_damage(where):
        turned = options.transpose or table.has_genes_as_rows()
        row_names, beside = table.row_names, table.beside
    if turned:
        if not options.transpose:
            log.info("%s: its first column holds the genes: the table is turned", where)
        cells = pd.DataFrame(index=pd.Index(table.names, dtype=str))
        genes = beside.set_axis(pd.Index(row_names, dtype=str))
        rows: Rows = rows_of(table.turned(), where)
    else:
        genes = pd.DataFrame(index=pd.Index(table.names, dtype=str))
        cells = beside.set_axis(pd.Index(row_names, dtype=str))
        rows = SequentialRows((len(cells), len(genes)), table.blocks, where)
    if len(beside.columns):
        log.info("%s: columns %s are no counts", where, ", ".join(map(str, beside.columns)))
    remedy = (
        "Leave transpose out: it was turned" if options.transpose else "Set transpose=true: turn it"
    )
    return _of_table(path, options, rows, cells, genes, remedy)


def _of_table(
    path: Path,
    options: OpenOptions,
    rows: Rows,
    cells: pd.DataFrame,
    genes: pd.DataFrame,
    remedy: str,
) -> Source:
    present = [str(c) for c in cells.columns]
    obs = options.plan.apply(
        cells.index, present, cells.__getitem__, path.name, options.name,
        genes=lambda: genes, genome=options.genome,
    )  # fmt: skip
    refuse_turned(obs.index, genes.index, path.name, remedy)
    counts = options.counts([Candidate("table", "X", rows, genes)], path.name, len(obs))
    return Source(options.name, path.name, path.name, "csv", counts, obs)


def _open_long(table: "_Table", options: OpenOptions) -> Source:
    """Open a table with a line per cell and gene (umi_tools count)."""
    options.refuse_transpose(table.path.name, "table in long format")
    path = table.path
    lines = table.read(dtype={0: str, 1: str}, keep_default_na=False)
    if len(lines) > _TURNED_VALUES:
        raise DataError(
            f"{path.name}: is in long format and too large to sort in memory. Write it as h5ad once"
        )
    names = [lines.iloc[:, 0], lines.iloc[:, 1]]
    shares = [share_of_genes(pd.unique(column)) for column in names]
    at = table.header[:2]
    said = ["gene" in name.lower() for name in at]
    gene_first = shares[0] > shares[1] or (shares[0] == shares[1] and said[0] >= said[1])
    genes, cells = names if gene_first else names[::-1]
    log.info("%s: is in long format (%s): a line per cell and gene", path.name, ", ".join(at))
    values = pd.to_numeric(lines.iloc[:, 2], errors="coerce").to_numpy(np.float64)
    cell_N, cell_names = pd.factorize(cells)
    gene_N, gene_names = pd.factorize(genes)
    matrix = sp.csr_matrix(
        (values, (cell_N, gene_N)), shape=(len(cell_names), len(gene_names))
    )  # what stands twice is summed
    return _of_table(
        path, options, rows_of(matrix, path.name),
        pd.DataFrame(index=pd.Index(cell_names, dtype=str)),
        pd.DataFrame(index=pd.Index(gene_names, dtype=str)),
        "Name the columns of genes and cells so that they can be told apart",
    )  # fmt: skip


class _Table:
    """A table of numbers in text, parsed in blocks of lines.

    ``names``: of the columns of numbers; ``header``: of all columns, that of the row names too;
    ``n_beside``: columns between the row names and the numbers.
    """

    def __init__(
        self, path: Path, separator: str, skipped: int, header: list[str], sample: list[list[str]]
    ) -> None:
        self.path, self.header = path, header
        self._separator, self._skipped = separator, skipped
        self._zipped = is_gzip(path)
        self.n_beside = 0
        for at in range(1, len(header) - 1):
            texts = [row[at] for row in sample if len(row) > at]
            if header[at].strip().lower() not in _ANNOTATION and not all(map(_is_text, texts)):
                break
            self.n_beside = at
        self.names = header[1 + self.n_beside :]

    @classmethod
    def of(cls, path: Path) -> "_Table":
        lines: list[str] = []
        skipped, comment = 0, ""
        with gzip.open(path, "rt") if is_gzip(path) else path.open("rt") as file:
            for text in file:
                line = text.lstrip("\ufeff")
                if not lines and (line.startswith("#") or not line.strip()):
                    comment = line if line.strip() else comment
                    skipped += 1
                    continue
                lines.append(line)
                if len(lines) > _SAMPLE:
                    break
        begin = lines[0] if lines else comment
        separator = next((c for c in "\t,;" if c in begin), " ")
        rows = list(csv.reader(lines, delimiter=separator, skipinitialspace=separator == " "))
        rows = [row for row in rows if row]
        # A header that is a comment itself: #gene, cell1, …
        hidden = next(csv.reader([comment.lstrip("# ")], delimiter=separator), [])
        if rows and len(hidden) > 1 and len(hidden) == len(rows[0]) and _numbers_in(rows[0]):
            header, sample = hidden, rows
        else:
            header, sample, skipped = rows[0] if rows else [], rows[1:], skipped + 1
        first = sample[0] if sample else []
        if len(header) < 2 or len(first) < 2:
            shown = [line[:60] for line in (*lines, "", "")[:2]]
            raise DataError(
                f"{path.name}: is no table: its first lines are {shown[0]!r} and {shown[1]!r}. "
                "Expected are a header with names and one line per cell or gene"
            )
        # R writes no name above the column of row names.
        if len(first) == len(header) + 1:
            header = ["", *header]
        return cls(path, separator, skipped, [name.strip() for name in header], sample)

    def read(self, **options: Any) -> Any:
        """Read the lines behind the header with pandas."""
        return pd.read_csv(
            self.path,
            sep=r"\s+" if self._separator == " " else self._separator,
            header=None,
            skiprows=self._skipped,
            compression="gzip" if self._zipped else None,
            **options,
        )

    @functools.cached_property
    def row_names(self) -> list[str]:
        """Names of the rows, their first fields."""
        names = self.read(usecols=[0], dtype=str, keep_default_na=False)
        return [str(v) for v in names.iloc[:, 0]]

    @functools.cached_property
    def beside(self) -> pd.DataFrame:
        """Columns between the row names and the numbers, as text."""
        if not self.n_beside:
            return pd.DataFrame(index=range(len(self.row_names)))
        columns = list(range(1, 1 + self.n_beside))
        found = self.read(usecols=columns, dtype=str, keep_default_na=False)
        named = pd.Index([self.header[c] or f"column {c}" for c in columns])
        return found.set_axis(named.where(~named.duplicated(), named + " again"), axis=1)

    def is_long(self) -> bool:
        """Whether a line is a gene of a cell, not all genes of a cell."""
        few = len(self.header) == 3 and self.n_beside == 1
        return few and len(set(self.row_names)) < len(self.row_names)

    def has_genes_as_rows(self) -> bool:
        """Whether the rows are genes, by how rows and columns are called."""
        beside = [self.beside[column].tolist() for column in self.beside]
        rows = max(map(share_of_genes, (self.row_names, *beside)))
        columns = share_of_genes(self.names)
        if max(rows, columns) >= _KNOWN:
            return rows > columns
        if are_barcodes(self.names) != are_barcodes(self.row_names):
            return are_barcodes(self.names)
        return self.header[0].lower().replace(" ", "_") in _GENE_COLUMNS

    def blocks(self) -> Iterator[sp.csr_matrix]:
        """Rows as they stand in the file, some at a time."""
        lines = max(1, _BLOCK_VALUES // len(self.names))
        for whole in self.read(chunksize=lines, index_col=0):
            block = whole.iloc[:, self.n_beside :]
            if block.shape[1] != len(self.names):
                raise DataError(
                    f"{self.path.name}: the header names {len(self.header) - 1:,} columns, lines "
                    f"have {whole.shape[1]:,}. Make the table again"
                )
            texts = [n for n, kind in enumerate(block.dtypes) if kind.kind not in "iufb"]
            if texts:
                column = self.names[texts[0]]
                numbers = pd.to_numeric(block.iloc[:, texts[0]], errors="coerce")
                wrong = block.iloc[:, texts[0]][numbers.isna()]
                if len(wrong):
                    raise DataError(
                        f"{self.path.name}: column {column!r} holds text ({wrong.iloc[0]!r} in "
                        f"line of {block.index[int(np.argmax(numbers.isna()))]!r}), not numbers. "
                        "Leave columns that are no counts out"
                    )
            yield sp.csr_matrix(block.to_numpy(dtype=np.float64))

    def turned(self) -> sp.csr_matrix:
        """Return the complete table with its columns as rows."""
        parts, held = [], 0
        with refuse_damage(self.path.name):
            for block in self.blocks():
                parts.append(block)
                held += block.nnz
                if held > _TURNED_VALUES:
                    raise DataError(
                        f"{self.path.name}: is too large to turn in memory. Convert it once: "
                        "anndata.io.read_csv(path).T.write_h5ad(...)"
                    )
        return sp.vstack(parts, format="csr").T.tocsr() if parts else sp.csr_matrix((0, 0))


def _is_text(value: str) -> bool:
    """Whether a field is neither a number nor empty."""
    try:
        float(value)
    except ValueError:
        return value.strip() != ""
    return False


def _numbers_in(row: list[str]) -> bool:
    return any(not _is_text(value) and value.strip() for value in row[1:])


def open_loom(file: Any, path: Path, options: OpenOptions) -> Source:
    """Open a loom file: genes × cells, dense, attributes of rows and columns beside it."""
    where = path.name
    options.refuse_transpose(where, "loom")

    def texts(dataset: Any) -> np.ndarray:
        values = dataset[:]
        if values.dtype.kind in "OS":
            return np.array([v.decode() if isinstance(v, bytes) else str(v) for v in values])
        return np.asarray(values)

    with refuse_damage(where):
        n_genes, n_cells = file["matrix"].shape
        rows_of_file, columns = file["row_attrs"], file["col_attrs"]
        genes = pd.DataFrame(
            {k: texts(v) for k, v in rows_of_file.items() if v.shape == (n_genes,)},
            index=range(n_genes),
        )
        usual = next((n for n in _GENE_NAMES if n in genes.columns), None)
        name = usual if usual is not None else name_column(genes)
        if name is None:
            raise DataError(
                f"{where}: names no genes: row_attrs has {', '.join(rows_of_file) or 'nothing'}, "
                f"expected is one of {', '.join(_GENE_NAMES)}, or another of names of genes"
            )
        genes.index = pd.Index(genes[name].astype(str))
        present = [k for k, v in columns.items() if v.shape == (n_cells,)]
        key = next((n for n in _CELL_NAMES if n in present), None)
        cells = texts(columns[key]) if key else np.arange(n_cells)
        obs = options.plan.apply(
            pd.Index(cells.astype(str)), present, lambda c: texts(columns[c]), where, options.name,
            genes=lambda: genes, genome=options.genome,
        )  # fmt: skip

    def matrix(dataset: Any, place: str) -> Rows:
        return numeric(DenseRows(dataset, place, transposed=True), place)

    candidates = [Candidate("matrix", "X", matrix(file["matrix"], f"{where}, matrix"), genes)]
    for layer in file.get("layers", {}):
        place = f"layers[{layer!r}]"
        candidates.append(
            Candidate(place, layer, matrix(file["layers"][layer], f"{where}, {place}"), genes)
        )
    counts = options.counts(candidates, where, len(obs))
    return Source(options.name, where, path.name, "loom", counts, obs, file.close)
