"""Counts of an AnnData with the names of their columns: own gene names, or tokens of a vocabulary.

Axes: C cells, F width of a model's cell vectors, G columns, V vocabulary.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.cells.contract import find_counts
from genemodel.cells.sources import CHUNK_CELLS, open_source
from genemodel.errors import DataError
from genemodel.genes.match import written_as_others
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.counts import VocabularyCells, refuse_unknown_species
from genemodel.inference.embed import encode

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneCounts:
    """All cells of an AnnData in memory.

    Attributes
    ----------
    counts_CG
        Raw counts, CSR.
    genes
        Name of every column, none twice; of a vocabulary, the tokens' numbers as text.
    measured_G
        Columns that the data set measured.
    features_CF
        Cell vectors of a bundle; NaN for a cell without any gene of its vocabulary.
    """

    counts_CG: sp.csr_matrix
    genes: list[str]
    measured_G: np.ndarray
    features_CF: np.ndarray | None = None

    def seen(self) -> np.ndarray:
        """Columns with at least one count, ascending."""
        return np.flatnonzero(self.counts_CG.getnnz(0) > 0)

    def only(self, column_G: np.ndarray) -> "GeneCounts":
        """Return these columns alone."""
        return GeneCounts(
            self.counts_CG[:, column_G],
            [self.genes[column] for column in column_G],
            self.measured_G[column_G],
            self.features_CF,
        )


def read_counts(
    adata: "AnnData",
    *,
    bundle: Bundle | None,
    vocabulary: GeneVocabulary | None,
    layer: str | None,
    species: str | None,
) -> GeneCounts:
    """Read proven counts in the columns that an integration works on.

    With a bundle the columns are its vocabulary and every cell gets its vector; with a vocabulary
    alone they are that vocabulary, so that orthologs of two species share a column; with neither
    they are the genes of the data.
    """
    if bundle is not None:
        return _with_bundle(adata, bundle, layer, species)
    if vocabulary is not None:
        return _with_vocabulary(adata, vocabulary, layer, species)
    counts = find_counts(adata, layer=layer)
    blocks = [
        counts.read(start, min(start + CHUNK_CELLS, counts.shape[0]))
        for start in range(0, counts.shape[0], CHUNK_CELLS)
    ]
    names = [str(name) for name in counts.genes.index]
    stacked_CG = sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix(counts.shape)
    code_G, unique = pd.factorize(np.array(names, dtype=object))
    if len(unique) < len(names):
        logger.info("%d gene names occur more than once: summed.", len(names) - len(unique))
        onto = sp.csr_matrix((np.ones(len(names)), (np.arange(len(names)), code_G)))
        stacked_CG = (stacked_CG @ onto).tocsr()
    return GeneCounts(stacked_CG, [str(name) for name in unique], np.ones(len(unique), bool))


def _with_bundle(
    adata: "AnnData", bundle: Bundle, layer: str | None, species: str | None
) -> GeneCounts:
    cells = VocabularyCells(adata, bundle, layer=layer, species=species)
    blocks, features = [], []
    for chunk in cells.chunks():
        blocks.append(chunk.counts_CV)
        features.append(encode(chunk, bundle))
    return GeneCounts(
        sp.vstack(blocks, format="csr"),
        [str(token) for token in range(len(bundle.vocabulary))],
        cells.measured_SV.any(0),
        np.concatenate(features),
    )


def _with_vocabulary(
    adata: "AnnData", vocabulary: GeneVocabulary, layer: str | None, species: str | None
) -> GeneCounts:
    source = open_source(adata, layer=layer, species=species)
    species_C = source.obs["species"].astype(object).to_numpy()
    refuse_unknown_species(
        {str(name) for name in species_C},
        vocabulary.species,
        species,
        source.where,
        "the vocabulary",
    )
    parts, rows, measured_V = [], [], np.zeros(len(vocabulary), bool)
    all_CG = sp.vstack([chunk.counts_CG for chunk in source.chunks()], format="csr")
    for name in sorted(set(species_C)):
        rows.append(np.flatnonzero(species_C == name))
        counts_CG = all_CG[rows[-1]]
        # What has counts is kept: cells of a wrongly named species are refused by their names.
        foreign_G = written_as_others(
            vocabulary, source.genes.index, species=name, among=vocabulary.species
        )
        own_G = np.flatnonzero((counts_CG.getnnz(0) > 0) | ~foreign_G)
        try:
            match = vocabulary.match(source.genes.iloc[own_G], species=name)
        except DataError as error:
            raise DataError(f"{source.where}: {error}") from error
        logger.info("%s: %s", source.where, match.summary())
        parts.append(match.project(counts_CG[:, own_G]))
        measured_V |= match.measured_V
    stacked_CV = sp.vstack(parts, format="csr")[np.argsort(np.concatenate(rows))]
    return GeneCounts(stacked_CV, [str(token) for token in range(len(vocabulary))], measured_V)
