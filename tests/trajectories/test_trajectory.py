"""An ordered column from cells to tables: what is found, what is not, and what is kept."""

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
from genemodel.integration.head import IntegrationSettings
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.trajectories import movers, populations, settings
from genemodel.trajectories.holdouts import folds
from genemodel.trajectories.movers import pearson, with_time
from genemodel.trajectories.placing import OURS, Placer
from genemodel.trajectories.populations import Interpolator, crossing
from genemodel.trajectories.settings import TrajectorySettings
from genemodel.trajectories.times import times_of
from genemodel.trajectories.trajectory import trajectory_file

N_GENES, N_CELLS, MOVING = 60, 240, 8
SHORT = {"steps": 5, "n_genes": 50}


@pytest.fixture(scope="module")
def names(small_vocabulary):
    genes = small_vocabulary.genes
    return genes[genes["species"] == "human"].iloc[:N_GENES]


@pytest.fixture(scope="module")
def cells(names):
    """Cells of four days and four donors; the first genes rise, the next ones fall."""
    rng = np.random.default_rng(1)
    day_C = np.arange(N_CELLS) % 4
    rate_CG = np.tile(rng.gamma(2.0, 1.5, N_GENES) + 0.5, (N_CELLS, 1))
    rate_CG[:, :MOVING] = 4 * 1.8 ** (day_C[:, None] - 1.5)
    rate_CG[:, MOVING : 2 * MOVING] = 4 * 1.8 ** (1.5 - day_C[:, None])
    donor_C = np.arange(N_CELLS) // 4 % 4
    rate_CG *= rng.gamma(20, 0.05, (4, N_GENES))[donor_C] * rng.gamma(8, 0.125, (N_CELLS, 1))
    obs = pd.DataFrame(
        {
            "day": [f"day {d}" for d in day_C], "donor": [f"d{d}" for d in donor_C],
            "species": "human",
        },
        index=[f"cell{i}" for i in range(N_CELLS)],
    )  # fmt: skip
    obs.loc[obs.index[:8], "day"] = "day 9?"
    var = pd.DataFrame(index=pd.Index(names["ensembl_id"].astype(str)))
    counts = rng.poisson(rate_CG).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


ORDER = [f"day {d}" for d in range(4)]


@pytest.fixture(scope="module")
def result(cells):
    return gm.trajectory(cells, time_key="day", order=ORDER, donor_key="donor", **SHORT)


def test_held_out_donors_and_times_are_placed(cells, result):
    error = result.placing.set_index(["held_out", "method"])["error"]
    assert error["donors", OURS] < 0.35 and error["times", OURS] < 0.5
    assert error["donors", OURS] < 0.4 * error["donors", "middle time"]
    assert set(result.placing["held_out"]) == {"donors", "times"}
    told = cells.obs["genemodel_time"].to_numpy()
    assert np.isfinite(told).all()
    # The cells of no known day were of day 0 to 3, in turn.
    assert np.abs(told[:8] - np.arange(8) % 4).mean() < 0.6


def test_what_is_learnt_from_is_never_what_is_asked_for(cells):
    times = times_of(cells.obs, "day", ORDER)
    donor_C = np.unique(cells.obs["donor"], return_inverse=True)[1]
    found = list(folds(times, donor_C, 0))
    assert [fold.kind for fold in found] == ["donors"] * 4 + ["times"] * 2
    for fold in found:
        group_C = donor_C if fold.kind == "donors" else times.code_C
        assert not np.intersect1d(group_C[fold.train], group_C[fold.test]).size
        assert (times.code_C[fold.train] >= 0).all()
    # Of a donor whose time no other has, the time would be held out as well.
    alone_C = times.code_C.clip(0)
    assert [fold.kind for fold in folds(times, alone_C, 0)] == ["times"] * 2
    cell_folds = [fold for fold in folds(times, None, 0) if fold.kind == "cells"]
    asked = np.concatenate([fold.test for fold in cell_folds])
    assert np.array_equal(np.sort(asked), np.flatnonzero(times.code_C >= 0))


def test_labels_of_held_out_donors_cannot_matter(cells):
    """The oracle against a leak: other labels of one donor change none of its places."""
    times = times_of(cells.obs, "day", ORDER)
    donor_C = np.unique(cells.obs["donor"], return_inverse=True)[1]
    counts = sp.csr_matrix(cells.X)
    before = Placer(counts, times, donor_C, None, 0).place().time_C
    code_C = times.code_C.copy()
    here = np.flatnonzero((donor_C == 2) & (code_C >= 0))
    code_C[here] = np.random.default_rng(0).permutation(code_C[here])
    after = Placer(
        counts, type(times)(times.names, times.value_T, code_C, True), donor_C, None, 0
    ).place().time_C  # fmt: skip
    np.testing.assert_allclose(after[here], before[here], atol=1e-9)
    assert np.abs(after - before).max() > 0.01  # others were learnt from them


