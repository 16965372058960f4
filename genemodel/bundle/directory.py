"""Directories of tensors and plain values that are written whole and read only undamaged.

Every model on disk is one: an ``*.json`` that says what it is, with the sha256 of the files beside
it. It is filled under another name, flushed and renamed, so that a kill leaves the old one or the
new one and never half of either.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genemodel.errors import DataError
from genemodel.settings import refuse_address


def sha256(path: Path) -> str:
    """Checksum of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush(path: Path) -> None:
    """Wait until a file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Create directory ``path`` in one move: fill a sibling, flush it, rename it."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    fill(partial)
    for file in sorted(partial.iterdir()):
        flush(file)
    flush(partial)
    if path.exists():
        # A directory cannot be replaced atomically: the old one steps aside first.
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)
    flush(path.parent)


def write_checked(
    path: Path, name: str, kind: str, about: Mapping[str, Any], fill: Callable[[Path], None]
) -> None:
    """Write a model as directory ``path``, replacing one of its kind that is there.

    Parameters
    ----------
    path
        The directory.
    name
        The file of ``about``, by which a directory of this kind is known.
    kind
        What it is, in words, with its article.
    about
        Plain values; the checksums are added as ``sha256``.
    fill
        Writes the other files into the directory it is given.

    Raises
    ------
    DataError
        If ``path`` exists and is something else.
    """
    refuse_address("path", path)
    if path.exists() and not (path / name).is_file():
        raise DataError(f"{path} exists and is not {kind} (no {name}): choose another directory.")

    def fill_and_sign(folder: Path) -> None:
        fill(folder)
        sums = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
        text = json.dumps({**about, "sha256": sums}, indent=1, sort_keys=True)
        (folder / name).write_text(text + "\n")

    write_directory(path, fill_and_sign)


def read_about(
    path: Path, name: str, kind: str, *, newest: int, wanted: Set[str]
) -> dict[str, Any]:
    """Read what :func:`write_checked` was told, after checking every file.

    Parameters
    ----------
    path, name, kind
        As there.
    newest
        Largest ``format`` that can be read.
    wanted
        Keys without which the values are of no use.

    Raises
    ------
    DataError
        A file is missing or damaged, or the format is newer.
    """
    again = "Copy the whole directory again from where it was made."
    try:
        about: dict[str, Any] = json.loads((path / name).read_text())
        number = int(about["format"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path / name} cannot be read ({error}). {again}") from error
    if number > newest:
        raise DataError(
            f"{path} is {kind} of format {number}; this version reads up to {newest}. Upgrade "
            "genemodel."
        )
    if missing := (wanted | {"sha256"}) - set(about):
        raise DataError(f"{path / name} lacks {', '.join(sorted(missing))}. {again}")
    for file, expected in about["sha256"].items():
        if not (path / file).is_file():
            raise DataError(f"{path}: {file} is missing. {again}")
        if sha256(path / file) != expected:
            raise DataError(
                f"{path / file} is damaged: its checksum is not the one in {name}. {again}"
            )
    return about


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises
    ------
    DataError
        If it is none.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
