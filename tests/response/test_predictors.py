"""Predictors of responses, each against what it is defined to be."""

import numpy as np
import pytest
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.expression.pseudobulk import bulk_profile
from genemodel.response import vectors
from genemodel.response.mixture import MEAN, NO_CHANGE, fit_mixture, ingredients
from genemodel.response.predictors import (
    Again,
    Asked,
    Likeness,
    Measured,
    additive,
    dose_line,
    linear,
    mean_response,
    nearest,
    nearest_dose,
    ridge,
    signal_share,
    to_one_level,
)
from genemodel.response.sampling import cells_with_effect

G = 40


def asked_of(*units: tuple[int, int, float]) -> Asked:
    p, x, dose = zip(*units, strict=True)
    return Asked(np.array(p), np.array(x), np.array(dose, float))


def measured_of(
    units: Asked, effect_UG: np.ndarray, *, n_contexts: int = 1, noise: float = 0.01,
    members: list[tuple[int, ...]] | None = None, tables: dict[str, np.ndarray] | None = None,
    control_XG: np.ndarray | None = None,
) -> Measured:  # fmt: skip
    n = int(units.perturbation_T.max()) + 10
    control_XG = np.zeros((n_contexts, effect_UG.shape[1])) if control_XG is None else control_XG
    rng = np.random.default_rng(9)

    def another() -> np.ndarray:
        return effect_UG + rng.normal(size=effect_UG.shape) * np.sqrt(noise)

    noise_UG = np.full(effect_UG.shape, noise)
    again = Again(
        another(), another(), another(), another(), noise_UG, noise_UG, control_XG,
        np.full(control_XG.shape, noise / 2),
    )  # fmt: skip
    return Measured(
        units, effect_UG, noise_UG, control_XG, np.full(control_XG.shape, noise / 2), tables or {},
        members or [(p,) for p in range(n)], [() for _ in range(n)], (again,),
    )  # fmt: skip


@pytest.fixture
def effects() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(6, G))


def test_the_mean_response_takes_the_nearest_that_was_measured(effects: np.ndarray) -> None:
    units = asked_of((0, 0, 1), (0, 1, 1), (1, 0, 1), (1, 1, 1), (2, 0, 1), (2, 1, 1))
    found = mean_response(measured_of(units, effects, n_contexts=3), asked_of((3, 1, 1), (0, 2, 1)))
    assert found[0] == pytest.approx(effects[[1, 3, 5]].mean(0))  # others in the same context
    assert found[1] == pytest.approx(effects[[0, 1]].mean(0))  # the same in other contexts


def test_additive_adds_up_a_combination_and_the_effects_of_both_sides(effects: np.ndarray) -> None:
    units = asked_of((0, 0, 1), (1, 0, 1), (2, 0, 1))
    members = [(0,), (1,), (2,), (0, 1), (0, -1)] + [(5,)] * 10
    measured = measured_of(units, effects[:3], members=members)
    found = additive(measured, asked_of((3, 0, 1), (4, 0, 1)))
    assert found[0] == pytest.approx(effects[0] + effects[1])
    assert found[1] == pytest.approx(effects[:3].mean(0))  # a part is not in the screen
    # In a table of sums, what is left out is the sum.
    rows, columns = effects[:3], effects[3:5]
    table = {(p, x): rows[p] + columns[x] for p in range(3) for x in range(2)}
    left = [key for key in table if key != (2, 1)]
    units = asked_of(*((p, x, 1) for p, x in left))
    measured = measured_of(units, np.stack([table[key] for key in left]), n_contexts=2)
    weights_are_exact = additive(measured, asked_of((2, 1, 1)))
    grand = np.stack([table[key] for key in left]).mean(0)
    expected = table[2, 0] + (table[0, 1] + table[1, 1]) / 2 - grand
    assert weights_are_exact[0] == pytest.approx(expected)


