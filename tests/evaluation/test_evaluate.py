"""The comparison as a whole: what runs, what is skipped, what is written."""

import importlib.util
import logging
import re
import time
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.evaluation import seurat
from genemodel.evaluation.baselines import Conditions
from genemodel.evaluation.evaluate import EvaluateSettings, _Comparison, evaluate
from genemodel.evaluation.meter import Meter
from genemodel.evaluation.methods import METHODS, Denoised, Method, choose
from genemodel.evaluation.models import loaded, model_methods
from genemodel.evaluation.sizes import run
from genemodel.imputation.network import DecoderSettings
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.integrate import integrate
from genemodel.reports.comparison import COLUMNS, EvaluationResult

HAS_SCIB = importlib.util.find_spec("scib_metrics") is not None
needs_scib = pytest.mark.skipif(
    not HAS_SCIB, reason="scib-metrics is not installed: pip install 'genemodel[bench]'"
)


@pytest.fixture(scope="module")
def cells():
    """240 cells, three types, two batches; log counts in X, raw ones in a layer."""
    draw = np.random.default_rng(0)
    type_C, batch_C = draw.integers(0, 3, 240), draw.integers(0, 2, 240)
    profile = draw.gamma(0.5, 1.0, (3, 120)) + 0.02
    rate = profile[type_C] * np.exp(0.4 * draw.standard_normal((2, 120)))[batch_C]
    rate *= draw.uniform(200, 500, (240, 1)) / rate.sum(axis=1, keepdims=True)
    counts = sp.csr_matrix(draw.poisson(rate).astype(np.float32))
    adata = ad.AnnData(counts.log1p())
    adata.layers["counts"] = counts
    adata.obs["donor"] = pd.Categorical([f"d{b}" for b in batch_C])
    adata.obs["kind"] = pd.Categorical([f"t{t}" for t in type_C])
    adata.obs["left"] = (type_C == 0).astype(float)
    adata.obs["right"] = (type_C != 0).astype(float)
    adata.obsm["X_tool"] = np.eye(3)[type_C] + 0.1 * draw.standard_normal((240, 3))
    return adata


def broken(adata):
    raise ZeroDivisionError("nothing to divide by")


@pytest.fixture(scope="module")
def imputed(cells, tmp_path_factory):
    """One imputation run with own methods, a failing and a mis-shaped one."""

    def with_intervals(adata):
        rate = np.tile(adata.X.mean(axis=0), (adata.n_obs, 1))
        return Denoised(np.asarray(rate), np.asarray(rate))

    own = {
        "none": None,
        "gene_mean": None,
        "magic": None,
        "mine": with_intervals,
        "broken": broken,
        "narrow": lambda adata: adata.X[:, :3],
    }
    out = tmp_path_factory.mktemp("impute")
    result = evaluate(
        cells, task="impute", layer="counts", methods=own, seeds=(0, 1), out=out,
        mixture=("left", "right"),
    )  # fmt: skip
    return result, out


def test_imputation_runs_every_method_and_names_what_failed(imputed):
    result, _ = imputed
    summary = result.summary()
    assert set(summary.index) == {"none", "gene_mean", "magic", "mine"}
    assert summary.at["none", "mse_ratio"] == 1.0
    assert summary.at["magic", "poisson_ratio"] < 1.0
    assert (summary["n_seeds"] == 2).all()
    assert "nothing to divide by" in result.skipped["broken"]
    assert "ZeroDivisionError" in result.skipped["broken"]
    assert re.search(r"shape \(240, 3\); expected \(240, 1\d\d\)", result.skipped["narrow"])
    assert summary.at["mine", "coverage_90"] > summary.at["gene_mean", "coverage_90"]
    assert summary["truth_pearson_cell"].between(0, 1).all()


def test_table_is_tidy_and_the_summary_is_its_mean(imputed):
    result, _ = imputed
    assert list(result.table.columns) == ["method", "kind", "seed", "metric", "value"]
    assert not result.table.duplicated(["method", "seed", "metric"]).any()
    kinds = result.table.drop_duplicates("method").set_index("method")["kind"]
    assert kinds["mine"] == "own"
    assert kinds["magic"] == "baseline"
    rows = result.table.query("method == 'magic' and metric == 'mse'")["value"]
    assert len(rows) == 2
    assert result.summary().at["magic", "mse"] == pytest.approx(rows.mean())
    assert result.spread().at["magic", "mse"] == pytest.approx(rows.std())


