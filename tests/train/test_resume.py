"""Kill −9 at a random step, start the same command again: every step as if nothing had happened."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("traced_run.py")
STEPS = 18


def run(processes, corpus, out, trace, optimiser, kill_after=0, accumulate=2):
    """Run to the end, or until the processes kill themselves; returns exit code and output."""
    # Dropout only where its randomness need not be the same for another number of processes.
    dropout = 0.1 if optimiser == "muon" else 0.0
    arguments = [SCRIPT, corpus, out, trace, STEPS, optimiser, kill_after, accumulate, dropout]
    arguments = [str(x) for x in arguments]
    launch = [
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--rdzv-backend",
        "c10d", "--rdzv-endpoint", "localhost:0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *(launch if processes > 1 else []), *arguments],
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    return done.returncode, done.stdout


def lines(trace, rank):
    path = Path(f"{trace}.{rank}")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "optimiser"), [(1, "muon"), (2, "adamw")])
def test_killed_and_resumed_equals_uninterrupted(tiny_corpus, tmp_path, processes, optimiser):
    whole, parts = tmp_path / "whole_trace", tmp_path / "parts_trace"
    code, output = run(processes, tiny_corpus, tmp_path / "whole", whole, optimiser)
    assert code == 0, output
    kill_after = random.Random(os.urandom(8)).randint(5, STEPS - 1)
    arguments = (processes, tiny_corpus, tmp_path / "parts", parts, optimiser)
    code, output = run(*arguments, kill_after)
    assert code != 0 and len(lines(parts, 0)) == kill_after, output
    code, output = run(*arguments)
    assert code == 0, output
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
        losses = [[float.fromhex(x) for x in line.split()[2:]] for line in lines(whole, 0)]
        assert losses == [[float.fromhex(x) for x in line.split()[2:]] for line in lines(whole, 1)]
        # And the same, but for rounding, as in one process that does all micro-batches itself,
        # although the ranks' shares hold unequal numbers of masked genes.
        alone = tmp_path / "alone_trace"
        code, output = run(1, tiny_corpus, tmp_path / "alone", alone, optimiser, accumulate=4)
        assert code == 0, output
        for line, expected in zip(lines(alone, 0), losses, strict=True):
            got = [float.fromhex(x) for x in line.split()[2:]]
            assert got == pytest.approx(expected, rel=1e-3), line
