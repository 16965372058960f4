"""Annotation: labels arrive, strangers are told apart, confidence is what it says."""

import logging

import anndata as ad
import numpy as np
import pytest

import genemodel as gm
from genemodel.adapt.integration_net import IntegrationSettings
from genemodel.errors import ConfigError, DataError
from genemodel.inference.annotate import _Transfer, _unit

SHORT = IntegrationSettings(steps=150, passes=1, hidden=32, rank=16, latent=10, batch_cells=64)


@pytest.fixture(scope="module")
def cells():
    return gm.synthetic(500, n_cell_types=3, n_batches=2, n_genes=1500, genes_per_cell=500, seed=6)


def test_human_labels_reach_mouse_cells_through_a_bundle(random_bundle, cells, tmp_path):
    human, mouse = cells["human"].copy(), cells["mouse"].copy()
    gm.annotate(mouse, human, random_bundle, label_key="cell_type", unknown=0.0, far_quantile=None)
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
                species="mouse", reference_species="human")  # fmt: skip
    right = (mouse.obs["genemodel_label"].astype(str) == mouse.obs["cell_type"].astype(str)).mean()
    chance = mouse.obs["cell_type"].value_counts(normalize=True).max()
    assert right > chance + 0.2
    again = mouse[::-1].copy()
    gm.annotate(again, human, model, label_key="cell_type", unknown=0.0, far_quantile=None,
                species="mouse", reference_species="human")  # fmt: skip
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
            query, reference, random_bundle, label_key="cell_type", unknown=0.0, far_quantile=1e-6
        )
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


def test_confidence_is_as_often_right_as_it_says():
    """Overlapping types: among new cells of the same kind, confidence equals accuracy."""
    rng = np.random.default_rng(1)
    centre = rng.normal(size=(3, 5))

    def draw(n):
        label = rng.integers(0, 3, n)
        return _unit(centre[label] + 0.9 * rng.normal(size=(n, 5))), label

    unit, label = draw(1500)
    transfer = _Transfer(unit, label, 3, 15)
    calibration = transfer.calibrate(0)
    new, truth = draw(1500)
    winner, share, _ = transfer.vote(new)
    confidence = calibration.confidence(share)
    right = winner == truth
    assert 0.4 < right.mean() < 0.95
    assert abs(confidence.mean() - right.mean()) < 0.04
    order = np.argsort(confidence)
    for part in np.array_split(order, 3):
        assert abs(confidence[part].mean() - right[part].mean()) < 0.08


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label_key": "celltype"}, "reference.obs has no column.*did you mean 'cell_type'"),
        ({"label_key": "species"}, "1 different labels"),
        ({"k": 0}, "k=0"),
        ({"unknown": 2.0}, "unknown=2.0"),
        ({"far_quantile": 0.0}, "far_quantile=0.0"),
        ({"key_added": ""}, "key_added"),
        ({"k": 400}, "401 are needed"),
    ],
)
def test_refusals(random_bundle, cells, options, words):
    with pytest.raises((ConfigError, DataError), match=words):
        gm.annotate(
            cells["mouse"].copy(), cells["human"], random_bundle,
            **{"label_key": "cell_type", **options},
        )  # fmt: skip


def test_what_is_no_model_is_refused(cells):
    with pytest.raises(ConfigError, match="model is a str"):
        gm.annotate(cells["mouse"], cells["human"], "bundle", label_key="cell_type")


def test_the_verb_equals_the_function(random_bundle, cells, tmp_path, capsys):
    from genemodel.cli import main

    cells["human"].write_h5ad(tmp_path / "human.h5ad")
    cells["mouse"].write_h5ad(tmp_path / "mouse.h5ad")
    random_bundle.save(tmp_path / "bundle")
    words = [
        "annotate", f"model={tmp_path / 'bundle'}", f"query={tmp_path / 'mouse.h5ad'}",
        f"reference={tmp_path / 'human.h5ad'}", "label_key=cell_type", "k=9", "far_quantile=null",
        f"output={tmp_path / 'out.h5ad'}", "device=cpu",
    ]  # fmt: skip
    assert main(words) == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    query = cells["mouse"].copy()
    gm.annotate(query, cells["human"], random_bundle, label_key="cell_type", k=9, far_quantile=None)
    assert list(written.obs["genemodel_label"]) == list(query.obs["genemodel_label"])
    assert list(written.obs_names) == list(query.obs_names) and written.n_vars == 0
    assert main(words) == 2
    assert "overwrite=true" in capsys.readouterr().err
    assert main([*words, "overwrite=true", f"query={tmp_path / 'no.h5ad'}"]) == 2
    assert "no.h5ad is no file" in capsys.readouterr().err
