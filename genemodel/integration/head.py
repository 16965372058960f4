"""The network of the batch-robust embedding: a conditional count autoencoder, and its losses.

The encoder sees one cell (optionally with a cached cell vector of a pre-trained model) and never
its batch; the decoder explains the same cell's counts and is told the batch, so that the latent
need not carry it.

Axes: C cells of a step, G genes, D latent, B batches, F features of a cell vector, E width of
pre-trained gene vectors, H hidden units, R rank of the decoder, N stored counts, L labels.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genemodel.batches.batch import CellBatch
from genemodel.errors import ConfigError
from genemodel.expression.likelihood import negative_binomial_loss
from genemodel.expression.rates import at_library, log_shares, logits
from genemodel.finetuning.setting_ranges import check_numbers
from genemodel.heads.parts import LossPart
from genemodel.model.count_encoder import CountEncoder
from genemodel.model.flops import encoder_flops
from genemodel.model.gene_model import Encoded


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
    full_passes
        Above this many cells the passes fall in proportion, so that the steps no longer grow: at
        20 passes and 128 cells a step they are 31,250. (scVI's rule does the same above 20,000
        cells.)
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
    spare_private
        Whether it is fitted once more without populations that seem to be of one batch alone, where
        some are found; without labels they are sought and warned of either way.
    gene_vectors
        Whether the genes start from the gene vectors of a pre-trained model, where there is one.
    few_cells
        With fewer cells than this to train on, the latent is linear components of the cells and
        what the network adds to them in few passes: a twentieth of the cells, but 10. 0 for never,
        which is so where labels are given.

    Notes
    -----
    Where the values come from (``docs/experiments.md``, totals over development sets, 23 to 26
    November 2026): ``latent`` 10 against 24 gains .006 and .014 of biology; ``dropout`` .3 and .5
    buy biology with mixing, .001 less and .004 more in all; 4,000 ``n_genes`` gain on one set of
    four; 3,000 ``steps`` lose up to .04; ``kl_weight`` 1.4 gains .01 on one set and loses .006 on
    another. ``few_cells``: the components as a start gain below it and lose .05 on one set of 561
    cells. All others are those of the first recipe and were not varied one by one.
    """

    n_genes: int = 2000
    latent: int = 10
    hidden: int = 128
    rank: int = 64
    steps: int = 1000
    batch_cells: int = 128
    passes: int = 20
    full_passes: int = 200_000
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
    spare_private: bool = False
    gene_vectors: bool = False
    few_cells: int = 500

    def __post_init__(self) -> None:
        """Refuse values that no run can be made with."""
        check_numbers(
            self,
            positive=(
                "n_genes",
                "latent",
                "hidden",
                "rank",
                "steps",
                "batch_cells",
                "full_passes",
            ),
            shares=("warm_up", "keep_min", "kl_ramp", "dropout", "feature_dropout"),
            not_negative=("passes", "few_cells", "weight_decay", "kl_weight", "label_weight"),
        )
        if self.keep_min == 0 or self.peak_rate <= 0 or self.max_norm <= 0:
            raise ConfigError("keep_min, peak_rate and max_norm must be above 0.")

    def steps_over(self, n_cells: int, at_once: int) -> int:
        """Return the number of steps of so many cells at once over so many cells."""
        visits = self.passes * min(n_cells, self.full_passes)
        return max(self.steps, math.ceil(visits / at_once))


class Prepared:
    """A micro-batch as the head takes it."""

    __slots__ = ("code_C", "items", "seen")

    def __init__(self, seen: CellBatch, items: dict[str, Tensor], code_C: Tensor | None) -> None:
        self.seen, self.items, self.code_C = seen, items, code_C


