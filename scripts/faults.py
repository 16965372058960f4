#!/usr/bin/env python3
"""Faults against real runs on this machine, and what came of each.

    python scripts/faults.py                          # everything: about an hour on two busy cores
    python scripts/faults.py kills --number 200       # kill -9 in every part of a step
    python scripts/faults.py signals                  # signals x launchers: saved? which exit code?
    python scripts/faults.py ranks                    # ranks stopped, killed, failing
    python scripts/faults.py numbers                  # losses that are not finite, or that jump
    python scripts/faults.py disk                     # full disks; takes root for some of them
    python scripts/faults.py worlds                   # 2 -> 1 -> 4 -> 2 processes
    python scripts/faults.py ranks --only 'kill'      # cases whose name matches

Prints one line a case and ends with 1 if any is not as it should be. Processes are forked from this
one, which has imported everything and started no thread, unless a case needs a launcher's own.
"""

import argparse
import csv
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parent.parent))

import torch

from genemodel import cli, writing
from genemodel.bundle.bundle import Bundle
from genemodel.cells import loader
from genemodel.tasks.pretraining import PretrainingObjectives
from genemodel.train import checkpoint, loop, recipe, record
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.exchange import Exchange

# A run of milliseconds a step, with everything in it that has a state.
STEPS = 24
WORDS = (
    "pretrain", "model=tiny", "model.layers=1", "model.width=16", "model.heads=2", "model.ffn=16",
    "model.components=4", "model.dropout=0.1", "tokens.context=64", "tokens.budget=512",
    "optim.warmup_steps=3", "optim.clip=0.5", "trainer.accelerator=cpu",
    f"trainer.max_steps={STEPS}", "trainer.checkpoint_every=3", "trainer.validate_every=5",
    "trainer.validation_batches=3", "trainer.log_every=2", "holdout.by=donor",
)  # fmt: skip
PATIENCE_S = 240.0  # for anything at all to happen; a busy machine takes half a minute to import


# -- processes -------------------------------------------------------------------------------------


