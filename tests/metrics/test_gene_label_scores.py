"""Areas under curves of genes against scikit-learn, and their intervals."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from genemodel.metrics.gene_labels import auroc_gain, gene_scores


def two(score_G):
    """As log odds of two labels."""
    return np.column_stack([-score_G / 2, score_G / 2])


@pytest.fixture(scope="module")
def genes():
    rng = np.random.default_rng(0)
    code_G = (rng.random(300) < 0.3).astype(int)
    return code_G, np.round(rng.normal(size=300) + code_G, 1)  # with ties


def test_areas_are_those_of_scikit_learn_with_ties(genes):
    code_G, score_G = genes
    found = gene_scores(code_G, two(score_G), draws=0)
    assert found.auroc == pytest.approx(roc_auc_score(code_G, score_G))
    assert found.auprc == pytest.approx(average_precision_score(code_G, score_G))
    assert (found.genes, found.positives) == (300, code_G.sum())
    assert np.isnan(found.auroc_low)


def test_several_labels_are_one_against_the_others():
    rng = np.random.default_rng(1)
    code_G = rng.integers(0, 3, 200)
    score_GL = rng.normal(size=(200, 3)) + 1.5 * np.eye(3)[code_G]
    found = gene_scores(code_G, score_GL, draws=0)
    each = [roc_auc_score(code_G == k, score_GL[:, k]) for k in range(3)]
    assert found.auroc == pytest.approx(np.mean(each))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Normal scores one deviation apart: an area of .7602."""
    rng = np.random.default_rng(2)
    held = 0
    for trial in range(100):
        code_G = np.repeat([0, 1], [60, 40])
        found = gene_scores(code_G, two(rng.normal(size=100) + code_G), draws=200, seed=trial)
        held += found.auroc_low <= 0.7602 <= found.auroc_high
    assert 85 <= held <= 100


def test_unpredicted_genes_are_left_out_and_a_label_without_genes_has_no_area(genes):
    code_G, score_G = genes
    part = two(score_G)
    part[:50] = np.nan
    assert gene_scores(code_G, part, draws=0).auroc == pytest.approx(
        roc_auc_score(code_G[50:], score_G[50:])
    )
    none = gene_scores(np.zeros(300, int), two(score_G))
    assert np.isnan(none.auroc) and np.isnan(none.auprc_high)


def test_a_gain_is_of_the_same_genes_and_draws(genes):
    code_G, score_G = genes
    assert auroc_gain(code_G, two(score_G), two(score_G)) == (0.0, 0.0, 0.0)
    rng = np.random.default_rng(3)
    worse_G = score_G + rng.normal(size=300)
    gain, low, high = auroc_gain(code_G, two(score_G), two(worse_G))
    expected = roc_auc_score(code_G, score_G) - roc_auc_score(code_G, worse_G)
    assert gain == pytest.approx(expected) and low < gain < high
    # Paired draws tell more than the two intervals do apart.
    first, second = gene_scores(code_G, two(score_G)), gene_scores(code_G, two(worse_G))
    apart = np.hypot(first.auroc_high - first.auroc_low, second.auroc_high - second.auroc_low)
    assert high - low < apart
