"""In-silico perturbation, from cells to statistics: what it measures, finds, refuses and keeps."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from scipy import stats

import genemodel as gm
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import N_SPECIAL
from genemodel.inference.counts import VocabularyCells, window_of
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.perturbation import blocks as blocks_module
from genemodel.perturbation.blocks import Blocks
from genemodel.perturbation.passes import How, Perturber
from genemodel.perturbation.perturb import perturb_file
from genemodel.perturbation.settings import PerturbSettings
from genemodel.perturbation.states import separation, units
from genemodel.perturbation.statistics import adjusted, matched_test

N_GENES, N_CELLS, CONTEXT = 150, 96, 96
PLANTED = 40
RANKS = {"position": "rank", "values": False, "components": 0, "max_rank": CONTEXT,
         "norm": "post", "bias": True, "embedding_norm": True}  # fmt: skip
VALUES = {"components": 4}


@pytest.fixture(scope="module")
def names(small_vocabulary):
    genes = small_vocabulary.genes
    return genes[genes["species"] == "human"].iloc[:N_GENES]


@pytest.fixture(scope="module")
def make_bundle(small_vocabulary):
    def make(**shape):
        torch.manual_seed(1)
        settings = ModelSettings(**{"layers": 2, "width": 16, "heads": 2, "ffn": 24, **shape})
        model = GeneModel(
            settings, n_tokens=len(small_vocabulary), n_species=len(small_vocabulary.species),
            context=CONTEXT,
        )  # fmt: skip
        rng = np.random.default_rng(0)
        medians_V = rng.uniform(20, 200, len(small_vocabulary)).astype(np.float32)
        tokens = TokenSettings(context=CONTEXT, budget=CONTEXT * 32)
        return Bundle(model.eval(), small_vocabulary, tokens, medians_V)

    return make


@pytest.fixture(scope="module")
def cells(names):
    """Cells of two states and eight donors; one gene is of the start alone."""
    rng = np.random.default_rng(5)
    rate_G = rng.gamma(0.7, 1.0, N_GENES) + 0.05
    counts = rng.poisson(rate_G * rng.gamma(8, 0.125, (N_CELLS, 1)))
    state = np.array(["ill", "well"])[np.arange(N_CELLS) % 2]
    counts[:, PLANTED] = np.where(state == "ill", 6, 0)
    obs = pd.DataFrame(
        {"state": state, "donor": [f"d{i // 2 % 8}" for i in range(N_CELLS)], "species": "human"},
        index=[f"cell{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=pd.Index(names["ensembl_id"].astype(str)))
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


@pytest.fixture(scope="module")
def planted(make_bundle, names):
    """A model whose cells look at one gene before all others."""
    bundle = make_bundle(**RANKS)
    token = int(names["token"].iloc[PLANTED])
    width = bundle.model.settings.width
    with torch.no_grad():
        weight_VD = bundle.model.embedding.token.weight
        direction_D = weight_VD[token].clone()
        unit_D = direction_D / direction_D.norm()
        weight_VD -= (weight_VD @ unit_D)[:, None] * unit_D
        weight_VD[token] = direction_D
        for block in bundle.model.blocks:
            for head in range(block.heads):
                at = head * width // block.heads
                block.qkv.bias[at] = 8.0
                block.qkv.weight[width + at] = unit_D
    return bundle


def symbol(names, at=PLANTED):
    return str(names["symbol"].iloc[at] or names["ensembl_id"].iloc[at])


def without(adata, at):
    changed = adata.copy()
    dense = changed.X.toarray()
    dense[:, at] = 0
    changed.X = sp.csr_matrix(dense)
    return changed


def embedded(adata, bundle):
    adata = adata.copy()
    gm.embed(adata, bundle)
    return units(adata.obsm["X_genemodel"].astype(np.float64))


TOWARDS = {"state_key": "state", "start_state": "ill", "goal_state": "well"}


@pytest.mark.parametrize("shape", [RANKS, VALUES], ids=["ranks", "values"])
def test_deletion_is_embedding_the_cells_without_the_gene(make_bundle, cells, names, shape):
    bundle = make_bundle(**shape)
    result = gm.perturb(
        cells, bundle, genes=symbol(names), nulls=0, min_auc=0.0, **TOWARDS
    )  # fmt: skip
    ill = (cells.obs["state"] == "ill").to_numpy()
    before, after = embedded(cells, bundle), embedded(without(cells, PLANTED), bundle)
    goal = before[~ill].mean(0)
    goal /= np.linalg.norm(goal)
    found = result.shifts
    assert found["cell"].astype(str).tolist() == cells.obs_names[ill].tolist()
    np.testing.assert_allclose(found["cosine_similarity"], (before * after).sum(1)[ill], atol=2e-6)
    np.testing.assert_allclose(found["shift_to_well"], ((after - before) @ goal)[ill], atol=2e-6)
    row = result.statistics.iloc[0]
    assert row["N_Detections"] == ill.sum() and row["Coverage"] == 1.0
    np.testing.assert_allclose(row["Shift_to_goal_end"], found["shift_to_well"].mean(), rtol=1e-5)
    assert cells.uns["genemodel_perturb"]["statistics"].equals(result.statistics)


def test_cells_of_no_state_are_left_alone(make_bundle, cells, names):
    bundle = make_bundle(**VALUES)
    gaps = cells.copy()
    gaps.obs["state"] = gaps.obs["state"].astype(object)
    gaps.obs.loc[gaps.obs_names[:6], "state"] = None
    found = gm.perturb(gaps, bundle, genes=symbol(names), nulls=0, min_auc=0.0, **TOWARDS)
    ill = (cells.obs["state"] == "ill").to_numpy() & (np.arange(N_CELLS) >= 6)
    assert found.shifts["cell"].astype(str).tolist() == cells.obs_names[ill].tolist()


def test_every_other_gene_is_measured_before_and_after(make_bundle, cells, names):
    bundle = make_bundle(**RANKS)
    one = cells[:1].copy()
    result = gm.perturb(
        one, bundle, genes=symbol(names), nulls=0, min_cells=1, emb_mode="cls_and_gene"
    )

    def hidden(adata):
        source = VocabularyCells(adata, bundle)
        perturber = Perturber(bundle, How())
        ((batch, _),) = perturber.batches(window_of(next(source.chunks())), np.arange(1))
        with torch.inference_mode():
            found = bundle.model(batch).hidden_TD
        return dict(zip(batch.gene_T.tolist(), found, strict=True))

    before, after = hidden(one), hidden(without(one, PLANTED))
    table = result.gene_shifts.set_index("Affected")
    staying = sorted(set(after) - set(range(N_SPECIAL)))
    assert sorted(table.index) == staying
    expected = [float(torch.cosine_similarity(before[t], after[t], dim=0)) for t in staying]
    np.testing.assert_allclose(table.loc[staying, "Cosine_sim_mean"], expected, atol=2e-6)
    assert (table["N_Detections"] == 1).all()


@pytest.fixture(scope="module")
def sweep(planted, cells):
    return gm.perturb(
        cells, planted, donor_key="donor", position_preserving=False, min_auc=0.6, **TOWARDS
    )


def test_a_planted_effect_is_found_first_with_the_official_columns(sweep, names):
    table = sweep.statistics
    assert list(table.columns[:8]) == [
        "Gene", "Gene_name", "Ensembl_ID", "Shift_to_goal_end", "Goal_end_vs_random_pval",
        "Goal_end_FDR", "N_Detections", "Sig",
    ]  # fmt: skip
    first = table.iloc[0]
    assert first["Ensembl_ID"] == names["ensembl_id"].iloc[PLANTED]
    assert first["Supported"] == 1 and first["N_Donors"] == 8 and first["Donor_same_sign"] == 1.0
    assert table["Supported"].sum() <= 0.1 * len(table)
    assert sweep.summary["auc"] > 0.9 and sweep.summary["auc_held_out"] == "donors"
    assert "AUC" in sweep.describe()


def test_against_matched_genes_p_values_are_uniform_where_labels_are_shuffled(make_bundle, cells):
    shuffled = without(cells, PLANTED)
    shuffled.obs["state"] = np.random.default_rng(2).permutation(shuffled.obs["state"].to_numpy())
    result = gm.perturb(
        shuffled,
        make_bundle(**RANKS),
        donor_key="donor",
        position_preserving=False,
        min_auc=0.0,
        **TOWARDS,
    )
    p = result.statistics["Matched_pval"].dropna()
    assert len(p) > 60
    assert stats.kstest(p, "uniform").pvalue > 0.05
    assert result.statistics["Supported"].sum() == 0


def test_states_that_do_not_separate_stop_it(planted, cells):
    shuffled = without(cells, PLANTED)
    shuffled.obs["state"] = np.random.default_rng(2).permutation(shuffled.obs["state"].to_numpy())
    with pytest.raises(DataError, match=r"AUC 0\.\d+ on donors held out.*min_auc=0"):
        gm.perturb(shuffled, planted, donor_key="donor", min_auc=0.75, **TOWARDS)


def test_combinations_are_their_genes_moved_together(make_bundle, cells, names):
    bundle = make_bundle(**RANKS)
    a, b = symbol(names), symbol(names, 41)
    result = gm.perturb(cells, bundle, genes=[a, b], combos=2, nulls=0, position_preserving=False)
    table = result.statistics.set_index("Gene_name")
    both = table.loc[f"{a}+{b}"]
    alone = table.loc[[a, b], "Test_avg_shift"] - 1
    np.testing.assert_allclose(both["Sum_of_indiv_shifts"], alone.sum(), rtol=1e-6)
    np.testing.assert_allclose(
        both["Combo_minus_sum_shift"], both["Test_avg_shift"] - 1 - alone.sum(), rtol=1e-6
    )
    anchored = gm.perturb(
        cells, bundle, genes=b, anchor_gene=a, nulls=0, position_preserving=False
    ).statistics.set_index("Gene_name")
    row = anchored.loc[f"{a}+{b}"]
    np.testing.assert_allclose(row["Anchor_shift"], alone[a], rtol=1e-6)
    np.testing.assert_allclose(row["Test_token_shift"], alone[b], rtol=1e-6)


def test_over_expression_reaches_cells_without_the_gene(make_bundle, cells, names):
    for shape in (RANKS, VALUES):
        result = gm.perturb(
            cells, make_bundle(**shape), genes=symbol(names), perturb_type="overexpress", nulls=0,
            emb_mode="cell",
        )  # fmt: skip
        assert len(result.shifts) == cells.n_obs
        assert ((result.shifts["rank"] == 0) == (cells.obs["state"] == "well").to_numpy()).all()
        moved = result.shifts["rank"] != 1  # one that is first already stays
        assert (result.shifts.loc[moved, "cosine_similarity"] < 1).mean() > 0.95


REFUSED = [
    ({"genes": "STAT99X"}, DataError, "STAT99X"),
    ({**TOWARDS, "goal_state": "wel"}, DataError, "did you mean 'well'"),
    ({**TOWARDS, "state_key": "stat"}, DataError, "did you mean 'state'"),
    ({"goal_state": "well"}, ConfigError, "state_key"),
    ({"rank_shift": 1}, ConfigError, "rank_shift"),
    ({"perturb_type": "knockout"}, ConfigError, "overexpress"),
    ({"combos": 2}, ConfigError, "name the genes"),
    ({"min_cells": 1000}, DataError, "min_cells=1000"),
    ({"donor_key": "doner"}, DataError, "did you mean 'donor'"),
]


@pytest.mark.parametrize(("how", "error", "says"), REFUSED)
def test_what_cannot_be_is_refused_by_name(make_bundle, cells, how, error, says):
    with pytest.raises(error, match=says):
        gm.perturb(cells, make_bundle(**RANKS), **how)


def test_genes_below_the_floor_are_named_and_not_tested(make_bundle, cells, names):
    rare = cells.copy()
    dense = rare.X.toarray()
    dense[:, 7] = np.arange(rare.n_obs) == 0
    rare.X = sp.csr_matrix(dense)
    result = gm.perturb(
        rare, make_bundle(**RANKS), genes=[symbol(names, 7), symbol(names)], nulls=0
    )
    assert result.statistics["Gene_name"].tolist() == [symbol(names)]
    assert result.summary["below_floor"] == [f"{symbol(names, 7)} (1 cells)"]


# -- files -----------------------------------------------------------------------------------------


@pytest.fixture
def job(make_bundle, cells, tmp_path):
    make_bundle(**RANKS).save(tmp_path / "bundle")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    return {
        "model": str(tmp_path / "bundle"), "input": str(tmp_path / "cells.h5ad"),
        "out": str(tmp_path / "out"), "device": "cpu", "genes": ("all",), "nulls": 5,
        "position_preserving": False,
    }  # fmt: skip


def tables(out):
    return {
        "statistics.csv": pd.read_csv(Path(out) / "statistics.csv"),
        "shifts.parquet": pd.read_parquet(Path(out) / "shifts.parquet"),
    }


def test_a_killed_command_goes_on_and_gives_the_same(job, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks_module, "BLOCK_VARIANTS", 512)
    script = textwrap.dedent(
        f"""
        import os, signal, torch
        torch.set_num_threads({torch.get_num_threads()})  # which decides the last bit of a sum
        from genemodel.perturbation import blocks
        from genemodel.perturbation.perturb import perturb_file
        from genemodel.perturbation.settings import PerturbSettings
        blocks.BLOCK_VARIANTS = 512
        keep, n = blocks.Blocks.keep, 0
        def killed(self, number, shifts):
            global n
            if n == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            n += 1
            keep(self, number, shifts)
        blocks.Blocks.keep = killed
        perturb_file(PerturbSettings(**{job!r}))
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    kept = sorted((tmp_path / ".out.shards").glob("*.npz"))
    assert len(kept) == 2
    made = []
    keep = Blocks.keep
    monkeypatch.setattr(Blocks, "keep", lambda s, n, x: (made.append(n), keep(s, n, x))[1])
    perturb_file(PerturbSettings(**job))
    assert made and not {0, 1} & set(made)
    assert not (tmp_path / ".out.shards").exists()
    went_on = tables(job["out"])
    perturb_file(PerturbSettings(**{**job, "out": str(tmp_path / "anew")}))
    for name, table in tables(tmp_path / "anew").items():
        pd.testing.assert_frame_equal(table, went_on[name], check_exact=True)
    uns = ad.read_h5ad(tmp_path / "out" / "cells.h5ad").uns["genemodel_perturb"]
    assert len(uns["statistics"]) == len(went_on["statistics.csv"])


