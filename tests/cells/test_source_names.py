"""No two sources of a corpus are called the same, whichever way they come."""

import shutil

import pytest

from genemodel.cells.source_names import Nameless, told_apart
from genemodel.cells.sources import open_source
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError


def names(*paths, taken=()):
    return told_apart([Nameless(path, None) for path in paths], taken)


def test_as_many_folders_as_tell_them_apart():
    a, b = "/x/p1/outs/filtered_feature_bc_matrix", "/x/p2/outs/filtered_feature_bc_matrix"
    assert names(a) == ["filtered_feature_bc_matrix"]
    assert names(a, b) == [
        "p1/outs/filtered_feature_bc_matrix", "p2/outs/filtered_feature_bc_matrix",
    ]  # fmt: skip
    assert names("/x/a/c.h5ad", "/x/b/c.h5ad", "/x/d.h5ad") == ["a/c", "b/c", "d"]
    assert names("s3://bucket/a/c.h5ad", "s3://bucket/b/c.h5ad") == ["a/c", "b/c"]
    assert len(set(names("/x/c.h5ad", "/x/c.zarr", "/x/c.csv.gz"))) == 3
    assert names("/x/a/c.h5ad", taken={"c"}) == ["a/c"]
    assert names(None, None, None) == ["AnnData", "AnnData 2", "AnnData 3"]
    assert names(None, taken={"AnnData"}) == ["AnnData 2"]


def test_two_genomes_of_one_file():
    both = [Nameless("/x/c.h5", None, genome=g) for g in ("hg19", "mm10")]
    assert len(set(told_apart(both))) == 2


def test_names_that_were_given_are_not_changed_but_refused_where_alike():
    assert told_apart([Nameless("/x/c.h5ad", "mine"), Nameless("/y/mine.h5ad", None)]) == [
        "mine", "y/mine",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'mine' is given to 2 sources.*column name of a sheet"):
        told_apart([Nameless("/x/a.h5ad", "mine"), Nameless("/x/b.h5ad", "mine")])
    with pytest.raises(ConfigError, match="'mine' is one that the corpus has already"):
        told_apart([Nameless("/x/a.h5ad", "mine")], {"mine"})


def test_files_of_one_name_and_objects_become_data_sets_of_their_own(
    make_cells, vocabulary, tmp_path
):
    for n in (1, 2, 3):
        (tmp_path / f"s{n}").mkdir()
        make_cells(20, seed=n).write_h5ad(tmp_path / f"s{n}/adata.h5ad")
    files = [tmp_path / f"s{n}/adata.h5ad" for n in (1, 2)]
    corpus = Corpus.build(files, tmp_path / "c", vocabulary=vocabulary)
    assert corpus.obs().dataset.value_counts().to_dict() == {"s1/adata": 20, "s2/adata": 20}
    corpus = corpus.append([tmp_path / "s3/adata.h5ad"])
    corpus = corpus.append([make_cells(10, seed=4), make_cells(10, seed=5)])
    corpus = corpus.append([make_cells(10, seed=6)])
    assert corpus.obs().dataset.value_counts().to_dict() == {
        "s1/adata": 20, "s2/adata": 20, "adata": 20,
        "AnnData": 10, "AnnData 2": 10, "AnnData 3": 10,
    }  # fmt: skip
    table = corpus.describe().to_frame()
    assert table.index.is_unique and len(table) == 6
    again = corpus.append([tmp_path / "s3/adata.h5ad"])
    assert len({s.name for s in again.sources}) == 7


def test_two_streams_of_one_name_are_refused(make_cells, vocabulary, tmp_path):
    both = [open_source(make_cells(10, seed=n)) for n in (1, 2)]
    with pytest.raises(ConfigError, match="'AnnData' is given to 2 sources"):
        Corpus.build(both, tmp_path / "c", vocabulary=vocabulary)


def test_a_corpus_inside_the_folder_of_its_source(make_cells, vocabulary, tmp_path):
    import scipy.io

    cells = make_cells(20)
    scipy.io.mmwrite(tmp_path / "matrix.mtx", cells.X.T.tocoo().astype(int), field="integer")
    (tmp_path / "barcodes.tsv").write_text("\n".join(cells.obs_names))
    (tmp_path / "genes.tsv").write_text("\n".join(cells.var_names))
    corpus = Corpus.build([tmp_path], tmp_path / "c", vocabulary=vocabulary, species="human")
    assert len(corpus) == 20
    shutil.rmtree(tmp_path / "c")
