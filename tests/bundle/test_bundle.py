"""Bundles: what is saved is what is loaded, and damage is named."""

import errno
import json

import numpy as np
import pytest
import torch
from torch import nn

import genemodel as gm
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.directory import KINDS, is_intact, read_about, sealed, write_model
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
        damaged = bytearray(original)
        damaged[len(damaged) // 2] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"damaged|cannot be read"):
            Bundle.load(saved)
        path.write_bytes(original)
    Bundle.load(saved)


def change(saved, **values):
    """Write other values with a right checksum, as a careless script might."""
    about = json.loads((saved / "model.json").read_text())
    (saved / "model.json").write_bytes(sealed(about | values))


def test_refusals_say_what_where_and_what_to_do(random_bundle, saved, tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        Bundle.load(tmp_path / "nowhere")
    (tmp_path / "run").mkdir()
    random_bundle.save(tmp_path / "run" / "bundle")
    with pytest.raises(DataError, match=r"folder of a run: name .*/run/bundle\."):
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
        ("bundle/bundle.json", r"the folder of a run: name .*/bundle\."),
        ("backbone/bundle/bundle.json", r"the folder of a run: name .*/backbone/bundle\."),
        ("model/integrated.json", "folder of a run that made none; it has .*/model"),
        ("integrated.json", "is an integrated model, not a model bundle: genemodel.load reads"),
        ("imputation.json", "is an imputation model, not"),
        ("manifest.json", "is a corpus, not a model bundle: `genemodel pretrain corpus=...` makes"),
        ("finetune.json", "is not a model bundle: it has no model.json"),
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
    text = (saved / "model.json").read_text()
    (saved / "model.json").write_text(text[: len(text) // 2])
    with pytest.raises(DataError, match=r"model\.json cannot be read"):
        Bundle.load(saved)


def test_no_single_flipped_bit_of_what_a_model_says_of_itself_is_read(saved):
    """A bit in a setting, a key, the format or the checksums themselves; 1E-05 for 1e-05, too."""
    wanted = {"model", "tokens", "settings", "provenance", "knowledge"}
    file = saved / "model.json"
    text = file.read_bytes()

    def read():
        return read_about(saved, "model.json", "a model bundle", wanted=wanted)

    said = read()
    assert said["format"] == 4 and said["model"]["norm_eps"] == 1e-05
    loaded = 0
    for place in range(len(text)):
        for bit in range(place % 3, 8, 3):
            broken = bytearray(text)
            broken[place] ^= 1 << bit
            file.write_bytes(broken)
            try:
                read()
            except DataError:
                continue
            loaded += 1
    assert loaded == 0


def test_a_checksum_of_itself_is_of_the_outermost_level(tmp_path):
    blank = "0" * 64
    text = sealed({"a": {"self": blank}, "z": f'"self": "{blank}"', "self": "from before"})
    values = json.loads(text)
    assert is_intact(text, values["self"]) and values["a"] == {"self": blank}
    assert not is_intact(text, blank) and not is_intact(text, None) and not is_intact(text, "")


def test_a_bundle_of_a_format_before_loads(random_bundle, saved):
    about = json.loads((saved / "model.json").read_text())
    (saved / "model.json").unlink()
    del about["self"], about["kind"]
    old = saved / "bundle.json"
    old.write_bytes(sealed(about | {"format": 2}))
    assert Bundle.load(saved).fingerprint == random_bundle.fingerprint
    assert gm.load(saved, device="cpu").provenance == random_bundle.provenance
    old.write_text(json.dumps(about | {"format": 1}))  # without a checksum of itself
    assert Bundle.load(saved).fingerprint == random_bundle.fingerprint
    old.write_text(json.dumps(about | {"format": 2}))
    with pytest.raises(DataError, match="checksum of itself does not fit"):
        Bundle.load(saved)
    for number in (0, True, "1", None):
        old.write_text(json.dumps(about | {"format": number}))
        with pytest.raises(DataError, match="format is"):
            Bundle.load(saved)
    random_bundle.save(saved)  # in its place, as what it is today
    assert sorted(path.name for path in saved.iterdir())[0] == "model.json"


def test_an_overwrite_that_was_stopped_between_its_moves_is_found_by_load_and_save(
    random_bundle, saved, caplog
):
    aside = saved.with_name(".bundle.old")
    saved.rename(aside)
    assert gm.load(saved, device="cpu").fingerprint == random_bundle.fingerprint
    assert "the one before is back" in caplog.text and saved.is_dir()
    saved.rename(aside)
    random_bundle.save(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]


def test_a_disk_that_fills_keeps_the_old_bundle(random_bundle, saved, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("genemodel.bundle.bundle.write_medians", full)
        with pytest.raises(DataError, match=r"bundle cannot be written: the disk is full.*needs"):
            random_bundle.save(saved)
    assert [path.name for path in saved.parent.iterdir()] == ["bundle"]
    assert gm.load(saved).fingerprint == random_bundle.fingerprint
    monkeypatch.setattr("genemodel.writing.free_bytes", lambda path: 1000)
    with pytest.raises(DataError, match=r"needs about 9\.6 MB .* 1\.0 kB \(1,000 bytes\) are free"):
        random_bundle.save(saved)
    assert gm.load(saved).fingerprint == random_bundle.fingerprint


def test_something_else_in_the_place_of_a_model_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("mine")
    for kind in ("bundle", "integration", "imputation"):
        with pytest.raises(DataError, match=f"exists and is not {KINDS[kind]}"):
            write_model(tmp_path / "x", kind, {}, {}, provenance={}, history=None, training=None)
    assert (tmp_path / "x").read_text() == "mine"
