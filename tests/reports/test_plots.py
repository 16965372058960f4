"""Figures hold what they were given; refusals name what is missing."""

from types import SimpleNamespace

import anndata as ad
import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from genemodel.errors import ConfigError, DataError
from genemodel.reports import pl, plots
from genemodel.reports.comparison import EvaluationResult

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def lab_distance(a: str, b: str) -> float:
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in (a, b)])
    return float(np.linalg.norm(np.subtract(*plots._lab(rgb))))


def curves() -> pd.DataFrame:
    train = pd.DataFrame({"step": range(10, 110, 10), "train/a": np.linspace(3, 1, 10), "lr": 0.1})
    held = pd.DataFrame(
        {"step": [50, 100], "val/a": [2.0, 1.5], "val_trivial/a": 1.8, "val/total": 2}
    )
    return pd.concat([train, held], ignore_index=True)


@pytest.mark.parametrize("n", [1, 8, 9, 24, 40])
def test_colours_are_enough_and_apart(n):
    colours = plots.palette(n)
    assert len(set(colours)) == n
    pairs = [(a, b) for i, a in enumerate(colours) for b in colours[:i]]
    assert all(lab_distance(a, b) > 10 for a, b in pairs)
    assert colours[:8] == plots.palette(8)[:n]


def test_colours_stay_the_same_when_categories_are_added():
    assert plots.palette(24)[:12] == plots.palette(12)


def test_batches_are_sorted_as_a_reader_counts_and_missing_is_grey():
    colours = plots.category_colours(["b10", "b2", "b1", "not given"])
    assert list(colours) == ["b1", "b2", "b10", "not given"]
    assert colours["not given"] == "#B5B5B5"


def test_umap_is_reproducible_and_keeps_groups_apart():
    values = np.concatenate([RNG.normal(0, 1, (60, 8)), RNG.normal(12, 1, (60, 8))])
    xy, at = plots.umap_of(values)
    again, _ = plots.umap_of(values)
    assert (at == np.arange(120)).all() and np.array_equal(xy, again)
    centre = xy[:60].mean(axis=0), xy[60:].mean(axis=0)
    spread = max(xy[:60].std(), xy[60:].std())
    assert np.linalg.norm(centre[0] - centre[1]) > 2 * spread


def test_umap_samples_when_there_are_many_cells():
    xy, at = plots.umap_of(RNG.normal(size=(200, 4)), most=50)
    assert xy.shape == (50, 2) and len(np.unique(at)) == 50 and (np.diff(at) > 0).all()


def test_the_fuzzy_graph_obeys_its_definition():
    values = RNG.normal(size=(80, 5))
    distance = np.linalg.norm(values[:, None] - values[None], axis=2)
    index = np.argsort(distance, axis=1)[:, :10]
    near = np.take_along_axis(distance, index, axis=1)
    graph = plots._fuzzy_graph(index, near).toarray()
    np.testing.assert_allclose(graph, graph.T, atol=1e-6)
    assert graph.max() == pytest.approx(1.0) and (np.diag(graph) == 0).all()
    # The nearest neighbour of every cell is joined with full weight.
    assert graph[np.arange(80), index[:, 1]] == pytest.approx(np.ones(80))


def test_grid_shares_limits_colours_and_one_legend_per_row():
    obs = pd.DataFrame({"cell_type": list("abc") * 20, "batch": ["x", "y"] * 30})
    axes = plots.embedding_grid(
        {"before": RNG.normal(size=(60, 2)), "after": 100 * RNG.normal(size=(60, 2))},
        obs,
        ["cell_type", "batch"],
    )
    assert axes.shape == (2, 2)
    assert len({ax.get_xlim() for ax in axes.ravel()}) == 1
    assert [ax.get_legend() is not None for ax in axes.ravel()] == [False, True, False, True]
    assert [t.get_text() for t in axes[0, 1].get_legend().get_texts()] == ["a", "b", "c"]
    assert "60 cells" in axes[0, 0].get_title()
    assert all(ax.collections[0].get_rasterized() for ax in axes.ravel())
    assert axes[0, 0].collections[0].get_offsets().max() <= 1.0