def test_written_files_hold_the_same_numbers(imputed):
    result, out = imputed
    read = pd.read_csv(out / "scores.csv")
    np.testing.assert_allclose(read["value"], result.table["value"], equal_nan=True)
    assert pd.read_csv(out / "skipped.csv")["method"].tolist() == ["broken", "narrow"]
    coverage = pd.read_csv(out / "coverage.csv")
    assert set(coverage["level"]) == {0.5, 0.8, 0.9, 0.95}
    page = (out / "report.html").read_text()
    for word in ("magic", "broken", "nothing to divide by", "Poisson", "Intervals", "keep"):
        assert word in page
    assert page.count("data:image/png") >= 4


def test_the_same_seed_gives_the_same_scores(cells, imputed):
    again = evaluate(cells, task="impute", layer="counts", methods=["magic"], seeds=[1])
    before = imputed[0].table.query("method == 'magic' and seed == 1").set_index("metric")["value"]
    after = again.table.query("method == 'magic'").set_index("metric")["value"]
    names = ["mse", "poisson", "pearson_gene", "coverage_90"]
    np.testing.assert_allclose(after[names], before[names], rtol=1e-5)


def test_terminal_text_fits_and_says_what_was_skipped(imputed):
    text = imputed[0].text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.splitlines()[0].split()[:4] == ["impute", "MSE", "±", "Poisson"]
    assert "skipped: broken: failed: ZeroDivisionError" in text


def test_whatever_of_ours_runs_says_which_encoder_made_it(imputed):
    for methods in METHODS.values():
        assert all(bool(m.encoder) == (m.kind == "ours") for m in methods.values())
    said = replace(imputed[0], encoders={"magic": "a net", "mine": "a net", "absent": "another"})
    assert said.encoder_notes() == ["magic, mine: by a net."]
    assert "magic, mine: by a net." in said.text()


def test_the_page_says_what_it_is_sorted_by_and_which_packages_computed_it(imputed):
    for task, way, title in (("impute", "lowest", "Poisson"), ("annotate", "highest", "forced")):
        by = {"impute": "poisson_ratio", "annotate": "accuracy_forced"}[task]
        rows = [
            {"method": name, "kind": "control" if name == "c" else "baseline", "seed": 0,
             "metric": metric, "value": value}
            for name, value in (("a", 0.5), ("b", 0.7), ("c", 0.9), ("d", 0.1))
            for metric in (by, "seconds", "peak_mb")
        ]  # fmt: skip
        result = EvaluationResult(task, pd.DataFrame(rows), {}, software={"a": "tool 1.2"})
        order = list(result.summary().index)
        assert order == (["d", "a", "b", "c"] if way == "lowest" else ["c", "b", "a", "d"])
        assert f"Sorted by {title}, {way} first." in result.text()
        assert "Software: a: tool 1.2." in result.text() and result.controls() == ["c"]
    page = imputed[0].report(umaps=False).html()
    assert "Sorted by Poisson, lowest first." in page and "scanpy 1." in page
    assert METHODS["integrate"]["none"].software() == ""


def test_nothing_is_best_for_not_answering():
    ways = dict(COLUMNS["annotate"].values())
    assert [ways[title] for title in ("if called", "unknown", "new unknown")] == [None] * 3
    assert ways["accuracy"] == ways["forced"] == "high"


def test_terminal_text_fits_with_every_integration_column():
    metrics = [
        "total",
        "bio",
        "batch",
        "kmeans_nmi",
        "kmeans_ari",
        "clisi",
        "ilisi",
        "kbet",
        "graph_connectivity",
        "pcr",
        "knn_accuracy_across",
        "seconds",
        "peak_mb",
    ]
    value = dict.fromkeys(metrics, 0.1) | {"seconds": 12345.6, "peak_mb": 12345.6}
    table = pd.DataFrame(
        {
            "method": name,
            "kind": "baseline",
            "seed": seed,
            "metric": metric,
            "value": value[metric],
        }
        for name in METHODS["integrate"]
        for seed in (0, 1)
        for metric in metrics
    )
    result = EvaluationResult("integrate", table, {"scvi": "it is not installed " * 20})
    lines = result.text().splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:5] == ["integrate", "total", "±", "bio", "batch"]
    assert "connect" not in lines[0]  # the least telling column gives way


