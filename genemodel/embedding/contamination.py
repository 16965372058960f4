"""How many of some cells were in a model's training, by the fingerprints that the model carries.

Axes: C cells asked about, Q fingerprints of each.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.kernels import PRINTS, fingerprints
from genemodel.cells.whole_file import read_anndata
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.gene_counts import gene_order, read_counts
from genemodel.integration.model import IntegratedModel
from genemodel.loading import TOLD, Model

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
_MOST_NAMED = 5
# A cell may have lost genes here, or there: its parts may have been half or twice as large.
_FINER = (-1, 0, 1)


@dataclass(frozen=True, eq=False, repr=False)
class Contamination:
    """Which of some cells a model was trained on.

    Attributes
    ----------
    found_C
        Whether a cell was in the training, bool (C,); None where the model keeps no fingerprints.
    n_cells
        Cells asked about that have enough genes to be told by, six of the model's or more.
    by_source
        Cells found in each source of the training that has any, most first.
    complete
        False where the model started from one without fingerprints: more may have been in training.
    by_chance
        Cells expected to be found although none was in the training.
    """

    found_C: np.ndarray | None
    n_cells: int
    by_source: dict[str, int]
    complete: bool
    by_chance: float

    @property
    def n_found(self) -> int | None:
        """Cells found; None where nobody knows."""
        return None if self.found_C is None else int(self.found_C.sum())

    def __repr__(self) -> str:
        return f"Contamination({self.text()})"

    def text(self) -> str:
        """Say it in a sentence without its full stop."""
        if self.n_found is None:
            return "unknown whether these cells were in its training: it keeps no fingerprints"
        share = f" ({100 * self.n_found / self.n_cells:.1f} %)" if self.n_found else ""
        said = f"{self.n_found:,} of {self.n_cells:,} cells{share} were in its training"
        if self.by_source:
            first = list(self.by_source.items())[:_MOST_NAMED]
            more = len(self.by_source) - len(first)
            said += ": " + ", ".join(f"{n:,} in {name}" for name, n in first)
            said += f" and {more} more sources" if more else ""
        if not self.complete:
            said = f"at least {said}; what its start was trained on is unknown"
        return said

    def values(self) -> dict[str, Any]:
        """Plain values that an h5ad can hold."""
        return {
            "in_training": UNKNOWN if self.n_found is None else self.n_found,
            "cells": self.n_cells,
            "sources": list(self.by_source),
            "in_source": list(self.by_source.values()),
            "complete": self.complete,
        }


@reads_cells
def contamination(
    adata: "AnnData | str | Path",
    model: Model | str | Path,
    **options: Unpack[InputOptions],
) -> Contamination:
    """Tell which cells a model has been trained on.

    Parameters
    ----------
    adata
        Raw counts, or the path of a file of them.
    model
        From :func:`genemodel.load`, or the path of its folder. Of a head both are asked: the cells
        that it was trained on, and those of the pre-trained model beneath or before it.
    **options
        How the cells are read.

    Returns
    -------
    Contamination
        With ``found_C``, ``n_found`` and ``by_source``.

    Notes
    -----
    A cell is known by its raw counts in three parts of the vocabulary, of some 12 to 24 of its
    genes each, and found where one of them is as it was: whatever the order of the genes, the names
    they go by and the format of the file, and mostly where a few per cent of its genes are missing.
    Aligned anew, thinned, or cut down to variable genes it is another cell: nothing found is no
    proof that nothing was there. A head without a vocabulary knows cells by the gene names in its
    training data.
    """
    reading = InputSettings.given(options)
    loaded = model_for("tell its training cells", TOLD, model)
    training = loaded.training
    if training is None:
        return Contamination(None, 0, {}, False, 0.0)
    n_asked = PRINTS * len(_FINER)
    # A vocabulary that grew later reads genes that the fingerprints of before do not cover.
    sizes = sorted({source.n_tokens for source in training.sources})
    parts = {size: [np.zeros((0, n_asked), np.uint64)] for size in sizes}
    n_all = 0
    for counts_CV in _counts(adata, loaded, reading):
        n_all += counts_CV.shape[0]
        for size in sizes:
            asked = [
                fingerprints(counts_CV.indptr, counts_CV.indices, counts_CV.data, size, finer)
                for finer in _FINER
            ]
            parts[size].append(np.concatenate(asked, axis=1))
    prints = {size: np.concatenate(blocks) for size, blocks in parts.items()}
    told_C, found_C = np.zeros(n_all, bool), np.zeros(n_all, bool)
    by_source: dict[str, int] = {}
    for source, known in zip(training.sources, training.fingerprints, strict=True):
        print_CQ = prints[source.n_tokens]
        told_C |= (print_CQ > 0).any(1)
        here_C = ((print_CQ > 0) & known.find(print_CQ.ravel()).reshape(print_CQ.shape)).any(1)
        found_C |= here_C
        if here_C.any():
            by_source[source.name] = by_source.get(source.name, 0) + int(here_C.sum())
    n_cells = int(told_C.sum())
    ordered = dict(sorted(by_source.items(), key=lambda item: -item[1]))
    by_chance = n_cells * n_asked * training.chance
    return Contamination(found_C, n_cells, ordered, training.complete, by_chance)


def _counts(
    adata: "AnnData | str | Path", model: Model, reading: InputSettings
) -> Iterator[sp.csr_matrix]:
    """Read cells over what the fingerprints are of: a vocabulary, or the model's own genes."""
    bundle = model if isinstance(model, Bundle) else model.bundle
    if bundle is not None:
        cells = VocabularyCells(adata, bundle, reading)
        yield from (chunk.counts_CV for chunk in cells.chunks())
        return
    assert not isinstance(model, Bundle)
    if isinstance(adata, str | Path):
        adata, reading = read_anndata(adata, reading)
    counts = read_counts(adata, bundle=None, vocabulary=model.vocabulary, reading=reading)
    counts_CG = counts.counts_CG
    if model.vocabulary is None:
        order = gene_order(
            counts.genes, model.genes, where="adata.var",
            remedy="A model without a vocabulary knows cells by the gene names it was trained on.",
        )  # fmt: skip
        counts_CG = order.apply(counts_CG)
    counts_CG = sp.csr_matrix(counts_CG, copy=True)  # it may be the caller's own
    counts_CG.sum_duplicates()
    counts_CG.eliminate_zeros()
    yield counts_CG


def note_contamination(
    adata: "AnnData",
    model: Bundle | IntegratedModel,
    key: str,
    reading: InputSettings,
) -> None:
    """Add to ``uns[key]`` how many cells were in the model's training, and say so."""
    found = contamination(adata, model, **reading.options())
    adata.uns[key]["training"] = found.values()
    logger.info("The model: %s.", found.text())
