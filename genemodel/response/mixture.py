"""The mixture of predictors that the measured units support, by leaving some of them out.

Axes: G genes, U measured units, T units to predict, K predictors, F folds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from genemodel.metrics.response import differential, expression_error, normal_test
from genemodel.response.panels import (
    ERROR,
    MEAN,
    NOTHING,
    REPLICATE,
    VALUES,
    ranked,
    scaled_panel,
    values_of,
)
from genemodel.response.predictors import (
    Again,
    Asked,
    Likeness,
    Measured,
    additive,
    dose_line,
    kept_where_sure,
    linear,
    mean_response,
    nearest,
    nearest_dose,
    no_change,
    ridge,
    to_one_level,
)

type Predictor = Callable[[Measured, Asked], np.ndarray]

HOLDOUTS = ("targets", "cell_types", "doses", "donors")
NO_CHANGE, ADDITIVE, OURS = "no change", "additive", "genemodel"
SURE = "mean, where sure"
# Inner folds at most; with fewer groups each is left out alone. As many as targets are held out in:
# with fewer of them left out inside, more of their kind would be left to learn from.
INNER_FOLDS = 5
# Strengths of a mixture: least squares shrink what they are unsure of, and called genes are lost.
STRENGTHS = (1.0, 1.15, 1.3, 1.5)
# Best candidates whose weights are averaged: scores of few units hardly tell them apart.
BEST = 3


def baselines(holdout: str, sources: Sequence[str]) -> dict[str, Predictor]:
    """Give the predictors that stand beside ours, by name."""
    found: dict[str, Predictor] = {
        NO_CHANGE: no_change, MEAN: mean_response, ADDITIVE: additive,
    }  # fmt: skip
    if holdout == "targets":
        for source in sources:
            found[f"linear ({source})"] = _linear(source)
            found[f"kNN ({source})"] = _nearest(Likeness(source))
    elif holdout == "doses":
        found |= {"nearest dose": nearest_dose, "dose line": dose_line}
    else:
        found["linear (control profile)"] = _ridge(Likeness("", of_contexts=True))
        found["kNN (control profile)"] = _nearest(Likeness("", of_contexts=True))
    return found


def ingredients(holdout: str, sources: Sequence[str]) -> dict[str, Predictor]:
    """Give what ours chooses from and is mixed of, by name."""
    found = baselines(holdout, sources) | {SURE: kept_where_sure}
    if holdout == "targets":
        found |= {f"kernel ({source})": _ridge(Likeness(source)) for source in sources}
    elif holdout != "doses":
        like = Likeness("", of_contexts=True)
        found |= {
            "one level": to_one_level,
            "one level, nearest": _one_level(like, only_sure=False),
            "one level, where sure": _one_level(like, only_sure=True),
        }
    return found


def _linear(source: str) -> Predictor:
    return lambda measured, asked: linear(measured, asked, source)


def _nearest(like: Likeness) -> Predictor:
    return lambda measured, asked: nearest(measured, asked, like)


def _ridge(like: Likeness) -> Predictor:
    return lambda measured, asked: ridge(measured, asked, like)


def _one_level(like: Likeness, *, only_sure: bool) -> Predictor:
    return lambda measured, asked: to_one_level(measured, asked, like, only_sure=only_sure)


@dataclass(frozen=True)
class Mixture:
    """Weights of predictors, and what inner cross-validation says of them.

    Attributes
    ----------
    weight
        Predictor -> weight.
    kind
        What was chosen: one predictor by its name, or a mixture.
    total
        Candidate -> its score inside, between mean response (0) and a repeat (1).
    """

    weight: dict[str, float]
    kind: str
    total: dict[str, float] = field(default_factory=dict)

    def predict(
        self, measured: Measured, asked: Asked, known: Mapping[str, Predictor]
    ) -> np.ndarray:
        """Effects (T, G)."""
        effect_TG = np.zeros((len(asked), measured.effect_UG.shape[1]))
        for name, weight in self.weight.items():
            effect_TG += weight * known[name](measured, asked)
        p_U = measured.units.perturbation_T
        own = [
            measured.effect_UG[u, gene] for u, p in enumerate(p_U) for gene in measured.own[p]
        ]  # fmt: skip
        # Of a target that was not seen, what perturbations do to their own genes.
        for t, p in enumerate(asked.perturbation_T):
            if own and p not in p_U:
                effect_TG[t, list(measured.own[p])] = np.mean(own)
        return effect_TG


def fit_mixture(
    measured: Measured, group_U: np.ndarray, known: Mapping[str, Predictor], seed: int
) -> Mixture:
    """Choose the weights of predictors by leaving groups of units out.

    Parameters
    ----------
    measured
        All that may be learned from.
    group_U
        What is left out together: as units are held out that are to be predicted.
    known
        The ingredients; with ``no change`` and ``mean response`` among them.
    seed
        Of the folds.

    Notes
    -----
    What is left out is judged from other control cells than predictions are learned from: from the
    same ones, the mean of noise would look like a response. Candidates are every ingredient alone
    and non-negative least squares of all, of all that are dense, at several strengths; they are
    scored as predictions are in the end, with normal tests of profiles in place of cells. The
    weights of the best few are averaged, of those that the mean response does not beat. Where
    scores tell nothing apart, what errs least is taken, no change where nothing errs less by more
    than a standard error.
    """
    groups = np.unique(group_U)
    if len(groups) < 2 or not measured.again:
        return Mixture({MEAN: 1.0}, MEAN)
    rng = np.random.default_rng(seed)
    dealt = rng.permutation(len(groups)) % min(INNER_FOLDS, len(groups))
    fold_U = dealt[np.searchsorted(groups, group_U)]
    effects = [_left_out(measured, again, fold_U, known) for again in measured.again]
    names = _different(list(known), effects)
    at = [list(known).index(name) for name in names]
    effects = [effect_KUG[at] for effect_KUG in effects]
    kept_UG = np.ones(measured.effect_UG.shape, bool)
    for u, p in enumerate(measured.units.perturbation_T):
        kept_UG[u, list(measured.own[p])] = False
    gram_UKK = np.zeros((len(fold_U), len(names), len(names)))
    right_UK = np.zeros((len(fold_U), len(names)))
    for again, effect_KUG in zip(measured.again, effects, strict=True):
        masked_KUG = effect_KUG * kept_UG
        gram_UKK += np.einsum("kug,lug->ukl", masked_KUG, masked_KUG)
        right_UK += np.einsum("kug,ug->uk", masked_KUG, again.judged_UG)
    candidates = _candidates(names, gram_UKK, right_UK, fold_U)
    parts = [
        _inner_scores(measured, again, candidates, effect_KUG, kept_UG, fold_U, rng)
        for again, effect_KUG in zip(measured.again, effects, strict=True)
    ]
    values = {name: np.concatenate([one[name] for one in parts]) for name in parts[0]}
    return _best(names, candidates, values)


def _left_out(
    measured: Measured, again: Again, fold_U: np.ndarray, known: Mapping[str, Predictor]
) -> np.ndarray:
    """Predict every unit by all that was not left out with it, (K, U, G)."""
    inner = replace(
        measured, effect_UG=again.learned_UG, control_XG=again.control_XG,
        control_noise_XG=again.control_noise_XG,
    )  # fmt: skip
    effect_KUG = np.zeros((len(known), *measured.effect_UG.shape), np.float32)
    for fold in np.unique(fold_U):
        out_U = fold_U == fold
        left, asked = inner.take(~out_U), inner.units.take(out_U)
        for k, predictor in enumerate(known.values()):
            effect_KUG[k, out_U] = predictor(left, asked)
    return effect_KUG


def _different(names: list[str], effects: Sequence[np.ndarray]) -> list[str]:
    """Leave out predictors that say what one before them says."""
    kept: list[int] = []
    for k in range(len(names)):
        if not any(all(np.allclose(x[k], x[j], atol=1e-6) for x in effects) for j in kept):
            kept.append(k)
    return [names[k] for k in kept]


@dataclass(frozen=True)
class _Candidate:
    """Weights that predict every unit from what was not left out with it; and those of all."""

    weight_UK: np.ndarray
    weight_K: np.ndarray


def _candidates(
    names: list[str], gram_UKK: np.ndarray, right_UK: np.ndarray, fold_U: np.ndarray
) -> dict[str, _Candidate]:
    found = {}
    for k, name in enumerate(names):
        only_K = np.eye(len(names))[k]
        found[name] = _Candidate(np.tile(only_K, (len(fold_U), 1)), only_K)
    moving_K = np.array([name != NO_CHANGE for name in names])
    dense_K = moving_K & np.array([SURE not in name and "where sure" not in name for name in names])
    for kind, allowed_K in (("mixture", moving_K), ("dense mixture", dense_K)):
        weight_UK = np.zeros((len(fold_U), len(names)))
        for fold in np.unique(fold_U):
            out = fold_U == fold
            weight_UK[out] = _weights(gram_UKK[~out].sum(0), right_UK[~out].sum(0), allowed_K)
        weight_K = _weights(gram_UKK.sum(0), right_UK.sum(0), allowed_K)
        for strength in STRENGTHS:
            name = kind if strength == 1 else f"{kind} × {strength:g}"
            found[name] = _Candidate(strength * weight_UK, strength * weight_K)
    return found


def _inner_scores(
    measured: Measured,
    again: Again,
    candidates: Mapping[str, _Candidate],
    effect_KUG: np.ndarray,
    kept_UG: np.ndarray,
    fold_U: np.ndarray,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Score candidates and a repeat on profiles: name -> (U, values)."""
    targets = [g for genes in measured.own for g in genes]
    context_U = measured.units.context_T
    of_no_target_G = ~np.isin(np.arange(kept_UG.shape[1]), targets)
    # Chance of the cells that are drawn.
    chance_UG = rng.normal(size=kept_UG.shape) * np.sqrt(measured.noise_UG)
    real = [
        normal_test(again.judged_UG[u], again.noise_UG[u]).without(~kept_UG[u])
        for u in range(len(fold_U))
    ]
    found = {}
    for name, candidate in candidates.items():
        effect_UG = np.einsum("uk,kug->ug", candidate.weight_UK, effect_KUG)
        moved_U = effect_UG.any(1)
        rows = []
        for u in range(len(fold_U)):
            error, nothing = expression_error(
                effect_UG[u], again.judged_UG[u], again.noise_UG[u], kept_UG[u]
            )
            # Cells without any effect are the controls themselves.
            drawn_G = effect_UG[u] + chance_UG[u] * moved_U[u]
            tested = normal_test(drawn_G, again.noise_UG[u]).without(~kept_UG[u])
            rows.append(differential(tested, real[u]) | {ERROR: error, NOTHING: nothing})
        ranks = _ranked(effect_UG, again.judged_UG, of_no_target_G, fold_U, context_U)
        found[name] = values_of(rows, ranks)
    rows = []
    for u in range(len(fold_U)):
        noise_G = again.half_noise_UG[u]
        error, nothing = expression_error(
            again.first_UG[u], again.second_UG[u], noise_G, kept_UG[u], noise_G
        )
        halves = [
            normal_test(x[u], noise_G).without(~kept_UG[u])
            for x in (again.first_UG, again.second_UG)
        ]
        rows.append(differential(halves[0], halves[1], real[u]) | {ERROR: error, NOTHING: nothing})
    ranks = _ranked(again.first_UG, again.second_UG, of_no_target_G, fold_U, context_U)
    found[REPLICATE] = values_of(rows, ranks)
    return found


