"""Integrated gradients (Sundararajan et al. 2017) of a number of a cell, by its genes.

The path goes from the cell with its genes hidden to the cell as it is, along the sums that the
first block's input is made of. What a gene adds to the opening token (expression components) is
its own part of the path. Vectors of zero are no place to begin: a layer norm sees the same of any
multiple of a vector, so all would change in the first hair's breadth of the path, between its
points. Axes: T tokens, C cells, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.genes.vocabulary import EOS, MASK, N_SPECIAL
from genemodel.model.gene_model import (
    HIDDEN_VALUE,
    Encoded,
    GeneEmbedding,
    GeneModel,
    opening_tokens,
)

type Score = Callable[[Encoded, CellBatch], Tensor]
"""From what a model makes of a batch to one number a place, (C,)."""


@dataclass(frozen=True)
class Attributed:
    """Of a batch: what each token is worth, and the number of each place at both ends of the path.

    By completeness the tokens of a cell add up to the difference of the two, but for what the sum
    over a few points leaves of the integral.
    """

    worth_T: Tensor
    score_C: Tensor
    baseline_C: Tensor


def genes_of(model: GeneModel, batch: CellBatch) -> Tensor:
    """Say which tokens are genes, bool (T,)."""
    closed = model.settings.hosts == "geneformer_v2"
    return batch.gene_T >= (EOS + 1 if closed else N_SPECIAL)


def hidden(model: GeneModel, batch: CellBatch) -> CellBatch:
    """Hide every gene and its value; ranks, species and depth stay."""
    is_gene_T = genes_of(model, batch)
    no_value = HIDDEN_VALUE if isinstance(model.embedding, GeneEmbedding) else 0.0
    return replace(
        batch,
        gene_T=torch.where(is_gene_T, MASK, batch.gene_T),
        value_T=torch.where(is_gene_T, no_value, batch.value_T),
    )


def integrated_gradients(
    model: GeneModel,
    batch: CellBatch,
    score: Score,
    *,
    steps: int = 16,
) -> Attributed:
    """Attribute a score to the genes of cells.

    Parameters
    ----------
    model
        In evaluation mode.
    batch
        Packed cells; a cell's score must depend on no other one.
    score
        What is attributed.
    steps
        Points of the path, placed as Gauss and Legendre do.
    """
    embedding, stop = model.embedding, model.cell_stop
    native = isinstance(embedding, GeneEmbedding)

    def summed(of: CellBatch) -> Tensor:
        return embedding.summed(of) if isinstance(embedding, GeneEmbedding) else embedding(of)

    def scored(summed_TD: Tensor) -> Tensor:
        x_TD = embedding.finished(summed_TD) if isinstance(embedding, GeneEmbedding) else summed_TD
        return score(model.encode(x_TD, batch, stop), batch).float()

    with torch.no_grad():
        full_TD, base_TD = summed(batch), summed(hidden(model, batch))
        way_TD = full_TD - base_TD
        score_C, baseline_C = scored(full_TD), scored(base_TD)
    slope_TD = torch.zeros_like(way_TD)
    points, weights = np.polynomial.legendre.leggauss(steps)
    for point, weight in zip((points + 1) / 2, weights / 2, strict=True):
        at_TD = (base_TD + float(point) * way_TD).requires_grad_()
        # Places without a cell read tokens of the cells, which must not answer for them.
        (gradient_TD,) = torch.autograd.grad(scored(at_TD)[: batch.n_cells].sum(), at_TD)
        slope_TD += float(weight) * gradient_TD
    with torch.no_grad():
        worth_T = (slope_TD * way_TD).sum(-1)
        if native and embedding.components is not None:
            worth_T = _to_genes(embedding, batch, slope_TD, way_TD, worth_T)
    return Attributed(worth_T, score_C, baseline_C)


def _to_genes(
    embedding: GeneEmbedding, batch: CellBatch, slope_TD: Tensor, way_TD: Tensor, worth_T: Tensor
) -> Tensor:
    """Give each gene what it adds to the opening token, which has changed by their sum."""
    components = embedding.components
    assert components is not None
    visible_T = torch.where(batch.gene_T >= N_SPECIAL, batch.value_T.clamp_min(0.0), 0.0)
    part_TD = components.project(components.loading(batch.gene_T) * visible_T[:, None])
    first_C, _ = opening_tokens(batch.starts_C1, way_TD.shape[0])
    opening_T = first_C[batch.segment_T]
    worth_T = worth_T + (part_TD * slope_TD[opening_T]).sum(-1)
    is_opening_T = torch.zeros_like(visible_T, dtype=torch.bool)
    is_opening_T[first_C] = True
    return worth_T.masked_fill(is_opening_T & (batch.gene_T < N_SPECIAL), 0.0)
