"""Every baseline on small generated data: it runs, keeps the order of cells, and does its job."""

import importlib.util
import logging
import warnings

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import DataError
from genemodel.evaluation import baselines, imputation_baselines, seurat
from genemodel.evaluation.baselines import Conditions, highly_variable
from genemodel.expression.normalise import log_normalised
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import DecoderSettings
from genemodel.metrics.imputation import mcv_split, score_denoised
from genemodel.metrics.light import knn_accuracy, same_batch_share

INSTALLED = {
    name: importlib.util.find_spec(name) is not None for name in ("harmonypy", "scanorama", "scvi")
}


def needs(package):
    return pytest.mark.skipif(
        not INSTALLED[package],
        reason=f"{package} is not installed: pip install 'genemodel[bench]'",
    )


def generated(n_cells=240, n_genes=150, effect=1.0, seed=0):
    """Three types in two batches; a batch multiplies genes at random by up to e^effect."""
    draw = np.random.default_rng(seed)
    type_C = draw.integers(0, 3, n_cells)
    batch_C = draw.integers(0, 2, n_cells)
    profile = draw.gamma(0.6, 1.0, (3, n_genes)) + 0.02
    bend = np.exp(effect * draw.standard_normal((2, n_genes)))
    rate = profile[type_C] * bend[batch_C]
    rate *= draw.uniform(300, 900, (n_cells, 1)) / rate.sum(axis=1, keepdims=True)
    adata = ad.AnnData(sp.csr_matrix(draw.poisson(rate).astype(np.float32)))
    adata.obs["batch"] = [f"b{b}" for b in batch_C]
    adata.obs["type"] = [f"t{t}" for t in type_C]
    return adata, rate


@pytest.fixture(scope="module")
def cells():
    return generated()[0]


def conditions(**changes):
    values = {"batch_key": "batch", "label_key": "type", "n_hvg": 100, "n_comps": 10}
    return Conditions(**(values | changes))


INTEGRATION = [
    pytest.param("none"),
    pytest.param("combat"),
    pytest.param("harmony", marks=needs("harmonypy")),
    pytest.param("scanorama", marks=needs("scanorama")),
    pytest.param("random"),
    pytest.param("random_weights"),
]


@pytest.mark.parametrize("name", INTEGRATION)
def test_integration_gives_one_row_per_cell_and_changes_nothing(cells, name):
    before = cells.X.copy()
    array = getattr(baselines, name)(cells, conditions())
    assert array.shape[0] == cells.n_obs
    assert array.shape[1] >= 2
    assert np.isfinite(array).all()
    assert (cells.X != before).nnz == 0
    assert list(cells.obs.columns) == ["batch", "type"]
    again = getattr(baselines, name)(cells, conditions())
    np.testing.assert_allclose(again, array, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["combat", *INTEGRATION[2:4]])
def test_correction_mixes_batches_and_keeps_types(name):
    cells = generated(effect=0.4)[0]
    before = baselines.none(cells, conditions())
    after = getattr(baselines, name)(cells, conditions())

    def stuck(array):
        share = same_batch_share(array, cells.obs["batch"], cells.obs["type"])
        return share["ratio"]["all"]

    assert stuck(after) < stuck(before) - 0.2
    assert knn_accuracy(after, cells.obs["type"]) > 0.9


@pytest.mark.parametrize("name", ["combat", "harmony", "scanorama"])
def test_rows_follow_their_cells(cells, name):
    if (
        name in INSTALLED
        and not INSTALLED[name]
        or name == "harmony"
        and not INSTALLED["harmonypy"]
    ):
        pytest.skip(f"{name} is not installed: pip install 'genemodel[bench]'")
    order = np.random.default_rng(5).permutation(cells.n_obs)
    array = getattr(baselines, name)(cells, conditions())
    moved = getattr(baselines, name)(cells[order].copy(), conditions())
    # the axes may turn and the random steps differ, the neighbourhoods stay with the cells
    types = cells.obs["type"].to_numpy()
    assert knn_accuracy(moved, types[order]) > 0.9
    assert knn_accuracy(moved, types) < 0.6
    assert knn_accuracy(array, types) > 0.9


