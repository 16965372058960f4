"""A decoder of gene shares that learns to denoise: it sees some molecules and predicts the others.

Each step shows the encoder a random part of a cell's molecules (binomial thinning) and scores the
likelihood of the *other* part. Molecular cross-validation (Batson, Royer & Webber 2019) is
therefore the training loss, and the network cannot gain by copying its input. The library never
enters the answer: a rate is a share of molecules times a library, whichever is asked for.

Axes: C cells, G genes, D latent dimensions, H hidden units, B technical batches, N stored entries.
"""

import copy
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from genemodel.adapt.posterior import (
    Floats,
    calibrate_dispersion,
    posterior_gamma,
    randomised_pit,
    tally_coverage,
)
from genemodel.adapt.setting_ranges import check_numbers
from genemodel.errors import ConfigError, DataError
from genemodel.expression.likelihood import MultinomialLoss
from genemodel.expression.normalise import log_normalised
from genemodel.expression.thinning import split_molecules

logger = logging.getLogger(__name__)

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


def _encoder_input(count_CG: sp.csr_matrix) -> tuple[Tensor, Tensor, Tensor]:
    """Gene index, row offset and weight: log-normalised counts over sqrt(genes seen)."""
    stored_C = np.diff(count_CG.indptr)
    weight_N = log_normalised(count_CG).data
    weight_N /= np.repeat(np.sqrt(np.maximum(stored_C, 1)), stored_C)
    return (
        torch.from_numpy(count_CG.indices.astype(np.int64)),
        torch.from_numpy(count_CG.indptr[:-1].astype(np.int64)),
        torch.from_numpy(weight_N.astype(np.float32)),
    )


def _target(count_CG: sp.csr_matrix) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row, column and value of the stored entries, and the library of every cell."""
    entries = count_CG.tocoo()
    return (
        torch.from_numpy(entries.row.astype(np.int64)),
        torch.from_numpy(entries.col.astype(np.int64)),
        torch.from_numpy(entries.data.astype(np.float32)),
        torch.from_numpy(np.asarray(count_CG.sum(axis=1), dtype=np.float32).ravel()),
    )


class Decoder(nn.Module):
    """Encoder of sparse counts and softmax decoder ``softmax(<z + offset_b, e_g> + bias_g)``.

    Parameters
    ----------
    frequency_G
        Share of all molecules per gene, positive; the decoder starts from it.
    n_batches
        Technical batches B; each has its own latent offset, zero when B is one.
    settings
        Widths and dropout.
    """

    def __init__(self, frequency_G: Floats, n_batches: int, settings: DecoderSettings) -> None:
        super().__init__()
        n_genes, hidden = len(frequency_G), settings.hidden
        self.input_GH = nn.Parameter(torch.randn(n_genes, hidden) * 0.02)
        self.input_bias_H = nn.Parameter(torch.zeros(hidden))
        self.trunk = nn.Sequential(
            nn.LayerNorm(hidden),
            nn.Dropout(settings.dropout),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, settings.latent),
        )
        self.gene_GD = nn.Parameter(torch.randn(n_genes, settings.latent) * 0.05)
        self.bias_G = nn.Parameter(torch.log(torch.as_tensor(frequency_G, dtype=torch.float32)))
        self.offset_BD = nn.Parameter(
            torch.zeros(n_batches, settings.latent), requires_grad=n_batches > 1
        )

    @torch.no_grad()
    def start_from(self, vectors_GE: Floats) -> None:
        """Start genes at the principal components of pre-trained vectors, as large as otherwise.

        Genes whose row is NaN start at random, and so do columns beyond the components.
        """
        vectors = torch.as_tensor(vectors_GE, dtype=torch.float32)
        known_G = torch.isfinite(vectors).all(1)
        if int(known_G.sum()) < 2:
            return
        centred_GE = vectors[known_G] - vectors[known_G].mean(0)
        left_GE, size_E, _ = torch.linalg.svd(centred_GE, full_matrices=False)
        score_GE = left_GE * size_E
        for target in (self.input_GH, self.gene_GD):
            k = min(score_GE.shape[1], target.shape[1])
            chosen_GE = score_GE[:, :k]
            target[known_G, :k] = chosen_GE / chosen_GE.std().clamp_min(1e-12) * target.std()

    def encode(self, count_CG: sp.csr_matrix) -> Tensor:
        """Latent vector of every cell, (C, D)."""
        gene_N, start_C, weight_N = _encoder_input(count_CG)
        summed_CH = functional.embedding_bag(
            gene_N, self.input_GH, start_C, mode="sum", per_sample_weights=weight_N
        )
        return self.trunk(summed_CH + self.input_bias_H)

    def log_fraction(self, latent_CD: Tensor, batch_C: Tensor) -> Tensor:
        """Log share of molecules per gene, (C, G); rows exponentiate to one.

        Batch -1 stands for the mean offset of all batches.
        """
        offset_CD = torch.where(
            (batch_C >= 0)[:, None], self.offset_BD[batch_C.clamp_min(0)], self.offset_BD.mean(0)
        )
        logit_CG = torch.addmm(self.bias_G, latent_CD + offset_CD, self.gene_GD.t())
        return torch.log_softmax(logit_CG, 1)


@torch.no_grad()
def decode_fraction(
    decoder: Decoder, count_CG: sp.csr_matrix, batch_C: NDArray[np.integer], block: int = 256
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
        Batch whose offset is used, per cell; -1 for the mean over batches.
    block
        Cells at a time.
    """
    decoder.eval()
    fraction_CG = np.empty(count_CG.shape, dtype=np.float32)
    for start in range(0, count_CG.shape[0], block):
        cells = slice(start, start + block)
        latent_CD = decoder.encode(count_CG[cells])
        codes_C = torch.from_numpy(np.asarray(batch_C[cells], dtype=np.int64))
        fraction_CG[cells] = decoder.log_fraction(latent_CD, codes_C).exp_().numpy()
    return fraction_CG


