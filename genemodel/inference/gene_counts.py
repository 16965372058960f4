"""Counts of an AnnData with the names of their columns: own gene names, or tokens of a vocabulary.

Axes: C cells, F width of a model's cell vectors, G columns, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.cells.contract import find_counts, refuse_numbers
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.source import CHUNK_CELLS
from genemodel.cells.sources import open_source
from genemodel.errors import DataError
from genemodel.genes.match import written_as_others
from genemodel.genes.recognition import without_appended
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.cell_vectors import embedder
from genemodel.inference.counts import VocabularyCells, refuse_unknown_species
from genemodel.inference.progress import Progress

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

MIN_SHARE = 0.3
"""Least share of the genes that a model reads for which it is applied to other cells."""


@dataclass(frozen=True)
class GeneOrder:
    """How the columns of other cells come in the order in which a trained model reads them.

    Attributes
    ----------
    onto_GW
        Of the data's columns (G) those that the model has, at their places among its genes (W).
    there_W
        Which of the model's genes the data measured.
    """

    onto_GW: sp.csr_matrix
    there_W: np.ndarray

    def apply(self, counts_CG: sp.csr_matrix) -> sp.csr_matrix:
        """Give counts (C, W), an empty column for a gene that was not measured."""
        ordered_CW = (counts_CG @ self.onto_GW.astype(counts_CG.dtype)).tocsr()
        ordered_CW.sort_indices()  # the order of a sum decides its last bit
        return ordered_CW


def gene_order(
    genes: Sequence[str],
    wanted: Sequence[str],
    measured_G: np.ndarray | None = None,
    *,
    read_W: np.ndarray | None = None,
    where: str,
    remedy: str,
) -> GeneOrder:
    """Find the genes of a trained model among those of other cells.

    Parameters
    ----------
    genes
        Names of the columns of the cells; those of one name are summed.
    wanted
        The model's W genes.
    measured_G
        Columns that were measured; all if omitted.
    read_W
        Rows of `wanted` that the model really reads; all if omitted.
    where, remedy
        Name of the data and what helps, for the message.

    Raises
    ------
    DataError
        If fewer than `MIN_SHARE` of the genes that the model reads are there.
    """
    place = {name: number for number, name in enumerate(wanted)}
    at_G = np.array([place.get(name, -1) for name in genes], np.int64)
    if measured_G is not None:
        at_G = np.where(measured_G, at_G, -1)
    column_N = np.flatnonzero(at_G >= 0)
    there_W = np.zeros(len(wanted), bool)
    there_W[at_G[column_N]] = True
    read_N = np.arange(len(wanted)) if read_W is None else read_W
    found = int(there_W[read_N].sum())
    if found < MIN_SHARE * len(read_N):
        raise DataError(
            f"{where}: only {found:,} of the {len(read_N):,} genes that the model reads are there "
            f"(the model's: {', '.join(wanted[:3])}; here: {', '.join(genes[:3])}). {remedy}"
        )
    if found < len(read_N):
        logger.info(
            "%s: %s of the %s genes that the model reads were not measured.",
            where, f"{len(read_N) - found:,}", f"{len(read_N):,}",
        )  # fmt: skip
    onto_GW = sp.csr_matrix(
        (np.ones(column_N.size, np.float32), (column_N, at_G[column_N])), (len(genes), len(wanted))
    )
    return GeneOrder(onto_GW, there_W)


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
    species_C
        Species code of every cell in the vocabulary; None for own gene names.
    """

    counts_CG: sp.csr_matrix
    genes: list[str]
    measured_G: np.ndarray
    features_CF: np.ndarray | None = None
    species_C: np.ndarray | None = None

    def seen(self) -> np.ndarray:
        """Columns with at least one count, ascending."""
        return np.flatnonzero(self.counts_CG.getnnz(0) > 0)

    def over(self, vocabulary: GeneVocabulary) -> sp.csr_matrix:
        """Put the columns, which are tokens, back in their places among all of a vocabulary."""
        token_G = np.array([int(name) for name in self.genes], np.int64)
        csr = sp.csr_matrix(self.counts_CG)
        return sp.csr_matrix(
            (csr.data, token_G[csr.indices], csr.indptr), (csr.shape[0], len(vocabulary))
        )

    def only(self, column_G: np.ndarray) -> "GeneCounts":
        """Return these columns alone."""
        return GeneCounts(
            self.counts_CG[:, column_G],
            [self.genes[column] for column in column_G],
            self.measured_G[column_G],
            self.features_CF,
            self.species_C,
        )


