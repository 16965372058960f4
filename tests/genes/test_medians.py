import io

import numpy as np
import pytest
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.genes import NonzeroMedians
from genemodel.genes.medians import RELATIVE_ERROR

N_TOKENS = 150


def counts(seed, n_cells=157, top=65_535):
    """Counts of every size: few and many cells per token, small and large values, empty rows."""
    rng = np.random.default_rng(seed)
    values = np.exp(rng.normal(rng.uniform(0, 7, N_TOKENS), 2.0, (n_cells, N_TOKENS)))
    seen = rng.random((n_cells, N_TOKENS)) < rng.random(N_TOKENS)
    dense = np.where(seen, np.clip(np.floor(values), 0, top), 0.0)
    dense[:, 5] = 0
    dense[:, 6] = 0
    dense[0, 6] = top
    dense[11] = 0
    return dense


def oracle(dense):
    """Median of the non-zero values of every column."""
    return np.array([np.median(c[c > 0]) if (c > 0).any() else np.nan for c in dense.T])


def filled(dense, *, chunk=50, dtype=np.float32, **settings):
    medians = NonzeroMedians(dense.shape[1], **settings)
    for start in range(0, len(dense), chunk):
        medians.update(sp.csr_matrix(dense[start : start + chunk].astype(dtype)))
    return medians


def same(a, b):
    left, right = a.state(), b.state()
    assert left.keys() == right.keys()
    order = [np.lexsort((s["page_N"], s["token_N"])) for s in (left, right)]
    for key in left:
        x, y = (
            s[key][o] if key.endswith(("_N", "_NS")) else s[key]
            for s, o in zip((left, right), order, strict=True)
        )
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.float32, np.float64])
def test_raw_medians_are_exact(dtype):
    dense = counts(0)
    medians = filled(dense, dtype=dtype)
    assert medians.exact
    np.testing.assert_array_equal(medians.medians_V(), oracle(dense).astype(np.float32))
    assert medians.medians_V().dtype == np.float32
    np.testing.assert_array_equal(medians.sum_V, dense.sum(axis=0))
    np.testing.assert_array_equal(medians.nonzero_V, (dense > 0).sum(axis=0))
    assert medians.n_cells == len(dense)


def test_even_numbers_of_cells_average_the_two_middle_values():
    dense = np.array([[1, 4, 300], [2, 0, 60_000], [0, 5, 70], [9, 0, 80]], dtype=float)
    assert filled(dense).medians_V().tolist() == [2.0, 4.5, 190.0]


