"""Imputing further cells with a model that is trained: genes by name, batches, files, refusals."""

import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
import torch

import genemodel as gm
from genemodel.command.cli import main
from genemodel.errors import ConfigError, DataError
from genemodel.imputation import plan, starting, training
from genemodel.imputation import pretrained as impute_pretrained
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import DecoderSettings
from genemodel.simulation.cells import synthetic

QUICK = DecoderSettings(hidden=16, latent=4, epochs=2)


@pytest.fixture(scope="module")
def cells(small_vocabulary):
    return synthetic(
        120, species=("human",), n_genes=300, genes_per_cell=60, n_batches=2, seed=2,
        vocabulary=small_vocabulary,
    )["human"]  # fmt: skip


@pytest.fixture(scope="module")
def trained(cells):
    adata = cells.copy()
    model = gm.impute(adata, batch_key="batch", uncertainty=True, settings=QUICK)
    return adata, model


def test_cells_of_the_training_get_what_they_got(trained, cells):
    adata, model = trained
    again = cells.copy()
    found = gm.impute(again, model, uncertainty=True)  # its own batch column is found
    assert isinstance(found, ImputationModel)
    np.testing.assert_array_equal(again.layers["imputed"], adata.layers["imputed"])
    np.testing.assert_array_equal(again.layers["imputed_sd"], adata.layers["imputed_sd"])
    assert again.uns["imputed"]["trained"] == "on other cells"
    assert adata.uns["imputed"]["trained"] == "here"


def test_the_order_of_genes_is_no_matter_and_strange_ones_get_nothing(trained, cells, caplog):
    adata, model = trained
    other = cells[:40, ::-1].copy()
    strange = other[:, :3].copy()
    strange.var_names = ["one", "two", "three"]
    both = ad.concat([other, strange], axis=1, merge="first")
    with caplog.at_level("WARNING"):
        gm.impute(both, model, uncertainty=True, draws=1, quantiles=[0.5])
    assert "3 genes were not in the training data and get NaN (one, two, three)" in caplog.text
    np.testing.assert_array_equal(
        both.layers["imputed"][:, :-3], adata.layers["imputed"][:40, ::-1]
    )
    for name in ("imputed", "imputed_sd", "imputed_draw0", "imputed_q50"):
        assert np.isnan(both.layers[name][:, -3:]).all()
        assert np.isfinite(both.layers[name][:, :-3]).all()


@pytest.mark.parametrize("join", ["-", "."])
def test_rows_that_were_made_unique_lose_no_counts(trained, cells, join):
    """Half of the molecules of ten genes stand in a second row, as ``GENE-1`` and ``GENE.1``."""
    adata, model = trained
    second = cells[:40, :10].copy()
    second.X = sp.csr_matrix(np.random.default_rng(0).binomial(second.X.toarray().astype(int), 0.5))
    first = cells[:40].copy()
    whole = first.X.toarray()
    whole[:, :10] -= second.X.toarray()
    first.X = sp.csr_matrix(whole)
    second.var_names = [f"{name}{join}1" for name in second.var_names]
    both = ad.concat([first, second], axis=1, merge="first")
    gm.impute(both, model)
    np.testing.assert_allclose(
        both.layers["imputed"][:, :-10], adata.layers["imputed"][:40], rtol=1e-4
    )
    assert np.isnan(both.layers["imputed"][:, -10:]).all()


def test_genes_that_were_not_measured_are_predicted(trained, cells, caplog):
    _, model = trained
    lost = cells.var_names[:60].tolist()
    part = cells[:, 60:].copy()
    with caplog.at_level("INFO"):
        gm.impute(part, model, genes=[*lost[:5], part.var_names[0]])
    assert "genes that the model reads were not measured" in caplog.text
    table = part.obsm["imputed"]
    assert list(table.columns)[:5] == lost[:5] and np.isfinite(table.to_numpy()).all()
    assert (table[lost[0]] > 0).all()


