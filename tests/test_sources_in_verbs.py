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
from genemodel.command.cli import main
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
        {"type": np.array(["T cell", "B cell"])[label_C]},
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


def fractional(cells: ad.AnnData, folder: Path) -> Path:
    """As ambient correction leaves counts: beside whole numbers."""
    other = cells.copy()
    noise_N = np.random.default_rng(1).normal(0, 0.05, other.X.nnz).clip(-0.4, 0.4)
    other.X.data = other.X.data + noise_N.astype(np.float32)
    return h5ad(other, folder)


def named_in_a_column(cells: ad.AnnData, folder: Path) -> Path:
    """The index holds genes too, but others."""
    other = cells.copy()
    other.var = pd.DataFrame({"right": list(cells.var_names)}, index=cells.var_names[::-1])
    return h5ad(other, folder)


def two_genomes(cells: ad.AnnData, folder: Path) -> Path:
    names = pd.Index([f"ENSMUSG{n:011d}" for n in range(20)])
    mouse = ad.AnnData(sp.csr_matrix(np.ones((C, 20), np.float32)), obs=cells.obs)
    mouse.var = pd.DataFrame({"genome": "mm10"}, index=names)
    human = ad.AnnData(cells.X, obs=cells.obs, var=cells.var.assign(genome="GRCh38"))
    both = ad.concat([human, mouse], axis=1, merge="first")
    both.obs = cells.obs
    return h5ad(both, folder)


def in_a_layer(cells: ad.AnnData, folder: Path) -> Path:
    other = cells.copy()
    other.layers["counts"] = cells.X.copy()
    other.X = cells.X.log1p()
    return h5ad(other, folder)


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
    "h5ad, fractional": fractional,
    "h5ad, names in a column": named_in_a_column,
    "h5ad, two genomes": two_genomes,
    "h5ad, counts in a layer": in_a_layer,
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
# What has to be said of a kind.
SAID = {
    "h5ad, genes as rows": "transpose=true",
    "h5ad, fractional": "allow_fractional=true",
    "h5ad, names in a column": "column=right",
    "h5ad, two genomes": "genome=GRCh38",
    "h5ad, counts in a layer": "layer=counts",
}
MATRIX = {kind: {verb: REFUSED.get(kind, READ) for verb in VERBS} for kind in WRITE}


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
        "corpus build": [f"input=[{source}]", f"out={out}/corpus"],
        "embed": [f"input={source}", f"model={model}", f"output={out}/o.h5ad", "device=cpu"],
        "impute": [f"input={source}", f"output={out}/o.h5ad", "device=cpu"],
        "finetune": [f"input={source}", f"out={out}/run", "task=impute",
                     "device=cpu", "trainer.accelerator=cpu"],
        "annotate": [f"input={source}", f"reference={reference}", "label_key=type",
                     "reference_species=human", f"output={out}/o.h5ad"],
        "evaluate": [f"input={source}", f"out={out}/scores", "task=impute", "methods=[none]",
                     "umaps=false"],
    }[verb]  # fmt: skip


def scored(table: pd.DataFrame) -> np.ndarray:
    """Take what no clock decides."""
    value_M = table[~table["metric"].isin(["seconds", "peak_mb"])]["value"].to_numpy()
    assert np.unique(value_M).size > 5
    return value_M


def imputed(path: Path) -> np.ndarray:
    """Read the layer; what is no gene of the chosen genome stays in ``var`` as NaN."""
    layer_CG = ad.read_h5ad(path).layers["imputed"]
    return layer_CG[:, ~np.isnan(layer_CG).all(0)]


def numbers(verb: str, out: Path) -> np.ndarray:
    """Read what a verb made."""
    match verb:
        case "corpus build":
            corpus = gm.Corpus.open(out / "corpus")
            return corpus.read(0, len(corpus)).to_csr(len(corpus.vocabulary)).toarray()
        case "embed":
            return ad.read_h5ad(out / "o.h5ad").obsm["X_genemodel"]
        case "impute":
            return imputed(out / "o.h5ad")
        case "finetune":
            return imputed(out / "run/imputed.h5ad")
        case "annotate":
            return ad.read_h5ad(out / "o.h5ad").obsm["genemodel_label_probability"]
        case _:
            return scored(pd.read_csv(out / "scores/scores.csv"))


