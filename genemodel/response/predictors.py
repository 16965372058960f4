"""Predictors of the effect of what was not measured: the usual baselines, and their best mixture.

Axes: G genes, U measured units, T units to predict, P perturbations, X contexts, F features,
K predictors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

NEIGHBOURS = 3
# Ridge penalties relative to the mean diagonal of a kernel, tried by leaving one unit out.
PENALTIES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
# What makes a kernel's mean effect free of the penalty.
_FREE = 1e3


@dataclass(frozen=True)
class Asked:
    """Units to predict: codes of perturbation and context, rank of the dose, each (T,)."""

    perturbation_T: np.ndarray
    context_T: np.ndarray
    dose_T: np.ndarray

    def __len__(self) -> int:
        return len(self.perturbation_T)

    def take(self, at: np.ndarray) -> "Asked":
        """Return some of them."""
        return Asked(self.perturbation_T[at], self.context_T[at], self.dose_T[at])


@dataclass(frozen=True)
class Measured:
    """What predictors learn from.

    Attributes
    ----------
    units
        Of every effect.
    effect_UG, noise_UG
        Effects and the variance that the perturbed cells leave in them.
    control_XG, control_noise_XG
        Log profiles of the controls of every context, and their variance.
    vectors
        Source of vectors -> (P, F), NaN rows where a perturbation has none.
    members
        The perturbations that each is made of.
    own
        Columns of each perturbation's own genes.
    again
        The same units from parts of the controls: what predictions of some of them are learned from
        and judged by inside, and two halves of their cells, each from its own controls, as a
        repeat. One an ordered pair of parts.
    """

    units: Asked
    effect_UG: np.ndarray
    noise_UG: np.ndarray
    control_XG: np.ndarray
    control_noise_XG: np.ndarray
    vectors: Mapping[str, np.ndarray]
    members: Sequence[tuple[int, ...]]
    own: Sequence[tuple[int, ...]]
    again: "tuple[Again, ...]" = ()

    def take(self, at: np.ndarray) -> "Measured":
        """Keep some of the units."""
        return replace(
            self, units=self.units.take(at), effect_UG=self.effect_UG[at],
            noise_UG=self.noise_UG[at],
            again=tuple(one.take(at) for one in self.again),
        )  # fmt: skip


@dataclass(frozen=True)
class Again:
    """Effects of units from two further parts of the controls, all (U, G).

    Attributes
    ----------
    learned_UG, judged_UG
        All cells of the unit from the one, and from the other part.
    first_UG, second_UG
        Half of the cells from the one, the others from the other part.
    noise_UG, half_noise_UG
        Variance of an effect of all cells and of half of them, controls included.
    control_XG, control_noise_XG
        Log profiles of the one part, and their variance.
    """

    learned_UG: np.ndarray
    judged_UG: np.ndarray
    first_UG: np.ndarray
    second_UG: np.ndarray
    noise_UG: np.ndarray
    half_noise_UG: np.ndarray
    control_XG: np.ndarray
    control_noise_XG: np.ndarray

    def take(self, at: np.ndarray) -> "Again":
        """Keep some of the units."""
        return replace(
            self, learned_UG=self.learned_UG[at], judged_UG=self.judged_UG[at],
            first_UG=self.first_UG[at], second_UG=self.second_UG[at], noise_UG=self.noise_UG[at],
            half_noise_UG=self.half_noise_UG[at],
        )  # fmt: skip


def no_change(measured: Measured, asked: Asked) -> np.ndarray:
    """Nothing happens."""
    return np.zeros((len(asked), measured.effect_UG.shape[1]))


def mean_weights(measured: Measured, asked: Asked) -> np.ndarray:
    """Equal weights on the nearest that was measured.

    The same perturbation and context at other doses; else the same perturbation in other contexts;
    else other perturbations in the same context; else everything.
    """
    same_p = measured.units.perturbation_T[None] == asked.perturbation_T[:, None]
    same_x = measured.units.context_T[None] == asked.context_T[:, None]
    weight_TU = np.zeros(same_p.shape)
    for t in range(len(asked)):
        for chosen in (same_p[t] & same_x[t], same_p[t], same_x[t], np.ones_like(same_p[t])):
            if chosen.any():
                weight_TU[t] = chosen / chosen.sum()
                break
    return weight_TU


def mean_response(measured: Measured, asked: Asked) -> np.ndarray:
    """Predict the mean of what was measured: the baseline that scores 0."""
    return mean_weights(measured, asked) @ measured.effect_UG


def additive(measured: Measured, asked: Asked) -> np.ndarray:
    """Effect of the perturbation and of the context, or the sum of a combination's parts."""
    n = len(measured.units)
    p_U, x_U = measured.units.perturbation_T, measured.units.context_T
    weight_TU = mean_weights(measured, asked)
    for t in range(len(asked)):
        parts = measured.members[asked.perturbation_T[t]]
        here = x_U == asked.context_T[t]
        if len(parts) > 1:
            found = [(p_U == part) & here for part in parts]
            if all(one.any() for one in found):
                weight_TU[t] = sum(one / one.sum() for one in found)
            continue
        mine = (p_U == asked.perturbation_T[t]) & (measured.units.dose_T == asked.dose_T[t])
        if mine.any() and here.any():
            weight_TU[t] = mine / mine.sum() + here / here.sum() - np.ones(n) / n
    return weight_TU @ measured.effect_UG


