"""Cells in memory, read by a stream as a corpus is.

Their genes are whatever columns they have: tokens of a vocabulary, or the data's own genes, of
which only networks on counts make sense.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import scipy.sparse as sp

from genemodel.batches.order import Layout
from genemodel.corpus.reading import CountsBlock


class HeldCells:
    """Counts of cells in memory with the face of a corpus.

    Parameters
    ----------
    counts_CG
        Whole counts, CSR.
    where
        Name of the data in messages.
    species_C
        Species code of every cell; all 0 by default.
    """

    def __init__(
        self, counts_CG: sp.csr_matrix, *, where: str, species_C: np.ndarray | None = None
    ) -> None:
        counts_CG = sp.csr_matrix(counts_CG)
        if not counts_CG.has_canonical_format or (counts_CG.data == 0).any():
            counts_CG = counts_CG.copy()
            counts_CG.sum_duplicates()
            counts_CG.eliminate_zeros()
        self.counts_CG, self.path = counts_CG, where
        self._starts_C1 = counts_CG.indptr.astype(np.int64)
        n_cells = counts_CG.shape[0]
        if species_C is None:
            species_C = np.zeros(n_cells, np.int16)
        self._labels: dict[str, Any] = {
            "library": np.asarray(counts_CG.sum(1, dtype=np.float64)).ravel(),
            "n_genes": np.diff(self._starts_C1),
            "source": np.zeros(n_cells, np.int32),
            "species": np.asarray(species_C),
        }

    def __len__(self) -> int:
        return self.counts_CG.shape[0]

    @property
    def layout(self) -> Layout:
        """Order of reading: cell by cell, because memory has no need of neighbours."""
        return Layout(block=1, window_blocks=8192, part_blocks=8192)

    def label(self, name: Literal["library", "n_genes", "source", "species"]) -> Any:
        """One number of every cell, as :meth:`Corpus.label` gives it."""
        return self._labels[name]

    def read_blocks(self, ranges: Sequence[tuple[int, int]]) -> CountsBlock:
        """Read ranges of cells, end to end in the order given."""
        starts_C1 = self._starts_C1
        rows = np.concatenate([np.arange(a, b) for a, b in ranges]) if ranges else np.arange(0)
        size_C = starts_C1[rows + 1] - starts_C1[rows]
        ends_C = np.cumsum(size_C)
        at_N = np.arange(int(size_C.sum())) + np.repeat(starts_C1[rows] - (ends_C - size_C), size_C)
        return CountsBlock(
            np.concatenate([[0], ends_C]).astype(np.int64),
            self.counts_CG.indices[at_N].astype(np.int32),
            self.counts_CG.data[at_N].astype(np.int32),
        )
