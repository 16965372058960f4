"""Where the latent starts: linear components of the cells, of counts and of cell vectors together.

A network that is trained on a few hundred cells forgets what a projection keeps. So the latent is
the leading components plus what the network adds, which is little where there are few cells. The
vectors of a pre-trained model take the share in the components that best tells molecules that
nobody has seen: a model that knows the tissue gets more than one that does not.

Axes: S sampled cells, G genes read, V genes of the cells, F width of a cell vector, K components.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from genemodel.expression.components import singular_vectors
from genemodel.expression.groups import rows_by_group
from genemodel.expression.neighbours import nearest_others
from genemodel.expression.normalise import log_normalised
from genemodel.expression.thinning import split_molecules

type MakesVectors = Callable[[np.ndarray, sp.csr_matrix], np.ndarray]
"""(rows of the sample, their counts over V, molecules left out) to vectors (rows, F)."""

# Standard deviation of the first component in the latent, where the noise of a cell starts at 0.37:
# on draws of 150 and 400 cells of development sets 8 is no better and 0.5 loses.
SPREAD = 4.0
# Vectors are judged on so many cells: the transformer reads them once more.
_JUDGED = 1000
_SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65)
_NEIGHBOURS = 10


@dataclass(frozen=True)
class LinearStart:
    """Projections of standardised genes and vectors onto the components.

    Attributes
    ----------
    gene_KG, feature_KF
        Float32; fewer rows than asked for where there are fewer components.
    share
        Of the vectors in the variance that the components are made of.
    """

    gene_KG: np.ndarray
    feature_KF: np.ndarray
    share: float


def linear_start(
    value_SG: np.ndarray,
    batch_S: np.ndarray,
    n_components: int,
    *,
    vector_SF: np.ndarray | None = None,
    share: float = 0.0,
    seed: int,
) -> LinearStart:
    """Find the directions in which cells of one batch differ most.

    Parameters
    ----------
    value_SG
        Log-normalised counts less their means.
    batch_S
        Batch of each cell; what sets batches apart is no direction.
    n_components
        K.
    vector_SF
        Standardised cell vectors.
    share
        Of the vectors in the variance, 0 to 1.
    seed
        Of the decomposition.
    """
    n_genes = value_SG.shape[1]
    scale_g, scale_f, joint = 1.0, 0.0, value_SG
    if vector_SF is not None and share > 0:
        scale_g = np.sqrt((1 - share) / _variance(value_SG))
        scale_f = np.sqrt(share / _variance(vector_SF))
        joint = np.hstack([value_SG * scale_g, vector_SF * scale_f])
    n_components = min(n_components, *joint.shape)
    within = _within(joint, batch_S).astype(np.float32)
    right_KJ = singular_vectors(within, n_components, passes=4, seed=seed)[2]
    largest = float((joint @ right_KJ.T).std(0).max(initial=0.0))
    right_KJ = right_KJ * (SPREAD / max(largest, 1e-6))
    width = 0 if vector_SF is None else vector_SF.shape[1]
    feature_KF = np.zeros((len(right_KJ), width))
    if joint.shape[1] > n_genes:
        feature_KF = right_KJ[:, n_genes:] * scale_f
    return LinearStart(
        (right_KJ[:, :n_genes] * scale_g).astype(np.float32), feature_KF.astype(np.float32), share
    )


def vector_share(
    sample_SV: sp.csr_matrix,
    gene_G: np.ndarray,
    batch_S: np.ndarray,
    makes_vectors: MakesVectors,
    n_components: int,
    seed: int,
) -> float:
    """Choose the share of cell vectors in the components, by molecules set aside.

    Half of the molecules make components with each share; a cell's neighbours in them predict its
    other half. The share whose prediction goes best with what was set aside is returned.

    Parameters
    ----------
    sample_SV, batch_S
        Counts of cells, and their batches.
    gene_G
        Columns that are read.
    makes_vectors
        The pre-trained model.
    n_components, seed
        Of the components, and of split and sample.
    """
    rng = np.random.default_rng(seed)
    row_J = np.arange(sample_SV.shape[0])
    if row_J.size > _JUDGED:
        row_J = np.sort(rng.choice(row_J, _JUDGED, replace=False))
    batch_J = batch_S[row_J]
    seen_JV, aside_JV = split_molecules(sample_SV[row_J], 0.5, rng, dtype=np.float32)
    vector_JF = np.nan_to_num(makes_vectors(row_J, seen_JV))
    vector_JF = (vector_JF - vector_JF.mean(0)) / (vector_JF.std(0) + 1e-6)
    kernels = []
    for part in (log_normalised(seen_JV[:, gene_G]).toarray(), vector_JF):
        within = _within(part, batch_J)
        kernels.append(within @ within.T / _variance(part))
    aside_JG = _within(log_normalised(aside_JV[:, gene_G]).toarray(), batch_J)
    scores = []
    for share in _SHARES:
        place_JK = _leading((1 - share) * kernels[0] + share * kernels[1], n_components)
        near_JN = nearest_others(place_JK, min(_NEIGHBOURS, row_J.size - 1))[0]
        told_JG = aside_JG[near_JN].mean(1)
        size = max(float(np.linalg.norm(told_JG)), 1e-9)
        scores.append(float((told_JG * aside_JG).sum()) / size)
    return _SHARES[int(np.argmax(scores))]


def _leading(kernel_JJ: np.ndarray, n_components: int) -> np.ndarray:
    """Scores of the first components of a matrix of inner products, float32 (J, K)."""
    from scipy.linalg import eigh

    n = len(kernel_JJ)
    size_K, vector_JK = eigh(kernel_JJ, subset_by_index=[max(0, n - n_components), n - 1])
    return np.asarray(vector_JK * np.sqrt(np.maximum(size_K, 0.0)), np.float32)


def _within(values_SJ: np.ndarray, batch_S: np.ndarray) -> np.ndarray:
    """Take the mean of its batch off every cell."""
    out_SJ = values_SJ.astype(np.float64)
    for _, rows in rows_by_group(batch_S):
        out_SJ[rows] -= out_SJ[rows].mean(0)
    return out_SJ


def _variance(values_SJ: np.ndarray) -> float:
    return max(float(values_SJ.var(0).sum()), 1e-9)
