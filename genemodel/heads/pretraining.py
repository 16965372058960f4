"""The pre-training objectives together: what is hidden, and what each objective costs.

Axes as in ``genemodel.batches.batch``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.corpus.statistics import GeneStatistics
from genemodel.errors import ConfigError
from genemodel.genes.vocabulary import N_SPECIAL
from genemodel.heads.decode_counts import CountDecoder, DecodeCountsSettings
from genemodel.heads.labels import LabelHead, Labels, LabelSettings
from genemodel.heads.masked_gene import MaskedGeneHead, MaskedGeneSettings
from genemodel.heads.masked_value import MaskedValueHead, MaskedValueSettings
from genemodel.heads.masking import Chosen, Hidden, choose, eligible, hide, key_of, uniform_at
from genemodel.heads.objective import Head, Passed
from genemodel.heads.parts import LossPart
from genemodel.model.flops import encoder_flops, gene_head_flops
from genemodel.model.gene_model import Encoded, GeneModel

# Purposes of randomness; part of every address, so streams never coincide.
HIDE, DROP_BATCH = 1, 2
BATCH_TABLE = "decode_counts.batch.weight"


@dataclass(frozen=True)
class PretrainingSettings:
    """Objectives and their weights; a weight of 0 switches one off.

    Attributes
    ----------
    masked_gene, masked_value, decode_counts, labels
        One group of settings an objective.
    """

    masked_gene: MaskedGeneSettings = field(default_factory=MaskedGeneSettings)
    masked_value: MaskedValueSettings = field(default_factory=MaskedValueSettings)
    decode_counts: DecodeCountsSettings = field(default_factory=DecodeCountsSettings)
    labels: LabelSettings = field(default_factory=LabelSettings)

    def __post_init__(self) -> None:
        weights = {
            name: getattr(self, name).weight
            for name in ("masked_gene", "masked_value", "decode_counts", "labels")
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
    """A micro-batch after hiding: what the model sees, and what it must find.

    ``truth`` is the micro-batch as it was, with the technical batches that the decoder is told.
    ``items`` stay on the device.
    """

    seen: CellBatch
    truth: CellBatch
    genes: Chosen | None
    values: Chosen | None
    items: dict[str, Tensor]


class Hiding(nn.Module):
    """What is hidden of a micro-batch, by addresses alone; a region that is compiled.

    Parameters
    ----------
    shares
        (low, high) of the uniform numbers whose genes, and whose values, are hidden.
    batch_dropout
        Share of cells whose technical batch is hidden; 0 for none.
    first_gene
        Lowest token that may be hidden.
    """

    def __init__(
        self,
        genes: tuple[float, float] | None,
        values: tuple[float, float] | None,
        batch_dropout: float,
        first_gene: int = N_SPECIAL,
    ) -> None:
        super().__init__()
        self.first_gene = first_gene
        self.genes, self.values, self.batch_dropout = genes, values, batch_dropout

    def forward(
        self, batch: CellBatch, key: Tensor, drop_key: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Chosen | None, Chosen | None]:
        """Return gene_T, value_T and batch_C with what is hidden, and where genes and values are.

        Without ``drop_key`` no technical batch is hidden.
        """
        cell_T = batch.cell_C[batch.segment_T]
        uniform_T = uniform_at(key, cell_T, batch.gene_T)
        can_T = eligible(batch.gene_T, self.first_gene)
        genes = choose(uniform_T, can_T, *self.genes) if self.genes else None
        values = choose(uniform_T, can_T, *self.values) if self.values else None
        gene_T, value_T = hide(batch.gene_T, batch.value_T, genes, values)
        batch_C = batch.batch_C
        if drop_key is not None:
            known_C = uniform_at(drop_key, batch.cell_C) >= self.batch_dropout
            batch_C = torch.where(known_C, batch_C, -1)
        return gene_T, value_T, batch_C, genes, values


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
    labels
        Of the cells, where ``settings.labels`` is on.
    first_gene
        Lowest token that may be hidden.
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
        labels: Labels | None = None,
        first_gene: int = N_SPECIAL,
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
        if settings.labels.weight > 0:
            assert labels is not None, "the run's labels"
            self.heads["labels"] = LabelHead(width, labels, settings.labels)
        genes = values = None
        low = 0.0
        if settings.masked_gene.weight > 0:
            genes = (low, low + settings.masked_gene.fraction)
            low = genes[1]
        if settings.masked_value.weight > 0:
            values = (low, low + settings.masked_value.fraction)
        self.hiding = Hiding(genes, values, settings.decode_counts.batch_dropout, first_gene)

    @property
    def parts(self) -> dict[str, Head]:
        """The heads that are on, by name."""
        return {name: cast(Head, head) for name, head in self.heads.items()}

    def start_from(self, weights: Mapping[str, Tensor]) -> list[str]:
        """Take up saved weights of heads, ``"decode_counts.log_theta_V"`` and the like.

        The table of technical batches and the labels stay new, because those of other cells are
        others. A weight that is smaller than its place, as after a vocabulary has grown, fills the
        beginning of every axis; what it does not reach stays new.

        Returns
        -------
        Names of the objectives whose weights, but for the batches, were all there.
        """
        complete = []
        for name, head in self.heads.items():
            if self.parts[name].starts_anew:
                continue
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

    def weights_at(self, share: float) -> dict[str, float]:
        """As :attr:`weights`: they stay."""
        return self.weights

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
        key = key_of(self.seed, HIDE, epoch, batch.device)
        drop_key = None
        if "decode_counts" in self.heads and self.training and not validation:
            drop_key = key_of(self.seed, DROP_BATCH, epoch, batch.device)
        gene_T, value_T, batch_C, genes, values = self.hiding(batch, key, drop_key)
        chosen = {"masked_gene": genes, "masked_value": values}
        items = {name: head.count(batch, chosen.get(name)) for name, head in self.parts.items()}
        return Prepared(
            seen=replace(batch, gene_T=gene_T, value_T=value_T),
            truth=replace(batch, batch_C=batch_C),
            genes=genes,
            values=values,
            items=items,
        )

    def forward(
        self, model: GeneModel, encoded: Encoded, prepared: Prepared, *, trivial: bool = True
    ) -> dict[str, LossPart]:
        """Cost of every objective on one prepared micro-batch.

        Parameters
        ----------
        model, encoded, prepared
            The backbone, and what it and :meth:`prepare` have made of the micro-batch.
        trivial
            Cost of the trivial predictors as well; it is no part of learning, so only steps that
            are shown need it.
        """
        at = _gathered(encoded, prepared)
        found = {}
        for name, head in self.parts.items():
            passed = Passed(model, encoded, prepared.truth, at.get(name))
            total, cost = head.cost(passed, trivial=trivial)
            found[name] = LossPart(
                total, prepared.items[name], None if cost is None else cost.detach()
            )
        return found

    def compile_regions(self, backend: str | Callable[..., Any]) -> None:
        """Compile hiding, heads and losses, each one graph; in place."""
        self.hiding.compile(dynamic=False, fullgraph=True, backend=backend)
        for head in self.parts.values():
            head.compile_region(backend)


def _gathered(encoded: Encoded, prepared: Prepared) -> dict[str, Hidden]:
    """Take the hidden tokens of all objectives in one gather: its backward is one scatter."""
    both = {"masked_gene": prepared.genes, "masked_value": prepared.values}
    chosen = {name: one for name, one in both.items() if one is not None}
    if not chosen:
        return {}
    truth = prepared.truth
    at_M = torch.cat([one.index_M for one in chosen.values()])
    parts = (
        encoded.hidden_TD.index_select(0, at_M),
        truth.gene_T[at_M],
        truth.species_C[truth.segment_T[at_M]],
        truth.value_T[at_M],
    )
    sizes = [one.index_M.shape[0] for one in chosen.values()]
    rows = zip(*(part.split(sizes) for part in parts), strict=True)
    return {
        name: Hidden(hidden_MD, gene_M, species_M, value_M, one.real_M)
        for (name, one), (hidden_MD, gene_M, species_M, value_M) in zip(
            chosen.items(), rows, strict=True
        )
    }
