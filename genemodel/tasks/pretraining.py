"""The pre-training objectives together: what is hidden, and what each objective costs.

Axes as in ``genemodel.cells.batch``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from genemodel.cells.batch import CellBatch
from genemodel.cells.statistics import GeneStatistics
from genemodel.errors import ConfigError
from genemodel.model.flops import encoder_flops, gene_head_flops
from genemodel.model.gene_model import Encoded, GeneModel
from genemodel.tasks.decode_counts import CountDecoder, DecodeCountsSettings
from genemodel.tasks.masked_gene import MaskedGeneHead, MaskedGeneSettings
from genemodel.tasks.masked_value import MaskedValueHead, MaskedValueSettings
from genemodel.tasks.masking import Chosen, choose, eligible, hide, uniform
from genemodel.tasks.parts import LossPart

# Purposes of randomness; part of every address, so streams never coincide.
HIDE, DROP_BATCH = 1, 2
BATCH_TABLE = "decode_counts.batch.weight"


@dataclass(frozen=True)
class PretrainingSettings:
    """Objectives and their weights; a weight of 0 switches one off.

    Attributes
    ----------
    masked_gene, masked_value, decode_counts
        One group of settings an objective.
    """

    masked_gene: MaskedGeneSettings = field(default_factory=MaskedGeneSettings)
    masked_value: MaskedValueSettings = field(default_factory=MaskedValueSettings)
    decode_counts: DecodeCountsSettings = field(default_factory=DecodeCountsSettings)

    def __post_init__(self) -> None:
        weights = {
            name: getattr(self, name).weight
            for name in ("masked_gene", "masked_value", "decode_counts")
        }
        if min(weights.values()) < 0 or max(weights.values()) == 0:
            raise ConfigError(
                f"Objective weights are {weights}: none may be negative and at least one must be "
                "positive. Set for example task.masked_gene.weight=1."
            )
        hidden = sum(s.fraction for s in (self.masked_gene, self.masked_value) if s.weight > 0)
        if hidden >= 1:
            raise ConfigError(
                f"task.masked_gene.fraction and task.masked_value.fraction add up to {hidden}: "
                "together they must leave tokens visible, below 1."
            )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A micro-batch after hiding: what the model sees, and what it must find."""

    seen: CellBatch
    truth: CellBatch
    genes: Chosen | None
    values: Chosen | None
    items: dict[str, Tensor]