@pytest.fixture(scope="session")
def expected(cells, model, reference, tmp_path_factory):
    """What each verb makes of the plain h5ad."""
    found = {}
    for verb in VERBS:
        out = tmp_path_factory.mktemp("expected")
        source = h5ad(cells, out)
        command = [*verb.split(), *words(verb, source, out, model, reference)]
        assert main([*command, "species=human"]) == 0
        found[verb] = numbers(verb, out)
    return found


# Every verb reads by one way in, which streams or reads whole: one verb of either is asked of every
# kind, and one more in turn. All are asked of the kinds that verbs could take differently.
ALL_VERBS = ("10x h5", "csv", "MuData", "h5ad, fractional", "h5ad, genes as rows", "legacy h5ad")
OTHERS = [verb for verb in VERBS if verb not in ("embed", "annotate")]
ASKED = [
    (kind, verb)
    for n, kind in enumerate(WRITE)
    for verb in VERBS
    if verb not in OTHERS or verb == OTHERS[n % len(OTHERS)] or kind in ALL_VERBS
]


@pytest.mark.parametrize(("kind", "verb"), ASKED)
def test_source_in_verb(kind, verb, cells, model, reference, expected, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    source = WRITE[kind](cells, tmp_path / "in")
    command = [*verb.split(), *words(verb, source, tmp_path, model, reference), "species=human"]
    command += [SAID[kind]] if kind in SAID else []
    status, said = main(command), capsys.readouterr().err
    if MATRIX[kind][verb] == READ:
        assert status == 0, said
        np.testing.assert_allclose(numbers(verb, tmp_path), expected[verb], rtol=1e-5, atol=1e-5)
    else:
        assert status == 2
        assert REFUSED[kind] in said


@pytest.mark.parametrize("kind", list(SAID))
def test_who_does_not_say_it_is_told_what_to_say(kind, cells, reference, tmp_path, capsys):
    """The refusal names the setting, where the kind can be seen."""
    (tmp_path / "in").mkdir()
    source = WRITE[kind](cells, tmp_path / "in")
    status = main(["impute", f"input={source}", f"output={tmp_path}/o.h5ad", "species=human"])
    said = capsys.readouterr().err
    if kind == "h5ad, names in a column":
        assert status == 0  # both are genes: nobody can see which are meant
    else:
        assert status == 2 and SAID[kind] in said


def test_the_page_on_inputs_says_the_matrix(repository):
    page = (repository / "docs/inputs.md").read_text()
    table = page.partition("| kind | all verbs |")[2]
    print(pd.DataFrame(MATRIX).T.map(lambda said: said[:40]).to_string())  # pytest -s
    for kind in WRITE:
        if kind not in SAID or kind == "h5ad, genes as rows":
            assert kind in table, kind


# -- objects in memory -----------------------------------------------------------------------------


def test_an_object_in_memory_in_every_call(cells, random_bundle, expected, tmp_path):
    how = {"species": "NCBITaxon:9606", "column": "right", "layer": "counts"}
    adata = cells.copy()
    adata.var = pd.DataFrame({"right": list(cells.var_names)}, index=cells.var_names[::-1])
    noise_N = np.random.default_rng(1).normal(0, 0.05, adata.X.nnz).clip(-0.4, 0.4)
    adata.layers["counts"], adata.X = adata.X.copy(), adata.X.log1p()
    adata.layers["counts"].data += noise_N.astype(np.float32)
    how["allow_fractional"] = True
    corpus = gm.Corpus.build([adata], tmp_path / "corpus", **how)
    built = corpus.read(0, len(corpus)).to_csr(len(corpus.vocabulary)).toarray()
    np.testing.assert_array_equal(built, expected["corpus build"])
    gm.embed(adata, random_bundle, **how)
    np.testing.assert_allclose(adata.obsm["X_genemodel"], expected["embed"], rtol=1e-5, atol=1e-5)
    gm.impute(adata, device="cpu", **how)
    np.testing.assert_allclose(adata.layers["imputed"], expected["impute"], rtol=1e-5)
    gm.annotate(adata, cells, label_key="type", reference_species=9606, **how)
    probability_CL = adata.obsm["genemodel_label_probability"]
    np.testing.assert_allclose(probability_CL, expected["annotate"], rtol=1e-4, atol=1e-5)
    found = gm.evaluate(adata, task="impute", methods=["none"], **how)
    np.testing.assert_allclose(scored(found.table), expected["evaluate"], rtol=1e-5)
    settings = gm.IntegrationSettings(steps=3)
    gm.integrate(adata, batch_key="lane", settings=settings, device="cpu", **how)
    assert np.isfinite(adata.obsm["X_integrated"]).all()


CALLS = {
    "embed": lambda adata, model: gm.embed(adata, model, species="human", transpose=True),
    "impute": lambda adata, model: gm.impute(adata, transpose=True),
    "integrate": lambda adata, model: gm.integrate(adata, batch_key="lane", transpose=True),
    "annotate": lambda adata, model: gm.annotate(
        adata, adata.copy(), label_key="type", transpose=True
    ),
    "evaluate": lambda adata, model: gm.evaluate(adata, task="impute", transpose=True),
}


@pytest.mark.parametrize("call", list(CALLS))
def test_an_object_in_memory_turns_itself(call, cells, random_bundle):
    with pytest.raises(GenemodelError, match=r"turns with adata = adata\.T"):
        CALLS[call](cells.copy(), random_bundle)
    with pytest.raises(GenemodelError, match=r"its rows are genes. Turn it: adata = adata\.T"):
        plain = cells.T.copy()
        plain.obs = plain.obs.assign(lane="a", type="b")
        if call == "evaluate":
            gm.evaluate(plain, task="impute")
        else:
            gm.impute(plain)


def test_few_known_genes_are_accepted_where_that_is_said(cells, model, tmp_path, capsys):
    names = pd.Index([f"probe{n}" for n in range(3 * G)])
    probes = ad.AnnData(sp.csr_matrix(np.ones((C, 3 * G), np.float32)), obs=cells.obs)
    probes.var_names = names
    both = ad.concat([cells, probes], axis=1)
    both.obs = cells.obs
    source = h5ad(both, tmp_path)
    command = ["embed", f"input={source}", f"model={model}", f"output={tmp_path}/o.h5ad"]
    assert main([*command, "species=human"]) == 2
    assert "say which column of var holds them (setting column), or accept fewer with " in (
        capsys.readouterr().err.replace("\n", " ")
    )
    assert main([*command, "species=9606", "min_fraction=0.2"]) == 0
    assert main(["corpus", "build", f"input={source}", f"out={tmp_path}/c", "species=human",
                 "min_fraction=0.2"]) == 0  # fmt: skip


def test_a_sheet_says_it_of_each_source(cells, tmp_path):
    rows = ["path\tspecies\tcolumn\ttranspose\tallow_fractional"]
    for kind, line in {
        "h5ad, genes as rows": "GRCh38\t\ttrue\t",
        "h5ad, fractional": "9606\t\t\ttrue",
        "h5ad, names in a column": "hsapiens\tright\tfalse\t",
    }.items():
        folder = tmp_path / kind.replace(" ", "_").replace(",", "")
        folder.mkdir()
        rows.append(f"{WRITE[kind](cells, folder).relative_to(tmp_path)}\t{line}")
    (tmp_path / "sheet.tsv").write_text("\n".join(rows))
    assert main(["corpus", "build", f"sheet={tmp_path}/sheet.tsv", f"out={tmp_path}/c"]) == 0
    corpus = gm.Corpus.open(tmp_path / "c")
    counts = corpus.read(0, len(corpus)).to_csr(len(corpus.vocabulary)).toarray()
    np.testing.assert_array_equal(counts[:C], counts[C : 2 * C])
    np.testing.assert_array_equal(counts[:C], counts[2 * C :])
    (tmp_path / "sheet.tsv").write_text(rows[0] + "\n" + rows[1].replace("true", "perhaps"))
    assert main(["corpus", "build", f"sheet={tmp_path}/sheet.tsv", f"out={tmp_path}/d"]) == 2
