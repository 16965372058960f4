"""What says "I do not know" is no label, no batch, no donor and no species: one list for all."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from genemodel.cells.input_settings import InputSettings
from genemodel.cells.missing_labels import is_missing, placeholders, without_placeholders
from genemodel.cells.sources import open_source
from genemodel.errors import ConfigError
from genemodel.inference.obs_keys import batch_names, label_codes

MISSING = ["nan", "NaN", "", " ", "NA", "N/A", "None", "null", "<NA>", "Unknown", "UNKNOWN",
           "unassigned", "Unassigned ", "not_available", "Not-Available", "unlabeled", "?", "-",
           "unknown cell type", "unclassified"]  # fmt: skip
LABELS = ["T cell", "unknown T cell", "0", "-1", "NK", "Nan-like", "native cell", "Na+ channel"]


@pytest.mark.parametrize("text", MISSING)
def test_placeholders_are_missing(text):
    assert is_missing(text)


@pytest.mark.parametrize("text", LABELS)
def test_labels_are_not(text):
    assert not is_missing(text)


@pytest.mark.parametrize("categorical", [False, True])
@pytest.mark.parametrize("text", ["nan", "", "Unknown", "unassigned", None, np.nan])
def test_labels_are_learnt_as_if_the_value_were_missing(text, categorical, caplog):
    values = pd.Series(["T", text, "B", text, "T"], dtype=object)
    obs = pd.DataFrame({"L": values.astype("category") if categorical else values})
    with caplog.at_level(logging.WARNING):
        codes, names = label_codes(obs, "L")
    assert names == ["B", "T"] and codes.tolist() == [1, -1, 0, -1, 1]
    said = [r for r in caplog.records if "missing value" in r.getMessage()]
    assert len(said) == (0 if pd.isna(text) else 1)
    if said:
        assert f"obs['L']: {text!r} (2 cells)" in said[0].getMessage()


def test_the_setting_adds_and_removes(caplog):
    obs = pd.DataFrame({"L": ["T", "doublet", "unknown", "B"]})
    codes, names = label_codes(obs, "L", missing_labels=["Doublet", "-Unknown"])
    assert names == ["B", "T", "unknown"] and codes.tolist() == [1, -1, 2, 0]
    # What the user added has no minus to be taken back with.
    assert caplog.messages == ["adata: obs['L']: 'doublet' (1 cells) stands for a missing value"]
    with pytest.raises(ConfigError, match="'-doublet', but 'doublet' does not stand for a missing"):
        placeholders(["-doublet"])
    with pytest.raises(ConfigError, match="one text: give a list"):
        placeholders("doublet")
    with pytest.raises(ConfigError, match="give texts"):
        placeholders(["-"])


def test_a_batch_that_is_unknown_is_missing():
    obs = pd.DataFrame({"b": ["1", "unknown"]})
    with pytest.raises(Exception, match="missing in 1 of 2"):
        batch_names(obs, ["b"])
    assert batch_names(obs, ["b"], missing_labels=["-unknown"]).tolist() == ["1", "unknown"]
    assert batch_names(obs, ["b"], settled=True).tolist() == ["1", "unknown"]


def test_it_is_said_once_for_a_source_and_stands_in_the_manifest(
    make_cells, vocabulary, tmp_path, caplog
):
    from genemodel.corpus.corpus import Corpus

    files = []
    for n in (1, 2):
        cells = make_cells(20, seed=n)
        cells.obs["cell_type"] = ["Unknown", "T"] * 10
        cells.write_h5ad(tmp_path / f"{n}.h5ad")
        files.append(tmp_path / f"{n}.h5ad")
    with caplog.at_level(logging.WARNING):
        corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary)
    said = [r.getMessage() for r in caplog.records if "missing value" in r.getMessage()]
    note = "obs['cell_type']: 'Unknown' (10 cells) stands for a missing value"
    assert [s.partition(";")[0] for s in said] == [f"1.h5ad: {note}", f"2.h5ad: {note}"]
    assert all(source.notes[0].startswith(note) for source in corpus.sources)
    codes, names = corpus.codes("cell_type")
    assert names == ["T"] and (codes == -1).sum() == 20


def test_categories_keep_their_order_and_numbers_stay():
    values = pd.Series(pd.Categorical(["b", "nan", "a"], categories=["b", "nan", "a"]))
    assert list(without_placeholders(values, column="L", where="x").cat.categories) == ["b", "a"]
    numbers = pd.Series([1.5, np.nan])
    assert without_placeholders(numbers, column="L", where="x") is numbers


def test_columns_of_a_corpus_know_them_and_kept_ones_only_what_is_empty(make_cells):
    cells = make_cells(6)
    cells.obs["donor"] = ["d1", "unknown", "NA", "d2", "None", "d1"]
    cells.obs["species"] = ["human", "human", "Unknown", "human", "human", "human"]
    cells.obs["treatment"] = ["none", "nan", "IFN", "none", "", "IFN"]
    with open_source(cells, keep=["treatment"]) as source:
        obs = source.obs
    assert obs["donor"].cat.codes.tolist() == [0, -1, -1, 1, -1, 0]
    assert obs["species"].isna().tolist() == [False, False, True, False, False, False]
    assert obs["treatment"].cat.codes.tolist() == [0, -1, 1, 0, -1, 1]
    with open_source(cells, missing_labels=["-unknown", "d1"]) as source:
        assert source.obs["donor"].cat.categories.tolist() == ["unknown", "d2"]


def test_what_was_kept_stays_kept_behind_the_reading(make_cells, vocabulary, tmp_path):
    from genemodel.corpus.corpus import Corpus
    from genemodel.corpus.report import _examine
    from genemodel.errors import DataError
    from genemodel.evaluation.baselines import Conditions, tuned
    from genemodel.finetuning.head_run import HeadRun
    from genemodel.integration.head import IntegrationSettings
    from genemodel.integration.integrate import integrate_cells
    from genemodel.model.tuning import TuningSettings

    cells = make_cells(40)
    for key in ("batch", "cell_type"):
        cells.obs[key] = ["Unknown", "b"] * 20
    reading = InputSettings(missing_labels=("-unknown",))
    corpus = Corpus.build([cells], tmp_path / "c", vocabulary=vocabulary, **reading.opening())
    names = batch_names(corpus.obs(), ["batch"], settled=True)
    assert set(names) == {"Unknown", "b"}
    assert (batch_names(corpus.obs(), ["batch"], ["-unknown"], settled=True) == names).all()
    codes, labels = label_codes(corpus.obs(), "cell_type", settled=True)
    assert labels == ["Unknown", "b"] and (codes >= 0).all()
    with pytest.raises(DataError, match="holds 1 different labels"):
        label_codes(corpus.obs(), "cell_type", missing_labels=["b"], settled=True)
    assert (_examine(corpus)[1]["cell_type"] >= 0).all()
    # Both get as far as the number of cells, behind what they say of batches.
    few = "40 cells: fewer than"
    with pytest.raises(DataError, match=few):
        integrate_cells(
            corpus, ("batch",), "cell_type", None, TuningSettings("frozen"),
            settings=IntegrationSettings(), where=HeadRun(tmp_path / "h"), seed=0,
        )  # fmt: skip
    with pytest.raises(DataError, match=few):
        tuned(cells, Conditions("batch", "cell_type", reading=reading), label_key="cell_type")


def test_a_text_is_a_label_where_scores_are_made():
    from genemodel.evaluation import annotation
    from genemodel.metrics import light
    from genemodel.metrics.scib import _cells_to_score

    label = ["unknown", "b", None, "nan", "unknown", np.nan]
    _, label_C, keep_C = _cells_to_score(None, label, 6)
    assert keep_C.tolist() == [True, True, False, True, True, False]
    assert label_C.tolist() == ["unknown", "b", "nan", "unknown"]
    codes, names = light._codes(label)
    assert names == ["b", "nan", "unknown"] and codes.tolist() == [2, 0, -1, 1, 2, -1]
    adata = ad.AnnData(obs=pd.DataFrame({"L": label}, index=list("abcdef")))
    assert annotation.labels_of(adata, "L").tolist() == [
        "unknown",
        "b",
        None,
        "nan",
        "unknown",
        None,
    ]


@pytest.mark.parametrize(
    ("how", "given"), [((), {"B", "T"}), (("-unknown",), {"B", "T", "unknown"})]
)
def test_a_comparison_lends_the_labels_that_the_user_kept(make_cells, how, given):
    from genemodel.evaluation.evaluate import evaluate

    cells = make_cells(180)
    cells.obs["lab"] = ["x", "y"] * 90
    cells.obs["cell_type"] = ["T", "T", "B", "B", "unknown", "unknown"] * 30
    seen = set()

    def method(reference, query, label_key):
        seen.update(reference.obs[label_key])
        return ["T"] * query.n_obs

    evaluate(
        cells, task="annotate", batch_key="lab", label_key="cell_type", methods={"mine": method},
        missing_labels=how,
    )  # fmt: skip
    assert seen == given
