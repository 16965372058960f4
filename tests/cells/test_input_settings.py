"""How cells are read, said in one place: each setting at the readers themselves."""

import inspect

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from genemodel.cells.input_settings import NAMES, InputOptions, InputSettings, reads_cells
from genemodel.cells.sources import open_source
from genemodel.cells.whole_file import read_anndata
from genemodel.errors import ConfigError, DataError
from genemodel.settings import parse, to_values


def counts_of(source):
    with source:
        return sp.vstack([c.counts_CG for c in source.chunks(7)]).toarray()


def test_settings_as_a_command_line_gives_them():
    found = parse(InputSettings, {"layer": "", "species": 9606, "missing_labels": ["doublet"]})
    assert found == InputSettings(species="9606", missing_labels=("doublet",))
    assert found.changed == ["species", "missing_labels"]
    assert parse(InputSettings, to_values(found)) == found
    assert InputSettings.given({"species": 9606, "missing_labels": ["doublet"]}) == found
    assert set(found.opening()) | {"min_fraction"} == set(NAMES)
    with pytest.raises(ConfigError, match="'layer' must be a text or null, not the whole number"):
        parse(InputSettings, {"layer": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_fraction": 1.5}, "min_fraction is 1.5: it must be between 0 and 1"),
        ({"missing_labels": ("-B cell",)}, "'B cell' does not stand for a missing value"),
    ],
)
def test_impossible_values_are_refused_at_once(values, message):
    with pytest.raises(ConfigError, match=message):
        InputSettings(**values)


def test_a_call_shows_them_in_its_signature_and_help():
    @reads_cells
    def look(adata, *, k: int = 3, **options):
        """Look.

        Parameters
        ----------
        adata
            Cells.
        **options
            How the cells are read.

        Returns
        -------
        Nothing.
        """

    assert list(inspect.signature(look).parameters) == ["adata", "k", *NAMES]
    assert list(InputOptions.__annotations__) == list(NAMES)
    text = look.__doc__
    assert "\nlayer\n    Where the raw counts are" in text and "**options" not in text
    assert text.index("\nmissing_labels\n") < text.index("\nReturns\n-------\nNothing.")


@pytest.mark.parametrize("layout", ["csr", "csc", "dense", "zarr"])
def test_a_stored_object_is_turned(layout, make_cells, tmp_path):
    cells = make_cells(30)
    cells.layers["log"] = cells.X.log1p()
    expected = cells.X.toarray()
    turned = cells.T.copy()
    turned.X = {"csc": sp.csc_matrix, "dense": lambda x: x.toarray()}.get(layout, sp.csr_matrix)(
        turned.X
    )
    path = tmp_path / ("x.zarr" if layout == "zarr" else "x.h5ad")
    turned.write_zarr(path) if layout == "zarr" else turned.write_h5ad(path)
    with open_source(path, transpose=True) as source:
        assert source.kind.endswith(", turned")
        assert list(source.obs.index) == list(cells.obs_names)
        assert set(source.obs["cell_type"]) == {"T cell", "B cell"}
        assert list(source.genes.index) == list(cells.var_names)
        np.testing.assert_array_equal(counts_of(source), expected)
    adata, rest = read_anndata(path, InputSettings(transpose=True, layer="X"))
    assert rest == InputSettings(layer="X")
    np.testing.assert_array_equal(sp.csr_matrix(adata.X).toarray(), expected)


def test_who_is_turned_or_not_is_told_what_to_do(make_cells, vocabulary, tmp_path):
    from genemodel.genes.vocabulary import GeneVocabulary

    genes = GeneVocabulary.builtin().genes
    symbols = genes[(genes["species"] == "human") & (genes["symbol"] != "")]["symbol"].iloc[:200]
    cells = make_cells(30)
    cells.var_names = list(symbols.astype(str))
    cells.write_h5ad(tmp_path / "right.h5ad")
    cells.T.copy().write_h5ad(tmp_path / "turned.h5ad")
    pd.DataFrame(cells.X.toarray(), cells.obs_names, cells.var_names).to_csv(tmp_path / "right.csv")
    for read in (open_source, lambda path, **how: read_anndata(path, InputSettings(**how))):
        with pytest.raises(DataError, match="its rows are genes. Turn it: transpose=true"):
            read(tmp_path / "turned.h5ad", species="human")
        for name in ("right.h5ad", "right.csv"):
            with pytest.raises(DataError, match="its rows are genes. Leave transpose out"):
                read(tmp_path / name, species="human", transpose=True)
    with pytest.raises(ConfigError, match=r"turns with adata = adata\.T"):
        open_source(cells, transpose=True)


def test_what_says_itself_which_side_is_genes_is_not_turned(make_cells, tmp_path):
    cells = make_cells(30)
    with h5py.File(tmp_path / "x.loom", "w") as file:
        file["matrix"] = cells.X.toarray().T
        file.create_group("row_attrs")["Accession"] = np.array(list(cells.var_names), "S")
        file.create_group("col_attrs")["CellID"] = np.array(list(cells.obs_names), "S")
    with pytest.raises(ConfigError, match="a loom source says which of its sides.*leave it out"):
        open_source(tmp_path / "x.loom", species="human", transpose=True)


def test_a_column_of_var_and_a_genome_in_any_kind(make_cells, tmp_path):
    cells = make_cells(30)
    names = list(cells.var_names)
    cells.var = pd.DataFrame(
        {"right": names, "genome": ["GRCh38"] * 150 + ["mm10"] * 50},
        index=[str(n) for n in range(len(names))],
    )
    cells.write_h5ad(tmp_path / "x.h5ad")
    for data in (cells, tmp_path / "x.h5ad"):
        with open_source(data, column="right", genome="GRCh38") as source:
            assert list(source.genes.index) == names[:150] and source.column == "right"
            np.testing.assert_array_equal(counts_of(source), cells.X[:, :150].toarray())
        with open_source(data, column="index") as source:
            assert list(source.genes.index[:2]) == ["0", "1"]
        with pytest.raises(DataError, match="no column 'wrong' .column=wrong.; it has right, geno"):
            open_source(data, column="wrong")
        with pytest.raises(DataError, match="no genome 'hg19'; it has GRCh38, mm10. Set genome= "):
            open_source(data, genome="hg19")
    with pytest.raises(DataError, match="it has no genome names"):
        open_source(make_cells(30), genome="hg19")
    # Where the counts are of raw, so is the column.
    whole = ad.AnnData(cells.X, obs=cells.obs, var=cells.var)
    whole.raw = whole
    whole = whole[:, :20].copy()
    with open_source(whole, layer="raw", column="right") as source:
        assert list(source.genes.index) == names