@pytest.mark.slow
@needs_scib
def test_integration_scores_own_methods_and_standing_embeddings(cells, tmp_path, caplog):
    def mine(adata):
        assert sorted(adata.obs) == ["donor", "kind", "left", "right"]
        return adata.obsm["X_tool"][:, :2]

    with caplog.at_level(logging.INFO, "genemodel"):
        result = evaluate(
            cells, batch_key="donor", label_key="kind", layer="counts", obsm=["X_tool"],
            methods={"none": None, "combat": None, "random": None, "mine": mine, "broken": broken},
            seeds=(0, 1), n_comps=8, out=tmp_path,
        )  # fmt: skip
    summary = result.summary()
    assert set(summary.index) == {"none", "combat", "random", "mine", "obsm:X_tool"}
    assert summary.at["random", "n_seeds"] == 2  # random: every seed; the others once
    assert summary.at["combat", "n_seeds"] == 1
    assert summary.at["obsm:X_tool", "bio"] > summary.at["random", "bio"] + 0.3
    assert list(summary["total"]) == sorted(summary["total"], reverse=True)
    assert list(result.skipped) == ["broken"]
    assert "combat" in caplog.text
    with np.load(tmp_path / "embeddings.npz") as file:
        np.testing.assert_array_equal(file["combat"], result.embeddings["combat"])
    assert set(pd.read_csv(tmp_path / "cell_types.csv")["cell_type"]) == {"t0", "t1", "t2", "all"}
    page = (tmp_path / "report.html").read_text()
    for word in ("UMAP", "Cell types", "Time and memory", "donor", "obsm:X_tool"):
        assert word in page
    assert max(map(len, result.text().splitlines())) <= 100


@pytest.fixture
def quick_scores(monkeypatch):
    """Scores without scib-metrics, which compiles for half a minute."""

    def score(embeddings, batch, label=None, **_):
        row = {"bio": 0.5, "batch": 0.25, "total": 0.4, "kmeans_nmi": np.nan}
        table = pd.DataFrame([row] * len(embeddings), index=list(embeddings))
        table.attrs["undefined"] = {}
        return table

    monkeypatch.setattr("genemodel.metrics.scib.score_embeddings", score)
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: "here" if name == "scib_metrics" else real(name)
    )


@pytest.mark.parametrize("task", ["integrate", "annotate", "impute"])
@pytest.mark.usefixtures("quick_scores")
def test_what_is_scored_is_on_disk_before_the_next_method_runs(cells, tmp_path, task):
    cells = cells.copy()
    cells.var_names = [f"gene{i}" for i in range(cells.n_vars)]
    (tmp_path / "coverage.csv").write_text("of an earlier comparison")
    seen = {}

    def look(*_):
        names = sorted(path.name for path in tmp_path.iterdir())
        seen.update(scores=set(pd.read_csv(tmp_path / "scores.csv")["method"]), names=names)
        raise KeyboardInterrupt

    def first(adata, *rest):
        return adata.X.toarray() if task == "impute" else np.eye(3)[np.arange(adata.n_obs) % 3]

    def label(reference, query, key):
        return np.full(query.n_obs, "t0")

    base = "majority" if task == "annotate" else "none"
    named = {"majority": None} if task == "annotate" else {"gene_mean": None}
    named = {"random": None} if task == "integrate" else named
    methods = {**named, "a/b": label if task == "annotate" else first, "look": look}
    with pytest.raises(KeyboardInterrupt):
        evaluate(cells, task=task, batch_key="donor", label_key="kind", layer="counts", n_comps=5,
                 methods=methods, out=tmp_path)  # fmt: skip
    assert {base, "a/b"} <= seen["scores"]
    assert {"scores.csv", "summary.csv", "skipped.csv"} <= set(seen["names"])
    assert ("coverage.csv" in seen["names"]) == (task == "impute")
    if task == "integrate":
        stored = np.load(tmp_path / "embeddings" / "a%2Fb.npy")
        np.testing.assert_array_equal(stored, np.eye(3)[np.arange(240) % 3])


@pytest.mark.usefixtures("quick_scores")
def test_a_finished_comparison_has_its_embeddings_in_one_file(cells, tmp_path):
    evaluate(cells, batch_key="donor", layer="counts", methods=["random"], n_comps=5,
             out=tmp_path, umaps=False)  # fmt: skip
    assert not (tmp_path / "embeddings").exists()
    with np.load(tmp_path / "embeddings.npz") as file:
        assert set(file) == {"none", "random"}


