"""Labels of genes: the loss by definition, what it reaches, what it must not know, and files."""

import numpy as np
import pandas as pd
import pytest
import torch

import genemodel as gm
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.head_run import HeadRun
from genemodel.gene_tasks.tables import GeneTask
from genemodel.gene_tasks.training import (
    GeneCells,
    GeneLabelSettings,
    cross_validate,
    mean_logits,
    train_gene_labels,
)
from genemodel.heads.gene_labels import NAME, GeneLabelHead, GeneLabelObjective, token_weights
from genemodel.inference.counts import VocabularyCells
from genemodel.model.gene_model import Encoded
from genemodel.model.tuning import TuningSettings

# Without weight decay, which would change weights that no gradient reaches.
SHORT = GeneLabelSettings(steps=3, batch_cells=8, folds=2, min_cells=1, weight_decay=0.0)


@pytest.fixture(scope="module")
def data(gene_bundle, gene_cells):
    return GeneCells.held(VocabularyCells(gene_cells.copy(), gene_bundle))


@pytest.fixture(scope="module")
def task(gene_bundle, gene_cells):
    """Whether a gene is one of those that differ between the types."""
    match = gene_bundle.vocabulary.match(gene_cells.var_names, species="human")
    token_G = match.token_G.astype(np.int64)
    code_G = (np.arange(len(token_G)) < 30).astype(np.int64)
    family_G = [f"f{i // 3}" for i in range(len(token_G))]
    return GeneTask("differ", ("no", "yes"), list(gene_cells.var_names), token_G, code_G, family_G)


def test_genes_count_alike_whatever_they_are_held_by_and_labels_too():
    code_V = np.array([-1, 0, 0, 0, 1, 1, -1])
    n_V = np.array([9, 10, 20, 0, 10, 5, 4])
    weight_V = token_weights(code_V, n_V, balanced=False)
    total_V = weight_V * n_V
    assert total_V[[0, 3, 6]].tolist() == [0, 0, 0]
    np.testing.assert_allclose(total_V[[1, 2, 4, 5]], 45 / 4, rtol=1e-6)
    total_V = token_weights(np.where(code_V == 1, [1, 1, 1, 1, 1, -1, 1], code_V), n_V,
                            balanced=True) * n_V  # fmt: skip
    np.testing.assert_allclose(total_V[[1, 2]].sum(), total_V[4], rtol=1e-6)
    # A gene of one cell would count ten thousand times as much a token: it is held back.
    weight_V = token_weights(np.array([0, 1]), np.array([10_000, 1]), balanced=False)
    assert 5 < weight_V[1] / weight_V[0] < 25


def test_the_loss_is_weighted_cross_entropy_over_labelled_tokens(pack_random):
    batch = pack_random(0)
    rng = np.random.default_rng(0)
    code_V = rng.integers(-1, 3, 203)
    code_V[:3] = -1  # no gene
    n_V = rng.integers(1, 9, 203)
    weight_V = token_weights(code_V, n_V, balanced=True)
    torch.manual_seed(0)
    head = GeneLabelHead(8, 3)
    torch.nn.init.normal_(head.out.weight)
    objective = GeneLabelObjective(head, code_V, weight_V, n_V)
    hidden_TD = torch.randn(batch.gene_T.shape[0], 8)
    prepared = objective.prepare(batch)
    part = objective(None, Encoded(hidden_TD, hidden_TD[:4]), prepared)[NAME]
    expected, items = 0.0, 0
    for place in range(batch.n_tokens):
        gene = int(batch.gene_T[place])
        if code_V[gene] < 0:
            continue
        log_p = head(hidden_TD[place]).detach().log_softmax(-1)
        expected -= float(weight_V[gene] * log_p[code_V[gene]])
        items += 1
    assert float(part.total) == pytest.approx(expected, rel=1e-5)
    assert int(part.items) == items > 20
    assert 0 < float(part.trivial) < 3 * items


@pytest.mark.parametrize("tune", ["frozen", "lora", "last", "full"])
def test_the_loss_reaches_what_learns_of_the_backbone(data, task, gene_bundle, tune):
    before = {k: v.clone() for k, v in gene_bundle.model.state_dict().items()}
    trained = train_gene_labels(
        data, gene_bundle, task.codes(len(gene_bundle.vocabulary)), 2,
        TuningSettings(tune=tune, rank=2), SHORT, HeadRun(device="cpu"),
    )  # fmt: skip
    after = trained.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    blocks = {name.split(".")[1] for name in changed if name.startswith("blocks")}
    assert blocks == {"frozen": set(), "last": {"1"}}.get(tune, {"0", "1"})
    # Matrices alone change by adapters; everything that a gene's vector is made of by full.
    assert ("embedding.token.weight" in changed) == (tune == "full")
    assert trained.head.out.weight.abs().sum() > 0
    assert all(torch.equal(before[k], v) for k, v in gene_bundle.model.state_dict().items())


def test_predictions_of_a_fold_know_nothing_of_its_labels(data, task, gene_bundle):
    fold_G = np.arange(len(task)) // 3 % 2
    tuning = TuningSettings(tune="last")

    def found(code_G):
        other = GeneTask(task.name, task.labels, task.gene_G, task.token_G, code_G, task.family_G)
        return cross_validate(
            data, gene_bundle, other, tuning, SHORT, lambda _: HeadRun(device="cpu"), fold_G=fold_G
        ).logit_GL

    first = found(task.code_G)
    turned = np.where(fold_G == 0, 1 - task.code_G, task.code_G)
    second = found(turned)
    np.testing.assert_array_equal(first[fold_G == 0], second[fold_G == 0])
    assert np.nanmax(np.abs(first - second)[fold_G == 1]) > 1e-6
    assert np.isnan(first[-1]).all()  # no cell holds it


