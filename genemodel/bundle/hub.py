"""Models on the Hugging Face hub: from an address to a folder of this machine.

``hf://ORG/NAME`` or ``hf://ORG/NAME@REVISION``, a branch, a tag or a commit. What is fetched are
the files that the model itself lists, weights and tables; no code is fetched, and none is ever run.
They lie in the cache of ``huggingface_hub`` (``HF_HOME``), where they are found again without a
network (``HF_HUB_OFFLINE=1``).
"""

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.settings import HUB, check_model_text

logger = logging.getLogger(__name__)

# The file by which a model is known.
ABOUT = "model.json"
# What a model is made of: tensors, plain values and tables, and nothing that could be run.
SUFFIXES = (".safetensors", ".json", ".tsv", ".tsv.gz", ".txt")
# Models that a head reads lie in folders of the head's own.
_DEEPEST = 3


def local_model(path: str | Path) -> Path:
    """Give the folder of a model: the path itself, or what its address on the hub is fetched to.

    Raises
    ------
    ConfigError
        An address that is none.
    DataError
        There is no such model, no access to it, or no network and no copy in the cache.
    """
    if not str(path).startswith(HUB):
        return Path(path).expanduser()
    return _fetched(str(path))


def parts_of(address: str) -> tuple[str, str | None]:
    """Split an address into the name of the repository and the revision.

    Raises
    ------
    ConfigError
        It is no address of a model on the hub.
    """
    check_model_text("model", address)
    if not address.startswith(HUB):
        raise ConfigError(f"{address} is no address on the hub: write hf://ORG/NAME.")
    name, _, revision = address.removeprefix(HUB).partition("@")
    return name, revision or None


def is_file_of_model(name: str) -> bool:
    """Whether a file is of a kind that models are made of."""
    return name.endswith(SUFFIXES)


def _fetched(address: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    name, revision = parts_of(address)
    with said_plainly(address):
        # First what the model says it consists of: of anybody else's, nothing more is fetched.
        about = Path(hf_hub_download(name, ABOUT, revision=revision, library_name="genemodel"))
        wanted = [ABOUT, *_listed(about, address)]
        for depth in range(1, _DEEPEST + 1):
            wanted += ["/".join(["bundle"] * depth) + f"/*{suffix}" for suffix in SUFFIXES]
        # By the commit, so that a branch that moves meanwhile does not mix two models.
        folder = Path(
            snapshot_download(
                name, revision=about.parent.name, allow_patterns=wanted, library_name="genemodel"
            )
        )
    logger.info("%s: revision %s, in %s.", address, about.parent.name[:12], folder)
    return folder


def _listed(about: Path, address: str) -> list[str]:
    """Give the files that a model lists; refuses what models are not made of."""
    try:
        files = list(json.loads(about.read_bytes())["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{address} is no model of genemodel: its {ABOUT} is not ours.") from error
    for file in files:
        parts = Path(file).parts
        if not is_file_of_model(file) or ".." in parts or re.search(r"^/|[*?\[]", file):
            raise DataError(
                f"{address} lists {file!r}, and a model holds only {', '.join(SUFFIXES)}: nothing "
                "of it is read."
            )
    return files


@contextmanager
def said_plainly(address: str) -> Iterator[None]:
    """Say in one sentence what the hub, or the way to it, objects to.

    Raises
    ------
    DataError
        No such model or revision, no access, no network.
    """
    import httpx2  # what huggingface_hub talks with
    from huggingface_hub import errors

    token = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except GenemodelError:
        raise
    except errors.GatedRepoError as error:
        raise DataError(f"{address} is gated: ask for access on its page, then {token}.") from error
    except errors.RevisionNotFoundError as error:
        raise DataError(f"{address}: there is no such revision; leave @… out for main.") from error
    except errors.RepositoryNotFoundError as error:
        raise DataError(
            f"{address} is not there, or is private: look at its name, or {token}."
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise DataError(f"{address} is no model of genemodel: it has no {ABOUT}.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise DataError(
            f"{address} is not in the cache, and the hub cannot be reached (no network, or "
            "HF_HUB_OFFLINE is set): fetch it once with a network, or copy its folder here."
        ) from error
    except errors.LocalTokenNotFoundError as error:
        raise DataError(f"{address}: no token is known here; {token}.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else 0
        if status in (401, 403):
            raise DataError(f"{address}: the hub refuses access; {token}.") from error
        raise DataError(f"{address}: the hub answers {status}; try again later.") from error
    except (httpx2.TransportError, ConnectionError) as error:
        raise DataError(
            f"{address}: the hub cannot be reached ({type(error).__name__}). Look at the network "
            "(proxies are read from HTTPS_PROXY), or copy the folder here."
        ) from error
    except ValueError as error:  # of the page's head, such as a licence that the hub does not know
        why = " ".join(str(error).split())
        raise DataError(f"{address}: the hub refuses what was sent: {why}") from error
