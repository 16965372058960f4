"""Directories of tensors and plain values that are written whole and read only undamaged.

Every model on disk is one: an ``*.json`` that says what it is, with the sha256 of the files beside
it and, since it holds settings that no other file repeats, of itself.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from genemodel.cells.manifest import MANIFEST
from genemodel.errors import DataError
from genemodel.settings import refuse_address
from genemodel.writing import found_again, whole_directory

# The file by which a folder is known, and what it then is.
KINDS = {
    "bundle.json": "a model bundle",
    "integrated.json": "an integrated model",
    "imputation.json": "an imputation model",
    MANIFEST: "a corpus",
}
# Where the verbs that train put their models, in the folder of a run.
PLACES = ("bundle", "model", "imputation_model", "backbone/bundle")


def known_by(path: Path) -> str | None:
    """Name the file that says what a folder is; None for one that no verb here has written."""
    return next((name for name in KINDS if (path / name).is_file()), None)


def refusal(path: Path, wanted: str = "") -> DataError:
    """Say what a path is, which is not the model that is wanted, and what to do.

    Parameters
    ----------
    path
        Where it was looked for.
    wanted
        The file that the model is known by; empty for a model of any kind.
    """
    kind = KINDS.get(wanted, "a model")
    if not path.exists():
        return DataError(
            f"No model at {path}: the directory does not exist. Pre-training writes one to "
            "RUN/bundle, fine-tuning to RUN/model and RUN/imputation_model."
        )
    there = known_by(path)
    if there is not None:
        advice = "`genemodel pretrain corpus=...` makes a model of it"
        if there != MANIFEST:
            advice = "genemodel.load reads whatever a folder holds"
        return DataError(f"{path} is {KINDS[there]}, not {kind}: {advice}.")
    inside = {place: known_by(path / place) for place in PLACES}
    places = [str(path / place) for place in PLACES if inside[place]]
    fitting = [str(path / place) for place in PLACES if inside[place] == wanted]
    if places and (fitting or not wanted):
        return DataError(
            f"{path} is not {kind} but the folder of a run: name {' or '.join(fitting or places)}."
        )
    if places:
        return DataError(
            f"{path} is not {kind} but the folder of a run that made none; it has "
            f"{' and '.join(places)}."
        )
    lacking = wanted or f"none of {', '.join(name for name in KINDS if name != 'manifest.json')}"
    return DataError(f"{path} is not {kind}: it has {'no ' if wanted else ''}{lacking}.")


def sha256(path: Path) -> str:
    """Checksum of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checked(
    path: Path,
    name: str,
    kind: str,
    about: Mapping[str, Any],
    fill: Callable[[Path], None],
    *,
    needed: int = 0,
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
        Plain values; the checksums are added as ``sha256`` and ``self``.
    fill
        Writes the other files into the directory it is given.
    needed
        About how many bytes that will be; 0 where nobody knows.

    Raises
    ------
    DataError
        If ``path`` exists and is something else, or there is no space for it.
    """
    refuse_address("path", path)
    found_again(path)
    if path.exists() and not (path / name).is_file():
        raise DataError(f"{path} exists and is not {kind} (no {name}): choose another directory.")
    with whole_directory(path, needed=needed) as folder:
        fill(folder)
        sums = {file.name: sha256(file) for file in sorted(folder.iterdir()) if file.is_file()}
        (folder / name).write_bytes(sealed({**about, "sha256": sums}))


def read_about(
    path: Path, name: str, kind: str, *, newest: int, wanted: Set[str], sealed_from: int = 2
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
    sealed_from
        The ``format`` from which on ``name`` holds a checksum of itself.

    Raises
    ------
    DataError
        A file is missing or damaged, or the format is newer.
    """
    again = "Copy the whole directory again from where it was made."
    try:
        text = (path / name).read_bytes()
        about: dict[str, Any] = json.loads(text)
        number = about["format"]
        if type(number) is not int or number < 1:
            raise ValueError(f"format is {number!r}")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path / name} cannot be read ({error}). {again}") from error
    if number > newest:
        raise DataError(
            f"{path} is {kind} of format {number}; this version reads up to {newest}. Upgrade "
            "genemodel."
        )
    if (number >= sealed_from or SEAL in about) and not is_intact(text, about.get(SEAL)):
        raise DataError(
            f"{path / name} is damaged or was edited: its checksum of itself does not fit. {again}"
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


# The key of a file's checksum of itself, and what stands there while it is computed. It is over the
# bytes, not over what they mean: 1e-05 and 1E-05 are two.
SEAL = "self"
_BLANK = "0" * 64


def sealed(values: Mapping[str, Any]) -> bytes:
    """Give the JSON text of plain values, with a checksum of the text in it."""
    text = json.dumps({**values, SEAL: _BLANK}, indent=1, sort_keys=True) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()
    entry = f'\n "{SEAL}": "{{}}"'  # of the outermost level alone by its indentation
    head, tail = text.split(entry.format(_BLANK))
    return (head + entry.format(digest) + tail).encode()


def is_intact(text: bytes, digest: object) -> bool:
    """Whether a text of :func:`sealed` is the one whose checksum it holds."""
    if not isinstance(digest, str) or text.count(digest.encode()) != 1:
        return False
    blank = text.replace(digest.encode(), _BLANK.encode())
    return hashlib.sha256(blank).hexdigest() == digest


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
