"""Molecules are kept at random, each on its own, and none is lost between the two parts."""

import numpy as np
import pytest
from scipy import sparse, stats

from genemodel.expression.thinning import split_molecules, thin


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.mark.parametrize("count", [3.0, 50.0, 5000.0])
def test_thinning_keeps_its_share_of_few_and_of_many_molecules(rng, count):
    kept = thin(np.full(4000, count), np.full(4000, 0.7), rng)
    assert abs(kept.mean() / count - 0.7) < 0.02
    assert (kept == np.rint(kept)).all() and 0 <= kept.min() and kept.max() <= count


def test_what_is_kept_is_binomial(rng):
    kept = thin(np.full(20_000, 12), 0.3, rng)
    expected = 20_000 * stats.binom.pmf(np.arange(13), 12, 0.3)
    seen = np.bincount(kept, minlength=13)
    enough = expected > 5
    assert stats.chisquare(seen[enough], expected[enough] * seen[enough].sum()
                           / expected[enough].sum()).pvalue > 1e-3  # fmt: skip


def test_one_number_and_one_a_count_are_the_same():
    count = np.random.default_rng(0).integers(0, 400, 500)
    one = thin(count, 0.4, np.random.default_rng(1))
    np.testing.assert_array_equal(one, thin(count, np.full(500, 0.4), np.random.default_rng(1)))
    assert one.dtype == count.dtype


def test_split_keeps_every_molecule(rng):
    x = sparse.csr_matrix(rng.poisson(1.0, (40, 30)))
    kept, held = split_molecules(x, 0.7, rng)
    assert ((kept + held) != x).nnz == 0
    assert abs(kept.sum() / x.sum() - 0.7) < 0.05
    assert (kept.data > 0).all() and (held.data > 0).all()
    assert split_molecules(x, 0.7, rng, dtype=np.int64)[0].dtype == np.int64


def test_the_parts_of_poisson_counts_are_independent_given_the_rate(rng):
    x = sparse.csr_matrix(np.tile(rng.poisson(4.0, 20_000), (2, 1)))
    kept, held = split_molecules(x, np.array([0.5, 1.0]), rng)
    first = kept[0].toarray().ravel(), held[0].toarray().ravel()
    assert abs(np.corrcoef(*first)[0, 1]) < 0.03
    assert held[1].nnz == 0  # a probability a cell