@pytest.mark.usefixtures("quick_scores")
def test_without_the_uncorrected_state_nothing_else_runs(cells, monkeypatch):
    failing = Method(lambda adata, conditions: broken(adata))
    monkeypatch.setitem(METHODS["integrate"], "none", failing)
    ran = []
    with pytest.raises(DataError, match="uncorrected embedding could not be computed.*divide"):
        evaluate(cells, batch_key="donor", layer="counts", methods={"mine": ran.append})
    assert ran == []


@pytest.mark.usefixtures("quick_scores")
def test_who_learns_from_labels_is_left_out_where_there_is_one(cells, monkeypatch):
    learner = Method(lambda adata, conditions: broken(adata), labels=True)
    monkeypatch.setitem(METHODS["integrate"], "learner", learner)
    cells = cells.copy()
    cells.obs["all"] = "T"
    result = evaluate(cells, batch_key="donor", label_key="all", layer="counts", n_comps=5,
                      methods=["learner"])  # fmt: skip
    assert result.skipped["learner"] == "it learns from labels, and obs['all'] holds T alone"


@pytest.mark.usefixtures("quick_scores")
def test_a_model_that_cannot_read_the_cells_is_refused_before_anything_runs(
    cells, random_bundle, monkeypatch
):
    monkeypatch.setattr("genemodel.evaluation.evaluate._Comparison._run", None)
    cells = cells.copy()
    cells.var_names = [f"gene{i}" for i in range(cells.n_vars)]
    with pytest.raises(GenemodelError, match="model 0 cannot read these cells.*species"):
        evaluate(cells, batch_key="donor", layer="counts", models=[random_bundle])
    integrated = integrate(
        ad.AnnData(cells.layers["counts"], cells.obs, cells.var), batch_key="donor",
        settings=IntegrationSettings(steps=2, passes=0, hidden=4, rank=4, latent=3),
    )  # fmt: skip
    other = cells.copy()
    other.var_names = [f"other{i}" for i in range(other.n_vars)]
    with pytest.raises(DataError, match="model 0 cannot read these cells.*only 0 of"):
        evaluate(other, batch_key="donor", layer="counts", models=[integrated])


def test_a_batch_of_one_cell_weighs_next_to_nothing():
    rows = [
        {"method": "m", "kind": "ours", "seed": 0, "metric": "accuracy", "value": value,
         "direction": name}
        for name, value in (("others → large", 0.9), ("others → lone", 0.0))
    ]  # fmt: skip
    rows.append({**rows[0], "metric": "seconds", "value": 3.0, "direction": "all"})
    judged = {"others → large": 450, "others → lone": 1}
    result = EvaluationResult("annotate", pd.DataFrame(rows), {}, judged=judged)
    assert result.summary().at["m", "accuracy"] == pytest.approx(
        0.9 * 0.9 / (0.9 + 1 / 51)  # weights 450 / 500 and 1 / 51
    )
    assert result.summary().at["m", "seconds"] == 3.0
    # Of large directions both count the same.
    even = EvaluationResult("annotate", pd.DataFrame(rows), {}, judged=dict.fromkeys(judged, 10**6))
    assert even.summary().at["m", "accuracy"] == pytest.approx(0.45)


@pytest.mark.slow
@needs_scib
def test_labels_that_no_two_batches_share_leave_what_needs_none(cells, tmp_path):
    cells = cells.copy()
    cells.obs["line"] = np.where(cells.obs["donor"] == "d0", "HEK", "Jurkat")
    result = evaluate(cells, batch_key="donor", label_key="line", layer="counts", n_comps=8,
                      methods=["combat"], out=tmp_path, umaps=False)  # fmt: skip
    summary = result.summary()
    assert summary[["bio", "clisi", "ilisi", "pcr", "batch_unlabelled"]].notna().all(axis=None)
    assert not {"total", "batch", "bras", "kbet", "knn_accuracy_across"} & set(summary.columns)
    text = result.text()
    assert "no label occurs in two batches: BRAS, kBET, batch and total are not defined" in text
    assert "no label occurs in two batches" in (tmp_path / "report.html").read_text()
    assert set(result.cell_types["cell_type"]) == {"HEK", "Jurkat", "all"}


@pytest.mark.slow
@needs_scib
def test_of_one_batch_biology_alone_is_scored(cells, tmp_path):
    cells = cells.copy()
    cells.obs["one"] = "all"
    result = evaluate(cells, batch_key="one", label_key="kind", layer="counts", n_comps=8,
                      methods=["random"], out=tmp_path, umaps=False)  # fmt: skip
    shown = set(result.summary().columns)
    assert {"bio", "clisi"} <= shown and not {"total", "batch", "ilisi"} & shown
    assert "one batch: mixing cannot be scored" in result.text()
    assert "There is one batch" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
