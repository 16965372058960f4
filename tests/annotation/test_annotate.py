"""Annotation: labels arrive, strangers are told apart, confidence is what it says."""

import dataclasses
import logging

import anndata as ad
import numpy as np
import pytest

import genemodel as gm
from genemodel.annotation.annotate import (
    AnnotateSettings,
    _Transfer,
    _unit,
    annotate_file,
    transfer_labels,
)
from genemodel.cells.input_settings import InputSettings
from genemodel.embedding.embed import write_whole
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.gene_counts import read_counts
from genemodel.integration.head import IntegrationSettings

SHORT = IntegrationSettings(steps=150, passes=1, hidden=32, rank=16, latent=10, batch_cells=64)


@pytest.fixture(scope="module")
def cells():
    return gm.synthetic(500, n_cell_types=3, n_batches=2, n_genes=1500, genes_per_cell=500, seed=6)


def test_human_labels_reach_mouse_cells_through_a_bundle(random_bundle, cells, tmp_path):
    human, mouse = cells["human"].copy(), cells["mouse"].copy()
    gm.annotate(mouse, human, random_bundle, label_key="cell_type", transfer="knn", unknown=0.0,
                far_quantile=None)  # fmt: skip
    said = mouse.obs["genemodel_label"]
    assert "unknown" not in set(said) and len(said) == mouse.n_obs
    confidence = mouse.obs["genemodel_label_confidence"]
    assert confidence.dtype == np.float32 and confidence.between(0, 1).all()
    uns = mouse.uns["genemodel_label"]
    assert uns["reference_cells"] == human.n_obs and uns["share_unknown"] == 0
    mouse.write_h5ad(tmp_path / "mouse.h5ad")
    back = ad.read_h5ad(tmp_path / "mouse.h5ad")
    assert list(back.obs["genemodel_label"]) == list(said)


def test_a_model_trained_on_human_cells_labels_mouse_cells(cells):
    human, mouse = cells["human"].copy(), cells["mouse"].copy()
    model = gm.integrate(
        human, batch_key="batch", label_key="cell_type", species="human", settings=SHORT
    )
    gm.annotate(mouse, human, model, label_key="cell_type", unknown=0.0, far_quantile=None,
                transfer="knn", species="mouse", reference_species="human")  # fmt: skip
    right = (mouse.obs["genemodel_label"].astype(str) == mouse.obs["cell_type"].astype(str)).mean()
    chance = mouse.obs["cell_type"].value_counts(normalize=True).max()
    assert right > chance + 0.2
    again = mouse[::-1].copy()
    gm.annotate(again, human, model, label_key="cell_type", unknown=0.0, far_quantile=None,
                transfer="knn", species="mouse", reference_species="human")  # fmt: skip
    same = again.obs["genemodel_label"][::-1].astype(str).to_numpy()
    assert (same == mouse.obs["genemodel_label"].astype(str).to_numpy()).mean() > 0.95


def test_thresholds_make_unknowns_and_say_so(random_bundle, cells, caplog):
    human = cells["human"].copy()
    rows = np.arange(human.n_obs)
    reference, query = human[rows % 2 == 0].copy(), human[rows % 2 == 1].copy()
    gm.annotate(query, reference, random_bundle, label_key="cell_type", unknown=1.0)
    assert set(query.obs["genemodel_label"]) == {"unknown"}
    assert query.uns["genemodel_label"]["share_doubtful"] == 1.0
    with caplog.at_level(logging.WARNING):
        gm.annotate(
            query, reference, random_bundle, label_key="cell_type", unknown=0.0, far_quantile=1e-6,
            transfer="knn",
        )  # fmt: skip
    assert query.uns["genemodel_label"]["share_far"] > 0.9
    assert "far_quantile=None" in caplog.text


