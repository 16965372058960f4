import re
import xml.etree.ElementTree as ElementTree
from base64 import b64decode

import numpy as np
import pytest

from genemodel.corpus.corpus import Corpus


@pytest.fixture(scope="module")
def corpus(make_cells, vocabulary, tmp_path_factory):
    good = make_cells(60, seed=1)
    empty = make_cells(60, seed=2, species="mouse")
    empty.X[:20] = 0
    unknown = make_cells(10, seed=3)
    unknown.obs["donor"] = "unknown"
    unknown.obs["batch"] = ["x", "y"] * 5
    unknown.obs["cell_type"] = ["T cell", "B cell"] * 5
    repeated = make_cells(60, seed=1)[:15].copy()
    sources = {"good": good, "empty": empty, "unknown": unknown, "repeated": repeated}
    out = tmp_path_factory.mktemp("report") / "corpus"
    return Corpus.build(sources, out, vocabulary=vocabulary)


@pytest.fixture(scope="module")
def report(corpus):
    return corpus.describe()


def test_the_table_says_what_happened_to_every_source(report, corpus):
    table = report.to_frame()
    assert list(table.index) == ["good", "empty", "unknown", "repeated"]
    assert list(table["kept"]) == [60, 40, 10, 15]
    assert table.loc["empty", "dropped"] == "20 empty cell"
    good = corpus.source_C == 0
    assert table.loc["good", "genes/cell median"] == np.median(corpus.n_genes_C[good])
    assert table.loc["good", "mito"] == np.median(corpus.mito_C[good] / corpus.library_C[good])
    assert (table.loc["good", "donors"], table.loc["good", "labels"]) == (3, 2)
    assert table.loc["unknown", "no donor"] == 1 and table.loc["good", "no assay"] == 1


@pytest.mark.parametrize(
    "what",
    [
        "15 cells have the same counts in both good and repeated",
        "dataset unknown: batch and cell_type are confounded",
        "empty: dropped 20 empty cell of 60 cells",
        "unknown: 10 cells only",
        "good: 200 genes only: a panel",
        "donor is missing for most cells of 1 of 4 sources: unknown",
    ],
)
def test_a_curator_is_warned(report, what):
    assert any(what in warning for warning in report.warnings)
    assert what in report.to_text()


def test_nothing_is_said_of_what_is_in_order(report):
    assert not any("dataset good" in w or "good: dropped" in w for w in report.warnings)
    assert not any("missing for most cells of 4 of 4" in w and "batch" in w
                   for w in report.warnings)  # fmt: skip


def test_the_page_stands_alone_and_its_plots_are_images(report, tmp_path):
    text = report.to_html(tmp_path / "page.html").read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    images = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', text)
    assert len(images) == 6
    for image in images:
        ElementTree.fromstring(b64decode(image))
    for warning in report.warnings:
        assert warning.split(":")[0].replace("&", "&amp;") in text
    assert text.count("<tr>") > 4


def test_names_are_escaped(make_cells, vocabulary, tmp_path):
    corpus = Corpus.build({"<b>x</b>": make_cells(20)}, tmp_path / "c", vocabulary=vocabulary)
    text = corpus.describe().to_html(tmp_path / "page.html").read_text()
    assert "<b>" not in text and "&lt;b&gt;x" in text


def test_the_share_of_counts_kept_is_that_of_the_file(make_cells, vocabulary, tmp_path):
    cells = make_cells(40, seed=4)
    names = cells.var_names.to_numpy().astype(object)
    names[:60] = [f"stranger {n}" for n in range(60)]
    cells.var_names = names
    corpus = Corpus.build({"part": cells}, tmp_path / "corpus", vocabulary=vocabulary)
    everything, kept = int(cells.X.sum()), int(cells.X[:, 60:].sum())
    report = corpus.describe()
    assert report.to_frame().loc["part", "counts kept"] == kept / everything < 0.8
    assert report.facts["counts kept"].startswith(f"{kept:,} of {everything:,} (")
    assert any("counts of its cells are of genes in the vocabulary" in w for w in report.warnings)
    assert f"{kept / everything:.1%}" in report.to_text()
    # Of a corpus that was built before this was noted nothing is claimed.
    source = corpus.sources[0]
    object.__setattr__(source, "n_counts", None)
    assert corpus.describe().facts["counts kept"] == "not noted when the corpus was built"
