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
    rate_CG = np.full((N_CELLS * 5, N_GENES), 1.0) * rng.uniform(1, 4, N_GENES)
    rate_CG[:, :3] = 1.0
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
    found = CountJacobian(bundle, genes, few.measured_V, 0, kept=1.0)
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


def test_directions_that_hold_most_are_enough(bundle, cells, names):
    """What is left out is small beside what is kept, as the share says."""
    few = network_cells(cells[:10].copy(), bundle)
    tokens = np.sort(names["token"].to_numpy())
    genes, made = Genes(tokens[:6], tokens), {}
    for kept in (1.0, 0.9):
        found = CountJacobian(bundle, genes, few.measured_V, 0, kept=kept)
        for batch in batches(few, bundle):
            found.add(batch)
        made[kept] = found
    assert made[0.9].passes < made[1.0].passes == 17
    whole, part = (made[kept].mean() for kept in (1.0, 0.9))
    assert 0 < np.linalg.norm(whole - part) < 0.35 * np.linalg.norm(whole)


def test_showing_the_network_alone_leaves_values_and_libraries(bundle, cells, names):
    few = network_cells(cells[:5].copy(), bundle)
    tokens = names["token"].to_numpy()[:9]
    (whole,), (part,) = batches(few, bundle), batches(few.showing(tokens), bundle)

    def values(batch):
        keys = zip(batch.segment_T.tolist(), batch.gene_T.tolist(), strict=True)
        return dict(zip(keys, batch.value_T.tolist(), strict=True))

    seen, all_of = values(part), values(whole)
    genes = {gene for _, gene in seen if gene > 2}
    assert genes <= set(tokens.tolist()) and len(genes) > 5
    # Cells are packed by length: what each gene's values are is compared, whatever the order.
    for gene in genes:
        ours = sorted(v for (_, g), v in seen.items() if g == gene)
        assert ours == sorted(v for (_, g), v in all_of.items() if g == gene)
    libraries = [np.sort(batch.library_C[:5]) for batch in (part, whole)]
    np.testing.assert_array_equal(*libraries)


# -- from the cells alone ------------------------------------------------------------------------


def test_partial_correlation_sees_through_a_chain():
    """One drives two drives three: given the second, the first and the third do not correlate."""
    rng = np.random.default_rng(0)
    one = rng.normal(size=4000)
    two = one + 0.7 * rng.normal(size=4000)
    three = two + 0.7 * rng.normal(size=4000)
    values = np.column_stack([one, two, three]).astype(np.float32)
    found, shrinkage = partial(values, np.arange(3), np.arange(3))
    assert np.corrcoef(one, three)[0, 1] > 0.6 and abs(found[0, 2]) < 0.05
    assert min(found[0, 1], found[1, 2]) > 0.5 and shrinkage < 0.05
    # the definition, by regression of both on the second
    rest = [x - np.polyval(np.polyfit(two, x, 1), two) for x in (one, three)]
    np.testing.assert_allclose(found[0, 2], np.corrcoef(*rest)[0, 1], atol=0.02)
    constant = np.column_stack([values, np.ones(4000, np.float32)])
    assert np.isfinite(partial(constant, np.arange(4), np.arange(4))[0]).all()


def test_boosted_trees_are_those_of_arboreto(cells):
    """Its settings, its early stopping and its importances, written out for one target."""
    from sklearn.ensemble import GradientBoostingRegressor

    values = np.log1p(cells.X.toarray())[:120, :12]
    sources = np.array([0, 1, 2, 5])
    found = grnboost(values, sources, np.array([3, 5]), seed=7)
    rounds = []

    def monitor(i, regressor, _):
        rounds.append(i)
        if i >= 24:
            return np.mean(regressor.oob_improvement_[max(0, i - 24) : i + 1]) < 0
        return False

    for place, (target, used) in enumerate(((3, [0, 1, 2, 5]), (5, [0, 1, 2]))):
        trees = GradientBoostingRegressor(
            learning_rate=0.01, n_estimators=5000, max_features=0.1, subsample=0.9, random_state=7
        ).fit(values[:, used].astype(np.float32), values[:, target].astype(np.float64),
              monitor=monitor)  # fmt: skip
        expected = np.zeros(4)
        expected[np.searchsorted(sources, used)] = trees.feature_importances_ * len(
            trees.estimators_
        )
        np.testing.assert_allclose(found[:, place], expected, rtol=1e-5)
    assert max(rounds) < 4999 and found[0, 0] > found[1:3, 0].max() and found[3, 1] == 0