@needs_scib
def test_without_labels_the_table_says_so(cells):
    result = evaluate(
        cells, batch_key="donor", layer="counts", methods=["combat"], n_comps=8, max_cells=120
    )
    text = result.text()
    assert "no labels: biology cannot be scored" in text
    assert "batch*" in text
    assert "bio" not in text.splitlines()[0]
    assert result.settings["cells"] == 120


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batch_key": "plate"}, DataError, r"no column 'plate'; it has 'donor', 'kind'"),
        ({"batch_key": "donor", "label_key": "x"}, DataError, "no column 'x'"),
        ({}, ConfigError, r"batch_key; obs has donor, kind"),
        ({"batch_key": "donor", "methods": ["harmny"]}, ConfigError, "did you mean 'harmony'"),
        ({"batch_key": "donor", "obsm": ["X_x"]}, DataError, r"no 'X_x'; it has 'X_tool'"),
        ({"batch_key": "donor", "seeds": ()}, ConfigError, "seeds is empty"),
        ({"task": "impute", "obsm": ["X_tool"]}, ConfigError, "task=impute"),
        ({"task": "guess"}, ConfigError, "task='guess': there are integrate, impute"),
        ({"batch_key": "donor", "layer": None}, DataError, "layer"),
        ({"batch_key": "donor", "methods": {"none": broken}}, ConfigError, "built in"),
        ({"batch_key": "donor", "methods": {"mine": 3}}, ConfigError, "'mine' is a int"),
        ({"task": "impute", "mixture": ("kind",)}, DataError, "not all are numbers"),
        ({"task": "impute", "keep": 2.0}, DataError, "keep = 2.0"),
        ({"batch_key": "donor", "hidden_labels": 1.0}, ConfigError, "hidden_labels=1.0"),
        ({"batch_key": "donor", "hidden_labels": 0.5}, ConfigError, "name the labels"),
        ({"batch_key": "dono"}, DataError, "Did you mean 'donor'"),
        ({"batch_key": "donor", "label_key": "donor"}, ConfigError, "a column of batch_key too"),
        ({"batch_key": "donor", "seeds": (-1,)}, ConfigError, r"seeds=\[-1\]"),
        ({"task": "impute", "seeds": (-1,)}, ConfigError, r"seeds=\[-1\]"),
        ({"batch_key": "donor", "seeds": (0, 0)}, ConfigError, "one comes twice"),
        ({"batch_key": "donor", "max_cells": -5}, ConfigError, "max_cells=-5"),
        ({"batch_key": "donor", "n_hvg": 0}, ConfigError, "n_hvg=0"),
        ({"batch_key": "donor", "n_comps": 0}, ConfigError, "n_comps=0"),
        ({"batch_key": "donor", "n_jobs": 0}, ConfigError, "n_jobs=0"),
        ({"batch_key": "donor", "scvi_epochs": 0}, ConfigError, "scvi_epochs=0"),
        ({"batch_key": "gaps"}, DataError, "is missing in 4 of 240 cells"),
        ({"batch_key": "one"}, DataError, "holds one batch only"),
        ({"batch_key": "each"}, DataError, "240 batches of 240 cells, so that most are of one"),
        ({"batch_key": "donor", "label_key": "none"}, DataError, "missing in all but 0 of 240"),
        ({"batch_key": "donor", "out": "/dev/null/x"}, ConfigError, "no folder that you may"),
    ],
)
def test_refusals_come_before_work(cells, settings, error, message, monkeypatch):
    def never(self, *arguments, **named):
        raise AssertionError("a method ran")

    monkeypatch.setattr("genemodel.evaluation.evaluate._Comparison._run", never)
    if settings.get("batch_key") in ("gaps", "one", "each") or settings.get("label_key") == "none":
        cells = cells.copy()
        cells.obs["each"], cells.obs["none"] = cells.obs_names, "nan"
        cells.obs["gaps"] = cells.obs["donor"].where(np.arange(240) > 3)
        cells.obs["one"] = "all"
    with pytest.raises(error, match=message):
        evaluate(cells, **({"layer": "counts"} | settings))


def test_a_handful_of_cells_is_refused(cells):
    with pytest.raises(DataError, match="has 1 cells; fewer than 10"):
        evaluate(cells[:1].copy(), task="impute", layer="counts")


