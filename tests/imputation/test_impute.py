"""gm.impute: nearer to the truth than the counts, calibrated, in order, bounded, refusing well."""

import logging
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.command.cli import main
from genemodel.corpus.statistics import GeneStatistics
from genemodel.errors import ConfigError, DataError
from genemodel.expression.thinning import split_molecules
from genemodel.heads.decode_counts import CountDecoder
from genemodel.imputation import impute as module
from genemodel.imputation import plan, ways
from genemodel.imputation.network import DecoderSettings
from genemodel.imputation.posterior import (
    posterior_gamma,
    randomised_pit,
    tally_coverage,
)
from genemodel.inference.cell_vectors import encode
from genemodel.inference.counts import VocabularyCells
from genemodel.simulation.cells import synthetic

QUICK = DecoderSettings(hidden=16, latent=4, epochs=2)


@pytest.fixture(scope="module")
def cells():
    """Three hundred human cells, two batches, with their true rates."""
    return synthetic(
        300, species=("human",), n_genes=300, genes_per_cell=100, n_batches=2, seed=1,
        with_truth=True,
    )["human"]  # fmt: skip


@pytest.fixture(scope="module")
def done(cells):
    """The cells imputed from nine tenths of their molecules, the other tenth, and the model."""
    seen, held = split_molecules(cells.X, 0.9, np.random.default_rng(0))
    adata = ad.AnnData(seen, obs=cells.obs.copy(), var=cells.var.copy())
    model = gm.impute(
        adata, batch_key="batch", uncertainty=True, draws=3, quantiles=(0.05, 0.975), seed=2
    )
    return adata, held, model


def small(cells, n=60):
    return ad.AnnData(cells.X[:n].copy(), obs=cells.obs[:n].copy(), var=cells.var.copy())


def log_error(rate, truth):
    return np.mean((np.log1p(rate) - np.log1p(truth)) ** 2)


def test_nearer_to_the_truth_than_counts_and_gene_means(cells, done):
    adata, _, model = done
    truth = 0.9 * cells.layers["true_rate"]
    counts = adata.X.toarray()
    gene_mean = counts.sum(1, keepdims=True) * counts.sum(0) / counts.sum()
    ours = log_error(adata.layers["imputed"], truth)
    assert ours < 0.4 * log_error(counts, truth)
    assert ours < 0.9 * log_error(gene_mean, truth)
    decoder = model.posterior(kind="decoder").mean
    assert np.mean((decoder - truth) ** 2) < 0.9 * np.mean((gene_mean - truth) ** 2)
    assert np.mean((decoder - truth) ** 2) < 0.5 * np.mean((counts - truth) ** 2)


def test_intervals_hold_what_was_never_shown(done):
    adata, held, model = done
    posterior = model.posterior()
    held = held.toarray()
    rng = np.random.default_rng(1)
    pit = randomised_pit(held, posterior.shape_CG, posterior.rate_CG, 1 / 9, rng)
    slices = np.digitize(posterior.mean / 9, [0.3])
    inside, entries = tally_coverage(pit, slices, 2)
    assert np.all(np.abs(inside / entries - 0.9) < 0.02)
    recorded = adata.uns["imputed"]["coverage"]
    assert 0.88 < recorded["overall"] < 0.92
    assert recorded["by_gene_decile"].shape == (10,)
    assert recorded["entries"].sum() == adata.n_obs * (model.kept_G.size)


