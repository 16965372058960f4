"""Attention between genes of an imported Geneformer against what transformers itself returns."""

import numpy as np
import pytest
import torch
from test_genecompass_parity import HUMAN, write_genecompass
from test_genecompass_parity import human as human_gene
from test_imported_models import cells as cells_of
from tiny_models import (
    GENES,
    cells,
    gene,
    published_inputs,
    tokens_of,
    write_dictionaries,
    write_geneformer,
)

import genemodel as gm
from genemodel.errors import ConfigError
from genemodel.importers.architecture import PRIORS
from genemodel.importers.importing import import_model
from genemodel.perturbation.passes import How, Perturber

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("version", [1, 2])
def test_attention_is_that_of_transformers(tmp_path, version):
    theirs = write_geneformer(tmp_path / "m", version)
    theirs.set_attn_implementation("eager")
    bundle = import_model(tmp_path / "m")
    adata = cells(n_cells=9, seed=5)
    asked = [gene(i) for i in range(0, GENES, 4)]
    found = gm.attention(adata, bundle, genes=asked, per_head=True, relative=False)
    median = write_dictionaries(tmp_path / "again", version)
    token = tokens_of(version)
    row_of = {token[name]: i for i, name in enumerate(asked)}
    total, n = np.zeros((12, len(asked), len(asked))), np.zeros((len(asked),) * 2)
    for sequence in published_inputs(adata, version, median, context=40):
        with torch.no_grad():
            said = theirs(torch.tensor([sequence]), output_attentions=True).attentions
        weight = torch.stack(said)[:, 0].flatten(0, 1).numpy()  # layers × heads, tokens, tokens
        at = [i for i, one in enumerate(sequence) if one in row_of]
        row = [row_of[sequence[i]] for i in at]
        total[np.ix_(range(12), row, row)] += weight[np.ix_(range(12), at, at)]
        n[np.ix_(row, row)] += 1
    np.testing.assert_array_equal(found.cells, n)
    there = n > 0
    np.testing.assert_allclose(
        found.weights[:, there], total[:, there] / n[there], rtol=1e-4, atol=1e-6
    )
    assert np.isnan(found.weights[:, ~there]).all() and there.sum() > 100
    assert found.heads == [(layer, head) for layer in range(3) for head in range(4)]


def test_a_genecompass_can_be_asked_too(tmp_path):
    write_genecompass(tmp_path / "m", PRIORS)
    bundle = import_model(tmp_path / "m")
    adata = cells_of([human_gene(i) for i in range(HUMAN)], seed=2)
    asked = [human_gene(i) for i in range(10)]
    found = gm.attention(adata, bundle, genes=asked, species="human", relative=False)
    assert (found.cells.diagonal() > 0).all()
    assert (found.weights[found.cells > 0] > 0).all() and np.nanmax(found.weights) < 1
    with pytest.raises(ConfigError, match="perturbation of genes is not made for models of gene"):
        gm.network(adata, bundle, methods="perturbation", species="human")
    adata.uns.clear()
    result = gm.network(
        adata, bundle, methods=["attention", "gene_vectors"], tfs=asked[:3], species="human"
    )
    assert set(result.edges) == {"attention", "gene_vectors"}


def test_genes_move_as_in_the_published_sequence_without_one(tmp_path):
    """Geneformer V2: the sequence in its published order, one token taken out."""
    theirs = write_geneformer(tmp_path / "m", 2)
    bundle = import_model(tmp_path / "m")
    adata = cells(n_cells=4, seed=6)
    median = write_dictionaries(tmp_path / "again", 2)
    token = tokens_of(2)
    sequences = published_inputs(adata, 2, median, context=40)
    gone = sequences[0][3]
    name = next(name for name, t in token.items() if t == gone)
    from genemodel.cells.input_settings import InputSettings
    from genemodel.networks.cells import read_network_cells

    view = read_network_cells(
        adata, bundle.vocabulary, InputSettings(), max_cells=0, seed=0, who="the model"
    )
    (ours,) = view.names.tokens([name], "genes")
    perturber = Perturber(bundle, How(operation="delete", held=False, mode="cls_and_gene"))
    sums = perturber.shifts(
        view.window, np.arange(4), [(ours,)], np.empty((0, 32)), None
    ).genes  # fmt: skip
    found = {}
    for sequence in sequences:
        if gone not in sequence:
            continue
        left = [t for t in sequence if t != gone]
        with torch.no_grad():
            before, after = (
                theirs(torch.tensor([s]), output_hidden_states=True).hidden_states[-2][0]
                for s in (sequence, left)
            )
        for place, one in enumerate(left):
            if one > 3:
                was = before[sequence.index(one)]
                cosine = torch.nn.functional.cosine_similarity(was, after[place], dim=0)
                found.setdefault(one, []).append(float(cosine))
    here = np.flatnonzero(sums.n_PV[0])
    here = here[here > 3]  # what closes a cell is no gene
    np.testing.assert_array_equal(sorted(found), here)  # V2's tokens are ours
    np.testing.assert_allclose(
        sums.sum_PV[0, here], [sum(found[one]) for one in here], rtol=0, atol=1e-4
    )
