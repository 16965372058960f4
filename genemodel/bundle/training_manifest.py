"""What a model was trained on: its sources, and fingerprints of every cell.

A corpus keeps up to three fingerprints of a cell, each a hash of its counts in a part of the
vocabulary (:func:`~genemodel.cells.kernels.fingerprints`): the order of genes, their names
and the format of the file do not matter, and a cell that has lost some genes still has the
fingerprint of a part that has lost none. Of the n fingerprints of a source the leading
32 + log2(n) bits are kept, sorted, as Elias and Fano encode ascending numbers: 32 bits as they are
and two more for all that stands before them, about 13 bytes a cell. A fingerprint of another cell
is taken for one of a source once in 2³².

Axes: C cells, N fingerprints of a source, Q fingerprints asked about.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import scipy.sparse as sp
from safetensors.numpy import load_file, save_file

from genemodel.cells.kernels import PRINTS, fingerprints, summarise
from genemodel.corpus.corpus import Corpus
from genemodel.settings import parse, some

FINGERPRINTS = "training.safetensors"
_MOST_NAMED = 20
_BLOCK_CELLS = 8192


@dataclass(frozen=True, eq=False)
class Fingerprints:
    """A set of fingerprints by their leading bits.

    Attributes
    ----------
    low_N
        The last of these bits, as many as the type has, in the order of all of them.
    high_B
        What stands before, in packed bits: of number ``i`` of value ``h`` bit ``i + h`` is set.
    """

    low_N: np.ndarray
    high_B: np.ndarray

    @classmethod
    def of(cls, print_N: np.ndarray, low: type[np.unsignedinteger[Any]] = np.uint32) -> Self:
        """Encode fingerprints, uint64 in any order; equal ones are one.

        Parameters
        ----------
        print_N
            The fingerprints.
        low
            Type of ``low_N``: a foreign one is found once in 2 to the number of its bits.
        """
        print_N = np.unique(print_N)
        n, n_low = len(print_N), 8 * np.dtype(low).itemsize
        value_N = print_N >> np.uint64(64 - n_low - _bits(n))
        set_B = np.zeros(n + 2 ** _bits(n), bool)
        set_B[(value_N >> np.uint64(n_low)).astype(np.int64) + np.arange(n)] = True
        return cls(value_N.astype(low), np.packbits(set_B))

    def __len__(self) -> int:
        return len(self.low_N)

    @property
    def _n_low(self) -> int:
        return 8 * self.low_N.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Size on disk."""
        return self.low_N.nbytes + self.high_B.nbytes

    @property
    def chance(self) -> float:
        """Share of foreign fingerprints that are found here."""
        return float(len(self) / 2.0 ** (self._n_low + _bits(len(self))))

    def values(self) -> np.ndarray:
        """Decode the leading bits of all, ascending, uint64 (N,)."""
        high_N = np.flatnonzero(np.unpackbits(self.high_B)) - np.arange(len(self))
        return (high_N.astype(np.uint64) << np.uint64(self._n_low)) | self.low_N

    def find(self, print_Q: np.ndarray) -> np.ndarray:
        """Tell which of these fingerprints are in the set, bool (Q,)."""
        if not len(self):
            return np.zeros(len(print_Q), bool)
        value_N = self.values()
        value_Q = print_Q >> np.uint64(64 - self._n_low - _bits(len(self)))
        place_Q = np.minimum(np.searchsorted(value_N, value_Q), len(self) - 1)
        return np.asarray(value_N[place_Q] == value_Q)


def _bits(n: int) -> int:
    """Bits that number ``n`` things."""
    return max(0, n - 1).bit_length()


@dataclass(frozen=True)
class TrainedSource:
    """A file and species of a corpus, as far as a model was trained on it.

    Attributes
    ----------
    name, file, species
        As in the corpus; ``file`` is a name without a path.
    licence, citation
        As far as the corpus knows; else empty.
    corpus
        Fingerprint of the corpus.
    n_cells, n_trained
        Cells of the source in the corpus, and of these those that were not held out.
    checksum
        Of the latter, whatever their order: the sum of the corpus's checksums of them, as hex.
    n_tokens
        Size of the vocabulary then: a vocabulary that grew gives a cell further genes, which its
        fingerprint does not cover.
    """

    name: str
    file: str
    species: str
    licence: str
    citation: str
    corpus: str
    n_cells: int
    n_trained: int
    checksum: str
    n_tokens: int

    @property
    def content(self) -> tuple[str, str, int, int]:
        """What two have in common that are of the same cells."""
        return self.species, self.checksum, self.n_trained, self.n_tokens

    def describe(self) -> str:
        """Say in a line what this is."""
        held_out = f" of {self.n_cells:,}" if self.n_trained < self.n_cells else ""
        file = f" ({self.file})" if self.file and self.file != self.name else ""
        return "; ".join(
            [
                f"{self.name}{file}: {self.n_trained:,}{held_out} cells"
                + (f", {self.species}" if self.species else ""),
                f"licence {self.licence or 'not known'}",
                *([self.citation] if self.citation else []),
            ]
        )


