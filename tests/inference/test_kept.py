"""What the user knows of cells and genes comes out of every verb as it went in, plus ours."""

from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import genemodel as gm
from genemodel.cells.annotations import copy_annotations, read_annotations
from genemodel.cells.sources import open_source
from genemodel.command.cli import main
from genemodel.errors import DataError
from genemodel.imputation.network import DecoderSettings
from genemodel.integration.head import IntegrationSettings
from genemodel.simulation.cells import synthetic

BRIEF = IntegrationSettings(steps=4, passes=0, hidden=8, rank=4, latent=5)
TINY = [f"integration.{word}" for word in ("steps=4", "passes=0", "hidden=8", "rank=4", "latent=5")]
QUICK = DecoderSettings(hidden=8, latent=3, epochs=1)
QUICKER = ["imputation.hidden=8", "imputation.latent=3", "imputation.epochs=1"]
N = 60
LABEL = "genemodel_label"
LABELS = {LABEL, f"{LABEL}_confidence", f"{LABEL}_novelty"}


def table(index, rng):
    """Columns of every type that a file of anndata holds, with gaps wherever a type knows them."""
    n = len(index)
    third = np.arange(n) % 3 == 0

    def gaps(values, dtype):
        return pd.array([None if gap else v for v, gap in zip(values, third, strict=True)], dtype)

    words = rng.choice(["x", "y", "nan", ""], n)
    chance = rng.random(n)
    return pd.DataFrame(
        {
            "unused": pd.Categorical(rng.choice(["b", "a"], n), categories=["z", "b", "a"]),
            "ordered": pd.Categorical(
                [None if gap else v for v, gap in zip(rng.choice(["lo", "hi"], n), third,
                                                      strict=True)],
                categories=["lo", "mid", "hi"], ordered=True,
            ),
            "numbers": pd.Categorical(rng.choice([3, 1], n), categories=[3, 2, 1]),
            "counts": gaps(rng.integers(0, 9, n), "Int64"),
            "maybe": gaps(rng.random(n) < 0.5, "boolean"),
            "doublet": rng.random(n) < 0.5,
            "text": words,
            "text with gaps": gaps(words, "str"),
            "p_A": chance,
            "p_B": 1 - chance,
            "single": rng.normal(size=n).astype(np.float32),
            "half": rng.normal(size=n).astype(np.float16),
            "byte": rng.integers(-9, 9, n).astype(np.int8),
            "long": rng.integers(0, 2**63, n).astype(np.uint64),
            "holes": np.where(third, np.nan, chance),
            "dataset": "mine",
            "taken": pd.date_range("2020-01-01", periods=n).astype(str),
        },
        index=index,
    )  # fmt: skip


def same_table(found, given, ours=()):
    """Same columns in the same order, of one type, categories and values; then ours, no others."""
    mine = [column for column in found.columns if column not in ours or column in given]
    assert mine == list(given.columns)
    assert set(found.columns) - set(given.columns) == set(ours)
    assert found.index.name == given.index.name
    assert found.index.tolist() == given.index.tolist()
    for column in given:
        assert found[column].dtype == given[column].dtype, column
        if isinstance(given[column].dtype, pd.CategoricalDtype):
            assert found[column].cat.categories.tolist() == given[column].cat.categories.tolist()
            assert found[column].cat.ordered == given[column].cat.ordered
        pd.testing.assert_series_equal(found[column], given[column])


def same_value(found, given):
    if isinstance(given, dict):
        assert found.keys() == given.keys()
        for key in given:
            same_value(found[key], given[key])
    elif isinstance(given, pd.DataFrame):
        pd.testing.assert_frame_equal(found, given)
    elif sp.issparse(given):
        assert found.format == given.format and found.dtype == given.dtype
        assert (found != given).nnz == 0
    else:
        assert type(found) is type(given)
        # Of text, zarr makes numpy's own strings.
        if isinstance(given, np.ndarray) and given.dtype != object:
            assert found.dtype == given.dtype
        np.testing.assert_array_equal(found, given)


def plain(values):
    return [None if pd.isna(value) else value for value in values]


def kept(found, given, *, obs=(), var=(), uns=(), obsm=(), genes=None):
    """``found`` is ``given`` and ours; ``genes``: these rows of var alone."""
    same_table(found.obs, given.obs, obs)
    same_table(found.var, given.var if genes is None else given.var.iloc[genes], var)
    assert set(found.uns) == {*given.uns, *uns}
    same_value({key: found.uns[key] for key in given.uns}, dict(given.uns))
    assert set(found.obsm) == {*given.obsm, *obsm}
    assert set(found.varm) == set(given.varm) and set(found.varp) == set(given.varp)
    assert set(found.obsp) == set(given.obsp)
    rows = slice(None) if genes is None else genes
    for key in given.obsm:
        same_value(found.obsm[key], given.obsm[key])
    for key in given.obsp:
        same_value(found.obsp[key], given.obsp[key])
    for key in given.varm:
        value = given.varm[key]
        wanted = value.iloc[rows] if isinstance(value, pd.DataFrame) else value[rows]
        same_value(found.varm[key], wanted)
    for key in given.varp:
        same_value(found.varp[key], given.varp[key][rows][:, rows])