def nearest_dose(measured: Measured, asked: Asked) -> np.ndarray:
    """Predict what the nearest dose does; a tie is their mean."""
    weight_TU = mean_weights(measured, asked)
    for t, (same, gap) in enumerate(_doses(measured, asked)):
        if same.any():
            best = same & (np.abs(gap) == np.abs(gap[same]).min())
            weight_TU[t] = best / best.sum()
    return weight_TU @ measured.effect_UG


def dose_line(measured: Measured, asked: Asked) -> np.ndarray:
    """Between two doses on the line that joins them by rank, no dose being no change.

    Beyond the last the last: no data say how a response goes on.
    """
    weight_TU = mean_weights(measured, asked)
    for t, (same, gap) in enumerate(_doses(measured, asked)):
        if not same.any():
            continue
        weight_TU[t] = 0.0
        below, above = same & (gap <= 0), same & (gap >= 0)
        low = gap[below].max() if below.any() else -float(asked.dose_T[t])  # rank 0 is no dose
        high = gap[above].min() if above.any() else None
        at_low = below & (gap == low)
        if high is None or high == low:
            weight_TU[t] = at_low / at_low.sum()
            continue
        at_high = above & (gap == high)
        weight_TU[t] += (-low / (high - low)) * at_high / at_high.sum()
        if at_low.any():
            weight_TU[t] += (high / (high - low)) * at_low / at_low.sum()
    return weight_TU @ measured.effect_UG


def _doses(measured: Measured, asked: Asked) -> list[tuple[np.ndarray, np.ndarray]]:
    units = measured.units
    return [
        (
            (units.perturbation_T == asked.perturbation_T[t])
            & (units.context_T == asked.context_T[t]),
            (units.dose_T - asked.dose_T[t]).astype(float),
        )
        for t in range(len(asked))
    ]


# -- by what perturbations or contexts are like ----------------------------------------------------


