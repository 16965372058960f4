"""Damage to any file on disk: refused by name, or harmless; never silent, never a crash."""

import json

import pytest


@pytest.fixture
def corruption(monkeypatch, repository):
    """The script, importable in its child processes, too."""
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    import corruption

    return corruption


def test_the_matrix_sees_what_is_silent_and_what_crashes(corruption, tmp_path, monkeypatch):
    path = corruption.make_bundle(tmp_path)
    whole = corruption.digest(corruption.read_bundle(path))

    def judge(file, damage, place=0):
        return corruption.judge("bundle", path, corruption.Case(file, damage, place), whole)[0]

    before = {file.name: file.read_bytes() for file in path.iterdir()}
    bit = 8 * before["model.json"].index(b'"steps": 7') + 8 * len('"steps": ')
    assert judge("model.json", "flip", bit) == "refused"
    assert judge("weights.safetensors", "missing") == "refused"
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    # As bundles were before they held a checksum of what they say.
    about = {k: v for k, v in json.loads(before["model.json"]).items() if k != "self"}
    (path / "model.json").write_text(json.dumps(about | {"format": 1}, indent=1, sort_keys=True))
    bit = 8 * (path / "model.json").read_bytes().index(b'"steps": 7') + 8 * len('"steps": ')
    assert judge("model.json", "flip", bit) == "silent"
    assert judge("model.json", "longer") == "refused"  # a byte 0 is no JSON

    def broken(path):
        raise KeyError("x")

    monkeypatch.setitem(corruption.KINDS, "bundle", (corruption.make_bundle, broken))
    assert judge("model.json", "missing") == "crash"


@pytest.mark.slow
def test_no_damage_is_silent_or_a_crash(corruption, tmp_path, capsys):
    counts = corruption.matrix(tmp_path, flips=1, cuts=0)
    said = capsys.readouterr().out
    for kind, found in counts.items():
        assert not found["silent"] + found["crash"] + found["unnamed"], said
        assert found["refused"] >= 20, kind
    assert counts["corpus"].total() > 500
