"""Checkpoints: what was the state at the call is on disk, whole, and training does not wait."""

import errno
import json
import threading
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from genemodel import writing
from genemodel.errors import DataError
from genemodel.train import checkpoint as module
from genemodel.train.checkpoint import CheckpointWriter, newest_checkpoint, prune, read_checkpoint


def at(folder, step):
    return folder / f"step-{step:08d}"


def state_of(value, n=1000):
    return {
        "weights": OrderedDict(a=torch.full((n,), float(value))),
        "steps": value,
        "x": [1, (2,)],
    }


def steps_in(folder):
    return [int(path.name[5:]) for path in sorted(folder.glob("step-*"))]


@pytest.fixture
def held(monkeypatch):
    """Hold the writing thread at the door until told otherwise."""
    door, write = threading.Event(), module._write

    def slowly(*args):
        assert door.wait(30)
        write(*args)

    monkeypatch.setattr(module, "_write", slowly)
    return door


def test_the_state_at_the_call_is_what_is_read_whatever_training_does_meanwhile(tmp_path, held):
    state = state_of(1)
    with CheckpointWriter() as writer:
        writer.save(at(tmp_path, 1), state, {"step": 1})
        state["weights"]["a"].add_(1)  # as an optimiser does
        state["x"].append(9)
        assert newest_checkpoint(tmp_path) is None  # nothing waited for the disk
        held.set()
    found = newest_checkpoint(tmp_path)
    assert found.step == 1 and found.path == at(tmp_path, 1)
    read = found.state()
    assert torch.equal(read["weights"]["a"], torch.ones(1000))
    assert read["x"] == [1, (2,)] and read["steps"] == 1
    assert writer.saves == 1 and writer.written_s > 0 and writer.stalled_s > 0


def test_files_are_those_that_were_written_before(tmp_path):
    with CheckpointWriter() as writer:
        writer.save(at(tmp_path, 1), state_of(1), {"step": 1, "settings": {"a": "β"}}, wait=True)
        assert steps_in(tmp_path) == [1]  # wait: on disk before close
    assert sorted(p.name for p in at(tmp_path, 1).iterdir()) == [
        "COMPLETE.json", "about.json", "state.pt",
    ]  # fmt: skip
    sums = json.loads((at(tmp_path, 1) / "COMPLETE.json").read_text())
    assert sums.keys() == {"state.pt", "about.json"}


def test_what_modules_share_and_note_beside_their_weights_survives(tmp_path):
    layer = torch.nn.Linear(300, 300, bias=False)
    state = {"a": layer.state_dict(), "b": layer.state_dict()}
    with CheckpointWriter() as writer:
        writer.save(at(tmp_path, 1), state, {"step": 1})
    read = newest_checkpoint(tmp_path).state()
    assert read["a"]._metadata == layer.state_dict()._metadata
    assert read["a"]["weight"].data_ptr() == read["b"]["weight"].data_ptr()
    assert (at(tmp_path, 1) / "state.pt").stat().st_size < 2 * 300 * 300 * 4


def test_what_could_not_be_read_again_is_refused_before_writing(tmp_path):
    for value in (Path("x"), torch.nn.Linear(1, 1), {1}):
        with pytest.raises(TypeError, match=r"state\['y'\]\[0\]"), CheckpointWriter() as writer:
            writer.save(at(tmp_path, 1), {"y": [value]}, {"step": 1})
    assert not list(tmp_path.iterdir())


def test_the_next_save_waits_for_the_one_before_and_the_newest_stay(tmp_path):
    with CheckpointWriter(keep=2) as writer:
        for step in range(1, 6):
            writer.save(at(tmp_path, step), state_of(step), {"step": step})
            assert step == 1 or newest_checkpoint(tmp_path).step >= step - 1
    assert steps_in(tmp_path) == [4, 5] and writer.saves == 5
    assert not list(tmp_path.glob(".*"))


