"""Integrated gradients: they add up, and blame what is to blame and nothing else."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.attribution.integrated_gradients import integrated_gradients
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.errors import ConfigError, DataError
from genemodel.heads.labels import LabelHead, Labels, LabelSettings
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings

N_GENES, N_CELLS, CONTEXT = 60, 24, 64
LABELS = ("a", "b", "c")
RANKS = {"position": "rank", "values": False, "components": 0, "max_rank": CONTEXT, "norm": "post",
         "bias": True, "embedding_norm": True}  # fmt: skip


@pytest.fixture(scope="module")
def make(small_vocabulary):
    """``make(**shape)``: a bundle with a head of three labels, all of it random."""

    def build(**shape):
        torch.manual_seed(2)
        settings = ModelSettings(
            **{"layers": 2, "width": 16, "heads": 2, "ffn": 24, "components": 4, **shape}
        )
        model = GeneModel(
            settings, n_tokens=len(small_vocabulary), n_species=2, context=CONTEXT
        ).eval()
        head = LabelHead(16, Labels(LABELS, np.zeros(0, np.int32), np.ones(3)), LabelSettings())
        torch.nn.init.normal_(head.out.weight)
        return Bundle(
            model, small_vocabulary, TokenSettings(CONTEXT, CONTEXT * 8),
            np.full(len(small_vocabulary), 50, np.float32),
            heads={f"labels.{k}": v for k, v in head.state_dict().items()},
            settings={"labels": list(LABELS)},
        )  # fmt: skip

    return build


@pytest.fixture(scope="module")
def bundle(make):
    return make()


@pytest.fixture(scope="module")
def cells(small_vocabulary):
    genes = small_vocabulary.genes
    names = genes[genes["species"] == "human"]["ensembl_id"].iloc[:N_GENES].to_numpy()
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(1.0, 1.0, N_GENES), (N_CELLS, N_GENES))
    obs = pd.DataFrame(
        {"state": np.array(["ill", "well"])[np.arange(N_CELLS) % 2], "species": "human"},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    return ad.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=names)
    )


@pytest.mark.parametrize(
    "shape", [{}, {"embedding_norm": True}, RANKS], ids=["own", "norm", "ranks"]
)
def test_the_genes_of_a_cell_add_up_to_what_its_score_has_changed_by(make, cells, shape):
    adata = cells.copy()
    gm.attribute(adata, make(**shape), "b", steps=32)
    change_C = (adata.obs["attributions_score"] - adata.obs["attributions_baseline"]).to_numpy()
    total_C = np.asarray(adata.layers["attributions"].sum(1)).ravel()
    assert np.abs(change_C).max() > 0.05
    np.testing.assert_allclose(total_C, change_C, atol=2e-3 * np.abs(change_C).max())
    assert adata.uns["attributions"]["largest_gap"] < 0.05
    # What is attributed is the logit less the mean over labels; probabilities are its softmax.
    logits = []
    for label in LABELS:
        gm.attribute(adata, make(**shape), label, steps=1)
        logits.append(adata.obs["attributions_score"].to_numpy())
    probability = torch.tensor(np.array(logits).T).softmax(1).numpy()
    gm.annotate(adata, model=make(**shape), unknown=0.0)
    np.testing.assert_allclose(probability, adata.obsm["genemodel_label_probability"], atol=1e-5)


def test_a_gene_that_alone_speaks_to_the_cell_gets_all_of_it(make, cells):
    """Nothing but the components reaches the opening token, and of them one gene has a loading."""
    bundle = make()
    with torch.no_grad():
        for block in bundle.model.blocks:
            block.out.weight.zero_()
            block.ffn.down.weight.zero_()
        loading = bundle.model.embedding.components.loading.weight
        loading.zero_()
        token = int(bundle.vocabulary.match([cells.var_names[7]], species="human", min_fraction=0,
                                            min_genes=1).token_G[0])  # fmt: skip
        loading[token] = torch.tensor([1.0, -2.0, 0.5, 1.0])
    adata = cells.copy()
    table = gm.attribute(adata, bundle, "a", steps=24)
    layer = adata.layers["attributions"].toarray()
    assert table.index[0] == cells.var_names[7]
    assert np.abs(np.delete(layer, 7, 1)).max() == 0
    change_C = (adata.obs["attributions_score"] - adata.obs["attributions_baseline"]).to_numpy()
    np.testing.assert_allclose(layer[:, 7], change_C, rtol=1e-3, atol=1e-6)
    held = cells.X.toarray()[:, 7] > 0
    assert ((np.abs(layer[:, 7]) > 1e-6) == held).all()


def test_one_point_is_enough_where_the_score_is_linear(bundle, pack_random):
    """Of the input itself any number of points gives gradient times difference."""
    batch = pack_random(0, n_tokens=len(bundle.vocabulary), context=64, budget=256,
                        lengths=(40, 7, 50, 23))  # fmt: skip
    plain = GeneModel(
        ModelSettings(layers=1, width=16, heads=2, ffn=24, components=4, norm="post"),
        n_tokens=len(bundle.vocabulary), n_species=2, context=64,
    ).eval()  # fmt: skip
    plain.blocks = torch.nn.ModuleList()
    direction_D = torch.randn(16)

    def score(encoded, _):
        return encoded.cell_CD @ direction_D

    few = integrated_gradients(plain, batch, score, steps=1)
    many = integrated_gradients(plain, batch, score, steps=9)
    np.testing.assert_allclose(few.worth_T, many.worth_T, atol=1e-5)
    total_C = np.bincount(batch.segment_T, few.worth_T.numpy())[:4]
    np.testing.assert_allclose(total_C, (few.score_C - few.baseline_C)[:4], atol=1e-4)


def test_neither_order_nor_size_of_batches_changes_an_attribution(bundle, cells):
    whole, other = cells.copy(), cells[::-1].copy()
    gm.attribute(whole, bundle, "c", steps=4)
    gm.attribute(other, bundle, "c", steps=4, batch_tokens=CONTEXT)
    np.testing.assert_allclose(
        whole.layers["attributions"].toarray(), other.layers["attributions"].toarray()[::-1],
        atol=1e-6,
    )  # fmt: skip


def test_tables_are_means_of_the_layer(bundle, cells):
    adata = cells.copy()
    table = gm.attribute(adata, bundle, "a", steps=2, label_key="state")
    layer = pd.DataFrame(adata.layers["attributions"].toarray(), adata.obs_names, adata.var_names)[
        (adata.obs["state"] == "ill").to_numpy()
    ]
    own = table.loc["ill"]
    np.testing.assert_allclose(own["attribution"], layer.mean()[own.index], atol=1e-6)
    held = (adata[layer.index].X.toarray() > 0).sum(0)
    np.testing.assert_array_equal(own["n_cells"], pd.Series(held, adata.var_names)[own.index])
    assert own["attribution"].abs().is_monotonic_decreasing
    # Without a target each cell is asked about its own label.
    table = gm.attribute(adata, bundle, steps=2)
    gm.annotate(adata, model=bundle, unknown=0.0)
    assert set(table.index.get_level_values(0)) == set(adata.obs["genemodel_label"].astype(str))
    assert (adata.obs["attributions_score"] > 0).all()  # the most probable is above the mean


def test_a_direction_between_states_is_that_of_the_embedding(bundle, cells):
    adata = cells.copy()
    gm.embed(adata, bundle)
    vector = adata.obsm["X_genemodel"]
    ill = (adata.obs["state"] == "ill").to_numpy()
    direction = vector[~ill].mean(0) - vector[ill].mean(0)
    gm.attribute(adata, bundle, state_key="state", start_state="ill", goal_state="well", steps=2)
    expected = vector @ direction / np.linalg.norm(direction)
    np.testing.assert_allclose(adata.obs["attributions_score"], expected, atol=1e-5)
    first = adata.layers["attributions"].toarray()
    gm.attribute(adata, bundle, direction.astype(np.float64), steps=2)
    np.testing.assert_allclose(adata.layers["attributions"].toarray(), first, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "options", "error", "said"),
    [
        ("d", {}, DataError, "knows a, b, c"),
        (np.ones(3), {}, ConfigError, "one number for each of the 16"),
        ("a", {"steps": 0}, ConfigError, "steps is 0"),
        ("a", {"state_key": "state"}, ConfigError, "needs state_key, start_state and goal_state"),
        (None, {"state_key": "state", "start_state": "ill", "goal_state": "wel"}, DataError,
         "Did you mean 'well'"),
    ],
)  # fmt: skip
def test_refusals(bundle, cells, target, options, error, said):
    with pytest.raises(error, match=said):
        gm.attribute(cells.copy(), bundle, target, **options)


def test_a_model_without_labels_says_what_else_can_be_asked(make, cells):
    silent = make()
    silent.heads, silent.settings = {}, {}
    with pytest.raises(DataError, match="finetune task=classify"):
        gm.attribute(cells.copy(), silent)
