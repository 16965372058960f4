"""A corpus: counts of many cells of several species in the order of one vocabulary, on disk.

``docs/corpus.md`` describes the layout. Cells are stored in the order of their sources; the
permanent number of a cell is its row. Axes: C cells, V vocabulary, N (gene, count) pairs,
S sources.
"""

import functools
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, Unpack

import numpy as np
import numpy.typing as npt
import pandas as pd

from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.matrices import refuse_damage
from genemodel.cells.source import CHUNK_CELLS
from genemodel.cells.sources import GROUP_CELLS
from genemodel.corpus import manifest as layout
from genemodel.corpus.manifest import Manifest, SourceRecord
from genemodel.corpus.mapped import mapped_once
from genemodel.corpus.reading import CountsBlock, CountsReader
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.settings import refuse_address
from genemodel.writing import found_again

if TYPE_CHECKING:
    from genemodel.corpus.assembly import Sources
    from genemodel.corpus.building import BuildOptions
    from genemodel.corpus.report import CorpusReport

log = logging.getLogger(__name__)

# Joins the parts of a joint category, as in "dataset / donor".
JOINT = " / "


@dataclass(frozen=True)
class SpeciesStatistics:
    """Gene statistics over the cells of one species.

    ``sum_V`` of counts, ``nonzero_V`` cells with the gene, ``medians_V`` non-zero median of counts
    per 10,000 (NaN where never seen), over ``n_cells``.
    """

    n_cells: int
    sum_V: npt.NDArray[np.float64]
    nonzero_V: npt.NDArray[np.int64]
    medians_V: npt.NDArray[np.float32]


