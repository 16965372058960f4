"""``CellBatch``: the one type that every room knows.

Legend, kept from the loader to the logits. An array's suffix names its axes::

    T  packed tokens: a fixed budget; cells lie end to end, the tail is cut into dummy cells
    C  cells: a fixed number of places; the first ``n_cells`` are real, then come the tail's pieces
    N  expressed genes of the real cells, end to end (not cut by the context)
    D  width      H  heads      K  width of a head      V  vocabulary
    M  masked tokens            P  knowledge tables     S  species

=================  =======  ==================================================================
field              dtype    meaning
=================  =======  ==================================================================
gene_T             int64    token; ``CELL`` opens every cell, ``PAD`` fills the dummy tail
value_T            float32  log1p(count ÷ library × 10⁴); 0 at ``CELL`` and ``PAD``
rank_T             int64    place in its cell by count ÷ median, 0 = ``CELL``
segment_T          int64    which place in C the token belongs to
starts_C1          int32    first token of every cell; repeated ``T`` after the tail
species_C          int64    position in ``vocabulary.species``
library_C          float32  counts of the cell over the whole vocabulary
batch_C            int64    technical batch code, −1 unknown
panel_C            int64    source code: which genes were measured, −1 unknown
cell_C             int64    permanent cell number in its corpus, −1 dummy
full_gene_N        int64    every expressed gene of the real cells, ascending within a cell
full_count_N       float32  its count
full_cell_N        int64    which place in C it belongs to
shown_count_N      float32  the part of the count that the tokens are made of; None where it is all
length_C           int64    tokens of the real cells, a numpy array: never on a device
=================  =======  ==================================================================

Cells of a published style (:mod:`genemodel.batches.published`) differ in three fields: Geneformer
V1's have no ``CELL``, and V2's end with ``EOS``; ``rank_T`` is the row of the position table;
``value_T`` is GeneCompass's log2(1 + count ÷ median).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(slots=True)
class CellBatch:
    """Packed cells of one micro-batch; see the legend at the top of this file.

    ``length_C``, ``n_cells``, ``n_tokens`` (all without the dummy tail), ``longest`` (which no
    cell and no piece of the tail exceeds; a constant of the run) and ``epoch`` are known on the
    host, so reading them never waits for a device.
    """

    gene_T: Tensor
    value_T: Tensor
    rank_T: Tensor
    segment_T: Tensor
    starts_C1: Tensor
    species_C: Tensor
    library_C: Tensor
    batch_C: Tensor
    panel_C: Tensor
    cell_C: Tensor
    full_gene_N: Tensor
    full_count_N: Tensor
    full_cell_N: Tensor
    length_C: np.ndarray
    n_cells: int
    n_tokens: int
    longest: int
    epoch: int = 0
    shown_count_N: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy every tensor to ``device``."""
        return self._with_tensors(lambda value: value.to(device, non_blocking=non_blocking))

    def _with_tensors(self, change: Callable[[Tensor], Tensor]) -> Self:
        tensors: dict[str, Any] = {
            field.name: change(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **tensors)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.gene_T.device

    @property
    def fill(self) -> float:
        """Share of the token budget that real cells use."""
        return self.n_tokens / self.gene_T.shape[0]

    @property
    def shown_N(self) -> Tensor:
        """Counts that the tokens are made of, beside ``full_gene_N``."""
        return self.full_count_N if self.shown_count_N is None else self.shown_count_N

    def per_cell(self, value_N: Tensor) -> Tensor:
        """Sum values beside ``full_gene_N`` within every real cell, (n_cells,) float32."""
        return sums_within(value_N, self.full_cell_N, self.n_cells)

    def lengths_C(self) -> np.ndarray:
        """Tokens of every real cell, its ``CELL`` token included; shape (n_cells,)."""
        return self.length_C


def sums_within(value_N: Tensor, cell_N: Tensor, n_cells: int) -> Tensor:
    """Sum values that lie one cell after the other, (C,) float32; no gradient goes through.

    Differences of one running sum take a tenth of the time that scattered additions take on a CPU,
    and always add in the same order.
    """
    with torch.no_grad():
        running_N1 = torch.zeros(value_N.shape[0] + 1, dtype=torch.float64, device=value_N.device)
        torch.cumsum(value_N.double(), 0, out=running_N1[1:])
        edges_C1 = torch.searchsorted(cell_N, torch.arange(n_cells + 1, device=cell_N.device))
        return running_N1[edges_C1].diff().float()
