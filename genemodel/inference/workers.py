"""Several devices of one machine: a process each, with its share of the shards.

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
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import genemodel
from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.inference.shards import Shards

logger = logging.getLogger(__name__)

_ERRORS = {"ConfigError": ConfigError, "DataError": DataError}


@dataclass(frozen=True)
class Job:
    """What every worker does alike."""

    model: str
    input: str
    reading: dict[str, Any]
    batch_size: int | None
    compile: bool
    folder: str
    fingerprint: str
    shard_cells: int


class _Worker:
    """A process, and threads that listen to it."""

    def __init__(
        self,
        name: str,
        device: torch.device,
        job: Job,
        numbers: list[int],
        threads: int,
        said: "queue.Queue[Any]",
    ) -> None:
        self.name = name
        self.left = set(numbers)
        self.ended = False
        self.failure: tuple[str, str] | None = None
        # The command's own environment, with our copy of the package first.
        package = str(Path(genemodel.__file__).resolve().parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        if device.type == "cpu":
            environment["OMP_NUM_THREADS"] = str(threads)
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
        assert self.process.stdin is not None
        # Standard input stays open: its end tells the worker that we are gone.
        with suppress(OSError):  # one that has died at once is found by its end
            told = {**asdict(job), "device": str(device), "shards": numbers}
            self.process.stdin.write(json.dumps(told) + "\n")
            self.process.stdin.flush()

    def _listen(self, said: "queue.Queue[Any]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError):  # half a line, the last of one that was killed
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
                with suppress(OSError):  # what could not be told to a worker that died
                    pipe.close()

    def refuse_failure(self) -> None:
        """Raise what ended it, where that was not the end of its work."""
        code = self.process.wait()
        if code == 0 and not self.left:
            return
        self._threads[1].join(timeout=5)
        words = list(self.last_words)
        if self.failure is not None and self.failure[0] in _ERRORS:
            raise _ERRORS[self.failure[0]](f"{self.name}: {self.failure[1]}")
        if code < 0:
            last = f" Its last message: {words[-1]}" if words else ""
            raise GenemodelError(
                f"{self.name} was killed by {signal.Signals(-code).name} (a full memory does that)."
                f"{last}"
            )
        last = self.failure[1] if self.failure else words[-1] if words else "nothing"
        error = RuntimeError(f"{self.name} ended with code {code}: {last}")
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
    missing = shards.missing()
    devices = devices[: len(missing)]
    said: queue.Queue[Any] = queue.Queue()
    workers: list[_Worker] = []
    try:
        # Neighbours stay together: files that are read from the start are read to the end once.
        shares = np.array_split(missing, len(devices)) if devices else []
        for number, (device, share) in enumerate(zip(devices, shares, strict=True), 1):
            name = f"worker {number} of {len(devices)} on {device}"
            threads = max(1, torch.get_num_threads() // len(devices))
            workers.append(_Worker(name, device, job, share.tolist(), threads, said))
        while not all(worker.ended for worker in workers):
            worker, message = said.get()
            if message is None:
                worker.ended = True
                worker.refuse_failure()
            elif "cells" in message:
                done(message["cells"])
            elif "shard" in message:
                worker.left.discard(message["shard"])
            elif "log" in message:
                logger.log(message["level"], "%s: %s", worker.name, message["log"])
            elif "error" in message:
                worker.failure = message["error"], message["text"]
    finally:
        for worker in workers:
            worker.close()