class Corpus:
    """An opened corpus. Make one with :meth:`build`, open it with :meth:`open`.

    Attributes
    ----------
    path
        Its folder.
    manifest
        What it says about itself.
    vocabulary
        The genes of its columns.
    """

    def __init__(
        self, path: Path, manifest: Manifest, vocabulary: GeneVocabulary, threads: int
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.vocabulary = vocabulary
        self.threads = threads

    # -- making and opening -----------------------------------------------------------------------

    @classmethod
    @reads_cells
    def build(
        cls,
        sources: "Sources",
        out: str | Path,
        *,
        vocabulary: GeneVocabulary | None = None,
        columns: Mapping[str, str] | None = None,
        batch_key: str | None = None,
        donor_key: str | None = None,
        label_key: str | None = None,
        keep: Sequence[str] = (),
        min_genes: int = 0,
        max_mito: float | None = None,
        unknown_species: Literal["refuse", "drop"] = "refuse",
        chunk_cells: int = CHUNK_CELLS,
        group_cells: int = GROUP_CELLS,
        workers: int = 1,
        engine: Literal["processes", "dask"] = "processes",
        scheduler: str | None = None,
        overwrite: bool = False,
        **options: Unpack[InputOptions],
    ) -> Self:
        """Build a corpus from any number of sources in one streaming pass.

        The same sources and options give the same bytes, whoever builds. After an interruption the
        same call makes only what is missing.

        Parameters
        ----------
        sources
            Files, AnnData objects or :class:`~genemodel.cells.source.Source`; or name -> source.
        out
            Folder of the corpus.
        vocabulary
            Default: the built-in human and mouse vocabulary.
        columns, keep
            See :func:`~genemodel.cells.sources.open_source`; for sources that differ, open each by
            itself and give the Source.
        batch_key, donor_key, label_key
            Short for ``columns={"batch": …, "donor": …, "cell_type": …}``.
        min_genes, max_mito
            Drop cells with fewer genes, or a larger share of mitochondrial counts; off by default.
        unknown_species
            ``"drop"`` leaves cells out whose species the vocabulary does not hold.
        chunk_cells
            Cells held at once by each worker.
        group_cells
            Most cells of a unit of work, and of a group on disk.
        workers
            Processes of this machine that build. AnnData objects and streams are read by the
            calling process, files by the workers. A script must call this below
            ``if __name__ == "__main__":`` where there are several.
        engine, scheduler
            ``"dask"`` and ``"tcp://HOST:8786"`` (or a scheduler file): the workers of a running
            Dask cluster build instead; all of them must see ``out`` and the sources under the same
            path.
        overwrite
            Replace a corpus that is there; only after the new one is complete.
        **options
            How the sources are read.

        Returns
        -------
        Corpus

        Raises
        ------
        DataError
            A source cannot be read, is not raw counts or does not match; nothing is written.
        ConfigError
            The folder exists, an option is impossible, or the cluster cannot be used.
        """
        from genemodel.corpus import assembly
        from genemodel.corpus.engines import EngineSettings

        refuse_address("out", out)
        how = _options(
            InputSettings.given(options), columns, batch_key, donor_key, label_key, keep,
            min_genes=min_genes, max_mito=max_mito, unknown_species=unknown_species,
            chunk_cells=chunk_cells, group_cells=group_cells,
        )  # fmt: skip
        assembly.build(
            sources,
            Path(out),
            GeneVocabulary.builtin() if vocabulary is None else vocabulary,
            how,
            EngineSettings(workers, engine, scheduler),
            overwrite=overwrite,
            made_by=_made_by(),
        )
        return cls.open(out)

    @reads_cells
    def append(
        self,
        sources: "Sources",
        *,
        columns: Mapping[str, str] | None = None,
        batch_key: str | None = None,
        donor_key: str | None = None,
        label_key: str | None = None,
        keep: Sequence[str] = (),
        min_genes: int = 0,
        max_mito: float | None = None,
        unknown_species: Literal["refuse", "drop"] = "refuse",
        chunk_cells: int = CHUNK_CELLS,
        group_cells: int = GROUP_CELLS,
        workers: int = 1,
        engine: Literal["processes", "dask"] = "processes",
        scheduler: str | None = None,
        **options: Unpack[InputOptions],
    ) -> "Corpus":
        """Add sources behind the cells that are there; returns the grown corpus, opened.

        Parameters are those of :meth:`build`. Existing cells keep their numbers, existing files
        are not touched, and a failure leaves the corpus as it was.

        Parameters
        ----------
        sources, columns, batch_key, donor_key, label_key, keep, min_genes, max_mito
            As in :meth:`build`.
        unknown_species, chunk_cells, group_cells, workers, engine, scheduler
            As in :meth:`build`.
        **options
            How the sources are read.
        """
        from genemodel.corpus import assembly
        from genemodel.corpus.engines import EngineSettings

        how = _options(
            InputSettings.given(options), columns, batch_key, donor_key, label_key, keep,
            min_genes=min_genes, max_mito=max_mito, unknown_species=unknown_species,
            chunk_cells=chunk_cells, group_cells=group_cells,
        )  # fmt: skip
        assembly.append(
            self.path, self.manifest, self.vocabulary, sources, how,
            EngineSettings(workers, engine, scheduler), made_by=_made_by(),
        )  # fmt: skip
        return type(self).open(self.path, threads=self.threads)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        vocabulary: GeneVocabulary | None = None,
        threads: int | None = None,
    ) -> Self:
        """Open a corpus; quick, whatever its size.

        Parameters
        ----------
        path
            Its folder.
        vocabulary
            The vocabulary it must have been built with, where that matters.
        threads
            Threads that read; by default up to four.

        Raises
        ------
        DataError
            No corpus, a newer format, files missing or of the wrong size, another vocabulary.
        """
        refuse_address("corpus", path)
        path = found_again(Path(path))
        manifest = Manifest.read(path)
        broken = [
            found
            for name, record in manifest.objects.items()
            if (found := _wrong_size(path / name, record.size))
        ]
        if broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise DataError(
                f"corpus {path}: {'; '.join(broken[:3])}{more}. `genemodel corpus verify` lists "
                "all damage; restore the files from a copy or build the corpus again"
            )
        stored = GeneVocabulary.read(path / layout.VOCABULARY)
        if stored.fingerprint != manifest.vocabulary:
            raise DataError(
                f"corpus {path}: {layout.VOCABULARY} is not the vocabulary that the corpus was "
                "built with. Restore it from a copy, or build the corpus again"
            )
        if vocabulary is not None and vocabulary.fingerprint != stored.fingerprint:
            raise DataError(
                f"corpus {path}: was built with vocabulary {stored.fingerprint[:12]} "
                f"({', '.join(stored.species)}; {len(stored):,} tokens), asked for is "
                f"{vocabulary.fingerprint[:12]} ({', '.join(vocabulary.species)}; "
                f"{len(vocabulary):,} tokens). Use the one of the corpus (corpus.vocabulary), or "
                "build the corpus again with the other"
            )
        return cls(path, manifest, stored, threads or min(4, os.cpu_count() or 1))

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.manifest.n_cells

    def __repr__(self) -> str:
        """Name path, cells, genes, species and sources."""
        return (
            f"Corpus({str(self.path)!r}, {len(self):,} cells × {len(self.vocabulary):,} tokens, "
            f"{len(self.sources)} sources, {', '.join(self.vocabulary.species)})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Where to open it again: open files and threads do not travel."""
        return {"path": self.path, "threads": self.threads, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open again, and refuse a corpus that was changed meanwhile."""
        again = type(self).open(state["path"], threads=state["threads"])
        if again.fingerprint != state["fingerprint"]:
            raise DataError(f"corpus {again.path}: was changed since it was opened")
        self.__dict__.update(again.__dict__)

    # -- what it holds ----------------------------------------------------------------------------

    @property
    def fingerprint(self) -> str:
        """Sha256 of the manifest, which holds that of every file."""
        return self.manifest.fingerprint

    @property
    def sources(self) -> list[SourceRecord]:
        """One record per file and species, in order; ``source_C`` counts them."""
        return self.manifest.sources

    @property
    def columns(self) -> list[str]:
        """Columns that :meth:`codes` knows."""
        return self.manifest.columns

    @functools.cached_property
    def n_genes_C(self) -> npt.NDArray[np.int32]:
        """Genes stored per cell."""
        return self._indexed("n_genes", np.int32)

    @functools.cached_property
    def library_C(self) -> npt.NDArray[np.int64]:
        """Sum of counts per cell."""
        return self._indexed("library", np.int64)

    @functools.cached_property
    def mito_C(self) -> npt.NDArray[np.int64]:
        """Sum of mitochondrial counts per cell."""
        return self._indexed("mito", np.int64)

    @functools.cached_property
    def source_C(self) -> npt.NDArray[np.int32]:
        """Source of every cell, a position in ``sources``."""
        return self._indexed("source", np.int32)

    @functools.cached_property
    def checksum_C(self) -> npt.NDArray[np.uint64]:
        """Checksum of every cell's genes and counts: equal cells have equal ones."""
        return self._indexed("checksum", np.uint64)

    def prints_CP(self) -> npt.NDArray[np.uint64]:
        """Fingerprints of every cell, by which a model knows what it was trained on; 0 for none.

        Read anew at every call; computed from the counts where an earlier version built the corpus.
        """
        from genemodel.cells.kernels import PRINTS, fingerprints

        print_CP, start = np.zeros((len(self), PRINTS), np.uint64), 0
        for group in self.manifest.groups:
            end = start + group.n_cells
            path = self.path / layout.INDEX / f"{group.name}.npz"
            with refuse_damage(str(path)), np.load(path, allow_pickle=False) as stored:
                if "prints" in stored.files:
                    print_CP[start:end] = stored["prints"]
                    start = end
            while start < end:
                stop = min(start + CHUNK_CELLS, end)
                block = self.read(start, stop)
                print_CP[start:stop] = fingerprints(
                    block.starts_C1, block.gene_N, block.count_N, len(self.vocabulary)
                )
                start = stop
        return print_CP

    @functools.cached_property
    def measured_SV(self) -> npt.NDArray[np.bool_]:
        """Genes that each source measures, bool (S, V)."""
        packed = self._statistics["panels"]
        return np.unpackbits(packed, axis=1, count=len(self.vocabulary)).astype(bool)

    @functools.cached_property
    def statistics(self) -> dict[str, SpeciesStatistics]:
        """Gene statistics of every species that has cells."""
        stored = self._statistics
        return {
            name: SpeciesStatistics(
                int(stored[f"{name}/n_cells"]),
                stored[f"{name}/sum_V"],
                stored[f"{name}/nonzero_V"],
                stored[f"{name}/medians_V"],
            )
            for name in self.vocabulary.species
            if f"{name}/n_cells" in stored and stored[f"{name}/n_cells"]
        }

    @property
    def medians_V(self) -> npt.NDArray[np.float32]:
        """Non-zero median of counts per 10,000 over all cells; NaN where never seen."""
        return self._statistics["medians_V"]

    @functools.cached_property
    def _statistics(self) -> dict[str, npt.NDArray[Any]]:
        path = self.path / self.manifest.statistics
        with refuse_damage(str(path)), np.load(path, allow_pickle=False) as stored:
            return {key: stored[key] for key in stored.files}

    def codes(self, *columns: str) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Category of every cell.

        Parameters
        ----------
        columns
            One column; or several for joint categories such as ``codes("dataset", "donor")``: a
            cell lacks the joint one when it lacks any of them.

        Returns
        -------
        codes_C
            int32, −1 where missing.
        categories
            Their names; joint ones are joined by ``" / "``.
        """
        if not columns:
            raise ConfigError(f"codes needs a column; the corpus has {', '.join(self.columns)}")
        for column in columns:
            if column not in self.columns:
                from genemodel.settings import nearest

                near = nearest(column, self.columns)
                raise ConfigError(
                    f"corpus {self.path}: has no column {column!r}; it has "
                    f"{', '.join(self.columns)}{f'. Did you mean {near!r}?' if near else ''}"
                )
        parts = [self._indexed(f"code_{column}", np.int32) for column in columns]
        names = [self.manifest.categories[column] for column in columns]
        if len(columns) == 1:
            return parts[0], list(names[0])
        joint = np.zeros(len(self), np.int64)
        for codes, categories in zip(parts, names, strict=True):
            joint = joint * max(1, len(categories)) + codes
        missing = np.any([codes < 0 for codes in parts], axis=0)
        result = np.full(len(self), -1, np.int32)
        _, first, inverse = np.unique(joint[~missing], return_index=True, return_inverse=True)
        result[~missing] = inverse
        example = np.flatnonzero(~missing)[first]
        categories = [
            JOINT.join(n[c[cell]] for c, n in zip(parts, names, strict=True)) for cell in example
        ]
        return result, categories

    def obs(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Table of all cells: the columns as categories, genes and library; index = cell number."""
        table = pd.DataFrame(index=pd.RangeIndex(len(self), name="cell"))
        for column in self.columns if columns is None else columns:
            codes, categories = self.codes(column)
            table[column] = pd.Categorical.from_codes(codes, categories)
        table["n_genes"] = self.n_genes_C
        table["library"] = self.library_C
        return table

    def label(self, name: Literal["library", "n_genes", "source", "species"]) -> npt.NDArray[Any]:
        """One number per cell that reading needs; a large corpus's is held once per node.

        Parameters
        ----------
        name
            ``library``, ``n_genes`` and ``source`` as the arrays of these names; ``species`` is a
            position in ``vocabulary.species``.

        Returns
        -------
        Read-only array over all cells.
        """
        if name not in self._labels:
            dtype = {"library": np.int64, "species": np.int16}.get(name, np.int32)

            def parts() -> Iterator[npt.NDArray[Any]]:
                if name != "species":
                    return self._index_parts(name, dtype)
                order = list(self.vocabulary.species)
                names = self.manifest.categories["species"]
                table = np.array([order.index(known) for known in names], dtype)
                return (table[code_C] for code_C in self._index_parts("code_species", np.int32))

            self._labels[name] = mapped_once(self.fingerprint, name, len(self), dtype, parts)
        return self._labels[name]

    @functools.cached_property
    def _labels(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    def _indexed(self, key: str, dtype: Any) -> Any:
        """Join one array of the index over all groups."""
        parts = list(self._index_parts(key, dtype))
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    def _index_parts(self, key: str, dtype: Any) -> Iterator[npt.NDArray[Any]]:
        """Read one array of the index, group by group."""
        for group in self.manifest.groups:
            path = self.path / layout.INDEX / f"{group.name}.npz"
            with refuse_damage(str(path)), np.load(path, allow_pickle=False) as stored:
                # A column that came with a later source is missing before.
                if key not in stored.files and key.startswith("code_"):
                    part = np.full(group.n_cells, -1, dtype)
                else:
                    part = stored[key].astype(dtype)
            if part.shape != (group.n_cells,):
                raise DataError(
                    f"{path}: has {part.size:,} entries of {key} for {group.n_cells:,} cells: "
                    "build the corpus again"
                )
            yield part

    # -- reading counts ---------------------------------------------------------------------------

    @functools.cached_property
    def _counts(self) -> CountsReader:
        return CountsReader(
            self.path, self.manifest.groups, self._starts_C1, len(self.vocabulary), self.threads
        )

    @property
    def _starts_C1(self) -> npt.NDArray[np.int64]:
        """First stored value of every cell, and the end."""

        def sums() -> Iterator[npt.NDArray[np.int64]]:
            yield np.zeros(1, np.int64)
            total = 0
            for part in self._index_parts("n_genes", np.int64):
                ends = total + np.cumsum(part)
                total = int(ends[-1]) if ends.size else total
                yield ends

        return mapped_once(self.fingerprint, "starts", len(self) + 1, np.int64, sums)

    def read(self, start: int, stop: int) -> CountsBlock:
        """Read the counts of cells ``start`` to ``stop``; safe to call from threads."""
        return self.read_blocks([(start, stop)])

    def read_blocks(self, ranges: Sequence[tuple[int, int]]) -> CountsBlock:
        """Read the counts of many ranges of cells, end to end in the order given.

        Parameters
        ----------
        ranges
            (start, stop) cell numbers.

        Raises
        ------
        DataError
            A file of the corpus is missing or damaged.
        ConfigError
            A range lies outside the corpus.
        """
        for start, stop in ranges:
            if not 0 <= start <= stop <= len(self):
                raise ConfigError(
                    f"cells {start} to {stop} were asked for; corpus {self.path} has cells 0 to "
                    f"{len(self)}"
                )
        return self._counts.read(ranges)

    # -- examining --------------------------------------------------------------------------------

    def verify(self) -> list[str]:
        """Check every file against the manifest, and the statistics against the counts.

        Returns
        -------
        list of str
            What is broken, by name; empty where all is well. For a corpus that cannot be opened
            use :func:`verify_corpus`.
        """
        return verify_corpus(self.path)

    def describe(self) -> "CorpusReport":
        """Examine what a curator wants to know: sources, depth, labels, warnings."""
        from genemodel.corpus.report import CorpusReport

        return CorpusReport.of(self)


def verify_corpus(path: str | Path, *, contents: bool = True) -> list[str]:
    """List everything that is wrong with a corpus.

    Parameters
    ----------
    path
        Folder of the corpus; it need not be openable.
    contents
        Besides the checksums of all files, read all counts and compare the per-cell index and the
        gene statistics with them.

    Returns
    -------
    list of str
        One line per fault, each with the file's name; empty where all is well.
    """
    from genemodel.corpus.verification import broken_files, contradictions

    path = found_again(Path(path))
    problems = broken_files(path)
    if contents and not problems:
        try:
            problems = contradictions(Corpus.open(path))
        except DataError as error:
            problems = [str(error)]
    return problems


def _options(
    reading: InputSettings,
    columns: Mapping[str, str] | None,
    batch_key: str | None,
    donor_key: str | None,
    label_key: str | None,
    keep: Sequence[str],
    **values: Any,
) -> "BuildOptions":
    from genemodel.corpus.building import BuildOptions

    named = {"batch": batch_key, "donor": donor_key, "cell_type": label_key}
    return BuildOptions.of(columns=columns, keep=keep, named=named, **reading.options(), **values)


def _made_by() -> str:
    from genemodel import __version__

    return f"genemodel {__version__}"


def _wrong_size(path: Path, size: int) -> str:
    try:
        found = path.stat().st_size
    except OSError:
        return f"{path.name if path.parent.name == '' else _short(path)} is missing"
    return "" if found == size else f"{_short(path)} has {found:,} bytes instead of {size:,}"


def _short(path: Path) -> str:
    """Path within the corpus."""
    parts = path.parts
    for root in (layout.COLLECTION, layout.INDEX):
        if root in parts:
            return "/".join(parts[parts.index(root) :])
    return path.name
