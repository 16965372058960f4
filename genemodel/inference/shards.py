"""An embedding on disk while it grows: one file a shard, whole or not there.

A shard's name ends in a fingerprint of all that its vectors depend on, so that a folder may be gone
on with after any interruption, and what belongs to other settings is never taken.

Axes: C cells, D width.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genemodel.errors import ConfigError, DataError
from genemodel.inference.counts import SHARD_CELLS, VocabularyCells
from genemodel.inference.forward import Forward

logger = logging.getLogger(__name__)

_LOCK = "lock"


@dataclass(frozen=True)
class Shards:
    """Shards of ``size`` cells each, of an embedding of ``n_cells`` × ``width``, in a folder."""

    folder: Path
    n_cells: int
    width: int
    fingerprint: str
    size: int = SHARD_CELLS

    def __len__(self) -> int:
        return -(-self.n_cells // self.size)

    def span(self, number: int) -> tuple[int, int]:
        """First row of a shard, and the row after its last."""
        start = number * self.size
        return start, min(start + self.size, self.n_cells)

    def path(self, number: int) -> Path:
        """Where a shard is, or will be."""
        return self.folder / f"{number:06d}.{self.fingerprint[:16]}.npy"

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there yet."""
        return [number for number in range(len(self)) if not self.has(number)]

    def has(self, number: int) -> bool:
        """Whether a shard is there, whole."""
        try:
            found = np.load(self.path(number), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):
            return False
        start, stop = self.span(number)
        return bool(found.shape == (stop - start, self.width) and found.dtype == np.float32)

    def write(self, number: int, embedding_CD: np.ndarray) -> None:
        """Write a shard under another name, flush it, rename it."""
        path = self.path(number)
        # Two processes never write to one file, should one outlive whoever started it.
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.save(file, embedding_CD, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield the shards in order, each mapped from its file."""
        for number in range(len(self)):
            yield np.load(self.path(number), mmap_mode="r", allow_pickle=False)

    def sweep(self) -> None:
        """Remove what other settings, another model or an earlier input left in the folder."""
        stale = [
            file
            for file in self.folder.iterdir()
            if ".npy" in file.name and f".{self.fingerprint[:16]}.npy" not in file.name
        ]
        for file in stale:
            file.unlink(missing_ok=True)
        if stale:
            logger.info(
                "%s: %s shards of another input, model or other settings are removed.",
                self.folder, f"{len(stale):,}",
            )  # fmt: skip

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep the folder for this process, and what is in it for the next should this one fail.

        Raises
        ------
        ConfigError
            Another process works in it.
        """
        self.folder.mkdir(exist_ok=True)
        with (self.folder / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(
                    f"another process is writing the same output (it holds {self.folder}): wait "
                    "for it, or name another output."
                ) from None
            except OSError:
                pass  # a file system without locks: shards stay whole all the same
            try:
                yield
            except BaseException:
                kept = sum(map(self.has, range(len(self))))
                if kept:
                    logger.warning(
                        "%s of %s shards are kept in %s: the same command goes on with them.",
                        f"{kept:,}", f"{len(self):,}", self.folder,
                    )  # fmt: skip
                else:
                    self.remove()
                raise


def folder_for(output: Path) -> Path:
    """Where the shards of an output lie until it is written: a hidden folder beside it."""
    return output.absolute().with_name(f".{output.name}.shards")


def fingerprint_of(values: Mapping[str, Any]) -> str:
    """Sha256 of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def identity_of(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of all files of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [
        (str(file.absolute()), status.st_size, status.st_mtime_ns)
        for file, status in ((file, file.stat()) for file in files)
    ]


def refuse_full_disk(shards: Shards, output: Path) -> None:
    """Refuse to begin what the disk has no room for: shards and output are there together."""
    need = (
        4 * shards.n_cells * shards.width
        + 4 * sum(stop - start for start, stop in map(shards.span, shards.missing())) * shards.width
    )
    free = shutil.disk_usage(output.absolute().parent).free
    if need > free:
        raise DataError(
            f"output={output} needs {need / 1e9:.2f} GB while it is written (the vectors twice), "
            f"but its disk has {free / 1e9:.2f} GB free: make room, or name a file on another disk."
        )


def embed_shards(
    forward: Forward,
    cells: VocabularyCells,
    shards: Shards,
    numbers: Iterable[int],
    done: Callable[[int], object] = lambda cells: None,
) -> Iterator[int]:
    """Embed and write shards, one after another without a pause between them.

    Parameters
    ----------
    forward
        Gives vectors of the shards' width.
    cells, shards
        The source, and where its shards go.
    numbers
        Which, ascending.
    done
        Told the number of cells of every batch that has come back.

    Yields
    ------
    The number of every shard that is on disk.
    """
    chunks = (
        chunk
        for number in numbers
        for chunk in cells.chunks(start=shards.span(number)[0], stop=shards.span(number)[1])
    )
    filling: list[np.ndarray] = []
    for chunk, vectors_CD in forward.over(chunks, done):
        filling.append(vectors_CD)
        number = chunk.start // shards.size
        if chunk.start + len(vectors_CD) == shards.span(number)[1]:
            shards.write(number, np.concatenate(filling))
            filling.clear()
            yield number
