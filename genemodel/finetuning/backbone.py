"""A pre-trained transformer beneath a head, and micro-batches with and without one.

Axes: C cells, F width of a cell vector, V genes of the cells.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from genemodel.batches.batch import CellBatch
from genemodel.batches.packing import tail_pieces
from genemodel.batches.tokens import TokenSettings
from genemodel.model.count_encoder import CountsBesideBackbone, ReadsCounts
from genemodel.model.gene_model import GeneModel
from genemodel.model.tuning import TuningSettings, merged, rate_shares, tune
from genemodel.train.reading import Built

# Cells whose vectors settle their mean and deviation before a transformer learns on.
STANDARDISED = 2048


@dataclass(frozen=True)
class Backbone:
    """A pre-trained transformer, whose vectors are made in every step.

    Attributes
    ----------
    model
        It is copied, and stays as it is.
    projection
        What makes the embedding of its cell token.
    tokens, inverse_median_V
        How it reads cells.
    tuning
        What of it learns from the loss of the head.
    gene_VF
        Gene vectors of its count decoder, if it has one.
    """

    model: GeneModel
    projection: nn.Module
    tokens: TokenSettings
    inverse_median_V: np.ndarray
    tuning: TuningSettings
    gene_VF: torch.Tensor | None = None

    @property
    def width(self) -> int:
        """Width of its cell vectors (F)."""
        return self.model.settings.width

    @torch.no_grad()
    def vectors_of(self, some: Iterable[CellBatch]) -> torch.Tensor:
        """Cell vectors as the transformer comes, (C, F), in the order of the cells' numbers."""
        vectors, numbers = [], []
        self.model.eval()
        for batch in some:
            # Blocks above those that cell vectors are read from have no part in them.
            encoded = self.model(batch, self.model.cell_stop)
            vectors.append(self.projection(encoded.cell_CD[: batch.n_cells]).float())
            numbers.append(batch.cell_C[: batch.n_cells])
        return torch.cat(vectors)[torch.argsort(torch.cat(numbers))]

    def beneath(self, counts: ReadsCounts, head: nn.Module, vectors_CF: torch.Tensor) -> Built:
        """Put a copy beneath an encoder of counts.

        Mean and deviation of the vectors are settled by those of some training cells.
        """
        model = copy.deepcopy(self.model)
        beside = CountsBesideBackbone(counts, model, copy.deepcopy(self.projection))
        counts.beside.standardise(vectors_CF)
        tune(model, self.tuning, cells_only=True)
        shares = {f"backbone.{k}": v for k, v in rate_shares(model, self.tuning).items()}
        return Built(beside.train(), head, shares)


def tuned(model: nn.Module) -> GeneModel | None:
    """Take the transformer from beneath an encoder, adapters merged; None without one."""
    if not isinstance(model, CountsBesideBackbone):
        return None
    assert isinstance(model.backbone, GeneModel)
    return merged(model.backbone).cpu().eval()


def even_size(n_cells: int, wanted: int) -> int:
    """Cells of a micro-batch, as even as can be: a step of few cells would be all noise."""
    return math.ceil(n_cells / math.ceil(n_cells / min(wanted, n_cells)))


def micro_batches(size: int, backbone: Backbone | None) -> TokenSettings:
    """Shape of micro-batches of at most so many cells."""
    if backbone is None:
        # No transformer reads tokens: every cell is as long as any other.
        return TokenSettings(2, 2 * size, size + tail_pieces(2 * size, 2))
    tokens = backbone.tokens
    return replace(tokens, places=size + tail_pieces(tokens.budget, tokens.context))
