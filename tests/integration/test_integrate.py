"""Integration: a planted batch effect goes, what only one batch has stays, nothing else changes."""

import dataclasses
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import genemodel as gm
from genemodel.errors import ConfigError, DataError
from genemodel.expression.neighbours import nearest
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.model import IntegratedModel

N_GENES = 300
QUICK = IntegrationSettings(steps=400, passes=1, hidden=48, rank=24, latent=12, batch_cells=64)
SHORT = IntegrationSettings(steps=12, passes=0, hidden=16, rank=8, latent=6, batch_cells=32)


def planted(n=480, *, seed=0, batches=("a", "b"), private=True):
    """Four types in all batches, a fifth in the first alone; each batch bends every gene.

    Within a type cells lie along two programs, as real ones do: where cells of a type differ by
    noise alone, the least rest of a batch effect decides who is whose neighbour.
    """
    rng = np.random.default_rng(seed)
    # The world (programs, bends) is the same for every seed of the cells.
    world = np.random.default_rng(99)
    base_G = world.gamma(0.6, 1.0, N_GENES) + 0.05
    program_TG = np.exp(1.1 * world.normal(size=(5, N_GENES)) * (world.random((5, N_GENES)) < 0.25))
    state_SG = 0.8 * world.normal(size=(2, N_GENES)) * (world.random((2, N_GENES)) < 0.3)
    bend_BG = {name: np.exp(0.3 * world.normal(size=N_GENES)) for name in "abc"}
    batch_C = rng.choice(list(batches), n)
    type_C = rng.integers(0, 4, n)
    if private:
        type_C[(batch_C == batches[0]) & (rng.random(n) < 0.25)] = 4
    mean_CG = base_G * program_TG[type_C] * np.stack([bend_BG[b] for b in batch_C])
    mean_CG *= np.exp(rng.normal(size=(n, 2)) @ state_SG)
    depth_C = rng.lognormal(np.log(900), 0.3, n)
    mean_CG *= (depth_C / mean_CG.sum(1))[:, None]
    counts_CG = rng.poisson(rng.gamma(4, mean_CG / 4)).astype(np.float32)
    return ad.AnnData(
        sp.csr_matrix(counts_CG),
        obs=pd.DataFrame(
            {"batch": batch_C, "cell_type": [f"t{t}" for t in type_C]},
            index=[f"c{i}" for i in range(n)],
        ),
        var=pd.DataFrame(index=[f"g{i}" for i in range(N_GENES)]),
    )


def components(adata, n=15):
    counts = adata.X.toarray()
    logged = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    u, s, _ = np.linalg.svd(logged - logged.mean(0), full_matrices=False)
    return (u * s)[:, :n]


def neighbours(embedding, k=15):
    return nearest(embedding, embedding, k + 1)[0][:, 1:]


def same_share(embedding, codes, rows=None):
    """Mean share of the nearest cells with the same code as the cell."""
    near = neighbours(embedding)
    same = (codes[near] == codes[:, None]).mean(1)
    return float(same.mean() if rows is None else same[rows].mean())


def accuracy(embedding, codes):
    near = codes[neighbours(embedding)]
    vote = np.array([np.bincount(row).argmax() for row in near])
    return float((vote == codes).mean())


@pytest.fixture(scope="module")
def integrated():
    adata = planted()
    model = gm.integrate(adata, batch_key="batch", settings=QUICK, seed=0)
    return adata, model


@pytest.fixture(scope="module")
def short():
    adata = planted(120)
    return adata, gm.integrate(adata, batch_key="batch", settings=SHORT, seed=1)


def test_a_planted_batch_effect_goes_and_types_stay(integrated):
    adata, _ = integrated
    embedding, before = adata.obsm["X_integrated"], components(adata)
    batch = adata.obs["batch"].astype("category").cat.codes.to_numpy().astype(int)
    kind = adata.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(int)
    shared = np.flatnonzero(kind < 4)
    assert same_share(before, batch, shared) > 0.7  # the effect was there
    assert same_share(embedding, batch, shared) < 0.55
    assert accuracy(embedding, kind) >= accuracy(before, kind) - 0.05


