"""Reading counts of many ranges of cells at once: the loader's hot path.

Axes: C cells, V vocabulary, N (gene, count) pairs.
"""

import bisect
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genemodel.cells.matrices import refuse_damage
from genemodel.corpus.manifest import COLLECTION, GroupRecord
from genemodel.errors import DataError

if TYPE_CHECKING:
    from genemodel.corpus.store import GroupReader

# Values below which a thread's work is done sooner than handed out.
_WORTH_A_THREAD = 1_000_000

# (group, first value, last value, place in the output)
type _Piece = tuple[int, int, int, int]


@dataclass(frozen=True)
class CountsBlock:
    """Counts of consecutive cells, end to end.

    Cell c owns ``gene_N[starts_C1[c]:starts_C1[c + 1]]`` (tokens, ascending, int32) and the counts
    beside them (int32, never 0); ``starts_C1`` is int64.
    """

    starts_C1: npt.NDArray[np.int64]
    gene_N: npt.NDArray[np.int32]
    count_N: npt.NDArray[np.int32]

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.starts_C1.size - 1

    def to_csr(self, n_tokens: int) -> sp.csr_matrix:
        """(C, V) matrix of the same counts."""
        return sp.csr_matrix(
            (self.count_N, self.gene_N, self.starts_C1), shape=(len(self), n_tokens)
        )


class CountsReader:
    """Counts of a corpus by cell number; safe to use from threads.

    Parameters
    ----------
    path
        Folder of the corpus.
    groups
        Its groups, in the order of their cells.
    starts_C1
        First stored value of every cell, over all groups, and the end.
    n_tokens
        V.
    threads
        Most threads that read at once.
    """

    def __init__(
        self,
        path: Path,
        groups: Sequence[GroupRecord],
        starts_C1: npt.NDArray[np.int64],
        n_tokens: int,
        threads: int,
    ) -> None:
        self._path, self._groups = path, groups
        self._n_tokens, self._n_threads = n_tokens, threads
        self._first_cell = [0]
        for group in groups:
            self._first_cell.append(self._first_cell[-1] + group.n_cells)
        self._starts_C1 = starts_C1
        self._readers: dict[int, GroupReader] = {}
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    def read(self, ranges: Sequence[tuple[int, int]]) -> CountsBlock:
        """Read ranges of cells, end to end in the order given."""
        starts = [self._starts_C1[start : stop + 1] for start, stop in ranges]
        starts_C1 = np.zeros(sum(s.size - 1 for s in starts) + 1, np.int64)
        if starts:
            np.cumsum(np.concatenate([np.diff(s) for s in starts]), out=starts_C1[1:])
        n_values = int(starts_C1[-1])
        gene_N, count_N = np.empty(n_values, np.int32), np.empty(n_values, np.int32)
        shares = _shares(self._pieces(ranges), self._n_threads)
        if len(shares) <= 1:
            for share in shares:
                self._read_share(share, gene_N, count_N)
        else:
            pool = self._threads()
            waiting = [pool.submit(self._read_share, s, gene_N, count_N) for s in shares]
            for future in waiting:
                future.result()
        if n_values and (count_N.min() <= 0 or gene_N.max() >= self._n_tokens):
            raise DataError(
                f"corpus {self._path}: a stored count is 0 or a gene lies outside the vocabulary: "
                "the corpus is damaged. `genemodel corpus verify` names the file"
            )
        return CountsBlock(starts_C1, gene_N, count_N)

    def _pieces(self, ranges: Sequence[tuple[int, int]]) -> list[_Piece]:
        """Cut ranges at the ends of groups; values are counted within their group."""
        pieces = []
        at = 0
        for start, stop in ranges:
            while start < stop:
                g = bisect.bisect_right(self._first_cell, start) - 1
                end = min(stop, self._first_cell[g + 1])
                base = int(self._starts_C1[self._first_cell[g]])
                first, last = int(self._starts_C1[start]) - base, int(self._starts_C1[end]) - base
                pieces.append((g, first, last, at))
                at += last - first
                start = end
        return pieces

    def _read_share(
        self,
        pieces: Sequence[_Piece],
        gene_N: npt.NDArray[np.int32],
        count_N: npt.NDArray[np.int32],
    ) -> None:
        """Read consecutive pieces, those of one group together."""
        run: list[tuple[int, int]] = []
        begin = at = 0
        for number, (g, first, last, place) in enumerate(pieces):
            if not run:
                begin = at = place
            run.append((first, last))
            at += last - first
            if number + 1 == len(pieces) or pieces[number + 1][0] != g:
                reader = self._reader(g)
                reader.indices.read_into(run, gene_N[begin:at])
                reader.data.read_into(run, count_N[begin:at])
                run = []

    def _reader(self, number: int) -> "GroupReader":
        found = self._readers.get(number)
        if found is None:
            from genemodel.corpus.store import GroupReader

            group = self._groups[number]
            folder = self._path / COLLECTION / group.name
            with refuse_damage(str(folder)):
                found = GroupReader(folder)
            if found.data.size != group.n_values:
                raise DataError(
                    f"{folder}: holds {found.data.size:,} counts, the manifest says "
                    f"{group.n_values:,}: build the corpus again"
                )
            with self._lock:
                self._readers[number] = found
        return found

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._n_threads, "genemodel-corpus")
            return self._pool


def _shares(pieces: Sequence[_Piece], n: int) -> list[list[_Piece]]:
    """Cut pieces into at most ``n`` consecutive runs of about equal size."""
    total = sum(last - first for _, first, last, _ in pieces)
    n = min(n, 1 + total // _WORTH_A_THREAD)
    shares: list[list[_Piece]] = [[] for _ in range(n)]
    done = 0
    for piece in pieces:
        shares[min(n - 1, done * n // max(1, total))].append(piece)
        done += piece[2] - piece[1]
    return [share for share in shares if share]
