"""Cell types of labelled counts onto other counts: logistic regression that knows its limits.

The head is multinomial logistic regression on components of log-normalised variable genes. What it
cannot know from the reference's own cells, it asks of the reference's *batches* and *types*: the
penalty, the neighbours' vote and the temperature are chosen on batches held out, and what counts
as unknown on types left out.

Axes: B pseudo-queries' cells, C cells of the query, D components, F signs of novelty, G genes, H
held-out cells of the reference, K neighbours, L labels, R cells of the reference.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from scipy.special import log_softmax, logsumexp, softmax

from genemodel.expression.components import singular_vectors
from genemodel.expression.neighbours import nearest, nearest_others
from genemodel.expression.normalise import log_normalised
from genemodel.expression.variable_genes import select_genes

logger = logging.getLogger(__name__)

VARIABLE_GENES = 2000
# Length of every cell's vector of log counts: about what a cell of 10x has over 2,000 genes, so
# that the penalties mean what they mean for log counts. Equal lengths take away most of the depth.
LENGTH = 12.0
COMPONENTS = 200
# Inverse penalties to choose from; scikit-learn's default of 1 is too weak between studies.
PENALTIES = (0.02, 0.05, 0.2)
ALONE = 0.05  # where the reference has one batch: its own cells would choose the weakest
NEIGHBOUR_SHARES = (0.25, 0.5)
COMPANY = 15  # cells of the query over which signs of novelty are averaged
FOLDS = 5
OF_BATCH = 20  # cells below which a batch of the reference does not count as one to hold out
MOST_STEPS = 300
# Cells that a choice, a shift or a basis is made on, and that the last regression is fitted to.
SAMPLE = 5000
FITTED = 50_000
# A gain of macro-F1 below it is noise of the held-out batches: the simpler one is kept.
LEAST_GAIN = 0.005
# Where only one batch is there, another one is made of the cells held out: the counts of every gene
# times a gain of its own, as between two chemistries, and times another in each type, which no
# common shift foretells (standard deviations of the log gains).
GAIN, GAIN_OF_TYPE = 0.6, 0.4
# A shift needs this many populations with so many cells each on both sides, and has to foretell
# this share of the shift of a population that took no part (development sets: below .33 where it
# does harm, above .38 where it helps).
SHIFT_TYPES, SHIFT_CELLS, SHIFT_EVIDENCE, SHIFT_ROUNDS = 3, 10, 0.35, 3
# A type has a shift of its own where this share of the neighbours, in the query, of its reference
# cells are called so, with as many cells as above.
OWN_EVIDENCE, OWN_ROUNDS = 0.5, 2
# It is no longer than this many times the usual one of three types or more: a new type that stands
# where the reference's type is missing in the query is farther (development sets: up to 2.1 where
# the types are the same, 3.5 and 8 where they are not).
OWN_MOST = 2.8
# How strongly the weights of the signs are pulled to be equal: more where types have shifts of
# their own, of which held-out batches of one study show little.
EVEN, EVEN_OWN = 0.05, 1.0
NARROW, MIXED = 30, 30  # components of the reference, and of both, in which distances are taken
ROUND = 10  # neighbours whose distance compares the query with the reference
LEFT_OUT = 12  # types, or groups of types, left out one after another
FEWEST = 5  # cells of a type with which it says something about unknown ones
# Quantile of the query at which a sign of novelty is zero: a query is farther as a whole, and at
# least this share of it is taken to be of known types.
KNOWN_SHARE = 0.25
LOW_SHARE = 0.05  # down to here from there: the spread of cells that are surely known
# Standard deviations that a query may be farther as a whole, by sign. Queries of other studies with
# shared types were at -3 to 1, queries without any at 3 to 13.
MOST_DRIFT = 2.0
# Of its company: held-out batches of one study were below 1, queries of other studies above 7.
MOST_APART = 3.0
MIN_QUERY = 30  # cells below which a query tells nothing about itself
SIGNS = ("energy", "distance", "distance_of_both", "distance_of_logits", "crowd")
CROWD = SIGNS.index("crowd")
ACROSS_BATCHES = ("distance_of_both", "crowd")


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
    rows = _some(len_of(log_RG), SAMPLE, seed)
    most = min(n_components, min(len(rows), log_RG.shape[1]) - 1)
    return singular_vectors(log_RG[rows], max(most, 1), passes=4, seed=seed)[2].T


def len_of(rows: Any) -> int:
    """Rows of a matrix, dense or not."""
    return int(rows.shape[0])


def _some(n: int, most: int, seed: int) -> np.ndarray:
    if n <= most:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).permutation(n)[:most])


def common_shift(
    model: Regression, log_RG: sp.csr_matrix, label_R: np.ndarray, log_CG: sp.csr_matrix
) -> tuple[np.ndarray, float]:
    """Estimate what all populations of the query differ by from those of the reference.

    Each label's cells, as far as they are recognised, are compared with the reference's; what the
    labels agree on is the shift of a condition, a chemistry or a laboratory. Genes on which they do
    not agree are shrunk to nothing. Recognised and compared again, a few times.

    Returns
    -------
    Shift per gene (zero without evidence), and the evidence: the share of a population's own
    difference that the others foretell, 1 at most.
    """
    nothing_G, evidence = np.zeros(log_RG.shape[1], np.float32), 0.0
    shift_G = nothing_G
    total_L = np.bincount(label_R, minlength=len(model.bias_L))
    usable_L = (total_L >= SHIFT_CELLS) & np.isfinite(model.bias_L)
    onto_RL = sp.csr_matrix(
        (np.ones(len(label_R), np.float32), (np.arange(len(label_R)), label_R)),
        (len(label_R), len(total_L)),
    )
    mean_LG = np.asarray((onto_RL.T @ log_RG).todense()) / np.maximum(total_L, 1)[:, None]
    for _ in range(SHIFT_ROUNDS):
        probability_CL = softmax(model.logits(log_CG, shift_G), axis=1)
        probability_CL[probability_CL < 0.5] = 0.0
        there_L = probability_CL.sum(0)
        shared = np.flatnonzero(usable_L & (there_L >= SHIFT_CELLS))
        if len(shared) < SHIFT_TYPES:
            return nothing_G, 0.0
        share_SC = (probability_CL[:, shared] / there_L[shared]).T
        difference_SG = (log_CG.T @ share_SC.T).T - mean_LG[shared]
        weight_S = np.sqrt(np.minimum(there_L, total_L)[shared])
        weight_S /= weight_S.sum()
        told_S = np.zeros(len(shared))
        for one in range(len(shared)):
            rest = np.arange(len(shared)) != one
            told_G = _agreed(difference_SG[rest], weight_S[rest])
            told_S[one] = 1 - np.sum((difference_SG[one] - told_G) ** 2) / max(
                np.sum(difference_SG[one] ** 2), 1e-12
            )
        evidence = float(weight_S @ told_S)
        if evidence < SHIFT_EVIDENCE:
            return nothing_G, evidence
        shift_G = _agreed(difference_SG, weight_S).astype(np.float32)
    return shift_G, evidence


def _agreed(difference_SG: np.ndarray, weight_S: np.ndarray) -> np.ndarray:
    """Weighted mean, shrunk gene by gene by its own standard error (positive-part James–Stein)."""
    weight_S = weight_S / weight_S.sum()
    mean_G = weight_S @ difference_SG
    used = np.sum(weight_S**2)
    error_G = weight_S @ (difference_SG - mean_G) ** 2 * used / max(1 - used, 1e-12)
    return mean_G * np.maximum(0, 1 - error_G / np.maximum(mean_G**2, 1e-12))


def own_shifts(
    model: Regression, log_RG: sp.csr_matrix, label_R: np.ndarray, log_CG: sp.csr_matrix,
    label_C: np.ndarray, shift_G: np.ndarray, seed: int,
) -> np.ndarray:  # fmt: skip
    """Estimate what each type of the query differs by beyond the shift that all have in common.

    A type of the query is taken for one of the reference where they are nearest to each other:
    the reference's cells have their neighbours in the query among the cells that are called so.
    What is called so too and lies beyond them, a new type beside its relative, takes no part, and
    stays as far away as it was. (L, G), zero without such evidence.
    """
    rows_R = _some(len_of(log_RG), SAMPLE, seed)
    rows_C = _some(len_of(log_CG), SAMPLE, seed)
    log_RG, label_R, log_CG, label_C = (
        log_RG[rows_R],
        label_R[rows_R],
        log_CG[rows_C],
        label_C[rows_C],
    )
    narrow_GD = model.basis_GD[:, :NARROW]
    there_RD = np.asarray(log_RG @ narrow_GD)
    whitening_DD = _whitening(there_RD, label_R)[0]
    plain_CD = np.asarray(log_CG @ narrow_GD) - shift_G @ narrow_GD
    own_LG = np.zeros((len(model.bias_L), log_RG.shape[1]), np.float32)
    for _ in range(OWN_ROUNDS):
        here_CD = plain_CD - (own_LG @ narrow_GD)[label_C]
        near_CK = nearest(here_CD, there_RD, min(ROUND, len(there_RD)))[0]
        agrees_C = (label_R[near_CK] == label_C[:, None]).mean(1) >= OWN_EVIDENCE
        near_RK = nearest(there_RD, here_CD, min(ROUND, len(here_CD)))[0]
        for label in np.unique(label_R):
            of_C = label_C == label
            hit = near_RK[label_R == label].ravel()
            if not of_C.any() or min(of_C[hit].mean(), agrees_C[of_C].mean()) < OWN_EVIDENCE:
                continue
            times_C = np.bincount(hit[(of_C & agrees_C)[hit]], minlength=len(here_CD))
            if np.count_nonzero(times_C) < SHIFT_CELLS:
                continue
            middle_G = np.asarray(log_RG[label_R == label].mean(0)).ravel() + shift_G
            own_LG[label] = log_CG.T @ (times_C / times_C.sum()) - middle_G
        length_L = np.linalg.norm(own_LG @ narrow_GD @ whitening_DD, axis=1)
        there = length_L[length_L > 0]
        usual = np.median(there) if len(there) >= SHIFT_TYPES else 0.0
        own_LG[length_L > OWN_MOST * usual] = 0.0
    return own_LG


# -- novelty --------------------------------------------------------------------------------------


def signs_of_novelty(
    model: Regression, log_RG: sp.csr_matrix, label_R: np.ndarray, log_CG: sp.csr_matrix,
    shift_G: np.ndarray, seed: int, *, alone: bool = False, own: bool = False,
) -> np.ndarray:  # fmt: skip
    """Measure in five ways how far each cell is from every type of the reference (C, F).

    ``energy``: no label scores high. ``distance``: to the nearest type (Mahalanobis, the spread
    within types) in components of the reference; ``distance_of_both``: in components of both, where
    a new type has directions of its own; ``distance_of_logits``: in the labels' scores, where a
    cell may also be *too* much of a label. ``crowd``: the cell has company among the query and none
    in the reference. All are means over a cell and its neighbours in the query: a new type is
    rarely one cell. ``alone``: no cell has company, as in a query of a few cells. ``own``: what a
    type of the query differs by beyond the common shift is taken off first (`own_shifts`).
    """
    plain_CL = model.logits(log_CG, shift_G)
    label_C = plain_CL.argmax(1)
    alone = alone or len_of(log_CG) < MIN_QUERY

    def signs(shift_LG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return _signs(model, log_RG, label_R, log_CG, label_C, shift_LG, seed, alone)

    sign_CF, near_CK = signs(np.tile(shift_G, (len(model.bias_L), 1)))
    if own and not alone:
        own_LG = own_shifts(model, log_RG, label_R, log_CG, label_C, shift_G, seed)
        own_L = own_LG.any(1)
        if own_L.any():
            plain_CF, (sign_CF, near_CK) = sign_CF, signs(shift_G + own_LG)
            # Types without evidence keep their places among the query.
            start, own_start = (np.quantile(s, KNOWN_SHARE, axis=0) for s in (plain_CF, sign_CF))
            other_C = ~own_L[label_C]
            sign_CF[other_C] = plain_CF[other_C] - start + own_start
    return (sign_CF + sign_CF[near_CK].sum(1)) / (1 + near_CK.shape[1])


def _signs(
    model: Regression, log_RG: sp.csr_matrix, label_R: np.ndarray, log_CG: sp.csr_matrix,
    label_C: np.ndarray, shift_LG: np.ndarray, seed: int, alone: bool,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Measure the signs of each cell, from which its label's shift is taken; and its company."""
    n_cells = len_of(log_CG)
    weight_GL = model.basis_GD @ model.weight_DL
    logit_CL = model.logits(log_CG, 0 * shift_LG[0]) - (shift_LG @ weight_GL)[label_C]
    logit_RL = model.logits(log_RG, 0 * shift_LG[0])
    seen_L = np.isfinite(model.bias_L)
    logit_CL, logit_RL = logit_CL[:, seen_L], logit_RL[:, seen_L]
    narrow_GD = model.basis_GD[:, :NARROW]
    sign_CF = np.zeros((n_cells, len(SIGNS)))
    sign_CF[:, 0] = -logsumexp(logit_CL, axis=1)
    here_CD = log_CG @ narrow_GD - (shift_LG @ narrow_GD)[label_C]
    sign_CF[:, 1] = _distance(log_RG @ narrow_GD, label_R, here_CD)
    sign_CF[:, 3] = _distance(logit_RL, label_R, logit_CL)
    if alone:
        sign_CF[:, 2] = sign_CF[:, 1]
        return sign_CF, np.zeros((n_cells, 0), np.int64)
    rows_R = _some(len_of(log_RG), min(SAMPLE, n_cells), seed)
    rows_C = _some(n_cells, min(SAMPLE, len_of(log_RG)), seed)
    both_XG = np.concatenate(
        [_dense(log_RG[rows_R]), _dense(log_CG[rows_C]) - shift_LG[label_C[rows_C]]]
    ).astype(np.float32, copy=False)
    # Both sides weigh the same, however many cells they have.
    both_XG[: len(rows_R)] /= np.sqrt(len(rows_R))
    both_XG[len(rows_R) :] /= np.sqrt(len(rows_C))
    most = min(MIXED, min(both_XG.shape) - 1)
    mixed_GD = singular_vectors(both_XG, most, passes=4, seed=seed)[2].T
    there_RD = np.asarray(log_RG @ mixed_GD, np.float32)
    here_CD = np.asarray(log_CG @ mixed_GD - (shift_LG @ mixed_GD)[label_C], np.float32)
    sign_CF[:, 2] = _distance(there_RD, label_R, here_CD)
    n_each = min(len(rows_R), len(rows_C))
    sparse_R, sparse_C = rows_R[:n_each], rows_C[:n_each]
    apart_C = nearest(here_CD, there_RD[sparse_R], ROUND)[1].mean(1)
    # A cell of the sample is its own nearest: one more is looked for, and the nearest left out.
    own_C = np.isin(np.arange(n_cells), sparse_C)
    among_CK = nearest(here_CD, here_CD[sparse_C].copy(), ROUND + 1)[1]
    among_C = np.where(own_C, among_CK[:, 1:].mean(1), among_CK[:, :-1].mean(1))
    sign_CF[:, 4] = np.log(np.maximum(apart_C, 1e-6) / np.maximum(among_C, 1e-6))
    return sign_CF, nearest_others(here_CD, COMPANY)[0]


