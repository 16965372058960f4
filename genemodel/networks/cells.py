"""The cells and genes of a network, with a model or without one.

Axes: C cells, V vocabulary, S sources (transcription factors), T targets.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import pack, rank_scale
from genemodel.batches.packing import plan_bins
from genemodel.batches.window import Window
from genemodel.bundle.bundle import Bundle
from genemodel.cells.annotations import annotations_of
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.sources import open_source
from genemodel.errors import ConfigError, DataError
from genemodel.expression.normalise import log_normalised
from genemodel.expression.variable_genes import select_genes
from genemodel.genes.vocabulary import N_SPECIAL, GeneVocabulary
from genemodel.inference.counts import VocabularyChunk, blocks_of, refuse_unknown_species, window_of
from genemodel.perturbation.genes import GeneNames
from genemodel.settings import some

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkCells:
    """Cells of one species over a vocabulary, those without a known gene left out.

    Attributes
    ----------
    chunk
        Their counts.
    row_C
        Row of each in the data.
    obs
        Annotations, row for row.
    measured_V
        Genes that the data measured.
    names
        Of genes, in the species.
    species
        Of the cells.
    where
        Names the data in messages.
    shown_V
        Genes that a model is shown; None for all.
    """

    chunk: VocabularyChunk
    row_C: np.ndarray
    obs: pd.DataFrame
    measured_V: np.ndarray
    names: GeneNames
    species: str
    where: str
    shown_V: np.ndarray | None = None

    def __len__(self) -> int:
        return self.row_C.size

    def take(self, rows: np.ndarray) -> "NetworkCells":
        """Take some of the cells."""
        chunk, total_C = self.chunk, self.chunk.total_C
        part = VocabularyChunk(
            0, chunk.counts_CV[rows], chunk.species_C[rows], chunk.library_C[rows],
            None if total_C is None else total_C[rows],
        )  # fmt: skip
        return replace(self, chunk=part, row_C=self.row_C[rows], obs=self.obs.iloc[rows])

    @property
    def window(self) -> Window:
        """The cells as they are packed; libraries are of all genes."""
        window = window_of(self.chunk)
        return window if self.shown_V is None else window.only(self.shown_V)

    def showing(self, tokens: np.ndarray) -> "NetworkCells":
        """Return the same with nothing but these genes for a model to see."""
        shown_V = np.zeros(self.measured_V.size, bool)
        shown_V[tokens] = True
        return replace(self, shown_V=shown_V)

    def held_V(self) -> np.ndarray:
        """How many cells hold each gene, (V,)."""
        return np.bincount(
            self.chunk.counts_CV.indices[self.chunk.counts_CV.data > 0],
            minlength=self.measured_V.size,
        )

    def values(self, tokens: np.ndarray) -> np.ndarray:
        """log(1 + counts per 10⁴) of some genes, dense float32 (C, len(tokens))."""
        counts = self.chunk.counts_CV[:, tokens]
        return np.asarray(log_normalised(counts, self.chunk.library_C).todense(), np.float32)

    def log_means(self, tokens: np.ndarray) -> np.ndarray:
        """Mean of the values of some genes."""
        counts = self.chunk.counts_CV[:, tokens]
        return np.asarray(log_normalised(counts, self.chunk.library_C).mean(0)).ravel()


def read_network_cells(
    data: "str | Path | AnnData",
    vocabulary: GeneVocabulary,
    reading: InputSettings,
    *,
    max_cells: int,
    seed: int,
    who: str,
) -> NetworkCells:
    """Read cells, or a sample of them.

    Parameters
    ----------
    data
        A path, or an AnnData.
    vocabulary
        Of the model, or the built-in one.
    reading
        How cells are read.
    max_cells
        Most cells; 0 for all.
    seed
        Of the sample.
    who
        Whose vocabulary it is, for messages.

    Raises
    ------
    ConfigError
        There are several species.
    DataError
        The species is unknown, or no cell holds a known gene.
    """
    if reading.species is None and len(vocabulary.species) == 1:
        reading = reading.but(species=vocabulary.species[0])
    with open_source(data, **reading.opening()) as source:
        found = {str(name) for name in source.obs["species"].astype(object)}
        refuse_unknown_species(found, vocabulary.species, reading.species, source.where, who)
        if len(found) > 1:
            raise ConfigError(
                f"{source.where}: holds {', '.join(sorted(found))}, whose genes are other tokens "
                "in each: give the cells of one species."
            )
        (species,) = found
        try:
            match = vocabulary.match(
                source.genes, species=species, column=source.column,
                min_fraction=reading.min_fraction,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{source.where}: {error}") from error
        n = source.n_cells
        chosen = np.arange(n)
        if max_cells and n > max_cells:
            chosen = np.sort(np.random.default_rng(seed).choice(n, max_cells, replace=False))
        parts, totals = [], []
        for start, counts_CG in blocks_of(source):
            a, b = np.searchsorted(chosen, [start, start + counts_CG.shape[0]])
            if b > a:
                here_CG = counts_CG[chosen[a:b] - start]
                totals.append(np.asarray(here_CG.sum(1, dtype=np.float64)).ravel())
                parts.append(match.project(here_CG))
        obs = annotations_of(data, source, ("obs",))["obs"]
        where = source.where
    counts_CV = sp.csr_matrix(sp.vstack(parts, format="csr"), dtype=np.float32)
    counts_CV.sort_indices()
    library_C = np.asarray(counts_CV.sum(1)).ravel().astype(np.float32)
    kept = np.flatnonzero(library_C > 0)
    if not kept.size:
        raise DataError(f"{where}: no cell has counts of a gene that {who} knows.")
    code = vocabulary.species_code(species)
    chunk = VocabularyChunk(
        0, counts_CV[kept], np.full(kept.size, code, np.int64), library_C[kept],
        np.concatenate(totals)[kept],
    )  # fmt: skip
    return NetworkCells(
        chunk, chosen[kept], obs.iloc[chosen[kept]], match.measured_V,
        GeneNames(vocabulary, [species]), species, where,
    )  # fmt: skip


def batches(
    cells: NetworkCells, bundle: Bundle, rows: np.ndarray | None = None, batch_tokens: int = 0
) -> Iterator[CellBatch]:
    """Pack cells of like length together, on the host; without a tail."""
    window = cells.window
    rows = np.arange(len(window)) if rows is None else rows
    tokens = bundle.tokens
    scale_V = rank_scale(bundle.medians_V, tokens.style)
    budget = max(batch_tokens or tokens.budget, tokens.context)
    length = window.lengths_C(tokens)[rows]
    order = np.argsort(-length, kind="stable")
    for chosen in plan_bins(length[order], budget, tokens.max_cells):
        here = rows[order[chosen]]
        size = int(length[order[chosen]].sum())
        yield pack(window, here, scale_V, tokens, budget=size, max_cells=here.size)


@dataclass(frozen=True)
class Genes:
    """Which genes edges start from and lead to: tokens, ascending."""

    sources: np.ndarray
    targets: np.ndarray

    @property
    def together(self) -> np.ndarray:
        """All of them once."""
        return np.union1d(self.sources, self.targets)

    @property
    def no_loops_ST(self) -> np.ndarray:
        """Pairs of two genes, bool."""
        return self.sources[:, None] != self.targets[None, :]


def choose_genes(
    cells: NetworkCells,
    tfs: np.ndarray | None,
    *,
    n_genes: int,
    min_cells: int,
    min_coverage: float,
    say: Callable[[int], str],
) -> Genes:
    """Choose genes that enough cells hold.

    Parameters
    ----------
    cells
        The cells.
    tfs
        Tokens of transcription factors; None: every target.
    n_genes
        Targets, the most variable; sources are targets too.
    min_cells, min_coverage
        The floor.
    say
        Names settings for the refusal, given how many sources were asked for.

    Raises
    ------
    DataError
        No source, or no other gene, is above the floor.
    """
    held_V = cells.held_V()
    covered_V = (held_V >= max(min_cells, 1)) & (held_V >= min_coverage * len(cells))
    covered_V[:N_SPECIAL] = False
    covered = np.flatnonzero(covered_V)
    if covered.size < 2:
        raise DataError(
            f"{cells.where}: {covered.size} genes are held by min_cells={min_cells} and "
            f"min_coverage={min_coverage:g} of the {len(cells):,} cells: give more cells, or lower "
            "the floor."
        )
    variable = covered
    if covered.size > n_genes:
        counts = sp.csr_matrix(cells.chunk.counts_CV[:, covered])
        variable = covered[select_genes(counts, np.zeros(len(cells), np.int64), n_genes)]
    if tfs is None:
        return Genes(variable, variable)
    sources = np.unique(tfs[covered_V[tfs]])
    if not sources.size:
        raise DataError(
            f"{cells.where}: {say(tfs.size)}, and none is held by min_cells={min_cells} and "
            f"min_coverage={min_coverage:g} of the {len(cells):,} cells. Give others, more cells, "
            "or lower the floor."
        )
    lost = np.setdiff1d(tfs, sources)
    if lost.size:
        logger.info(
            "%s: %s of %s transcription factors are in too few cells and left out: %s.",
            cells.where, f"{lost.size:,}", f"{np.unique(tfs).size:,}",
            some([cells.names.symbol((int(t),)) for t in lost]),
        )  # fmt: skip
    return Genes(sources, np.union1d(variable, sources))