def test_layers_are_the_posterior(done):
    adata, _, model = done
    posterior = model.posterior()
    for name in ("imputed", "imputed_sd", "imputed_q5", "imputed_q97.5", "imputed_draw2"):
        assert adata.layers[name].shape == adata.shape and adata.layers[name].dtype == np.float32
    np.testing.assert_allclose(adata.layers["imputed"], posterior.mean, rtol=1e-5)
    np.testing.assert_allclose(adata.layers["imputed_sd"], posterior.sd, rtol=1e-5)
    assert (adata.layers["imputed_sd"] > 0).all()
    low, high = adata.layers["imputed_q5"], adata.layers["imputed_q97.5"]
    assert (low <= high).all()
    draws = np.stack([adata.layers[f"imputed_draw{i}"] for i in range(3)])
    assert abs((draws < low).mean() - 0.05) < 0.01
    assert abs((draws > high).mean() - 0.025) < 0.01
    assert not np.array_equal(draws[0], draws[1])


def test_draws_have_the_mean_and_variance_of_the_posterior(done):
    _, _, model = done
    rows, genes = slice(0, 20), np.arange(0, 300, 3)
    posterior = model.posterior(rows, genes=genes)
    draws = model.draws(2000, rows, genes=genes, seed=4)
    z = (draws.mean(0) - posterior.mean) / (posterior.sd / np.sqrt(2000))
    assert abs(z.mean()) < 0.1 and 0.9 < z.std() < 1.1
    frequent = posterior.shape_CG > 2
    ratio = draws.var(0)[frequent] / posterior.sd[frequent] ** 2
    assert abs(ratio.mean() - 1) < 0.02
    np.testing.assert_array_equal(draws, model.draws(2000, rows, genes=genes, seed=4))


def test_blocks_of_equal_cells_get_draws_of_their_own(cells, monkeypatch):
    monkeypatch.setattr(ways, "BLOCK_CELLS", 30)
    half = small(cells, 30)
    adata = ad.concat([half, half], index_unique="-")
    gm.impute(adata, settings=QUICK, draws=2, key_added="drawn")
    drawn = [np.asarray(adata.layers[f"drawn_draw{m}"]) for m in (0, 1)]
    mean = np.asarray(adata.layers["drawn"])
    np.testing.assert_allclose(mean[:30], mean[30:], rtol=1e-5)
    for one, other in ((drawn[0][:30], drawn[0][30:]), (drawn[0], drawn[1])):
        there = (one > 1e-3) | (other > 1e-3)
        assert (one != other)[there].mean() > 0.99


def test_any_cells_and_genes_in_any_order(done):
    _, _, model = done
    whole = model.posterior().mean
    rows, genes = np.array([7, 3, 250]), np.array([5, 299, 0])
    some = model.posterior(rows, genes=genes).mean
    np.testing.assert_allclose(some, whole[np.ix_(rows, genes)], rtol=1e-4)
    mask = np.arange(300) % 100 == 3
    np.testing.assert_allclose(model.posterior(mask).mean, whole[mask], rtol=1e-4)


def test_library_scales_everything(done):
    _, _, model = done
    own, fixed = model.posterior(), model.posterior(library=1000)
    ratio = 1000 / model.library_C[:, None]
    np.testing.assert_allclose(fixed.mean, own.mean * ratio, rtol=1e-6)
    np.testing.assert_allclose(fixed.sd, own.sd * ratio, rtol=1e-6)
    np.testing.assert_allclose(fixed.quantiles([0.9]), own.quantiles([0.9]) * ratio, rtol=1e-6)
    assert abs(fixed.mean.sum(1) / 1000 - 1).max() < 0.1
    median = model.posterior(library="median").mean
    np.testing.assert_allclose(median, fixed.mean * np.median(model.library_C) / 1000, rtol=1e-6)
    np.testing.assert_allclose(model.posterior(library="0.5x").mean, own.mean / 2, rtol=1e-6)


@pytest.mark.parametrize("library", ["0x", "x", "half", "-1x", 0, True])
def test_a_library_that_is_none_is_refused(done, library):
    with pytest.raises(ConfigError, match="0.5x"):
        done[2].posterior(library=library)


