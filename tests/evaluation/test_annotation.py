"""Labels carried from one species to another and back: who labels whom, and what it is worth."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from genemodel.cells.missing_labels import without_placeholders
from genemodel.errors import ConfigError, DataError
from genemodel.evaluation import annotation
from genemodel.evaluation.annotation import Called, Direction
from genemodel.evaluation.baselines import Conditions
from genemodel.evaluation.evaluate import EvaluateSettings, evaluate
from genemodel.evaluation.methods import Method
from genemodel.evaluation.sizes import run
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.simulation.cells import synthetic


@pytest.fixture(scope="module")
def cells():
    """Human and mouse cells in one file, each with genes of its own; mouse has far fewer.

    One label stands in mouse alone, one cell has none, and one says that it is unknown.
    """
    parts = synthetic(320, n_cell_types=4, n_batches=2, n_genes=700, genes_per_cell=250, seed=6)
    parts["mouse"] = parts["mouse"][:, :180].copy()
    adata = ad.concat(parts.values(), join="outer", fill_value=0)
    label = adata.obs["cell_type"].astype(object)
    types = sorted(label.unique())
    mouse = (adata.obs["species"] == "mouse").to_numpy()
    label[mouse & (label == types[0]).to_numpy()] = "only in mice"
    label.iloc[0], label.iloc[1] = None, "unknown"
    adata.obs["kind"] = pd.Categorical(label)
    adata.obs["half"] = np.where(np.arange(adata.n_obs) % 2, "odd", "even")
    return adata


@pytest.fixture(scope="module")
def shared(cells):
    return annotation.shared_genes(cells, "species")


def one_hot(adata, conditions):
    """Stands for a perfect embedding."""
    code = pd.Categorical(adata.obs["cell_type"]).codes
    draw = np.random.default_rng(0)
    array = np.eye(code.max() + 1)[code] + 0.05 * draw.standard_normal(
        (adata.n_obs, code.max() + 1)
    )
    array[-1] = np.nan
    return array


def test_shared_genes_are_orthologs_that_both_species_have(cells, shared):
    vocabulary = GeneVocabulary.builtin()
    species = cells.obs["species"].to_numpy()
    columns = {}
    for name in ("human", "mouse"):
        counts = cells.X[species == name]
        genes = cells.var_names[counts.getnnz(0) > 0]
        token_G = vocabulary.match(genes, species=name).token_G
        columns[name] = {
            int(t): np.asarray(counts[:, cells.var_names.get_indexer([g])].sum(1)).ravel()
            for t, g in zip(token_G, genes, strict=True)
            if t >= 0
        }
    both = sorted(columns["human"].keys() & columns["mouse"].keys())
    names = vocabulary.token_names()
    assert list(shared.var_names) == [names[token] for token in both]
    assert 50 < len(both) < 180
    for place in (0, len(both) // 2, len(both) - 1):
        for name, column in columns.items():
            seen = shared.X[species == name][:, [place]].toarray().ravel()
            np.testing.assert_array_equal(seen, column[both[place]])
    one = annotation.shared_genes(cells[species == "human"].copy(), "half")
    assert set(one.var_names) <= set(cells.var_names)  # one species: the data's own names


def test_directions_there_and_back(cells):
    settled = cells.copy()  # as evaluate reads them
    settled.obs["kind"] = without_placeholders(cells.obs["kind"], (), column="kind", where="cells")
    found, left_out = annotation.directions(settled, "species", "kind")
    assert [one.name for one in found] == ["human → mouse", "mouse → human"]
    assert not left_out
    there, back = found
    np.testing.assert_array_equal(there.query_Q, back.reference_R)
    assert {0, 1}.isdisjoint(there.reference_R)  # without a label there is nothing to lend
    assert "only in mice" in back.labels
    assert "only in mice" not in there.labels
    assert there.shared == back.shared
    assert len(there.shared) == 3
    adata = cells.copy()
    adata.obs["three"] = np.where(
        adata.obs["kind"] == "only in mice", "odd ones", adata.obs["half"]
    )
    found, left_out = annotation.directions(adata, "three", "kind")
    assert [one.name for one in found] == ["others → even", "others → odd"]
    assert "no label of 'kind' stands on both sides" in left_out["others → odd ones"]
    assert "only in mice" in left_out["others → odd ones"]


def test_scores_equal_a_count_by_hand():
    true = np.array(["a", "a", "a", "b", "b", "new", "new"], dtype=object)
    label = np.array(["a", "a", "unknown", "b", "a", "unknown", "c"], dtype=object)
    forced = np.array(["a", "a", "a", "b", "a", "b", "c"], dtype=object)
    direction = Direction("x → y", np.arange(3), np.arange(7), true, ["a", "b", "c"])
    assert direction.shared == ["a", "b"]
    found = annotation.scores(direction, Called(label, forced))
    assert found == pytest.approx(
        {
            "accuracy": 3 / 5,
            # a: precision 2/3, recall 2/3; b: precision 1, recall 1/2
            "macro_f1": (2 / 3 + 2 / 3) / 2,
            "balanced_accuracy": (2 / 3 + 1 / 2) / 2,
            "accuracy_forced": 4 / 5,
            # a: precision 3/4, recall 1
            "macro_f1_forced": (6 / 7 + 2 / 3) / 2,
            "accuracy_called": 3 / 4,
            "unknown": 1 / 5,
            "unknown_new": 1 / 2,
            "ece": np.nan,
            "unknown_auroc": np.nan,
        },
        nan_ok=True,
    )
    known = Direction("x → y", np.arange(3), np.arange(5), true[:5], ["a", "b", "c"])
    assert np.isnan(annotation.scores(known, Called(label[:5], forced[:5]))["unknown_new"])
    table = annotation.per_label(direction, "m", Called(label, forced)).set_index("cell_type")
    assert table.loc["a", ["n", "accuracy", "unknown"]].tolist() == [3, 2 / 3, 1 / 3]
    assert np.isnan(table.at["new", "accuracy"])
    assert table.at["new", "unknown"] == 0.5


def test_ours_is_trained_once_and_paid_twice(shared, monkeypatch):
    trained = []

    def tuned(adata, conditions):
        trained.append(conditions.seed)
        return one_hot(adata, conditions)

    monkeypatch.setattr(annotation, "tuned", tuned)
    conditions = Conditions(batch_key="species", label_key="kind", seed=3)
    there, back = annotation.genemodel_linear(shared, conditions)
    assert conditions.borrowed_seconds == 0
    annotation.genemodel_knn(shared, conditions)
    assert conditions.borrowed_seconds > 0
    assert trained == [3]
    found, _ = annotation.directions(shared, "species", "kind")
    scores = [annotation.scores(*pair) for pair in zip(found, (there, back), strict=True)]
    assert min(one["accuracy_forced"] for one in scores) > 0.95
    assert there.forced_Q[-1] == "unknown"  # no vector, no label
    assert (there.forced_Q[:-1] != "unknown").all()


def test_logistic_regression_learns_from_the_reference_alone(shared):
    from sklearn.linear_model import LogisticRegression

    conditions = Conditions(batch_key="species", label_key="kind", n_hvg=40)
    found, _ = annotation.directions(shared, "species", "kind")
    dense = shared.X.toarray()
    logged = np.log1p(1e4 * dense / dense.sum(axis=1, keepdims=True))
    label_C = shared.obs["kind"].astype(str).to_numpy()
    everything = annotation.logistic_regression(shared, conditions)
    for direction, called in zip(found, everything, strict=True):
        slow = LogisticRegression(max_iter=500)
        slow.fit(logged[direction.reference_R], label_C[direction.reference_R])
        agree = slow.predict(logged[direction.query_Q]) == called.label_Q
        assert agree.mean() > 0.99
    variable = annotation.logistic_regression_hvg(shared, conditions)
    score, most = (
        np.mean([annotation.scores(*pair)["accuracy"] for pair in zip(found, called, strict=True)])
        for called in (variable, everything)
    )
    assert score != most
    assert score > 0.6


@pytest.fixture(scope="module")
def compared(cells, tmp_path_factory):
    seen = []

    def perfect(reference, query, key):
        seen.append((reference, query, key))
        return query.obs["cell_type"].to_numpy()

    def short(reference, query, key):
        return ["a"]

    def broken(reference, query, key):
        raise ZeroDivisionError("nothing to divide by")

    adata = cells.copy()
    adata.obsm["X_tool"] = np.nan_to_num(one_hot(adata, None))
    own = {"perfect": perfect, "short": short, "broken": broken}
    built_in = dict.fromkeys(
        ["majority", "logistic_regression", "pca_knn", "genemodel", "genemodel_linear"]
    )
    out = tmp_path_factory.mktemp("annotate")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(annotation, "tuned", one_hot)
        result = evaluate(
            adata, task="annotate", batch_key="species", label_key="kind", methods=own | built_in,
            obsm=["X_tool"], seeds=(0, 1), out=out,
        )  # fmt: skip
    return result, seen, out


def test_methods_are_compared_in_both_directions(compared):
    result, seen, _ = compared
    summary = result.summary()
    assert set(summary.index) == {
        "majority", "logistic_regression", "pca_knn", "genemodel", "genemodel_linear", "perfect",
        "obsm:X_tool",
    }  # fmt: skip
    assert summary.at["logistic_regression", "accuracy"] > summary.at["majority", "accuracy"] + 0.2
    assert summary.at["genemodel_linear", "accuracy_forced"] > 0.95
    assert summary.at["obsm:X_tool", "accuracy_forced"] > 0.95
    assert summary.at["majority", "unknown"] == summary.at["majority", "unknown_new"] == 0
    assert summary.at["genemodel_linear", "n_seeds"] == 2
    assert summary.at["genemodel", "n_seeds"] == 1
    assert summary.at["majority", "n_seeds"] == 1
    # Its labels are those before some were renamed, which only the cells of known labels keep.
    assert summary.at["perfect", "accuracy"] == 1.0
    assert "ZeroDivisionError" in result.skipped["broken"]
    assert "shape (1,) for human → mouse; expected (160,)" in result.skipped["short"]
    assert [key for *_, key in seen] == ["kind", "kind"]
    for reference, query, key in seen:
        assert key in reference.obs
        assert key not in query.obs
        assert list(reference.var_names) == list(query.var_names)


def test_the_table_is_tidy_and_the_summary_the_mean_of_directions(compared):
    result, _, _ = compared
    table = result.table
    assert not table.duplicated(["method", "seed", "direction", "metric"]).any()
    each = result.directions()
    assert list(each) == ["human → mouse", "mouse → human"]
    score_D = np.array([part.summary().at["pca_knn", "macro_f1"] for part in each.values()])
    n_D = np.array([result.judged[name] for name in each])
    weight_D = n_D / (n_D + 50)
    assert weight_D[0] != weight_D[1]
    expected = (score_D * weight_D).sum() / weight_D.sum()
    assert result.summary().at["pca_knn", "macro_f1"] == pytest.approx(expected)
    assert result.spread().at["pca_knn", "macro_f1"] != result.spread().at["pca_knn", "macro_f1"]
    rows = table.query("method == 'genemodel_linear' and metric == 'accuracy'")
    by_seed = rows.groupby("seed").apply(
        lambda of: np.average(of["value"], weights=weight_D[of["direction"].map(list(each).index)])
    )
    assert result.spread().at["genemodel_linear", "accuracy"] == pytest.approx(by_seed.std())


def test_what_is_written_and_said(compared, cells):
    result, _, out = compared
    calls = pd.read_csv(out / "calls.csv")
    assert len(calls) == cells.n_obs - 2
    there = calls[calls["direction"] == "human → mouse"]
    known = there["true"] != "only in mice"
    said = (there["genemodel"] == there["true"])[known].mean()
    seed0 = result.table.query("method == 'genemodel' and seed == 0 and metric == 'accuracy'")
    assert said == pytest.approx(seed0.set_index("direction").at["human → mouse", "value"])
    assert set(pd.read_csv(out / "cell_types.csv")["method"]) == set(result.summary().index)
    page = (out / "report.html").read_text()
    for word in (
        "human → mouse",
        "only in mice (new)",
        "nothing to divide by",
        "Share of each cell type",
    ):
        assert word in page
    # two figures, and a confusion for each of ours and each direction
    assert page.count("data:image/png") == 6
    text = result.text()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].split()[:3] == ["annotate", "accuracy", "±"]
    assert [line.split("  ")[0] for line in lines if "→" in line][:2] == list(result.directions())
    assert "skipped: broken: failed: ZeroDivisionError" in text


def test_trained_models_read_all_genes(cells, monkeypatch):
    given = {}

    def embed(adata, conditions):
        given["genes"] = adata.n_vars
        return np.nan_to_num(one_hot(adata, conditions))

    monkeypatch.setattr("genemodel.evaluation.evaluate.loaded", lambda models, task: {})
    monkeypatch.setattr(
        "genemodel.evaluation.evaluate.model_methods",
        lambda *models: {"model mine": Method(embed, kind="ours")},
    )
    result = evaluate(
        cells, task="annotate", batch_key="species", label_key="kind", methods=["majority"],
        models=["somewhere"],
    )  # fmt: skip
    assert given["genes"] == cells.n_vars
    assert result.summary().index[0] == "model mine"
    assert result.settings["genes that all batches have"] < cells.n_vars


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"label_key": None}, ConfigError, "batch_key and that of cell types with label_key; obs"),
        ({"batch_key": None}, ConfigError, "to annotate, name the column of batches or species"),
        ({"batch_key": "tissue"}, DataError, "one batch only"),
        ({"label_key": "species"}, ConfigError, "label_key=species is a column of batch_key too"),
        ({"label_key": "tissue"}, DataError, "the reference has 1 labels"),
        ({"label_key": "apart"}, DataError, "no label of 'apart' stands on both sides: human B"),
        ({"batch_key": "gaps"}, DataError, r"obs\['gaps'\].*missing in 1 cells"),
        ({"methods": ["scvi_nn"]}, ConfigError, "did you mean 'scvi_knn'"),
        ({"methods": {"mine": 3}}, ConfigError, r"\(reference, query, label_key\) -> labels"),
    ],
)
def test_refusals_come_before_work(cells, settings, error, message, monkeypatch):
    monkeypatch.setattr("genemodel.evaluation.evaluate._Comparison._run", None)
    adata = cells.copy()
    adata.obs["apart"] = adata.obs["species"].astype(str) + " " + adata.obs["cell_type"].astype(str)
    adata.obs["gaps"] = adata.obs["half"].where(np.arange(adata.n_obs) > 0, None)
    adata.obs["tissue"] = "one"
    with pytest.raises(error, match=message):
        evaluate(
            adata, task="annotate", **{"batch_key": "species", "label_key": "kind", **settings}
        )


def test_batches_without_common_genes_are_refused(cells):
    adata = cells.copy()
    adata.obs["origin"] = adata.obs["species"]
    del adata.obs["species"]
    with pytest.raises(
        DataError, match=r"only 0 genes have counts.*name each cell's in obs\['spec"
    ):
        annotation.shared_genes(adata, "origin")


def test_the_verb_runs_from_a_file(cells, tmp_path):
    cells.write_h5ad(tmp_path / "both.h5ad")
    settings = EvaluateSettings(
        input=tmp_path / "both.h5ad", out=tmp_path / "out", task="annotate", batch_key="species",
        label_key="kind", methods=("majority",),
    )  # fmt: skip
    text = run(settings)
    assert "majority" in text
    assert (tmp_path / "out" / "report.html").exists()


def test_each_label_is_left_out_and_calibration_is_scored(shared):
    """A method that says "new" of the very cells whose label it was not given."""
    conditions = Conditions(batch_key="species", label_key="kind")
    label_C = annotation.labels_of(shared, "kind")
    asked = []

    def oracle(rows_R, code_R, query_Q):
        given = set(label_C[rows_R])
        asked.append(given)
        assert len(np.unique(code_R)) == len(given) == code_R.max() + 1
        new_Q = np.array([label not in given for label in label_C[query_Q]])
        names = sorted(given)
        code_Q = np.array([names.index(x) if x in given else 0 for x in label_C[query_Q]])
        return annotation.Answer(code_Q, np.full(len(query_Q), 0.8), new_Q * 1.0, new_Q)

    called = annotation._classified(shared, conditions, oracle)
    found, _ = annotation.directions(shared, "species", "kind")
    assert [one.left_out_auroc for one in called] == [1.0, 1.0]
    for direction, one in zip(found, called, strict=True):
        everything = set(direction.labels)
        for label in direction.shared:
            assert everything - {label} in asked
        score = annotation.scores(direction, one)
        assert score["accuracy"] == 1.0
        assert score["ece"] == pytest.approx(0.2)  # always right, and says .8
        assert score["unknown_auroc"] == 1.0
    blind = annotation._classified(shared, conditions, oracle, leave_out=False)
    assert np.isnan(blind[0].left_out_auroc)


def test_ours_labels_by_counts_with_a_confidence(shared):
    conditions = Conditions(batch_key="species", label_key="kind")
    found, _ = annotation.directions(shared, "species", "kind")
    for direction, one in zip(found, annotation.head(shared, conditions), strict=True):
        score = annotation.scores(direction, one)
        assert score["accuracy_forced"] > 0.7
        assert score["ece"] < 0.35
        assert 0.5 < score["unknown_auroc"] <= 1


def test_scanvi_never_sees_the_labels_of_the_query(shared, monkeypatch):
    """It learns from as many labels as the reference has cells, in either direction."""
    scvi = pytest.importorskip("scvi")
    conditions = Conditions(batch_key="species", label_key="kind", n_hvg=100, scvi_epochs=2)
    found, _ = annotation.directions(shared, "species", "kind")
    labelled, train = [], scvi.model.SCANVI.train

    def watched(self, *args, **kwargs):
        labelled.append(np.sort(self._labeled_indices))
        return train(self, *args, **kwargs)

    monkeypatch.setattr(scvi.model.SCANVI, "train", watched)
    called = annotation.scanvi(shared, conditions)
    for direction, one, rows in zip(found, called, labelled, strict=True):
        np.testing.assert_array_equal(rows, direction.reference_R)
        assert set(one.forced_Q) <= set(direction.labels)
