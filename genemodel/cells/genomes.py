"""The genomes that a reference is made of, as its gene table names them, and their species.

Cell Ranger, and what scanpy makes of its files, names a genome for each gene in a column; matrix
folders and older files write it before each gene name (``GRCh38_TP53``, ``mm10___Trp53``).
"""

import pandas as pd

from genemodel.errors import DataError
from genemodel.genes.recognition import some_of
from genemodel.genes.species import ASSEMBLY_PREFIX, SPECIES, species_name

GENOME = "genome"
# Texts of the column of features that are of no genome: antibodies, tags.
_NONE = ("", "nan", "none", "na")
# One name of a few hundred may begin like an assembly; of a reference of several all do.
_MANY = 0.5


def genome_of(genes: pd.DataFrame) -> pd.Series | None:
    """Name the genome of every gene, missing where it has none; None where nothing is said."""
    if list(genes.columns).count(GENOME) == 1:
        names = genes[GENOME].astype(object)
        known = names.notna() & ~names.astype(str).str.strip().str.lower().isin(_NONE)
        return names.astype(str).where(known) if known.any() else None
    some = some_of(genes.index)
    if not some or sum(bool(ASSEMBLY_PREFIX.match(n)) for n in some) <= _MANY * len(some):
        return None
    found = [ASSEMBLY_PREFIX.match(str(name)) for name in genes.index]
    return pd.Series([f[1] if f else None for f in found], index=genes.index, dtype=object)


def species_of_genomes(genes: pd.DataFrame, genome: str | None = None) -> dict[str, list[str]]:
    """Species -> the genomes of it that a gene table names, or of ``genome`` alone.

    Empty where it names none, or one whose species nobody knows.
    """
    names = genome_of(genes) if genome is None else pd.Series([genome])
    if names is None:
        return {}
    found: dict[str, list[str]] = {}
    for name in sorted(names.dropna().unique()):
        found.setdefault(species_name(name), []).append(str(name))
    return found if set(found) <= set(SPECIES) else {}


def only_species(genes: pd.DataFrame, genome: str | None, where: str) -> str | None:
    """Species of which all genes are, where their genomes say so; None where they do not.

    Raises
    ------
    DataError
        They are of several: cells of which one is meant must be said.
    """
    found = species_of_genomes(genes, genome)
    if len(found) > 1:
        genomes = ", ".join(name for names in found.values() for name in names)
        first = next(iter(found.values()))[0]
        raise DataError(
            f"{where}: its genes are of {len(found)} species ({genomes}), and nothing says of "
            f"which one a cell is. Set genome={first} (or another) to take the genes of one, and "
            "leave the cells of others out; or species=obs:COLUMN with an obs column that says it"
        )
    return next(iter(found), None)