def test_another_batch_moves_the_prior_and_keeps_the_evidence(done):
    adata, _, model = done
    names = model.batches
    assert set(names) == set(adata.obs["batch"])
    own = model.posterior(kind="decoder").mean
    there = model.posterior(kind="decoder", batch=names[0]).mean
    inside = (adata.obs["batch"] == names[0]).to_numpy()
    np.testing.assert_allclose(there[inside], own[inside], rtol=1e-4)
    assert np.abs(np.log(there[~inside] / own[~inside])).mean() > 0.01
    factor = model.posterior().mean / own
    moved = model.posterior(batch=names[0]).mean
    np.testing.assert_allclose(moved, there * factor, rtol=1e-4)
    gap = []
    for batch in (None, "mean"):
        share = model.posterior(kind="decoder", library=1, batch=batch).mean
        gap.append(np.abs(share[inside].mean(0) - share[~inside].mean(0)).sum())
    assert gap[1] < gap[0]


def test_the_decoder_is_the_posterior_without_evidence(done):
    adata, _, model = done
    prior = model.posterior(kind="decoder")
    np.testing.assert_allclose(prior.sd, prior.mean * np.sqrt(model.dispersion_G), rtol=1e-6)
    shape, rate = posterior_gamma(adata.X.toarray(), prior.mean, model.dispersion_G)
    np.testing.assert_allclose(model.posterior().mean, shape / rate, rtol=1e-6)


def test_logarithms_are_those_of_another_measurement(cells, done):
    """Drawn replicates of the posterior have the expected logarithms that are written."""
    _, _, model = done
    library_C = model.library_C[:40]
    posterior = model.posterior(slice(0, 40))
    draw = np.random.default_rng(0)
    rate = draw.gamma(posterior.shape_CG, 1 / posterior.rate_CG, (2000, *posterior.shape_CG.shape))
    replicate = np.log1p(1e4 * draw.poisson(rate) / library_C[:, None])
    found_CG = posterior.log_mean(library_C)
    error_CG = replicate.std(0) / np.sqrt(2000)
    assert (np.abs(found_CG - replicate.mean(0)) < 5 * error_CG + 0.01).all()
    adata = small(cells)
    written = gm.impute(adata, kind="log", settings=QUICK)
    expected_CG = written.posterior().log_mean(written.library_C)
    np.testing.assert_allclose(adata.layers["imputed"], expected_CG, rtol=1e-5)


def test_genes_asked_for_become_a_table(cells, done):
    adata = small(cells)
    symbols = adata.var["gene_symbol"].tolist()
    wanted = [adata.var_names[5], symbols[2], adata.var_names[0]]
    model = gm.impute(adata, genes=wanted, uncertainty=True, settings=QUICK)
    table = adata.obsm["imputed"]
    assert list(table.columns) == wanted and list(table.index) == list(adata.obs_names)
    assert "imputed" not in adata.layers and "imputed_sd" in adata.obsm
    expected = model.posterior(genes=[5, 2, 0]).mean
    np.testing.assert_allclose(table.to_numpy(), expected, rtol=1e-5)


def test_empty_cells_and_genes(cells, caplog):
    adata = small(cells)
    counts = adata.X.tolil()
    counts[4] = 0
    counts[:, 9] = 0
    adata.X = counts.tocsr()
    with caplog.at_level(logging.WARNING, logger="genemodel"):
        model = gm.impute(adata, uncertainty=True, settings=QUICK)
    assert "1 of 60 cells have no counts and get 0" in caplog.text
    mean = adata.layers["imputed"]
    assert np.allclose(mean[4], 0, atol=1e-9) and np.isfinite(mean).all()
    seen = np.arange(60) != 4
    assert 0 < mean[seen][:, 9].max() < 0.01
    gm.impute(adata, library="median", settings=QUICK)
    assert np.isnan(adata.layers["imputed"][4]).all()
    assert np.isfinite(adata.layers["imputed"][seen]).all()
    assert 9 not in model.kept_G and model.dispersion_G.shape == (300,)