def _dense(rows_CG: sp.csr_matrix) -> np.ndarray:
    return rows_CG.toarray().astype(np.float32, copy=False)


def _distance(there_RD: np.ndarray, label_R: np.ndarray, here_CD: np.ndarray) -> np.ndarray:
    """Log Mahalanobis distance to the nearest type, with one spread for all types."""
    whitening_DD, mean_LD = _whitening(there_RD, label_R)
    here_CD, mean_LD = np.asarray(here_CD, np.float64) @ whitening_DD, mean_LD @ whitening_DD
    square_CL = (here_CD**2).sum(1)[:, None] - 2 * here_CD @ mean_LD.T + (mean_LD**2).sum(1)[None]
    return 0.5 * np.log(np.maximum(square_CL.min(1), 1e-6))


def _whitening(there_RD: np.ndarray, label_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what makes the spread within types one in all directions, and the types' means."""
    there_RD = np.asarray(there_RD, np.float64)
    code = np.unique(label_R)
    mean_LD = np.stack([there_RD[label_R == one].mean(0) for one in code])
    within_RD = there_RD - mean_LD[np.searchsorted(code, label_R)]
    spread_DD = within_RD.T @ within_RD / max(len(within_RD) - 1, 1)
    width = spread_DD.shape[0]
    spread_DD += (1e-3 * np.trace(spread_DD) / width + 1e-9) * np.eye(width)
    return np.linalg.inv(np.linalg.cholesky(spread_DD)).T, mean_LD


@dataclass(frozen=True)
class Novelty:
    """How the signs make one probability, learnt on types left out of the reference.

    Attributes
    ----------
    centre_F, scale_F
        Of the signs of known cells, above the quantile at which a query's signs are zero.
    start_F, most_F
        That quantile over the reference's pseudo-queries, and how far away a query's may be.
    low_F
        Spread of the pseudo-queries below it: a query that is wider there is wider as a whole.
    weight_F, bias
        Of the standardised signs; no weight is negative.
    limit
        A probability above it is unknown.
    left_out_auroc
        Of the left-out types among known cells, mean over the types; nan where none could be
        left out.
    """

    centre_F: np.ndarray
    scale_F: np.ndarray
    start_F: np.ndarray
    most_F: np.ndarray
    low_F: np.ndarray
    weight_F: np.ndarray
    bias: float
    limit: float
    left_out_auroc: float

    @classmethod
    def fit(
        cls,
        sign_TBF: list[np.ndarray],
        new_TB: list[np.ndarray],
        keep: float,
        across: bool,
        even: float = EVEN,
    ) -> Self:
        """Learn from pseudo-queries ``T``, in each of which some cells are of a type left out.

        ``across``: whether directions of the query's own and its company are believed. Cells of
        another study have both, whatever they are, so that only held-out batches can say what they
        are worth, and only to queries that are no farther than those.

        The limit is where left-out types and known cells are told apart best (Youden), but at least
        a share ``keep`` of the known cells stays known.
        """
        from scipy.optimize import minimize
        from sklearn.metrics import roc_auc_score

        low_TF, start_TF = (
            np.stack([np.quantile(sign, share, axis=0) for sign in sign_TBF])
            for share in (LOW_SHARE, KNOWN_SHARE)
        )
        sign_NF = np.concatenate(
            [sign - start for sign, start in zip(sign_TBF, start_TF, strict=True)]
        )
        new_N = np.concatenate(new_TB)
        known_MF = sign_NF[~new_N]
        centre_F, scale_F = known_MF.mean(0), np.maximum(known_MF.std(0), 1e-3)
        z_NF = np.clip((sign_NF - centre_F) / scale_F, -5, 10)
        # Every pseudo-query counts the same, and in it the new cells as much as the known ones.
        mass_N = np.concatenate(
            [np.where(new, 1 / max(new.sum(), 1), 1 / max((~new).sum(), 1)) for new in new_TB]
        ) / len(new_TB)
        believed_F = np.isin(SIGNS, ACROSS_BATCHES, invert=True) | across
        weight_F, bias = believed_F.astype(float), -2.0
        if new_N.any():
            side_N = np.where(new_N, 1.0, -1.0)

            def loss(p: np.ndarray) -> tuple[float, np.ndarray]:
                margin_N = side_N * (z_NF @ p[:-1] + p[-1])
                # Equal weights, unless the types say otherwise.
                pull_F = believed_F * (p[:-1] - p[:-1][believed_F].mean())
                slope_N = (
                    -mass_N
                    * side_N
                    * softmax(np.stack([margin_N, np.zeros_like(margin_N)]), axis=0)[1]
                )
                value = mass_N @ np.logaddexp(0, -margin_N) + even * pull_F @ pull_F
                return float(value), np.r_[slope_N @ z_NF + 2 * even * pull_F, slope_N.sum()]

            bounds = [(0.0, None if yes else 0.0) for yes in believed_F] + [(None, None)]
            found = minimize(loss, np.r_[weight_F / 2, bias], jac=True, bounds=bounds)
            weight_F, bias = found.x[:-1], float(found.x[-1])
        score_N = z_NF @ weight_F + bias
        limit = float(np.quantile(score_N[~new_N], keep))
        auroc = float("nan")
        if new_N.any():
            ends = np.cumsum([len(new) for new in new_TB])[:-1]
            auroc = float(np.mean([
                roc_auc_score(new, score)
                for new, score in zip(new_TB, np.split(score_N, ends), strict=True)
                if new.any() and not new.all()
            ]))  # fmt: skip
            order = np.argsort(score_N)
            gain_N = np.cumsum(np.where(new_N, -mass_N, mass_N)[order])
            limit = max(limit, float(score_N[order[int(np.argmax(gain_N))]]))
        start_F = start_TF.mean(0)
        return cls(
            centre_F, scale_F, start_F, start_F + MOST_DRIFT * scale_F,
            np.maximum((start_TF - low_TF).mean(0), 1e-6), weight_F, bias,
            float(1 / (1 + np.exp(-limit))), auroc,
        )  # fmt: skip

    def probability(self, sign_CF: np.ndarray, *, far: bool = False) -> np.ndarray:
        """Probability that each cell is of no type of the reference, were half of all so."""
        if not len(sign_CF):
            return np.zeros(0)
        start_F, wider_F = self.start_F, np.ones(len(SIGNS))
        if len(sign_CF) >= MIN_QUERY:
            low_F, start_F = np.quantile(sign_CF, (LOW_SHARE, KNOWN_SHARE), axis=0)
            wider_F = np.maximum(1.0, (start_F - low_F) / self.low_F)
            start_F = start_F if far else np.minimum(start_F, self.most_F)
        z_CF = np.clip(((sign_CF - start_F) / wider_F - self.centre_F) / self.scale_F, -5, 10)
        return 1 / (1 + np.exp(-np.clip(z_CF @ self.weight_F + self.bias, -50, 50)))


# -- what is chosen on the reference --------------------------------------------------------------


def folds_of(label_R: np.ndarray, batch_R: np.ndarray, seed: int) -> tuple[np.ndarray, bool]:
    """Fold of every reference cell: whole batches where two or more are large enough, else cells.

    Returns
    -------
    Fold codes, and whether they are batches. Of batches, the largest goes where there is least.
    """
    batch_R = np.unique(batch_R, return_inverse=True)[1]
    size_B = np.bincount(batch_R)
    rng = np.random.default_rng(seed)
    # Held out against a handful of cells, a batch would be judged by what these could teach.
    large = int((size_B >= OF_BATCH).sum())
    if large > 1:
        fold_B, load = np.zeros(len(size_B), np.int64), np.zeros(min(FOLDS, len(size_B)))
        for batch in np.argsort(-size_B, kind="stable"):
            fold_B[batch] = int(load.argmin())
            load[fold_B[batch]] += size_B[batch]
        return fold_B[batch_R], True
    fold_R = np.zeros(len(label_R), np.int64)
    for one in np.unique(label_R):
        rows = rng.permutation(np.flatnonzero(label_R == one))
        fold_R[rows] = (np.arange(len(rows)) + rng.integers(FOLDS)) % FOLDS
    return fold_R, False


def votes(
    vector_RD: np.ndarray, label_R: np.ndarray, vector_CD: np.ndarray, n_labels: int, k: int
) -> np.ndarray:
    """Share of each label among the nearest reference cells, by cosine (C, L).

    A cell without a vector has the same share of all.
    """
    finite_C = np.isfinite(vector_CD).all(1)
    finite_R = np.isfinite(vector_RD).all(1)
    vote_CL = np.full((len(vector_CD), n_labels), 1 / n_labels)
    if not finite_R.any() or not finite_C.any():
        return vote_CL
    centre_D = vector_RD[finite_R].mean(0)
    unit_RD, unit_CD = _unit(vector_RD[finite_R] - centre_D), _unit(vector_CD[finite_C] - centre_D)
    near_CK = nearest(unit_CD, unit_RD, k)[0]
    label_CK = label_R[finite_R][near_CK]
    count_CL = np.zeros((len(near_CK), n_labels))
    np.add.at(count_CL, (np.arange(len(near_CK))[:, None], label_CK), 1.0)
    vote_CL[finite_C] = count_CL / near_CK.shape[1]
    return vote_CL


def _unit(rows_CD: np.ndarray) -> np.ndarray:
    return rows_CD / np.maximum(np.linalg.norm(rows_CD, axis=1, keepdims=True), 1e-8)


def mixed(logit_CL: np.ndarray, vote_CL: np.ndarray, share: float) -> np.ndarray:
    """Log probabilities of the regression and, for a share, of the votes."""
    log_CL = log_softmax(logit_CL, axis=1)
    if share:
        log_CL = np.log((1 - share) * np.exp(log_CL) + share * vote_CL + 1e-9)
    return log_CL


def temperature_of(log_HL: np.ndarray, label_H: np.ndarray) -> float:
    """Temperature at which held-out labels are likeliest (one that calibrates)."""
    from scipy.optimize import minimize_scalar

    if not len(label_H):
        return 1.0
    log_HL = np.maximum(log_HL, -50.0)

    def loss(log_temperature: float) -> float:
        scaled_HL = log_softmax(log_HL / np.exp(log_temperature), axis=1)
        return -float(scaled_HL[np.arange(len(label_H)), label_H].mean())

    return float(np.exp(minimize_scalar(loss, bounds=(-3.0, 3.0), method="bounded").x))


@dataclass(frozen=True)
class HeadAnswer:
    """Labels of the query's cells.

    Attributes
    ----------
    probability_CL
        Of every label, given that the cell is of one of them; calibrated.
    novelty_C
        Probability that it is of none, were half of all cells so; 1 for a cell without counts.
    limit
        Novelty above which a cell is called unknown.
    seen_C
        Whether the cell has a count in the genes that are read.
    about
        What was chosen and found, for ``uns``.
    """

    probability_CL: np.ndarray
    novelty_C: np.ndarray
    limit: float
    seen_C: np.ndarray
    about: dict[str, Any]

    @property
    def far_C(self) -> np.ndarray:
        """Cells that are of none of the types."""
        return (self.novelty_C > self.limit) & self.seen_C


def label_counts(
    counts_RG: sp.csr_matrix,
    label_R: np.ndarray,
    counts_CG: sp.csr_matrix,
    *,
    batch_R: np.ndarray | None = None,
    vectors: tuple[np.ndarray, np.ndarray] | None = None,
    k: int = 15,
    keep: float | None = 0.95,
    far: bool = False,
    seed: int = 0,
) -> HeadAnswer:
    """Label cells by labelled cells; columns are the same genes, every label code has a cell.

    Parameters
    ----------
    counts_RG, label_R
        Raw counts of the reference and its labels, codes from 0 without gaps.
    counts_CG
        Raw counts of the query.
    batch_R
        Batch of every reference cell; with two or more of them, batches are held out for what is
        chosen, else cells.
    vectors
        Embeddings (R, D) and (C, D) whose neighbours vote where that helps the batches held out;
        default the regression's own components.
    k
        How many of them.
    keep
        Least share of known cells that stay known; None looks for no novelty.
    far
        Whether the query is known to be far as a whole, as another species is: what is far from the
        reference is then told by the query's nearest quarter alone.
    seed
        Of the samples and the decompositions.
    """
    n_labels = int(label_R.max()) + 1
    batch_R = np.zeros(len(label_R), np.int64) if batch_R is None else batch_R
    gene_G = select_genes(counts_RG, np.unique(batch_R, return_inverse=True)[1], VARIABLE_GENES)
    counts_RG, log_CG = counts_RG[:, gene_G], unit_logs(counts_CG[:, gene_G])
    log_RG = unit_logs(counts_RG)
    head = _Chooser(counts_RG, log_RG, label_R, batch_R, n_labels,
                    None if vectors is None else vectors[0], k, keep, seed)  # fmt: skip
    inverse_penalty, share, temperature, held = head.choose()
    rows = head.fitted
    basis_GD = basis_of(log_RG[rows], COMPONENTS, seed)
    model = Regression.fit(log_RG[rows], label_R[rows], n_labels, basis_GD, inverse_penalty)
    shift_G, evidence = common_shift(model, log_RG[rows], label_R[rows], log_CG)
    vote_CL = head.votes(model, rows, log_CG, shift_G, None if vectors is None else vectors[1],
                         share)  # fmt: skip
    log_CL = mixed(model.logits(log_CG, shift_G), vote_CL, share)
    probability_CL = softmax(np.maximum(log_CL, -50.0) / temperature, axis=1)
    # No finite number of right answers proves that the next one is right.
    most = 1 - 1 / (len(label_R) + 2)
    probability_CL = probability_CL * most + (1 - most) / n_labels
    novelty_C, limit, auroc = np.zeros(len_of(log_CG)), 1.0, float("nan")
    if keep is not None:
        sign_CF = signs_of_novelty(
            model, log_RG[rows], label_R[rows], log_CG, shift_G, seed, own=head.by_batch
        )
        seen_C = log_CG.getnnz(1) > 0
        novelty = head.novelty(inverse_penalty, sign_CF[seen_C])
        novelty_C, limit = np.ones(len(seen_C)), novelty.limit
        novelty_C[seen_C] = novelty.probability(sign_CF[seen_C], far=far)
        auroc = novelty.left_out_auroc
    about = {
        "genes": len(gene_G),
        "inverse_penalty": inverse_penalty,
        "neighbours_share": share,
        "temperature": temperature,
        "calibrated_on": "batches" if head.by_batch else "cells",
        "shift_evidence": evidence,
        "shift": float(np.linalg.norm(shift_G)) / LENGTH,
        "novelty_limit": limit,
        "left_out_auroc": auroc,
        **held,
    }
    return HeadAnswer(probability_CL, novelty_C, limit, log_CG.getnnz(1) > 0, about)


class _Chooser:
    """Everything that is decided on the reference alone."""

    def __init__(
        self, counts_RG: sp.csr_matrix, log_RG: sp.csr_matrix, label_R: np.ndarray,
        batch_R: np.ndarray, n_labels: int, vector_RD: np.ndarray | None, k: int,
        keep: float | None, seed: int,
    ) -> None:  # fmt: skip
        self.all_RG, self.all_label_R, self.n_labels = log_RG, label_R, n_labels
        self.all_vector_RD, self.k, self.keep, self.seed = vector_RD, k, keep, seed
        self.fitted = _by_type(label_R, FITTED, seed)
        rows = _by_type(label_R, SAMPLE, seed)
        self.counts_RG, self.log_RG, self.label_R = counts_RG[rows], log_RG[rows], label_R[rows]
        self.vector_RD = None if vector_RD is None else vector_RD[rows]
        self.fold_R, self.by_batch = folds_of(self.label_R, batch_R[rows], seed)
        if self.by_batch and next(self._split(), None) is None:
            # No label of a batch is known outside of it: batches can be asked for nothing.
            one_R = np.zeros(len(rows), np.int64)
            self.fold_R, self.by_batch = folds_of(self.label_R, one_R, seed)

    def _asked(self, rows_R: np.ndarray, number: int) -> sp.csr_matrix:
        """Log counts of held-out cells, as another batch would have them."""
        if self.by_batch:
            return self.log_RG[rows_R]
        draw = np.random.default_rng([self.seed, number])
        shape = self.n_labels, self.counts_RG.shape[1]
        log_gain_LG = GAIN * draw.normal(size=shape[1]) + GAIN_OF_TYPE * draw.normal(size=shape)
        counts_HG = self.counts_RG[rows_R].astype(np.float32)
        of_N = np.repeat(self.label_R[rows_R], np.diff(counts_HG.indptr))
        counts_HG.data *= np.exp(log_gain_LG[of_N, counts_HG.indices]).astype(np.float32)
        return unit_logs(counts_HG)

    def _split(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Rows learnt from, and rows held out whose label can be known."""
        for fold in np.unique(self.fold_R):
            learnt = np.flatnonzero(self.fold_R != fold)
            known = np.unique(self.label_R[learnt])
            held = np.flatnonzero((self.fold_R == fold) & np.isin(self.label_R, known))
            if len(known) >= 2 and len(held):
                yield learnt, held

    def votes(
        self, model: Regression, rows_R: np.ndarray, log_CG: sp.csr_matrix, shift_G: np.ndarray,
        vector_CD: np.ndarray | None, share: float,
    ) -> np.ndarray:  # fmt: skip
        """Votes of rows of the whole reference on the query."""
        if not share:
            return np.zeros((len_of(log_CG), self.n_labels))
        if vector_CD is None or self.all_vector_RD is None:
            narrow_GD = model.basis_GD[:, :NARROW]
            there_RD, here_CD = self.all_RG[rows_R] @ narrow_GD, log_CG @ narrow_GD
            here_CD = here_CD - shift_G @ narrow_GD
            return votes(there_RD, self.all_label_R[rows_R], here_CD, self.n_labels, self.k)
        return votes(
            self.all_vector_RD[rows_R], self.all_label_R[rows_R], vector_CD, self.n_labels, self.k
        )

    def choose(self) -> tuple[float, float, float, dict[str, float]]:
        """Inverse penalty, share of the neighbours, temperature, and scores on what is held out."""
        penalties = PENALTIES if self.by_batch else (ALONE,)
        by_choice: dict[float, list[np.ndarray]] = {c: [] for c in penalties}
        truth, ballot = [], []
        for number, (learnt, held) in enumerate(self._split()):
            log_LG, label_L = self.log_RG[learnt], self.label_R[learnt]
            log_HG = self._asked(held, number)
            basis_GD = basis_of(log_LG, COMPONENTS, self.seed)
            truth.append(self.label_R[held])
            for c in penalties:
                model = Regression.fit(log_LG, label_L, self.n_labels, basis_GD, c)
                shift_G, _ = common_shift(model, log_LG, label_L, log_HG)
                by_choice[c].append(model.logits(log_HG, shift_G))
            if self.vector_RD is None:
                narrow_GD = basis_GD[:, :NARROW]
                pair = log_LG @ narrow_GD, log_HG @ narrow_GD - shift_G @ narrow_GD
            else:
                pair = self.vector_RD[learnt], self.vector_RD[held]
            ballot.append(votes(pair[0], label_L, pair[1], self.n_labels, self.k))
        if not truth:
            return ALONE, 0.0, 1.0, {}
        label_H, vote_HL = np.concatenate(truth), np.concatenate(ballot)
        logit = {c: np.concatenate(parts) for c, parts in by_choice.items()}
        best, share, score = penalties[0], 0.0, -1.0
        # From the strongest penalty without neighbours on: what is less simple has to gain.
        for c in penalties:
            found = _macro_f1(label_H, logit[c].argmax(1))
            if found > score + LEAST_GAIN:
                best, score = c, found
        for candidate in NEIGHBOUR_SHARES:
            found = _macro_f1(label_H, mixed(logit[best], vote_HL, candidate).argmax(1))
            if found > score + LEAST_GAIN:
                share, score = candidate, found
        log_HL = mixed(logit[best], vote_HL, share)
        temperature = temperature_of(log_HL, label_H)
        probability_HL = softmax(np.maximum(log_HL, -50.0) / temperature, axis=1)
        right_H = probability_HL.argmax(1) == label_H
        return (
            best,
            share,
            temperature,
            {
                "held_out_accuracy": float(right_H.mean()),
                "held_out_macro_f1": score,
                "held_out_calibration_error": calibration_error(probability_HL.max(1), right_H),
            },
        )

    def novelty(self, inverse_penalty: float, sign_CF: np.ndarray) -> Novelty:
        """Learn what unknown looks like on types that are left out one after another.

        The query's own signs only say whether it is as near as a batch of the reference.
        """
        signs, news, alone = [], [], len(sign_CF) < MIN_QUERY
        folds = np.unique(self.fold_R)
        groups = self._left_out()
        for number, group in enumerate(groups or [np.zeros(0, np.int64)]):
            fold = folds[number % len(folds)]
            left_R = np.isin(self.label_R, group)
            learnt = np.flatnonzero((self.fold_R != fold) & ~left_R)
            known = np.unique(self.label_R[learnt])
            asked_R = (self.fold_R == fold) & (np.isin(self.label_R, known) | left_R)
            if (asked_R & left_R).sum() < FEWEST:
                asked_R |= left_R
            asked = np.flatnonzero(asked_R)
            if len(known) < 1 or not len(asked):
                continue
            log_LG, label_L = self.log_RG[learnt], self.label_R[learnt]
            basis_GD = basis_of(log_LG, COMPONENTS, self.seed)
            model = Regression.fit(log_LG, label_L, self.n_labels, basis_GD, inverse_penalty)
            log_BG = self._asked(asked, number)
            shift_G, _ = common_shift(model, log_LG, label_L, log_BG)
            signs.append(
                signs_of_novelty(
                    model,
                    log_LG,
                    label_L,
                    log_BG,
                    shift_G,
                    self.seed,
                    alone=alone,
                    own=self.by_batch,
                )  # fmt: skip
            )
            news.append(left_R[asked])
        keep = 1.0 if self.keep is None else self.keep
        even = EVEN_OWN if self.by_batch else EVEN
        if self.by_batch and not alone:
            found = Novelty.fit(signs, news, keep, across=True, even=even)
            start = np.quantile(sign_CF[:, CROWD], KNOWN_SHARE)
            if start < found.start_F[CROWD] + MOST_APART * found.scale_F[CROWD]:
                return found
        return Novelty.fit(signs, news, keep, across=False, even=even)

    def _left_out(self) -> list[np.ndarray]:
        """Types to leave out, several at once where there are many; two must remain."""
        size_L = np.bincount(self.label_R, minlength=self.n_labels)
        usable = np.flatnonzero(size_L >= FEWEST)
        if self.n_labels < 3:
            return []
        order = np.random.default_rng(self.seed).permutation(usable)
        return [part for part in np.array_split(order, min(LEFT_OUT, len(order))) if len(part)]


def _by_type(label_R: np.ndarray, most: int, seed: int) -> np.ndarray:
    """Rows, at most so many; small types are kept whole before large ones are thinned."""
    if len(label_R) <= most:
        return np.arange(len(label_R))
    shuffled = np.random.default_rng(seed).permutation(len(label_R))
    order = shuffled[np.argsort(label_R[shuffled], kind="stable")]
    size_L = np.bincount(label_R)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(size_L) - size_L, size_L)
    # Half of the places go round the types in turn, half to cells as they come.
    first = order[np.argsort(rank, kind="stable")[: most // 2]]
    rest = shuffled[~np.isin(shuffled, first)][: most - len(first)]
    return np.sort(np.concatenate([first, rest]))


def _macro_f1(label_H: np.ndarray, said_H: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(label_H, said_H, average="macro", labels=np.unique(label_H),
                          zero_division=0))  # fmt: skip


def calibration_error(confidence_C: np.ndarray, right_C: np.ndarray, n_bins: int = 10) -> float:
    """Give the expected calibration error: |confidence - accuracy|, bins of equal width, by cells.

    nan without cells.
    """
    if not len(confidence_C):
        return float("nan")
    bin_C = np.minimum((np.asarray(confidence_C) * n_bins).astype(int), n_bins - 1)
    off = np.bincount(bin_C, right_C.astype(float) - confidence_C, n_bins)
    return float(np.abs(off).sum() / len(bin_C))
