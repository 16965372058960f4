"""Files and directories that are there whole or not at all; the only definition of it.

What is written bears another name beside its place (``.NAME.partial``), is flushed to disk and
renamed, so that a kill leaves the old one or the new one and never half of either. A directory
cannot be replaced in one move: the old one steps aside first (``.NAME.old``), and whoever opens it
after a kill between the two moves finds it again. A disk that is too small is named before work
starts where the size is known, and after it with nothing left behind where it is not.
"""

import errno
import gzip
import io
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genemodel.errors import DataError

logger = logging.getLogger(__name__)

_FULL = {errno.ENOSPC, errno.EDQUOT}
# HDF5 and safetensors (Rust) pass the system's number on in words only.
_FULL_IN_WORDS = re.compile(
    r"No space left on device|Disk quota exceeded|(errno = |os error )(28|122)\b"
)
# Times that a writer makes way again for readers that put the old directory back between its moves.
_TRIES = 100


class DiskFull(DataError):
    """A disk or a quota has less space than what is to be written takes."""


@contextmanager
def whole(path: Path, *, needed: int = 0) -> Iterator[Path]:
    """Give the name under which to write a file or a directory, then put it in its place.

    Parameters
    ----------
    path
        Where it shall be; what is there is replaced, and stays if anything fails.
    needed
        About how many bytes it will have; 0 where nobody knows.

    Raises
    ------
    DiskFull
        The disk or a quota is full, or has less than ``needed`` left. Nothing is left behind.
    """
    found_again(path)
    partial = path.with_name(f".{path.name}.partial")
    remove(partial)
    path.parent.mkdir(parents=True, exist_ok=True)
    check_space(path, needed)
    try:
        yield partial
        flush_all(partial)
        put_in_place(partial, path)
    except Exception as error:
        if not is_full(error):
            raise
        written = size_of(partial)
        remove(partial)
        known = needed > written
        raise too_small(path, needed if known else written, exact=known) from error
    finally:
        remove(partial)


def write_text(path: Path, text: str) -> None:
    """Write a text file, gzipped where its name ends in ``.gz``: same text, same bytes."""
    data = text.encode()
    if path.suffix == ".gz":
        packed = io.BytesIO()
        with gzip.GzipFile("", "wb", fileobj=packed, mtime=0) as stream:
            stream.write(data)
        data = packed.getvalue()
    with whole(path, needed=len(data)) as partial:
        partial.write_bytes(data)


@contextmanager
def whole_directory(path: Path, *, needed: int = 0) -> Iterator[Path]:
    """Give an empty directory to write into, then put it in its place; see :func:`whole`."""
    with whole(path, needed=needed) as partial:
        partial.mkdir()
        yield partial


def put_in_place(made: Path, path: Path) -> None:
    """Move a finished file or directory to its name; what is there goes once the new one stands."""
    if not (path.is_dir() or (made.is_dir() and path.exists())):
        made.replace(path)
        flush(path.parent)
        return
    old = _old(path)
    for attempt in range(_TRIES):
        if path.exists():
            remove(old)
            path.rename(old)
        try:
            made.rename(path)
            break
        except OSError as error:
            # A reader that came between the two moves has put the old one back.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or attempt == _TRIES - 1:
                if not path.exists():
                    old.rename(path)
                raise
    remove(old)
    flush(path.parent)


def found_again(path: Path) -> Path:
    """Where a directory lies whose replacement may have been interrupted between its two moves.

    Returns
    -------
    ``path``, to which the one before is moved back if need be; the place where it stepped aside to
    in a folder that cannot be changed.
    """
    if not path.name or os.path.lexists(path) or not (old := _old(path)).exists():
        return path
    try:
        old.rename(path)
    except OSError as error:
        if path.exists():  # another process was faster
            return path
        logger.warning(
            "%s was being replaced when its writer was stopped, and cannot be put back here (%s): "
            "the one before is read from %s.",
            path, error.strerror, old,
        )  # fmt: skip
        return old
    logger.warning(
        "%s was being replaced when its writer was stopped: the one before is back.", path
    )
    return path


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


# -- space -------------------------------------------------------------------------------------


def check_space(path: Path, needed: int) -> None:
    """Refuse to write ``needed`` bytes at ``path`` where fewer are free.

    Raises
    ------
    DiskFull
        With both numbers, the place, and what to do.
    """
    if needed > free_bytes(path):
        raise too_small(path, needed)


def free_bytes(path: Path) -> int:
    """Bytes that may be written at ``path``, which need not exist."""
    return shutil.disk_usage(_standing(path)).free


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; 0 for nothing."""
    if path.is_dir():
        return sum(file.lstat().st_size for file in path.rglob("*") if not file.is_dir())
    return path.stat().st_size if path.exists() else 0


def is_full(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, says that a disk or a quota is full."""
    while error is not None:
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and error.errno in _FULL):
            return True
        if _FULL_IN_WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def too_small(path: Path, needed: int, *, exact: bool = True) -> DiskFull:
    """Make the error for when ``path`` cannot be written for want of space.

    ``needed`` is about the whole of it, or with ``exact=False`` what was written until it was full.
    """
    free = free_bytes(path)
    quota = free > needed and exact
    return DiskFull(
        f"{path} cannot be written: the disk is full. It needs "
        f"{'about' if exact else 'more than'} {in_bytes(needed)}, and {in_bytes(free)} are free in "
        f"{_standing(path)}"
        + (", so that a quota or the number of files (df -i) is the limit" if quota else "")
        + ". What was there is kept. Make space or choose another place, and run the same again."
    )


def in_bytes(n: int) -> str:
    """Give a number of bytes for people and to the last one."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if n >= 1000**power:
            return f"{n / 1000**power:.1f} {unit} ({n:,} bytes)"
    return f"{n} bytes"


def _standing(path: Path) -> Path:
    """Nearest folder that exists."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


# -- small steps -------------------------------------------------------------------------------


def remove(path: Path) -> None:
    """Delete a file or a directory, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush_all(path: Path) -> None:
    """Wait until a file, or a directory with all below it, is on disk."""
    if path.is_dir():
        for inside in path.rglob("*"):
            flush(inside)
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file, or the list of names of a directory, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and user-space file systems know no flush of a directory.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
