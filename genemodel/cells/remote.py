"""Sources at an address (``s3://…``, ``gs://…``, ``https://…``), read through fsspec in ranges.

Only what can be read in ranges is opened there: HDF5 files and zarr stores. A corpus or a run is
never kept at an address: both rely on renaming in one step, which object stores lack.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from genemodel.errors import DataError, GenemodelError
from genemodel.settings import is_address

# Blocks that stay in memory of every opened file: 128 MiB. HDF5 jumps between its tables and the
# data, so reading ahead alone would fetch the same bytes many times.
_BLOCK_BYTES = 4 * 2**20
_BLOCKS = 32
_ADVICE = "Check the address and your access to it, or download it and give the file"
_KINDS = (
    "At an address, h5ad, 10x h5, loom and zarr can be read; download anything else and give the "
    "file"
)


def of_this_process(address: str) -> bool:
    """Whether only this process can read it."""
    return address.startswith("memory:")


@contextmanager
def _refused(address: str) -> Iterator[None]:
    """Turn what the libraries of all the stores raise into a refusal that names the address."""
    try:
        yield
    except GenemodelError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{address}: does not exist. {_ADVICE}") from error
    except ImportError as error:
        raise DataError(
            f"{address}: a package that reads such addresses is missing ({error}). Install it, or "
            "download the file"
        ) from error
    # Every store has its own errors, which share no class.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise DataError(
            f"{address}: cannot be read ({type(error).__name__}: {reason}). {_ADVICE}"
        ) from error


def locate(address: str) -> tuple[Any, str, dict[str, Any]]:
    """File system, path and what is known of it.

    Raises
    ------
    DataError
        No such thing, no access, or the package for such addresses is missing.
    """
    import fsspec

    with _refused(address):
        system, path = fsspec.core.url_to_fs(address)
        # Another process may have written since this one last looked.
        system.invalidate_cache()
        return system, path, dict(system.info(path))


def identity(address: str) -> str:
    """Text that changes when what lies there does: sizes, dates, entity tags."""
    system, path, found = locate(address)
    with _refused(address):
        facts = [found]
        if found["type"] == "directory":
            listed = system.find(path, detail=True)
            facts = [listed[name] for name in sorted(listed)]
        digest = hashlib.sha256()
        for fact in facts:
            digest.update(repr(sorted((k, str(v)) for k, v in fact.items())).encode())
        return digest.hexdigest()


def name_of(address: str) -> Path:
    """Last part of an address, without a query."""
    return Path(PurePosixPath(address.partition("?")[0].rstrip("/")).name)


def is_local(path: str) -> bool:
    """Whether a text is a path of this machine."""
    return not is_address(path)


def open_hdf5(address: str) -> tuple[Any, Any] | None:
    """HDF5 file and the file object beneath; None where it is a folder.

    Raises
    ------
    DataError
        It is neither, or cannot be reached.
    """
    import h5py

    system, path, found = locate(address)
    if found["type"] == "directory":
        return None
    with _refused(address):
        head = system.cat_file(path, start=0, end=8)
        if head != b"\x89HDF\r\n\x1a\n":
            raise DataError(f"{address}: begins with {head[:8]!r}. {_KINDS}")
        stream = system.open(
            path,
            "rb",
            block_size=_BLOCK_BYTES,
            cache_type="blockcache",
            cache_options={"maxblocks": _BLOCKS},
        )
        if stream.seek(0, os.SEEK_END) != found["size"]:
            raise DataError(f"{address}: changes while it is read. Try again when it is complete")
        return h5py.File(stream, "r"), stream


def open_zarr(address: str) -> Any:
    """Group of a zarr store."""
    import zarr

    with _refused(address):
        store = zarr.storage.FsspecStore.from_url(address, read_only=True)
        try:
            return zarr.open_group(store, mode="r")
        except FileNotFoundError as error:
            raise DataError(f"{address}: is a folder, but not a zarr store. {_KINDS}") from error
