"""Where cells stand on an ordered column, of donors and of times that were not learnt from.

Axes: C cells, D components, G genes, T times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from genemodel.annotation.regression import basis_of, unit_logs
from genemodel.expression.neighbours import nearest
from genemodel.expression.normalise import log_normalised
from genemodel.trajectories.holdouts import Fold, folds
from genemodel.trajectories.ordinal import OrdinalRegression
from genemodel.trajectories.times import Times

OURS, WITH_MODEL = "ordinal on counts", "ordinal on the model"
KNN, RIDGE, MIDDLE = "kNN in PCA", "ridge on PCA", "middle time"
KNN_MODEL = "kNN in the model"
K = 15
PCA_COMPONENTS, COMPONENTS = 50, 100
# Penalties of the ordinal regression to choose from, and the folds that choose.
PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03)
INNER_FOLDS = 4
RIDGE_PENALTIES = tuple(float(value) for value in np.logspace(-1, 5, 13))
# Donors below which nothing replicates.
MIN_DONORS = 3


@dataclass(frozen=True)
class Placed:
    """Where cells were placed.

    Attributes
    ----------
    table
        One row a kind of hold-out and method: error and rank correlation.
    long
        One row a kind, method, donor and time.
    time_C
        Time of every cell, by the first of ``methods``: of known cells as held out, of the others
        by all known ones.
    method
        Which that was.
    """

    table: pd.DataFrame
    long: pd.DataFrame
    time_C: np.ndarray
    method: str


type Method = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Placer:
    """Methods on the same cells; each takes rows to learn from and rows to place.

    Parameters
    ----------
    counts_CG
        Raw counts of variable genes.
    times, donor_C
        Of the cells; donors are held out where the penalty is chosen, too.
    vectors_CF
        Cell vectors of a model, NaN where it knows none of a cell's genes.
    seed
        Of folds and decompositions.
    """

    def __init__(
        self,
        counts_CG: sp.csr_matrix,
        times: Times,
        donor_C: np.ndarray | None,
        vectors_CF: np.ndarray | None,
        seed: int,
    ) -> None:
        self.times, self.donor_C, self.seed = times, donor_C, seed
        self.log_CG, self.unit_CG = log_normalised(counts_CG), unit_logs(counts_CG)
        self.vectors_CF = vectors_CF
        self._pca: tuple[np.ndarray, np.ndarray] | None = None
        self.methods: dict[str, Method] = {
            OURS: self._ordinal, MIDDLE: self._middle, KNN: self._knn, RIDGE: self._ridge,
        }  # fmt: skip
        if vectors_CF is not None:
            self.methods = {
                WITH_MODEL: self._ordinal_model, **self.methods, KNN_MODEL: self._knn_model,
            }  # fmt: skip

    def _learnt(self, train: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the times that are learnt from, 0 to T − 1, and their values."""
        kept, code_N = np.unique(self.times.code_C[train], return_inverse=True)
        return code_N, self.times.value_T[kept]

    def _middle(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        return np.full(test.size, float(np.median(self._learnt(train)[1])))

    def _components(self, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Principal components of the cells that are learnt from, and the others on them."""
        from sklearn.decomposition import PCA

        if self._pca is None or not np.array_equal(self._pca[0], train):
            most = min(PCA_COMPONENTS, min(train.size, self.log_CG.shape[1]) - 1)
            pca = PCA(most, svd_solver="arpack", random_state=self.seed).fit(self.log_CG[train])
            self._pca = train, pca.transform(self.log_CG)
        return self._pca[1][train], self._pca[1][test]

    def _knn(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        return self._vote(train, *self._components(train, test))

    def _knn_model(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        vectors_CF = self._vectors(train)
        return self._vote(train, vectors_CF[train], vectors_CF[test])

    def _vote(self, train: np.ndarray, there_ND: np.ndarray, here_MD: np.ndarray) -> np.ndarray:
        index_MK, _ = nearest(here_MD, there_ND, K)
        return np.asarray(self.times.value_C[train][index_MK].mean(1))

    def _ridge(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        from sklearn.linear_model import RidgeCV

        there_ND, here_MD = self._components(train, test)
        fitted = RidgeCV(RIDGE_PENALTIES).fit(there_ND, self.times.value_C[train])
        return np.asarray(fitted.predict(here_MD))

    def _ordinal(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        basis_GD = basis_of(self.unit_CG[train], COMPONENTS, self.seed)
        x_CD = np.asarray(self.unit_CG @ basis_GD)
        return self._fitted(train, x_CD).predict(x_CD[test])

    def _ordinal_model(self, train: np.ndarray, test: np.ndarray) -> np.ndarray:
        vectors_CF = self._vectors(train)
        return self._fitted(train, vectors_CF).predict(vectors_CF[test])

    def _vectors(self, train: np.ndarray) -> np.ndarray:
        """Vectors of all cells; a cell without one is the mean of those learnt from."""
        assert self.vectors_CF is not None
        mean_F = np.nanmean(self.vectors_CF[train], axis=0)
        return np.where(np.isfinite(self.vectors_CF), self.vectors_CF, mean_F)

    def _fitted(self, train: np.ndarray, x_CD: np.ndarray) -> OrdinalRegression:
        """Fit with the penalty that places held-out donors (or cells) best."""
        code_N, value_T = self._learnt(train)
        fold_N = self._inner_folds(train, code_N)
        if fold_N is None:
            return OrdinalRegression.fit(x_CD[train], code_N, value_T, PENALTIES[2])
        error_P = np.zeros(len(PENALTIES))
        for fold in np.unique(fold_N):
            out_N = fold_N == fold
            if np.unique(code_N[~out_N]).size < len(value_T):
                continue  # a time would be gone
            for p, penalty in enumerate(PENALTIES):
                fitted = OrdinalRegression.fit(
                    x_CD[train[~out_N]], code_N[~out_N], value_T, penalty
                )
                told_M = fitted.predict(x_CD[train[out_N]])
                error_P[p] += np.abs(told_M - value_T[code_N[out_N]]).sum()
        # Of equal ones the strongest, which is also what is taken where no fold could be made.
        best = len(PENALTIES) - 1 - int(np.argmin(error_P[::-1]))
        return OrdinalRegression.fit(x_CD[train], code_N, value_T, PENALTIES[best])

    def _inner_folds(self, train: np.ndarray, code_N: np.ndarray) -> np.ndarray | None:
        rng = np.random.default_rng(self.seed)
        if self.donor_C is not None:
            donors, donor_N = np.unique(self.donor_C[train], return_inverse=True)
            fold_N = rng.permutation(len(donors))[donor_N] % INNER_FOLDS
            usable = any(
                np.unique(code_N[fold_N != fold]).size == code_N.max() + 1
                for fold in np.unique(fold_N)
            )
            if len(donors) > 1 and usable:
                return np.asarray(fold_N)
        if np.bincount(code_N).min() < 2 * INNER_FOLDS:
            return None
        fold_N = np.empty(train.size, np.int64)
        for code in np.unique(code_N):
            here = np.flatnonzero(code_N == code)
            fold_N[rng.permutation(here)] = np.arange(here.size) % INNER_FOLDS
        return fold_N

    def place(self, done: Callable[[int], object] = lambda cells: None) -> Placed:
        """Run every method on every fold.

        Parameters
        ----------
        done
            Told how many cells have been placed.
        """
        said: list[pd.DataFrame] = []
        first = next(iter(self.methods))
        time_C = np.full(self.times.code_C.size, np.nan)
        for fold in folds(self.times, self.donor_C, self.seed):
            for name, method in self.methods.items():
                told_M = method(fold.train, fold.test)
                said.append(self._said(fold, name, told_M))
                # A donor held out is what a new sample is; a time held out alone is not learnt.
                if name == first and fold.kind != "times":
                    time_C[fold.test] = told_M
            done(fold.test.size)
        known = np.flatnonzero(self.times.code_C >= 0)
        others = np.flatnonzero(np.isnan(time_C) & (self.times.code_C < 0))
        if others.size:
            time_C[others] = self.methods[first](known, others)
        cells = pd.concat(said, ignore_index=True)
        # Cells whose time one donor alone has: as their time was held out.
        left = np.flatnonzero(np.isnan(time_C))
        told = cells[(cells["method"] == first) & (cells["held_out"] == "times")]
        time_C[left] = told.set_index("row")["told"].reindex(left).to_numpy()
        return Placed(*tables(cells, first), time_C, first)

    def _said(self, fold: Fold, name: str, told_M: np.ndarray) -> pd.DataFrame:
        donor_M = np.zeros(fold.test.size, np.int64)
        if self.donor_C is not None:
            donor_M = self.donor_C[fold.test]
        return pd.DataFrame({
            "held_out": fold.kind, "method": name, "row": fold.test, "donor": donor_M,
            "time": self.times.code_C[fold.test], "true": self.times.value_C[fold.test],
            "told": told_M,
        })  # fmt: skip


def tables(cells: pd.DataFrame, ours: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Make the table of methods, and that of donors and times beneath it.

    An error is the mean of a donor's times, then of donors, so that neither the time nor the donor
    with most cells decides.
    """
    cells = cells.assign(
        error=(cells["told"] - cells["true"]).abs(), bias=cells["told"] - cells["true"]
    )
    keys = ["held_out", "method", "donor", "time"]
    long = (
        cells.groupby(keys, sort=False)
        .agg(cells=("row", "size"), error=("error", "mean"), bias=("bias", "mean"))
        .reset_index()
    )
    by_donor = long.groupby(["held_out", "method", "donor"], sort=False)["error"].mean()
    rows = []
    by_donor = by_donor.sort_index()
    for (held_out, name), own in cells.groupby(["held_out", "method"], sort=False):
        error_B = by_donor.loc[(held_out, name)]
        ours_B = by_donor.loc[(held_out, ours)].reindex(error_B.index)
        tau = stats.kendalltau(own["true"], own["told"]).statistic
        rows.append({
            "held_out": held_out, "method": name, "error": float(error_B.mean()),
            "kendall_tau": float(tau), "donors": len(error_B), "cells": len(own),
            "worse_than_ours": float((error_B - ours_B).mean()),
            "pval": paired(error_B.to_numpy() - ours_B.to_numpy()),
        })  # fmt: skip
    return pd.DataFrame(rows), long


def paired(difference_B: np.ndarray) -> float:
    """Two-sided p of a mean difference over donors; NaN below three, or without a spread."""
    difference_B = difference_B[np.isfinite(difference_B)]
    if difference_B.size < MIN_DONORS or np.ptp(difference_B) == 0:
        return float("nan")
    return float(stats.ttest_1samp(difference_B, 0.0).pvalue)
