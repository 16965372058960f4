"""Molecules shared out: binomial, by address, and the same whatever lies beside."""

import numpy as np
import pytest
import scipy.sparse as sp
from scipy import stats

from genemodel.batches.held import HeldCells
from genemodel.batches.loader import CellStream
from genemodel.batches.order import Position
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.views import View, binomial


@pytest.mark.parametrize(
    ("n", "p"), [(1, 0.3), (2, 0.9), (7, 0.5), (40, 0.05), (200, 0.97), (201, 0.4), (5000, 0.01)]
)
def test_draws_are_binomial(n, p):
    bits = np.random.default_rng(0).integers(0, 2**64, 20_000, dtype=np.uint64)
    drawn = np.array([binomial(n, p, b) for b in bits])
    assert drawn.min() >= 0 and drawn.max() <= n
    exact = stats.binom(n, p)
    assert abs(drawn.mean() - exact.mean()) < 4 * exact.std() / np.sqrt(drawn.size)
    assert drawn.var() == pytest.approx(exact.var(), rel=0.06)
    for k in (exact.ppf(0.1), exact.median(), exact.ppf(0.9)):
        assert (drawn <= k).mean() == pytest.approx(exact.cdf(k), abs=0.02)
    assert binomial(n, 0.0, bits[0]) == 0 and binomial(n, 1.0, bits[0]) == n


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    return sp.csr_matrix(rng.poisson(rng.gamma(0.3, 8, (200, 40))).astype(np.float32))


def shared_out(counts, view, rows, epoch=0):
    part = counts[rows]
    there, shown = view.apply(
        part.indptr[:-1], part.indptr[1:], part.indices, part.data, np.asarray(rows), epoch
    )
    return [
        sp.csr_matrix((values, part.indices, part.indptr), part.shape).toarray()
        for values in (there, shown)
    ]


def test_a_cell_is_shared_out_alike_in_any_company(counts):
    view = View(3, 0.2, 0.9, aside=0.1)
    every = shared_out(counts, view, np.arange(200))
    some = shared_out(counts, view, np.array([7, 150, 3]))
    for whole, part in zip(every, some, strict=True):
        np.testing.assert_array_equal(whole[[7, 150, 3]], part)
    later = shared_out(counts, view, np.arange(200), epoch=1)
    np.testing.assert_array_equal(every[0], later[0])  # set aside for good
    assert (every[1] != later[1]).mean() > 0.1  # shown anew
    half = View(3, 0.5, 0.5)  # the same share in every pass, of other molecules
    one, two = (shared_out(counts, half, np.arange(200), epoch=e)[1] for e in (0, 1))
    assert (one != two).mean() > 0.1
    other = shared_out(counts, View(4, 0.2, 0.9, aside=0.1), np.arange(200))
    assert (every[0] != other[0]).any()


def test_what_is_set_aside_is_what_is_judged(counts):
    rows, whole = np.arange(200), counts.toarray()
    rest, shown = shared_out(counts, View(0, 0.5, 0.5, aside=0.2), rows)
    there, seen = shared_out(counts, View(0, aside=0.2, judged=True), rows)
    np.testing.assert_array_equal(there, whole)
    np.testing.assert_array_equal(seen, rest)
    assert (shown <= rest).all()
    assert rest.sum() / whole.sum() == pytest.approx(0.8, abs=0.01)
    assert shown.sum() / rest.sum() == pytest.approx(0.5, abs=0.02)
    # The two draws of one molecule have nothing to do with each other.
    apart = np.corrcoef((whole - rest)[whole == 1], shown[whole == 1])[0, 1]
    kept = (whole == 1) & (rest == 1)
    assert apart < 0 and shown[kept].mean() == pytest.approx(0.5, abs=0.05)


def test_the_share_is_uniform_between_its_bounds(counts):
    deep = sp.csr_matrix(np.full((3000, 1), 200_000, np.float32))
    there, shown = shared_out(deep, View(0, 0.3, 0.7), np.arange(3000))
    share = (shown / there)[:, 0]
    assert 0.295 < share.min() < 0.302 and 0.698 < share.max() < 0.705
    assert stats.kstest((share - 0.3) / 0.4, "uniform").pvalue > 0.01


def stream(counts, view=None, n_tokens=None, **options):
    cells = HeldCells(counts, where="cells")
    return CellStream(
        cells, np.arange(len(cells)), TokenSettings(16, 256, 40), seed=0, view=view,
        inverse_median_V=np.ones(40, np.float32), layout=cells.layout, n_tokens=n_tokens, **options,
    )  # fmt: skip


def test_tokens_are_of_what_is_shown_and_counts_of_what_is_there(counts):
    view = View(0, 0.2, 0.5)
    there, shown = shared_out(counts, view, np.arange(200))
    for batch, _ in stream(counts, view, endless=False):
        cell_C = batch.cell_C[: batch.n_cells].numpy()
        for place, cell in enumerate(cell_C):
            mine = (batch.full_cell_N == place).numpy()
            genes = batch.full_gene_N.numpy()[mine]
            np.testing.assert_array_equal(batch.full_count_N.numpy()[mine], there[cell, genes])
            np.testing.assert_array_equal(batch.shown_N.numpy()[mine], shown[cell, genes])
            a, b = batch.starts_C1[place : place + 2].tolist()
            order = np.lexsort((np.arange(40), -shown[cell]))
            order = order[shown[cell][order] > 0][:15]
            assert batch.gene_T[a + 1 : b].tolist() == order.tolist()
            assert batch.library_C[place] == max(1, shown[cell].sum())


def test_genes_beyond_the_tokens_are_no_tokens(counts):
    for batch, _ in stream(counts, n_tokens=25, endless=False):
        assert batch.full_gene_N.max() > 25
        real = batch.gene_T[: batch.n_tokens]
        assert real.max() < 25
        known = batch.per_cell(batch.full_count_N * (batch.full_gene_N < 25))
        np.testing.assert_array_equal(batch.library_C[: batch.n_cells], known.clamp_min(1))


def test_a_stream_of_held_cells_goes_on_exactly(counts):
    view = View(1, 0.3, 0.9)
    whole = [next_ for _, next_ in zip(range(12), stream(counts, view), strict=False)]
    position = Position.of({"taken": whole[4][1].taken, "lanes": whole[4][1].lanes})
    again = stream(counts, view, position=position)
    for (batch, _), (other, _) in zip(whole[5:], again, strict=False):
        np.testing.assert_array_equal(batch.cell_C, other.cell_C)
        np.testing.assert_array_equal(batch.shown_N, other.shown_N)
        assert batch.epoch == other.epoch


def test_every_held_cell_comes_once_an_epoch(counts):
    seen = np.concatenate([b.cell_C[: b.n_cells].numpy() for b, _ in stream(counts, endless=False)])
    assert sorted(seen) == list(range(200)) and (np.diff(seen) != 1).mean() > 0.9
