"""A trained imputation model: on disk and back, and given cells that it was not trained on."""

import numpy as np
import pytest
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import Decoder, DecoderSettings, SparseCountEncoder
from genemodel.imputation.starting import start_at_vectors

QUICK = DecoderSettings(hidden=16, latent=4, epochs=3, batch_cells=32, learning_rate=1e-2)
N, G = 90, 50


def counts(seed, n=N):
    rng = np.random.default_rng(seed)
    share = np.random.default_rng(0).dirichlet(np.full(G - 1, 0.5), 3)
    kind = rng.integers(0, 3, n)
    drawn = rng.poisson(share[kind] * 300)
    return sp.csr_matrix(np.c_[drawn, np.zeros(n)]).astype(np.float32)  # the last is never seen


@pytest.fixture(scope="module")
def model():
    batch = np.arange(N) % 2
    return ImputationModel.train(
        counts(1), batch, ("a", "b"), QUICK, genes=[f"g{i}" for i in range(G)], seed=3
    )


def equal(first, second):
    np.testing.assert_array_equal(first.shape_CG, second.shape_CG)
    np.testing.assert_array_equal(first.rate_CG, second.rate_CG)


def test_saved_and_loaded_it_answers_alike(model, tmp_path):
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")  # replaces its own kind
    back = ImputationModel.load(tmp_path / "model")
    assert len(back) == 0 and back.genes == model.genes and back.batches == ("a", "b")
    assert back.settings == QUICK and back.trained.coverage == model.trained.coverage
    new, batch = counts(2, 40), np.arange(40) % 3 - 1
    for options in ({}, {"library": 500.0, "batch": "a"}, {"kind": "decoder"}, {"batch": "mean"}):
        equal(back.of(new, batch).posterior(**options), model.of(new, batch).posterior(**options))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_same_cells_get_the_same_answer(model):
    again = model.of(counts(1), np.arange(N) % 2)
    for options in ({}, {"batch": "b"}, {"kind": "decoder", "rows": [3, 1]}):
        equal(again.posterior(**options), model.posterior(**options))
    np.testing.assert_array_equal(again.draws(2, seed=5), model.draws(2, seed=5))


def test_an_unknown_batch_is_the_mean_of_all(model):
    # Of cells: their own batch is unknown; asked for: as if measured in the mean batch.
    new = counts(2, 20)
    unknown = model.of(new).posterior(kind="decoder")
    known = model.of(new, np.zeros(20, int)).posterior(kind="decoder", batch="mean")
    np.testing.assert_allclose(unknown.mean, known.mean, rtol=1e-6)
    own = model.of(new, np.zeros(20, int)).posterior(kind="decoder")
    assert not np.allclose(unknown.mean, own.mean)


def test_unmeasured_genes_are_predicted_from_the_others(model):
    new = counts(2, 60)
    measured = np.arange(G) % 3 != 0
    hidden = new.copy().tolil()
    hidden[:, ~measured] = 0
    part = model.of(hidden.tocsr(), np.zeros(60, int), measured)
    found = part.posterior()
    # No count speaks against them: their shape is the prior's.
    np.testing.assert_allclose(
        found.shape_CG[:, ~measured], np.tile(1 / model.dispersion_G[~measured], (60, 1))
    )
    # The library was counted on the measured ones, so those keep it and the others come on top.
    prior = part.posterior(kind="decoder").mean
    library = np.asarray(hidden.sum(1)).ravel()
    np.testing.assert_allclose(prior[:, measured].sum(1), library, rtol=1e-3)
    total = np.asarray(new.sum(1)).ravel()
    assert abs(np.median(prior.sum(1) / total) - 1) < 0.1
    # Better than the same gene's average over all cells.
    truth = new.toarray()[:, ~measured]
    average = truth.mean(0) * (total / total.mean())[:, None]
    assert np.square(found.mean[:, ~measured] - truth).mean() < np.square(average - truth).mean()


def test_gene_vectors_are_the_start_where_there_are_any():
    vectors = np.random.default_rng(0).normal(size=(7, 6)).astype(np.float32)
    vectors[2] = np.nan
    random, started = (Decoder.new(7, 1, QUICK).head for _ in range(2))
    encoder = SparseCountEncoder(np.arange(7), 7, QUICK)
    before = started.gene_GD.detach().clone()
    start_at_vectors(encoder, started, vectors)
    known = np.flatnonzero(np.arange(7) != 2)
    assert np.array_equal(started.gene_GD.detach()[2], before[2])
    start = started.gene_GD.detach().numpy()[known]
    centred = vectors[known] - vectors[known].mean(0)
    # Principal components: orthogonal, and as large as the random start.
    products = start.T @ start
    np.testing.assert_allclose(products, np.diag(np.diag(products)), atol=1e-6)
    assert 0.3 < start.std() / random.gene_GD.detach().numpy().std() < 3
    first = np.linalg.svd(centred, full_matrices=False)[0][:, 0]
    assert abs(np.corrcoef(first, start[:, 0])[0, 1]) == pytest.approx(1, abs=1e-4)
    start_at_vectors(encoder, started, np.full((7, 6), np.nan))
    assert np.isfinite(started.gene_GD.detach().numpy()).all()


def test_refusals(model, tmp_path):
    with pytest.raises(DataError, match="3 columns of counts, the model 50 genes"):
        model.of(sp.csr_matrix((2, 3)))
    with pytest.raises(DataError, match="is not an imputation model: it has no model.json"):
        ImputationModel.load(tmp_path)
    (tmp_path / "thesis").mkdir()
    with pytest.raises(DataError, match="is not an imputation model.*another directory"):
        model.save(tmp_path / "thesis")
    model.save(tmp_path / "model")
    genes = tmp_path / "model" / "genes.txt"
    original = genes.read_text()
    genes.write_text(original.replace("g7", "g8"))
    with pytest.raises(DataError, match="genes.txt is damaged.*Copy the whole directory"):
        ImputationModel.load(tmp_path / "model")
    genes.unlink()
    with pytest.raises(DataError, match="genes.txt is missing"):
        ImputationModel.load(tmp_path / "model")
    genes.write_text(original)
    about = tmp_path / "model" / "model.json"
    whole = about.read_text()
    about.write_text(whole.replace("unseen_share", "unseen_sharf"))
    with pytest.raises(DataError, match="checksum of itself does not fit"):
        ImputationModel.load(tmp_path / "model")
    about.write_text(whole.replace('"format": 4', '"format": 5'))
    with pytest.raises(DataError, match="of format 5; this version reads up to 4. Upgrade"):
        ImputationModel.load(tmp_path / "model")
