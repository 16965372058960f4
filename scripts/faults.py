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

from genemodel import writing
from genemodel.batches import loader
from genemodel.bundle.bundle import Bundle
from genemodel.command import cli
from genemodel.errors import DataError
from genemodel.heads.pretraining import PretrainingObjectives
from genemodel.train import checkpoint, loop, recipe, record
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.exchange import Exchange
from genemodel.train.job import Job

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
        "from genemodel.corpus.corpus import Corpus\n"
        "from genemodel.simulation.cells import synthetic\n"
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
    goodbye = Job._say_goodbye

    def write(*args: Any) -> None:
        path.write_text(json.dumps(counts))
        goodbye(*args)

    Job._say_goodbye = write


def before_call(name: str, nth: int, act: Callable[[], object]) -> None:
    """Do something when the n-th call of a point begins."""
    owner, attribute = POINTS[name]
    itself = getattr(owner, attribute)
    left = [nth]

    def counted(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            act()
        return itself(*args, **options)

    setattr(owner, attribute, counted)


def kill_in(name: str, nth: int, after_s: float) -> None:
    """Kill this process so long after the n-th call of a point has begun."""

    def kill() -> None:
        if after_s < 2e-4:  # a thread takes longer to start
            os.kill(os.getpid(), signal.SIGKILL)
        timer = threading.Timer(after_s, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()

    before_call(name, nth, kill)


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
            named = f"rank {victim}" in other.said.lower() or other.code == 0
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
    # It hands on what is listed only; Slurm's and submitit's signals are not by default.
    "--signals-to-handle", "SIGTERM,SIGINT,SIGUSR1,SIGUSR2",
)  # fmt: skip
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
                    process = run.launch(TORCHRUN)
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


# -- ranks that stop, die or fail ------------------------------------------------------------------

HANG_S = 15.0  # a busy machine may keep a healthy rank waiting for some seconds


def ranks(table: Table, folder: Path, corpus: Path) -> None:
    """Ranks stopped, killed, failing or stuck: the others end, and say why."""
    hang = (*LONG, "trainer.validate_every=1000000", f"trainer.hang_minutes={HANG_S / 60}")

    def run_of(name: str) -> Run:
        return Run(folder / re.sub(r"\W+", "_", name), corpus, hang)

    for number, what in ((signal.SIGSTOP, "stop"), (signal.SIGKILL, "kill")):
        for victim in (0, 1):
            for launcher in ("by hand", "devices=2", "torchrun"):
                name = f"{what} rank {victim}, {launcher}"
                if not table.wanted(f"ranks {name}"):
                    continue
                with table.case(f"ranks: {name}") as case:
                    run = run_of(name)
                    if launcher == "by hand":
                        processes = run.begin(by_hand(2))
                    elif launcher == "torchrun":
                        processes = [run.launch(TORCHRUN)]
                    else:
                        processes = run.begin(extra=("trainer.devices=2",))
                    run.wait_for_step(5, processes)
                    pids = [run.pid_of(r) for r in range(2)]
                    sent = time.monotonic()
                    os.kill(pids[victim], number)
                    step = run.logged
                    survivor = processes[1 - victim] if launcher == "by hand" else processes[0]
                    survivor.wait(120)
                    took = time.monotonic() - sent
                    case.found.append(f"exit {survivor.code} after {took:.1f} s")
                    said = survivor.said
                    case.check(f"rank {victim}" in said.lower(), f"not named: {said[-900:]}")
                    if what == "stop":
                        case.check("trainer.hang_minutes" in said, said[-900:])
                        named = re.search(r"since step ([\d,]+)", said)
                        near = named and abs(int(named[1].replace(",", "")) - step) <= 3
                        case.check(bool(near), f"step {step}: {named and named[0]}")
                    # torchrun gives its stopped worker half a minute before it kills.
                    limit = (HANG_S if what == "stop" else 0) + (
                        45 if launcher == "torchrun" else 15
                    )
                    case.check(took < limit, f"took {took:.0f} s")
                    case.check(survivor.code == (1 if launcher == "torchrun" else 69), "exit code")
                    for process in processes:
                        process.kill()
                    for pid in pids:
                        case.check(gone(pid), f"process {pid} is left")

    def failing(victim: int, error: Exception) -> Callable[[int], None]:
        def hook(rank: int) -> None:
            if rank == victim:
                fail_in("forward", 5, error)

        return hook

    for victim in (0, 1):
        name = f"MemoryError on rank {victim}"
        if table.wanted(f"ranks {name}"):
            with table.case(f"ranks: {name}") as case:
                run = run_of(name)
                processes = run.begin(by_hand(2), failing(victim, MemoryError("out of memory")))
                judge_reason(case, processes, victim, "MemoryError: out of memory", own=1)
    if table.wanted("ranks DataError before the first step"):
        with table.case("ranks: DataError before the first step on rank 1") as case:
            run = run_of("early")

            def unbuilt(rank: int) -> None:
                if rank == 1:

                    def build(*args: Any) -> Any:
                        raise DataError("this file is damaged")

                    recipe.build = build

            processes = run.begin(by_hand(2), unbuilt)
            judge_reason(case, processes, 1, "DataError: this file is damaged", own=2)
    if table.wanted("ranks rank 1 stuck"):
        with table.case("ranks: rank 1 stuck while reading") as case:
            run = run_of("stuck")

            def stuck(rank: int) -> None:
                if rank == 1:
                    steps = loop._steps

                    def slowly(*args: Any) -> Iterator[Any]:
                        for n, step in enumerate(steps(*args)):
                            if n == 5:
                                time.sleep(1000)
                            yield step

                    loop._steps = slowly

            processes = run.begin(by_hand(2), stuck)
            begun = time.monotonic()
            for process in processes:
                process.wait(120)
            codes = [p.code for p in processes]
            case.found.append(f"exit {codes} after {time.monotonic() - begun:.0f} s")
            case.check(codes == [69, 69], f"{codes}")
            for process in processes:
                case.check("rank 1 is in 'data' after step 5" in process.said, process.said[-900:])
                process.kill()
    if table.wanted("ranks supervisor killed"):
        with table.case("ranks: kill the supervisor of devices=2") as case:
            run = run_of("supervisor")
            processes = run.begin(extra=("trainer.devices=2",))
            run.wait_for_step(5, processes)
            pids = [run.pid_of(r) for r in range(2)]
            begun = time.monotonic()
            os.kill(processes[0].pid, signal.SIGKILL)
            while not all(gone(pid) for pid in pids) and time.monotonic() - begun < 60:
                time.sleep(0.1)
            case.found.append(f"workers gone after {time.monotonic() - begun:.0f} s")
            case.check(all(gone(pid) for pid in pids), "workers train on")
            case.check(run.saved == run.logged > 0, f"saved {run.saved} of {run.logged}")
            processes[0].kill()
            for pid in pids:
                if not gone(pid):
                    os.kill(pid, signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether a process has ended; whoever should wait for an orphan may not have yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def fail_in(name: str, nth: int, error: Exception) -> None:
    """Raise an error in the n-th call of a point."""

    def fail() -> None:
        raise error

    before_call(name, nth, fail)


def judge_reason(
    case: Case, processes: Sequence[Process], victim: int, reason: str, *, own: int
) -> None:
    """Both end at once, the other one with the reason of the one that failed."""
    processes[victim].wait()
    begun = time.monotonic()
    other = processes[1 - victim]
    other.wait(60)
    took = time.monotonic() - begun
    case.found.append(f"exit {[p.code for p in processes]}, the other after {took:.1f} s")
    case.check(processes[victim].code == own, f"own exit {processes[victim].code}")
    case.check(other.code == 69, f"the other's exit {other.code}")
    case.check(took < 15, f"took {took:.0f} s")
    case.check(f"Rank {victim} stopped at step" in other.said and reason in other.said, other.said)
    case.check("Traceback" not in other.said, other.said[-600:])
    for process in processes:
        process.kill()


# -- numbers that are wrong ------------------------------------------------------------------------


def poison(cells: Sequence[int], factor: float) -> None:
    """Multiply the expression values of these cells, as a damaged file might; NaN for none."""
    pack = loader.pack

    def packed(*args: Any, **options: Any) -> Any:
        batch = pack(*args, **options)
        for place in [i for i, c in enumerate(batch.cell_C.tolist()) if c in cells]:
            batch.value_T[batch.segment_T == place] *= factor
        return batch

    loader.pack = packed


def note_cells(path: Path) -> None:
    """Write down which cells every step of this rank reads, and whether its weights changed."""
    note = loop.Loop._note
    before = [""]

    def noting(self: Any, report: Any, batches: Any, stream: Any, *, shown: bool) -> None:
        weights = digest(self.losses.state_dict())
        cells = [b.cell_C[: b.n_cells].tolist() for b in batches]
        with path.open("a") as file:
            line = {"step": self.progress.step, "cells": cells, "same": weights == before[0]}
            file.write(json.dumps(line) + "\n")
        before[0] = weights
        note(self, report, batches, stream, shown=shown)

    loop.Loop._note = noting  # type: ignore[method-assign]


def noted(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(table: Table, folder: Path, corpus: Path) -> None:
    """Losses that are not finite or jump, of one cell on the second rank."""
    clean = Run(folder / "clean", corpus)
    ended = clean.through(
        places=by_hand(2), hook=lambda rank: note_cells(folder / f"clean.cells{rank}")
    )
    assert [p.code for p in ended] == [0, 0], ended[0].said
    # A cell that the second rank first meets in step 8, after two checkpoints.
    steps = noted(folder / "clean.cells1")
    seen = {c for step in steps[:7] for c in step["cells"][0]}
    seen |= {c for step in noted(folder / "clean.cells0") for c in step["cells"][0]}
    bad = next(c for c in steps[7]["cells"][0] if c not in seen)

    def bitten(run: Run, cells: Sequence[int] = (bad,)) -> Callable[[int], None]:
        def hook(rank: int) -> None:
            note_cells(run.out.with_name(f"{run.out.name}.cells{rank}"))
            poison(cells, math.nan)

        return hook

    if table.wanted("numbers NaN, stop"):
        with table.case("numbers: NaN in a cell of rank 1, on_nonfinite=stop, then skip") as case:
            run = Run(folder / "stop", corpus)
            ended = run.through(places=by_hand(2), hook=bitten(run))
            said, codes = ended[0].said, [p.code for p in ended]
            case.check(codes == [2, 2], f"{codes} {said[-900:]}")
            case.check("not finite at step 8, before the weights were changed" in said, said[-900:])
            case.check(f"cells {bad:,} of AnnData" in said, said[-900:])
            case.check("error" not in ended[1].said, "both ranks say it")
            listed = (run.out / "bad-steps" / "step-00000008.txt").read_text().split("\n")[1:-1]
            case.check(listed == [str(bad)], f"listed {listed}")
            case.check(run.saved == 6, f"saved {run.saved}")
            case.found.append(f"exit {codes}, cell {bad} named, checkpoint 6 kept")
            run.words = ("trainer.on_nonfinite=skip",)
            ended = run.through(places=by_hand(2), hook=bitten(run))
            case.check([p.code for p in ended] == [0, 0], ended[0].said[-900:])
            judge_skipped(case, run, 8)
    if table.wanted("numbers NaN, skip"):
        with table.case(
            "numbers: NaN in a cell of rank 1, on_nonfinite=skip, killed twice"
        ) as case:
            whole = Run(folder / "skip_whole", corpus, ("trainer.on_nonfinite=skip",))
            ended = whole.through(places=by_hand(2), hook=bitten(whole))
            case.check([p.code for p in ended] == [0, 0], ended[0].said[-900:])
            judge_skipped(case, whole, 8)
            compare_killed(case, folder / "skip", whole, (8, 11), bitten)
    if table.wanted("numbers NaN, roll_back"):
        with table.case("numbers: NaN on rank 1, on_nonfinite=roll_back, killed twice") as case:
            whole = Run(folder / "back_whole", corpus, ("trainer.on_nonfinite=roll_back",))
            ended = whole.through(places=by_hand(2), hook=bitten(whole))
            said = ended[0].said
            case.check([p.code for p in ended] == [0, 0], said[-900:])
            case.check("Back to the checkpoint of step 6" in said, said[-900:])
            trail = [step["step"] for step in noted(folder / "back_whole.cells0")]
            case.check(trail == [*range(1, 8), *range(7, STEPS + 1)], f"steps {trail}")
            read = [c for step in noted(folder / "back_whole.cells1") for c in step["cells"][0]]
            # The epoch is longer than the run: no cell twice, so the data went on.
            case.check(len(read) == len(set(read)) and bad not in read, "cells read again")
            case.found.append(f"back to 6, {skipped(whole)} skipped")
            case.check(skipped(whole) == 1, f"{skipped(whole)} skipped")
            compare_killed(case, folder / "back", whole, (9, 8), bitten)
    if table.wanted("numbers max_skips"):
        with table.case("numbers: NaN in every later step, max_skips=2") as case:
            words = ("trainer.on_nonfinite=skip", "trainer.max_skips=2")
            run = Run(folder / "limit", corpus, words)
            later = [c for step in steps[7:] for c in step["cells"][0]]
            ended = run.through(places=by_hand(2), hook=bitten(run, later))
            said, codes = ended[0].said, [p.code for p in ended]
            case.found.append(f"exit {codes}")
            case.check(codes == [2, 2], f"{codes} {said[-900:]}")
            case.check("at step 10 after 2 such steps (trainer.max_skips)" in said, said[-900:])
    for policy in ("note", "skip", "roll_back", "stop"):
        name = f"a jump, on_spike={policy}"
        if table.wanted(f"numbers {name}"):
            with table.case(f"numbers: {name}") as case:
                words = (
                    "trainer.max_steps=90",
                    "trainer.log_every=1",
                    f"trainer.on_spike={policy}",
                )
                run = Run(folder / f"jump_{policy}", corpus, words)
                ended = run.through(hook=lambda rank: jump_at(72))
                said, code = ended[0].said, ended[0].code
                case.check(code == (2 if policy == "stop" else 0), f"{code} {said[-900:]}")
                met = re.findall(r"the loss [\d.e+]+ is \d+ deviations above", said)
                case.found.append(f"exit {code}; {met[0] if met else 'nothing said'}")
                case.check(len(met) == 1, f"found {len(met)} times: {met}")
                if policy != "stop":
                    count = 0 if policy == "note" else 1
                    case.check(skipped(run) == count, f"{skipped(run)} skipped")
    if table.wanted("numbers no false alarm"):
        with table.case("numbers: 4 ordinary runs of 250 steps, on_spike=stop") as case:
            for name, words in (
                ("adamw", ()), ("muon", ("optim=muon",)), ("high rate", ("optim.lr=0.03",)),
                ("unclipped", ("optim.clip=0.0",)),
            ):  # fmt: skip
                rarely = ("trainer.validate_every=1000", "trainer.checkpoint_every=1000")
                extra = (*words, "trainer.max_steps=250", "trainer.on_spike=stop", *rarely)
                run = Run(folder / name.replace(" ", "_"), corpus, extra)
                ended = run.through()
                case.check(ended[0].code == 0, f"{name}: {ended[0].said[-700:]}")
            case.found.append("no alarm")


def jump_at(step: int) -> None:
    """Triple the losses of one step, the first time that it comes."""
    forward = loop.Losses.forward
    gradient = loop.Loop._gradient
    steps: list[int] = []

    def stepping(self: Any, *args: Any, **options: Any) -> Any:
        steps.append(self.progress.step + 1)
        return gradient(self, *args, **options)

    def tripled(self: Any, prepared: Any, trivial: bool) -> Any:
        total_K, trivial_K = forward(self, prepared, trivial)
        now = self.training and steps[-1] == step and steps.count(step) == 1
        return (total_K * 3 if now else total_K), trivial_K

    loop.Loop._gradient = stepping  # type: ignore[method-assign]
    loop.Losses.forward = tripled  # type: ignore[method-assign]


def skipped(run: Run) -> int:
    found = newest_checkpoint(run.out / "checkpoints")
    return int(found.state()["progress"]["skipped"]) if found else -1


def judge_skipped(case: Case, run: Run, step: int) -> None:
    """One step left out, weights untouched by it and by no other; finished."""
    for rank in range(2):
        lines = noted(run.out.with_name(f"{run.out.name}.cells{rank}"))
        same = [line["step"] for line in lines if line["same"]]
        case.check(same == [step], f"rank {rank}: weights unchanged by steps {same}")
    case.check(skipped(run) == 1, f"{skipped(run)} skipped")
    case.check(run.saved == STEPS, f"ended at {run.saved}")
    case.found.append("step left out, counted, finished")


def compare_killed(
    case: Case,
    out: Path,
    whole: Run,
    kills: Sequence[int],
    bitten: Callable[[Run], Callable[[int], None]],
) -> None:
    """The same run, killed in these forward passes of its sessions, ends the same."""
    run = Run(out, whole.corpus, whole.words)
    for nth in kills:

        def hook(rank: int, nth: int = nth) -> None:
            bitten(run)(rank)
            kill_in("forward", nth, 0.0)

        ended = run.through(places=by_hand(2), hook=hook)
        codes = [p.code for p in ended]
        case.check(-signal.SIGKILL in codes, f"not killed: {codes}")
    ended = run.through(places=by_hand(2), hook=bitten(run))
    case.check([p.code for p in ended] == [0, 0], ended[0].said[-900:])
    wrong = differences(run, whole.result(), same_steps=False)
    case.check(not wrong, f"killed and resumed: {wrong} differ")
    case.found.append("resumed bit-equal")


# -- full disks ------------------------------------------------------------------------------------

# What is being written when the last byte is taken.
WRITES: dict[str, tuple[str, int]] = {
    "metrics.csv": ("row", 5),
    "validation.csv": ("row", 3),
    "the bundle": ("bundle", 2),
    "a checkpoint": ("save", 3),
    "a checkpoint, its tensors": ("tensors", 3),
}


def fill_in(name: str, nth: int, disk: Path) -> None:
    """Take all space of a small disk before the n-th call of a point, or after for a look."""

    def fill() -> None:
        with (disk / "ballast").open("wb", buffering=0) as file:
            try:
                for size in (1 << 14, 1 << 6, 1):
                    try:
                        while True:
                            file.write(bytes(size))
                    except OSError:
                        pass
            finally:
                (disk.parent / "filled").touch()

    before_call(name, nth, fill)


@contextmanager
def small_disk(folder: Path, megabytes: int = 3) -> Iterator[Path]:
    """Mount a file system of a few megabytes; PermissionError where that is not allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        raise PermissionError
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def disk(table: Table, folder: Path, corpus: Path) -> None:
    """Disks that become full in every kind of file: said, nothing lost, and it goes on."""
    wholes: dict[int, dict[str, Any]] = {}
    for world in (1, 2):
        for what, (point, nth) in WRITES.items():
            name = f"full at {what}, {world} process{'es' if world > 1 else ''}"
            if not table.wanted(f"disk {name}"):
                continue
            if world not in wholes:
                whole = Run(folder / f"whole{world}", corpus)
                ended = whole.through(places=places_of(world))
                assert [p.code for p in ended] == [0] * world, ended[0].said
                wholes[world] = whole.result()
            with table.case(f"disk: {name}") as case:
                home = folder / re.sub(r"\W+", "_", name)
                home.mkdir()
                try:
                    with small_disk(home / "disk") as small:
                        judge_full(case, small, corpus, world, (point, nth), wholes[world])
                except PermissionError:
                    case.found.append("skipped: a file system cannot be mounted here")


def judge_full(
    case: Case, small: Path, corpus: Path, world: int, point: tuple[str, int],
    whole: Mapping[str, Any],
) -> None:  # fmt: skip
    run = Run(small / "run", corpus)
    run._log = lambda what: small.parent / f"{run.sessions}.{what}.log"  # type: ignore[method-assign]
    trace = small / "run.trace"
    trace.symlink_to(small.parent / "trace")

    def hook(rank: int) -> None:
        if rank == 0:
            fill_in(*point, small)

    ended = run.through(places=places_of(world), hook=hook)
    codes, said = [p.code for p in ended], ended[0].said
    assert (small.parent / "filled").exists(), said
    case.check(codes == [2, 69][:world], f"exit {codes}: {said[-900:]}")
    case.check("the disk is full" in said and "Traceback" not in said, said[-900:])
    if world > 1:
        other = ended[1].said
        case.check("Rank 0 stopped" in other and "disk is full" in other, other[-900:])
    saved = run.saved
    case.check(saved > 0, "no checkpoint is left")
    left = [*(run.out / "checkpoints").glob(".*"), *run.out.glob(".*")]
    case.check(not left, f"left {left}")
    again = run.through(places=places_of(world))
    case.check(again[0].code == 2, f"still full: exit {again[0].code} {again[0].said[-600:]}")
    case.check(run.saved >= saved, "a checkpoint is lost")
    (small / "ballast").unlink()
    ended = run.through(places=places_of(world))
    case.check([p.code for p in ended] == [0] * world, ended[0].said[-900:])
    wrong = differences(run, whole)
    case.check(not wrong, f"{wrong} differ")
    case.found.append(f"exit {codes}, checkpoint {saved} kept, then finished, bit-equal")


# -- other numbers of processes --------------------------------------------------------------------


def trace_world(path: Path) -> None:
    """Write the cells of every micro-batch down by its place in the step, on every rank."""
    note = loop.Loop._note

    def noting(self: Any, report: Any, batches: Any, stream: Any, *, shown: bool) -> None:
        world, rank = self.exchange.world, self.exchange.rank
        cells = {
            i * world + rank: digest(b.cell_C[: b.n_cells])[:16] for i, b in enumerate(batches)
        }
        losses = [*report.losses.values(), report.norm]
        with path.open("a") as file:
            file.write(json.dumps([self.progress.step, cells, losses]) + "\n")
        note(self, report, batches, stream, shown=shown)

    loop.Loop._note = noting  # type: ignore[method-assign]


def traced(paths: Sequence[Path]) -> dict[int, tuple[dict[str, str], list[list[float]]]]:
    """Micro-batches and losses of every step, from all ranks and sessions."""
    found: dict[int, tuple[dict[str, str], list[list[float]]]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            step, cells, losses = json.loads(line)
            here = found.setdefault(step, ({}, []))
            for place, what in cells.items():
                assert here[0].setdefault(place, what) == what, f"step {step}, {place}"
            if losses not in here[1]:
                here[1].append(losses)
    return found


def worlds(table: Table, folder: Path, corpus: Path) -> None:
    """2, 1, 4 and 2 processes with as many micro-batches a step; others are refused."""
    for kind, words in (
        ("deterministic", ("trainer.deterministic=true",)), ("ddp", ()),
    ):  # fmt: skip
        if not table.wanted(f"worlds {kind}"):
            continue
        with table.case(f"worlds: 2 x 2, 1 x 4, 4 x 1, 2 x 2, {kind}") as case:
            slug = f"{kind}_whole"
            whole = Run(folder / slug, corpus, (*words, "trainer.accumulate=4"))
            ended = whole.through(hook=lambda rank, slug=slug: trace_world(folder / f"{slug}.0"))
            case.check(ended[0].code == 0, ended[0].said[-900:])
            expected = traced([folder / f"{slug}.0"])
            run = Run(folder / kind, corpus, words)
            sessions = ((2, 2, 11), (1, 4, 19), (4, 1, 6), (2, 2, 0))
            for n, (world, accumulate, kill) in enumerate(sessions):

                def hook(
                    rank: int, kill: int = kill, last: int = world - 1, name: str = f"{kind}.{n}"
                ) -> None:
                    trace_world(folder / f"{name}.{rank}")
                    if kill and rank == last:
                        kill_in("backward", kill, 0.0)

                ended = run.through(
                    places=places_of(world), hook=hook,
                    extra=(f"trainer.accumulate={accumulate}", "trainer.hang_minutes=1"),
                )  # fmt: skip
                codes = [p.code for p in ended]
                fine = codes == [0] * world if not kill else codes[-1] == -signal.SIGKILL
                case.check(fine, f"{world} processes: {codes} {ended[0].said[-700:]}")
            found = traced(sorted(folder.glob(f"{kind}.[0-9].[0-9]")))
            case.check(sorted(found) == sorted(expected), "other steps")
            worst = 0.0
            for step, (cells, losses) in expected.items():
                case.check(found[step][0] == cells, f"step {step}: other cells")
                for got in found[step][1]:
                    pairs = zip(got, losses[0], strict=True)
                    worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
            if kind == "deterministic":
                alike = whole.result()
                del alike["metrics.csv"]  # cells and fill of a step are the first rank's
                wrong = differences(run, alike, same_steps=False)
                case.check(worst == 0 and not wrong, f"losses by {worst:.1e}, {wrong} differ")
                case.found.append("cells, losses, weights, bundle, looks bit-equal")
            else:
                case.check(worst < 1e-6, f"losses differ by {worst:.1e}")
                case.found.append(f"cells equal, losses to {worst:.1e}")
    for name, words in (
        ("adamw", ()), ("muon", ("optim=muon",)), ("accumulate=2", ("trainer.accumulate=2",)),
    ):  # fmt: skip
        if not table.wanted(f"worlds fsdp {name}"):
            continue
        with table.case(f"worlds: fsdp on 2 processes against ddp, {name}") as case:
            slug = re.sub(r"\W+", "_", name)
            runs = []
            for strategy in ("auto", "fsdp"):
                run = Run(
                    folder / f"{slug}_{strategy}", corpus, (*words, f"trainer.strategy={strategy}")
                )
                trace = folder / f"{slug}_{strategy}"
                ended = run.through(
                    places=by_hand(2),
                    hook=lambda rank, trace=trace: trace_world(Path(f"{trace}.cells{rank}")),
                )
                case.check([p.code for p in ended] == [0, 0], ended[0].said[-900:])
                runs.append((run, traced([Path(f"{trace}.cells{rank}") for rank in range(2)])))
            worst = 0.0
            for step, (cells, losses) in runs[0][1].items():
                got = runs[1][1][step]
                case.check(got[0] == cells, f"step {step}: other cells")
                pairs = zip(got[1][0], losses[0], strict=True)
                worst = max(worst, *(abs(a - b) / abs(b) for a, b in pairs))
            # Muon orthogonalises in bfloat16, which makes more of a rounding.
            case.check(worst < (1e-3 if name == "muon" else 1e-5), f"losses differ by {worst:.1e}")
            ddp, fsdp = (Bundle.load(run.out / "bundle", device="cpu") for run, _ in runs)
            shapes = [
                {k: v.shape for k, v in (*b.model.state_dict().items(), *b.heads.items())}
                for b in (ddp, fsdp)
            ]
            case.check(shapes[0] == shapes[1], "other weights in the bundle")
            expected = runs[1][0].result()
            killed = Run(folder / f"{slug}_killed", corpus, runs[1][0].words)

            def hook(rank: int) -> None:
                if rank == 1:
                    kill_in("forward", 21, 0.0)

            ended = killed.through(places=by_hand(2), hook=hook, extra=("trainer.hang_minutes=1",))
            case.check([p.code for p in ended] == [69, -9], f"{[p.code for p in ended]}")
            ended = killed.through(places=by_hand(2))
            wrong = differences(killed, expected)
            case.check(not wrong, f"killed and resumed: {wrong} differ")
            case.found.append(f"cells equal, losses to {worst:.1e}; resumed bit-equal")
    for before, after in ((2, 3), (4, 3)):
        if not table.wanted(f"worlds {before} to {after}"):
            continue
        with table.case(f"worlds: {before} to {after} processes") as case:
            run = Run(folder / f"{before}to{after}", corpus, LONG)
            run.through(places=by_hand(before), extra=("trainer.max_minutes=0.000001",))
            saved = run.saved
            ended = run.through(places=by_hand(after))
            codes, said = [p.code for p in ended], ended[0].said
            case.found.append(f"exit {codes}")
            case.check(saved > 0 and codes == [2] * after, f"{codes} {said[-700:]}")
            case.check("trainer.accumulate" in said and f"{before} micro-batches" in said, said)
            case.found.append(said.strip().split("\n")[-2].strip()[:110])
            case.check(run.saved == saved, "something was written")


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
