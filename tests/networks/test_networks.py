"""Gene networks: what each method computes, what is scored, what is refused and written."""

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.heads.decode_counts import CountDecoder
from genemodel.inference.cell_vectors import cell_projection
from genemodel.model.attention import attend
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.networks.attention_sums import AttentionSums
from genemodel.networks.cells import Genes, batches, read_network_cells
from genemodel.networks.classical import grnboost, partial
from genemodel.networks.jacobian import CountJacobian

N_GENES, N_CELLS, CONTEXT = 40, 60, 64


@pytest.fixture(scope="module")
def names(small_vocabulary):
    genes = small_vocabulary.genes
    return genes[(genes["species"] == "human") & (genes["symbol"] != "")].iloc[:N_GENES]


@pytest.fixture(scope="module")
def cells(names):
    """Three factors drive six genes each; the rest follow nothing. Six donors."""
    rng = np.random.default_rng(3)
    rate_CG = np.full((N_CELLS * 5, N_GENES), 2.0)
    for factor in range(3):
        activity_C = rng.gamma(1.5, 1.0, len(rate_CG))
        rate_CG[:, factor] *= activity_C
        rate_CG[:, 3 + 6 * factor : 9 + 6 * factor] *= activity_C[:, None]
    counts = rng.poisson(rate_CG * 2)
    obs = pd.DataFrame(
        {"species": "human", "donor": [f"d{i % 6}" for i in range(len(counts))]},
        index=[f"cell{i}" for i in range(len(counts))],
    )
    var = pd.DataFrame(index=pd.Index(names["ensembl_id"].astype(str)))
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def truth(names, tmp_path_factory):
    """Edges of two of the factors, by symbol, and one of a gene that nobody knows."""
    symbol = names["symbol"].tolist()
    rows = [
        (symbol[factor], symbol[target])
        for factor in range(2) for target in range(3 + 6 * factor, 9 + 6 * factor)
    ]  # fmt: skip
    path = tmp_path_factory.mktemp("truth") / "truth.tsv.gz"
    table = pd.DataFrame([*rows, ("NOGENE", symbol[1])], columns=["tf", "target"])
    table.to_csv(path, sep="\t", index=False)
    return path


@pytest.fixture(scope="module")
def make_bundle(small_vocabulary):
    def make(*, decoder=True, **shape):
        torch.manual_seed(1)
        n_tokens, n_species = len(small_vocabulary), len(small_vocabulary.species)
        settings = ModelSettings(
            **{"layers": 2, "width": 16, "heads": 2, "ffn": 24, "components": 4, **shape}
        )
        model = GeneModel(settings, n_tokens=n_tokens, n_species=n_species, context=CONTEXT)
        heads = {}
        if decoder:
            from genemodel.corpus.statistics import GeneStatistics

            rng = np.random.default_rng(0)
            statistics = GeneStatistics(
                frequency_SV=rng.dirichlet(np.ones(n_tokens), n_species),
                mean_value_SV=rng.uniform(1, 5, (n_species, n_tokens)),
                rate_SV=rng.dirichlet(np.ones(n_tokens), n_species),
                dispersion_V=rng.uniform(0.5, 3, n_tokens),
                present_SV=np.ones((n_species, n_tokens), bool),
            )
            head = CountDecoder(16, statistics, 1, torch.ones(1, n_tokens, dtype=torch.bool))
            torch.nn.init.normal_(head.projection.project.weight, std=0.5)
            heads = {f"decode_counts.{k}": v.detach() for k, v in head.state_dict().items()}
        medians_V = np.random.default_rng(0).uniform(20, 200, n_tokens).astype(np.float32)
        tokens = TokenSettings(context=CONTEXT, budget=CONTEXT * 16)
        return Bundle(model.eval(), small_vocabulary, tokens, medians_V, heads)

    return make


@pytest.fixture(scope="module")
def bundle(make_bundle):
    return make_bundle()


def network_cells(adata, bundle):
    return read_network_cells(
        adata, bundle.vocabulary, InputSettings(), max_cells=0, seed=0, who="the model"
    )


