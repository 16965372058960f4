"""evaluate genes: methods on the same genes and folds, planted answers found, refusals."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.evaluation.gene_features import (
    coexpression_components,
    expression_features,
    gene_set_components,
    out_of_fold,
)
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings

N_GENES, N_CELLS = 150, 60
SHORT = gm.GeneLabelSettings(folds=3, steps=2, batch_cells=8, min_cells=3)


@pytest.fixture(scope="module")
def study(small_vocabulary, tmp_path_factory):
    """Genes whose label is their expression, whose label is their module, and by chance."""
    folder = tmp_path_factory.mktemp("study")
    genes = small_vocabulary.genes
    names = genes[genes["species"] == "human"]["ensembl_id"].iloc[:N_GENES].to_numpy()
    rng = np.random.default_rng(0)
    rate_G = rng.gamma(1.0, 1.0, N_GENES) + 0.1
    module_G = rng.integers(0, 2, N_GENES)
    factor_C = np.where(np.arange(N_CELLS) % 2, 4.0, 0.25)
    rate_CG = rate_G * np.where(module_G, factor_C[:, None], 1 / factor_C[:, None])
    counts = rng.poisson(rate_CG)
    counts[:, :5] = 0  # held by no cell
    adata = ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)),
        obs=pd.DataFrame({"species": "human"}, index=[f"c{i}" for i in range(N_CELLS)]),
        var=pd.DataFrame(index=names),
    )
    adata.write_h5ad(folder / "cells.h5ad")
    tasks = {"level": rate_G > np.median(rate_G), "module": module_G == 1,
             "chance": rng.random(N_GENES) < 0.4}  # fmt: skip
    pd.concat(
        pd.DataFrame(
            {"task": k, "gene": names, "label": np.where(v, "yes", "no"), "positive": v * 1}
        )
        for k, v in tasks.items()
    ).to_csv(folder / "tasks.tsv", sep="\t", index=False)
    groups = pd.DataFrame({"gene": names, "family": np.arange(N_GENES) // 2})
    groups.to_csv(folder / "groups.tsv", sep="\t", index=False)
    rows = [
        f"s{i}\t-\t" + "\t".join(names[np.flatnonzero(tasks["chance"])[i::3]]) for i in range(3)
    ]
    (folder / "sets.gmt").write_text("\n".join(rows) + "\n")
    torch.manual_seed(0)
    model = GeneModel(
        ModelSettings(layers=1, width=16, heads=2, ffn=16, components=4),
        n_tokens=len(small_vocabulary), n_species=2, context=160,
    ).eval()  # fmt: skip
    medians_V = np.full(len(small_vocabulary), 50, np.float32)
    Bundle(model, small_vocabulary, TokenSettings(160, 1600), medians_V).save(folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def result(study):
    return gm.evaluate_genes(
        study / "cells.h5ad", study / "tasks.tsv", models=[study / "tiny"], device="cpu",
        groups=study / "groups.tsv", gene_sets=study / "sets.gmt", gene_labels=SHORT, draws=200,
        out=study / "out",
    )  # fmt: skip


def auroc(result, task, method):
    rows = result.table.set_index(["task", "method"])
    return rows.loc[(task, method), "auroc"]


def test_what_is_planted_is_found_by_what_can_see_it_and_by_nothing_else(result):
    assert auroc(result, "level", "mean_expression") > 0.85
    assert auroc(result, "module", "mean_expression") < 0.7
    assert auroc(result, "module", "coexpression_pca") > 0.95
    assert auroc(result, "chance", "gene_sets") > 0.95
    # Chance is within the interval of whatever sees nothing of it.
    rows = result.table.set_index(["task", "method"]).loc["chance"]
    for method in ("expression", "static:tiny", "contextual:tiny"):
        assert rows.loc[method, "auroc_low"] < 0.6 and rows.loc[method, "auroc_high"] > 0.4
    gain = result.table.set_index(["task", "method"]).loc[("module", "coexpression_pca")]
    assert gain["gain_low"] > 0 and gain["gain"] == pytest.approx(
        gain["auroc"] - auroc(result, "module", "expression")
    )


def test_all_methods_are_scored_on_the_same_genes(result, study):
    for task, rows in result.table.groupby("task"):
        own = rows[rows["method"] != "expression_all"]
        assert own["genes"].nunique() == 1 and own["genes"].iloc[0] <= N_GENES - 5
        assert len(own) == 8, task
        whole = rows[rows["method"] == "expression_all"]
        assert whole["genes"].iloc[0] == N_GENES
    kinds = result.table.groupby("method")["kind"].first()
    assert kinds["contextual:random:tiny"] == "control"
    assert kinds["finetuned (last):tiny"] == "ours"
    family = pd.read_csv(study / "groups.tsv", sep="\t").set_index("gene")["family"]
    predicted = result.predictions
    folds = predicted.assign(family=predicted["gene"].map(family)).groupby(["task", "family"])
    assert folds["fold"].nunique().max() == 1
    assert len(pd.read_csv(study / "out" / "scores.csv")) == len(result.table)
    assert "expression_all is of all labelled genes" in result.text()


def test_random_weights_are_other_weights(result):
    predicted = result.predictions
    assert not np.allclose(predicted["contextual:tiny"], predicted["contextual:random:tiny"])


def test_features_of_expression_are_what_they_are_called():
    counts = sp.csr_matrix(np.array([[5, 0, 5], [0, 0, 10], [10, 0, 0]], np.float32))
    mean, detection, held, spread = expression_features(counts, np.array([0, 1])).T
    value = np.log1p(np.array([5000, 0, 10_000]))
    np.testing.assert_allclose(mean, [value.mean(), 0], rtol=1e-5)
    np.testing.assert_allclose(detection, [2 / 3, 0])
    np.testing.assert_allclose(held, [value[value > 0].mean(), 0], rtol=1e-5)
    np.testing.assert_allclose(spread, [value.std(), 0], rtol=1e-5)


def test_components_of_genes_keep_their_correlations():
    rng = np.random.default_rng(0)
    base_C = rng.gamma(2, 5, 40)
    counts = rng.poisson(np.outer(base_C, rng.gamma(2, 2, 12)) + 5).astype(np.float32)
    found = coexpression_components(sp.csr_matrix(counts), np.arange(12), seed=0)
    value = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    np.testing.assert_allclose(found @ found.T, np.corrcoef(value.T), atol=1e-4)


def test_a_gene_that_is_told_apart_with_certainty_keeps_its_score():
    feature = np.repeat([[-1.0], [1.0]], 20, axis=0) * np.linspace(1, 1000, 40)[:, None]
    code = np.repeat([0, 1], 20)
    found = out_of_fold(feature, code, [f"f{i}" for i in range(40)], np.arange(40) % 4, seed=0)
    assert np.isfinite(found).all()


def test_a_held_out_fold_changes_nothing_of_how_it_is_predicted():
    rng = np.random.default_rng(0)
    feature, code = rng.normal(size=(60, 5)), rng.integers(0, 2, 60)
    family = [f"f{i // 2}" for i in range(60)]
    fold = np.arange(60) // 2 % 3
    first = out_of_fold(feature, code, family, fold, seed=0)
    second = out_of_fold(feature, np.where(fold == 0, 1 - code, code), family, fold, seed=0)
    np.testing.assert_array_equal(first[fold == 0], second[fold == 0])
    assert not np.allclose(first[fold == 1], second[fold == 1])


def test_refusals(study, small_vocabulary):
    cells, tasks = study / "cells.h5ad", study / "tasks.tsv"
    for options, error, said in (
        ({"backbones": ["scratch"]}, ConfigError, "frozen, lora, last or full"),
        ({"gene_labels": gm.GeneLabelSettings(task="level")}, ConfigError, "tasks and groups here"),
        ({"gene_labels": gm.GeneLabelSettings(folds=0)}, ConfigError, "folds=0 predicts no gene"),
        ({"seeds": []}, ConfigError, "seeds is empty"),
        ({"tasks": ["modul"]}, DataError, "did you mean 'module'"),
    ):
        with pytest.raises(error, match=said):
            gm.evaluate_genes(cells, tasks, models=[study / "tiny"], device="cpu", **options)
    (study / "empty.gmt").write_text("s\t-\tNOGENE\n")
    with pytest.raises(DataError, match="names no gene of human"):
        gene_set_components(study / "empty.gmt", small_vocabulary, ("human",), np.arange(9), 0)


def test_the_verb_prints_the_table(study, capsys):
    assert main([
        "evaluate", "genes", f"input={study / 'cells.h5ad'}", f"genes={study / 'tasks.tsv'}",
        f"groups={study / 'groups.tsv'}", "tasks=[module]", f"out={study / 'baselines'}",
        "draws=50", "species=human",
    ]) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "coexpression_pca" in said and "Written to" in said and "finetuned" not in said
