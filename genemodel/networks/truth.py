"""Known edges and lists of transcription factors, read from tables.

Axes: E edges.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from genemodel.errors import ConfigError, DataError
from genemodel.perturbation.genes import GeneNames
from genemodel.settings import some

logger = logging.getLogger(__name__)

# Where tables keep them: CollecTRI, DoRothEA, BEELINE, decoupler, and our own output.
SOURCE_COLUMNS = ("tf", "source", "gene1", "regulator")
TARGET_COLUMNS = ("target", "gene2")
# Beside a name its id, which is taken where there is one.
ID = "_ensembl"
_FILES = (".txt", ".tsv", ".csv", ".gz", ".tab")


def read_table(path: str | Path, setting: str, *, header: bool = True) -> pd.DataFrame:
    """Read a table of texts, divided by tabs or commas, gzipped or not."""
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{setting}={path} is no file.")
    plain = file.name.removesuffix(".gz")
    try:
        return pd.read_csv(
            file, sep="," if plain.endswith(".csv") else "\t", dtype=str, keep_default_na=False,
            header=0 if header else None,
        )  # fmt: skip
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError,
            pd.errors.EmptyDataError) as error:  # fmt: skip
        raise DataError(f"{setting}={path} is not a readable table ({error}).") from error


def read_edges(path: str | Path, names: GeneNames, setting: str, *, kind: str = "") -> np.ndarray:
    """Read edges as tokens, each once, int64 (E, 2): source and target.

    Names that the vocabulary lacks are left out, and counted in the log. Loops are left out.

    Raises
    ------
    ConfigError
        ``kind`` is missing where the table holds several, or is none of them.
    DataError
        The table cannot be read, lacks the columns, or holds no gene of the vocabulary.
    """
    table = read_table(path, setting)
    lowered = {str(name).lower(): str(name) for name in table.columns}
    sides = []
    for known, what in ((SOURCE_COLUMNS, "transcription factors"), (TARGET_COLUMNS, "targets")):
        column = next((name for name in known if name in lowered), None)
        if column is None:
            raise DataError(
                f"{setting}={path} has no column of {what} ({', '.join(known)}); it has "
                f"{some(list(map(str, table.columns)))}."
            )
        sides.append(column)
    table = _of_kind(table, lowered, kind, f"{setting}={path}")
    tokens = [_tokens(table, lowered, column, names) for column in sides]
    edges = np.column_stack(tokens)
    known_E = (edges >= 0).all(1)
    if not known_E.any():
        raise DataError(
            f"{setting}={path}: no edge is between two genes of {', '.join(names.species)} that "
            "are known here: check species, and the columns of the table."
        )
    if not known_E.all():
        logger.info(
            "%s=%s: %s of %s edges name a gene that is not known here.",
            setting, path, f"{(~known_E).sum():,}", f"{known_E.size:,}",
        )  # fmt: skip
    edges = np.unique(edges[known_E], axis=0)
    return edges[edges[:, 0] != edges[:, 1]]


def _of_kind(table: pd.DataFrame, lowered: dict[str, str], kind: str, where: str) -> pd.DataFrame:
    column = lowered.get("kind")
    if column is None:
        if kind:
            raise ConfigError(f"truth_kind={kind}, but {where} has no column kind: leave it out.")
        return table
    kinds = sorted(set(table[column]))
    if not kind and len(kinds) > 1:
        raise ConfigError(
            f"{where} holds {len(kinds)} kinds of edges ({some(kinds)}): set truth_kind."
        )
    if kind and kind not in kinds:
        raise ConfigError(f"truth_kind={kind}: {where} holds {some(kinds)}.")
    return table[table[column] == kind] if kind else table


def _tokens(
    table: pd.DataFrame, lowered: dict[str, str], column: str, names: GeneNames
) -> np.ndarray:
    by_name = lookup(table[lowered[column]].tolist(), names)
    if (ids := lowered.get(column + ID)) is None:
        return by_name
    by_id = lookup(table[ids].tolist(), names)
    return np.where(by_id >= 0, by_id, by_name)


def lookup(texts: Sequence[str], names: GeneNames) -> np.ndarray:
    """Tokens of names, -1 where unknown."""
    different, at = np.unique(np.asarray(texts, dtype=object).astype(str), return_inverse=True)
    token = np.full(different.size, -1, np.int64)
    for species in names.species:
        match = names.vocabulary.match(
            different.tolist(), species=species, min_fraction=0.0, min_genes=0,
            among=names.species,
        )  # fmt: skip
        token = np.where(token < 0, match.token_G, token)
    return np.where(different == "", -1, token)[at]


def factors(given: Sequence[str], names: GeneNames) -> np.ndarray:
    """Tokens of transcription factors, from names or from one file of them.

    A list in a file is of all that a species has: those that the vocabulary lacks are left out. A
    name that is written out must be known.
    """
    files = [text for text in given if text.endswith(_FILES) or "/" in text]
    if not files:
        return np.unique(names.tokens(list(given), "tfs"))
    if len(given) > 1:
        raise ConfigError(f"tfs names the file {files[0]} and more: give one file, or names.")
    table = read_table(files[0], "tfs", header=False)
    token = lookup(table[0].tolist(), names)
    if not (token >= 0).any():
        raise DataError(
            f"tfs={files[0]}: the first column holds no gene of {', '.join(names.species)}."
        )
    return np.unique(token[token >= 0])
