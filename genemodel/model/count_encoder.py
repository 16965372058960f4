"""``CountEncoder``: a network on the counts of chosen genes, with the face of ``GeneModel``.

It is what heads read where there is no pre-trained model: fast on a CPU, and of any genes, because
it knows them by their place only. Vectors of a pre-trained model may lie beside the counts.

Axes: C cells, G genes read, V genes of the cells, F width of a cell vector, H hidden units.
"""

from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from genemodel.batches.batch import CellBatch
from genemodel.expression.normalise import log_normalised
from genemodel.model.gene_model import Encoded

# Beyond six standard deviations a value says no more than that it is high.
_LARGEST = 6.0


def dense_counts(batch: CellBatch, place_V: Tensor, n_genes: int, count_N: Tensor) -> Tensor:
    """Lay the counts of the real cells out as a table of the genes read, (C, G) float32.

    ``place_V`` has G for genes that are not read: a column that is thrown away, because to leave
    them out one by one would make the host wait for a GPU.
    """
    n_cells = batch.n_cells
    out_CG = torch.zeros((n_cells, n_genes + 1), device=batch.device)
    at_N = batch.full_cell_N * (n_genes + 1) + place_V[batch.full_gene_N]
    out_CG.view(-1).scatter_(0, at_N, count_N)
    return out_CG[:, :n_genes]


