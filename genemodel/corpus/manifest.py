"""The manifest of a corpus: what it holds, what was dropped and why, and a checksum of every file.

A corpus is one folder::

    manifest.json          written last; a folder without it is not a corpus
    vocabulary.tsv.gz      the genes, in the order of the columns
    cells.zarr/            an annbatch collection of AnnData zarr v3 groups
        dataset_0/         counts (CSR, cells × vocabulary) and obs of consecutive cells
    index/dataset_0.npz    per cell: genes, library, mitochondrial counts, checksum, fingerprints,
                           codes
    statistics.N.npz       per species: sums, frequencies, medians; panel of every source
    medians.N.npz          the histograms behind the medians, for appending

Files never change once they are written; appending adds files and replaces the manifest.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from genemodel.errors import DataError
from genemodel.writing import whole

FORMAT = "genemodel-corpus"
VERSION = 1
MANIFEST = "manifest.json"
VOCABULARY = "vocabulary.tsv.gz"
COLLECTION = "cells.zarr"
INDEX = "index"
_SELF = "sha256"
_SYNCHRONISED = 8


@dataclass(frozen=True)
class SourceRecord:
    """One file and species that went into a corpus.

    Attributes
    ----------
    name, file, kind, layer, species
        Where the cells came from; ``file`` is a name without a path, ``layer`` where the counts
        stood.
    n_read, n_cells
        Cells met, cells kept.
    dropped
        Reason -> cells dropped for it.
    n_genes, n_matched, n_summed, n_ambiguous
        Genes of the file, with a token, of them added to another gene's token, fitting two genes.
    gene_column
        Where the gene names stood.
    unmatched
        Some names without a token.
    explicit_zeros, rounded
        Stored zeros removed from, fractional counts rounded in, the complete file.
    repeated_names
        Cells of the complete file whose name an earlier one has.
    notes
        What a curator should know about the counts.
    licence, citation
        Of the data, where the file or the sheet of sources says.
    n_counts
        All counts of the cells kept, those of genes outside the vocabulary included; None in a
        corpus that was built before this was noted.
    """

    name: str
    file: str
    kind: str
    layer: str
    species: str
    n_read: int
    n_cells: int
    dropped: dict[str, int]
    n_genes: int
    n_matched: int
    n_summed: int
    n_ambiguous: int
    gene_column: str
    unmatched: list[str]
    explicit_zeros: int
    rounded: int
    repeated_names: int
    notes: list[str]
    licence: str = ""
    citation: str = ""
    n_counts: int | None = None


@dataclass(frozen=True)
class GroupRecord:
    """One AnnData group of the collection: consecutive cells of one source file."""

    name: str
    n_cells: int
    n_values: int


@dataclass(frozen=True)
class ObjectRecord:
    """Size and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything that the cells of a corpus do not say themselves."""

    n_cells: int
    n_tokens: int
    vocabulary: str
    """Fingerprint of the vocabulary."""
    columns: list[str]
    categories: dict[str, list[str]]
    sources: list[SourceRecord]
    groups: list[GroupRecord]
    statistics: str
    medians: str
    """File names, relative to the corpus."""
    objects: dict[str, ObjectRecord]
    made_by: str
    fingerprint: str = field(default="", compare=False)
    """Sha256 of the manifest itself; it covers the checksums of all files."""

    def to_json(self) -> str:
        """Deterministic text, with its own checksum inside."""
        values = self._values()
        values[_SELF] = _digest(values)
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def digest(self) -> str:
        """Give the ``fingerprint`` that it will be read with."""
        return _digest(self._values())

    def _values(self) -> dict[str, Any]:
        values: dict[str, Any] = {"format": FORMAT, "format_version": VERSION, **asdict(self)}
        del values["fingerprint"]
        return values

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check the manifest of a corpus.

        Raises
        ------
        DataError
            The folder is no corpus, its manifest is damaged, or of a newer format.
        """
        path = folder / MANIFEST
        if not folder.is_dir():
            raise DataError(
                f"corpus {folder}: does not exist. Make it with `genemodel corpus build`"
            )
        if not path.is_file():
            raise DataError(
                f"corpus {folder}: has no {MANIFEST}: it is not a corpus, or its making was "
                "interrupted. Make it again with `genemodel corpus build`"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(
                f"{path}: is damaged ({error}). Restore it from a copy, or build the corpus again"
            ) from error
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise DataError(f"{path}: is not the manifest of a genemodel corpus")
        version = values.get("format_version")
        if not isinstance(version, int) or version > VERSION:
            raise DataError(
                f"{path}: has format version {version}, this genemodel reads up to {VERSION}. "
                "Update genemodel, or build the corpus again with this one"
            )
        stated = values.pop(_SELF, None)
        if stated != _digest(values):
            raise DataError(
                f"{path}: was changed after it was written (its sha256 does not fit). Restore it "
                "from a copy, or build the corpus again"
            )
        return cls._parse(values, path, stated)

    @classmethod
    def _parse(cls, values: Mapping[str, Any], path: Path, fingerprint: str) -> Self:
        names = {f.name for f in fields(cls)} - {"fingerprint"}
        missing = names - values.keys()
        if missing:
            raise DataError(f"{path}: lacks {', '.join(sorted(missing))}: build the corpus again")
        try:
            parts = {name: values[name] for name in names}
            parts["sources"] = [SourceRecord(**s) for s in values["sources"]]
            parts["groups"] = [GroupRecord(**g) for g in values["groups"]]
            parts["objects"] = {k: ObjectRecord(**o) for k, o in values["objects"].items()}
        except TypeError as error:
            raise DataError(f"{path}: has unknown entries ({error})") from error
        return cls(**parts, fingerprint=fingerprint)


def _digest(values: Mapping[str, Any]) -> str:
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step: a crash leaves the old or the new one, never a half."""
    with whole(folder / MANIFEST) as partial:
        partial.write_text(manifest.to_json(), encoding="utf-8")


def file_record(path: Path) -> ObjectRecord:
    """Size and checksum of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ObjectRecord(file.tell(), digest)


def files_under(folder: Path) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, sorted."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix()


def sync_files(folder: Path) -> None:
    """Force every file and folder below ``folder`` to disk, so that a crash cannot lose it."""
    paths = [*folder.rglob("*"), folder]
    # Most of them are small: a disk takes many at once in the time of one.
    with ThreadPoolExecutor(_SYNCHRONISED, "genemodel-sync") as pool:
        list(pool.map(lambda path: (sync_folder if path.is_dir() else sync_file)(path), paths))


def sync_file(path: Path) -> None:
    """Force a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Force a folder's entries to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