def test_genes_that_move_are_found_and_shuffled_times_find_none(result, names):
    genes = result.genes
    assert result.summary["replicates"] == "donors of several times"
    found = set(genes[genes["Time_FDR"] < 0.05]["Gene"])
    moving = set(names["ensembl_id"].iloc[: 2 * MOVING].astype(str))
    assert len(found & moving) >= 12 and len(found - moving) <= 4
    assert result.summary["null_significant"] < 1
    up = genes.set_index("Gene").loc[names["ensembl_id"].iloc[0]]
    assert up["Time_correlation"] > 0.4 and up["Donor_same_sign"] == 1.0
    assert up["Change_day 0_to_day 1"] > 0


def test_donors_of_one_time_each_are_replicates_and_cells_are_said_to_be_none(cells, monkeypatch):
    times = times_of(cells.obs, "day", ORDER)
    kept = np.flatnonzero(times.code_C >= 0)
    times = type(times)(times.names, times.value_T, times.code_C[kept], True)
    counts = sp.csr_matrix(cells.X[kept])
    genes = [str(g) for g in range(N_GENES)]
    # Every donor is of one day: two of each.
    donor_C = 2 * times.code_C + np.arange(kept.size) // 4 % 2
    table, said = with_time(counts, genes, times, donor_C, 0)
    assert said["replicates"] == "donors of one time"
    dense = cells.X[kept].toarray()
    log = np.log1p(dense * (1e4 / dense.sum(1, keepdims=True)))
    means = [log[donor_C == d, 3].mean() for d in range(8)]
    expected = stats.linregress([d // 2 for d in range(8)], means)
    row = table.set_index("Gene").loc["3"]
    assert row["Time_correlation"] == pytest.approx(expected.rvalue, abs=1e-5)
    assert row["Time_pval"] == pytest.approx(expected.pvalue, rel=1e-3)
    monkeypatch.setattr(movers, "SHUFFLES", 1)
    assert with_time(counts, genes, times, None, 0)[1]["replicates"] == "cells"
    value_C = times.value_C
    r_G = pearson(sp.csc_matrix(log), value_C)
    assert r_G[5] == pytest.approx(np.corrcoef(log[:, 5], value_C)[0, 1], abs=1e-6)


def test_a_population_between_two_times(result):
    table = result.populations.set_index("method")["energy"]
    assert table["optimal transport"] < 0.6 * min(table["earlier time"], table["later time"])
    assert abs(table["half of the same cells"]) < 0.3 * table["earlier time"]
    assert set(result.populations_long["donor"]) == {"d0", "d1", "d2", "d3"}
    assert set(result.populations_long["time"]) == {"day 1", "day 2"}


def test_no_cell_of_the_time_held_out_is_used(cells, monkeypatch):
    """Other counts of a held-out time change the truth, and no prediction."""
    times = times_of(cells.obs, "day", ORDER)
    held = np.flatnonzero(times.code_C == 1)
    settings = IntegrationSettings(steps=3, passes=0)
    found, between = [], []

    def kept(a_AD, b_BD):
        found[-1].append((a_AD.copy(), b_BD.copy()))
        return 0.0

    monkeypatch.setattr(populations, "energy_distance", kept)
    monkeypatch.setattr(type(times), "inner", property(lambda self: range(1, 2)))
    for changed in (False, True):
        counts = cells.X.toarray()
        if changed:
            counts[held] = counts[held][:, ::-1]
        one = Interpolator(sp.csr_matrix(counts), times, None, None, settings)
        between.append(one)
        # The space of the score is that of all cells, and kept.
        one._pca, one.component_CK = between[0]._pca, between[0].component_CK.copy()
        one.component_CK[held] += 100.0 * changed
        found.append([])
        rows = one.long()
    for i, name in enumerate(rows["method"]):
        if name not in populations.FLOORS:
            np.testing.assert_allclose(found[1][i][0], found[0][i][0], atol=1e-4)
            assert np.abs(found[1][i][1] - found[0][i][1]).max() > 50


def test_donors_of_one_time_are_not_corrected_for():
    obs = pd.DataFrame({"t": np.repeat([1, 2, 3], 12)})
    times = times_of(obs, "t")
    assert not crossing(times, np.repeat([0, 1, 2], 12)).any()
    donor_C = np.tile([0, 1], 18)
    assert np.array_equal(crossing(times, donor_C), donor_C)


def test_tables_survive_an_h5ad_and_are_drawn(cells, result, tmp_path):
    cells.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    pd.testing.assert_frame_equal(
        again.uns["genemodel_time"]["populations"].reset_index(drop=True),
        result.populations, check_dtype=False, check_index_type=False,
    )  # fmt: skip
    import matplotlib

    matplotlib.use("Agg")
    assert len(gm.pl.trajectory(again)) == 4
    assert len(gm.pl.trajectory(result)) == 4
    with pytest.raises(DataError, match="genemodel_time"):
        gm.pl.trajectory(ad.AnnData(np.ones((2, 2))))


def test_the_verb_writes_tables_and_keeps_other_folders(cells, tmp_path):
    cells.write_h5ad(tmp_path / "in.h5ad")
    asked = {
        "input": str(tmp_path / "in.h5ad"), "out": str(tmp_path / "out"), "time_key": "day",
        "order": tuple(ORDER), "parts": ("place", "genes"), "n_genes": 50,
    }  # fmt: skip
    said = trajectory_file(TrajectorySettings(**asked))
    assert "No donors were named" in said and "Cells are no replicates" in said
    table = pd.read_csv(tmp_path / "out" / "placing.csv")
    assert set(table["held_out"]) == {"cells", "times"}
    written = ad.read_h5ad(tmp_path / "out" / "cells.h5ad")
    assert np.isfinite(written.obs["genemodel_time"]).all() and written.X is None
    with pytest.raises(ConfigError, match="exists"):
        trajectory_file(TrajectorySettings(**asked))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("all of it")
    with pytest.raises(ConfigError, match="not written by trajectory"):
        trajectory_file(
            TrajectorySettings(**asked | {"out": str(tmp_path / "theirs"), "overwrite": True})
        )


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"parts": ("place", "fly")}, "parts"),
        ({"donor_key": "day"}, "time_key too"),
        ({"key_added": "day"}, "would be replaced"),
        ({"genes": "STAT1"}, "give model="),
        ({"perturb_type": "smash"}, "perturb_type"),
    ],
)
def test_refusals(cells, changed, said):
    with pytest.raises(ConfigError, match=said):
        gm.trajectory(cells, **{"time_key": "day", "order": ORDER, **changed})