class VectorsBeside(nn.Module):
    """Cell vectors of a pre-trained model as a term of a hidden layer, standardised.

    Parameters
    ----------
    n_features
        Width of the vectors (F), 0 for none.
    hidden
        Width of the layer (H).
    bias
        Whether the term has one of its own.
    """

    def __init__(self, n_features: int, hidden: int, *, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(n_features, hidden, bias=bias) if n_features else None
        self.mean_F = nn.Buffer(torch.zeros(n_features))
        self.sd_F = nn.Buffer(torch.ones(n_features))

    @torch.no_grad()
    def standardise(self, features_CF: Tensor) -> None:
        """Take up mean and standard deviation of the vectors; rows with NaN are left out."""
        whole_CF = features_CF[torch.isfinite(features_CF).all(1)]
        self.mean_F.copy_(whole_CF.mean(0))
        self.sd_F.copy_(whole_CF.std(0, unbiased=False))

    def centred(self, features_CF: Tensor) -> Tensor:
        """Standardise vectors; a row with NaN stands for the mean of all."""
        return torch.nan_to_num((features_CF - self.mean_F) / (self.sd_F + 1e-6))

    def forward(self, hidden_CH: Tensor, features_CF: Tensor | None) -> Tensor:
        """Add the term."""
        if self.linear is None or features_CF is None:
            return hidden_CH
        return hidden_CH + self.linear(self.centred(features_CF))


class LinearComponents(nn.Module):
    """Components of standardised genes, and of cell vectors beside them; they do not learn.

    Parameters
    ----------
    n_genes, n_features, n_components
        Width of what is read (G and F) and of what comes out (K).
    """

    def __init__(self, n_genes: int, n_features: int, n_components: int) -> None:
        super().__init__()
        self.gene_KG = nn.Buffer(torch.zeros(n_components, n_genes))
        self.feature_KF = nn.Buffer(torch.zeros(n_components, n_features))

    @property
    def width(self) -> int:
        """K."""
        return self.gene_KG.shape[0]

    @torch.no_grad()
    def lay(self, gene_KG: np.ndarray, feature_KF: np.ndarray) -> None:
        """Take up projections; components that there are none of stay 0."""
        self.gene_KG[: len(gene_KG)] = torch.from_numpy(gene_KG)
        if feature_KF.shape[1]:
            self.feature_KF[: len(feature_KF)] = torch.from_numpy(feature_KF)

    def forward(self, value_CG: Tensor, centred_CF: Tensor | None) -> Tensor:
        """Project, (C, K)."""
        out_CK = value_CG @ self.gene_KG.T
        return out_CK if centred_CF is None else out_CK + centred_CF @ self.feature_KF.T


# What an encoder called these before they were a module.
_BESIDE = {"features_in.": "beside.linear.", "feature_mean_F": "beside.mean_F",
           "feature_sd_F": "beside.sd_F"}  # fmt: skip


def encoder_name(name: str) -> str:
    """Name a weight of an encoder of counts as this version does."""
    old = next((old for old in _BESIDE if name.startswith(old)), None)
    return name if old is None else _BESIDE[old] + name.removeprefix(old)


class CountEncoder(nn.Module):
    """Standardised log-normalised counts through two layers.

    Parameters
    ----------
    gene_G
        Genes that are read, by their place among the genes of the cells.
    n_all
        Number of genes of the cells (V).
    hidden
        Width (H).
    dropout
        Of the hidden layers.
    n_features
        Width of the vectors beside the counts (F), 0 without.
    feature_dropout
        Share of cells whose vector is hidden in a step.
    n_components
        Linear components (K) that are laid beside the hidden units, 0 for none: see
        :class:`LinearComponents`.
    """

    place_V: Tensor

    def __init__(
        self,
        gene_G: np.ndarray,
        n_all: int,
        *,
        hidden: int,
        dropout: float,
        n_features: int = 0,
        feature_dropout: float = 0.0,
        n_components: int = 0,
    ) -> None:
        super().__init__()
        n_genes = len(gene_G)
        self.n_genes, self.feature_dropout = n_genes, feature_dropout
        self.components = (
            LinearComponents(n_genes, n_features, n_components) if n_components else None
        )
        self.genes_in = nn.Linear(n_genes, hidden)
        self.beside = VectorsBeside(n_features, hidden, bias=True)
        self.norm_in, self.norm_hidden = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.hidden = nn.Linear(hidden, hidden)
        self.dropout = nn.Dropout(dropout)
        place_V = torch.full((n_all,), n_genes)
        place_V[torch.from_numpy(np.asarray(gene_G, np.int64))] = torch.arange(n_genes)
        self.register_buffer("place_V", place_V, persistent=False)
        self.input_mean_G = nn.Buffer(torch.zeros(n_genes))
        self.input_sd_G = nn.Buffer(torch.ones(n_genes))

    @torch.no_grad()
    def standardise(self, mean_G: np.ndarray, sd_G: np.ndarray) -> None:
        """Take up mean and standard deviation of the log-normalised counts."""
        self.input_mean_G.copy_(torch.from_numpy(np.asarray(mean_G, np.float32)))
        # A gene that hardly varies would be blown up.
        self.input_sd_G.copy_(torch.from_numpy(np.maximum(sd_G, 0.1).astype(np.float32)))

    def forward(self, batch: CellBatch, features_CF: Tensor | None = None) -> Encoded:
        """Encode the molecules that are shown of every real cell; there are no token states."""
        counts_CG = dense_counts(batch, self.place_V, self.n_genes, batch.shown_N)
        if features_CF is not None and self.training and self.feature_dropout:
            seen_C1 = torch.rand((batch.n_cells, 1), device=batch.device) >= self.feature_dropout
            features_CF = torch.where(seen_C1, features_CF, torch.nan)
        hidden_CH = self.read(counts_CG, features_CF)
        return Encoded(hidden_CH.new_empty(0, hidden_CH.shape[1]), hidden_CH)

    def read(
        self,
        counts_CG: Tensor,
        features_CF: Tensor | None = None,
        measured_G: Tensor | None = None,
    ) -> Tensor:
        """Encode a table of counts, (C, H), or (C, H + K) with components.

        Parameters
        ----------
        counts_CG
            Raw counts of the genes that are read.
        features_CF
            Cell vectors as they come from their model; a row with NaN is absent.
        measured_G
            Genes that the data set measured, bool; the others count as neither high nor low.
        """
        value_CG = (log_normalised(counts_CG) - self.input_mean_G) / self.input_sd_G
        value_CG = value_CG.clamp(-_LARGEST, _LARGEST)
        if measured_G is not None:
            value_CG = value_CG * measured_G
        hidden_CH = self.beside(self.genes_in(value_CG), features_CF)
        hidden_CH = self.dropout(functional.gelu(self.norm_in(hidden_CH)))
        hidden_CH = functional.gelu(self.norm_hidden(self.hidden(hidden_CH) + hidden_CH))
        hidden_CH = self.dropout(hidden_CH)
        if self.components is None:
            return hidden_CH
        centred_CF = None if features_CF is None else self.beside.centred(features_CF)
        return torch.cat([hidden_CH, self.components(value_CG, centred_CF)], 1)


class ReadsCounts(Protocol):
    """An encoder of counts that can read a cell vector beside them."""

    beside: VectorsBeside

    def __call__(self, batch: CellBatch, features_CF: Tensor | None = None) -> Encoded:
        """Encode the real cells."""


class CountsBesideBackbone(nn.Module):
    """Counts with the cell vector that a transformer makes of the same, shown molecules.

    The loss of a head reaches whatever of the transformer learns.

    Parameters
    ----------
    counts
        With as many features as the vectors are wide.
    backbone
        A :class:`~genemodel.model.gene_model.GeneModel`, tuned or frozen.
    projection
        What makes the embedding of its cell token; it does not learn.
    """

    def __init__(self, counts: ReadsCounts, backbone: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.counts: Any = counts
        self.backbone = backbone
        self.projection = projection.requires_grad_(False)

    def vectors(self, batch: CellBatch) -> Tensor:
        """Cell vectors of the real cells, (C, F)."""
        # Blocks above those that cell vectors are read from have no part in them.
        encoded = self.backbone(batch, self.backbone.cell_stop)
        return self.projection(encoded.cell_CD[: batch.n_cells]).float()

    def forward(self, batch: CellBatch) -> Encoded:
        """Encode the real cells."""
        encoded: Encoded = self.counts(batch, self.vectors(batch))
        return encoded


class CountsBesideVectors(nn.Module):
    """Counts with cell vectors that were made once and for all, of a transformer that stays.

    Parameters
    ----------
    counts
        With as many features as the vectors are wide.
    vectors_NF
        Of every cell (N), by its permanent number; a row with NaN is absent.
    """

    vectors_NF: Tensor

    def __init__(self, counts: CountEncoder, vectors_NF: Tensor) -> None:
        super().__init__()
        self.counts = counts
        self.register_buffer("vectors_NF", vectors_NF, persistent=False)

    def forward(self, batch: CellBatch) -> Encoded:
        """Encode the real cells."""
        encoded: Encoded = self.counts(batch, self.vectors_NF[batch.cell_C[: batch.n_cells]])
        return encoded
