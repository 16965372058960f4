"""The label head: who it knows, what it does not know, and what it has seen to say so.

Axes: C cells, G genes, L labels.
"""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from sklearn.metrics import roc_auc_score

import genemodel as gm
from genemodel.annotation.label_head import (
    calibration_error,
    confidence_of_halves,
    folds_of,
    label_counts,
    mixed,
    temperature_for,
    temperature_of,
    votes,
)
from genemodel.annotation.novelty import (
    CROWD,
    SIGNS,
    Novelty,
    common_shift,
    own_shifts,
    signs_of_novelty,
)
from genemodel.annotation.regression import LENGTH, Regression, basis_of, unit_logs
from genemodel.errors import ConfigError, DataError

GENES = 400
MEAN_COUNTS = 800


def profiles(n_types, strength=1.0, seed=0):
    """Expression of each type: some genes of its own above a common level, (types, G)."""
    draw = np.random.default_rng(seed)
    level_G = draw.gamma(0.6, 1.0, GENES)
    return level_G * np.exp(strength * draw.normal(size=(n_types, GENES)))


def cells_of(profile_LG, label_C, *, gain_G=1.0, depth=MEAN_COUNTS, seed=0):
    draw = np.random.default_rng(seed)
    rate_CG = profile_LG[label_C] * gain_G
    rate_CG = rate_CG / rate_CG.sum(1, keepdims=True)
    rate_CG = rate_CG * (depth * draw.lognormal(0, 0.3, len(label_C)))[:, None]
    return sp.csr_matrix(draw.poisson(rate_CG).astype(np.float32))


def study(n, n_types, *, batches=3, effect=0.25, strength=0.7, seed=0, profile_seed=0, of=None):
    """AnnData of several donors, each with a gain per gene of its own."""
    draw = np.random.default_rng(seed)
    profile_LG = profiles(n_types, strength, profile_seed)
    label_C = draw.integers(0, n_types, n) if of is None else draw.choice(of, n)
    batch_C = draw.integers(0, batches, n)
    parts = []
    for batch in range(batches):
        rows = np.flatnonzero(batch_C == batch)
        gain_G = np.exp(effect * np.random.default_rng([seed, batch]).normal(size=GENES))
        counts = cells_of(profile_LG, label_C[rows], gain_G=gain_G, seed=seed + batch)
        parts.append(ad.AnnData(counts, obs=pd.DataFrame({
            "kind": [f"type {code}" for code in label_C[rows]], "donor": f"donor {batch}",
        }, index=[f"{seed}-{row}" for row in rows])))  # fmt: skip
    adata = ad.concat(parts)
    adata.var_names = [f"gene{g}" for g in range(GENES)]
    return adata


@pytest.fixture(scope="module")
def reference():
    return study(700, 5, seed=1)


@pytest.fixture(scope="module")
def query():
    """Cells of donors that the reference lacks."""
    return study(500, 5, seed=50)


def test_labels_confidence_and_probabilities_are_written(reference, query, tmp_path):
    given = query.copy()
    gm.annotate(given, reference, label_key="kind", batch_key="donor")
    said = given.obs["genemodel_label"].astype(str)
    assert (said == given.obs["kind"]).mean() > 0.9
    about = given.uns["genemodel_label"]
    assert about["calibrated_on"] == "batches"
    assert "confidence_of_halves" not in about  # asked for across species only
    probability_CL = given.obsm["genemodel_label_probability"]
    np.testing.assert_allclose(probability_CL.sum(1), 1, atol=1e-5)
    np.testing.assert_allclose(
        probability_CL.max(1), given.obs["genemodel_label_confidence"], atol=1e-6
    )
    assert about["labels"] == sorted(reference.obs["kind"].unique())
    best = np.array(about["labels"])[probability_CL.argmax(1)]
    known = (said != "unknown").to_numpy()
    assert (best[known] == said[known]).all()
    assert given.obs["genemodel_label_novelty"].between(0, 1).all()
    given.write_h5ad(tmp_path / "labelled.h5ad")
    assert ad.read_h5ad(tmp_path / "labelled.h5ad").uns["genemodel_label"]["genes"] > 300