class PretrainingObjectives(nn.Module):
    """Heads and losses of pre-training.

    Parameters
    ----------
    settings
        Weights and shares.
    width
        Of the backbone (D).
    statistics
        Gene averages of the training cells: trivial predictors and starting points.
    n_batches
        Technical batches known to the count decoder (B).
    measured_XV
        Which genes every panel measured, bool.
    seed
        Address of the masks.
    """

    def __init__(
        self,
        settings: PretrainingSettings,
        *,
        width: int,
        statistics: GeneStatistics,
        n_batches: int,
        measured_XV: Tensor,
        seed: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.heads = nn.ModuleDict()
        if settings.masked_gene.weight > 0:
            self.heads["masked_gene"] = MaskedGeneHead(width, statistics)
        if settings.masked_value.weight > 0:
            self.heads["masked_value"] = MaskedValueHead(width, statistics)
        if settings.decode_counts.weight > 0:
            self.heads["decode_counts"] = CountDecoder(width, statistics, n_batches, measured_XV)

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take up saved weights of heads, ``"decode_counts.log_theta_V"`` and the like.

        The table of technical batches stays new, because the batches of other cells are others. A
        weight that is smaller than its place, as after a vocabulary has grown, fills the beginning
        of every axis; what it does not reach stays new.

        Returns
        -------
        Names of the objectives whose weights, but for the batches, were all there.
        """
        complete = []
        for name, head in self.heads.items():
            own = head.state_dict()
            wanted = [key for key in own if f"{name}.{key}" != BATCH_TABLE]
            taken = 0
            for key in wanted:
                saved = weights.get(f"{name}.{key}")
                if saved is None or saved.dim() != own[key].dim():
                    continue
                if all(n <= m for n, m in zip(saved.shape, own[key].shape, strict=True)):
                    own[key][tuple(slice(0, n) for n in saved.shape)] = saved
                    taken += 1
            if taken == len(wanted):
                complete.append(name)
        return complete

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every objective that is on."""
        return {name: getattr(self.settings, name).weight for name in self.heads}

    def forward_flops(self, model: GeneModel, lengths_C: np.ndarray) -> int:
        """Operations of one forward pass over cells of these lengths: encoder and heads."""
        shape = model.settings
        flops = encoder_flops(shape, lengths_C)
        if "masked_gene" in self.heads:
            hidden = int(self.settings.masked_gene.fraction * lengths_C.sum())
            flops += gene_head_flops(shape, hidden, model.n_tokens)
        if "decode_counts" in self.heads:
            flops += 2 * len(lengths_C) * (shape.width**2 + shape.width * model.n_tokens)
        return flops

    @torch.no_grad()
    def prepare(self, batch: CellBatch, *, validation: bool = False) -> Prepared:
        """Hide tokens; the same cells in the same epoch always lose the same ones."""
        # Validation masks are those of an epoch that training never reaches.
        epoch = -1 if validation else batch.epoch
        cell_T = batch.cell_C[batch.segment_T]
        uniform_T = uniform(self.seed, HIDE, epoch, cell_T, batch.gene_T)
        can_T = eligible(batch)
        genes = values = None
        low = 0.0
        items: dict[str, Tensor] = {}
        if "masked_gene" in self.heads:
            high = low + self.settings.masked_gene.fraction
            genes = choose(uniform_T, can_T, low, high)
            items["masked_gene"] = genes.n
            low = high
        if "masked_value" in self.heads:
            high = low + self.settings.masked_value.fraction
            values = choose(uniform_T, can_T, low, high)
            items["masked_value"] = values.n
        if "decode_counts" in self.heads:
            # Per expressed gene: keeps the loss of the order of a cross-entropy whatever the panel.
            items["decode_counts"] = torch.tensor(batch.full_gene_N.shape[0], device=batch.device)
        return Prepared(hide(batch, genes, values), batch, genes, values, items)

    def forward(
        self, model: GeneModel, encoded: Encoded, prepared: Prepared, *, trivial: bool = True
    ) -> dict[str, LossPart]:
        """Cost of every objective on one prepared micro-batch."""
        truth = prepared.truth
        parts: dict[str, LossPart] = {}
        species_T = truth.species_C[truth.segment_T]
        for name, head in self.heads.items():
            if isinstance(head, MaskedGeneHead):
                assert prepared.genes is not None
                at, real = prepared.genes.index_M, prepared.genes.real_M
                total, trivial = head(
                    encoded.hidden_TD[at], truth.gene_T[at], species_T[at], real,
                    model.embedding.token.weight,
                )  # fmt: skip
            elif isinstance(head, MaskedValueHead):
                assert prepared.values is not None
                at, real = prepared.values.index_M, prepared.values.real_M
                total, trivial = head(
                    encoded.hidden_TD[at], truth.value_T[at], truth.gene_T[at], species_T[at], real
                )
            else:
                total, trivial = self._decode(encoded, truth)
            parts[name] = LossPart(total, prepared.items[name], trivial.detach())
        return parts

    def _decode(self, encoded: Encoded, truth: CellBatch) -> tuple[Tensor, Tensor]:
        n = truth.n_cells
        batch_C = truth.batch_C[:n]
        if self.training:
            u_C = uniform(self.seed, DROP_BATCH, truth.epoch, truth.cell_C[:n])
            batch_C = torch.where(u_C < self.settings.decode_counts.batch_dropout, -1, batch_C)
        return self.heads["decode_counts"](
            encoded.cell_CD[:n],
            truth.species_C[:n],
            batch_C,
            truth.library_C[:n],
            truth.panel_C[:n],
            truth.full_cell_N,
            truth.full_gene_N,
            truth.full_count_N,
        )
