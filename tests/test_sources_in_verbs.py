"""Every verb reads every kind of source that a corpus is built from, to the same numbers.

The table :data:`MATRIX` is what ``docs/inputs.md`` says; a cell of it is run by its test.
"""

import gzip
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.io
import scipy.sparse as sp

import genemodel as gm
from genemodel.cli import main
from genemodel.errors import GenemodelError
from genemodel.genes.vocabulary import GeneVocabulary

C, G = 64, 90
READ = "read"
# A kind of file that nobody reads, and the way out that all verbs say.
REFUSED = {
    "legacy h5ad": "anndata older than 0.7. Read it once with anndata.read_h5ad and write it again",
    "R object": "an R object: convert it in R, e.g. with zellkonverter::writeH5AD",
    "zip": "an archive: unpack it and give what is inside",
    "numpy array": "a numpy array without names: make an AnnData of it and write that",
}
VERBS = ("corpus build", "embed", "impute", "finetune", "annotate", "evaluate")


# -- one matrix in all kinds -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def cells():
    """Human cells of two types in two batches."""
    genes = GeneVocabulary.builtin().genes
    rows = genes[(genes["species"] == "human") & (genes["symbol"] != "")].iloc[:G]
    rng = np.random.default_rng(0)
    rate_LG = rng.gamma(0.7, 3.0, (2, G))
    label_C = np.arange(C) % 2
    counts_CG = rng.poisson(rate_LG[label_C])
    counts_CG[:, 0] += 1
    obs = pd.DataFrame(
        {"type": np.array(["T cell", "B cell"])[label_C], "lane": ["a", "b"] * 0 + ["x"] * C},
        index=[f"ACGTACGTACGTAC{'ACGT'[i % 4]}-{i}" for i in range(C)],
    )
    obs["lane"] = np.array(["one", "two"])[np.arange(C) // (C // 2)]
    var = pd.DataFrame(
        {"gene_symbol": rows["symbol"].astype(str).to_numpy()},
        index=pd.Index(rows["ensembl_id"].astype(str)),
    )
    return ad.AnnData(sp.csr_matrix(counts_CG.astype(np.float32)), obs=obs, var=var)


def h5ad(cells: ad.AnnData, folder: Path) -> Path:
    cells.write_h5ad(folder / "x.h5ad")
    return folder / "x.h5ad"


def turned(cells: ad.AnnData, folder: Path) -> Path:
    cells.T.copy().write_h5ad(folder / "x.h5ad")
    return folder / "x.h5ad"


def zarr(cells: ad.AnnData, folder: Path) -> Path:
    cells.write_zarr(folder / "x.zarr")
    return folder / "x.zarr"


def mudata(cells: ad.AnnData, folder: Path) -> Path:
    h5ad(cells, folder)
    with h5py.File(folder / "x.h5mu", "w") as file, h5py.File(folder / "x.h5ad") as source:
        rna = file.create_group("mod").create_group("rna")
        for key in source:
            source.copy(key, rna)
        source.copy("obs", file)
        source.copy("var", file)
    (folder / "x.h5ad").unlink()
    return folder / "x.h5mu"


def oddly_labelled(cells: ad.AnnData, folder: Path) -> Path:
    with h5py.File(h5ad(cells, folder), "a") as file:
        file.attrs["encoding-type"] = "AnnData"  # as MuDataSeurat writes it
    return folder / "x.h5ad"


def tenx_h5(cells: ad.AnnData, folder: Path) -> Path:
    X = cells.X.tocsr()
    with h5py.File(folder / "x.h5", "w") as file:
        group = file.create_group("matrix")
        features = group.create_group("features")
        group["barcodes"] = np.array(list(cells.obs_names), "S")
        group["data"], group["indptr"] = X.data.astype(np.int32), X.indptr.astype(np.int64)
        group["indices"], group["shape"] = X.indices.astype(np.int64), np.array(X.shape[::-1])
        features["id"] = np.array(list(cells.var_names), "S")
        features["name"] = np.array(list(cells.var["gene_symbol"]), "S")
        features["feature_type"] = np.array(["Gene Expression"] * G, "S")
        features["genome"] = np.array(["GRCh38"] * G, "S")
    return folder / "x.h5"


def _market(path: Path, counts: sp.spmatrix) -> None:
    scipy.io.mmwrite(path, sp.coo_matrix(counts).astype(np.int64), field="integer")


def _triplet(cells: ad.AnnData, folder: Path, start: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _market(folder / f"{start}matrix.mtx", cells.X.T)
    (folder / f"{start}barcodes.tsv").write_text("\n".join(cells.obs_names))
    lines = zip(cells.var_names, cells.var["gene_symbol"], strict=True)
    text = "".join(f"{i}\t{s}\tGene Expression\n" for i, s in lines)
    (folder / f"{start}features.tsv").write_text(text)


def tenx_mtx(cells: ad.AnnData, folder: Path) -> Path:
    _triplet(cells, folder / "filtered_feature_bc_matrix")
    return folder / "filtered_feature_bc_matrix"


def starsolo(cells: ad.AnnData, folder: Path) -> Path:
    _triplet(cells, folder / "Solo.out/Gene/filtered")
    return folder / "Solo.out/Gene/filtered"


def geo(cells: ad.AnnData, folder: Path) -> Path:
    _triplet(cells, folder, "GSM1_lung_")
    for path in list(folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    return folder / "GSM1_lung_matrix.mtx.gz"


def parse(cells: ad.AnnData, folder: Path) -> Path:
    folder = folder / "DGE_filtered"
    folder.mkdir()
    _market(folder / "count_matrix.mtx", cells.X)
    pd.DataFrame(
        {"gene_id": cells.var_names, "gene_name": cells.var["gene_symbol"].to_numpy()}
    ).to_csv(folder / "all_genes.csv", index=False)
    table = pd.DataFrame({"bc_wells": cells.obs_names, "gene_count": 3})
    table.assign(lane=cells.obs["lane"].to_numpy()).to_csv(
        folder / "cell_metadata.csv", index=False
    )
    return folder


def loom(cells: ad.AnnData, folder: Path) -> Path:
    with h5py.File(folder / "x.loom", "w") as file:
        file["matrix"] = cells.X.toarray().T
        rows, columns = file.create_group("row_attrs"), file.create_group("col_attrs")
        rows["Accession"] = np.array(list(cells.var_names), "S")
        columns["CellID"] = np.array(list(cells.obs_names), "S")
        columns["lane"] = np.array(list(cells.obs["lane"]), "S")
    return folder / "x.loom"


def csv(cells: ad.AnnData, folder: Path) -> Path:
    frame = pd.DataFrame(cells.X.toarray().astype(int), cells.obs_names, cells.var_names)
    frame.to_csv(folder / "x.csv")
    return folder / "x.csv"


def tsv_of_genes(cells: ad.AnnData, folder: Path) -> Path:
    frame = pd.DataFrame(cells.X.toarray().astype(int), cells.obs_names, cells.var_names)
    frame.T.to_csv(folder / "x.tsv.gz", sep="\t", index_label="GENE")
    return folder / "x.tsv.gz"


def legacy(cells: ad.AnnData, folder: Path) -> Path:
    with h5py.File(folder / "x.h5ad", "w") as file:
        file["X"] = cells.X.toarray()
        for key, index in (("obs", cells.obs_names), ("var", cells.var_names)):
            file[key] = np.array([(str(n),) for n in index], dtype=[("index", "S40")])
    return folder / "x.h5ad"


def _bytes(name: str, content: bytes):
    def write(cells: ad.AnnData, folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return write


WRITE = {
    "h5ad": h5ad,
    "h5ad, genes as rows": turned,
    "h5ad of MuDataSeurat": oddly_labelled,
    "zarr": zarr,
    "MuData": mudata,
    "10x h5": tenx_h5,
    "10x mtx folder": tenx_mtx,
    "STARsolo folder": starsolo,
    "GEO triplet": geo,
    "Parse folder": parse,
    "loom": loom,
    "csv": csv,
    "tsv, genes as rows": tsv_of_genes,
    "legacy h5ad": legacy,
    "R object": _bytes("x.rds", gzip.compress(b"X\n\0\0\0\3" * 9)),
    "zip": _bytes("x.zip", b"PK\x03\x04" + b"\0" * 40),
    "numpy array": _bytes("x.npy", b"\x93NUMPY" + b"\0" * 40),
}
MATRIX = {
    kind: {verb: REFUSED.get(kind, READ) for verb in VERBS} for kind in WRITE
}


# -- what each verb makes of it --------------------------------------------------------------------


@pytest.fixture(scope="session")
def model(random_bundle, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "bundle"
    random_bundle.save(path)
    return path


@pytest.fixture(scope="session")
def reference(cells, tmp_path_factory):
    return h5ad(cells, tmp_path_factory.mktemp("reference"))


def words(verb: str, source: Path, out: Path, model: Path, reference: Path) -> list[str]:
    """Give the shortest command of a verb."""
    return {
        "corpus build": [f"sources=[{source}]", f"out={out}/corpus"],
        "embed": [f"input={source}", f"model={model}", f"output={out}/o.h5ad", "device=cpu"],
        "impute": [f"input={source}", f"output={out}/o.h5ad", "device=cpu"],
        "finetune": [f"data={source}", f"out={out}/run", "task=impute",
                     "device=cpu", "trainer.accelerator=cpu"],
        "annotate": [f"query={source}", f"reference={reference}", "label_key=type",
                     "reference_species=human", f"output={out}/o.h5ad"],
        "evaluate": [f"data={source}", f"out={out}/scores", "task=impute", "methods=[none]",
                     "umaps=false"],
    }[verb]  # fmt: skip


def numbers(verb: str, out: Path) -> np.ndarray:
    """Read what a verb made."""
    match verb:
        case "corpus build":
            corpus = gm.Corpus.open(out / "corpus")
            return corpus.read(0, len(corpus)).to_csr(len(corpus.vocabulary)).toarray()
        case "embed":
            return ad.read_h5ad(out / "o.h5ad").obsm["X_genemodel"]
        case "impute":
            return ad.read_h5ad(out / "o.h5ad").layers["imputed"]
        case "finetune":
            return ad.read_h5ad(out / "run/imputed.h5ad").layers["imputed"]
        case "annotate":
            return ad.read_h5ad(out / "o.h5ad").obsm["genemodel_label_probability"]
        case _:
            table = pd.read_csv(out / "scores/scores.csv")
            return table.select_dtypes("number").iloc[:, :1].to_numpy()


@pytest.fixture(scope="session")
def expected(cells, model, reference, tmp_path_factory):
    """What each verb makes of the plain h5ad."""
    found = {}
    for verb in VERBS:
        out = tmp_path_factory.mktemp("expected")
        source = h5ad(cells, out)
        assert main([*verb.split(), *words(verb, source, out, model, reference), "species=human"]) == 0
        found[verb] = numbers(verb, out)
    return found


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("kind", list(WRITE))
def test_source_in_verb(kind, verb, cells, model, reference, expected, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    source = WRITE[kind](cells, tmp_path / "in")
    command = [*verb.split(), *words(verb, source, tmp_path, model, reference), "species=human"]
    if kind == "h5ad, genes as rows":
        command.append("transpose=true")
    status, said = main(command), capsys.readouterr().err
    if MATRIX[kind][verb] == READ:
        assert status == 0, said
        np.testing.assert_allclose(numbers(verb, tmp_path), expected[verb], rtol=1e-5, atol=1e-5)
    else:
        assert status == 2
        assert REFUSED[kind] in said