# -- the whole -----------------------------------------------------------------------------------


def test_networks_find_who_drives_whom(cells, bundle, truth, names, tmp_path):
    result = gm.network(
        cells, bundle, truth=truth, n_genes=N_GENES, donor_key="donor", jacobian_cells=12,
        max_cells=150, bootstraps=20, min_fraction=0.0,
    )  # fmt: skip
    scores = result.scores.set_index("method")
    assert list(result.edges) == [
        "attention", "gene_vectors", "perturbation", "jacobian", "pearson", "partial", "grnboost"
    ]  # fmt: skip
    assert scores["edges"].unique().tolist() == [12] and scores["tfs"].unique().tolist() == [2]
    for method in ("pearson", "grnboost"):
        assert scores.loc[method, "epr"] == pytest.approx(1 / scores.loc[method, "density"])
        assert scores.loc[method, "matched_auroc"] == 1
        assert scores.loc[method, "stability"] > 0.4
    null = scores.loc[["mean expression", "mean of both"]]
    assert null["over_expression"].max() == 0  # that of the better of them
    np.testing.assert_allclose(
        scores["over_expression"], scores["auprc_ratio"] - null["auprc_ratio"].max()
    )
    assert np.isnan(scores.loc["gene_vectors", "stability"])
    best = result.edges["pearson"]
    assert list(best.columns) == ["source", "target", "weight"]
    assert (
        set(best["source"]) <= set(names["symbol"][:2]) and (best["source"] != best["target"]).all()
    )
    assert best["weight"].abs().is_monotonic_decreasing
    assert "matched AUROC" in result.describe()
    kept = cells.copy()
    gm.network(kept, methods="pearson", truth=truth, min_fraction=0.0)
    kept.write_h5ad(tmp_path / "kept.h5ad")
    read = ad.read_h5ad(tmp_path / "kept.h5ad").uns["genemodel_network"]
    assert read["edges"]["pearson"]["weight"].iloc[0] == pytest.approx(
        best["weight"].iloc[0], abs=0.1
    )


def test_prior_edges_count_neither_as_edges_nor_as_others(cells, truth, names, tmp_path):
    symbol = names["symbol"].tolist()
    prior = tmp_path / "prior.tsv"
    # Half of the first factor's edges, and pairs that are none.
    rows = [(symbol[0], symbol[t]) for t in (3, 4, 5, 30, 31)]
    pd.DataFrame(rows, columns=["source", "target"]).to_csv(prior, sep="\t", index=False)
    result = gm.network(
        cells, methods=["pearson"], truth=truth, prior=prior, bootstraps=0, min_fraction=0.0
    )
    of = result.scores[result.scores["method"] == "pearson"].set_index("truth")
    assert of.loc["all", "edges"] == 12 and of.loc["without prior", "edges"] == 9
    pairs = (of["edges"] / of["density"]).round().astype(int)
    assert pairs["all"] - pairs["without prior"] == 3  # of pairs to genes that the table names
    assert of.loc["without prior", "targets"] == of.loc["all", "targets"]


