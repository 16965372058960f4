"""Has an embedding collapsed? Two numbers that say so, and the warning.

Axes: C cells, D width.
"""

import logging
from collections.abc import Callable, Iterable, Iterator

import numpy as np

logger = logging.getLogger(__name__)

LOWEST_RANK, HIGHEST_COSINE = 2.0, 0.999
# Rows that are looked at in double precision at once.
_BLOCK_CELLS = 16_384

Blocks = Callable[[], Iterable[np.ndarray]]
"""Starts a pass over an embedding: blocks of rows (c, D)."""


def effective_rank(embedding_CD: np.ndarray) -> float:
    """Return the exponential of the entropy of the singular values of the centred embedding.

    Between 1 (all cells on a line, or all the same) and the width D (Roy & Vetterli 2007).
    """
    return _effective_rank(lambda: _blocks(embedding_CD))


def mean_cosine(embedding_CD: np.ndarray) -> float:
    """Return the mean cosine over all pairs of different cells (1: all point the same way)."""
    return _mean_cosine(lambda: _blocks(embedding_CD))


def _blocks(embedding_CD: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(embedding_CD), _BLOCK_CELLS):
        yield embedding_CD[start : start + _BLOCK_CELLS].astype(np.float64)


def _effective_rank(blocks: Blocks) -> float:
    n, largest, sum_D = 0, 0.0, np.zeros(1)
    for values_CD in blocks():
        n += len(values_CD)
        largest = max(largest, float(np.abs(values_CD).max(initial=0.0)))
        sum_D = sum_D + values_CD.sum(axis=0)
    mean_D = sum_D / n
    # The D x D Gram matrix is enough and does not grow with the cells.
    gram_DD = np.zeros((len(mean_D), len(mean_D)))
    for values_CD in blocks():
        centred_CD = values_CD - mean_D
        gram_DD += centred_CD.T @ centred_CD
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(gram_DD), 0.0, None))
    # Below the rounding of float32 a direction is noise, not rank.
    scale = max(largest, 1e-30) * np.sqrt(n) * 1e-6
    singular = singular[singular > scale]
    if len(singular) == 0:
        return 1.0
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _mean_cosine(blocks: Blocks) -> float:
    n, total_D = 0, np.zeros(1)
    for values_CD in blocks():
        norm_C = np.linalg.norm(values_CD, axis=1)
        values_CD, norm_C = values_CD[norm_C > 0], norm_C[norm_C > 0]
        n += len(values_CD)
        total_D = total_D + (values_CD / norm_C[:, None]).sum(axis=0)
    if n < 2:
        return 1.0
    return float((total_D @ total_D - n) / (n * (n - 1)))


def collapse(embedding: np.ndarray | Blocks) -> dict[str, float]:
    """Measure whether an embedding has collapsed.

    Parameters
    ----------
    embedding
        One row a cell, or what starts a pass over blocks of rows where they are too many to hold;
        rows with NaN are left out.

    Returns
    -------
    ``effective_rank`` and ``mean_cosine``; NaN with fewer than three cells.
    """

    def finite() -> Iterator[np.ndarray]:
        passed = [embedding] if isinstance(embedding, np.ndarray) else embedding()
        for rows_CD in passed:
            for values_CD in _blocks(rows_CD):
                yield values_CD[np.isfinite(values_CD).all(1)]

    if sum(len(rows_CD) for rows_CD in finite()) < 3:
        return {"effective_rank": float("nan"), "mean_cosine": float("nan")}
    return {"effective_rank": _effective_rank(finite), "mean_cosine": _mean_cosine(finite)}


def warn_of_collapse(health: dict[str, float], where: str) -> None:
    """Say when an embedding holds next to nothing."""
    if health["effective_rank"] < LOWEST_RANK or health["mean_cosine"] > HIGHEST_COSINE:
        logger.warning(
            "%s: the embedding has all but collapsed (effective rank %.1f, mean cosine %.4f): "
            "cells look alike to this model. Check species, layer and the share of matched genes.",
            where, health["effective_rank"], health["mean_cosine"],
        )  # fmt: skip