def test_doses_between_lie_on_the_line_and_beyond_on_the_last(effects: np.ndarray) -> None:
    units = asked_of((0, 0, 1), (0, 0, 3))
    measured = measured_of(units, effects[:2])
    found = dose_line(measured, asked_of((0, 0, 2), (0, 0, 0.5), (0, 0, 4), (0, 0, 1)))
    assert found[0] == pytest.approx(effects[:2].mean(0))
    assert found[1] == pytest.approx(effects[0] / 2)  # half-way from no dose
    assert found[2] == pytest.approx(effects[1])
    assert found[3] == pytest.approx(effects[0])
    near = nearest_dose(measured, asked_of((0, 0, 2), (0, 0, 4)))
    assert near[0] == pytest.approx(effects[:2].mean(0)) and near[1] == pytest.approx(effects[1])


def _families() -> tuple[np.ndarray, np.ndarray]:
    """Twelve perturbations of two families that do opposite things, and what tells them."""
    rng = np.random.default_rng(1)
    programme = rng.normal(size=G)
    family = np.r_[np.ones(6), -np.ones(6)]
    effect = family[:, None] * programme + rng.normal(0, 0.1, (12, G))
    return effect, np.c_[family, rng.normal(0, 0.2, 12)]


@pytest.mark.parametrize("method", ["nearest", "ridge", "linear"])
def test_what_is_alike_responds_alike(method: str) -> None:
    effect, table = _families()
    left = np.r_[1:6, 7:12]
    units = asked_of(*((int(p), 0, 1) for p in left))
    tables = {"known": np.r_[table, np.full((10, 2), np.nan)]}
    measured = measured_of(units, effect[left], tables=tables)
    asked = asked_of((0, 0, 1), (6, 0, 1), (15, 0, 1))
    if method == "linear":
        found = linear(measured, asked, "known")
    else:
        found = (nearest if method == "nearest" else ridge)(measured, asked, Likeness("known"))
    assert np.corrcoef(found[0], effect[0])[0, 1] > 0.9
    assert np.corrcoef(found[1], effect[6])[0, 1] > 0.9
    # Of what nothing is known, the mean of all.
    assert found[2] == pytest.approx(effect[left].mean(0), abs=0.02)


def test_signal_is_what_stands_out_of_noise() -> None:
    rng = np.random.default_rng(2)
    effect = rng.normal(0, 0.1, (4, 400))
    effect[:, :50] += 2
    measured = measured_of(asked_of(*((p, 0, 1) for p in range(4))), effect)
    share = signal_share(measured, np.full((1, 4), 0.25))
    assert share[0, :50].min() > 0.95 and share[0, 50:].mean() < 0.3
    assert (share >= 0).all() and (share <= 1).all()


def test_one_level_is_reached_from_wherever_a_context_begins() -> None:
    level = np.r_[np.full(10, 5.0), np.zeros(30)]
    begins = np.random.default_rng(3).uniform(0, 2, (4, 10))
    control = np.c_[begins, np.zeros((4, 30))]
    units = asked_of((0, 0, 1), (0, 1, 1), (0, 2, 1))
    measured = measured_of(units, level - control[:3], n_contexts=4, control_XG=control, noise=1e-6)
    found = to_one_level(measured, asked_of((0, 3, 1)))
    assert found[0] == pytest.approx(level - control[3], abs=1e-3)


def test_the_mixture_finds_what_tells_perturbations_apart() -> None:
    effect, table = _families()
    units = asked_of(*((p, 0, 1) for p in range(12)))
    measured = measured_of(units, effect, tables={"known": table})
    found = fit_mixture(measured, np.arange(12), ingredients("targets", ["known"]), 0)
    assert "known" in found.kind and found.total["kNN (known)"] > 0.5
    predicted = found.predict(measured, asked_of((0, 0, 1)), ingredients("targets", ["known"]))
    assert np.corrcoef(predicted[0], effect[0])[0, 1] > 0.9


