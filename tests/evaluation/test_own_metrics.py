"""Metrics of the user's own: what they are given, where they stand, what is refused."""

import numpy as np
import pytest

import genemodel as gm
from genemodel.errors import ConfigError
from genemodel.evaluation.own_metrics import Metric

QUICK = {"task": "impute", "methods": ["none", "gene_mean"]}


@pytest.fixture(scope="module")
def cells():
    return gm.synthetic(300, n_genes=200, genes_per_cell=40, n_batches=2, n_cell_types=2)["human"]


def test_a_metric_of_denoised_counts_sees_what_was_set_aside(cells):
    seen = {}

    def molecules(denoised_CG, held_out_CG):
        seen[len(seen)] = denoised_CG.shape, held_out_CG.shape
        return float(held_out_CG.sum())

    def breaks(denoised_CG, held_out_CG):
        raise ValueError("not for these")

    result = gm.evaluate(
        cells, keep=0.5, metrics={"set aside": molecules, "breaks": Metric(breaks, "low")}, **QUICK
    )
    table = result.summary()
    assert all(shape == (len(cells), seen[0][0][1]) for pair in seen.values() for shape in pair)
    # Half of the molecules, within five standard deviations, and the same for both methods.
    total = cells.X.sum()
    assert abs(table["set aside"]["none"] - total / 2) < 5 * np.sqrt(total) / 2
    assert table["set aside"].nunique() == 1
    assert list(result.headline())[-3:] == ["set aside", "s", "MB"]  # no value, no column
    assert "no value: none: breaks: ValueError: not for these" in result.text()
    assert result.columns()["breaks"] == ("breaks", "low")
    gm.pl.scores(result, metrics=["set aside"])


def test_a_metric_of_labels_sees_those_given_and_those_known(cells):
    result = gm.evaluate(
        cells, task="annotate", batch_key="batch", label_key="cell_type", methods=["majority"],
        metrics={"right": lambda given_Q, true_Q: np.mean(given_Q == true_Q)},
    )  # fmt: skip
    table = result.summary()
    assert table["right"].to_numpy() == pytest.approx(table["accuracy"].to_numpy(), abs=1e-12)


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"mse_ratio": len}, "already; rename yours"),
        ({"seconds": len}, "already; rename yours"),
        ({"mine": 3}, "'mine' is 3; give a function"),
        ({"mine": Metric(len, "up")}, "better of 'mine' is 'up'; high, low or None"),
    ],
)
def test_what_is_no_metric_is_refused_before_work(cells, metrics, said, monkeypatch):
    monkeypatch.setattr("genemodel.evaluation.evaluate._cells", None)
    with pytest.raises(ConfigError, match=said):
        gm.evaluate(cells, metrics=metrics, **QUICK)
