"""Telling gene names from other names by what they are: for files that do not say where they stand.

Known are ids by how they are written, and symbols of the built-in vocabulary as their species
writes them.
"""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.match import APPENDED, USUAL_COLUMNS
from genemodel.genes.species import ASSEMBLY_PREFIX

# ids of Ensembl, WormBase and FlyBase, with a version, a prefix or a symbol attached
_ID = re.compile(r"(?:^|[^A-Za-z0-9])(?:ENS[A-Z]{0,6}G\d{11}|WBGene\d{8}|FBgn\d{7})(?![0-9])", re.I)
# 0, 12.0, 7-1: a place in a table, whatever was appended when tables were joined
_NUMBER = re.compile(r"^\d+(?:[-._]\d+)*$")
_BARCODE = re.compile(r"(?:^|[^A-Za-z])[ACGTN]{8,}(?:$|[^A-Za-z])")
_LOOKED_AT = 300
_FEW = 10
_MANY = 0.5
# Texts of which more than this are known genes hold the gene names.
_KNOWN = 0.1
_CLEARLY_MORE = 0.02
_DIFFERENT = 0.9


def some_of(names: Sequence[object], most: int = _LOOKED_AT) -> list[str]:
    """Return at most so many names, from everywhere."""
    n = len(names)
    at = range(n) if n <= most else np.linspace(0, n - 1, most).astype(int).tolist()
    return [str(names[i]) for i in at]


def are_numbers(names: Sequence[object]) -> bool:
    """Whether the names are places in a table, not names."""
    some = some_of(names)
    return bool(some) and sum(bool(_NUMBER.match(n)) for n in some) > _MANY * len(some)


def are_barcodes(names: Sequence[object]) -> bool:
    """Whether the names are sequences of bases, as cells have them."""
    some = some_of(names)
    return bool(some) and sum(bool(_BARCODE.search(n)) for n in some) > _MANY * len(some)


def share_of_genes(names: Sequence[object]) -> float:
    """Share of the names that are gene ids or known gene symbols, of a few hundred looked at."""
    some = [n for n in some_of(names) if n and n != "nan"]
    if not some:
        return 0.0
    if are_numbers(some) or are_barcodes(some):
        return 0.0
    ids = sum(bool(_ID.search(n)) for n in some)
    if ids > _MANY * len(some):
        return ids / len(some)
    from genemodel.genes.vocabulary import GeneVocabulary

    vocabulary = GeneVocabulary.builtin()
    best = 0
    for species in vocabulary.species:
        index = vocabulary.index(species)
        found = 0
        for name in some:
            plain = name
            if prefix := ASSEMBLY_PREFIX.match(name):
                plain = name[prefix.end() :]
            known = plain in index.by_symbol or plain in index.by_alias
            found += known or bool(_ID.search(name))
        best = max(best, found)
    return best / len(some)


def name_column(var: pd.DataFrame) -> str | None:
    """Column of a var table that holds gene names, found by what stands in it; None if none does.

    The known genes decide; where none is known (a species of which nothing is built in), the
    first column of texts that differ from row to row.
    """
    usual = {name: i for i, name in enumerate(USUAL_COLUMNS)}
    texts = []
    for at, column in enumerate(var.columns):
        values = var.iloc[:, at]
        if values.dtype.kind in "iufbcmM" or (var.columns == column).sum() > 1:
            continue
        names = values.dropna().astype(str).tolist()
        if len(names) > _MANY * len(values) and not are_numbers(names):
            texts.append((usual.get(str(column).lower(), len(usual)), str(column), names))
    texts.sort(key=lambda item: item[0])
    best, found = _KNOWN, None
    for _, column, names in texts:
        share = share_of_genes(names)
        if share > best + (_CLEARLY_MORE if found else 0):
            best, found = share, column
    if found is not None:
        return found
    different = (c for _, c, names in texts if len(set(names)) > _DIFFERENT * len(names) > 0)
    return next(different, None)


def without_appended(names: Sequence[str]) -> list[str]:
    """Undo what made repeated names unique: ``GENE-1`` and ``GENE.1`` beside ``GENE`` are GENE.

    Names that are genes by themselves (``MIR1-1``) stay.
    """
    there = set(names)
    found = {}
    for name in there:
        if (parts := APPENDED.match(name)) and parts[1] in there:
            found[name] = parts[1]
    if not found:
        return list(names)
    from genemodel.genes.vocabulary import GeneVocabulary

    vocabulary = GeneVocabulary.builtin()
    indices = [vocabulary.index(species) for species in vocabulary.species]
    for name in list(found):
        if any(
            name in i.by_symbol or name.lower() in i.by_id or name in i.by_alias for i in indices
        ):
            del found[name]
    return [found.get(name, name) for name in names]


# The way out for an AnnData that is in memory, and for a file.
TURN_OBJECT = "Turn it: adata = adata.T"
TURN_FILE = "Turn it: transpose=true"


def refuse_turned(
    cells: Sequence[object], genes: Sequence[object], where: str, remedy: str = TURN_OBJECT
) -> None:
    """Refuse a matrix whose rows are the genes.

    Raises
    ------
    DataError
        The names of the cells are genes, and those of the genes are none.
    """
    if len(cells) < _FEW or share_of_genes(cells) < _MANY or share_of_genes(genes) > _KNOWN:
        return
    raise DataError(
        f"{where}: obs_names hold gene names ({', '.join(some_of(cells, 3))}), var_names do not "
        f"({', '.join(some_of(genes, 3))}): its rows are genes. {remedy}"
    )