def test_the_mixture_predicts_no_change_of_noise() -> None:
    rng = np.random.default_rng(4)
    units = asked_of(*((p, 0, 1) for p in range(12)))
    measured = measured_of(units, np.zeros((12, G)), noise=0.04)
    again = Again(
        *(rng.normal(0, 0.2, (12, G)) for _ in range(4)), *(np.full((12, G), 0.04),) * 2,
        measured.control_XG, measured.control_noise_XG,
    )  # fmt: skip
    measured = Measured(**{**vars(measured), "again": (again,)})
    found = fit_mixture(measured, np.arange(12), ingredients("targets", []), 0)
    predicted = found.predict(measured, asked_of((0, 0, 1)), ingredients("targets", []))
    assert found.kind == NO_CHANGE and not predicted.any()
    assert MEAN in found.total


def test_made_cells_have_the_effect_and_no_effect_makes_copies() -> None:
    rng = np.random.default_rng(5)
    rate = rng.gamma(1, 3, 30) + 0.5
    control = sp.csr_matrix(rng.poisson(rate * rng.gamma(4, 0.25, (300, 1))))
    profile = bulk_profile(np.asarray(control.sum(0)).ravel(), 1e4)
    effect = rng.normal(0, 0.7, 30)
    made = cells_with_effect(control, profile, effect, 2000, rng, depth=1e4)
    assert made.shape == (2000, 30) and made.data.min() >= 1
    wanted = np.expm1(np.maximum(profile + effect, 0))
    got = bulk_profile(np.asarray(made.sum(0)).ravel(), 1e4)
    assert got == pytest.approx(np.log1p(1e4 * wanted / wanted.sum()), abs=0.12)
    copies = cells_with_effect(control, profile, np.zeros(30), 50, rng, depth=1e4)
    own = {row.tobytes() for row in control.toarray()}
    assert all(row.tobytes() in own for row in copies.toarray().astype(control.dtype))


def test_made_cells_gain_genes_that_controls_do_not_have() -> None:
    control = np.zeros((100, 3), int)
    control[:, 0] = 20
    profile = bulk_profile(control.sum(0), 1e3)
    made = cells_with_effect(
        sp.csr_matrix(control), profile, np.array([0, 5.0, 0]), 500, np.random.default_rng(6),
        depth=1e3,
    )  # fmt: skip
    sums = np.asarray(made.sum(0)).ravel()
    assert sums[1] / sums.sum() == pytest.approx(np.expm1(5) / (np.expm1(5) + 1e3), abs=0.02)
    assert sums[2] == 0


def test_sets_and_tables_of_targets_are_read(tmp_path) -> None:
    sets = tmp_path / "sets.gmt"
    sets.write_text("one\tnote\tA\tb\tX\ntwo\tnote\tC\nall\tnote\tA\tB\tC\n")
    found = vectors.of_sets(sets, ["A", "B", "C", "D"])
    assert found.shape == (4, 2) and np.isnan(found[3]).all()  # a set of one gene is left out
    assert found[0, 0] > found[0, 1] > 0 and found[2, 0] == 0  # rarer weighs more
    table = tmp_path / "v.tsv"
    table.write_text("gene\tx\ty\nA\t1\t2\nz\t1\nb\t3\t4\n")
    assert vectors.of_table(table, ["A", "B", "C"])[:2].tolist() == [[1, 2], [3, 4]]
    for text, match in (("A\tx\n", "line 1"), ("A\t1\t2\nB\t1\n", "one length")):
        table.write_text(text)
        with pytest.raises(DataError, match=match):
            vectors.of_table(table, ["A", "B", "C"])
    sets.write_text("one\tA\n")
    with pytest.raises(DataError, match="line 1: 2 fields"):
        vectors.of_sets(sets, ["A", "B"])
    sets.write_text("one\tnote\tX\n")
    with pytest.raises(DataError, match="no set that holds two"):
        vectors.of_sets(sets, ["A", "B"])
