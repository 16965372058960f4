"""Training checkpoints that survive a kill at any moment.

A checkpoint is a directory ``step-00001234``: ``state.pt`` (tensors and plain values only),
``about.json`` (step, position, settings), and last ``COMPLETE.json`` with the sha256 of both. It is
written under another name, flushed to disk, renamed. Whoever looks takes the newest one whose
checksums hold; a damaged one is named and passed over.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from genemodel.bundle.directory import flush, sha256, write_directory

logger = logging.getLogger(__name__)

STATE, ABOUT, MARKER = "state.pt", "about.json", "COMPLETE.json"


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    about: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.about["step"])


class CheckpointDirectory(CheckpointIO):
    """Lightning's door to checkpoints, writing and reading the directories described above."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write one checkpoint; ``checkpoint["about"]`` becomes ``about.json``."""
        about = checkpoint.pop("about")

        def fill(folder: Path) -> None:
            torch.save(checkpoint, folder / STATE)
            (folder / ABOUT).write_text(json.dumps(about, indent=1))
            sums = {name: sha256(folder / name) for name in (STATE, ABOUT)}
            for name in (STATE, ABOUT):
                flush(folder / name)
            (folder / MARKER).write_text(json.dumps(sums, indent=1))

        write_directory(Path(path), fill)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read tensors and plain values; anything else in the file is refused by torch."""
        return torch.load(Path(path) / STATE, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: Any) -> None:
        """Delete one checkpoint."""
        shutil.rmtree(path)


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint at ``path`` if it is complete and undamaged, else say why not."""
    try:
        sums: Mapping[str, str] = json.loads((path / MARKER).read_text())
        for name, expected in sums.items():
            if sha256(path / name) != expected:
                logger.warning("Checkpoint %s: %s is damaged, passing over it.", path, name)
                return None
        return Checkpoint(path, json.loads((path / ABOUT).read_text()))
    except (OSError, json.JSONDecodeError) as error:
        logger.warning("Checkpoint %s is incomplete (%s), passing over it.", path, error)
        return None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Newest complete and undamaged checkpoint below ``folder``."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        found = read_checkpoint(path)
        if found is not None:
            return found
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(path)
