import errno
import json
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.cells.kernels import fingerprints
from genemodel.cells.obs_columns import COLUMNS
from genemodel.cells.sources import SourceFile, open_source
from genemodel.corpus import assembly, building, manifest, reading, store
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def messy(make_cells, vocabulary):
    """Two species in one object, genes named twice, unknown genes, empty cells, extra zeros."""
    human = make_cells(50, species="human", seed=1)
    mouse = make_cells(30, species="mouse", seed=2)
    both = ad.concat([human, mouse], join="outer", index_unique="-", fill_value=0)
    # A gene by its id and by its symbol, and one that no vocabulary knows.
    row = vocabulary.genes.set_index("ensembl_id").loc[human.var_names[3]]
    extra = sp.csr_matrix(np.arange(80).reshape(-1, 1) % 3 * [[1.0, 5.0]])
    x = sp.hstack([both.X, extra], format="csr").astype(np.float32)
    x[10] = 0  # empty
    x[20] = 0
    x[20, x.shape[1] - 1] = 7  # the unknown gene only
    x.data[5:9] = 0  # stored zeros (x[10] and x[20] left some already)
    obs = both.obs.sample(frac=1, random_state=0)  # species take turns
    order = both.obs_names.get_indexer(obs.index)
    var = pd.DataFrame(index=[*both.var_names, row["symbol"], "NOGENE1"])
    adata = ad.AnnData(x[order], obs=obs, var=var)
    adata.obs_names = [f"c{i % 70}" for i in range(80)]
    adata.layers["lognorm"] = np.log1p(adata.X)
    return adata


def oracle(adata, vocabulary, layer=None):
    """Slow: every count of every cell, one by one, added to the token of its gene."""
    x = (adata.X if layer is None else adata.layers[layer]).toarray()
    genes = vocabulary.genes
    dense = np.zeros((len(x), len(vocabulary)), int)
    for c, species in enumerate(adata.obs["species"]):
        mine = genes[genes["species"] == species]
        names = dict(zip(mine["ensembl_id"], mine["token"], strict=True))
        names |= dict(zip(mine["symbol"].str.lower(), mine["token"], strict=True))
        for g, name in enumerate(adata.var_names):
            token = names.get(name, names.get(name.lower()))
            if token is not None:
                dense[c, token] += int(x[c, g])
    return dense


