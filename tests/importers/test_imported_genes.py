"""What imported models say of genes: against transformers, gene by gene."""

import numpy as np
import pytest
import torch
from tiny_models import cells, published_inputs, tokens_of, write_geneformer

import genemodel as gm
from genemodel.importers.importing import import_model

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("version", [1, 2])
def test_vectors_and_labels_of_genes_are_those_of_the_published_code(tmp_path, version):
    theirs = write_geneformer(
        tmp_path / "m", version, "BertForTokenClassification", id2label={0: "off", 1: "on"}
    )
    bundle = import_model(tmp_path / "m")
    adata = cells()
    median = dict(
        zip(bundle.vocabulary.token_ids(), np.asarray(bundle.medians_V, np.float64), strict=True)
    )
    context = bundle.tokens.context
    sequences = published_inputs(adata, version, median, context=context)
    gene_of = {token: name for name, token in tokens_of(version).items()}
    states, logits = {}, {}
    for sequence in sequences:
        with torch.no_grad():
            out = theirs(torch.tensor([sequence]), output_hidden_states=True)
        for place, token in enumerate(sequence):
            if token in gene_of and gene_of[token].startswith("ENSG"):
                # As is usual with them: of the block before the last one.
                states.setdefault(gene_of[token], []).append(out.hidden_states[-2][0, place])
                logits.setdefault(gene_of[token], []).append(out.logits[0, place])
    table = gm.gene_vectors(adata.copy(), bundle, kind="contextual", species="human")
    labels = gm.classify_genes(adata.copy(), bundle, species="human")
    assert set(table.index) == set(states)
    for gene, own in states.items():
        mean = torch.stack(own).mean(0).numpy()
        np.testing.assert_allclose(
            table.loc[gene].filter(regex=r"^v\d").astype(float), mean, atol=2e-5
        )
        probability = torch.stack(logits[gene]).mean(0).softmax(-1).numpy()
        np.testing.assert_allclose(
            labels.loc[gene, ["p_off", "p_on"]].astype(float), probability, atol=2e-5
        )
        assert labels.loc[gene, "n_cells"] == len(own)


def test_attributions_of_an_imported_cell_classifier_add_up(tmp_path):
    write_geneformer(tmp_path / "m", 2, "BertForSequenceClassification", id2label={0: "x", 1: "y"})
    bundle = import_model(tmp_path / "m")
    adata = cells()
    gm.attribute(adata, bundle, "y", steps=64, species="human")
    change_C = (adata.obs["attributions_score"] - adata.obs["attributions_baseline"]).to_numpy()
    total_C = np.asarray(adata.layers["attributions"].sum(1)).ravel()
    assert np.abs(change_C).max() > 1e-3
    np.testing.assert_allclose(total_C, change_C, atol=0.02 * np.abs(change_C).max())
    # Genes of no dictionary have no share.
    assert adata.layers["attributions"][:, -30:].nnz == 0
