"""Heartbeats, and what is said of ranks that are silent, stuck, killed or have failed."""

import json
import logging
import os
import subprocess
import sys
import threading
import time

import pytest

from genemodel.train import ranks as module
from genemodel.train.ranks import (
    BUILD,
    COMPUTE,
    DATA,
    EXCHANGE,
    FAILED,
    LOOK,
    START,
    PeerLost,
    Ranks,
)

FAST = 0.6 / 60  # minutes; heartbeats come every 0.2 s then


def read(run, rank):
    return json.loads((run / "ranks" / f"rank-{rank}.json").read_text())


class Peer:
    """Another rank, as its file shows it; ``beating`` writes it anew as a live one does."""

    def __init__(self, run, rank=1, **state):
        self.path = run / "ranks" / f"rank-{rank}.json"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.state = {"beat": 0, "here": "elsewhere", "pid": 1, "step": 7, "phase": EXCHANGE}
        self.state |= {"why": "", **state}
        self.write()

    def write(self):
        partial = self.path.with_suffix(".new")
        partial.write_text(json.dumps(self.state))
        partial.replace(self.path)

    def __enter__(self):
        self.end = threading.Event()
        self.thread = threading.Thread(target=self._beat)
        self.thread.start()
        return self

    def _beat(self):
        while not self.end.wait(0.05):
            self.state["beat"] += 1
            self.write()

    def __exit__(self, *_):
        self.end.set()
        self.thread.join()


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def given_up(monkeypatch, caplog):
    """Note that the process would end, with which code, and end its watch instead."""
    codes = []

    class Ended(BaseException):
        pass

    def leave(code):
        codes.append(code)
        raise Ended

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(logging, "shutdown", lambda: None)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def wait(seconds):
        deadline = time.monotonic() + seconds
        while not codes and time.monotonic() < deadline:
            time.sleep(0.02)
        return codes

    return wait


def test_a_rank_says_where_it_is_until_it_leaves(tmp_path):
    with Ranks(tmp_path, 1, 2, FAST) as ranks:
        ranks.at(COMPUTE, 5)
        time.sleep(0.5)
        first = read(tmp_path, 1)
        assert (first["step"], first["phase"], first["pid"]) == (5, COMPUTE, os.getpid())
        ranks.at(LOOK)
        time.sleep(0.5)
        second = read(tmp_path, 1)
        assert second["beat"] > first["beat"] and second["phase"] == LOOK and second["step"] == 5
    assert not (tmp_path / "ranks").exists()


def test_one_process_has_nobody_to_tell(tmp_path):
    before = threading.active_count()
    with Ranks(tmp_path, 0, 1, FAST) as ranks:
        assert threading.active_count() == before
        ranks.at(EXCHANGE, 1)
        assert ranks.explain(RuntimeError("x")) is None
    assert not list(tmp_path.iterdir())


def test_an_error_is_left_for_the_others_and_a_stop_is_not(tmp_path):
    with pytest.raises(MemoryError), Ranks(tmp_path, 1, 2, FAST) as ranks:
        ranks.at(COMPUTE, 3)
        raise MemoryError("no more\nof it")
    state = read(tmp_path, 1)
    assert (state["phase"], state["why"], state["step"]) == (FAILED, "MemoryError: no more", 3)
    for leaving in (SystemExit(143), PeerLost("another one")):
        with pytest.raises(type(leaving)), Ranks(tmp_path, 1, 2, FAST):
            raise leaving
        assert not (tmp_path / "ranks").exists()


def test_a_full_disk_does_not_keep_the_reason_secret(tmp_path, monkeypatch):
    ranks = Ranks(tmp_path, 0, 2, 10)
    with pytest.raises(OSError, match="full"), ranks:

        def refuse(path, text):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(module.Path, "write_text", refuse)
        raise OSError("the disk is full")
    assert read(tmp_path, 0)["why"] == "OSError: the disk is full"


def explained(tmp_path, text="Connection closed by peer\nmore", **state):
    with Ranks(tmp_path, 0, 2, FAST) as ranks:
        ranks.at(EXCHANGE, 7)
        peer = Peer(tmp_path, **state)
        begin = time.monotonic()
        lost = ranks.explain(RuntimeError(text))
        peer.path.unlink()
    return str(lost) if lost else None, time.monotonic() - begin


