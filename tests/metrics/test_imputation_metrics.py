"""Molecular cross-validation: exact splits, formulas against slow loops, known truths."""

import math

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from genemodel.errors import DataError
from genemodel.metrics.imputation import (
    count_agreement,
    expression_bins,
    gene_statistics,
    mcv_split,
    mixture_expectation,
    predictive_coverage,
    rowwise_pearson,
    rowwise_spearman,
    score_against_expectation,
    score_denoised,
)


def rates(n_cells=80, n_genes=60, seed=0):
    """Two kinds of cells with their own profiles, at varying depth."""
    draw = np.random.default_rng(seed)
    profile = draw.gamma(0.4, 1.0, (2, n_genes)) + 0.01
    depth = draw.uniform(100, 400, (n_cells, 1))
    kind = np.arange(n_cells) % 2
    return depth * (profile / profile.sum(axis=1, keepdims=True))[kind]


@pytest.fixture(scope="module")
def truth():
    return rates()


@pytest.fixture(scope="module")
def counts(truth):
    return sp.csr_matrix(np.random.default_rng(1).poisson(truth).astype(np.int32))


def test_parts_add_up_to_the_whole(counts):
    split = mcv_split(counts, 0.9, seed=3, drop_unseen=False)
    assert ((split.train + split.test) != counts).nnz == 0
    assert split.train.data.min() > 0
    assert split.test.data.min() > 0
    share = split.train.sum() / counts.sum()
    assert abs(share - 0.9) < 4 * math.sqrt(0.09 / counts.sum())


def test_split_depends_on_the_seed_alone(counts):
    one, two, other = (
        mcv_split(counts, 0.9, 3),
        mcv_split(counts, 0.9, 3),
        mcv_split(counts, 0.9, 4),
    )
    assert (one.train != two.train).nnz == 0
    assert (one.train != other.train).nnz > 0
    dense = mcv_split(counts.toarray().astype(np.float32), 0.9, 3)
    assert (one.train != dense.train).nnz == 0


def test_genes_without_training_molecules_are_dropped_from_both_parts():
    counts = np.zeros((50, 3), dtype=int)
    counts[:, 0] = 5
    counts[0, 1] = 1
    seeds = [seed for seed in range(60) if not mcv_split(counts, 0.5, seed).gene_kept_G[1]]
    assert seeds
    split = mcv_split(counts, 0.5, seeds[0])
    assert split.gene_kept_G.tolist() == [True, False, False]
    assert split.train.shape == split.test.shape == (50, 1)


@pytest.mark.parametrize("bad", [np.array([[0.5, 1.0]]), np.array([[-1.0, 2.0]])])
def test_only_raw_counts_are_split(bad):
    with pytest.raises(DataError, match="raw counts"):
        mcv_split(bad)


@pytest.mark.parametrize("keep", [0.0, 1.0, 1.5])
def test_keep_is_a_share(counts, keep):
    with pytest.raises(DataError, match=f"keep = {keep}"):
        mcv_split(counts, keep)


def slow_scores(denoised, split):
    """The three losses, one entry at a time."""
    train, test = split.train.toarray(), split.test.toarray()
    factor = test.sum() / train.sum()
    mse = poisson = deviance = 0.0
    for c in range(test.shape[0]):
        for g in range(test.shape[1]):
            y, d = float(test[c, g]), float(denoised[c, g])
            log_y = math.log1p(1e4 * y / test[c].sum()) if test[c].sum() else 0.0
            log_d = math.log1p(1e4 * d / denoised[c].sum()) if denoised[c].sum() else 0.0
            mse += (log_y - log_d) ** 2
            rate = d * factor
            poisson += rate - y * math.log(rate + 1e-6)
            deviance += 2 * ((y * math.log(y / (rate + 1e-6)) if y else 0.0) - y + rate)
    n = test.size
    return {"mse": mse / n, "poisson": poisson / n, "deviance": deviance / n}


def test_losses_equal_the_slow_formulas(counts, truth):
    dense = counts.toarray()
    dense[3] = 0  # a cell without anything
    counts = sp.csr_matrix(dense)
    split = mcv_split(counts, 0.8, 0)
    denoised = truth[:, split.gene_kept_G].copy()
    denoised[5] = 0.0
    table = score_denoised({"mine": denoised, "sparse": sp.csr_matrix(denoised)}, split)
    expected = slow_scores(denoised, split)
    nothing = slow_scores(split.train.toarray(), split)
    for name, value in expected.items():
        assert table.at["mine", name] == pytest.approx(value, rel=1e-9)
        assert table.at["sparse", name] == pytest.approx(value, rel=1e-9)
        assert table.at["mine", f"{name}_ratio"] == pytest.approx(value / nothing[name], rel=1e-9)
        assert table.at["none", f"{name}_ratio"] == 1.0


