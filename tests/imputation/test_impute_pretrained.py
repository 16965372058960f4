"""Imputing with a bundle as it is: its decoder, closed-form factors, calibration, streams."""

from dataclasses import replace

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.command.cli import main
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.statistics import GeneStatistics
from genemodel.errors import ConfigError, DataError
from genemodel.expression.thinning import split_molecules
from genemodel.heads.decode_counts import CountDecoder
from genemodel.imputation import plan
from genemodel.imputation import pretrained as impute_pretrained
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import (
    DecoderSettings,
    ImputationHead,
)
from genemodel.imputation.posterior import posterior_gamma, randomised_pit, tally_coverage
from genemodel.inference.cell_vectors import encode
from genemodel.inference.counts import VocabularyCells
from genemodel.settings import parse
from genemodel.simulation.cells import synthetic
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


@pytest.fixture(scope="module")
def bundle(small_start):
    """Of a short run; its decoder with gene vectors that say something."""
    start = gm.load(small_start / "run" / "bundle", device="cpu")
    torch.manual_seed(1)
    heads = dict(start.heads)
    weight = torch.zeros(16, 16).normal_(std=0.3)
    heads["decode_counts.projection.project.weight"] = weight
    return replace(start, heads=heads)


@pytest.fixture(scope="module")
def cells(small_vocabulary):
    return synthetic(
        120, species=("human",), n_genes=300, genes_per_cell=60, n_batches=2, seed=2,
        vocabulary=small_vocabulary,
    )["human"]  # fmt: skip


@pytest.fixture
def untrained(monkeypatch):
    """Fail where anything is trained."""

    def never(*_, **__):
        raise AssertionError("trained")

    monkeypatch.setattr(ImputationModel, "train", never)


def test_the_prior_is_the_decoders_and_the_posterior_has_the_counts(
    cells, bundle, untrained, monkeypatch
):
    monkeypatch.setattr(impute_pretrained, "settle_factors", lambda *_: None)
    adata, prior = cells.copy(), cells.copy()
    options = {"uncertainty": True, "draws": 2, "quantiles": (0.05, 0.95)}
    model = gm.impute(adata, bundle, **options)
    gm.impute(prior, bundle, kind="decoder")
    # The slow, obvious version.
    source = VocabularyCells(cells, bundle)
    chunk = next(source.chunks())
    z = encode(chunk, bundle).astype(np.float64)
    heads = {k: v.double().numpy() for k, v in bundle.heads.items()}
    weight = np.exp(z @ heads["decode_counts.gene.weight"].T + heads["decode_counts.base_SV"][0])
    token = source.matches[0].token_G
    assert (token >= 0).all()
    rate = weight[:, token] / weight[:, token].sum(1, keepdims=True) * chunk.library_C[:, None]
    np.testing.assert_allclose(prior.layers["imputed"], rate, rtol=1e-3)
    shape, speed = posterior_gamma(cells.X.toarray(), rate, model.dispersion_G)
    np.testing.assert_allclose(adata.layers["imputed"], shape / speed, rtol=1e-3)
    np.testing.assert_allclose(adata.layers["imputed_sd"], np.sqrt(shape) / speed, rtol=1e-3)
    written = {"imputed", "imputed_sd", "imputed_q5", "imputed_q95"}
    assert set(adata.layers) == written | {"imputed_draw0", "imputed_draw1"} | set(cells.layers)
    np.testing.assert_allclose(model.posterior().mean, adata.layers["imputed"], rtol=1e-4)
    assert len(model) == 120 and model.bundle is bundle
    np.testing.assert_allclose(adata.var["imputed_dispersion"], model.dispersion_G)


def test_it_says_what_a_training_says(cells, bundle, untrained):
    adata = cells.copy()
    model = gm.impute(adata, bundle)
    about = adata.uns["imputed"]
    assert about["trained"] == "in pre-training" and about["passes"] == 0
    assert about["model"] == bundle.fingerprint == model.provenance["model"]
    assert 0 < about["heldout_nats_per_molecule"] < np.log(300) + 1
    assert 0.85 < about["coverage"]["overall"] < 0.95
    assert model.history["step"].tolist() == [0]
    assert "nats a molecule set aside" in repr(model) and "imputed_sd" not in adata.layers


