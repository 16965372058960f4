"""Hidden states of genes over many cells, added up as they come: one pass, memory of one table.

Axes: C cells, T tokens, V vocabulary, R rows (genes that are wanted), L groups of cells, F features
of a token.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.bundle.bundle import Bundle
from genemodel.errors import ConfigError
from genemodel.inference.counts import VocabularyChunk
from genemodel.inference.forward import Forward
from genemodel.inference.progress import Progress
from genemodel.model.gene_model import Encoded

type Features = Callable[[Tensor], Tensor]
"""From hidden states of genes (T, D) to what is averaged, (T, F)."""

# Bytes of sums that are held at once, at most; more is asked for in parts.
MOST_BYTES = 4 * 2**30


class TokenSums:
    """Counts, sums and sums of squares of every wanted gene, in float64.

    Float64 makes a sum of float32 numbers the same to their last bit in whatever order they come:
    its own rounding is nine digits further down.

    Parameters
    ----------
    row_V
        Row of every token, int64; -1 for those that are not wanted.
    features, width
        What is averaged, and F.
    group_C
        Group of every cell of the source, -1 for none; all are in one by default.
    n_groups
        L.
    squares
        Whether sums of squares are wanted.
    device
        Where the model is.
    """

    def __init__(
        self,
        row_V: np.ndarray,
        features: Features,
        width: int,
        *,
        group_C: np.ndarray | None = None,
        n_groups: int = 1,
        squares: bool = False,
        device: torch.device,
    ) -> None:
        self.n_rows = int(row_V.max(initial=-1)) + 1
        self.n_groups, self.width = n_groups, width
        cells = n_groups * self.n_rows
        if cells * width * 8 * (1 + squares) > MOST_BYTES:
            raise ConfigError(
                f"Sums of {self.n_rows:,} genes × {n_groups} groups of cells × {width} numbers "
                f"take more than {MOST_BYTES / 2**30:.0f} GiB: name fewer genes, or leave the "
                "groups out."
            )
        self._row_V = torch.from_numpy(row_V).to(device)
        self._group_C = None if group_C is None else torch.from_numpy(group_C).to(device)
        self._features = features
        self._n = torch.zeros(cells, dtype=torch.int64, device=device)
        self._sum = torch.zeros(cells, width, dtype=torch.float64, device=device)
        self._square = torch.zeros_like(self._sum) if squares else None

    def add(self, encoded: Encoded, batch: CellBatch) -> None:
        """Add the genes of a batch."""
        n = batch.n_tokens
        place_T = self._row_V[batch.gene_T[:n]]
        keep_T = place_T >= 0
        if self._group_C is not None:
            group_T = self._group_C[batch.cell_C[batch.segment_T[:n]]]
            keep_T = keep_T & (group_T >= 0)
            place_T = place_T + group_T * self.n_rows
        at_T = keep_T.nonzero()[:, 0]
        if not at_T.numel():
            return
        value_TF = self._features(encoded.hidden_TD[at_T].float()).double()
        place_T = place_T[at_T]
        self._n.index_add_(0, place_T, torch.ones_like(place_T))
        self._sum.index_add_(0, place_T, value_TF)
        if self._square is not None:
            self._square.index_add_(0, place_T, value_TF.square())

    @property
    def n_LR(self) -> np.ndarray:
        """Cells that hold each gene, int64."""
        return self._n.cpu().numpy().reshape(self.n_groups, self.n_rows)

    @property
    def sum_LRF(self) -> np.ndarray:
        """Sums over these cells, float64."""
        return self._sum.cpu().numpy().reshape(self.n_groups, self.n_rows, self.width)

    @property
    def square_LRF(self) -> np.ndarray:
        """Sums of squares."""
        assert self._square is not None
        return self._square.cpu().numpy().reshape(self.n_groups, self.n_rows, self.width)


def run(
    bundle: Bundle,
    chunks: Iterable[VocabularyChunk],
    sums: TokenSums,
    n_cells: int,
    *,
    what: str,
    blocks: int | None = None,
    batch_size: int | None = None,
) -> None:
    """Add all cells to the sums."""
    forward = Forward(
        bundle, lambda cell_BD, _: cell_BD[:, :0], 0, batch_size=batch_size, blocks=blocks,
        see=sums.add,
    )  # fmt: skip
    with Progress(what, n_cells) as progress:
        for _ in forward.over(chunks, progress.add):
            pass


def with_context(bundle: Bundle, context: int) -> Bundle:
    """Read cells with so many tokens; 0 keeps the model's own number.

    Raises
    ------
    ConfigError
        A model that learnt a vector for every rank has none for further ones.
    """
    own = bundle.tokens.context
    if not context or context == own:
        return bundle
    if context > own and bundle.model.settings.position == "rank":
        raise ConfigError(
            f"context is {context}, but this model knows {own} ranks: set at most that, or 0."
        )
    tokens = replace(
        bundle.tokens, context=context, budget=max(bundle.tokens.budget, context), places=0
    )
    return replace(bundle, tokens=tokens)
