"""Cells of a source → their vectors by a pre-trained model, in input order.

Axes: B cells of a batch, C cells, D width.
"""

import numpy as np
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.bundle.bundle import Bundle
from genemodel.corpus.corpus import Corpus
from genemodel.heads.decode_counts import CellProjection
from genemodel.inference.counts import VocabularyCells, VocabularyChunk, corpus_chunks
from genemodel.inference.forward import Forward
from genemodel.inference.progress import Progress


def embedder(bundle: Bundle, *, batch_size: int | None = None, compile: bool = False) -> Forward:
    """Make a forward pass whose result is the embedding, float32 (C, D).

    Where the model has a count decoder, a cell is the vector that its counts are decoded from:
    library, species and technical batch are terms of their own there, so it need not hold them.
    Otherwise it is the hidden state of the cell token.
    """
    projection = cell_projection(bundle)

    def read_out(cell_BD: Tensor, batch: CellBatch) -> Tensor:
        vectors_BD: Tensor = projection(cell_BD)
        return vectors_BD

    return Forward(
        bundle, read_out, bundle.model.settings.width, batch_size=batch_size, compile=compile
    )


def embedding_of(
    cells: VocabularyCells,
    bundle: Bundle,
    *,
    batch_size: int | None = None,
    compile: bool = False,
) -> np.ndarray:
    """Embed all cells of a source; float32 (C, D), in input order."""
    forward = embedder(bundle, batch_size=batch_size, compile=compile)
    out_CD = np.empty((len(cells), forward.columns), np.float32)
    with Progress("embed", len(cells)) as progress:
        for chunk, vectors_CD in forward.over(cells.chunks(), progress.add):
            out_CD[chunk.start : chunk.start + len(vectors_CD)] = vectors_CD
    return out_CD


def corpus_vectors(corpus: Corpus, bundle: Bundle) -> np.ndarray:
    """Embed all cells of a corpus, read from its files; float32 (C, D), in the corpus's order."""
    forward = embedder(bundle)
    out_CD = np.empty((len(corpus), forward.columns), np.float32)
    with Progress("embed", len(corpus)) as progress:
        chunks = corpus_chunks(corpus, np.arange(len(corpus)), bundle)
        for chunk, vectors_CD in forward.over(chunks, progress.add):
            out_CD[chunk.start : chunk.start + len(vectors_CD)] = vectors_CD
    return out_CD


def encode(chunk: VocabularyChunk, bundle: Bundle, *, batch_size: int | None = None) -> np.ndarray:
    """Embed the cells of one chunk; float32 (C, D), NaN for a cell without any known gene."""
    ((_, vectors_CD),) = embedder(bundle, batch_size=batch_size).over([chunk])
    return vectors_CD


def cell_projection(bundle: Bundle) -> nn.Module:
    """Return the count decoder's view of a cell, or the identity for a model without one."""
    if any(name.startswith("decode_counts.projection.") for name in bundle.heads):
        return bundle.head(
            "decode_counts.projection", CellProjection(bundle.model.settings.width)
        ).eval()
    return nn.Identity()
