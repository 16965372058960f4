"""The correction, which can spare populations that one batch alone has, and what is told of them.

Axes: C cells, D width, G genes, S sampled cells.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse

from genemodel.expression.neighbours import nearest, without
from genemodel.genes.match import USUAL_COLUMNS
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.integration.private_populations import (
    MOST_CELLS,
    MOST_OTHERS,
    PrivatePopulation,
    private_populations_of,
)
from genemodel.integration.shared_clusters import SharedClusterCorrection

if TYPE_CHECKING:
    import pandas as pd

logger = logging.getLogger(__name__)

# Neighbours that are asked what a cell that was not looked at is.
_ASKED = 5
_NEIGHBOURS = 15


@dataclass(frozen=True)
class Spared:
    """A population of one batch, and what became of it.

    Attributes
    ----------
    found
        What it was told by.
    cells
        Rows of all its cells, ascending.
    own_merged, own_after
        Share of its own among its nearest cells after the first correction, and as it is now.
    """

    found: PrivatePopulation
    cells: np.ndarray
    own_merged: float
    own_after: float


def corrected(
    latent_CD: np.ndarray,
    batch_C: np.ndarray,
    sample_S: np.ndarray,
    counts_SG: sparse.csr_matrix,
    *,
    correct: bool = True,
    spare: bool = False,
    look: bool = True,
    seed: int = 0,
) -> tuple[SharedClusterCorrection | None, np.ndarray, list[Spared]]:
    """Correct the latent, and look for populations of one batch that were merged.

    Where they are to be spared it is fitted once more without them; otherwise, and where there are
    none, the first correction stands as it is.

    Parameters
    ----------
    latent_CD, batch_C
        All cells.
    sample_S, counts_SG
        Rows of those whose counts are at hand, ascending, and their counts.
    correct
        Whether there is a correction at all.
    spare
        Whether private populations are left out of it.
    look
        Whether they are looked for.
    seed
        Of both.

    Returns
    -------
    tuple
        The correction, float32 embedding, and what was found, its shares as they are now.
    """
    correction, embedding_CD = None, latent_CD
    if correct:
        correction = SharedClusterCorrection(seed=seed)
        embedding_CD = correction.fit_transform(latent_CD, batch_C).astype(np.float32)
    if not look:
        return correction, embedding_CD, []
    found = private_populations_of(
        counts_SG, batch_C[sample_S], latent_CD[sample_S], embedding_CD[sample_S], seed=seed
    )
    if not found:
        return correction, embedding_CD, []
    rows = [_cells_of(one, latent_CD, batch_C, sample_S) for one in found]
    merged_CD = embedding_CD
    if correct and spare:
        alone_C = np.zeros(len(batch_C), bool)
        alone_C[np.concatenate(rows)] = True
        correction = SharedClusterCorrection(seed=seed)
        embedding_CD = correction.fit_transform(latent_CD, batch_C, alone_C).astype(np.float32)
    pool = np.random.default_rng(seed).permutation(len(batch_C))[:MOST_OTHERS]
    spared = [
        Spared(one, own, _own_share(merged_CD, own, pool), _own_share(embedding_CD, own, pool))
        for one, own in zip(found, rows, strict=True)
    ]
    return correction, embedding_CD, spared


def _cells_of(
    found: PrivatePopulation, latent_CD: np.ndarray, batch_C: np.ndarray, sample_S: np.ndarray
) -> np.ndarray:
    """Rows of all cells of a population: of a large batch not all were looked at."""
    looked_at, of_it = sample_S[found.looked_at], sample_S[found.cells]
    rest = np.setdiff1d(np.flatnonzero(batch_C == found.batch), looked_at)
    near_CK = nearest(latent_CD[rest], latent_CD[looked_at], _ASKED)[0]
    more = rest[np.isin(looked_at, of_it)[near_CK].mean(1) > 0.5]
    return np.sort(np.concatenate([of_it, more]))


def _own_share(embedding_CD: np.ndarray, own: np.ndarray, pool: np.ndarray) -> float:
    """Share of its own among the nearest other cells of (some cells of) a population."""
    asked = np.intersect1d(own, pool)[:MOST_CELLS]
    if not len(asked):
        return float("nan")
    pool = np.sort(pool)
    found = nearest(embedding_CD[asked], embedding_CD[pool], _NEIGHBOURS + 1)
    near_CK = without(found, np.searchsorted(pool, asked))[0]
    return float(np.isin(pool, own)[near_CK].mean())


def told(
    spared: Sequence[Spared],
    batches: Sequence[str],
    names: Sequence[str],
    *,
    correct: bool,
    spare: bool,
) -> list[str]:
    """Warn of what was found; returns a line for each.

    Parameters
    ----------
    spared
        What :func:`corrected` found.
    batches
        Names of the batches.
    names
        Of the genes, as a reader knows them.
    correct, spare
        Whether there was a correction, and whether they were left out of it.
    """
    remedy = ""
    if correct and not spare:
        remedy = (
            "; or have the correction fitted without them (a setting of integration that spares "
            "private populations)"
        )
    lines = []
    for one in spared:
        found = one.found
        markers = ", ".join(names[gene] for gene in found.genes)
        lines.append(f"{len(one.cells):,} cells of {batches[found.batch]} ({markers})")
        became = f"{one.own_after:.0%} in the embedding"
        if correct and spare:
            became = (
                f"{one.own_merged:.0%} with a correction that saw them and {became}, whose did not"
            )
        logger.warning(
            "%s cells of batch %r (highest in them: %s) seem to be of a population that no other "
            "batch has: cells of other batches beside them differ from those around by %.0f %% of "
            "what tells them in their own batch. Of their own kind among their neighbours are "
            "%.0f %% within their batch's components, %s. Look at these genes (rows: "
            "uns[...]['private_cells']); if it is a type of its own, name it in a column and give "
            "that as label_key (gaps are fine)%s.",
            f"{len(one.cells):,}", batches[found.batch], markers, 100 * found.shown,
            100 * found.own_before, became,
            remedy,
        )  # fmt: skip
    return lines


def rows_of(spared: Sequence[Spared], used_C: np.ndarray) -> dict[str, list[int]]:
    """Numbers of the cells of every population, at most 1,000 of each, in the order of `told`."""
    return {
        str(number): used_C[one.cells[:MOST_CELLS]].tolist() for number, one in enumerate(spared)
    }


def names_for_readers(
    genes: Sequence[str], vocabulary: GeneVocabulary | None, var: "pd.DataFrame | None"
) -> list[str]:
    """Symbols where they are known: by the vocabulary, or by a column of the data."""
    if vocabulary is not None:
        token_names = vocabulary.token_names()
        return [token_names[int(gene)] or gene for gene in genes]
    told_by = [name for name in USUAL_COLUMNS if "symbol" in name or "name" in name]
    column = next((name for name in told_by if var is not None and name in var), None)
    if var is None or column is None:
        return list(genes)
    symbol = dict(zip(var.index.astype(str), var[column].astype(str), strict=True))
    return [symbol.get(gene, gene) for gene in genes]
