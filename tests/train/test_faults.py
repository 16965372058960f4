"""A share of scripts/faults.py, which runs all of it: real runs, and what came of their faults."""

import os
import subprocess
import sys

import pytest

# One of each kind; the script's own cases are many more.
CASES = (
    "kills",
    "signals SIGTERM plain",
    "signals SIGUSR1 srun, 2 tasks, to rank 1",
    "signals requeue",
    "ranks kill rank 0, by hand",
    "ranks MemoryError on rank 1",
    "numbers NaN, roll_back",
    "disk full at a checkpoint, 2 processes",
    "worlds deterministic",
    "worlds 2 to 3",
    "worlds fsdp adamw",
)


@pytest.mark.slow
def test_faults_do_no_harm(repository):
    done = subprocess.run(
        [sys.executable, repository / "scripts" / "faults.py", "--number", "4", "--only",
         "|".join(CASES)],
        env=dict(os.environ, PYTHONPATH=str(repository)), timeout=1500,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    n = len(CASES) - 1 + 4  # the kills are of four kinds of run
    assert f"{n} of {n} cases are as they should be" in done.stdout
