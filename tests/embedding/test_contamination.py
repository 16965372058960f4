"""Training cells are known again in other files, others are not."""

import logging
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import genemodel as gm
from genemodel.bundle import training_manifest
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.cells.input_settings import InputSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.head_run import HeadRun
from genemodel.imputation.network import DecoderSettings
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.integrate import integrate_cells
from genemodel.model.tuning import TuningSettings
from genemodel.simulation.cells import synthetic


@pytest.fixture(scope="module")
def cells():
    """Human cells of 300 genes each."""
    return synthetic(300, species=("human",), n_genes=1500, genes_per_cell=300, seed=3)["human"]


@pytest.fixture(scope="module")
def bundle(cells, random_bundle, tmp_path_factory):
    """Trained on the first 200 cells; the rest was held out."""
    folder = tmp_path_factory.mktemp("contamination")
    corpus = Corpus.build([cells], folder / "corpus", vocabulary=random_bundle.vocabulary)
    assert len(corpus) == cells.n_obs
    return replace(random_bundle, training=TrainingManifest.of(corpus, np.arange(200)))


def trained(cells):
    return np.arange(cells.n_obs) < 200


def test_cells_trained_on_are_found_and_those_held_out_are_not(cells, bundle):
    found = gm.contamination(cells, bundle)
    np.testing.assert_array_equal(found.found_C, trained(cells))
    assert found.n_found == 200 and found.n_cells == 300 and found.complete
    assert list(found.by_source.values()) == [200]
    assert found.by_chance < 1e-5
    assert found.text().startswith("200 of 300 cells (66.7 %) were in its training: 200 in ")


def test_other_orders_names_and_formats_are_the_same_cells(cells, bundle, tmp_path):
    rng = np.random.default_rng(0)
    row_C, column_G = rng.permutation(cells.n_obs), rng.permutation(cells.n_vars)
    other = cells[row_C, column_G].copy()
    rows = bundle.vocabulary.species_rows("human")
    symbols = dict(zip(rows["ensembl_id"], rows["symbol"], strict=True))
    other.var_names = [symbols[name] for name in other.var_names]
    other.X = sp.csc_matrix(other.X).toarray().astype(np.int64)
    other.write_h5ad(tmp_path / "other.h5ad")
    found = gm.contamination(tmp_path / "other.h5ad", bundle, species="human")
    np.testing.assert_array_equal(found.found_C, trained(cells)[row_C])


def test_explicit_zeros_and_layers_change_nothing(cells, bundle):
    counts = sp.csr_matrix(cells.X, copy=True)
    zeros = sp.csr_matrix(np.ones(counts.shape, np.float32))
    zeros.data[:] = 0
    with_zeros = sp.csr_matrix(
        (np.concatenate([counts.data, zeros.data]),
         (np.concatenate([np.repeat(np.arange(300), np.diff(counts.indptr)),
                          np.repeat(np.arange(300), np.diff(zeros.indptr))]),
          np.concatenate([counts.indices, zeros.indices]))), counts.shape,
    )  # fmt: skip
    assert (with_zeros.data == 0).any()
    adata = ad.AnnData(counts.log1p(), obs=cells.obs, var=cells.var, layers={"raw": with_zeros})
    found = gm.contamination(adata, bundle, layer="raw")
    np.testing.assert_array_equal(found.found_C, trained(cells))


def test_a_few_genes_less_leave_most_cells_known(cells, bundle):
    """Another file of the same cells often lacks rare genes, or knows fewer names."""
    kept = np.random.default_rng(1).permutation(cells.n_vars)[: int(0.98 * cells.n_vars)]
    found = gm.contamination(cells[:, np.sort(kept)].copy(), bundle)
    assert found.found_C[:200].mean() > 0.85
    assert not found.found_C[200:].any()


