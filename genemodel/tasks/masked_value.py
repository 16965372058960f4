"""Masked value: find how strongly a known gene is expressed from the rest of the cell.

The model sees no rank, and tokens attend as a set, so a hidden value cannot be read off the
neighbours between which it was sorted (as it can in models with rank positions).

Axes: M masked tokens, D width, V vocabulary, S species.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.cells.statistics import GeneStatistics
from genemodel.model.gene_model import initialise
from genemodel.tasks.masked_gene import check_fraction


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

    def predict(self, hidden_MD: Tensor, gene_M: Tensor, species_M: Tensor) -> Tensor:
        """(M, D) → (M,)."""
        h_MD = self.norm(F.gelu(self.dense(hidden_MD)))
        return self.out(h_MD)[:, 0] + self.mean_SV[species_M, gene_M]

    def forward(
        self, hidden_MD: Tensor, value_M: Tensor, gene_M: Tensor, species_M: Tensor, real_M: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return squared error summed over the real rows, and the per-gene mean's own."""
        loss_M = (self.predict(hidden_MD, gene_M, species_M).float() - value_M) ** 2
        trivial_M = (self.trivial_SV[species_M, gene_M] - value_M) ** 2
        return (loss_M * real_M).sum(), (trivial_M * real_M).sum()
