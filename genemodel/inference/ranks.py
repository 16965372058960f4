"""Processes that a launcher started side by side (torchrun), each with its own shards.

They need no connection: shards are dealt by number, and what rank 0 has to know of the others it
reads from files beside the shards.
"""

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from genemodel.errors import ConfigError, GenemodelError
from genemodel.inference.shards import Shards

logger = logging.getLogger(__name__)

# A rank says this often that it lives, and is given up after this long without a word: loading a
# model, compiling it and reading to the first of its cells take minutes at worst.
BEAT_S = 10.0
SILENCE_S = 600.0
_LOOK_S = 0.5


@dataclass
class Rank:
    """One process of ``world``: its number, and its number on its machine."""

    number: int
    world: int
    local: int
    _last_beat: float = field(default=float("-inf"), repr=False)

    @classmethod
    def of_environment(cls) -> Self | None:
        """Read what torchrun sets; None for a process of its own."""
        world = os.environ.get("WORLD_SIZE", "1")
        rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
        try:
            found = cls(int(rank), int(world), int(local))
        except ValueError:
            found = cls(-1, 2, 0)
        if found.world > 1 and not 0 <= found.number < found.world:
            raise ConfigError(
                f"the environment says RANK={rank}, WORLD_SIZE={world}: start with torchrun, which "
                "sets both, or unset them."
            )
        return found if found.world > 1 else None

    def device(self, given: torch.device) -> torch.device:
        """Return the GPU of this rank where ``given`` is any GPU."""
        if str(given) == "cuda":
            return torch.device("cuda", self.local % torch.cuda.device_count())
        return given

    def mine(self, numbers: list[int]) -> list[int]:
        """Return the shards that are this rank's; which they are does not depend on time."""
        return [number for number in numbers if number % self.world == self.number]

    def beat(self, folder: Path) -> None:
        """Say that this rank lives."""
        now = time.monotonic()
        if now - self._last_beat > BEAT_S:
            self._last_beat = now
            (folder / f"rank-{self.number}.alive").touch()

    @contextmanager
    def reporting(self, folder: Path) -> Iterator[None]:
        """Leave word for rank 0 should this rank fail."""
        failed = folder / f"rank-{self.number}.failed"
        folder.mkdir(exist_ok=True)
        failed.unlink(missing_ok=True)
        if self.number == 0:  # of an earlier session, whose other ranks may come up after us
            for stale in folder.glob("rank-*.failed"):
                stale.unlink(missing_ok=True)
        self.beat(folder)
        try:
            yield
        except BaseException as error:
            if folder.is_dir():
                failed.write_text(str(error) or type(error).__name__)
            raise

    def wait_for_others(self, shards: Shards, arrived: Callable[[int], object]) -> None:
        """Wait until all shards are there; ``arrived`` is told the number of cells of each.

        Raises
        ------
        GenemodelError
            A rank has failed, or has not been heard of for ``SILENCE_S``.
        """
        missing = shards.missing()
        if missing:
            late = ", ".join(map(str, sorted({number % self.world for number in missing})))
            logger.info("Rank 0 is through and waits for rank %s.", late)
        heard: dict[int, tuple[int, float]] = {}
        while missing:
            for number in [number for number in missing if shards.has(number)]:
                start, stop = shards.span(number)
                arrived(stop - start)
            missing = [number for number in missing if not shards.has(number)]
            for rank in sorted({number % self.world for number in missing}):
                _refuse_failed(shards.folder / f"rank-{rank}.failed", rank, self.world)
                beat = _changed(shards.folder / f"rank-{rank}.alive")
                now = time.monotonic()
                if rank not in heard or heard[rank][0] != beat:
                    heard[rank] = beat, now
                elif now - heard[rank][1] > SILENCE_S:
                    raise GenemodelError(
                        f"rank {rank} of {self.world} has not been heard of for "
                        f"{SILENCE_S / 60:.0f} minutes: look at its log."
                    )
            if missing:
                time.sleep(_LOOK_S)


def _refuse_failed(file: Path, rank: int, world: int) -> None:
    if file.exists():
        raise GenemodelError(f"rank {rank} of {world} failed: {file.read_text().strip()}")


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
