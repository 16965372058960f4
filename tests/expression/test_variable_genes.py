"""Genes that vary beyond their level, and not for other reasons."""

import numpy as np
from anndata import AnnData
from scipy import sparse

from genemodel.expression.variable_genes import select_genes, variable_counts


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


def test_genes_that_vary_beyond_their_mean_are_chosen():
    rng = np.random.default_rng(7)
    rate = np.exp(rng.normal(0, 1.5, 300))
    counts = rng.poisson(rate, (500, 300))
    loud = np.argsort(rate)[200:210]
    counts[:250, loud] = rng.poisson(3 * rate[loud], (250, 10))
    assert set(variable_counts(sparse.csr_matrix(counts), 10)) == set(loud)


def test_most_are_those_of_scanpy():
    """Its dispersions and those of Seurat are the same idea: nine in ten genes agree."""
    import scanpy as sc

    rng = np.random.default_rng(0)
    rate = rng.gamma(0.5, 2.0, 800) * rng.gamma(1.0, 1.0, (4, 800))[rng.integers(0, 4, 600)]
    rate *= 2000 / rate.sum(1, keepdims=True)
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.float32))
    data = AnnData(counts.copy())
    sc.pp.normalize_total(data, target_sum=1e4)
    sc.pp.log1p(data)
    theirs = sc.pp.highly_variable_genes(data, n_top_genes=200, inplace=False)["highly_variable"]
    ours = select_genes(counts, np.zeros(600, int), 200)
    assert theirs.to_numpy()[ours].mean() > 0.9
