"""Co-expression vectors from a corpus: inner products that approximate correlations.

Values are log1p of counts per 10⁴, centred within every source (a study's level is no
co-expression) and divided by the standard deviation over all of them; the leading right singular
vectors × sizes ÷ √cells are gene vectors whose inner products are the best approximation of the
matrix of correlations at that rank. Neither that matrix nor cells × genes is ever made: blocks of
cells are read, once for each of a dozen products.

Axes: C cells, V vocabulary, X sources, P dimensions.
"""

from collections.abc import Iterator

import numpy as np
import scipy.sparse as sp

from genemodel.corpus.corpus import Corpus
from genemodel.corpus.statistics import draw_blocks
from genemodel.errors import DataError
from genemodel.expression.components import right_singular_vectors
from genemodel.expression.normalise import log_normalised

# Cells with the gene below which a correlation is noise.
MIN_CELLS = 20
_MEMORY_CELLS = 8192  # read at once


class _Standardised:
    """Cells × genes, centred and scaled, known by its products."""

    def __init__(self, corpus: Corpus, cells: np.ndarray, sample: int, seed: int) -> None:
        self.corpus = corpus
        self.runs = draw_blocks(cells, sample, seed)
        self.n_cells = sum(run.size for run in self.runs)
        n_tokens, n_sources = len(corpus.vocabulary), len(corpus.sources)
        total_XV = np.zeros((n_sources, n_tokens))
        square_V = np.zeros(n_tokens)
        nonzero_V = np.zeros(n_tokens, np.int64)
        cells_X = np.zeros(n_sources)
        for _, source_C, X_CV in self.blocks():
            member_CX = sp.csr_matrix(
                (np.ones(source_C.size), (np.arange(source_C.size), source_C)),
                shape=(source_C.size, n_sources),
            )
            total_XV += (member_CX.T @ X_CV).toarray()
            square_V += np.asarray(X_CV.multiply(X_CV).sum(0)).ravel()
            nonzero_V += np.diff(X_CV.tocsc().indptr)
            cells_X += np.bincount(source_C, minlength=n_sources)
        self.mean_XV = total_XV / np.maximum(cells_X, 1)[:, None]
        measured_V = cells_X @ np.asarray(corpus.measured_SV, np.float64)
        variance_V = square_V - (cells_X[:, None] * self.mean_XV**2).sum(0)
        variance_V = np.maximum(variance_V, 0) / np.maximum(measured_V, 1)
        self.known_V = (nonzero_V >= MIN_CELLS) & (variance_V > 1e-8)
        self.scale_V = np.where(self.known_V, 1 / np.sqrt(np.maximum(variance_V, 1e-8)), 0)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray, sp.csr_matrix]]:
        """Give places, sources and values of the cells, block by block."""
        at = 0
        for run in self.runs:
            for part in np.split(run, np.arange(_MEMORY_CELLS, run.size, _MEMORY_CELLS)):
                block = self.corpus.read(int(part[0]), int(part[-1]) + 1)
                X_CV = block.to_csr(len(self.corpus.vocabulary))[part - part[0]]
                X_CV = log_normalised(X_CV.astype(np.float32), self.corpus.library_C[part])
                yield slice(at, at + part.size), np.asarray(self.corpus.source_C)[part], X_CV
                at += part.size

    def times(self, B_VP: np.ndarray) -> np.ndarray:
        """(V, P) → (C, P)."""
        scaled_VP = (self.scale_V[:, None] * B_VP).astype(np.float32)
        centre_XP = self.mean_XV @ scaled_VP
        made_CP = np.empty((self.n_cells, B_VP.shape[1]), np.float32)
        for place, source_C, X_CV in self.blocks():
            made_CP[place] = X_CV @ scaled_VP - centre_XP[source_C]
        return made_CP

    def transposed_times(self, B_CP: np.ndarray) -> np.ndarray:
        """(C, P) → (V, P)."""
        made_VP = np.zeros((self.scale_V.size, B_CP.shape[1]))
        total_XP = np.zeros((self.mean_XV.shape[0], B_CP.shape[1]))
        for place, source_C, X_CV in self.blocks():
            made_VP += X_CV.T @ B_CP[place]
            np.add.at(total_XP, source_C, B_CP[place])
        return self.scale_V[:, None] * (made_VP - self.mean_XV.T @ total_XP)


def coexpression(
    corpus: Corpus, cells: np.ndarray, dimensions: int, *, sample: int, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Vectors (V, P) of the corpus's genes, which are known, and a line on how.

    Parameters
    ----------
    corpus
        Of any size.
    cells
        Which of its cells may be looked at.
    dimensions
        P.
    sample
        Most cells looked at, drawn block-wise.
    seed
        Of the draw and of the decomposition.

    Raises
    ------
    DataError
        Fewer cells than dimensions, or no gene in 20 of them.
    """
    z = _Standardised(corpus, cells, sample, seed)
    if z.n_cells <= dimensions + 8 or z.known_V.sum() <= dimensions:
        raise DataError(
            f"corpus {corpus.path}: {z.n_cells:,} cells with {int(z.known_V.sum()):,} genes seen "
            f"in {MIN_CELLS} of them or more are too few for {dimensions} dimensions. Set "
            "dimensions lower (knowledge build: dimensions=16), or take a larger corpus"
        )
    vector_VP, size_P = right_singular_vectors(
        z.times, z.transposed_times, z.scale_V.size, dimensions, seed=seed
    )
    vector_VP = (vector_VP * size_P / np.sqrt(z.n_cells)).astype(np.float32)
    kept = float((vector_VP[z.known_V] ** 2).sum() / z.known_V.sum())
    vector_VP[~z.known_V] = 0
    how = f"correlations over {z.n_cells:,} cells, {kept:.1%} of the variance kept"
    return vector_VP, z.known_V, how
