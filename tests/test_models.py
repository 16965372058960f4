"""Models of every kind from their folders: what it is, what it can do, and what it cannot."""

import json
import shutil
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from safetensors.torch import load_file, save_file

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.directory import CORPUS, KINDS, sealed, sha256
from genemodel.bundle.given import model_for
from genemodel.command.verbs import DescribeSettings, describe
from genemodel.corpus.manifest import MANIFEST
from genemodel.corpus.statistics import GeneStatistics
from genemodel.embedding.embed import EmbedSettings, embed_file
from genemodel.errors import ConfigError, DataError
from genemodel.heads.decode_counts import CountDecoder
from genemodel.imputation.impute import IMPUTE
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import DecoderSettings
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.model import IntegratedModel
from genemodel.integration.shared_clusters import SharedClusterCorrection
from genemodel.loading import EMBED, MODELS, load

SHORT = IntegrationSettings(steps=6, passes=0, hidden=16, rank=8, latent=6, batch_cells=32)


@pytest.fixture(scope="module")
def cells():
    return gm.synthetic(
        90, species=("human",), n_batches=2, n_genes=400, genes_per_cell=80, seed=2
    )["human"]


@pytest.fixture(scope="module")
def integrated(cells):
    return gm.integrate(cells.copy(), batch_key="batch", settings=SHORT)


@pytest.fixture(scope="module")
def imputation(cells):
    return gm.impute(
        cells.copy(), batch_key="batch", settings=DecoderSettings(epochs=5, hidden=8, latent=4)
    )


@pytest.fixture(scope="module")
def folders(random_bundle, integrated, imputation, tmp_path_factory):
    """The three kinds where a run puts them."""
    run = tmp_path_factory.mktemp("models") / "run"
    run.mkdir()
    named = {"bundle": random_bundle, "model": integrated, "imputation_model": imputation}
    for name, model in named.items():
        model.save(run / name)
    return run


def test_a_folder_is_read_as_what_it_is(folders):
    kinds = {"bundle": Bundle, "model": IntegratedModel, "imputation_model": ImputationModel}
    for name, kind in kinds.items():
        model = gm.load(folders / name, device="cpu")
        assert type(model) is kind
        assert type(gm.load(str(folders / name), device="cpu")) is kind
    assert {*MODELS, CORPUS} == set(KINDS)
    assert set(MODELS.values()) == {*EMBED, *IMPUTE}


def test_what_is_no_model_is_refused_with_the_way_out(folders, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path / "none")
    with pytest.raises(DataError, match="is not a model: it has no model.json"):
        load(tmp_path)
    with pytest.raises(DataError, match=r"run: name .*/bundle or .*/model or .*/imputation_model"):
        load(folders)
    with pytest.raises(DataError, match=r"folder of a run: name .*/run/model\.$"):
        IntegratedModel.load(folders)
    (tmp_path / MANIFEST).write_text("{}")
    with pytest.raises(DataError, match="is a corpus, not a model: `genemodel pretrain"):
        load(tmp_path)


def test_a_model_that_cannot_do_it_is_refused_before_its_weights_are_read(
    folders, integrated, imputation, monkeypatch
):
    monkeypatch.setattr(ImputationModel, "load", None)
    with pytest.raises(ConfigError, match="imputation_model is an ImputationModel, which cannot"):
        model_for("embed", EMBED, folders / "imputation_model")
    with pytest.raises(ConfigError, match="cannot embed: give a Bundle or an IntegratedModel"):
        model_for("embed", EMBED, imputation)
    with pytest.raises(ConfigError, match="an IntegratedModel, which cannot impute: give an Imp"):
        model_for("impute", IMPUTE, integrated)
    with pytest.raises(ConfigError, match="is a dict, which cannot"):
        model_for("impute", IMPUTE, {})


def test_each_verb_refuses_what_cannot_do_it(cells, integrated, imputation):
    adata = cells.copy()
    before = set(adata.layers), set(adata.obsm)
    with pytest.raises(ConfigError, match="IntegratedModel, which cannot impute"):
        gm.impute(adata, integrated)
    with pytest.raises(ConfigError, match="ImputationModel, which cannot annotate"):
        gm.annotate(adata, cells, imputation, label_key="cell_type")
    with pytest.raises(ConfigError, match="ImputationModel, which cannot embed"):
        gm.evaluate(adata, batch_key="batch", models=[imputation])
    assert (set(adata.layers), set(adata.obsm)) == before