@pytest.fixture(scope="module")
def built(messy, vocabulary, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus") / "messy"
    return Corpus.build(
        {"messy": messy}, out, vocabulary=vocabulary, chunk_cells=13, keep=["extra"]
    )


def test_counts_equal_a_slow_sum_per_cell_and_gene(built, messy, vocabulary):
    dense = oracle(messy, vocabulary)
    kept = dense.sum(1) > 0
    assert kept.sum() == len(built) == 78
    found = built.read(0, len(built)).to_csr(len(vocabulary)).toarray()
    np.testing.assert_array_equal(found, dense[kept])
    np.testing.assert_array_equal(built.library_C, dense[kept].sum(1))
    np.testing.assert_array_equal(built.n_genes_C, (dense[kept] > 0).sum(1))


def test_what_was_dropped_is_counted_per_species(built):
    assert [s.species for s in built.sources] == ["human", "mouse"]
    human, mouse = built.sources
    assert human.n_read == 50 and mouse.n_read == 30
    dropped = {k: human.dropped.get(k, 0) + mouse.dropped.get(k, 0) for k in
               (building.EMPTY, building.NO_GENE)}  # fmt: skip
    assert dropped == {building.EMPTY: 1, building.NO_GENE: 1}
    assert human.n_cells + mouse.n_cells == len(built)
    assert human.n_summed == 1 and mouse.unmatched
    assert human.explicit_zeros > 0 and human.repeated_names == 10


def test_statistics_equal_those_of_the_stored_counts(built, vocabulary):
    dense = built.read(0, len(built)).to_csr(len(vocabulary)).toarray()
    species_C, names = built.codes("species")
    for s, name in enumerate(names):
        part = dense[species_C == s]
        found = built.statistics[name]
        assert found.n_cells == len(part)
        np.testing.assert_array_equal(found.sum_V, part.sum(0))
        np.testing.assert_array_equal(found.nonzero_V, (part > 0).sum(0))
    per_10k = dense / dense.sum(1, keepdims=True) * 1e4
    expected = [np.median(v[v > 0]) if (v > 0).any() else np.nan for v in per_10k.T]
    np.testing.assert_allclose(built.medians_V, expected, rtol=0.01)
    mito = built.vocabulary.genes.query("symbol.str.lower().str.startswith('mt-')")["token"]
    np.testing.assert_array_equal(built.mito_C, dense[:, np.unique(mito)].sum(1))
    assert built.mito_C.sum() > 0


def test_fingerprints_equal_those_of_the_stored_counts(make_cells, vocabulary, tmp_path):
    """Also of a corpus that an earlier version built without them."""
    sources = {"a": make_cells(50, seed=1), "b": make_cells(30, species="mouse", seed=2)}
    built = Corpus.build(sources, tmp_path / "c", vocabulary=vocabulary, group_cells=40)
    counts_CV = built.read(0, len(built)).to_csr(len(vocabulary))
    stored_CP = built.prints_CP()
    expected_CP = fingerprints(counts_CV.indptr, counts_CV.indices, counts_CV.data, len(vocabulary))
    np.testing.assert_array_equal(stored_CP, expected_CP)
    assert (stored_CP > 0).any(1).all() and np.unique(stored_CP).size > 2 * len(built)
    index = sorted((built.path / "index").iterdir())
    assert len(index) > 2
    with np.load(index[1]) as stored:
        np.savez(index[1], **{key: stored[key] for key in stored.files if key != "prints"})
    np.testing.assert_array_equal(built.prints_CP(), stored_CP)


def slow_fingerprints(cell, level):
    """By the definition: of each of the first parts the hash of its counts, 0 of a poor one."""
    word = 2**64 - 1

    def mixed(value):
        value = (value + 0x9E3779B97F4A7C15) & word
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & word
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & word
        return value ^ (value >> 31)

    found = []
    for part in range(3):
        own = {t: n for t, n in cell.items() if mixed(~t & word) >> (64 - level) == part}
        total = sum(mixed((t << 32) ^ n) for t, n in own.items()) & word
        found.append(mixed(total ^ level) if len(own) >= 6 else 0)
    return found


@pytest.mark.parametrize(("n_genes", "level"), [(5, 0), (23, 0), (24, 1), (47, 1), (200, 4)])
def test_fingerprints_equal_the_slow_oracle(n_genes, level):
    rng = np.random.default_rng(n_genes)
    token = rng.choice(np.arange(3, 5000), n_genes, replace=False)
    count = rng.geometric(0.2, n_genes)
    cell = dict(zip(token.tolist(), count.tolist(), strict=True))
    indptr = np.array([0, 0, n_genes])
    for finer in (-1, 0, 1):
        empty, found = fingerprints(indptr, token, count, 5000, finer).tolist()
        assert empty == [0, 0, 0]
        at = level + finer
        assert found == (slow_fingerprints(cell, at) if at >= 0 else [0, 0, 0])
    # Tokens beyond the vocabulary of then are passed over, wherever they stand.
    further = np.insert(token, n_genes // 2, 5001), np.insert(count, n_genes // 2, 7)
    again = fingerprints(indptr + [0, 0, 1], *further, 5000)
    np.testing.assert_array_equal(again, fingerprints(indptr, token, count, 5000))


def test_licence_and_citation_are_those_of_the_file_or_of_who_asks(
    make_cells, vocabulary, tmp_path
):
    said = make_cells(40, seed=1)
    said.uns |= {"license": "CC-BY 4.0", "citation": "Doe et al. 2024"}
    said.write_h5ad(tmp_path / "said.h5ad")
    silent = make_cells(40, seed=2)
    silent.uns["citation"] = np.arange(3)  # not a text: not one
    silent.write_h5ad(tmp_path / "silent.h5ad")
    said.write_h5ad(tmp_path / "copy.h5ad")
    sources = [
        tmp_path / "said.h5ad",
        tmp_path / "silent.h5ad",
        open_source(said, name="memory"),
        SourceFile(str(tmp_path / "copy.h5ad"), name="again", licence="CC0"),
    ]
    corpus = Corpus.build(sources, tmp_path / "c", vocabulary=vocabulary)
    found = {source.name: (source.licence, source.citation) for source in corpus.sources}
    assert found == {
        "said": ("CC-BY 4.0", "Doe et al. 2024"), "silent": ("", ""),
        "memory": ("CC-BY 4.0", "Doe et al. 2024"), "again": ("CC0", "Doe et al. 2024"),
    }  # fmt: skip
    assert "CC-BY 4.0" in corpus.describe().to_text()


def test_panels_say_what_each_source_measures(built, messy):
    for number, source in enumerate(built.sources):
        match = built.vocabulary.match(messy.var, species=source.species)
        np.testing.assert_array_equal(built.measured_SV[number], match.measured_V)


def test_codes_follow_the_obs_table(built, messy, vocabulary):
    kept = messy.obs[oracle(messy, vocabulary).sum(1) > 0]
    for column in ("species", "batch", "donor", "cell_type"):
        codes, names = built.codes(column)
        assert [names[i] for i in codes] == list(kept[column])
    assert set(built.codes("assay")[0]) == {-1}
    assert built.codes("extra")[1] == [] and set(built.codes("dataset")[1]) == {"messy"}
    joint, names = built.codes("dataset", "donor")
    assert [names[i] for i in joint] == [f"messy / {d}" for d in kept["donor"]]
    assert list(built.obs(["donor"])["donor"]) == list(kept["donor"])
    species = [built.sources[s].species for s in built.source_C]
    assert species == list(kept["species"])


def test_a_joint_category_is_missing_where_a_part_is(make_cells, vocabulary, tmp_path):
    adata = make_cells(10)
    adata.obs["donor"] = ["a", None] * 5
    corpus = Corpus.build({"x": adata}, tmp_path / "c", vocabulary=vocabulary)
    assert list(corpus.codes("dataset", "donor")[0]) == [0, -1] * 5


@pytest.mark.parametrize("threads", [1, 3])
def test_any_ranges_in_any_order_give_the_same_cells(built, vocabulary, threads, monkeypatch):
    dense = built.read(0, len(built)).to_csr(len(vocabulary)).toarray()
    corpus = Corpus.open(built.path, threads=threads)
    monkeypatch.setattr(reading, "_WORTH_A_THREAD", 1)
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts = rng.integers(0, len(built), 6)
        ranges = [(int(a), int(min(len(built), a + rng.integers(0, 20)))) for a in starts]
        block = corpus.read_blocks(ranges)
        expected = np.concatenate([dense[a:b] for a, b in ranges])
        np.testing.assert_array_equal(block.to_csr(len(vocabulary)).toarray(), expected)
        assert block.gene_N.dtype == block.count_N.dtype == np.int32
    assert len(corpus.read_blocks([])) == 0
    for wrong in [(-1, 2), (5, 4), (0, 79)]:
        with pytest.raises(ConfigError, match="has cells 0 to 78"):
            corpus.read_blocks([wrong])


def test_reading_from_many_threads_at_once(built):
    whole = built.read(0, len(built))
    with ThreadPoolExecutor(6) as pool:
        blocks = list(pool.map(lambda c: built.read(c, c + 1), range(len(built))))
    np.testing.assert_array_equal(np.concatenate([b.gene_N for b in blocks]), whole.gene_N)
    np.testing.assert_array_equal(np.concatenate([b.count_N for b in blocks]), whole.count_N)


def test_small_chunks_and_shards_read_the_same(make_cells, vocabulary, tmp_path, monkeypatch):
    adata = make_cells(90, seed=5, depth=0.15)
    adata.X[3, 4] = 70_000  # needs more than 16 bits
    large = Corpus.build({"x": adata}, tmp_path / "large", vocabulary=vocabulary)
    monkeypatch.setattr(store, "CHUNK_VALUES", 64)
    monkeypatch.setattr(store, "SHARD_VALUES", 256)
    monkeypatch.setattr(building, "GROUP_VALUES", 1_000)
    small = Corpus.build({"x": adata}, tmp_path / "small", vocabulary=vocabulary, chunk_cells=7)
    assert len(small.manifest.groups) > 2
    shards = list((small.path / "cells.zarr/dataset_0/X/data/c").iterdir())
    assert len(shards) > 2
    ranges = [(80, 90), (0, 33), (33, 34), (5, 70)]
    one, other = large.read_blocks(ranges), small.read_blocks(ranges)
    for key in ("starts_C1", "gene_N", "count_N"):
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
    assert small.verify() == []


def test_anndata_and_annbatch_open_the_same_counts(built, vocabulary):
    annbatch = pytest.importorskip("annbatch")
    expected = built.read(0, len(built)).to_csr(len(vocabulary)).toarray()
    root = built.path / "cells.zarr"
    adata = ad.read_zarr(root / "dataset_0")
    np.testing.assert_array_equal(adata.X.toarray(), expected)
    assert adata.var_names[3] == vocabulary.token_ids()[3]
    assert list(adata.obs["species"].astype(str)) == list(built.obs()["species"])
    assert adata.obs["assay"].isna().all()

    collection = annbatch.DatasetCollection(root, mode="r")
    assert not collection.is_empty
    assert list(collection.obs(["donor"])["donor"]) == list(built.obs()["donor"])
    loader = annbatch.Loader(
        chunk_size=8, preload_nchunks=2, batch_size=16, shuffle=False, preload_to_gpu=False
    ).use_collection(collection)
    batches = [batch["X"] for batch in loader]
    found = np.concatenate([b.toarray() for b in batches])
    np.testing.assert_array_equal(found, expected)


def test_append_equals_building_from_both(make_cells, vocabulary, tmp_path):
    first, second = make_cells(40, seed=1), make_cells(30, species="mouse", seed=2)
    second.obs["age"] = "8 weeks"
    both = Corpus.build(
        {"a": first, "b": second}, tmp_path / "both", vocabulary=vocabulary, keep=["age"]
    )
    grown = Corpus.build({"a": first}, tmp_path / "grown", vocabulary=vocabulary)
    grown = grown.append({"b": second}, keep=["age"])
    one, other = both.read(0, 70), grown.read(0, 70)
    for key in ("starts_C1", "gene_N", "count_N"):
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key))
    pd.testing.assert_frame_equal(both.obs(), grown.obs())
    assert both.sources == grown.sources
    np.testing.assert_array_equal(both.medians_V, grown.medians_V)
    np.testing.assert_array_equal(both.measured_SV, grown.measured_SV)
    for name in ("human", "mouse"):
        for key in ("sum_V", "nonzero_V", "medians_V"):
            np.testing.assert_array_equal(
                getattr(both.statistics[name], key), getattr(grown.statistics[name], key)
            )
    assert grown.codes("age")[1] == ["8 weeks"] and grown.verify() == []


