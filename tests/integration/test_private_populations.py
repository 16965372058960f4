"""Populations of one batch among a relative of others: found by their genes, spared, told of."""

import logging

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import genemodel as gm
from genemodel.integration import private_populations, sparing
from genemodel.integration.private_populations import PrivatePopulation, private_populations_of
from genemodel.integration.shared_clusters import SharedClusterCorrection
from genemodel.integration.sparing import Spared, corrected, names_for_readers, rows_of, told

N_GENES = 120
MARKERS, RELATIVE = np.arange(100, 112), 4


def cells(seed=0, *, n=320, both=False, batches=2, relative=70):
    """Four types in all batches, and a relative of the first in batch 0 alone, or in all of them.

    Genes 0 to 59 tell the types, 100 to 111 the relative, 60 to 99 a state of all cells. A cell
    lies at its type (axes 3 to 5), its state (axis 1) and as a relative or not (axis 0). Batch 0
    has n cells besides, the others twice as many.
    """
    rng = np.random.default_rng(seed)
    size = np.array([n] + [2 * n] * (batches - 1))
    batch, kind = np.repeat(np.arange(batches), size), np.arange(size.sum()) % 4
    of_it = np.repeat(np.arange(batches if both else 1), relative)
    batch, kind = np.append(batch, of_it), np.append(kind, np.full(len(of_it), 4))
    state = rng.normal(size=len(kind))
    rate = rng.gamma(2, 0.5, (1, N_GENES)) + np.zeros((len(kind), 1))
    for number in (1, 2, 3):
        rate[:, 20 * number - 20 : 20 * number] *= np.exp(1.2 * (kind == number))[:, None]
    rate[:, 60:100] *= np.exp(0.4 * state)[:, None]
    rate[:, MARKERS] *= np.exp(1.0 * (kind == RELATIVE))[:, None]
    # A batch bends all genes, which must not look like a population.
    rate *= np.exp(0.2 * rng.normal(size=(batches, N_GENES)))[batch]
    counts = sparse.csr_matrix(rng.poisson(3 * rate).astype(np.float32))
    place = np.stack(
        [
            2.0 * (kind == RELATIVE),
            0.5 * state,
            6.0 + 0 * state,
            *(6.0 * (kind == k) for k in (1, 2, 3)),
        ],
        axis=1,
    )
    return counts, batch, kind, place + 0.4 * rng.normal(size=place.shape)


def merged(place, batch, kind):
    """As a correction leaves it: of the other batch's first type, a third lies at the relative."""
    place = place.copy()
    place[np.flatnonzero((batch > 0) & (kind == 0))[::3], 0] += 2.0
    return place


def test_a_relative_that_one_batch_alone_has_is_found_by_its_genes():
    counts, batch, kind, place = cells()
    (found,) = private_populations_of(counts, batch, place, merged(place, batch, kind), seed=0)
    assert found.batch == 0 and np.isin(found.genes, MARKERS).all()
    assert (kind[found.cells] == RELATIVE).mean() > 0.9
    assert np.isin(np.flatnonzero(kind == RELATIVE), found.cells).mean() > 0.9
    assert found.shown < 0.4 and found.own_before > 0.4 and found.abroad > 0.35


@pytest.mark.parametrize("seed", [0, 1])
def test_what_others_have_too_and_what_lies_apart_raise_no_alarm(seed):
    counts, batch, _, place = cells(seed, both=True)
    assert private_populations_of(counts, batch, place, place, seed=seed) == []
    # A relative that nobody was laid onto: nothing is lost.
    counts, batch, _, place = cells(seed)
    assert private_populations_of(counts, batch, place, place, seed=seed) == []


def test_a_type_that_one_other_batch_has_among_many_is_shared():
    counts, batch, kind, place = cells(both=True, batches=4)
    kept = (kind != RELATIVE) | (batch < 2)  # two batches of four have the relative
    counts, batch, place = counts[kept], batch[kept], place[kept]
    assert private_populations_of(counts, batch, place, place, seed=0) == []


def test_what_is_looked_at_is_bounded(monkeypatch):
    counts, batch, kind, place = cells(n=160, batches=6)
    place = merged(place, batch, kind)
    asked = []
    real = private_populations._Place

    def counted(counts_CG, batch_C, latent_CD, embedding_CD, own, abroad, others, rng):
        asked.append((int(batch_C[own[0]]), len(own), len(others)))
        return real(counts_CG, batch_C, latent_CD, embedding_CD, own, abroad, others, rng)

    monkeypatch.setattr(private_populations, "_Place", counted)
    monkeypatch.setattr(private_populations, "MOST_BATCHES", 2)
    monkeypatch.setattr(private_populations, "MOST_CELLS", 100)
    monkeypatch.setattr(private_populations, "MOST_OTHERS", 500)
    private_populations_of(counts, batch, place, place, seed=0)
    assert asked == [(1, 100, 500), (2, 100, 500)]  # batch 0 is smaller


def own_share(place, kind):
    from genemodel.expression.neighbours import nearest_others

    near = nearest_others(np.asarray(place, np.float32), 15)[0]
    return (kind[near[kind == RELATIVE]] == RELATIVE).mean()


