"""From any source of cells to their counts over a model's vocabulary, in bounded memory.

Axes: C cells, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch

from genemodel.batches.window import Window
from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.source import Source
from genemodel.cells.sources import open_source
from genemodel.corpus.corpus import Corpus
from genemodel.errors import DataError
from genemodel.genes.match import GeneMatch
from genemodel.model.devices import calculates_in_half
from genemodel.settings import nearest, some

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

CHUNK_CELLS = 8192
# Cells whose vectors are written as one file and, after an interruption, made again: some seconds
# of a GPU or minutes of a CPU; 10⁸ cells make 6,104 files. No chunk crosses the border between two
# shards, so a shard comes out the same whoever computes it, and after whatever.
SHARD_CELLS = 2 * CHUNK_CELLS


@dataclass(frozen=True)
class VocabularyChunk:
    """Consecutive cells of a source in vocabulary order.

    Attributes
    ----------
    start
        Row of the first cell in the source.
    counts_CV
        Raw counts, CSR.
    species_C
        Species code of every cell.
    library_C
        Counts over the vocabulary; 0 for a cell without any known gene.
    total_C
        Counts over all genes of the source, where they are known; by default ``library_C``.
    """

    start: int
    counts_CV: sp.csr_matrix
    species_C: np.ndarray
    library_C: np.ndarray
    total_C: np.ndarray | None = None


class VocabularyCells:
    """A source opened for a model: proven counts, matched genes, cells in input order.

    Parameters
    ----------
    data
        AnnData in memory or backed, a path, or an open source.
    bundle
        The model whose vocabulary counts.
    reading
        How the cells are read. An open source has been, but for ``min_fraction``.
    """

    def __init__(
        self,
        data: "str | Path | AnnData | Source",
        bundle: Bundle,
        reading: InputSettings | None = None,
    ) -> None:
        reading = reading or InputSettings()
        if reading.species is None and len(bundle.species) == 1:
            reading = reading.but(species=bundle.species[0])
        species = reading.species
        self.bundle = bundle
        self.source = open_source(data, **reading.opening())
        names = self.source.obs["species"].astype(object).to_numpy()
        refuse_unknown_species(
            {str(n) for n in names}, bundle.species, species, self.source.where, "the model"
        )
        self.species_C = np.array([bundle.species.index(n) for n in names], np.int64)
        here = [int(s) for s in np.unique(self.species_C)]
        among = [bundle.species[s] for s in here]
        self.matches: dict[int, GeneMatch] = {}
        try:
            for s in here:
                self.matches[s] = bundle.vocabulary.match(
                    self.source.genes, species=bundle.species[s], among=among,
                    column=self.source.column, min_fraction=reading.min_fraction,
                )  # fmt: skip
        except DataError as error:
            raise DataError(f"{self.source.where}: {error}") from error
        for match in self.matches.values():
            logger.info("%s: %s", self.source.where, match.summary())

    def __len__(self) -> int:
        return self.source.n_cells

    def tokens_beside(self, n_genes: int, what: str) -> np.ndarray:
        """Token of every gene of an AnnData, −1 for none; refuses other genes than its own."""
        token_G = np.full(len(self.source.genes), -1, np.int64)
        for match in self.matches.values():
            token_G = np.where(token_G < 0, match.token_G, token_G)
        if len(token_G) != n_genes:
            raise DataError(
                f"adata has {n_genes:,} genes, and the counts that were read {len(token_G):,} "
                f"(layer=raw): {what}. Give adata.raw.to_adata()."
            )
        return token_G

    @property
    def measured_SV(self) -> np.ndarray:
        """Which genes this source measured, by species code, bool (S, V)."""
        measured = np.zeros((len(self.bundle.species), len(self.bundle.vocabulary)), bool)
        for s, match in self.matches.items():
            measured[s] = match.measured_V
        return measured

    def chunks(
        self, chunk_cells: int = CHUNK_CELLS, *, start: int = 0, stop: int | None = None
    ) -> Iterator[VocabularyChunk]:
        """Yield the cells of these rows in order; no chunk crosses a border of ``SHARD_CELLS``."""
        for at, counts_CG in self.blocks(chunk_cells, start=start, stop=stop):
            yield self.over_vocabulary(at, counts_CG)

    def blocks(
        self, chunk_cells: int = CHUNK_CELLS, *, start: int = 0, stop: int | None = None
    ) -> Iterator[tuple[int, sp.csr_matrix]]:
        """Yield the same cells by the source's own genes: row of the first, and counts."""
        return blocks_of(self.source, chunk_cells, start=start, stop=stop)

    def over_vocabulary(self, start: int, counts_CG: sp.csr_matrix) -> VocabularyChunk:
        """Bring counts of cells from row ``start`` on in the order of the vocabulary."""
        species_C = self.species_C[start : start + counts_CG.shape[0]]
        here = np.unique(species_C)
        if here.size == 1:
            counts_CV = self.matches[int(here[0])].project(counts_CG)
        else:
            parts = [(np.flatnonzero(species_C == s), self.matches[int(s)]) for s in here]
            stacked = sp.vstack(
                [match.project(counts_CG[rows]) for rows, match in parts], format="csr"
            )
            counts_CV = stacked[np.argsort(np.concatenate([rows for rows, _ in parts]))]
        library_C = np.asarray(counts_CV.sum(1)).ravel().astype(np.float32)
        total_C = np.asarray(counts_CG.sum(1, dtype=np.float64)).ravel()
        return VocabularyChunk(start, counts_CV, species_C, library_C, total_C)

    def close(self) -> None:
        """Close the file."""
        self.source.close()