def test_the_same_sources_give_the_same_corpus(make_cells, vocabulary, tmp_path):
    one, other = (
        Corpus.build({"a": make_cells(20)}, tmp_path / name, vocabulary=vocabulary)
        for name in ("one", "other")
    )
    assert one.fingerprint == other.fingerprint
    third = Corpus.build({"a": make_cells(20, seed=9)}, tmp_path / "3", vocabulary=vocabulary)
    assert third.fingerprint != one.fingerprint


def test_no_path_of_the_user_is_in_the_manifest(make_cells, vocabulary, tmp_path):
    make_cells(20).write_h5ad(tmp_path / "secret_name.h5ad")
    corpus = Corpus.build([tmp_path / "secret_name.h5ad"], tmp_path / "c", vocabulary=vocabulary)
    text = (corpus.path / "manifest.json").read_text()
    assert "secret_name.h5ad" in text and str(tmp_path) not in text


def test_a_corpus_travels_to_another_process(built):
    again = pickle.loads(pickle.dumps(built))
    assert again.fingerprint == built.fingerprint
    np.testing.assert_array_equal(again.read(3, 9).gene_N, built.read(3, 9).gene_N)


def test_filters_are_off_by_default_and_counted_when_on(make_cells, vocabulary, tmp_path):
    adata = make_cells(60, seed=3)
    plain = Corpus.build({"x": adata}, tmp_path / "plain", vocabulary=vocabulary)
    limit = int(np.median(plain.n_genes_C))
    share = plain.mito_C / plain.library_C
    strict = Corpus.build(
        {"x": adata}, tmp_path / "strict", vocabulary=vocabulary, min_genes=limit,
        max_mito=float(np.median(share)),
    )  # fmt: skip
    few = plain.n_genes_C < limit
    high = (share > np.median(share)) & ~few
    assert strict.sources[0].dropped == {
        building.FEW_GENES: few.sum(), building.MUCH_MITO: high.sum(),
    }  # fmt: skip
    assert len(strict) == 60 - few.sum() - high.sum()
    with pytest.raises(DataError, match=r"no cell of the sources is left: 60 × fewer genes"):
        Corpus.build({"x": adata}, tmp_path / "0", vocabulary=vocabulary, min_genes=10_000)
    assert not (tmp_path / "0").exists()


