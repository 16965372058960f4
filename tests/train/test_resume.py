"""Kill −9 at a random step, start the same command again: every step as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("traced_run.py")
STEPS = 18


CASES = [(1, "muon"), (2, "adamw")]


@pytest.fixture(scope="module")
def done(tiny_corpus, tmp_path_factory):
    """Run all to the end, or until they kill themselves: folder, step of the kill, codes, output.

    By one process for all cases: it takes longer to start than they take to train.
    """
    found, runs, at = {}, [], {}
    for processes, optimiser in CASES:
        folder = tmp_path_factory.mktemp(optimiser)
        # Dropout only where its randomness need not be the same for another number of processes.
        dropout = 0.1 if optimiser == "muon" else 0.0
        kill_after = random.Random(os.urandom(8)).randint(5, STEPS - 1)

        def one(name, *, n=processes, kill=0, accumulate=2, out=folder, o=optimiser, p=dropout):
            places = (str(tiny_corpus), str(out / name), str(out / f"{name}_trace"))
            return (n, *places, STEPS, o, kill, accumulate, p)

        own = [one("whole"), one("parts", kill=kill_after), one("parts")]
        if processes == 2:
            own.append(one("alone", n=1, accumulate=4))
        at[processes] = slice(len(runs), len(runs) + len(own))
        runs += own
        found[processes] = folder, kill_after
    ended = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(runs)],
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout
    codes = json.loads(ended.stdout.splitlines()[-1])
    return {n: (*what, codes[at[n]], ended.stdout) for n, what in found.items()}


def lines(trace, rank):
    path = Path(f"{trace}.{rank}")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "optimiser"), CASES)
def test_killed_and_resumed_equals_uninterrupted(done, processes, optimiser):
    folder, kill_after, codes, output = done[processes]
    killed = [-signal.SIGKILL] * processes
    assert len(codes) == 2 + processes
    assert codes == [[0] * processes, killed, [0] * processes, [0]][: len(codes)], output
    whole, parts, alone = (folder / f"{name}_trace" for name in ("whole", "parts", "alone"))
    # A run again gives the steps after its last checkpoint a second time.
    assert [line.split(" ", 1)[0] for line in lines(parts, 0)].index(str(kill_after)) == (
        kill_after - 1
    ), output
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
        for line, expected in zip(lines(alone, 0), losses, strict=True):
            got = [float.fromhex(x) for x in line.split()[2:]]
            assert got == pytest.approx(expected, rel=1e-3), line
