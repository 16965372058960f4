"""The processes of a run: who starts them, how they end, and what their exit codes mean.

A run has one process a device. ``torchrun``, Slurm's ``srun`` or a user start them, or
:func:`supervise` does: it starts one ``python -m genemodel.train.worker`` a device from a file of
settings, hands signals on, and waits. So nothing that called ``pretrain`` runs twice, and a
notebook can train on several devices.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from genemodel.errors import ConfigError
from genemodel.settings import to_values

logger = logging.getLogger(__name__)

# What a process says with its exit code; documented in docs/clusters.md.
# 75 and 69 are EX_TEMPFAIL and EX_UNAVAILABLE of BSD's sysexits.h; 128 + n is the shell's.
FINISHED, REFUSED, OUT_OF_TIME, RANK_LOST = 0, 2, 75, 69

# SIGUSR1 and SIGUSR2 are what Slurm and submitit send before a time limit.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)

# Supervised processes have this long to save or to say why after another one has failed, and less
# where one has already found out that it waits in vain.
GRACE_S, LOST_GRACE_S = 20.0, 5.0
# Ctrl-C in a terminal reaches a process directly and through its launcher: that is one Ctrl-C.
TWICE_S = 0.5


class Unfinished(SystemExit):
    """A run ended before its last step, saved; carries the exit code that says why."""


class RankLost(SystemExit):
    """A process of the run died or hung; the run ends with ``RANK_LOST``."""

    def __init__(self) -> None:
        super().__init__(RANK_LOST)


@dataclass(frozen=True)
class Processes:
    """Which process this is, and of how many.

    Attributes
    ----------
    here, nodes
        Processes on this node, and nodes.
    rank
        Of this process among all.
    started
        Who started it: ``alone``, ``us`` (:func:`supervise`), ``torchrun``, ``slurm`` or ``user``
        (rank and address set by hand in the environment).
    """

    here: int
    nodes: int
    rank: int
    started: str

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.here * self.nodes

    @property
    def to_be_started(self) -> bool:
        """Whether several are asked for, and none has been started yet."""
        return self.started == "alone" and self.here > 1


def find_processes(devices: int, nodes: int) -> Processes:
    """Count processes: those that a launcher has started, or those that the settings ask for.

    Parameters
    ----------
    devices, nodes
        ``trainer.devices`` and ``trainer.num_nodes``; a launcher's numbers go before them.

    Raises
    ------
    ConfigError
        A launcher started numbers of processes that do not fit together.
    """
    env = os.environ
    if "LOCAL_WORLD_SIZE" in env:
        here, world = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"])
        started = "us" if env.get(_SUPERVISED) else "torchrun"
        if world % here:
            raise ConfigError(
                f"torchrun started {world} processes, {here} of them on this node: start the same "
                "number on every node."
            )
        return Processes(here, world // here, int(env["RANK"]), started)
    if _in_slurm_step():
        world = int(env.get("SLURM_STEP_NUM_TASKS", env.get("SLURM_NTASKS", "1")))
        slurm_nodes = int(env.get("SLURM_STEP_NUM_NODES", env.get("SLURM_NNODES", "1")))
        if world % slurm_nodes:
            raise ConfigError(
                f"srun started {world} tasks on {slurm_nodes} nodes: start the same number on "
                "every node (--ntasks-per-node)."
            )
        return Processes(world // slurm_nodes, slurm_nodes, int(env["SLURM_PROCID"]), "slurm")
    if "LOCAL_RANK" in env:
        local, node = int(env["LOCAL_RANK"]), int(env.get("NODE_RANK", "0"))
        if local >= devices or node >= nodes:
            raise ConfigError(
                f"The environment says LOCAL_RANK={local} and NODE_RANK={node}, but there are "
                f"{devices} devices on {nodes} nodes: unset LOCAL_RANK, or say what you start "
                "(pretrain, finetune: trainer.devices=… trainer.num_nodes=…)."
            )
        return Processes(devices, nodes, node * devices + local, "user")
    if nodes > 1 and not {"NODE_RANK", "MASTER_ADDR", "MASTER_PORT"} <= set(env):
        raise ConfigError(
            f"trainer.num_nodes={nodes}, but nothing says which node this is: start the run with "
            "torchrun or srun (docs/clusters.md), or set NODE_RANK, MASTER_ADDR and MASTER_PORT "
            "on every node."
        )
    return Processes(devices, nodes, int(env.get("NODE_RANK", "0")) * devices, "alone")


# Steps above this number are Slurm's own: the batch script, an interactive shell.
_LAST_SLURM_STEP = 0xFFFFFFF0


def _in_slurm_step() -> bool:
    """Whether ``srun`` started this process; the script that sbatch runs has its variables too."""
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < _LAST_SLURM_STEP and "SLURM_PROCID" in os.environ


# -- starting them ---------------------------------------------------------------------------------

_SUPERVISED = "GENEMODEL_SUPERVISED"


def supervise(settings: Any, verb: Callable[[Any], object], processes: Processes) -> None:
    """Start one worker a device that calls a verb with these settings, and wait for all of them.

    The settings are a frozen dataclass, the verb a function of a module.

    Signals go to every worker. When one of them fails, the others get a moment to save and end
    with it.

    Raises
    ------
    Unfinished
        The run was stopped; with the workers' exit code.
    RankLost
        A worker was killed.
    SystemExit
        A worker refused or failed and has said why; with its exit code.
    """
    env = dict(os.environ)
    env.setdefault("MASTER_ADDR", "127.0.0.1")
    env.setdefault("MASTER_PORT", str(_free_port()))
    # As torchrun does: each process on its own share of the cores.
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes.here)))
    with tempfile.TemporaryDirectory(prefix="genemodel-run-") as folder:
        file = Path(folder) / "settings.json"
        kind = type(settings)
        asked = {
            "verb": f"{verb.__module__}:{verb.__name__}",
            "kind": f"{kind.__module__}:{kind.__name__}",
            "settings": to_values(settings),
        }
        file.write_text(json.dumps(asked))
        workers: list[subprocess.Popen[bytes]] = []
        with _handing_on(workers) as handing:
            for local in range(processes.here):
                place = {
                    "LOCAL_RANK": local,
                    "RANK": processes.rank + local,
                    "LOCAL_WORLD_SIZE": processes.here,
                    "WORLD_SIZE": processes.world,
                    "NODE_RANK": processes.rank // processes.here,
                    _SUPERVISED: 1,
                }
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "genemodel.train.worker", str(file)],
                        env={**env, **{k: str(v) for k, v in place.items()}},
                    )
                )
            first = _wait(workers, processes.rank, handing)
    if first == 0:
        return
    if first == -handing.number:  # before the worker could note it, and there was nothing to save
        raise Unfinished(128 + handing.number)
    if first < 0:
        raise RankLost
    raise (Unfinished(first) if first == OUT_OF_TIME or first > 128 else SystemExit(first))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class _handing_on:
    """Hand signals on to the workers while they run.

    A terminal's Ctrl-C reaches the workers by itself; a scheduler's signal may reach this process
    only.
    """

    def __init__(self, workers: "list[subprocess.Popen[bytes]]") -> None:
        self.workers = workers
        self.number = 0
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "_handing_on":
        if threading.current_thread() is threading.main_thread():
            self.before = {n: signal.signal(n, self._hand_on) for n in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        for worker in self.workers:
            if worker.poll() is None:
                worker.kill()
            worker.wait()

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        if number == signal.SIGINT and sys.stdin is not None and _in_foreground():
            return
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(number)


def _in_foreground() -> bool:
    """Whether a terminal sends its Ctrl-C to the whole group, workers included."""
    try:
        return os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()
    except (OSError, ValueError):
        return False


def _wait(workers: "list[subprocess.Popen[bytes]]", first_rank: int, handing: _handing_on) -> int:
    """Wait for all; returns the code of the first that failed, negative for a signal, or 0."""
    first: int | None = None
    deadline: float | None = None
    while any(worker.poll() is None for worker in workers):
        for local, worker in enumerate(workers):
            code = worker.poll()
            if code and first is None:
                first = code
                grace = LOST_GRACE_S if code == RANK_LOST else GRACE_S
                deadline = time.monotonic() + grace
                if code < 0 and code != -handing.number:
                    logger.error(
                        "Rank %d was killed by %s; the others end with it. The same command goes "
                        "on from the last checkpoint.",
                        first_rank + local, signal.Signals(-code).name,
                    )  # fmt: skip
        if deadline is not None and time.monotonic() > deadline:
            for worker in workers:
                if worker.poll() is None:
                    worker.kill()
        time.sleep(0.05)
    codes = [worker.returncode for worker in workers]
    return first if first is not None else next((code for code in codes if code), 0)


# -- being asked to stop ---------------------------------------------------------------------------


class StopSignals:
    """Notes signals that ask to stop, to be looked at between two steps.

    The second SIGINT ends the process at once: somebody pressed Ctrl-C twice.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self.number = 0
        self._at = 0.0
        self._say = say
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {n: signal.signal(n, self._note) for n in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and number == signal.SIGINT and now - self._at > TWICE_S:
            raise KeyboardInterrupt
        if self.number:
            return
        self.number, self._at = number, now
        # The process may be in the middle of writing to the same stream.
        with contextlib.suppress(RuntimeError):
            self._say(f"{signal.Signals(number).name} received: saving at the end of this step.")


def requeue() -> None:
    """Ask Slurm to start this job again, once the run is saved."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if not job:
        logger.warning("trainer.requeue=true, but this is no Slurm job: start the command again.")
        return
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, check=False
        )
        why = (done.stderr.strip() or f"code {done.returncode}") if done.returncode else ""
    except OSError as error:
        why = f"scontrol: {error.strerror}"
    if why:
        logger.error("scontrol requeue %s failed (%s): submit the same script again.", job, why)
    else:
        logger.info("Slurm puts job %s into its queue again.", job)
