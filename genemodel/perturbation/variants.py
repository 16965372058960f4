"""Perturbed cells as index tensors into the packed batch of the cells as they are.

Nothing is tokenised again and nothing is padded: of a batch of packed cells a list of *moves* says
which token of which cell goes where, and one sort of small keys gives the packed batch of the
variants.

A cell is a list of genes from the largest count ÷ median to the smallest, and every perturbation
is a move along it. What a move means depends on what a model reads:

==============  ==================================  ============================================
operation       ranks                               values
==============  ==================================  ============================================
delete          the gene goes                       the gene goes
overexpress     to the front, added where absent    its count ÷ median becomes the cell's largest
activate        up by quartiles, or to the front    … becomes that of the gene whose place it takes
inhibit         down by quartiles, or to the end    … becomes that of the gene whose place it takes
==============  ==================================  ============================================

The other genes *follow*, as if the cell had been counted so: ranks close up, and values are shares
of the new library. Or they are *held*: each keeps its rank and its value, so that what is seen is
the gene's own doing and not the shift of everything behind it.

Imported models keep their own form: Geneformer V1 opens no cell, so that its first gene stands at
position 0; V2 closes cells with a token that stays last; GeneCompass reads log2(1 + count ÷
median), which no other gene changes, and counts positions from its first gene.

Axes: T tokens of the cells, C cells, W variants, M moves, R tokens of the variants.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.batches.tokens import Style, TokenSettings
from genemodel.expression.normalise import DEPTH

type Operation = Literal["delete", "overexpress", "inhibit", "activate"]
OPERATIONS: tuple[Operation, ...] = ("delete", "overexpress", "inhibit", "activate")
QUARTILES = 4


@dataclass(frozen=True)
class Moves:
    """What is changed: every variant has one move or several, in order.

    Attributes
    ----------
    cell_W
        Cell of the batch that a variant is made of.
    variant_M
        Variant of every move, ascending.
    gene_M
        Token that is moved.
    place_M
        Its place among the genes of the cell, from 1; 0 where the cell lacks the gene.
    """

    cell_W: np.ndarray
    variant_M: np.ndarray
    gene_M: np.ndarray
    place_M: np.ndarray

    def __len__(self) -> int:
        return self.cell_W.size

    def take(self, start: int, stop: int) -> "Moves":
        """Take consecutive variants."""
        a, b = np.searchsorted(self.variant_M, [start, stop])
        return Moves(
            self.cell_W[start:stop], self.variant_M[a:b] - start, self.gene_M[a:b],
            self.place_M[a:b],
        )  # fmt: skip

    def lengths_W(self, length_C: np.ndarray, operation: Operation, context: int) -> np.ndarray:
        """Tokens of every variant."""
        absent_M = self.place_M == 0
        more = -1 if operation == "delete" else 0
        change_M = np.where(absent_M, 1 if operation == "overexpress" else 0, more)
        change_W = np.bincount(self.variant_M, change_M, self.cell_W.size).astype(np.int64)
        return np.minimum(length_C[self.cell_W] + change_W, context)


@dataclass(frozen=True)
class Variants:
    """Packed variants, and where each of their tokens was.

    Attributes
    ----------
    batch
        As a model reads it; without a tail, so that nothing is calculated on padding.
    source_R
        Place of the token in the batch of the cells; -1 for a gene that was added.
    moved_R
        Whether the token is one that the perturbation moved or added.
    """

    batch: CellBatch
    source_R: Tensor
    moved_R: Tensor


def goal_places(
    operation: Operation, place_M: np.ndarray, genes_M: np.ndarray, quartiles: int | None
) -> np.ndarray:
    """Return whose place every moved gene takes, from 1.

    Parameters
    ----------
    operation
        Not ``delete``.
    place_M
        Where the genes are, 0 where absent.
    genes_M
        Genes of the cell.
    quartiles
        How far ``activate`` and ``inhibit`` go: into the middle of the quartile so many above or
        below, and to the very end where there is none. None: to the end.
    """
    up = operation != "inhibit"
    last_M = np.ones_like(place_M) if up else genes_M
    if operation == "overexpress" or quartiles is None:
        return last_M
    quartile_M = -(-QUARTILES * place_M // np.maximum(genes_M, 1))  # 1 … 4
    goal_M = quartile_M + (-quartiles if up else quartiles)
    middle_M = np.ceil((goal_M - 0.5) * genes_M / QUARTILES).astype(np.int64).clip(1, genes_M)
    return np.where((goal_M < 1) | (goal_M > QUARTILES), last_M, middle_M)


def vary(
    base: CellBatch,
    moves: Moves,
    operation: Operation,
    inverse_median_V: Tensor,
    *,
    tokens: TokenSettings,
    quartiles: int | None = None,
    held: bool = False,
) -> Variants:
    """Make the packed batch of the variants.

    Parameters
    ----------
    base
        The cells as they are.
    moves
        What is changed.
    operation, quartiles
        How; see :func:`goal_places`.
    inverse_median_V
        1 ÷ non-zero median of every token, on the device of the batch.
    tokens
        Form of a cell. Where a gene is added to a full one, the last gene falls out.
    held
        The other genes keep rank and value, and the cell its library.
    """
    device, opens, first_gene = base.device, int(tokens.opens), tokens.first_gene
    length_C = np.asarray(base.length_C, np.int64)
    start_C = base.starts_C1[: base.n_cells].long()
    cell_W = torch.from_numpy(moves.cell_W).to(device)
    n_W = len(moves)
    length_W = length_C[moves.cell_W]
    offset_W = np.concatenate([[0], np.cumsum(length_W)])
    variant_R = torch.repeat_interleave(
        torch.arange(n_W, device=device), torch.from_numpy(length_W).to(device)
    )
    offset_R = torch.from_numpy(offset_W).to(device)[variant_R]
    place_R = torch.arange(int(offset_W[-1]), device=device) - offset_R
    source_R = start_C[cell_W][variant_R] + place_R
    gene_R = base.gene_T[source_R]

    # Keys leave room for every move of a variant between two places.
    order_M = np.arange(moves.variant_M.size) - np.searchsorted(moves.variant_M, moves.variant_M)
    step = int(order_M.max(initial=0)) + 2
    # What closes a cell (an end token of an imported model) stays behind everything else.
    closing_R = (gene_R < first_gene) & (place_R > 0)
    key_R = (place_R + 1) * step + closing_R * (2 * step * (int(length_C.max(initial=1)) + 2))
    count_R = counts_of(
        base.value_T[source_R], gene_R, base.library_C[cell_W][variant_R], inverse_median_V,
        tokens.style,
    )  # fmt: skip
    new_R, keep_R = count_R.clone(), torch.ones_like(closing_R)
    moved_R = torch.zeros_like(closing_R)
    rank_R = base.rank_T[source_R].clone()

    there_M = moves.place_M > 0
    at_M = torch.from_numpy(
        offset_W[moves.variant_M[there_M]] + moves.place_M[there_M] - 1 + opens
    ).to(device)  # fmt: skip
    moved_R[at_M] = True
    extra: list[tuple[Tensor, Tensor]] = []
    if operation == "delete":
        keep_R[at_M] = False
        new_R[at_M] = 0.0
    else:
        genes_M = _genes_of(base, length_C, first_gene)[moves.cell_W[moves.variant_M]]
        goal_M = goal_places(operation, moves.place_M, genes_M, quartiles)
        position_M = goal_M - 1 + opens
        before = operation != "inhibit"
        # Between two places: before that of a gene above which it goes, behind one below.
        key_M = torch.from_numpy(
            (position_M + 1) * step + order_M + (1 - step if before else 1)
        ).to(device)  # fmt: skip
        stays_M = torch.from_numpy(goal_M == moves.place_M).to(device)
        whose_M = torch.from_numpy(offset_W[moves.variant_M] + position_M).to(device)
        gene_M = torch.from_numpy(moves.gene_M).to(device)
        ratio_M = count_R[whose_M] * inverse_median_V[gene_R[whose_M]].double()
        count_M = ratio_M / inverse_median_V[gene_M].double()
        is_there_M = torch.from_numpy(there_M).to(device)
        key_R[at_M] = key_M[is_there_M]
        new_R[at_M] = torch.where(stays_M[is_there_M], count_R[at_M], count_M[is_there_M])
        rank_M = _ranks(torch.from_numpy(position_M).to(device), tokens.style)
        rank_R[at_M] = rank_M[is_there_M]
        absent_M = ~is_there_M
        if operation == "overexpress" and bool((~there_M).any()):
            variant_M = torch.from_numpy(moves.variant_M).to(device)[absent_M]
            nowhere_M = torch.full_like(variant_M, -1)
            extra = [
                (variant_R, variant_M), (source_R, nowhere_M), (gene_R, gene_M[absent_M]),
                (key_R, key_M[absent_M]), (count_R, torch.zeros_like(count_M[absent_M])),
                (new_R, count_M[absent_M]), (keep_R, torch.ones_like(absent_M[absent_M])),
                (moved_R, torch.ones_like(absent_M[absent_M])),
                (rank_R, rank_M[absent_M]),
                (closing_R, torch.zeros_like(absent_M[absent_M])),
            ]  # fmt: skip
    if extra:
        (variant_R, source_R, gene_R, key_R, count_R, new_R, keep_R, moved_R, rank_R,
         closing_R) = (torch.cat(pair) for pair in extra)  # fmt: skip

    library_W = base.library_C[cell_W].double()
    if not held:
        change_R = (new_R - count_R).where(gene_R >= first_gene, 0.0)
        library_W = library_W.index_add(0, variant_R, change_R)
    key_R = variant_R * (int(key_R.max()) + 1) + key_R if key_R.numel() else key_R
    (kept_R,) = keep_R.nonzero(as_tuple=True)
    order_R = kept_R[torch.argsort(key_R[kept_R], stable=True)]
    # A cell that has become too long loses its last genes.
    variant_R = variant_R[order_R]
    size_W = torch.bincount(variant_R, minlength=n_W)
    first_W = size_W.cumsum(0) - size_W
    place_R = torch.arange(order_R.numel(), device=device) - first_W[variant_R]
    if extra:
        closing_W = torch.bincount(variant_R[closing_R[order_R]], minlength=n_W)
        fits_R = closing_R[order_R] | (place_R < tokens.context - closing_W[variant_R])
        order_R, variant_R = order_R[fits_R], variant_R[fits_R]
        size_W = torch.bincount(variant_R, minlength=n_W)
        first_W = size_W.cumsum(0) - size_W
        place_R = torch.arange(order_R.numel(), device=device) - first_W[variant_R]
    source_R, moved_R = source_R[order_R], moved_R[order_R]
    gene_R = gene_R[order_R]
    if tokens.style == "genecompass":
        value_R = torch.log2(1.0 + new_R[order_R] * inverse_median_V[gene_R].double()).float()
    else:
        value_R = torch.log1p(
            new_R[order_R] * (DEPTH / library_W.clamp_min(1e-9))[variant_R]
        ).float()  # fmt: skip
    value_R = value_R.where(gene_R >= first_gene, 0.0)
    if held or tokens.style == "genecompass":
        # To the bit what it was, for all that has not been moved.
        value_R = torch.where(moved_R, value_R, base.value_T[source_R.clamp_min(0)])
    sizes_W = moves.lengths_W(length_C, operation, tokens.context)
    starts_W1 = torch.zeros(n_W + 1, dtype=torch.int32, device=device)
    starts_W1[1:] = size_W.cumsum(0)
    nothing_N = torch.empty(0, dtype=torch.int64, device=device)
    batch = CellBatch(
        gene_T=gene_R,
        value_T=value_R,
        rank_T=rank_R[order_R] if held else _ranks(place_R, tokens.style),
        segment_T=variant_R,
        starts_C1=starts_W1,
        species_C=base.species_C[cell_W],
        library_C=library_W.float(),
        batch_C=base.batch_C[cell_W],
        panel_C=base.panel_C[cell_W],
        cell_C=base.cell_C[cell_W],
        full_gene_N=nothing_N,
        full_count_N=nothing_N.float(),
        full_cell_N=nothing_N,
        length_C=sizes_W,
        n_cells=n_W,
        n_tokens=int(sizes_W.sum()),
        longest=int(sizes_W.max(initial=1)),
    )
    return Variants(batch, source_R, moved_R)


def counts_of(
    value_T: Tensor, gene_T: Tensor, library_T: Tensor, inverse_median_V: Tensor, style: Style
) -> Tensor:
    """Give counts of values, float64: of log1p(counts per 10⁴), or of GeneCompass's."""
    if style == "genecompass":
        return (torch.exp2(value_T.double()) - 1.0) / inverse_median_V[gene_T].double()
    return torch.expm1(value_T.double()) * (library_T.double() / DEPTH)


def _ranks(position_T: Tensor, style: Style) -> Tensor:
    """Row of the position table: GeneCompass's species token has none."""
    return (position_T - 1).clamp_min(0) if style == "genecompass" else position_T


def _genes_of(base: CellBatch, length_C: np.ndarray, first_gene: int) -> np.ndarray:
    """Genes of every cell: its tokens but the opening one and what closes it."""
    n = int(length_C.sum())
    is_gene_T = (base.gene_T[:n] >= first_gene).long()
    per_C = torch.zeros(base.n_cells, dtype=torch.int64, device=base.device)
    return per_C.index_add(0, base.segment_T[:n], is_gene_T).cpu().numpy()