def test_many_categories_are_named_on_the_plot_and_numbers_get_a_colour_bar():
    names = [f"type {i}" for i in range(25)] * 4
    ax = plots.embedding_panel(RNG.normal(size=(100, 2)), names)
    assert {t.get_text() for t in ax.texts} == set(names)
    ax = plots.embedding_panel(RNG.normal(size=(100, 2)), RNG.normal(size=100), title="depth")
    assert ax.get_legend() is None and len(ax.child_axes) == 1


def test_loss_curves_show_training_held_out_and_the_trivial_predictor():
    assert plots.curve_names(curves()) == ["a"]
    (ax,) = plots.loss_curves(curves(), {"a": 1.8})
    labels = [line.get_label() for line in ax.lines]
    assert labels == ["training", "held-out cells", "trivial predictor"]
    assert list(ax.lines[1].get_ydata()) == [2.0, 1.5]
    assert ax.lines[2].get_ydata()[0] == 1.8
    low, high = ax.get_ylim()
    assert low < 1.0 and high > 3.0


def test_an_early_spike_does_not_flatten_the_curve():
    table = pd.DataFrame(
        {"step": range(1, 1001), "train/a": [1e6] * 10 + [1.0] * 495 + [2.0] * 495}
    )
    (ax,) = plots.loss_curves(table)
    assert ax.get_ylim()[1] < 3


def test_throughput_draws_what_is_there():
    axes = plots.throughput_curves(curves())
    assert [ax.get_title() for ax in axes] == ["learning rate"]
    with pytest.raises(DataError, match="none of lr, grad_norm"):
        plots.throughput_curves(curves()[["step", "train/a"]])


def test_calibration_draws_methods_and_deciles():
    axes = plots.calibration(
        [0.5, 0.9], {"ours": [0.52, 0.91], "other": [0.3, 0.6]},
        by_decile=pd.Series(np.full(10, 0.89), index=range(1, 11)), n=1000,
    )  # fmt: skip
    assert len(axes) == 2
    assert [line.get_label() for line in axes[0].lines] == ["exact", "ours", "other"]
    assert "1,000 counts" in axes[0].get_title()
    assert list(axes[1].lines[1].get_ydata()) == [0.89] * 10
    with pytest.raises(DataError, match="3 coverages for 2 nominal levels"):
        plots.calibration([0.5, 0.9], [0.1, 0.2, 0.3])


def test_gene_plots_draw_every_gene():
    mean = RNG.gamma(1.0, 1.0, 50)
    ax = plots.mean_variance({"observed": (mean, 2 * mean), "predicted": (mean, mean)})
    assert [len(c.get_offsets()) for c in ax.collections] == [50, 50]
    ax = plots.zero_fraction(np.full(30, 0.5), np.full(30, 0.6))
    assert "30 genes, mean difference 0.100" in ax.get_title()


def test_bars_say_what_was_not_computed():
    table = pd.DataFrame({"bio": [0.5, 0.6], "batch": [np.nan, 0.2]}, index=["PCA", "ours"])
    axes = plots.metric_bars(table, highlight=["ours"])
    assert {t.get_text().strip() for t in axes[1].texts} == {"not computed", "0.200"}
    with pytest.raises(DataError, match="empty"):
        plots.metric_bars(table.iloc[:0])
    wide = pd.DataFrame(np.ones((3, 6)), columns=list("abcdef"))
    axes = plots.metric_bars(wide)
    assert [ax.get_title() for ax in axes] == list("abcdef")
    # As wide as a page of a window of 1,200 pixels shows nearly unshrunk.
    assert axes[0].figure.get_size_inches()[0] * 96 < 1_020


def test_confusion_rows_are_shares_and_unknown_stands_last():
    ax = plots.confusion(["a", "a", "b", "b"], ["a", "b", "b", None])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b", "unknown"]
    np.testing.assert_allclose(ax.images[0].get_array(), [[0.5, 0.5, 0], [0, 0.5, 0.5]])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a (2)", "b (2)"]


# -- gm.pl ------------------------------------------------------------------------------------


