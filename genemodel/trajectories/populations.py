"""The population at a time between two others, from the cells of the others.

Axes: C cells, D latent, G genes, K components, N drawn cells.
"""

import logging
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from genemodel.expression.normalise import log_normalised
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.training import Integration, train_integration
from genemodel.metrics.distributions import (
    energy_distance,
    kernel_distance,
    kernel_width,
    transport_plan,
    wasserstein_distance,
)
from genemodel.trajectories.placing import paired
from genemodel.trajectories.times import MIN_CELLS, Times

logger = logging.getLogger(__name__)

OURS = "latent and decoder"
EARLIER, LATER, MIXTURE = "earlier time", "later time", "both, mixed"
POOLED, TRANSPORT = "all other times", "optimal transport"
# What no prediction can be asked to beat: the cells themselves, and the time in other donors.
HALF, OTHER_DONORS = "half of the same cells", "same time, other donors"
FLOORS = (HALF, OTHER_DONORS)
# Cells drawn of a population: the assignment takes their cube, and 500 of them a second.
DRAWN = 500
COMPONENTS = 30
METRICS = ("energy", "kernel", "wasserstein")


class Interpolator:
    """Predictions of one held-out time at a time.

    Distances are taken in principal components of all cells, in which optimal transport works as
    well: the space favours it.

    Parameters
    ----------
    counts_CG
        Raw counts of variable genes, no cell without any.
    times, donor_C
        Of the cells.
    vectors_CF
        Cell vectors of a model that the latent reads beside the counts.
    settings
        Of the latent and its decoder.
    device
        Where they are trained.
    seed
        Of everything that is drawn.
    """

    def __init__(
        self,
        counts_CG: sp.csr_matrix,
        times: Times,
        donor_C: np.ndarray | None,
        vectors_CF: np.ndarray | None,
        settings: IntegrationSettings,
        *,
        device: str | torch.device = "auto",
        seed: int = 0,
    ) -> None:
        from sklearn.decomposition import PCA

        self.counts_CG, self.times, self.donor_C = counts_CG, times, donor_C
        self.vectors_CF, self.seed, self.device = vectors_CF, seed, device
        # What a donor's cells differ by is corrected where a donor is of several times; else it
        # cannot be told from time, and time is what must stay.
        self.batch_C = crossing(times, donor_C)
        self.settings = replace(settings, correct=False)
        log_CG = log_normalised(counts_CG)
        most = min(COMPONENTS, min(log_CG.shape) - 1)
        self._pca = PCA(most, svd_solver="arpack", random_state=seed).fit(log_CG)
        self.component_CK = self._pca.transform(log_CG)

    def long(self, done: Callable[[int], object] = lambda times: None) -> pd.DataFrame:
        """Score every method on every time between two others."""
        rows: list[dict[str, object]] = []
        for time in self.times.inner:
            trained, kept, latent_CD = self._trained(time)
            for donor, truth, others in self._asked(time):
                rows += self._scored(time, donor, truth, others, (trained, kept, latent_CD))
            done(1)
        return pd.DataFrame(rows)

    def _asked(self, time: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
        """Donors with cells of a time: number, these cells, and all cells to predict them from."""
        code_C = self.times.code_C
        there_C, others_C = code_C == time, (code_C >= 0) & (code_C != time)
        every = [(-1, np.flatnonzero(there_C), np.flatnonzero(others_C))]
        if self.donor_C is None:
            return every
        found = []
        for donor in np.unique(self.donor_C[there_C]):
            truth = np.flatnonzero(there_C & (self.donor_C == donor))
            # Of other donors, as far as they have the time before and the time after.
            foreign_C = others_C & (self.donor_C != donor)
            near = [int((foreign_C & (code_C == time + step)).sum()) for step in (-1, 1)]
            if truth.size >= MIN_CELLS and min(near) >= MIN_CELLS:
                found.append((int(donor), truth, np.flatnonzero(foreign_C)))
        return found or every

    def _trained(self, time: int) -> tuple[Integration, np.ndarray, np.ndarray]:
        """Train latent and decoder on all cells of other times; cells that it read, and latents."""
        kept = np.flatnonzero((self.times.code_C >= 0) & (self.times.code_C != time))
        vectors_NF = None if self.vectors_CF is None else self.vectors_CF[kept]
        _, batch_N = np.unique(self.batch_C[kept], return_inverse=True)
        cells = TrainingCells.held(self.counts_CG[kept], batch_N, seed=self.seed)
        trained = train_integration(
            cells, settings=self.settings, vectors_NF=vectors_NF,
            where=HeadRun(device=self.device), seed=self.seed,
        )  # fmt: skip
        return trained, kept, trained.latent_CD

    def _scored(
        self,
        time: int,
        donor: int,
        truth: np.ndarray,
        others: np.ndarray,
        model: tuple[Integration, np.ndarray, np.ndarray],
    ) -> list[dict[str, object]]:
        rng = np.random.default_rng([self.seed, time, donor + 1])
        code_C, value_T = self.times.code_C, self.times.value_T
        share = (value_T[time] - value_T[time - 1]) / (value_T[time + 1] - value_T[time - 1])
        before = _drawn(rng, others[code_C[others] == time - 1], DRAWN)
        after = _drawn(rng, others[code_C[others] == time + 1], DRAWN)
        at = self.component_CK
        from_b = rng.random(DRAWN) < share
        plan = transport_plan(at[before], at[after])
        said = {
            OURS: self._decoded(before, after, share, model, rng),
            TRANSPORT: (1 - share) * at[before] + share * at[after[plan]],
            EARLIER: at[before],
            LATER: at[after],
            MIXTURE: at[np.where(from_b, after, before)],
            POOLED: at[_drawn(rng, others, DRAWN)],
        }
        mixed = rng.permutation(truth)
        half, rest = mixed[: mixed.size // 2], mixed[mixed.size // 2 :]
        rows: list[dict[str, object]] = []
        width = kernel_width(at[truth])
        floors = {HALF: at[half]}
        same = np.flatnonzero(code_C == time)
        if self.donor_C is not None and donor >= 0:
            same = same[self.donor_C[same] != donor]
            if same.size >= MIN_CELLS:
                floors[OTHER_DONORS] = at[_drawn(rng, same, DRAWN)]
        for name, point_NK in {**said, **floors}.items():
            true_NK = at[rest] if name == HALF else at[truth]
            # Wasserstein's samples are of one size.
            n = min(len(point_NK), len(true_NK))
            a_NK, b_NK = (p[rng.permutation(len(p))[:n]] for p in (point_NK, true_NK))
            rows.append({
                "time": self.times.names[time], "donor": donor, "method": name,
                "cells": len(true_NK),
                "energy": energy_distance(point_NK, true_NK),
                "kernel": kernel_distance(point_NK, true_NK, width),
                "wasserstein": wasserstein_distance(a_NK, b_NK),
            })  # fmt: skip
        return rows

    @torch.no_grad()
    def _decoded(
        self,
        before: np.ndarray,
        after: np.ndarray,
        share: float,
        model: tuple[Integration, np.ndarray, np.ndarray],
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Go part of the way from cell to cell in the latent, and draw counts of what is there."""
        trained, kept, latent_CD = model
        a_ND, b_ND = (latent_CD[np.searchsorted(kept, rows)] for rows in (before, after))
        plan = transport_plan(a_ND, b_ND)
        between_ND = (1 - share) * a_ND + share * b_ND[plan]
        library_C = np.asarray(self.counts_CG.sum(1)).ravel()
        # Depth is not what goes from one time to the next: that of one of the two cells.
        which_N = rng.random(len(before)) < share
        library_N = np.where(which_N, library_C[after[plan]], library_C[before])
        head = trained.net.head
        z_ND = torch.from_numpy(np.asarray(between_ND, np.float32))
        share_NG = head.log_share(z_ND, torch.full((len(before),), -1)).exp().double().numpy()
        theta_G = head.log_theta_G.exp().double().numpy()
        mean_NG = share_NG * library_N[:, None]
        drawn_NG = rng.poisson(rng.gamma(theta_G, mean_NG / theta_G))
        counts_NG = np.zeros((len(before), self.counts_CG.shape[1]), np.float32)
        counts_NG[:, trained.gene_G] = drawn_NG
        return np.asarray(self._pca.transform(log_normalised(sp.csr_matrix(counts_NG))))


def crossing(times: Times, donor_C: np.ndarray | None) -> np.ndarray:
    """Donor of every cell where donors have several times each, else 0 for all."""
    if donor_C is None:
        return np.zeros(times.code_C.size, np.int64)
    known_C = times.code_C >= 0
    n_times = [np.unique(times.code_C[known_C & (donor_C == d)]).size for d in np.unique(donor_C)]
    several = np.mean([n > 1 for n in n_times if n])
    return donor_C if several > 0.5 else np.zeros(times.code_C.size, np.int64)


def _drawn(rng: np.random.Generator, rows: np.ndarray, n: int) -> np.ndarray:
    """Draw cells, each once where there are enough of them."""
    return rng.choice(rows, n, replace=rows.size < n)


def population_table(long: pd.DataFrame) -> pd.DataFrame:
    """Average over the times of a donor, then over donors, beside ours and the floor."""
    by_donor = long.groupby(["method", "donor"], sort=False)[list(METRICS)].mean()
    ours = by_donor.loc[OURS]
    rows = []
    for name in dict.fromkeys(long["method"]):
        own = by_donor.loc[name]
        difference = (own["energy"] - ours["energy"].reindex(own.index)).to_numpy()
        rows.append({
            "method": name, **{metric: float(own[metric].mean()) for metric in METRICS},
            "donors": len(own), "times": int(long["time"].nunique()),
            "worse_than_ours": float(difference.mean()),
            "pval": float("nan") if name in (OURS, *FLOORS) else paired(difference),
        })  # fmt: skip
    return pd.DataFrame(rows)
