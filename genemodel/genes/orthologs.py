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
import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.species import SPECIES, checked_species_name
from genemodel.genes.tables import first_column, read_table, required_column

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
    return best[keep].reset_index(drop=True)


def _genes_table(path: str | Path) -> tuple[pd.DataFrame, int]:
    """Genes of kept biotypes (columns ensembl_id, symbol, biotype) and how many were listed."""
    from genemodel.genes.vocabulary import kept_biotype

    what = "genes table"
    table = read_table(path, what)
    id_column = required_column(
        table, ("ensembl_id", "gene_id", "gene_stable_id", "feature_id", "id"), what=what, path=path
    )
    symbol_column = first_column(
        table, ("symbol", "gene_symbol", "gene_name", "name", "external_gene_name")
    )
    biotype_column = first_column(table, ("biotype", "gene_biotype", "gene_type", "type"))
    empty = pd.Series([""] * len(table), dtype=object)
    genes = pd.DataFrame(
        {
            "ensembl_id": table[id_column].str.strip(),
            "symbol": table[symbol_column].str.strip() if symbol_column else empty,
            "biotype": table[biotype_column].str.strip() if biotype_column else empty,
        }
    )
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
