"""Rows, thinning and gene choice beneath an integration."""

import numpy as np
from genemodel.adapt.variable_genes import select_genes
from scipy import sparse

from genemodel.adapt.integration import _Rows, thin, train_integration
from genemodel.adapt.integration_net import IntegrationSettings


def random_counts(n=60, genes=30, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(0.8, (n, genes)).astype(np.float32))


def test_rows_are_those_of_the_matrix_and_thinning_only_takes_away():
    counts = random_counts()
    rows = _Rows(counts, np.random.default_rng(1))
    cells = np.array([5, 0, 59, 5])
    np.testing.assert_array_equal(rows.full(cells).numpy(), counts[cells].toarray())
    view, full = rows.pair(cells, 0.3)
    np.testing.assert_array_equal(full.numpy(), counts[cells].toarray())
    assert (view <= full).all() and view.sum() < full.sum()
    view, full = rows.pair(cells, 1.0)
    assert view is full


def test_thinning_keeps_its_share_of_few_and_of_many_molecules():
    rng = np.random.default_rng(0)
    for count in (3.0, 50.0, 5000.0):
        kept = thin(np.full(4000, count), np.full(4000, 0.7), rng)
        assert abs(kept.mean() / count - 0.7) < 0.02
        assert (kept == np.rint(kept)).all() and kept.max() <= count


def test_genes_that_vary_within_batches_are_chosen_and_not_those_between():
    rng = np.random.default_rng(0)
    mean = np.tile(rng.uniform(2, 6, 120), (400, 1))
    batch = np.repeat([0, 1], 200)
    mean[:, :10] *= rng.gamma(2, 0.5, (400, 1))  # vary among the cells of a batch
    mean[batch == 1, 10:20] *= 1.6  # differ between the batches alone
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    chosen = set(select_genes(counts, batch, 10).tolist())
    assert len(chosen & set(range(10))) >= 9
    assert not chosen & set(range(10, 20))
    np.testing.assert_array_equal(select_genes(counts, batch, 500), np.arange(120))


def test_cell_vectors_are_standardised_and_missing_ones_are_neutral():
    counts, batch = random_counts(), np.arange(60) % 2
    vectors = np.random.default_rng(0).normal(5, 3, (60, 4)).astype(np.float32)
    vectors[7] = np.nan
    settings = IntegrationSettings(steps=3, passes=0, hidden=8, rank=4, latent=3)
    trained = train_integration(counts, batch, cell_features_CF=vectors, settings=settings)
    known = np.delete(vectors, 7, 0)
    np.testing.assert_allclose(trained.net.feature_mean_F, known.mean(0), rtol=1e-5)
    assert np.isfinite(trained.embedding_CD).all()
    assert len(trained.history) == 3 and set(trained.history[0]) == {"counts", "kl"}


def test_passes_raise_the_number_of_steps():
    counts, batch = random_counts(), np.arange(60) % 2
    settings = IntegrationSettings(
        steps=2, passes=3, batch_cells=10, hidden=8, rank=4, latent=3, correct=False
    )
    trained = train_integration(counts, batch, settings=settings)
    assert len(trained.history) == 18
    assert trained.correction is None
    np.testing.assert_array_equal(trained.embedding_CD, trained.latent_CD)