def read_counts(
    adata: "AnnData",
    *,
    bundle: Bundle | None,
    vocabulary: GeneVocabulary | None,
    reading: InputSettings,
    features: bool = True,
) -> GeneCounts:
    """Read proven counts in the columns that an integration works on.

    With a bundle the columns are its vocabulary and every cell gets its vector, unless no
    ``features`` are asked for; with a vocabulary alone they are that vocabulary, so that orthologs
    of two species share a column; with neither they are the genes of the data.
    """
    if bundle is not None:
        return _with_bundle(adata, bundle, reading, features=features)
    if vocabulary is not None:
        return _with_vocabulary(adata, vocabulary, reading)
    counts = find_counts(adata, **reading.counting())
    refuse_numbers(counts.genes, "adata")
    blocks = [
        counts.read(start, min(start + CHUNK_CELLS, counts.shape[0]))
        for start in range(0, counts.shape[0], CHUNK_CELLS)
    ]
    # What scanpy calls GENE-1 is a second row of GENE.
    names = without_appended([str(name) for name in counts.genes.index])
    stacked_CG = sp.vstack(blocks, format="csr") if blocks else sp.csr_matrix(counts.shape)
    stacked_CG, unique = summed_by_name(stacked_CG, names)
    return GeneCounts(stacked_CG, unique, np.ones(len(unique), bool))


def summed_by_name(
    counts_CG: sp.csr_matrix, names: Sequence[str]
) -> tuple[sp.csr_matrix, list[str]]:
    """Sum the columns of one name; names come in the order in which they are met."""
    code_G, unique = pd.factorize(np.array(names, dtype=object))
    if len(unique) < len(names):
        logger.info("%d gene names occur more than once: summed.", len(names) - len(unique))
        onto = sp.csr_matrix(
            (np.ones(len(names), counts_CG.dtype), (np.arange(len(names)), code_G))
        )
        counts_CG = (counts_CG @ onto).tocsr()
    return counts_CG, [str(name) for name in unique]


def _with_bundle(
    adata: "AnnData", bundle: Bundle, reading: InputSettings, *, features: bool
) -> GeneCounts:
    cells = VocabularyCells(adata, bundle, reading)
    blocks, vectors = [], []
    if features:
        with Progress("embed", len(cells)) as progress:
            for chunk, vectors_CF in embedder(bundle).over(cells.chunks(), progress.add):
                blocks.append(chunk.counts_CV)
                vectors.append(vectors_CF)
    else:
        blocks = [chunk.counts_CV for chunk in cells.chunks()]
    return GeneCounts(
        sp.vstack(blocks, format="csr"),
        [str(token) for token in range(len(bundle.vocabulary))],
        cells.measured_SV.any(0),
        np.concatenate(vectors) if features else None,
        cells.species_C,
    )


def _with_vocabulary(
    adata: "AnnData", vocabulary: GeneVocabulary, reading: InputSettings
) -> GeneCounts:
    source = open_source(adata, **reading.opening())
    species_C = source.obs["species"].astype(object).to_numpy()
    refuse_unknown_species(
        {str(name) for name in species_C},
        vocabulary.species,
        reading.species,
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
            match = vocabulary.match(
                source.genes.iloc[own_G], species=name, column=source.column,
                min_fraction=reading.min_fraction,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{source.where}: {error}") from error
        logger.info("%s: %s", source.where, match.summary())
        parts.append(match.project(counts_CG[:, own_G]))
        measured_V |= match.measured_V
    stacked_CV = sp.vstack(parts, format="csr")[np.argsort(np.concatenate(rows))]
    return GeneCounts(
        stacked_CV,
        [str(token) for token in range(len(vocabulary))],
        measured_V,
        species_C=np.array([vocabulary.species.index(name) for name in species_C], np.int64),
    )