@dataclass(frozen=True)
class TrainingManifest:
    """The cells that a model was trained on, source by source.

    Attributes
    ----------
    sources
        Those of a model that this one started from come first.
    fingerprints
        Of the cells of each source.
    complete
        False where the model started from one that keeps no manifest: then other cells may have
        been trained on, too.
    """

    sources: tuple[TrainedSource, ...] = ()
    fingerprints: tuple[Fingerprints, ...] = field(default=(), repr=False, compare=False)
    complete: bool = True

    @classmethod
    def of(cls, corpus: Corpus, cells: np.ndarray) -> Self:
        """Take down these cells of a corpus, by their permanent numbers."""
        source_C, checksum_C = corpus.source_C[cells], corpus.checksum_C[cells]
        print_CP = corpus.prints_CP()[cells]
        sources, prints = [], []
        for s in np.unique(source_C).tolist():
            record, own_C = corpus.sources[s], source_C == s
            sources.append(
                TrainedSource(
                    name=record.name, file=record.file, species=record.species,
                    licence=record.licence, citation=record.citation,
                    corpus=corpus.fingerprint, n_cells=record.n_cells,
                    n_trained=int(own_C.sum()),
                    checksum=f"{int(np.add.reduce(checksum_C[own_C])):016x}",
                    n_tokens=len(corpus.vocabulary),
                )
            )  # fmt: skip
            print_N = print_CP[own_C].ravel()
            prints.append(Fingerprints.of(print_N[print_N > 0]))
        return cls(tuple(sources), tuple(prints))

    @classmethod
    def of_counts(
        cls,
        counts_CV: sp.csr_matrix,
        trained: np.ndarray,
        species_C: np.ndarray | None = None,
        *,
        name: str,
        file: str = "",
        licence: str = "",
        citation: str = "",
    ) -> Self:
        """Take down cells in memory, as a corpus of them would be.

        Parameters
        ----------
        counts_CV
            Whole counts of all cells over a vocabulary, or over a model's own genes in their order.
        trained
            Rows that are trained on.
        species_C
            Name of every cell's species; none where the genes are known by the data's own names.
        name, file, licence, citation
            Of the source.
        """
        n_cells, n_tokens = counts_CV.shape
        checksum_C = np.zeros(n_cells, np.uint64)
        print_CP = np.zeros((n_cells, PRINTS), np.uint64)
        for start in range(0, n_cells, _BLOCK_CELLS):
            rows = slice(start, start + _BLOCK_CELLS)
            block_CV = sp.csr_matrix(counts_CV[rows], copy=True)
            block_CV.sum_duplicates()
            block_CV.eliminate_zeros()
            parts = block_CV.indptr, block_CV.indices, block_CV.data.astype(np.int64)
            checksum_C[rows] = summarise(*parts, np.zeros(n_tokens, bool))[2]
            print_CP[rows] = fingerprints(*parts, n_tokens)
        if species_C is None:
            species_C = np.full(n_cells, "", dtype=object)
        is_trained_C = np.zeros(n_cells, bool)
        is_trained_C[trained] = True
        sources, prints = [], []
        for species in sorted(set(species_C[is_trained_C])):
            here_C = species_C == species
            own_C = here_C & is_trained_C
            sources.append(
                TrainedSource(
                    name=name, file=file, species=species, licence=licence, citation=citation,
                    corpus="", n_cells=int(here_C.sum()), n_trained=int(own_C.sum()),
                    checksum=f"{int(np.add.reduce(checksum_C[own_C])):016x}", n_tokens=n_tokens,
                )
            )  # fmt: skip
            print_N = print_CP[own_C].ravel()
            prints.append(Fingerprints.of(print_N[print_N > 0]))
        return cls(tuple(sources), tuple(prints))

    @classmethod
    def after(cls, start: "TrainingManifest | None", own: "TrainingManifest") -> Self:
        """Put the cells of a model's start before its own; None is a start that keeps none."""
        if start is None:
            return cls(own.sources, own.fingerprints, complete=False)
        # Who goes on with the same cells, of whichever corpus, was not trained on more of them.
        before = {source.content for source in start.sources}
        new = [i for i, source in enumerate(own.sources) if source.content not in before]
        return cls(
            (*start.sources, *(own.sources[i] for i in new)),
            (*start.fingerprints, *(own.fingerprints[i] for i in new)),
            start.complete and own.complete,
        )

    @property
    def n_trained(self) -> int:
        """Cells, as often as they stand in a source."""
        return sum(source.n_trained for source in self.sources)

    @property
    def chance(self) -> float:
        """Share of foreign fingerprints that are found in any of the sources."""
        return sum(prints.chance for prints in self.fingerprints)

    def describe(self) -> str:
        """Say in some lines what was trained on."""
        several = "" if len(self.sources) == 1 else "s"
        head = f"trained on: {self.n_trained:,} cells of {len(self.sources)} source{several}"
        if not self.complete:
            head += ", and on what the model it started from was trained on, which is unknown"
        lines = [f"  {source.describe()}" for source in self.sources[:_MOST_NAMED]]
        if len(self.sources) > _MOST_NAMED:
            left = [source.name for source in self.sources[_MOST_NAMED:]]
            lines.append(f"  {len(left)} more: {some(left)}")
        return "\n".join([head, *lines])

    # -- disk -------------------------------------------------------------------------------

    def about(self) -> dict[str, Any]:
        """Plain values, all but the fingerprints."""
        return {"complete": self.complete, "sources": [asdict(each) for each in self.sources]}

    def save(self, folder: Path) -> None:
        """Write the fingerprints."""
        arrays: dict[str, np.ndarray] = {}
        for i, prints in enumerate(self.fingerprints):
            arrays |= {f"low.{i}": prints.low_N, f"high.{i}": prints.high_B}
        save_file(arrays, folder / FINGERPRINTS)

    @classmethod
    def read(cls, folder: Path, about: Mapping[str, Any]) -> Self:
        """Read what :meth:`save` wrote and :meth:`about` gave, whose checksums have been proven."""
        where = f"{folder}: training"
        sources = tuple(parse(TrainedSource, each, where=where) for each in about["sources"])
        arrays = load_file(folder / FINGERPRINTS)
        fingerprints = tuple(
            Fingerprints(arrays[f"low.{i}"], arrays[f"high.{i}"]) for i in range(len(sources))
        )
        return cls(sources, fingerprints, about["complete"])
