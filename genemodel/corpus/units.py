"""Units of work of a corpus that is being built: consecutive cells of one source.

A unit is made by whichever process or machine is free, in a folder of its own that appears
complete or not at all. Its record carries a fingerprint of everything its bytes depend on, so a
later run of the same command finds what is done, and makes anew what is stale, missing or damaged.
"""

import functools
import hashlib
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from genemodel.cells import remote
from genemodel.cells.matrices import ColumnRows, SelectedColumns
from genemodel.cells.obs_columns import refuse_named_twice
from genemodel.cells.source import Source
from genemodel.cells.sources import SourceFile
from genemodel.cells.sources_tenx import is_market
from genemodel.corpus import building, store
from genemodel.corpus import manifest as layout
from genemodel.corpus.building import BuildOptions, Columns, Streamed, UnitWriter, match_source
from genemodel.corpus.manifest import ObjectRecord
from genemodel.corpus.summary import mitochondrial_V, write_medians
from genemodel.errors import DataError
from genemodel.genes.match import GeneMatch
from genemodel.genes.vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData

UNITS = "units"
RECORD = "unit.json"
MEDIANS = "medians.npz"
# Ends the name of a unit of cells in memory: no later run can know that they are the same.
HELD = "-held"
# Marks what is not complete.
PARTIAL = ".partial"
_EXAMPLES = 20
# Raise it when the bytes of a unit change while all its inputs stay.
_VERSION = 2


@dataclass(frozen=True)
class Bench:
    """What all units of a build share, in a form that travels to other processes.

    ``folder`` is the working folder, ``vocabulary`` the file, ``fingerprint`` that of its content.
    """

    folder: Path
    vocabulary: Path
    fingerprint: str
    options: BuildOptions
    columns: tuple[str, ...]
    made_by: str


@dataclass(frozen=True)
class Input:
    """A source by its number; ``file`` is None where only the process that builds holds it."""

    number: int
    label: str
    file: SourceFile | None
    name: str
    """No other source of the corpus is called so."""

    @property
    def travels(self) -> bool:
        """Whether another process can open it."""
        return self.file is not None and not remote.of_this_process(self.file.path)


@dataclass(frozen=True)
class Matched:
    """How the genes of a source fit one species."""

    species: str
    n_genes: int
    n_matched: int
    n_summed: int
    n_ambiguous: int
    column: str
    unmatched: list[str]
    measured: bytes
    """Packed bits over the vocabulary."""


@dataclass(frozen=True)
class Survey:
    """What a first look at a source finds.

    ``identity`` changes when the file does; ``bounds`` cut the cells into units; ``texts`` are the
    categories that occur in each column.
    """

    identity: str
    where: str
    name: str
    file: str
    kind: str
    layer: str
    notes: tuple[str, ...]
    bounds: tuple[int, ...]
    texts: dict[str, list[str]]
    matches: tuple[Matched, ...]
    without_species: int
    repeated: int
    licence: str = ""
    citation: str = ""