@torch.no_grad()
def _heldout_nats(
    decoder: Decoder,
    seen_CG: sp.csr_matrix,
    held_CG: sp.csr_matrix,
    batch_C: NDArray[np.int64],
    block: int = 256,
) -> float:
    """Negative log-likelihood per held-out molecule."""
    decoder.eval()
    total = 0.0
    for start in range(0, seen_CG.shape[0], block):
        cells = slice(start, start + block)
        row_N, column_N, count_N, _ = _target(held_CG[cells])
        log_CG = decoder.log_fraction(
            decoder.encode(seen_CG[cells]), torch.from_numpy(batch_C[cells])
        )
        total -= float(count_N @ log_CG[row_N, column_N])
    return total / max(float(held_CG.sum()), 1.0)


@dataclass(frozen=True, slots=True)
class Coverage:
    """How many of the set-aside counts 90 % intervals hold, by the randomised definition.

    Attributes
    ----------
    overall
        Share of all entries (cell, gene).
    by_gene_decile
        The same per tenth of the genes, rarest first.
    by_mean
        ``(smallest predicted mean, share, entries)`` per slice; slices without entries are left
        out. Only slices of means above some 0.3 can really fail: below, nearly all counts are 0.
    """

    overall: float
    by_gene_decile: tuple[float, ...]
    by_mean: tuple[tuple[float, float, int], ...]

    def __str__(self) -> str:
        slices = ", ".join(f"from {low:g}: {share:.1%}" for low, share, _ in self.by_mean)
        return (
            f"90 % intervals hold {self.overall:.1%} of the counts set aside (gene deciles "
            f"{min(self.by_gene_decile):.1%} to {max(self.by_gene_decile):.1%}; predicted mean "
            f"{slices})"
        )


COVERAGE_SLICES = (0.0, 0.01, 0.3, 1.0, 3.0, 10.0)