def test_random_controls_follow_the_seed(cells):
    for name in ("random", "random_weights"):
        one = getattr(baselines, name)(cells, conditions(seed=1))
        np.testing.assert_array_equal(one, getattr(baselines, name)(cells, conditions(seed=1)))
        assert np.abs(one - getattr(baselines, name)(cells, conditions(seed=2))).max() > 0.1


def test_a_gene_that_only_marks_a_batch_is_not_preferred():
    draw = np.random.default_rng(0)
    rate = np.tile(draw.uniform(0.5, 4.0, 300), (400, 1))
    batch = np.repeat(["a", "b"], 200)
    rate[:, 0] = np.where(batch == "a", 0.3, 5.0)  # constant within each batch
    rate[:, 1] = np.where(np.arange(400) % 2, 0.3, 5.0)  # varies within both
    logged = log_normalised(sp.csr_matrix(draw.poisson(rate).astype(np.float32)))
    assert highly_variable(logged, 4)[:2].all()
    chosen = highly_variable(logged, 4, batch)
    assert chosen[1]
    assert not chosen[0]
    assert chosen.sum() == 4
    assert highly_variable(logged, 300, batch).all()
    lone = batch.copy()
    lone[0] = "lone"  # a batch of one cell does not make the others one
    chosen = highly_variable(logged, 4, lone)
    assert chosen[1] and not chosen[0]


def test_what_a_method_needs_is_named(cells):
    with pytest.raises(DataError, match="needs batch_key"):
        baselines.combat(cells, conditions(batch_key=None))
    lonely = cells.copy()
    lonely.obs["batch"] = ["alone", *["b"] * (cells.n_obs - 1)]
    with pytest.raises(DataError, match="needs 2 cells per batch.*'batch' has 1"):
        baselines.combat(lonely, conditions())
    if INSTALLED["scvi"]:
        with pytest.raises(DataError, match="needs label_key"):
            baselines.scanvi(cells, conditions(label_key=None))


@pytest.mark.slow
@needs("scvi")
def test_scvi_and_scanvi_share_one_training(cells):
    data = cells.copy()
    data.X[0] = 0  # a cell without any count among the variable genes
    data.obs["type"] = data.obs["type"].astype(object)
    data.obs.iloc[:10, data.obs.columns.get_loc("type")] = None
    shared = conditions(scvi_epochs=2)
    latent = baselines.scvi(data, shared)
    assert latent.shape[0] == cells.n_obs
    assert np.isfinite(latent).all()
    np.testing.assert_allclose(latent[0], latent[1:].mean(axis=0), atol=1e-4)
    assert shared.borrowed_seconds == 0.0
    labelled = baselines.scanvi(data, shared)
    assert labelled.shape == latent.shape
    assert shared.borrowed_seconds > 0.0
    assert len(shared.shared) == 1


@pytest.mark.slow
@needs("scvi")
def test_scvi_denoises_to_the_depth_of_the_cells(cells):
    denoised = imputation_baselines.scvi(cells, conditions(scvi_epochs=2))
    np.testing.assert_allclose(denoised.sum(axis=1), cells.X.sum(axis=1).A1, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["seurat_cca", "seurat_rpca", "combat_r"])
def test_r_originals(name):
    package = "sva" if name == "combat_r" else "Seurat"
    reason = seurat.missing_r(package)
    if reason is not None:
        pytest.skip(reason)
    cells = generated(n_cells=300)[0]
    array = getattr(seurat, name)(cells, conditions())
    assert array.shape == (300, 10)
    assert knn_accuracy(array, cells.obs["type"]) > 0.9
    before = same_batch_share(baselines.none(cells, conditions()), cells.obs["batch"])
    after = same_batch_share(array, cells.obs["batch"])
    assert after["ratio"]["all"] < before["ratio"]["all"]


DENOISERS = ["none", "gene_mean", "gene_median", "knn_smoothing", "magic", "alra", "mice"]


@pytest.fixture(scope="module")
def molecules():
    """Training counts of a shallow data set without batch effect, and the split."""
    _, rate = generated(effect=0.0)
    counts = np.random.default_rng(1).poisson(rate * 0.3)
    split = mcv_split(counts, 0.9, 0)
    return ad.AnnData(split.train.astype(np.float32)), split