def test_a_batch_that_is_new_or_not_told_gets_the_mean(trained, cells, caplog):
    _, model = trained
    new, untold = cells[:30].copy(), cells[:30].copy()
    new.obs["batch"] = "tomorrow"
    del untold.obs["batch"]
    for adata in (new, untold):
        caplog.clear()
        with caplog.at_level("INFO"):
            gm.impute(adata, model)
        assert "30 cells are of no batch of the training" in caplog.text
    np.testing.assert_array_equal(new.layers["imputed"], untold.layers["imputed"])


def test_a_file_by_the_command_line(trained, cells, tmp_path, capsys):
    adata, model = trained
    model.save(tmp_path / "model")
    cells[:25].copy().write_h5ad(tmp_path / "new.h5ad")
    words = ["impute", f"input={tmp_path / 'new.h5ad'}", f"model={tmp_path / 'model'}"]
    assert main([*words, f"output={tmp_path / 'out.h5ad'}", "uncertainty=true"]) == 0
    assert "pass " not in capsys.readouterr().err  # nothing is trained
    out = ad.read_h5ad(tmp_path / "out.h5ad")
    # Another number of cells in a block: the same but for rounding.
    np.testing.assert_allclose(out.layers["imputed"], adata.layers["imputed"][:25], rtol=1e-4)
    assert out.var["measured"].all()
    gene = cells.var_names[7]
    words += [f"genes=[{gene}]", f"output={tmp_path / 'one.h5ad'}"]
    assert main(words) == 0
    one = ad.read_h5ad(tmp_path / "one.h5ad")
    np.testing.assert_array_equal(one.layers["imputed"][:, 0], out.layers["imputed"][:, 7])


@pytest.mark.parametrize("beneath", [False, True])
def test_a_file_is_read_in_a_stream(trained, cells, small_start, tmp_path, monkeypatch, beneath):
    """With and without a transformer beneath, genes that are lacking, and a batch that is new."""
    _, model = trained
    if beneath:
        bundle = gm.load(small_start / "run" / "bundle", device="cpu")
        model = gm.impute(
            cells.copy(), bundle, batch_key="batch", settings=QUICK, backbone="frozen"
        )
    other = cells[:70, 10:].copy()
    other.obs["batch"] = other.obs["batch"].astype(str)
    other.obs.loc[other.obs_names[50:], "batch"] = "tomorrow"
    other.write_h5ad(tmp_path / "other.h5ad")
    options = {"uncertainty": True, "library": "median"}
    gm.impute(other, model, **options)
    monkeypatch.setattr(plan, "_read", None)  # what takes up all counts at once
    monkeypatch.setattr(impute_pretrained, "BLOCK_CELLS", 32)
    found = gm.impute(tmp_path / "other.h5ad", model, output=tmp_path / "out.h5ad", **options)
    assert len(found) == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    for name in ("imputed", "imputed_sd"):
        np.testing.assert_allclose(written.layers[name], other.layers[name], rtol=1e-4)
    genes = [cells.var_names[3], other.var_names[3]]  # the first was not measured
    gm.impute(tmp_path / "other.h5ad", model, output=tmp_path / "two.h5ad", genes=genes)
    two = ad.read_h5ad(tmp_path / "two.h5ad")
    assert two.var["measured"].tolist() == [False, True]
    assert np.isfinite(two.layers["imputed"]).all() and (two.layers["imputed"] > 0).all()


def test_nested_batches_are_told_apart(cells):
    adata = cells.copy()
    model = gm.impute(adata, batch_key=["batch", "donor"], settings=QUICK)
    pairs = adata.obs[["batch", "donor"]].astype(str).agg(" | ".join, axis=1)
    assert model.batches == tuple(sorted(pairs.unique()))
    assert model.batch_keys == ("batch", "donor")