# -- attention -----------------------------------------------------------------------------------


def dense_attention(bundle, cells, tokens):
    """Every block's scores of every cell, one whole matrix at a time; (L, H, G, G) and cells."""
    shape = bundle.model.settings
    total = np.zeros((shape.layers, shape.heads, tokens.size, tokens.size))
    n = np.zeros((tokens.size, tokens.size))
    for batch in batches(cells, bundle):
        x = bundle.model.embedding(batch)
        for layer, block in enumerate(bundle.model.blocks):
            given = block.norm1(x) if block.pre else x
            q, k, _ = block.qkv(given).view(len(x), 3, shape.heads, -1).unbind(1)
            for c in range(batch.n_cells):
                a, b = batch.starts_C1[c : c + 2].tolist()
                score = torch.einsum("thk,shk->hts", q[a:b], k[a:b]) * q.shape[-1] ** -0.5
                weight = (score.softmax(-1) * (b - a)).double().detach().numpy()
                gene = batch.gene_T[a:b].numpy()
                for i, one in enumerate(tokens):
                    for j, other in enumerate(tokens):
                        at, to = np.flatnonzero(gene == one), np.flatnonzero(gene == other)
                        if at.size and to.size:
                            total[layer, :, i, j] += weight[:, at[0], to[0]]
                            n[i, j] += layer == 0
            x = block(x, batch.starts_C1, batch.longest)
    return total / n, n