@pytest.mark.parametrize("name", DENOISERS)
def test_denoisers_return_counts_at_the_depth_of_the_cells(molecules, name):
    adata, _ = molecules
    before = adata.X.copy()
    found = getattr(imputation_baselines, name)(adata, Conditions(n_hvg=100))
    found = found.toarray() if sp.issparse(found) else found
    assert found.shape == adata.shape
    assert np.isfinite(found).all()
    assert found.min() >= 0
    assert (adata.X != before).nnz == 0
    if name != "mice":  # it fills values in and takes none away
        np.testing.assert_allclose(found.sum(axis=1), adata.X.sum(axis=1).A1, rtol=1e-3)


def test_denoisers_that_share_between_alike_cells_beat_doing_nothing(molecules):
    adata, split = molecules
    found = {
        name: getattr(imputation_baselines, name)(adata, Conditions())
        for name in ("gene_mean", "knn_smoothing", "magic", "alra")
    }
    table = score_denoised(found, split)
    assert (table["poisson_ratio"].drop("none") < 1.0).all()
    for name in ("knn_smoothing", "magic"):  # they know the types, the average does not
        assert table.at[name, "pearson_gene"] > table.at["gene_mean", "pearson_gene"] + 0.05
        assert table.at[name, "deviance"] < table.at["gene_mean", "deviance"]


def test_our_rows_share_one_training(molecules, monkeypatch):
    adata, split = molecules
    trainings = []
    train = ImputationModel.train

    def counted(*args, **options):
        trainings.append(options["seed"])
        return train(*args, settings=DecoderSettings(epochs=10), **options)

    monkeypatch.setattr(imputation_baselines.ImputationModel, "train", counted)
    asked = Conditions()
    own = imputation_baselines.genemodel(adata, asked)
    assert asked.borrowed_seconds == 0
    found = {
        "own": own.mean,
        "log": imputation_baselines.genemodel_log(adata, asked),
        "half": imputation_baselines.genemodel_log_half(adata, asked),
    }
    assert trainings == [asked.seed] and asked.borrowed_seconds > 0
    library_C = np.asarray(adata.X.sum(1)).ravel()
    for name in ("log", "half"):
        np.testing.assert_allclose(found[name].sum(1), library_C, rtol=1e-4)
    table = score_denoised(found, split, correlations=False)
    assert table.loc["half", "mse_ratio"] < table.loc["log", "mse_ratio"] < 1
    assert table.loc["own", "poisson_ratio"] < table.loc["half", "poisson_ratio"] < 1


def test_gene_mean_and_median_by_hand():
    counts = np.array([[2, 0, 2], [4, 4, 0], [1, 2, 1]], dtype=np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts))
    mean = imputation_baselines.gene_mean(adata, Conditions())
    np.testing.assert_allclose(mean, np.outer([4, 8, 4], [7, 6, 3]) / 16)
    median = imputation_baselines.gene_median(adata, Conditions())
    # shares: (.5, 0, .5), (.5, .5, 0), (.25, .5, .25) -> medians .5, .5, .25
    np.testing.assert_allclose(median, np.outer([4, 8, 4], [0.4, 0.4, 0.2]), rtol=1e-6)


def test_knn_smoothing_adds_up_the_neighbours():
    draw = np.random.default_rng(0)
    kinds = np.eye(4)[np.repeat(np.arange(4), 8)]
    counts = draw.poisson(kinds @ (draw.gamma(0.3, 30.0, (4, 50)) + 0.1))
    adata = ad.AnnData(sp.csr_matrix(counts.astype(np.float32)))
    found = imputation_baselines.knn_smoothing(adata, Conditions(), k=7)
    groups = counts.reshape(4, 8, 50).sum(axis=1)
    expected = groups[np.repeat(np.arange(4), 8)].astype(float)
    expected *= counts.sum(axis=1, keepdims=True) / expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("logarithm", "first"),
    [
        (False, [0.094257, 0.085677, 0.15384, 0.143377, 0.130649, 0.136667, 0.154373, 0.101162]),
        (True, [0.068317, 0.079982, 0.141022, 0.09038, 0.179515, 0.184964, 0.147052, 0.108768]),
    ],
)
def test_magic_is_the_published_package(logarithm, first):
    """Shares of the first cell by magic-impute 3.0.0, ``MAGIC(knn=5, decay=1, t=3, n_pca=5)``."""
    draw = np.random.default_rng(7)
    rate = np.exp(draw.normal(size=(20, 3)) @ draw.normal(size=(3, 8)) * 0.6 + 1)
    adata = ad.AnnData(sp.csr_matrix(draw.poisson(rate).astype(np.float32)))
    found = imputation_baselines.magic(adata, Conditions(), n_comps=5, logarithm=logarithm)
    np.testing.assert_allclose(found[0] / found[0].sum(), first, atol=2e-6)