def test_one_donor_is_refused(cells):
    one = cells.copy()
    one.obs["donor"] = "d0"
    with pytest.raises(DataError, match="one donor"):
        gm.trajectory(one, time_key="day", order=ORDER, donor_key="donor")


def test_a_model_is_asked_about_genes_between_times_that_it_tells_apart(
    cells, small_vocabulary, names
):
    torch.manual_seed(1)
    context = 64
    shape = ModelSettings(layers=1, width=16, heads=2, ffn=24, components=4)
    model = GeneModel(
        shape, n_tokens=len(small_vocabulary), n_species=len(small_vocabulary.species),
        context=context,
    )  # fmt: skip
    medians_V = np.ones(len(small_vocabulary), np.float32)
    tokens = TokenSettings(context=context, budget=context * 32)
    bundle = Bundle(model.eval(), small_vocabulary, tokens, medians_V)
    asked = {"time_key": "day", "order": ORDER, "donor_key": "donor", "max_cells": 12,
             "n_perturbed": 3, "nulls": 0, "n_genes": 50}  # fmt: skip
    result = gm.trajectory(cells, model=bundle, parts=("place", "genes"), min_auc=0.0, **asked)
    assert set(result.steps["Step"]) == {f"day {d}_to_day {d + 1}" for d in range(3)}
    assert set(result.steps["Gene_name"]) == set(result.genes["Gene"].head(3))
    assert result.summary["placed_by"] == "ordinal on the model"
    # The same as gm.perturb says of the step alone.
    chosen = cells[cells.obs["day"].isin(["day 0", "day 1"])].copy()
    alone = gm.perturb(
        chosen, bundle, genes=list(result.genes["Gene"].head(3)), state_key="day",
        start_state="day 0", goal_state="day 1", donor_key="donor", nulls=0, min_auc=0.0,
        max_cells=12,
    )  # fmt: skip
    first = result.steps[result.steps["Step"] == "day 0_to_day 1"].set_index("Gene_name")
    assert set(result.summary["auc"]) == set(result.steps["Step"])
    assert len(alone.statistics) == len(first)
    with pytest.raises(DataError, match="tells no time from the next"):
        gm.trajectory(cells, model=bundle, parts=("genes",), min_auc=1.0, **asked)


def test_defaults_are_written_once():
    assert settings.TimeAsked(time_key="t").steps == settings.STEPS
