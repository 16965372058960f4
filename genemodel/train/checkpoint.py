"""Training checkpoints that survive a kill at any moment, and that training does not wait for.

A checkpoint is a directory ``step-00001234``: ``state.pt`` (tensors and plain values only),
``about.json`` (step, position, settings), and last ``COMPLETE.json`` with the sha256 of both. It is
written under another name, flushed to disk, renamed. Whoever looks takes the newest one whose
checksums hold; a damaged one is named and passed over.
"""

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from genemodel.bundle.directory import sha256
from genemodel.errors import DataError
from genemodel.writing import (
    found_again,
    free_bytes,
    is_full,
    remove,
    size_of,
    too_small,
    whole_directory,
)

logger = logging.getLogger(__name__)

STATE, ABOUT, MARKER = "state.pt", "about.json", "COMPLETE.json"
# Names, the table of tensors and the small files, beside the tensors themselves.
_OVERHEAD = 1 << 16
_OVERHEAD_PER_TENSOR = 512


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    about: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return int(self.about["step"])

    def state(self, map_location: str | torch.device = "cpu") -> dict[str, Any]:
        """Read tensors and plain values; anything else in the file is refused.

        Raises
        ------
        DataError
            If it is none of our making.
        """
        try:
            state: dict[str, Any] = torch.load(
                self.path / STATE, map_location=map_location, weights_only=True
            )
        except Exception as error:  # whatever torch says to bytes that are none of its own
            raise DataError(
                f"{self.path / STATE} cannot be read ({error}). Move {self.path} away: the same "
                "command goes on from the checkpoint before."
            ) from error
        return state


def read_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint at ``path`` if it is complete and undamaged, else say why not."""
    try:
        sums: Mapping[str, str] = json.loads((path / MARKER).read_bytes())
        if set(sums) != {STATE, ABOUT}:
            raise ValueError(f"{MARKER} is damaged")
        for name, expected in sums.items():
            if sha256(path / name) != expected:
                logger.warning("Checkpoint %s: %s is damaged, passing over it.", path, name)
                return None
        return Checkpoint(path, json.loads((path / ABOUT).read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("Checkpoint %s is incomplete (%s), passing over it.", path, error)
        return None


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Newest complete and undamaged checkpoint below ``folder``."""
    for path in sorted(_all(folder), reverse=True):
        found = read_checkpoint(path)
        if found is not None:
            return found
    return None


def prune(folder: Path, keep: int, *, newest: Path | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints, and what interrupted writers left.

    Damaged ones above the newest that is whole go too: the run went on from below them, and they
    would be counted as kept. ``newest`` says which that is; None reads all of them to find out.
    """
    for left in folder.glob(".step-*.partial"):
        remove(left)
    if newest is None:
        found = newest_checkpoint(folder)
        if found is None:
            return
        newest = found.path
    older = []
    for path in sorted(_all(folder)):
        if path < newest:
            older.append(path)
        elif path > newest and read_checkpoint(path) is None:
            remove(path)
    for path in older[: len(older) - (keep - 1)]:
        remove(path)


def _all(folder: Path) -> list[Path]:
    for aside in folder.glob(".step-*.old"):
        found_again(folder / aside.name.removeprefix(".").removesuffix(".old"))
    return list(folder.glob("step-*"))


class CheckpointWriter:
    """Write checkpoints in the background, one at a time.

    :meth:`save` copies the state to the memory of the host and returns; a thread writes it. The
    next :meth:`save` or :meth:`close` waits for the one before and raises what went wrong in it.

    Parameters
    ----------
    keep
        Checkpoints that stay after each save: the newest ones.

    Attributes
    ----------
    saves
        Checkpoints that are complete on disk.
    written_s
        Seconds spent on writing all of them, most of them beside the training.
    stalled_s
        Seconds that the training stood still for them: copying, and waiting for the one before.
    """

    def __init__(self, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep}: at least the newest checkpoint stays")
        self.keep = keep
        self.saves = 0
        self.written_s = 0.0
        self.stalled_s = 0.0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self, path: Path, state: dict[str, Any], about: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Save one checkpoint.

        Parameters
        ----------
        path
            Directory, ``step-`` and the number of steps in eight digits.
        state
            Tensors on any device and plain values, nested in dictionaries, lists and tuples. It
            may change as soon as this returns.
        about
            Plain values; they become ``about.json``.
        wait
            Return only when it is on disk, as at the end of a run.

        Raises
        ------
        DataError
            The checkpoint before could not be written, or there is no space for this one even
            without all but the newest complete one. What is on disk is untouched then.
        """
        begin = time.perf_counter()
        try:
            self._join()
            _make_room(path, _bytes_of(state))
            text = json.dumps(about, indent=1)
            snapshot = on_host(state)
            self._thread = threading.Thread(
                target=self._write, args=(path, snapshot, text), name="checkpoint"
            )
            self._thread.start()
            if wait:
                self._join()
        finally:
            self.stalled_s += time.perf_counter() - begin

    def close(self) -> None:
        """Wait for the last checkpoint.

        Raises
        ------
        DataError
            It could not be written.
        """
        begin = time.perf_counter()
        try:
            self._join()
        finally:
            self.stalled_s += time.perf_counter() - begin

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, DataError):
            raise error
        if error is not None:
            raise DataError(
                f"The last checkpoint could not be written ({type(error).__name__}: {error}); the "
                "ones before it are kept. Mend that and run the same command again."
            ) from error

    def _write(self, path: Path, state: dict[str, Any], about: str) -> None:
        begin = time.perf_counter()
        try:
            _write(path, state, about)
            prune(path.parent, self.keep, newest=path)
            self.saves += 1
        except Exception as error:  # noqa: BLE001 - the next call raises it, where one trains
            self._error = error
        self.written_s += time.perf_counter() - begin