def test_the_reason_of_a_broken_connection(tmp_path, dead_pid):
    said, took = explained(tmp_path, phase=FAILED, why="MemoryError: no more")
    assert "Rank 1 stopped at step 8: MemoryError: no more" in said and took < 1
    said, took = explained(tmp_path, here=module._here(), pid=dead_pid)
    assert "Rank 1 was killed after step 7" in said and took < 1
    # On another node only its silence can be seen.
    said, _ = explained(tmp_path, pid=dead_pid)
    assert "broke at step 8 (Connection closed by peer)" in said
    assert "rank 1 (last step 7) gives no sign of life" in said and "the same command" in said
    assert PeerLost.exit_code == 69


def test_a_rank_that_lives_is_not_blamed(tmp_path):
    with Ranks(tmp_path, 0, 2, FAST) as ranks, Peer(tmp_path):
        ranks.at(EXCHANGE, 7)
        assert ranks.explain(RuntimeError("[gloo] connection closed")) is None


def test_a_mistake_of_its_own_is_told_at_once_unless_another_rank_is_known_to_be_gone(tmp_path):
    # The peer's next heartbeat has not come yet.
    said, _ = explained(tmp_path, "CUDA out of memory. Tried to allocate 2 GiB")
    assert said is None
    said, _ = explained(tmp_path, "whatever", phase=FAILED, why="MemoryError: no more")
    assert "Rank 1 stopped" in said


def test_ranks_that_never_meet_are_not_judged_by_what_an_earlier_run_left(tmp_path, dead_pid):
    Peer(tmp_path, here=module._here(), pid=dead_pid)
    with Ranks(tmp_path, 0, 2, FAST) as ranks:
        assert ranks.phase == START
        time.sleep(1.2)  # the watch has had time to be wrong
        said = str(ranks.explain(RuntimeError("timed out after 120 s")))
    assert "Not all of the 2 ranks came" in said and "MASTER_ADDR" in said and "killed" not in said


@pytest.mark.parametrize(
    ("phase", "beats", "said"),
    [
        (EXCHANGE, False, "rank 1 gave no sign of life since step 7"),
        (DATA, True, "rank 1 is in 'data' after step 7"),
        (LOOK, True, "rank 1 is in 'look' after step 7"),
        # All wait for each other: all are named.
        (EXCHANGE, True, "rank 0 is in 'exchange' after step 7; rank 1 is in 'exchange'"),
    ],
)
def test_no_step_for_too_long_ends_the_run_and_names_the_rank(
    tmp_path, given_up, caplog, phase, beats, said
):
    with Ranks(tmp_path, 0, 2, FAST) as ranks:
        peer = Peer(tmp_path, phase=phase)
        ranks.at(EXCHANGE, 7)
        begin = time.monotonic()
        if beats:
            with peer:
                assert given_up(10) == [69]
        else:
            assert given_up(10) == [69]
        assert 0.5 < time.monotonic() - begin < 5
    assert "(trainer.hang_minutes)" in caplog.text and said in caplog.text


def test_whoever_waits_for_a_rank_that_failed_or_died_ends_before_the_limit(
    tmp_path, given_up, caplog, dead_pid
):
    with Ranks(tmp_path, 0, 2, 8 / 60) as ranks:  # longer than this test
        Peer(tmp_path, here=module._here(), pid=dead_pid)
        ranks.at(EXCHANGE, 7)
        assert given_up(3) == [69]
    assert "Rank 1 was killed after step 7" in caplog.text


def test_while_all_is_well_nobody_reads_what_the_others_write(tmp_path, given_up, monkeypatch):
    reads = []
    read_itself = Ranks._read
    monkeypatch.setattr(Ranks, "_read", lambda self, r: reads.append(r) or read_itself(self, r))
    with Ranks(tmp_path, 0, 2, 8 / 60) as ranks:
        Peer(tmp_path)
        for step in range(15):
            ranks.at((DATA, COMPUTE, EXCHANGE)[step % 3], step)
            assert not given_up(0.1)
        assert reads == []


def test_a_slow_start_is_no_hang(tmp_path, given_up):
    with Ranks(tmp_path, 0, 2, FAST) as ranks:
        Peer(tmp_path)
        ranks.at(BUILD)
        assert not given_up(2.0)
