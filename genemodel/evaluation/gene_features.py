"""What can be known of genes without a model, and logistic regression on whatever is known.

Axes: C cells, V vocabulary, R genes, F features, L labels, S gene sets.
"""

from pathlib import Path

import numpy as np
import scipy.sparse as sp
from scipy.special import log_softmax

from genemodel.errors import DataError
from genemodel.expression.components import singular_vectors
from genemodel.expression.normalise import log_normalised
from genemodel.gene_tasks.families import grouped_folds, tokens_of
from genemodel.genes.tables import read_text
from genemodel.genes.vocabulary import GeneVocabulary

# Inverse penalties that the inner folds choose from.
PENALTIES = (0.001, 0.01, 0.1)
INNER_FOLDS = 3
MOST_STEPS = 300
COMPONENTS = 50
# A set of fewer genes says nothing about any other gene.
LEAST_IN_SET = 3
# Log probability of a label that no gene of the other folds has.
UNSEEN = -1000.0


def expression_features(counts_CV: sp.csr_matrix, token_R: np.ndarray) -> np.ndarray:
    """Mean, detection, mean where detected and deviation of log1p(counts per 10⁴), (R, 4)."""
    log_CR = sp.csr_matrix(log_normalised(counts_CV)[:, token_R])
    n_cells = log_CR.shape[0]
    n_R = log_CR.getnnz(0)
    sum_R = np.asarray(log_CR.sum(0)).ravel()
    square_R = np.asarray(log_CR.multiply(log_CR).sum(0)).ravel()
    mean_R = sum_R / n_cells
    spread_R = np.sqrt(np.maximum(square_R / n_cells - mean_R**2, 0.0))
    return np.column_stack([mean_R, n_R / n_cells, sum_R / np.maximum(n_R, 1), spread_R])


def coexpression_components(
    counts_CV: sp.csr_matrix, token_R: np.ndarray, seed: int, most_cells: int = 2000
) -> np.ndarray:
    """Principal components of genes over cells, each gene of mean 0 and deviation 1, (R, F).

    They are those of all genes that a cell in a hundred holds, onto which the others are projected.
    """
    log_CV = log_normalised(counts_CV)
    if log_CV.shape[0] > most_cells:
        rows = np.random.default_rng(seed).permutation(log_CV.shape[0])[:most_cells]
        log_CV = log_CV[np.sort(rows)]
    n_cells = log_CV.shape[0]
    common = np.flatnonzero(log_CV.getnnz(0) >= max(2, 0.01 * n_cells))
    rank = min(COMPONENTS, n_cells - 1, common.size)
    if rank < 1:
        return np.zeros((len(token_R), 1))

    def standardised(token: np.ndarray) -> np.ndarray:
        values_CR = log_CV[:, token].toarray()
        values_CR -= values_CR.mean(0)
        scaled_CR: np.ndarray = values_CR / np.maximum(values_CR.std(0), 1e-6)
        return scaled_CR

    left_CF = singular_vectors(standardised(common), rank, passes=4, seed=seed)[0]
    return standardised(token_R).T @ left_CF / np.sqrt(n_cells)


def gene_set_components(
    path: str | Path,
    vocabulary: GeneVocabulary,
    species: tuple[str, ...],
    token_R: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Components of membership in the sets of a GMT file (name, origin, genes), (R, F)."""
    lines = [line.split("\t") for line in read_text(path, "gene sets").splitlines() if line]
    sets = [line[2:] for line in lines if len(line) > 2]
    if not sets:
        raise DataError(f"gene sets: {path} has no line of name, origin and genes (GMT).")
    names = sorted({gene for genes in sets for gene in genes if gene})
    token_of = dict(zip(names, tokens_of(vocabulary, names, species).tolist(), strict=True))
    rows, columns = [], []
    for number, genes in enumerate(sets):
        tokens = {token_of[gene] for gene in genes if gene} - {-1}
        if len(tokens) >= LEAST_IN_SET:
            rows += sorted(tokens)
            columns += [number] * len(tokens)
    if not rows:
        raise DataError(f"gene sets: {path} names no gene of {', '.join(species)}.")
    shape = len(vocabulary), len(sets)
    member_VS = sp.csr_matrix((np.ones(len(rows), np.float32), (rows, columns)), shape)
    rank = min(2 * COMPONENTS, *shape)
    right_SF = singular_vectors(member_VS, rank, passes=4, seed=seed)[2].T
    return np.asarray(member_VS[token_R] @ right_SF)


def out_of_fold(
    feature_RF: np.ndarray,
    code_R: np.ndarray,
    family_R: list[str],
    fold_R: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Log probabilities by logistic regression on the genes of the other folds, (R, L).

    Features are standardised and the penalty is chosen on those genes alone, the latter on folds of
    their own families.
    """
    n_labels = int(code_R.max()) + 1
    out_RL = np.full((len(code_R), n_labels), np.nan)
    for fold in np.unique(fold_R):
        learnt, held = np.flatnonzero(fold_R != fold), np.flatnonzero(fold_R == fold)
        penalty = _chosen(feature_RF[learnt], code_R[learnt], [family_R[i] for i in learnt], seed)
        out_RL[held] = _fitted(
            feature_RF[learnt], code_R[learnt], feature_RF[held], penalty, n_labels
        )
    return out_RL


def _chosen(feature_RF: np.ndarray, code_R: np.ndarray, family_R: list[str], seed: int) -> float:
    """Inverse penalty with the best AUROC on inner folds; the middle one where there are none."""
    from genemodel.metrics.gene_labels import gene_scores

    try:
        fold_R = grouped_folds(code_R, family_R, INNER_FOLDS, seed)
    except DataError:
        return PENALTIES[1]
    n_labels = int(code_R.max()) + 1
    best, found = PENALTIES[1], -1.0
    for penalty in PENALTIES:
        said_RL = np.full((len(code_R), n_labels), np.nan)
        for fold in np.unique(fold_R):
            held = fold_R == fold
            if len(np.unique(code_R[~held])) < n_labels:
                continue
            said_RL[held] = _fitted(
                feature_RF[~held], code_R[~held], feature_RF[held], penalty, n_labels
            )
        auroc = gene_scores(code_R, said_RL, draws=0).auroc
        if auroc > found + 1e-6:
            best, found = penalty, auroc
    return best


def _fitted(
    learnt_RF: np.ndarray, code_R: np.ndarray, held_RF: np.ndarray, penalty: float, n_labels: int
) -> np.ndarray:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(learnt_RF)
    model = LogisticRegression(C=penalty, class_weight="balanced", max_iter=MOST_STEPS)
    model.fit(scaler.transform(learnt_RF), code_R)
    logit_RL = model.decision_function(scaler.transform(held_RF))
    if logit_RL.ndim == 1:
        logit_RL = np.column_stack([-logit_RL / 2, logit_RL / 2])
    out_RL = np.full((len(held_RF), n_labels), UNSEEN)
    # By logits: a probability that rounds to 0 has no logarithm, and its gene no score.
    out_RL[:, model.classes_] = log_softmax(logit_RL, axis=1)
    return out_RL
