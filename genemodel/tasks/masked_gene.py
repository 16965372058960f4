"""Masked gene identity: find a gene from its value and the rest of the cell.

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

    trivial_SV: Tensor

    def __init__(self, width: int, statistics: GeneStatistics) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        initialise(self)
        nn.init.constant_(self.norm.weight, 0.1)  # start near the bias: the gene frequencies
        log_SV = torch.from_numpy(statistics.frequency_SV).clamp_min(1e-12).log()
        log_SV[~torch.from_numpy(statistics.present_SV)] = IMPOSSIBLE
        self.bias_SV = nn.Parameter(log_SV.float())
        self.register_buffer("trivial_SV", log_SV.float().log_softmax(-1), persistent=False)

    def transform(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) → (M, D), before the product with the gene embedding."""
        return self.norm(F.gelu(self.dense(hidden_MD)))

    def logits(self, hidden_MD: Tensor, species_M: Tensor, gene_VD: Tensor) -> Tensor:
        """Score every gene for the masked rows only: (M, D) → (M, V)."""
        return self.transform(hidden_MD) @ gene_VD.T + self.bias_SV[species_M]

    def forward(
        self, hidden_MD: Tensor, gene_M: Tensor, species_M: Tensor, real_M: Tensor, gene_VD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return cross-entropy summed over the real rows, and the gene frequencies' own."""
        trivial = (-self.trivial_SV[species_M, gene_M] * real_M).sum()
        if hidden_MD.is_cuda:
            logits_MV = self.logits(hidden_MD, species_M, gene_VD)
            loss_M = F.cross_entropy(logits_MV.float(), gene_M, reduction="none")
            return (loss_M * real_M).sum(), trivial
        loss = ChunkedCrossEntropy.apply(
            self.transform(hidden_MD),
            gene_VD,
            self.bias_SV,
            species_M,
            gene_M,
            real_M,
            torch.is_grad_enabled(),
        )
        return loss, trivial


class ChunkedCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy of h·Eᵀ + bias without ever holding all logits.

    On a CPU, logits of a thousand rows times the vocabulary are hundreds of megabytes that the
    system maps, zeroes and unmaps several times a step; that takes longer than the arithmetic. The
    gradients are made in the forward pass, chunk by chunk in one buffer, and only those that are
    asked for: none in validation, none of what is frozen.
    """

    BUFFER = 6_000_000  # floats; 24 MB stays below the size from which malloc maps afresh

    @staticmethod
    def forward(ctx, h_MD, gene_VD, bias_SV, species_M, gene_M, real_M, learning):  # type: ignore[no-untyped-def]
        """Sum of the losses of the real rows; without ``learning`` there will be no backward."""
        wants_h, wants_gene, wants_bias = (learning and w for w in ctx.needs_input_grad[:3])
        rows = max(1, ChunkedCrossEntropy.BUFFER // gene_VD.shape[0])
        buffer = h_MD.new_empty(rows, gene_VD.shape[0])
        grad_h = torch.zeros_like(h_MD) if wants_h else None
        grad_gene = torch.zeros_like(gene_VD) if wants_gene else None
        grad_bias = torch.zeros_like(bias_SV) if wants_bias else None
        total = h_MD.new_zeros(())
        for s in range(bias_SV.shape[0]):
            for at in torch.nonzero(real_M & (species_M == s))[:, 0].split(rows):
                h, p = h_MD[at], buffer[: at.numel()]
                here = torch.arange(at.numel()), gene_M[at]
                torch.addmm(bias_SV[s], h, gene_VD.T, out=p)
                highest = p.amax(1, keepdim=True)
                score = p[here] - highest[:, 0]
                p.sub_(highest).exp_()
                norm = p.sum(1, keepdim=True)
                total += (norm[:, 0].log() - score).sum()
                if not (wants_h or wants_gene or wants_bias):
                    continue
                p.div_(norm)
                p[here] -= 1.0  # now the gradient of the logits
                if grad_h is not None:
                    grad_h[at] = p @ gene_VD
                if grad_gene is not None:
                    grad_gene.addmm_(p.T, h)
                if grad_bias is not None:
                    grad_bias[s] += p.sum(0)
        ctx.save_for_backward(grad_h, grad_gene, grad_bias)
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Scale the gradients made on the way forward."""
        made = (None if saved is None else grad * saved for saved in ctx.saved_tensors)
        return *made, None, None, None, None