def test_seed_and_species_of_the_input(cells):
    """The seed decides; the species plays no part and need not be there."""
    results = []
    for seed, drop in ((0, False), (0, True), (1, True)):
        adata = small(cells)
        if drop:
            del adata.obs["species"]
        gm.impute(adata, seed=seed, draws=1, settings=QUICK)
        results.append((adata.layers["imputed"], adata.layers["imputed_draw0"]))
        assert adata.uns["imputed"]["seed"] == seed
    for first, again, other in zip(*results, strict=True):
        np.testing.assert_array_equal(first, again)
        assert not np.array_equal(first, other)


def test_counts_may_be_in_a_layer_and_dense(cells):
    plain, hidden = small(cells), small(cells)
    hidden.layers["counts"] = hidden.X.toarray()
    hidden.X = np.log1p(hidden.layers["counts"])
    gm.impute(plain, settings=QUICK)
    gm.impute(hidden, layer="counts", settings=QUICK, key_added="denoised")
    np.testing.assert_array_equal(plain.layers["imputed"], hidden.layers["denoised"])
    assert hidden.uns["denoised"]["counts"] == "layers['counts']"


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".h5ad", ".zarr"])
def test_a_file_holds_what_memory_would(cells, tmp_path, ending):
    adata = small(cells, 300)  # more than one block
    options = {
        "batch_key": "batch", "uncertainty": True, "draws": 2, "quantiles": [0.5],
        "settings": QUICK, "seed": 3,
    }  # fmt: skip
    gm.impute(adata, **options)
    source = tmp_path / "in.h5ad"
    small(cells, 300).write_h5ad(source)
    output = tmp_path / f"out{ending}"
    gm.impute(source, output=output, **options)
    read = ad.read_zarr(output) if ending == ".zarr" else ad.read_h5ad(output)
    assert list(read.obs_names) == list(adata.obs_names)
    assert list(read.var_names) == list(adata.var_names)
    assert read.X is None and read.var["measured"].all()
    assert read.obs["batch"].astype(str).tolist() == adata.obs["batch"].astype(str).tolist()
    names = {"imputed", "imputed_sd", "imputed_q50", "imputed_draw0", "imputed_draw1"}
    assert names <= set(read.layers) and "imputed_dispersion" in read.var
    for name in names:
        np.testing.assert_array_equal(read.layers[name], adata.layers[name])
    assert read.uns["imputed"]["coverage"]["overall"] == pytest.approx(
        adata.uns["imputed"]["coverage"]["overall"]
    )
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    with pytest.raises(ConfigError, match="exists: set overwrite=true"):
        gm.impute(source, output=output, **options)
    gm.impute(source, output=output, overwrite=True, settings=QUICK, genes=[adata.var_names[3]])
    again = ad.read_zarr(output) if ending == ".zarr" else ad.read_h5ad(output)
    assert again.shape == (300, 1) and set(again.layers) == {"imputed"}