def test_alra_rank_and_thresholds():
    draw = np.random.default_rng(0)
    noise = np.sort(draw.uniform(1.0, 1.1, 97))[::-1]
    size = np.concatenate([[50.0, 30.0, 10.0], noise])
    assert imputation_baselines._rank_above_noise(size) == 3
    low = np.array([[-0.2], [0.1], [0.5], [1.5], [0.05]])
    seen = np.array([[0.0], [0.0], [2.0], [4.0], [0.7]])
    found = imputation_baselines._alra_genes(low, seen)
    # the smallest value is about -0.2: up to 0.2 is a technical zero, unless it was observed
    assert found[:2].ravel().tolist() == [0.0, 0.0]
    assert found[4] == pytest.approx(0.7)
    spread = np.std([2.0, 4.0, 0.7], ddof=1) / np.std([0.5, 1.5], ddof=1)
    expected = (np.array([0.5, 1.5]) - 1.0) * spread + np.mean([2.0, 4.0, 0.7])
    np.testing.assert_allclose(found[2:4].ravel(), expected, rtol=1e-5)


def test_a_hushed_library_says_nothing(capsys):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with baselines.hushed("some.library"):
            print("progress")
            warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
            logging.getLogger("some.library").warning("careful")
        warnings.warn("ours", UserWarning, stacklevel=1)
    assert [str(one.message) for one in caught] == ["ours"]
    assert capsys.readouterr().out == ""
    assert logging.getLogger("some.library").level == logging.NOTSET


def test_a_projection_on_a_corpus_is_its_pca(small_start, small_vocabulary):
    """The corpus's own cells: their scores are those of a decomposition written out here."""
    from genemodel.corpus.corpus import Corpus
    from genemodel.simulation.cells import synthetic

    cells = synthetic(
        240, species=("human",), n_genes=500, genes_per_cell=60, seed=1, vocabulary=small_vocabulary
    )["human"]
    corpus = Corpus.open(small_start / "corpus")
    found_CK = baselines.corpus_pca(cells, conditions(corpus=corpus, n_comps=4))
    logged_CG = log_normalised(sp.csr_matrix(cells.X, dtype=np.float64)).toarray()
    left, size, _ = np.linalg.svd(logged_CG - logged_CG.mean(0), full_matrices=False)
    wanted_CK = left[:, :4] * size[:4]
    # The corpus's decomposition is a randomised one: its first component is exact, and the next
    # ones lie among those of an exact one.
    assert abs(np.corrcoef(found_CK[:, 0], wanted_CK[:, 0])[0, 1]) > 0.999
    np.testing.assert_allclose(found_CK[:, 0].std(), wanted_CK[:, 0].std(), rtol=0.01)
    among_CK = left[:, :20] @ (left[:, :20].T @ found_CK)
    assert ((found_CK - among_CK) ** 2).sum() < 0.05 * (found_CK**2).sum()
    np.testing.assert_allclose(found_CK.mean(0), 0, atol=1e-3)
    # Cells are projected one by one: which others come along changes nothing.
    few_CK = baselines.corpus_pca(cells[::7].copy(), conditions(corpus=corpus, n_comps=4))
    np.testing.assert_allclose(few_CK, found_CK[::7], atol=1e-4)
    # Names in a column that the comparison was told of.
    renamed = cells.copy()
    renamed.var["here"] = renamed.var_names
    renamed.var_names = [f"row {i}" for i in range(renamed.n_vars)]
    told = conditions(corpus=corpus, n_comps=4, reading=InputSettings(column="here"))
    np.testing.assert_allclose(baselines.corpus_pca(renamed, told), found_CK, atol=1e-4)
    with pytest.raises(DataError, match="corpus="):
        baselines.corpus_pca(cells, conditions())
