"""What a run trains, and how its cells are read: said before anything is launched."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from genemodel.batches.loader import Cells, CellStream
from genemodel.batches.order import Layout
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.views import View
from genemodel.train.data import RankStream


@dataclass(frozen=True)
class Built:
    """What a run trains.

    Attributes
    ----------
    model
        Encodes a micro-batch.
    objectives
        What is asked of it; see :class:`~genemodel.heads.objective.Objective`.
    rate_shares
        Learning rates of the model's parameters by name, as shares of the run's.
    """

    model: nn.Module
    objectives: nn.Module
    rate_shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Reading:
    """How the cells of a run are read.

    Attributes
    ----------
    cells
        A corpus, or cells in memory.
    tokens
        Shape of a micro-batch.
    inverse_median_V
        1 ÷ non-zero median of every gene.
    train_cells, held_out
        Sorted permanent numbers; no look is taken where none is held out.
    batch_codes
        Technical batch of every cell, −1 unknown; default all unknown.
    layout
        How training cells are cut into windows; default as their number asks for.
    view, held_view
        Which molecules are shown in training, and in a look.
    n_tokens
        Genes at or above it are no tokens; default all are.
    genes_V
        Genes that are read at all, bool; default all.
    """

    cells: Cells
    tokens: TokenSettings
    inverse_median_V: np.ndarray
    train_cells: np.ndarray
    held_out: np.ndarray | None = None
    batch_codes: np.ndarray | None = None
    layout: Layout | None = None
    view: View | None = None
    held_view: View | None = None
    n_tokens: int | None = None
    genes_V: np.ndarray | None = None

    def stream(self, cells: np.ndarray, device: torch.device, **options: Any) -> RankStream:
        """Micro-batches of some of the cells."""
        stream = CellStream(
            self.cells, cells, self.tokens, inverse_median_V=self.inverse_median_V,
            batch_codes=self.batch_codes, n_tokens=self.n_tokens, genes_V=self.genes_V, **options,
        )  # fmt: skip
        return RankStream(stream, device)
