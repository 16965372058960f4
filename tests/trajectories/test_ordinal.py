"""Ordinal regression against logistic regression and another implementation of the model."""

import numpy as np
import pytest
from scipy.special import expit

from genemodel.trajectories.ordinal import OrdinalRegression


def drawn(n, n_times, seed=0, width=3):
    rng = np.random.default_rng(seed)
    x_CD = rng.normal(size=(n, width))
    score_C = x_CD @ np.array([1.5, -1.0, 0.5])[:width] + rng.logistic(size=n)
    code_C = np.searchsorted(np.quantile(score_C, np.arange(1, n_times) / n_times), score_C)
    return x_CD, code_C


def test_of_two_times_it_is_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    x_CD, code_C = drawn(200, 2)
    x_CD = (x_CD - x_CD.mean(0)) / x_CD.std(0)
    found = OrdinalRegression.fit(x_CD, code_C, np.array([0.0, 1.0]), 0.01)
    # Its penalty is per cell, and the intercept is free.
    one = LogisticRegression(C=1 / (0.01 * 200), tol=1e-9).fit(x_CD, code_C)
    np.testing.assert_allclose(found.weight_D, one.coef_[0], rtol=2e-3)
    np.testing.assert_allclose(-found.threshold_T, one.intercept_, atol=2e-3)


def test_it_is_the_cumulative_logit_model():
    from statsmodels.miscmodels.ordinal_model import OrderedModel

    x_CD, code_C = drawn(400, 4)
    x_CD = (x_CD - x_CD.mean(0)) / x_CD.std(0)
    assert np.ptp(np.bincount(code_C)) == 0  # so that weights of times change nothing
    found = OrdinalRegression.fit(x_CD, code_C, np.arange(4.0), 0.0)
    other = OrderedModel(code_C, x_CD, distr="logit").fit(method="bfgs", disp=False)
    np.testing.assert_allclose(found.weight_D, other.params[:3], rtol=5e-3)
    threshold_T = other.model.transform_threshold_params(other.params)[1:-1]
    np.testing.assert_allclose(found.threshold_T, threshold_T, atol=1e-2)
    np.testing.assert_allclose(found.probabilities(x_CD), other.predict(), atol=3e-3)


def test_cells_of_a_time_that_was_left_out_come_between_its_neighbours():
    rng = np.random.default_rng(4)
    code_C = np.repeat([0, 1, 2, 3], 80)
    x_CD = rng.normal(size=(320, 5)) * 0.3
    x_CD[:, 1] += code_C
    kept = code_C != 2
    value_T = np.array([0.0, 1.0, 3.0])
    found = OrdinalRegression.fit(x_CD[kept], np.array([0, 1, -1, 2])[code_C[kept]], value_T, 0.01)
    told = found.predict(x_CD[~kept])
    assert np.median(told) == pytest.approx(2.0, abs=0.25)
    # None is before the first or after the last, and more of the score is never earlier.
    everywhere = found.predict(np.linspace(-20, 20, 41)[:, None] * np.eye(5)[1])
    assert everywhere.min() == 0.0 and everywhere.max() == 3.0
    assert (np.diff(everywhere) >= 0).all()


def test_a_rare_time_weighs_as_much_as_a_common_one():
    rng = np.random.default_rng(6)
    x_CD = np.concatenate([rng.normal(-1, 1, (300, 1)), rng.normal(1, 1, (30, 1))])
    code_C = np.repeat([0, 1], [300, 30])
    found = OrdinalRegression.fit(x_CD, code_C, np.array([0.0, 1.0]), 1e-4)
    # Two normals of one spread meet half-way, where a fit to all cells alike would not look.
    half = found.mean_D + found.scale_D * found.threshold_T / found.weight_D
    assert abs(half[0]) < 0.25
    assert 0.4 < expit(found.score(np.zeros((1, 1))) - found.threshold_T)[0] < 0.6