@pytest.fixture(scope="module")
def awkward(small_vocabulary):
    """Cells with something odd in every place, in an order of their own."""
    cells = synthetic(
        N, species=("human",), n_genes=200, genes_per_cell=60, n_batches=2, n_cell_types=2,
        seed=4, vocabulary=small_vocabulary,
    )["human"]  # fmt: skip
    rng = np.random.default_rng(0)
    cells = cells[rng.permutation(N)].copy()
    cells.obs = pd.concat([cells.obs, table(cells.obs_names, rng).drop(columns="dataset")], axis=1)
    cells.obs["dataset"] = "mine"
    cells.var = pd.concat([cells.var, table(cells.var_names, rng)], axis=1)
    cells.obs.index.name, cells.var.index.name = "barcode", "ensembl"
    cells.obsm["X_pca"] = rng.normal(size=(N, 3))
    cells.obsm["protein"] = pd.DataFrame(
        {"CD3": np.arange(N), "kind": pd.Categorical(["q", "p"] * (N // 2), ["z", "q", "p"])},
        index=cells.obs_names,
    )
    cells.obsm["sparse"] = sp.random(N, 7, 0.3, format="csr", random_state=0)
    cells.varm["loadings"] = rng.normal(size=(cells.n_vars, 2))
    cells.varm["notes"] = pd.DataFrame({"a": ["u", "v"] * (cells.n_vars // 2)}, cells.var_names)
    cells.obsp["distances"] = sp.random(N, N, 0.1, format="csr", random_state=0)
    cells.obsp["dense"] = rng.normal(size=(N, N))
    cells.varp["together"] = sp.identity(cells.n_vars, format="csr")
    cells.uns = {
        "colours": np.array(["red", "blue"], dtype=object),
        "deep": {"k": 3, "deeper": {"on": True, "name": "leiden", "x": np.arange(3.0)}},
        "empty": {},
        "groups": np.array([("a", 1.5), ("b", 2.5)], dtype=[("name", "O"), ("score", "f4")]),
        "frame": pd.DataFrame({"c": pd.Categorical(["a", "b"], ["b", "a"])}, index=["r", "s"]),
        "matrix": sp.random(3, 4, 0.5, format="csr", random_state=0),
    }
    cells.layers["spliced"] = cells.X.copy()
    cells.raw = cells.copy()
    return cells


@pytest.fixture
def file(awkward, tmp_path):
    path = tmp_path / "in.h5ad"
    awkward.copy().write_h5ad(path, convert_strings_to_categoricals=False)
    return path


@pytest.fixture(scope="module")
def bundle(small_start):
    return str(small_start / "run" / "bundle")


def run(*words):
    assert main([str(word) for word in words]) == 0


# -- in memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["embed", "integrate", "impute", "annotate", "evaluate"])
def test_an_object_in_memory_gets_ours_and_loses_nothing(awkward, bundle, verb):
    adata = awkward.copy()
    x, layer = adata.X.copy(), adata.layers["spliced"].copy()
    match verb:
        case "embed":
            gm.embed(adata, bundle)
            kept(adata, awkward, uns=["X_genemodel"], obsm=["X_genemodel"])
        case "integrate":
            gm.integrate(adata, batch_key="batch", label_key="cell_type", settings=BRIEF)
            kept(adata, awkward, uns=["X_integrated"], obsm=["X_integrated"])
        case "impute":
            gm.impute(adata, batch_key="batch", settings=QUICK)
            kept(adata, awkward, var=["imputed_dispersion"], uns=["imputed"])
        case "annotate":
            reference = awkward.copy()
            gm.annotate(adata, reference, label_key="cell_type", batch_key="batch")
            kept(adata, awkward, obs=LABELS, uns=[LABEL], obsm=[f"{LABEL}_probability"])
            kept(reference, awkward)
        case "evaluate":
            mine = {"mine": lambda cells: cells.X.toarray()}
            gm.evaluate(adata, task="impute", batch_key="batch", methods=mine)
            kept(adata, awkward)
    same_value(adata.X, x)
    same_value(adata.layers["spliced"], layer)
    same_table(adata.raw.var, awkward.raw.var)


# -- files -----------------------------------------------------------------------------------------


def test_embed_by_a_bundle(awkward, file, bundle, tmp_path):
    run("embed", f"model={bundle}", f"input={file}", f"output={tmp_path}/out.h5ad", "device=cpu")
    for found in (ad.read_h5ad(tmp_path / "out.h5ad"), gm.embed(file, gm.load(bundle))):
        kept(found, ad.read_h5ad(file), uns=["X_genemodel"], obsm=["X_genemodel"])
    kept(found, awkward, uns=["X_genemodel"], obsm=["X_genemodel"])


def test_embed_by_an_integrated_model(awkward, file, tmp_path):
    model = gm.integrate(awkward.copy(), batch_key="batch", settings=BRIEF)
    model.save(tmp_path / "model")
    run("embed", f"model={tmp_path}/model", f"input={file}", f"output={tmp_path}/out.h5ad")
    for found in (ad.read_h5ad(tmp_path / "out.h5ad"), gm.embed(file, model)):
        kept(found, awkward, uns=["X_genemodel"], obsm=["X_genemodel"])


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
@pytest.mark.parametrize("source", ["h5ad", "zarr", "memory", "backed"])
def test_impute_to_a_file(awkward, file, tmp_path, source, ending):
    data, output = file, tmp_path / f"out.{ending}"
    if source == "zarr":
        data = tmp_path / "in.zarr"
        awkward.copy().write_zarr(data, convert_strings_to_categoricals=False)
    elif source == "memory":
        data = awkward.copy()
    elif source == "backed":
        data = ad.read_h5ad(file, backed="r")
    gm.impute(data, output=output, settings=QUICK)
    found = ad.read_h5ad(output) if ending == "h5ad" else ad.read_zarr(output)
    kept(found, awkward, var=["measured", "imputed_dispersion"], uns=["imputed"])
    assert found.X is None and set(found.layers) == {"imputed"}


def test_impute_by_the_command_and_some_genes(awkward, file, tmp_path):
    genes = [7, 3, 150]
    names = ",".join(awkward.var_names[genes])
    run("impute", f"input={file}", f"output={tmp_path}/out.h5ad", "batch_key=batch",
        f"genes=[{names}]")  # fmt: skip
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    kept(found, awkward, genes=genes, var=["measured", "imputed_dispersion"], uns=["imputed"])


def test_impute_some_genes_that_were_not_measured(awkward, file, tmp_path):
    """Of those that were, var stays; whole numbers and truth values stay what they are."""
    model = gm.impute(awkward.copy(), settings=QUICK)
    part = awkward[:, 2:].copy()
    names = [*awkward.var_names[[5, 0, 9]]]
    gm.impute(part, model, genes=names, output=tmp_path / "out.h5ad")
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    same_table(found.obs, part.obs)
    assert found.var_names.tolist() == names and found.var["measured"].tolist() == [1, 0, 1]
    there = found.var[found.var["measured"]]
    for column in awkward.var:
        wanted = part.var[column].iloc[[3, 7]]
        assert plain(there[column]) == plain(wanted), column
        if isinstance(part.var[column].dtype, pd.CategoricalDtype):
            assert found.var[column].dtype == part.var[column].dtype
    assert there["byte"].dtype == "Int8" and there["doublet"].dtype == "boolean"
    assert found.varm == {} and set(found.obsp) == set(awkward.obsp)


def test_impute_a_file_with_features_that_are_no_genes(awkward, tmp_path):
    """They stay in var, and have no values; a user's own column `measured` is not ours."""
    peaks = np.zeros(awkward.n_vars, bool)
    peaks[::4] = True
    given = awkward.copy()
    given.var["feature_types"] = np.where(peaks, "Peaks", "Gene Expression")
    given.var["measured"] = "by us"
    given.write_h5ad(tmp_path / "in.h5ad", convert_strings_to_categoricals=False)
    gm.impute(tmp_path / "in.h5ad", output=tmp_path / "out.h5ad", settings=QUICK)
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    kept(found, given, var=["imputed_measured", "imputed_dispersion"], uns=["imputed"])
    np.testing.assert_array_equal(np.isnan(found.layers["imputed"]), np.tile(peaks, (N, 1)))
    np.testing.assert_array_equal(found.var["imputed_measured"], ~peaks)
    memory = given.copy()
    gm.impute(memory, settings=QUICK)
    np.testing.assert_array_equal(memory.layers["imputed"], found.layers["imputed"])


def test_annotate(awkward, file, tmp_path):
    run("annotate", f"input={file}", f"reference={file}", "label_key=cell_type",
        f"output={tmp_path}/out.h5ad")  # fmt: skip
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    kept(found, awkward, obs=LABELS, uns=[LABEL], obsm=[f"{LABEL}_probability"])
    assert found.X is None and not [name for name in found.layers if name]


@pytest.mark.usefixtures("blank_report")
def test_finetune_both_heads(awkward, file, tmp_path):
    run("finetune", f"input={file}", "task=both", "batch_key=batch", f"out={tmp_path}/run",
        *TINY, *QUICKER)  # fmt: skip
    embedded = ad.read_h5ad(tmp_path / "run/embedded.h5ad")
    kept(embedded, awkward, uns=["X_integrated"], obsm=["X_integrated"])
    imputed = ad.read_h5ad(tmp_path / "run/imputed.h5ad")
    kept(imputed, awkward, var=["measured", "imputed_dispersion"], uns=["imputed"])


@pytest.mark.usefixtures("blank_report")
def test_finetune_classify(awkward, file, bundle, tmp_path):
    run("finetune", f"input={file}", "task=classify", "label_key=cell_type", f"model={bundle}",
        f"out={tmp_path}/run", "backbone=last", "trainer.max_steps=2", "trainer.validate_every=2",
        "trainer.checkpoint_every=2")  # fmt: skip
    found = ad.read_h5ad(tmp_path / "run/labels.h5ad")
    kept(found, awkward, obs=[LABEL, f"{LABEL}_confidence"], uns=[LABEL],
         obsm=[f"{LABEL}_probability"])  # fmt: skip


# -- other kinds of files --------------------------------------------------------------------------


def test_of_a_mudata_the_table_of_its_genes_is_carried(awkward, file, bundle, tmp_path):
    with h5py.File(tmp_path / "m.h5mu", "w") as mudata, h5py.File(file) as cells:
        rna = mudata.create_group("mod/rna")
        for key in cells:
            cells.copy(key, rna)
        for key in ("obs", "var"):
            cells.copy(key, mudata)
    words = [f"input={tmp_path}/m.h5mu", "overwrite=true"]
    run("embed", f"model={bundle}", *words, f"output={tmp_path}/e.h5ad", "device=cpu")
    kept(ad.read_h5ad(tmp_path / "e.h5ad"), awkward, uns=["X_genemodel"], obsm=["X_genemodel"])
    run("impute", *words, f"output={tmp_path}/i.h5ad")
    kept(ad.read_h5ad(tmp_path / "i.h5ad"), awkward, var=["measured", "imputed_dispersion"],
         uns=["imputed"])  # fmt: skip


def test_a_table_of_counts_alone_gets_no_invented_columns(awkward, tmp_path):
    counts = pd.DataFrame(awkward.X.toarray().astype(int), awkward.obs_names, awkward.var_names)
    counts.to_csv(tmp_path / "in.csv")
    run("impute", f"input={tmp_path}/in.csv", f"output={tmp_path}/out.h5ad")
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    assert list(found.obs.columns) == [] and list(found.obs_names) == list(awkward.obs_names)
    assert list(found.var.columns) == ["measured", "imputed_dispersion"]


# -- what no file can hold -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "said"),
    [
        ("when", pd.date_range("2020", periods=N), r"obs columns when .*\['when'\]\.astype"),
        ("score", pd.array([1.5] * N, "Float64"), r"obs columns score .*\['score'\]\.astype"),
        ("a/b", 1, "obs columns a/b .*slash"),
        (3, 1, "obs columns 3 .*numbers"),
    ],
)
@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_a_column_that_no_file_holds_is_named_before_work(
    awkward, tmp_path, monkeypatch, column, values, said, ending
):
    monkeypatch.setattr("genemodel.imputation.model.ImputationModel.train", None)
    adata = awkward.copy()
    adata.obs[column] = values
    with pytest.raises(DataError, match=said):
        gm.impute(adata, output=tmp_path / f"o.{ending}", settings=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_two_columns_of_one_name_and_odd_notes_are_named(awkward, tmp_path):
    twice = awkward.copy()
    twice.obs = pd.concat([twice.obs, twice.obs[["p_A"]]], axis=1)
    with pytest.raises(DataError, match="obs has several columns of the name 'p_A'"):
        gm.impute(twice, output=tmp_path / "o.h5ad", settings=QUICK)
    odd = awkward.copy()
    odd.uns["model"] = object()
    with pytest.raises(DataError, match=r"uns\['model'\] of the input cannot be written"):
        gm.impute(odd, output=tmp_path / "o.h5ad", settings=QUICK)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["h5ad", "zarr"])
def test_of_a_file_with_genes_as_rows_the_tables_change_places(awkward, file, tmp_path, ending):
    path = tmp_path / f"turned.{ending}"
    turned = awkward.T.copy()
    if ending == "h5ad":
        turned.write_h5ad(path, convert_strings_to_categoricals=False)
    else:
        turned.write_zarr(path, convert_strings_to_categoricals=False)
    source = replace(open_source(file), kind=f"{ending}, turned")
    with h5py.File(tmp_path / "out.h5ad", "w") as root:
        copy_annotations(path, source, root)
    source.close()
    kept(ad.read_h5ad(tmp_path / "out.h5ad"), awkward)
    kept(read_annotations(path, source), awkward)