def test_the_true_rates_beat_doing_nothing_and_the_average(counts, truth):
    split = mcv_split(counts, 0.9, 0)
    true = 0.9 * truth[:, split.gene_kept_G]
    library = true.sum(axis=1, keepdims=True)
    average = library * true.sum(axis=0) / true.sum()
    table = score_denoised({"true": true, "average": average}, split)
    for score in ("poisson", "deviance"):
        assert table.at["true", score] < table.at["average", score] < table.at["none", score]
    # the MSE asks for the expected logarithm of noisy counts: no rate can be perfect at it
    perfect = score_denoised({"perfect": split.test}, split)
    assert perfect.at["perfect", "mse"] == 0.0 < table.at["none", "mse"]
    for score in ("pearson_cell", "spearman_cell", "pearson_gene", "spearman_gene"):
        assert table.at["true", score] > table.at["none", score]
    assert table.at["true", "pearson_gene"] > table.at["average", "pearson_gene"] + 0.05
    assert table.at["true", "zero_fraction_error"] < table.at["none", "zero_fraction_error"]


def test_correlations_are_over_all_entries(counts, truth):
    split = mcv_split(counts, 0.9, 0)
    true = truth[:, split.gene_kept_G]
    test = split.test.toarray().astype(float)
    log = lambda x: np.log1p(1e4 * x / np.maximum(x.sum(axis=1, keepdims=True), 1e-9))  # noqa: E731
    table = score_denoised({"mine": true}, split)
    by_cell = [stats.spearmanr(a, b).statistic for a, b in zip(log(test), log(true), strict=True)]
    assert table.at["mine", "spearman_cell"] == pytest.approx(np.nanmean(by_cell), abs=1e-5)
    seen = test.sum(axis=0) >= 3
    pairs = zip(log(test).T[seen], log(true).T[seen], strict=True)
    by_gene = [stats.pearsonr(a, b).statistic for a, b in pairs]
    assert table.at["mine", "pearson_gene"] == pytest.approx(np.nanmean(by_gene), abs=1e-5)


