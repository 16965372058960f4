"""Labels of genes from their hidden states: the head and loss that fine-tune on genes.

The gradient reaches whatever of the backbone learns. Axes: T tokens, D width, L labels, V
vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.heads.parts import LossPart
from genemodel.model.flops import encoder_flops
from genemodel.model.gene_model import Encoded, initialise

NAME = "gene_labels"
# A gene of few cells, or of a rare label, counts at most so many times as much a token as others.
LARGEST_WEIGHT = 10.0


class GeneLabelHead(nn.Module):
    """Normalised hidden state of a gene → logits, (…, D) → (…, L); starts at no opinion."""

    def __init__(self, width: int, n_labels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, n_labels)
        initialise(self)
        nn.init.zeros_(self.out.weight)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) → (T, L)."""
        logits_TL: Tensor = self.out(self.dropout(self.norm(hidden_TD)))
        return logits_TL


@dataclass(frozen=True, slots=True)
class Prepared:
    """A micro-batch as it is, and how many of its tokens are labelled."""

    seen: CellBatch
    items: dict[str, Tensor]
    code_T: Tensor


def token_weights(code_V: np.ndarray, n_V: np.ndarray, *, balanced: bool) -> np.ndarray:
    """Weight of a token of every gene, float32 (V,): genes count alike, whatever they are held by.

    Parameters
    ----------
    code_V
        Labels, -1 without.
    n_V
        Cells that hold each gene.
    balanced
        Labels count alike, too.

    Returns
    -------
    Mean 1 over all labelled tokens, and at most 10 before that; 0 without a label.
    """
    known_V = (code_V >= 0) & (n_V > 0)
    weight_V = np.zeros(code_V.size)
    weight_V[known_V] = 1.0 / n_V[known_V]
    if balanced:
        size_L = np.bincount(code_V[known_V], minlength=int(code_V.max(initial=0)) + 1)
        weight_V[known_V] /= size_L[code_V[known_V]]
    total = float((weight_V * n_V).sum())
    if total:
        weight_V *= float(n_V[known_V].sum()) / total
        weight_V = np.minimum(weight_V, LARGEST_WEIGHT)
        weight_V *= float(n_V[known_V].sum()) / float((weight_V * n_V).sum())
    return weight_V.astype(np.float32)


class GeneLabelObjective(nn.Module):
    """Cross-entropy of the labelled genes of cells (:class:`~genemodel.heads.objective.Objective`).

    Parameters
    ----------
    head
        Of the labels.
    code_V
        Label of every token, -1 for those that are not learnt from.
    weight_V, n_V
        See :func:`token_weights`.
    """

    code_V: Tensor
    weight_V: Tensor
    trivial_L: Tensor

    def __init__(
        self, head: GeneLabelHead, code_V: np.ndarray, weight_V: np.ndarray, n_V: np.ndarray
    ) -> None:
        super().__init__()
        self.head = head
        known_V = code_V >= 0
        # What the best predictor that ignores the gene says: the labels' shares of the weight.
        share_L = np.bincount(
            code_V[known_V], (weight_V * n_V)[known_V], minlength=head.out.out_features
        )
        log_share_L = np.log(np.maximum(share_L / max(share_L.sum(), 1e-12), 1e-6))
        self.register_buffer("code_V", torch.from_numpy(code_V), persistent=False)
        self.register_buffer("weight_V", torch.from_numpy(weight_V), persistent=False)
        self.register_buffer(
            "trivial_L", torch.from_numpy(log_share_L.astype(np.float32)), persistent=False
        )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of the loss."""
        return {NAME: 1.0}

    def weights_at(self, share: float) -> dict[str, float]:
        """Return the same all along."""
        return self.weights

    def prepare(self, batch: CellBatch, *, validation: bool = False) -> Prepared:
        """Look labels up."""
        code_T = self.code_V[batch.gene_T]
        return Prepared(batch, {NAME: (code_T >= 0).sum()}, code_T)

    def forward(
        self, model: nn.Module, encoded: Encoded, prepared: Prepared, *, trivial: bool = True
    ) -> dict[str, LossPart]:
        """Sum the weighted cross-entropy over labelled tokens."""
        known_T, safe_T = prepared.code_T >= 0, prepared.code_T.clamp_min(0)
        weight_T = self.weight_V[prepared.seen.gene_T] * known_T
        log_p_TL = self.head(encoded.hidden_TD).float().log_softmax(-1)
        loss = -(log_p_TL.gather(1, safe_T[:, None])[:, 0] * weight_T).sum()
        alone = -(self.trivial_L[safe_T] * weight_T).sum() if trivial else None
        return {NAME: LossPart(loss, prepared.items[NAME], alone)}

    def forward_flops(self, model: Any, lengths_C: np.ndarray) -> int:
        """Operations of one forward pass: those of the encoder."""
        return encoder_flops(model.settings, lengths_C)


def labels_in(settings: dict[str, Any]) -> Sequence[str]:
    """Labels of the head that a bundle's settings tell of; empty without one."""
    told = settings.get(NAME) or {}
    return list(told.get("labels", []))