@dataclass(frozen=True)
class Likeness:
    """Similarity of perturbations by one source of vectors, or of contexts by their controls."""

    source: str
    of_contexts: bool = False

    def kernel(self, measured: Measured, asked: Asked) -> tuple[np.ndarray, np.ndarray]:
        """Cosines of centred vectors: (T, U) and (U, U); 0 where one has no vector."""
        if self.of_contexts:
            table_NF, mine_U, theirs_T = (
                measured.control_XG, measured.units.context_T, asked.context_T,
            )  # fmt: skip
            likeness = _cosines(table_NF, np.arange(len(table_NF)))
            # A perturbation elsewhere says as much as its context is alike; another one nothing.
            pair_TU = asked.perturbation_T[:, None] == measured.units.perturbation_T[None]
            pair_UU = measured.units.perturbation_T[:, None] == measured.units.perturbation_T[None]
        else:
            table_NF, mine_U, theirs_T = (
                measured.vectors[self.source], measured.units.perturbation_T, asked.perturbation_T,
            )  # fmt: skip
            likeness = _cosines(table_NF, np.unique(mine_U))
            pair_TU = asked.context_T[:, None] == measured.units.context_T[None]
            pair_UU = measured.units.context_T[:, None] == measured.units.context_T[None]
        return (
            likeness[np.ix_(theirs_T, mine_U)] * pair_TU,
            likeness[np.ix_(mine_U, mine_U)] * pair_UU,
        )


def _cosines(table_NF: np.ndarray, about_N: np.ndarray) -> np.ndarray:
    known_N = np.isfinite(table_NF).all(1)
    centre = about_N[known_N[about_N]]
    if not len(centre):
        return np.eye(len(table_NF))
    vectors_NF = np.where(known_N[:, None], table_NF, 0.0) - table_NF[centre].mean(0)
    vectors_NF[~known_N] = 0.0
    size_N1 = np.linalg.norm(vectors_NF, axis=1, keepdims=True)
    unit_NF = np.divide(vectors_NF, size_N1, out=np.zeros_like(vectors_NF), where=size_N1 > 0)
    likeness = unit_NF @ unit_NF.T
    np.fill_diagonal(likeness, 1.0)
    return likeness


def nearest(measured: Measured, asked: Asked, like: Likeness) -> np.ndarray:
    """Mean of the most similar units, by cosine."""
    kernel_TU, _ = like.kernel(measured, asked)
    weight_TU = mean_weights(measured, asked)
    for t, row in enumerate(kernel_TU):
        if np.any(row != 0):
            best = np.argsort(-np.where(row != 0, row, -np.inf), kind="stable")[:NEIGHBOURS]
            best = best[row[best] != 0]
            weight_TU[t] = 0.0
            weight_TU[t, best] = 1 / len(best)
    return weight_TU @ measured.effect_UG


def ridge(measured: Measured, asked: Asked, like: Likeness) -> np.ndarray:
    """Kernel ridge around the mean response, its penalty by leaving one unit out."""
    kernel_TU, kernel_UU = like.kernel(measured, asked)
    n = len(measured.units)
    if n < NEIGHBOURS or not np.any(kernel_TU):
        return mean_response(measured, asked)
    # Units of one context (or perturbation) share a mean.
    side = "perturbation_T" if like.of_contexts else "context_T"
    mine_U, theirs_T = getattr(measured.units, side), getattr(asked, side)
    free_UU = _FREE * (mine_U[:, None] == mine_U[None])
    free_TU = _FREE * (theirs_T[:, None] == mine_U[None])
    if not np.all(free_TU.any(1)):
        return mean_response(measured, asked)
    best, least = PENALTIES[-1], np.inf
    for penalty in PENALTIES:
        inverse_UU = np.linalg.inv(kernel_UU + free_UU + penalty * np.eye(n))
        left_UG = (inverse_UU @ measured.effect_UG) / np.diag(inverse_UU)[:, None]
        loss = float(np.square(left_UG).sum())
        if loss < least:
            best, least = penalty, loss
    inverse_UU = np.linalg.inv(kernel_UU + free_UU + best * np.eye(n))
    return (kernel_TU + free_TU) @ inverse_UU @ measured.effect_UG


