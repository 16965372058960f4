"""Batch and donor of 10x samples, whose folders carry no obs columns: a sheet, or their names."""

import pytest
import scipy.io

from genemodel.cells.sources import open_source
from genemodel.command.cli import main
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError


def tenx(cells, folder, suffixes=("1",)):
    folder.mkdir(parents=True)
    scipy.io.mmwrite(folder / "matrix.mtx", cells.X.T.tocoo().astype(int), field="integer")
    names = [f"{n:08d}-{suffixes[n % len(suffixes)]}" for n in range(cells.n_obs)]
    (folder / "barcodes.tsv").write_text("\n".join(names))
    (folder / "genes.tsv").write_text("\n".join(cells.var_names))
    return folder


@pytest.fixture
def samples(make_cells, tmp_path):
    inside = "outs/filtered_feature_bc_matrix"
    return [tenx(make_cells(12, seed=n), tmp_path / f"p{n}" / inside) for n in (1, 2)]


def test_a_folder_is_a_batch_of_a_donor_named_like_it(samples, vocabulary, tmp_path):
    corpus = Corpus.build(samples, tmp_path / "c", vocabulary=vocabulary, species="human")
    obs = corpus.obs()
    for column in ("dataset", "batch", "donor"):
        assert obs[column].value_counts().to_dict() == {
            "p1/outs/filtered_feature_bc_matrix": 12, "p2/outs/filtered_feature_bc_matrix": 12,
        }  # fmt: skip
    assert any("batch and donor are the sample" in w for w in corpus.describe().warnings)


def test_a_sheet_says_whose_they_are(samples, vocabulary, tmp_path, capsys):
    vocabulary.save(tmp_path / "genes.tsv")
    rows = ["path\tbatch\tdonor\ttissue"]
    rows += [f"{path.relative_to(tmp_path)}\t\tP{n}\tlung" for n, path in enumerate(samples)]
    (tmp_path / "sheet.tsv").write_text("\n".join(rows))
    command = [
        "corpus", "build", f"sheet={tmp_path}/sheet.tsv", f"vocabulary={tmp_path}/genes.tsv",
        "species=human",
    ]  # fmt: skip
    assert main([*command, f"out={tmp_path}/c"]) == 0
    obs = Corpus.open(tmp_path / "c").obs()
    assert obs["donor"].tolist() == ["P0"] * 12 + ["P1"] * 12
    assert set(obs["tissue"]) == {"lung"} and obs["batch"].nunique() == 2
    rows[0] = "path\tdonor_key\tdonor\ttissue"
    (tmp_path / "sheet.tsv").write_text("\n".join(row.replace("\t\t", "\tx\t") for row in rows))
    assert main([*command, f"out={tmp_path}/d"]) == 2
    assert "leave one of them empty" in capsys.readouterr().err


def test_joined_libraries_are_batches_of_donors_unknown(make_cells, tmp_path):
    source = open_source(
        tenx(make_cells(10, seed=1), tmp_path / "aggr", suffixes=("1", "2")), species="human"
    )
    assert source.obs["batch"].tolist() == ["aggr-1", "aggr-2"] * 5
    assert source.obs["donor"].isna().all()


def test_what_is_said_goes_before_the_file_and_nothing_is_made_up(make_cells, tmp_path):
    cells = make_cells(10, seed=1)
    said = open_source(cells, values={"donor": "P1"})
    assert set(said.obs["donor"]) == {"P1"} != set(open_source(cells).obs["donor"])
    bare = cells[:, :].copy()
    bare.obs = bare.obs[["species"]]
    assert open_source(bare).obs["batch"].isna().all()
    with pytest.raises(ConfigError, match="values: 'dataset' is 'x'.*batch, donor"):
        open_source(cells, values={"dataset": "x"})
