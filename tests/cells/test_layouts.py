"""Folders and tables as programs and repositories really write them, against the same matrix."""

import gzip
import logging

import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

from genemodel.cells.sources import open_source
from genemodel.cells.whole_file import read_anndata
from genemodel.corpus.corpus import Corpus
from genemodel.errors import DataError
from genemodel.genes.vocabulary import GeneVocabulary

N, G = 30, 45


@pytest.fixture(scope="module")
def genes():
    table = GeneVocabulary.builtin().genes
    table = table[(table["species"] == "human") & (table["symbol"] != "")].iloc[:G]
    return table.reset_index(drop=True)


@pytest.fixture(scope="module")
def counts():
    return np.random.default_rng(0).poisson(1.0, (N, G)) + np.eye(N, G, dtype=int)


BARCODES = [f"ACGTACGTACGTAC{'ACGT'[i % 4]}-{i}" for i in range(N)]


def check(source, counts, names, cells=BARCODES):
    with source:
        found = sp.vstack([c.counts_CG for c in source.chunks(7)]).toarray()
        assert list(source.genes.index) == list(names)
        assert list(source.obs.index) == list(cells)
        np.testing.assert_array_equal(found, counts)
        return source


def market(path, counts):
    scipy.io.mmwrite(path, sp.coo_matrix(counts), field="integer")


def zipped(path):
    path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()


# -- folders ---------------------------------------------------------------------------------------


def triplet(folder, start, counts, genes, *, features="features.tsv", third="Gene Expression"):
    market(folder / f"{start}matrix.mtx", counts.T)
    (folder / f"{start}barcodes.tsv").write_text("\n".join(BARCODES))
    lines = zip(genes["ensembl_id"], genes["symbol"], strict=True)
    (folder / f"{start}{features}").write_text(
        "".join(f"{i}\t{s}\t{third}\n" if third else f"{i}\t{s}\n" for i, s in lines)
    )


def test_triplets_of_geo(genes, counts, tmp_path):
    for n, start in enumerate(("GSM1_lung_", "GSM2_liver.")):
        triplet(tmp_path, start, counts + n, genes, features="genes.tsv", third="")
    for path in list(tmp_path.iterdir()):
        zipped(path)
    for n, name in enumerate(("GSM1_lung_matrix.mtx.gz", "GSM2_liver.matrix.mtx.gz")):
        source = open_source(tmp_path / name, species="human")
        assert source.name == name.partition("matrix")[0].rstrip("_.")
        check(source, counts + n, genes["ensembl_id"])
    with pytest.raises(DataError, match="holds 2 matrices.*GSM2_liver.*Give the path of each"):
        open_source(tmp_path, species="human")


def test_one_triplet_alone_in_its_folder(genes, counts, tmp_path):
    triplet(tmp_path, "GSM1_", counts, genes)
    check(open_source(tmp_path, species="human"), counts, genes["ensembl_id"])


@pytest.mark.parametrize("third", ["gene", "protein_coding", "chr1", "Gene Expression", ""])
def test_a_third_column_that_is_no_feature_type(third, genes, counts, tmp_path, caplog):
    triplet(tmp_path, "", counts, genes, third=third)
    with caplog.at_level(logging.INFO):
        check(open_source(tmp_path, species="human"), counts, genes["ensembl_id"])
    assert ("are no feature types" in caplog.text) == (third in ("protein_coding", "chr1"))


def test_parse(genes, counts, tmp_path):
    market(tmp_path / "count_matrix.mtx", counts)
    pd.DataFrame(
        {"gene_id": genes["ensembl_id"], "gene_name": genes["symbol"], "genome": "hg38"}
    ).to_csv(tmp_path / "all_genes.csv", index=False)
    pd.DataFrame({"bc_wells": BARCODES, "sample": "s1", "species": "hg38", "gene_count": 3}).to_csv(
        tmp_path / "cell_metadata.csv", index=False
    )
    source = check(open_source(tmp_path, columns={"batch": "sample"}), counts, genes["ensembl_id"])
    assert set(source.obs["species"]) == {"human"} and set(source.obs["batch"]) == {"s1"}


def test_kallisto_and_alevin(genes, counts, tmp_path):
    for names, (matrix, cells, features) in {
        "kallisto": ("cells_x_genes.mtx", "cells_x_genes.barcodes.txt", "cells_x_genes.genes.txt"),
        "alevin": ("quants_mat.mtx", "quants_mat_rows.txt", "quants_mat_cols.txt"),
    }.items():
        folder = tmp_path / names
        folder.mkdir()
        market(folder / matrix, counts)
        (folder / cells).write_text("\n".join(BARCODES) + "\n")
        (folder / features).write_text("\n".join(genes["ensembl_id"]) + "\n")
        check(open_source(folder, species="human"), counts, genes["ensembl_id"])