def test_more_genes_leave_most_cells_known(cells, random_bundle, tmp_path):
    """It was the training that lacked some."""
    kept = np.random.default_rng(1).permutation(cells.n_vars)[: int(0.98 * cells.n_vars)]
    fewer = cells[:, np.sort(kept)].copy()
    corpus = Corpus.build([fewer], tmp_path / "corpus", vocabulary=random_bundle.vocabulary)
    bundle = replace(random_bundle, training=TrainingManifest.of(corpus, np.arange(200)))
    found = gm.contamination(cells, bundle)
    assert found.found_C[:200].mean() > 0.85
    assert not found.found_C[200:].any()


@pytest.mark.parametrize("lost", ["here", "there"])
def test_parts_of_half_the_size_are_looked_up_too(random_bundle, tmp_path, lost):
    """Cells of 12 × 16 genes and a few: with a few less their parts would be twice as large."""
    rng = np.random.default_rng(0)
    rows = random_bundle.vocabulary.species_rows("human")
    names = list(dict.fromkeys(rows["ensembl_id"]))[:2000]
    whole_CG = np.zeros((100, 2000), np.float32)
    for cell_G in whole_CG:
        cell_G[rng.choice(2000, 195, replace=False)] = rng.geometric(0.3, 195)
    fewer_CG = whole_CG.copy()
    for cell_G in fewer_CG:
        cell_G[rng.choice(np.flatnonzero(cell_G), 5, replace=False)] = 0
    obs = pd.DataFrame({"species": "human"}, index=[f"c{i}" for i in range(100)])
    whole, fewer = (
        ad.AnnData(sp.csr_matrix(counts_CG), obs=obs, var=pd.DataFrame(index=names))
        for counts_CG in (whole_CG, fewer_CG)
    )
    first, second = (whole, fewer) if lost == "here" else (fewer, whole)
    corpus = Corpus.build([first], tmp_path / "c", vocabulary=random_bundle.vocabulary)
    bundle = replace(random_bundle, training=TrainingManifest.of(corpus, np.arange(50)))
    found = gm.contamination(second, bundle)
    assert found.found_C[:50].mean() > 0.85 and not found.found_C[50:].any()


def test_thinned_and_changed_cells_are_others(cells, bundle):
    counts = sp.csr_matrix(cells.X, copy=True).astype(np.int64)
    counts.data = np.random.default_rng(0).binomial(counts.data, 0.5)
    thinned = ad.AnnData(counts.astype(np.float32), obs=cells.obs, var=cells.var)
    assert gm.contamination(thinned, bundle).n_found == 0
    more = sp.csr_matrix(cells.X, copy=True)
    more.data += 1
    found = gm.contamination(ad.AnnData(more, obs=cells.obs, var=cells.var), bundle)
    assert found.n_found == 0 and found.by_source == {}
    assert found.text() == "0 of 300 cells were in its training"


def test_cells_that_nobody_could_know_are_not_counted(cells, bundle):
    adata = cells.copy()
    counts = sp.lil_matrix(adata.X)
    counts[0], counts[1] = 0, 0
    counts[1, :3] = 1
    adata.X = counts.tocsr()
    found = gm.contamination(adata, bundle)
    assert found.n_cells == 298 and found.n_found == 198
    assert not found.found_C[:2].any()


def test_a_vocabulary_that_has_grown_knows_the_cells_of_before(random_bundle, tmp_path):
    rows = random_bundle.vocabulary.genes
    rows = rows[rows["species"] == "human"]
    few, more = (
        gm.GeneVocabulary(rows[rows["token"] < n].reset_index(drop=True)) for n in (1003, 1503)
    )
    assert more.extends(few)
    cells = synthetic(
        300, species=("human",), n_genes=1200, genes_per_cell=200, seed=3, vocabulary=more
    )["human"]
    corpus = Corpus.build([cells], tmp_path / "corpus", vocabulary=few)
    training = TrainingManifest.of(corpus, np.arange(200))
    assert training.sources[0].n_tokens == len(few)
    found = gm.contamination(cells, replace(random_bundle, vocabulary=more, training=training))
    assert found.found_C[:200].all() and not found.found_C[200:].any()