def test_a_failure_leaves_no_half_file(cells, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        gm.impute(small(cells), output=tmp_path / "o.h5ad", settings=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_the_same(cells, tmp_path, capsys):
    adata = small(cells)
    adata.write_h5ad(tmp_path / "in.h5ad")
    output = tmp_path / "out.h5ad"
    words = [
        "impute", f"input={tmp_path / 'in.h5ad'}", f"output={output}", "batch_key=batch",
        "library=median", "quantiles=[0.05]",
        f"genes=[{adata.var_names[0]},{adata.var_names[7]}]",
    ]  # fmt: skip
    assert main(words) == 0
    printed = capsys.readouterr()
    assert printed.out.strip() == str(output)
    assert "90 % intervals hold" in printed.err
    gm.impute(adata, batch_key="batch", library="median")
    np.testing.assert_array_equal(
        ad.read_h5ad(output).layers["imputed"], adata.layers["imputed"][:, [0, 7]]
    )
    assert main(words) == 2
    assert "overwrite=true" in capsys.readouterr().err


# -- unmeasured genes ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoding_bundle(random_bundle):
    """The random bundle with a random count decoder of three batches."""
    n = len(random_bundle.vocabulary)
    torch.manual_seed(1)
    decoder = CountDecoder(
        16, GeneStatistics.empty(2, n), 3, torch.zeros(1, n, dtype=torch.bool)
    )  # fmt: skip
    with torch.no_grad():
        decoder.base_SV.normal_()
        decoder.log_theta_V.normal_()
        decoder.projection.project.weight.normal_(std=0.3)
    heads = {f"decode_counts.{k}": v.clone() for k, v in decoder.state_dict().items()}
    return replace(random_bundle, heads=heads)


def test_unmeasured_genes_come_from_the_models_decoder(cells, decoding_bundle):
    adata = small(cells)
    vocabulary = decoding_bundle.vocabulary
    table = vocabulary.genes
    human = table[table["species"] == "human"]
    free = human[~human["ensembl_id"].isin(adata.var_names) & (human["symbol"] != "")]
    first, second = free["ensembl_id"].iloc[10], free["symbol"].iloc[500]
    wanted = [first, adata.var_names[3], second]
    options = {"genes": wanted, "uncertainty": True, "settings": QUICK}
    model = gm.impute(adata, decoding_bundle, **options)
    assert adata.uns["imputed"]["unmeasured"] == [first, second]
    assert adata.uns["imputed"]["model"] == decoding_bundle.fingerprint
    got = adata.obsm["imputed"]
    np.testing.assert_allclose(
        got[adata.var_names[3]], model.posterior(genes=[3]).mean[:, 0], rtol=1e-5
    )
    # The slow, obvious version: softmax weights relative to those of the measured genes.
    source = VocabularyCells(adata, decoding_bundle)
    chunk = next(source.chunks())
    z = encode(chunk, decoding_bundle).astype(np.float64)
    heads = {k: v.double().numpy() for k, v in decoding_bundle.heads.items()}
    weight = np.exp(z @ heads["decode_counts.gene.weight"].T + heads["decode_counts.base_SV"][0])
    share = weight / weight[:, source.measured_SV[0]].sum(1, keepdims=True)
    tokens = [
        int(free.loc[free["ensembl_id"] == first, "token"].iloc[0]),
        int(free.loc[free["symbol"] == second, "token"].iloc[0]),
    ]
    expected = share[:, tokens] * chunk.library_C[:, None]
    np.testing.assert_allclose(got[[first, second]].to_numpy(), expected, rtol=1e-3)
    theta = np.exp(heads["decode_counts.log_theta_V"][tokens])
    sd = adata.obsm["imputed_sd"][[first, second]].to_numpy()
    np.testing.assert_allclose(sd, expected / np.sqrt(theta), rtol=1e-3)


def test_a_file_says_which_genes_were_measured(cells, decoding_bundle, tmp_path):
    adata = small(cells)
    genes = decoding_bundle.vocabulary.genes
    human = genes[genes["species"] == "human"]["ensembl_id"]
    free = human[~human.isin(adata.var_names)].iloc[3]
    gm.impute(
        adata, decoding_bundle, genes=[free, adata.var_names[1]], library=500,
        output=tmp_path / "o.h5ad", settings=QUICK,
    )  # fmt: skip
    read = ad.read_h5ad(tmp_path / "o.h5ad")
    assert read.var["measured"].tolist() == [False, True]
    assert np.isfinite(read.layers["imputed"]).all()


def test_a_symbol_that_the_data_know_by_id_counts_as_measured(cells, random_bundle):
    """No decoder is needed then, and this bundle has none."""
    adata = small(cells)
    symbol = adata.var["gene_symbol"].iloc[4]
    del adata.var["gene_symbol"]
    model = gm.impute(adata, random_bundle, genes=[symbol], settings=QUICK)
    np.testing.assert_allclose(
        adata.obsm["imputed"][symbol], model.posterior(genes=[4]).mean[:, 0], rtol=1e-5
    )
    assert adata.uns["imputed"]["unmeasured"] == []
    free = "ENSG00000141510" if "ENSG00000141510" not in adata.var_names else "ENSG00000146648"
    with pytest.raises(DataError, match="no head 'decode_counts'"):
        gm.impute(adata, random_bundle, genes=[free], settings=QUICK)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_key": "btch"}, "no obs column 'btch'"),
        ({"batch": "mean"}, "needs batch_key"),
        ({"batch_key": "batch", "batch": "human_batch9"}, "did you mean 'human_batch"),
        ({"library": "mean"}, "'median', or a positive"),
        ({"library": -3.0}, "positive"),
        ({"kind": "prior"}, "'posterior', 'decoder' or 'log'"),
        ({"kind": "log", "draws": 2}, "expected logarithms only"),
        ({"draws": -1}, "draws is -1"),
        ({"quantiles": [5]}, "between 0 and 1"),
        ({"quantiles": [0.05, 0.9, 0.05]}, "'imputed_q5' twice"),
        ({"key_added": ""}, "key_added is empty"),
        ({"key_added": "a/b"}, "a slash"),
        ({"seed": -1}, "seed is -1"),
        ({"genes": []}, "empty list"),
        ({"genes": "CD4"}, "give a list"),
        ({"genes": ["A", "A"]}, "A more than once"),
        ({"output": "out.csv"}, "neither in .h5ad nor in .zarr"),
        ({"output": "no/such/o.h5ad"}, "folder no/such does not exist"),
        ({"layer": "spliced"}, "no layer 'spliced'"),
        ({"draws": 100_000}, r"100001 layers take 7.* GB.*output=.*genes="),
    ],
)  # fmt: skip
def test_refusals_before_any_work(cells, options, words, monkeypatch):
    monkeypatch.setattr(plan, "_read", None)  # nothing may get that far
    with pytest.raises((ConfigError, DataError), match=words):
        gm.impute(small(cells), **options)