def test_votes_equal_the_slow_and_obvious_version():
    rng = np.random.default_rng(0)
    unit, query = _unit(rng.normal(size=(90, 4))), _unit(rng.normal(size=(20, 4)))
    label = rng.integers(0, 3, 90)
    winner, share, distance = _Transfer(unit, label, 3, 7).vote(query)
    for row, cell in enumerate(query):
        d = np.linalg.norm(unit - cell, axis=1)
        near = np.argsort(d)[:7]
        weight = np.exp(-d[near] / d[near].mean())
        votes = [weight[label[near] == code].sum() for code in range(3)]
        assert winner[row] == np.argmax(votes)
        assert share[row] == pytest.approx(max(votes) / sum(votes))
        assert distance[row] == pytest.approx(d[near].mean())
    alone, _, _ = _Transfer(unit, np.arange(90), 90, 1).vote(unit, np.arange(90))
    assert (alone != np.arange(90)).all()  # no cell votes on itself


@pytest.mark.parametrize("transfer", ["knn", "linear"])
def test_confidence_is_as_often_right_as_it_says(transfer):
    """Overlapping types: among new cells of the same kind, confidence equals accuracy."""
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(3, 5))

    def draw(n):
        label = rng.integers(0, 3, n)
        return centre[label] + 0.9 * rng.normal(size=(n, 5)), label

    reference, label = draw(1500)
    new, truth = draw(1500)
    found = transfer_labels(reference, label, new, transfer=transfer)
    right = found.winner_C == truth
    assert 0.4 < right.mean() < 0.95
    assert abs(found.held_out_accuracy - right.mean()) < 0.04
    assert abs(found.confidence_C.mean() - right.mean()) < 0.04
    order = np.argsort(found.confidence_C)
    for part in np.array_split(order, 3):
        assert abs(found.confidence_C[part].mean() - right[part].mean()) < 0.08


def test_an_only_vote_is_no_certainty_where_labels_are_chance():
    rng = np.random.default_rng(2)
    reference, new = rng.normal(size=(900, 4)), rng.normal(size=(300, 4))
    found = transfer_labels(reference, rng.integers(0, 3, 900), new, k=1)
    assert found.held_out_accuracy == pytest.approx(1 / 3, abs=0.06)
    np.testing.assert_allclose(found.confidence_C, found.held_out_accuracy, rtol=1e-6)


def test_linear_transfer_is_logistic_regression_and_far_stays_the_neighbours():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(2)
    label = rng.integers(0, 3, 200)
    reference = np.eye(3)[label] + 0.4 * rng.normal(size=(200, 3))
    query = np.vstack(
        [np.eye(3)[rng.integers(0, 3, 60)] + 0.4 * rng.normal(size=(60, 3)), [[9.0] * 3]]
    )
    query = np.vstack([query, np.full((1, 3), np.nan)])
    linear = transfer_labels(reference, label, query, transfer="linear")
    knn = transfer_labels(reference, label, query, transfer="knn")
    centre = reference.mean(0)
    slow = LogisticRegression(C=0.1, max_iter=500).fit(3 * _unit(reference - centre), label)
    np.testing.assert_array_equal(
        linear.winner_C[:-1], slow.predict(3 * _unit(query[:-1] - centre))
    )
    np.testing.assert_array_equal(linear.far_C, knn.far_C)
    assert (linear.confidence_C != knn.confidence_C).any()
    assert linear.winner_C[-1] == -1 and linear.confidence_C[-1] == 0 and not linear.far_C[-1]
    assert list(linear.names(["a", "b", "c"], 0.0))[-1] == "unknown"
    # A label that stands in one cell alone is missing from a fold: still answered.
    lonely = np.r_[np.zeros(199, int), 1]
    assert transfer_labels(reference, lonely, query, transfer="linear").held_out_accuracy > 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_key": "celltype"}, "reference.obs has no column.*did you mean 'cell_type'"),
        ({"label_key": "species"}, "1 different labels"),
        ({"k": 0}, "k=0"),
        ({"transfer": "tree"}, "transfer='tree': there are head, knn, linear"),
        ({"unknown": 2.0}, "unknown=2.0"),
        ({"far_quantile": 0.0}, "far_quantile=0.0"),
        ({"key_added": ""}, "key_added"),
        ({"key_added": "a/b"}, "a slash"),
        ({"seed": -1}, "seed is -1"),
        ({"layer": "absent"}, "query: .*no layer 'absent'"),
        ({"reference_layer": "absent"}, "reference: .*no layer 'absent'"),
        ({"k": 400}, "401 are needed"),
        ({"k": 400, "transfer": "knn"}, "that the model knows; 401 are needed"),
        ({"batch_key": "bach"}, "reference.obs has no column 'bach'.*did you mean 'batch'"),
        ({"batch_key": "cell_type"}, "label_key=cell_type is a column of batch_key too"),
    ],
)
def test_refusals(random_bundle, cells, options, words):
    with pytest.raises((ConfigError, DataError), match=words):
        gm.annotate(
            cells["mouse"].copy(), cells["human"], random_bundle,
            **{"label_key": "cell_type", **options},
        )  # fmt: skip


