"""Kill −9 at a random step, start the same command again: every step as if nothing had happened."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("traced_run.py")
STEPS = 18


def command(processes, corpus, out, trace, optimiser):
    arguments = [str(SCRIPT), str(corpus), str(out), str(trace), str(STEPS), optimiser]
    if processes == 1:
        return [sys.executable, *arguments]
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", *arguments,
    ]  # fmt: skip


def start(*arguments):
    environment = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    environment.pop("RANK", None)
    return subprocess.Popen(
        command(*arguments), env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def lines(trace, rank):
    path = Path(f"{trace}.{rank}")
    return path.read_text().splitlines() if path.exists() else []


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "optimiser"), [(1, "muon"), (2, "adamw")])
def test_killed_and_resumed_equals_uninterrupted(tiny_corpus, tmp_path, processes, optimiser):
    whole = tmp_path / "whole_trace"
    finish(start(processes, tiny_corpus, tmp_path / "whole", whole, optimiser))
    parts = tmp_path / "parts_trace"
    kill_after = random.Random(os.urandom(8)).randint(5, STEPS - 2)
    process = start(processes, tiny_corpus, tmp_path / "parts", parts, optimiser)
    deadline = time.monotonic() + 240
    while len(lines(parts, 0)) < kill_after and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(lines(parts, 0)) < STEPS, "killed too late to prove anything"
    finish(start(processes, tiny_corpus, tmp_path / "parts", parts, optimiser))
    for rank in range(processes):
        expected = dict(line.split(" ", 1) for line in lines(whole, rank))
        got = [line.split(" ", 1) for line in lines(parts, rank)]
        assert sorted(map(int, expected)) == list(range(1, STEPS + 1))
        assert {int(step) for step, _ in got} == set(range(1, STEPS + 1))
        # Steps after the last checkpoint were done twice: both times alike.
        for step, what in got:
            assert what == expected[step], f"rank {rank}, step {step}, killed at {kill_after}"
    if processes == 2:
        assert lines(whole, 0)[0].split()[1] != lines(whole, 1)[0].split()[1], "ranks saw the same"
        # Losses are global: the same number on both ranks.
        assert [x.split()[2:] for x in lines(whole, 0)] == [x.split()[2:] for x in lines(whole, 1)]
