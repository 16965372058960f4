"""Families of genes, and folds that keep each family together.

Paralogues look alike to every method; a fold that parts them asks for what was learnt by heart.
"""

import re
from functools import cache
from pathlib import Path

import numpy as np

from genemodel.errors import DataError
from genemodel.genes.tables import read_table, required_column
from genemodel.genes.vocabulary import N_SPECIAL, GeneVocabulary

SHIPPED = Path(__file__).parent / "data" / "human_families.tsv.gz"
GENE_COLUMNS = ("gene", "gene_id", "ensembl_id", "ensembl", "symbol")
# Letters before the first figure of a symbol, where they say something: ZNF, HOXA, Slc.
_STEM = re.compile(r"[A-Za-z]{3,}(?=\d)")


def families_of(
    vocabulary: GeneVocabulary, species: tuple[str, ...], path: str | Path = ""
) -> list[str]:
    """Name the family of every token, in the order of the vocabulary (V).

    Parameters
    ----------
    vocabulary
        Of the model.
    species
        Of the genes, for a table with their names.
    path
        A table with columns gene and family (or group). A gene with several is of the largest of
        them, which its paralogues are in, too. Empty: the gene groups of HGNC, which come with the
        package; genes of other species are in the group of the human gene whose token they share.

    Notes
    -----
    A gene without a family is together with genes whose symbols begin alike (``ZNF``, ``Slc``).
    """
    names = vocabulary.token_names()
    found = [""] * len(names)
    gene, family = _shipped() if not path else _read(str(path))
    if path or "human" in vocabulary.species:
        token_N = tokens_of(vocabulary, gene, species if path else ("human",))
        size = dict(zip(*np.unique(family, return_counts=True), strict=True))
        for token, name in zip(token_N.tolist(), family, strict=True):
            if token >= 0 and size[name] > size.get(found[token], 0):
                found[token] = name
    for token in range(N_SPECIAL, len(names)):
        if not found[token]:
            stem = _STEM.match(names[token])
            found[token] = f"stem {stem[0].upper()}" if stem else f"gene {token}"
    return found


@cache
def _shipped() -> tuple[list[str], list[str]]:
    return _read(str(SHIPPED))


def _read(path: str) -> tuple[list[str], list[str]]:
    what = "groups of genes"
    table = read_table(path, what)
    gene = required_column(table, GENE_COLUMNS, what=what, path=path)
    wanted = ("family", "group", "family_id", "group_id")
    family = required_column(table, wanted, what=what, path=path)
    return table[gene].tolist(), table[family].tolist()


def tokens_of(vocabulary: GeneVocabulary, names: list[str], species: tuple[str, ...]) -> np.ndarray:
    """Find tokens by symbol, id or alias, int64; -1 for what is no gene of these species."""
    token_N = np.full(len(names), -1, np.int64)
    for one in species:
        match = vocabulary.match(names, species=one, min_fraction=0.0, min_genes=0, among=species)
        token_N = np.where(token_N < 0, match.token_G, token_N)
    return token_N


def grouped_folds(code_G: np.ndarray, group_G: list[str], n_folds: int, seed: int) -> np.ndarray:
    """Give every gene a fold, (G,): whole groups, labels as even over the folds as they allow.

    Raises
    ------
    DataError
        A label is in fewer groups than two: nothing could be learnt and asked.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    groups_of = [
        {g for g, c in zip(group_G, code_G, strict=True) if c == code} for code in np.unique(code_G)
    ]
    fewest = min(map(len, groups_of))
    if fewest < 2:
        raise DataError(
            f"A label has genes of {fewest} family only, so that no fold without it could be "
            "learnt from: give more genes, or another table of groups."
        )
    folds = StratifiedGroupKFold(min(n_folds, fewest), shuffle=True, random_state=seed)
    fold_G = np.zeros(len(code_G), np.int64)
    for number, (_, held) in enumerate(folds.split(code_G, code_G, group_G)):
        fold_G[held] = number
    return fold_G
