"""How far two samples of points are apart as distributions.

Axes: A, B points of two samples, D dimensions.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist, pdist


def energy_distance(a_AD: np.ndarray, b_BD: np.ndarray) -> float:
    """Give 2 E|a − b| − E|a − a'| − E|b − b'|; its expectation is 0 where both are one population.

    Pairs of a point with itself are left out (the U statistic of Székely and Rizzo), so that a
    small sample is not farther away by being small; the value may be a little below 0.
    """
    return float(2 * cdist(a_AD, b_BD).mean() - _within(a_AD) - _within(b_BD))


def _within(a_AD: np.ndarray) -> float:
    return float(pdist(a_AD).mean()) if len(a_AD) > 1 else 0.0


def kernel_distance(a_AD: np.ndarray, b_BD: np.ndarray, width: float) -> float:
    """Squared maximum mean discrepancy with a Gaussian kernel, unbiased: 0 for one population.

    Parameters
    ----------
    a_AD, b_BD
        Samples of two points or more.
    width
        Standard deviation of the kernel; see :func:`kernel_width`.
    """
    gamma = 0.5 / width**2

    def within(sample_AD: np.ndarray) -> float:
        return float(np.exp(-gamma * pdist(sample_AD, "sqeuclidean")).mean())

    across = float(np.exp(-gamma * cdist(a_AD, b_BD, "sqeuclidean")).mean())
    return within(a_AD) + within(b_BD) - 2 * across


def kernel_width(a_AD: np.ndarray) -> float:
    """Median distance between two points of a sample, the usual width of a kernel."""
    return float(np.median(pdist(a_AD))) or 1.0


def transport_plan(a_AD: np.ndarray, b_AD: np.ndarray) -> np.ndarray:
    """Say which point of ``b`` every point of ``a`` goes to, (A,), at the least squared way.

    Between samples of one size and even weights the optimal transport is an assignment, which is
    found exactly and without a regularisation to choose.
    """
    return np.asarray(linear_sum_assignment(cdist(a_AD, b_AD, "sqeuclidean"))[1])


def wasserstein_distance(a_AD: np.ndarray, b_AD: np.ndarray) -> float:
    """Wasserstein-2 distance of two samples of one size; above 0 for two samples of one kind."""
    way_A = ((a_AD - b_AD[transport_plan(a_AD, b_AD)]) ** 2).sum(1)
    return float(np.sqrt(way_A.mean()))
