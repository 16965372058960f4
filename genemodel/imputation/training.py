"""A decoder of gene shares that learns to denoise: it sees some molecules and predicts the others.

Each step shows the encoder a random part of a cell's molecules (binomial thinning) and scores the
likelihood of the *other* part. Molecular cross-validation (Batson, Royer & Webber 2019) is
therefore the training loss, and the network cannot gain by copying its input. The library never
enters the answer: a rate is a share of molecules times a library, whichever is asked for.

Axes: C cells, G genes decoded, V genes of the cells, D latent dimensions, H hidden units, F width
of a cell vector, B technical batches, N stored entries, S sampled cells.
"""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import CellStream
from genemodel.batches.transfer import on_device
from genemodel.batches.views import View
from genemodel.bundle.history import STEP
from genemodel.errors import DataError
from genemodel.finetuning.backbone import (
    STANDARDISED,
    Backbone,
    even_size,
    micro_batches,
    tuned,
)
from genemodel.finetuning.head_run import HeadRun, out_of_bounds, train_head
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.imputation.network import (
    BLOCK_CELLS,
    Decoder,
    DecoderSettings,
    ImputationHead,
    SparseCountEncoder,
)
from genemodel.imputation.posterior import (
    Floats,
    calibrate_dispersion,
    posterior_gamma,
    randomised_pit,
    tally_coverage,
)
from genemodel.imputation.starting import Shown, knows, start_at_decoder, start_at_vectors
from genemodel.model.gene_model import Encoded, GeneModel
from genemodel.settings import to_values
from genemodel.train.reading import Built, Reading
from genemodel.train.settings import OptimSettings