def test_a_type_of_one_batch_is_not_merged(integrated):
    adata, _ = integrated
    kind = adata.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(int)
    assert same_share(adata.obsm["X_integrated"], kind, np.flatnonzero(kind == 4)) > 0.85
    uns = adata.uns["X_integrated"]
    assert list(uns["vanished"]) == []
    share = dict(zip(uns["batches"], uns["shared_evidence"], strict=True))
    assert share["a"] < share["b"]  # only a holds cells that b has not


def test_the_outcome_is_written_in_order_and_can_be_stored(integrated, tmp_path):
    adata, model = integrated
    embedding = adata.obsm["X_integrated"]
    assert embedding.shape == (480, 12) and embedding.dtype == np.float32
    assert model.provenance["effective_rank"] > 3
    adata.write_h5ad(tmp_path / "out.h5ad")
    back = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_array_equal(back.obsm["X_integrated"], embedding)
    assert back.uns["X_integrated"]["seed"] == 0
    assert back.uns["X_integrated"]["settings"]["latent"] == 12


def test_a_batch_never_seen_lands_among_its_types(integrated):
    adata, model = integrated
    new = planted(200, seed=5, batches=("c",), private=False)
    assert model.embed(new) is None
    kind = adata.obs["cell_type"].to_numpy()
    near = nearest(new.obsm["X_genemodel"], adata.obsm["X_integrated"], 1)[0][:, 0]
    assert (kind[near] == new.obs["cell_type"].to_numpy()).mean() > 0.8
    blind = new.copy()
    del blind.obs["batch"]
    np.testing.assert_array_equal(model.encode(blind), new.obsm["X_genemodel"])
    np.testing.assert_array_equal(model.encode(new, new_batch=True), new.obsm["X_genemodel"])
    with pytest.raises(DataError, match="'c' was not trained on"):
        model.encode(new, new_batch=False)


def test_cells_of_known_batches_land_near_their_own_rows(integrated):
    adata, model = integrated
    again = model.encode(adata, new_batch=False)
    trained = adata.obsm["X_integrated"]
    off = np.linalg.norm(again - trained, axis=1)
    spread = np.linalg.norm(trained - trained.mean(0), axis=1)
    assert np.median(off) < 0.5 * np.median(spread)
    part = model.encode(adata[100:130].copy(), new_batch=False)
    np.testing.assert_allclose(part, again[100:130], rtol=1e-4, atol=1e-4)


def test_the_seed_decides_and_the_global_random_state_is_left_alone(short):
    import torch

    adata, _ = short
    again, other = adata.copy(), adata.copy()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    gm.integrate(again, batch_key="batch", settings=SHORT, seed=1)
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(again.obsm["X_integrated"], adata.obsm["X_integrated"])
    gm.integrate(other, batch_key="batch", settings=SHORT, seed=2)
    assert np.abs(other.obsm["X_integrated"] - adata.obsm["X_integrated"]).max() > 0.01


def test_a_saved_model_embeds_alike(short, tmp_path):
    adata, model = short
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")  # replaces its own kind
    back = IntegratedModel.load(tmp_path / "model")
    assert back.settings == SHORT and back.batches == ["a", "b"] and back.genes == model.genes
    np.testing.assert_array_equal(back.encode(adata), model.encode(adata))
    new = planted(60, seed=3, batches=("c",), private=False)
    np.testing.assert_array_equal(back.encode(new), model.encode(new))
    assert not [p for p in tmp_path.iterdir() if p.name != "model"]
    with (tmp_path / "model" / "weights.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(DataError, match=r"weights.safetensors is damaged"):
        IntegratedModel.load(tmp_path / "model")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="choose another"):
        model.save(tmp_path / "mine")
    with pytest.raises(DataError, match="not an integrated model"):
        IntegratedModel.load(tmp_path / "mine")


