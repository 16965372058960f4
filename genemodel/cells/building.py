"""One streaming pass from sources to the groups of a corpus, in bounded memory."""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.sparse as sp

from genemodel.cells import manifest as layout
from genemodel.cells.corpus_statistics import Statistics, mitochondrial_V
from genemodel.cells.manifest import GroupRecord, SourceRecord
from genemodel.cells.sources import CHUNK_CELLS, Source, open_source
from genemodel.errors import ConfigError, DataError
from genemodel.genes.match import GeneMatch
from genemodel.genes.vocabulary import GeneVocabulary

if TYPE_CHECKING:
    from anndata import AnnData

log = logging.getLogger(__name__)

# A group is closed at either bound: it is what building holds in memory.
GROUP_CELLS = 131_072
GROUP_VALUES = 64_000_000
_EXAMPLES = 20
_COUNTED_BEHIND = 2

EMPTY = "empty cell"
NO_GENE = "no gene of the vocabulary"
FEW_GENES = "fewer genes than min_genes"
MUCH_MITO = "more mitochondrial counts than max_mito"
NO_SPECIES = "species not in the vocabulary or missing"

type SourceLike = "str | Path | AnnData | Source"


@dataclass(frozen=True)
class BuildOptions:
    """How sources are read and which cells are kept; see :meth:`Corpus.build`."""

    layer: str | None = None
    species: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    keep: tuple[str, ...] = ()
    min_fraction: float = 0.3
    min_genes: int = 0
    max_mito: float | None = None
    allow_fractional: bool = False
    unknown_species: Literal["refuse", "drop"] = "refuse"
    chunk_cells: int = CHUNK_CELLS
    group_cells: int = GROUP_CELLS

    def __post_init__(self) -> None:
        for name, low, high in (
            ("min_fraction", 0, 1), ("min_genes", 0, None), ("max_mito", 0, 1),
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

    def open(self, data: SourceLike, name: str | None = None) -> Source:
        """Open a source with these options."""
        return open_source(
            data,
            name=name,
            layer=self.layer,
            species=self.species,
            columns=self.columns,
            keep=self.keep,
            allow_fractional=self.allow_fractional,
        )


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
                "(`genemodel species`), or leave these cells out with unknown_species=drop"
            )
        raise DataError(
            f"{source.where}: {missing:,} of {source.n_cells:,} cells have no species in obs. Fill "
            "the column, set species=, or leave these cells out with unknown_species=drop"
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
                source.genes, species=name, min_fraction=options.min_fraction, among=known
            )
        except DataError as error:
            raise DataError(f"{source.where}: {error}{_turned(source, vocabulary)}") from error
    return matches


def _turned(source: Source, vocabulary: GeneVocabulary) -> str:
    """Hint where a text table has its genes as rows."""
    if source.kind != "csv":
        return ""
    index = vocabulary.index(vocabulary.species[0])
    rows = [name.lower() for name in source.obs.index[:2000]]
    hits = sum(name in index.by_lowered or name.split(".")[0] in index.by_id for name in rows)
    if hits > 0.3 * len(rows):
        return " The first column holds gene names: open it with transpose=True"
    return ""


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


