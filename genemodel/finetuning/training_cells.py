"""The cells that a head is trained on: all of them for the stream, some of them for statistics.

Axes: C cells, S sampled cells, V genes of the cells.
"""

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from genemodel.batches.held import HeldCells
from genemodel.batches.loader import Cells
from genemodel.batches.order import Layout
from genemodel.corpus.corpus import Corpus

# Variable genes, means and deviations are settled by far fewer cells: at 50,000 the standard error
# of a mean is below half a per cent of the deviation.
MOST_SAMPLED = 50_000
# A batch of which there are so many cells has them in the sample, however many batches there are.
_OF_EACH_BATCH = 50


@dataclass(frozen=True)
class TrainingCells:
    """Cells behind the one interface of a stream.

    Attributes
    ----------
    cells
        A corpus, or cells in memory.
    n_genes
        Genes of the cells (V).
    batch_C
        Batch code of every cell, 0 to B - 1; -1 where unknown.
    used
        Sorted permanent numbers of the cells with counts, to train on and to embed.
    held_out
        Those of ``used`` that are not trained on, but looked at; empty for none.
    sample, sample_SV
        Some of those trained on, sorted, and their counts.
    label_C
        Label code of every cell, -1 where unknown; None without labels.
    """

    cells: Cells
    n_genes: int
    batch_C: np.ndarray
    used: np.ndarray
    held_out: np.ndarray
    sample: np.ndarray
    sample_SV: sp.csr_matrix
    label_C: np.ndarray | None = None

    @property
    def train(self) -> np.ndarray:
        """Cells that are trained on."""
        return np.setdiff1d(self.used, self.held_out, assume_unique=True)

    @property
    def n_batches(self) -> int:
        """B, of the cells that are trained on."""
        return int(self.batch_C.max()) + 1

    @property
    def share_B(self) -> Tensor:
        """Share of the cells trained on that are of each batch, float32 (B,)."""
        code = self.batch_C[self.train]
        n_B = np.bincount(code[code >= 0], minlength=self.n_batches).astype(np.float64)
        return torch.from_numpy((n_B / max(float(n_B.sum()), 1.0)).astype(np.float32))

    def only(self, gene_G: np.ndarray) -> Self:
        """Leave out all other genes of cells in memory; a stream leaves out those of a corpus."""
        if not isinstance(self.cells, HeldCells):
            return self
        cells = HeldCells(
            self.cells.counts_CG[:, gene_G], where=self.cells.path,
            species_C=self.cells.label("species"),
        )  # fmt: skip
        return replace(self, cells=cells, n_genes=len(gene_G), sample_SV=self.sample_SV[:, gene_G])

    @property
    def layout(self) -> Layout | None:
        """How the cells are cut into windows."""
        return self.cells.layout if isinstance(self.cells, HeldCells) else None

    @classmethod
    def held(
        cls,
        counts_CV: sp.csr_matrix,
        batch_C: np.ndarray,
        *,
        label_C: np.ndarray | None = None,
        held_out: np.ndarray | None = None,
        species_C: np.ndarray | None = None,
        where: str = "adata",
        seed: int = 0,
    ) -> Self:
        """Take cells in memory; those without counts are left out."""
        cells = HeldCells(counts_CV, where=where, species_C=species_C)
        return cls._of(cells, counts_CV.shape[1], batch_C, label_C, held_out, seed)

    @classmethod
    def of_corpus(
        cls,
        corpus: Corpus,
        batch_C: np.ndarray,
        *,
        label_C: np.ndarray | None = None,
        held_out: np.ndarray | None = None,
        seed: int = 0,
    ) -> Self:
        """Take the cells of a corpus, which is read from its files all along."""
        return cls._of(corpus, len(corpus.vocabulary), batch_C, label_C, held_out, seed)

    @classmethod
    def _of(
        cls,
        cells: Cells,
        n_genes: int,
        batch_C: np.ndarray,
        label_C: np.ndarray | None,
        held_out: np.ndarray | None,
        seed: int,
    ) -> Self:
        used = np.flatnonzero(np.asarray(cells.label("library")) > 0)
        held = np.zeros(0, np.int64) if held_out is None else np.intersect1d(used, held_out)
        sample = _sampled(np.setdiff1d(used, held, assume_unique=True), batch_C, seed)
        counts_SV = read_csr(cells, sample, n_genes)
        return cls(cells, n_genes, batch_C, used, held, sample, counts_SV, label_C)


def read_csr(cells: Cells, numbers: np.ndarray, n_genes: int) -> sp.csr_matrix:
    """Read the counts of cells with ascending numbers, float32."""
    if isinstance(cells, HeldCells):
        return cells.counts_CG[numbers].astype(np.float32)
    edges = np.flatnonzero(np.diff(numbers) > 1) + 1
    runs = np.split(numbers, edges) if numbers.size else []
    block = cells.read_blocks([(int(run[0]), int(run[-1]) + 1) for run in runs])
    return block.to_csr(n_genes).astype(np.float32)


def _sampled(train: np.ndarray, batch_C: np.ndarray, seed: int) -> np.ndarray:
    if train.size <= MOST_SAMPLED:
        return train
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(train)
    order = np.argsort(batch_C[shuffled], kind="stable")
    code = batch_C[shuffled][order]
    first = np.searchsorted(code, code)  # of its batch
    some = shuffled[order[np.arange(code.size) - first < _OF_EACH_BATCH]]
    return np.unique(np.concatenate([some, shuffled[:MOST_SAMPLED]]))