def test_counts_above_the_cap_are_binned_within_the_stated_error():
    dense = counts(1, top=2_000_000_000) * np.array([1, 1000] * (N_TOKENS // 2))
    medians = filled(np.minimum(dense, 2**31 - 129), dtype=np.float64)
    expected = oracle(np.minimum(dense, 2**31 - 129))
    seen = ~np.isnan(expected)
    assert (expected[seen] > 65_535).any()
    error = np.abs(medians.medians_V()[seen] / expected[seen] - 1)
    assert error.max() <= RELATIVE_ERROR + 1e-6
    assert (error[expected[seen] <= 30_000] <= RELATIVE_ERROR).all()


def test_memory_bound_bins_large_counts_and_says_so():
    dense = counts(2)
    full = filled(dense)
    limit = full.state()["token_N"].size // 2
    small = filled(dense, max_pages=limit)
    assert not small.exact
    assert small.state()["token_N"].size < full.state()["token_N"].size
    expected = oracle(dense)
    seen = ~np.isnan(expected)
    np.testing.assert_allclose(small.medians_V()[seen], expected[seen], rtol=RELATIVE_ERROR + 1e-6)
    low = seen & (dense.max(axis=0) < 256)
    assert low.any()
    np.testing.assert_array_equal(small.medians_V()[low], expected[low])
    np.testing.assert_array_equal(small.nonzero_V, full.nonzero_V)
    # Order and grouping do not matter, not even to what is binned.
    same(small, filled(dense[::-1], chunk=13, max_pages=limit))


def test_per_10k_medians_are_within_the_stated_error():
    dense = counts(3)
    dense[:, 7] = 1  # the smallest shares there are
    medians = filled(dense, per_10k=True)
    share = dense / np.maximum(dense.sum(axis=1, keepdims=True), 1) * 1e4
    expected = oracle(share)
    seen = ~np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(medians.medians_V()), ~seen)
    np.testing.assert_allclose(
        medians.medians_V()[seen], expected[seen], rtol=RELATIVE_ERROR + 1e-6
    )
    np.testing.assert_array_equal(medians.sum_V, dense.sum(axis=0))
    assert not medians.exact


def test_library_is_the_total_that_per_10k_divides_by():
    dense = counts(4, top=500)
    library = dense.sum(axis=1) * 3 + 100
    medians = NonzeroMedians(N_TOKENS, per_10k=True)
    medians.update(sp.csr_matrix(dense), library)
    expected = oracle(dense / library[:, None] * 1e4)
    seen = ~np.isnan(expected)
    np.testing.assert_allclose(
        medians.medians_V()[seen], expected[seen], rtol=RELATIVE_ERROR + 1e-6
    )
    # A library of 10,000 for every cell leaves the counts as they are.
    few = sp.csr_matrix(np.minimum(dense, 20))
    level = NonzeroMedians(N_TOKENS, per_10k=True)
    level.update(few, np.full(len(dense), 10_000))
    np.testing.assert_allclose(level.medians_V(), oracle(few.toarray()), rtol=RELATIVE_ERROR + 1e-6)


@pytest.mark.parametrize("settings", [{}, {"per_10k": True}, {"max_pages": 400}])
def test_merge_is_associative_and_equals_one_pass(settings):
    parts = [counts(seed, n_cells=60) for seed in (10, 11, 12)]
    whole = filled(np.concatenate(parts), **settings)

    def part(i):
        return filled(parts[i], **settings)

    same(part(0).merge(part(1)).merge(part(2)), whole)
    same(part(0).merge(part(1).merge(part(2))), whole)
    same(part(2).merge(part(0)).merge(part(1)), whole)
    same(NonzeroMedians(N_TOKENS, **settings).merge(whole), whole)
    assert whole.exact is (settings == {})


def test_merging_a_binned_and_an_exact_part_leaves_the_exact_one_alone():
    exact, binned = filled(counts(20)), filled(counts(21), max_pages=300)
    before = exact.medians_V()
    merged = NonzeroMedians.from_state(binned.state()).merge(exact)
    assert not merged.exact
    assert exact.exact
    np.testing.assert_array_equal(exact.medians_V(), before)
    same_way = NonzeroMedians.from_state(exact.state())
    same_way.merge(binned)
    np.testing.assert_array_equal(same_way.medians_V(), merged.medians_V())


@pytest.mark.parametrize("per_10k", [False, True])
def test_state_survives_a_file(per_10k):
    medians = filled(counts(5), per_10k=per_10k)
    stream = io.BytesIO()
    np.savez(stream, **medians.state())
    stream.seek(0)
    with np.load(stream, allow_pickle=False) as stored:
        again = NonzeroMedians.from_state(dict(stored))
    same(again, medians)
    more = sp.csr_matrix(counts(6))
    again.update(more)
    medians.update(more)
    same(again, medians)
    np.testing.assert_array_equal(again.medians_V(), medians.medians_V())


def test_damaged_states_are_refused():
    state = filled(counts(7)).state()
    with pytest.raises(DataError, match="lack sum_V"):
        NonzeroMedians.from_state({k: v for k, v in state.items() if k != "sum_V"})
    with pytest.raises(DataError, match="damaged"):
        NonzeroMedians.from_state({**state, "count_NS": state["count_NS"] * 2})


def test_explicit_zeros_and_duplicate_free_layouts_do_not_matter():
    dense = counts(8)
    X = sp.csr_matrix(dense)
    with_zeros = sp.csr_matrix(
        (np.append(X.data, 0.0), np.append(X.indices, 0), np.append(X.indptr[:-1], X.nnz + 1)),
        shape=X.shape,
    )
    medians = NonzeroMedians(N_TOKENS)
    medians.update(with_zeros)
    same(medians, filled(dense))
    shuffled = NonzeroMedians(N_TOKENS)
    shuffled.update(X[:, np.arange(N_TOKENS)[::-1]][:, np.arange(N_TOKENS)[::-1]])
    same(shuffled, filled(dense))


@pytest.mark.parametrize(
    ("dense", "settings", "message"),
    [
        ([[0.5, 1.0]], {}, "fractions.*0.5.*per_10k=True"),
        ([[-1.0, 1.0]], {}, "negative.*-1"),
        ([[np.nan, 1.0]], {"per_10k": True}, "NaN or infinite"),
        ([[np.inf, 1.0]], {}, "NaN or infinite"),
        ([[3e9, 1.0]], {}, "above 2,147,483,647"),
        ([[1.0, 1.0, 1.0]], {}, "3 columns.*2 tokens"),
    ],
)
def test_what_is_not_counts_is_refused(dense, settings, message):
    medians = NonzeroMedians(2, **settings)
    with pytest.raises(DataError, match=message):
        medians.update(sp.csr_matrix(np.array(dense)))
    assert medians.n_cells == 0
    assert not medians.nonzero_V.any()


def test_impossible_libraries_and_merges_are_refused():
    X = sp.csr_matrix(np.array([[1.0, 2.0], [5.0, 5.0]]))
    medians = NonzeroMedians(2, per_10k=True)
    with pytest.raises(DataError, match="cell 1: library 4 is below the sum of its counts 10 or"):
        medians.update(X, [3, 4])
    with pytest.raises(DataError, match=r"shape \(3,\).*2 cells"):
        medians.update(X, [3, 4, 5])
    with pytest.raises(DataError, match="2 tokens.*cannot take in those of 3"):
        NonzeroMedians(2).merge(NonzeroMedians(3))


def test_fractional_counts_are_accepted_per_10k():
    dense = np.array([[0.5, 1.5], [0.25, 0.75]])
    medians = filled(dense, per_10k=True, dtype=np.float64)
    np.testing.assert_allclose(medians.medians_V(), [2500, 7500], rtol=RELATIVE_ERROR + 1e-6)


def test_damaged_sparse_counts_are_refused():
    X = sp.csr_matrix(counts(9))
    X.indices[0] = N_TOKENS
    with pytest.raises(DataError, match=f"entry in column {N_TOKENS} of {N_TOKENS}"):
        NonzeroMedians(N_TOKENS).update(X)


def test_shares_below_the_smallest_bin_stay_in_it():
    medians = filled(np.array([[1e-12, 1.0]]), per_10k=True, dtype=np.float64)
    assert 2.0**-24 < medians.medians_V()[0] < 2.0**-23