def test_keys_name_obs_columns(make_cells, vocabulary, tmp_path):
    adata = make_cells(20)
    adata.obs = adata.obs.rename(columns={"batch": "lane", "donor": "pid", "cell_type": "ct"})
    corpus = Corpus.build(
        {"x": adata}, tmp_path / "c", vocabulary=vocabulary, batch_key="lane", donor_key="pid",
        label_key="ct",
    )  # fmt: skip
    assert corpus.codes("donor")[1] == ["donor0", "donor1", "donor2"]
    assert corpus.columns == list(COLUMNS)
    with pytest.raises(ConfigError, match="donor is mapped to 'pid' by columns= and to 'lane'"):
        Corpus.build({"x": adata}, tmp_path / "d", columns={"donor": "pid"}, donor_key="lane")


# -- refusals --------------------------------------------------------------------------------------


def log_normalised(adata):
    adata.layers["counts"] = adata.X.copy()
    adata.X = sp.csr_matrix(np.log1p(adata.X.toarray() / adata.X.sum(1) * 1e4))


def renamed(adata):
    adata.var_names = [f"gene{i}" for i in range(adata.n_vars)]


def wrong_species(adata):
    adata.obs["species"] = "zebrafish"


def half_species(adata):
    adata.obs["species"] = ["human", None] * (adata.n_obs // 2)


BAD = {
    "logarithms": (log_normalised, {}, DataError, r"bad, X: .*log1p.*set layer=counts"),
    "unknown genes": (renamed, {}, DataError, "bad: only 0 of 200 gene names"),
    "unknown species": (wrong_species, {}, DataError, r"bad: .*zebrafish \(20 cells\).*=drop"),
    "missing species": (half_species, {}, DataError, "bad: 10 of 20 cells have no species"),
    "wrong layer": (None, {"layer": "raw"}, DataError, "good: has no layer 'raw'; it has X"),
    "wrong column": (None, {"donor_key": "pid"}, DataError, "no obs column 'pid'"),
    "impossible share": (None, {"min_fraction": 2}, ConfigError, "min_fraction is 2: .*0 and 1"),
    "impossible number": (None, {"chunk_cells": 0}, ConfigError, "chunk_cells is 0"),
    "impossible choice": (None, {"unknown_species": "x"}, ConfigError, "'refuse' or 'drop'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_before_anything_is_written(name, make_cells, vocabulary, tmp_path):
    spoil, options, kind, what = BAD[name]
    adata = make_cells(20)
    if spoil:
        spoil(adata)
    with pytest.raises(kind, match=what):
        Corpus.build(
            {"good": make_cells(20), "bad": adata}, tmp_path / "c", vocabulary=vocabulary,
            **options,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_unknown_species_are_dropped_on_request(make_cells, vocabulary, tmp_path):
    adata = make_cells(20)
    adata.obs["species"] = ["human", "gorilla", "human", None] * 5
    corpus = Corpus.build(
        {"x": adata}, tmp_path / "c", vocabulary=vocabulary, unknown_species="drop"
    )
    assert len(corpus) == 10
    assert corpus.sources[0].dropped == {building.NO_SPECIES: 10}
    assert corpus.sources[0].n_read == 20


@pytest.mark.parametrize("sources", [[], {}, "cells.h5ad", None, 3])
def test_sources_must_be_a_list(sources, tmp_path):
    with pytest.raises(ConfigError, match="sources"):
        Corpus.build(sources, tmp_path / "c")


def test_a_file_is_not_taken_twice(make_cells, vocabulary, tmp_path):
    make_cells(20).write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(ConfigError, match=r"x.h5ad is listed twice"):
        Corpus.build([tmp_path / "x.h5ad"] * 2, tmp_path / "c", vocabulary=vocabulary)


def test_a_table_with_genes_as_rows_is_recognised(make_cells, vocabulary, tmp_path):
    adata = make_cells(20)
    frame = pd.DataFrame(adata.X.toarray().T.astype(int), adata.var_names, adata.obs_names)
    frame.to_csv(tmp_path / "t.csv")
    corpora = []
    for transpose in (False, True):
        source = open_source(tmp_path / "t.csv", species="human", transpose=transpose)
        corpora.append(Corpus.build([source], tmp_path / f"{transpose}", vocabulary=vocabulary))
    seen, said = corpora
    assert len(seen) == 20 and (seen.checksum_C == said.checksum_C).all()
    assert seen.sources[0].n_matched == adata.n_vars


def test_nothing_is_overwritten_unasked(make_cells, vocabulary, tmp_path):
    out = tmp_path / "c"
    first = Corpus.build({"a": make_cells(20)}, out, vocabulary=vocabulary)
    with pytest.raises(ConfigError, match="exists already.*overwrite=True"):
        Corpus.build({"a": make_cells(10)}, out, vocabulary=vocabulary)
    second = Corpus.build({"a": make_cells(10)}, out, vocabulary=vocabulary, overwrite=True)
    assert len(first) == 20 and len(second) == 10 == len(Corpus.open(out))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="is not a corpus: overwrite=True replaces corpora only"):
        Corpus.build({"a": make_cells(10)}, tmp_path / "mine", overwrite=True)


class Interrupted(BaseException):
    """Stands for a killed process."""


def spoilt_late(make_cells):
    """Raw counts at first sight, with one NaN further on."""
    adata = make_cells(600, seed=4)
    adata.X.data[adata.X.indptr[250]] = np.nan
    return adata


def test_a_failure_while_building_leaves_nothing(make_cells, vocabulary, tmp_path):
    with pytest.raises(DataError, match="late, X: holds NaN.*cell number 250"):
        Corpus.build({"late": spoilt_late(make_cells)}, tmp_path / "c", vocabulary=vocabulary)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["streaming", "moving", "manifest"])
def test_an_interrupted_append_leaves_the_corpus_as_it_was(
    moment, make_cells, vocabulary, tmp_path, monkeypatch
):
    corpus = Corpus.build({"a": make_cells(30)}, tmp_path / "c", vocabulary=vocabulary)
    before = corpus.fingerprint, corpus.read(0, 30)

    def stop(*_, **__):
        raise Interrupted

    with monkeypatch.context() as patch:
        if moment == "streaming":
            with pytest.raises(DataError, match="NaN"):
                corpus.append({"late": spoilt_late(make_cells)})
        else:
            target = assembly if moment == "moving" else manifest
            patch.setattr(target, "_move_in" if moment == "moving" else "write_manifest", stop)
            with pytest.raises(Interrupted):
                corpus.append({"b": make_cells(20, seed=7)})
    again = Corpus.open(corpus.path)
    assert again.fingerprint == before[0]
    np.testing.assert_array_equal(again.read(0, 30).count_N, before[1].count_N)
    grown = again.append({"b": make_cells(20, seed=7)})
    assert len(grown) == 50 and grown.verify() == []


def test_two_processes_do_not_write_at_once(make_cells, vocabulary, tmp_path):
    corpus = Corpus.build({"a": make_cells(20)}, tmp_path / "c", vocabulary=vocabulary)
    with assembly.working_folder(corpus.path / "append.partial"):
        with pytest.raises(ConfigError, match="another process is writing"):
            corpus.append({"b": make_cells(20, seed=7)})
    assert len(corpus.append({"b": make_cells(20, seed=7)})) == 40
    with pytest.raises(ConfigError, match="was changed by another process: open it again"):
        corpus.append({"c": make_cells(20, seed=8)})


def test_a_replacement_that_was_stopped_between_its_moves_is_found_again(
    make_cells, vocabulary, tmp_path
):
    corpus = Corpus.build({"a": make_cells(20)}, tmp_path / "c", vocabulary=vocabulary)
    aside = tmp_path / ".c.old"
    corpus.path.rename(aside)
    assert Corpus.open(corpus.path).fingerprint == corpus.fingerprint
    corpus.path.rename(aside)
    with pytest.raises(ConfigError, match="exists already"):
        Corpus.build({"a": make_cells(20)}, corpus.path, vocabulary=vocabulary)
    Corpus.build({"b": make_cells(30)}, corpus.path, vocabulary=vocabulary, overwrite=True)
    assert len(Corpus.open(corpus.path)) == 30 and os.listdir(tmp_path) == ["c"]


def test_a_disk_that_fills_is_named_and_leaves_what_was_there(
    make_cells, vocabulary, tmp_path, monkeypatch
):
    corpus = Corpus.build({"a": make_cells(20)}, tmp_path / "c", vocabulary=vocabulary)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        for write in (
            lambda: corpus.append({"b": make_cells(20, seed=7)}),
            lambda: Corpus.build(
                {"b": make_cells(20)}, corpus.path, vocabulary=vocabulary, overwrite=True
            ),
        ):
            with pytest.raises(DataError, match=r"disk is full.*more than .* bytes.*are free in"):
                write()
            assert Corpus.open(corpus.path).verify() == [] and os.listdir(tmp_path) == ["c"]
    assert len(corpus.append({"b": make_cells(20, seed=7)})) == 40


def test_opening_refuses_what_is_no_corpus(built, tmp_path, other_vocabulary):
    with pytest.raises(DataError, match="nowhere: does not exist.*corpus build"):
        Corpus.open(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no manifest.json: it is not a corpus"):
        Corpus.open(tmp_path)
    with pytest.raises(DataError, match="built with vocabulary.*asked for is"):
        Corpus.open(built.path, vocabulary=other_vocabulary)


def test_a_newer_format_is_refused(make_cells, vocabulary, tmp_path):
    corpus = Corpus.build({"a": make_cells(20)}, tmp_path / "c", vocabulary=vocabulary)
    file = corpus.path / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99, this genemodel reads up to 1"):
        Corpus.open(corpus.path)


def test_a_column_that_is_not_there(built):
    with pytest.raises(ConfigError, match="no column 'doner'.*Did you mean 'donor'"):
        built.codes("doner")
    with pytest.raises(ConfigError, match="codes needs a column; the corpus has species, dataset"):
        built.codes()


def test_real_files(shared_data, tmp_path):
    names = ("human_pbmc_kang_ifnb", "mouse_gi_mca_219")
    files = [shared_data / f"{name}.h5ad" for name in names]
    corpus = Corpus.build(files, tmp_path / "real")
    assert len(corpus) == 2_219 and [s.n_cells for s in corpus.sources] == [2_000, 219]
    adata = ad.read_h5ad(files[1])
    match = corpus.vocabulary.match(adata.var, species="mouse")
    expected = match.project(sp.csr_matrix(adata.X, dtype=np.int32))
    found = corpus.read(2_000, 2_219).to_csr(len(corpus.vocabulary))
    assert (found != expected).nnz == 0
    assert corpus.verify() == []
