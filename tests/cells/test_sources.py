"""Every kind of file against the matrix it was written from, and every refusal of a bad one."""

import gzip
import shutil

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp
import zarr

from genemodel.cells import sources_tenx
from genemodel.cells.sources import open_source, stream_source
from genemodel.errors import ConfigError, DataError

N, G = 40, 25


@pytest.fixture(scope="module")
def counts():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.8, (N, G)) + np.eye(N, G, dtype=int)
    counts[7] = 0
    return counts


@pytest.fixture(scope="module")
def adata(counts):
    obs = pd.DataFrame(
        {
            "organism": pd.Categorical(["Homo sapiens"] * 30 + ["mouse"] * 10),
            "sample": [1.0, np.nan] * (N // 2),
            "label": pd.array(["T", None] * (N // 2), dtype="string"),
        },
        index=[f"c{i}" for i in range(N)],
    )
    var = pd.DataFrame(
        {"symbol": [f"S{i}" for i in range(G)]}, index=[f"ENSG{i:011d}" for i in range(G)]
    )
    return ad.AnnData(sp.csr_matrix(counts.astype(np.float32)), obs=obs, var=var)


def total(source, chunk_cells=7):
    blocks = list(source.chunks(chunk_cells))
    names = [n for b in blocks for n in b.obs.index]
    return sp.vstack([b.counts_CG for b in blocks]).toarray(), names


# -- writers: one per kind of file; each returns the path ------------------------------------------


def h5ad(adata, folder, name="cells.h5ad", x=None):
    adata = adata.copy()
    if x is not None:
        adata.X = x
    adata.write_h5ad(folder / name, compression="gzip")
    return folder / name


def tenx_v3(adata, folder, feature_types=None, genomes=None):
    x = sp.csr_matrix(adata.X).astype(np.int32)
    with h5py.File(folder / "v3.h5", "w") as file:
        group = file.create_group("matrix")
        for key in ("data", "indices", "indptr"):
            group[key] = getattr(x, key)
        group["shape"] = np.array(x.shape[::-1])
        group["barcodes"] = np.array(adata.obs_names, dtype="S")
        features = group.create_group("features")
        features["id"] = np.array(adata.var_names, dtype="S")
        features["name"] = np.array(adata.var["symbol"], dtype="S")
        features["feature_type"] = np.array(feature_types or ["Gene Expression"] * G, dtype="S")
        features["genome"] = np.array(genomes or ["GRCh38"] * G, dtype="S")
    return folder / "v3.h5"


def tenx_v2(adata, folder, genomes=("hg19",)):
    x = sp.csr_matrix(adata.X).astype(np.int32)
    with h5py.File(folder / "v2.h5", "w") as file:
        for genome in genomes:
            group = file.create_group(genome)
            for key in ("data", "indices", "indptr"):
                group[key] = getattr(x, key)
            group["shape"] = np.array(x.shape[::-1])
            group["barcodes"] = np.array(adata.obs_names, dtype="S")
            group["genes"] = np.array(adata.var_names, dtype="S")
            group["gene_names"] = np.array(adata.var["symbol"], dtype="S")
    return folder / "v2.h5"


def market(adata, folder, *, zipped=False, turned=False, by_gene=False, old=False):
    path = folder / f"mtx_{zipped}_{turned}_{by_gene}_{old}"
    path.mkdir()
    x = sp.csr_matrix(adata.X).astype(int)
    matrix = x if turned else x.T
    # scipy writes entries in the order of the layout: by cell, or by gene.
    by_cell = matrix.tocsr() if turned else matrix.tocsc()
    by_genes = matrix.tocsc() if turned else matrix.tocsr()
    chosen = (by_genes if by_gene else by_cell).tocoo()
    scipy.io.mmwrite(path / "matrix.mtx", chosen, field="integer")
    features = "genes.tsv" if old else "features.tsv"
    table = pd.DataFrame({"id": adata.var_names, "symbol": adata.var["symbol"].to_numpy()})
    if not old:
        table["type"] = "Gene Expression"
    table.to_csv(path / features, sep="\t", header=False, index=False)
    (path / "barcodes.tsv").write_text("\n".join(adata.obs_names) + "\n")
    if zipped:
        for file in list(path.iterdir()):
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return path


def loom(adata, folder):
    with h5py.File(folder / "cells.loom", "w") as file:
        file["matrix"] = adata.X.toarray().T
        file["row_attrs/Gene"] = np.array(adata.var["symbol"], dtype="S")
        file["row_attrs/Accession"] = np.array(adata.var_names, dtype="S")
        file["col_attrs/CellID"] = np.array(adata.obs_names, dtype="S")
        file["layers/normalised"] = adata.X.toarray().T / 3
    return folder / "cells.loom"


def table(adata, folder, *, ending=".csv", turned=False, like_r=False):
    frame = pd.DataFrame(
        adata.X.toarray().astype(int), index=adata.obs_names, columns=adata.var_names
    )
    path = folder / f"table_{turned}_{like_r}{ending}"
    separator = "\t" if ".tsv" in ending else ","
    (frame.T if turned else frame).to_csv(path, sep=separator)
    if like_r:
        text = path.read_text()
        path.write_text(text.removeprefix(separator))
    return path


def zarr_store(adata, folder):
    adata.write_zarr(folder / "cells.zarr")
    return folder / "cells.zarr"


KINDS = {
    "h5ad csr": (h5ad, {}, {}),
    "h5ad csc": (lambda a, f: h5ad(a, f, "csc.h5ad", sp.csc_matrix(a.X)), {}, {}),
    "h5ad dense": (lambda a, f: h5ad(a, f, "dense.h5ad", a.X.toarray()), {}, {}),
    "zarr": (zarr_store, {}, {}),
    "10x h5 v3": (tenx_v3, {}, {}),
    "10x h5 v2": (tenx_v2, {}, {}),
    "10x mtx": (market, {}, {}),
    "10x mtx gz": (market, {"zipped": True}, {}),
    "10x mtx of Cell Ranger 2": (market, {"old": True}, {}),
    "10x mtx, cells first": (market, {"turned": True}, {}),
    "10x mtx sorted by gene": (market, {"by_gene": True}, {}),
    "loom": (loom, {}, {}),
    "csv": (table, {}, {}),
    "tsv.gz": (table, {"ending": ".tsv.gz"}, {}),
    "csv of R": (table, {"like_r": True}, {}),
    "csv, genes first": (table, {"turned": True}, {"transpose": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_counts(kind, adata, counts, tmp_path):
    write, how, options = KINDS[kind]
    with open_source(write(adata, tmp_path, **how), species="human", **options) as source:
        found, names = total(source)
        again, _ = total(source, chunk_cells=1000)
        np.testing.assert_array_equal(found, counts)
        np.testing.assert_array_equal(again, counts)
        assert names == list(adata.obs_names)
        assert list(source.genes.index) == list(adata.var_names)
        assert set(source.obs["species"]) == {"human"}
        assert source.counts.tally.explicit_zeros == 0


@pytest.mark.parametrize("lines", [7, 64])
def test_a_matrix_market_file_is_parsed_in_blocks(lines, adata, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_tenx, "_LINES", lines)
    with open_source(market(adata, tmp_path), species="human") as source:
        np.testing.assert_array_equal(total(source)[0], counts)


def test_an_unsorted_matrix_market_file_too_large_to_sort(adata, tmp_path, monkeypatch):
    monkeypatch.setattr(sources_tenx, "_LINES", 50)
    monkeypatch.setattr(sources_tenx, "_SORTED_LINES", 100)
    with pytest.raises(DataError, match=r"not sorted by cell.*Convert it once"):
        open_source(market(adata, tmp_path, by_gene=True), species="human")


def test_backed_and_in_memory_objects(adata, counts, tmp_path):
    backed = ad.read_h5ad(h5ad(adata, tmp_path), backed="r")
    for data in (adata, backed, adata[::-1][::-1]):
        np.testing.assert_array_equal(total(open_source(data, species="human"))[0], counts)


def test_columns_are_renamed_and_missing_values_stay_missing(adata, tmp_path):
    source = open_source(
        h5ad(adata, tmp_path),
        species="obs:organism",
        columns={"batch": "sample", "cell_type": "label"},
        keep=["nowhere"],
    )
    obs = source.obs
    assert list(obs["species"].cat.categories) == ["human", "mouse"]
    assert list(obs["batch"].cat.categories) == ["1"]
    assert obs["batch"].isna().sum() == obs["cell_type"].isna().sum() == N // 2
    assert obs["donor"].isna().all() and obs["nowhere"].isna().all()
    assert set(obs["dataset"]) == {"cells"}


def test_antibodies_are_left_out_and_noted(adata, counts, tmp_path):
    types = ["Gene Expression"] * (G - 2) + ["Antibody Capture"] * 2
    source = open_source(tenx_v3(adata, tmp_path, types), species="human")
    np.testing.assert_array_equal(total(source)[0], counts[:, : G - 2])
    assert "2 features are not genes" in source.notes[0]


def test_one_genome_of_several(adata, counts, tmp_path):
    genomes = ["GRCh38"] * 10 + ["mm10"] * (G - 10)
    path = tenx_v3(adata, tmp_path, genomes=genomes)
    source = open_source(path, species="mouse", genome="mm10")
    np.testing.assert_array_equal(total(source)[0], counts[:, 10:])
    with pytest.raises(DataError, match="no genome 'hg19'; it has GRCh38, mm10"):
        open_source(path, species="human", genome="hg19")
    both = tenx_v2(adata, tmp_path, genomes=("hg19", "mm10"))
    with pytest.raises(DataError, match=r"2 genomes \(hg19, mm10\).*Set genome="):
        open_source(both, species="human")
    np.testing.assert_array_equal(
        total(open_source(both, species="mouse", genome="mm10"))[0], counts
    )


@pytest.mark.parametrize(
    ("genome", "species"),
    [("GRCh38", "human"), ("hg19", "human"), ("mm10", "mouse"), ("GRCm39", "mouse")],
)
@pytest.mark.parametrize("kind", ["h5", "h5 of version 2", "mtx", "mtx, names", "AnnData", "h5ad"])
def test_the_species_is_that_of_the_genome(adata, tmp_path, genome, species, kind, caplog):
    adata = adata.copy()
    if kind == "h5":
        data = tenx_v3(adata, tmp_path, genomes=[genome] * (G - 1) + [""])
    elif kind == "h5 of version 2":
        data = tenx_v2(adata, tmp_path, genomes=(genome,))
    elif kind == "mtx":
        data = market(adata, tmp_path, old=True).rename(tmp_path / genome)
    elif kind == "mtx, names":
        adata.var_names = [f"{genome}_{name}" for name in adata.var_names]
        data = market(adata, tmp_path, zipped=True)
    else:
        del adata.obs["organism"]
        adata.var["genome"] = genome
        data = adata if kind == "AnnData" else h5ad(adata, tmp_path)
    with caplog.at_level("INFO"), open_source(data) as source:
        assert set(source.obs["species"]) == {species}
    assert f"{species}, as the genome of its genes says" in caplog.text
    with open_source(data, species="pig") as source:  # what is said goes before
        assert set(source.obs["species"]) == {"pig"}


@pytest.mark.parametrize("how", [{}, {"species": "human"}])
def test_genes_of_two_species_are_refused_where_nothing_says_of_which_a_cell_is(
    adata, counts, tmp_path, how
):
    adata = adata.copy()
    organism = adata.obs.pop("organism")
    genomes = ["GRCh38"] * 10 + ["mm10"] * (G - 10)
    both = tenx_v3(adata, tmp_path, genomes=genomes)
    names = adata.copy()
    names.var_names = [f"{g}_{n}" for g, n in zip(genomes, adata.var_names, strict=True)]
    for data in (both, market(names, tmp_path), h5ad(names, tmp_path), names):
        said = r"genes are of 2 species \(GRCh38, mm10\).*Set genome=GRCh38"
        with pytest.raises(DataError, match=said):
            open_source(data, **how)
        with open_source(data, genome="mm10") as source:
            assert set(source.obs["species"]) == {"mouse"}
            np.testing.assert_array_equal(total(source)[0], counts[:, 10:])
    adata.obs["organism"], adata.var["genome"] = organism, genomes
    with open_source(adata, species=None if not how else "obs:organism") as source:
        assert source.counts.shape == counts.shape


def test_a_genome_that_nobody_knows_says_nothing(adata, tmp_path):
    for genomes in (["mine"] * G, ["GRCh38"] * (G - 1) + ["mine"], ["GRCh38_and_mm10"] * G):
        with pytest.raises(ConfigError, match="species of its cells is not stated"):
            open_source(tenx_v3(adata, tmp_path, genomes=genomes))


def test_a_program_may_stream_cells(adata, counts):
    obs = pd.DataFrame({"donor": ["d"] * N}, index=[str(i) for i in range(N)])

    def blocks():
        for start in range(0, N, 9):
            yield sp.csr_matrix(counts[start : start + 9])

    source = stream_source("generated", list(adata.var_names), obs, blocks, species="human")
    np.testing.assert_array_equal(total(source, 4)[0], counts)
    short = stream_source(
        "short", list(adata.var_names), obs, lambda: iter([sp.csr_matrix(counts[:9])]),
        species="human",
    )  # fmt: skip
    with pytest.raises(DataError, match="short: ends after 9 cells, 40 were announced"):
        total(short)


# -- refusals --------------------------------------------------------------------------------------


def foreign_hdf5(adata, folder):
    with h5py.File(folder / "other.h5", "w") as file:
        file["table"] = np.arange(3)
    return folder / "other.h5"


def foreign_zarr(adata, folder):
    zarr.open_group(folder / "image.zarr", mode="w").create_array("image", data=np.ones(3))
    return folder / "image.zarr"


def written(name, content):
    def write(adata, folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def cut(write, name=None, keep=0.6, **how):
    def make(adata, folder):
        path = write(adata, folder, **how)
        target = path / name if name else path
        data = target.read_bytes()
        target.write_bytes(data[: int(len(data) * keep)])
        return path

    return make


def without(write, *names, **how):
    def make(adata, folder):
        path = write(adata, folder, **how)
        for name in names:
            target = path / name
            shutil.rmtree(target) if target.is_dir() else target.unlink()
        return path

    return make


def without_key(key):
    def make(adata, folder):
        path = h5ad(adata, folder)
        with h5py.File(path, "a") as file:
            del file[key]
        return path

    return make


def changed(write, name, old, new, **how):
    def make(adata, folder):
        path = write(adata, folder, **how)
        target = path / name if name else path
        text = target.read_text()
        assert old in text
        target.write_text(text.replace(old, new, 1))
        return path

    return make


def parent_of_market(adata, folder):
    market(adata, folder).rename(folder / "filtered_feature_bc_matrix")
    return folder


def wide_index(adata, folder):
    path = h5ad(adata, folder)
    with h5py.File(path, "a") as file:
        file["X/indices"][3] = 10_000
    return path


def antibodies_only(adata, folder):
    return tenx_v3(adata, folder, feature_types=["Antibody Capture"] * G)


def log_loom(adata, folder):
    path = loom(adata, folder)
    with h5py.File(path, "a") as file:
        file["layers/counts"] = file["matrix"][:]
        file["matrix"][...] = np.log1p(file["matrix"][:])
    return path


BAD = {
    "absent": (lambda a, f: f / "cels.h5ad", "cels.h5ad: does not exist"),
    "misspelt": (lambda a, f: h5ad(a, f).with_name("cell.h5ad"), "did you mean .*cells.h5ad"),
    "absent folder": (lambda a, f: f / "no" / "cells.h5ad", "there is no folder .*no"),
    "address": (lambda a, f: "nosuch://bucket/cells.h5ad", "cannot be read.*download it and give"),
    "empty file": (written("cells.h5ad", b""), r"is empty \(0 bytes\)"),
    "text named h5ad": (written("cells.h5ad", b"gene,cell\n1,2\n"), "begins with b'gene,cel'"),
    "R object": (written("cells.rds", b"\x1f\x8bxxxxxxxx"), "R object.*writeH5AD"),
    "archive": (written("cells.tar.gz", b"\x1f\x8bxxxxxxxx"), "archive: unpack it"),
    "matrix alone": (
        written("matrix.mtx", b"%%MatrixMarket m c i g\n"), "has matrix.mtx but no barcodes.tsv",
    ),
    "unknown kind": (written("cells.xyz", b"123456789"), "of no known kind"),
    "foreign hdf5": (foreign_hdf5, "neither h5ad .* 10x .* nor loom.*it holds table"),
    "truncated h5ad": (cut(h5ad), "cells.h5ad.*cannot be read"),
    "h5ad without obs": (without_key("obs"), "neither h5ad"),
    "h5ad without X": (without_key("X"), "neither h5ad|no layer 'X'"),
    "h5ad without row pointers": (without_key("X/indptr"), "X: .*it has no indptr"),
    "h5ad without var": (without_key("var"), "var: cannot be read"),
    "column number out of range": (wide_index, "stored column number is 10,000"),
    "foreign zarr": (foreign_zarr, "zarr store, but not one of anndata.*it holds image"),
    "zarr without a chunk": (without(zarr_store, "X/data/c"), "X: cannot be read"),
    "empty folder": (lambda a, f: f, "folder without matrix.mtx.*it holds nothing"),
    "parent of a 10x folder": (parent_of_market, "Give .*filtered_feature_bc_matrix instead"),
    "10x without genes": (without(market, "features.tsv"), r"no features.tsv or genes.tsv"),
    "10x without barcodes": (without(market, "barcodes.tsv"), "no barcodes.tsv"),
    "10x of two runs": (changed(market, "barcodes.tsv", "c0\n", ""), "25 × 40.*39 barcodes"),
    "10x cut off": (cut(market, "matrix.mtx", 0.5), "cut off|cannot be read|fields"),
    "10x with damaged gzip": (cut(market, "matrix.mtx.gz", 0.5, zipped=True), "cannot be read"),
    "mtx of another kind": (
        changed(market, "matrix.mtx", "coordinate integer general", "array real general"),
        "array real general",
    ),
    "not a market file": (changed(market, "matrix.mtx", "%%MatrixMarket", "#"), "matrix-market"),
    "antibodies only": (antibodies_only, "no feature of type 'Gene Expression', only Antibody"),
    "loom of logarithms": (log_loom, r"log1p.*layers\['counts'\] holds raw counts"),
    "table of one column": (written("t.csv", b"gene\n1\n"), "is no table"),
    "table with a text column": (
        changed(table, None, "c0,", "c0,T cell"), "column .* holds text|cannot be read",
    ),
    "table with a hole": (written("t.csv", b",a,b\nc1,1,\nc2,2,3\n"), "NaN"),
    "table with ragged lines": (written("t.csv", b",a,b\nc1,1,2\nc2,2,3,4\n"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_sources_are_refused_by_name(name, adata, tmp_path):
    make, what = BAD[name]
    path = make(adata, tmp_path)
    with pytest.raises(DataError, match=what) as caught:
        with open_source(path, species="human") as source:
            total(source)
    place = str(path).rsplit("/", 1)[-1]
    assert place.split(".")[0] in str(caught.value)


def test_a_species_must_be_stated(adata, tmp_path):
    adata = adata.copy()
    adata.obs = adata.obs.rename(columns={"organism": "being"})
    path = h5ad(adata, tmp_path)
    with pytest.raises(ConfigError, match=r"not stated. Set species=human.*being, sample"):
        open_source(path)
    with pytest.raises(DataError, match="no obs column 'specie' .*being, sample, label"):
        open_source(path, species="obs:specie")
    with pytest.raises(DataError, match="no obs column 'patient'.*wanted for donor"):
        open_source(path, species="human", columns={"donor": "patient"})
    with pytest.raises(ConfigError, match="'donor' is mapped to ''"):
        open_source(path, species="human", columns={"donor": ""})


def test_things_that_are_no_source(tmp_path):
    with pytest.raises(DataError, match="a path or an AnnData, not builtins.int"):
        open_source(3, species="human")


def test_a_layer_of_a_source_without_layers(adata, tmp_path):
    for path in (tenx_v3(adata, tmp_path), table(adata, tmp_path)):
        with pytest.raises(DataError, match="no layers, layer=counts was asked"):
            open_source(path, species="human", layer="counts")