class Builder:
    """Streams sources into groups below a folder."""

    def __init__(
        self,
        folder: Path,
        vocabulary: GeneVocabulary,
        options: BuildOptions,
        statistics: Statistics,
        *,
        categories: Mapping[str, Sequence[str]],
        columns: Sequence[str],
        first_group: int,
    ) -> None:
        self.folder, self.vocabulary, self.options = folder, vocabulary, options
        self.statistics = statistics
        further = [c for c in (*options.columns, *options.keep) if c not in columns]
        self.columns = [*columns, *dict.fromkeys(further)]
        self.categories = {c: list(categories.get(c, ())) for c in self.columns}
        self._place = {c: {v: i for i, v in enumerate(self.categories[c])} for c in self.columns}
        self.groups: list[GroupRecord] = []
        self.sources: list[SourceRecord] = []
        self._first_group = first_group
        self._group = _Group()
        # Gene statistics take as long as everything else together: they run beside it.
        self._beside = ThreadPoolExecutor(1, "genemodel-statistics")
        self._waiting: deque[Future[None]] = deque()
        self._mito_V = mitochondrial_V(vocabulary)
        names = vocabulary.token_names()
        self._var = pd.DataFrame(
            {"symbol": np.array(names, dtype=object)},
            index=pd.Index(_unique(vocabulary.token_ids()), dtype=object),
        )
        (folder / layout.INDEX).mkdir(parents=True)

    def add(self, source: Source, matches: Mapping[str, GeneMatch]) -> None:
        """Stream one source."""
        species = list(matches)
        first_source = len(self.statistics.panels)
        place = {name: i for i, name in enumerate(species)}
        column = source.obs["species"].cat
        table = np.array([place.get(name, -1) for name in column.categories] + [-1])
        species_C = table[column.codes]
        codes = {c: self._codes(source.obs[c] if c in source.obs else None, c, source.n_cells)
                 for c in self.columns}  # fmt: skip
        names = source.obs.index.to_numpy()
        read = np.zeros(len(species), np.int64)
        kept = np.zeros(len(species), np.int64)
        dropped: list[dict[str, int]] = [{} for _ in species]
        for chunk in source.chunks(self.options.chunk_cells):
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
            facts["source"] = chosen_C[row_C] + first_source
            at = row_C + chunk.start
            facts |= {f"code_{c}": values[at] for c, values in codes.items()}
            self._group.add(counts_CV, names[at], facts)
            full = self._group.n_values >= GROUP_VALUES
            if full or self._group.n_cells >= self.options.group_cells:
                self._flush()
        self._flush()
        self._wait(0)
        if (species_C < 0).any():
            dropped[0][NO_SPECIES] = int((species_C < 0).sum())
            read[0] += dropped[0][NO_SPECIES]
        repeated = int(source.obs.index.duplicated().sum())
        for s, (name, match) in enumerate(matches.items()):
            self.statistics.panels.append(match.measured_V)
            self.sources.append(
                SourceRecord(
                    name=source.name, file=source.file, kind=source.kind,
                    layer=source.counts.name, species=name, n_read=int(read[s]),
                    n_cells=int(kept[s]), dropped=dropped[s], n_genes=match.n_genes,
                    n_matched=match.n_matched, n_summed=match.n_summed,
                    n_ambiguous=len(match.ambiguous), gene_column=match.column,
                    unmatched=match.unmatched[:_EXAMPLES],
                    explicit_zeros=source.counts.tally.explicit_zeros,
                    rounded=source.counts.tally.rounded, repeated_names=repeated,
                    notes=list(source.notes),
                )
            )  # fmt: skip

    def _wait(self, most: int) -> None:
        """Wait until at most so many chunks are left to be counted."""
        while len(self._waiting) > most:
            self._waiting.popleft().result()

    def close(self) -> None:
        """End the thread that counts."""
        self._beside.shutdown(cancel_futures=True)

    def _codes(self, column: pd.Series | None, name: str, n: int) -> npt.NDArray[np.int64]:
        """Codes of the corpus for a column of the source, −1 missing."""
        if column is None:
            return np.full(n, -1, np.int64)
        place, known = self._place[name], self.categories[name]
        codes, categories = column.cat.codes.to_numpy(), column.cat.categories
        table = np.full(len(categories) + 1, -1, np.int64)
        for i in np.unique(codes[codes >= 0]):
            text = categories[i]
            if text not in place:
                place[text] = len(known)
                known.append(text)
            table[i] = place[text]
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
        from genemodel.cells.corpus_kernels import summarise

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
            "n_genes": genes_C, "library": library_C, "mito": mito_C, "checksum": checksum_C
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
                self.statistics.by_species[name].update(counts_CV, library_C)
            elif row.size:
                self.statistics.by_species[name].update(counts_CV[row], library_C[row])

    def _flush(self) -> None:
        """Write the waiting cells as one group."""
        from genemodel.cells.store import write_group

        group, self._group = self._group, _Group()
        if not group.n_cells:
            return
        name = f"dataset_{self._first_group + len(self.groups)}"
        cells = {key: np.concatenate(parts) for key, parts in group.cells.items()}
        indptr = np.concatenate([[0], np.cumsum(cells["n_genes"], dtype=np.int64)])
        obs = pd.DataFrame(index=pd.Index(np.concatenate(group.names), dtype=object))
        for column in self.columns:
            used, codes = np.unique(cells[f"code_{column}"], return_inverse=True)
            shift = int(used.size > 0 and used[0] < 0)
            categories = [self.categories[column][i] for i in used if i >= 0]
            texts = pd.Index(categories, dtype=object)
            obs[column] = pd.Categorical.from_codes(codes - shift, texts)
        write_group(
            self.folder / layout.COLLECTION,
            name,
            np.concatenate(group.data),
            np.concatenate(group.indices),
            indptr,
            obs,
            self._var,
        )
        compact: dict[str, Any] = {
            k: v if k == "checksum" else narrow(v.astype(np.int64)) for k, v in cells.items()
        }
        np.savez(self.folder / layout.INDEX / f"{name}.npz", **compact)
        self.groups.append(GroupRecord(name, group.n_cells, group.n_values))


def _unique(names: list[str]) -> list[str]:
    """Make repeated names distinct by their position."""
    seen: set[str] = set()
    result = []
    for at, name in enumerate(names):
        result.append(f"{name}#{at}" if name in seen or not name else name)
        seen.add(name)
    return result
