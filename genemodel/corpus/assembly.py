"""Building and growing a corpus, such that an interruption leaves what was there before.

Every source is opened, has shown raw counts and has matched the vocabulary before a cell is stored.
Units of work (:mod:`genemodel.corpus.units`) are made by one process or many in a folder beside the
corpus, then numbered and moved into place in the order of their sources; the manifest comes last.
An interrupted run is gone on with: what it made is found again.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from genemodel.cells.obs_columns import COLUMNS
from genemodel.cells.remote import is_local
from genemodel.cells.source import Source
from genemodel.cells.source_names import Nameless, told_apart
from genemodel.corpus import manifest as layout
from genemodel.corpus.building import NO_SPECIES, BuildOptions, SourceLike, Streamed
from genemodel.corpus.engines import Engine, EngineSettings, OneProcess
from genemodel.corpus.manifest import GroupRecord, Manifest, ObjectRecord, SourceRecord
from genemodel.corpus.summary import Statistics, read_medians
from genemodel.corpus.units import (
    HELD,
    MEDIANS,
    PARTIAL,
    RECORD,
    UNITS,
    Bench,
    Desk,
    Input,
    Survey,
    Unit,
    UnitRecord,
    make,
    survey,
)
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.writing import found_again, is_full, put_in_place, size_of, too_small

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

# Says which files were moved into place, so that the next run can take them back.
_JOURNAL = "journal.json"
# A shared disk may show a new file to another machine only after a while.
_SHOWN_S = 60

type Sources = Sequence[SourceLike] | Mapping[str, SourceLike]
type Held = dict[int, "AnnData | Source"]


def listed(sources: Sources) -> list[tuple[str | None, SourceLike]]:
    """Name (None: that of the file) and data of every source."""
    if isinstance(sources, Mapping):
        pairs: list[tuple[str | None, SourceLike]] = list(sources.items())
    elif isinstance(sources, Sequence) and not isinstance(sources, str):
        pairs = [(None, data) for data in sources]
    else:
        raise ConfigError(
            "sources must be a list of files (or name -> file), not one "
            f"{type(sources).__name__}: write [{str(sources)!r}]"
        )
    if not pairs:
        raise ConfigError("sources is empty: give at least one file")
    return pairs


def inputs_of(
    sources: Sources, options: BuildOptions, taken: Collection[str] = ()
) -> tuple[list[Input], Held]:
    """Sort out which sources any process can open, and which are in this one's memory.

    No two get the same name, nor one of those ``taken``.
    """
    inputs: list[Input] = []
    held: Held = {}
    seen: set[tuple[object, str | None]] = set()
    pairs = listed(sources)
    files = [options.file(data, name) for name, data in pairs]
    names = told_apart(
        [
            Nameless(None, data.name if isinstance(data, Source) else name)
            if file is None
            else Nameless(file.path, file.name, genome=file.genome)
            for file, (name, data) in zip(files, pairs, strict=True)
        ],
        taken,
    )
    for number, (file, (_, data)) in enumerate(zip(files, pairs, strict=True)):
        if file is None:
            held[number] = data
            inputs.append(Input(number, names[number], None, names[number]))
            continue
        label = file.path
        if is_local(file.path):
            # Other processes, and machines, work elsewhere.
            file = replace(file, path=str(Path(file.path).absolute()))
        same = Path(file.path).resolve() if is_local(file.path) else file.path, file.genome
        if same in seen:
            raise ConfigError(f"{label} is listed twice in sources: its cells would be doubled")
        seen.add(same)
        inputs.append(Input(number, label, file, names[number]))
    return inputs, held


@dataclass(frozen=True)
class Plan:
    """All units of a build, and what their sources are."""

    inputs: list[Input]
    surveys: list[Survey]
    units: list[Unit]
    columns: list[str]
    categories: dict[str, list[str]]

    def command(self, bench: Bench) -> str:
        """Digest of sources and options, to recognise a command that is given again."""
        facts = [
            bench.fingerprint, asdict(bench.options), bench.columns, bench.made_by,
            # An append that is given again finds its own names taken.
            [asdict(replace(each, name="")) for each in self.inputs],
            [seen.identity for seen in self.surveys],
        ]  # fmt: skip
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()


def plan(
    engine: Engine,
    bench: Bench,
    inputs: list[Input],
    categories: Mapping[str, Sequence[str]],
    n_before: int,
) -> Plan:
    """Look at every source, then give codes to categories and numbers to sources, in order.

    Parameters
    ----------
    engine
        Who looks.
    bench
        What all units share.
    inputs
        The sources.
    categories
        Those that a grown corpus has already.
    n_before
        Records of sources that it has already.
    """
    found: dict[int, Survey] = dict(engine.results(survey, bench, inputs, inputs))
    surveys = [found[i] for i in range(len(inputs))]
    if not isinstance(engine, OneProcess):
        for wanted, seen in zip(inputs, surveys, strict=True):
            for note in seen.notes if wanted.travels else ():
                log.warning("%s, %s: %s", seen.where, seen.layer, note)
    known = {c: list(categories.get(c, ())) for c in bench.columns}
    place = {c: {text: i for i, text in enumerate(known[c])} for c in bench.columns}
    units: list[Unit] = []
    for wanted, seen in zip(inputs, surveys, strict=True):
        codes: dict[str, tuple[int, ...]] = {}
        for column, texts in seen.texts.items():
            for text in texts:
                if text not in place[column]:
                    place[column][text] = len(known[column])
                    known[column].append(text)
            codes[column] = tuple(place[column][text] for text in texts)
        for start, stop in zip(seen.bounds, seen.bounds[1:], strict=False):
            units.append(Unit(wanted, seen.identity, seen.where, start, stop, n_before, codes))
        n_before += len(seen.matches)
    return Plan(inputs, surveys, units, list(bench.columns), known)


def make_units(
    engine: Engine, bench: Bench, planned: Plan, statistics: Statistics
) -> list[UnitRecord]:
    """Make every unit that is not there yet; returns their records in order."""
    folder = bench.folder / UNITS
    folder.mkdir(exist_ok=True)
    wanted = {unit.name for unit in planned.units}
    for path in folder.iterdir():
        if path.name not in wanted:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    records: dict[int, UnitRecord] = {}
    n_units = len(planned.units)
    n_left = sum(unit.stop - unit.start for unit in planned.units)
    n_found = n_made = 0
    begin = time.perf_counter()
    inputs = [unit.input for unit in planned.units]
    for i, outcome in engine.results(make, bench, planned.units, inputs):
        unit = planned.units[i]
        n_cells = unit.stop - unit.start
        _see(folder / unit.name)
        statistics.take_in(read_medians(folder / unit.name / MEDIANS))
        records[i] = outcome.record
        n_left -= n_cells
        if not outcome.fresh:
            n_found += 1
            log.info(
                "%s: cells %s to %s were there (%d of %d units)",
                unit.where, f"{unit.start:,}", f"{unit.stop:,}", len(records), n_units,
            )  # fmt: skip
            continue
        n_made += n_cells
        rate = n_made / max(1e-9, time.perf_counter() - begin)
        log.info(
            "%s: cells %s to %s (%d of %d units, %.0f cells/s%s)",
            unit.where, f"{unit.start:,}", f"{unit.stop:,}", len(records), n_units, rate,
            f", about {_duration(n_left / rate)} left" if n_left else "",
        )  # fmt: skip
    if n_found:
        log.info(
            "%d of %d units were there from an interrupted run, %d were made",
            n_found, n_units, n_units - n_found,
        )  # fmt: skip
    return [records[i] for i in range(n_units)]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _see(place: Path) -> None:
    """Wait until what another machine has made shows here."""
    end = time.monotonic() + _SHOWN_S
    while not (place / RECORD).is_file():
        if time.monotonic() > end:
            raise ConfigError(
                f"{place}: was made by a worker and cannot be seen here: every machine must share "
                "the file system that the corpus is built on, under one path. Put the corpus on "
                "a shared disk"
            )
        time.sleep(0.2)


def source_records(planned: Plan, records: Sequence[UnitRecord]) -> list[SourceRecord]:
    """Sum up the units of every source and species."""
    result: list[SourceRecord] = []
    parts: dict[int, list[Streamed]] = {}
    for unit, record in zip(planned.units, records, strict=True):
        parts.setdefault(unit.input.number, []).append(record.streamed)
    for number, seen in enumerate(planned.surveys):
        own = parts.get(number, [])
        for s, match in enumerate(seen.matches):
            dropped: dict[str, int] = {}
            for part in own:
                for reason, n in part.dropped[s].items():
                    dropped[reason] = dropped.get(reason, 0) + n
            n_read = sum(part.n_read[s] for part in own)
            if s == 0 and seen.without_species:
                dropped[NO_SPECIES] = seen.without_species
                n_read += seen.without_species
            result.append(
                SourceRecord(
                    name=seen.name, file=seen.file, kind=seen.kind, layer=seen.layer,
                    species=match.species, n_read=n_read,
                    n_cells=sum(part.n_cells[s] for part in own), dropped=dropped,
                    n_genes=match.n_genes, n_matched=match.n_matched, n_summed=match.n_summed,
                    n_ambiguous=match.n_ambiguous, gene_column=match.column,
                    unmatched=match.unmatched,
                    explicit_zeros=sum(part.explicit_zeros for part in own),
                    rounded=sum(part.rounded for part in own), repeated_names=seen.repeated,
                    notes=list(seen.notes), licence=seen.licence, citation=seen.citation,
                    n_counts=sum(part.n_counts[s] for part in own),
                )
            )  # fmt: skip
    if not sum(record.n_cells for record in result):
        reasons: dict[str, int] = {}
        for source in result:
            for reason, n in source.dropped.items():
                reasons[reason] = reasons.get(reason, 0) + n
        found = ", ".join(f"{n:,} × {reason}" for reason, n in reasons.items())
        raise DataError(f"no cell of the sources is left: {found}. Relax the filters")
    return result


@dataclass(frozen=True)
class Placed:
    """Groups with their numbers, their files, and what must move from where to where."""

    groups: list[GroupRecord]
    objects: dict[str, ObjectRecord]
    moves: list[tuple[str, str]]
    """Relative to the working folder, and to the corpus."""


def place_groups(planned: Plan, records: Sequence[UnitRecord], first: int) -> Placed:
    """Give groups their numbers in the order of their cells."""
    placed = Placed([], {}, [])
    for unit, record in zip(planned.units, records, strict=True):
        for number, (n_cells, n_values) in enumerate(record.streamed.groups):
            name = f"dataset_{first + len(placed.groups)}"
            placed.groups.append(GroupRecord(name, n_cells, n_values))
            group, index = f"{layout.COLLECTION}/{name}", f"{layout.INDEX}/{name}.npz"
            own = f"{UNITS}/{unit.name}"
            placed.moves.append((f"{own}/{number}", group))
            placed.moves.append((f"{own}/{number}.npz", index))
            placed.objects[index] = record.objects[f"{number}.npz"]
            for file, stated in record.objects.items():
                if file.startswith(f"{number}/"):
                    placed.objects[group + file.removeprefix(str(number))] = stated
    return placed


# -- the working folder ----------------------------------------------------------------------------


@contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """Make a folder for new files, or take the one of an interrupted run, locked against a second.

    After a failure it stays where units are done that the same command would find again.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder}: another process is writing there. Wait for it to end"
            ) from error
        try:
            yield folder
        except OSError as error:
            if is_full(error):
                raise too_small(folder, size_of(folder), exact=False) from error
            raise DataError(
                f"{folder}: cannot be written ({error.strerror or error}). Choose another place"
            ) from error
        finally:
            if folder.exists() and not _worth_keeping(folder):
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _worth_keeping(folder: Path) -> bool:
    found = [path.parent.name for path in (folder / UNITS).glob(f"*/{RECORD}")]
    done = sum(1 for name in found if not name.endswith(HELD) and PARTIAL not in name)
    if done:
        log.warning(
            "%d finished %s in %s: the same command goes on from there. Remove the folder where "
            "that is not wanted",
            done, "unit is" if done == 1 else "units are", folder,
        )  # fmt: skip
    return bool(done)


