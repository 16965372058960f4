"""The same comparison on draws of few cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.embedding.contamination import Contamination
from genemodel.errors import ConfigError
from genemodel.evaluation import sizes
from genemodel.evaluation.sizes import evaluate_sizes
from genemodel.reports.comparison import EvaluationResult


@pytest.fixture
def cells():
    draw = np.random.default_rng(0)
    counts_CG = draw.poisson(draw.gamma(0.7, 2.0, 60), (90, 60)).astype(np.float32)
    adata = ad.AnnData(sp.csr_matrix(counts_CG))
    adata.obs_names = [f"cell {i}" for i in range(90)]
    return adata


def test_every_method_sees_the_same_cells_of_every_draw(cells, tmp_path):
    seen = {}

    def mine(train):
        seen.setdefault(train.n_obs, []).append(tuple(train.obs_names))
        return np.asarray(train.X.mean(0)) * np.ones((train.n_obs, 1))

    result = evaluate_sizes(
        cells, sizes=[40, 20], draws=2, task="impute", methods={"mine": mine, "gene_mean": None},
        out=tmp_path / "out",
    )  # fmt: skip
    assert {size: len(draws) for size, draws in seen.items()} == {20: 2, 40: 2}
    assert len({draw for draws in seen.values() for draw in draws}) == 4
    assert all(len(set(draw)) == len(draw) for draws in seen.values() for draw in draws)
    written = pd.read_csv(tmp_path / "out" / "sizes.csv")
    assert len(written) == len(result.table)
    means = result.summary("poisson_ratio")
    assert list(means.columns) == [20, 40] and {"none", "gene_mean", "mine"} <= set(means.index)
    one = pd.read_csv(tmp_path / "out" / "20" / "1" / "scores.csv")
    of_draw = written[(written["size"] == 20) & (written["draw"] == 1)]
    pd.testing.assert_series_equal(
        of_draw["value"].reset_index(drop=True), one["value"], check_exact=False
    )
    by_hand = of_draw[of_draw["metric"] == "poisson_ratio"].set_index("method")["value"]
    other = written[(written["size"] == 20) & (written["draw"] == 0)]
    other = other[other["metric"] == "poisson_ratio"].set_index("method")["value"]
    assert means.loc["mine", 20] == pytest.approx((by_hand["mine"] + other["mine"]) / 2)
    assert "20 cells" in result.text() and "Means of 2 draws" in result.text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sizes": [5]}, "from 10 up"),
        ({"sizes": [500]}, "has 90 cells"),
        ({"sizes": [20], "draws": 0}, "at least one draw"),
        ({"sizes": [20], "seeds": [3]}, "Leave seeds out"),
        ({"sizes": [20], "max_cells": 30}, "Leave max_cells out"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(cells, options, said):
    with pytest.raises(ConfigError, match=said):
        evaluate_sizes(cells, task="impute", **options)


@pytest.mark.parametrize(
    ("known", "said"),
    [(True, "model run: 6 of 60 cells, of all draws, were in its training."),
     (False, "model run: unknown whether these cells were in its training")],
)  # fmt: skip
def test_it_says_what_a_model_had_seen_of_all_draws(cells, monkeypatch, known, said):
    def evaluate(part, **_):
        seen_C = np.arange(part.n_obs) < part.n_obs // 10
        found = Contamination(seen_C if known else None, part.n_obs, {}, True, 0.0)
        row = {"method": "none", "metric": "total", "value": 0.5}
        return EvaluationResult(
            "integrate", pd.DataFrame([row]), {}, contamination={"model run": found}
        )

    monkeypatch.setattr(sizes, "evaluate", evaluate)
    result = evaluate_sizes(cells, sizes=[20, 40], draws=1)
    assert said in result.text()