@pytest.mark.parametrize("n", [120, 30])
def test_intervals_hold_what_was_never_shown(cells, bundle, n):
    seen, held = split_molecules(cells.X[:n], 0.8, np.random.default_rng(0))
    adata = ad.AnnData(seen, obs=cells.obs[:n].copy(), var=cells.var.copy())
    posterior = gm.impute(adata, bundle).posterior()
    rng = np.random.default_rng(1)
    pit = randomised_pit(held.toarray(), posterior.shape_CG, posterior.rate_CG, 0.25, rng)
    slices = np.digitize(posterior.mean / 4, [0.3])
    inside, entries = tally_coverage(pit, slices, 2)
    assert np.all(np.abs(inside / entries - 0.9) < (0.03 if n > 100 else 0.06))


def test_factors_are_found_where_there_are_counts_and_stay_where_there_are_none():
    rng = np.random.default_rng(0)
    head = ImputationHead(np.full(40, 1 / 40), 1, DecoderSettings(latent=3))
    latent = torch.from_numpy(rng.normal(size=(600, 3)).astype(np.float32))
    with torch.no_grad():
        head.gene_GD.normal_(std=0.5)
        head.bias_G[30:] -= 9.0  # hardly ever seen
        share = head.log_fraction(latent, torch.zeros(600, dtype=torch.long)).exp().numpy()
    factor = np.exp(rng.normal(size=40))
    wrong = share * factor
    wrong /= wrong.sum(1, keepdims=True)
    counts = sp.csr_matrix(rng.poisson(200 * wrong).astype(np.float32))
    before = head.bias_G.detach().clone()
    impute_pretrained.settle_factors(head, latent, counts)
    moved = (head.bias_G.detach() - before).numpy()
    wanted = np.log(factor)
    seen = np.arange(40) < 30
    error = (moved - wanted)[seen]
    assert (error - error.mean()).std() < 0.08  # a softmax knows no common factor
    assert np.abs(moved[~seen]).max() < 1.0 and np.isfinite(moved).all()
    same = head.bias_G.detach().clone()
    few = sp.csr_matrix(rng.poisson(0.01 * wrong).astype(np.float32))
    impute_pretrained.settle_factors(head, latent, few)
    assert (head.bias_G.detach() - same).abs().max() < np.log(3)


def test_what_the_model_does_not_know_gets_nothing_and_the_library_is_of_the_others(
    cells, bundle, caplog
):
    strange = ad.AnnData(
        sp.csr_matrix(np.full((120, 2), 5, np.float32)), obs=cells.obs.copy()
    )  # fmt: skip
    strange.var_names = ["one", "two"]
    both = ad.concat([strange, cells], axis=1, merge="first")
    with caplog.at_level("WARNING"):
        gm.impute(both, bundle, uncertainty=True, species="human")
    assert "does not know 2 of 302 genes, which get NaN" in caplog.text
    assert np.isnan(both.layers["imputed"][:, :2]).all()
    assert both.var["imputed_dispersion"].isna().tolist() == [True] * 2 + [False] * 300
    alone = cells.copy()
    gm.impute(alone, bundle, uncertainty=True)
    for name in ("imputed", "imputed_sd"):
        np.testing.assert_allclose(both.layers[name][:, 2:], alone.layers[name], rtol=1e-4)


def test_genes_that_were_not_measured_come_with_the_others(cells, bundle):
    lost = cells.var_names[:3].tolist()
    part = cells[:, 3:].copy()
    gm.impute(part, bundle, genes=[lost[0], part.var_names[5], lost[2]])
    table = part.obsm["imputed"]
    assert part.uns["imputed"]["unmeasured"] == [lost[0], lost[2]]
    assert np.isfinite(table.to_numpy()).all() and (table > 0).all().all()
    whole = part.copy()
    gm.impute(whole, bundle, key_added="whole")
    np.testing.assert_allclose(table.iloc[:, 1], whole.layers["whole"][:, 5], rtol=1e-4)