def _clear(folder: Path) -> None:
    """Remove what an interrupted run left, but for its units and what workers read."""
    for path in folder.iterdir():
        if path.name not in (UNITS, layout.VOCABULARY):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@dataclass(frozen=True)
class Journal:
    """What was about to be moved when a run was interrupted."""

    plan: str
    old: str
    new: str
    moves: list[tuple[str, str]]

    def save(self, folder: Path) -> None:
        """Write it to disk before the first move."""
        path = folder / UNITS / _JOURNAL
        with path.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        layout.sync_folder(path.parent)

    @classmethod
    def read(cls, folder: Path) -> "Journal | None":
        """Read that of an interrupted run; None where nothing was moved."""
        try:
            return cls(**json.loads((folder / UNITS / _JOURNAL).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def ends(self, folder: Path, command: str) -> bool:
        """Whether the same command had everything in its place when it was interrupted."""
        try:
            return self.plan == command and Manifest.read(folder).fingerprint == self.new
        except DataError:
            return False

    def take_back(self, folder: Path, out: Path) -> None:
        """Move everything back to the units."""
        for own, there in self.moves:
            source, target = folder / own, out / there
            if target.exists() and not source.exists() and source.parent.is_dir():
                target.rename(source)
        (folder / UNITS / _JOURNAL).unlink(missing_ok=True)


def _move_in(folder: Path, out: Path, moves: Sequence[tuple[str, str]]) -> None:
    """Move new files to their places; left-overs of an interrupted append make room."""
    for own, there in moves:
        target = out / there
        if target.is_dir():
            shutil.rmtree(target)
        (folder / own).replace(target)
    for place in (out / layout.COLLECTION, out / layout.INDEX, out):
        layout.sync_folder(place)


# -- building and growing --------------------------------------------------------------------------


def _all_columns(columns: Sequence[str], options: BuildOptions) -> tuple[str, ...]:
    further = [c for c in (*options.columns, *options.keep) if c not in columns]
    return (*columns, *dict.fromkeys(further))


def build(
    sources: Sources,
    out: Path,
    vocabulary: GeneVocabulary,
    options: BuildOptions,
    engine: EngineSettings,
    *,
    overwrite: bool,
    made_by: str,
) -> None:
    """Build a corpus at ``out``; see :meth:`Corpus.build`."""
    from genemodel.corpus.store import create_collection

    out = out.absolute()
    found_again(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise ConfigError(
                f"{out} exists already. Choose another name, add to it with append, or set "
                "overwrite=True"
            )
        if not (out / layout.MANIFEST).is_file():
            raise ConfigError(f"{out} is not a corpus: overwrite=True replaces corpora only")
    inputs, held = inputs_of(sources, options)
    with working_folder(out.with_name(out.name + PARTIAL)) as folder:
        vocabulary.save(folder / layout.VOCABULARY)
        bench = Bench(
            folder, folder / layout.VOCABULARY, vocabulary.fingerprint, options,
            _all_columns(COLUMNS, options), made_by,
        )  # fmt: skip
        desk = Desk(held, vocabulary=vocabulary)
        with engine.start(bench, desk) as running:
            planned = plan(running, bench, inputs, {}, 0)
            command = planned.command(bench)
            journal = Journal.read(folder)
            if journal is not None and journal.ends(folder, command):
                _finish(folder, out)
                return
            if journal is not None:
                journal.take_back(folder, folder)
            _clear(folder)
            statistics = Statistics(vocabulary)
            records = make_units(running, bench, planned, statistics)
            found = source_records(planned, records)
        create_collection(folder / layout.COLLECTION)
        (folder / layout.INDEX).mkdir()
        names = _write_statistics(folder, statistics, planned, 0)
        placed = place_groups(planned, records, 0)
        collection = f"{layout.COLLECTION}/zarr.json"
        objects = placed.objects | {
            name: layout.file_record(folder / name)
            for name in (layout.VOCABULARY, collection, *names)
        }
        manifest = Manifest(
            n_cells=sum(s.n_cells for s in found),
            n_tokens=len(vocabulary),
            vocabulary=vocabulary.fingerprint,
            columns=planned.columns,
            categories=planned.categories,
            sources=found,
            groups=placed.groups,
            statistics=names[0],
            medians=names[1],
            objects=dict(sorted(objects.items())),
            made_by=made_by,
        )
        for name in (layout.VOCABULARY, collection, *names):
            layout.sync_file(folder / name)
        Journal(command, "", manifest.digest(), placed.moves).save(folder)
        _move_in(folder, folder, placed.moves)
        layout.write_manifest(folder, manifest)
        _finish(folder, out)


def _finish(folder: Path, out: Path) -> None:
    """Let a complete working folder be the corpus."""
    _remove_units(folder)
    put_in_place(folder, out)


def _remove_units(folder: Path) -> None:
    """Remove what is left of the units; the journal last, so that a kill loses no work."""
    for path in (folder / UNITS).iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    shutil.rmtree(folder / UNITS)


def _write_statistics(
    folder: Path, statistics: Statistics, planned: Plan, number: int
) -> tuple[str, str]:
    for seen in planned.surveys:
        for match in seen.matches:
            bits = np.unpackbits(
                np.frombuffer(match.measured, np.uint8), count=len(statistics.vocabulary)
            )
            statistics.panels.append(bits.astype(bool))
    names = f"statistics.{number}.npz", f"medians.{number}.npz"
    statistics.write(folder / names[0], folder / names[1])
    return names


def append(
    out: Path,
    old: Manifest,
    vocabulary: GeneVocabulary,
    sources: Sources,
    options: BuildOptions,
    engine: EngineSettings,
    *,
    made_by: str,
) -> None:
    """Add sources to the corpus at ``out``; see :meth:`Corpus.append`."""
    out = out.absolute()
    taken = {source.name for source in old.sources} | set(old.categories.get("dataset", ()))
    inputs, held = inputs_of(sources, options, taken)
    with working_folder(out / "append.partial") as folder:
        if Manifest.read(out).fingerprint != old.fingerprint:
            raise ConfigError(f"corpus {out}: was changed by another process: open it again")
        bench = Bench(
            folder, out / layout.VOCABULARY, vocabulary.fingerprint, options,
            _all_columns(old.columns, options), made_by,
        )  # fmt: skip
        desk = Desk(held, vocabulary=vocabulary)
        with engine.start(bench, desk) as running:
            planned = plan(running, bench, inputs, old.categories, len(old.sources))
            journal = Journal.read(folder)
            if journal is not None and journal.new == old.fingerprint:
                _remove_unlisted_statistics(out, old)
                if journal.plan == planned.command(bench):
                    _remove_units(folder)
                    log.info("%s: an interrupted run had added these sources already", out)
                    return
                shutil.rmtree(folder / UNITS)
            elif journal is not None and journal.old == old.fingerprint:
                journal.take_back(folder, out)
            elif journal is not None:
                shutil.rmtree(folder / UNITS)
            _clear(folder)
            statistics = Statistics.read(vocabulary, out / old.statistics, out / old.medians)
            records = make_units(running, bench, planned, statistics)
            found = source_records(planned, records)
        number = int(old.statistics.split(".")[1]) + 1
        names = _write_statistics(folder, statistics, planned, number)
        placed = place_groups(planned, records, len(old.groups))
        fresh = placed.objects | {name: layout.file_record(folder / name) for name in names}
        for name in names:
            layout.sync_file(folder / name)
        kept = {k: v for k, v in old.objects.items() if k not in (old.statistics, old.medians)}
        manifest = Manifest(
            n_cells=old.n_cells + sum(s.n_cells for s in found),
            n_tokens=old.n_tokens,
            vocabulary=old.vocabulary,
            columns=planned.columns,
            categories=planned.categories,
            sources=old.sources + found,
            groups=old.groups + placed.groups,
            statistics=names[0],
            medians=names[1],
            objects=dict(sorted((kept | fresh).items())),
            made_by=made_by,
        )
        moves = [(name, name) for name in names] + placed.moves
        Journal(planned.command(bench), old.fingerprint, manifest.digest(), moves).save(folder)
        _move_in(folder, out, moves)
        layout.write_manifest(out, manifest)
        _remove_unlisted_statistics(out, manifest)
        _remove_units(folder)


def _remove_unlisted_statistics(out: Path, manifest: Manifest) -> None:
    """Remove statistics of before."""
    for kind in ("statistics", "medians"):
        for path in out.glob(f"{kind}.*.npz"):
            if path.name not in manifest.objects:
                path.unlink()