def test_starsolo_and_outs_name_the_folder_inside(genes, counts, tmp_path):
    for which in ("raw", "filtered"):
        inner = tmp_path / "Solo.out/Gene" / which
        inner.mkdir(parents=True)
        triplet(inner, "", counts, genes)
    check(open_source(inner, species="human"), counts, genes["ensembl_id"])
    for folder in ("Solo.out", "Solo.out/Gene"):
        with pytest.raises(DataError, match=r"Give \S*Solo.out/Gene/filtered or \S*raw instead"):
            open_source(tmp_path / folder, species="human")


def test_matrices_that_share_the_names_of_cells_and_genes(genes, counts, tmp_path):
    triplet(tmp_path, "", counts, genes)
    (tmp_path / "matrix.mtx").rename(tmp_path / "spliced.mtx")
    market(tmp_path / "unspliced.mtx", counts.T + 1)
    for n, name in enumerate(("spliced.mtx", "unspliced.mtx")):
        check(open_source(tmp_path / name, species="human"), counts + n, genes["ensembl_id"])


def test_swapped_names_are_refused(genes, counts, tmp_path):
    triplet(tmp_path, "", counts, genes)
    (tmp_path / "barcodes.tsv").rename(tmp_path / "x")
    (tmp_path / "features.tsv").rename(tmp_path / "barcodes.tsv")
    (tmp_path / "x").rename(tmp_path / "features.tsv")
    with pytest.raises(DataError, match="obs_names hold gene names"):
        open_source(tmp_path, species="human")


# -- tables ----------------------------------------------------------------------------------------


def frame(genes, counts):
    return pd.DataFrame(counts, BARCODES, genes["symbol"])


def test_genes_as_rows_are_seen(genes, counts, tmp_path, caplog):
    path = tmp_path / "GSE1_counts.txt.gz"
    frame(genes, counts).T.to_csv(path, sep="\t", index_label="GENE")
    with caplog.at_level(logging.INFO):
        check(open_source(path, species="human"), counts, genes["symbol"])
    assert "the table is turned" in caplog.text
    axolotl = frame(genes, counts).set_axis([f"AMEX{i}" for i in range(G)], axis=1)
    axolotl.T.to_csv(path, sep="\t", index_label="x")
    check(open_source(path, species="human"), counts, axolotl.columns)


def test_comments_and_columns_beside(genes, counts, tmp_path):
    plain = frame(genes, counts)
    bd = tmp_path / "bd.csv"
    bd.write_text("####\n## Pipeline 1.9\n\n####\n" + plain.to_csv(index_label="Cell_Index"))
    check(open_source(bd, species="human"), counts, genes["symbol"])
    wide = plain.T
    for at, (name, value) in enumerate(
        {"Chr": "1;1", "Start": 5, "End": 9, "Strand": "+", "Length": 44}.items()
    ):
        wide.insert(at, name, value)
    text = "# Program:featureCounts v2; Command: x\n" + wide.to_csv(sep="\t", index_label="Geneid")
    (tmp_path / "fc.txt").write_text(text)
    check(open_source(tmp_path / "fc.txt", species="human"), counts, genes["symbol"])


def test_ids_with_a_column_of_symbols(genes, counts, tmp_path):
    wide = pd.DataFrame(counts.T, genes["ensembl_id"], BARCODES)
    wide.insert(0, "gene_name", genes["symbol"].to_numpy())
    wide.to_csv(tmp_path / "x.csv")
    source = check(open_source(tmp_path / "x.csv", species="human"), counts, genes["ensembl_id"])
    assert list(source.genes["gene_name"]) == list(genes["symbol"])


