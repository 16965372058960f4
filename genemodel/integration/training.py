"""Training a batch-robust embedding, and embedding cells with it.

The encoder reads a binomially thinned copy of the counts and decodes the full profile, which makes
the latent independent of sequencing depth. What batch effect is left is removed by a soft-cluster
offset per batch, estimated only from populations with evidence that they exist in more than one.

Axes: C cells of a step or a data set, G genes read, V genes of the cells, D latent, F features of a
cell vector, E width of pre-trained gene vectors, S sampled cells.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from torch import nn

from genemodel.batches.loader import CellStream
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.transfer import on_device
from genemodel.batches.views import View
from genemodel.expression.normalise import log_normalised, normalised
from genemodel.expression.variable_genes import select_genes
from genemodel.finetuning.backbone import (
    STANDARDISED,
    Backbone,
    even_size,
    micro_batches,
    tuned,
)
from genemodel.finetuning.head_run import HeadRun, out_of_bounds, train_head
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.integration.head import (
    IntegrationHead,
    IntegrationSettings,
    start_at_vectors,
)
from genemodel.integration.linear_start import (
    LinearStart,
    MakesVectors,
    linear_start,
    vector_share,
)
from genemodel.integration.shared_clusters import SharedClusterCorrection
from genemodel.integration.sparing import Spared, corrected
from genemodel.model.count_encoder import CountEncoder, CountsBesideVectors
from genemodel.model.gene_model import GeneModel
from genemodel.settings import to_values
from genemodel.train.reading import Built, Reading
from genemodel.train.settings import OptimSettings

logger = logging.getLogger(__name__)

# Of few cells a network unlearns what their components keep: on draws of 150 cells of five sets 10
# passes keep more biology than 20, on draws of 400 cells 20 and 40 are alike.
_FEW_PASSES, _PASSES_PER_CELL = 10, 0.05
# Cells encoded at a time after training, where no transformer takes part.
_ENCODED = 1024


class IntegrationNet(nn.Module):
    """Encoder blind to the batch, and the head whose decoder is told about it."""

    def __init__(self, encoder: CountEncoder, head: IntegrationHead) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    @torch.no_grad()
    def encode(
        self,
        counts_CG: sparse.csr_matrix,
        features_CF: np.ndarray | None = None,
        measured_G: np.ndarray | None = None,
    ) -> np.ndarray:
        """Latent mean of every cell, (C, D) float32.

        Parameters
        ----------
        counts_CG
            Raw counts of the genes that it reads, in its order.
        features_CF
            Cell vectors as they came from their model, where the network was trained with them; a
            row with NaN is treated as absent.
        measured_G
            Genes that this data set measured, bool; default all.
        """
        training = self.training
        self.eval()
        counts_CG = sparse.csr_matrix(counts_CG).astype(np.float32)
        measured = None if measured_G is None else torch.from_numpy(measured_G.astype(np.float32))
        out = []
        for start in range(0, counts_CG.shape[0], _ENCODED):
            rows = slice(start, start + _ENCODED)
            beside = None
            if features_CF is not None:
                beside = torch.from_numpy(np.ascontiguousarray(features_CF[rows], np.float32))
            block = torch.from_numpy(counts_CG[rows].toarray())
            out.append(self.head.latent(self.encoder.read(block, beside, measured))[0])
        self.train(training)
        return torch.cat(out).numpy() if out else np.zeros((0, self.head.settings.latent), "f4")


@dataclass(repr=False)
class Integration:
    """A trained net with the genes it reads and the correction fitted on its training cells.

    Attributes
    ----------
    net
        The network, in evaluation mode, on the CPU.
    gene_G
        Columns that it reads.
    correction
        What was fitted after training; None where it was turned off.
    latent_CD, embedding_CD
        The cells with counts before and after the correction, float32.
    history
        Losses.
    steps
        Of the training.
    backbone
        The transformer beneath where it has learnt on, adapters merged.
    start
        Linear components that the latent started at, where the cells were few.
    private
        Populations that seem to be of one batch alone; none is sought where labels tell.
    """

    net: IntegrationNet
    gene_G: np.ndarray
    correction: SharedClusterCorrection | None
    latent_CD: np.ndarray
    embedding_CD: np.ndarray
    history: pd.DataFrame
    steps: int
    backbone: GeneModel | None = None
    start: LinearStart | None = None
    private: Sequence[Spared] = ()

    def __repr__(self) -> str:
        cells, latent = self.latent_CD.shape
        corrected = "corrected" if self.correction is not None else "not corrected"
        return (
            f"Integration({cells:,} cells × {len(self.gene_G):,} genes → {latent} dimensions, "
            f"{self.steps:,} steps, {corrected})"
        )


def train_integration(
    data: TrainingCells,
    *,
    settings: IntegrationSettings | None = None,
    vectors_NF: np.ndarray | None = None,
    backbone: Backbone | None = None,
    gene_vectors_VE: np.ndarray | None = None,
    makes_vectors: MakesVectors | None = None,
    where: HeadRun | None = None,
    seed: int = 0,
) -> Integration:
    """Train the net and fit the correction on its latent.

    Parameters
    ----------
    data
        The cells.
    settings
        The recipe; the default is meant for every data set.
    vectors_NF
        Vectors of all cells by a transformer that stays as it is, read beside the counts; NaN for
        a cell without known genes.
    backbone
        Or a transformer that makes them on the way.
    gene_vectors_VE
        Pre-trained gene vectors, from which the genes start.
    makes_vectors
        Vectors of sampled cells of other molecules, by the transformer as it came. Without it they
        take no part in the linear components.
    where
        Folder and devices of the training.
    seed
        Of initial weights, order, thinning and clustering.

    Raises
    ------
    ConfigError
        The training went out of bounds.
    """
    settings, where = settings or IntegrationSettings(), where or HeadRun()
    plan = _Plan(
        data, settings, vectors_NF, backbone, gene_vectors_VE, makes_vectors, seed, where
    )  # fmt: skip
    trained = train_head(
        where,
        values=to_values(settings) | _said_of(backbone),
        reading=plan.reading,
        optim=OptimSettings(
            lr=settings.peak_rate, warmup_steps=round(settings.warm_up * plan.steps), final_lr=0.0,
            weight_decay=settings.weight_decay, beta2=0.999, clip=settings.max_norm,
        ),
        steps=plan.steps,
        build=plan.build,
        seed=seed,
        rate="peak_rate",
        backbone=None if backbone is None else backbone.model.settings,
    )  # fmt: skip
    built = trained.loaded(plan.build, seed)
    latent_CD = plan.encode(built, where.target)
    if not np.isfinite(latent_CD).all():
        raise out_of_bounds("peak_rate", settings.peak_rate)
    correction, embedding_CD, private = corrected(
        latent_CD, data.batch_C[data.used], np.searchsorted(data.used, data.sample),
        plan.sample_SG, correct=settings.correct and data.n_batches > 1,
        spare=settings.spare_private, look=data.label_C is None, seed=seed,
    )  # fmt: skip
    beneath = tuned(built.model)
    counts = built.model if isinstance(built.model, CountEncoder) else built.model.counts
    assert isinstance(counts, CountEncoder) and isinstance(built.objectives, IntegrationHead)
    net = IntegrationNet(counts.cpu(), built.objectives.cpu()).eval()
    return Integration(
        net,
        plan.gene_G,
        correction,
        latent_CD,
        embedding_CD,
        trained.history,
        trained.steps,
        beneath,
        plan.start,
        private,
    )


def _said_of(backbone: Backbone | None) -> dict[str, object]:
    if backbone is None:
        return {}
    said: dict[str, object] = {"backbone": to_values(backbone.tuning)}
    return said


class _Plan:
    """What is settled before the training: genes, statistics, micro-batches, steps."""

    def __init__(
        self,
        data: TrainingCells,
        settings: IntegrationSettings,
        vectors_NF: np.ndarray | None,
        backbone: Backbone | None,
        gene_vectors_VE: np.ndarray | None,
        makes_vectors: MakesVectors | None,
        seed: int,
        where: HeadRun,
    ) -> None:
        self.data, self.settings, self.seed = data, settings, seed
        self.makes_vectors, self.sample_SV = makes_vectors, data.sample_SV
        self.vectors_NF, self.backbone = vectors_NF, backbone
        code_S = data.batch_C[data.sample]
        # Most genes of a vocabulary are in no single data set.
        seen_G = np.flatnonzero(data.sample_SV.getnnz(0) > 0)
        if data.n_genes <= settings.n_genes:
            seen_G = np.arange(data.n_genes)
        chosen = select_genes(data.sample_SV[:, seen_G], code_S, settings.n_genes)
        self.gene_G = seen_G[chosen]
        self.place_G = self.gene_G
        self.sample_SG = data.sample_SV[:, self.gene_G]
        if backbone is None:
            # Without a transformer no other gene is read.
            data = data.only(self.gene_G)
            if data.n_genes == len(self.gene_G):
                self.place_G = np.arange(data.n_genes)
        self.data = data
        genes_V = np.zeros(data.n_genes, bool)
        genes_V[self.place_G] = True
        self.genes_V = None if backbone is not None or genes_V.all() else genes_V
        self.vectors_GE = None if gene_vectors_VE is None else gene_vectors_VE[self.gene_G]
        train = data.train
        n_cells = len(train)
        size = even_size(n_cells, settings.batch_cells)
        self.tokens = micro_batches(size, backbone)
        self.inverse_median_V = (
            np.ones(data.n_genes, np.float32) if backbone is None else backbone.inverse_median_V
        )
        self.reading = Reading(
            data.cells, self.tokens, self.inverse_median_V, train,
            data.held_out if data.held_out.size else None,
            # A batch that is held out whole is as unknown as one that comes later.
            batch_codes=np.where(np.isin(data.batch_C, data.batch_C[train]), data.batch_C, -1),
            layout=data.layout,
            view=View(seed, settings.keep_min), genes_V=self.genes_V,
        )  # fmt: skip
        trainer = where.trainer
        at_once = size * trainer.accumulate * trainer.devices * trainer.num_nodes
        self.steps = settings.steps_over(n_cells, at_once)
        # Labels give the network more to learn from than a few cells.
        self.linear = n_cells < settings.few_cells and data.label_C is None
        self.start: LinearStart | None = None
        if self.linear:
            most = max(_FEW_PASSES, _PASSES_PER_CELL * n_cells)
            self.steps = min(self.steps, math.ceil(most * n_cells / at_once))

    def build(self) -> Built:
        """Make encoder and head, with their starting points."""
        data, settings, backbone = self.data, self.settings, self.backbone
        n_features = 0 if backbone is None else backbone.width
        if self.vectors_NF is not None:
            n_features = self.vectors_NF.shape[1]
        counts = CountEncoder(
            self.place_G, data.n_genes, hidden=settings.hidden, dropout=settings.dropout,
            n_features=n_features, feature_dropout=settings.feature_dropout,
            n_components=settings.latent if self.linear else 0,
        )  # fmt: skip
        value_SG = log_normalised(self.sample_SG)
        mean_G = np.asarray(value_SG.mean(0)).ravel()
        square_G = np.asarray(value_SG.multiply(value_SG).mean(0)).ravel()
        counts.standardise(mean_G, np.sqrt(np.maximum(square_G - mean_G**2, 0.0)))
        share_SG = normalised(self.sample_SG, depth=1.0)
        label_C = data.label_C
        head = IntegrationHead(
            len(self.gene_G), data.n_batches, settings,
            place_V=counts.place_V.clone(),
            label_N=label_C,
            n_labels=0 if label_C is None else int(label_C.max()) + 1,
            mean_share_G=np.asarray(share_SG.mean(0)).ravel(),
            share_B=data.share_B,
            linear=self.linear,
        )  # fmt: skip
        if self.vectors_GE is not None:
            vectors_GE = torch.from_numpy(np.asarray(self.vectors_GE, np.float32))
            start_at_vectors(counts, head, vectors_GE)
        built = Built(counts, head)
        if self.vectors_NF is not None:
            vectors_NF = torch.from_numpy(np.asarray(self.vectors_NF, np.float32))
            counts.beside.standardise(vectors_NF[torch.from_numpy(data.sample)])
            built = Built(CountsBesideVectors(counts, vectors_NF), head)
        elif backbone is not None:
            some = data.sample[:: max(1, data.sample.size // STANDARDISED)]
            batches = (batch for batch, _ in self._in_order(some, self.tokens))
            built = backbone.beneath(counts, head, backbone.vectors_of(batches))
        if counts.components is not None:
            self._start(counts, value_SG)
        return built

    def _start(self, counts: CountEncoder, value_SG: sparse.csr_matrix) -> None:
        """Lay the components of the sampled cells into the encoder."""
        assert counts.components is not None
        if self.start is None:  # the network is built once more to be read
            self.start = self._components(counts, value_SG)
        start = self.start
        counts.components.lay(start.gene_KG * counts.input_sd_G.numpy(), start.feature_KF)

    def _components(self, counts: CountEncoder, value_SG: sparse.csr_matrix) -> LinearStart:
        data, latent, seed = self.data, self.settings.latent, self.seed
        batch_S = data.batch_C[data.sample]
        vector_SF, share = None, 0.0
        if self.makes_vectors is not None:
            share = vector_share(
                self.sample_SV, self.gene_G, batch_S, self.makes_vectors, latent, seed
            )
        if self.makes_vectors is not None and share:
            if self.vectors_NF is not None:
                made_SF = self.vectors_NF[data.sample]
            else:
                made_SF = self.makes_vectors(np.arange(batch_S.size), self.sample_SV)
            made = torch.from_numpy(np.asarray(made_SF, np.float32))
            vector_SF = counts.beside.centred(made).numpy()
        logger.info(
            "%s cells are few: the embedding is linear components and what %s steps add%s.",
            f"{batch_S.size:,}", f"{self.steps:,}",
            f"; vectors of the model make {share:.0%} of them" if self.makes_vectors else "",
        )  # fmt: skip
        return linear_start(
            value_SG.toarray() - counts.input_mean_G.numpy(), batch_S, latent,
            vector_SF=vector_SF, share=share, seed=seed,
        )  # fmt: skip

    def _in_order(self, cells: np.ndarray, tokens: TokenSettings) -> CellStream:
        """Read cells once, all their molecules shown."""
        return CellStream(
            self.data.cells, cells, tokens, seed=self.seed, endless=False, shuffle=False,
            inverse_median_V=self.inverse_median_V, genes_V=self.genes_V,
        )  # fmt: skip

    @torch.no_grad()
    def encode(self, built: Built, device: torch.device) -> np.ndarray:
        """Latent mean of all cells with counts, in their order, (C, D) float32."""
        tokens = self.tokens
        if self.backbone is None:
            tokens = micro_batches(_ENCODED, None)
        model, head = built.model.to(device).eval(), built.objectives.to(device).eval()
        assert isinstance(head, IntegrationHead)
        number_C, mean_CD = [], []
        for batch, _ in on_device(self._in_order(self.data.used, tokens), device):
            mean_CD.append(head.latent(model(batch).cell_CD[: batch.n_cells])[0].float())
            number_C.append(batch.cell_C[: batch.n_cells])
        order_C = torch.argsort(torch.cat(number_C))
        latent_CD: np.ndarray = torch.cat(mean_CD)[order_C].cpu().numpy()
        return latent_CD