def linear(measured: Measured, asked: Asked, source: str, components: int = 10) -> np.ndarray:
    """Linear from vectors to the components of effects (Ahlmann-Eltze and others, 2025).

    ``Y ≈ G W Pᵀ + b``: G the components of effects, P vectors of targets, W by ridge.
    """
    table_PF = measured.vectors[source]
    p_U, p_T = measured.units.perturbation_T, asked.perturbation_T
    known_P = np.isfinite(table_PF).all(1)
    known_U = known_P[p_U]
    effect_TG = mean_response(measured, asked)
    for x in np.unique(asked.context_T):
        at_U = np.flatnonzero(known_U & (measured.units.context_T == x))
        at_T = np.flatnonzero((asked.context_T == x) & known_P[p_T])
        if len(at_U) < NEIGHBOURS or not len(at_T):
            continue
        k = min(components, len(at_U) - 1)
        centre_G = measured.effect_UG[at_U].mean(0)
        _, _, right_KG = np.linalg.svd(measured.effect_UG[at_U] - centre_G, full_matrices=False)
        score_UK = (measured.effect_UG[at_U] - centre_G) @ right_KG[:k].T
        about_F, scale_F = table_PF[known_P].mean(0), table_PF[known_P].std(0)
        scale_F = np.where(scale_F > 1e-6 * np.abs(table_PF[known_P]).max(0), scale_F, np.inf)
        x_UF, x_TF = ((table_PF[p] - about_F) / scale_F for p in (p_U[at_U], p_T[at_T]))
        gram_UU = x_UF @ x_UF.T
        # The penalty of the published form is 0.1 on unscaled data; here a tenth of the diagonal.
        penalty = 0.1 * np.trace(gram_UU) / len(at_U) + 1e-9
        weight_TU = x_TF @ x_UF.T @ np.linalg.inv(gram_UU + penalty * np.eye(len(at_U)))
        effect_TG[at_T] = centre_G + weight_TU @ score_UK @ right_KG[:k]
    return effect_TG


# -- ours ------------------------------------------------------------------------------------------


def signal_share(measured: Measured, weight_TU: np.ndarray) -> np.ndarray:
    """Share of a weighted mean effect that is not noise, by gene, in [0, 1]: James and Stein."""
    effect_TG = weight_TU @ measured.effect_UG
    noise_TG = weight_TU**2 @ measured.noise_UG
    for x in np.unique(measured.units.context_T):
        at_U = measured.units.context_T == x
        noise_TG += weight_TU[:, at_U].sum(1)[:, None] ** 2 * measured.control_noise_XG[x]
    square_TG = effect_TG**2
    share_TG = np.zeros_like(effect_TG)
    np.divide(square_TG - noise_TG, square_TG, out=share_TG, where=square_TG > noise_TG)
    return share_TG


def kept_where_sure(measured: Measured, asked: Asked) -> np.ndarray:
    """Predict the mean response, each gene as far as it stands out of its noise."""
    weight_TU = mean_weights(measured, asked)
    return signal_share(measured, weight_TU) * (weight_TU @ measured.effect_UG)


def to_one_level(
    measured: Measured, asked: Asked, like: Likeness | None = None, *, only_sure: bool = False
) -> np.ndarray:
    """Genes that respond reach the level they reach elsewhere, whatever level they begin at.

    Parameters
    ----------
    measured, asked
        Other contexts, and those that are asked for.
    like
        Weigh contexts by how alike their controls are; else all alike.
    only_sure
        Genes that do not stand out of noise elsewhere do not respond; else as they do elsewhere.
    """
    weight_TU = mean_weights(measured, asked)
    if like is not None:
        kernel_TU, _ = like.kernel(measured, asked)
        # As sharp as tells contexts apart: one that is a deviation nearer has e times the weight.
        sharp_TU = np.where(weight_TU > 0, kernel_TU, -np.inf)
        spread = np.array([row[np.isfinite(row)].std() or 1.0 for row in sharp_TU])
        sharp_TU = np.exp((sharp_TU - sharp_TU.max(1, keepdims=True)) / spread[:, None])
        weight_TU = sharp_TU / sharp_TU.sum(1, keepdims=True)
    share_TG = signal_share(measured, weight_TU)
    effect_TG = weight_TU @ measured.effect_UG
    begins_TG = weight_TU @ measured.control_XG[measured.units.context_T]
    further_TG = begins_TG - measured.control_XG[asked.context_T]
    return (share_TG if only_sure else 1.0) * effect_TG + share_TG * further_TG
