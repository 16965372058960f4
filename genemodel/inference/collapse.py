"""Has an embedding collapsed? Two numbers that say so, and the warning.

Axes: C cells, D width.
"""

import logging

import numpy as np

logger = logging.getLogger(__name__)

LOWEST_RANK, HIGHEST_COSINE = 2.0, 0.999


def effective_rank(embedding_CD: np.ndarray) -> float:
    """Return the exponential of the entropy of the singular values of the centred embedding.

    Between 1 (all cells on a line, or all the same) and the width D (Roy & Vetterli 2007).
    """
    values_CD = embedding_CD.astype(np.float64)
    centred_CD = values_CD - values_CD.mean(axis=0)
    # The D x D Gram matrix is enough and does not grow with the cells.
    singular = np.sqrt(np.clip(np.linalg.eigvalsh(centred_CD.T @ centred_CD), 0.0, None))
    # Below the rounding of float32 a direction is noise, not rank.
    scale = max(float(np.abs(values_CD).max()), 1e-30) * np.sqrt(len(values_CD)) * 1e-6
    singular = singular[singular > scale]
    if len(singular) == 0:
        return 1.0
    share = singular / singular.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def mean_cosine(embedding_CD: np.ndarray) -> float:
    """Return the mean cosine over all pairs of different cells (1: all point the same way)."""
    values_CD = embedding_CD.astype(np.float64)
    norm_C = np.linalg.norm(values_CD, axis=1)
    values_CD, norm_C = values_CD[norm_C > 0], norm_C[norm_C > 0]
    n = len(values_CD)
    if n < 2:
        return 1.0
    total_D = (values_CD / norm_C[:, None]).sum(axis=0)
    return float((total_D @ total_D - n) / (n * (n - 1)))


def collapse(embedding_CD: np.ndarray) -> dict[str, float]:
    """Measure whether an embedding has collapsed.

    Parameters
    ----------
    embedding_CD
        One row a cell; rows with NaN are left out.

    Returns
    -------
    ``effective_rank`` and ``mean_cosine``; NaN with fewer than three cells.
    """
    rows_CD = embedding_CD[np.isfinite(embedding_CD).all(1)]
    if len(rows_CD) < 3:
        return {"effective_rank": float("nan"), "mean_cosine": float("nan")}
    return {"effective_rank": effective_rank(rows_CD), "mean_cosine": mean_cosine(rows_CD)}


def warn_of_collapse(health: dict[str, float], where: str) -> None:
    """Say when an embedding holds next to nothing."""
    if health["effective_rank"] < LOWEST_RANK or health["mean_cosine"] > HIGHEST_COSINE:
        logger.warning(
            "%s: the embedding has all but collapsed (effective rank %.1f, mean cosine %.4f): "
            "cells look alike to this model. Check species, layer and the share of matched genes.",
            where, health["effective_rank"], health["mean_cosine"],
        )  # fmt: skip
