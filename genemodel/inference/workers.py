"""Several devices of one machine: a process each, to which shards are handed one by one.

A worker is :mod:`genemodel.inference.shard_worker`, told by its standard input what to do; what it
says comes back line by line as JSON.
"""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import genemodel
from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.inference.shards import Shards

logger = logging.getLogger(__name__)

# Shards that a worker has been told of and not finished: the next is read while one is computed.
_AHEAD = 2
_KEPT = " Finished shards are kept: the same command goes on with them."
_ERRORS = {"ConfigError": ConfigError, "DataError": DataError}


@dataclass(frozen=True)
class Job:
    """What every worker does alike."""

    model: str
    input: str
    layer: str | None
    species: str | None
    batch_size: int | None
    compile: bool
    folder: str
    fingerprint: str


class _Worker:
    """A process, and threads that listen to it."""

    def __init__(
        self, number: int, of: int, device: torch.device, job: Job, said: "queue.Queue[Any]"
    ) -> None:
        self.name = f"worker {number} of {of} (device={device})"
        self.under_way: set[int] = set()
        self.ended = False
        self.failure: tuple[str, str] | None = None
        # The command's own environment, with our copy of the package first.
        package = str(Path(genemodel.__file__).resolve().parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        if device.type == "cpu":
            environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // of))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "genemodel.inference.shard_worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment,
            # Ctrl-C reaches us; we end the workers.
            start_new_session=True,
        )  # fmt: skip
        self.last_words: deque[str] = deque(maxlen=30)
        self._threads = [
            threading.Thread(target=self._listen, args=(said,), daemon=True),
            threading.Thread(target=self._overhear, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        self.tell({**asdict(job), "device": str(device)})

    def tell(self, message: Any) -> None:
        """Write a line to it; one that has died is found by its end."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass

    def _listen(self, said: "queue.Queue[Any]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.put((self, json.loads(line)))
        said.put((self, None))

    def _overhear(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.strip():
                self.last_words.append(line.rstrip())

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for thread in self._threads:
            thread.join(timeout=5)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    pass  # what could not be told to a worker that died

    def refuse_failure(self) -> None:
        """Raise what ended it, where that was not the end of its work."""
        code = self.process.wait()
        if code == 0 and not self.under_way:
            return
        self._threads[1].join(timeout=5)
        words = list(self.last_words)
        if self.failure is not None and self.failure[0] in _ERRORS:
            raise _ERRORS[self.failure[0]](f"{self.name}: {self.failure[1]}{_KEPT}")
        if code < 0:
            last = f" Its last message: {words[-1]}" if words else ""
            raise GenemodelError(
                f"{self.name} was killed by {signal.Signals(-code).name} (a full memory does that)."
                f"{last}{_KEPT}"
            )
        last = self.failure[1] if self.failure else words[-1] if words else "nothing"
        error = RuntimeError(f"{self.name} ended with code {code}: {last}{_KEPT}")
        error.add_note("\n".join(words))
        raise error


def embed_on(
    devices: list[torch.device], job: Job, shards: Shards, done: Callable[[int], object]
) -> None:
    """Have the missing shards made by a process for every device.

    Parameters
    ----------
    devices
        One worker each; no more than there are shards.
    job
        What they do.
    shards
        Where the shards go.
    done
        Told the number of cells that are through.

    Raises
    ------
    GenemodelError
        A worker was refused something or killed; the others are ended.
    RuntimeError
        A worker failed by a mistake of ours.
    """
    waiting = deque(shards.missing())
    if not waiting:
        return
    said: queue.Queue[Any] = queue.Queue()
    workers: list[_Worker] = []
    try:
        devices = devices[: len(waiting)]
        for number, device in enumerate(devices, 1):
            workers.append(_Worker(number, len(devices), device, job, said))
        # Round by round, so that few shards are shared by all.
        for _ in range(_AHEAD):
            for worker in workers:
                _hand_out(worker, waiting)
        while not all(worker.ended for worker in workers):
            worker, message = said.get()
            if message is None:
                worker.ended = True
                worker.refuse_failure()
            elif "cells" in message:
                done(message["cells"])
            elif "shard" in message:
                worker.under_way.discard(message["shard"])
                _hand_out(worker, waiting)
            elif "log" in message:
                logger.log(message["level"], "%s: %s", worker.name, message["log"])
            elif "error" in message:
                worker.failure = message["error"], message["text"]
    finally:
        for worker in workers:
            worker.close()


def _hand_out(worker: _Worker, waiting: deque[int]) -> None:
    """Tell a worker of its next shard, or that there is none."""
    number = waiting.popleft() if waiting else None
    if number is not None:
        worker.under_way.add(number)
    worker.tell({"shard": number})