@dataclass(frozen=True)
class Unit:
    """Cells ``start`` to ``stop`` of a source, and what their bytes depend on besides."""

    input: Input
    identity: str
    where: str
    start: int
    stop: int
    first_source: int
    codes: Mapping[str, tuple[int, ...]] = field(repr=False)

    @property
    def name(self) -> str:
        """The folder it is made in, the same in every run."""
        held = HELD if self.input.file is None else ""
        return f"{self.input.number:06d}-{self.start:012d}{held}"

    def fingerprint(self, bench: Bench) -> str:
        """Digest of everything that the bytes of the unit depend on."""
        file = None if self.input.file is None else asdict(self.input.file)
        depends = [
            _VERSION, bench.made_by, bench.fingerprint, asdict(bench.options), bench.columns,
            building.GROUP_VALUES, store.CHUNK_VALUES, store.SHARD_VALUES,
            file, self.input.name, self.identity, self.start, self.stop, self.first_source,
            sorted(self.codes.items()),
        ]  # fmt: skip
        text = json.dumps(depends, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class UnitRecord:
    """What a finished unit holds; ``objects`` are its files, relative to its folder."""

    fingerprint: str
    streamed: Streamed
    objects: dict[str, ObjectRecord]

    def save(self, folder: Path) -> None:
        """Write it into the folder of the unit."""
        (folder / RECORD).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> "UnitRecord | None":
        """Read the record of a unit; None where there is none that can be read."""
        try:
            values = json.loads((folder / RECORD).read_text(encoding="utf-8"))
            streamed = Streamed(**values["streamed"])
            objects = {name: ObjectRecord(**o) for name, o in values["objects"].items()}
            return cls(values["fingerprint"], streamed, objects)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def holds(self, folder: Path) -> bool:
        """Whether every file is there with the checksum that it was written with."""
        try:
            return all(
                layout.file_record(folder / name) == stated for name, stated in self.objects.items()
            )
        except OSError:
            return False


@dataclass(frozen=True)
class Outcome:
    """A finished unit; ``fresh`` where it was made now, not found."""

    record: UnitRecord
    fresh: bool


@functools.lru_cache(1)
def _vocabulary(path: Path, fingerprint: str) -> GeneVocabulary:
    vocabulary = GeneVocabulary.read(path)
    if vocabulary.fingerprint != fingerprint:
        raise DataError(f"{path}: is not the vocabulary that the corpus is built with")
    return vocabulary


def _go_on() -> None:
    """Let the work go on."""


@contextmanager
def _said_once(again: bool) -> Iterator[None]:
    """Keep what opening a source says to itself where it is opened again."""
    room = logging.getLogger("genemodel.cells")  # whose sources they are
    level = room.level
    if again:
        room.setLevel(logging.ERROR)
    try:
        yield
    finally:
        room.setLevel(level)


class Desk:
    """What a process keeps between two units: the source that it opened last.

    Parameters
    ----------
    held
        Sources that only this process has, by number.
    go_on
        Called between chunks; raises where the work is to stop.
    vocabulary
        That of the build, where it is in memory already.
    """

    def __init__(
        self,
        held: "Mapping[int, AnnData | Source] | None" = None,
        go_on: Callable[[], None] = _go_on,
        vocabulary: GeneVocabulary | None = None,
    ) -> None:
        self.go_on = go_on
        self._vocabulary = vocabulary
        self._held = held or {}
        self._seen: set[int] = set()
        self._opened: tuple[Bench, Input, str, Source, dict[str, GeneMatch]] | None = None

    def vocabulary(self, bench: Bench) -> GeneVocabulary:
        """Give the vocabulary of a build."""
        known = self._vocabulary
        if known is not None and known.fingerprint == bench.fingerprint:
            return known
        return _vocabulary(bench.vocabulary, bench.fingerprint)

    def open(
        self, bench: Bench, wanted: Input, identity: str
    ) -> tuple[Source, dict[str, GeneMatch]]:
        """Open and match a source, or take the one that is open."""
        held = self._opened
        if held is not None and held[:3] == (bench, wanted, identity):
            return held[3], held[4]
        self.close()
        with _said_once(wanted.number in self._seen):
            if wanted.file is None:
                source = bench.options.open(self._held[wanted.number], wanted.name)
            else:
                source = replace(wanted.file, name=wanted.name).open()
        self._seen.add(wanted.number)
        try:
            matches = match_source(source, self.vocabulary(bench), bench.options)
        except BaseException:
            self._let_go(wanted, source)
            raise
        self._opened = bench, wanted, identity, source, matches
        return source, matches

    def close(self) -> None:
        """Close the source that is open."""
        held, self._opened = self._opened, None
        if held is not None:
            self._let_go(held[1], held[3])

    def _let_go(self, wanted: Input, source: Source) -> None:
        # A source that the caller opened is the caller's to close.
        if wanted.file is not None:
            source.close()


def identify(wanted: Input) -> str:
    """Text that changes when the source does; cells in memory are never the same twice."""
    if wanted.file is None:
        return uuid.uuid4().hex
    if not remote.is_local(wanted.file.path):
        return remote.identity(wanted.file.path)
    path = Path(wanted.file.path)
    digest = hashlib.sha256(str(path).encode())
    if path.is_dir():
        # Below a folder of a matrix-market file stands what is no part of it.
        is_zarr = any((path / name).exists() for name in ("zarr.json", ".zgroup", ".zmetadata"))
        files = sorted(path.rglob("*") if is_zarr else path.iterdir())
    else:
        files = sorted(path.parent.iterdir()) if is_market(path.name) else [path]
    for file in files:
        try:
            facts = file.stat()
        except OSError:
            continue  # opening it says what is wrong
        if not file.is_dir():
            digest.update(f"{file.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def survey(bench: Bench, wanted: Input, desk: Desk) -> Survey:
    """Open, look at and match a source, so that refusals come before any work."""
    identity = identify(wanted)
    source, matches = desk.open(bench, wanted, identity)
    obs = source.obs
    refuse_named_twice(obs, source.where)
    place = set(matches)
    column = obs["species"].cat
    known = np.array([name in place for name in column.categories] + [False])
    return Survey(
        identity=identity,
        where=source.where,
        name=source.name,
        file=source.file,
        kind=source.kind,
        layer=source.counts.name,
        notes=tuple(source.notes),
        bounds=_bounds(source, bench.options.group_cells),
        texts={c: building.texts_of(obs[c]) for c in bench.columns if c in obs},
        matches=tuple(
            Matched(
                name, m.n_genes, m.n_matched, m.n_summed, len(m.ambiguous), m.column,
                list(m.unmatched[:_EXAMPLES]), np.packbits(m.measured_V).tobytes(),
            )
            for name, m in matches.items()
        ),
        without_species=int((~known[column.codes]).sum()),
        repeated=int(obs.index.duplicated().sum()),
        licence=source.licence,
        citation=source.citation,
    )  # fmt: skip


def _bounds(source: Source, most: int) -> tuple[int, ...]:
    """Where units begin, and the end; what cannot be entered in the middle stays in one piece."""
    rows = source.counts.rows
    if isinstance(rows, SelectedColumns):
        rows = rows.rows
    step = most
    if isinstance(rows, ColumnRows):
        # A pass over the file gives so many rows: to cut one would double the reading.
        step = rows.rows_per_pass * max(1, most // rows.rows_per_pass)
    elif rows.from_the_start:
        step = source.n_cells
    return (*range(0, source.n_cells, max(1, step)), source.n_cells)


def make(bench: Bench, unit: Unit, desk: Desk) -> Outcome:
    """Make a unit, or find that it is there."""
    folder = bench.folder / UNITS
    place = folder / unit.name
    fingerprint = unit.fingerprint(bench)
    found = UnitRecord.read(place)
    if found is not None and found.fingerprint == fingerprint and found.holds(place):
        return Outcome(found, fresh=False)
    if place.exists():
        shutil.rmtree(place, ignore_errors=True)
    # Nobody else writes below this name, not even a worker that was given up for dead.
    here = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    partial = folder / f"{unit.name}{PARTIAL}-{here}"
    try:
        partial.mkdir(parents=True)
        source, matches = desk.open(bench, unit.input, unit.identity)
        columns = Columns(
            bench.columns,
            {c: building.texts_of(source.obs[c]) for c in unit.codes},
            unit.codes,
        )
        vocabulary = desk.vocabulary(bench)
        writer = UnitWriter(
            partial, vocabulary, bench.options, columns, _mito_V(vocabulary), desk.go_on
        )
        streamed = writer.write(source, matches, unit.start, unit.stop, unit.first_source)
        if unit.input.file is not None and identify(unit.input) != unit.identity:
            raise DataError(f"{unit.where}: was changed while it was read. Start again")
        write_medians(partial / MEDIANS, writer.medians)
        objects = {name: layout.file_record(partial / name) for name in layout.files_under(partial)}
        record = UnitRecord(fingerprint, streamed, objects)
        record.save(partial)
        layout.sync_files(partial)
        try:
            partial.rename(place)
        except OSError:
            # Made twice, after a worker was given up too early: both are the same.
            other = UnitRecord.read(place)
            if other is None or other.fingerprint != fingerprint:
                raise
            shutil.rmtree(partial, ignore_errors=True)
            return Outcome(other, fresh=False)
        layout.sync_folder(folder)
    except BaseException:
        desk.close()
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return Outcome(record, fresh=True)


@functools.lru_cache(1)
def _mito_V(vocabulary: GeneVocabulary) -> npt.NDArray[np.bool_]:
    return mitochondrial_V(vocabulary)