def test_log_data_are_refused(cells):
    adata = small(cells)
    adata.X = adata.X.astype(np.float32).log1p()
    with pytest.raises(DataError, match="not raw counts"):
        gm.impute(adata)


def test_unknown_genes_are_named_with_the_nearest(cells, random_bundle):
    adata = small(cells)
    symbol = adata.var["gene_symbol"].iloc[0]
    with pytest.raises(DataError, match=rf"{symbol}x \(nearest: {symbol}\).*give it as model"):
        gm.impute(adata, genes=[f"{symbol}x"])
    with pytest.raises(DataError, match="QQQQQQQQQ7.*vocabulary does not have them"):
        gm.impute(adata, random_bundle, genes=["QQQQQQQQQ7"], settings=QUICK)


def test_missing_batches_paths_and_few_cells_are_refused(cells, tmp_path):
    adata = small(cells)
    adata.obs["run"] = pd.Categorical(["a"] * 59 + [None])
    with pytest.raises(DataError, match="'run' has no value for 1 of 60"):
        gm.impute(adata, batch_key="run")
    path = tmp_path / "a.h5ad"
    small(cells).write_h5ad(path)
    with pytest.raises(ConfigError, match="name output="):
        gm.impute(path)
    with pytest.raises(ConfigError, match="is the input itself"):
        gm.impute(path, output=path, overwrite=True)
    with pytest.raises(DataError, match="5 cells"):
        gm.impute(small(cells, 5))
    adata = small(cells)
    adata.raw = adata
    with pytest.raises(ConfigError, match="cannot become a layer"):
        gm.impute(adata[:, :100].copy(), layer="raw", settings=QUICK)


