"""Signs that a cell is of no type of the reference, and from where on they mean *unknown*.

A query may differ from the reference as a whole, and its types each on their own: both are taken
off first, where there is evidence for them.

Axes: C cells of the query, D components, F signs, G genes, L labels, R cells of the reference, S
samples of shifts.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp
from scipy.special import logsumexp, softmax

from genemodel.annotation.regression import (
    SAMPLE,
    Regression,
    len_of,
    some_rows,
)
from genemodel.expression.components import singular_vectors
from genemodel.expression.neighbours import nearest, nearest_others

COMPANY = 15  # cells of the query over which signs of novelty are averaged
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
    rows_R = some_rows(len_of(log_RG), SAMPLE, seed)
    rows_C = some_rows(len_of(log_CG), SAMPLE, seed)
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
    rows_R = some_rows(len_of(log_RG), min(SAMPLE, n_cells), seed)
    rows_C = some_rows(n_cells, min(SAMPLE, len_of(log_RG)), seed)
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
