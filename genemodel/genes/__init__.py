"""Genes, species and tokens: what a column of a count matrix means to the model."""

from genemodel.genes.match import GeneMatch
from genemodel.genes.medians import NonzeroMedians
from genemodel.genes.species import SPECIES, Species
from genemodel.genes.vocabulary import CELL, MASK, N_SPECIAL, PAD, GeneVocabulary

__all__ = [
    "CELL",
    "MASK",
    "N_SPECIAL",
    "PAD",
    "SPECIES",
    "GeneMatch",
    "GeneVocabulary",
    "NonzeroMedians",
    "Species",
]
