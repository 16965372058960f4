"""The batch script: run by bash, under a Slurm of one machine."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

# Stands for `genemodel`: says what it was given, and stops as `genemodel pretrain` does.
PROGRAM = f"""#!{sys.executable}
import json, os, signal, subprocess, sys, time
from pathlib import Path
notes = Path(os.environ["NOTES"])
rank, start = os.environ["SLURM_PROCID"], os.environ.get("SLURM_RESTART_COUNT", "0")
got = []
signal.signal(signal.SIGUSR1, lambda n, _: got.append(n))
slurm = {{k: v for k, v in os.environ.items() if k.startswith(("SLURM_", "SRUN_"))}}
file = notes / f"{{start}}-{{rank}}.json"
file.write_text(json.dumps({{"words": sys.argv[1:], **slurm}}))
if start == os.environ.get("LAST_START", "0"):
    sys.exit(0)
while not got:
    time.sleep(0.01)
if rank == "0":
    time.sleep(0.5)  # the others are gone: nobody may end this one while it saves
    (notes / f"{{start}}-saved").touch()
    subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
sys.exit(128 + got[0])
"""


@pytest.fixture
def job(slurm, tmp_path, repository):
    """Start the script with some words; options come first."""
    program = tmp_path / "program"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    notes = tmp_path / "notes"
    notes.mkdir()
    started = []

    def start(*words, **env):
        script = str(repository / "scripts" / "slurm" / "pretrain.sbatch")
        options = [word for word in words if word.startswith("--")]
        rest = [word for word in words if not word.startswith("--")]
        environment = slurm | {"GENEMODEL": str(program), "NOTES": str(notes), **env}
        process = subprocess.Popen(
            ["sbatch", *options, script, *rest],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        started.append(process)
        return process, environment, notes, Path(slurm["FAKE_SLURM"])

    yield start
    for process in started:
        process.kill()
        process.wait()


def wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"no {path}"
        time.sleep(0.01)


def test_every_task_knows_its_place_and_gets_the_words(job):
    process, _, notes, folder = job(
        "--nodes=2", "--ntasks-per-node=3", "--cpus-per-task=4", "out=my run", "optim.lr=1e-3"
    )
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    places = [json.loads((notes / f"0-{rank}.json").read_text()) for rank in range(6)]
    assert [(p["SLURM_NODEID"], p["SLURM_LOCALID"]) for p in places] == [
        ("0", "0"), ("0", "1"), ("0", "2"), ("1", "0"), ("1", "1"), ("1", "2"),
    ]  # fmt: skip
    for place in places:
        # The user's words come last, so that they win.
        assert place["words"] == ["pretrain", "trainer.requeue=true", "out=my run", "optim.lr=1e-3"]
        assert place["SLURM_NTASKS"] == "6" and place["SLURM_STEP_NUM_NODES"] == "2"
        assert place["SLURM_NTASKS_PER_NODE"] == "3" and place["SRUN_CPUS_PER_TASK"] == "4"
    options = json.loads((folder / "job.json").read_text())["options"]
    assert options["signal"] == "USR1@300"  # to the tasks: B:USR1 would go to bash alone
    assert options["open-mode"] == "append" and "requeue" in options
    assert options["gpus-per-node"] == "8"
    assert (folder / "calls.log").read_text() == "ended 0: 0\n"


def test_a_signal_before_the_time_limit_saves_and_the_job_starts_again(job):
    process, env, notes, folder = job("--nodes=1", "--ntasks-per-node=2", LAST_START="2")
    for start in range(2):
        for rank in range(2):
            wait_for(notes / f"{start}-{rank}.json")
        subprocess.run(["scancel", "--signal=USR1", "1"], env=env, check=True)
        wait_for(notes / f"{start}-saved")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "start 0" in said and "start 2" in said
    number = json.loads((folder / "job.json").read_text())["job"]
    calls = (folder / "calls.log").read_text().splitlines()
    assert calls.count(f"scontrol requeue {number}") == 2
    # The step ends with the largest code: 138 of rank 1, or what Slurm did to rank 0 after saving.
    assert [c for c in calls if c.startswith("ended")][-1] == "ended 2: 0"
    assert all(
        int(c.split()[-1]) in (138, 143) for c in calls if c.startswith(("ended 0", "ended 1"))
    )


def test_where_requeueing_is_off_the_code_says_what_happened(job):
    process, env, notes, folder = job(
        "--nodes=1", "--ntasks-per-node=2", LAST_START="2", FAKE_SLURM_REFUSES="1"
    )
    for rank in range(2):
        wait_for(notes / f"0-{rank}.json")
    subprocess.run(["scancel", "--signal=USR1", "1"], env=env, check=True)
    process.communicate(timeout=60)
    assert process.returncode == 138 and (notes / "0-saved").exists()