def test_the_same_seed_gives_the_same_labels_in_any_order_of_cells(reference, query):
    one, other = query.copy(), query[::-1].copy()
    for given in (one, other):
        gm.annotate(given, reference[::-1].copy(), label_key="kind", batch_key="donor")
    back = other.obsm["genemodel_label_probability"][::-1]
    np.testing.assert_allclose(one.obsm["genemodel_label_probability"], back, atol=0.02)
    again = query.copy()
    gm.annotate(again, reference[::-1].copy(), label_key="kind", batch_key="donor")
    np.testing.assert_array_equal(
        one.obsm["genemodel_label_probability"], again.obsm["genemodel_label_probability"]
    )


@pytest.mark.parametrize("batch_key", ["donor", ()])
def test_a_type_left_out_is_flagged_and_known_types_stay(reference, query, batch_key):
    less = reference[reference.obs["kind"] != "type 3"].copy()
    given = query.copy()
    gm.annotate(given, less, label_key="kind", batch_key=batch_key)
    new = (given.obs["kind"] == "type 3").to_numpy()
    unknown = (given.obs["genemodel_label"] == "unknown").to_numpy()
    assert roc_auc_score(new, given.obs["genemodel_label_novelty"]) > 0.95
    assert unknown[new].mean() > 0.8
    assert unknown[~new].mean() < 0.15
    calm = query.copy()
    gm.annotate(calm, less, label_key="kind", batch_key=batch_key, far_quantile=None, unknown=0)
    assert (calm.obs["genemodel_label"] != "unknown").all()
    assert (calm.obs["genemodel_label_novelty"] == 0).all()


@pytest.mark.parametrize("batch_key", ["donor", ()])
def test_probabilities_are_as_often_right_as_they_say(batch_key):
    """Types that overlap, donors that were not seen: no regression of its own would say it."""
    known, new = (study(900, 4, effect=0.3, strength=0.12, seed=seed) for seed in (3, 70))
    gm.annotate(new, known, label_key="kind", batch_key=batch_key, far_quantile=None, unknown=0)
    right = (new.obs["genemodel_label"].astype(str) == new.obs["kind"]).to_numpy()
    confidence = new.obs["genemodel_label_confidence"].to_numpy()
    assert 0.5 < right.mean() < 0.95
    assert calibration_error(confidence, right) < 0.08
    assert abs(confidence.mean() - right.mean()) < 0.07


def test_whole_donors_are_held_out():
    donor = np.repeat(np.arange(7), [50, 40, 30, 20, 10, 5, 5])
    fold, by_batch = folds_of(np.zeros(160, int), donor, seed=0)
    assert by_batch and len(np.unique(fold)) == 5
    for one in range(7):
        assert len(np.unique(fold[donor == one])) == 1
    assert np.bincount(fold).max() == 50
    label = np.repeat([0, 1], [157, 3])
    fold, by_batch = folds_of(label, np.zeros(160, int), seed=0)
    assert not by_batch
    assert len(np.unique(fold[label == 1])) == 3  # three cells of a type are three folds


def test_a_batch_of_one_cell_is_no_other_batch():
    """Held out against it, hundreds of cells would be judged by what one can teach."""
    label = np.arange(201) % 2
    fold, by_batch = folds_of(label, np.array(["lone"] + ["large"] * 200), seed=0)
    assert not by_batch and len(np.unique(fold)) == 5
    batch = np.array(["lone"] + ["left", "right"] * 100)
    fold, by_batch = folds_of(label, batch, seed=0)
    assert by_batch and len(np.unique(fold[batch == "left"])) == 1


