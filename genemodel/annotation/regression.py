"""Multinomial logistic regression of cell types on components of log-normalised genes.

Axes: C cells of the query, D components, G genes, L labels, R cells of the reference.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse as sp

from genemodel.expression.components import singular_vectors
from genemodel.expression.normalise import log_normalised

# Length of every cell's vector of log counts: about what a cell of 10x has over 2,000 genes, so
# that the penalties mean what they mean for log counts. Equal lengths take away most of the depth.
LENGTH = 12.0
MOST_STEPS = 300
# Cells that a choice, a shift or a basis is made on, and that the last regression is fitted to.
SAMPLE = 5000


def unit_logs(counts_CG: sp.csr_matrix) -> sp.csr_matrix:
    """Log-normalised counts, every cell of the same length."""
    logged_CG = log_normalised(counts_CG)
    length_C = np.sqrt(np.asarray(logged_CG.multiply(logged_CG).sum(1))).ravel()
    factor_C = LENGTH / np.maximum(length_C, 1e-8)
    logged_CG.data *= np.repeat(factor_C, np.diff(logged_CG.indptr)).astype(logged_CG.dtype)
    return logged_CG


@dataclass(frozen=True)
class Regression:
    """Logistic regression on components of the reference.

    Attributes
    ----------
    basis_GD
        Right singular vectors of the cells it was fitted to.
    weight_DL, bias_L
        Of every label; ``-inf`` for one that it has not seen.
    """

    basis_GD: np.ndarray
    weight_DL: np.ndarray
    bias_L: np.ndarray

    @classmethod
    def fit(
        cls, log_RG: sp.csr_matrix, label_R: np.ndarray, n_labels: int, basis_GD: np.ndarray,
        inverse_penalty: float,
    ) -> Self:  # fmt: skip
        """Fit, every label weighing the same."""
        from sklearn.linear_model import LogisticRegression

        code_R = np.unique(label_R)
        weight_DL = np.zeros((basis_GD.shape[1], n_labels))
        bias_L = np.full(n_labels, -np.inf)
        if len(code_R) == 1:
            bias_L[code_R] = 0.0
            return cls(basis_GD, weight_DL, bias_L)
        model = LogisticRegression(
            C=inverse_penalty, class_weight="balanced", max_iter=MOST_STEPS
        ).fit(np.asarray(log_RG @ basis_GD, np.float64), label_R)
        weight, bias = model.coef_.T, model.intercept_
        if len(code_R) == 2:  # one line for two labels
            weight, bias = np.c_[-weight, weight] / 2, np.r_[-bias, bias] / 2
        weight_DL[:, code_R], bias_L[code_R] = weight, bias
        return cls(basis_GD, weight_DL, bias_L)

    def logits(self, log_CG: sp.csr_matrix, shift_G: np.ndarray) -> np.ndarray:
        """Score every label of cells from which the shift is taken."""
        part_CD = np.asarray(log_CG @ self.basis_GD) - shift_G @ self.basis_GD
        return part_CD @ self.weight_DL + self.bias_L


def basis_of(log_RG: sp.csr_matrix, n_components: int, seed: int) -> np.ndarray:
    """Right singular vectors (G, D) of a sample of cells."""
    rows = some_rows(len_of(log_RG), SAMPLE, seed)
    most = min(n_components, min(len(rows), log_RG.shape[1]) - 1)
    return singular_vectors(log_RG[rows], max(most, 1), passes=4, seed=seed)[2].T


def len_of(rows: Any) -> int:
    """Rows of a matrix, dense or not."""
    return int(rows.shape[0])


def some_rows(n: int, most: int, seed: int) -> np.ndarray:
    """Draw so many of ``n`` rows at most, in their order."""
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])