def test_genes_are_found_by_name_and_absent_ones_are_neutral(short):
    adata, model = short
    order = np.random.default_rng(0).permutation(N_GENES)
    np.testing.assert_allclose(
        model.encode(adata[:, order].copy()), model.encode(adata), rtol=1e-4, atol=1e-5
    )
    most = model.encode(adata[:, 30:].copy())
    assert np.isfinite(most).all()
    with pytest.raises(DataError, match=r"only 50 of the 300 genes"):
        model.encode(adata[:, :50].copy())


def test_labels_with_gaps_several_columns_and_empty_cells(caplog):
    adata = planted(160)
    adata.obs["donor"] = np.where(np.arange(160) % 2, "d1", "d2")
    adata.obs.loc[adata.obs_names[:50], "cell_type"] = None
    counts = adata.X.tolil()
    counts[7] = 0
    adata.X = counts.tocsr()
    with caplog.at_level(logging.WARNING):
        model = gm.integrate(
            adata, batch_key=["batch", "donor"], label_key="cell_type", settings=SHORT,
            key_added="X_mine",
        )  # fmt: skip
    assert model.batches == ["a | d1", "a | d2", "b | d1", "b | d2"]
    assert model.labels == ["t0", "t1", "t2", "t3", "t4"]
    assert "label" in model.provenance["losses"]
    finite = np.isfinite(adata.obsm["X_mine"]).all(1)
    assert not finite[7] and finite.sum() == 159
    assert "1 of 160 cells have no counts" in caplog.text


def test_cell_vectors_of_a_bundle_are_read(random_bundle, tmp_path):
    human = gm.synthetic(
        160, species=("human",), n_batches=2, n_genes=600, genes_per_cell=80, seed=4
    )["human"]
    model = gm.integrate(human, batch_key="batch", model=random_bundle, settings=SHORT)
    assert model.net.encoder.beside.linear is not None
    vectors = gm.embed(human, random_bundle, key_added="X_bundle")
    assert vectors is None
    np.testing.assert_allclose(
        model.net.encoder.beside.mean_F, human.obsm["X_bundle"].mean(0), rtol=1e-3, atol=1e-4
    )
    model.save(tmp_path / "model")
    back = IntegratedModel.load(tmp_path / "model", device="cpu")
    assert back.bundle is not None and back.bundle.fingerprint == random_bundle.fingerprint
    np.testing.assert_allclose(back.encode(human), model.encode(human), rtol=1e-4, atol=1e-5)


def test_without_a_bundle_a_species_shares_orthologs(tmp_path):
    cells = gm.synthetic(240, n_batches=2, n_genes=600, genes_per_cell=80, seed=4)
    human, mouse = cells["human"], cells["mouse"]
    model = gm.integrate(human, batch_key="batch", species="human", settings=SHORT)
    model.save(tmp_path / "model")
    back = IntegratedModel.load(tmp_path / "model")
    out = back.encode(mouse, species="mouse", new_batch=True)
    assert out.shape == (mouse.n_obs, SHORT.latent) and np.isfinite(out).all()
    both = ad.concat([human, mouse], join="outer", fill_value=0)
    order = np.random.default_rng(0).permutation(both.n_obs)
    mixed = gm.integrate(
        both[order].copy(), batch_key="species", species="obs:species", settings=SHORT
    )
    assert mixed.batches == ["human", "mouse"]
    straight = mixed.encode(both, species="obs:species")
    turned = mixed.encode(both[order].copy(), species="obs:species")
    np.testing.assert_allclose(turned, straight[order], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, {"batch_key": "bach"}, "'bach'.*did you mean 'batch'"),
        ({}, {"batch_key": ()}, "names no obs column"),
        ({"batch": "one"}, {}, "one batch only"),
        ({"batch": np.nan}, {}, "missing in 120 of 120"),
        ({}, {"label_key": "celltype"}, "label_key.*did you mean 'cell_type'"),
        ({"cell_type": "same"}, {"label_key": "cell_type"}, "1 different labels"),
        ({}, {"layer": "absent"}, "absent"),
        ({}, {"key_added": ""}, "key_added"),
        ({}, {"key_added": "a/b"}, "a slash"),
        ({}, {"seed": -1}, "seed is -1"),
        ({}, {"label_key": "batch"}, "label_key=batch is a column of batch_key too"),
        ({}, {"batch_key": ["batch", "batch"]}, "names a column twice"),
        ({"batch": np.arange(120.0)}, {}, "120 batches of 120 cells"),
        ({}, {"settings": IntegrationSettings(gene_vectors=True)}, "needs a pre-trained model"),
    ],
)
def test_refusals_come_before_work(change, options, words):
    adata = planted(120)
    for name, value in change.items():
        adata.obs[name] = value
    with pytest.raises((DataError, ConfigError), match=words):
        gm.integrate(adata, **{"batch_key": "batch", **options})
    assert "X_integrated" not in adata.obsm


