"""Writing the AnnData groups of a corpus, and reading their counts fast.

The groups are ordinary AnnData zarr v3: anndata, annbatch and any other zarr reader open them. The
counts are read here without zarr's Python machinery, because a loader wants many short ranges: the
shard's own index says where each compressed chunk lies, so a range costs a few ``pread`` calls and
decompressions, which release the GIL. Every chunk carries a CRC-32C, checked at every read: a
damaged byte is an error, and so is a missing chunk, for which zarr would give zeros.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import pandas as pd
from numcodecs import blosc

from genemodel.errors import DataError

# Values per chunk: a block of 128 rich cells is a handful of chunks, so little is read in vain.
CHUNK_VALUES = 32_768
SHARD_VALUES = 2**25
_COMPRESSOR, _LEVEL = "lz4", 5
_WRITERS = 2
_CRC_BYTES = 4
_ABSENT = np.uint64(2**64 - 1)
# Marks the root as an annbatch collection.
_COLLECTION_ATTRIBUTES = {"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"}
# zarr's settings belong to the process: what one thread sets, another that ends first takes back.
_zarr_settings = threading.Lock()


def create_collection(folder: Path) -> None:
    """Make an empty annbatch collection."""
    import zarr

    zarr.open_group(folder, mode="w", zarr_format=3, attributes=_COLLECTION_ATTRIBUTES)


def write_group(
    folder: Path,
    name: str,
    data_N: npt.NDArray[Any],
    indices_N: npt.NDArray[Any],
    indptr_C1: npt.NDArray[np.int64],
    obs: pd.DataFrame,
    var: pd.DataFrame,
) -> None:
    """Write one AnnData group: counts (C, V) as CSR in shards, obs and var."""
    import anndata as ad
    import zarr
    from zarr.codecs import BloscCodec, Crc32cCodec
    from zarr.storage import MemoryStore

    root = folder / name
    entries: dict[str, Any] = {}
    # Everything but the counts is small: made in memory, it costs zarr a tenth of the time.
    # write_empty_chunks: a chunk may be all zeros, and a chunk that is not there is an error here.
    with _zarr_settings, zarr.config.set({"array.write_empty_chunks": True}):
        group = zarr.open_group(MemoryStore(store_dict=entries), mode="w", zarr_format=3)
        group.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        ad.io.write_elem(group, "obs", _plain(obs))
        ad.io.write_elem(group, "var", _plain(var))
        matrix = group.create_group("X")
        matrix.attrs.update(
            {
                "encoding-type": "csr_matrix",
                "encoding-version": "0.1.0",
                "shape": [len(obs), len(var)],
            }
        )
        ad.io.write_elem(matrix, "indptr", indptr_C1)
        n_values = max(1, data_N.size)
        shard = min(SHARD_VALUES, -(-n_values // CHUNK_VALUES) * CHUNK_VALUES)
        for key, values in (("data", data_N), ("indices", indices_N)):
            matrix.create_array(
                key,
                shape=values.shape,
                dtype=values.dtype,
                chunks=(CHUNK_VALUES,),
                shards=(shard,),
                compressors=(
                    BloscCodec(cname=_COMPRESSOR, clevel=_LEVEL, shuffle="bitshuffle"),
                    Crc32cCodec(),
                ),
                fill_value=0,
                attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
            )
    for key, entry in entries.items():
        path = root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(entry.to_bytes())
    with ThreadPoolExecutor(_WRITERS, "genemodel-write") as pool:
        for key, values in (("data", data_N), ("indices", indices_N)):
            _write_shards(root / "X" / key, values, shard, pool)


def _write_shards(
    folder: Path, values: npt.NDArray[Any], shard_values: int, pool: ThreadPoolExecutor
) -> None:
    """Write the files of an array whose metadata says: shards of compressed, checksummed chunks.

    zarr spends ten times as long on the same bytes.
    """
    (folder / "c").mkdir(exist_ok=True)
    for number, first in enumerate(range(0, values.size, shard_values)):
        shard = values[first : first + shard_values]
        n_chunks = shard_values // CHUNK_VALUES
        index = np.full((n_chunks, 2), _ABSENT, "<u8")
        at = 0
        with (folder / "c" / str(number)).open("wb") as file:
            starts = range(0, shard.size, CHUNK_VALUES)
            parts = pool.map(_encode, [shard[a : a + CHUNK_VALUES] for a in starts])
            for place, part in enumerate(parts):
                file.write(part)
                index[place] = at, len(part)
                at += len(part)
            file.write(_with_crc(index.tobytes()))


def _encode(values: npt.NDArray[Any]) -> bytes:
    """Compress one chunk; a last, short one is filled up with zeros."""
    if values.size < CHUNK_VALUES:
        values = np.pad(values, (0, CHUNK_VALUES - values.size))
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    packed = blosc.compress(little, _COMPRESSOR.encode(), _LEVEL, blosc.BITSHUFFLE)
    return _with_crc(packed)


def _with_crc(raw: bytes) -> bytes:
    return raw + int(google_crc32c.value(raw)).to_bytes(_CRC_BYTES, "little")


def _plain(table: pd.DataFrame) -> pd.DataFrame:
    """Return the table with object strings, which anndata of any version reads."""
    plain = {
        name: column.cat.set_categories(column.cat.categories.astype(object))
        if isinstance(column.dtype, pd.CategoricalDtype)
        else column
        for name, column in table.items()
    }
    return pd.DataFrame(plain, index=table.index.astype(object))


@dataclass(frozen=True)
class _Shard:
    """Where the chunks of one file lie: (chunks, 2) offset and size."""

    path: Path
    index: npt.NDArray[np.uint64]


class ShardedArray:
    """A one-dimensional sharded array of a group, read in ranges; safe to use from threads."""

    def __init__(self, folder: Path) -> None:
        import zarr

        array = zarr.open_array(folder, mode="r")
        if array.shards is None or len(array.shape) != 1:
            raise DataError(f"{folder}: is not stored in shards: build the corpus again")
        self.dtype = np.dtype(array.dtype)
        self.size = int(array.shape[0])
        self._folder = folder
        self._chunk = int(array.chunks[0])
        self._per_shard = int(array.shards[0]) // self._chunk
        self._shards: dict[int, _Shard] = {}
        self._lock = threading.Lock()

    def _shard(self, number: int) -> _Shard:
        found = self._shards.get(number)
        if found is not None:
            return found
        path = self._folder / "c" / str(number)
        n_bytes = 16 * self._per_shard + _CRC_BYTES
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - n_bytes))
                raw = file.read()
        except OSError as error:
            raise _damaged(path, error.strerror or str(error)) from error
        if len(raw) != n_bytes or not _crc_fits(raw):
            raise _damaged(path, f"its index is cut off or changed ({size:,} bytes)")
        index = np.frombuffer(raw[:-_CRC_BYTES], "<u8").reshape(-1, 2)
        shard = _Shard(path, index)
        with self._lock:
            self._shards[number] = shard
        return shard

    def read_into(self, ranges: Sequence[tuple[int, int]], out_N: npt.NDArray[Any]) -> None:
        """Read ranges of values, end to end, into ``out_N`` (any type wide enough)."""
        scratch = np.empty(self._chunk, self.dtype)
        at = 0
        handle, opened = -1, -1
        try:
            for start, stop in ranges:
                while start < stop:
                    chunk = start // self._chunk
                    number, place = divmod(chunk, self._per_shard)
                    shard = self._shard(number)
                    if number != opened:
                        if handle >= 0:
                            os.close(handle)
                            handle = -1
                        try:
                            handle = os.open(shard.path, os.O_RDONLY)
                        except OSError as error:
                            raise _damaged(shard.path, error.strerror or str(error)) from error
                        opened = number
                    self._decode(handle, shard, place, scratch)
                    first = start - chunk * self._chunk
                    last = min(stop - chunk * self._chunk, self._chunk)
                    out_N[at : at + last - first] = scratch[first:last]
                    at += last - first
                    start += last - first
        finally:
            if handle >= 0:
                os.close(handle)

    def _decode(self, handle: int, shard: _Shard, place: int, out: npt.NDArray[Any]) -> None:
        offset, size = shard.index[place]
        if offset == _ABSENT:
            raise _damaged(shard.path, f"chunk {place} is missing")
        try:
            raw = os.pread(handle, int(size), int(offset))
        except OSError as error:
            raise _damaged(shard.path, error.strerror or str(error)) from error
        if len(raw) != size or not _crc_fits(raw):
            raise _damaged(shard.path, f"chunk {place} is cut off or changed (wrong CRC)")
        try:
            blosc.decompress(raw[:-_CRC_BYTES], out)
        except (RuntimeError, ValueError) as error:
            raise _damaged(shard.path, f"chunk {place} cannot be decompressed") from error


def _crc_fits(raw: bytes) -> bool:
    stated = int.from_bytes(raw[-_CRC_BYTES:], "little")
    return bool(google_crc32c.value(raw[:-_CRC_BYTES]) == stated)


def _damaged(path: Path, why: str) -> DataError:
    corpus = next((p.parent for p in path.parents if p.suffix == ".zarr"), path.parent)
    return DataError(
        f"corpus {corpus}: {path.relative_to(corpus)} is damaged: {why}. "
        "`genemodel corpus verify` lists all damage; restore the file from a copy or build again"
    )


class GroupReader:
    """Counts of one group."""

    def __init__(self, folder: Path) -> None:
        self.data = ShardedArray(folder / "X" / "data")
        self.indices = ShardedArray(folder / "X" / "indices")
        if self.data.size != self.indices.size:
            raise DataError(
                f"{folder}: {self.data.size:,} counts but {self.indices.size:,} genes. The group "
                "is damaged: build the corpus again"
            )
