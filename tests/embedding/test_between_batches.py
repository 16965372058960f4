"""Shifts of batches in a frozen model's vectors: taken off where proven, and only there.

Axes: B batches, C cells, D width, T types.
"""

import anndata as ad
import numpy as np
import pytest

import genemodel as gm
from genemodel.command import cli
from genemodel.embedding import between_batches
from genemodel.embedding.between_batches import BatchShifts
from genemodel.errors import ConfigError, DataError
from genemodel.integration.model import IntegratedModel
from genemodel.simulation.cells import synthetic

WIDTH = 12


def populations(size_BT, effect=0.0, seed=0):
    """Vectors (C, D) with so many cells of each type in each batch, their batch and their type."""
    draw = np.random.default_rng(seed)
    size_BT = np.asarray(size_BT)
    middle_TD = 4 * draw.normal(size=(size_BT.shape[1], WIDTH))
    effect_BD = effect * draw.normal(size=(len(size_BT), WIDTH))
    code_C = np.repeat(np.arange(len(size_BT)), size_BT.sum(1))
    type_C = np.concatenate([np.repeat(np.arange(len(row)), row) for row in size_BT])
    vector_CD = middle_TD[type_C] + effect_BD[code_C] + draw.normal(size=(len(code_C), WIDTH))
    return vector_CD.astype(np.float32), code_C, type_C, effect_BD


def distance(one_CD, code_C, type_C, shared):
    """Mean distance between the two batches' means of the types that both have."""
    return np.mean([
        np.linalg.norm(
            one_CD[(type_C == t) & (code_C == 0)].mean(0)
            - one_CD[(type_C == t) & (code_C == 1)].mean(0)
        )
        for t in shared
    ])  # fmt: skip


def centred(vector_CD, code_C):
    return vector_CD - np.stack([vector_CD[code_C == b].mean(0) for b in range(2)])[code_C]


def test_a_shift_is_found_where_the_batches_hold_other_shares_of_types():
    sizes = [[120, 60, 40, 20, 0], [20, 60, 40, 120, 60]]
    vector_CD, code_C, type_C, effect_BD = populations(sizes, effect=6.0)
    shifts = BatchShifts.fit(vector_CD, code_C, ["a", "b"])
    assert shifts.start == "centred"
    shared = range(4)
    before = distance(vector_CD, code_C, type_C, shared)
    after = distance(shifts.apply(vector_CD, code_C), code_C, type_C, shared)
    blindly = distance(centred(vector_CD, code_C), code_C, type_C, shared)
    assert after < 0.1 * before
    assert after < 0.5 * blindly  # which takes the difference in composition for one of batches
    found_D = shifts.shift_BD[0] - shifts.shift_BD[1]
    np.testing.assert_allclose(found_D, effect_BD[0] - effect_BD[1], atol=1.0)


def test_batches_of_other_types_without_an_effect_stay_where_they_are():
    vector_CD, code_C, type_C, _ = populations([[80, 80, 80, 0, 0], [0, 0, 80, 80, 80]])
    shifts = BatchShifts.fit(vector_CD, code_C, ["a", "b"])
    assert shifts.start == "as is"
    plainly_D = vector_CD[code_C == 0].mean(0) - vector_CD[code_C == 1].mean(0)
    moved_D = shifts.shift_BD[0] - shifts.shift_BD[1]
    assert np.linalg.norm(moved_D) < 0.15 * np.linalg.norm(plainly_D)
    # A part of the evidence is there: one type in three is shared.
    assert (shifts.evidence_B > 0.2).all()
    assert (shifts.evidence_B < 0.6).all()


def test_labels_reach_the_other_study_over_its_shift():
    vector_CD, code_C, type_C, _ = populations(
        [[90, 50, 20, 40], [30, 60, 50, 10]], effect=9.0, seed=1
    )
    apart_CD = BatchShifts.fit(vector_CD, code_C, ["a", "b"]).apply(vector_CD, code_C)
    there_C, here_C = code_C == 0, code_C == 1
    right = []
    for rows_CD in (vector_CD, apart_CD):
        near_CC = np.linalg.norm(rows_CD[here_C, None] - rows_CD[None, there_C], axis=2)
        right.append((type_C[there_C][near_CC.argmin(1)] == type_C[here_C]).mean())
    assert right[1] > 0.98
    assert right[1] > right[0] + 0.2