def test_few_cells_and_normalised_counts_are_refused():
    adata = planted(120)
    with pytest.raises(DataError, match="49 cells"):
        gm.integrate(adata[:49].copy(), batch_key="batch")
    adata.X = adata.X.log1p()
    with pytest.raises(DataError, match="raw counts"):
        gm.integrate(adata, batch_key="batch")


def test_a_training_that_goes_out_of_bounds_is_no_result():
    adata = planted(120)
    wild = dataclasses.replace(SHORT, peak_rate=1e30)
    with pytest.raises(ConfigError, match=r"out of bounds .peak_rate=1e\+30.*lower peak_rate"):
        gm.integrate(adata, batch_key="batch", settings=wild)
    assert "X_integrated" not in adata.obsm


def test_settings_that_make_no_run_are_refused():
    for wrong in ({"latent": 0}, {"keep_min": 0.0}, {"dropout": 1.5}, {"kl_weight": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            IntegrationSettings(**wrong)


def test_a_type_that_vanishes_is_named_in_a_warning(integrated, caplog):
    """The guard, fed a result in which the private type was moved onto another one."""
    from genemodel.finetuning.training_cells import TrainingCells
    from genemodel.integration.integrate import _guard
    from genemodel.integration.training import Integration

    adata, model = integrated
    kind = adata.obs["cell_type"].astype("category").cat.codes.to_numpy().astype(int)
    batch = adata.obs["batch"].astype("category").cat.codes.to_numpy().astype(int)
    good = adata.obsm["X_integrated"]
    merged = good.copy()
    merged[kind == 4] += good[kind == 2].mean(0) - good[kind == 4].mean(0)
    genes = np.arange(N_GENES)
    names = ["t0", "t1", "t2", "t3", "t4"]
    cells = TrainingCells.held(adata.X, batch, label_C=kind)
    for outcome, expected in ((good, []), (merged, ["t4"])):
        trained = Integration(model.net, genes, model.correction, good, outcome, model.history, 1)
        with caplog.at_level(logging.WARNING):
            assert _guard(trained, cells, names, 0) == expected
        assert ("t4 is found in one batch only, but now lies among t2" in caplog.text) == bool(
            expected
        )


def test_a_path_or_a_table_is_no_anndata(tmp_path):
    import genemodel as gm

    for given in (tmp_path / "a.h5ad", str(tmp_path), np.zeros((3, 3))):
        with pytest.raises(ConfigError, match=r"^adata is .*genemodel finetune task=integrate"):
            gm.integrate(given, batch_key="batch")
        with pytest.raises(ConfigError, match=r"^query is .*genemodel annotate"):
            gm.annotate(given, given, label_key="cell_type")
