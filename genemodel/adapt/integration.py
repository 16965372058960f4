"""Training a batch-robust embedding on one data set, and embedding cells with it.

The encoder reads a binomially thinned copy of the counts and decodes the full profile, which makes
the latent independent of sequencing depth. What batch effect is left is removed by a soft-cluster
offset per batch, estimated only from populations with evidence that they exist in more than one.

Axes: C cells of a step or a data set, G genes, D latent, F features of a cell vector, E width of
pre-trained gene vectors, N stored counts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from genemodel.adapt.integration_net import (
    IntegrationNet,
    IntegrationSettings,
    gaussian_kl,
    label_loss,
)
from genemodel.adapt.shared_clusters import SharedClusterCorrection
from genemodel.errors import ConfigError
from genemodel.expression.likelihood import negative_binomial_loss
from genemodel.expression.normalise import log_normalised, normalised
from genemodel.expression.thinning import thin
from genemodel.expression.variable_genes import select_genes

# Counts above it are thinned by expectation.
_MOST_TRIALS = 200

Progress = Callable[[int, int, dict[str, float]], None]


class _Rows:
    """Rows of a CSR matrix as dense tensors, with binomial thinning."""

    def __init__(self, counts_CG: sparse.csr_matrix, rng: np.random.Generator) -> None:
        counts_CG = counts_CG.tocsr()
        counts_CG.sort_indices()
        self.indptr, self.indices = counts_CG.indptr, counts_CG.indices
        self.data, self.shape, self.rng = counts_CG.data, counts_CG.shape, rng

    def stored(self, cell_C: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row number within the request, gene and count of every stored entry."""
        start_C = self.indptr[cell_C].astype(np.int64)
        n_C = self.indptr[cell_C + 1].astype(np.int64) - start_C
        row_N = np.repeat(np.arange(len(cell_C)), n_C)
        first_C = np.cumsum(n_C) - n_C
        at_N = np.arange(len(row_N)) - first_C[row_N] + start_C[row_N]
        return row_N, self.indices[at_N].astype(np.int64), self.data[at_N]

    def dense(
        self, n_cells: int, row_N: np.ndarray, gene_N: np.ndarray, count_N: np.ndarray
    ) -> Tensor:
        out_CG = np.zeros((n_cells, self.shape[1]), dtype=np.float32)
        out_CG[row_N, gene_N] = count_N
        return torch.from_numpy(out_CG)

    def full(self, cell_C: np.ndarray) -> Tensor:
        return self.dense(len(cell_C), *self.stored(cell_C))

    def pair(
        self, cell_C: np.ndarray, keep_min: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Return a thinned view of cells, dense, and row, gene and value of all their counts."""
        row_N, gene_N, count_N = self.stored(cell_C)
        full = torch.from_numpy(row_N), torch.from_numpy(gene_N), torch.from_numpy(count_N)
        if keep_min < 1.0:
            keep_N = self.rng.uniform(keep_min, 1.0, len(cell_C))[row_N]
            count_N = thin(count_N, keep_N, self.rng, most_trials=_MOST_TRIALS)
        return self.dense(len(cell_C), row_N, gene_N, count_N), full


@dataclass(repr=False)
class Integration:
    """A trained net with the genes it reads and the correction fitted on its training cells.

    Attributes
    ----------
    net
        The network, in evaluation mode.
    gene_G
        Columns that it reads.
    correction
        What was fitted after training; None where it was turned off.
    latent_CD, embedding_CD
        The training cells before and after the correction, float32.
    history
        Losses of every step.
    """

    net: IntegrationNet
    gene_G: np.ndarray
    correction: SharedClusterCorrection | None
    latent_CD: np.ndarray
    embedding_CD: np.ndarray
    history: list[dict[str, float]]

    def __repr__(self) -> str:
        cells, latent = self.latent_CD.shape
        corrected = "corrected" if self.correction is not None else "not corrected"
        return (
            f"Integration({cells:,} cells × {len(self.gene_G):,} genes → {latent} dimensions, "
            f"{len(self.history):,} steps, {corrected})"
        )


def encode(
    net: IntegrationNet,
    counts_CG: sparse.csr_matrix,
    features_CF: np.ndarray | None = None,
    measured_G: np.ndarray | None = None,
) -> np.ndarray:
    """Latent mean of every cell, (C, D) float32.

    Parameters
    ----------
    net
        A trained network.
    counts_CG
        Raw counts of the genes that it reads, in its order.
    features_CF
        Cell vectors as they came from their model, where the network was trained with them; a row
        with NaN is treated as absent.
    measured_G
        Genes that this data set measured, bool; default all.
    """
    rows = _Rows(counts_CG.astype(np.float32), np.random.default_rng(0))
    features = None if features_CF is None else _standardised_features(net, features_CF)
    measured = None if measured_G is None else torch.from_numpy(measured_G.astype(np.float32))
    return _encode_rows(net, rows, features, measured)


def _standardised_features(net: IntegrationNet, features_CF: np.ndarray) -> np.ndarray:
    centred_CF = features_CF - net.feature_mean_F.numpy()
    return np.nan_to_num(centred_CF / (net.feature_sd_F.numpy() + 1e-6)).astype(np.float32)


def _encode_rows(
    net: IntegrationNet,
    rows: _Rows,
    features_CF: np.ndarray | None,
    measured_G: Tensor | None = None,
) -> np.ndarray:
    training = net.training
    net.eval()
    out = []
    with torch.no_grad():
        for start in range(0, rows.shape[0], 1024):
            cell_C = np.arange(start, min(start + 1024, rows.shape[0]))
            feature = None if features_CF is None else torch.from_numpy(features_CF[cell_C])
            out.append(net.encode(rows.full(cell_C), feature, measured_G)[0])
    net.train(training)
    return torch.cat(out).numpy()


def train_integration(
    counts_CG: sparse.csr_matrix,
    batch_C: np.ndarray,
    *,
    labels_C: np.ndarray | None = None,
    cell_features_CF: np.ndarray | None = None,
    gene_embeddings_GE: np.ndarray | None = None,
    settings: IntegrationSettings | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Integration:
    """Train the net on one data set and fit the correction on its latent.

    Parameters
    ----------
    counts_CG
        Raw counts, CSR.
    batch_C
        Batch code per cell, 0 to B - 1.
    labels_C
        Cell-type code per cell, -1 where unknown.
    cell_features_CF
        Cached, frozen backbone vectors of the same cells.
    gene_embeddings_GE
        Pre-trained gene vectors of the same columns.
    settings
        The recipe; the default is meant for every data set.
    seed
        Seed of initial weights, order, thinning and clustering.
    progress
        Called with (step, steps, losses) every 50 steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _train(
            counts_CG,
            batch_C,
            labels_C,
            cell_features_CF,
            gene_embeddings_GE,
            settings or IntegrationSettings(),
            seed,
            progress,
        )


def _train(
    counts_CG: sparse.csr_matrix,
    batch_C: np.ndarray,
    labels_C: np.ndarray | None,
    cell_features_CF: np.ndarray | None,
    gene_embeddings_GE: np.ndarray | None,
    settings: IntegrationSettings,
    seed: int,
    progress: Progress | None,
) -> Integration:
    rng = np.random.default_rng(seed)
    gene_G = select_genes(counts_CG, batch_C, settings.n_genes)
    chosen_CG = counts_CG.tocsr()[:, gene_G].astype(np.float32)
    rows = _Rows(chosen_CG, rng)
    n_cells, n_genes = rows.shape
    library_C = np.maximum(np.asarray(chosen_CG.sum(1), dtype=np.float32).ravel(), 1.0)
    share_CG = normalised(chosen_CG, depth=1.0)
    vectors = None
    if gene_embeddings_GE is not None:
        vectors = torch.from_numpy(gene_embeddings_GE[gene_G].astype(np.float32))
    net = IntegrationNet(
        n_genes,
        int(batch_C.max()) + 1,
        settings,
        n_features=0 if cell_features_CF is None else cell_features_CF.shape[1],
        n_labels=0 if labels_C is None else int(labels_C.max()) + 1,
        embedding_GE=vectors,
        mean_share_G=torch.from_numpy(np.asarray(share_CG.mean(0), dtype=np.float32).ravel()),
    )
    _standardise(net, chosen_CG)
    features = None
    if cell_features_CF is not None:
        net.feature_mean_F.copy_(torch.from_numpy(np.nanmean(cell_features_CF, axis=0)))
        net.feature_sd_F.copy_(torch.from_numpy(np.nanstd(cell_features_CF, axis=0)))
        features = _standardised_features(net, cell_features_CF)
    history = _descend(net, rows, features, batch_C, labels_C, library_C, settings, rng, progress)
    net.eval()
    latent_CD = _encode_rows(net, rows, features)
    if not np.isfinite(latent_CD).all():
        raise ConfigError(
            f"The training went out of bounds (peak_rate={settings.peak_rate:g}): its numbers are "
            "no longer finite. Set a lower peak_rate; the default is "
            f"{IntegrationSettings().peak_rate:g}."
        )
    if not (settings.correct and net.batch_gene_BG.shape[0] > 1):
        return Integration(net, gene_G, None, latent_CD, latent_CD, history)
    correction = SharedClusterCorrection(seed=seed)
    embedding_CD = correction.fit_transform(latent_CD, batch_C).astype(np.float32)
    return Integration(net, gene_G, correction, latent_CD, embedding_CD, history)


def _descend(
    net: IntegrationNet,
    rows: _Rows,
    features: np.ndarray | None,
    batch_C: np.ndarray,
    labels_C: np.ndarray | None,
    library_C: np.ndarray,
    settings: IntegrationSettings,
    rng: np.random.Generator,
    progress: Progress | None,
) -> list[dict[str, float]]:
    """Run the optimiser; returns the losses of every step."""
    n_cells = rows.shape[0]
    plain = {"intercept_G", "log_theta_G"}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in net.named_parameters() if name not in plain]},
        {"params": [net.intercept_G, net.log_theta_G], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(
        groups,
        lr=settings.peak_rate,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    size = min(settings.batch_cells, n_cells)
    steps = max(settings.steps, math.ceil(settings.passes * n_cells / size))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.peak_rate, total_steps=steps + 1, pct_start=settings.warm_up
    )
    batch_t, library_t = torch.from_numpy(batch_C.astype(np.int64)), torch.from_numpy(library_C)
    label_t = None if labels_C is None else torch.from_numpy(labels_C.astype(np.int64))
    history: list[dict[str, float]] = []
    order_C, at = rng.permutation(n_cells), 0
    net.train()
    for step in range(steps):
        if at + size > n_cells:
            order_C, at = rng.permutation(n_cells), 0
        cell_C = order_C[at : at + size]
        at += size
        pick = torch.from_numpy(cell_C)
        view_CG, stored = rows.pair(cell_C, settings.keep_min)
        feature = None
        if features is not None:
            seen_C1 = rng.random((size, 1)) >= settings.feature_dropout
            feature = torch.from_numpy(features[cell_C] * seen_C1.astype(np.float32))
        mean_CD, log_var_CD = net.encode(view_CG, feature)
        z_CD = mean_CD + torch.randn_like(mean_CD) * (0.5 * log_var_CD).exp()
        log_mean_CG = net.decode(z_CD, batch_t[pick], library_t[pick])
        counts = negative_binomial_loss(log_mean_CG, net.log_theta_G, *stored) / size
        divergence = gaussian_kl(mean_CD, log_var_CD)
        weight = settings.kl_weight * min(1.0, step / max(settings.kl_ramp * steps, 1e-9))
        loss = counts + weight * divergence
        parts = {"counts": counts.item(), "kl": divergence.item()}
        if net.to_label is not None and label_t is not None:
            labelled = label_loss(net.to_label(z_CD), label_t[pick])
            loss = loss + settings.label_weight * labelled
            parts["label"] = labelled.item()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), settings.max_norm)
        optimiser.step()
        schedule.step()
        history.append(parts)
        if progress is not None and step % 50 == 0:
            progress(step, steps, parts)
    return history


def _standardise(net: IntegrationNet, counts_CG: sparse.csr_matrix) -> None:
    """Mean and standard deviation of the input, from the stored entries only."""
    value_CG = log_normalised(counts_CG)
    mean_G = np.asarray(value_CG.mean(0)).ravel()
    square_G = np.asarray(value_CG.multiply(value_CG).mean(0)).ravel()
    sd_G = np.sqrt(np.maximum(square_G - mean_G**2, 0.0))
    net.input_mean_G.copy_(torch.from_numpy(mean_G.astype(np.float32)))
    net.input_sd_G.copy_(torch.from_numpy(np.maximum(sd_G, 0.1).astype(np.float32)))