def test_a_model_that_keeps_nothing_says_so(cells, random_bundle, bundle):
    found = gm.contamination(cells, random_bundle)
    assert found.n_found is None and found.text().startswith("unknown whether")
    assert found.values()["in_training"] == "unknown"
    partly = TrainingManifest.after(None, bundle.training)
    said = gm.contamination(cells, replace(random_bundle, training=partly)).text()
    assert said.startswith("at least 200 of 300 cells") and said.endswith("is unknown")


# -- heads -----------------------------------------------------------------------------------------

SHORT = IntegrationSettings(steps=3, passes=0, hidden=16, rank=8, latent=4, batch_cells=32)
BRIEF = DecoderSettings(epochs=1, hidden=8, latent=4)


def own(cells):
    """The last hundred cells, of which nothing else has heard."""
    adata = cells[200:].copy()
    adata.obs["batch"] = np.arange(100) % 2
    adata.obs["batch"] = adata.obs["batch"].astype(str)
    return adata


def head(kind, adata, bundle, **options):
    if kind == "integrate":
        return gm.integrate(adata, batch_key="batch", settings=SHORT, model=bundle, **options)
    if bundle is not None:
        options |= {"backbone": options.get("backbone", "frozen")}
    return gm.impute(adata, bundle, settings=BRIEF, **options)


@pytest.mark.parametrize("kind", ["integrate", "impute"])
@pytest.mark.parametrize("backbone", ["frozen", "lora"])
def test_a_head_on_a_bundle_tells_its_own_cells_and_those_of_the_bundle(
    cells, random_bundle, tmp_path, kind, backbone
):
    corpus = Corpus.build(
        {"before": cells}, tmp_path / "c", vocabulary=random_bundle.vocabulary
    )  # fmt: skip
    beneath = replace(random_bundle, training=TrainingManifest.of(corpus, np.arange(50)))
    model = head(kind, own(cells), beneath, backbone=backbone)
    model.save(tmp_path / "model")
    back = gm.load(tmp_path / "model", device="cpu")
    for one in (model, back, tmp_path / "model"):
        found = gm.contamination(cells, one)
        expected = (np.arange(300) < 50) | (np.arange(300) >= 200)
        np.testing.assert_array_equal(found.found_C, expected)
        assert sorted(found.by_source.values()) == [50, 100] and found.complete
    assert "150 cells of 2 sources" in back.describe()
    # What lies beneath has learnt from the head's cells only where they reached it.
    assert back.bundle.training.n_trained == (150 if backbone == "lora" else 50)
    unknown = head(kind, own(cells), replace(random_bundle, training=None), backbone=backbone)
    assert gm.contamination(cells, unknown).text().startswith("at least 100 of 300 cells")


@pytest.mark.parametrize("kind", ["integrate", "impute"])
def test_a_head_without_a_vocabulary_knows_cells_by_its_own_genes(cells, tmp_path, kind):
    model = head(kind, own(cells), None)
    model.save(tmp_path / "model")
    shuffled = cells[:, np.random.default_rng(0).permutation(cells.n_vars)].copy()
    shuffled.write_h5ad(tmp_path / "cells.h5ad")
    for one, given in ((model, cells), (tmp_path / "model", tmp_path / "cells.h5ad")):
        found = gm.contamination(given, one)
        np.testing.assert_array_equal(found.found_C, np.arange(300) >= 200)
    strange = cells.copy()
    strange.var_names = [f"x{name}" for name in strange.var_names]
    with pytest.raises(DataError, match="knows cells by the gene names it was trained on"):
        gm.contamination(strange, model)


def test_a_head_over_the_built_in_vocabulary_and_held_out_cells(cells, tmp_path):
    model = gm.integrate(own(cells), batch_key="batch", settings=SHORT, species="human")
    model.save(tmp_path / "model")
    found = gm.contamination(cells, gm.load(tmp_path / "model"))
    np.testing.assert_array_equal(found.found_C, np.arange(300) >= 200)
    assert [source.species for source in model.training.sources] == ["human"]
    result, _ = integrate_cells(
        own(cells), ("batch",), None, None, TuningSettings(tune="frozen"), settings=SHORT,
        where=HeadRun(), seed=0, held_out=np.arange(60, 100), reading=InputSettings(),
    )  # fmt: skip
    found = gm.contamination(cells, result)
    np.testing.assert_array_equal(np.flatnonzero(found.found_C), np.arange(200, 260))
    assert result.training.sources[0].n_cells == 100


