"""Response prediction from AnnData to tables: what is planted is found, noise is said to be so."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import genemodel as gm
from genemodel.cells.input_settings import InputSettings
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.response.design import design_of
from genemodel.response.null_test import null_test, p_of_shuffled
from genemodel.response.panels import REPLICATE, VALUES, panel, ranked, telling
from genemodel.response.settings import AskedResponse

G = 60
QUICK = {"repeats": 1, "permutations": 99}


def cells_of(rows: list[tuple[dict[str, object], np.ndarray, int]], seed: int = 0) -> ad.AnnData:
    """Cells of groups: their obs, their rates and how many."""
    rng = np.random.default_rng(seed)
    counts, obs = [], []
    for about, rate_G, n in rows:
        depth_C1 = rng.gamma(8, 1 / 8, (n, 1))
        counts.append(rng.poisson(rate_G * depth_C1))
        obs += [about] * n
    counts_CG = np.concatenate(counts)
    counts_CG[:, 0] += 1
    frame = pd.DataFrame(obs, index=[f"c{i}" for i in range(len(obs))])
    return ad.AnnData(
        sp.csr_matrix(counts_CG.astype(np.float32)), obs=frame,
        var=pd.DataFrame(index=[f"G{g}" for g in range(G)]),
    )  # fmt: skip


def types(effect: float = 1.2, n: int = 60) -> ad.AnnData:
    """Give six cell types of two kinds, which respond alike within a kind."""
    rng = np.random.default_rng(1)
    base = rng.gamma(1, 3, G) + 1
    rows = []
    kinds = [np.where(rng.random(G) < 0.3, rng.normal(0, effect, G), 0) for _ in range(2)]
    markers = [np.exp(rng.normal(0, 0.8, G)) for _ in range(2)]
    for t in range(6):
        rate = base * markers[t % 2] * np.exp(rng.normal(0, 0.15, G))
        for what, change in (("ctrl", np.zeros(G)), ("drug", kinds[t % 2])):
            rows.append(({"what": what, "type": f"T{t}", "lane": t % 2}, rate * np.exp(change), n))
    return cells_of(rows)


def screen(effect: float = 1.0, n: int = 50, contexts: tuple[str, ...] = ("here",)) -> ad.AnnData:
    """Give eight targets of two families; with no effect, labels that mean nothing."""
    rng = np.random.default_rng(2)
    base = rng.gamma(1, 3, G) + 1
    families = [np.where(rng.random(G) < 0.3, rng.normal(0, 1, G), 0) for _ in range(2)]
    rows = []
    for place in contexts:
        size = effect if place == contexts[0] else 0.0
        rows.append(({"target": "none", "place": place, "guide": "none_1"}, base, 3 * n))
        for p in range(8):
            rate = base * np.exp(size * families[p % 2])
            for guide in (1, 2):
                about = {"target": f"G{p + 10}", "place": place, "guide": f"G{p + 10}_{guide}"}
                rows.append((about, rate, n // 2))
    return cells_of(rows)


@pytest.fixture(scope="module")
def of_types() -> tuple[ad.AnnData, "gm.response.result.ResponseResult"]:
    adata = types()
    # A type that has controls only.
    extra = adata[(adata.obs["type"] == "T0") & (adata.obs["what"] == "ctrl")].copy()
    extra.obs["type"] = "T6"
    extra.obs_names = [f"x{i}" for i in range(extra.n_obs)]
    adata = ad.concat([adata, extra])
    result = gm.respond(
        adata, "what", "ctrl", holdout="cell_types", label_key="type", batch_key="lane", cells=30,
        **QUICK,
    )  # fmt: skip
    return adata, result


def test_held_out_types_are_predicted_from_those_alike(of_types) -> None:
    _, result = of_types
    assert result.tests["supported"].all()
    ours, mean = result.scaled.loc["genemodel"], result.scaled.loc["mean response"]
    assert mean["total"] == pytest.approx(0) and ours["total"] > 0.2
    assert result.scaled.loc[REPLICATE, "total"] == pytest.approx(1)
    assert result.scores.loc["no change", "expression_error"] == pytest.approx(1)
    held = result.predicted.loc["held out"]
    r = [
        np.corrcoef(held.loc[at], result.measured.loc["held out"].loc[at])[0, 1]
        for at in held.index
    ]
    assert min(r) > 0.5
    assert "above the best baseline" in result.words() or "BELOW" in result.words()
    assert result.summary["best_baseline"] in result.scaled.index


def test_what_was_not_measured_is_predicted_and_made(of_types) -> None:
    adata, result = of_types
    new = result.predicted.loc["new"]
    assert list(new.index.get_level_values("context")) == ["T6"]
    # T6 is T0 over again.
    measured = result.measured.xs("T0", level="context").iloc[0]
    assert np.corrcoef(new.iloc[0], measured)[0, 1] > 0.8
    assert result.cells is not None and result.cells.n_obs == 30 * 7
    made = result.cells[result.cells.obs["part"] == "new"].X
    assert np.array_equal(made.data, np.round(made.data)) and made.data.min() > 0
    kept = adata.uns["genemodel_respond"]
    assert kept["scaled"].equals(result.scaled) and kept["words"] == result.words()


def test_a_result_survives_a_file_and_the_verb_writes_the_same(of_types, tmp_path, capsys) -> None:
    adata, result = of_types
    file, out = tmp_path / "cells.h5ad", tmp_path / "out"
    adata.write_h5ad(file)
    again = ad.read_h5ad(file).uns["genemodel_respond"]
    pd.testing.assert_frame_equal(again["scaled"], result.scaled, check_names=False)
    words = [
        "respond", f"input={file}", f"out={out}", "perturbation_key=what", "control=ctrl",
        "holdout=cell_types", "label_key=type", "batch_key=lane", "cells=30", "repeats=1",
        "permutations=99",
    ]  # fmt: skip
    assert main(words) == 0
    assert result.words() in capsys.readouterr().out
    table = pd.read_csv(out / "scaled.csv", index_col="method")
    pd.testing.assert_frame_equal(table, result.scaled, check_names=False)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["words"] == result.summary["words"]
    assert "Predicted and measured" in (out / "report.html").read_text()
    assert ad.read_h5ad(out / "cells.h5ad").n_obs == 210
    assert main(words) == 2 and "overwrite=true" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    words[2] = f"out={tmp_path / 'mine'}"
    assert main([*words, "overwrite=true"]) == 2
    assert "was not written by respond" in capsys.readouterr().err


def test_a_context_without_effects_comes_out_as_null() -> None:
    adata = screen(contexts=("here", "there"))
    table = adata.obs["target"].to_numpy()
    result = gm.respond(
        adata,
        "target",
        "none",
        label_key="place",
        guide_key="guide",
        folds=2,
        predict="G30",
        **QUICK,
    )
    assert result.summary["null_contexts"] == ["there"]
    verdict = result.tests.set_index("context")["verdict"]
    assert set(verdict["there"]) == {"null: no effect is claimed"}
    assert not result.tests.loc[result.tests["context"] == "there", "supported"].any()
    assert result.tests.loc[result.tests["context"] == "here", "supported"].all()
    assert "there: NULL. No perturbation is told from controls" in result.words()
    assert result.summary["guides_p"]["here"] < 0.05 < result.summary["guides_p"]["there"]
    assert "No vector" not in result.words()  # co-expression knows G30, which is measured
    assert set(result.predicted.loc["new"].index.get_level_values("context")) == {"here", "there"}
    assert len(np.unique(table)) == 9


def test_a_null_screen_has_no_scores() -> None:
    result = gm.respond(screen(effect=0.0), "target", "none", folds=2, **QUICK)
    assert not len(result.scaled) and not result.tests["supported"].any()
    # The mean of what was learned is the chance of its controls, and no help with others.
    mean = result.units[result.units["method"] == "mean response"]
    assert mean["_error"].sum() > mean["_nothing"].sum()
    assert "NULL" in result.describe() and "best baseline" not in result.describe()
    assert "What genemodel chose" in result.report().html()


def test_p_of_shuffled_labels_is_uniform_where_labels_mean_nothing() -> None:
    rng = np.random.default_rng(3)
    p = np.array([p_of_shuffled(rng.normal(size=(100, 2))) for _ in range(400)])
    assert abs((p <= 0.05).mean() - 0.05) < 0.03 and abs(p.mean() - 0.5) < 0.06
    moved = rng.normal(size=(100, 2))
    moved[0, 1] = 9
    assert p_of_shuffled(moved) == pytest.approx(0.01, abs=0.011)


def test_batches_are_no_effect() -> None:
    """Perturbed cells of another batch: told apart without the batch, not within it."""
    rng = np.random.default_rng(4)
    base = rng.gamma(1, 3, G) + 1
    lanes = [base, base * np.exp(rng.normal(0, 1, G))]
    rows = []
    for name, sizes in (("none", (80, 20)), ("A", (15, 45)), ("B", (40, 20)), ("C", (20, 40))):
        rows += [
            ({"target": name, "lane": f"L{b}"}, lanes[b], n) for b, n in enumerate(sizes)
        ]  # fmt: skip
    adata = cells_of(rows)

    def fdr(**keys: str) -> np.ndarray:
        asked = AskedResponse(perturbation_key="target", control="none", **keys)
        design = design_of(adata, asked, InputSettings(), "adata")
        effect = design.screen.whole().effect(design.screen.units[0])
        return np.r_[null_test(design.screen, None, 99, 0).fdr_U, np.square(effect).sum()]

    without, within = fdr(), fdr(batch_key="lane")
    assert without[0] < 0.05 and within[:3].min() > 0.05
    assert within[3] < 0.3 * without[3]


def test_a_dose_between_is_predicted_better_than_by_the_mean() -> None:
    rng = np.random.default_rng(5)
    base = rng.gamma(1, 3, G) + 1
    full = np.where(rng.random(G) < 0.4, rng.normal(0, 1.5, G), 0)
    rows = [({"drug": "none", "dose": 0.0}, base, 240)]
    rows += [
        ({"drug": "X", "dose": dose}, base * np.exp(full * share), 60)
        for dose, share in ((1, 0.15), (2, 0.4), (4, 0.7), (8, 1.0))
    ]
    adata = cells_of(rows)
    result = gm.respond(
        adata, "drug", "none", holdout="doses", dose_key="dose", predict=["3", "16"], **QUICK
    )
    error = result.scores["expression_error"]
    assert error["genemodel"] < 0.5 * error["mean response"]
    assert error["dose line"] < error["mean response"]
    new = result.predicted.loc["new"].reset_index("dose")
    assert list(new["dose"]) == [3.0, 16.0]
    size = np.abs(result.predicted.loc["new"].to_numpy()).sum(1)
    assert size[0] < size[1]


def test_what_tells_nothing_apart_does_not_count() -> None:
    rng = np.random.default_rng(6)
    values = {
        "mean response": rng.normal(0.5, 0.3, (8, len(VALUES))),
        REPLICATE: rng.normal(0.55, 0.3, (8, len(VALUES))),
    }
    values[REPLICATE][:, 0] = 0.95 + rng.normal(0, 0.01, 8)
    assert telling(values)[:1] == ("discrimination",)
    assert "direction_fidelity" not in telling(values)
    assert panel(values[REPLICATE])["discrimination"] == pytest.approx(0.95, abs=0.02)


def test_discrimination_is_within_contexts() -> None:
    rng = np.random.default_rng(7)
    place = np.repeat([0, 1], 4)
    measured = rng.normal(size=(8, G)) + 3 * rng.normal(size=(2, G))[place]
    # All that is known is the context: that tells contexts apart, and no perturbation.
    shared = np.stack([measured[:4].mean(0), measured[4:].mean(0)])[place]
    kept = np.ones(G, bool)
    assert ranked(shared, measured, kept, place).mean() == pytest.approx(0.5)
    assert ranked(measured, measured, kept, place) == pytest.approx(1)
    assert ranked(measured, measured, kept, np.arange(8)) == pytest.approx(1)
    assert np.isnan(ranked(measured[:3], measured[:3], kept, np.array([0, 0, 1]))[2])


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"perturbation_key": "targt"}, "Did you mean 'target'"),
        ({"control": "non"}, "control=non is no value"),
        ({"label_key": "nothing"}, "no column 'nothing'"),
        ({"min_cells": 500}, "no context has 500 cells"),
        ({"min_counts": 1e9}, "Lower min_counts"),
        ({"holdout": "cell_types", "label_key": "place"}, "1 cell types have at least"),
        ({"holdout": "doses", "dose_key": "guide"}, "is no number"),
        ({"knowledge": "no.gmt"}, "knowledge=no.gmt: there is no such file"),
    ],
)
def test_what_cannot_be_is_refused(keys: dict[str, object], match: str) -> None:
    asked = {"perturbation_key": "target", "control": "none", **QUICK} | keys
    with pytest.raises(DataError, match=match):
        gm.respond(SMALL, **asked)


SMALL = screen(n=40)


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"holdout": "cells"}, "must be one of"),
        ({"holdout": "cell_types"}, "needs label_key"),
        ({"donor_key": "guide"}, "read with holdout=donors only"),
        ({"label_key": "target"}, "one column cannot be two"),
        ({"folds": 1}, "folds is 1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"knowledge": "x", "holdout": "cell_types", "label_key": "place"}, "leave knowledge out"),
        ({"model": "x", "holdout": "cell_types", "label_key": "place"}, "leave model out"),
        ({"combination": ""}, "combination is empty"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(keys, match: str) -> None:
    asked = {"perturbation_key": "target", "control": "none"} | keys
    with pytest.raises(ConfigError, match=match):
        gm.respond(SMALL, **asked)


def test_the_unstimulated_jurkat_screen_is_null_and_the_stimulated_is_not(shared_data) -> None:
    adata = ad.read_h5ad(shared_data / "human_jurkat_scifi_crispr.h5ad")
    asked = AskedResponse(
        perturbation_key="perturbation", control="non-targeting", label_key="condition"
    )
    design = design_of(adata, asked, InputSettings(), "jurkat")
    found = null_test(design.screen, None, 199, 0)
    context_U = np.array([unit.context for unit in design.screen.units])
    assert design.screen.contexts == ["stimulated", "unstimulated"]
    assert found.null_contexts(context_U) == [1]
    assert (found.fdr_U[context_U == 0] < 0.05).sum() >= 5
