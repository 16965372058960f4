"""Scores of predicted responses: against scipy, against their definitions, and at their ends."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.stats import mannwhitneyu

from genemodel.expression.pseudobulk import bulk_profile, jackknife_variance
from genemodel.metrics.response import (
    METRICS,
    Compared,
    compare,
    differential,
    discrimination,
    expression_error,
    genes_to_test,
    normal_test,
    rank_sum_p,
    scaled,
)


def test_the_rank_sum_is_scipys_with_ties_and_empty_genes() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.poisson(0.6, (40, 25)) / 3, rng.poisson(0.9, (70, 25)) / 3
    a[:, 3], b[:, 3] = 0, 0
    a[:, 4] = 0
    ours = rank_sum_p(sp.csr_matrix(a), sp.csr_matrix(b))
    theirs = mannwhitneyu(a, b, axis=0, method="asymptotic").pvalue
    assert ours == pytest.approx(np.nan_to_num(theirs, nan=1.0), abs=1e-12)


def test_the_jackknife_leaves_out_one_cell_after_the_other() -> None:
    rng = np.random.default_rng(1)
    counts, weight = rng.poisson(0.8, (30, 12)).astype(float), rng.uniform(0.5, 2, 30)
    weighted = counts * weight[:, None]
    left = np.array([bulk_profile(weighted.sum(0) - weighted[i], 1e3) for i in range(30)])
    direct = 29 / 30 * np.square(left - left.mean(0)).sum(0)
    ours = jackknife_variance(sp.csr_matrix(counts), weight, 1e3)
    assert ours == pytest.approx(direct, rel=1e-9)
    assert not jackknife_variance(sp.csr_matrix(counts[:1])).any()


def test_one_shared_prediction_and_none_discriminate_nothing() -> None:
    rng = np.random.default_rng(2)
    measured = rng.normal(size=(6, 30))
    kept = np.ones(30, bool)
    shared = np.tile(rng.normal(size=30), (6, 1))
    assert discrimination(np.zeros_like(measured), measured, kept) == pytest.approx(0.5)
    assert discrimination(shared, measured, kept).mean() == pytest.approx(0.5)
    assert discrimination(measured * 3, measured, kept) == pytest.approx(1.0)
    assert np.isnan(discrimination(measured[:1], measured[:1], kept)).all()


def test_genes_that_are_targets_do_not_count() -> None:
    rng = np.random.default_rng(3)
    measured = rng.normal(size=(5, 20))
    predicted = measured.copy()
    predicted[:, 10:] = -20 * measured[:, 10:]
    only = np.arange(20) < 10
    assert discrimination(predicted, measured, only) == pytest.approx(1.0)
    assert discrimination(predicted, measured, np.ones(20, bool)).max() < 1


def test_the_expression_error_of_a_repeat_is_zero_and_of_no_change_one() -> None:
    rng = np.random.default_rng(4)
    effect, kept = rng.normal(0, 0.5, 4000), np.ones(4000, bool)
    noise = np.full(4000, 0.3)
    measured, again = (effect + rng.normal(size=4000) * np.sqrt(noise) for _ in range(2))
    error, nothing = expression_error(again, measured, noise, kept, noise)
    assert error / nothing == pytest.approx(0, abs=0.1)
    error, nothing = expression_error(effect, measured, noise, kept)
    assert error / nothing == pytest.approx(0, abs=0.1)
    error, nothing = expression_error(np.zeros(4000), measured, noise, kept)
    assert error == nothing


def _tested(lfc: list[float], fdr: list[float]) -> Compared:
    return Compared(np.array(lfc), np.array(fdr) / 2, np.array(fdr))


def test_directions_and_genes_by_hand() -> None:
    real = _tested([1, -1, 2, -2, 0.5, 0.1], [0.01, 0.01, 0.01, 0.01, 0.3, 0.9])
    # Called: right, right, wrong, not called; and one that is not real, in the right direction.
    made = _tested([1, -2, -1, -1, 1, -1], [0.01, 0.02, 0.03, 0.4, 0.04, 0.8])
    found = differential(made, real)
    assert found["direction_fidelity"] == pytest.approx(3 / 4)
    assert found["direction_reach"] == pytest.approx(2 / 4)  # two right, then one wrong
    assert found["responding_genes"] == pytest.approx(3 / 5)
    assert np.isnan(found["fold_change_error"])  # fewer than ten genes


def test_a_perfect_prediction_and_its_opposite() -> None:
    rng = np.random.default_rng(5)
    effect = rng.normal(0, 2, 40)
    real = normal_test(effect, np.full(40, 0.01))
    same = differential(real, real)
    other = differential(normal_test(-effect, np.full(40, 0.01)), real)
    assert [same[name] for name in list(METRICS)[2:]] == [1.0, 1.0, 1.0, 0.0]
    assert other["direction_fidelity"] == 0 and other["fold_change_error"] == pytest.approx(2)
    silent = _tested([0.0] * 40, [1.0] * 40)
    nothing = differential(silent, real)
    assert nothing["direction_fidelity"] == 0 and nothing["fold_change_error"] == pytest.approx(1)
    assert differential(silent, silent)["responding_genes"] == 1
    assert np.isnan(differential(silent, silent)["direction_fidelity"])


def test_the_gate_of_fold_changes_is_the_whole_measurement() -> None:
    gate = _tested([1.0] * 12 + [5.0], [0.01] * 12 + [0.5])
    half = _tested([0.5] * 13, [0.9] * 13)
    assert differential(half, half, gate)["fold_change_error"] == 0
    assert np.isnan(differential(half, half)["fold_change_error"])


def test_a_score_without_room_is_no_score() -> None:
    base, repeat = dict.fromkeys(METRICS, 0.5), dict.fromkeys(METRICS, 0.5)
    base["expression_error"], repeat["expression_error"] = 1.0, 0.0
    repeat["direction_reach"] = 0.45
    repeat["discrimination"] = 0.9
    found = scaled(dict.fromkeys(METRICS, 0.7), base, repeat)
    assert found["discrimination"] == pytest.approx(0.5)
    assert found["expression_error"] == pytest.approx(0.3)
    assert np.isnan(found["direction_reach"]) and np.isnan(found["responding_genes"])
    far = scaled(dict.fromkeys(METRICS, 50.0), base, repeat)
    assert far["expression_error"] == -6


def test_cells_are_compared_at_one_depth_and_shallow_genes_left_out() -> None:
    rng = np.random.default_rng(6)
    rate = np.r_[np.full(20, 20.0), np.full(5, 1e-7)]
    control = rng.poisson(rate, (80, 25))
    treated = rng.poisson(rate * np.r_[3.0, np.ones(24)], (60, 25)) * 2  # deeper
    at = genes_to_test(sp.csr_matrix(control))
    assert at.tolist() == [True] * 20 + [False] * 5
    found = compare(sp.csr_matrix(treated), sp.csr_matrix(control), at)
    assert found.significant_G[0] and found.lfc_G[0] == pytest.approx(np.log2(3 * 20 / 22), abs=0.1)
    assert np.isnan(found.p_G[20:]).all()
    assert np.isnan(found.without(at).p_G).all()
