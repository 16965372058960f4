"""Scores of gene networks against their definitions."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from genemodel.metrics.networks import (
    MatchedPairs,
    Pairs,
    interval,
    rank,
    resampled,
    stability,
)

S, T = 8, 60


@pytest.fixture(scope="module")
def case():
    """Edges that a noisy order knows something of, with ties; loops do not count."""
    rng = np.random.default_rng(4)
    edge_ST = rng.random((S, T)) < 0.12
    counts_ST = np.ones((S, T), bool)
    counts_ST[np.arange(S), np.arange(S)] = False
    edge_ST &= counts_ST
    strength_ST = np.round(edge_ST * 0.8 + rng.normal(size=(S, T)), 1)
    mean_T = rng.gamma(1.0, 1.0, T)
    pairs = Pairs.of(edge_ST, counts_ST)
    return edge_ST, counts_ST, strength_ST, mean_T, pairs, MatchedPairs(pairs, edge_ST, mean_T)


def test_average_precision_is_that_of_scikit_learn_resamples_too(case):
    edge_ST, counts_ST, strength_ST, _, pairs, matched = case
    times_BS = resampled(S, 5, seed=1)
    found = rank(strength_ST, pairs, times_BS, matched)
    for times_S, ratio in zip(times_BS, found.auprc_ratio_B, strict=True):
        weight_N = times_S[pairs.source_N]
        truth_N, strength_N = edge_ST[counts_ST], strength_ST[counts_ST]
        expected = average_precision_score(truth_N, strength_N, sample_weight=weight_N)
        assert ratio == pytest.approx(expected / np.average(truth_N, weights=weight_N))


def test_early_precision_is_the_mean_over_ties_broken_at_random(case):
    edge_ST, counts_ST, strength_ST, _, pairs, matched = case
    found = rank(strength_ST, pairs, resampled(S, 0, 0), matched).epr_B[0]
    truth_N, strength_N = edge_ST[counts_ST], strength_ST[counts_ST]
    k, rng = int(truth_N.sum()), np.random.default_rng(0)
    drawn = []
    for _ in range(4000):
        order = np.lexsort((rng.random(truth_N.size), -strength_N))
        drawn.append(truth_N[order[:k]].mean() / truth_N.mean())
    assert found == pytest.approx(np.mean(drawn), abs=4 * np.std(drawn) / 4000**0.5)
    assert np.std(drawn) > 0  # the case has ties at the border


def test_what_knows_only_how_loud_targets_are_is_at_chance_among_matched_pairs():
    """Loud genes are regulated more: mean expression wins on AUPRC, and not where pairs match."""
    rng = np.random.default_rng(0)
    n_S, n_T = 30, 400
    mean_T = rng.gamma(0.7, 1.0, n_T)
    chance_T = 0.02 + 0.3 * mean_T / mean_T.max()
    edge_ST = rng.random((n_S, n_T)) < chance_T
    pairs = Pairs.of(edge_ST, np.ones((n_S, n_T), bool))
    matched, times_BS = MatchedPairs(pairs, edge_ST, mean_T), resampled(n_S, 100, 0)
    loud = rank(np.broadcast_to(mean_T, (n_S, n_T)), pairs, times_BS, matched)
    assert interval(loud.auprc_ratio_B)[1] > 1.2
    estimate, low, high = interval(loud.matched_auroc_B)
    assert estimate == low == high == 0.5
    knows = rank(edge_ST + rng.normal(size=(n_S, n_T)), pairs, times_BS, matched)
    assert interval(knows.matched_auroc_B)[1] > 0.7


def test_matched_pairs_are_none_of_the_edges_and_lie_on_both_sides(case):
    edge_ST, _, _, mean_T, pairs, matched = case
    edge, other = matched.edge_M, matched.other_M
    assert pairs.edge_N[edge].all() and not pairs.edge_N[other].any()
    assert (pairs.source_N[edge] == pairs.source_N[other]).all()
    louder = mean_T[pairs.target_N[other]] > mean_T[pairs.target_N[edge]]
    for one in np.unique(edge):
        assert louder[edge == one].mean() == 0.5
        assert len(set(other[edge == one])) == (edge == one).sum() <= 10
    assert np.unique(edge).size > 0.8 * edge_ST.sum()


def test_matched_auroc_is_the_auroc_where_all_pairs_match():
    """One source and one edge in the middle: every other pair is on one of its sides."""
    rng = np.random.default_rng(2)
    edge_ST = np.arange(21)[None] == 10
    strength_ST = np.round(rng.normal(size=(1, 21)), 1)
    pairs = Pairs.of(edge_ST, np.ones((1, 21), bool))
    matched = MatchedPairs(pairs, edge_ST, np.arange(21.0), a_side=10)
    found = rank(strength_ST, pairs, resampled(1, 10, 0), matched)
    assert found.matched_auroc_B[0] == pytest.approx(roc_auc_score(edge_ST[0], strength_ST[0]))
    assert np.isnan(interval(found.auprc_ratio_B)[1])  # one source has no interval


def test_pairs_that_nothing_is_said_about_come_last(case):
    edge_ST, _, strength_ST, _, pairs, matched = case
    silent = np.where(edge_ST, np.nan, strength_ST)
    found = rank(silent, pairs, resampled(S, 0, 0), matched)
    assert found.matched_auroc_B[0] == 0
    assert found.epr_B[0] == 0


def test_an_oracle_scores_most_and_its_opposite_nothing(case):
    edge_ST, _, _, _, pairs, matched = case
    times_BS = resampled(S, 20, 0)
    best = rank(edge_ST.astype(float), pairs, times_BS, matched)
    np.testing.assert_allclose(best.auprc_ratio_B[0], 1 / pairs.density)
    np.testing.assert_allclose(best.epr_B[0], 1 / pairs.density)
    assert (best.matched_auroc_B == 1).all()


def test_stability_counts_shared_edges(case):
    _, counts_ST, strength_ST, _, _, _ = case
    assert stability(strength_ST, strength_ST, counts_ST, 30) == 1
    assert stability(np.arange(S * T).reshape(S, T), -np.arange(S * T).reshape(S, T),
                     counts_ST, 30) == 0  # fmt: skip
    assert np.isnan(stability(strength_ST, strength_ST, np.zeros((S, T), bool), 30))


def test_the_interval_of_an_order_by_chance_holds_1():
    """Factors of very different size: 95 % should hold it, and plain quantiles do not."""
    rng = np.random.default_rng(1)
    held = plain = 0
    for _ in range(40):
        edge_ST = rng.random((12, 80)) < rng.beta(0.5, 4, 12)[:, None]
        pairs = Pairs.of(edge_ST, edge_ST.any(1)[:, None] & np.ones(80, bool))
        matched = MatchedPairs(pairs, edge_ST, rng.random(80))
        times_BS = resampled(12, 100, seed=1)
        found = rank(rng.random((12, 80)), pairs, times_BS, matched).auprc_ratio_B
        _, low, high = interval(found)
        held += low <= 1 <= high
        low, high = np.quantile(found[1:], [0.025, 0.975])
        plain += low <= 1 <= high
    assert held >= 34 and held > plain + 3
