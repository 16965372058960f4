"""One streaming pass over some cells of a source, into groups of a corpus, in bounded memory."""

import functools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.input_settings import InputSettings
from genemodel.cells.source import CHUNK_CELLS, Source
from genemodel.cells.sources import GROUP_CELLS, SourceFile, open_source
from genemodel.errors import ConfigError, DataError
from genemodel.genes.match import GeneMatch
from genemodel.genes.medians import NonzeroMedians
from genemodel.genes.vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData

# A group is closed here or at group_cells: it is what building holds in memory.
GROUP_VALUES = 64_000_000
_COUNTED_BEHIND = 2

EMPTY = "empty cell"
NO_GENE = "no gene of the vocabulary"
FEW_GENES = "fewer genes than min_genes"
MUCH_MITO = "more mitochondrial counts than max_mito"
NO_SPECIES = "species not in the vocabulary or missing"

type SourceLike = "str | Path | AnnData | Source | SourceFile"


@dataclass(frozen=True, kw_only=True)
class BuildOptions(InputSettings):
    """How sources are read and which cells are kept; see :meth:`Corpus.build`."""

    columns: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    min_genes: int = 0
    max_mito: float | None = None
    unknown_species: Literal["refuse", "drop"] = "refuse"
    chunk_cells: int = CHUNK_CELLS
    group_cells: int = GROUP_CELLS

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (
            ("min_genes", 0, None), ("max_mito", 0, 1),
            ("chunk_cells", 1, None), ("group_cells", 1, None),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                limits = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ConfigError(f"{name} is {value}: it must be {limits}")
        if self.unknown_species not in ("refuse", "drop"):
            raise ConfigError(
                f"unknown_species is {self.unknown_species!r}: it must be 'refuse' or 'drop'"
            )

    @classmethod
    def of(
        cls,
        *,
        columns: Mapping[str, str] | None,
        keep: Sequence[str],
        named: Mapping[str, str | None],
        **values: Any,
    ) -> "BuildOptions":
        """Merge ``batch_key=`` and its like into ``columns``."""
        merged = dict(columns or {})
        for column, key in named.items():
            if key is None:
                continue
            if merged.get(column, key) != key:
                raise ConfigError(
                    f"{column} is mapped to {merged[column]!r} by columns= and to {key!r} by its "
                    "own key: give one of them"
                )
            merged[column] = key
        return cls(columns=merged, keep=tuple(keep), **values)

    def file(self, data: SourceLike, name: str | None = None) -> SourceFile | None:
        """Say how any process opens this source; None where only this one can."""
        if isinstance(data, Source):
            return data.opened_from
        if isinstance(data, str | Path):
            return SourceFile(str(data), name=name, **self._reading())
        return data if isinstance(data, SourceFile) else None

    def open(self, data: "AnnData | Source", name: str | None = None) -> Source:
        """Open a source that this process holds."""
        return open_source(data, name=name, **self._reading())

    def _reading(self) -> dict[str, Any]:
        return self.opening() | {"columns": self.columns, "keep": self.keep}


def match_source(
    source: Source, vocabulary: GeneVocabulary, options: BuildOptions
) -> dict[str, GeneMatch]:
    """Match the genes of a source for each species that its cells are of."""
    column = source.obs["species"].cat
    used = [column.categories[i] for i in np.unique(column.codes) if i >= 0]
    known = [name for name in vocabulary.species if name in used]
    missing = int((column.codes < 0).sum())
    unknown = [name for name in used if name not in known]
    if (unknown or missing) and options.unknown_species == "refuse":
        if unknown:
            counts = source.obs["species"].value_counts()
            found = ", ".join(f"{name} ({counts[name]:,} cells)" for name in unknown)
            raise DataError(
                f"{source.where}: holds cells of {found}; the vocabulary knows "
                f"{', '.join(vocabulary.species)}. Add the species to the vocabulary "
                "(`genemodel species`), or leave these cells out "
                "(corpus build, corpus append: unknown_species=drop)"
            )
        raise DataError(
            f"{source.where}: {missing:,} of {source.n_cells:,} cells have no species in obs. Fill "
            "the column, set species=, or leave these cells out "
            "(corpus build, corpus append: unknown_species=drop)"
        )
    if not known:
        raise DataError(
            f"{source.where}: no cell is of a species of the vocabulary "
            f"({', '.join(vocabulary.species)})"
        )
    matches = {}
    for name in known:
        try:
            matches[name] = vocabulary.match(
                source.genes, species=name, column=source.column,
                min_fraction=options.min_fraction, among=known,
            )  # fmt: skip
        except DataError as error:
            raise DataError(f"{source.where}: {error}") from error
    return matches


class _Group:
    """Cells that wait to be written, with narrow types."""

    def __init__(self) -> None:
        self.indices: list[npt.NDArray[Any]] = []
        self.data: list[npt.NDArray[Any]] = []
        self.cells: dict[str, list[npt.NDArray[Any]]] = {}
        self.names: list[npt.NDArray[Any]] = []
        self.n_cells = 0
        self.n_values = 0

    def add(
        self,
        counts_CV: sp.csr_matrix,
        names: npt.NDArray[Any],
        cells: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        wide_index = counts_CV.shape[1] > np.iinfo(np.uint16).max + 1
        largest = int(counts_CV.data.max(initial=0))
        self.indices.append(counts_CV.indices.astype(np.uint32 if wide_index else np.uint16))
        self.data.append(counts_CV.data.astype(np.uint16 if largest < 2**16 else np.uint32))
        self.names.append(names)
        for key, values in cells.items():
            self.cells.setdefault(key, []).append(values)
        self.n_cells += counts_CV.shape[0]
        self.n_values += counts_CV.nnz


def narrow(values: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """Return the same whole numbers in the smallest type that holds them."""
    low, high = (int(values.min()), int(values.max())) if values.size else (0, 0)
    kinds = (np.int8, np.int16, np.int32) if low < 0 else (np.uint8, np.uint16, np.uint32)
    for kind in kinds:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.int64 if low < 0 else np.uint64)


@dataclass(frozen=True)
class Columns:
    """The obs columns of a unit: for each, the categories of its source and their codes."""

    names: tuple[str, ...]
    texts: Mapping[str, Sequence[str]]
    codes: Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Streamed:
    """What a unit holds; per species of the source, in their order, where it says so.

    ``n_counts``: all counts of the cells kept, genes outside the vocabulary included. ``groups``:
    cells and values of each group.
    """

    n_read: list[int]
    n_cells: list[int]
    n_counts: list[int]
    dropped: list[dict[str, int]]
    explicit_zeros: int
    rounded: int
    groups: list[tuple[int, int]]


def texts_of(column: pd.Series) -> list[str]:
    """Categories that occur, in the order of their codes."""
    codes = column.cat.codes.to_numpy()
    return [str(column.cat.categories[i]) for i in np.unique(codes[codes >= 0])]


class UnitWriter:
    """Streams consecutive cells of a source into groups ``0``, ``1`` … below a folder.

    The bytes depend on the cells, the options and the codes only, not on what other units hold.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: GeneVocabulary,
        options: BuildOptions,
        columns: Columns,
        mito_V: npt.NDArray[np.bool_],
        go_on: Callable[[], None],
    ) -> None:
        self.folder, self.vocabulary, self.options = folder, vocabulary, options
        self.columns = columns
        self.medians: dict[str, NonzeroMedians] = {}
        self.groups: list[tuple[int, int]] = []
        self._go_on = go_on
        self._group = _Group()
        # Gene statistics take as long as everything else together: they run beside it.
        self._beside = ThreadPoolExecutor(1, "genemodel-statistics")
        self._waiting: deque[Future[None]] = deque()
        self._mito_V = mito_V
        self._text = {
            column: dict(zip(columns.codes[column], texts, strict=True))
            for column, texts in columns.texts.items()
        }
        self._var = _var_of(vocabulary)

    def write(
        self,
        source: Source,
        matches: Mapping[str, GeneMatch],
        start: int,
        stop: int,
        first_source: int,
    ) -> Streamed:
        """Stream cells ``start`` to ``stop``; the first species has number ``first_source``."""
        try:
            return self._write(source, matches, start, stop, first_source)
        finally:
            self._beside.shutdown(cancel_futures=True)

    def _write(
        self,
        source: Source,
        matches: Mapping[str, GeneMatch],
        start: int,
        stop: int,
        first_source: int,
    ) -> Streamed:
        species = list(matches)
        self.medians = {s: NonzeroMedians(len(self.vocabulary), per_10k=True) for s in species}
        place = {name: i for i, name in enumerate(species)}
        column = source.obs["species"].cat
        table = np.array([place.get(name, -1) for name in column.categories] + [-1])
        species_C = table[column.codes]
        codes = {c: self._codes(source, c) for c in self.columns.names}
        names = source.obs.index.to_numpy()
        tally = source.counts.tally
        before = tally.explicit_zeros, tally.rounded
        read = np.zeros(len(species), np.int64)
        kept = np.zeros(len(species), np.int64)
        in_file = np.zeros(len(species), np.int64)
        dropped: list[dict[str, int]] = [{} for _ in species]
        for chunk in source.chunks(self.options.chunk_cells, start, stop):
            self._go_on()
            cells = slice(chunk.start, chunk.start + chunk.counts_CG.shape[0])
            chosen_C = species_C[cells]
            read += np.bincount(chosen_C[chosen_C >= 0], minlength=len(species))
            counts_CV, row_C = self._project(chunk.counts_CG, chosen_C, list(matches.values()))
            facts, reason_C = self._judge(counts_CV, np.diff(chunk.counts_CG.indptr)[row_C])
            for s in range(len(species)):
                for reason in sorted({r for r in reason_C[chosen_C[row_C] == s] if r}):
                    n = int(((reason_C == reason) & (chosen_C[row_C] == s)).sum())
                    dropped[s][reason] = dropped[s].get(reason, 0) + n
            good = reason_C == ""
            if not good.all():
                counts_CV, row_C = counts_CV[good], row_C[good]
                facts = {key: values[good] for key, values in facts.items()}
            self._waiting.append(
                self._beside.submit(
                    self._count, counts_CV, chosen_C[row_C], species, facts["library"]
                )
            )
            self._wait(_COUNTED_BEHIND)
            kept += np.bincount(chosen_C[row_C], minlength=len(species))
            # All that the cells have in the file, also of genes that are not in the vocabulary.
            total_C = np.asarray(chunk.counts_CG.sum(axis=1, dtype=np.int64)).ravel()[row_C]
            np.add.at(in_file, chosen_C[row_C], total_C)
            facts["source"] = chosen_C[row_C] + first_source
            at = row_C + chunk.start
            facts |= {f"code_{c}": values[at] for c, values in codes.items()}
            self._group.add(counts_CV, names[at], facts)
            full = self._group.n_values >= GROUP_VALUES
            if full or self._group.n_cells >= self.options.group_cells:
                self._flush()
        self._flush()
        self._wait(0)
        return Streamed(
            n_read=read.tolist(),
            n_cells=kept.tolist(),
            n_counts=in_file.tolist(),
            dropped=dropped,
            explicit_zeros=tally.explicit_zeros - before[0],
            rounded=tally.rounded - before[1],
            groups=self.groups,
        )

    def _wait(self, most: int) -> None:
        """Wait until at most so many chunks are left to be counted."""
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def _codes(self, source: Source, name: str) -> npt.NDArray[np.int64]:
        """Codes of the corpus for a column of the source, −1 missing."""
        if name not in source.obs:
            return np.full(source.n_cells, -1, np.int64)
        column = source.obs[name]
        codes = column.cat.codes.to_numpy()
        table = np.full(len(column.cat.categories) + 1, -1, np.int64)
        table[np.unique(codes[codes >= 0])] = self.columns.codes[name]
        return table[codes]

    def _project(
        self, counts_CG: sp.csr_matrix, chosen_C: npt.NDArray[Any], matches: list[GeneMatch]
    ) -> tuple[sp.csr_matrix, npt.NDArray[np.int64]]:
        """Return counts (C, V) of the cells that have a species, and their rows in the chunk."""
        if len(matches) == 1 and (chosen_C == 0).all():
            return matches[0].project(counts_CG), np.arange(counts_CG.shape[0])
        rows, parts = [], []
        for s, match in enumerate(matches):
            row = np.flatnonzero(chosen_C == s)
            if row.size:
                rows.append(row)
                parts.append(match.project(counts_CG[row]))
        if not rows:
            return sp.csr_matrix((0, len(self.vocabulary)), dtype=np.int32), np.empty(0, np.int64)
        row_C = np.concatenate(rows)
        order = np.argsort(row_C, kind="stable")
        return sp.vstack(parts, format="csr")[order], row_C[order]

    def _judge(
        self, counts_CV: sp.csr_matrix, stored_C: npt.NDArray[Any]
    ) -> tuple[dict[str, npt.NDArray[Any]], npt.NDArray[Any]]:
        """Per cell: facts for the index, and why it is dropped ("" where it is kept)."""
        from genemodel.cells.kernels import fingerprints, summarise

        genes_C = np.diff(counts_CV.indptr)
        library_C, mito_C, checksum_C = summarise(
            counts_CV.indptr, counts_CV.indices, counts_CV.data, self._mito_V
        )
        reason_C = np.full(genes_C.size, "", dtype=object)
        if self.options.max_mito is not None:
            reason_C[mito_C > self.options.max_mito * library_C] = MUCH_MITO
        reason_C[genes_C < self.options.min_genes] = FEW_GENES
        reason_C[genes_C == 0] = NO_GENE
        reason_C[stored_C == 0] = EMPTY
        facts = {
            "n_genes": genes_C, "library": library_C, "mito": mito_C, "checksum": checksum_C,
            "prints": fingerprints(
                counts_CV.indptr, counts_CV.indices, counts_CV.data, counts_CV.shape[1]
            ),
        }  # fmt: skip
        return facts, reason_C

    def _count(
        self,
        counts_CV: sp.csr_matrix,
        species_C: npt.NDArray[Any],
        species: list[str],
        library_C: npt.NDArray[np.int64],
    ) -> None:
        for s, name in enumerate(species):
            row = np.flatnonzero(species_C == s)
            if row.size == counts_CV.shape[0] and row.size:
                self.medians[name].update(counts_CV, library_C)
            elif row.size:
                self.medians[name].update(counts_CV[row], library_C[row])

    def _flush(self) -> None:
        """Write the waiting cells as one group."""
        from genemodel.corpus.store import write_group

        group, self._group = self._group, _Group()
        if not group.n_cells:
            return
        name = str(len(self.groups))
        cells = {key: np.concatenate(parts) for key, parts in group.cells.items()}
        indptr = np.concatenate([[0], np.cumsum(cells["n_genes"], dtype=np.int64)])
        obs = pd.DataFrame(index=pd.Index(np.concatenate(group.names), dtype=object))
        for column in self.columns.names:
            used, codes = np.unique(cells[f"code_{column}"], return_inverse=True)
            shift = int(used.size > 0 and used[0] < 0)
            categories = [self._text[column][i] for i in used.tolist() if i >= 0]
            texts = pd.Index(categories, dtype=object)
            obs[column] = pd.Categorical.from_codes(codes - shift, texts)
        write_group(
            self.folder,
            name,
            np.concatenate(group.data),
            np.concatenate(group.indices),
            indptr,
            obs,
            self._var,
        )
        compact: dict[str, Any] = {
            k: v if v.dtype == np.uint64 else narrow(v.astype(np.int64)) for k, v in cells.items()
        }
        np.savez(self.folder / f"{name}.npz", **compact)
        self.groups.append((group.n_cells, group.n_values))


@functools.lru_cache(1)
def _var_of(vocabulary: GeneVocabulary) -> pd.DataFrame:
    """Give the var table of every group."""
    return pd.DataFrame(
        {"symbol": np.array(vocabulary.token_names(), dtype=object)},
        index=pd.Index(_unique(vocabulary.token_ids()), dtype=object),
    )


def _unique(names: list[str]) -> list[str]:
    """Make repeated names distinct by their position."""
    seen: set[str] = set()
    result = []
    for at, name in enumerate(names):
        result.append(f"{name}#{at}" if name in seen or not name else name)
        seen.add(name)
    return result
