"""Light metrics against toys worked out by hand and against slow, obvious versions."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from genemodel.errors import ConfigError, DataError
from genemodel.metrics import light as lm

RNG = np.random.default_rng(0)


def blobs(centres: list[tuple[float, float]], n: int, sd: float = 0.3, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(centre, sd, (n, 2)) for centre in centres])


# Six cells on a line: two groups of three, ten apart.
LINE = np.array([[0.0], [1.0], [2.0], [10.0], [11.0], [12.0]])
LINE_LABEL = ["a", "a", "b", "b", "b", "b"]


def test_neighbours_are_those_of_a_full_distance_matrix():
    values = RNG.normal(size=(60, 5))
    distance = np.linalg.norm(values[:, None] - values[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    index, found = lm.neighbours(values, 7)
    assert (index == np.argsort(distance, axis=1)[:, :7]).all()
    np.testing.assert_allclose(found, np.sort(distance, axis=1)[:, :7], atol=1e-4)


def test_a_cell_is_never_its_own_neighbour_among_duplicates():
    index, _ = lm.neighbours(np.zeros((20, 3)), 5)
    assert index.shape == (20, 5)
    assert not (index == np.arange(20)[:, None]).any()


def test_cross_batch_neighbours_are_all_of_other_batches_and_nearest():
    values = RNG.normal(size=(50, 4))
    batch = np.arange(50) % 3
    index = lm.cross_batch_neighbours(values, batch, 6)
    distance = np.linalg.norm(values[:, None] - values[None], axis=2)
    distance[batch[:, None] == batch[None]] = np.inf
    assert (index == np.argsort(distance, axis=1)[:, :6]).all()


def test_cross_batch_neighbours_say_where_there_are_too_few():
    index = lm.cross_batch_neighbours(np.arange(4.0)[:, None], ["x", "x", "x", "y"], 2)
    assert index.tolist() == [[3, -1], [3, -1], [3, -1], [2, 1]]


def test_knn_accuracy_by_hand():
    line = np.array([[0.0], [0.9], [2.0], [10.0], [11.0], [12.5]])
    predicted = lm.knn_predict(line, LINE_LABEL, k=2)
    # 0 -> 1(a), 2(b): tie, nearer a. 1 -> 0(a), 2(b): a. 2 -> 1(a), 0(a): a, wrong. Others b.
    assert predicted.tolist() == ["a", "a", "a", "b", "b", "b"]
    assert lm.knn_accuracy(line, LINE_LABEL, k=2) == pytest.approx(5 / 6)
    assert lm.knn_accuracy(line, LINE_LABEL, k=2, average="label") == pytest.approx((1 + 3 / 4) / 2)


def test_knn_accuracy_across_batches_ignores_own_batch_and_unshared_labels():
    # Within its batch every cell sits beside its own label; across batches the labels are swapped.
    values = np.array([[0.0], [0.1], [5.0], [5.1], [0.3], [0.4], [5.3], [5.4], [9.0]])
    label = ["a", "a", "b", "b", "b", "b", "a", "a", "only here"]
    batch = [1, 1, 1, 1, 2, 2, 2, 2, 2]
    assert lm.knn_accuracy(values, label, k=1) == pytest.approx(8 / 9)
    assert lm.knn_accuracy(values, label, batch=batch, k=2) == 0.0
    # Whoever nothing could vote for is no error, and alone nobody can be judged.
    label[4:] = ["a", "a", "b", "b", "only here"]
    assert lm.knn_accuracy(values, label, batch=batch, k=2) == 1.0
    assert lm.knn_accuracy(values, label, batch=batch, k=2, average="label") == 1.0
    assert np.isnan(lm.knn_accuracy(values, np.arange(9), batch=batch, k=2))


def test_missing_labels_neither_vote_nor_count():
    line = np.array([[0.0], [0.9], [2.0], [10.0], [11.0], [12.5]])
    label = ["a", "a", None, "b", np.nan, "b"]
    assert lm.knn_accuracy(line, label, k=1) == 1.0
    assert lm.knn_predict(line, [None] * 6, k=1).tolist() == [None] * 6


def test_silhouette_by_hand():
    # Labels a: 0, 1; b: 10, 11. Cell 0: within 1, other mean 10.5 -> 1 - 1/10.5; cell 1: 1 - 1/9.5.
    values = np.array([[0.0], [1.0], [10.0], [11.0]])
    expected = np.mean([1 - 1 / 10.5, 1 - 1 / 9.5, 1 - 1 / 9.5, 1 - 1 / 10.5])
    assert lm.silhouette(values, ["a", "a", "b", "b"]) == pytest.approx(expected)
    assert np.isnan(lm.silhouette(values, ["a"] * 4))


def test_batch_silhouette_is_one_when_mixed_and_low_when_apart():
    mixed = RNG.normal(size=(400, 3))
    batch, label = np.arange(400) % 2, np.zeros(400)
    assert lm.batch_silhouette(mixed, batch, label) > 0.97
    apart = mixed + 50 * batch[:, None]
    assert lm.batch_silhouette(apart, batch, label) < 0.1
    assert np.isnan(lm.batch_silhouette(mixed, np.zeros(400), label))


def test_same_batch_share_by_hand():
    # Pairs of one batch each: the nearest neighbour is always of the own batch; chance is 1/3.
    values = np.array([[0.0], [0.1], [5.0], [5.1]])
    table = lm.same_batch_share(values, ["x", "x", "y", "y"], k=1)
    assert table.loc["all", ["observed", "expected", "ratio"]].tolist() == pytest.approx(
        [1, 1 / 3, 3]
    )


def test_same_batch_share_is_one_under_random_mixing_of_uneven_batches():
    values = RNG.normal(size=(1500, 4))
    batch = RNG.choice(["x", "y", "z"], 1500, p=[0.8, 0.15, 0.05])
    label = RNG.choice(["a", "b"], 1500)
    table = lm.same_batch_share(values, batch, label, k=15)
    assert list(table.index) == ["a", "b", "all"]
    assert table["ratio"].between(0.95, 1.05).all()
    # Composition alone (type a only in x) must not look like a batch effect.
    batch[label == "a"] = "x"
    table = lm.same_batch_share(values + 30 * (label == "a")[:, None], batch, label, k=15)
    assert np.isnan(table.loc["a", "ratio"])
    assert 0.9 < table.loc["all", "ratio"] < 1.1


def test_graph_connectivity_by_hand():
    # Label a lies in two places too far apart to be joined by k=1 edges: half of it is connected.
    values = np.array([[0.0], [0.1], [100.0], [100.1], [50.0], [50.1]])
    assert lm.graph_connectivity(values, ["a", "a", "a", "a", "b", "b"], k=1) == pytest.approx(0.75)


@pytest.mark.parametrize("method", ["kmeans", "leiden"])
def test_clusters_agree_with_separate_blobs_and_not_with_random_labels(method):
    if method == "leiden":
        pytest.importorskip("igraph")
    values = blobs([(0, 0), (10, 0), (0, 10)], 60)
    label = np.repeat(["a", "b", "c"], 60)
    assert lm.cluster_agreement(values, label, method=method) == pytest.approx({"nmi": 1, "ari": 1})
    shuffled = RNG.permutation(label)
    assert lm.cluster_agreement(values, shuffled, method=method)["nmi"] < 0.1


def test_cluster_agreement_refuses_an_unknown_method():
    with pytest.raises(ConfigError, match=r"'ward' is unknown; use 'kmeans' or 'leiden'"):
        lm.cluster_agreement(LINE, LINE_LABEL, method="ward")


def test_lisi_by_hand():
    # Two places of two cells, k=1: each sees one batch only, an index of 1.
    values = np.array([[0.0], [0.1], [9.0], [9.1]])
    assert lm.lisi(values, ["x", "x", "y", "y"], k=1) == 0.0
    assert lm.lisi(values, ["x", "x", "y", "y"], k=1, kind="label") == 1.0
    # All three others: shares 1/3, 2/3 -> index 1 / (1/9 + 4/9) = 1.8.
    assert lm.lisi(values, ["x", "x", "y", "y"], k=3) == pytest.approx(0.8)
    assert np.isnan(lm.lisi(values, ["x"] * 4, k=3))


def test_pcr_equals_regression_of_every_component():
    values = RNG.normal(size=(90, 4)) + np.repeat([0.0, 1.0, 3.0], 30)[:, None] * [1, 2, 0, 0]
    batch = np.repeat(["x", "y", "z"], 30)
    centred = values - values.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    design = pd.get_dummies(batch).to_numpy(float)
    r2 = []
    for component in (u * s).T:
        fit = design @ np.linalg.lstsq(design, component, rcond=None)[0]
        r2.append(1 - ((component - fit) ** 2).sum() / ((component - component.mean()) ** 2).sum())
    expected = float((np.array(r2) * s**2).sum() / (s**2).sum())
    assert lm.pcr(values, batch) == pytest.approx(expected, abs=1e-6)
    rotation = np.linalg.qr(RNG.normal(size=(4, 4)))[0]
    assert lm.pcr(values @ rotation, batch) == pytest.approx(expected, abs=1e-5)
    corrected = values - pd.DataFrame(values).groupby(batch).transform("mean").to_numpy()
    assert lm.pcr_comparison(values, corrected, batch) == pytest.approx(1.0)
    assert lm.pcr_comparison(corrected, values, batch) == 0.0


@pytest.fixture
def merged() -> dict[str, object]:
    """Types a, b in both batches, c in batch y only."""
    label = np.array(["a"] * 80 + ["b"] * 80 + ["a"] * 80 + ["b"] * 80 + ["c"] * 80)
    batch = np.array(["x"] * 160 + ["y"] * 240)
    centre = {"a": (0, 0), "b": (10, 0), "c": (0, 10)}
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 0.5, (400, 2))
    kept = np.array([centre[t] for t in label]) + noise
    before = kept + np.where(batch == "y", 40.0, 0.0)[:, None]
    # Over-corrected: c of batch y is laid over b, which batch x also has.
    vanished = np.array([centre["b" if t == "c" else t] for t in label]) + noise
    return {"label": label, "batch": batch, "before": before, "kept": kept, "vanished": vanished}


def test_a_vanished_batch_specific_type_is_named(merged):
    table = lm.lost_types(
        merged["vanished"], merged["batch"], merged["label"], before_CD=merged["before"]
    )
    lost = table[table["lost"]]
    row = lost[lost["label"] == "c"].iloc[0]
    assert (row["batch"], row["into"], row["only_here"]) == ("y", "b", True)
    assert row["mixing"] > 0.8 and row["mixing_before"] < 0.05
    assert "a" not in set(lost["label"])


def test_good_integration_loses_nothing(merged):
    table = lm.lost_types(
        merged["kept"], merged["batch"], merged["label"], before_CD=merged["before"]
    )
    assert not table["lost"].any()
    assert table.set_index(["batch", "label"]).loc[("x", "a"), "own_share"] == 1.0
    assert table.set_index(["batch", "label"]).loc[("y", "c"), "own_share"] == 0.0


def test_types_that_never_were_apart_are_not_lost(merged):
    label = merged["label"].astype(object)
    # Two labels for one cloud: mixed before and after.
    b = np.flatnonzero(label == "b")
    label[b[::2]] = "b2"
    after = lm.lost_types(merged["kept"], merged["batch"], label)
    assert {"b", "b2"} <= set(after.loc[after["lost"], "label"])
    with_before = lm.lost_types(merged["kept"], merged["batch"], label, before_CD=merged["before"])
    assert not with_before["lost"].any()


def test_biology_and_batch_reports_both_per_type_and_overall(merged):
    good = lm.biology_and_batch(
        merged["kept"], merged["batch"], merged["label"], before_CD=merged["before"]
    )
    assert list(good.index) == ["a", "b", "c", "all"]
    assert good.loc["all", "n"] == 400
    assert good.loc["all", "knn_accuracy"] == 1.0
    assert good.loc["all", "same_batch_ratio"] == pytest.approx(1.0, abs=0.12)
    assert good.loc["all", "ilisi"] > 0.8
    assert np.isnan(good.loc["c", "same_batch_ratio"]) and np.isnan(good.loc["c", "ilisi"])
    assert good.loc["all", "lost_into"] == "0 lost"
    none = lm.biology_and_batch(merged["before"], merged["batch"], merged["label"])
    assert none.loc["a", "same_batch_ratio"] > 1.8
    assert none.loc["all", "ilisi"] < 0.05
    bad = lm.biology_and_batch(
        merged["vanished"], merged["batch"], merged["label"], before_CD=merged["before"]
    )
    assert bad.loc["c", "lost_into"] == "b"
    assert bad.loc["c", "knn_accuracy"] < 0.8
    assert good.loc["all", "knn_accuracy"] == lm.knn_accuracy(merged["kept"], merged["label"])
    assert good.loc["all", "silhouette"] == pytest.approx(
        lm.silhouette(merged["kept"], merged["label"])
    )
    assert good.loc["all", "connectivity"] == lm.graph_connectivity(merged["kept"], merged["label"])


def test_refusals_name_what_and_where():
    with pytest.raises(DataError, match=r"NaN or infinite values in 1 cells"):
        lm.neighbours(np.array([[0.0], [np.nan], [1.0]]))
    with pytest.raises(DataError, match=r"label has 3 entries and the embedding has 6 cells"):
        lm.knn_accuracy(LINE, ["a", "b", "c"])
    with pytest.raises(DataError, match=r"shape \(6,\)"):
        lm.neighbours(np.zeros(6))
    with pytest.raises(DataError, match="Fewer than two cells"):
        lm.silhouette(LINE, [None] * 6)
    with pytest.raises(DataError, match="1 cells have no counts"):
        lm.pca_of_lognorm(sparse.csr_matrix(np.array([[1, 2], [0, 0], [3, 1]])))


def test_pca_of_lognorm_equals_the_obvious_version():
    counts = sparse.csr_matrix(RNG.poisson(RNG.gamma(0.5, 4.0, (1, 40)), (70, 40)) + 1)
    dense = counts.toarray().astype(float)
    logged = np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)
    centred = logged - logged.mean(axis=0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    found = lm.pca_of_lognorm(counts, n_comps=5, n_hvg=40)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :5] * s[:5]), atol=5e-3)
    assert (found == lm.pca_of_lognorm(counts, n_comps=5, n_hvg=40)).all()


def test_types_too_small_to_be_lost_are_none_that_were():
    """Not one type has enough cells of a batch to be judged: the table of lost types is empty."""
    rng = np.random.default_rng(0)
    label, batch = np.arange(24).astype(str), np.arange(24) % 2
    table = lm.biology_and_batch(rng.normal(size=(24, 3)), batch, label)
    assert (table["lost_into"].iloc[:-1] == "").all() and table.at["all", "lost_into"] == "0 lost"