def test_imputing_by_a_path_is_imputing_by_the_model(cells, imputation, folders):
    by_model, by_path = cells.copy(), cells.copy()
    gm.impute(by_model, imputation)
    gm.impute(by_path, folders / "imputation_model")
    assert sp.issparse(cells.X) and np.isfinite(by_path.layers["imputed"]).all()
    np.testing.assert_array_equal(by_model.layers["imputed"], by_path.layers["imputed"])


def test_embedding_by_a_network_on_counts_is_its_own_embedding(cells, integrated, folders):
    expected = integrated.encode(cells)
    adata = cells.copy()
    assert gm.embed(adata, integrated) is None
    np.testing.assert_array_equal(adata.obsm["X_genemodel"], expected)
    assert "X_integrated" not in adata.obsm  # which is what an integration wrote
    gm.embed(adata, folders / "model", key_added="X_new", new_batch=True)
    np.testing.assert_array_equal(adata.obsm["X_new"], integrated.encode(cells, new_batch=True))
    assert np.abs(adata.obsm["X_new"] - expected).max() > 0


def test_integrating_and_embedding_write_side_by_side(cells, random_bundle, folders):
    adata = cells.copy()
    model = gm.integrate(adata, batch_key="batch", settings=SHORT)
    integrated = adata.obsm["X_integrated"].copy()
    gm.embed(adata, random_bundle)
    np.testing.assert_array_equal(adata.obsm["X_integrated"], integrated)
    assert adata.obsm["X_genemodel"].shape == (90, random_bundle.model.settings.width)
    model.embed(adata)
    np.testing.assert_array_equal(adata.obsm["X_integrated"], integrated)
    assert adata.obsm["X_genemodel"].shape == integrated.shape
    gm.embed(adata, random_bundle)
    by_path = cells.copy()
    gm.embed(by_path, folders / "bundle", device="cpu")
    np.testing.assert_array_equal(by_path.obsm["X_genemodel"], adata.obsm["X_genemodel"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch_size": 8}, "batch_size say how a transformer runs"),
        ({"device": "cpu", "compile": True}, "device and compile say"),
    ],
)
def test_what_only_a_transformer_can_use_is_refused(cells, integrated, options, said):
    adata = cells.copy()
    with pytest.raises(ConfigError, match=said):
        gm.embed(adata, integrated, **options)
    assert "X_genemodel" not in adata.obsm


def test_a_bundle_knows_of_no_batches(cells, random_bundle):
    with pytest.raises(ConfigError, match="new_batch=True says nothing to a Bundle"):
        gm.embed(cells.copy(), random_bundle, new_batch=True)