@pytest.fixture
def adata() -> ad.AnnData:
    obs = pd.DataFrame(
        {"cell_type": list("ab") * 15, "batch": ["x"] * 15 + ["y"] * 15},
        index=[str(i) for i in range(30)],
    )
    cells = ad.AnnData(np.ones((30, 3), np.float32), obs=obs)
    cells.obsm["X_pca"] = RNG.normal(size=(30, 2))
    cells.obsm["X_genemodel"] = RNG.normal(size=(30, 6))
    return cells


def test_embedding_leaves_out_missing_default_columns_only(adata):
    axes = pl.embedding(adata, "X_pca")
    assert [ax.get_ylabel() for ax in axes] == ["cell type", "batch"]
    with pytest.raises(DataError, match="no column 'donor'; it has cell_type, batch"):
        pl.embedding(adata, "X_pca", color=["donor"])
    with pytest.raises(DataError, match=r"no 'X_scVI'; it has X_pca, X_genemodel"):
        pl.embedding(adata, "X_scVI")


def test_integration_puts_before_left_of_after(adata):
    axes = pl.integration(adata)
    assert axes.shape == (2, 2)
    assert axes[0, 0].get_title().startswith("before (X_pca)")
    assert axes[0, 1].get_title().startswith("after (X_genemodel)")
    adata.obsm["X_integrated"] = RNG.normal(size=(30, 2))
    axes = pl.integration(adata)
    assert axes[0, 1].get_title().startswith("after (X_integrated)")


def test_training_reads_a_run_and_refuses_another_folder(tmp_path):
    table = curves()
    table.iloc[:10][["step", "train/a", "lr"]].to_csv(tmp_path / "metrics.csv", index=False)
    table.iloc[10:][["step", "val/a", "val_trivial/a"]].to_csv(
        tmp_path / "validation.csv", index=False
    )
    axes = pl.training(tmp_path)
    assert [ax.get_title() for ax in axes] == ["a", "learning rate"]
    assert axes[0].lines[2].get_ydata()[0] == 1.8
    with pytest.raises(DataError, match=r"holds no metrics\.csv"):
        pl.training(tmp_path / "elsewhere")
    (tmp_path / "metrics.csv").write_text("")
    with pytest.raises(DataError, match="not a readable table"):
        pl.training(tmp_path)


def test_public_calibration_is_the_figure_of_the_room():
    assert len(pl.calibration([0.5], [0.4])) == 1


def test_corpus_draws_the_largest_sources():
    corpus = SimpleNamespace(
        source_C=np.repeat([0, 1, 2], [5, 20, 10]),
        library_C=RNG.integers(100, 200, 35),
        n_genes_C=RNG.integers(10, 20, 35),
        sources=[SimpleNamespace(name=n, species="human") for n in ("s0", "s1", "s2")],
    )
    corpus = type("C", (), {**vars(corpus), "__len__": lambda self: 35})()
    axes = pl.corpus(corpus, most_sources=2)
    assert [t.get_text() for t in axes[0].get_yticklabels()] == ["s1 (human)", "s2 (human)"]
    assert "largest 2 shown" in axes[0].figure.get_suptitle()
    with pytest.raises(ConfigError, match="most_sources=0"):
        pl.corpus(corpus, most_sources=0)


def _compared(task="integrate"):
    rows = [
        ("ours", "ours", "total", 0.8), ("none", "baseline", "total", 0.5),
        ("ours", "ours", "bio", 0.7), ("none", "baseline", "bio", 0.6),
        ("ours", "ours", "batch", 0.9), ("none", "baseline", "batch", 0.3),
        ("ours", "ours", "ilisi", 0.9), ("none", "baseline", "ilisi", 0.1),
    ]  # fmt: skip
    table = pd.DataFrame(
        [(m, k, 0, name, v) for m, k, name, v in rows],
        columns=["method", "kind", "seed", "metric", "value"],
    )
    return EvaluationResult(task, table, {})