def test_a_file_is_read_in_a_stream_and_holds_what_memory_would(
    cells, bundle, untrained, tmp_path, monkeypatch
):
    monkeypatch.setattr(impute_pretrained, "BLOCK_CELLS", 32)
    monkeypatch.setattr(plan, "_read", None)  # what takes up all counts at once
    cells.write_h5ad(tmp_path / "in.h5ad")
    adata = cells.copy()
    options = {"uncertainty": True, "draws": 1, "library": "median"}
    gm.impute(adata, bundle, **options)
    model = gm.impute(tmp_path / "in.h5ad", bundle, output=tmp_path / "out.h5ad", **options)
    assert len(model) == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    for name in ("imputed", "imputed_sd", "imputed_draw0"):
        np.testing.assert_array_equal(written.layers[name], adata.layers[name])
    assert written.var["measured"].all() and written.uns["imputed"]["library"] == "median"
    held = gm.impute(adata, bundle, output=tmp_path / "again.h5ad")  # no path: it is in memory
    assert len(held) == 120 and "imputed_draw1" not in adata.layers
    median = float(np.median(np.asarray(cells.X.sum(1))))
    number = cells.copy()
    gm.impute(number, bundle, library=median)
    np.testing.assert_allclose(number.layers["imputed"], adata.layers["imputed"], rtol=1e-6)


def test_the_command_does_it_too(cells, bundle, untrained, tmp_path, capsys):
    bundle.save(tmp_path / "bundle")
    cells[:40].copy().write_h5ad(tmp_path / "in.h5ad")
    words = ["impute", f"input={tmp_path / 'in.h5ad'}", f"model={tmp_path / 'bundle'}"]
    words += [f"output={tmp_path / 'out.h5ad'}", "batch_key=batch", "device=cpu"]
    assert main(words) == 0
    said = capsys.readouterr().err
    assert "the batches of batch are unknown to the pre-trained decoder" in said
    told = ad.read_h5ad(tmp_path / "out.h5ad")
    plain = cells[:40].copy()
    gm.impute(plain, bundle)
    np.testing.assert_allclose(told.layers["imputed"], plain.layers["imputed"], rtol=1e-5)


def test_it_can_be_kept_and_used_on_other_cells(cells, bundle, tmp_path):
    model = gm.impute(cells[:80].copy(), bundle)
    model.save(tmp_path / "model")
    back = gm.load(tmp_path / "model", device="cpu")
    assert isinstance(back, ImputationModel)
    adata, again = cells[80:].copy(), cells[80:, ::-1].copy()
    gm.impute(adata, model)
    gm.impute(again, back)
    np.testing.assert_allclose(adata.layers["imputed"], again.layers["imputed"][:, ::-1], rtol=1e-4)
    assert adata.uns["imputed"]["trained"] == "on other cells"


def test_cells_without_counts(cells, bundle, caplog):
    there = np.ones(120, np.float32)
    there[7] = 0
    adata = cells.copy()
    adata.X = sp.csr_matrix(sp.diags(there) @ cells.X)
    with caplog.at_level("WARNING"):
        gm.impute(adata, bundle)
    assert "1 of 120 cells have no counts and get 0" in caplog.text
    assert np.abs(adata.layers["imputed"][7]).max() < 1e-6
    assert np.isfinite(adata.layers["imputed"]).all()
    adata.X = sp.csr_matrix(cells.shape, dtype=np.float32)
    strange = adata[:, :1].copy()
    strange.X, strange.var_names = np.ones((120, 1), np.float32), ["one"]
    both = ad.concat([strange, adata], axis=1, merge="first")
    with pytest.raises(DataError, match="no cell that was looked at has counts of a gene"):
        gm.impute(both, bundle)


def test_many_cells_are_settled_by_some_from_everywhere(cells, bundle, monkeypatch):
    monkeypatch.setattr(impute_pretrained, "_SETTLED", 32)
    monkeypatch.setattr(impute_pretrained, "_STRETCHES", 4)
    found, read = [], []
    settle = impute_pretrained.settle_factors
    vectors = impute_pretrained.PretrainedImputation._vectors

    def noted(head, latent, seen):
        found.append((seen.shape[0], seen.sum()))
        settle(head, latent, seen)

    def watched(self, counts):
        read.append(counts.sum())
        return vectors(self, counts)

    monkeypatch.setattr(impute_pretrained, "settle_factors", noted)
    monkeypatch.setattr(impute_pretrained.PretrainedImputation, "_vectors", watched)
    model = gm.impute(cells.copy(), bundle)
    rows = np.concatenate([np.arange(start, start + 8) for start in (0, 37, 74, 112)])
    # Neither vectors nor factors see the tenth that is set aside.
    assert read == [found[0][1]] and 0.85 < read[0] / cells.X[rows].sum() < 0.95
    assert found[0][0] == 32 and model.provenance["cells"] == 32 and len(model) == 120


