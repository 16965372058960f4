"""The network that denoises: encoder of sparse counts, decoder of gene shares, where they start.

The library never enters the answer: a rate is a share of molecules times a library, whichever is
asked for.

Axes: C cells, G genes decoded, V genes of the cells, D latent dimensions, H hidden units, F width
of a cell vector, E width of a gene vector, B technical batches, N stored entries, S sampled cells.
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from genemodel.batches.batch import CellBatch, sums_within
from genemodel.errors import ConfigError
from genemodel.expression.likelihood import MultinomialLoss
from genemodel.expression.normalise import depth_factor
from genemodel.expression.rates import log_shares
from genemodel.finetuning.setting_ranges import check_numbers
from genemodel.heads.parts import LossPart
from genemodel.imputation.posterior import (
    Floats,
)
from genemodel.model.count_encoder import VectorsBeside
from genemodel.model.flops import encoder_flops
from genemodel.model.gene_model import Encoded

BLOCK_CELLS = 256


@dataclass(frozen=True, slots=True)
class DecoderSettings:
    """The one default of the recipe; nothing here is chosen per data set.

    Attributes
    ----------
    hidden, latent
        Width of the encoder and of the latent vector.
    epochs, batch_cells, learning_rate
        One-cycle schedule over ``epochs`` passes; the best averaged weights are kept.
    thin_low, thin_high
        The share of molecules shown to the encoder is uniform between these, drawn per cell.
    dropout
        On the first hidden layer.
    average_decay
        Decay of the running mean of the weights (the weights that are used afterwards).
    calibration_fraction
        Share of molecules set aside for early stopping and calibration.
    patience, check_every
        Stop after ``patience`` checks, ``check_every`` epochs apart, without a gain of 1e-4 nats
        per molecule.
    full_passes
        Above this many cells the number of passes falls in proportion, so that the cells seen in
        all stay the same.
    calibration_cells
        Most cells, drawn at random, on which the dispersion is calibrated and checked.
    gene_vectors
        Start genes from the gene vectors of a pre-trained model instead of at random.
    from_decoder
        With a transformer beneath whose model has a count decoder that tells molecules set aside
        better than a cell's neighbours do: start as that decoder, so that the first answer is the
        model's own and the training only adds to it. ``latent`` is then the width of its cell
        vectors. Otherwise the vectors are read beside the counts by a network that starts from
        nothing.

    Notes
    -----
    The recipe was chosen as a whole on the six development sets of ``docs/imputation.md``, its
    values not one by one. Three seeds of training differ by .001 in the ratios of both losses, and
    as much is what ``gene_vectors`` gain where there is a bundle.
    """

    hidden: int = 128
    latent: int = 32
    epochs: int = 40
    batch_cells: int = 128
    learning_rate: float = 3e-3
    thin_low: float = 0.2
    thin_high: float = 0.95
    dropout: float = 0.1
    average_decay: float = 0.98
    calibration_fraction: float = 0.1
    patience: int = 2
    check_every: int = 5
    full_passes: int = 50_000
    calibration_cells: int = 20_000
    gene_vectors: bool = False
    from_decoder: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.thin_low <= self.thin_high < 1:
            raise ConfigError(
                f"thin_low={self.thin_low}, thin_high={self.thin_high}: the share of molecules "
                "shown must lie between 0 and 1, low before high."
            )
        if not 0 < self.calibration_fraction < 0.5:
            raise ConfigError(
                f"calibration_fraction={self.calibration_fraction}: the share of molecules set "
                "aside must lie between 0 and 0.5."
            )
        whole = ("hidden", "latent", "epochs", "batch_cells", "check_every", "full_passes")
        check_numbers(
            self,
            positive=(*whole, "calibration_cells"),
            shares=("dropout", "average_decay"),
            not_negative=("patience",),
        )
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate={self.learning_rate}: must be above 0.")

    def passes(self, n_cells: int) -> int:
        """Return the number of passes over this many cells."""
        return max(1, min(self.epochs, math.ceil(self.epochs * self.full_passes / n_cells)))


class SparseCountEncoder(nn.Module):
    """A sum of gene vectors, weighted with log-normalised counts, through a small network.

    It reads every gene of a data set, of which a cell has few: work goes with the genes seen. An
    encoder like :class:`~genemodel.model.count_encoder.CountEncoder`; its result is the latent.

    Parameters
    ----------
    gene_G
        Genes that are read, by their place among the genes of the cells.
    n_all
        Number of genes of the cells (V).
    settings
        Widths and dropout.
    n_features
        Width of the vectors beside the counts (F), 0 without.
    carries
        Whether the latent is the vector beside the counts, each direction times a factor that
        starts at one, and what the network adds to it, at first nothing. The latent is then as wide
        as the vector, whatever the settings say.
    """

    place_V: Tensor
    carry_F: nn.Parameter | None

    def __init__(
        self,
        gene_G: NDArray[np.integer],
        n_all: int,
        settings: "DecoderSettings",
        n_features: int = 0,
        *,
        carries: bool = False,
    ) -> None:
        super().__init__()
        n_genes, hidden = len(gene_G), settings.hidden
        self.n_genes = n_genes
        self.input_GH = nn.Parameter(torch.randn(n_genes, hidden) * 0.02)
        self.input_bias_H = nn.Parameter(torch.zeros(hidden))
        self.beside = VectorsBeside(n_features, hidden, bias=False)
        middle = nn.Linear(hidden, hidden)
        last = nn.Linear(hidden, n_features if carries else settings.latent)
        self.carry_F = nn.Parameter(torch.ones(n_features)) if carries else None
        if carries:
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        self.trunk = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Dropout(settings.dropout),
            nn.GELU(),
            middle,
            nn.GELU(),
            last,
        )
        place_V = torch.full((n_all,), n_genes)
        place_V[torch.from_numpy(np.asarray(gene_G, np.int64))] = torch.arange(n_genes)
        self.register_buffer("place_V", place_V, persistent=False)

    def forward(self, batch: CellBatch, features_CF: Tensor | None = None) -> Encoded:
        """Latent of every real cell from the molecules shown; there are no token states."""
        place_N = self.place_V[batch.full_gene_N]
        read_N = place_N < self.n_genes
        count_N = torch.where(read_N, batch.shown_N, 0.0)
        latent_CD = self.read(
            torch.where(read_N, place_N, 0), batch.full_cell_N, count_N, batch.n_cells, features_CF
        )
        return Encoded(latent_CD.new_empty(0, latent_CD.shape[1]), latent_CD)

    def read(
        self,
        gene_N: Tensor,
        cell_N: Tensor,
        count_N: Tensor,
        n_cells: int,
        features_CF: Tensor | None = None,
    ) -> Tensor:
        """Latent of cells whose stored counts lie one cell after the other, (C, D)."""
        # Cells with more genes would have longer sums, whatever they are like.
        root_C = sums_within(count_N > 0, cell_N, n_cells).clamp_min(1.0).sqrt()
        scale_C = depth_factor(sums_within(count_N, cell_N, n_cells))
        weight_N = (count_N * scale_C[cell_N]).log1p() / root_C[cell_N]
        starts_C = torch.searchsorted(cell_N, torch.arange(n_cells, device=cell_N.device))
        summed_CH = functional.embedding_bag(
            gene_N, self.input_GH, starts_C, mode="sum", per_sample_weights=weight_N
        )
        latent_CD = self.trunk(self.beside(summed_CH + self.input_bias_H, features_CF))
        if self.carry_F is None or features_CF is None:
            return latent_CD
        return latent_CD + self.carry_F * torch.nan_to_num(features_CF)


class VectorEncoder(nn.Module):
    """The latent is a pre-trained model's vector of the cell: nothing of the counts is read here.

    With it :class:`Decoder` is the count decoder of a bundle, cut to the genes of some data.
    """

    def read(
        self,
        gene_N: Tensor,
        cell_N: Tensor,
        count_N: Tensor,
        n_cells: int,
        features_CF: Tensor | None = None,
    ) -> Tensor:
        """Vectors of the cells; a cell without one is at the origin."""
        assert features_CF is not None, "vectors of the cells"
        return torch.nan_to_num(features_CF)


class _Prepared:
    """A micro-batch as the head takes it; ``molecules`` are those to be predicted."""

    __slots__ = ("count_N", "gene_N", "items", "seen")

    def __init__(
        self, seen: CellBatch, items: dict[str, Tensor], gene_N: Tensor, count_N: Tensor
    ) -> None:
        self.seen, self.items, self.gene_N, self.count_N = seen, items, gene_N, count_N


class ImputationHead(nn.Module):
    """Shares of molecules ``softmax(<z + offset_b, e_g> + bias_g)``, and what they cost.

    An objective (:class:`~genemodel.heads.objective.Objective`) of one loss: nats a molecule that
    was not shown.

    Parameters
    ----------
    frequency_G
        Share of all molecules per gene, positive; the decoder starts from it, and a predictor that
        ignores the cell stays there.
    n_batches
        Technical batches B; each has its own latent offset, zero when B is one.
    settings
        Widths.
    place_V
        Where each gene of the cells is among those decoded, G for the others.
    share_B
        Share of the cells in each batch, by which the mean of all batches weighs their offsets: a
        batch of one cell says next to nothing. The same for all by default.
    latent
        Width of the latent, where it is not that of the settings.
    """

    LOSS = "nats_per_molecule"

    place_V: Tensor
    trivial_G: Tensor

    def __init__(
        self,
        frequency_G: Floats,
        n_batches: int,
        settings: "DecoderSettings",
        place_V: Tensor | None = None,
        share_B: Tensor | None = None,
        *,
        latent: int | None = None,
    ) -> None:
        super().__init__()
        n_genes = len(frequency_G)
        self.latent = latent or settings.latent
        self.gene_GD = nn.Parameter(torch.randn(n_genes, self.latent) * 0.05)
        self.bias_G = nn.Parameter(torch.log(torch.as_tensor(frequency_G, dtype=torch.float32)))
        self.offset_BD = nn.Parameter(
            torch.zeros(n_batches, self.latent), requires_grad=n_batches > 1
        )
        if share_B is None:
            share_B = torch.full((n_batches,), 1 / n_batches)
        self.share_B = nn.Buffer(share_B.to(torch.float32))
        self.register_load_state_dict_pre_hook(_alike_before)
        place_V = torch.arange(n_genes) if place_V is None else place_V
        self.register_buffer("place_V", place_V, persistent=False)
        trivial_G = log_shares(self.bias_G.detach())
        self.register_buffer("trivial_G", trivial_G, persistent=False)

    @property
    def weights(self) -> dict[str, float]:
        """One loss of weight 1."""
        return {self.LOSS: 1.0}

    def weights_at(self, share: float) -> dict[str, float]:
        """As :attr:`weights`: it stays."""
        return self.weights

    @torch.no_grad()
    def prepare(self, batch: CellBatch, *, validation: bool = False) -> _Prepared:
        """Find the molecules that are there and not shown."""
        place_N = self.place_V[batch.full_gene_N]
        read_N = place_N < len(self.bias_G)
        count_N = torch.where(read_N, batch.full_count_N - batch.shown_N, 0.0)
        items = {self.LOSS: count_N.sum()}
        return _Prepared(batch, items, torch.where(read_N, place_N, 0), count_N)

    def forward(
        self, model: nn.Module, encoded: Encoded, prepared: _Prepared, *, trivial: bool = True
    ) -> dict[str, LossPart]:
        """Cost of the molecules that were not shown."""
        batch = prepared.seen
        n_cells, cell_N, count_N = batch.n_cells, batch.full_cell_N, prepared.count_N
        latent_CD = self.shifted(encoded.cell_CD[:n_cells], batch.batch_C[:n_cells])
        library_C = batch.per_cell(count_N)
        total = MultinomialLoss.apply(
            latent_CD, self.gene_GD, self.bias_G, cell_N, prepared.gene_N, count_N, library_C
        )
        alone = -(count_N @ self.trivial_G[prepared.gene_N]) if trivial else None
        return {self.LOSS: LossPart(total, prepared.items[self.LOSS], alone)}

    def forward_flops(self, model: nn.Module, lengths_C: NDArray[np.integer]) -> int:
        """Operations of one forward pass: the decoder's matrix, and a transformer beneath."""
        backbone = getattr(model, "backbone", None)
        beneath = 0 if backbone is None else encoder_flops(backbone.settings, lengths_C)
        return 2 * len(lengths_C) * self.latent * len(self.bias_G) + beneath

    def shifted(self, latent_CD: Tensor, batch_C: Tensor) -> Tensor:
        """Add each cell's batch offset; batch -1 stands for the mean of all cells' offsets."""
        own_CD = self.offset_BD[batch_C.clamp_min(0)]
        return latent_CD + torch.where(
            (batch_C >= 0)[:, None], own_CD, self.share_B @ self.offset_BD
        )

    def log_fraction(self, latent_CD: Tensor, batch_C: Tensor) -> Tensor:
        """Log share of molecules per gene, (C, G); rows exponentiate to one."""
        shifted_CD = self.shifted(latent_CD, batch_C)
        return log_shares(torch.addmm(self.bias_G, shifted_CD, self.gene_GD.t()))