SHAPES = {
    "ours": {},
    "ranks": {
        "position": "rank", "values": False, "components": 0, "max_rank": CONTEXT, "norm": "post",
        "bias": True, "embedding_norm": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", list(SHAPES))
def test_attention_is_that_of_dense_matrices(kind, make_bundle, cells, names):
    bundle = make_bundle(decoder=False, **SHAPES[kind])
    few = cells[:20].copy()
    genes = names["symbol"].tolist()[:12]
    with torch.no_grad():
        expected, n = dense_attention(
            bundle, network_cells(few, bundle), names["token"].to_numpy()[:12]
        )
    apart = gm.attention(few, bundle, genes=genes, per_head=True)
    np.testing.assert_array_equal(apart.cells, n)
    np.testing.assert_allclose(apart.weights, expected.reshape(4, 12, 12), rtol=2e-5, atol=1e-6)
    mean = gm.attention(few, bundle, genes=genes)
    np.testing.assert_allclose(mean.weights, expected.mean((0, 1)), rtol=2e-5, atol=1e-6)
    one = gm.attention(few, bundle, genes=genes, layers=[1], heads=[0])
    np.testing.assert_allclose(one.weights, expected[1, 0], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(apart.matrix(1, 0), one.weights, rtol=1e-6)
    assert few.uns["genemodel_attention"]["genes"].tolist() == genes


def test_attention_in_pieces_is_the_same(bundle, cells, names, monkeypatch):
    from genemodel.networks import attention_sums

    whole = gm.attention(cells, bundle, n_genes=30)
    monkeypatch.setattr(attention_sums, "_SCORES_AT_ONCE", 200)
    pieces = gm.attention(cells, bundle, n_genes=30, batch_tokens=CONTEXT * 3)
    np.testing.assert_allclose(pieces.weights, whole.weights, rtol=1e-5)


def test_attention_adds_up_to_all_that_a_gene_looks_at(bundle, cells, names):
    """Of cells that hold the same genes: shares add up to 1 with the cell token's."""
    few = cells[:8].copy()
    few.X = sp.csr_matrix(np.ones(few.shape, np.float32) + np.arange(N_GENES, dtype=np.float32))
    shares = gm.attention(few, bundle, genes=names["symbol"].tolist(), relative=False)
    total = shares.weights.sum(1)
    assert ((total > 0.8) & (total < 1)).all()
    relative = gm.attention(few, bundle, genes=names["symbol"].tolist())
    np.testing.assert_allclose(relative.weights, shares.weights * (N_GENES + 1), rtol=1e-5)


def test_the_model_is_as_before_once_attention_is_measured(bundle, cells, monkeypatch):
    called = []

    def counted(*given):
        called.append(len(given))
        return attend(*given)

    before = gm.embed(cells.copy(), bundle)
    monkeypatch.setattr("genemodel.model.gene_model.attend", counted)
    gm.attention(cells, bundle, n_genes=5)
    assert called, "the pass itself goes through the one door to attention"
    assert not any(block.qkv._forward_hooks for block in bundle.model.blocks)
    monkeypatch.undo()
    again = gm.embed(cells.copy(), bundle)
    assert (before is None and again is None) or np.array_equal(before, again)


def test_attention_refuses(bundle, cells):
    with pytest.raises(DataError, match="'NOTAGENE' is no gene"):
        gm.attention(cells, bundle, genes=["NOTAGENE"])
    with pytest.raises(ConfigError, match="layers names 7, but the model has 2 blocks"):
        gm.attention(cells, bundle, layers=[7])
    with pytest.raises(ConfigError, match="heads names -1"):
        gm.attention(cells, bundle, heads=[-1])
    with pytest.raises(ConfigError, match="expected an AnnData"):
        gm.attention("cells.h5ad", bundle)
    with pytest.raises(DataError, match="averaged"):
        gm.attention(cells, bundle, n_genes=4).matrix(layer=0)
    many = np.arange(3, 1003)
    with pytest.raises(ConfigError, match="name fewer genes, layers or heads"):
        AttentionSums(bundle.model, np.tile(many, 12), np.tile(many, 12), apart=True)


# -- the Jacobian --------------------------------------------------------------------------------


def test_the_jacobian_is_what_one_count_more_does(bundle, cells, names):
    """Against differences of the whole path: tokens, values, library, depth, decoder."""
    few = network_cells(cells[:6].copy(), bundle)
    tokens = names["token"].to_numpy()
    genes = Genes(np.sort(tokens[:4]), np.sort(tokens[:20]))
    found = CountJacobian(bundle, genes, few.measured_V, 0)
    for batch in batches(few, bundle):
        found.add(batch)
    weight = bundle.heads["decode_counts.gene.weight"].double()
    base = bundle.heads["decode_counts.base_SV"][0].double()
    measured = np.flatnonzero(few.measured_V)
    model, project = bundle.model.double(), cell_projection(bundle).double()
    try:
        def log_rates(counts):
            """Of one cell from its counts, in double precision."""
            import dataclasses

            chunk = dataclasses.replace(
                few.chunk, counts_CV=sp.csr_matrix(counts[None]), species_C=np.zeros(1, np.int64),
                library_C=np.array([counts.sum()], np.float64), total_C=None,
            )  # fmt: skip
            one = dataclasses.replace(few, chunk=chunk, row_C=np.zeros(1, np.int64))
            (batch,) = batches(one, bundle)
            exact = np.log1p(counts / counts.sum() * 1e4)
            batch.value_T = torch.from_numpy(exact)[batch.gene_T].where(batch.gene_T >= 3, 0.0)
            batch.library_C = batch.library_C.double()
            batch.library_C[0] = counts.sum()
            z = project(model(batch).cell_CD)[0]
            logits = (weight @ z + base)[measured]
            rate = torch.full((len(counts),), float("nan"), dtype=torch.float64)
            rate[measured] = logits.log_softmax(0)
            return rate.detach().numpy()[genes.targets]

        expected, n = np.zeros((4, 20)), np.zeros(4)
        for row in few.chunk.counts_CV.toarray().astype(np.float64):
            for s, source in enumerate(genes.sources):
                if row[source]:
                    step = np.zeros_like(row)
                    step[source] = 1e-5
                    slope = (log_rates(row + step) - log_rates(row - step)) / 2e-5
                    expected[s] += slope * row.sum() / 1e4  # a count per 10⁴
                    n[s] += 1
    finally:
        bundle.model.float()
    np.testing.assert_allclose(found.mean(), expected / n[:, None], rtol=2e-3, atol=1e-7)
    assert np.abs(expected).max() > 1e-4
