"""Vectors of genes: sums over cells against one cell at a time, whatever the order; refusals."""

import numpy as np
import pandas as pd
import pytest
import torch

import genemodel as gm
from genemodel.batches.loader import pack, rank_scale
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.gene_tasks import passes
from genemodel.gene_tasks.passes import TokenSums, with_context
from genemodel.inference.counts import VocabularyCells, window_of


@pytest.fixture(scope="module")
def one_by_one(gene_bundle, gene_cells):
    """Hidden states of every gene, cell by cell: {(gene, cell): (D,)}, by the plainest way."""
    cells = VocabularyCells(gene_cells.copy(), gene_bundle)
    (chunk,) = cells.chunks()
    window = window_of(chunk)
    ids = gene_bundle.vocabulary.token_ids()
    scale_V = rank_scale(gene_bundle.medians_V, gene_bundle.tokens.style)
    found = {}
    for row in range(len(window)):
        batch = pack(window, np.array([row]), scale_V, gene_bundle.tokens, budget=96, max_cells=4)
        with torch.no_grad():
            hidden_TD = gene_bundle.model(batch).hidden_TD
        for place in range(1, batch.n_tokens):
            found[ids[int(batch.gene_T[place])], row] = hidden_TD[place].double().numpy()
    return found


def test_contextual_vectors_are_means_over_the_cells_that_hold_a_gene(
    gene_bundle, gene_cells, one_by_one
):
    adata = gene_cells.copy()
    table = gm.gene_vectors(adata, gene_bundle, kind="contextual", spread=True)
    held = {gene for gene, _ in one_by_one}
    assert set(table.index) == held and gene_cells.var_names[-1] not in held
    for gene in list(table.index)[::9]:
        own = np.array([v for (g, _), v in one_by_one.items() if g == gene])
        assert table.loc[gene, "n_cells"] == len(own)
        np.testing.assert_allclose(
            table.loc[gene].filter(regex=r"^v\d").astype(float), own.mean(0), atol=2e-6
        )
        np.testing.assert_allclose(
            table.loc[gene].filter(regex=r"^sd\d").astype(float), own.std(0), atol=1e-5
        )
    # Beside the genes of the AnnData, and NaN where there is none.
    at = gene_cells.var_names.get_loc(table.index[3])
    np.testing.assert_array_equal(
        adata.varm["gene_vectors"][at], table.iloc[3].filter(regex=r"^v\d").astype(np.float32)
    )
    assert np.isnan(adata.varm["gene_vectors"][-1]).all()
    assert adata.uns["gene_vectors"]["model"] == gene_bundle.fingerprint


def test_neither_the_order_of_cells_nor_how_many_go_at_once_changes_a_vector(
    gene_bundle, gene_cells
):
    whole = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual")
    order = np.random.default_rng(1).permutation(gene_cells.n_obs)
    other = gm.gene_vectors(gene_cells[order].copy(), gene_bundle, kind="contextual", batch_size=1)
    pd.testing.assert_frame_equal(whole, other, rtol=0, atol=1e-6)


def test_labels_part_the_cells_and_those_without_count_in_the_whole(gene_bundle, gene_cells):
    whole = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual", min_cells=3)
    parts = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual", label_key="kind")
    alone = gm.gene_vectors(gene_cells[[5]].copy(), gene_bundle, kind="contextual")
    gene = gene_cells.var_names[40]
    rows = [parts.loc["a", gene], parts.loc["b", gene], alone.loc[gene]]
    n = np.array([row["n_cells"] for row in rows])
    assert n.tolist() == [24, 23, 1] and whole.loc[gene, "n_cells"] == 48
    mean = sum(k * row.filter(regex=r"^v\d").astype(float) for k, row in zip(n, rows, strict=True))
    np.testing.assert_allclose(
        mean / 48, whole.loc[gene].filter(regex=r"^v\d").astype(float), atol=1e-6
    )
    assert whole["n_cells"].min() >= 3


def test_static_vectors_are_those_of_the_tokens(gene_bundle, gene_cells):
    whole = gm.gene_vectors(None, gene_bundle)
    assert len(whole) == len(gene_bundle.vocabulary) - 3 and whole["seen"].all()
    weight = gene_bundle.model.embedding.token.weight.detach().numpy()
    np.testing.assert_array_equal(whole.filter(regex=r"^v\d"), weight[3:])
    named = gm.gene_vectors(
        gene_cells.copy(), gene_bundle, genes=list(gene_cells.var["symbol"][:2])
    )
    assert list(named.index) == list(gene_cells.var_names[:2])
    pd.testing.assert_frame_equal(named, whole.loc[named.index])


def test_a_longer_context_reaches_more_genes_and_ranks_have_an_end(
    gene_bundle, gene_cells, make_gene_bundle
):
    few = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual", context=20)
    many = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual", context=200)
    assert few["n_cells"].sum() == 19 * len(gene_cells) < many["n_cells"].sum()
    ranks = make_gene_bundle(position="rank", max_rank=96)
    with pytest.raises(ConfigError, match="knows 96 ranks"):
        with_context(ranks, 97)
    assert with_context(ranks, 50).tokens.context == 50
    assert with_context(ranks, 0) is ranks


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"kind": "static", "label_key": "kind"}, ConfigError, "label_key=kind says nothing"),
        ({"kind": "meaning"}, ConfigError, "static or contextual"),
        ({"kind": "contextual", "blocks": 3}, ConfigError, "the model has 2"),
        ({"kind": "contextual", "genes": ["NOSUCHGENE"]}, DataError, "NOSUCHGENE"),
        ({"kind": "contextual", "label_key": "knd"}, DataError, "knd"),
    ],
)
def test_refusals(gene_bundle, gene_cells, options, error, said):
    with pytest.raises(error, match=said):
        gm.gene_vectors(gene_cells.copy(), gene_bundle, **options)


def test_contextual_vectors_need_cells(gene_bundle):
    with pytest.raises(ConfigError, match="needs cells"):
        gm.gene_vectors(None, gene_bundle, kind="contextual")


def test_sums_that_would_fill_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(passes, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="10 genes × 2 groups of cells × 8 numbers"):
        TokenSums(np.arange(10), lambda x: x, 8, n_groups=2, device=torch.device("cpu"))


def test_the_verb_writes_what_the_call_gives(gene_bundle, gene_cells, tmp_path):
    gene_bundle.save(tmp_path / "bundle")
    gene_cells.write_h5ad(tmp_path / "cells.h5ad")
    words = ["genes", f"model={tmp_path / 'bundle'}", f"input={tmp_path / 'cells.h5ad'}",
             "kind=contextual", "label_key=kind", "device=cpu"]  # fmt: skip
    assert main([*words, f"output={tmp_path / 'genes.tsv.gz'}"]) == 0
    read = pd.read_csv(tmp_path / "genes.tsv.gz", sep="\t", index_col=[0, 1])
    table = gm.gene_vectors(gene_cells.copy(), gene_bundle, kind="contextual", label_key="kind")
    pd.testing.assert_frame_equal(read, table, check_dtype=False, rtol=1e-5)
    assert main([*words, f"output={tmp_path / 'genes.tsv.gz'}"]) == 2  # it exists
    assert main([*words, f"output={tmp_path / 'genes.doc'}"]) == 2