def test_the_verb_writes_tables_and_refuses_a_folder_of_others(cells, truth, tmp_path, capsys):
    file, out = tmp_path / "cells.h5ad", tmp_path / "out"
    cells.write_h5ad(file)
    words = [
        "network", f"input={file}", f"truth={truth}", f"out={out}", "methods=[pearson,partial]",
        "min_fraction=0", "bootstraps=10", "max_edges=7",
    ]  # fmt: skip
    assert main(words) == 0
    assert "AUPRC ratio" in capsys.readouterr().out
    edges = pd.read_csv(out / "pearson.tsv", sep="\t")
    assert list(edges.columns) == ["source", "target", "weight"] and len(edges) == 7
    about = json.loads((out / "network.json").read_text())
    assert about["summary"]["asked"]["max_edges"] == 7
    scores = pd.read_csv(out / "scores.tsv", sep="\t")
    assert about["scores"][0]["epr"] == pytest.approx(scores["epr"][0])
    assert main(words) == 2 and "overwrite=true" in capsys.readouterr().err
    assert main([*words, "overwrite=true"]) == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    words[3] = f"out={tmp_path / 'mine'}"
    assert main([*words, "overwrite=true"]) == 2
    assert "was not written by network" in capsys.readouterr().err


def test_without_a_model_what_asks_one_is_left_out_or_refused(cells, truth, make_bundle):
    result = gm.network(cells, truth=truth, bootstraps=0, n_genes=20, min_fraction=0.0)
    assert list(result.edges) == ["pearson", "partial", "grnboost"]
    assert "jacobian asks a model" in result.describe()
    with pytest.raises(ConfigError, match="jacobian asks a model: set model"):
        gm.network(cells, methods=["pearson", "jacobian"], min_fraction=0.0)
    with pytest.raises(ConfigError, match="lacks: pre-train one with it"):
        gm.network(cells, make_bundle(decoder=False), methods="jacobian")
    with pytest.raises(ConfigError, match="reads their ranks"):
        gm.network(cells, make_bundle(**SHAPES["ranks"]), methods="jacobian")


def test_network_refuses(cells, truth, names, tmp_path):
    def call(**given):
        gm.network(cells, **{"methods": "pearson", "min_fraction": 0.0} | given)

    with pytest.raises(ConfigError, match="did you mean 'grnboost'"):
        call(methods="grnboost2")
    with pytest.raises(ConfigError, match="prior is given and no truth"):
        call(prior=truth)
    with pytest.raises(DataError, match="truth=none.tsv is no file"):
        call(truth="none.tsv")
    kinds = tmp_path / "kinds.csv"
    symbol = names["symbol"].tolist()
    table = pd.DataFrame({"tf": symbol[:2], "target": symbol[3:5], "kind": ["chip", "knock-out"]})
    table.to_csv(kinds, index=False)
    with pytest.raises(ConfigError, match=r"2 kinds of edges \(chip, knock-out\): set truth_kind"):
        call(truth=kinds)
    with pytest.raises(ConfigError, match="truth_kind=ship"):
        call(truth=kinds, truth_kind="ship")
    with pytest.raises(ConfigError, match="has no column kind"):
        call(truth=truth, truth_kind="chip")
    call(truth=kinds, truth_kind="chip", bootstraps=0)
    table.drop(columns="target").to_csv(kinds, index=False)
    with pytest.raises(DataError, match="no column of targets"):
        call(truth=kinds, truth_kind="chip")
    with pytest.raises(DataError, match="'NOGENE' is no gene"):
        call(tfs=["NOGENE"])
    factors = tmp_path / "tfs.txt"
    factors.write_text(f"{symbol[0]}\nNOGENE\n")
    assert set(gm.network(cells, methods="pearson", tfs=str(factors), min_fraction=0.0)
               .edges["pearson"]["source"]) == {symbol[0]}  # fmt: skip
    with pytest.raises(ConfigError, match="and more: give one file, or names"):
        call(tfs=[str(factors), symbol[1]])
    with pytest.raises(DataError, match="names one donor"):
        one = cells[cells.obs["donor"] == "d0"].copy()
        gm.network(one, methods="pearson", donor_key="donor", min_fraction=0.0)
    most = int((cells.X[:, :2] > 0).sum(0).max()) + 1
    with pytest.raises(DataError, match=f"truth names 2 .* none is held by min_cells={most}"):
        call(truth=truth, min_cells=most)
    with pytest.raises(DataError, match="0 genes are held by min_cells=301"):
        call(truth=truth, min_cells=301)