def test_another_condition_is_taken_off_where_types_agree(reference):
    profile_LG = profiles(5, 0.7)
    label_C = np.random.default_rng(9).integers(0, 5, 600)
    draw = np.random.default_rng(8)
    induced_G = np.where(draw.random(GENES) < 0.15, np.exp(1.6), 1.0)
    changed, same = (
        cells_of(profile_LG, label_C, gain_G=gain, seed=4) for gain in (induced_G, 1.0)
    )
    log_RG = unit_logs(reference.X)
    label_R = pd.Categorical(reference.obs["kind"]).codes.astype(int)
    basis_GD = basis_of(log_RG, 50, 0)
    model = Regression.fit(log_RG, label_R, 5, basis_GD, 0.05)
    shift_G, evidence = common_shift(model, log_RG, label_R, unit_logs(changed))
    assert evidence > 0.6
    assert shift_G[induced_G > 1].mean() > 4 * abs(shift_G[induced_G == 1].mean())
    none_G, little = common_shift(model, log_RG, label_R, unit_logs(same[:40]))
    assert little < 0.35 and not none_G.any()
    few_G, _ = common_shift(model, log_RG, label_R, unit_logs(changed[label_C < 2]))
    assert not few_G.any()  # two types in common are no evidence
    right = [
        (model.logits(unit_logs(changed), one_G).argmax(1) == label_C).mean()
        for one_G in (shift_G, 0 * shift_G)
    ]
    assert right[0] >= right[1]


def test_two_species_meet_in_their_orthologs_without_a_model():
    parts = gm.synthetic(500, n_cell_types=3, n_batches=2, n_genes=1500, genes_per_cell=500, seed=6)
    human, mouse = parts["human"], parts["mouse"]
    gm.annotate(mouse, human, label_key="cell_type", batch_key="batch")
    right = (mouse.obs["genemodel_label"].astype(str) == mouse.obs["cell_type"].astype(str)).mean()
    assert right > mouse.obs["cell_type"].value_counts(normalize=True).max() + 0.2
    confidence = mouse.obs["genemodel_label_confidence"].mean()
    assert confidence <= mouse.uns["genemodel_label"]["confidence_of_halves"] + 0.01
    bare = human.copy()
    bare.obs = bare.obs.drop(columns="species")
    with pytest.raises(DataError, match="0 genes of the same name.*Name the species of both"):
        gm.annotate(parts["mouse"].copy(), bare, label_key="cell_type")