def _ranked(
    predicted_UG: np.ndarray,
    measured_UG: np.ndarray,
    kept_G: np.ndarray,
    fold_U: np.ndarray,
    context_U: np.ndarray,
) -> np.ndarray:
    ranked_U = np.full(len(fold_U), np.nan)
    for fold in np.unique(fold_U):
        at = fold_U == fold
        ranked_U[at] = ranked(predicted_UG[at], measured_UG[at], kept_G, context_U[at])
    return ranked_U


def _best(
    names: list[str],
    candidates: Mapping[str, _Candidate],
    values: Mapping[str, np.ndarray],
) -> Mixture:
    totals = _totals(values)
    if np.isfinite(totals[MEAN]):
        chosen = sorted(candidates, key=lambda name: -totals[name])[:BEST]
        # The mean response is left only for what is better.
        chosen = [name for name in chosen if totals[name] >= totals[MEAN]]
    else:
        # A repeat of the experiment is no better than the mean response: what errs least.
        error_U = {name: values[name][:, VALUES.index(ERROR)] for name in candidates}
        chosen = [NO_CHANGE]
        for name in (MEAN, "mixture"):
            gain_U = error_U[chosen[0]] - error_U[name]
            if gain_U.mean() > gain_U.std(ddof=1) / np.sqrt(len(gain_U)):
                chosen = [name]
    weight_K = np.mean([candidates[name].weight_K for name in chosen], 0)
    kept = {name: float(w) for name, w in zip(names, weight_K, strict=True) if w > 1e-3}
    kept.pop(NO_CHANGE, None)
    return Mixture(kept, " + ".join(chosen), totals)


def _totals(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: one["total"] for name, one in scaled_panel(values).items()}


def _weights(gram_KK: np.ndarray, right_K: np.ndarray, allowed_K: np.ndarray) -> np.ndarray:
    """Non-negative least squares from its normal equations."""
    from scipy.optimize import nnls

    at = np.flatnonzero(allowed_K)
    gram = gram_KK[np.ix_(at, at)].astype(np.float64)
    # Predictors that say the same share their weight instead of fighting for it.
    gram = gram + (0.01 * np.trace(gram) / len(at) + 1e-12) * np.eye(len(at))
    root = np.linalg.cholesky(gram)
    weight_K = np.zeros(len(gram_KK))
    weight_K[at] = nnls(root.T, np.linalg.solve(root, right_K[at]))[0]
    return weight_K