class IntegrationHead(nn.Module):
    """Latent of a cell, and the decoder of its counts, which alone is told the batch.

    An objective (:class:`~genemodel.heads.objective.Objective`) of three losses: ``counts``, in
    nats a cell of all molecules whichever were shown; ``kl``; and ``label`` where there are labels.

    Parameters
    ----------
    n_genes, n_batches
        Genes that the encoder reads, which are those decoded; batches of the training cells.
    settings
        Widths and weights.
    place_V
        Where each gene of the cells is among those read, ``n_genes`` for the others.
    label_N
        Label of every cell by its permanent number, -1 where unknown.
    n_labels
        Cell types of the classification head, 0 without one.
    mean_share_G
        Mean share of every gene in a cell's counts: initial intercept of the decoder, and what a
        predictor knows that ignores the cell.
    share_B
        Share of the cells in each batch, which a cell of unknown batch is decoded at: a batch of
        one cell says next to nothing. The same for all by default.
    linear
        Whether the encoder lays linear components beside its hidden units, as many as the latent is
        wide: the latent starts there.
    """

    place_V: Tensor
    share_B: Tensor
    label_N: Tensor | None
    # The loss of the counts as it is shown, and as it is trained: per cell, without a constant.
    READ = "nats_per_count"
    silent = ("counts",)

    trivial_G: Tensor

    def __init__(
        self,
        n_genes: int,
        n_batches: int,
        settings: IntegrationSettings,
        *,
        place_V: Tensor | None = None,
        label_N: np.ndarray | None = None,
        n_labels: int = 0,
        mean_share_G: np.ndarray | None = None,
        share_B: Tensor | None = None,
        linear: bool = False,
    ) -> None:
        super().__init__()
        width, latent, rank = settings.hidden, settings.latent, settings.rank
        self.settings, self.n_genes = settings, n_genes
        read = width + latent if linear else width
        self.to_mean, self.to_log_var = nn.Linear(read, latent), nn.Linear(read, latent)
        if linear:
            # The mean starts at the components; what the hidden units say is added to them.
            with torch.no_grad():
                self.to_mean.weight.copy_(torch.eye(latent, read).roll(width, 1))
                self.to_mean.bias.zero_()
        nn.init.zeros_(self.to_log_var.weight)
        nn.init.constant_(self.to_log_var.bias, -2.0)
        self.decode_in = nn.Linear(latent + n_batches, width)
        self.decode_norm = nn.LayerNorm(width)
        self.decode_out = nn.Linear(width, rank)
        self.gene_GR = nn.Parameter(torch.randn(n_genes, rank) * 0.05)
        share_G = torch.full((n_genes,), 1 / n_genes)
        if mean_share_G is not None:
            share_G = torch.from_numpy(np.asarray(mean_share_G, np.float32))
        self.intercept_G = nn.Parameter(torch.log(share_G + 1e-6))
        self.batch_gene_BG = nn.Parameter(torch.zeros(n_batches, n_genes))
        self.log_theta_G = nn.Parameter(torch.full((n_genes,), 0.7))
        self.to_label = nn.Linear(latent, n_labels) if n_labels else None
        if place_V is None:
            place_V = torch.arange(n_genes)
        self.register_buffer("place_V", place_V, persistent=False)
        if share_B is None:
            share_B = torch.full((n_batches,), 1 / n_batches)
        self.register_buffer("share_B", share_B, persistent=False)
        self.register_buffer("trivial_G", self.intercept_G.detach().clone(), persistent=False)
        self.register_buffer(
            "label_N",
            None if label_N is None else torch.from_numpy(np.asarray(label_N, np.int64)),
            persistent=False,
        )

    # -- the objective ---------------------------------------------------------------------------

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss at the end."""
        return self.weights_at(1.0)

    def weights_at(self, share: float) -> dict[str, float]:
        """Weights after this share of the steps: that of the divergence grows."""
        ramp = min(1.0, share / max(self.settings.kl_ramp, 1e-9))
        weights = {"counts": 1.0, "kl": self.settings.kl_weight * ramp}
        if self.to_label is not None:
            weights["label"] = self.settings.label_weight
        return {**weights, self.READ: 0.0}

    def prepare(self, batch: CellBatch, *, validation: bool = False) -> Prepared:
        """Look labels up; which molecules are shown is settled when the cells are read."""
        n_cells = torch.full((), batch.n_cells, device=batch.device)
        items, code_C = {"counts": n_cells, "kl": n_cells}, None
        items[self.READ] = self._read(batch)[2].sum()
        if self.label_N is not None:
            code_C = self.label_N[batch.cell_C[: batch.n_cells]]
            items["label"] = (code_C >= 0).sum()
        return Prepared(batch, items, code_C)

    def forward(
        self, model: nn.Module, encoded: Encoded, prepared: Prepared, *, trivial: bool = True
    ) -> dict[str, LossPart]:
        """Cost of a micro-batch; cells of unknown batch are decoded at the mean of all."""
        batch = prepared.seen
        n_cells = batch.n_cells
        hidden_CH = encoded.cell_CD[:n_cells]
        mean_CD, log_var_CD = self.latent(hidden_CH)
        z_CD = mean_CD
        if self.training:
            z_CD = mean_CD + torch.randn_like(mean_CD) * (0.5 * log_var_CD).exp()
        row_N, gene_N, count_N = self._read(batch)
        library_C = batch.per_cell(count_N).clamp_min(1.0)
        stored = (row_N, gene_N, count_N)
        log_mean_CG = at_library(self.log_share(z_CD, batch.batch_C[:n_cells]), library_C)
        counts = negative_binomial_loss(log_mean_CG, self.log_theta_G, *stored)
        divergence = gaussian_kl(mean_CD, log_var_CD)
        alone = None
        if trivial:
            with torch.no_grad():
                flat_CG = at_library(log_shares(self.trivial_G), library_C)
                alone = negative_binomial_loss(flat_CG, self.log_theta_G, *stored)
        parts = {
            "counts": LossPart(counts, prepared.items["counts"], alone),
            "kl": LossPart(divergence, prepared.items["kl"], torch.zeros_like(divergence)),
        }
        if self.to_label is not None and prepared.code_C is not None:
            cost = label_loss(self.to_label(z_CD), prepared.code_C)
            even = prepared.items["label"] * math.log(self.to_label.out_features)
            parts["label"] = LossPart(cost, prepared.items["label"], even)
        # The same in a unit that can be read and compared, with what no parameter enters.
        constant = torch.lgamma(count_N + 1).sum()
        parts[self.READ] = LossPart(
            counts.detach() + constant,
            prepared.items[self.READ],
            None if alone is None else alone + constant,
        )
        return parts

    def forward_flops(self, model: nn.Module, lengths_C: np.ndarray) -> int:
        """Operations of one forward pass: the matrices of encoder and decoder."""
        shape = self.settings
        per_cell = 2 * shape.hidden * (self.n_genes + shape.hidden + shape.rank)
        backbone = getattr(model, "backbone", None)
        beneath = 0 if backbone is None else encoder_flops(backbone.settings, lengths_C)
        return len(lengths_C) * (per_cell + 2 * shape.rank * self.n_genes) + beneath

    def _read(self, batch: CellBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Row, gene and value of all counts; those of other genes are 0 of some gene."""
        place_N = self.place_V[batch.full_gene_N]
        read_N = place_N < self.n_genes
        return (
            batch.full_cell_N,
            torch.where(read_N, place_N, 0),
            torch.where(read_N, batch.full_count_N, 0.0),
        )

    # -- the network -----------------------------------------------------------------------------

    def latent(self, hidden_CH: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent, (C, D) each."""
        return self.to_mean(hidden_CH), self.to_log_var(hidden_CH).clamp(-8, 4)

    def log_share(self, z_CD: Tensor, batch_C: Tensor) -> Tensor:
        """Log share of every gene in a cell's counts, (C, G); batch -1 is the mean of all cells."""
        n_batches = self.batch_gene_BG.shape[0]
        known_C1 = (batch_C >= 0)[:, None]
        which_CB = (batch_C[:, None] == torch.arange(n_batches, device=z_CD.device)).to(z_CD.dtype)
        which_CB = torch.where(known_C1, which_CB, self.share_B)
        hidden_CH = functional.gelu(
            self.decode_norm(self.decode_in(torch.cat([z_CD, which_CB], 1)))
        )
        logit_CG = logits(self.decode_out(hidden_CH), self.gene_GR, self.intercept_G)
        return log_shares(logit_CG + which_CB @ self.batch_gene_BG)


def gaussian_kl(mean_CD: Tensor, log_var_CD: Tensor) -> Tensor:
    """Kullback-Leibler divergence from the standard normal, summed over dimensions and cells."""
    return 0.5 * (mean_CD.square() + log_var_CD.exp() - 1 - log_var_CD).sum()


def label_loss(logits_CL: Tensor, label_C: Tensor) -> Tensor:
    """Cross-entropy summed over the labelled cells (label >= 0)."""
    cost_C = functional.cross_entropy(logits_CL, label_C.clamp_min(0), reduction="none")
    return (cost_C * (label_C >= 0)).sum()


@torch.no_grad()
def start_at_vectors(encoder: CountEncoder, head: IntegrationHead, vectors_GE: Tensor) -> None:
    """Start the genes at random projections of pre-trained vectors, as large as otherwise."""
    centred_GE = functional.normalize(vectors_GE - vectors_GE.mean(0), dim=1)
    n_genes, width = centred_GE.shape
    for target, scale in (
        (encoder.genes_in.weight.T, 1 / math.sqrt(3 * n_genes)),
        (head.gene_GR, 0.05),
    ):
        projected = centred_GE @ torch.randn(width, target.shape[1])
        target.copy_(projected / projected.std() * scale)
