"""The network of the batch-robust embedding: a conditional count autoencoder, and its losses.

The encoder sees one cell (optionally with a cached cell vector of a pre-trained model) and never
its batch; the decoder explains the same cell's counts and is told the batch, so that the latent
need not carry it.

Axes: C cells of a step, G genes, D latent, B batches, F features of a cell vector, E width of
pre-trained gene vectors, H hidden units, R rank of the decoder, N stored counts, L labels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from genemodel.adapt.setting_ranges import check_numbers
from genemodel.errors import ConfigError
from genemodel.expression.normalise import log_normalised


@dataclass(frozen=True)
class IntegrationSettings:
    """One configuration for every data set.

    Attributes
    ----------
    n_genes
        Genes that are read and decoded, chosen per batch (`select_genes`).
    latent, hidden, rank
        Width of the latent, of the hidden layers and of the decoder's gene vectors.
    steps, batch_cells
        Optimiser steps and cells per step; the cost does not grow with the file.
    passes
        Lower bound for the number of times that each cell is seen; raises `steps` on large files.
    peak_rate, weight_decay, warm_up, max_norm
        AdamW with a one-cycle learning rate, and the gradient norm that is let through.
    keep_min
        Lowest keep-rate of the binomial thinning (1 turns it off).
    kl_weight, kl_ramp
        Weight of the Kullback-Leibler term and the share of the run over which it grows.
    dropout
        Dropout of the encoder's hidden layers.
    feature_dropout
        Share of cells whose backbone vector is hidden in a step.
    label_weight
        Weight of the cross-entropy on labelled cells (used only with labels).
    correct
        Whether the anchor-gated correction is fitted after training.
    gene_vectors
        Whether the genes start from the gene vectors of a pre-trained model, where there is one.
    """

    n_genes: int = 2000
    latent: int = 10
    hidden: int = 128
    rank: int = 64
    steps: int = 1000
    batch_cells: int = 128
    passes: int = 20
    peak_rate: float = 3e-3
    weight_decay: float = 1e-2
    warm_up: float = 0.15
    max_norm: float = 50.0
    keep_min: float = 0.5
    kl_weight: float = 2.0
    kl_ramp: float = 0.3
    dropout: float = 0.1
    feature_dropout: float = 0.2
    label_weight: float = 20.0
    correct: bool = True
    gene_vectors: bool = False

    def __post_init__(self) -> None:
        """Refuse values that no run can be made with."""
        check_numbers(
            self,
            positive=("n_genes", "latent", "hidden", "rank", "steps", "batch_cells"),
            shares=("warm_up", "keep_min", "kl_ramp", "dropout", "feature_dropout"),
            not_negative=("passes", "weight_decay", "kl_weight", "label_weight"),
        )
        if self.keep_min == 0 or self.peak_rate <= 0 or self.max_norm <= 0:
            raise ConfigError("keep_min, peak_rate and max_norm must be above 0.")


def gaussian_kl(mean_CD: Tensor, log_var_CD: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the standard normal: sum over D, mean over cells."""
    return 0.5 * (mean_CD.square() + log_var_CD.exp() - 1 - log_var_CD).sum(1).mean()


def label_loss(logits_CL: Tensor, label_C: Tensor) -> Tensor:
    """Cross-entropy over the labelled cells (label >= 0); zero when there are none."""
    known_C = label_C >= 0
    if not bool(known_C.any()):
        return logits_CL.sum() * 0.0
    return F.cross_entropy(logits_CL[known_C], label_C[known_C])


