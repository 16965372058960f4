"""Decode a cell's counts from its one vector: the bottleneck that makes it a cell embedding.

rate = softmax over the measured genes of ⟨W·cell + shift of the technical batch, gene⟩ + base,
times the library. The technical batch enters here and nowhere else, so the cell vector need not
carry it (the idea of scVI, Lopez et al. 2018). Counts are negative binomial with one dispersion a
gene; a gene that was measured and not seen counts as a zero, a gene outside the panel as nothing.

Axes: C cells, D width, V vocabulary, S species, B technical batches, X panels, N expressed genes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch, sums_within
from genemodel.corpus.statistics import GeneStatistics, PrincipalGenes
from genemodel.errors import ConfigError
from genemodel.expression.likelihood import negative_binomial_loss
from genemodel.expression.rates import at_library, log_shares, logits
from genemodel.heads.masking import Chosen
from genemodel.heads.objective import Passed
from genemodel.model.gene_model import initialise


@dataclass(frozen=True)
class DecodeCountsSettings:
    """Count decoding from the cell vector.

    Attributes
    ----------
    weight
        Of this objective in the total; 0 switches it off.
    batch_key
        obs column of the technical batch, known to the decoder only; empty for none.
    batch_dropout
        Share of cells decoded as if their batch were unknown, so that the unknown batch stays a
        meaningful average.
    keep_min, keep_max
        Share of a cell's molecules that the model is shown, uniform between them and drawn anew in
        every epoch; the *others* are decoded, so that nothing is gained by copying. 1 and 1 show
        all of them, and all are decoded.
    """

    weight: float = 1.0
    batch_key: str = "batch"
    batch_dropout: float = 0.2
    keep_min: float = 1.0
    keep_max: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.batch_dropout <= 1:
            raise ConfigError(
                f"task.decode_counts.batch_dropout is {self.batch_dropout}: it is a share of "
                "cells, between 0 and 1."
            )
        if not 0 < self.keep_min <= self.keep_max <= 1 or (self.keep_min < 1) != (
            self.keep_max < 1
        ):
            raise ConfigError(
                f"task.decode_counts.keep_min={self.keep_min}, keep_max={self.keep_max}: shares of "
                "molecules above 0, the lower first, both below 1 so that there are others to "
                "decode; or 1 and 1 to show and decode all."
            )


class CellProjection(nn.Module):
    """Backbone's cell vector → the vector from which counts are decoded (and cells embedded).

    Library, species and technical batch have terms of their own in the decoder, so this vector
    has no use for them. It starts at zero: training starts at the pseudobulk.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.project = nn.Linear(width, width)
        initialise(self)
        nn.init.zeros_(self.project.weight)

    def forward(self, cell_CD: Tensor) -> Tensor:
        """(C, D) → (C, D)."""
        return self.project(self.norm(cell_CD))


