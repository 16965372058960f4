"""finetune task=classify: its loss reaches the backbone, donors are held out, files are right."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.command.cli import main
from genemodel.errors import DataError
from genemodel.simulation.cells import synthetic


@pytest.fixture(scope="module")
def mine(tmp_path_factory, small_vocabulary):
    """400 generated cells with labels, one in ten without."""
    cells = synthetic(
        400, species=("human",), n_genes=500, genes_per_cell=60, seed=3, vocabulary=small_vocabulary
    )["human"]
    cells.obs["kind"] = cells.obs["cell_type"].astype(object)
    cells.obs.loc[cells.obs_names[::10], "kind"] = np.nan
    path = tmp_path_factory.mktemp("mine") / "cells.h5ad"
    cells.write_h5ad(path)
    return path


def command(mine, small_start, out, *words, backbone="lora"):
    return [
        "finetune", f"input={mine}", f"out={out}", "task=classify", "label_key=kind",
        f"model={small_start / 'run' / 'bundle'}", f"backbone={backbone}", "backbone.rank=2",
        "tokens.context=64", "tokens.budget=512", "trainer.accelerator=cpu", "device=cpu",
        "trainer.max_steps=6", "trainer.validate_every=3", "trainer.validation_batches=2",
        "optim.lr=1e-2", "species=human", *words,
    ]  # fmt: skip


@pytest.mark.usefixtures("blank_report")
@pytest.mark.parametrize("backbone", ["frozen", "lora", "last", "full"])
def test_the_loss_reaches_what_learns_of_the_backbone(mine, small_start, tmp_path, backbone):
    out = tmp_path / "run"
    assert main(command(mine, small_start, out, "trainer.early_stopping=0", backbone=backbone)) == 0
    before = Bundle.load(small_start / "run" / "bundle", device="cpu")
    after = Bundle.load(out / "classifier", device="cpu")
    assert after.settings["labels"] == sorted(after.settings["labels"])
    old, new = before.model.state_dict(), after.model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    if after.provenance["steps"]:
        assert bool(changed) == (backbone != "frozen")
        if backbone == "last":
            assert {name.split(".")[1] for name in changed if name.startswith("blocks")} == {"1"}
    # Heads of a frozen backbone still hold; those of a changed one do not.
    kept = any(name.startswith("decode_counts.") for name in after.heads)
    assert kept == (backbone == "frozen")
    held = after.provenance["labels"]
    # Its own cells are added to those of the start, but for the ones that it was judged by.
    training = after.training
    assert training.sources[: len(before.training.sources)] == before.training.sources
    own = training.sources[len(before.training.sources) :]
    if after.provenance["steps"]:
        assert [(one.name, one.n_cells) for one in own] == [("cells", 400)]
        labelled_told = ad.read_h5ad(out / "labels.h5ad").uns["genemodel_label"]["training"]
        assert labelled_told["in_training"] == own[0].n_trained < 400
    assert held["cells"] > 0 and 0 <= held["accuracy"] <= 1
    assert after.heads["labels.temperature"].item() == pytest.approx(held["temperature"])
    labelled = ad.read_h5ad(out / "labels.h5ad")
    given = ad.read_h5ad(mine)
    assert labelled.obs_names.equals(given.obs_names)
    probability = labelled.obsm["genemodel_label_probability"]
    np.testing.assert_allclose(probability.sum(1), 1.0, rtol=1e-5)
    assert set(labelled.uns["genemodel_label"]["labels"]) == set(given.obs["kind"].dropna())
    # The same labels by the public call, and unknown where nothing is sure enough.
    gm.annotate(given, model=after, unknown=0.0)
    best = np.array(after.settings["labels"])[probability.argmax(1)]
    assert (given.obs["genemodel_label"].astype(str) == best).all()
    gm.annotate(given, model=after, unknown=1.0)
    assert (given.obs["genemodel_label"] == "unknown").mean() > 0.9


@pytest.mark.usefixtures("blank_report")
def test_it_learns_what_can_be_learnt(mine, small_start, tmp_path, caplog):
    out = tmp_path / "run"
    words = ("trainer.max_steps=150", "trainer.validate_every=50", "optim.lr=5e-3")
    with caplog.at_level("INFO"):
        assert main(command(mine, small_start, out, *words, backbone="full")) == 0
    looks = pd.read_csv(out / "backbone" / "validation.csv")
    assert (looks["val/labels"] / looks["val_trivial/labels"]).min() < 0.95
    assert "held-out cells: accuracy" in caplog.text
    # The same command finds a finished run.
    assert main(command(mine, small_start, out, *words, backbone="full")) == 0
    assert "is complete: nothing to do" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["label_key=''"], "task=classify needs label_key"),
        (["batch_key=donor"], "says nothing to task=classify"),
        (["label_key=knd"], "did you mean 'kind'"),
        (["model=''", "backbone=frozen"], "task=classify reads a backbone"),
    ],
)
def test_user_errors_are_told_in_a_line(mine, small_start, tmp_path, capsys, words, said):
    assert main(command(mine, small_start, tmp_path / "run", *words)) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_model_without_labels_needs_a_reference(mine, small_start):
    bundle = Bundle.load(small_start / "run" / "bundle", device="cpu")
    cells = ad.read_h5ad(mine)
    with pytest.raises(DataError, match="tells no labels apart"):
        gm.annotate(cells, model=bundle)