def test_without_scib_metrics_integration_is_refused_before_work(cells, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "scib_metrics" else real(name)
    )
    monkeypatch.setattr("genemodel.evaluation.evaluate._Comparison._run", None)
    with pytest.raises(ConfigError, match=r"scib-metrics.*genemodel\[bench\]"):
        evaluate(cells, layer="counts", batch_key="donor", methods=["none"])


def test_files_that_cannot_be_used_are_refused(tmp_path, cells):
    with pytest.raises(DataError, match="does not exist"):
        evaluate(tmp_path / "no.h5ad", batch_key="donor")
    (tmp_path / "text.h5ad").write_text("not HDF5")
    with pytest.raises(DataError, match=r"text\.h5ad: is named like an HDF5 file"):
        evaluate(tmp_path / "text.h5ad", batch_key="donor")
    with pytest.raises(ConfigError, match="is a file: name a folder"):
        evaluate(cells, batch_key="donor", out=tmp_path / "text.h5ad")
    empty = cells.copy()
    counts = cells.layers["counts"].toarray()
    counts[4] = 0
    empty.layers["counts"] = sp.csr_matrix(counts)
    with pytest.raises(DataError, match="1 cells have no counts at all"):
        evaluate(empty, batch_key="donor", layer="counts")


def test_what_is_not_installed_is_named_with_the_way_to_get_it(monkeypatch):
    absent = Method(lambda adata, conditions: None, packages=("no_such_package_of_ours",))
    monkeypatch.setitem(METHODS["integrate"], "absent", absent)
    monkeypatch.setattr(seurat.shutil, "which", lambda name: None)
    seurat.missing_r.cache_clear()
    chosen, skipped = choose("integrate", None, has_labels=False)
    seurat.missing_r.cache_clear()
    assert "none" in chosen
    assert "no_such_package_of_ours is not installed; pip install" in skipped["absent"]
    assert "no Rscript" in skipped["seurat_cca"]
    assert "apt-get install r-cran-seurat" in skipped["seurat_cca"]
    scvi_is_here = importlib.util.find_spec("scvi") is not None
    assert ("label_key" if scvi_is_here else "scvi is not installed") in skipped["scanvi"]
    assert chosen.keys() | skipped.keys() == METHODS["integrate"].keys()


def test_choosing_methods():
    chosen, skipped = choose("impute", ["magic"], has_labels=False)
    assert list(chosen) == ["none", "magic"]  # the reference is always there
    assert not skipped
    chosen, _ = choose("impute", {"mine": broken}, has_labels=False)
    assert {"none", "magic", "mine"} <= chosen.keys()
    chosen, _ = choose("impute", {"mine": broken, "alra": None}, has_labels=False)
    assert list(chosen) == ["none", "alra", "mine"]