def test_scores_draw_the_three_that_matter_and_ours_in_colour():
    axes = pl.scores(_compared())
    assert [ax.get_title() for ax in axes] == ["bio", "batch", "total"]
    bars = [bar.get_facecolor() for bar in axes[0].patches]
    assert bars[0] != bars[1]
    assert axes[0].get_xlabel() == "higher is better"
    assert [ax.get_title() for ax in pl.scores(_compared(), metrics=["ilisi"])] == ["ilisi"]
    with pytest.raises(DataError, match="no metric 'nmi'; it has .*total"):
        pl.scores(_compared(), metrics=["nmi"])


def test_coverage_draws_every_method_in_the_order_of_the_scores():
    with pytest.raises(DataError, match="task='impute'"):
        pl.coverage(_compared())
    result = _compared("impute")
    result.coverage = pd.DataFrame(
        [
            (method, level, group, level - off)
            for method, off in (("none", 0.2), ("ours", 0.0))
            for level in (0.9, 0.5)
            for group in ("all", "1")
        ],
        columns=["method", "level", "entries", "coverage"],
    )
    ax, per_decile = pl.coverage(result)
    assert [line.get_color() for line in per_decile.lines[-2:]] == [
        line.get_color() for line in ax.lines[-2:]
    ]
    lines = {line.get_label(): line for line in ax.lines}
    assert set(lines) == {"exact", "ours", "none"}
    assert list(lines["ours"].get_xdata()) == [0.5, 0.9]
    assert np.allclose(lines["none"].get_ydata(), [0.3, 0.7])


def test_one_layout_is_drawn_once_per_column_with_a_legend_each(adata):
    adata.obs["depth"] = RNG.random(adata.n_obs)
    axes = pl.embedding(adata, "X_pca", color=["cell_type", "depth", "batch"])
    assert [ax.get_ylabel() for ax in axes] == ["cell type", "depth", "batch"]
    assert [ax.get_legend() is None for ax in axes] == [False, True, False]
    assert len(axes[1].child_axes) == 1


def test_annotation_draws_shares_of_the_known_type(adata):
    with pytest.raises(DataError, match="no column 'genemodel_label'; it has cell_type, batch"):
        pl.annotation(adata)
    adata.obs["genemodel_label"] = adata.obs["cell_type"].astype(str)
    shares = pl.annotation(adata).images[0].get_array()
    assert np.allclose(shares, np.eye(len(shares)))


def test_intervals_keep_the_order_and_refuse_unequal_lengths():
    one, two = ([1.0, 2.0], [0.5, 1.5], [1.5, 2.5]), ([1.0, 2.0], [-3.0, 0.0], [5.0, 4.0])
    ax = pl.intervals({"raw": one, "pooled": two}, ["A", "B"], xlabel="x")
    names = {
        round(y): text.get_text()
        for y, text in zip(ax.get_yticks(), ax.get_yticklabels(), strict=True)
    }
    assert names == {1: "A", 0: "B"}
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["raw", "pooled"]
    assert ax.lines[0].get_ydata()[0] > ax.lines[0].get_ydata()[1], "the first is on top"
    with pytest.raises(DataError, match="raw: 2 estimates, 1 lower and 2 upper ends for 2 names"):
        pl.intervals({"raw": ([1, 2], [0], [2, 3])}, ["A", "B"])
    with pytest.raises(DataError, match="no estimates"):
        pl.intervals({}, ["A"])


def _every_plot() -> dict[str, tuple[tuple[object, ...], dict[str, object]]]:
    cells = ad.AnnData(
        obs=pd.DataFrame(
            {
                "cell_type": list("ab") * 10,
                "batch": list("xxyy") * 5,
                "genemodel_label": ["a"] * 20,
            },
            index=[str(i) for i in range(20)],
        ),
        obsm={"X_umap": RNG.normal(size=(20, 2)), "X_integrated": RNG.normal(size=(20, 2))},
    )
    return {
        "embedding": ((cells,), {"color": ["batch", "cell_type", "genemodel_label"]}),
        "integration": ((cells,), {"before": "X_umap"}),
        "annotation": ((cells,), {}),
        "calibration": (([0.5, 0.9], [0.4, 0.8]), {}),
        "intervals": (({"one": ([1.0], [0.5], [2.0])}, ["g"]), {}),
    }


