"""Building and growing a corpus, such that an interruption leaves what was there before.

Nothing is written before every source has been opened, has shown raw counts and has matched the
vocabulary. New files are written beside the corpus, forced to disk and moved into place; the
manifest comes last.
"""

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from genemodel.cells import manifest as layout
from genemodel.cells.building import Builder, BuildOptions, SourceLike, match_source
from genemodel.cells.corpus_statistics import Statistics
from genemodel.cells.manifest import Manifest
from genemodel.cells.obs_columns import COLUMNS
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.writing import found_again, is_full, put_in_place, size_of, too_small

log = logging.getLogger(__name__)

_PARTIAL = ".partial"

type Sources = Sequence[SourceLike] | Mapping[str, SourceLike]


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


def prepare(
    sources: list[tuple[str | None, SourceLike]], vocabulary: GeneVocabulary, options: BuildOptions
) -> None:
    """Open, look at and match every source, so that refusals come before any work."""
    seen: set[Path] = set()
    for name, data in sources:
        if isinstance(data, str | Path):
            path = Path(data).resolve()
            if path in seen:
                raise ConfigError(f"{data} is listed twice in sources: its cells would be doubled")
            seen.add(path)
        source = options.open(data, name)
        try:
            match_source(source, vocabulary, options)
        finally:
            if source is not data:
                source.close()


def stream(
    builder: Builder, sources: list[tuple[str | None, SourceLike]], options: BuildOptions
) -> None:
    """Stream all sources into the builder."""
    n_cells = 0
    begin = time.perf_counter()
    try:
        for number, (name, data) in enumerate(sources, start=1):
            with options.open(data, name) as source:
                builder.add(source, match_source(source, builder.vocabulary, options))
                n_cells += source.n_cells
                rate = n_cells / max(1e-9, time.perf_counter() - begin)
                log.info(
                    "%s: %s cells (%d of %d sources, %.0f cells/s)",
                    source.where, f"{source.n_cells:,}", number, len(sources), rate,
                )  # fmt: skip
    finally:
        builder.close()
    if not sum(s.n_cells for s in builder.sources):
        reasons: dict[str, int] = {}
        for record in builder.sources:
            for reason, n in record.dropped.items():
                reasons[reason] = reasons.get(reason, 0) + n
        found = ", ".join(f"{n:,} × {reason}" for reason, n in reasons.items())
        raise DataError(f"no cell of the sources is left: {found}. Relax the filters")


@contextmanager
def working_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder for new files, locked against a second process, removed on failure.

    What an interrupted run left there is removed first.
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
        _empty(folder)
        try:
            yield folder
        except OSError as error:
            if is_full(error):
                written = size_of(folder)
                shutil.rmtree(folder, ignore_errors=True)
                raise too_small(folder, written, exact=False) from error
            raise DataError(
                f"{folder}: cannot be written ({error.strerror or error}). Choose another place"
            ) from error
        finally:
            if folder.exists():
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def describe_files(folder: Path) -> dict[str, layout.ObjectRecord]:
    """Checksums of all files below a folder."""
    return {name: layout.file_record(folder / name) for name in layout.files_under(folder)}


def build(
    sources: Sources,
    out: Path,
    vocabulary: GeneVocabulary,
    options: BuildOptions,
    *,
    overwrite: bool,
    made_by: str,
) -> None:
    """Build a corpus at ``out``; see :meth:`Corpus.build`."""
    from genemodel.cells.store import create_collection

    found_again(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        if not overwrite:
            raise ConfigError(
                f"{out} exists already. Choose another name, add to it with append, or set "
                "overwrite=True"
            )
        if not (out / layout.MANIFEST).is_file():
            raise ConfigError(f"{out} is not a corpus: overwrite=True replaces corpora only")
    pairs = listed(sources)
    prepare(pairs, vocabulary, options)
    with working_folder(out.with_name(out.name + _PARTIAL)) as folder:
        create_collection(folder / layout.COLLECTION)
        vocabulary.save(folder / layout.VOCABULARY)
        builder = Builder(
            folder, vocabulary, options, Statistics(vocabulary),
            categories={}, columns=COLUMNS, first_group=0,
        )  # fmt: skip
        stream(builder, pairs, options)
        statistics, medians = "statistics.0.npz", "medians.0.npz"
        builder.statistics.write(folder / statistics, folder / medians)
        manifest = Manifest(
            n_cells=sum(s.n_cells for s in builder.sources),
            n_tokens=len(vocabulary),
            vocabulary=vocabulary.fingerprint,
            columns=builder.columns,
            categories=builder.categories,
            sources=builder.sources,
            groups=builder.groups,
            statistics=statistics,
            medians=medians,
            objects=describe_files(folder),
            made_by=made_by,
        )
        layout.sync_files(folder)
        layout.write_manifest(folder, manifest)
        put_in_place(folder, out)


def append(
    out: Path,
    old: Manifest,
    vocabulary: GeneVocabulary,
    sources: Sources,
    options: BuildOptions,
    *,
    made_by: str,
) -> None:
    """Add sources to the corpus at ``out``; see :meth:`Corpus.append`."""
    pairs = listed(sources)
    prepare(pairs, vocabulary, options)
    with working_folder(out / "append.partial") as folder:
        if Manifest.read(out).fingerprint != old.fingerprint:
            raise ConfigError(f"corpus {out}: was changed by another process: open it again")
        statistics = Statistics.read(vocabulary, out / old.statistics, out / old.medians)
        first = len(old.groups)
        builder = Builder(
            folder, vocabulary, options, statistics,
            categories=old.categories, columns=old.columns, first_group=first,
        )  # fmt: skip
        stream(builder, pairs, options)
        number = int(old.statistics.split(".")[1]) + 1
        names = f"statistics.{number}.npz", f"medians.{number}.npz"
        statistics.write(folder / names[0], folder / names[1])
        fresh = describe_files(folder)
        layout.sync_files(folder)
        _move_in(folder, out, [g.name for g in builder.groups], names)
        kept = {k: v for k, v in old.objects.items() if k not in (old.statistics, old.medians)}
        manifest = Manifest(
            n_cells=old.n_cells + sum(s.n_cells for s in builder.sources),
            n_tokens=old.n_tokens,
            vocabulary=old.vocabulary,
            columns=builder.columns,
            categories=builder.categories,
            sources=old.sources + builder.sources,
            groups=old.groups + builder.groups,
            statistics=names[0],
            medians=names[1],
            objects=kept | fresh,
            made_by=made_by,
        )
        layout.write_manifest(out, manifest)
        for name in (old.statistics, old.medians):
            (out / name).unlink(missing_ok=True)


def _move_in(folder: Path, out: Path, groups: list[str], files: tuple[str, str]) -> None:
    """Move new files to their places; left-overs of an interrupted append make room."""
    pairs = [(folder / name, out / name) for name in files]
    for group in groups:
        pairs.append((folder / layout.COLLECTION / group, out / layout.COLLECTION / group))
        index = f"{group}.npz"
        pairs.append((folder / layout.INDEX / index, out / layout.INDEX / index))
    for source, target in pairs:
        if target.is_dir():
            shutil.rmtree(target)
        source.replace(target)
    for place in (out / layout.COLLECTION, out / layout.INDEX, out):
        layout.sync_folder(place)
