"""How much genes look at each other: attention of chosen pairs, summed over cells as they pass.

The model runs as it always does. A hook on every block's projection sees queries and keys go by,
and of them the scores of chosen genes are made a second time, cell by cell: softmax needs all keys
of a cell, but only the rows of the chosen genes. No tokens × tokens matrix of a batch is ever made.

Axes as in ``genemodel.batches.batch``; L layers, Q genes that look, S genes that are looked at,
A sums: layers × heads, or one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.errors import ConfigError
from genemodel.model.gene_model import Block, GeneModel
from genemodel.writing import in_bytes

# Sums over pairs are held in memory.
SUMS_BYTES = 2 * 1024**3
# Scores that are made at once, heads × genes × tokens: 64 MB.
_SCORES_AT_ONCE = 16 * 1024**2


class AttentionSums:
    """Sums of attention over cells.

    Parameters
    ----------
    model
        In evaluation mode.
    lookers, looked_at
        Tokens of the genes, each once.
    layers, heads
        Which are summed; default all.
    apart
        Keep layers and heads apart, instead of averaging over them.
    relative
        Attention as a multiple of what a token gets on average (1 ÷ tokens of the cell), so that
        long and short cells count alike; otherwise as a share of 1.

    Attributes
    ----------
    sum_AQS
        Float64, on the host.
    n_QS
        Cells that hold both genes.

    Raises
    ------
    ConfigError
        A layer or head is not there, or the sums are larger than memory should be.
    """

    def __init__(
        self,
        model: GeneModel,
        lookers: np.ndarray,
        looked_at: np.ndarray,
        *,
        layers: tuple[int, ...] = (),
        heads: tuple[int, ...] = (),
        apart: bool = False,
        relative: bool = True,
    ) -> None:
        shape = model.settings
        self.layers = _chosen(layers, shape.layers, "layers", "blocks")
        self.heads = _chosen(heads, shape.heads, "heads", "heads")
        self.model, self.apart, self.relative = model, apart, relative
        n = len(self.layers) * len(self.heads) if apart else 1
        needed = (n + 1) * lookers.size * looked_at.size * 8
        if needed > SUMS_BYTES:
            raise ConfigError(
                f"attention of {lookers.size:,} × {looked_at.size:,} genes"
                + (f" in {n:,} heads" if apart else "")
                + f" needs {in_bytes(needed)}: name fewer genes, layers or heads."
            )
        self.sum_AQS = np.zeros((n, lookers.size, looked_at.size))
        self.n_QS = np.zeros((lookers.size, looked_at.size), np.int64)
        self._looker_V = _places(lookers, model.n_tokens)
        self._looked_V = _places(looked_at, model.n_tokens)
        self._cells: list[_Cell] = []

    def add(self, batch: CellBatch) -> None:
        """Run a batch through the model, and add what is seen of its cells."""
        self._cells = self._find(batch)
        with self._watching(), torch.no_grad():
            self.model(batch.to(self.model.embedding.token.weight.device))
        for cell in self._cells:
            self.n_QS[np.ix_(cell.looker, cell.looked)] += 1
        self._cells = []

    def mean(self) -> np.ndarray:
        """Mean over the cells that hold both, float32 (A, Q, S); NaN where none does."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean_AQS = self.sum_AQS / self.n_QS
        if not self.apart:
            mean_AQS /= len(self.layers) * len(self.heads)
        return mean_AQS.astype(np.float32)

    # -- one batch ---------------------------------------------------------------------------

    def _find(self, batch: CellBatch) -> "list[_Cell]":
        """Say where in every cell the chosen genes are."""
        gene_T = batch.gene_T.cpu().numpy()
        starts = batch.starts_C1.cpu().numpy()
        found = []
        for c in range(batch.n_cells):
            a, b = int(starts[c]), int(starts[c + 1])
            looker, looked = self._looker_V[gene_T[a:b]], self._looked_V[gene_T[a:b]]
            (query,), (key,) = np.nonzero(looker >= 0), np.nonzero(looked >= 0)
            if query.size and key.size:
                found.append(_Cell(a, b, query, key, looker[query], looked[key]))
        return found

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Have the projections of the chosen blocks tell what they give, and no longer."""
        handles = []
        try:
            for place, layer in enumerate(self.layers):
                block = self.model.blocks[layer]
                assert isinstance(block, Block)
                handles.append(block.qkv.register_forward_hook(partial(self._see, place)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, place: int, _module: nn.Module, _given: Any, qkv: Tensor) -> None:
        q_THK, k_THK, _ = qkv.view(qkv.shape[0], 3, self.model.settings.heads, -1).unbind(1)
        head_H = torch.tensor(self.heads, device=qkv.device)
        q_THK, k_THK = q_THK[:, head_H].float(), k_THK[:, head_H].float()
        for cell in self._cells:
            self._add_cell(place, cell, q_THK, k_THK)

    def _add_cell(self, place: int, cell: "_Cell", q_THK: Tensor, k_THK: Tensor) -> None:
        k_HtK = k_THK[cell.start : cell.stop].transpose(0, 1)
        heads, tokens = k_HtK.shape[:2]
        key = torch.from_numpy(cell.key).to(k_HtK.device)
        step = max(1, _SCORES_AT_ONCE // (heads * tokens))
        for at in range(0, cell.query.size, step):
            query = torch.from_numpy(cell.start + cell.query[at : at + step]).to(k_HtK.device)
            q_HqK = q_THK.index_select(0, query).transpose(0, 1)
            score_Hqt = torch.matmul(q_HqK, k_HtK.transpose(1, 2)) * q_HqK.shape[-1] ** -0.5
            weight_Hqk = score_Hqt.softmax(-1).index_select(2, key).double()
            if self.relative:
                weight_Hqk = weight_Hqk * tokens
            if not self.apart:
                weight_Hqk = weight_Hqk.sum(0, keepdim=True)
            a = place * heads if self.apart else 0
            # A gene is in a cell once: no pair is added to twice at a time.
            at_QS = np.ix_(
                np.arange(a, a + len(weight_Hqk)), cell.looker[at : at + step], cell.looked
            )
            self.sum_AQS[at_QS] += weight_Hqk.cpu().numpy()


class _Cell:
    """Where a cell's chosen genes are."""

    def __init__(
        self, start: int, stop: int, query: np.ndarray, key: np.ndarray, looker: np.ndarray,
        looked: np.ndarray,
    ) -> None:  # fmt: skip
        self.start, self.stop = start, stop
        self.query, self.key = query, key  # places within the cell
        self.looker, self.looked = looker, looked  # rows and columns of the sums


def _places(tokens: np.ndarray, n_tokens: int) -> np.ndarray:
    place_V = np.full(n_tokens, -1, np.int64)
    place_V[tokens] = np.arange(tokens.size)
    return place_V


def _chosen(wanted: tuple[int, ...], n: int, name: str, what: str) -> tuple[int, ...]:
    for one in wanted:
        if not 0 <= one < n:
            raise ConfigError(
                f"{name} names {one}, but the model has {n} {what}: give numbers from 0 to {n - 1}."
            )
    if len(set(wanted)) < len(wanted):
        raise ConfigError(f"{name}={list(wanted)} names one twice.")
    return tuple(wanted) or tuple(range(n))