def test_columns_of_labels_become_obs(genes, counts, tmp_path):
    table = frame(genes, counts)
    table.insert(0, "cell_type", ["T", "B"] * (N // 2))
    table.to_csv(tmp_path / "x.tsv", sep="\t")
    source = check(open_source(tmp_path / "x.tsv", species="human"), counts, genes["symbol"])
    assert source.obs["cell_type"].tolist() == ["T", "B"] * (N // 2)


@pytest.mark.parametrize("turned", [False, True])
def test_long_format(turned, genes, counts, tmp_path):
    long = frame(genes, counts).T.stack()
    long = long[long > 0].rename_axis(["gene", "cell"]).rename("count").reset_index()
    long = long[["cell", "gene", "count"]] if turned else long
    long.to_csv(tmp_path / "x.tsv.gz", sep="\t", index=False)
    with open_source(tmp_path / "x.tsv.gz", species="human") as source:
        (chunk,) = source.chunks()
        found = pd.DataFrame(chunk.counts_CG.toarray(), source.obs.index, source.genes.index)
    expected = frame(genes, counts).loc[found.index, found.columns]
    np.testing.assert_array_equal(found, expected)
    assert found.to_numpy().sum() == counts.sum()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("a.csv", gzip.compress),
        ("a.csv.gz", lambda data: data),
        ("a.counts", lambda data: data),
        ("a.txt", lambda data: data.replace(b",", b"\t")),
        ("a.txt", lambda data: data.replace(b",", b";")),
        ("a.csv", lambda data: data.replace(b"\n", b"\r\n")),
        ("a.csv", lambda data: b"\xef\xbb\xbf" + data),
        ("a.csv", lambda data: b'"' + data.replace(b",", b'","').replace(b"\n", b'"\n"')[:-1]),
    ],
)
def test_the_content_decides_not_the_name(name, change, genes, counts, tmp_path):
    path = tmp_path / name
    path.write_bytes(change(frame(genes, counts).to_csv(index_label="cell").encode()))
    check(open_source(path, species="human"), counts, genes["symbol"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"PK\x03\x04....", "archive: unpack"), (b"PAR1....", "parquet"), (b"BZh9....", "bunzip2"),
        (b"RDX3\nX....", "R workspace"), (b"\x80\x04\x95...", "pickle"),
        (gzip.compress(b"\x89HDF\r\n\x1a\n.", mtime=0), "with gzip: unpack it with gunzip"),
    ],
)  # fmt: skip
def test_foreign_content_is_named(content, message, tmp_path):
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError, match=f"x.csv: is .*{message}"):
        open_source(tmp_path / "x.csv", species="human")


def test_no_advice_about_other_matrices_where_there_are_none(genes, counts, tmp_path):
    table = frame(genes, counts).astype(object)
    table.iloc[3, 2] = "many"
    table.to_csv(tmp_path / "x.csv")
    with pytest.raises(DataError, match="holds text .'many' in line of") as caught:
        open_source(tmp_path / "x.csv", species="human")
    assert "other matrix" not in str(caught.value) and "None of the others" not in str(caught.value)


# -- HDF5 ------------------------------------------------------------------------------------------


def test_loom_names_genes_by_content_and_cellbender_of_before(genes, counts, tmp_path):
    with h5py.File(tmp_path / "a.loom", "w") as file:
        file["matrix"] = counts.T
        file["row_attrs/Chromosome"] = np.array(["1"] * G, "S")
        file["row_attrs/TargetId"] = np.array(genes["ensembl_id"], "S")
        file["col_attrs/CellID"] = np.array(BARCODES, "S")
    check(open_source(tmp_path / "a.loom", species="human"), counts, genes["ensembl_id"])
    x = sp.csr_matrix(counts.astype(np.int32))
    for n, named in enumerate(({"genes", "gene_names"}, {"gene_names"}, {"genes"})):
        with h5py.File(tmp_path / f"{n}.h5", "w") as file:
            group = file.create_group("matrix")
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(x, key)
            group["barcodes"] = np.array(BARCODES, "S")
            group["latent_cell_probability"] = np.ones(N)
            for key, column in (("genes", "ensembl_id"), ("gene_names", "symbol")):
                if key in named:
                    group[key] = np.array(genes[column], "S")
        names = genes["ensembl_id" if "genes" in named else "symbol"]
        check(open_source(tmp_path / f"{n}.h5", species="human"), counts, names)


def test_muon(genes, counts, make_cells, tmp_path):
    cells = make_cells(12)
    cells.write_h5ad(tmp_path / "a.h5ad")
    for name, parts in {"one": ["x"], "two": ["rna", "prot"], "odd": ["a", "b"]}.items():
        with h5py.File(tmp_path / f"{name}.h5mu", "w") as file, h5py.File(tmp_path / "a.h5ad") as s:
            for part in parts:
                group = file.create_group(f"mod/{part}")
                for key in s:
                    s.copy(key, group)
            s.copy("obs", file)
    for name in ("one", "two"):
        source = open_source(tmp_path / f"{name}.h5mu")
        check(source, cells.X.toarray(), cells.var_names, cells.obs_names)
    with pytest.raises(DataError, match=r"MuData of a, b.*mdata\['NAME'\].write_h5ad"):
        open_source(tmp_path / "odd.h5mu")


