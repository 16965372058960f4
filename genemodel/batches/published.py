"""The published models' own sequences: their order, their framing, their values.

Ranks are made in float64 and in the published order of operations, because there the last bit
decides. Their sorts are unstable; here ties go to the smaller token.

Axes: C cells, N stored genes of the cells end to end, V vocabulary, T packed tokens.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

from genemodel.batches.batch import CellBatch
from genemodel.batches.packing import tail_pieces
from genemodel.batches.tokens import Style, TokenSettings
from genemodel.batches.views import joined
from genemodel.genes.vocabulary import CELL, EOS, PAD

PublishedStyle = Literal["geneformer_v1", "geneformer_v2", "genecompass"]
# Most tokens of a cell, framing included, with which each was trained.
CONTEXT: dict[PublishedStyle, int] = {
    "geneformer_v1": 2048,
    "geneformer_v2": 4096,
    "genecompass": 2049,
}


def rank_values(
    style: Style, count_N: np.ndarray, median_N: np.ndarray, total_N: np.ndarray | float
) -> np.ndarray:
    """Compute what genes are ranked by, float64 (N,): the larger, the earlier.

    Geneformer's x ÷ n × 10⁴ ÷ median, in that order; GeneCompass's log2(1 + x ÷ median), which is
    also its value.
    """
    count_N = np.asarray(count_N, np.float64)
    if style == "genecompass":
        return np.log2(1.0 + count_N / median_N)
    return count_N / total_N * 10_000.0 / median_N  # Geneformer's own depth, whatever ours is


def lay_out_published(
    settings: TokenSettings,
    begin_C: np.ndarray,
    end_C: np.ndarray,
    gene_N: np.ndarray,
    count_N: np.ndarray,
    median_V: np.ndarray,
    total_C: np.ndarray,
    *,
    gene_T: np.ndarray,
    value_T: np.ndarray,
    rank_T: np.ndarray,
    segment_T: np.ndarray,
    starts_C1: np.ndarray,
) -> int:
    """Rank cells as published and lay them end to end; :func:`pack_cells` for the other styles.

    ``rank_T`` is the row of the position table: the place in the sequence, and for GeneCompass the
    place among the genes, because its species token has no position.

    Parameters
    ----------
    settings
        Style and context.
    begin_C, end_C, gene_N, count_N
        Cell c owns ``gene_N[begin_C[c]:end_C[c]]`` and its counts beside it.
    median_V
        Non-zero medians, float64.
    total_C
        Counts of every cell over all its genes, also those without a token.
    gene_T, value_T, rank_T, segment_T, starts_C1
        Filled; the tail of the budget becomes dummy cells.

    Returns
    -------
    Number of real tokens.
    """
    style, budget, n_cells = settings.style, gene_T.size, begin_C.size
    size_C = np.asarray(end_C - begin_C, np.int64)
    n_stored = int(size_C.sum())
    gene_N = joined(begin_C, end_C, gene_N, n_stored).astype(np.int64)
    count_N = joined(begin_C, end_C, count_N, n_stored)
    cell_N = np.repeat(np.arange(n_cells), size_C)
    score_N = rank_values(style, count_N, median_V[gene_N], total_C[cell_N])
    order_N = np.lexsort((gene_N, -score_N, cell_N))

    kept_C = np.minimum(size_C, settings.context - settings.framing)
    ends_C = np.cumsum(kept_C + settings.framing)
    starts_C = ends_C - kept_C - settings.framing
    at = int(ends_C[-1]) if n_cells else 0
    place_N = np.arange(n_stored) - np.repeat(np.cumsum(size_C) - size_C, size_C)
    kept_N = place_N < np.repeat(kept_C, size_C)
    opens = int(style != "geneformer_v1")
    at_N = (starts_C[cell_N] + opens + place_N)[kept_N]
    chosen_N = order_N[kept_N]  # sorted by cell first, so places within cells stand

    gene_T[:], value_T[:], rank_T[:] = PAD, 0.0, 0
    gene_T[at_N] = gene_N[chosen_N]
    rank_T[at_N] = place_N[kept_N] + (style == "geneformer_v2")
    if style == "genecompass":
        value_T[at_N] = score_N[chosen_N]
    if opens:
        gene_T[starts_C] = CELL
    if style == "geneformer_v2":
        gene_T[ends_C - 1] = EOS
        rank_T[ends_C - 1] = kept_C + 1
    segment_T[:at] = np.repeat(np.arange(n_cells), kept_C + settings.framing)
    segment_T[at:] = n_cells + np.arange(budget - at) // settings.context
    starts_C1[:n_cells] = starts_C
    n_tail = starts_C1.size - n_cells
    starts_C1[n_cells:] = np.minimum(at + np.arange(n_tail) * settings.context, budget)
    return at


def pack_sequences(
    settings: TokenSettings,
    tokens: Sequence[np.ndarray],
    numbers: np.ndarray,
    *,
    values: Sequence[np.ndarray] | None = None,
    species: np.ndarray | None = None,
) -> CellBatch:
    """Pack finished sequences of a published style, such as variants of a cell; there is no count.

    Parameters
    ----------
    settings
        Style, context and budget; the sequences have to fit into it (see ``plan_bins``).
    tokens
        Our tokens of every sequence, its framing included, none longer than the context.
    numbers
        Of the sequences, int64; where randomness has an address, it is this.
    values
        Values beside the tokens (GeneCompass).
    species
        Code of every sequence; all 0 by default.
    """
    budget, context = settings.budget, settings.context
    n_cells = len(tokens)
    length_C = np.array([genes.size for genes in tokens], np.int64)
    places, n = n_cells + tail_pieces(budget, context), int(length_C.sum())
    if n > budget or (n_cells and length_C.max() > context):
        raise AssertionError(f"sequences of {n} tokens in a budget of {budget}")
    tail_C1 = np.minimum(n + np.arange(places + 1 - n_cells) * context, budget)
    starts_C1 = np.concatenate([np.cumsum(length_C) - length_C, tail_C1]).astype(np.int32)
    gene_T, value_T = np.full(budget, PAD, np.int64), np.zeros(budget, np.float32)
    rank_T = np.zeros(budget, np.int64)
    gene_T[:n] = np.concatenate(tokens)
    rank_T[:n] = np.arange(n) - np.repeat(starts_C1[:n_cells], length_C)
    if settings.style == "genecompass":  # its species token has no position
        rank_T[:n] = np.maximum(rank_T[:n] - 1, 0)
    if values is not None:
        value_T[:n] = np.concatenate(values)

    def placed(given: np.ndarray | None, dummy: int) -> torch.Tensor:
        out = np.full(places, dummy, np.int64)
        if given is not None:
            out[:n_cells] = given
        return torch.from_numpy(out)

    nothing = torch.zeros(0, dtype=torch.int64)
    return CellBatch(
        gene_T=torch.from_numpy(gene_T), value_T=torch.from_numpy(value_T),
        rank_T=torch.from_numpy(rank_T),
        segment_T=torch.from_numpy(np.repeat(np.arange(places), np.diff(starts_C1))),
        starts_C1=torch.from_numpy(starts_C1), species_C=placed(species, 0),
        library_C=torch.ones(places), batch_C=placed(None, -1), panel_C=placed(None, -1),
        cell_C=placed(numbers, -1), full_gene_N=nothing, full_count_N=torch.zeros(0),
        full_cell_N=nothing, length_C=length_C, n_cells=n_cells, n_tokens=n,
        longest=min(context, budget),
    )  # fmt: skip
