"""Masked value: find how strongly a known gene is expressed from the rest of the cell.

The model sees no rank, and tokens attend as a set, so a hidden value cannot be read off the
neighbours between which it was sorted (as it can in models with rank positions).

Axes: M masked tokens, D width, V vocabulary, S species.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.corpus.statistics import GeneStatistics
from genemodel.heads.masked_gene import check_fraction
from genemodel.heads.masking import Chosen
from genemodel.heads.objective import Passed
from genemodel.model.gene_model import initialise


@dataclass(frozen=True)
class MaskedValueSettings:
    """Masked value.

    Attributes
    ----------
    weight
        Of this objective in the total; 0 switches it off.
    fraction
        Share of a cell's genes whose value is hidden. Their identities stay visible.
    """

    weight: float = 1.0
    fraction: float = 0.15

    def __post_init__(self) -> None:
        check_fraction("task.masked_value.fraction", self.fraction)


class MaskedValueHead(nn.Module):
    """Deviation of log1p(counts per 10⁴) from the gene's own mean where detected."""

    trivial_SV: Tensor

    starts_anew = False

    def __init__(self, width: int, statistics: GeneStatistics) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)
        initialise(self)
        nn.init.zeros_(self.out.weight)  # start at the trivial predictor
        mean_SV = torch.from_numpy(statistics.mean_value_SV).float()
        self.mean_SV = nn.Parameter(mean_SV.clone())
        self.register_buffer("trivial_SV", mean_SV, persistent=False)

    def count(self, batch: CellBatch, chosen: Chosen | None) -> Tensor:
        """See :class:`~genemodel.heads.objective.Head`: hidden values."""
        assert chosen is not None
        return chosen.n

    def cost(self, passed: Passed, *, trivial: bool) -> tuple[Tensor, Tensor | None]:
        """See :class:`~genemodel.heads.objective.Head`."""
        at = passed.hidden
        assert at is not None
        found: tuple[Tensor, Tensor | None] = self(
            at.hidden_MD, at.value_M, at.gene_M, at.species_M, at.real_M, trivial=trivial
        )
        return found

    def compile_region(self, backend: str | Callable[..., Any]) -> None:
        """See :class:`~genemodel.heads.objective.Head`."""
        self.compile(dynamic=False, fullgraph=True, backend=backend)

    def predict(self, hidden_MD: Tensor, gene_M: Tensor, species_M: Tensor) -> Tensor:
        """(M, D) → (M,)."""
        h_MD = self.norm(F.gelu(self.dense(hidden_MD)))
        return self.out(h_MD)[:, 0] + _at(self.mean_SV, species_M, gene_M)

    def forward(
        self,
        hidden_MD: Tensor,
        value_M: Tensor,
        gene_M: Tensor,
        species_M: Tensor,
        real_M: Tensor,
        *,
        trivial: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return squared error summed over the real rows, and the per-gene mean's own."""
        # Rows that are not real may all hold the same token; their gradients, which are nothing,
        # need not queue up for its place.
        row_M = torch.arange(gene_M.shape[0], device=gene_M.device)
        gene_M = torch.where(real_M, gene_M, row_M % self.mean_SV.shape[1])
        loss_M = (self.predict(hidden_MD, gene_M, species_M).float() - value_M) ** 2
        loss = (loss_M * real_M).sum()
        if not trivial:
            return loss, None
        with torch.no_grad():
            trivial_M = (_at(self.trivial_SV, species_M, gene_M) - value_M) ** 2
            return loss, (trivial_M * real_M).sum()


def _at(table_SV: Tensor, species_M: Tensor, gene_M: Tensor) -> Tensor:
    """Entries of a table by species and gene, (M,)."""
    return table_SV.flatten().index_select(0, species_M * table_SV.shape[1] + gene_M)
