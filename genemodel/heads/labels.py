"""Labels of cells: any categorical obs column, from the one cell vector.

The gradient reaches whatever of the backbone learns: this is the objective that fine-tunes a
backbone to tell cell types (or tissues, or conditions) apart.

Axes: C cells, D width, L labels, N cells of the corpus.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.errors import ConfigError
from genemodel.heads.masking import Chosen
from genemodel.heads.objective import Passed
from genemodel.model.gene_model import initialise

# A rare label counts at most so many times as much as an average one: a label of a few cells would
# otherwise decide every step that it is in.
LARGEST_WEIGHT = 10.0


@dataclass(frozen=True)
class LabelSettings:
    """Classification of cells.

    Attributes
    ----------
    weight
        Of this objective in the total; 0 switches it off.
    label_key
        obs column of the corpus; cells without a label take no part.
    balanced
        Weigh labels against their frequency (up to 10 times the mean), so that rare ones count.
    dropout
        Of the cell vector, in training.
    """

    weight: float = 0.0
    label_key: str = "cell_type"
    balanced: bool = True
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.weight > 0 and not self.label_key:
            raise ConfigError(
                "task.labels.weight is positive, but task.labels.label_key is empty: name the obs "
                "column of the labels."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"task.labels.dropout is {self.dropout}: it must be in [0, 1).")


@dataclass(frozen=True)
class Labels:
    """The labels of a run.

    Attributes
    ----------
    names
        Labels that training cells have, in the order of their codes.
    code_N
        Code of every cell of the corpus, int32; -1 without a label, or with one that no training
        cell has.
    count_L
        Training cells of every label.
    """

    names: tuple[str, ...]
    code_N: np.ndarray
    count_L: np.ndarray


class LabelHead(nn.Module):
    """Normalised cell vector → logits, started at the labels' frequencies.

    Parameters
    ----------
    width
        Of the backbone (D).
    labels
        Of the run.
    settings
        Of the objective.
    """

    code_N: Tensor
    weight_L: Tensor
    trivial_L: Tensor
    temperature: Tensor

    starts_anew = True

    def __init__(self, width: int, labels: Labels, settings: LabelSettings) -> None:
        super().__init__()
        n_labels = len(labels.names)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(settings.dropout)
        self.out = nn.Linear(width, n_labels)
        initialise(self)
        nn.init.zeros_(self.out.weight)
        count_L = torch.from_numpy(np.asarray(labels.count_L, np.float32)).clamp_min(1.0)
        weight_L = torch.ones(n_labels)
        if settings.balanced and n_labels:
            weight_L = (count_L.mean() / count_L).clamp_max(LARGEST_WEIGHT)
            # The mean over training cells stays 1, and with it the size of the loss.
            weight_L = weight_L * count_L.sum() / (weight_L * count_L).sum()
        # What the best predictor that ignores the cell says of a label: its share of the weight.
        share_L = weight_L * count_L
        log_share_L = (share_L / share_L.sum()).log() if n_labels else share_L
        with torch.no_grad():
            self.out.bias.copy_(log_share_L)
        self.register_buffer("code_N", torch.from_numpy(labels.code_N), persistent=False)
        self.register_buffer("weight_L", weight_L, persistent=False)
        self.register_buffer("trivial_L", log_share_L.clone(), persistent=False)
        # Fitted on held-out cells after training; logits are divided by it.
        self.register_buffer("temperature", torch.ones(()))

    def count(self, batch: CellBatch, chosen: Chosen | None) -> Tensor:
        """See :class:`~genemodel.heads.objective.Head`: cells with a label."""
        return (self.codes(batch.cell_C) >= 0).sum()

    def cost(self, passed: Passed, *, trivial: bool) -> tuple[Tensor, Tensor | None]:
        """See :class:`~genemodel.heads.objective.Head`."""
        found: tuple[Tensor, Tensor | None] = self(
            passed.encoded.cell_CD, passed.truth.cell_C, trivial=trivial
        )
        return found

    def compile_region(self, backend: str | Callable[..., Any]) -> None:
        """See :class:`~genemodel.heads.objective.Head`."""
        self.compile(dynamic=False, fullgraph=True, backend=backend)

    def codes(self, cell_C: Tensor) -> Tensor:
        """Label of every place of a micro-batch, (C,); -1 for places without a cell or label."""
        code_C = self.code_N.index_select(0, cell_C.clamp_min(0)).long()
        return torch.where(cell_C >= 0, code_C, -1)

    def logits(self, cell_CD: Tensor) -> Tensor:
        """(C, D) → (C, L), not divided by the temperature."""
        return self.out(self.dropout(self.norm(cell_CD)))

    def forward(
        self, cell_CD: Tensor, cell_C: Tensor, *, trivial: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Return weighted cross-entropy summed over labelled cells, and the frequencies' own."""
        code_C = self.codes(cell_C)
        known_C, safe_C = code_C >= 0, code_C.clamp_min(0)
        weight_C = self.weight_L[safe_C] * known_C
        log_p_CL = self.logits(cell_CD).float().log_softmax(-1)
        loss = -(log_p_CL.gather(1, safe_C[:, None])[:, 0] * weight_C).sum()
        if not trivial:
            return loss, None
        with torch.no_grad():
            return loss, -(self.trivial_L[safe_C] * weight_C).sum()


def fitted_temperature(logits_CL: Tensor, code_C: Tensor) -> float:
    """Temperature with which the logits of held-out cells are most likely (Guo et al. 2017).

    Parameters
    ----------
    logits_CL
        Of held-out cells that have a label.
    code_C
        Their labels.

    Returns
    -------
    Between 0.05 and 20; 1 without any cell.
    """
    if not code_C.numel():
        return 1.0
    # The likelihood has one maximum in 1 / T: a grid of 2 % steps finds it.
    grid_T = torch.logspace(np.log10(0.05), np.log10(20.0), 301)
    losses = [float(F.cross_entropy(logits_CL.float() / t, code_C)) for t in grid_T]
    return float(grid_T[int(np.argmin(losses))])
