"""Predictions of what was held out, judged beside baselines and beside a repeat of the experiment.

Axes: C cells, G genes, U units, T units held out, R repeats.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from genemodel.metrics.response import (
    Compared,
    compare,
    differential,
    expression_error,
    genes_to_test,
)
from genemodel.response.mixture import OURS, Mixture, baselines, fit_mixture, ingredients
from genemodel.response.panels import ERROR, NOTHING, REPLICATE, ranked
from genemodel.response.predictors import Again, Asked, Measured
from genemodel.response.sampling import cells_with_effect
from genemodel.response.screen import Origin, Screen, Unit

# Times that controls are dealt to choose a mixture by; each part then takes either side.
_DEALS = 2


@dataclass
class Scores:
    """What came of the comparison.

    Attributes
    ----------
    units
        One row a repeat, held-out unit and method: raw scores; ``_error`` and ``_nothing`` are the
        parts of the expression error.
    mixtures
        One row a repeat and fold: of what ours was mixed.
    effects
        One row a held-out unit: what ours predicted and what was measured, mean over repeats.
    """

    units: pd.DataFrame
    mixtures: pd.DataFrame
    predicted_UG: np.ndarray
    measured_UG: np.ndarray
    noise_UG: np.ndarray
    asked: list[int] = field(default_factory=list)


def asked_of(units: list[Unit]) -> Asked:
    """Codes of units."""
    return Asked(
        np.array([u.perturbation for u in units]), np.array([u.context for u in units]),
        np.array([u.dose for u in units]),
    )  # fmt: skip


def measure(
    screen: Screen,
    origin: Origin,
    units: list[Unit],
    noise_UG: np.ndarray,
    vectors: Mapping[str, np.ndarray],
    seed: int,
) -> Measured:
    """Measure the effects of units from these controls, and again from two parts of them."""
    rng = np.random.default_rng(seed)
    # Half of the controls leave twice their noise.
    control_UG = np.stack([2 * origin.against(u.context, u.rows)[1] for u in units])
    again = []
    for _ in range(_DEALS):
        parts = origin.halves(int(rng.integers(2**31)))
        halves = [np.array_split(rng.permutation(unit.rows), 2) for unit in units]
        for one, other in (parts, parts[::-1]):
            again.append(Again(
                learned_UG=np.stack([one.effect(unit) for unit in units]),
                judged_UG=np.stack([other.effect(unit) for unit in units]),
                first_UG=np.stack(
                    [one.effect(u, h[0]) for u, h in zip(units, halves, strict=True)]
                ),
                second_UG=np.stack(
                    [other.effect(u, h[1]) for u, h in zip(units, halves, strict=True)]
                ),
                noise_UG=noise_UG + control_UG, half_noise_UG=2 * noise_UG + control_UG,
                control_XG=one.control_XG, control_noise_XG=one.noise_XG,
            ))  # fmt: skip
    return Measured(
        asked_of(units), np.stack([origin.effect(unit) for unit in units]), noise_UG,
        origin.control_XG, origin.noise_XG, vectors, screen.members, screen.targets, tuple(again),
    )  # fmt: skip


def noise_of(screen: Screen) -> np.ndarray:
    """Variance that the perturbed cells leave in the effect of every unit, (U, G)."""
    return np.stack([screen.noise(u.rows) for u in screen.units])


def score(
    screen: Screen,
    folds: list[np.ndarray],
    group_U: np.ndarray,
    holdout: str,
    vectors_of: Callable[[Origin], dict[str, np.ndarray]],
    *,
    repeats: int,
    seed: int,
    advance: Callable[[int], object] = lambda n: None,
) -> Scores:
    """Hold out units fold by fold, predict them with every method, and score the predictions.

    Parameters
    ----------
    screen
        All cells.
    folds
        Units that are held out together.
    group_U
        Which units go together when ours leaves some out by itself.
    holdout
        What is held out.
    vectors_of
        Vectors of perturbations, from the control cells that may be learned from.
    repeats
        Times that controls are dealt and cells drawn.
    seed
        Of all chance.
    advance
        Told of every unit that is done.
    """
    noise_UG = noise_of(screen)
    rows: list[dict[str, object]] = []
    mixtures: list[dict[str, object]] = []
    n_genes = len(screen.genes)
    predicted_UG = np.zeros((len(screen.units), n_genes))
    measured_UG, judged_noise_UG = np.zeros_like(predicted_UG), np.zeros_like(predicted_UG)
    for repeat in range(repeats):
        rng = np.random.default_rng([seed, repeat])
        learned, judge = screen.whole().halves(int(rng.integers(2**31)))
        vectors = vectors_of(learned)
        everything = measure(
            screen, learned, screen.units, noise_UG, vectors, int(rng.integers(2**31))
        )
        judges = Judge(screen, learned, judge, noise_UG, rng)
        for number, held in enumerate(folds):
            left = np.setdiff1d(np.arange(len(screen.units)), held)
            measured, asked = everything.take(left), everything.units.take(held)
            mixture, predictions = predict_all(
                measured, asked, group_U[left], holdout, seed + repeat
            )
            mixtures.append(
                {"repeat": repeat, "fold": number, "kind": mixture.kind, **mixture.weight}
            )
            rows += judges.rows(held, predictions, repeat)
            predicted_UG[held] += predictions[OURS] / repeats
            for u in held:
                measured_UG[u] += judges.effect_G(u) / repeats
                judged_noise_UG[u] += judges.noise_G(u) / repeats
            advance(len(held))
    held_out = sorted({int(u) for fold in folds for u in fold})
    return Scores(
        pd.DataFrame(rows), pd.DataFrame(mixtures), predicted_UG, measured_UG, judged_noise_UG,
        held_out,
    )  # fmt: skip


def predict_all(
    measured: Measured, asked: Asked, group_U: np.ndarray, holdout: str, seed: int
) -> tuple[Mixture, dict[str, np.ndarray]]:
    """Predict with every method: name -> (T, G), ours last."""
    sources = list(measured.vectors)
    known = ingredients(holdout, sources)
    mixture = fit_mixture(measured, group_U, known, seed)
    found = {
        name: predictor(measured, asked) for name, predictor in baselines(holdout, sources).items()
    }
    found[OURS] = mixture.predict(measured, asked, known)
    return mixture, found


class Judge:
    """Scores predictions of units against the controls that nothing was learned from."""

    def __init__(
        self,
        screen: Screen,
        learned: Origin,
        judge: Origin,
        noise_UG: np.ndarray,
        rng: np.random.Generator,
    ) -> None:
        self.screen, self.learned, self.judge = screen, learned, judge
        self.cells_noise_UG, self.rng = noise_UG, rng
        self.tested_XG = [
            genes_to_test(judge.counts(x)) & genes_to_test(learned.counts(x))
            for x in range(len(screen.contexts))
        ]

    def effect_G(self, u: int) -> np.ndarray:
        """Give the measured effect."""
        return self.judge.effect(self.screen.units[u])

    def noise_G(self, u: int) -> np.ndarray:
        """Give its variance, of cells and of controls."""
        unit = self.screen.units[u]
        return self.cells_noise_UG[u] + self.judge.against(unit.context, unit.rows)[1]

    def rows(
        self, held: np.ndarray, predictions: Mapping[str, np.ndarray], repeat: int
    ) -> list[dict[str, object]]:
        """Score all predictions of a fold, and the replicate split."""
        screen, units = self.screen, [self.screen.units[u] for u in held]
        measured_TG = np.stack([self.effect_G(u) for u in held])
        rows: list[dict[str, object]] = []
        halves = [self._replicate(unit) for unit in units]
        first_TG, second_TG = (np.stack([half[k] for half in halves]) for k in (0, 1))
        not_targets_G = ~screen.target_G
        context_T = np.array([unit.context for unit in units])
        ranks = {
            name: ranked(effect_TG, measured_TG, not_targets_G, context_T)
            for name, effect_TG in predictions.items()
        } | {REPLICATE: ranked(first_TG, second_TG, not_targets_G, context_T)}
        for t, (u, unit) in enumerate(zip(held, units, strict=True)):
            kept_G = ~screen.own_G(unit.perturbation)
            real = self._tested(unit, self.judge).without(~kept_G)
            about = {"repeat": repeat, "unit": int(u)}
            for name, effect_TG in predictions.items():
                error, nothing = expression_error(
                    effect_TG[t], measured_TG[t], self.noise_G(u), kept_G
                )
                made = self._made(unit, effect_TG[t]).without(~kept_G)
                rows.append(
                    about | {"method": name, "discrimination": ranks[name][t], ERROR: error,
                             NOTHING: nothing} | differential(made, real)
                )  # fmt: skip
            rows.append(
                about | {"method": REPLICATE, "discrimination": ranks[REPLICATE][t]}
                | self._halves(unit, halves[t], real, kept_G)
            )  # fmt: skip
        return rows

    def _tested(self, unit: Unit, origin: Origin, rows: np.ndarray | None = None) -> Compared:
        counts_CG = self.screen.counts_CG[unit.rows if rows is None else rows]
        return compare(counts_CG, origin.counts(unit.context), self.tested_XG[unit.context])

    def _made(self, unit: Unit, effect_G: np.ndarray) -> Compared:
        weight_C = self.learned.weights(unit.context, unit.rows)
        control_G, _ = self.learned.against(unit.context, unit.rows)
        controls_CG = self.learned.counts(unit.context)
        made_CG = cells_with_effect(
            controls_CG, control_G, effect_G, len(unit.rows), self.rng,
            depth=self.screen.depth, weight_C=weight_C,
        )  # fmt: skip
        return compare(made_CG, controls_CG, self.tested_XG[unit.context])

    def _replicate(self, unit: Unit) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Effects of two halves of the cells, each from its own half of the controls."""
        rows = self.rng.permutation(unit.rows)
        one, other = rows[: len(rows) // 2], rows[len(rows) // 2 :]
        return self.learned.effect(unit, one), self.judge.effect(unit, other), one, other

    def _halves(
        self,
        unit: Unit,
        half: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        whole: Compared,
        kept_G: np.ndarray,
    ) -> dict[str, float]:
        first_G, second_G, one, other = half
        noise_G = [
            self.screen.noise(rows) + origin.against(unit.context, rows)[1]
            for rows, origin in ((one, self.learned), (other, self.judge))
        ]
        error, nothing = expression_error(first_G, second_G, noise_G[1], kept_G, noise_G[0])
        return {ERROR: error, NOTHING: nothing} | differential(
            self._tested(unit, self.learned, one).without(~kept_G),
            self._tested(unit, self.judge, other).without(~kept_G),
            whole,
        )
