"""Distances of samples against closed forms and other implementations."""

import numpy as np
import pytest
from scipy import stats

from genemodel.metrics.distributions import (
    energy_distance,
    kernel_distance,
    kernel_width,
    transport_plan,
    wasserstein_distance,
)


def test_energy_distance_is_scipys_without_pairs_of_a_point_with_itself():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=40), rng.normal(1.0, 2.0, 30)
    # scipy's is the root of the V statistic, with the zeros on the diagonals in its means.
    mean_a = np.abs(a[:, None] - a).mean()
    mean_b = np.abs(b[:, None] - b).mean()
    expected = stats.energy_distance(a, b) ** 2 - mean_a / (40 - 1) - mean_b / (30 - 1)
    assert energy_distance(a[:, None], b[:, None]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", ["energy", "kernel"])
def test_samples_of_one_population_are_not_apart_however_small(distance):
    rng = np.random.default_rng(1)

    def measured(shift):
        a, b = rng.normal(size=(12, 3)), rng.normal(size=(9, 3)) + shift
        if distance == "energy":
            return energy_distance(a, b)
        return kernel_distance(a, b, kernel_width(b))

    null = np.array([measured(0.0) for _ in range(300)])
    assert abs(null.mean()) < 3 * null.std() / np.sqrt(300)
    assert np.mean([measured(2.0) for _ in range(20)]) > 5 * null.std()


def test_transport_is_the_best_of_all_assignments():
    from itertools import permutations

    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(6, 2)), rng.normal(size=(6, 2))
    best = min(((a - b[list(p)]) ** 2).sum() for p in permutations(range(6)))
    assert ((a - b[transport_plan(a, b)]) ** 2).sum() == pytest.approx(best)
    assert wasserstein_distance(a, b) == pytest.approx(np.sqrt(best / 6))


def test_wasserstein_distance_of_a_shift_is_the_shift():
    a = np.random.default_rng(3).normal(size=(25, 4))
    assert wasserstein_distance(a, a + [3.0, 0.0, 4.0, 0.0]) == pytest.approx(5.0)
