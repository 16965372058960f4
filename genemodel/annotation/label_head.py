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
from typing import Any

import numpy as np
import scipy.sparse as sp
from scipy.special import log_softmax, softmax

from genemodel.annotation.novelty import (
    CROWD,
    EVEN,
    EVEN_OWN,
    FEWEST,
    KNOWN_SHARE,
    MIN_QUERY,
    MOST_APART,
    NARROW,
    Novelty,
    common_shift,
    signs_of_novelty,
)
from genemodel.annotation.regression import (
    LENGTH,
    SAMPLE,
    Regression,
    basis_of,
    len_of,
    unit_logs,
)
from genemodel.expression.neighbours import nearest
from genemodel.expression.variable_genes import select_genes

logger = logging.getLogger(__name__)

VARIABLE_GENES = 2000
COMPONENTS = 200
# Inverse penalties to choose from; scikit-learn's default of 1 is too weak between studies.
PENALTIES = (0.02, 0.05, 0.2)
ALONE = 0.05  # where the reference has one batch: its own cells would choose the weakest
NEIGHBOUR_SHARES = (0.25, 0.5)
FOLDS = 5
OF_BATCH = 20  # cells below which a batch of the reference does not count as one to hold out
FITTED = 50_000
# A gain of macro-F1 below it is noise of the held-out batches: the simpler one is kept.
LEAST_GAIN = 0.005
# Where only one batch is there, another one is made of the cells held out: the counts of every gene
# times a gain of its own, as between two chemistries, and times another in each type, which no
# common shift foretells (standard deviations of the log gains).
GAIN, GAIN_OF_TYPE = 0.6, 0.4
LEFT_OUT = 12  # types, or groups of types, left out one after another
# Times that the genes are cut in two halves to ask how much a far query's labels depend on them
# (development pairs of human and mouse: calibration error .146 with two, .144 with four).
HALVINGS = 4


# -- novelty --------------------------------------------------------------------------------------


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


def temperature_for(log_CL: np.ndarray, confidence: float) -> float:
    """Temperature at which the mean confidence is this one, or as near as it gets."""
    from scipy.optimize import brentq

    log_CL = np.maximum(log_CL, -50.0)

    def excess(log_temperature: float) -> float:
        best_C = softmax(log_CL / np.exp(log_temperature), axis=1).max(1)
        return float(best_C.mean()) - confidence

    low, high = -3.0, 3.0
    if excess(low) <= 0:
        return float(np.exp(low))
    if excess(high) >= 0:
        return float(np.exp(high))
    return float(np.exp(brentq(excess, low, high, xtol=1e-3)))


def confidence_of_halves(
    counts_RG: sp.csr_matrix, label_R: np.ndarray, counts_CG: sp.csr_matrix, n_labels: int,
    inverse_penalty: float, temperature: float, seed: int,
) -> float:  # fmt: skip
    """Mean confidence in the query when it is asked of many regressions, on half of the genes each.

    Within a species either half of the genes says the same. Where it does not, as across species,
    in which genes have changed what they tell, the label is a matter of which ones are read.
    """
    draw = np.random.default_rng(seed)
    mean_CL = np.zeros((len_of(counts_CG), n_labels))
    for _ in range(HALVINGS):
        for gene_H in np.array_split(draw.permutation(counts_RG.shape[1]), 2):
            log_RH, log_CH = unit_logs(counts_RG[:, gene_H]), unit_logs(counts_CG[:, gene_H])
            basis_HD = basis_of(log_RH, COMPONENTS, seed)
            model = Regression.fit(log_RH, label_R, n_labels, basis_HD, inverse_penalty)
            shift_H, _ = common_shift(model, log_RH, label_R, log_CH)
            logit_CL = log_softmax(model.logits(log_CH, shift_H), axis=1)
            mean_CL += softmax(np.maximum(logit_CL, -50.0) / temperature, axis=1)
    return float((mean_CL / (2 * HALVINGS)).max(1).mean())


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
        reference is then told by the query's nearest quarter alone, and the query is labelled with
        no more confidence than regressions on half of the genes have (`confidence_of_halves`).
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
    seen_C = log_CG.getnnz(1) > 0
    if far and seen_C.any():
        # Cells held out are of the reference's species: they say nothing of what another one costs.
        asked = confidence_of_halves(
            head.counts_RG, head.label_R, counts_CG[seen_C][:, gene_G], n_labels, inverse_penalty,
            temperature, seed,
        )  # fmt: skip
        held["confidence_of_halves"] = asked
        temperature = max(temperature, temperature_for(log_CL[seen_C], asked))
    probability_CL = softmax(np.maximum(log_CL, -50.0) / temperature, axis=1)
    # No finite number of right answers proves that the next one is right.
    most = 1 - 1 / (len(label_R) + 2)
    probability_CL = probability_CL * most + (1 - most) / n_labels
    novelty_C, limit, auroc = np.zeros(len_of(log_CG)), 1.0, float("nan")
    if keep is not None:
        sign_CF = signs_of_novelty(
            model, log_RG[rows], label_R[rows], log_CG, shift_G, seed, own=head.by_batch
        )
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
    return HeadAnswer(probability_CL, novelty_C, limit, seen_C, about)


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