def _alike_before(head: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Heads that were saved without shares of their batches weighed all of them the same."""
    offset_BD = state.get(f"{prefix}offset_BD")
    if offset_BD is not None:
        alike_B = torch.full((len(offset_BD),), 1 / len(offset_BD))
        state.setdefault(f"{prefix}share_B", alike_B)


class Decoder(nn.Module):
    """Encoder of sparse counts, and the head that decodes them."""

    encoder: SparseCountEncoder | VectorEncoder
    head: ImputationHead

    def __init__(self, encoder: SparseCountEncoder | VectorEncoder, head: ImputationHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    @classmethod
    def new(
        cls,
        n_genes: int,
        n_batches: int,
        settings: "DecoderSettings",
        n_features: int = 0,
        *,
        carries: bool = False,
    ) -> "Decoder":
        """Make one of new weights, to be given others."""
        encoder = SparseCountEncoder(
            np.arange(n_genes), n_genes, settings, n_features, carries=carries
        )
        head = ImputationHead(
            np.full(n_genes, 1 / n_genes), n_batches, settings,
            latent=n_features if carries else None,
        )  # fmt: skip
        return cls(encoder, head)

    @classmethod
    def of_vectors(cls, gene_GD: Tensor, bias_G: Tensor) -> "Decoder":
        """Make one that decodes vectors of a pre-trained model."""
        n_genes, width = gene_GD.shape
        settings = DecoderSettings(latent=width)
        head = ImputationHead(np.full(n_genes, 1 / n_genes), 1, settings)
        with torch.no_grad():
            head.gene_GD.copy_(gene_GD)
            head.bias_G.copy_(bias_G)
        return cls(VectorEncoder(), head).requires_grad_(False)

    def encode(self, count_CG: sp.csr_matrix, features_CF: Floats | None = None) -> Tensor:
        """Latent vector of every cell, (C, D)."""
        stored_C = np.diff(count_CG.indptr)
        cell_N = torch.from_numpy(np.repeat(np.arange(len(stored_C)), stored_C))
        beside = None
        if features_CF is not None:
            beside = torch.from_numpy(np.ascontiguousarray(features_CF, np.float32))
        return self.encoder.read(
            torch.from_numpy(count_CG.indices.astype(np.int64)),
            cell_N,
            torch.from_numpy(count_CG.data.astype(np.float32)),
            len(stored_C),
            beside,
        )


@torch.no_grad()
def decode_fraction(
    decoder: Decoder,
    count_CG: sp.csr_matrix,
    batch_C: NDArray[np.integer],
    features_CF: Floats | None = None,
    block: int = 256,
) -> NDArray[np.float32]:
    """Prior share of molecules per gene given all counts of a cell, (C, G) float32.

    Memory is one (C, G) array plus a block; call it on slices of cells to stream.

    Parameters
    ----------
    decoder
        Trained weights.
    count_CG
        All counts of the cells, CSR (C, G).
    batch_C
        Batch whose offset is used, per cell; -1 for the mean over the cells of all.
    features_CF
        Vectors of the cells, where the decoder was trained with them.
    block
        Cells at a time.
    """
    decoder.eval()
    fraction_CG = np.empty(count_CG.shape, dtype=np.float32)
    for start in range(0, count_CG.shape[0], block):
        cells = slice(start, start + block)
        beside = None if features_CF is None else features_CF[cells]
        latent_CD = decoder.encode(count_CG[cells], beside)
        codes_C = torch.from_numpy(np.asarray(batch_C[cells], dtype=np.int64))
        fraction_CG[cells] = decoder.head.log_fraction(latent_CD, codes_C).exp_().numpy()
    return fraction_CG