def test_the_correction_can_spare_it_and_is_the_plain_one_otherwise():
    counts, batch, kind, latent = cells()
    latent[batch == 1, 0] += 1.0  # half way towards the relative
    plain = SharedClusterCorrection(seed=0).fit_transform(latent, batch).astype(np.float32)
    everything = np.arange(len(batch))
    correction, spared, (one,) = corrected(latent, batch, everything, counts, spare=True)
    assert (kind[one.cells] == RELATIVE).mean() > 0.9
    assert (correction.evidence_C[one.cells] == 0).all()
    assert own_share(spared, kind) > own_share(plain, kind) + 0.1
    assert one.own_after > one.own_merged + 0.1
    # Of a batch of which some cells were looked at, the others are found by their place.
    some = np.sort(np.random.default_rng(0).permutation(len(batch))[: 3 * len(batch) // 4])
    _, kept_as_it_is, (half,) = corrected(latent, batch, some, counts[some])
    np.testing.assert_array_equal(kept_as_it_is, plain)
    assert np.isin(np.flatnonzero(kind == RELATIVE), half.cells).mean() > 0.9
    assert corrected(latent, batch, everything, counts, look=False)[2] == []
    counts, batch, _, latent = cells(both=True)
    plain = SharedClusterCorrection(seed=0).fit_transform(latent, batch).astype(np.float32)
    _, same, none = corrected(latent, batch, np.arange(len(batch)), counts, spare=True)
    assert none == []
    np.testing.assert_array_equal(same, plain)


def found_in(rows, batch=0):
    return PrivatePopulation(batch, rows, rows, (2, 0), 0.8, 0.5, 0.1, 9.0)


def test_what_is_told_names_batch_genes_and_what_became_of_it(caplog):
    spared = [Spared(found_in(np.arange(30)), np.arange(30), 0.33, 0.62)]
    with caplog.at_level(logging.WARNING):
        lines = told(spared, ["donor 7"], ["GZMK", "CD4", "CD8A"], correct=True, spare=False)
    assert lines == ["30 cells of donor 7 (CD8A, GZMK)"]
    for words in (
        "'donor 7'",
        "CD8A, GZMK",
        "80 %",
        "62%",
        "label_key",
        "fitted without them",
    ):
        assert words in caplog.text
    caplog.clear()
    told(spared, ["donor 7"], ["GZMK", "CD4", "CD8A"], correct=True, spare=True)
    assert "33%" in caplog.text and "fitted without them" not in caplog.text
    caplog.clear()
    told(spared, ["donor 7"], ["GZMK", "CD4", "CD8A"], correct=False, spare=False)
    assert "fitted without them" not in caplog.text
    assert rows_of(spared, 5 + np.arange(40)) == {"0": list(range(5, 35))}
    var = pd.DataFrame({"gene_symbol": ["CD8A", "CD4"]}, index=["ENSG1", "ENSG2"])
    assert names_for_readers(["ENSG2", "other"], None, var) == ["CD4", "other"]
    assert names_for_readers(["ENSG2"], None, None) == ["ENSG2"]
    vocabulary = gm.GeneVocabulary.builtin()
    token = vocabulary.token_names().index("CD8A")
    assert names_for_readers([str(token)], vocabulary, None) == ["CD8A"]


def test_integrate_says_it_where_vanished_populations_are_named(monkeypatch, tmp_path):
    import anndata as ad

    counts, batch, kind, _ = cells(n=60, relative=30)
    adata = ad.AnnData(
        counts,
        obs=pd.DataFrame({"batch": [f"b{b}" for b in batch], "type": [f"t{k}" for k in kind]},
                         index=[f"c{i}" for i in range(len(kind))]),
        var=pd.DataFrame({"gene_symbol": [f"GENE{g}" for g in range(N_GENES)]},
                         index=[f"g{g}" for g in range(N_GENES)]),
    )  # fmt: skip
    rows = np.flatnonzero(kind == RELATIVE)
    seen = []

    def planted(counts_SG, batch_S, latent_SD, embedding_SD, *, seed):
        seen.append(counts_SG.shape)
        looked_at = np.flatnonzero(batch_S == 0)
        return [PrivatePopulation(0, looked_at, rows, (100, 101), 0.9, 0.5, 0.1, 9.0)]

    monkeypatch.setattr(sparing, "private_populations_of", planted)
    settings = gm.IntegrationSettings(
        steps=8, passes=0, hidden=16, rank=8, latent=6, batch_cells=32, few_cells=0
    )
    model = gm.integrate(adata, batch_key="batch", settings=settings)
    told_of = adata.uns["X_integrated"]
    assert seen == [(len(kind), N_GENES)]
    assert "30 cells of b0 (GENE100, GENE101)" in told_of["vanished"]
    assert told_of["private_cells"] == {"0": rows.tolist()}
    assert "GENE100" in model.describe()
    model.save(tmp_path / "model")
    assert gm.load(tmp_path / "model").provenance["private_cells"] == {"0": rows.tolist()}
    adata.write_h5ad(tmp_path / "told.h5ad")
    # Where labels tell, nothing is sought.
    gm.integrate(adata, batch_key="batch", label_key="type", settings=settings)
    assert len(seen) == 1 and adata.uns["X_integrated"]["private_cells"] == {}