def test_an_existing_folder_is_kept(job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists"):
        perturb_file(PerturbSettings(**job))
    with pytest.raises(ConfigError, match="not written by perturb"):
        perturb_file(PerturbSettings(**job, overwrite=True))


def test_both_formats_hold_the_same(job):
    perturb_file(PerturbSettings(**job))
    parquet = pd.read_parquet(Path(job["out"]) / "shifts.parquet")
    assert parquet["cosine_similarity"].dtype == np.float32
    perturb_file(PerturbSettings(**job, tables="csv", overwrite=True))
    assert not (Path(job["out"]) / "shifts.parquet").exists()
    text = pd.read_csv(Path(job["out"]) / "shifts.csv.gz")
    assert len(text) == len(parquet) > 1000
    pd.testing.assert_frame_equal(
        text.astype({"cell": str, "Gene": str}), parquet.astype({"cell": str, "Gene": str}),
        check_dtype=False, check_categorical=False, rtol=1e-6,
    )  # fmt: skip


# -- parts -----------------------------------------------------------------------------------------


def test_cells_do_not_vote_for_the_mean_that_they_are_part_of():
    """Noise of many dimensions: a cell is always closest to the mean that it helped to make."""
    rng = np.random.default_rng(1)
    noise_CD = units(rng.normal(size=(60, 400)))
    for donor_C in (None, np.arange(60) % 6):
        auc, _ = separation(noise_CD, rng.permutation(60) < 30, donor_C, 0)
        assert auc < 0.7


@pytest.mark.parametrize("freedom", [3, 300])
def test_matched_test_is_uniform_whatever_the_tails_and_finds_what_is_beyond(freedom):
    rng = np.random.default_rng(0)
    value_P = 3.0 + 2.0 * rng.standard_t(freedom, 600)
    value_P[7] = 300.0
    nulls = [rng.permutation(np.delete(np.arange(600), p))[:30].tolist() for p in range(600)]
    found = matched_test(value_P, nulls)
    assert stats.kstest(np.delete(found["Matched_pval"], 7), "uniform").pvalue > 0.05
    assert found["Matched_FDR"].to_numpy()[7] < 0.01
    few = matched_test(np.arange(4.0), [[1, 2, 3]])
    assert np.isnan(few["Matched_pval"].iloc[0]) and few["Matched_null_shift"].iloc[0] == 2.0


def test_false_discovery_rates_count_what_was_tested():
    found = adjusted(np.array([0.01, np.nan, 0.02, 0.5]))
    np.testing.assert_allclose(found, [0.03, np.nan, 0.03, 0.5])


def test_separation_of_donors_is_not_taken_for_separation_of_states():
    """Donors lie apart and have mostly one state each: held out, the state is not told."""
    rng = np.random.default_rng(0)
    donor = np.repeat(np.arange(6), 40)
    is_goal = rng.random(240) < np.where(donor % 2, 0.9, 0.1)
    place = rng.normal(size=(6, 8))[donor] * 3 + rng.normal(size=(240, 8))
    by_cells, how = separation(units(place), is_goal, None, 0)
    by_donors, how_2 = separation(units(place), is_goal, donor, 0)
    assert how == "cells" and how_2 == "donors"
    assert by_cells > 0.8 > 0.65 > by_donors


def test_the_figure_shows_the_strongest_genes_from_result_and_from_uns(sweep, cells, names):
    axes = gm.pl.perturbation(sweep, most=12)
    labels = [text.get_text() for text in axes[1].get_yticklabels()]
    assert len(labels) == 12 and symbol(names) in labels
    assert "goal" in axes[0].get_xlabel()
    with pytest.raises(DataError, match="genemodel.perturb"):
        gm.pl.perturbation(ad.AnnData(np.zeros((1, 1))))