@pytest.fixture(scope="module")
def two_species():
    """Cells of two species, of which seven genes in eight tell other types in each."""
    draw = np.random.default_rng(3)
    here_LG, there_LG = profiles(6, 0.6), profiles(6, 0.6)
    for gene in draw.permutation(GENES)[: 7 * GENES // 8]:
        there_LG[:, gene] = draw.permutation(there_LG[:, gene])
    label_R, label_C = draw.integers(0, 6, 300), draw.integers(0, 6, 200)
    return cells_of(here_LG, label_R, seed=1), label_R, cells_of(there_LG, label_C, seed=2), label_C


def test_another_species_is_labelled_alike_but_with_less_confidence(two_species):
    counts_RG, label_R, counts_CG, label_C = two_species
    plain, far = (
        label_counts(counts_RG, label_R, counts_CG, keep=None, far=far) for far in (False, True)
    )
    best_C = plain.probability_CL.argmax(1)
    np.testing.assert_array_equal(far.probability_CL.argmax(1), best_C)
    right_C = best_C == label_C
    before, after = (calibration_error(one.probability_CL.max(1), right_C) for one in (plain, far))
    # The confidence that cells of the reference's own species taught is what is wrong.
    assert plain.probability_CL.max(1).mean() > right_C.mean() + 0.1
    assert after < before - 0.05
    assert "confidence_of_halves" not in plain.about
    assert far.about["temperature"] > plain.about["temperature"]
    asked = far.about["confidence_of_halves"]
    assert far.probability_CL.max(1).mean() == pytest.approx(asked, abs=0.01)


def test_halves_of_the_genes_agree_on_cells_of_the_same_species(two_species):
    counts_RG, label_R, counts_CG, _ = two_species
    alike_CG = cells_of(profiles(6, 0.6), np.arange(200) % 6, seed=4)
    same, other = (
        confidence_of_halves(counts_RG, label_R, cells_CG, 6, 0.05, 0.3, 0)
        for cells_CG in (alike_CG, counts_CG)
    )
    assert same > 0.9
    assert other < same - 0.2


def test_the_temperature_for_a_confidence_gives_it():
    log_CL = np.random.default_rng(0).normal(0, 3, (500, 5))
    for wanted in (0.3, 0.6, 0.9):
        scaled_CL = np.exp(log_CL / temperature_for(log_CL, wanted))
        confidence = (scaled_CL / scaled_CL.sum(1, keepdims=True)).max(1).mean()
        assert confidence == pytest.approx(wanted, abs=2e-3)
    # Nothing is less sure than a share of all labels, nor surer than 1: as near as it gets.
    assert temperature_for(log_CL, 0.1) == pytest.approx(np.exp(3))
    assert temperature_for(log_CL, 1.0) == pytest.approx(np.exp(-3))


def test_a_reference_of_two_types_and_one_of_three_cells(query):
    small = study(300, 2, batches=1, seed=5)
    given = query[query.obs["kind"].isin(["type 0", "type 1"])].copy()
    gm.annotate(given, small, label_key="kind")
    assert given.uns["genemodel_label"]["calibrated_on"] == "cells"
    assert np.isnan(given.uns["genemodel_label"]["left_out_auroc"])
    assert (given.obs["genemodel_label"].astype(str) == given.obs["kind"]).mean() > 0.85
    rare = study(400, 4, seed=6)
    at = np.flatnonzero(rare.obs["kind"] == "type 2")
    rare = rare[np.setdiff1d(np.arange(400), at[3:])].copy()
    assert (rare.obs["kind"] == "type 2").sum() == 3
    gm.annotate(given, rare, label_key="kind", batch_key="donor")
    assert (given.obs["genemodel_label"].astype(str) == given.obs["kind"]).mean() > 0.85


def test_a_type_of_one_donor_alone_is_no_error_across_donors(reference):
    odd = reference.copy()
    kind = odd.obs["kind"].astype(object)
    kind[(odd.obs["donor"] == "donor 0") & (kind == "type 0")] = "type 0 of donor 0"
    odd.obs["kind"] = kind
    given = reference[::2].copy()
    gm.annotate(given, odd, label_key="kind", batch_key="donor", unknown=0)
    assert given.uns["genemodel_label"]["held_out_accuracy"] > 0.85


@pytest.mark.parametrize("rows", [1, 7])
def test_few_cells_and_cells_without_counts(reference, query, rows):
    few = query[:rows].copy()
    if rows == 1:
        gm.annotate(few, reference, label_key="kind", batch_key="donor", unknown=0)
        assert few.obs["genemodel_label"].iloc[0] == few.obs["kind"].iloc[0]
        return
    few.X[0] = 0
    few.X.eliminate_zeros()
    gm.annotate(few, reference, label_key="kind", batch_key="donor")
    assert few.obs["genemodel_label"].iloc[0] == "unknown"
    assert few.obs["genemodel_label_confidence"].iloc[0] == 0
    assert few.obs["genemodel_label_novelty"].iloc[0] == 1
    rest = few.obs.iloc[1:]
    assert (rest["genemodel_label"].astype(str) == rest["kind"]).mean() > 0.5


def test_what_is_foreign_as_a_whole_is_unknown_as_a_whole(reference, caplog):
    foreign = study(300, 4, strength=1.5, seed=33, profile_seed=99)
    with caplog.at_level(logging.WARNING):
        gm.annotate(foreign, reference, label_key="kind", batch_key="donor")
    assert (foreign.obs["genemodel_label"] == "unknown").mean() > 0.8
    assert "far_quantile=None" in caplog.text


def test_regression_is_that_of_scikit_learn(reference):
    from sklearn.linear_model import LogisticRegression

    log_RG = unit_logs(reference.X)
    np.testing.assert_allclose(np.sqrt(log_RG.multiply(log_RG).sum(1)), LENGTH, 1e-5)
    basis_GD = basis_of(log_RG, 30, 0)
    part_CD = np.asarray(log_RG @ basis_GD, float)
    label = pd.Categorical(reference.obs["kind"]).codes.astype(int)
    for those in (label, np.minimum(label, 1)):
        slow = LogisticRegression(C=0.05, class_weight="balanced", max_iter=300)
        slow.fit(part_CD, those)
        fast = Regression.fit(log_RG, those, 5, basis_GD, 0.05)
        logit_CL = fast.logits(log_RG, np.zeros(GENES))
        np.testing.assert_allclose(
            np.exp(mixed(logit_CL, logit_CL, 0.0))[:, slow.classes_],
            slow.predict_proba(part_CD), atol=1e-3,
        )  # fmt: skip


def test_temperature_makes_overconfident_scores_true():
    draw = np.random.default_rng(0)
    logit_CL = draw.normal(size=(4000, 3))
    label_C = np.array([draw.choice(3, p=p) for p in np.exp(mixed(logit_CL, logit_CL, 0.0))])
    assert temperature_of(3 * logit_CL, label_C) == pytest.approx(3, rel=0.1)
    assert temperature_of(np.zeros((0, 3)), np.zeros(0, int)) == 1.0


def test_calibration_error_equals_a_count_by_hand():
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    right = np.array([True, True, True, False])
    # bin .9: |1 - .95|, bin .5: |.5 - .55|, half of the cells each
    assert calibration_error(confidence, right) == pytest.approx(0.05)
    assert np.isnan(calibration_error(np.zeros(0), np.zeros(0, bool)))


def test_votes_are_shares_of_the_nearest():
    vectors = np.array([[1.0, 0], [1, 0.1], [-1, 0], [-1, 0.1]])
    vote = votes(vectors, np.array([0, 0, 1, 1]), np.array([[2.0, 0.1], [np.nan, 0]]), 2, 2)
    np.testing.assert_array_equal(vote, [[1, 0], [0.5, 0.5]])


def test_neighbours_in_an_embedding_vote_where_they_help_the_held_out_donors(reference, query):
    """Counts say little, the embedding all: it is chosen. And the other way round it is not."""
    label_R = pd.Categorical(reference.obs["kind"]).codes.astype(int)
    label_C = pd.Categorical(query.obs["kind"]).codes.astype(int)
    donor_R = reference.obs["donor"].to_numpy()
    draw = np.random.default_rng(0)
    weak_RG, weak_CG = (
        sp.csr_matrix(draw.poisson(1.0, (len(label), GENES)).astype(np.float32))
        for label in (label_R, label_C)
    )
    telling = np.eye(5)[label_R], np.eye(5)[label_C]
    noise = draw.normal(size=(len(label_R), 5)), draw.normal(size=(len(label_C), 5))
    found = label_counts(weak_RG, label_R, weak_CG, batch_R=donor_R, vectors=telling, keep=None)
    assert found.about["neighbours_share"] == 0.5
    assert (found.probability_CL.argmax(1) == label_C).mean() > 0.9
    found = label_counts(reference.X, label_R, query.X, batch_R=donor_R, vectors=noise, keep=None)
    assert found.about["neighbours_share"] == 0.0


def test_the_limit_is_set_on_types_left_out_but_keeps_known_cells():
    draw = np.random.default_rng(0)
    known, new = draw.normal(size=(400, 5)), draw.normal(size=(100, 5)) + 4
    signs = [np.concatenate([known, new])]
    news = [np.arange(500) >= 400]
    found = Novelty.fit(signs, news, 0.9, across=True)
    assert found.left_out_auroc > 0.99
    assert (found.weight_F >= 0).all()
    # Apart: the limit lies between both, far above the quantile that had to be kept.
    assert (found.probability(known) < found.limit).mean() > 0.985
    assert (found.probability(np.concatenate([known, new]))[400:] > found.limit).mean() > 0.97
    blind = Novelty.fit([signs[0][:, ::1] * [0, 1, 1, 1, 1]], news, 0.95, across=False)
    assert blind.weight_F[CROWD] == 0
    near = Novelty.fit([np.concatenate([known, new - 4])], news, 0.9, across=True)
    assert (near.probability(known) <= near.limit).mean() >= 0.89


def test_what_is_missing_is_said(reference, query):
    with pytest.raises(ConfigError, match="reference is missing: give labelled cells, or a model"):
        gm.annotate(query.copy())
    with pytest.raises(ConfigError, match="transfer=knn reads the vectors of a model"):
        gm.annotate(query.copy(), reference, label_key="kind", transfer="knn")
    with pytest.raises(ConfigError, match="label_key is missing"):
        gm.annotate(query.copy(), reference)
    odd = reference.copy()
    odd.obs["donor"] = odd.obs["donor"].where(np.arange(odd.n_obs) > 0, None)
    with pytest.raises(DataError, match="'donor'.*missing in 1 of 700"):
        gm.annotate(query.copy(), odd, label_key="kind", batch_key="donor")


@pytest.mark.parametrize("labels", [2, 4])
def test_a_batch_for_every_type_is_no_traceback(labels):
    """Held out, a batch would leave no cell of its own types to learn from: cells are instead."""
    reference, query = study(160, labels, seed=1), study(60, labels, seed=2)
    half = [f"type {code}" for code in range(labels // 2)]
    reference.obs["donor"] = np.where(reference.obs["kind"].isin(half), "left", "right")
    gm.annotate(query, reference, label_key="kind", batch_key="donor")
    assert query.uns["genemodel_label"]["calibrated_on"] == "cells"
    assert (query.obs["genemodel_label"] == query.obs["kind"]).mean() > 0.5


def test_two_columns_of_species_are_refused():
    reference, query = study(80, 2, seed=1), study(40, 2, seed=2)
    query.obs["species"] = "human"
    query.obs = pd.concat([query.obs, query.obs[["species"]]], axis=1)
    with pytest.raises(DataError, match="two columns of the name 'species'"):
        gm.annotate(query, reference, label_key="kind")


def test_a_type_that_changed_more_than_the_others_has_a_shift_of_its_own():
    """Planted: one type moves, another is missing in the query and a new one stands far away."""
    draw = np.random.default_rng(0)
    n_genes, n_types, spread = 60, 5, 0.3
    mean_LG = draw.normal(3, 1, (n_types + 1, n_genes))
    moved_LG = 0.15 * draw.normal(size=mean_LG.shape)
    moved_LG[0] += 0.2 * draw.normal(size=n_genes)

    def cells(code_C, shift_LG):
        noise_CG = spread * draw.normal(size=(len(code_C), n_genes))
        return sp.csr_matrix((mean_LG[code_C] + shift_LG[code_C] + noise_CG).astype(np.float32))

    label_R = np.arange(500) % n_types
    kind_C = np.repeat([0, 1, 2, 3, n_types], 60)  # no 4; the last is of no type
    log_RG, log_CG = cells(label_R, 0 * moved_LG), cells(kind_C, moved_LG)
    model = Regression.fit(log_RG, label_R, n_types, basis_of(log_RG, 40, 0), 1.0)
    said_C = np.where(kind_C == n_types, 4, kind_C)
    nothing_G = np.zeros(n_genes, np.float32)
    own_LG = own_shifts(model, log_RG, label_R, log_CG, said_C, nothing_G, 0)
    error = spread * np.sqrt(2 / 60)
    np.testing.assert_allclose(own_LG[:4], moved_LG[:4], atol=5 * error)
    assert not own_LG[4].any()
    few = own_shifts(model, log_RG, label_R, log_CG[:120], said_C[:120], nothing_G, 0)
    assert not few.any()  # two types say nothing of what is usual
    signs = [
        signs_of_novelty(model, log_RG, label_R, log_CG, nothing_G, 0, own=own)
        for own in (False, True)
    ]
    column = SIGNS.index("distance")
    gap, own_gap = (
        sign[kind_C == n_types, column].min() - sign[kind_C == 0, column].max() for sign in signs
    )
    assert own_gap > gap + 0.1


def test_monocytes_of_another_study_are_known_and_dendritic_cells_are_not(shared_data):
    """Interferon changes monocytes more than lymphocytes, and Kang has no dendritic cells."""
    reference = ad.read_h5ad(shared_data / "human_pbmc_kang_ifnb_labelled_1267g.h5ad")
    query = ad.read_h5ad(shared_data / "human_pbmc3k_10xv1.h5ad")
    kind = query.obs["cell_type"].astype(str).to_numpy()
    wanted = {"DC": 32, "CD14+ Mono": 150, "B": 100, "Memory CD4 T": 150, "CD8 T": 60}
    rows = np.concatenate([np.flatnonzero(kind == name)[:n] for name, n in wanted.items()])
    query = query[np.sort(rows)].copy()
    gm.annotate(query, reference, label_key="cell_type", batch_key="batch")
    unknown = (query.obs["genemodel_label"] == "unknown").groupby(
        query.obs["cell_type"].astype(str)
    ).mean()  # fmt: skip
    assert unknown["DC"] > 0.5
    assert unknown["CD14+ Mono"] < 0.3
    assert unknown[["B", "Memory CD4 T", "CD8 T"]].max() < 0.2
