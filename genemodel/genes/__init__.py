"""Genes, species and tokens: what a column of a count matrix means to the model."""

from genemodel.genes.foreign import ForeignTokens
from genemodel.genes.match import GeneMatch
from genemodel.genes.medians import NonzeroMedians
from genemodel.genes.orthologs import SpeciesReport
from genemodel.genes.species import SPECIES, Species, species_name
from genemodel.genes.vocabulary import CELL, MASK, N_SPECIAL, PAD, GeneVocabulary, add_species

__all__ = [
    "CELL",
    "MASK",
    "N_SPECIAL",
    "PAD",
    "SPECIES",
    "ForeignTokens",
    "GeneMatch",
    "GeneVocabulary",
    "NonzeroMedians",
    "Species",
    "SpeciesReport",
    "add_species",
    "species_name",
]