def _write(path: Path, state: dict[str, Any], about: str) -> None:
    while True:
        try:
            with whole_directory(path, needed=_bytes_of(state)) as folder:
                # Through a file of our own, whose error says that the disk is full.
                with (folder / STATE).open("wb") as file:
                    torch.save(state, file)
                (folder / ABOUT).write_text(about)
                sums = {name: sha256(folder / name) for name in (STATE, ABOUT)}
                (folder / MARKER).write_text(json.dumps(sums, indent=1))
            return
        except DataError as error:
            # A quota does not say beforehand that it will not do.
            spare = _spare(path.parent) if is_full(error) else []
            if not spare:
                raise
            logger.warning("%s Removing %s for it.", error, spare[0])
            remove(spare[0])


def _make_room(path: Path, needed: int) -> None:
    """Remove the oldest checkpoints until ``needed`` bytes are free, or refuse and touch none.

    The newest complete one stays in any case.
    """
    free = free_bytes(path)
    if needed <= free:
        return
    going = []
    for spare in _spare(path.parent):
        going.append(spare)
        free += size_of(spare)
        if needed <= free:
            break
    else:
        raise too_small(path, needed)
    for spare in going:
        logger.warning("The disk is nearly full: removing %s for %s.", spare, path.name)
        remove(spare)


def _spare(folder: Path) -> list[Path]:
    """List what may go for a new checkpoint, oldest first: all but the newest complete one."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return []
    return [path for path in sorted(_all(folder)) if path != newest.path]


# -- a copy that training does not change ----------------------------------------------------------

_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)


def on_host(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state into the memory of the host, tensors that are one remaining one.

    Raises
    ------
    TypeError
        Something in it is neither a tensor nor a plain value, and could not be read again.
    """
    copies: dict[tuple[Any, ...], Tensor] = {}
    devices: set[torch.device] = set()

    def copied(value: Any, where: str) -> Any:
        if isinstance(value, Tensor):
            key = _identity(value)
            if key not in copies:
                source = value.detach()
                if source.device.type == "cuda":
                    devices.add(source.device)
                    copies[key] = torch.empty_like(source, device="cpu", pin_memory=True)
                    copies[key].copy_(source, non_blocking=True)
                else:
                    copies[key] = source.to("cpu", copy=True)
            return copies[key]
        if isinstance(value, dict):
            # Modules keep their version beside the entries of an OrderedDict.
            same: dict[Any, Any] = {}
            if isinstance(value, OrderedDict):
                same = OrderedDict()
                vars(same).update(vars(value))
            same.update((k, copied(v, f"{where}[{k!r}]")) for k, v in value.items())
            return same
        if type(value) in (list, tuple):
            return type(value)(copied(v, f"{where}[{i}]") for i, v in enumerate(value))
        if type(value) not in _PLAIN:
            raise TypeError(
                f"{where} is a {type(value).__name__}: a checkpoint holds tensors and plain values"
            )
        return value

    snapshot: dict[str, Any] = copied(state, "state")
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return snapshot


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _bytes_of(state: Any) -> int:
    """About how long ``state.pt`` will be."""
    sizes: dict[tuple[Any, ...], int] = {}

    def visit(value: Any) -> None:
        if isinstance(value, Tensor):
            sizes[_identity(value)] = value.nbytes
        elif isinstance(value, dict):
            for inside in value.values():
                visit(inside)
        elif isinstance(value, list | tuple):
            for inside in value:
                visit(inside)

    visit(state)
    return sum(sizes.values()) + _OVERHEAD_PER_TENSOR * len(sizes) + _OVERHEAD
