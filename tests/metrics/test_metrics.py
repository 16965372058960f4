"""Scores of embeddings: against scib-metrics' own benchmark, and on toys whose answer is known."""

import numpy as np
import pandas as pd
import pytest

from genemodel.errors import DataError
from genemodel.metrics.scib import (
    BATCH,
    BIO,
    _Measure,
    _with_totals,
    score_cell_types,
    score_embeddings,
    undefined_of,
)


def toy(n=60, n_types=3, n_batches=2, shift=0.0, spread=0.3, seed=0):
    """Types on the corners of a simplex, batches moved apart by ``shift`` along one more axis."""
    draw = np.random.default_rng(seed)
    label = np.repeat(np.arange(n_types), n)
    batch = np.tile(np.arange(n_batches), n_types * n // n_batches)
    place = spread * draw.standard_normal((len(label), n_types + 1))
    place[np.arange(len(label)), label] += 3.0
    place[:, -1] += shift * batch
    return place.astype(np.float32), batch.astype(str), np.array([f"type {i}" for i in label])


@pytest.fixture(scope="module")
def scored():
    """Three embeddings scored once: scib-metrics compiles for most of a minute, only at first."""
    pytest.importorskip("scib_metrics", reason="needs pip install 'genemodel[bench]'")
    apart, batch, label = toy(shift=4.0)
    mixed, _, _ = toy(shift=0.0)
    # As a method gives it: scores are those of float32, and scib-metrics' kBET multiplies the last
    # bits of the coordinates until they move a cell.
    noise = np.random.default_rng(1).standard_normal(mixed.shape).astype(np.float32)
    table = score_embeddings(
        {"none": apart, "mixed": mixed, "noise": noise}, batch, label, extra=True
    )
    return table, {"none": apart, "mixed": mixed, "noise": noise}, batch, label


def test_totals_are_weighted_as_in_the_scib_study():
    rows = {name: [0.1 * i] for i, name in enumerate((*BIO, *BATCH))}
    table = _with_totals(pd.DataFrame(rows, index=["a"]))
    assert table.loc["a", "bio"] == pytest.approx(0.2)
    assert table.loc["a", "batch"] == pytest.approx(0.7)
    assert table.loc["a", "total"] == pytest.approx(0.6 * 0.2 + 0.4 * 0.7)


def test_what_labels_and_batches_cannot_say_is_known_before():
    batch = np.array(["a"] * 6 + ["b"] * 6)
    one = undefined_of(batch, np.array(["x"] * 6 + ["y"] * 6))
    assert set(one) == {"bras", "kbet", "batch", "total", "knn_accuracy_across"}
    assert set(one.values()) == {"no label occurs in two batches"}
    assert undefined_of(batch, np.array(["x"] * 7 + ["y"] * 5)) == {}  # x is in both
    lone = undefined_of(batch, np.array(["x"] * 5 + ["pair"] * 2 + ["y"] * 5))
    assert set(lone) == {"bras", "kbet", "batch", "total"} and "of another" in lone["bras"]
    assert undefined_of(batch, None) == undefined_of(None, batch) == {}


def test_a_metric_without_a_value_is_told_and_the_others_go_on(caplog):
    measure = _Measure(lambda metric: None, "tool", {"bras": "nothing is shared"})

    def fails():
        raise ValueError("empty\nmore")

    assert np.isnan(measure("bras", fails)) and np.isnan(measure("kbet", fails))
    assert measure("ilisi", lambda: 0.5) == 0.5
    assert measure.failed == {"kbet": "empty"} and "tool: kbet has no value: empty" in caplog.text
    with pytest.raises(KeyboardInterrupt):
        measure("pcr", lambda: (_ for _ in ()).throw(KeyboardInterrupt))


@pytest.mark.slow
def test_totals_equal_scib_metrics_benchmark(scored):
    anndata = pytest.importorskip("anndata")
    benchmark = pytest.importorskip("scib_metrics.benchmark")
    table, embeddings, batch, label = scored
    adata = anndata.AnnData(np.zeros((len(batch), 1), np.float32))
    adata.obs["b"], adata.obs["l"] = pd.Categorical(batch), pd.Categorical(label)
    adata.obsm.update(embeddings)
    judge = benchmark.Benchmarker(
        adata, "b", "l", list(embeddings), pre_integrated_embedding_obsm_key="none",
        progress_bar=False,
    )  # fmt: skip

    def exact(array, k):
        from scib_metrics.nearest_neighbors import NeighborsResults
        from sklearn.neighbors import NearestNeighbors

        search = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(array)
        distance, index = search.kneighbors(array)
        return NeighborsResults(indices=index, distances=distance.astype(np.float32))

    judge.prepare(exact)
    judge.benchmark()
    theirs = judge.get_results().drop(index="Metric Type").astype(float)
    for ours, name in (("bio", "Bio conservation"), ("batch", "Batch correction"),
                       ("total", "Total"), ("kbet", "KBET"), ("ilisi", "iLISI")):  # fmt: skip
        np.testing.assert_allclose(table[ours], theirs.loc[table.index, name], atol=1e-6)


@pytest.mark.slow
def test_aggregates_are_the_means_of_their_parts(scored):
    table = scored[0]
    np.testing.assert_allclose(table["bio"], table[list(BIO)].mean(axis=1))
    np.testing.assert_allclose(table["batch"], table[list(BATCH)].mean(axis=1))
    np.testing.assert_allclose(table["total"], 0.6 * table["bio"] + 0.4 * table["batch"])


@pytest.mark.slow
def test_known_answers(scored):
    table = scored[0]
    assert table.loc["none", "pcr"] == 0.0  # nothing gained over itself
    assert table.loc["mixed", "total"] > table.loc["none", "total"]
    assert table.loc["mixed", "kmeans_ari"] == pytest.approx(1.0)
    assert table.loc["mixed", "knn_accuracy"] == 1.0
    assert abs(table.loc["noise", "kmeans_ari"]) < 0.1
    # neighbours never cross batches that lie far apart: ratio to chance = 1 / (chance of the type)
    n_own, n_type = 30, 60
    assert table.loc["none", "same_batch_ratio"] == pytest.approx((n_type - 1) / (n_own - 1))


@pytest.mark.slow
def test_cells_and_names_may_come_in_any_order(scored):
    table, embeddings, batch, label = scored
    order = np.random.default_rng(3).permutation(len(batch))
    renamed = np.array([{"0": "z", "1": "a"}[b] for b in batch])
    again = score_embeddings(
        {"mixed": embeddings["mixed"][order]}, renamed[order], label[order],
        pre=embeddings["none"][order],
    )  # fmt: skip
    exact = ["silhouette_label", "clisi", "ilisi", "bras", "pcr", "graph_connectivity"]
    np.testing.assert_allclose(again.loc["mixed", exact], table.loc["mixed", exact], atol=1e-4)


@pytest.mark.slow
def test_without_labels_only_mixing_is_scored(scored):
    _, embeddings, batch, _ = scored
    table = score_embeddings(embeddings, batch)
    assert table[["bio", "batch", "total"]].isna().all(axis=None)
    mean = table[["ilisi", "pcr", "kbet_all_cells"]].mean(axis=1)
    np.testing.assert_allclose(table["batch_unlabelled"], mean)
    assert table.loc["mixed", "batch_unlabelled"] > table.loc["none", "batch_unlabelled"]


@pytest.mark.slow
def test_with_one_batch_only_biology_is_scored(scored):
    _, embeddings, _, label = scored
    table = score_embeddings({"mixed": embeddings["mixed"]}, None, label)
    assert table.loc["mixed", "bio"] > 0.8
    assert np.isnan(table.loc["mixed", "batch"])
    assert np.isnan(table.loc["mixed", "total"])


@pytest.mark.slow
def test_cells_without_a_label_take_no_part(scored):
    table, embeddings, batch, label = scored
    extra = np.full((25, 4), 50.0, np.float32)  # would change every score
    place = np.vstack([extra, embeddings["none"]])
    some = np.array([None] * 20 + [np.nan] * 5 + list(label), dtype=object)
    again = score_embeddings({"none": place}, np.array(["0"] * 25 + list(batch)), some)
    assert again.attrs["n_cells"] == len(batch)
    np.testing.assert_allclose(
        again.loc["none", list(BIO)], table.loc["none", list(BIO)], atol=1e-6
    )


def test_cell_type_table_names_the_type_that_vanished():
    place, batch, label = toy(n=60)
    before = place.copy()
    merged = place.copy()
    lost = label == "type 2"
    merged[lost] = place[label == "type 1"]
    table = score_cell_types({"none": before, "merged": merged}, batch, label, pre=before)
    table = table.set_index(["method", "cell_type"])
    assert table.loc[("none", "type 2"), "lost_into"] == ""
    assert table.loc[("merged", "type 2"), "lost_into"] == "type 1"
    assert table.loc[("merged", "type 2"), "knn_accuracy"] < 0.8
    assert table.loc[("none", "type 2"), "knn_accuracy"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, b, la: (e, b[:-1], la), r"batch has 179 entries .* 180 rows"),
        (lambda e, b, la: ({"x": e["none"]}, b, la), r"pass pre="),
        (lambda e, b, la: ({"none": e["none"][:, 0]}, b, la), r"'none' has shape \(180,\)"),
        (lambda e, b, la: (e | {"bad": e["none"] * np.nan}, b, la), r"'bad' .* not finite in 180"),
        (lambda e, b, la: (e, np.zeros(180), None), r"nothing to score against"),
        (lambda e, b, la: ({}, b, la), r"no embedding"),
        (lambda e, b, la: (e, [None, *b[1:]], la), r"batch is missing for 1 of 180"),
    ],
)
def test_refusals_name_what_is_wrong(change, message):
    place, batch, label = toy()
    with pytest.raises(DataError, match=message):
        score_embeddings(*change({"none": place}, batch, label))