def test_rowwise_correlations_and_their_constant_rows():
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, 4, (700, 30)).astype(float), draw.random((700, 30))
    expected = [stats.pearsonr(a, b).statistic for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(rowwise_pearson(left, right), expected)
    expected = [stats.spearmanr(a, b).statistic for a, b in zip(left, right, strict=True)]
    np.testing.assert_allclose(rowwise_spearman(left, right), expected)
    assert rowwise_pearson(left[:1], np.full((1, 30), 0.1)).tolist() == [0.0]
    assert np.isnan(rowwise_pearson(np.ones((1, 30)), right[:1])).all()


def test_gene_statistics_describe_counts_and_draws(counts, truth):
    split = mcv_split(counts, 0.5, 0)
    test = split.test.toarray()
    seen = gene_statistics(split.test, split, counts=True)
    np.testing.assert_allclose(seen["mean"], test.mean(axis=0))
    np.testing.assert_allclose(seen["variance"], test.var(axis=0))
    np.testing.assert_allclose(seen["zeros"], (test == 0).mean(axis=0))
    rate = truth[:, split.gene_kept_G] * split.test_per_train
    drawn = np.random.default_rng(0).poisson(np.tile(rate, (300, 1, 1)))
    expected = gene_statistics(truth[:, split.gene_kept_G], split)
    np.testing.assert_allclose(expected["mean"], drawn.mean(axis=(0, 1)), rtol=0.1, atol=0.01)
    np.testing.assert_allclose(expected["variance"], drawn.var(axis=(0, 1)), rtol=0.15, atol=0.02)
    np.testing.assert_allclose(expected["zeros"], (drawn == 0).mean(axis=(0, 1)), atol=0.01)
    perfect = count_agreement(0.5 * truth[:, split.gene_kept_G], split)
    halved = count_agreement(0.25 * truth[:, split.gene_kept_G], split)
    assert halved["mean_error"] == pytest.approx(perfect["mean_error"] + 1.0, abs=0.35)


def test_expression_bins_are_equal_and_ordered():
    expression = np.array([0.0, 5, 1, 3, 2, 4, 0, 6])
    groups = expression_bins(expression, 3)
    assert [int(mask.sum()) for mask in groups.values()] == [2, 2, 2]
    assert groups["1"].tolist() == [False, False, True, False, True, False, False, False]
    assert not any(mask[0] or mask[6] for mask in groups.values())


@pytest.fixture(scope="module")
def gamma_poisson():
    """Counts whose rates vary around a known mean by a known amount."""
    draw = np.random.default_rng(2)
    mean = np.tile(draw.gamma(1.0, 3.0, 200), (400, 1)) + 0.05
    sd = 0.5 * mean
    rate = draw.gamma((mean / sd) ** 2, sd**2 / mean)
    return mcv_split(draw.poisson(rate), 0.5, 0, drop_unseen=False), 0.5 * mean, 0.5 * sd


@pytest.mark.parametrize("level", [0.5, 0.9])
def test_coverage_is_nominal_exactly_when_the_prediction_is_right(gamma_poisson, level):
    split, mean, sd = gamma_poisson
    right = predictive_coverage(mean, split, sd=sd, levels=[level]).set_index("entries")
    assert right.at["all", "coverage"] == pytest.approx(level, abs=0.006)
    deciles = right["coverage"].drop(["all", "nonzero"])
    assert (deciles - level).abs().max() < 0.03
    assert right.at["all", "coverage_closed"] > right.at["all", "coverage"]
    sure = predictive_coverage(mean, split, levels=[level]).set_index("entries")
    assert sure.at["all", "coverage"] < level - 0.01
    unsure = predictive_coverage(mean, split, sd=3 * sd, levels=[level]).set_index("entries")
    assert abs(unsure.at["all", "coverage"] - level) > 0.01


def test_closed_coverage_equals_quantiles_of_the_distribution(gamma_poisson):
    split, mean, sd = gamma_poisson
    found = predictive_coverage(mean, split, sd=sd, levels=[0.8], most_cells=50)
    cells = np.sort(np.random.default_rng(0).permutation(400)[:50])
    f = split.test_per_train
    shape = (mean[cells] / sd[cells]) ** 2
    chance = shape / (shape + f * mean[cells])
    count = split.test.toarray()[cells]
    low, high = stats.nbinom.ppf(0.1, shape, chance), stats.nbinom.ppf(0.9, shape, chance)
    expected = ((count >= low) & (count <= high)).mean()
    whole = found[found["entries"] == "all"]["coverage_closed"].iloc[0]
    assert whole == pytest.approx(expected, abs=1e-9)


def test_mixture_truth_is_recovered():
    draw = np.random.default_rng(0)
    source = draw.dirichlet(np.full(40, 0.5), 3)
    mix = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.68, 0.16, 0.16], [1 / 3] * 3])
    mix = np.repeat(mix, 30, axis=0)
    depth = draw.uniform(3000, 9000, (len(mix), 1))
    counts = draw.poisson(depth * (mix @ source))
    expected = mixture_expectation(sp.csr_matrix(counts), mix)
    np.testing.assert_allclose(expected.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(expected, mix @ source, atol=0.003)
    noisy = counts / counts.sum(axis=1, keepdims=True)
    assert np.abs(expected - mix @ source).mean() < 0.3 * np.abs(noisy - mix @ source).mean()
    table = score_against_expectation({"counts": counts, "truth": depth * expected}, expected)
    assert table.at["truth", "truth_pearson_cell"] == pytest.approx(1.0)
    assert table.at["counts", "truth_pearson_gene"] < 0.999
    with pytest.raises(DataError, match="sum to 1"):
        mixture_expectation(counts, 2 * mix)
    with pytest.raises(DataError, match="expected \\(150, sources\\)"):
        mixture_expectation(counts, mix[:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d[:, :-1], "expected \\(80, "),
        (lambda d: d - 1e3, "negative"),
        (lambda d: d * np.nan, "not finite"),
    ],
)
def test_denoised_counts_that_cannot_be_scored_are_refused(counts, truth, change, message):
    split = mcv_split(counts, 0.9, 0)
    with pytest.raises(DataError, match=message):
        score_denoised({"mine": change(truth[:, split.gene_kept_G])}, split)