def test_gene_vectors_change_the_start(cells, small_start):
    bundle = gm.load(small_start / "run" / "bundle", device="cpu")
    found = []
    for gene_vectors in (True, True, False):
        settings = DecoderSettings(hidden=16, latent=4, epochs=1, gene_vectors=gene_vectors)
        adata = cells.copy()
        gm.impute(adata, bundle, settings=settings)
        found.append(adata.layers["imputed"])
    np.testing.assert_array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_training_starts_as_a_decoder_that_knows_the_cells(
    cells, small_start, tmp_path, monkeypatch
):
    """With a rate of next to nothing the answer is the model's own, unless neighbours know more."""
    bundle = gm.load(small_start / "run" / "bundle", device="cpu")
    cells = cells[:, np.asarray(cells.X.sum(0)).ravel() > 0]  # of others no decoder is trained
    chance = torch.Generator().manual_seed(0)
    for name in ("gene.weight", "projection.project.weight"):  # after few steps they say little
        weight = bundle.heads[f"decode_counts.{name}"]
        weight.copy_(0.2 * torch.randn(weight.shape, generator=chance))
    own = cells.copy()
    gm.impute(own, bundle, kind="decoder")
    answers, apart = {}, {}
    for way in ("believed", "judged", "anew"):
        settings = DecoderSettings(
            hidden=16, latent=4, epochs=1, learning_rate=1e-9, from_decoder=way != "anew"
        )
        adata = cells.copy()
        with monkeypatch.context() as patch:
            if way == "believed":
                patch.setattr(training, "knows", lambda head, cells: True)
            model = gm.impute(
                adata, bundle, backbone="frozen", settings=settings, kind="decoder",
                batch_key="batch",
            )  # fmt: skip
        answers[way] = adata.layers["imputed"]
        # The factor of a gene is settled on other molecules, and the sum of a cell with it.
        apart[way] = _of_both(answers[way] / own.layers["imputed"]).std()
        again = cells.copy()
        model.save(tmp_path / way)
        gm.impute(again, gm.load(tmp_path / way, device="cpu"), kind="decoder")
        np.testing.assert_allclose(again.layers["imputed"], answers[way], rtol=1e-5)
    said = _of_both(own.layers["imputed"]).std()
    assert apart["believed"] < 1e-3 * said < 0.5 * said < apart["anew"], (apart, said)
    # These weights are noise, and the neighbours say so.
    assert apart["judged"] > 0.5 * said


def test_neighbours_predict_what_a_mixture_of_their_counts_says():
    """Two kinds of cells without a common gene: neighbours tell the kind, the average does not."""
    draw = np.random.default_rng(0)
    share_KG = np.kron(np.eye(2), np.full(5, 0.2)) + 1e-9
    kind_S = np.repeat([0, 1], 30)
    counts = [
        sp.csr_matrix(np.stack([draw.multinomial(n, share_KG[k] / share_KG[k].sum())
                                for k in kind_S]).astype(np.float32))
        for n in (50, 20)
    ]  # fmt: skip
    cells = starting.Shown(torch.zeros(60, 2), *counts)
    assert np.log(5) < starting.neighbour_nats(cells) < np.log(5) + 0.1
    assert starting.average_nats(cells) == pytest.approx(np.log(10), abs=0.05)


def _of_both(rate_CG):
    """Of logarithms, what neither the cell nor the gene alone says."""
    log_CG = np.log(rate_CG)
    log_CG = log_CG - log_CG.mean(0)
    return log_CG - log_CG.mean(1, keepdims=True)


def test_refusals(trained, cells):
    _, model = trained
    with pytest.raises(ConfigError, match="this model is trained: give one"):
        gm.impute(cells.copy(), model, settings=QUICK)
    with pytest.raises(ConfigError, match="gene_vectors=true needs a pre-trained model"):
        gm.impute(cells.copy(), settings=DecoderSettings(gene_vectors=True))
    renamed = cells.copy()
    renamed.var_names = [f"x{i}" for i in range(renamed.n_vars)]
    with pytest.raises(DataError, match="only 0 of the .* that the model reads.*leave model out"):
        gm.impute(renamed, model)
    twice = cells.copy()
    twice.var_names = [cells.var_names[0], cells.var_names[0], *cells.var_names[2:]]
    with pytest.raises(DataError, match="more than once.*var_names_make_unique"):
        gm.impute(twice, model)
    with pytest.raises(DataError, match="does not have NOGENE.*leave these out"):
        gm.impute(cells.copy(), model, genes=["NOGENE"])
    with pytest.raises(ConfigError, match="there is no batch 'c'"):
        gm.impute(cells.copy(), model, batch="c")