@dataclass
class Process:
    """A process of a run, forked or started, and the file of what it says."""

    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it lives."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = PATIENCE_S) -> int | None:
        """Wait, but not for ever."""
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.code

    def kill(self) -> None:
        """End it, stopped or not."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")


def fork(
    words: Sequence[str], log: Path, env: Mapping[str, str], hook: Callable[[], None] | None = None
) -> Process:
    """Run the command line in a copy of this process; ``hook`` runs in it first."""
    assert threading.active_count() == 1, "forking with threads"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Process(pid, log)
    code: Any = 1
    try:
        with log.open("ab", buffering=0) as file:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(env)
        if hook is not None:
            hook()
        code = cli.main(list(words))
    except SystemExit as leaving:
        code = leaving.code
    except BaseException:  # noqa: BLE001 - as the interpreter would
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def spawn(command: Sequence[str], log: Path, env: Mapping[str, str]) -> Process:
    """Start a program of its own."""
    with log.open("ab") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            env={**os.environ, **env},
        )  # fmt: skip
    process.returncode = 0  # it is waited for here, not there
    return Process(process.pid, log)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def by_hand(world: int) -> list[dict[str, str]]:
    """Give the environment of every rank, as the supervisor and torchrun set it."""
    port = free_port()
    return [
        {
            "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world), "NODE_RANK": "0",
            "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            "GENEMODEL_SUPERVISED": "1",
        }
        for r in range(world)
    ]  # fmt: skip


def by_slurm(world: int) -> list[dict[str, str]]:
    """Give the environment of every task, as srun sets it on one node."""
    port, job = free_port(), str(random.randrange(10**6, 10**7))
    return [
        {
            "SLURM_JOB_ID": job, "SLURM_JOBID": job, "SLURM_JOB_NAME": "train", "SLURM_STEP_ID":
            "0", "SLURM_NTASKS": str(world), "SLURM_STEP_NUM_TASKS": str(world),
            "SLURM_NNODES": "1", "SLURM_STEP_NUM_NODES": "1", "SLURM_NODEID": "0",
            "SLURM_PROCID": str(r), "SLURM_LOCALID": str(r), "SLURM_NODELIST": "localhost",
            "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS_PER_NODE": str(world),
            "MASTER_PORT": port,
        }
        for r in range(world)
    ]  # fmt: skip


# -- runs ------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run directory, the command that goes on with it, and what its processes have left."""

    out: Path
    corpus: Path
    words: tuple[str, ...] = ()
    sessions: int = 0
    env: dict[str, str] = field(default_factory=dict)

    @property
    def command(self) -> list[str]:
        return [*WORDS, f"corpus={self.corpus}", f"out={self.out}", *self.words]

    def _log(self, what: str) -> Path:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        return self.out.with_name(f"{self.out.name}.{self.sessions}.{what}.log")

    def begin(
        self,
        places: Sequence[Mapping[str, str]] = ({},),
        hook: Callable[[int], None] | None = None,
        extra: Sequence[str] = (),
    ) -> list[Process]:
        """Fork one process for each of ``places``; ``hook(rank)`` runs in it first."""
        self.sessions += 1
        trace = self.out.with_name(f"{self.out.name}.trace")

        def prepared(rank: int) -> None:
            trace_steps(trace if rank == 0 else None)
            if hook is not None:
                hook(rank)

        return [
            fork(
                [*self.command, *extra], self._log(f"rank{r}"), {**self.env, **place},
                lambda r=r: prepared(r),
            )
            for r, place in enumerate(places)
        ]  # fmt: skip

    def launch(self, launcher: Sequence[str], extra: Sequence[str] = (), **env: str) -> Process:
        """Start it as a user does, from the shell."""
        self.sessions += 1
        command = [sys.executable, *launcher, "-m", "genemodel", *self.command, *extra]
        return spawn(command, self._log("shell"), {**self.env, **env})

    def through(self, **options: Any) -> list[Process]:
        """Fork, and wait for the end."""
        processes = self.begin(**options)
        for process in processes:
            process.wait()
        return processes

    @property
    def saved(self) -> int:
        """Step of the newest whole checkpoint; 0 without one."""
        found = newest_checkpoint(self.out / "checkpoints")
        return found.step if found else 0

    def wait_for_step(self, step: int, processes: Sequence[Process]) -> None:
        """Wait until metrics.csv has the row of a step."""
        deadline = time.monotonic() + PATIENCE_S
        while self.logged < step:
            ended = [p for p in processes if p.poll() is not None]
            if ended or time.monotonic() > deadline:
                raise AssertionError("it has not come to train:\n" + processes[0].said[-3000:])
            time.sleep(0.02)

    @property
    def logged(self) -> int:
        return last_step(self.out / "metrics.csv")

    def pid_of(self, rank: int) -> int:
        """Process of a rank, as its heartbeat says."""
        return int(json.loads((self.out / "ranks" / f"rank-{rank}.json").read_text())["pid"])

    def result(self) -> dict[str, Any]:
        """Give everything of a finished run that has to be the same whatever befell it."""
        found = newest_checkpoint(self.out / "checkpoints")
        assert found is not None, f"{self.out} has no checkpoint"
        state = found.state()
        state["progress"].pop("minutes")
        weights = Bundle.load(self.out / "bundle", device="cpu")
        steps: dict[int, set[str]] = {}
        trace = self.out.with_name(f"{self.out.name}.trace")
        for line in trace.read_text().splitlines():
            step, _, what = line.partition(" ")
            steps.setdefault(int(step), set()).add(what)
        timeless = ("step", "train/", "trivial/", "grad_norm", "lr", "fill", "cells_per_step")
        return {
            "step": found.step,
            "steps": steps,
            "state": digest(state),
            "bundle": digest([weights.model.state_dict(), weights.heads]),
            "validation.csv": (self.out / "validation.csv").read_text(),
            "metrics.csv": [
                {k: v for k, v in row.items() if k.startswith(timeless)}
                for row in rows(self.out / "metrics.csv")
            ],
        }


def rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def last_step(path: Path) -> int:
    try:
        return int(float(rows(path)[-1]["step"]))
    except (IndexError, KeyError, ValueError, TypeError):
        return 0


def digest(value: Any) -> str:
    """Digest tensors to the bit, and plain values, whatever they are nested in."""
    import hashlib

    found = hashlib.sha256()

    def visit(x: Any) -> None:
        if isinstance(x, torch.Tensor):
            found.update(f"{x.dtype}{tuple(x.shape)}".encode())
            found.update(x.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(x, Mapping):
            for key in x:
                found.update(repr(key).encode())
                visit(x[key])
        elif isinstance(x, list | tuple):
            for inside in x:
                visit(inside)
        else:
            found.update(repr(x).encode())

    visit(value)
    return found.hexdigest()


def differences(run: Run, whole: Mapping[str, Any], *, same_steps: bool = True) -> str:
    """Name what of a run is not as in the uninterrupted one; empty where all is."""
    found = run.result()
    wrong = [k for k in whole if k != "steps" and found[k] != whole[k]]
    if same_steps and found["steps"] != whole["steps"]:
        other = [s for s, what in found["steps"].items() if what != whole["steps"].get(s)]
        wrong.append(f"losses or cells of steps {other[:5]}")
    return ", ".join(wrong)


def trace_steps(path: Path | None) -> None:
    """Write cells and losses of every step down, to the bit."""
    if path is None:
        return
    note = loop.Loop._note

    def noting(self: Any, report: Any, batches: Any, stream: Any, *, shown: bool) -> None:
        cells = digest([batch.cell_C for batch in batches])[:12]
        losses = " ".join(x.hex() for x in (*report.losses.values(), report.norm))
        with path.open("a") as file:
            file.write(f"{self.progress.step} {cells} {losses}\n")
        note(self, report, batches, stream, shown=shown)

    loop.Loop._note = noting  # type: ignore[method-assign]


def make_corpus(folder: Path) -> Path:
    """Generate 600 cells over a thousand genes, in a process of its own: it starts threads."""
    script = (
        "import sys\n"
        "from genemodel.cells.corpus import Corpus\n"
        "from genemodel.cells.synthetic import synthetic\n"
        "from genemodel.genes import GeneVocabulary\n"
        "rows = GeneVocabulary.builtin().genes\n"
        "few = GeneVocabulary(rows[rows['token'] < 1003].reset_index(drop=True))\n"
        "cells = synthetic(600, species=('human',), n_genes=500, genes_per_cell=60, seed=1,\n"
        "                  vocabulary=few)['human']\n"
        "Corpus.build([cells], sys.argv[1], vocabulary=few)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(folder)], check=True, capture_output=True)
    return folder


# -- the table -------------------------------------------------------------------------------------


class Table:
    """Lines of results, and whether all are as they should be."""

    def __init__(self, only: str) -> None:
        self.only = re.compile(only)
        self.failed: list[str] = []
        self.done = 0

    def wanted(self, name: str) -> bool:
        return bool(self.only.search(name))

    @contextmanager
    def case(self, name: str) -> Iterator["Case"]:
        """Note one case; an error in it is a failure and no end."""
        case, begin = Case(), time.monotonic()
        try:
            yield case
        except Exception as error:  # noqa: BLE001 - the next case still runs
            traceback.print_exc()
            case.wrong.append(f"{type(error).__name__}: {error}")
        self.done += 1
        if case.wrong:
            self.failed.append(name)
        verdict = "NO: " + "; ".join(case.wrong) if case.wrong else "ok"
        seconds = time.monotonic() - begin
        print(f"  {name:<58} {', '.join(case.found):<66} {seconds:5.0f} s  {verdict}", flush=True)


@dataclass
class Case:
    """What was found, and what of it is wrong."""

    found: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def check(self, right: bool, what: str) -> None:
        if not right:
            self.wrong.append(what)


# -- kill -9 ---------------------------------------------------------------------------------------

# Parts of a run, and the function that each happens in.
POINTS: dict[str, tuple[Any, str]] = {
    "restore": (checkpoint.Checkpoint, "state"),
    "data": (loader.CellStream, "read_part"),
    "pack": (loader, "pack"),
    "prepare": (PretrainingObjectives, "prepare"),
    "forward": (loop.Losses, "forward"),
    "backward": (torch.Tensor, "backward"),
    "exchange": (Exchange, "sum_"),
    "clip": (Exchange, "clip_"),
    "optimiser": (torch.optim.AdamW, "step"),
    "row": (record, "append_row"),
    "rows kept": (record, "keep_rows_up_to"),
    "look": (loop.Loop, "look"),
    "bundle": (Bundle, "save"),
    "save": (checkpoint, "_write"),
    "tensors": (torch, "save"),
    "flush": (writing, "flush_all"),
    "rename": (writing, "put_in_place"),
    "prune": (checkpoint, "prune"),
}


def measure_points(path: Path) -> None:
    """Count the calls of every point and their seconds, into a file."""
    counts: dict[str, list[float]] = {name: [0, 0.0] for name in POINTS}

    def wrap(name: str, owner: Any, attribute: str) -> None:
        itself = getattr(owner, attribute)

        def measured(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return itself(*args, **options)
            finally:
                counts[name][0] += 1
                counts[name][1] += time.perf_counter() - begin

        setattr(owner, attribute, measured)

    for name, (owner, attribute) in POINTS.items():
        wrap(name, owner, attribute)
    goodbye = recipe._say_goodbye

    def write(*args: Any) -> None:
        path.write_text(json.dumps(counts))
        goodbye(*args)

    recipe._say_goodbye = write


def kill_in(name: str, nth: int, after_s: float) -> None:
    """Kill this process so long after the n-th call of a point has begun."""
    owner, attribute = POINTS[name]
    itself = getattr(owner, attribute)
    left = [nth]

    def deadly(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            if after_s < 2e-4:  # a thread takes longer to start
                os.kill(os.getpid(), signal.SIGKILL)
            timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
            timer.daemon = True
            timer.start()
        return itself(*args, **options)

    setattr(owner, attribute, deadly)


def kills(table: Table, folder: Path, corpus: Path, number: int, seed: int) -> None:
    """Kill processes in every part of a run, again and again, until it is through."""
    kinds = [
        ("1 process, muon", 1, ("optim=muon",)),
        ("2 processes, adamw", 2, ()),
        ("1 process, adamw", 1, ("trainer.accumulate=2",)),
        ("2 processes, deterministic", 2, ("trainer.deterministic=true",)),
    ]
    share = [number // len(kinds) + (i < number % len(kinds)) for i in range(len(kinds))]
    for (name, world, words), n in zip(kinds, share, strict=True):
        if not n or not table.wanted(f"kills {name}"):
            continue
        rng = random.Random(f"{seed} {name}")
        slug = re.sub(r"\W+", "_", name)
        whole = Run(folder / f"{slug}_whole", corpus, words)
        counts = folder / f"{slug}.json"

        def measuring(rank: int, counts: Path = counts) -> None:
            if rank == 0:
                measure_points(counts)

        ended = whole.through(places=places_of(world), hook=measuring)
        assert [p.code for p in ended] == [0] * world, ended[0].said
        expected = whole.result()
        measured = json.loads(counts.read_text())
        done, runs, alone, where = 0, 0, 0, dict.fromkeys(POINTS, 0)
        with table.case(f"kills: {name}") as case:
            while done < n:
                runs += 1
                run = Run(folder / f"{slug}_{runs}", corpus, words)
                while done < n:
                    point, killed, lonely = kill_once(run, world, measured, rng, case)
                    if not killed:
                        break
                    done += 1
                    where[point] += 1
                    alone += lonely
                ended = run.through(places=places_of(world))
                codes = [p.code for p in ended]
                case.check(codes == [0] * world, f"run {runs}: {codes} {ended[0].said[-300:]}")
                wrong = differences(run, expected)
                case.check(not wrong, f"run {runs}: {wrong} differ")
                if not case.wrong:
                    shutil.rmtree(run.out)
            met = ", ".join(f"{point} {count}" for point, count in where.items() if count)
            case.found.append(
                f"{done} kills in {runs} runs, all bit-equal"
                + (f", {alone} of one rank only" if world > 1 else "")
                + f" ({met})"
            )


def places_of(world: int) -> list[dict[str, str]]:
    return by_hand(world) if world > 1 else [{}]


def kill_once(
    run: Run, world: int, measured: Mapping[str, Any], rng: random.Random, case: Case
) -> tuple[str, bool, bool]:
    """Go on with a run until it is killed, or through."""
    victim = rng.randrange(world)
    # Only the first rank reports, saves and releases.
    own = {"row", "bundle", "save", "tensors", "flush", "rename", "prune"}
    points = [p for p in POINTS if measured[p][0] and not (victim and p in own)]
    if run.sessions:
        points.append("restore")
    point = rng.choice(points)
    calls, seconds = measured[point]
    nth = rng.randint(1, max(1, math.ceil(calls / 3)))
    after_s = rng.uniform(0, 1.2 * seconds / calls) if calls else rng.uniform(0, 0.02)
    lonely = world > 1 and rng.random() < 0.3

    def hook(rank: int) -> None:
        if rank == victim:
            kill_in(point, nth, after_s)

    ended = run.begin(places_of(world), hook, ("trainer.hang_minutes=0.5",))
    code = ended[victim].wait()
    others = [p for p in ended if p is not ended[victim]]
    if code == -signal.SIGKILL and lonely:
        for other in others:
            other.wait(60)
            # It may have been through before, with nothing left to wait for.
            named = f"rank {victim}" in other.said or other.code == 0
            case.check(other.code is not None and named, f"the other rank: {other.said[-400:]}")
    for other in others:
        if code == -signal.SIGKILL:
            other.kill()
        else:
            other.wait()
    killed = code == -signal.SIGKILL
    case.check(killed or code == 0, f"{point}: {code} {ended[victim].said[-600:]}")
    return point, killed, lonely


# -- signals ---------------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
TORCHRUN = (
    "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
    "--rdzv-endpoint", "localhost:0",
)  # fmt: skip
# It hands on these only; Slurm's and submitit's signals must be added.
HANDED_ON = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"}
LONG = ("trainer.max_steps=1000000", "trainer.log_every=1", "trainer.checkpoint_every=1000000")
# A look after every step: whoever waits for one when asked to stop is found out.
LOOKING = (*LONG, "trainer.validate_every=1", "trainer.validation_batches=1")


def judge_stop(
    case: Case, run: Run, processes: Sequence[Process], sent: float, codes: Sequence[int]
) -> None:
    """Saved at the last step, no look after it, gone in seconds, with the right codes."""
    for process in processes:
        process.wait(60)
    took = time.monotonic() - sent
    got = [p.code for p in processes]
    for process in processes:
        process.kill()
    saved, seen = run.saved, last_step(run.out / "validation.csv")
    case.found.append(f"saved step {saved}, exit {got}, after {took:.1f} s")
    case.check(got == list(codes), f"not {list(codes)}: {processes[0].said[-900:]}")
    case.check(saved > 0 and saved == run.logged, f"saved {saved} of {run.logged} steps")
    case.check(seen < saved, f"looked at held-out cells after step {seen} before it went")
    case.check("Traceback" not in processes[0].said, "a traceback")
    leftover = list((run.out / "checkpoints").glob(".*"))
    case.check(not leftover, f"left {leftover}")


def signals(table: Table, folder: Path, corpus: Path) -> None:
    """Every signal under every launcher."""
    for number in SIGNALS:
        code = 128 + number
        name = f"{number.name} plain"
        if table.wanted(f"signals {name}"):
            with table.case(f"signals: {name}") as case:
                run = Run(folder / name.replace(" ", "_"), corpus, LOOKING)
                processes = run.begin()
                run.wait_for_step(3, processes)
                os.kill(processes[0].pid, number)
                judge_stop(case, run, processes, time.monotonic(), [code])
                # The same command goes on from there.
                before = run.saved
                processes = run.begin(extra=("trainer.max_minutes=0.000001",))
                judge_stop(case, run, processes, time.monotonic(), [75])
                case.check(run.saved == before + 1, f"went on to {run.saved} from {before}")
        for target in ("to all", "to rank 1"):
            name = f"{number.name} srun, 2 tasks, {target}"
            if table.wanted(f"signals {name}"):
                with table.case(f"signals: {name}") as case:
                    run = Run(folder / re.sub(r"\W+", "_", name), corpus, LOOKING)
                    processes = run.begin(by_slurm(2))
                    run.wait_for_step(3, processes)
                    for process in processes if target == "to all" else processes[1:]:
                        os.kill(process.pid, number)
                    judge_stop(case, run, processes, time.monotonic(), [code, code])
        for target in ("to the parent", "to rank 0", "to rank 1"):
            name = f"{number.name} devices=2, {target}"
            if table.wanted(f"signals {name}"):
                with table.case(f"signals: {name}") as case:
                    run = Run(folder / re.sub(r"\W+", "_", name), corpus, LOOKING)
                    processes = run.begin(extra=("trainer.devices=2",))
                    run.wait_for_step(3, processes)
                    pid = processes[0].pid
                    os.kill(pid if "parent" in target else run.pid_of(int(target[-1])), number)
                    judge_stop(case, run, processes, time.monotonic(), [code])
        for target in ("to torchrun", "to rank 1"):
            name = f"{number.name} torchrun, 2 ranks, {target}"
            if table.wanted(f"signals {name}"):
                with table.case(f"signals: {name}") as case:
                    run = Run(folder / re.sub(r"\W+", "_", name), corpus, LOOKING)
                    process = run.launch(TORCHRUN, **HANDED_ON)
                    run.wait_for_step(3, [process])
                    os.kill(process.pid if "torchrun" in target else run.pid_of(1), number)
                    process.wait(60)
                    saved = run.saved
                    case.found.append(f"saved step {saved}, exit {process.code} (torchrun's own)")
                    case.check(saved > 0 and saved == run.logged, f"saved {saved}/{run.logged}")
                    case.check(process.code == 1, f"exit {process.code}")
                    case.check(
                        f"Stopped by {number.name} after step {saved:,}" in process.said,
                        process.said[-900:],
                    )
                    process.kill()
    for name, world, places in (
        ("max_minutes plain", 1, [{}]),
        ("max_minutes srun, 2 tasks", 2, by_slurm(2)),
        ("max_minutes devices=2", 1, [{}]),
    ):
        if table.wanted(f"signals {name}"):
            with table.case(f"signals: {name}") as case:
                extra = ["trainer.max_minutes=0.05"]
                if "devices" in name:
                    extra.append("trainer.devices=2")
                run = Run(folder / re.sub(r"\W+", "_", name), corpus, LOOKING)
                begun = time.monotonic()
                processes = run.begin(places, extra=extra)
                processes[0].wait()
                judge_stop(case, run, processes, begun, [75] * world)
                text = f"Stopped by max_minutes after step {run.saved:,} of 1,000,000"
                said = processes[0].said
                case.check(text in said and "the schedule is not finished" in said, said[-500:])
    if table.wanted("signals requeue"):
        with table.case("signals: USR1 srun, 2 tasks, requeue") as case:
            run = Run(folder / "requeue", corpus, (*LOOKING, "trainer.requeue=true"))
            calls = fake_scontrol(folder / "bin", folder / "requeue" / "checkpoints")
            path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
            run.env["PATH"] = path
            places = by_slurm(2)
            processes = run.begin(places)
            run.wait_for_step(3, processes)
            for process in processes:
                os.kill(process.pid, signal.SIGUSR1)
            judge_stop(case, run, processes, time.monotonic(), [138, 138])
            said = calls.read_text().split("\n") if calls.exists() else []
            expected = f"requeue {places[0]['SLURM_JOB_ID']} after step-{run.saved:08d}"
            case.found.append(f"scontrol: {said[0] if said else 'not called'}")
            case.check(said == [expected, ""], f"scontrol {said}, not once {expected!r}")
    if table.wanted("signals TERM before the first step"):
        with table.case("signals: SIGTERM before the first step, 2 tasks") as case:
            run = Run(folder / "early", corpus, LOOKING)

            def slow(rank: int) -> None:
                build = recipe.build

                def building(*args: Any) -> Any:
                    run.out.with_name("building").touch()
                    time.sleep(2)
                    return build(*args)

                recipe.build = building

            processes = run.begin(by_slurm(2), hook=slow)
            while not run.out.with_name("building").exists():
                time.sleep(0.01)
            time.sleep(0.2)
            for process in processes:
                os.kill(process.pid, signal.SIGTERM)
            for process in processes:
                process.wait(60)
            got = [p.code for p in processes]
            case.found.append(f"exit {got}, {run.logged} steps done")
            case.check(got == [143, 143], processes[0].said[-900:])
            for process in processes:
                process.kill()
    if table.wanted("signals INT twice"):
        with table.case("signals: SIGINT twice, plain") as case:
            run = Run(folder / "twice", corpus, LOOKING)

            def slow_step(rank: int) -> None:
                backward = torch.Tensor.backward

                def slowly(*args: Any, **options: Any) -> Any:
                    if run.logged >= 3:
                        run.out.with_name("slow").touch()
                        time.sleep(30)
                    return backward(*args, **options)

                torch.Tensor.backward = slowly  # type: ignore[method-assign]

            processes = run.begin(hook=slow_step)
            while not run.out.with_name("slow").exists():
                time.sleep(0.01)
            os.kill(processes[0].pid, signal.SIGINT)
            time.sleep(0.5)
            begun = time.monotonic()
            os.kill(processes[0].pid, signal.SIGINT)
            code = processes[0].wait(60)
            case.found.append(f"exit {code} after {time.monotonic() - begun:.1f} s, not saved")
            case.check(code == 130 and time.monotonic() - begun < 10, processes[0].said[-900:])
            processes[0].kill()


def fake_scontrol(folder: Path, checkpoints: Path) -> Path:
    """Put a scontrol into a folder that notes what it is asked, and what was saved then."""
    folder.mkdir()
    calls = folder / "calls"
    program = folder / "scontrol"
    program.write_text(
        f"#!/bin/sh\nnewest=$(ls -d {checkpoints}/step-* | tail -1)\n"
        f'echo "$@ after $(basename $newest)" >> {calls}\n'
    )
    program.chmod(0o755)
    return calls


# -- all of it -------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    known = ("kills", "signals", "ranks", "numbers", "disk", "worlds")
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=", ".join(known))
    parser.add_argument("--number", type=int, default=200, help="kills in all")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    parser.add_argument("--only", default="", help="a pattern: cases that match")
    parser.add_argument("--keep", type=Path, help="a new folder for runs and logs, kept")
    chosen = parser.parse_args()
    if unknown := set(chosen.groups) - set(known):
        parser.error(f"unknown group {', '.join(sorted(unknown))}: there are {', '.join(known)}")
    if chosen.keep:
        chosen.keep.mkdir(parents=True)
    table = Table(chosen.only)
    with tempfile.TemporaryDirectory(prefix="genemodel-faults-") as scratch:
        folder = chosen.keep or Path(scratch)
        corpus = make_corpus(folder / "corpus")
        for group in chosen.groups or known:
            print(group, flush=True)
            (folder / group).mkdir()
            options: dict[str, int] = {}
            if group == "kills":
                options = {"number": chosen.number, "seed": chosen.seed}
            globals()[group](table, folder / group, corpus, **options)
    print(f"{table.done - len(table.failed)} of {table.done} cases are as they should be.")
    for name in table.failed:
        print(f"  not: {name}")
    return 1 if table.failed or not table.done else 0


if __name__ == "__main__":
    sys.exit(main())