logger = logging.getLogger(__name__)


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
    backbone
        The transformer beneath where there is one, adapters merged.
    """

    decoder: Decoder
    dispersion_G: NDArray[np.float64]
    heldout_nats: float
    coverage: Coverage
    history: list[tuple[int, float]] = field(default_factory=list)
    backbone: GeneModel | None = None

    @property
    def table(self) -> pd.DataFrame:
        """The history as a table that goes with a model; a ``step`` is a pass over the cells."""
        return pd.DataFrame(self.history, columns=[STEP, ImputationHead.LOSS])

    def __repr__(self) -> str:
        return (
            f"TrainedDecoder({len(self.dispersion_G):,} genes, {self.heldout_nats:.4f} nats a "
            "molecule set aside)"
        )


def train_decoder(
    data: TrainingCells,
    settings: DecoderSettings | None = None,
    *,
    gene_G: NDArray[np.integer] | None = None,
    gene_vectors_GE: Floats | None = None,
    backbone: Backbone | None = None,
    n_tokens: int | None = None,
    where: HeadRun | None = None,
    seed: int = 0,
) -> TrainedDecoder:
    """Train the decoder by thinning and calibrate its dispersion on molecules set aside.

    Parameters
    ----------
    data
        The cells.
    settings
        Default ``DecoderSettings()``.
    gene_G
        Genes that are read and decoded, by their place among those of the cells; default all. Leave
        out genes without counts: they cost time and say nothing.
    gene_vectors_GE
        Pre-trained vectors from which the genes start; NaN for a gene without one.
    backbone
        A transformer whose cell vectors are read beside the counts. They are made anew of the
        molecules that are shown, in every step: made once of all, they would show the encoder those
        that it is to predict.
    n_tokens
        Genes of the cells at or above it are unknown to the transformer.
    where
        Folder and devices of the training.
    seed
        Fixes the split, the initial weights and the order of cells.

    Returns
    -------
    TrainedDecoder
        Use it with ``decode_fraction`` on *all* counts of the cells.

    Raises
    ------
    DataError
        If a gene has no counts in the cells that are looked at.
    ConfigError
        The training went out of bounds.
    """
    settings, where = settings or DecoderSettings(), where or HeadRun()
    plan = _Plan(data, settings, gene_G, gene_vectors_GE, backbone, n_tokens, seed, where)
    trained = train_head(
        where,
        values=to_values(settings)
        | ({} if backbone is None else {"backbone": to_values(backbone.tuning)}),
        reading=plan.reading,
        optim=OptimSettings(
            lr=settings.learning_rate, warmup_steps=max(1, round(0.1 * plan.steps)),
            # As low as torch's one-cycle schedule ends with its own factors, 25 and 20.
            final_lr=0.002, weight_decay=0.0, beta2=0.99, clip=0.0,
            average_decay=settings.average_decay,
        ),
        steps=plan.steps,
        build=plan.build,
        seed=seed,
        rate="learning_rate",
        looks={
            "validate_every": settings.check_every * plan.steps_a_pass,
            "validation_batches": 10**9,
            "early_stopping": settings.patience + 1,
            "early_stopping_gain": _GAIN,
        },
        backbone=None if backbone is None else backbone.model.settings,
    )  # fmt: skip
    history = [
        (round(step / plan.steps_a_pass), float(nats))
        for step, nats in zip(
            trained.history[STEP], trained.history[ImputationHead.LOSS], strict=True
        )
    ]
    nats = min(nats for _, nats in history)
    if not math.isfinite(nats):
        raise out_of_bounds("learning_rate", settings.learning_rate)
    built = trained.loaded(plan.build, seed)
    head, model = built.objectives, built.model
    assert isinstance(head, ImputationHead)
    dispersion_G, coverage = _calibrated(plan, model, head, where.target)
    beneath = tuned(model)
    counts = model if isinstance(model, SparseCountEncoder) else model.counts
    assert isinstance(counts, SparseCountEncoder)
    decoder = Decoder(counts, head).cpu().eval()
    return TrainedDecoder(decoder, dispersion_G, nats, coverage, history, beneath)


# Less than this, in nats a molecule, is no gain: the differences between seeds are larger.
_GAIN = 1e-4


class _Plan:
    """What is settled before the training: genes, micro-batches, steps, molecules set aside."""

    def __init__(
        self,
        data: TrainingCells,
        settings: DecoderSettings,
        gene_G: NDArray[np.integer] | None,
        gene_vectors_GE: Floats | None,
        backbone: Backbone | None,
        n_tokens: int | None,
        seed: int,
        where: HeadRun,
    ) -> None:
        self.data, self.settings, self.seed = data, settings, seed
        self.backbone, self.vectors_GE = backbone, gene_vectors_GE
        # Whether the model's count decoder is the start; None until that was looked at.
        self.knows: bool | None = None if settings.from_decoder else False
        self.gene_G = np.arange(data.n_genes) if gene_G is None else np.asarray(gene_G)
        n_cells = len(data.train)
        size = even_size(n_cells, settings.batch_cells)
        trainer = where.trainer
        at_once = size * trainer.accumulate * trainer.devices * trainer.num_nodes
        self.steps_a_pass = math.ceil(n_cells / at_once)
        self.steps = settings.passes(n_cells) * self.steps_a_pass
        aside = settings.calibration_fraction
        genes_V = np.zeros(data.n_genes, bool)
        genes_V[self.gene_G] = True
        self.judged = View(seed, aside=aside, judged=True)
        tokens = micro_batches(size, backbone)
        inverse_median_V = np.ones(data.n_genes, np.float32)
        if backbone is not None:
            known_V = backbone.inverse_median_V
            inverse_median_V = inverse_median_V.astype(known_V.dtype)
            inverse_median_V[: len(known_V)] = known_V[: data.n_genes]
        held_out = data.held_out if data.held_out.size else data.sample
        self.reading = Reading(
            data.cells, tokens, inverse_median_V, data.train, held_out,
            batch_codes=data.batch_C, layout=data.layout,
            view=View(seed, settings.thin_low, settings.thin_high, aside), held_view=self.judged,
            n_tokens=n_tokens if backbone is not None else None,
            genes_V=None if backbone is not None or len(self.gene_G) == data.n_genes else genes_V,
        )  # fmt: skip
        # What the encoder is shown of the sample in a check, and what is set aside of it.
        self.seen_SG, self.held_SG = self._shared_out(data.sample, data.sample_SV)
        total_G = np.asarray(data.sample_SV[:, self.gene_G].sum(0)).ravel()
        if not total_G.all():
            raise DataError("counts have genes without any count; remove them before training")

    def _shared_out(
        self, cells: NDArray[np.integer], counts_SV: sp.csr_matrix
    ) -> tuple[sp.csr_matrix, sp.csr_matrix]:
        """Split counts of some cells into molecules that are shown and set aside."""
        counts_SV = sp.csr_matrix(counts_SV)
        there_N, seen_N = self.judged.apply(
            counts_SV.indptr[:-1], counts_SV.indptr[1:], counts_SV.indices, counts_SV.data, cells, 0
        )
        parts = []
        for value_N in (seen_N, there_N - seen_N):
            part = sp.csr_matrix(
                (value_N, counts_SV.indices.copy(), counts_SV.indptr.copy()), counts_SV.shape
            )
            part.eliminate_zeros()
            parts.append(part[:, self.gene_G])
        return parts[0], parts[1]

    def build(self) -> Built:
        """Make encoder and head, with their starting points."""
        data, backbone = self.data, self.backbone
        if backbone is None:
            counts, head = self._parts(0)
            if self.vectors_GE is not None:
                start_at_vectors(counts, head, self.vectors_GE)
            return Built(counts, head)
        rows = slice(None, None, max(1, data.sample.size // STANDARDISED))
        vectors_CF = backbone.vectors_of(self.in_order(data.sample[rows]))
        if self.knows is not False and backbone.gene_VF is not None:
            counts, head = self._parts(backbone.width, carries=True)
            shown = Shown(vectors_CF, self.seen_SG[rows], self.held_SG[rows])
            start_at_decoder(head, backbone.gene_VF, self.gene_G, shown)
            if self.knows is None:
                self.knows = knows(head, shown)
            if self.knows:
                return backbone.beneath(counts, head, vectors_CF)
        counts, head = self._parts(backbone.width)
        if self.vectors_GE is not None:
            start_at_vectors(counts, head, self.vectors_GE)
        return backbone.beneath(counts, head, vectors_CF)

    def _parts(
        self, width: int, *, carries: bool = False
    ) -> tuple[SparseCountEncoder, ImputationHead]:
        """Make encoder and head of new weights."""
        data, settings = self.data, self.settings
        counts = SparseCountEncoder(self.gene_G, data.n_genes, settings, width, carries=carries)
        frequency_G = np.asarray(self.seen_SG.sum(axis=0)).ravel() + 0.1
        head = ImputationHead(
            frequency_G / frequency_G.sum(), data.n_batches, settings, counts.place_V.clone(),
            data.share_B, latent=width if carries else None,
        )  # fmt: skip
        return counts, head

    def in_order(
        self, cells: NDArray[np.integer], device: torch.device | str = "cpu"
    ) -> Iterator[CellBatch]:
        """Read cells once, without the molecules that are set aside."""
        reading = self.reading
        stream = CellStream(
            self.data.cells, cells, reading.tokens, seed=self.seed, endless=False, shuffle=False,
            inverse_median_V=reading.inverse_median_V, view=self.judged,
            n_tokens=reading.n_tokens, genes_V=reading.genes_V,
        )  # fmt: skip
        for batch, _ in on_device(stream, device):
            yield batch


@torch.no_grad()
def _calibrated(
    plan: _Plan, model: nn.Module, head: ImputationHead, device: torch.device
) -> tuple[NDArray[np.float64], Coverage]:
    """Fit the dispersion of every gene on molecules set aside, and check the intervals on them."""
    data, settings, seed = plan.data, plan.settings, plan.seed
    model.to(device).eval()
    cells, seen_SG, held_SG = data.sample, plan.seen_SG, plan.held_SG
    if len(cells) > settings.calibration_cells:
        generator = np.random.default_rng(seed)
        chosen = generator.choice(len(cells), settings.calibration_cells, replace=False)
        rows = np.sort(chosen)
        cells, seen_SG, held_SG = cells[rows], seen_SG[rows], held_SG[rows]
    latents, numbers = [], []
    for batch in plan.in_order(cells, device):
        encoded: Encoded = model(batch)
        latents.append(encoded.cell_CD[: batch.n_cells].float().cpu())
        numbers.append(batch.cell_C[: batch.n_cells].cpu())
    latent_SD = torch.cat(latents)[torch.argsort(torch.cat(numbers))]
    code_S = torch.from_numpy(np.asarray(data.batch_C[cells], np.int64))
    return calibrated(
        head.cpu(), latent_SD, code_S, seen_SG, held_SG, settings.calibration_fraction, seed
    )


def calibrated(
    head: ImputationHead,
    latent_SD: Tensor,
    code_S: Tensor,
    seen_SG: sp.csr_matrix,
    held_SG: sp.csr_matrix,
    fraction: float,
    seed: int,
) -> tuple[NDArray[np.float64], Coverage]:
    """Dispersion of every gene around a decoder's answer, and what its intervals then hold.

    Parameters
    ----------
    head
        Decodes the latents.
    latent_SD, code_S
        Of some cells, made without the molecules set aside, and their batches.
    seen_SG, held_SG
        Molecules that were shown, and set aside.
    fraction
        Share of the molecules that was set aside.
    seed
        Of the randomised intervals.
    """
    library_S = np.asarray(seen_SG.sum(axis=1), dtype=np.float32).ravel()

    def prior_mean(rows: slice) -> Floats:
        with torch.no_grad():
            fraction_CG = head.log_fraction(latent_SD[rows], code_S[rows]).exp().numpy()
        # A cell whose every molecule was set aside has seen nothing and predicts nothing.
        return np.maximum(fraction_CG * library_S[rows, None], 1e-12)

    ratio = fraction / (1.0 - fraction)
    dispersion_G = calibrate_dispersion(prior_mean, seen_SG, held_SG, ratio)
    coverage = measure_coverage(
        prior_mean, dispersion_G, seen_SG, held_SG, ratio, np.random.default_rng(seed)
    )
    logger.info("%s", coverage)
    return dispersion_G, coverage