@pytest.mark.parametrize("name", list(_every_plot()))
def test_plots_take_axes_and_files_as_scanpys_do(name, tmp_path, monkeypatch):
    given, options = _every_plot()[name]
    own = np.ravel(getattr(pl, name)(*given, **options, save=tmp_path / "own.svg"))
    assert (tmp_path / "own.svg").stat().st_size > 1000
    plt.close("all")
    figure, axes = plt.subplots(2, 4)
    mine = axes.ravel()[: len(own)]
    size = figure.get_size_inches().copy()
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.append(True))
    drawn = getattr(pl, name)(
        *given, **options, ax=mine if len(mine) > 1 else mine[0], show=True,
        save=tmp_path / "mine.png",
    )  # fmt: skip
    assert list(np.ravel(drawn)) == list(mine) and shown == [True]
    assert all(ax.has_data() for ax in mine) and not axes.ravel()[len(own)].has_data()
    assert plt.get_fignums() == [figure.number] and (figure.get_size_inches() == size).all()
    assert (tmp_path / "mine.png").exists()
    with pytest.raises(ConfigError, match=f"and this plot has {len(own)} panels"):
        getattr(pl, name)(*given, **options, ax=axes)
    if len(own) > 1:
        with pytest.raises(ConfigError, match="too few axes"):
            getattr(pl, name)(*given, **options, ax=axes[0, 0])
    with pytest.raises(ConfigError, match="name a file in a folder that is there"):
        getattr(pl, name)(*given, **options, save=tmp_path / "none" / "a.png")


def test_every_public_plot_says_what_it_takes():
    import inspect

    for name in pl.__all__:
        plot = getattr(pl, name)
        assert {"ax", "show", "save"} <= set(inspect.signature(plot).parameters), name
        assert "\nsave\n    File to write it to" in plot.__doc__, name


def attention_result(**changes):
    from genemodel.networks.attention import AttentionResult

    rng = np.random.default_rng(0)
    weights = rng.gamma(2.0, 0.5, (2, 6, 6)).astype(np.float32)
    weights[:, 0, 5] = np.nan
    made = AttentionResult(
        [f"G{i}" for i in range(6)], weights, np.full((6, 6), 20), [(0, 0), (1, 0)],
        {"cells": 20, "relative": True},
    )  # fmt: skip
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def test_attention_is_drawn_as_it_is(tmp_path):
    result = attention_result()
    ax = pl.attention(result, layer=1, cluster=False, save=tmp_path / "a.png")
    drawn = ax.images[0].get_array()
    np.testing.assert_array_equal(drawn.mask, np.isnan(result.weights[1]))
    np.testing.assert_array_equal(drawn.compressed(), result.weights[1][~drawn.mask])
    assert [label.get_text() for label in ax.get_yticklabels()] == result.genes
    assert (tmp_path / "a.png").stat().st_size > 1000
    ordered = pl.attention(result)
    names = [label.get_text() for label in ordered.get_xticklabels()]
    mean = result.matrix().loc[names, names].to_numpy()
    np.testing.assert_array_equal(ordered.images[0].get_array().filled(np.nan), mean)
    assert sorted(names) == result.genes and "mean of heads, 20 cells" in ordered.get_title()
    own = plt.figure().gca()
    assert pl.attention(result, genes=["G1", "G2"], ax=own) is own


def test_attention_that_is_not_there_is_refused():
    adata = ad.AnnData(np.zeros((2, 2), np.float32))
    with pytest.raises(DataError, match="Compute it first with genemodel.attention"):
        pl.attention(adata)
    with pytest.raises(DataError, match="'G9' is not in the result; it has G0"):
        pl.attention(attention_result(), genes=["G9"])
    with pytest.raises(DataError, match="no layer 4"):
        pl.attention(attention_result(), layer=4)
    with pytest.raises(DataError, match="nothing can be drawn"):
        pl.attention(attention_result(weights=np.full((2, 6, 6), np.nan, np.float32)))
