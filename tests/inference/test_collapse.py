"""The numbers that tell a collapsed embedding, and the warning."""

import logging

import numpy as np
import pytest

from genemodel.inference.collapse import collapse, effective_rank, mean_cosine, warn_of_collapse

RNG = np.random.default_rng(0)


def test_effective_rank_counts_directions_and_ignores_scale_and_shift():
    # Two equal singular values give 2; three of 1, 1, 1 give 3.
    square = np.array([[1, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]], float)
    assert effective_rank(square) == pytest.approx(2.0)
    assert effective_rank(1e3 * square + 7) == pytest.approx(2.0)
    assert effective_rank(RNG.normal(size=(4000, 16))) == pytest.approx(16, abs=0.1)
    assert effective_rank(np.ones((10, 8))) == 1.0


def test_mean_cosine_is_the_mean_over_pairs():
    values = RNG.normal(size=(25, 6)) + 0.5
    unit = values / np.linalg.norm(values, axis=1, keepdims=True)
    cosine = (unit @ unit.T)[~np.eye(25, dtype=bool)]
    assert mean_cosine(values) == pytest.approx(cosine.mean(), abs=1e-6)


@pytest.mark.parametrize("name", ["point", "line"])
def test_collapse_is_warned_of(name, caplog):
    healthy = RNG.normal(size=(300, 32))
    fallen = {
        "point": np.ones((300, 32)) + 1e-6 * healthy,
        "line": healthy[:, :1] @ np.ones((1, 32)) + 100,
    }[name]
    with caplog.at_level(logging.WARNING, logger="genemodel"):
        warn_of_collapse(collapse(healthy), "cells")
        # The common offset of transformer embeddings alone is no collapse.
        warn_of_collapse(collapse(healthy + 5), "cells")
        assert not caplog.records
        warn_of_collapse(collapse(fallen), "cells")
    assert "cells: the embedding has all but collapsed" in caplog.text


def test_rows_without_numbers_are_left_out():
    values = RNG.normal(size=(50, 4))
    with_gap = np.vstack([values, np.full((1, 4), np.nan)])
    assert collapse(with_gap) == collapse(values)
    assert np.isnan(collapse(values[:2])["effective_rank"])


def test_an_embedding_in_blocks_is_the_embedding():
    values = RNG.normal(size=(90, 5)).astype(np.float32) + 3
    values[7] = np.nan
    blocks = collapse(lambda: np.split(values, [20, 21, 70]))
    assert blocks == pytest.approx(collapse(values), rel=1e-9)
    centred = values[np.isfinite(values).all(1)].astype(float)
    singular = np.linalg.svd(centred - centred.mean(0), compute_uv=False)
    share = singular / singular.sum()
    assert blocks["effective_rank"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