def test_a_posterior_too_large_for_memory_is_refused(done, monkeypatch):
    from genemodel.imputation import model as imputation_model

    monkeypatch.setattr(imputation_model, "LARGEST_IN_MEMORY", 1e5)
    with pytest.raises(ConfigError, match="fewer rows"):
        done[2].posterior()
    with pytest.raises(ConfigError, match="draws of 3 cells"):
        done[2].draws(1000, [0, 1, 2])


def test_mixed_dense_and_sparse_inputs_are_not_changed(cells):
    adata = small(cells)
    before = adata.X.copy()
    gm.impute(adata, settings=QUICK)
    assert (adata.X != before).nnz == 0 and sp.issparse(adata.X) and adata.X.dtype == before.dtype


def test_a_backed_object_is_written_in_memory_only(cells, tmp_path):
    plain = small(cells)
    plain.write_h5ad(tmp_path / "b.h5ad")
    backed = ad.read_h5ad(tmp_path / "b.h5ad", backed="r")
    gm.impute(backed, settings=QUICK)
    gm.impute(plain, settings=QUICK)
    np.testing.assert_array_equal(backed.layers["imputed"], plain.layers["imputed"])
    backed.file.close()
    assert "imputed" not in ad.read_h5ad(tmp_path / "b.h5ad").layers


def test_a_species_without_the_gene_gets_nothing(decoding_bundle):
    parts = synthetic(80, n_genes=200, genes_per_cell=80, seed=4)
    table = decoding_bundle.vocabulary.genes
    shared = table["token"].isin(table.loc[table["species"] == "mouse", "token"])
    own = (
        (table["species"] == "human")
        & ~shared
        & ~table["ensembl_id"].isin(parts["human"].var_names)
    )
    gene = table.loc[own, "ensembl_id"].iloc[0]
    both = ad.concat([part[:30] for part in parts.values()], join="outer", fill_value=0)
    both.obs["species"] = ["human"] * 30 + ["mouse"] * 30
    gm.impute(both, decoding_bundle, genes=[gene], uncertainty=True, settings=QUICK)
    for key in ("imputed", "imputed_sd"):
        values = both.obsm[key][gene].to_numpy()
        assert np.isfinite(values[:30]).all() and np.isnan(values[30:]).all()


def test_an_obs_that_cannot_be_written_is_refused_and_leaves_nothing(cells, tmp_path):
    adata = small(cells)
    adata.obs["odd"] = [object() for _ in range(60)]
    with pytest.raises(DataError, match="make their columns text"):
        gm.impute(adata, output=tmp_path / "o.h5ad", settings=QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_dates_in_obs_are_refused_by_name_before_the_training(cells, tmp_path, ending):
    adata = small(cells)
    adata.obs["taken"] = pd.date_range("2020-01-01", periods=60)
    with pytest.raises(DataError, match=r"obs columns taken .*dates.*\['taken'\].astype\(str\)"):
        gm.impute(adata, output=tmp_path / f"o.{ending}", settings=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_output_s_name_stays_where_the_work_fails(cells, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    output = tmp_path / "o.h5ad"
    output.write_text("what was there")
    monkeypatch.setattr(module, "write", fail)
    with pytest.raises(KeyboardInterrupt):
        gm.impute(small(cells), output=output, overwrite=True, settings=QUICK)
    assert list(tmp_path.iterdir()) == [output] and output.read_text() == "what was there"


def test_the_command_writes_logarithms(cells, tmp_path):
    """Every kind that the function knows is one that the command knows."""
    adata = small(cells)
    adata.write_h5ad(tmp_path / "in.h5ad")
    output = tmp_path / "out.zarr"
    words = ["impute", f"input={tmp_path / 'in.h5ad'}", f"output={output}", "kind=log"]
    assert main(words) == 0
    written = ad.read_zarr(output)
    assert written.uns["imputed"]["kind"] == "log"
    gm.impute(adata, kind="log")
    np.testing.assert_array_equal(written.layers["imputed"], adata.layers["imputed"])
