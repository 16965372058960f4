"""From counts to ranked tokens, at read time.

A gene's rank value is its count divided by the gene's non-zero median; dividing by the cell's
library as well cannot change the order, so the native tokeniser does not. Ties go to the smaller
token, always. The published models' own sequences are made in :mod:`genemodel.batches.published`.

Axes: C cells, N stored genes of the cells end to end, V vocabulary.
"""

from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
from numba import njit

from genemodel.batches.packing import places_for, tail_pieces
from genemodel.errors import ConfigError
from genemodel.expression.normalise import DEPTH
from genemodel.genes.vocabulary import EOS, N_SPECIAL

Style = Literal["native", "geneformer_v1", "geneformer_v2", "genecompass"]


@dataclass(frozen=True)
class TokenSettings:
    """How a cell becomes tokens.

    Attributes
    ----------
    context
        Most tokens of a cell, its cell token included. The genes kept are those with the largest
        count ÷ median.
    budget
        Tokens of a packed micro-batch; every micro-batch has this shape.
    places
        Cells of a packed micro-batch, pieces of the empty tail included; 0 chooses about twice
        the typical number of cells, from the cells' mean length.
    style
        ``native``; or the published model whose order and framing of a cell are made, as they come
        with an imported bundle: ``geneformer_v1`` (genes alone), ``geneformer_v2`` (``<cls>``,
        genes, ``<eos>``) or ``genecompass`` (species token, genes with values).
    """

    context: int = 2048
    budget: int = 16_384
    places: int = 0
    style: Style = "native"

    def __post_init__(self) -> None:
        if self.context < 1 + self.framing:
            raise ConfigError(
                f"tokens.context is {self.context}: it must hold the cell token and at least one "
                f"gene. Set tokens.context to {1 + self.framing} or more."
            )
        if self.budget < self.context:
            raise ConfigError(
                f"tokens.budget is {self.budget} but tokens.context is {self.context}: one cell "
                "might not fit into a micro-batch. Set tokens.budget to at least tokens.context."
            )
        fewest = tail_pieces(self.budget, self.context) + 1
        if self.places and self.places < fewest:
            raise ConfigError(
                f"tokens.places is {self.places}: a cell and the empty tail of a micro-batch of "
                f"{self.budget:,} tokens may need {fewest}. Set tokens.places to at least "
                f"{fewest}, or to 0 to have it chosen."
            )

    @property
    def framing(self) -> int:
        """Tokens of a cell that are no genes."""
        return {"geneformer_v1": 0, "geneformer_v2": 2}.get(self.style, 1)

    @property
    def opens(self) -> bool:
        """Whether a cell begins with a token that is no gene."""
        return self.style != "geneformer_v1"

    @property
    def first_gene(self) -> int:
        """Lowest token that is a gene; below are the special ones."""
        return EOS + 1 if self.style == "geneformer_v2" else N_SPECIAL

    def lengths(self, n_genes_C: np.ndarray) -> np.ndarray:
        """Tokens of cells with so many expressed genes."""
        return np.minimum(n_genes_C, self.context - self.framing) + self.framing

    def placed(self, mean_length: float) -> Self:
        """Choose the number of places for cells of this mean length, where it is left open."""
        if self.places:
            return self
        return replace(self, places=places_for(self.budget, self.context, mean_length))

    @property
    def max_cells(self) -> int:
        """Most cells of a micro-batch, with places left for the longest tail."""
        if not self.places:
            # 32 tokens a cell is far below any usable cell; shallower cells only lower the fill.
            return max(8, self.budget // 32)
        return self.places - tail_pieces(self.budget, self.context)

    @property
    def most_pieces(self) -> int:
        """Most pieces of a micro-batch: from there on they hardly become smaller."""
        return max(1, self.budget // self.context)

    def piece(self, pieces: int) -> Self:
        """Shape of one of so many pieces of a micro-batch; see ``packing.deal``."""
        if pieces == 1:
            return self
        budget = -(-self.budget // pieces) + self.context
        cells = -(-self.max_cells // pieces)
        return replace(self, budget=budget, places=cells + tail_pieces(budget, self.context))


N_LOGS = 64  # counts below this share a table of logarithms within a cell


@njit(nogil=True, cache=True, boundscheck=False)
def _rank_cell(  # type: ignore[no-untyped-def]
    gene, count, inverse_median_V, key_a, key_b, order_a, order_b, histogram
):
    """Stable descending radix sort of one cell; the order lies in ``order_a[:n]`` afterwards."""
    n = gene.shape[0]
    for i in range(n):
        order_a[i] = i
    if n < 2:
        return
    value = np.empty(n, np.float32)
    for i in range(n):
        value[i] = np.float32(count[i]) * inverse_median_V[gene[i]]
    bits = value.view(np.uint32)
    for i in range(n):
        # Positive floats order like their bits; inverting the bits makes ascending descending.
        key_a[i] = ~bits[i]
    # Three passes of 11 bits cover the 32-bit key. Input is ascending by token and every pass is
    # stable, so equal values stay ascending by token.
    histogram[:, :] = 0
    for i in range(n):
        key = key_a[i]
        histogram[0, key & 2047] += 1
        histogram[1, (key >> 11) & 2047] += 1
        histogram[2, key >> 22] += 1
    for p in range(3):
        total = 0
        for b in range(2048):
            here = histogram[p, b]
            histogram[p, b] = total
            total += here
    for i in range(n):
        key = key_a[i]
        b = key & 2047
        at = histogram[0, b]
        histogram[0, b] = at + 1
        key_b[at] = key
        order_b[at] = order_a[i]
    for i in range(n):
        key = key_b[i]
        b = (key >> 11) & 2047
        at = histogram[1, b]
        histogram[1, b] = at + 1
        key_a[at] = key
        order_a[at] = order_b[i]
    for i in range(n):
        key = key_a[i]
        b = key >> 22
        at = histogram[2, b]
        histogram[2, b] = at + 1
        order_b[at] = order_a[i]
    for i in range(n):
        order_a[i] = order_b[i]


@njit(nogil=True, cache=True, boundscheck=False)
def rank_cells(  # type: ignore[no-untyped-def]
    starts_C1, gene_N, count_N, inverse_median_V, limit, out_starts_C1, out_index
):
    """Rank every cell's genes by count ÷ median, descending; ties by token, ascending.

    Parameters
    ----------
    starts_C1
        First stored gene of every cell and the end, int64.
    gene_N, count_N
        Tokens (ascending within a cell) and their counts.
    inverse_median_V
        1 ÷ non-zero median of every token, float32.
    limit
        Most genes kept of a cell.
    out_starts_C1
        Filled with the first ranked gene of every cell.
    out_index
        Filled with positions into ``gene_N``: the ranked, truncated cells end to end.
    """
    longest = 0
    for c in range(starts_C1.shape[0] - 1):
        longest = max(longest, starts_C1[c + 1] - starts_C1[c])
    key_a = np.empty(longest, np.uint32)
    key_b = np.empty(longest, np.uint32)
    order_a = np.empty(longest, np.int32)
    order_b = np.empty(longest, np.int32)
    histogram = np.empty((3, 2048), np.int32)
    at = 0
    out_starts_C1[0] = 0
    for c in range(starts_C1.shape[0] - 1):
        lo, hi = starts_C1[c], starts_C1[c + 1]
        _rank_cell(
            gene_N[lo:hi],
            count_N[lo:hi],
            inverse_median_V,
            key_a,
            key_b,
            order_a,
            order_b,
            histogram,
        )
        kept = min(limit, hi - lo)
        for i in range(kept):
            out_index[at + i] = lo + order_a[i]
        at += kept
        out_starts_C1[c + 1] = at


@njit(nogil=True, cache=True, boundscheck=False)
def pack_cells(  # type: ignore[no-untyped-def]
    begin_C,
    end_C,
    gene_N,
    count_N,
    inverse_median_V,
    library_C,
    limit,
    cell_token,
    pad_token,
    gene_T,
    value_T,
    rank_T,
    segment_T,
    out_starts_C1,
    full_gene_N,
    full_count_N,
    full_cell_N,
):
    """Rank cells and lay them end to end into one micro-batch.

    Cell c owns ``gene_N[begin_C[c]:end_C[c]]``, ascending by token. Every cell opens with
    ``cell_token``; the tail of the budget becomes dummy cells of ``pad_token``, as long as a cell
    may be and the last of them shorter. The ``full`` arrays take every stored gene in storage
    order. Returns the number of real tokens.
    """
    budget = gene_T.shape[0]
    longest = 0
    for c in range(begin_C.shape[0]):
        longest = max(longest, end_C[c] - begin_C[c])
    key_a = np.empty(longest, np.uint32)
    key_b = np.empty(longest, np.uint32)
    order_a = np.empty(longest, np.int32)
    order_b = np.empty(longest, np.int32)
    histogram = np.empty((3, 2048), np.int32)
    log_of = np.empty(N_LOGS, np.float32)
    full = 0
    at = 0
    for place in range(begin_C.shape[0]):
        lo, hi = begin_C[place], end_C[place]
        _rank_cell(
            gene_N[lo:hi],
            count_N[lo:hi],
            inverse_median_V,
            key_a,
            key_b,
            order_a,
            order_b,
            histogram,
        )
        out_starts_C1[place] = at
        gene_T[at] = cell_token
        value_T[at] = 0.0
        rank_T[at] = 0
        segment_T[at] = place
        at += 1
        scale = np.float32(DEPTH) / np.float32(library_C[place])
        # Most counts are small whole numbers: their logarithms are taken once a cell.
        for small in range(N_LOGS):
            log_of[small] = np.log1p(np.float32(small) * scale)
        for i in range(min(limit, hi - lo)):
            j = lo + order_a[i]
            gene_T[at] = gene_N[j]
            x = np.int64(count_N[j])
            if x < N_LOGS and x == count_N[j]:
                value_T[at] = log_of[x]
            else:
                value_T[at] = np.log1p(np.float32(count_N[j]) * scale)
            rank_T[at] = i + 1
            segment_T[at] = place
            at += 1
        for j in range(lo, hi):
            full_gene_N[full] = gene_N[j]
            full_count_N[full] = count_N[j]
            full_cell_N[full] = place
            full += 1
    n_cells = begin_C.shape[0]
    for place in range(n_cells, out_starts_C1.shape[0]):
        out_starts_C1[place] = min(at + (place - n_cells) * (limit + 1), budget)
    for t in range(at, budget):
        gene_T[t] = pad_token
        value_T[t] = 0.0
        rank_T[t] = 0
        segment_T[t] = n_cells + (t - at) // (limit + 1)
    return at
