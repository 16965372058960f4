"""An imported Geneformer against transformers: every hidden state, every logit, every token."""

import numpy as np
import pytest
import torch
from tiny_models import cells, published_inputs, write_dictionaries, write_geneformer

import genemodel as gm
from genemodel.batches.loader import pack, rank_scale
from genemodel.heads.published import PublishedGeneHead
from genemodel.importers.importing import import_model
from genemodel.inference.counts import VocabularyCells, window_of

transformers = pytest.importorskip("transformers")
# fp32: sums of three layers in another order than transformers'.
CLOSE = {"rtol": 0, "atol": 1e-5}


def packed(bundle, adata):
    view = VocabularyCells(adata, bundle)
    (chunk,) = view.chunks()
    return pack(
        window_of(chunk), np.arange(adata.n_obs),
        rank_scale(bundle.medians_V, bundle.tokens.style), bundle.tokens,
    )  # fmt: skip


def source_of(bundle):
    """Published token of each of ours, from what the vocabulary says."""
    v2 = bundle.tokens.style == "geneformer_v2"
    n = len(bundle.vocabulary)
    return np.arange(n) if v2 else np.array([0, 1, -1, *range(2, n - 1)])


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_hidden_states_and_logits_are_those_of_transformers(tmp_path, version, activation):
    theirs = write_geneformer(tmp_path / "m", version, hidden_act=activation)
    bundle = import_model(tmp_path / "m")
    adata = cells()
    median = write_dictionaries(tmp_path / "again", version)
    sequences = published_inputs(adata, version, median, context=40)
    assert max(map(len, sequences)) == 40  # some are cut
    batch = packed(bundle, adata)
    source = source_of(bundle)
    starts = batch.starts_C1.numpy()
    head = bundle.head("published_gene", PublishedGeneHead(bundle.model.settings, len(source)))
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    for row, tokens in enumerate(sequences):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        own = batch.gene_T[starts[row] : starts[row + 1]].numpy()
        assert source[own].tolist() == tokens
    with torch.no_grad():
        said = theirs(ids, attention_mask=(ids > 0).long(), output_hidden_states=True)
        ours = [bundle.model(batch, layer).hidden_TD for layer in range(4)]
        logits = head(ours[-1], bundle.model.embedding.token.weight)
    for row, tokens in enumerate(sequences):
        own = slice(starts[row], starts[row + 1])
        for layer in range(4):
            torch.testing.assert_close(
                ours[layer][own], said.hidden_states[layer][row, : len(tokens)], **CLOSE
            )
        at = source >= 0
        torch.testing.assert_close(
            logits[own][:, at], said.logits[row, : len(tokens)][:, source[at]], **CLOSE
        )


@pytest.mark.parametrize("version", [1, 2])
def test_embeddings_are_means_of_genes_in_the_second_to_last_layer(tmp_path, version):
    theirs = write_geneformer(tmp_path / "m", version)
    import_model(tmp_path / "m").save(tmp_path / "b")
    adata = cells(n_cells=9, seed=3)
    gm.embed(adata, tmp_path / "b")
    median = write_dictionaries(tmp_path / "again", version)
    for row, tokens in enumerate(published_inputs(adata, version, median, context=40)):
        with torch.no_grad():
            hidden = theirs(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-2][0]
        genes = hidden[1:-1] if version == 2 else hidden
        np.testing.assert_allclose(adata.obsm["X_genemodel"][row], genes.mean(0), rtol=0, atol=1e-5)


def test_the_cls_token_of_the_last_layer_where_it_is_asked_for(tmp_path):
    theirs = write_geneformer(tmp_path / "m", 2)
    bundle = import_model(tmp_path / "m", cell="opening", cell_layer=0)
    adata = cells(n_cells=3)
    gm.embed(adata, bundle)
    median = write_dictionaries(tmp_path / "again", 2)
    for row, tokens in enumerate(published_inputs(adata, 2, median, context=40)):
        with torch.no_grad():
            hidden = theirs(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
        np.testing.assert_allclose(adata.obsm["X_genemodel"][row], hidden[0], rtol=0, atol=1e-5)
