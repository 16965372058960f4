"""Weights & Biases: one run however often it stops, no leak, and training never depends on it."""

import json
import logging
import socket
import struct
import sys
import time

import pytest

from genemodel.train import wandb_log
from genemodel.train.settings import LogSettings
from genemodel.train.wandb_log import start_wandb, without_secrets

pytest.importorskip("wandb")

ON = LogSettings(kind="wandb", entity="team", project="atlas", group="g1", tags=("one", "two"))
VALUES = {
    "corpus": "/home/somebody/private/corpus",
    "tokens": {"context": 5},
    "hf_token": "verysecret123",
}


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    """No test talks to a server, whoever is logged in on this machine."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")


def written(folder, wanted, seconds=30):
    """All bytes under a folder; wandb's service writes the last ones after ``finish``."""
    deadline = time.monotonic() + seconds
    while True:
        found = b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
        if all(text in found for text in wanted) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def records(path):
    """What a .wandb file holds, in order: a log as of LevelDB, in blocks of 32 kB."""
    from wandb.proto.wandb_internal_pb2 import Record

    text, at, whole = path.read_bytes(), 7, b""  # after the name and version of the format
    while at + 7 <= len(text):
        if at % 32768 > 32768 - 7:  # no header fits into the end of a block
            at += -at % 32768
        length, kind = struct.unpack("<HB", text[at + 4 : at + 7])  # behind 4 bytes of checksum
        whole += text[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # complete, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def steps_of(path):
    found = []
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            items = {(i.key or ".".join(i.nested_key)): i.value_json for i in record.history.item}
            found.append(json.loads(items["step"]))
    return found


def test_two_sessions_are_pieces_of_one_run_and_say_how_to_send_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = tmp_path / "my run"
    run.mkdir()
    for steps in ((1, 2, 3), (3, 4)):  # the last checkpoint was at step 2
        log = start_wandb(run, ON, VALUES)
        for step in steps:
            log.log({"loss": 1 / step}, step=step)
        log.finish()
        time.sleep(1.1)  # wandb names a piece by the second of its start
    assert f"wandb sync '{run}/wandb'" in caplog.text
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    pieces = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert len(pieces) == 2
    written(run, [b"loss"])
    assert [steps_of(piece) for piece in pieces] == [[1, 2, 3], [3, 4]]
    opened = [
        next(r.run for r in records(p) if r.WhichOneof("record_type") == "run") for p in pieces
    ]
    assert opened[0].run_id == opened[1].run_id == pieces[0].name[4:-6]
    for one in opened:
        assert (one.entity, one.project, one.run_group) == ("team", "atlas", "g1")
        assert list(one.tags) == ["one", "two"] and one.display_name == "my run"
    # wandb's own counter would drop step 3 of the second session, or call it 4.
    metrics = [r.metric for r in records(pieces[0]) if r.WhichOneof("record_type") == "metric"]
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)


def test_neither_secrets_nor_paths_nor_the_host_leak(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["genemodel", "--api_key=verysecret123"])
    assert without_secrets(VALUES) == {
        "corpus": "corpus", "tokens": {"context": 5}, "hf_token": "(left out)",
    }  # fmt: skip
    assert without_secrets({"model": {"knowledge": ("/home/somebody/genes.tsv", "go")}}) == {
        "model": {"knowledge": ["genes.tsv", "go"]}
    }
    log = start_wandb(tmp_path, ON, VALUES)
    log.log({"loss": 1.0}, step=1)
    log.finish()
    found = written(tmp_path, [b"loss"])
    assert b"loss" in found and b"verysecret123" not in found and b"somebody" not in found
    [sent] = tmp_path.glob("wandb/offline-run-*/*.wandb")  # what `wandb sync` would send
    assert str(tmp_path).encode() not in sent.read_bytes()
    if len(socket.gethostname()) > 4:
        assert socket.gethostname().encode() not in sent.read_bytes()


@pytest.mark.parametrize("system", [True, False])
def test_the_host_is_watched_unless_told_otherwise(system, tmp_path, monkeypatch):
    import wandb

    seen = {}
    monkeypatch.setattr(wandb, "init", lambda **options: seen.update(options) or pytest.fail)
    start_wandb(tmp_path, LogSettings(kind="wandb", system=system), VALUES)
    settings = seen["settings"]
    assert settings.x_disable_stats is not system
    assert settings.x_disable_meta and settings.disable_git and settings.disable_code
    assert not settings.x_save_requirements


def test_another_kind_of_log_is_none(tmp_path):
    assert start_wandb(tmp_path, LogSettings(), VALUES) is None
    assert not list(tmp_path.iterdir())


def test_without_wandb_or_with_a_broken_one_training_goes_on(tmp_path, monkeypatch, caplog):
    import wandb

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        assert start_wandb(tmp_path, ON, VALUES) is None
    assert "wandb cannot be imported" in caplog.text and "pip install wandb" in caplog.text

    def broken(**options):
        raise RuntimeError("service did not start")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", broken)
        assert start_wandb(tmp_path, ON, VALUES) is None
    assert "service did not start" in caplog.text and "metrics.csv alone" in caplog.text


def test_online_without_a_key_is_written_offline_and_never_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    log = start_wandb(tmp_path, LogSettings(kind="wandb", mode="online"), VALUES)
    log.finish()
    assert "no key in WANDB_API_KEY" in caplog.text and "to be sent later" in caplog.text
    assert f"wandb sync {tmp_path}/wandb" in caplog.text
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1


def test_online_says_the_address(tmp_path, monkeypatch, caplog):
    import wandb

    class Run:
        url = "https://example.org/team/atlas/runs/1"

        def define_metric(self, *args, **options):
            pass

        def finish(self, exit_code):
            self.exit_code = exit_code

    run = Run()
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(wandb, "login", lambda **options: True)
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    log = start_wandb(tmp_path, LogSettings(kind="wandb", mode="online"), VALUES)
    assert run.url in caplog.text and "sync" not in caplog.text
    log.log({"loss": 1.0}, step=1)  # this run has no `log`: it fails
    assert "Weights & Biases stopped (AttributeError" in caplog.text
    log.log({"loss": 1.0}, step=2)
    log.finish(143)
    assert caplog.text.count("Weights & Biases stopped") == 1 and not hasattr(run, "exit_code")


@pytest.mark.parametrize("text", ["", "{}", '{"id": 3}', "[1]", "\xff"])
def test_a_damaged_number_file_is_named_and_replaced(text, tmp_path, caplog):
    file = tmp_path / wandb_log.NUMBER
    file.write_text(text)
    number = wandb_log._number(file)
    assert len(number) == 8 and wandb_log._number(file) == number
    assert ("is damaged" in caplog.text) or text == '{"id": 3}'