def test_files_that_join_species_are_read_and_a_wrong_species_still_refused(cells):
    """The zeros of the other species' genes count for nothing, however many they are."""
    few = cells["mouse"][:, :300].copy()
    both = ad.concat([cells["human"], few], join="outer", fill_value=0)
    mouse = both[(both.obs["species"] == "mouse").to_numpy()].copy()

    def read(adata, species):
        how = InputSettings(species=species)
        return read_counts(adata, bundle=None, vocabulary=GeneVocabulary.builtin(), reading=how)

    found = read(mouse, "mouse")
    alone = read(few, "mouse")
    assert (found.counts_CG != alone.counts_CG).nnz == 0
    np.testing.assert_array_equal(found.measured_G, alone.measured_G)
    joined = read(both, "obs:species")
    assert (joined.counts_CG[cells["human"].n_obs :] != alone.counts_CG).nnz == 0
    with pytest.raises(DataError, match="set species=mouse"):
        read(few, "human")


def test_neither_query_nor_reference_is_overwritten(cells, tmp_path):
    cells["mouse"].write_h5ad(tmp_path / "query.h5ad")
    given = AnnotateSettings(
        model="absent", label_key="cell_type", overwrite=True,
        input=str(tmp_path / "query.h5ad"), reference=str(tmp_path / "reference.h5ad"),
        output=str(tmp_path / "query.h5ad"),
    )  # fmt: skip
    for output in (given.query, given.reference):
        with pytest.raises(ConfigError, match="is what is read"):
            annotate_file(dataclasses.replace(given, output=output))


def test_what_is_no_model_is_refused(cells):
    with pytest.raises(ConfigError, match="model is a dict, which cannot annotate"):
        gm.annotate(cells["mouse"], cells["human"], {}, label_key="cell_type")
    with pytest.raises(DataError, match="No model at nowhere"):
        gm.annotate(cells["mouse"], cells["human"], "nowhere", label_key="cell_type")


def test_the_verb_equals_the_function(random_bundle, cells, tmp_path, capsys):
    from genemodel.command.cli import main

    cells["human"].write_h5ad(tmp_path / "human.h5ad")
    cells["mouse"].write_h5ad(tmp_path / "mouse.h5ad")
    random_bundle.save(tmp_path / "bundle")
    words = [
        "annotate", f"model={tmp_path / 'bundle'}", f"input={tmp_path / 'mouse.h5ad'}",
        f"reference={tmp_path / 'human.h5ad'}", "label_key=cell_type", "k=9", "far_quantile=null",
        "transfer=linear",
        f"output={tmp_path / 'out.h5ad'}", "device=cpu",
    ]  # fmt: skip
    assert main(words) == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    query = cells["mouse"].copy()
    gm.annotate(
        query, cells["human"], random_bundle, label_key="cell_type", transfer="linear", k=9,
        far_quantile=None,
    )  # fmt: skip
    assert written.uns["genemodel_label"]["transfer"] == "linear"
    assert list(written.obs["genemodel_label"]) == list(query.obs["genemodel_label"])
    assert list(written.obs_names) == list(query.obs_names)
    assert main(words) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert main([*words, "overwrite=true", f"input={tmp_path / 'no.h5ad'}"]) == 2
    assert "no.h5ad is no file" in capsys.readouterr().err


def test_what_cannot_be_written_leaves_the_old_file_and_no_half_one(cells, tmp_path):
    output = tmp_path / "o.h5ad"
    output.write_text("what was there")
    odd = cells["human"][:5].copy()
    odd.obs["odd"] = [object() for _ in range(5)]
    with pytest.raises(TypeError):
        write_whole(odd, output)
    assert list(tmp_path.iterdir()) == [output] and output.read_text() == "what was there"
