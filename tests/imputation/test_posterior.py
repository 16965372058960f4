"""Posterior, calibration, coverage and Rubin's rules against slow or closed answers."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

import genemodel as gm
from genemodel.errors import DataError
from genemodel.imputation.posterior import (
    calibrate_dispersion,
    expected_log1p,
    posterior_draws,
    posterior_gamma,
    randomised_pit,
    rate_quantiles,
    rubin_pool,
    tally_coverage,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def _moments(*given):
    """Mean and variance of the posterior."""
    shape, rate = posterior_gamma(*given)
    return shape / rate, shape / rate**2


def test_posterior_matches_grid_integration():
    count, mean, dispersion, exposure = 3, 1.7, 0.4, 0.8
    rate = np.linspace(1e-6, 40, 400_001)
    density = stats.gamma.pdf(rate, 1 / dispersion, scale=dispersion * mean) * stats.poisson.pmf(
        count, exposure * rate
    )
    density /= density.sum()
    m = (rate * density).sum()
    v = ((rate - m) ** 2 * density).sum()
    ours = _moments(np.array([[count]]), np.array([[mean]]), np.array([dispersion]), exposure)
    assert np.allclose([ours[0].item(), ours[1].item()], [m, v], rtol=1e-4)


def test_unmeasured_gene_is_the_prior():
    mean, variance = _moments(
        np.array([[0.0, 0.0]]), np.array([[2.0, 2.0]]), np.array([0.5, 0.5]), np.array([[1.0, 0.0]])
    )
    assert mean[0, 1] == pytest.approx(2.0) and variance[0, 1] == pytest.approx(0.5 * 4.0)
    assert mean[0, 0] < 2.0


def test_draws_agree_with_the_closed_form(rng):
    shape, rate = np.array([[2.5, 0.7]]), np.array([[1.3, 4.0]])
    draws = posterior_draws(shape, rate, 40_000, rng)
    assert np.allclose(draws.mean(0), shape / rate, rtol=0.03)
    assert np.allclose(draws.var(0), shape / rate**2, rtol=0.06)


def _gamma_poisson_cells(rng, dispersion, factor=1.0, n=600, g=40):
    mean = np.exp(rng.normal(-1, 1.5, g))[None].repeat(n, 0)
    rate = rng.gamma(1 / dispersion, dispersion, (n, g)) * mean
    return mean * factor, rng.poisson(rate), rng.poisson(rate / 9)


def test_calibration_recovers_dispersion_and_coverage(rng):
    mean, x, held = _gamma_poisson_cells(rng, 0.5)
    found = calibrate_dispersion(mean, sp.csr_matrix(x), sp.csr_matrix(held), 1 / 9, n_bins=2)
    assert 0.3 < np.exp(np.log(found[x.mean(0) > 0.3]).mean()) < 0.8
    shape, rate = posterior_gamma(x, mean, found)
    pit = randomised_pit(held, shape, rate, 1 / 9, rng)
    assert stats.kstest(pit.ravel(), "uniform").pvalue > 0.001
    decile = np.argsort(np.argsort(mean[0])) * 10 // 40
    inside, entries = tally_coverage(pit, decile, 10)
    assert np.all(np.abs(inside / entries - 0.9) < 0.02)


def test_coverage_check_notices_intervals_that_are_too_narrow(rng):
    mean, x, held = _gamma_poisson_cells(rng, 1.5)
    shape, rate = posterior_gamma(x * 0.0 + mean, mean, np.full(40, 1e-3))
    frequent = mean[0] > 1.0
    pit = randomised_pit(held[:, frequent] * 9, shape[:, frequent], rate[:, frequent], 1.0, rng)
    inside, entries = tally_coverage(pit, np.zeros(1, int), 1)
    assert inside[0] / entries[0] < 0.8


def test_rubin_pool_by_hand():
    estimate, total, df, missing = rubin_pool(
        np.array([[1.0], [2.0], [3.0]]), np.array([[0.5], [0.5], [0.5]])
    )
    # between = 1, (1 + 1/3) * 1 = 4/3, total = 11/6, share = 8/11, df = 2 / (8/11)^2, r = 8/3
    assert estimate[0] == 2.0 and total[0] == pytest.approx(11 / 6)
    assert df[0] == pytest.approx(2 * (11 / 8) ** 2)
    assert missing[0] == pytest.approx((8 / 3 + 2 / (df[0] + 3)) / (8 / 3 + 1))


def test_rubin_pool_covers_the_truth_in_simulation(rng):
    """Normal data, 60 % missing at random, proper imputation: 95 % intervals hold the mean 95 %."""
    n, n_seen, m, repeats = 200, 80, 20, 2000
    hits, naive = 0, 0
    for _ in range(repeats):
        seen = rng.normal(5.0, 2.0, n_seen)
        variance = seen.var(ddof=1) * (n_seen - 1) / rng.chisquare(n_seen - 1, m)
        centre = rng.normal(seen.mean(), np.sqrt(variance / n_seen))
        filled = rng.normal(centre[:, None], np.sqrt(variance)[:, None], (m, n - n_seen))
        every = np.concatenate([np.broadcast_to(seen, (m, n_seen)), filled], 1)
        est, var = every.mean(1)[:, None], every.var(1, ddof=1)[:, None] / n
        pooled, total, df, missing = rubin_pool(est, var, complete_df=n - 1)
        hits += abs(pooled[0] - 5.0) < stats.t.ppf(0.975, df[0]) * math.sqrt(total[0])
        naive += abs(est[0, 0] - 5.0) < 1.96 * math.sqrt(var[0, 0])
    assert 0.935 < hits / repeats < 0.965
    assert naive / repeats < 0.85  # one imputation taken for data is over-confident


def test_rubin_pool_needs_two_imputations():
    assert gm.rubin_pool is rubin_pool
    for shape in ((1, 3), ()):
        with pytest.raises(DataError, match=r"at least two.*draws=5"):
            rubin_pool(np.zeros(shape), np.zeros(shape))
    with pytest.raises(DataError, match=r"\(2, 3\), variances \(2, 4\)"):
        rubin_pool(np.zeros((2, 3)), np.zeros((2, 4)))


def test_a_function_gives_the_same_calibration_as_a_matrix(rng):
    mean, x, held = _gamma_poisson_cells(rng, 0.5, n=300, g=12)
    counts = sp.csr_matrix(x), sp.csr_matrix(held)
    whole = calibrate_dispersion(mean, *counts, 1 / 9)
    parts = calibrate_dispersion(lambda cells: mean[cells], *counts, 1 / 9, block=77)
    np.testing.assert_allclose(whole, parts)


def test_a_tiny_dispersion_believes_the_decoder_and_a_large_one_the_counts():
    count, mean = np.array([[6.0]]), np.array([[2.0]])
    stiff, _ = _moments(count, mean, np.array([1e-6]))
    loose, _ = _moments(count, mean, np.array([1e6]))
    assert stiff.item() == pytest.approx(2.0, rel=1e-4)
    assert loose.item() == pytest.approx(6.0, rel=1e-4)


def test_rate_quantiles_match_scipy():
    shape, rate = np.array([[0.05, 2.5, 400.0]]), np.array([[1.3, 4.0, 9.0]])
    levels = [0.05, 0.5, 0.975]
    expected = [stats.gamma.ppf(level, shape, scale=1 / rate) for level in levels]
    np.testing.assert_allclose(rate_quantiles(shape, rate, levels), expected, rtol=1e-8)


def test_coverage_adds_up_over_blocks(rng):
    pit, group = rng.random((60, 5)), np.arange(5) % 3
    whole = tally_coverage(pit, group, 4)
    parts = [tally_coverage(block, group, 4) for block in (pit[:13], pit[13:])]
    np.testing.assert_array_equal(whole, np.sum(parts, 0))
    np.testing.assert_array_equal(whole[1], [120, 120, 60, 0])


def test_expected_log_is_the_sum_over_the_negative_binomial():
    shape_CG = np.array([[0.05, 0.5, 2.0, 30.0], [1.0, 4.0, 100.0, 0.3]])
    mean_CG = np.array([[1e-4, 0.02, 1.5, 40.0], [5.0, 60.0, 900.0, 10.0]])
    scale_C = np.array([2.0, 0.7])
    found_CG = expected_log1p(shape_CG, shape_CG / mean_CG, scale_C)
    count_N = np.arange(20_000)
    for cell, gene in np.ndindex(shape_CG.shape):
        shape, mean = shape_CG[cell, gene], mean_CG[cell, gene]
        mass_N = stats.nbinom.pmf(count_N, shape, shape / (shape + mean))
        slow = (mass_N * np.log1p(scale_C[cell] * count_N)).sum()
        assert found_CG[cell, gene] == pytest.approx(slow, rel=6e-3 if mean > 50 else 1e-5)
