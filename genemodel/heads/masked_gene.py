"""Masked gene identity: find a gene from its value and the rest of the cell.

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
from genemodel.errors import ConfigError
from genemodel.heads.masking import Chosen
from genemodel.heads.objective import Passed
from genemodel.model.compiling import Regions
from genemodel.model.devices import full_precision, half_of, is_host
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

    starts_anew = False

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
        self.regions = Regions()

    def count(self, batch: CellBatch, chosen: Chosen | None) -> Tensor:
        """See :class:`~genemodel.heads.objective.Head`: hidden genes."""
        assert chosen is not None
        return chosen.n

    def cost(self, passed: Passed, *, trivial: bool) -> tuple[Tensor, Tensor | None]:
        """See :class:`~genemodel.heads.objective.Head`."""
        at = passed.hidden
        assert at is not None
        gene_VD = passed.model.embedding.token.weight
        found: tuple[Tensor, Tensor | None] = self(
            at.hidden_MD, at.gene_M, at.species_M, at.real_M, gene_VD, trivial=trivial
        )
        return found

    def compile_region(self, backend: str | Callable[..., Any]) -> None:
        """See :class:`~genemodel.heads.objective.Head`: the chunks and what lies before them."""
        self.regions.backend = backend

    def transform(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) → (M, D), before the product with the gene embedding."""
        dense, norm = self.dense, self.norm
        return self.regions.run(transformed)(
            hidden_MD, dense.weight, dense.bias, norm.weight, norm.bias, norm.eps
        )

    def logits(self, hidden_MD: Tensor, species_M: Tensor, gene_VD: Tensor) -> Tensor:
        """Score every gene for the masked rows only: (M, D) → (M, V)."""
        return self.transform(hidden_MD) @ gene_VD.T + self.bias_SV[species_M]

    def forward(
        self,
        hidden_MD: Tensor,
        gene_M: Tensor,
        species_M: Tensor,
        real_M: Tensor,
        gene_VD: Tensor,
        *,
        trivial: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return cross-entropy summed over the real rows, and the gene frequencies' own."""
        loss = ChunkedCrossEntropy.apply(
            self.transform(hidden_MD),
            gene_VD,
            self.bias_SV,
            species_M,
            gene_M,
            real_M,
            torch.is_grad_enabled(),
            self.regions,
        )
        if not trivial:
            return loss, None
        with torch.no_grad():
            return loss, (-self.trivial_SV[species_M, gene_M] * real_M).sum()


def transformed(
    hidden_MD: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> Tensor:
    """Dense layer, GELU, layer norm."""
    h_MD = F.gelu(F.linear(hidden_MD, weight, bias))
    return F.layer_norm(h_MD, scale.shape, scale, shift, eps)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy of h·Eᵀ + bias without ever holding all logits.

    The gradients are made in the forward pass, chunk by chunk, and only those that are asked for:
    none in validation, none of what is frozen. Statistics and sums are made in full precision.

    On a CPU, logits of a thousand rows times the vocabulary are hundreds of megabytes that the
    system maps, zeroes and unmaps several times a step; that takes longer than the arithmetic.
    There the real rows alone are taken, species by species, through one buffer. Elsewhere how many
    those are is not known without waiting for the device: all rows are taken, in chunks of a
    constant shape, and :func:`chunk_cross_entropy` is a compiled region of its own.
    """

    BUFFER = 6_000_000  # floats; 24 MB stays below the size from which malloc maps afresh
    ROWS = 1024  # of a chunk on a device: 0.15 GB of logits at 36,000 genes

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, h_MD, gene_VD, bias_SV, species_M, gene_M, real_M, learning, regions
    ):
        """Sum of the losses of the real rows; without ``learning`` there will be no backward."""
        wants = tuple(learning and w for w in ctx.needs_input_grad[:3])
        dtype = half_of(h_MD.device) or h_MD.dtype
        rows = (h_MD, gene_VD, bias_SV, species_M, gene_M, real_M)
        with full_precision(h_MD.device):
            if is_host(h_MD.device):
                total, *made = in_one_buffer(*rows, wants)
            else:
                total, *made = in_constant_chunks(*rows, wants, dtype, regions)
        kept = zip(wants, made, (h_MD, gene_VD, bias_SV), strict=True)
        ctx.save_for_backward(*(grad.to(of.dtype) if want else None for want, grad, of in kept))
        return total

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Scale the gradients made on the way forward."""
        made = (None if saved is None else grad * saved for saved in ctx.saved_tensors)
        return *made, None, None, None, None, None


def in_one_buffer(
    h_MD: Tensor,
    gene_VD: Tensor,
    bias_SV: Tensor,
    species_M: Tensor,
    gene_M: Tensor,
    real_M: Tensor,
    wants: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of the real rows and its gradients on a CPU; zeros where none is wanted."""
    wants_h, wants_gene, wants_bias = wants
    h_MD, gene_VD, bias_SV = h_MD.float(), gene_VD.float(), bias_SV.float()
    rows = max(1, ChunkedCrossEntropy.BUFFER // gene_VD.shape[0])
    buffer = h_MD.new_empty(rows, gene_VD.shape[0])
    grad_h, grad_gene, grad_bias = (
        torch.zeros_like(x) if want else x.new_zeros(())
        for want, x in zip(wants, (h_MD, gene_VD, bias_SV), strict=True)
    )
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
            if not any(wants):
                continue
            p.div_(norm)
            p[here] -= 1.0  # now the gradient of the logits
            if wants_h:
                grad_h[at] = p @ gene_VD
            if wants_gene:
                grad_gene.addmm_(p.T, h)
            if wants_bias:
                grad_bias[s] += p.sum(0)
    return total, grad_h, grad_gene, grad_bias


def in_constant_chunks(
    h_MD: Tensor,
    gene_VD: Tensor,
    bias_SV: Tensor,
    species_M: Tensor,
    gene_M: Tensor,
    real_M: Tensor,
    wants: tuple[bool, ...],
    dtype: torch.dtype,
    regions: Regions,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss of the real rows and its gradients by chunks of a constant shape; products in ``dtype``.

    Zeros where no gradient is wanted.
    """
    n_rows = h_MD.shape[0]
    n_chunks = -(-n_rows // ChunkedCrossEntropy.ROWS)
    spare = -n_rows % n_chunks
    padded = [F.pad(x, (0, spare)) for x in (species_M, gene_M, real_M)]
    chunks = [x.chunk(n_chunks) for x in (F.pad(h_MD.to(dtype), (0, 0, 0, spare)), *padded)]
    table_VD = gene_VD.to(dtype)
    total, grad_gene, grad_bias = (
        torch.zeros(shape, device=h_MD.device)
        for shape in ((), gene_VD.shape if wants[1] else (), bias_SV.shape if wants[2] else ())
    )
    grad_h = []
    run = regions.run(chunk_cross_entropy)
    for h, species, gene, real in zip(*chunks, strict=True):
        total, here, grad_gene, grad_bias = run(
            h, table_VD, bias_SV, species, gene, real, total, grad_gene, grad_bias, wants
        )
        grad_h.append(here)
    return total, torch.cat(grad_h)[:n_rows] if wants[0] else total, grad_gene, grad_bias


def chunk_cross_entropy(
    h_MD: Tensor,
    table_VD: Tensor,
    bias_SV: Tensor,
    species_M: Tensor,
    gene_M: Tensor,
    real_M: Tensor,
    total: Tensor,
    grad_gene: Tensor,
    grad_bias: Tensor,
    wants: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add one chunk's loss and gradients to the sums; returns them, with the chunk's own rows."""
    wants_h, wants_gene, wants_bias = wants
    logits_MV = (h_MD @ table_VD.T).float() + bias_SV.index_select(0, species_M)
    log_norm_M = logits_MV.logsumexp(1)
    loss_M = log_norm_M - logits_MV.gather(1, gene_M[:, None])[:, 0]
    total = total + torch.where(real_M, loss_M, 0.0).sum()
    grad_h = total
    if wants_h or wants_gene or wants_bias:
        is_truth_MV = torch.arange(table_VD.shape[0], device=h_MD.device) == gene_M[:, None]
        grad_MV = (logits_MV - log_norm_M[:, None]).exp() - is_truth_MV.float()
        grad_MV = (grad_MV * real_M[:, None]).to(h_MD.dtype)
        if wants_h:
            grad_h = (grad_MV @ table_VD).float()
        if wants_gene:
            grad_gene = grad_gene + (grad_MV.T @ h_MD).float()
        if wants_bias:
            species_S1 = torch.arange(bias_SV.shape[0], device=h_MD.device)[:, None]
            grad_bias = grad_bias + ((species_M == species_S1).to(h_MD.dtype) @ grad_MV).float()
    return total, grad_h, grad_gene, grad_bias