def test_blocks_few_cells_and_cells_without_a_vector(monkeypatch):
    vector_CD, code_C, type_C, _ = populations([[100, 60, 40], [30, 60, 90]], effect=6.0)
    vector_CD[[0, -1]] = np.nan
    whole = BatchShifts.fit(vector_CD, code_C, ["a", "b", "empty"])
    blocks = BatchShifts.fit_blocks(np.array_split(vector_CD, 7), code_C, ["a", "b", "empty"])
    np.testing.assert_array_equal(whole.shift_BD, blocks.shift_BD)
    # A name without cells has no shift, and takes nobody with it.
    assert not whole.shift_BD[2].any()
    moved_CD = whole.apply(vector_CD, code_C)
    np.testing.assert_array_equal(np.isnan(moved_CD), np.isnan(vector_CD))
    assert moved_CD.dtype == np.float32
    monkeypatch.setattr(between_batches, "FITTED", 200)
    rows_F = between_batches._rows(code_C, 2, 0)
    assert len(rows_F) == 200
    assert (np.bincount(code_C[rows_F]) > 90).all()
    fewer = BatchShifts.fit(vector_CD, code_C, ["a", "b"])
    apart = whole.shift_BD[0] - whole.shift_BD[1] - fewer.shift_BD[0] + fewer.shift_BD[1]
    assert np.linalg.norm(apart) < 0.1 * np.linalg.norm(whole.shift_BD[0] - whole.shift_BD[1])


@pytest.fixture(scope="module")
def cells():
    adata = synthetic(160, species=("human",), n_genes=600, genes_per_cell=150, seed=3)["human"]
    adata.obs["place"] = np.where(np.arange(adata.n_obs) % 3 == 0, "one", "two")
    return adata


def test_function_and_verb_say_what_they_did(random_bundle, cells, tmp_path):
    plain, moved = cells.copy(), cells.copy()
    gm.embed(plain, random_bundle)
    gm.embed(moved, random_bundle, batch_key=["batch", "place"])
    about = moved.uns["X_genemodel"]
    names = (cells.obs["batch"].astype(str) + " | " + cells.obs["place"]).to_numpy()
    assert about["batches"] == sorted(set(names))
    assert about["batch_key"] == ["batch", "place"]
    assert about["batch_cells"].sum() == cells.n_obs
    shift_CD = plain.obsm["X_genemodel"] - moved.obsm["X_genemodel"]
    for name, length in zip(about["batches"], about["batch_shift"], strict=True):
        own_CD = shift_CD[names == name]
        np.testing.assert_allclose(own_CD, own_CD[:1].repeat(len(own_CD), 0), atol=1e-5)
        assert np.linalg.norm(own_CD[0]) == pytest.approx(length, abs=1e-4)
    assert about["batch_shift"].any()
    assert "batches" not in plain.uns["X_genemodel"]
    random_bundle.save(tmp_path / "bundle")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    words = [f"model={tmp_path / 'bundle'}", f"input={tmp_path / 'cells.h5ad'}", "device=cpu"]
    words += [f"output={tmp_path / 'out.h5ad'}", "batch_key=[batch,place]"]
    assert cli.main(["embed", *words]) == 0
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    np.testing.assert_allclose(written.obsm["X_genemodel"], moved.obsm["X_genemodel"], atol=1e-5)
    assert list(written.uns["X_genemodel"]["batches"]) == about["batches"]
    np.testing.assert_allclose(
        written.uns["X_genemodel"]["batch_evidence"], about["batch_evidence"], atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"key": "gone"}, "no column 'gone' \\(batch_key\\)"),
        ({"value": "all"}, "holds one batch only: there is nothing to align. Leave batch_key out"),
        ({"value": np.nan}, "\\(batch_key\\) is missing in 160 of 160 cells"),
        ({"value": np.arange(160).astype(str)}, "holds 160 batches of 160 cells"),
    ],
)
def test_batches_that_are_none_are_refused_before_the_work(
    random_bundle, cells, monkeypatch, change, words
):
    monkeypatch.setattr("genemodel.embedding.embed.embedding_of", lambda *_, **__: pytest.fail())
    given = cells.copy()
    given.obs["place"] = change.get("value", "all")
    with pytest.raises(DataError, match=words):
        gm.embed(given, random_bundle, batch_key=change.get("key", "place"))


def test_an_integrated_model_knows_its_batches(cells):
    model = IntegratedModel.__new__(IntegratedModel)
    with pytest.raises(ConfigError, match="batch_key=batch says nothing to an IntegratedModel"):
        gm.embed(cells.copy(), model, batch_key="batch")


def test_a_batch_that_shares_nothing_stays_and_is_named(random_bundle, cells, caplog, monkeypatch):
    monkeypatch.setattr(between_batches, "LEAST_EVIDENCE", 1.1)
    plain, given = cells.copy(), cells.copy()
    gm.embed(plain, random_bundle)
    gm.embed(given, random_bundle, batch_key="place")
    np.testing.assert_array_equal(given.obsm["X_genemodel"], plain.obsm["X_genemodel"])
    assert "2 of 2 batches of place share no population that is proven (one, two)" in caplog.text
