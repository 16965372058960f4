"""One number per cell for all processes of a node: in a file that they map, not in each of them.

The labels of 10⁸ cells are about 4 GB; eight processes would hold them eight times. The files lie
below the system's temporary folder (``TMPDIR``), named by the content that they were made from, so
any process may make them, none needs to remove them, and the corpus itself is never written to.
"""

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import fcntl
except ImportError:  # no such locks on Windows: two processes may make the same file twice
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

# Below this a process holds its own copy: 8 MB an array are not worth a file.
MAPPED_FROM = 1_000_000


def mapped_once(
    key: str,
    name: str,
    size: int,
    dtype: npt.DTypeLike,
    parts: Callable[[], Iterable[npt.NDArray[Any]]],
) -> npt.NDArray[Any]:
    """Map an array that the first process to ask for it writes.

    Parameters
    ----------
    key
        What the values were made from: the fingerprint of a corpus.
    name
        Which of its arrays.
    size, dtype
        Shape (size,) and type.
    parts
        Makes the values, piece by piece.

    Returns
    -------
    Read-only array; in memory where it is small, or where no file can be written.
    """
    dtype = np.dtype(dtype)
    if size < MAPPED_FROM:
        return _in_memory(parts, size, dtype)
    try:
        folder = _folder() / key
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.npy"
        found = _mapped(path, size, dtype)
        if found is None:
            with _locked(folder / f"{name}.lock"):
                found = _mapped(path, size, dtype)
                if found is None:
                    _write(path, size, dtype, parts)
                    found = _mapped(path, size, dtype)
    except OSError as error:
        logger.warning(
            "%s of %s cells cannot be shared between processes (%s); each holds its own copy. Set "
            "TMPDIR to a local folder with %.1f GB free.",
            name, f"{size:,}", error, size * dtype.itemsize / 1e9,
        )  # fmt: skip
        found = None
    return _in_memory(parts, size, dtype) if found is None else found


def shared(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Let all processes of a node that computed the same values hold them once.

    The caller's own copy goes when it is no longer referred to.
    """
    if values.size < MAPPED_FROM or values.ndim != 1:
        return values
    values = np.ascontiguousarray(values)
    digest = hashlib.blake2b(values.data, digest_size=16).hexdigest()
    return mapped_once(
        "values", f"{digest}-{values.dtype.str[1:]}", values.size, values.dtype, lambda: [values]
    )


def _in_memory(
    parts: Callable[[], Iterable[npt.NDArray[Any]]], size: int, dtype: np.dtype[Any]
) -> npt.NDArray[Any]:
    values = np.empty(size, dtype)
    at = 0
    for part in parts():
        values[at : at + part.size] = part
        at += part.size
    assert at == size, f"{at:,} values of {size:,}"
    values.flags.writeable = False
    return values


def _folder() -> Path:
    """Make the folder of this user's files; nobody else can write into it."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir()) / f"genemodel-{user}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    if hasattr(os, "getuid") and (about.st_uid != os.getuid() or about.st_mode & 0o022):
        raise OSError(f"{folder} can be written by others")
    return folder


def _mapped(path: Path, size: int, dtype: np.dtype[Any]) -> npt.NDArray[Any] | None:
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None  # not there, or cut off by a full disk: made anew
    fits = found.shape == (size,) and found.dtype == dtype
    return np.asarray(found) if fits else None


def _write(
    path: Path,
    size: int,
    dtype: np.dtype[Any],
    parts: Callable[[], Iterable[npt.NDArray[Any]]],
) -> None:
    """Write and rename, so that a reader finds all or nothing."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        # Not through a map: a full disk must be an error, and not the end of the process.
        with partial.open("wb") as file:
            header = {"descr": dtype.str, "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            at = 0
            for part in parts():
                file.write(np.ascontiguousarray(part, dtype).data)
                at += part.size
        assert at == size, f"{at:,} values of {size:,}"
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process of the node in at a time; the others find what it has made."""
    with path.open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