def test_cells_in_memory_are_the_same_as_in_a_corpus(cells, random_bundle, tmp_path, monkeypatch):
    """Whoever trains a head on the cells of the bundle was not trained on more of them."""
    monkeypatch.setattr(training_manifest, "_BLOCK_CELLS", 7)  # whatever is taken at once
    corpus = Corpus.build([own(cells)], tmp_path / "c", vocabulary=random_bundle.vocabulary)
    beneath = replace(random_bundle, training=TrainingManifest.of(corpus, np.arange(100)))
    model = head("integrate", own(cells), beneath)
    assert model.training.n_trained == 100 and len(model.training.sources) == 1


@pytest.mark.parametrize("task", ["integrate", "impute"])
def test_heads_on_a_corpus_tell_its_cells(cells, random_bundle, tmp_path, task, blank_report):
    Corpus.build([own(cells)], tmp_path / "c", vocabulary=random_bundle.vocabulary)
    out = gm.finetune(
        gm.FinetuneSettings(
            input=str(tmp_path / "c"), out=str(tmp_path / "out"), task=task, batch_key=("batch",),
            integration=SHORT, imputation=BRIEF,
        )
    )  # fmt: skip
    model = out / ("model" if task == "integrate" else "imputation_model")
    found = gm.contamination(cells, model)
    np.testing.assert_array_equal(found.found_C, np.arange(300) >= 200)


def test_what_is_no_model_is_refused(cells):
    with pytest.raises(ConfigError, match="cannot tell its training cells"):
        gm.contamination(cells, 3)


def test_annotation_tells_how_many_cells_were_in_the_training(cells, bundle, caplog, tmp_path):
    query, reference = cells[150:].copy(), cells[:150].copy()
    with caplog.at_level(logging.INFO):
        gm.annotate(query, reference, bundle, label_key="cell_type")
    told = query.uns["genemodel_label"]["training"]
    assert told["in_training"] == 50 and told["cells"] == 150
    assert "50 of 150 cells (33.3 %) were in its training" in caplog.text
    query.write_h5ad(tmp_path / "query.h5ad")
    read = ad.read_h5ad(tmp_path / "query.h5ad").uns["genemodel_label"]["training"]
    assert read["in_training"] == 50 and list(read["in_source"]) == [50]


@pytest.mark.parametrize(
    "name", ["human_pbmc4k_10xv2", "mouse_bonemarrow_paul15", "mouse_brain_merfish_1000"]
)
def test_real_cells_are_told_apart(name, shared_data, random_bundle, tmp_path):
    """Half of a file was trained on; the other half is as like it as cells get."""
    adata = ad.read_h5ad(shared_data / f"{name}.h5ad")
    adata = adata[: min(adata.n_obs, 1500)].copy()
    species = name.partition("_")[0]
    adata.obs = pd.DataFrame({"species": species}, index=adata.obs_names)
    corpus = Corpus.build([adata], tmp_path / "corpus", vocabulary=random_bundle.vocabulary)
    half = np.arange(len(corpus) // 2)
    bundle = replace(random_bundle, training=TrainingManifest.of(corpus, half))
    found = gm.contamination(adata, bundle)
    assert found.found_C[: half.size].all() and not found.found_C[half.size :].any()
    common_G = np.asarray((adata.X > 0).sum(0)).ravel() >= 3
    assert (~common_G).any() or name != "human_pbmc4k_10xv2"
    fewer = gm.contamination(adata[:, common_G].copy(), bundle)
    assert fewer.found_C[: half.size].mean() > 0.98 and not fewer.found_C[half.size :].any()