def test_one_prediction_a_gene_is_the_mean_over_its_cells(data, gene_bundle, gene_cells):
    torch.manual_seed(0)
    head = GeneLabelHead(16, 2)
    torch.nn.init.normal_(head.out.weight)
    linear = torch.nn.Linear(16, 2)
    linear.requires_grad_(False)
    match = gene_bundle.vocabulary.match(gene_cells.var_names, species="human")
    token_R = match.token_G[[40, 3]].astype(np.int64)
    n_R, logit_RL = mean_logits(gene_bundle, linear, 2, data, token_R)
    vectors = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual")
    # Of a linear head the mean over cells is that of the mean.
    mean_RD = vectors.loc[gene_cells.var_names[[40, 3]]].filter(regex=r"^v\d").to_numpy(np.float32)
    np.testing.assert_allclose(
        logit_RL, linear(torch.from_numpy(mean_RD.copy())).numpy(), atol=1e-5
    )
    assert n_R[0] == len(gene_cells)
    again = mean_logits(gene_bundle, head, 2, data, token_R[::-1].copy(), batch_size=2)[1]
    np.testing.assert_allclose(
        mean_logits(gene_bundle, head, 2, data, token_R)[1], again[::-1], atol=1e-6
    )


def test_no_labelled_gene_in_the_cells_is_refused(data, gene_bundle):
    with pytest.raises(DataError, match="no cell holds a gene with a label"):
        train_gene_labels(
            data, gene_bundle, np.full(len(gene_bundle.vocabulary), -1), 2,
            TuningSettings(tune="frozen"), SHORT, HeadRun(device="cpu"),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="folds=1"):
        GeneLabelSettings(folds=1)
    with pytest.raises(ConfigError, match="steps=0"):
        GeneLabelSettings(steps=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, gene_bundle, gene_cells, task):
    folder = tmp_path_factory.mktemp("genes")
    gene_bundle.save(folder / "bundle")
    gene_cells.write_h5ad(folder / "cells.h5ad")
    kept = np.arange(len(task)) % 4 != 3
    pd.DataFrame(
        {"gene": np.array(task.gene_G)[kept], "label": np.array(task.labels)[task.code_G[kept]]}
    ).to_csv(folder / "task.tsv", sep="\t", index=False)
    return folder


def command(folder, *words):
    return [
        "finetune", f"input={folder / 'cells.h5ad'}", "task=genes", f"genes={folder / 'task.tsv'}",
        f"model={folder / 'bundle'}", "backbone=last", f"out={folder / 'out'}", "device=cpu",
        "trainer.accelerator=cpu", "gene_labels.steps=3", "gene_labels.batch_cells=8",
        "gene_labels.folds=2", "gene_labels.min_cells=2", "species=human", *words,
    ]  # fmt: skip


@pytest.mark.usefixtures("blank_report")
def test_from_a_table_to_a_model_that_labels_new_genes(finished, gene_cells):
    out = finished / "out"
    assert main(command(finished)) == 0
    rows = pd.read_csv(out / "genes.tsv", sep="\t", index_col="gene")
    assert (
        set(rows["label"]) == {"no", "yes"} and rows.groupby("family")["fold"].nunique().max() == 1
    )
    known = rows["p_yes"].notna()
    np.testing.assert_allclose((rows["p_yes"] + rows["p_no"])[known], 1, rtol=1e-6)
    assert (known == (rows["n_cells"] >= 2)).all()
    model = gm.load(out / "gene_classifier", device="cpu")
    assert model.provenance["gene_labels"].count("AUROC") == 1
    assert model.training.sources[-1].n_trained == len(gene_cells)
    table = gm.classify_genes(gene_cells.copy(), model)
    new = table[~table["trained_on"]]
    assert len(new) >= 25 and set(new["label"].dropna()) <= {"no", "yes"}
    held = table["n_cells"] >= 2
    assert (table["label"].notna() == held).all()
    np.testing.assert_allclose((table["p_yes"] + table["p_no"])[held], 1, rtol=1e-6)
    # The verb says the same, and the cells of a finished run are not trained on again.
    assert main(["genes", f"model={out / 'gene_classifier'}", "kind=labels", "device=cpu",
                 f"input={finished / 'cells.h5ad'}", f"output={out / 'all.csv'}"]) == 0  # fmt: skip
    read = pd.read_csv(out / "all.csv", index_col="gene")
    np.testing.assert_allclose(read["p_yes"], table["p_yes"], rtol=1e-5)
    before = (out / "gene_classifier" / "model.json").stat().st_mtime_ns
    assert main(command(finished)) == 0
    assert (out / "gene_classifier" / "model.json").stat().st_mtime_ns == before
    assert main(command(finished, "gene_labels.steps=4")) == 2  # another run


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("batch_key=[kind]",), "batch_key=.* says nothing to task=genes"),
        (("label_key=kind",), "label_key=kind says nothing to task=genes"),
        (("genes=''",), "task=genes needs genes"),
        (("task=integrate", "batch_key=[kind]"), "says nothing to task=integrate"),
        (("model=''", "backbone=frozen"), "task=genes reads a backbone"),
        (("gene_labels.task=other",), "has no task 'other'"),
    ],
)
def test_what_the_verb_refuses(finished, words, said, capsys):
    import re

    assert main([*command(finished, *words), f"out={finished / 'refused'}"]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (finished / "refused").exists()


def test_a_model_without_the_head_says_how_to_get_one(gene_bundle, gene_cells):
    with pytest.raises(DataError, match="finetune task=genes"):
        gm.classify_genes(gene_cells.copy(), gene_bundle)
