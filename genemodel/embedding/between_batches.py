"""What studies differ by in the vectors of a frozen model, taken off without training.

Axes: B batches, C cells, D width, F cells that the shifts are fitted to.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from genemodel.integration.shared_clusters import SharedClusterCorrection

FITTED = 20_000  # cells that the shifts are fitted to, as many of every batch as there are
# Mean gain of evidence by centring from which on batches are centred before populations are sought
# (development: .02 where batches meet as they are, .32 where the study is the largest direction).
GAIN_OF_CENTRING = 0.1
# Share of a batch's cells that must be of populations proven elsewhere (beyond chance neighbours),
# below which nothing says what the batch differs by, and it stays where it is.
LEAST_EVIDENCE = 0.1


@dataclass(frozen=True)
class BatchShifts:
    """One shift for every batch, from the populations that it shares with others.

    Attributes
    ----------
    batches
        Names, in the order of the codes.
    shift_BD
        What is taken off; zero for a batch without evidence.
    evidence_B
        Mean over the batch's cells of how well it is proven that their population is elsewhere too.
    start
        ``"as is"`` or ``"centred"``: where the shared populations were sought.
    """

    batches: list[str]
    shift_BD: np.ndarray
    evidence_B: np.ndarray
    start: str

    @classmethod
    def fit(
        cls, vectors_CD: np.ndarray, code_C: np.ndarray, batches: Sequence[str], seed: int = 0
    ) -> "BatchShifts":
        """Fit to cells of all batches; those without a vector (NaN) take no part."""
        return cls.fit_blocks([vectors_CD], code_C, batches, seed)

    @classmethod
    def fit_blocks(
        cls,
        blocks: Iterable[np.ndarray],
        code_C: np.ndarray,
        batches: Sequence[str],
        seed: int = 0,
    ) -> "BatchShifts":
        """Fit to blocks of rows, in their order, of which those drawn are held and no others."""
        rows_F, parts, first = _rows(code_C, len(batches), seed), [], 0
        for block_CD in blocks:
            stop = first + len(block_CD)
            parts.append(block_CD[rows_F[(rows_F >= first) & (rows_F < stop)] - first])
            first = stop
        plain_FD = np.concatenate(parts).astype(np.float64)
        finite_F = np.isfinite(plain_FD).all(1)
        plain_FD, rows_F = plain_FD[finite_F], rows_F[finite_F]
        code_F = code_C[rows_F]
        shift_BD, evidence_B = np.zeros((len(batches), plain_FD.shape[1])), np.zeros(len(batches))
        present, of_F = np.unique(code_F, return_inverse=True)
        if len(present) < 2:
            return cls(list(batches), shift_BD, evidence_B, "as is")
        plain_FD -= plain_FD.mean(0)
        mean_ND = _mean_by(plain_FD, of_F, np.ones(len(of_F)))
        starts = {"as is": np.zeros_like(mean_ND), "centred": mean_ND}
        found = {name: _evidence(plain_FD - off_ND[of_F], of_F) for name, off_ND in starts.items()}
        gain = found["centred"].mean() - found["as is"].mean()
        start = "centred" if gain > GAIN_OF_CENTRING else "as is"
        begun_FD = plain_FD - starts[start][of_F]
        evidence_F = found[start]
        evidence_N = np.bincount(of_F, evidence_F) / np.bincount(of_F)
        if evidence_F.any():
            moved_FD = begun_FD - SharedClusterCorrection(seed=seed).fit_transform(begun_FD, of_F)
            off_ND = starts[start] + _mean_by(moved_FD, of_F, evidence_F)
            shift_BD[present] = np.where((evidence_N >= LEAST_EVIDENCE)[:, None], off_ND, 0.0)
        evidence_B[present] = evidence_N
        return cls(list(batches), shift_BD, evidence_B, start)

    def apply(self, vectors_CD: np.ndarray, code_C: np.ndarray) -> np.ndarray:
        """Take every batch's shift off its cells; each by itself, so that blocks may be given."""
        return (vectors_CD - self.shift_BD[code_C]).astype(np.float32)

    def about(self, keys: Sequence[str], code_C: np.ndarray) -> dict[str, Any]:
        """Say what was done, for ``uns``: plain values, in the order of the batches."""
        return {
            "batch_key": list(keys),
            "batches": self.batches,
            "batch_cells": np.bincount(code_C, minlength=len(self.batches)),
            "batch_evidence": self.evidence_B,
            "batch_shift": np.linalg.norm(self.shift_BD, axis=1),
            "shared_populations_sought": self.start,
        }


def _rows(code_C: np.ndarray, n_batches: int, seed: int) -> np.ndarray:
    """Draw rows to fit to: all, or as many of every batch where there are too many."""
    if len(code_C) <= FITTED:
        return np.arange(len(code_C))
    rows = np.random.default_rng(seed).permutation(len(code_C))
    rows = rows[np.argsort(code_C[rows], kind="stable")]
    size_B = np.bincount(code_C[rows], minlength=n_batches)
    rank = np.arange(len(rows)) - np.repeat(np.cumsum(size_B) - size_B, size_B)
    # In turn round the batches: small ones whole before large ones are thinned out.
    return np.sort(rows[np.argsort(rank, kind="stable")[:FITTED]])


def _mean_by(rows_FD: np.ndarray, of_F: np.ndarray, weight_F: np.ndarray) -> np.ndarray:
    """Weighted mean of every batch's rows; zero without weight."""
    mean_ND = np.zeros((int(of_F.max()) + 1, rows_FD.shape[1]))
    for number in range(len(mean_ND)):
        own_F = of_F == number
        total = weight_F[own_F].sum()
        if total > 0:
            mean_ND[number] = weight_F[own_F] @ rows_FD[own_F] / total
    return mean_ND


def _evidence(rows_FD: np.ndarray, of_F: np.ndarray) -> np.ndarray:
    length_F1 = np.maximum(np.linalg.norm(rows_FD, axis=1, keepdims=True), 1e-8)
    return SharedClusterCorrection().evidence(rows_FD / length_F1, of_F)
