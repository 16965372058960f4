"""Rows and steps beneath an integration."""

import numpy as np
from scipy import sparse

from genemodel.adapt.integration import _Rows, train_integration
from genemodel.adapt.integration_net import IntegrationSettings


def random_counts(n=60, genes=30, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(0.8, (n, genes)).astype(np.float32))


def test_rows_are_those_of_the_matrix_and_thinning_only_takes_away():
    counts = random_counts()
    rows = _Rows(counts, np.random.default_rng(1))
    cells = np.array([5, 0, 59, 5])
    np.testing.assert_array_equal(rows.full(cells).numpy(), counts[cells].toarray())
    view, (row, gene, count) = rows.pair(cells, 0.3)
    full = counts[cells].toarray()
    np.testing.assert_array_equal(
        sparse.coo_matrix((count, (row, gene)), full.shape).toarray(), full
    )
    assert (view.numpy() <= full).all() and view.sum() < full.sum()
    view, _ = rows.pair(cells, 1.0)
    np.testing.assert_array_equal(view.numpy(), full)


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
