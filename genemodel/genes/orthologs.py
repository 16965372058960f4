"""Which genes of two species may share a token, and how a species is added to a vocabulary.

The rule, for every pair of species: two genes share a token when each is the other's only credible
ortholog. Where a table carries support (the number of databases that predict the pair), a rival
prediction is credible when it has at least half the support of the pair; where it carries none,
any second row for either gene is a rival. A gene with several orthologs (one-to-many, many-to-many)
gets a token of its own: nobody can say which of the copies should inherit what was learnt.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.genes.species import SPECIES, checked_species_name
from genemodel.genes.tables import (
    COLUMNS,
    first_column,
    kept_biotype,
    plain_column,
    read_table,
    required_column,
)

if TYPE_CHECKING:
    from genemodel.genes.vocabulary import GeneVocabulary

log = logging.getLogger(__name__)

RIVAL_SHARE = 0.5

# The names under which multi-species ortholog tables know our species.
_ORTHOLOG_TABLE_NAMES = {
    "worm": ("c.elegans", "caenorhabditis elegans", "celegans"),
    "fly": ("fruitfly", "drosophila melanogaster", "d.melanogaster"),
    "yeast": ("s.cerevisiae", "saccharomyces cerevisiae"),
    "rhesus": ("macaque", "macaca mulatta"),
    "frog": ("xenopus", "xenopus tropicalis"),
    "lizard": ("anole_lizard", "anole lizard", "anolis carolinensis"),
}


@dataclass(frozen=True)
class SpeciesReport:
    """What happened to the genes of a species that was added.

    Attributes
    ----------
    species, to
        The new species and the known one its orthologs were given for.
    genes_in_table, genes_kept
        Genes in the table, and those of a kept biotype.
    shared
        Genes that took over the token of their one-to-one ortholog.
    own
        Genes that got a new token: ``dropped_one_to_many + unmapped``.
    dropped_one_to_many
        Genes with orthologs, none of which is one-to-one.
    unmapped
        Genes without any ortholog in the vocabulary.
    tokens_before, tokens_after
        Vocabulary sizes.
    """

    species: str
    to: str
    genes_in_table: int
    genes_kept: int
    shared: int
    own: int
    dropped_one_to_many: int
    unmapped: int
    tokens_before: int
    tokens_after: int

    def __str__(self) -> str:
        """Say it in one paragraph."""
        return (
            f"{self.species}: {self.genes_kept:,} of {self.genes_in_table:,} genes kept; "
            f"{self.shared:,} share a token with their one-to-one {self.to} ortholog, "
            f"{self.own:,} have their own ({self.dropped_one_to_many:,} because their orthologs "
            f"are not one-to-one, {self.unmapped:,} without an ortholog). "
            f"Vocabulary: {self.tokens_before:,} -> {self.tokens_after:,} tokens."
        )


def one_to_one(pairs: pd.DataFrame) -> pd.DataFrame:
    """Pairs in which each gene is the other's only credible ortholog.

    Parameters
    ----------
    pairs
        Columns ``known``, ``new`` and ``support`` (a number; equal for all rows where the table has
        none). Repeated pairs count once, with their highest support.

    Returns
    -------
    pandas.DataFrame
        The kept pairs, columns ``known``, ``new``, ``support``; no gene occurs twice.
    """
    best = pairs.groupby(["known", "new"], as_index=False, sort=True)["support"].max()
    keep = np.ones(len(best), dtype=bool)
    support = best["support"].to_numpy(dtype=np.float64)
    for side in ("known", "new"):
        code = pd.factorize(best[side])[0]
        order = np.lexsort((-support, code))
        first = np.ones(len(order), dtype=bool)
        first[1:] = code[order][1:] != code[order][:-1]
        # Support of the strongest rival: the second row for the leader, the leader for the rest.
        leader = np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
        sorted_support = support[order]
        rival = sorted_support[leader].copy()
        starts = np.flatnonzero(first)
        has_second = np.append(starts[1:], len(order)) - starts > 1
        rival[starts] = np.where(
            has_second, sorted_support[np.minimum(starts + 1, len(order) - 1)], -np.inf
        )
        rival_of_row = np.empty(len(order))
        rival_of_row[order] = rival
        keep &= rival_of_row < RIVAL_SHARE * support
    return best.loc[keep].reset_index(drop=True)


def _genes_table(path: str | Path) -> tuple[pd.DataFrame, int]:
    """Genes of kept biotypes (columns ensembl_id, symbol, biotype) and how many were listed."""
    what = "genes table"
    table = read_table(path, what)
    id_column = required_column(
        table,
        ("ensembl_id", "gene_id", "gene_stable_id", "ensembl_gene_id", "feature_id", "id"),
        what=what,
        path=path,
    )
    symbol_column = first_column(
        table, ("symbol", "gene_symbol", "gene_name", "name", "external_gene_name")
    )
    biotype_column = first_column(table, ("biotype", "gene_biotype", "gene_type", "type"))
    alias_column = first_column(
        table, ("aliases", "alias", "gene_synonym", "external_synonym", "synonyms")
    )
    empty = pd.Series([""] * len(table), dtype=object)
    genes = pd.DataFrame(
        {
            "ensembl_id": table[id_column].str.strip(),
            "symbol": table[symbol_column].str.strip() if symbol_column else empty,
            "biotype": table[biotype_column].str.strip() if biotype_column else empty,
            "aliases": table[alias_column].str.strip() if alias_column else empty,
        }
    )
    # BioMart gives a line per transcript or synonym where one was asked for beside the gene.
    # A dictionary and not a groupby, which makes a frame of every one of 50,000 genes.
    aliases: dict[tuple[str, ...], dict[str, None]] = {}
    for *gene, alias in genes.itertuples(index=False, name=None):
        aliases.setdefault(tuple(gene), {})[alias] = None
    rows = [(*gene, "|".join(filter(None, found))) for gene, found in aliases.items()]
    genes = pd.DataFrame(rows, columns=genes.columns)
    repeated = genes["ensembl_id"].duplicated()
    if repeated.any():
        raise DataError(
            f"{what}: {path} lists {genes['ensembl_id'][repeated].iloc[0]} twice; each gene must "
            "stand once"
        )
    if (genes["ensembl_id"] == "").any():
        raise DataError(f"{what}: {path} has a gene without id")
    listed = len(genes)
    if biotype_column:
        genes = genes[genes["biotype"].map(kept_biotype)]
        if genes.empty:
            found = ", ".join(sorted(set(table[biotype_column]))[:8])
            raise DataError(
                f"{what}: {path} has no gene of a kept biotype (protein_coding, miRNA, IG/TR genes,"
                f" Mt_*); its biotypes are {found}"
            )
    return genes.sort_values("ensembl_id").reset_index(drop=True), listed


_KNOWN_ID = ("human_ensembl", "known_ensembl", "known_id", "ensembl_id_known")
_KNOWN_SYMBOL = ("human_symbol", "known_symbol")
_NEW_ID = ("target_ensembl", "ortholog_ensembl", "new_ensembl", "new_id")
_NEW_SYMBOL = ("target_symbol", "ortholog_symbol", "new_symbol")
_SUPPORT = ("n_support", "support_count", "n_databases")
_TYPE = ("orthology_type", "homology_type", "ortholog_type")


def _ortholog_pairs(
    path: str | Path,
    name: str,
    to: str,
    known: dict[str, str],
    new: dict[str, str],
) -> pd.DataFrame:
    """Pairs of ids: columns known, new, support, one2one, symbol (the new gene's, as given).

    `known` and `new` map lower-case ids, and symbols that only one gene has, to ids. A gene that
    they do not hold keeps its name from the table behind a ``?``: it cannot share a token, but it
    can be a rival (the retired id of the true ortholog, say).
    """
    what = "orthologs table"
    table = read_table(path, what)
    if (species_column := first_column(table, ("species", "target_species"))) is not None:
        accepted = {name, name.replace("_", " "), *_ORTHOLOG_TABLE_NAMES.get(name, ())}
        if name in SPECIES:
            accepted.add(SPECIES[name].scientific.lower())
        present = table[species_column].str.lower()
        table = table[present.isin(accepted)]
        if table.empty:
            raise DataError(
                f"{what}: {path} has no row for species {name!r}; its column {species_column!r} "
                f"holds {', '.join(sorted(set(present)))}"
            )
    known_columns = _side_columns(table, to, _KNOWN_ID, _KNOWN_SYMBOL)
    new_columns = _side_columns(table, name, _NEW_ID, _NEW_SYMBOL)
    if not known_columns or not new_columns:
        known_columns, new_columns = _biomart_columns(table, known_columns, new_columns)
    if not known_columns or not new_columns:
        if table.shape[1] != 2:
            raise DataError(
                f"{what}: {path} has columns {', '.join(map(str, table.columns))}; need one with "
                f"ids or symbols of {to} ({to}_ensembl or {to}_symbol) and one of {name} "
                f"({name}_ensembl, target_ensembl or {name}_symbol), or two columns in all"
            )
        first, second = map(str, table.columns)
        forward = table[first].str.lower().isin(known).sum()
        backward = table[second].str.lower().isin(known).sum()
        known_columns, new_columns = (
            ([first], [second])
            if forward >= backward
            else (
                [second],
                [first],
            )
        )
    support_column = first_column(table, _SUPPORT)
    type_column = first_column(table, _TYPE) or next(
        (str(c) for c in table.columns if plain_column(str(c)).endswith(_TYPE)), None
    )
    support = pd.Series(1.0, index=table.index)
    if support_column is not None:
        support = pd.to_numeric(table[support_column], errors="coerce")
        if support.isna().any():
            raise DataError(
                f"{what}: {path} has {table[support_column][support.isna()].iloc[0]!r} in "
                f"{support_column}, expected numbers"
            )
    symbol_column = new_columns[-1]
    pairs = pd.DataFrame(
        {
            "known": _ids(table, known_columns, known),
            "new": _ids(table, new_columns, new),
            "support": support,
            "one2one": table[type_column].str.contains("one2one") if type_column else True,
            "symbol": table[symbol_column],
        }
    )
    pairs = pairs[(pairs["known"] != "?") & (pairs["new"] != "?")]
    if not _resolved(pairs).any():
        raise DataError(
            f"{what}: none of the {len(table):,} rows of {path} names both a {to} gene of the "
            f"vocabulary ({', '.join(known_columns)}: {', '.join(table[known_columns[0]][:3])}) and"
            f" a {name} gene of the genes table ({', '.join(new_columns)}: "
            f"{', '.join(table[new_columns[0]][:3])})"
        )
    return pairs


def _side_columns(
    table: pd.DataFrame, species: str, ids: tuple[str, ...], symbols: tuple[str, ...]
) -> list[str]:
    """Columns that name one side's genes, ids before symbols."""
    found = (
        first_column(
            table, (f"{species}_ensembl", f"{species}_id", f"{species}_gene_stable_id", *ids)
        ),
        first_column(table, (f"{species}_symbol", f"{species}_gene_name", *symbols)),
    )
    return [column for column in found if column is not None]


def _biomart_columns(
    table: pd.DataFrame, known: list[str], new: list[str]
) -> tuple[list[str], list[str]]:
    """Find the sides in a table of BioMart, whose own species bears no name in its columns.

    The web page writes "Gene stable ID" and "Zebrafish gene stable ID", R's biomaRt
    ensembl_gene_id and drerio_homolog_ensembl_gene.
    """
    ids, symbols = ("gene_stable_id", "ensembl_gene_id"), ("gene_name", "external_gene_name")
    own = [c for c in (first_column(table, ids), first_column(table, symbols)) if c is not None]
    ends = (
        ("_gene_stable_id", "_homolog_ensembl_gene"),
        ("_gene_name", "_homolog_associated_gene_name"),
    )
    other = [
        str(c)
        for side in ends
        for c in table.columns
        if plain_column(str(c)).endswith(side)
        and str(c) not in own
        and not plain_column(str(c)).startswith("external")
    ]
    if own and known:
        return known, [c for c in own if c not in known]
    if own and (new or other):
        return own, new or other
    return known, new


def _ids(table: pd.DataFrame, columns: list[str], known: dict[str, str]) -> pd.Series:
    """Id of each row, from the first column whose entry is known; ``?name`` where none is."""
    result = table[columns[0]].str.lower().map(known)
    for column in columns[1:]:
        result = result.fillna(table[column].str.lower().map(known))
    return result.fillna("?" + table[columns[0]])


def _resolved(pairs: pd.DataFrame) -> npt.NDArray[np.bool_]:
    """Rows of which both genes are known."""
    unknown = pairs["known"].str.startswith("?") | pairs["new"].str.startswith("?")
    return ~unknown.to_numpy(dtype=bool)


def _names_of(ids: list[str], symbols: list[str]) -> dict[str, str]:
    """Lower-case ids and unshared symbols -> id."""
    count = pd.Series(symbols, dtype=object).str.lower().value_counts()
    unshared = set(count.index[count == 1])
    names = {s.lower(): g for g, s in zip(ids, symbols, strict=True) if s.lower() in unshared}
    return names | {gene.lower(): gene for gene in ids}


def _with_aliases(table: pd.DataFrame, pairs: pd.DataFrame) -> list[str]:
    """Aliases of the genes table, and the symbols by which the orthologs table knows its genes."""
    current = {s.lower() for s in (*table["symbol"], *table["ensembl_id"])}
    further: dict[str, list[str]] = {}
    for gene, symbol in sorted(set(zip(pairs["new"], pairs["symbol"], strict=True))):
        if symbol.strip("-") and "|" not in symbol and symbol.lower() not in current:
            further.setdefault(gene, []).append(symbol)
    return [
        "|".join(dict.fromkeys([*filter(None, given.split("|")), *further.get(gene, ())]))
        for gene, given in zip(table["ensembl_id"], table["aliases"], strict=True)
    ]


def extend(
    vocabulary: "GeneVocabulary", name: str, genes: str | Path, orthologs: str | Path, to: str
) -> tuple["GeneVocabulary", SpeciesReport]:
    """Do the work of :func:`~genemodel.genes.add_species`, without writing."""
    name = checked_species_name(name)
    if name in vocabulary.species:
        raise DataError(
            f"species {name!r} is in the vocabulary already ({', '.join(vocabulary.species)})"
        )
    to = vocabulary.species[vocabulary.species_code(to)]
    table, listed = _genes_table(genes)
    known_rows = vocabulary.species_rows(to)
    known_ids = [str(g) for g in known_rows["ensembl_id"]]
    token_of = dict(zip(known_ids, map(int, known_rows["token"]), strict=True))
    taken = set(vocabulary.genes["ensembl_id"]) & set(table["ensembl_id"])
    if taken:
        raise DataError(
            f"genes table: {genes} holds {min(taken)}, a gene of another species of the vocabulary;"
            f" give the table of {name}"
        )
    pairs = _ortholog_pairs(
        orthologs,
        name,
        to,
        _names_of(known_ids, [str(s) for s in known_rows["symbol"]]),
        _names_of(table["ensembl_id"].tolist(), table["symbol"].tolist()),
    )
    kept = one_to_one(pairs)
    kept = kept[_resolved(kept)]
    declared = set(pairs.loc[pairs["one2one"], ["known", "new"]].itertuples(index=False, name=None))
    shared = {n: k for k, n, _ in kept.itertuples(index=False) if (k, n) in declared}
    token = np.array([token_of[shared[g]] if g in shared else -1 for g in table["ensembl_id"]])
    own = token < 0
    token[own] = len(vocabulary) + np.arange(int(own.sum()))
    aliases = _with_aliases(table, pairs)
    table = table.assign(token=token, species=name, aliases=aliases).sort_values("token")
    extended = type(vocabulary)(
        pd.concat([vocabulary.genes, table[list(COLUMNS)]], ignore_index=True),
        provenance={
            **vocabulary.provenance,
            name: f"{Path(genes).name} and {Path(orthologs).name}, orthologs of {to}",
        },
        where=f"vocabulary with {name}",
    )
    with_orthologs = len(set(pairs["new"][_resolved(pairs)]))
    report = SpeciesReport(
        species=name,
        to=to,
        genes_in_table=listed,
        genes_kept=len(table),
        shared=len(shared),
        own=int(own.sum()),
        dropped_one_to_many=with_orthologs - len(shared),
        unmapped=len(table) - with_orthologs,
        tokens_before=len(vocabulary),
        tokens_after=len(extended),
    )
    log.info("%s", report)
    return extended, report


def ortholog_means(
    vocabulary: "GeneVocabulary", species: str, orthologs: str | Path, to: str
) -> sp.csr_matrix:
    """Weights with which tokens of `to` make up those of another species: means of orthologs.

    A gene with several credible orthologs (at least half the support of its best one) is the mean
    of all of them; how often `to`'s gene is itself duplicated plays no part, so every copy of a
    duplicated gene is that gene again. Tokens that the two species share are left out: they are
    the same gene.

    Parameters
    ----------
    vocabulary
        Holds both species.
    species, to
        Whose genes are wanted, and of which they are made up.
    orthologs
        Table of pairs, as :func:`~genemodel.genes.add_species` takes it.

    Returns
    -------
    scipy.sparse.csr_matrix
        (V, V) float32; rows of tokens with orthologs sum to 1, all others are empty.

    Raises
    ------
    DataError
        The table cannot be read, or names no gene of either.
    """
    species, to = (vocabulary.species[vocabulary.species_code(s)] for s in (species, to))
    sides = {name: vocabulary.species_rows(name) for name in (species, to)}
    ids = {name: [str(g) for g in rows["ensembl_id"]] for name, rows in sides.items()}
    names = {
        name: _names_of(ids[name], [str(s) for s in rows["symbol"]]) for name, rows in sides.items()
    }
    token_of = {
        name: dict(zip(ids[name], map(int, rows["token"]), strict=True))
        for name, rows in sides.items()
    }
    pairs = _ortholog_pairs(orthologs, species, to, names[to], names[species])
    pairs = pairs[_resolved(pairs)]
    pairs = pairs.groupby(["known", "new"], as_index=False, sort=True)["support"].max()
    best = pairs.groupby("new")["support"].transform("max")
    pairs = pairs[pairs["support"] >= RIVAL_SHARE * best]
    row = pairs["new"].map(token_of[species]).to_numpy(np.int64)
    column = pairs["known"].map(token_of[to]).to_numpy(np.int64)
    own = ~np.isin(row, list(token_of[to].values()))
    row, column = row[own], column[own]
    share = 1 / np.bincount(row, minlength=len(vocabulary))[row]
    size = len(vocabulary)
    return sp.csr_matrix((share.astype(np.float32), (row, column)), shape=(size, size))
