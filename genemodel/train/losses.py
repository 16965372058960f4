"""Model and objectives as one module, whose result is losses.

Axes: K objectives.
"""

from typing import Any

import torch
from torch import Tensor, nn


class Losses(nn.Module):
    """Model and objectives as one module: what the ranks' exchange wraps.

    Parameters
    ----------
    model
        Encodes a micro-batch.
    objectives
        See :class:`~genemodel.heads.objective.Objective`.
    """

    def __init__(self, model: nn.Module, objectives: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.objectives: Any = objectives

    @property
    def names(self) -> list[str]:
        """Objectives in the order of every axis K."""
        return list(self.objectives.weights)

    def forward(self, prepared: Any, trivial: bool) -> tuple[Tensor, Tensor]:
        """Losses of one prepared micro-batch, (K,), and the trivial predictors' where asked for."""
        parts = self.objectives(self.model, self.model(prepared.seen), prepared, trivial=trivial)
        total_K = torch.stack([parts[name].total.float() for name in self.names])
        if not trivial:
            return total_K, torch.zeros_like(total_K)
        return total_K, torch.stack([parts[name].trivial.float() for name in self.names])
