"""Masked gene identity: which gene is this, given its value and the rest of the cell?

Axes: M masked tokens, D width, V vocabulary, S species.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.cells.statistics import GeneStatistics
from genemodel.errors import ConfigError
from genemodel.model.gene_model import initialise

# Logit bias of genes of other species: they cannot occur, and e⁻³⁰ keeps gradients finite.
IMPOSSIBLE = -30.0


@dataclass(frozen=True)
class MaskedGeneSettings:
    """Masked gene identity.

    Attributes
    ----------
    weight
        Of this objective in the total; 0 switches it off.
    fraction
        Share of a cell's genes whose identity is hidden. Their values stay visible.
    """

    weight: float = 1.0
    fraction: float = 0.15

    def __post_init__(self) -> None:
        check_fraction("task.masked_gene.fraction", self.fraction)


def check_fraction(name: str, fraction: float) -> None:
    """Refuse a share of hidden tokens outside (0, 1)."""
    if not 0 < fraction < 1:
        raise ConfigError(f"{name} is {fraction}: it is a share of tokens, between 0 and 1.")


class MaskedGeneHead(nn.Module):
    """BERT's head: transform, then the tied gene embedding, plus a bias per species and gene.

    The bias starts at the log frequency of the gene among the species' detections, so training
    starts at the trivial predictor instead of spending its first thousand steps finding it.
    """

    def __init__(self, width: int, statistics: GeneStatistics) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        initialise(self)
        log_SV = torch.from_numpy(statistics.frequency_SV).clamp_min(1e-12).log()
        log_SV[~torch.from_numpy(statistics.present_SV)] = IMPOSSIBLE
        self.bias_SV = nn.Parameter(log_SV.float())
        self.register_buffer("trivial_SV", log_SV.float().log_softmax(-1), persistent=False)

    def logits(self, hidden_MD: Tensor, species_M: Tensor, gene_VD: Tensor) -> Tensor:
        """Score every gene for the masked rows only: (M, D) → (M, V)."""
        h_MD = self.norm(F.gelu(self.dense(hidden_MD)))
        return h_MD @ gene_VD.T + self.bias_SV[species_M]

    def forward(
        self, hidden_MD: Tensor, gene_M: Tensor, species_M: Tensor, real_M: Tensor, gene_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return cross-entropy summed over the real rows, and the gene frequencies' own."""
        logits_MV = self.logits(hidden_MD, species_M, gene_VD)
        loss_M = F.cross_entropy(logits_MV.float(), gene_M, reduction="none")
        trivial_M = -self.trivial_SV[species_M, gene_M]
        return (loss_M * real_M).sum(), (trivial_M * real_M).sum()
