"""Counts of cells that may be packed together, before any of them is ranked.

Axes: C cells, N genes end to end, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from genemodel.batches.tokens import TokenSettings


@dataclass(frozen=True)
class Window:
    """Counts and labels of cells that may be packed together; C cells, N genes end to end.

    Cell c owns ``gene_N[begin_C[c]:end_C[c]]``, ascending, and its counts beside it. ``total_C``
    are counts over all genes of the source, also those without a token, where they are known; by
    default the libraries.
    """

    begin_C: np.ndarray
    end_C: np.ndarray
    gene_N: np.ndarray
    count_N: np.ndarray
    library_C: np.ndarray
    species_C: np.ndarray
    batch_C: np.ndarray
    panel_C: np.ndarray
    cell_C: np.ndarray
    total_C: np.ndarray = field(default_factory=lambda: np.zeros(0))

    def __post_init__(self) -> None:
        if not self.total_C.size:
            object.__setattr__(self, "total_C", self.library_C)

    def __len__(self) -> int:
        return self.cell_C.shape[0]

    def lengths_C(self, settings: TokenSettings) -> np.ndarray:
        """Tokens of every cell under ``settings``, the cell token included."""
        return settings.lengths(self.end_C - self.begin_C)

    def take(self, rows: np.ndarray) -> "Window":
        """Copy these rows, and no more of the counts than theirs."""
        size_C = self.end_C[rows] - self.begin_C[rows]
        ends_C = np.cumsum(size_C)
        spans = [slice(self.begin_C[r], self.end_C[r]) for r in rows]
        return Window(
            begin_C=ends_C - size_C,
            end_C=ends_C,
            gene_N=np.concatenate([self.gene_N[span] for span in spans]),
            count_N=np.concatenate([self.count_N[span] for span in spans]),
            library_C=self.library_C[rows],
            species_C=self.species_C[rows],
            batch_C=self.batch_C[rows],
            panel_C=self.panel_C[rows],
            cell_C=self.cell_C[rows],
            total_C=self.total_C[rows],
        )

    def only(self, genes_V: np.ndarray) -> "Window":
        """Leave out all other genes; libraries stay those of all."""
        kept_N = genes_V[self.gene_N]
        before_N1 = np.concatenate([[0], np.cumsum(kept_N)])
        return replace(
            self, begin_C=before_N1[self.begin_C], end_C=before_N1[self.end_C],
            gene_N=self.gene_N[kept_N], count_N=self.count_N[kept_N],
        )  # fmt: skip

    @classmethod
    def joined(cls, windows: Sequence[Self]) -> Self:
        """Put windows end to end."""
        sizes = [window.gene_N.size for window in windows]
        firsts = np.cumsum([0, *sizes[:-1]])
        values = {
            name: np.concatenate([getattr(window, name) for window in windows])
            for name in cls.__dataclass_fields__
        }
        for name in ("begin_C", "end_C"):
            values[name] = np.concatenate(
                [getattr(w, name) + first for w, first in zip(windows, firsts, strict=True)]
            )
        return cls(**values)
