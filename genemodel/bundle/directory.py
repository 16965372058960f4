"""Models on disk: one layout for all kinds, written whole and read only undamaged.

::

    model.json             kind, format, settings, provenance, training; sha256 of what lies beside
                           it and, since it holds settings that no other file repeats, of itself
    weights.safetensors    all tensors
    history.tsv            losses of the training, where one was kept
    training.safetensors   fingerprints of the cells trained on, where they are known
    …                      what a kind has besides, such as genes.txt or vocabulary.tsv.gz
    bundle/                the pre-trained model beneath a head that reads one: a folder like this

Folders of before format 4 have a file of another name for ``model.json``, one for each kind, and
are read all the same.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from genemodel.bundle.history import read_history, write_history
from genemodel.bundle.hub import ABOUT as ABOUT
from genemodel.bundle.hub import local_model
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.corpus.manifest import MANIFEST
from genemodel.errors import DataError
from genemodel.settings import refuse_address
from genemodel.writing import found_again, whole_directory

WEIGHTS = "weights.safetensors"
FORMAT = 4
BUNDLE, INTEGRATION, IMPUTATION = "bundle", "integration", "imputation"
CORPUS = "corpus"
# What a folder is, in words.
KINDS = {
    BUNDLE: "a model bundle",
    INTEGRATION: "an integrated model",
    IMPUTATION: "an imputation model",
    CORPUS: "a corpus",
}
# The class of what the folder of a model holds.
CLASSES = {BUNDLE: "Bundle", INTEGRATION: "IntegratedModel", IMPUTATION: "ImputationModel"}
# The file by which a folder was known before format 4, and a corpus is.
_BY_FILE = {
    "bundle.json": BUNDLE,
    "integrated.json": INTEGRATION,
    "imputation.json": IMPUTATION,
    MANIFEST: CORPUS,
}
# Where the verbs that train put their models, in the folder of a run.
PLACES = ("bundle", "model", "imputation_model", "classifier", "backbone/bundle")
_AGAIN = "Copy the whole directory again from where it was made."


def file_of(path: Path) -> str | None:
    """Name the file by which a model or corpus is known; None for any other folder."""
    return next((name for name in (ABOUT, *_BY_FILE) if (path / name).is_file()), None)


def kind_of(path: Path) -> str | None:
    """Say what a folder is, as a key of ``KINDS``; None for one that no verb here has written.

    Raises
    ------
    DataError
        It is a model, and what it says of itself cannot be read.
    """
    name = file_of(path)
    if name != ABOUT:
        return None if name is None else _BY_FILE[name]
    try:
        kind = json.loads((path / ABOUT).read_bytes())["kind"]
        if kind not in KINDS or kind == CORPUS:
            raise ValueError(f"kind is {kind!r}")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path / ABOUT} cannot be read ({error}). {_AGAIN}") from error
    return str(kind)


def refusal(path: Path, wanted: str = "") -> DataError:
    """Say what a path is, which is not the model that is wanted, and what to do.

    Parameters
    ----------
    path
        Where it was looked for.
    wanted
        The kind that is wanted; empty for a model of any kind.
    """
    kind = KINDS.get(wanted, "a model")
    if not path.exists():
        return DataError(
            f"No model at {path}: the directory does not exist. Pre-training writes one to "
            "RUN/bundle, fine-tuning to RUN/model, RUN/imputation_model and RUN/classifier."
        )
    there = kind_of(path)
    if there is not None:
        advice = "`genemodel pretrain corpus=...` makes a model of it"
        if there != CORPUS:
            advice = "genemodel.load reads whatever a folder holds"
        return DataError(f"{path} is {KINDS[there]}, not {kind}: {advice}.")
    inside = {place: kind_of(path / place) for place in PLACES}
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
    return DataError(f"{path} is not {kind}: it has no {ABOUT}.")


@dataclass(frozen=True)
class StoredModel:
    """What every kind of model has on disk, checked.

    Attributes
    ----------
    path
        The directory.
    about
        Plain values of its kind.
    weights
        All tensors, by name.
    provenance
        How it was made.
    history
        Losses of the training, a column ``step`` and one for each loss.
    training
        The cells it was trained on; None where nobody knows.
    """

    path: Path
    about: dict[str, Any]
    weights: dict[str, Tensor]
    provenance: dict[str, Any]
    history: pd.DataFrame
    training: TrainingManifest | None

    @property
    def where(self) -> str:
        """Name of the file of ``about``, for messages."""
        return str(self.path / (file_of(self.path) or ABOUT))


def write_model(
    path: str | Path,
    kind: str,
    about: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    provenance: Mapping[str, Any],
    history: pd.DataFrame,
    training: TrainingManifest | None,
    fill: Callable[[Path], object] = lambda folder: None,
) -> None:
    """Write a model as directory ``path``, replacing one of its kind that is there.

    Parameters
    ----------
    path
        The directory.
    kind
        Which of ``KINDS``.
    about, weights, provenance, history, training
        As in :class:`StoredModel`.
    fill
        Writes what the kind has besides into the directory it is given.

    Raises
    ------
    DataError
        If ``path`` exists and is something else, or there is no space for it.
    """
    path = Path(path)
    refuse_address("path", path)
    found_again(path)
    if path.exists() and kind_of(path) != kind:
        raise DataError(
            f"{path} exists and is not {KINDS[kind]} (no {ABOUT} that says so): choose another "
            "directory."
        )
    moved = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    with whole_directory(path, needed=sum(each.nbytes for each in moved.values())) as folder:
        save_file(moved, folder / WEIGHTS)
        write_history(folder, history)
        if training is not None:
            training.save(folder)
        fill(folder)
        said = {
            **about,
            "kind": kind,
            "format": FORMAT,
            "provenance": dict(provenance),
            "training": None if training is None else training.about(),
            "sha256": {f.name: sha256(f) for f in sorted(folder.iterdir()) if f.is_file()},
        }
        (folder / ABOUT).write_bytes(sealed(said))


def read_model(path: str | Path, kind: str, wanted: Set[str]) -> StoredModel:
    """Read what :func:`write_model` wrote, after checking every file.

    Parameters
    ----------
    path, kind
        As there.
    wanted
        Keys of ``about`` without which it is of no use.

    Raises
    ------
    DataError
        It is something else, a file is missing or damaged, or the format is newer.
    """
    path = found_again(local_model(path))
    if kind_of(path) != kind:
        raise refusal(path, kind)
    about = read_about(path, file_of(path) or ABOUT, KINDS[kind], wanted=wanted)
    training = about.get("training")  # models of earlier versions say nothing
    return StoredModel(
        path,
        about,
        read_tensors(path / WEIGHTS),
        about.get("provenance", {}),
        read_history(path),
        None if training is None else TrainingManifest.read(path, training),
    )


def sha256(path: Path) -> str:
    """Checksum of a file's content, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_about(path: Path, name: str, kind: str, *, wanted: Set[str]) -> dict[str, Any]:
    """Read what a model says of itself, after checking every file.

    Parameters
    ----------
    path, name
        The directory, and the file.
    kind
        What it is, in words, with its article.
    wanted
        Keys without which the values are of no use.

    Raises
    ------
    DataError
        A file is missing or damaged, or the format is newer.
    """
    try:
        text = (path / name).read_bytes()
        about: dict[str, Any] = json.loads(text)
        number = about["format"]
        if type(number) is not int or number < 1:
            raise ValueError(f"format is {number!r}")
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise DataError(f"{path / name} cannot be read ({error}). {_AGAIN}") from error
    if number > FORMAT:
        raise DataError(
            f"{path} is {kind} of format {number}; this version reads up to {FORMAT}. Upgrade "
            "genemodel."
        )
    # Format 1 had no checksum of itself.
    if (number > 1 or SEAL in about) and not is_intact(text, about.get(SEAL)):
        raise DataError(
            f"{path / name} is damaged or was edited: its checksum of itself does not fit. {_AGAIN}"
        )
    if missing := (wanted | {"sha256"}) - set(about):
        raise DataError(f"{path / name} lacks {', '.join(sorted(missing))}. {_AGAIN}")
    for file, expected in about["sha256"].items():
        if not (path / file).is_file():
            raise DataError(f"{path}: {file} is missing. {_AGAIN}")
        if sha256(path / file) != expected:
            raise DataError(
                f"{path / file} is damaged: its checksum is not the one in {name}. {_AGAIN}"
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
