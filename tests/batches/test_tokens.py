"""Ranking against a slow oracle; published sequences against a transcription of their papers."""

import numpy as np
import pytest

from genemodel.batches.tokens import (
    TokenSettings,
    pack_cells,
    rank_cells,
)
from genemodel.errors import ConfigError


def ragged(rng, n_cells=40, n_vocabulary=500, longest=200):
    lengths = rng.integers(0, longest, n_cells)
    lengths[:3] = 0, 1, longest
    starts_C1 = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    gene_N = np.concatenate(
        [np.sort(rng.choice(n_vocabulary, n, replace=False)) for n in lengths]
    ).astype(np.int32)
    count_N = (rng.geometric(0.4, gene_N.size)).astype(np.float32)
    # Few distinct medians, so that ties are common.
    inverse_median_V = rng.choice([1.0, 0.5, 0.25, 0.37], n_vocabulary).astype(np.float32)
    return starts_C1, gene_N, count_N, inverse_median_V


def rank_cells_reference(
    starts_C1: np.ndarray,
    gene_N: np.ndarray,
    count_N: np.ndarray,
    inverse_median_V: np.ndarray,
    limit: int,
) -> list[np.ndarray]:
    """Say slowly what `rank_cells` does: one array of positions into ``gene_N`` a cell."""
    cells = []
    for lo, hi in zip(starts_C1[:-1], starts_C1[1:], strict=True):
        value = count_N[lo:hi].astype(np.float32) * inverse_median_V[gene_N[lo:hi]]
        order = np.lexsort((gene_N[lo:hi], -value))
        cells.append(lo + order[:limit])
    return cells


@pytest.mark.parametrize("limit", [1, 17, 1000])
def test_radix_ranking_equals_the_slow_oracle(limit):
    starts_C1, gene_N, count_N, inverse = ragged(np.random.default_rng(0))
    out_starts = np.empty_like(starts_C1)
    out = np.empty(gene_N.size, np.int64)
    rank_cells(starts_C1, gene_N, count_N, inverse, limit, out_starts, out)
    expected = rank_cells_reference(starts_C1, gene_N, count_N, inverse, limit)
    for c, cell in enumerate(expected):
        np.testing.assert_array_equal(out[out_starts[c] : out_starts[c + 1]], cell)


def test_ties_go_to_the_smaller_token():
    starts = np.array([0, 4], np.int64)
    gene = np.array([3, 5, 7, 9], np.int32)
    count = np.array([2, 2, 5, 2], np.float32)
    out, out_starts = np.empty(4, np.int64), np.empty(2, np.int64)
    rank_cells(starts, gene, count, np.ones(10, np.float32), 10, out_starts, out)
    assert gene[out].tolist() == [7, 3, 5, 9]


def test_packed_cells_keep_values_and_open_with_the_cell_token():
    rng = np.random.default_rng(1)
    starts_C1, gene_N, count_N, inverse = ragged(rng)
    cells = np.array([5, 2, 0, 7])
    library = np.array([1000.0, 2000.0, 1.0, 500.0], np.float32)
    budget = 600
    gene_T, rank_T, segment_T = (np.empty(budget, np.int64) for _ in range(3))
    value_T = np.empty(budget, np.float32)
    out_starts = np.empty(16, np.int32)
    n_full = int((starts_C1[cells + 1] - starts_C1[cells]).sum())
    full_gene, full_cell = np.empty(n_full, np.int64), np.empty(n_full, np.int64)
    full_count = np.empty(n_full, np.float32)
    count_N[:50] += 100  # beyond the table of logarithms
    n = pack_cells(
        starts_C1[cells], starts_C1[cells + 1], gene_N, count_N, inverse, library, 50, 2, 0,
        gene_T, value_T, rank_T, segment_T, out_starts, full_gene, full_count, full_cell,
    )  # fmt: skip
    expected = rank_cells_reference(starts_C1, gene_N, count_N, inverse, 50)
    for place, c in enumerate(cells):
        a, b = out_starts[place], out_starts[place + 1]
        assert gene_T[a] == 2 and value_T[a] == 0 and rank_T[a] == 0
        np.testing.assert_array_equal(gene_T[a + 1 : b], gene_N[expected[c]])
        np.testing.assert_allclose(
            value_T[a + 1 : b],
            np.log1p(count_N[expected[c]] / library[place] * 1e4),
            rtol=1e-5,
        )
        np.testing.assert_array_equal(rank_T[a:b], np.arange(b - a))
        assert (segment_T[a:b] == place).all()
        # Beyond the context too, in storage order.
        stored = slice(starts_C1[c], starts_C1[c + 1])
        np.testing.assert_array_equal(full_gene[full_cell == place], gene_N[stored])
        np.testing.assert_array_equal(full_count[full_cell == place], count_N[stored])
    assert n == out_starts[4]
    # The tail lies in pieces of a full cell's length.
    assert out_starts[4:].tolist() == [min(n + 51 * i, budget) for i in range(12)]
    assert (gene_T[n:] == 0).all()
    np.testing.assert_array_equal(segment_T[n:], 4 + np.arange(budget - n) // 51)


def test_settings_refuse_impossible_shapes():
    with pytest.raises(ConfigError, match="tokens.budget is 100"):
        TokenSettings(context=200, budget=100)
    with pytest.raises(ConfigError, match="tokens.context is 1"):
        TokenSettings(context=1)
