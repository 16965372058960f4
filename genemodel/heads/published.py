"""The heads of published models, as they are; they score, and are not trained here.

Axes: M tokens, D width, V vocabulary, C cells, L labels.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.model.settings import ModelSettings


class PublishedGeneHead(nn.Module):
    """BERT's masked-token head: transform, then the tied embedding and a bias."""

    NAME = "published_gene"

    def __init__(self, settings: ModelSettings, n_tokens: int) -> None:
        super().__init__()
        width = settings.width
        self.relu = settings.activation == "relu"
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.bias_V = nn.Parameter(torch.zeros(n_tokens))

    def forward(self, hidden_MD: Tensor, gene_VD: Tensor) -> Tensor:
        """Score all tokens: (M, D) → (M, V)."""
        x = self.dense(hidden_MD)
        x = self.norm(F.relu(x) if self.relu else F.gelu(x))
        return x @ gene_VD.T + self.bias_V


class PublishedValueHead(nn.Module):
    """GeneCompass's head for the value of a masked gene."""

    NAME = "published_value"

    def __init__(self, settings: ModelSettings) -> None:
        super().__init__()
        width = settings.width
        self.relu = settings.activation == "relu"
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=settings.norm_eps)
        self.out = nn.Linear(width, 1)

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """(M, D) → (M,)."""
        x = self.dense(hidden_MD)
        return self.out(self.norm(F.relu(x) if self.relu else F.gelu(x)))[:, 0]


class PublishedClassifier(nn.Module):
    """A fine-tuned classifier: of cells from the first token through a pooler, or of genes."""

    NAME = "published_classifier"

    def __init__(self, heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        n_labels, width = heads[f"{self.NAME}.weight"].shape
        self.pooler = nn.Linear(width, width) if "published_pooler.weight" in heads else None
        self.out = nn.Linear(width, n_labels)
        parts = [(self.NAME, self.out), ("published_pooler", self.pooler)]
        with torch.no_grad():
            for name, linear in parts:
                if linear is not None:
                    linear.weight.copy_(heads[f"{name}.weight"])
                    linear.bias.copy_(heads[f"{name}.bias"])

    def forward(self, hidden_MD: Tensor) -> Tensor:
        """Logits of first tokens (or of genes) of the last block: (M, D) → (M, L)."""
        if self.pooler is not None:
            hidden_MD = self.pooler(hidden_MD).tanh()
        return self.out(hidden_MD)
