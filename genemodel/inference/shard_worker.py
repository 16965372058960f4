"""A process that embeds the shards it is told of: ``python -m genemodel.inference.shard_worker``.

Started by :mod:`genemodel.inference.workers`. A line of standard input is the job. When standard
input ends, whoever started the process is gone, and it ends at once.
"""

import json
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import torch

from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import GenemodelError
from genemodel.inference.cell_vectors import embedder
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.shards import Shards, embed_shards
from genemodel.settings import parse

# Seconds between two words on how many cells are through.
_EVERY_S = 0.5


class _Channel(logging.Handler):
    """What goes back to whoever started this process, log records included."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.WARNING)
        self.stream = stream
        self._cells, self._said = 0, time.monotonic()

    def say(self, **message: Any) -> None:
        """Write one line."""
        self.stream.write(json.dumps(message) + "\n")
        self.stream.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a warning on."""
        self.say(log=record.getMessage(), level=record.levelno)

    def count(self, cells: int) -> None:
        """Note cells that are through; say so now and then."""
        self._cells += cells
        if time.monotonic() - self._said > _EVERY_S:
            self.say_cells()

    def say_cells(self) -> None:
        """Say how many cells came through since last said."""
        self.say(cells=self._cells)
        self._cells, self._said = 0, time.monotonic()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def _work(job: dict[str, Any], channel: _Channel) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    device = torch.device(job["device"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    bundle = Bundle.load(job["model"], device=device)
    cells = VocabularyCells(job["input"], bundle, parse(InputSettings, job["reading"]))
    shards = Shards(
        Path(job["folder"]),
        len(cells),
        bundle.model.settings.width,
        job["fingerprint"],
        job["shard_cells"],
    )
    forward = embedder(bundle, batch_size=job["batch_size"], compile=job["compile"])
    for number in embed_shards(forward, cells, shards, job["shards"], channel.count):
        channel.say_cells()
        channel.say(shard=number)
    cells.close()


def main() -> int:
    """Run one job; 0 when it is done, 1 after a mistake, 2 after a refusal."""
    # Whatever a library prints must not get between our lines.
    channel = _Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    logging.getLogger("genemodel").addHandler(channel)
    try:
        _work(json.loads(sys.stdin.readline()), channel)
    except GenemodelError as error:
        channel.say(error=type(error).__name__, text=str(error))
        return 2
    except Exception as error:
        channel.say(error=type(error).__name__, text=f"{type(error).__name__}: {error}")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
