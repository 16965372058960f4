"""``genemodel push``: a model to the Hugging Face hub, with a page written from its provenance."""

import logging
from dataclasses import dataclass
from pathlib import Path

from genemodel.bundle.hub import ABOUT, SUFFIXES, is_file_of_model, parts_of, said_plainly
from genemodel.errors import ConfigError, DataError
from genemodel.hub.card import CARD, model_card
from genemodel.loading import load
from genemodel.settings import PathText
from genemodel.writing import found_again

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PushSettings:
    """Settings of ``genemodel push``, see ``configs/push.yaml``."""

    model: PathText
    to: str
    licence: str | None = None
    private: bool = False
    message: str = "Model by genemodel push"


def push(
    model: str | Path,
    to: str,
    *,
    licence: str | None = None,
    private: bool = False,
    message: str = "Model by genemodel push",
) -> str:
    """Publish the folder of a model on the hub.

    All of it is one commit: whoever loads meanwhile gets the model before or this one. Weights,
    tables and plain values are sent and nothing else; a folder that holds anything else is refused.

    Parameters
    ----------
    model
        Folder of a model of any kind.
    to
        ``hf://ORG/NAME``, or ``hf://ORG/NAME@BRANCH``; made where it is not there yet.
    licence
        Of the weights, as the hub spells it (``apache-2.0``); None: the page does not state one.
    private
        Make the repository private where there is none yet.
    message
        Of the commit.

    Returns
    -------
    The address of exactly this version, to be loaded or cited: ``hf://ORG/NAME@COMMIT``.

    Raises
    ------
    ConfigError
        ``to`` is no address on the hub.
    DataError
        There is no model in the folder, it is damaged or holds what no model is made of; or the hub
        refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    name, branch = parts_of(to)
    folder = found_again(Path(model).expanduser())
    files = _files(folder)
    # Reading it proves every checksum.
    page = model_card(load(folder, device="cpu"), to, licence=licence)
    with said_plainly(to):
        hub = HfApi(library_name="genemodel")
        hub.create_repo(name, private=private or None, exist_ok=True)
        if branch is not None:
            hub.create_branch(name, branch=branch, exist_ok=True)
        commit = hub.create_commit(
            name,
            [CommitOperationAdd(CARD, page.encode())]
            + [CommitOperationAdd(each, folder / each) for each in files],
            commit_message=message,
            revision=branch,
        )
    logger.info("%s: %d files and %s.", to, len(files), CARD)
    return f"hf://{name}@{commit.oid}"


def _files(folder: Path) -> list[str]:
    """Name what is sent; refuses what models are not made of."""
    if folder.is_dir() and not (folder / ABOUT).is_file() and any(folder.glob("*.json")):
        raise DataError(
            f"model={folder} has no {ABOUT}: if it is a model of an earlier version, write it anew "
            "with genemodel.load(…).save(…)."
        )
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    strange = [name for name in found if not is_file_of_model(name) and name != CARD]
    if strange:
        raise DataError(
            f"model={folder} holds {', '.join(strange[:5])}, and a model is made of "
            f"{', '.join(SUFFIXES)} alone: move it elsewhere, and push again."
        )
    return [name for name in found if name != CARD]


def run_push(settings: PushSettings) -> str:
    """Push a model; returns how it is loaded."""
    if "://" not in settings.to:
        raise ConfigError(f"to={settings.to}: write hf://ORG/NAME.")
    pinned = push(
        settings.model, settings.to, licence=settings.licence, private=settings.private,
        message=settings.message,
    )  # fmt: skip
    return f'{settings.to}\nLoad exactly this version with: genemodel.load("{pinned}")'
