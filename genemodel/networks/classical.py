"""Networks from the cells alone: correlation, partial correlation, boosted trees.

Axes: C cells, G genes, S sources (transcription factors), T targets.
"""

import numpy as np

# GRNBoost2's own (Moerman et al. 2019): trees of depth 3 on a tenth of the factors and nine tenths
# of the cells, added until the cells left out have gained nothing over 25 trees.
RATE, FEATURES, SUBSAMPLE, MOST_TREES, WINDOW = 0.01, 0.1, 0.9, 5000, 25
# Targets that one process takes at once.
_TARGETS_AT_ONCE = 20


def pearson(source_CS: np.ndarray, target_CT: np.ndarray) -> np.ndarray:
    """Correlation of every source with every target, float32 (S, T); 0 with a constant gene."""
    return _standardised(source_CS).T @ _standardised(target_CT) / np.float32(len(source_CS))


def partial(
    values_CG: np.ndarray, sources: np.ndarray, targets: np.ndarray
) -> tuple[np.ndarray, float]:
    """Partial correlation given all other genes, from a covariance that is shrunk.

    Ledoit and Wolf's shrinkage of the correlation matrix makes its inverse exist where there are
    more genes than cells.

    Parameters
    ----------
    values_CG
        Values of the genes.
    sources, targets
        Columns.

    Returns
    -------
    float32 (S, T), and the shrinkage: 1 leaves nothing but the diagonal.
    """
    from sklearn.covariance import ledoit_wolf

    shrunk_GG, shrinkage = ledoit_wolf(_standardised(values_CG).astype(np.float64))
    # A constant gene has no variance of its own; a millionth keeps the matrix invertible.
    precision_GG = np.linalg.inv(shrunk_GG + 1e-6 * np.eye(len(shrunk_GG)))
    scale_G = np.sqrt(np.diag(precision_GG))
    partial_ST = -precision_GG[np.ix_(sources, targets)]
    partial_ST /= np.outer(scale_G[sources], scale_G[targets])
    return partial_ST.astype(np.float32), float(shrinkage)


def grnboost(
    values_CG: np.ndarray, sources: np.ndarray, targets: np.ndarray, *, seed: int, workers: int = 1
) -> np.ndarray:
    """GRNBoost2's importance of every source for every target, float32 (S, T).

    The regression is the one that arboreto makes (scikit-learn's stochastic gradient boosting, the
    same settings, early stopping and importances times the number of trees), without its graph of
    Dask tasks.

    Parameters
    ----------
    values_CG
        Values of the genes.
    sources, targets
        Columns.
    seed
        Of every target's trees.
    workers
        Processes.
    """
    from sklearn.utils.parallel import Parallel, delayed

    source_CS = np.ascontiguousarray(values_CG[:, sources], np.float32)
    parts = [targets[at : at + _TARGETS_AT_ONCE] for at in range(0, targets.size, _TARGETS_AT_ONCE)]
    found = Parallel(n_jobs=workers)(
        delayed(_boosted)(source_CS, sources, values_CG[:, part], part, seed) for part in parts
    )
    return np.concatenate(found, axis=1)


def _boosted(
    source_CS: np.ndarray, sources: np.ndarray, target_CT: np.ndarray, targets: np.ndarray,
    seed: int,
) -> np.ndarray:  # fmt: skip
    from sklearn.ensemble import GradientBoostingRegressor

    out_ST = np.zeros((sources.size, targets.size), np.float32)
    for t, target in enumerate(targets):
        others_S = np.flatnonzero(sources != target)
        y_C = target_CT[:, t].astype(np.float64)
        if not others_S.size or np.ptp(y_C) == 0:
            continue
        trees = GradientBoostingRegressor(
            learning_rate=RATE, n_estimators=MOST_TREES, max_features=FEATURES,
            subsample=SUBSAMPLE, random_state=seed,
        )  # fmt: skip
        trees.fit(source_CS[:, others_S], y_C, monitor=_gains_nothing)
        out_ST[others_S, t] = trees.feature_importances_ * len(trees.estimators_)
    return out_ST


def _gains_nothing(done: int, trees: object, _local: object) -> bool:
    """Stop once the last trees have made the cells left out no better, on average."""
    if done < WINDOW - 1:
        return False
    improvement: np.ndarray = trees.oob_improvement_  # type: ignore[attr-defined]
    return bool(improvement[max(0, done - WINDOW + 1) : done + 1].mean() < 0)


def _standardised(values_CG: np.ndarray) -> np.ndarray:
    centred_CG = values_CG - values_CG.mean(0)
    spread_G = centred_CG.std(0)
    result: np.ndarray = centred_CG / np.where(spread_G > 0, spread_G, 1.0)
    return result