def test_an_error_of_the_thread_is_raised_by_the_next_call_once(tmp_path, monkeypatch):
    writer = CheckpointWriter()
    writer.save(at(tmp_path, 1), state_of(1), {"step": 1}, wait=True)

    def broken(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", broken)
        writer.save(at(tmp_path, 2), state_of(2), {"step": 2})
        with pytest.raises(DataError, match="last checkpoint could not be written.*Input/output"):
            writer.save(at(tmp_path, 3), state_of(3), {"step": 3})
    assert steps_in(tmp_path) == [1] and not list(tmp_path.glob(".*"))
    writer.save(at(tmp_path, 4), state_of(4), {"step": 4})
    writer.close()
    assert steps_in(tmp_path) == [1, 4] and writer.saves == 2


def test_a_full_disk_seen_beforehand_costs_the_oldest_or_nothing(tmp_path, monkeypatch):
    with CheckpointWriter(keep=3) as writer:
        for step in (1, 2, 3):
            writer.save(at(tmp_path, step), state_of(step), {"step": step})
    size = writing.size_of(at(tmp_path, 1))
    # Room for all but one and a half of what a checkpoint takes.
    monkeypatch.setattr(module, "free_bytes", lambda path: module._bytes_of(state_of(4)) - size - 9)
    monkeypatch.setattr(writing, "free_bytes", lambda path: 1 << 40)
    with CheckpointWriter(keep=9) as writer:
        writer.save(at(tmp_path, 4), state_of(4), {"step": 4})
    assert steps_in(tmp_path) == [3, 4]
    big = state_of(5, n=100_000)
    with pytest.raises(DataError, match="disk is full"), CheckpointWriter(keep=9) as writer:
        writer.save(at(tmp_path, 5), big, {"step": 5})
    assert steps_in(tmp_path) == [3, 4] and newest_checkpoint(tmp_path).step == 4


def test_the_newest_complete_one_is_not_the_one_that_makes_room(tmp_path, monkeypatch):
    with CheckpointWriter(keep=2) as writer:
        for step in (1, 2):
            writer.save(at(tmp_path, step), state_of(step), {"step": step})
    (at(tmp_path, 2) / "state.pt").write_bytes(b"damaged")
    monkeypatch.setattr(module, "free_bytes", lambda path: module._bytes_of(state_of(3)) - 7)
    writer = CheckpointWriter(keep=1)
    with pytest.raises(DataError, match="disk is full"):  # what the damaged one frees is too little
        writer.save(at(tmp_path, 3), state_of(3, n=10_000), {"step": 3})
    assert steps_in(tmp_path) == [1, 2]
    writer.save(at(tmp_path, 3), state_of(3), {"step": 3}, wait=True)
    assert steps_in(tmp_path) == [3]


def test_a_quota_that_shows_only_in_writing_costs_the_oldest(tmp_path, monkeypatch):
    with CheckpointWriter(keep=2) as writer:
        for step in (1, 2):
            writer.save(at(tmp_path, step), state_of(step), {"step": step})
    save = torch.save

    def limited(*args, **kwargs):
        if len(steps_in(tmp_path)) > 1:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        save(*args, **kwargs)

    monkeypatch.setattr(torch, "save", limited)
    with CheckpointWriter(keep=2) as writer:
        writer.save(at(tmp_path, 3), state_of(3), {"step": 3})
    assert steps_in(tmp_path) == [2, 3]

    def never(*args, **kwargs):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(torch, "save", never)
    with pytest.raises(DataError, match="quota"), CheckpointWriter(keep=2) as writer:
        writer.save(at(tmp_path, 4), state_of(4), {"step": 4})
    assert steps_in(tmp_path) == [3] and not list(tmp_path.glob(".*"))


def test_on_a_real_small_disk_the_run_goes_on_after_space_is_made(small_disk):
    folder = small_disk / "checkpoints"
    mine = small_disk / "mine"
    mine.write_bytes(bytes(500_000))
    with CheckpointWriter(keep=2) as writer:  # 400 kB each: three of them and 500 kB fit into 2 MB
        for step in (1, 2, 3, 4):
            writer.save(at(folder, step), state_of(step, 100_000), {"step": step})
    assert steps_in(folder) == [3, 4]
    mine.write_bytes(bytes(900_000))
    with CheckpointWriter(keep=2) as writer:  # now only two: the oldest goes first
        writer.save(at(folder, 5), state_of(5, 100_000), {"step": 5})
    assert steps_in(folder) == [4, 5]
    mine.write_bytes(bytes(1_100_000))
    with pytest.raises(DataError, match="disk is full"), CheckpointWriter() as writer:
        writer.save(at(folder, 6), state_of(6, 200_000), {"step": 6})
    assert newest_checkpoint(folder).step == 5 and not list(folder.glob(".*"))
    mine.unlink()
    with CheckpointWriter() as writer:
        writer.save(at(folder, 6), state_of(6, 200_000), {"step": 6})
    assert newest_checkpoint(folder).step == 6


def test_a_damaged_one_is_passed_over_and_not_kept_in_place_of_a_whole_one(tmp_path, caplog):
    with CheckpointWriter(keep=2) as writer:
        for step in (1, 2, 3):
            writer.save(at(tmp_path, step), state_of(step), {"step": step})
    (at(tmp_path, 3) / "about.json").write_text("{}")
    assert newest_checkpoint(tmp_path).step == 2 and "about.json is damaged" in caplog.text
    (tmp_path / ".step-00000009.partial").mkdir()  # of a run that was killed
    with CheckpointWriter(keep=1) as writer:
        writer.save(at(tmp_path, 2), state_of(2), {"step": 2})
    assert steps_in(tmp_path) == [2] and not list(tmp_path.glob(".*"))
    prune(tmp_path / "nowhere", 1)


def test_no_single_flipped_bit_of_a_marker_reads_as_a_checkpoint(tmp_path):
    with CheckpointWriter() as writer:
        writer.save(at(tmp_path, 1), state_of(1), {"step": 1})
    marker = at(tmp_path, 1) / "COMPLETE.json"
    whole = marker.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            broken = bytearray(whole)
            broken[place] ^= 1 << bit
            marker.write_bytes(broken)
            found = read_checkpoint(at(tmp_path, 1))
            # A flip between two kinds of white space is none that anyone could read.
            assert found is None or json.loads(broken) == json.loads(whole)
    marker.write_bytes(whole)
    for text in ("[]", "3", "null", "{}", "\xff"):
        marker.write_text(text)
        assert read_checkpoint(at(tmp_path, 1)) is None


def test_code_in_a_state_file_is_not_run(tmp_path):
    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    with CheckpointWriter() as writer:
        writer.save(at(tmp_path, 1), state_of(1), {"step": 1})
    found = newest_checkpoint(tmp_path)
    torch.save({"a": Planted()}, found.path / "state.pt")
    with pytest.raises(DataError, match="cannot be read"):
        found.state()
    assert not (tmp_path / "executed").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_state_on_a_gpu_is_the_one_at_the_call(tmp_path, held):
    weight = torch.ones(1 << 20, device="cuda")
    with CheckpointWriter() as writer:
        writer.save(at(tmp_path, 1), {"w": weight}, {"step": 1})
        weight.add_(1)
        torch.cuda.synchronize()
        held.set()
    assert torch.equal(newest_checkpoint(tmp_path).state()["w"], torch.ones(1 << 20))