def test_refusals(cells, random_bundle, bundle):
    adata = cells.copy()
    with pytest.raises(ConfigError, match="without a count decoder .*some_head.*leave model out"):
        gm.impute(adata, random_bundle)
    with pytest.raises(ConfigError, match="needs batch_key"):
        gm.impute(adata, bundle, batch="mean")
    assert not set(adata.layers) - set(cells.layers)
    n = len(random_bundle.vocabulary)
    decoder = CountDecoder(16, GeneStatistics.empty(2, n), 1, torch.zeros(1, n, dtype=torch.bool))
    heads = {f"decode_counts.{k}": v.clone() for k, v in decoder.state_dict().items()}
    both = gm.synthetic(60, n_genes=400, genes_per_cell=80, seed=2)
    mixed = ad.concat([both["human"], both["mouse"]], join="outer")
    with pytest.raises(ConfigError, match="several species.*one species at a time"):
        gm.impute(mixed, replace(random_bundle, heads=heads), species="obs:species")


@pytest.mark.slow
def test_cells_of_another_chemistry_without_training(shared_data, tmp_path):
    """Pre-trained for a moment on one set of blood cells, asked about another one.

    The measured share of intervals is of molecules that no one has seen; it has to beat the mean of
    each gene, which knows these cells as well.
    """
    start, query = (
        ad.read_h5ad(shared_data / f"{name}.h5ad")
        for name in ("human_pbmc4k_10xv2", "human_pbmc_1k_v3")
    )
    often = np.asarray(start.X.sum(0)).ravel()
    kept = set(start.var_names[np.argsort(-often)[:2000]])
    start = start[:600, [name in kept for name in start.var_names]].copy()
    query = query[:200, [name in kept for name in query.var_names]].copy()
    Corpus.build([start], tmp_path / "corpus")
    pretrain(
        parse(
            PretrainSettings,
            {
                "corpus": str(tmp_path / "corpus"), "out": str(tmp_path / "run"),
                "tokens": {"context": 128, "budget": 2048},
                "model": {"layers": 2, "width": 32, "heads": 2, "ffn": 64, "components": 16},
                "task": {
                    "masked_gene": {"weight": 0.0}, "masked_value": {"weight": 0.0},
                    "decode_counts": {"keep_min": 0.3, "keep_max": 0.9},
                },
                "optim": {"lr": 2e-3, "warmup_steps": 5},
                "holdout": {"by": ""},
                "trainer": {"max_steps": 80, "validate_every": 80, "accelerator": "cpu"},
            },
        )
    )  # fmt: skip
    seen, held = split_molecules(query.X, 0.9, np.random.default_rng(0))
    adata = ad.AnnData(seen, obs=query.obs.copy(), var=query.var.copy())
    model = gm.impute(adata, tmp_path / "run" / "bundle")
    posterior = model.posterior()
    known = np.isin(adata.var_names, model.genes)
    assert known.mean() > 0.95
    seen, truth = seen[:, known], held[:, known].toarray()
    rng = np.random.default_rng(1)
    pit = randomised_pit(truth, posterior.shape_CG, posterior.rate_CG, 1 / 9, rng)
    inside, entries = tally_coverage(pit, np.digitize(posterior.mean / 9, [0.3]), 2)
    assert np.all(np.abs(inside / entries - 0.9) < 0.015), inside / entries
    library = np.asarray(seen.sum(1))
    mean = library * np.asarray(seen.sum(0)).ravel() / library.sum() / 9

    def loss(rate):
        return float((rate - truth * np.log(np.maximum(rate, 1e-9))).mean())

    assert loss(posterior.mean / 9) < 0.97 * loss(mean)