# -- as an AnnData ---------------------------------------------------------------------------------


def test_a_stored_object_is_read_whole_even_where_its_root_is_labelled_oddly(make_cells, tmp_path):
    cells = make_cells(12)
    cells.layers["counts"] = cells.X
    cells.obsm["X_pca"] = np.ones((12, 2))
    cells.uns["note"] = "kept"
    cells.raw = cells
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    cells.write_h5ad(tmp_path / "a.h5ad")
    cells.write_zarr(tmp_path / "a.zarr")
    with h5py.File(tmp_path / "a.h5ad", "a") as file:
        file.attrs["encoding-type"] = "AnnData"  # as MuDataSeurat writes it
    for name in ("a.h5ad", "a.zarr"):
        found, _ = read_anndata(tmp_path / name)
        pd.testing.assert_frame_equal(found.obs, cells.obs)
        pd.testing.assert_frame_equal(found.var, cells.var)
        assert found.uns["note"] == "kept" and found.raw.shape == cells.shape
        assert (found.layers["counts"] != cells.X).nnz == 0 and found.obsm["X_pca"].sum() == 24


def test_other_kinds_become_objects_with_their_columns(genes, counts, tmp_path):
    table = frame(genes, counts)
    table.insert(0, "sample", "s1")
    table.to_csv(tmp_path / "x.csv")
    found, _ = read_anndata(tmp_path / "x.csv")
    np.testing.assert_array_equal(found.X.toarray(), counts)
    assert list(found.obs.columns) == ["sample"] and list(found.var_names) == list(genes["symbol"])
    triplet(tmp_path, "", counts, genes)
    found, _ = read_anndata(tmp_path / "matrix.mtx")
    assert list(found.obs.columns) == [] and list(found.obs_names) == BARCODES
    assert list(found.var["gene_symbol"]) == list(genes["symbol"])
    with pytest.raises(DataError, match=r"nothing\.h5ad: does not exist"):
        read_anndata(tmp_path / "nothing.h5ad")


# -- fractions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", [1e-6, 0.006, 0.2])
def test_fractions_beside_whole_numbers_are_rounded_on_request_and_it_is_said(spread, make_cells):
    cells = make_cells(30)
    counts = cells.X.toarray()
    rng = np.random.default_rng(0)
    cells.X = sp.csr_matrix(
        np.clip(counts + (counts > 0) * rng.uniform(-spread, spread, counts.shape), 0, None)
    )
    with pytest.raises(DataError, match="allow_fractional"):
        open_source(cells)
    source = open_source(cells, allow_fractional=True)
    check(source, counts, cells.var_names, cells.obs_names)
    (said,) = [n for n in source.notes if "rounded to the nearest whole number" in n]
    assert f"to {int(counts.sum()):,} in all" in said and source.counts.tally.rounded > 0


def test_organism_says_the_species_and_two_columns_of_a_name_are_refused_where_they_are_used(
    make_cells, vocabulary, tmp_path
):
    cells = make_cells(6)
    cells.obs = cells.obs.rename(columns={"species": "organism_ontology_term_id"})
    cells.obs["organism_ontology_term_id"] = "NCBITaxon:9606"
    assert set(open_source(cells).obs["species"]) == {"human"}
    cells.obs = pd.concat([cells.obs, cells.obs[["donor"]]], axis=1)
    with open_source(cells) as source:  # who embeds asks for no donor
        assert set(source.obs["species"]) == {"human"} and source.obs["donor"].isna().all()
    said = "two obs columns of the name 'donor', and nothing says which one is meant"
    for how in ({"keep": ["donor"]}, {"columns": {"batch": "donor"}}):
        with pytest.raises(DataError, match=said):
            open_source(cells, **how)
    with pytest.raises(DataError, match=said):
        Corpus.build([cells], tmp_path / "c", vocabulary=vocabulary)
    assert not (tmp_path / "c").exists()
    cells.obs.columns = [*cells.obs.columns[:-1], "species"]
    cells.obs["species"] = "human"
    cells.obs = pd.concat([cells.obs, cells.obs[["species"]]], axis=1)
    with pytest.raises(DataError, match="two obs columns of the name 'species'"):
        open_source(cells)
    assert set(open_source(cells, species="human").obs["species"]) == {"human"}