def measure_coverage(
    prior_mean: Callable[[slice], Floats],
    dispersion_G: NDArray[np.float64],
    count_CG: sp.csr_matrix,
    held_CG: sp.csr_matrix,
    exposure_ratio: float,
    generator: np.random.Generator,
    *,
    most_cells: int = 2_000,
) -> Coverage:
    """Check the posterior's predictions of counts that were set aside.

    Parameters
    ----------
    prior_mean
        Decoder's mean of a slice of cells at the exposure of ``count_CG``.
    dispersion_G
        Of the prior.
    count_CG, held_CG
        Evidence and set-aside counts.
    exposure_ratio
        Exposure of ``held_CG`` over that of ``count_CG``.
    generator
        Source of randomness of the randomised intervals.
    most_cells
        Cells looked at, in blocks spread evenly.
    """
    n_genes, n_slices = count_CG.shape[1], len(COVERAGE_SLICES)
    total_G = np.asarray(count_CG.sum(axis=0)).ravel()
    decile_G = np.argsort(np.argsort(total_G, kind="stable"), kind="stable") * 10 // n_genes
    hits, seen = np.zeros((10, n_slices)), np.zeros((10, n_slices))
    starts = np.arange(0, count_CG.shape[0], BLOCK_CELLS)
    n_blocks = max(1, most_cells // BLOCK_CELLS)
    for start in starts[:: -(-len(starts) // n_blocks)]:
        cells = slice(int(start), int(start) + BLOCK_CELLS)
        shape_CG, rate_CG = posterior_gamma(
            count_CG[cells].toarray(), prior_mean(cells), dispersion_G
        )
        held_block_CG = held_CG[cells].toarray()
        pit_CG = randomised_pit(held_block_CG, shape_CG, rate_CG, exposure_ratio, generator)
        slice_CG = np.searchsorted(COVERAGE_SLICES, exposure_ratio * shape_CG / rate_CG, "right")
        group_CG = decile_G * n_slices + np.maximum(slice_CG - 1, 0)
        more_hits, more = tally_coverage(pit_CG, group_CG, hits.size)
        hits += more_hits.reshape(hits.shape)
        seen += more.reshape(seen.shape)
    by_decile = hits.sum(1)[seen.sum(1) > 0] / seen.sum(1)[seen.sum(1) > 0]
    return Coverage(
        overall=float(hits.sum() / seen.sum()),
        by_gene_decile=tuple(by_decile.tolist()),
        by_mean=tuple(
            (low, float(hits[:, i].sum() / seen[:, i].sum()), int(seen[:, i].sum()))
            for i, low in enumerate(COVERAGE_SLICES)
            if seen[:, i].any()
        ),
    )


@dataclass(frozen=True, slots=True, repr=False)
class TrainedDecoder:
    """A decoder with its calibrated dispersion.

    Attributes
    ----------
    decoder
        Weights are the running mean at the best check.
    dispersion_G
        Variance of a gene's true rate around the decoder's answer over the squared answer.
    heldout_nats
        Negative log-likelihood per calibration molecule at the best check.
    coverage
        What the intervals hold of the molecules set aside.
    history
        ``(epoch, heldout_nats)`` of every check.
    """

    decoder: Decoder
    dispersion_G: NDArray[np.float64]
    heldout_nats: float
    coverage: Coverage
    history: list[tuple[int, float]] = field(default_factory=list)

    def __repr__(self) -> str:
        return (
            f"TrainedDecoder({len(self.dispersion_G):,} genes, {self.heldout_nats:.4f} nats a "
            "molecule set aside)"
        )


def train_decoder(
    count_CG: sp.csr_matrix,
    batch_C: NDArray[np.integer] | None = None,
    settings: DecoderSettings | None = None,
    *,
    gene_vectors_GE: Floats | None = None,
    seed: int = 0,
) -> TrainedDecoder:
    """Train the decoder by thinning and calibrate its dispersion on molecules set aside.

    Parameters
    ----------
    count_CG
        Raw counts, CSR (C, G). Drop genes without counts first: they cost time and say nothing.
    batch_C
        Technical batch codes 0..B-1; one batch if omitted.
    settings
        Default ``DecoderSettings()``.
    gene_vectors_GE
        Pre-trained vectors from which the genes start; NaN for a gene without one. There is no such
        door for *cell* vectors: they are made from all molecules of a cell, and would show the
        encoder those that it is to predict.
    seed
        Fixes the split, the initial weights and the order of cells.

    Returns
    -------
    TrainedDecoder
        Use it with ``decode_fraction`` on *all* counts of the cells.

    Raises
    ------
    DataError
        If a cell or a gene has no counts, or the codes do not match the cells.
    """
    settings = settings or DecoderSettings()
    count_CG = sp.csr_matrix(count_CG)
    n_cells = count_CG.shape[0]
    total_G = np.asarray(count_CG.sum(axis=0), dtype=np.float64).ravel()
    if not total_G.all() or not np.asarray(count_CG.sum(axis=1)).all():
        raise DataError("counts have cells or genes without any count; remove them before training")
    codes_C = np.zeros(n_cells, np.int64) if batch_C is None else np.asarray(batch_C, np.int64)
    if codes_C.shape != (n_cells,) or codes_C.min() < 0:
        raise DataError(f"batch codes have shape {codes_C.shape}; expected ({n_cells},), all >= 0")

    generator = np.random.default_rng(seed)
    seen_CG, held_CG = split_molecules(count_CG, 1.0 - settings.calibration_fraction, generator)
    frequency_G = np.asarray(seen_CG.sum(axis=0)).ravel() + 0.1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = Decoder(frequency_G / frequency_G.sum(), int(codes_C.max()) + 1, settings)
        if gene_vectors_GE is not None:
            decoder.start_from(gene_vectors_GE)
        averaged, nats, history = _fit(decoder, seen_CG, held_CG, codes_C, generator, settings)

    chosen_C = np.arange(n_cells)
    if n_cells > settings.calibration_cells:
        chosen_C = np.sort(generator.choice(n_cells, settings.calibration_cells, replace=False))
        seen_CG, held_CG, codes_C = seen_CG[chosen_C], held_CG[chosen_C], codes_C[chosen_C]
    library_C = np.asarray(seen_CG.sum(axis=1), dtype=np.float32).ravel()

    def prior_mean(cells: slice) -> Floats:
        fraction_CG = decode_fraction(averaged, seen_CG[cells], codes_C[cells])
        # A cell whose every molecule was set aside has seen nothing and predicts nothing.
        return np.maximum(fraction_CG * library_C[cells, None], 1e-12)

    ratio = settings.calibration_fraction / (1.0 - settings.calibration_fraction)
    dispersion_G = calibrate_dispersion(prior_mean, seen_CG, held_CG, ratio)
    coverage = measure_coverage(
        prior_mean, dispersion_G, seen_CG, held_CG, ratio, np.random.default_rng(seed)
    )
    logger.info("%s", coverage)
    return TrainedDecoder(averaged, dispersion_G, nats, coverage, history)


def _fit(
    decoder: Decoder,
    seen_CG: sp.csr_matrix,
    held_CG: sp.csr_matrix,
    codes_C: NDArray[np.int64],
    generator: np.random.Generator,
    settings: DecoderSettings,
) -> tuple[Decoder, float, list[tuple[int, float]]]:
    """Run the optimiser; return the best averaged weights, their score and the history."""
    n_cells = seen_CG.shape[0]
    weights: list[Tensor] = [p for p in decoder.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(weights, lr=settings.learning_rate, betas=(0.9, 0.99))
    epochs = settings.passes(n_cells)
    n_steps = epochs * math.ceil(n_cells / settings.batch_cells)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=n_steps, pct_start=0.1, final_div_factor=20
    )
    running = copy.deepcopy(decoder)
    averaged: list[Tensor] = [p for p in running.parameters() if p.requires_grad]
    best, best_nats, step, waited = copy.deepcopy(decoder), math.inf, 0, 0
    history: list[tuple[int, float]] = []
    for epoch in range(1, epochs + 1):
        decoder.train()
        order_C = generator.permutation(n_cells)
        for start in range(0, n_cells, settings.batch_cells):
            cells = np.sort(order_C[start : start + settings.batch_cells])
            keep_C = generator.uniform(settings.thin_low, settings.thin_high, len(cells))
            shown_CG, other_CG = split_molecules(seen_CG[cells], keep_C, generator)
            latent_CD = decoder.encode(shown_CG)
            if decoder.offset_BD.requires_grad:
                latent_CD = latent_CD + decoder.offset_BD[torch.from_numpy(codes_C[cells])]
            loss = MultinomialLoss.apply(
                latent_CD, decoder.gene_GD, decoder.bias_G, *_target(other_CG)
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            step += 1
            decay = min(settings.average_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(averaged, weights, 1.0 - decay)
        if epoch % settings.check_every == 0 or epoch == epochs:
            nats = _heldout_nats(running, seen_CG, held_CG, codes_C)
            history.append((epoch, nats))
            logger.info(
                "imputation: pass %d of %d, %.4f nats a molecule set aside", epoch, epochs, nats
            )
            waited = 0 if nats < best_nats - 1e-4 else waited + 1
            if nats < best_nats:
                best, best_nats = copy.deepcopy(running), nats
            if waited > settings.patience:
                break
    return best, best_nats, history