def test_the_verb_runs_from_a_file(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    settings = EvaluateSettings(
        input=tmp_path / "cells.h5ad", out=tmp_path / "out", task="impute", layer="counts",
        methods=("gene_mean",), umaps=False,
    )  # fmt: skip
    text = run(settings)
    assert "gene_mean" in text
    assert (tmp_path / "out" / "report.html").exists()


def test_the_meter_sees_time_and_memory():
    with Meter() as meter:
        block = np.ones(12_000_000)  # 96 MB
        time.sleep(0.1)
        del block
    assert 0.1 <= meter.seconds < 30
    assert 60 < meter.peak_mb < 400


@pytest.fixture(scope="module")
def human_cells():
    from genemodel.simulation.cells import synthetic

    return synthetic(60, species=("human",), n_genes=300, genes_per_cell=80, seed=0)["human"]


def test_a_bundle_is_scored_as_it_is_tuned_and_untrained(random_bundle, human_cells, tmp_path):
    random_bundle.save(tmp_path / "mine" / "bundle")
    found = model_methods(
        loaded([tmp_path / "mine" / "bundle", random_bundle], "integrate"),
        "integrate",
        ("frozen", "lora"),
    )
    assert list(found) == [
        "model mine", "model mine tuned", "model mine lora", "model mine untrained",
        "model 1", "model 1 tuned", "model 1 lora", "model 1 untrained",
    ]  # fmt: skip
    assert found["model mine untrained"].kind == "control"
    conditions = Conditions(batch_key="batch")
    as_it_is = found["model mine"].run(human_cells, conditions)
    np.testing.assert_allclose(found["model 1"].run(human_cells, conditions), as_it_is, atol=1e-5)
    untrained = found["model mine untrained"]
    other = untrained.run(human_cells, conditions)
    assert other.shape == as_it_is.shape
    assert np.abs(other - as_it_is).max() > 1e-3
    np.testing.assert_array_equal(other, untrained.run(human_cells, conditions))
    again = found["model 1"].run(human_cells, conditions)  # the bundle itself is as it was
    np.testing.assert_allclose(again, as_it_is, atol=1e-5)


def test_models_impute_as_they_are_and_tuned(small_start, small_vocabulary, tmp_path, monkeypatch):
    import genemodel as gm
    from genemodel.simulation.cells import synthetic

    bundle = gm.load(small_start / "run" / "bundle", device="cpu")
    cells = synthetic(
        90, species=("human",), n_genes=300, genes_per_cell=60, vocabulary=small_vocabulary
    )["human"]
    cells.var_names = [*cells.var_names[:-1], "of no vocabulary"]
    trained = gm.impute(cells[:, :200].copy(), settings=DecoderSettings(epochs=2))
    trained.save(tmp_path / "lung" / "imputation_model")
    result = evaluate(
        cells, task="impute", batch_key="batch", methods=["gene_mean"],
        models=[bundle, replace(bundle, heads={}), tmp_path / "lung" / "imputation_model"],
    )  # fmt: skip
    assert not result.skipped
    scored = result.table.pivot(index="method", columns="metric", values="value")
    # The second bundle has no count decoder, so that it imputes nothing as it is.
    assert {name for name in scored.index if name.startswith("model")} == {
        "model 0", "model 0 tuned", "model 1 tuned", "model lung",
    }  # fmt: skip
    assert scored["poisson"].notna().all()
    assert scored["poisson"].nunique() == len(scored)
    assert "genes that it does not know at their mean" in result.encoders["model 0"]
    assert "frozen" in result.encoders["model 1 tuned"]
    with pytest.raises(ConfigError, match="cannot impute"):
        evaluate(cells, task="impute", models=[cells])
    renamed = cells.copy()
    renamed.var_names = [f"other {number}" for number in range(cells.n_vars)]
    with pytest.raises(DataError, match="model 0 cannot read these cells: .* Leave it out of"):
        evaluate(renamed, task="impute", models=[trained])
    monkeypatch.setattr("genemodel.imputation.model.LARGEST_IN_MEMORY", 1e5)
    with pytest.raises(ConfigError, match=r"take 0\.0 GB .* with max_cells"):
        evaluate(cells, task="impute", models=[trained])


def test_models_of_one_name_are_told_apart_by_their_folders(random_bundle, tmp_path):
    paths = [tmp_path / a / "lung" / "bundle" for a in ("one", "two")]
    paths.append(tmp_path / "third" / "backbone" / "bundle")
    for path in paths:
        random_bundle.save(path)
    names = [
        name
        for name in model_methods(loaded(paths, "integrate"), "integrate")
        if not name.endswith(" tuned")
    ]
    assert [name for name in names if "untrained" not in name] == [
        "model lung", f"model {paths[1]}", "model third/backbone",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="is named twice"):
        loaded([paths[0], paths[1], paths[1]], "integrate")


def test_it_says_how_many_cells_the_models_were_trained_on(
    random_bundle, human_cells, tmp_path, monkeypatch
):
    from genemodel.bundle.training_manifest import TrainingManifest
    from genemodel.corpus.corpus import Corpus

    corpus = Corpus.build({"ours": human_cells}, tmp_path / "corpus")
    training = TrainingManifest.of(corpus, np.arange(45))
    replace(random_bundle, training=training).save(tmp_path / "known" / "bundle")
    random_bundle.save(tmp_path / "earlier" / "bundle")
    monkeypatch.setattr("genemodel.evaluation.evaluate.model_methods", lambda *models: {})
    monkeypatch.setattr("genemodel.annotation.annotate.MIN_REFERENCE", 10)
    monkeypatch.setattr("genemodel.evaluation.annotation.MIN_REFERENCE", 10)
    result = evaluate(
        human_cells, task="annotate", batch_key="batch", label_key="cell_type",
        methods=["majority"], out=tmp_path / "out",
        models=[tmp_path / name / "bundle" for name in ("known", "earlier")],
    )  # fmt: skip
    text, page = result.text(), (tmp_path / "out" / "report.html").read_text()
    for said in (
        "model known: 45 of 60 cells (75.0 %) were in its training: 45 in ours.",
        "model earlier: unknown whether these cells were in its training",
    ):
        assert said in " ".join(text.split())
        assert said in page
    table = pd.read_csv(tmp_path / "out" / "contamination.csv").set_index("model")
    assert table.loc["model known", ["cells", "in_training"]].tolist() == [60, "45"]
    assert table.at["model earlier", "in_training"] == "unknown"
    assert max(map(len, text.splitlines())) <= 100


def test_our_integration_trains_on_the_cells(human_cells, monkeypatch):
    """The hook hands over the right columns and gives back the right array."""
    import genemodel.integration.integrate

    asked = []

    def integrate(adata, *, batch_key, label_key, model, backbone, seed, missing_labels):
        assert backbone == "frozen" and missing_labels == conditions.reading.missing_labels
        asked.append((batch_key, label_key, model, seed))
        adata.obsm["X_integrated"] = np.full((adata.n_obs, 2), seed, np.float32)

    monkeypatch.setattr(genemodel.integration.integrate, "integrate", integrate)
    conditions = Conditions(batch_key="batch", label_key="cell_type", seed=5)
    for name in ("genemodel", "genemodel_labels"):
        array = METHODS["integrate"][name].run(human_cells, conditions)
        assert array.tolist() == [[5.0, 5.0]] * human_cells.n_obs
    assert asked == [("batch", None, None, 5), ("batch", "cell_type", None, 5)]
    assert "X_integrated" not in human_cells.obsm


def test_our_imputations_share_one_training(human_cells, monkeypatch):
    from genemodel.imputation.model import ImputationModel
    from genemodel.imputation.network import DecoderSettings

    trainings = []
    train = ImputationModel.train

    def brief(counts_CG, codes_C, batches, *, seed):
        trainings.append((batches, seed))
        return train(counts_CG, codes_C, batches, DecoderSettings(epochs=1), seed=seed)

    monkeypatch.setattr(ImputationModel, "train", brief)
    cells = human_cells.copy()
    conditions = Conditions(batch_key="batch", seed=5)
    given = {
        name: METHODS["impute"][name].run(cells, conditions)
        for name in ("genemodel", "genemodel_log", "genemodel_log_half")
    }
    assert trainings == [(tuple(sorted(cells.obs["batch"].unique())), 5)]
    assert isinstance(given["genemodel"], Denoised)
    assert (given["genemodel"].sd > 0).any()
    # The shallower the replicate, the more of its logarithms are those of noughts.
    assert (given["genemodel_log"] > given["genemodel_log_half"]).mean() > 0.5
    assert list(cells.layers) == list(human_cells.layers)


def test_labels_are_hidden_from_those_who_learn_from_them(cells):
    seen = {}

    def learns(adata, conditions):
        seen["learns"] = adata.obs["kind"].copy()
        return adata.obsm["X_tool"]

    def does_not(adata, conditions):
        seen["does not"] = adata.obs["kind"].copy()
        return adata.obsm["X_tool"]

    methods = {
        "learns": Method(learns, labels=True, seeded=True),
        "does not": Method(does_not),
    }
    conditions = Conditions(batch_key="donor", label_key="kind")
    comparison = _Comparison(cells, conditions, methods, (0,), {}, hidden_labels=0.5)
    for name, method in methods.items():
        shown = comparison._with_labels_hidden(0) if method.labels else cells
        comparison._run(name, method, 0, shown, "")
    assert not seen["does not"].isna().any()
    assert 0.4 < seen["learns"].isna().mean() < 0.6
    kept = ~seen["learns"].isna()
    assert (seen["learns"][kept].astype(str) == cells.obs["kind"][kept].astype(str)).all()
    result = EvaluationResult("integrate", pd.DataFrame({"metric": ["total"]}), {}, ["learns"])
    assert "learns learnt from the labels" in result.labels_note()
    result.settings = {"hidden_labels": 0.5}
    assert "50% of the labels" in result.labels_note()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_the_share_of_hidden_labels_is_the_one_asked_for(cells, share):
    conditions = Conditions(batch_key="donor", label_key="kind")
    comparison = _Comparison(cells, conditions, {}, (0,), {}, hidden_labels=share)
    hidden, again, other = (
        comparison._with_labels_hidden(seed).obs["kind"].isna() for seed in (0, 0, 1)
    )
    assert abs(hidden.mean() - share) < 0.07
    assert (hidden == again).all() and (share == 0 or (hidden != other).any())
    assert not cells.obs["kind"].isna().any()
