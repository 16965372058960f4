"""Bundles: what is saved is what is loaded, and damage is named."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.errors import DataError


@pytest.fixture
def saved(random_bundle, tmp_path):
    random_bundle.save(tmp_path / "bundle")
    return tmp_path / "bundle"


def test_round_trip(random_bundle, saved):
    loaded = gm.load(saved, device="cpu")
    for name, tensor in random_bundle.model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[name]), name
    assert loaded.vocabulary.fingerprint == random_bundle.vocabulary.fingerprint
    assert loaded.tokens == random_bundle.tokens
    np.testing.assert_array_equal(loaded.medians_V, random_bundle.medians_V)
    assert loaded.settings == {"some_head": {"n": 4}} and loaded.provenance == {"steps": 7}
    assert loaded.fingerprint == random_bundle.fingerprint
    head = nn.Linear(4, 1, bias=False)
    head.weight = nn.Parameter(torch.zeros(4))
    assert torch.equal(loaded.head("some_head", head).weight, torch.arange(4.0))
    assert "16" in loaded.describe() and "human" in loaded.describe()


def test_saving_twice_gives_the_same_bytes_and_replaces(random_bundle, saved):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    random_bundle.save(saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert not list(saved.parent.glob(".*"))


def test_every_file_missing_or_flipped_is_named(saved):
    for path in sorted(saved.iterdir()):
        original = path.read_bytes()
        path.unlink()
        with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
            Bundle.load(saved)
        if path.name != "bundle.json":
            damaged = bytearray(original)
            damaged[len(damaged) // 2] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(DataError, match="damaged"):
                Bundle.load(saved)
        path.write_bytes(original)
    Bundle.load(saved)


def change(saved, **values):
    about = json.loads((saved / "bundle.json").read_text())
    (saved / "bundle.json").write_text(json.dumps(about | values))


def test_refusals_say_what_where_and_what_to_do(random_bundle, saved, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Bundle.load(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    random_bundle.save(tmp_path / "run" / "bundle")
    with pytest.raises(DataError, match="use its bundle/ directory"):
        Bundle.load(tmp_path / "run")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("do not delete")
    with pytest.raises(DataError, match="not a model bundle"):
        random_bundle.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()
    with pytest.raises(DataError, match="no head 'impute'"):
        random_bundle.head("impute", nn.Linear(1, 1))
    change(saved, format=99)
    with pytest.raises(DataError, match="format 99.*Upgrade"):
        Bundle.load(saved)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("bundle/bundle.json", "use its bundle/ directory"),
        ("backbone/bundle/bundle.json", "use its backbone/bundle/ directory"),
        ("integrated.json", "made to integrate: gm.IntegratedModel.load"),
        ("imputation.json", "made to impute"),
        ("manifest.json", "It is a corpus"),
    ],
)
def test_what_is_no_bundle_is_called_by_its_name(tmp_path, name, said):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=said):
        Bundle.load(tmp_path)


def test_a_mixture_of_two_models_is_refused(saved):
    change(saved, model={"layers": 2, "width": 16, "heads": 2, "ffn": 16})
    with pytest.raises(DataError, match="does not fit the architecture"):
        Bundle.load(saved)


def test_a_setting_this_version_does_not_know_is_refused(saved):
    change(saved, model={"layers": 1, "width": 16, "heads": 2, "ffn": 16, "mystery": 1})
    with pytest.raises(ValueError, match="mystery"):
        Bundle.load(saved)


def test_torn_json_is_refused(saved):
    text = (saved / "bundle.json").read_text()
    (saved / "bundle.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"bundle\.json cannot be read"):
        Bundle.load(saved)
