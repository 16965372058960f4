"""Reading the tab-separated tables that people bring: genes, orthologs, foreign tokens."""

import csv
import gzip
import re
import zlib
from pathlib import Path

import pandas as pd

from genemodel.errors import DataError

# Columns of a vocabulary.
COLUMNS = ("token", "species", "ensembl_id", "symbol", "biotype", "aliases")
_KEPT_BIOTYPE = re.compile(r"^(?:protein_coding|miRNA|Mt_\w+|(?:IG|TR)_[A-Z]+_gene)$")


def kept_biotype(biotype: str) -> bool:
    """Whether genes of this biotype belong in a vocabulary whatever they are called.

    Protein-coding, immunoglobulin and T-cell-receptor segments, miRNA, mitochondrial RNA.
    """
    return bool(_KEPT_BIOTYPE.match(biotype))


def read_text(path: str | Path, what: str) -> str:
    """Return the text of a plain or gzipped UTF-8 file.

    Raises
    ------
    DataError
        The file is missing, not UTF-8, or its gzip stream is damaged.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{what}: {path} does not exist") from error
    except OSError as error:
        raise DataError(f"{what}: {path} cannot be read ({error.strerror})") from error
    return decoded(data, f"{what}: {path}")


def decoded(data: bytes, where: str) -> str:
    """Return the text of plain or gzipped UTF-8 bytes; `where` starts the message of a refusal."""
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"{where} is a damaged or cut-off gzip file ({error}): copy or build it again"
            ) from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not a UTF-8 text table (byte {error.start})") from error


def read_table(path: str | Path, what: str) -> pd.DataFrame:
    """Read a tab- or comma-separated table with a header; every value stays a string.

    Lines that begin with ``#`` before the header are comments. The first line of the header decides
    the separator.
    """
    lines = read_text(path, what).splitlines()
    start = 0
    while start < len(lines) and (lines[start].startswith("#") or not lines[start].strip()):
        start += 1
    if start == len(lines):
        raise DataError(f"{what}: {path} has no header line")
    separator = "\t" if "\t" in lines[start] or "," not in lines[start] else ","
    reader = csv.reader(
        lines[start:],
        delimiter=separator,
        quoting=csv.QUOTE_NONE if separator == "\t" else csv.QUOTE_MINIMAL,
    )
    header = [name.strip() for name in next(reader)]
    if len(set(header)) != len(header):
        raise DataError(f"{what}: {path} has the same column twice in {header}")
    rows = list(reader)
    if not set(map(len, rows)) <= {len(header)}:
        for offset, row in enumerate(rows, start=start + 2):
            if row and len(row) != len(header):
                raise DataError(
                    f"{what}: line {offset} of {path} has {len(row)} fields, the header has "
                    f"{len(header)}"
                )
        rows = [row for row in rows if row]
    columns = zip(*rows, strict=True) if rows else ([] for _ in header)
    return pd.DataFrame(dict(zip(header, map(list, columns), strict=True)), dtype=object)


def first_column(table: pd.DataFrame, names: tuple[str, ...]) -> str | None:
    """Return the first of `names` that the table has (any case, blanks as _), or None."""
    lowered = {plain_column(str(c)): str(c) for c in table.columns}
    return next((lowered[name] for name in names if name in lowered), None)


def plain_column(name: str) -> str:
    """Write the name of a column as it is compared: BioMart's web page has "Gene stable ID"."""
    return "_".join(name.lower().split())


def required_column(
    table: pd.DataFrame, names: tuple[str, ...], *, what: str, path: str | Path
) -> str:
    """Return the first of `names` that the table has, or refuse with the columns it does have."""
    found = first_column(table, names)
    if found is None:
        raise DataError(
            f"{what}: {path} has no column {' or '.join(names)}; it has "
            f"{', '.join(map(str, table.columns))}"
        )
    return found