class IntegrationNet(nn.Module):
    """Encoder blind to the batch, negative-binomial decoder told about it.

    Parameters
    ----------
    n_genes, n_batches
        Genes read and decoded; batches of the training cells.
    settings
        Widths and dropout.
    n_features
        Width of the cached backbone vector, 0 without one.
    n_labels
        Cell types of the classification head, 0 without one.
    embedding_GE
        Pre-trained gene vectors: they initialise the input projection and the decoder's genes.
    mean_share_G
        Mean share of every gene in a cell's counts: initial intercept of the decoder.
    """

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        settings: IntegrationSettings,
        *,
        n_features: int = 0,
        n_labels: int = 0,
        embedding_GE: Tensor | None = None,
        mean_share_G: Tensor | None = None,
    ) -> None:
        super().__init__()
        width, latent, rank = settings.hidden, settings.latent, settings.rank
        self.settings = settings
        self.genes_in = nn.Linear(n_genes, width)
        self.features_in = nn.Linear(n_features, width) if n_features else None
        self.norm_in, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.hidden = nn.Linear(width, width)
        self.dropout = nn.Dropout(settings.dropout)
        self.to_mean, self.to_log_var = nn.Linear(width, latent), nn.Linear(width, latent)
        nn.init.zeros_(self.to_log_var.weight)
        nn.init.constant_(self.to_log_var.bias, -2.0)
        self.decode_in = nn.Linear(latent + n_batches, width)
        self.decode_norm = nn.LayerNorm(width)
        self.decode_out = nn.Linear(width, rank)
        self.gene_GR = nn.Parameter(torch.randn(n_genes, rank) * 0.05)
        share_G = torch.full((n_genes,), 1 / n_genes) if mean_share_G is None else mean_share_G
        self.intercept_G = nn.Parameter(torch.log(share_G + 1e-6))
        self.batch_gene_BG = nn.Parameter(torch.zeros(n_batches, n_genes))
        self.log_theta_G = nn.Parameter(torch.full((n_genes,), 0.7))
        self.to_label = nn.Linear(latent, n_labels) if n_labels else None
        self.input_mean_G = nn.Buffer(torch.zeros(n_genes))
        self.input_sd_G = nn.Buffer(torch.ones(n_genes))
        self.feature_mean_F = nn.Buffer(torch.zeros(n_features))
        self.feature_sd_F = nn.Buffer(torch.ones(n_features))
        if embedding_GE is not None:
            self._start_from(embedding_GE)

    @torch.no_grad()
    def _start_from(self, embedding_GE: Tensor) -> None:
        """Random projections of the gene vectors, scaled as the random start would be."""
        centred_GE = F.normalize(embedding_GE - embedding_GE.mean(0), dim=1)
        n_genes, width = centred_GE.shape
        for target, scale in (
            (self.genes_in.weight.T, 1 / math.sqrt(3 * n_genes)),
            (self.gene_GR, 0.05),
        ):
            projected = centred_GE @ torch.randn(width, target.shape[1])
            target.copy_(projected / projected.std() * scale)

    def encode(
        self,
        counts_CG: Tensor,
        features_CF: Tensor | None = None,
        measured_G: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, (C, D) each; no batch is needed.

        Parameters
        ----------
        counts_CG
            Raw counts of the genes that are read.
        features_CF
            Cell vectors, standardised; a row of zeros hides one.
        measured_G
            Genes that the data set measured, bool; the others count as neither high nor low.
        """
        value_CG = ((log_normalised(counts_CG) - self.input_mean_G) / self.input_sd_G).clamp(-6, 6)
        if measured_G is not None:
            value_CG = value_CG * measured_G
        hidden_CH = self.genes_in(value_CG)
        if self.features_in is not None and features_CF is not None:
            hidden_CH = hidden_CH + self.features_in(features_CF)
        hidden_CH = self.dropout(F.gelu(self.norm_in(hidden_CH)))
        hidden_CH = self.dropout(F.gelu(self.norm_hidden(self.hidden(hidden_CH) + hidden_CH)))
        return self.to_mean(hidden_CH), self.to_log_var(hidden_CH).clamp(-8, 4)

    def decode(self, z_CD: Tensor, batch_C: Tensor | None, library_C: Tensor) -> Tensor:
        """Log of the expected counts (C, G); `batch_C` None means the mean of all batches."""
        n_batches = self.batch_gene_BG.shape[0]
        if batch_C is None:
            which_CB = z_CD.new_full((len(z_CD), n_batches), 1 / n_batches)
        else:
            which_CB = F.one_hot(batch_C, n_batches).to(z_CD.dtype)
        hidden_CH = F.gelu(self.decode_norm(self.decode_in(torch.cat([z_CD, which_CB], 1))))
        logit_CG = self.decode_out(hidden_CH) @ self.gene_GR.T + self.intercept_G
        logit_CG = logit_CG + which_CB @ self.batch_gene_BG
        return F.log_softmax(logit_CG, 1) + library_C.log()[:, None]
