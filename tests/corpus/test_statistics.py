"""Gene averages and principal components of a corpus against slow oracles."""

import numpy as np
import pytest

from genemodel.corpus.corpus import Corpus
from genemodel.corpus.statistics import GeneStatistics, PrincipalGenes


@pytest.fixture(scope="module")
def opened(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    counts = corpus.read(0, len(corpus)).to_csr(len(corpus.vocabulary)).toarray()
    codes, names = corpus.codes("species")
    return corpus, counts.astype(float), np.array(names)[codes]


def test_averages_equal_dense_ones(opened):
    corpus, counts, species = opened
    cells = np.arange(0, len(corpus), 2)
    got = GeneStatistics.measure(corpus, cells)
    x, library = counts[cells], counts[cells].sum(1)
    for s, name in enumerate(corpus.vocabulary.species):
        rows = species[cells] == name
        seen = (x[rows] > 0).sum(0)
        genes = np.flatnonzero(seen)
        value = np.log1p(x[rows] / library[rows, None] * 1e4)
        np.testing.assert_allclose(
            got.mean_value_SV[s, genes], value.sum(0)[genes] / seen[genes], rtol=1e-6
        )
        np.testing.assert_allclose(
            got.rate_SV[s, genes], (x[rows].sum(0)[genes] + 0.01) / library[rows].sum(), rtol=1e-6
        )
        own = corpus.vocabulary.tokens_of(name)
        expected = (seen[own] + 0.5) / (seen[own] + 0.5).sum()
        np.testing.assert_allclose(got.frequency_SV[s, own], expected, rtol=1e-6)
        assert got.frequency_SV[s].sum() == pytest.approx(1)


def test_dispersion_finds_what_was_planted(opened):
    """Moments on negative-binomial counts with θ = 2 give about 2, on Poisson counts far more."""
    corpus, _, _ = opened
    rng = np.random.default_rng(0)
    library = rng.uniform(500, 3000, 4000)
    rate = 0.01
    mean = rate * library
    for theta, low, high in ((2.0, 1.6, 2.5), (np.inf, 20, np.inf)):
        x = rng.poisson(mean if np.isinf(theta) else mean * rng.gamma(theta, 1 / theta, 4000))
        excess = ((x - mean) ** 2 - mean).sum()
        estimate = (mean**2).sum() / max(excess, 1e-9)
        assert low < estimate < high


def test_components_equal_a_dense_svd_of_species_centred_values(opened):
    corpus, counts, species = opened
    got = PrincipalGenes.measure(corpus, np.arange(len(corpus)), 5, sample=10_000)
    # Genes that no cell has are none of the decomposition, and most of the vocabulary.
    seen = counts.any(0)
    value = np.log1p(counts[:, seen] / counts.sum(1, keepdims=True) * 1e4)
    centred = value.copy()
    for name in np.unique(species):
        centred[species == name] -= value[species == name].mean(0)
    _, size, Vt = np.linalg.svd(centred, full_matrices=False)
    scores = value @ got.loading_VK[seen]
    for s, name in enumerate(corpus.vocabulary.species):
        scores[species == name] += got.offset_SK[s]
    np.testing.assert_allclose(scores.std(0), 1.0, rtol=0.05)
    np.testing.assert_allclose(scores.mean(0), 0.0, atol=1e-3)
    # Neighbouring components of a flat spectrum may mix; how much they explain may not change.
    spread = 1 / np.linalg.norm(got.loading_VK, axis=0)
    np.testing.assert_allclose(spread, size[:5] / np.sqrt(len(corpus)), rtol=0.05)
    expected = centred @ Vt[0]
    assert abs(np.corrcoef(scores[:, 0], expected)[0, 1]) > 0.98