def blocks_of(
    source: Source, chunk_cells: int = CHUNK_CELLS, *, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, sp.csr_matrix]]:
    """Yield the counts of cells in order, and the row of the first of each block.

    No block crosses a border of ``SHARD_CELLS``.
    """
    stop = source.n_cells if stop is None else stop
    while start < stop:
        most = min(chunk_cells, stop - start, SHARD_CELLS - start % SHARD_CELLS)
        end = source.counts.rows.stop_of(start, most)
        yield start, source.counts.read(start, end)
        start = end


def corpus_chunks(
    corpus: Corpus, cells: np.ndarray, bundle: Bundle, chunk_cells: int = CHUNK_CELLS
) -> Iterator[VocabularyChunk]:
    """Yield cells of a corpus, ascending permanent numbers, as chunks of a source."""
    code_N, names = corpus.codes("species")
    position_S = np.array([bundle.species.index(name) for name in names])
    for start in range(0, cells.size, chunk_cells):
        here = cells[start : start + chunk_cells]
        runs = np.split(here, np.flatnonzero(np.diff(here) > 1) + 1)
        parts = [
            corpus.read(int(run[0]), int(run[-1]) + 1).to_csr(len(corpus.vocabulary))
            for run in runs
        ]
        counts_CV = sp.vstack(parts, format="csr").astype(np.float32)
        library_C = np.asarray(counts_CV.sum(1)).ravel().astype(np.float32)
        yield VocabularyChunk(start, counts_CV, position_S[code_N[here]], library_C)


def refuse_unknown_species(
    found: set[str], known: Sequence[str], species: str | None, where: str, who: str
) -> None:
    """Refuse species that a model or vocabulary lacks, with where they were said to be."""
    unknown = sorted(found - set(known))
    if not unknown:
        return
    if unknown == ["nan"]:
        column = "species" if species is None else species.removeprefix("obs:")
        raise DataError(
            f"{where}: some cells have no species in obs[{column!r}]. Fill the column, or leave "
            "those cells out."
        )
    if species is not None and not species.startswith("obs:"):
        near = nearest(unknown[0], known)
        raise DataError(
            f"{where}: species={species}, but {who} knows {', '.join(known)}"
            + (f": did you mean species={near}?" if near else ".")
        )
    column = "species" if species is None else species.removeprefix("obs:")
    raise DataError(
        f"{where}: obs[{column!r}] holds the species {some(unknown, 5)}, but {who} knows "
        f"{', '.join(known)}. Leave those cells out, use a model trained with them, or name the "
        "right column with species=obs:COLUMN."
    )


def window_of(chunk: VocabularyChunk) -> Window:
    """View a chunk as a window that can be packed; unknown technical batch and panel."""
    n = chunk.counts_CV.shape[0]
    indptr = chunk.counts_CV.indptr.astype(np.int64)
    unknown = np.full(n, -1, np.int64)
    return Window(
        begin_C=indptr[:-1],
        end_C=indptr[1:],
        gene_N=chunk.counts_CV.indices.astype(np.int32),
        count_N=chunk.counts_CV.data.astype(np.float32),
        library_C=chunk.library_C,
        species_C=chunk.species_C,
        batch_C=unknown,
        panel_C=unknown,
        cell_C=np.arange(chunk.start, chunk.start + n),
        total_C=chunk.library_C if chunk.total_C is None else chunk.total_C,
    )


def precision(device: torch.device) -> torch.autocast:
    """bf16 on GPUs that calculate in it, full precision elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=calculates_in_half(device))
