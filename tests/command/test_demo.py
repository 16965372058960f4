"""The demo from end to end, small: generated cells, and a file of the user's with one batch."""

import pandas as pd
import pytest

import genemodel as gm
from genemodel.command.demo import DemoSettings, demo
from genemodel.errors import DataError
from genemodel.simulation.cells import synthetic


def test_generated_cells_to_report(tmp_path):
    out = tmp_path / "demo"
    said = demo(DemoSettings(out=str(out), cells=240, steps=3))
    for name in ("report.html", "corpus.html", "run/bundle", "run/metrics.csv"):
        assert (out / name).exists() and name.rsplit("/", 1)[-1] in said, name
    assert "masked_gene" in said and "PCA" in said and "random weights" in said
    page = (out / "report.html").read_text()
    # Both species are among the held-out cells, and have a picture of their own.
    assert "human" in page and "mouse" in page and "species" in page
    assert gm.load(out / "run" / "bundle", device="cpu").species == ("human", "mouse")


def test_a_file_with_one_batch_and_no_labels(tmp_path, small_vocabulary):
    small_vocabulary.save(tmp_path / "genes.tsv")
    adata = synthetic(
        200, species=("human",), n_batches=1, n_genes=500, genes_per_cell=100,
        vocabulary=small_vocabulary,
    )  # fmt: skip
    adata["human"].obs = pd.DataFrame(index=adata["human"].obs_names)
    adata["human"].write_h5ad(tmp_path / "mine.h5ad")
    settings = DemoSettings(
        input=(str(tmp_path / "mine.h5ad"),),
        species="human",
        out=str(tmp_path / "out"),
        steps=2,
        vocabulary=str(tmp_path / "genes.tsv"),
    )
    assert "report.html" in demo(settings)
    assert (tmp_path / "out" / "report.html").exists()


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.h5ad: no such file"):
        demo(DemoSettings(input=("nowhere.h5ad",), out=str(tmp_path / "out")))


def test_pbmc3k_without_internet_says_so(tmp_path, monkeypatch):
    import urllib.error

    import scanpy as sc

    def unreachable():
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sc.datasets, "pbmc3k", unreachable)
    with pytest.raises(DataError, match="needs the internet.*input=generated"):
        demo(DemoSettings(input=("pbmc3k",), out=str(tmp_path / "out")))