def test_the_verb_embeds_a_file_with_a_network_on_counts(cells, integrated, folders, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    given = {
        "model": str(folders / "model"),
        "input": str(tmp_path / "cells.h5ad"),
        "output": str(tmp_path / "out.h5ad"),
        "device": "cpu",
    }
    for words, said in (
        ({"batch_size": 4}, "batch_size say how"),
        ({"device": ("cpu", "cpu")}, "device say how"),
        ({"model": str(folders / "imputation_model")}, "ImputationModel, which cannot embed"),
        ({"model": str(folders)}, "folder of a run: name .*bundle or .*model"),
    ):
        with pytest.raises((ConfigError, DataError), match=said):
            embed_file(EmbedSettings(**{**given, **words}))
        assert not (tmp_path / "out.h5ad").exists()
    written = ad.read_h5ad(embed_file(EmbedSettings(**given)))
    np.testing.assert_allclose(
        written.obsm["X_genemodel"], integrated.encode(cells), rtol=1e-5, atol=1e-6
    )
    assert written.X is None and not written.layers
    assert list(written.obs_names) == list(cells.obs_names)
    assert set(written.obs) == set(cells.obs) and set(written.var) == set(cells.var)
    # In Python the same from the path, with the counts left out of what is returned.
    back = gm.embed(tmp_path / "cells.h5ad", folders / "model")
    np.testing.assert_array_equal(back.obsm["X_genemodel"], written.obsm["X_genemodel"])
    assert back.X is None
    (tmp_path / "cells.csv").write_text("")
    with pytest.raises(DataError, match="cells.csv: is empty"):
        gm.embed(tmp_path / "cells.csv", folders / "model")


def test_history_and_provenance_go_with_every_model(random_bundle, integrated, imputation, folders):
    frame = pd.DataFrame({"step": [5, 10], "val/total": [1 / 3, 0.1]})
    replace(random_bundle, history=frame).save(folders.parent / "told")
    pd.testing.assert_frame_equal(load(folders.parent / "told").history, frame)
    assert list(load(folders / "bundle").history.columns) == ["step"]
    assert len(load(folders / "bundle").history) == 0
    for name, model, losses in (
        ("model", integrated, ["kl", "nats_per_count"]),
        ("imputation_model", imputation, ["nats_per_molecule"]),
    ):
        back = load(folders / name)
        assert list(model.history.columns) == ["step", *losses]
        pd.testing.assert_frame_equal(back.history, model.history)
        assert back.provenance == model.provenance
        assert back.provenance["cells"] == 90 and back.provenance["seed"] == 0
    assert integrated.history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert imputation.history["nats_per_molecule"].min() == imputation.trained.heldout_nats


def test_what_a_notebook_shows_of_a_model_is_a_line_or_two(random_bundle, integrated, imputation):
    assert integrated.correction is not None
    posterior = imputation.posterior()
    models = (random_bundle, integrated, imputation)
    said = ("tokens of human, mouse", "2 batches of batch; labels: none", "90 cells × 400 genes")
    for model, words in zip(models, said, strict=True):
        assert words in repr(model)
    objects = (*models, integrated.correction, imputation.trained, posterior)
    assert all(len(repr(one)) < 400 for one in objects), [repr(one) for one in objects]
    assert "2 batches, 6 dimensions" in repr(integrated.correction)
    assert repr(SharedClusterCorrection()) == "SharedClusterCorrection(not fitted)"


# -- every kind of folder × every call -------------------------------------------------------------

BRIEF = DecoderSettings(epochs=1, hidden=8, latent=4)


@pytest.fixture(scope="module")
def decoding(random_bundle):
    """The random bundle with a count decoder."""
    n = len(random_bundle.vocabulary)
    torch.manual_seed(1)
    decoder = CountDecoder(16, GeneStatistics.empty(2, n), 1, torch.zeros(1, n, dtype=torch.bool))
    with torch.no_grad():
        decoder.projection.project.weight.normal_(std=0.3)
    heads = {f"decode_counts.{k}": v.clone() for k, v in decoder.state_dict().items()}
    return replace(random_bundle, heads=heads)


@pytest.fixture(scope="module")
def every(cells, random_bundle, decoding, integrated, imputation):
    """Every kind of model, with and without a bundle beneath."""
    return {
        "bundle": random_bundle,
        "decoding bundle": decoding,
        "integrated": integrated,
        "integrated, species": gm.integrate(
            cells.copy(), batch_key="batch", settings=SHORT, species="human"
        ),
        "integrated on a bundle": gm.integrate(
            cells.copy(), batch_key="batch", settings=SHORT, model=decoding
        ),
        "imputation": imputation,
        "imputation on a bundle": gm.impute(
            cells.copy(), decoding, settings=BRIEF, backbone="frozen"
        ),
        "imputation by a bundle": gm.impute(cells.copy(), decoding),
    }


def embedded(adata, model):
    gm.embed(adata, model)
    return next(iter(adata.obsm.values()))


def imputed(adata, model):
    gm.impute(adata, model)
    return adata.layers["imputed"]


def annotated(adata, model):
    gm.annotate(adata, adata.copy(), model, label_key="cell_type", transfer="knn")
    return adata.obs["genemodel_label_confidence"].to_numpy()


def told(adata, model):
    found = gm.contamination(adata, model)
    return None if found.found_C is None else found.found_C


EMBEDS = {"bundle", "decoding bundle", "integrated", "integrated, species"} | {
    "integrated on a bundle"
}
CALLS = {
    embedded: EMBEDS,
    annotated: EMBEDS,
    imputed: {"decoding bundle", "imputation", "imputation on a bundle", "imputation by a bundle"},
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_call_works_with_what_can_do_it_and_by_its_folder_too(cells, every, call, tmp_path):
    for name, model in every.items():
        model.save(tmp_path / "model")
        before = cells.copy()
        if name not in CALLS[call]:
            for one in (model, tmp_path / "model"):
                with pytest.raises(ConfigError, match=r"cannot|without a count decoder"):
                    call(before, one)
            assert not (set(before.obsm) | set(before.layers)) - set(cells.layers), name
        else:
            found = call(before, model)
            assert np.isfinite(found).all(), name
            again = call(cells.copy(), tmp_path / "model")
            np.testing.assert_allclose(again, found, rtol=1e-4, atol=1e-6, err_msg=name)
        shutil.rmtree(tmp_path / "model")


def test_every_model_tells_what_it_is(cells, every, tmp_path):
    for name, model in every.items():
        model.save(tmp_path / name)
        back = gm.load(tmp_path / name, device="cpu")
        assert type(back) is type(model) and back.provenance == model.provenance
        assert list(back.history.columns)[0] == "step" and len(repr(back)) < 400
        pd.testing.assert_frame_equal(back.history, model.history)
        said = describe(DescribeSettings(tmp_path / name))
        assert said.startswith(f"{model.KIND} ") and "trained on" in said
        assert [said.count("\n") > 3, back.describe() in said] == [True, True]
        np.testing.assert_array_equal(told(cells, back), told(cells, model), err_msg=name)
        about = json.loads((tmp_path / name / "model.json").read_text())
        assert about["format"] == 4 and MODELS[about["kind"]] is type(model)
        assert (tmp_path / name / "weights.safetensors").is_file()


def as_before(folder, number):
    """Turn a folder into what an earlier version wrote: names of file and weights, history."""
    about = json.loads((folder / "model.json").read_text())
    kind = about.pop("kind")
    (folder / "model.json").unlink()
    weights = load_file(folder / "weights.safetensors")
    if kind == "imputation":
        history = (folder / "history.tsv").read_text().split("\n")[1:-1]
        about["history"] = [[float(x) for x in row.split("\t")] for row in history]
        (folder / "history.tsv").unlink()
        del about["pretrained"]
    if kind != "bundle":
        (folder / "training.safetensors").unlink()
        del about["training"]
        named = {}
        for name, tensor in weights.items():
            if name.endswith("share_B"):
                continue  # all batches weighed the same
            name = name.replace(".beside.linear.", ".features_in.")
            name = name.replace(".beside.", ".feature_")
            if number < 3:
                name = name.replace(".encoder.", ".").replace(".head.", ".")
            if not (number < 3 and kind == "imputation" and ".feature_" in name):
                named[name] = tensor.clone()
        save_file(named, folder / "weights.safetensors")
    about["sha256"] = {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file()}
    file = {"bundle": "bundle", "integration": "integrated", "imputation": "imputation"}[kind]
    about["format"] = min(number, 2) if kind == "bundle" else number
    if number > 1:
        (folder / f"{file}.json").write_bytes(sealed(about))
    else:
        del about["self"]
        (folder / f"{file}.json").write_text(json.dumps(about))
    if (folder / "bundle").is_dir():
        as_before(folder / "bundle", number)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_folders_of_before_are_read(cells, every, tmp_path, number):
    for name, model in every.items():
        if name == "imputation by a bundle" or (number < 3 and name == "imputation on a bundle"):
            continue  # there were none
        model.save(tmp_path / name)
        as_before(tmp_path / name, number)
        assert not (tmp_path / name / "model.json").exists()
        back = gm.load(tmp_path / name, device="cpu")
        assert type(back) is type(model) and back.provenance == model.provenance
        pd.testing.assert_frame_equal(back.history, model.history)
        call = embedded if name in EMBEDS else imputed
        found, expected = call(cells.copy(), back), call(cells.copy(), model)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6, err_msg=name)
        if not isinstance(back, Bundle):
            assert back.training is None and "trained on: unknown" in back.describe()
        back.save(tmp_path / name)  # as what it is today, in the same place
        assert sorted(p.name for p in (tmp_path / name).glob("*.json")) == ["model.json"]


def test_a_folder_of_a_kind_that_is_not_known_is_refused(cells, integrated, tmp_path):
    integrated.save(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    about = json.loads(file.read_text())
    file.write_bytes(sealed(about | {"kind": "perturbation"}))
    with pytest.raises(DataError, match=r"model\.json cannot be read \(kind is 'perturbation'\)"):
        gm.load(tmp_path / "model")
    file.write_bytes(sealed(about | {"kind": "corpus"}))
    with pytest.raises(DataError, match="kind is 'corpus'"):
        gm.load(tmp_path / "model")
    file.write_bytes(sealed(about | {"format": 5}))
    with pytest.raises(DataError, match="of format 5; this version reads up to 4. Upgrade"):
        gm.load(tmp_path / "model")
