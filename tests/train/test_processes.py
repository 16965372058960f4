"""Who starts the processes of a run, how signals reach them, and what their exit codes say."""

import json
import logging
import os
import signal
import sys
import threading
import time

import pytest

from genemodel.errors import ConfigError
from genemodel.settings import parse
from genemodel.train import processes as module
from genemodel.train.processes import (
    OUT_OF_TIME,
    RANK_LOST,
    Processes,
    RankLost,
    StopSignals,
    Unfinished,
    find_processes,
    requeue,
    supervise,
)
from genemodel.train.recipe import pretrain
from genemodel.train.settings import HoldoutSettings, LogSettings
from genemodel.train.worker import _found

TORCHRUN = {"RANK": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "8"}
# As srun sets them for task 5 of 8 on 4 nodes; sbatch's own are there too.
SLURM = {
    "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "4", "SLURM_NTASKS": "16",
    "SLURM_NNODES": "8",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in (
            *TORCHRUN,
            "NODE_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
        ):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("env", "settings", "expected"),
    [
        ({}, (1, 1), Processes(1, 1, 0, "alone")),
        ({}, (2, 1), Processes(2, 1, 0, "alone")),
        (TORCHRUN, (1, 1), Processes(2, 4, 5, "torchrun")),
        # torchrun started by srun: what torchrun says is nearer.
        ({**SLURM, **TORCHRUN}, (1, 1), Processes(2, 4, 5, "torchrun")),
        ({**TORCHRUN, "GENEMODEL_SUPERVISED": "1"}, (2, 4), Processes(2, 4, 5, "us")),
        (SLURM, (1, 1), Processes(2, 4, 5, "slurm")),
        # The script of sbatch and an interactive shell (salloc) are no tasks of srun.
        ({**SLURM, "SLURM_STEP_ID": str(0xFFFFFFFB)}, (1, 1), Processes(1, 1, 0, "alone")),
        ({**SLURM, "SLURM_STEP_ID": "batch"}, (2, 1), Processes(2, 1, 0, "alone")),
        ({"LOCAL_RANK": "1"}, (2, 1), Processes(2, 1, 1, "user")),
        ({"LOCAL_RANK": "1", "NODE_RANK": "2"}, (2, 4), Processes(2, 4, 5, "user")),
        (
            {"NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (2, 3),
            Processes(2, 3, 2, "alone"),
        ),
    ],
)  # fmt: skip
def test_processes_are_those_that_were_started(monkeypatch, env, settings, expected):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    found = find_processes(*settings)
    assert found == expected
    assert found.world == found.here * found.nodes
    assert found.to_be_started == (found.started == "alone" and settings[0] > 1)


@pytest.mark.parametrize(
    ("env", "settings", "said"),
    [
        ({}, (1, 2), "trainer.num_nodes=2.*which node this is.*NODE_RANK"),
        ({**TORCHRUN, "WORLD_SIZE": "7"}, (1, 1), "torchrun started 7 processes, 2 of them"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "7"}, (1, 1), "srun started 7 tasks on 4 nodes"),
        ({"LOCAL_RANK": "2"}, (2, 1), "LOCAL_RANK=2.*there are 2 devices.*trainer.devices="),
        (
            {"LOCAL_RANK": "0", "NODE_RANK": "1"},
            (2, 1),
            "NODE_RANK=1.*on 1 nodes.*trainer.num_nodes=",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(monkeypatch, env, settings, said):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        find_processes(*settings)


# -- supervised workers, played by a shell script --------------------------------------------------


@pytest.fixture
def played(monkeypatch, tmp_path):
    """Let a shell script be the worker of every rank: ``played({rank: script})``."""

    def play(scripts):
        program = tmp_path / "python"
        lines = ["#!/bin/sh", f"echo $RANK $LOCAL_RANK $WORLD_SIZE $MASTER_PORT >> {tmp_path}/env"]
        lines += [f'if [ "$RANK" = {rank} ]; then {script}; fi' for rank, script in scripts.items()]
        program.write_text("\n".join([*lines, "exit 0"]) + "\n")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(program))
        monkeypatch.setattr(module, "GRACE_S", 0.5)
        monkeypatch.setattr(module, "LOST_GRACE_S", 0.1)

    return play


FOR_EVER = "while true; do sleep 0.05; done"


def test_workers_are_told_their_places(played, tmp_path):
    played({})
    supervise(HoldoutSettings(), pretrain, Processes(2, 3, 2, "alone"))
    told = sorted(line.split() for line in (tmp_path / "env").read_text().splitlines())
    assert [line[:3] for line in told] == [["2", "0", "6"], ["3", "1", "6"]]
    assert told[0][3] == told[1][3]


@pytest.mark.parametrize(
    ("scripts", "error", "code"),
    [
        ({1: "exit 2"}, SystemExit, 2),
        ({1: "exit 1", 0: FOR_EVER}, SystemExit, 1),
        ({0: f"exit {OUT_OF_TIME}", 1: f"exit {OUT_OF_TIME}"}, Unfinished, OUT_OF_TIME),
        ({0: "exit 143", 1: "exit 143"}, Unfinished, 143),
        ({1: "kill -9 $$", 0: FOR_EVER}, RankLost, RANK_LOST),
        # A rank has found out that another one hangs, which then is killed.
        ({0: f"exit {RANK_LOST}", 1: FOR_EVER}, SystemExit, RANK_LOST),
    ],
)
def test_the_first_failure_decides_and_nobody_is_left(played, caplog, scripts, error, code):
    played(scripts)
    begin = time.monotonic()
    with pytest.raises(error) as ended:
        supervise(HoldoutSettings(), pretrain, Processes(2, 1, 0, "alone"))
    assert type(ended.value) is error and ended.value.code == code
    assert time.monotonic() - begin < 15
    assert ("Rank 1 was killed by SIGKILL" in caplog.text) == (error is RankLost)


@pytest.mark.parametrize(
    ("trap", "error"), [("trap 'exit 138' USR1; ", Unfinished), ("", Unfinished)]
)
def test_signals_are_handed_on(played, tmp_path, caplog, trap, error):
    ready = f"touch {tmp_path}/ready-$RANK; "
    played({0: trap + ready + FOR_EVER, 1: trap + ready + FOR_EVER})

    def send():
        while len(list(tmp_path.glob("ready-*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGUSR1)

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=send)
    thread.start()
    with pytest.raises(error) as ended:
        supervise(HoldoutSettings(), pretrain, Processes(2, 1, 0, "alone"))
    thread.join()
    # Whether a worker notes the signal or, not yet able to, dies of it: it was stopped, not lost.
    assert ended.value.code == 128 + signal.SIGUSR1 and "killed" not in caplog.text
    assert signal.getsignal(signal.SIGUSR1) is before


# -- being asked to stop ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2])
def test_the_first_signal_is_noted_and_said_once(number):
    said = []
    before = signal.getsignal(number)
    with StopSignals(said.append) as signals:
        assert signals.number == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == number
    assert [text.split()[0] for text in said] == [number.name]
    assert signal.getsignal(number) is before


def test_ctrl_c_twice_ends_at_once_but_not_when_a_launcher_repeats_it(monkeypatch):
    with StopSignals(lambda text: None) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # of the same Ctrl-C
        assert signals.number == signal.SIGINT
        monkeypatch.setattr(module, "TWICE_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_middle_of_writing_does_no_harm():
    def say(text):
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stderr>'>")

    with StopSignals(say) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.number == signal.SIGTERM


# -- requeue ---------------------------------------------------------------------------------------


def scontrol(folder, code):
    program = folder / "scontrol"
    program.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\necho "Denied" >&2\nexit {code}\n')
    program.chmod(0o755)


def test_requeue_asks_slurm_once(monkeypatch, tmp_path, caplog):
    scontrol(tmp_path, 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with caplog.at_level(logging.INFO):
        requeue()
    assert (tmp_path / "calls").read_text() == "requeue 77\n"
    assert "puts job 77 into its queue again" in caplog.text


def test_requeue_that_fails_says_what_to_do(monkeypatch, tmp_path, caplog):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    requeue()
    assert "no Slurm job" in caplog.text
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue()
    assert "No such file" in caplog.text and "submit the same script again" in caplog.text
    scontrol(tmp_path, 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    requeue()
    assert "requeue 77 failed (Denied)" in caplog.text


def test_settings_reach_the_workers_whole(monkeypatch, tmp_path, played):
    played({0: f"cp $3 {tmp_path}/seen.json"})
    settings = LogSettings(entity="a b", tags=("x", "é"))
    supervise(settings, pretrain, Processes(1, 1, 0, "alone"))
    asked = json.loads((tmp_path / "seen.json").read_text())
    assert _found(asked["verb"]) is pretrain and _found(asked["kind"]) is LogSettings
    assert parse(LogSettings, asked["settings"]) == settings