class CountDecoder(nn.Module):
    """Cell vector → distribution of counts over the vocabulary."""

    measured_XV: Tensor
    trivial_SV: Tensor
    trivial_theta_V: Tensor
    starts_anew = False
    compiled = False

    def __init__(
        self, width: int, statistics: GeneStatistics, n_batches: int, measured_XV: Tensor
    ) -> None:
        super().__init__()
        n_tokens = statistics.dispersion_V.shape[0]
        self.batch = nn.Embedding(max(n_batches, 1), width)
        # Gene vectors of their own: the backbone's serve its input and its tied head.
        self.gene = nn.Embedding(n_tokens, width)
        initialise(self)
        self.projection = CellProjection(width)
        nn.init.normal_(self.gene.weight, std=width**-0.5)
        nn.init.zeros_(self.batch.weight)  # batches start alike
        log_rate_SV = torch.from_numpy(statistics.rate_SV).clamp_min(1e-9).log().float()
        log_theta_V = torch.from_numpy(statistics.dispersion_V).log().float()
        self.base_SV = nn.Parameter(log_rate_SV.clone())
        self.log_theta_V = nn.Parameter(log_theta_V.clone())
        self.register_buffer("trivial_SV", log_rate_SV, persistent=False)
        self.register_buffer("trivial_theta_V", log_theta_V.clone(), persistent=False)
        # The panels belong to the corpus, not to the model: not saved with the weights.
        self.register_buffer("measured_XV", measured_XV, persistent=False)

    def count(self, batch: CellBatch, chosen: Chosen | None) -> Tensor:
        """See :class:`~genemodel.heads.objective.Head`: expressed genes.

        Per expressed gene the loss is of the order of a cross-entropy, whatever the panel.
        """
        return torch.full((), batch.full_gene_N.shape[0], device=batch.device)

    def cost(self, passed: Passed, *, trivial: bool) -> tuple[Tensor, Tensor | None]:
        """See :class:`~genemodel.heads.objective.Head`: the molecules that were not shown."""
        truth = passed.truth
        # Compiled shapes are constant: all places are decoded, and the number of expressed genes
        # is the one axis that is left open. Otherwise only the real cells are.
        n = truth.cell_C.shape[0] if self.compiled else truth.n_cells
        library_C, count_N = truth.library_C[:n], truth.full_count_N
        if truth.shown_count_N is not None:
            count_N = count_N - truth.shown_count_N
            library_C = sums_within(count_N, truth.full_cell_N, n).clamp_min(1.0)
        full = (truth.full_cell_N, truth.full_gene_N, count_N)
        if self.compiled and truth.full_gene_N.shape[0] > 1:
            for each in full:
                torch._dynamo.mark_dynamic(each, 0)
        found: tuple[Tensor, Tensor | None] = self(
            passed.encoded.cell_CD[:n],
            truth.species_C[:n],
            truth.batch_C[:n],
            library_C,
            truth.panel_C[:n],
            truth.cell_C[:n] >= 0,
            *full,
            trivial=trivial,
        )
        return found

    def compile_region(self, backend: str | Callable[..., Any]) -> None:
        """See :class:`~genemodel.heads.objective.Head`."""
        self.compiled = True
        self.compile(dynamic=False, fullgraph=True, backend=backend)

    @torch.no_grad()
    def start_at(self, components: PrincipalGenes) -> None:
        """Start the gene vectors at principal components: log-rate per unit of a score.

        Values are log1p; where a gene is rare its log-rate moves faster than its value, by about
        the inverse of its mean.
        """
        mean_V = torch.from_numpy(components.mean_SV).amax(0).clamp(0.2, 1.0)
        slope_VK = torch.from_numpy(components.deviation_VK) / mean_V[:, None]
        k = min(slope_VK.shape[1], self.gene.weight.shape[1])
        self.gene.weight[:, :k] = slope_VK[:, :k]

    def log_rate(
        self,
        cell_CD: Tensor,
        species_C: Tensor,
        batch_C: Tensor,
        library_C: Tensor,
        measured_CV: Tensor,
    ) -> Tensor:
        """Log mean count of every measured gene; shape (C, V)."""
        shift_CD = self.batch(batch_C.clamp_min(0)).masked_fill((batch_C < 0)[:, None], 0.0)
        z_CD = self.projection(cell_CD) + shift_CD
        logit_CV = logits(z_CD, self.gene.weight, self.base_SV.index_select(0, species_C))
        return at_library(log_shares(logit_CV, measured_CV), library_C)

    def forward(
        self,
        cell_CD: Tensor,
        species_C: Tensor,
        batch_C: Tensor,
        library_C: Tensor,
        panel_C: Tensor,
        real_C: Tensor,
        cell_N: Tensor,
        gene_N: Tensor,
        count_N: Tensor,
        *,
        trivial: bool = True,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the negative log-likelihood of the real cells, and the pseudobulk's own."""
        measured_CV = self.measured_XV[panel_C] & real_C[:, None]
        log_rate_CV = self.log_rate(cell_CD, species_C, batch_C, library_C, measured_CV)
        counts = (cell_N, gene_N, count_N)
        ways: Any = {"measured_CG": measured_CV, "complete": True}
        loss = negative_binomial_loss(log_rate_CV, self.log_theta_V, *counts, **ways)
        if not trivial:
            return loss, None
        with torch.no_grad():
            trivial_CV = log_shares(self.trivial_SV[species_C], measured_CV)
            trivial_CV = at_library(trivial_CV, library_C)
            return loss, negative_binomial_loss(trivial_CV, self.trivial_theta_V, *counts, **ways)
