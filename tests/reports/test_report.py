"""The page is one file, says what it was given, and lets nothing through unescaped."""

import base64
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from genemodel.errors import ConfigError, DataError
from genemodel.reports.demo import (
    embedding_scores,
    objective_table,
    write_demo_report,
)
from genemodel.reports.page import Report, number_text


class _Reader(HTMLParser):
    """Collects tags, attributes that load something, and text; knows whether tags close."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.seen: list[str] = []
        self.words = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "action", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def figure() -> plt.Figure:
    drawn, ax = plt.subplots(figsize=(2, 1))
    ax.plot([0, 1])
    return drawn


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"), (12.3456, "12.35"), (128.456, "128.5"), (1234.5, "1,234"),
        (12345, "12,345"), (0.00001, "1.0e-05"), (-0.5, "−0.500"), (-12345, "−12,345"),
        (float("nan"), "–"), (None, "–"), (float("-inf"), "−∞"), (True, "yes"), (0.0, "0"),
        ("a<b", "a<b"), (np.float32(0.25), "0.250"), (np.int64(7), "7"), (-0.0001, "−1.0e-04"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_readers(value, text):
    assert number_text(value) == text


def test_numbers_of_one_column_share_their_decimals():
    assert [number_text(v, beside=25.5) for v in (25.5, 9.123, 0.0004, -0.0004)] == [
        "25.50",
        "9.12",
        "0.00",
        "0.00",
    ]


def test_the_page_is_self_contained_and_well_formed(tmp_path):
    report = (
        Report("Title", "below").section("One").text("first\n\nsecond").figure(figure(), "A line")
    )
    report.table(pd.DataFrame({"x": [1.0]})).settings({"a": {"b": 1}})
    path = report.write(tmp_path / "deep" / "report.html")
    reader = read(path.read_text(encoding="utf-8"))
    assert "script" not in reader.seen and "link" not in reader.seen
    assert all(load.startswith(("data:image/", "#")) for load in reader.loads)
    assert {"first", "second"} <= set(re.findall("first|second", reader.words))
    assert "http" not in "".join(reader.loads)
    assert list(tmp_path.joinpath("deep").iterdir()) == [path]


def test_everything_is_escaped():
    evil = '<script>alert("x")</script>'
    page = (
        Report(evil, evil)
        .section(evil)
        .text(evil)
        .preformatted(evil)
        .table(pd.DataFrame({evil: [evil]}, index=[evil]), evil)
        .figure(figure(), evil)
        .settings({evil: evil})
        .html()
    )
    reader = read(page)
    assert "script" not in reader.seen
    assert reader.words.count(evil) >= 8


def test_the_image_in_the_page_is_the_figure():
    page = Report("t").figure(figure()).html()
    data = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", page)[1])
    assert data.startswith(b"\x89PNG")
    wide = int.from_bytes(data[16:20], "big")
    assert f'width="{round(wide * 96 / 160)}"' in page


def test_figures_are_closed_and_axes_are_accepted():
    before = len(plt.get_fignums())
    drawn = figure()
    Report("t").figure(drawn.axes[0]).figure(np.array([figure().axes[0]]))
    assert len(plt.get_fignums()) == before


def test_tables_mark_the_best():
    table = pd.DataFrame(
        {"score": [0.5, 0.7], "time": [2.0, 1.0], "note": ["x", "y"]}, index=["a", "b"]
    )
    page = Report("t").table(table, best={"score": "high", "time": "low"}).html()
    row = re.search(r"<tr><td>b</td>.*?</tr>", page)[0]
    assert row.count('class="best"') == 2 and 'class="words">y' in row
    assert 'class="best"' not in re.search(r"<tr><td>a</td>.*?</tr>", page)[0]


def test_a_control_is_never_the_best():
    table = pd.DataFrame({"score": [0.5, 0.7, np.nan]}, index=["a", "random", "b"])
    page = Report("t").table(table, best={"score": "high"}, never_best=["random"]).html()
    assert 'class="best"' not in re.search(r"<tr><td>random</td>.*?</tr>", page)[0]
    page = Report("t").table(table.T, best={}, never_best=["score"]).html()
    assert 'class="best"' not in page
    three = pd.DataFrame({"score": [0.5, 0.7, 0.6]}, index=["a", "random", "b"])
    page = Report("t").table(three, best={"score": "high"}, never_best=["random"]).html()
    assert 'class="best"' in re.search(r"<tr><td>b</td>.*?</tr>", page)[0]
    assert page.count('class="best"') == 1


def test_a_figure_has_its_drawing_behind_a_link_and_a_wide_one_is_not_shrunk():
    drawn, ax = plt.subplots(figsize=(2, 1))
    ax.set_title("words to edit")
    page = Report("t").figure(drawn, "A line").html()
    vector = base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^\"]+)", page)[1]).decode()
    assert vector.startswith("<?xml") and ">words to edit</text>" in vector
    assert 'download="figure-1.svg"' in page and "<figure>" in page
    wide = Report("t").figure(plt.subplots(figsize=(20, 1))[0]).html()
    assert '<figure class="wide">' in wide


def test_packages_are_told_and_settings_are_folded():
    report = Report("t").section("One").text("x").packages({"harmonypy": "2.0.0"})
    page = report.settings({"seed": 3}).html()
    assert "harmonypy 2.0.0" in read(page).words
    assert (
        page.index("<summary>1 settings") < page.index("<td>seed</td>") < page.index("</details>")
    )


def test_contents_link_to_sections_and_the_making_is_told():
    page = Report("t").section("Alpha").text("x").section("Beta").settings({"seed": 3}).html()
    assert re.findall(r'<a href="#(s\d)">([^<]+)</a>', page) == [
        ("s0", "Alpha"),
        ("s1", "Beta"),
        ("s2", "How this was made"),
    ]
    assert all(f'id="s{i}"' in page for i in range(3))
    words = read(page).words
    assert "genemodel 0." in words and "numpy" in words and "seed3" in words


def test_refusals(tmp_path):
    with pytest.raises(DataError, match="is a directory; name the file"):
        Report("t").write(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        Report("t").write(tmp_path / "file" / "report.html")
    with pytest.raises(ConfigError, match="got a str"):
        Report("t").figure("figure.png")
    with pytest.raises(ConfigError, match="names the column 'z'; the table has x"):
        Report("t").table(pd.DataFrame({"x": [1]}), best={"z": "high"})
    plt.close("all")


# -- the demo's report -------------------------------------------------------------------------


@pytest.fixture
def run() -> dict[str, object]:
    rng = np.random.default_rng(0)
    n = 120
    kind = rng.integers(0, 2, n)
    obs = pd.DataFrame(
        {
            "cell_type": np.where(kind, "a", "b"),
            "species": ["human"] * 60 + ["mouse"] * 60,
            "batch": [f"h{i % 2}" for i in range(60)] + [f"m{i % 2}" for i in range(60)],
        }
    )
    steps = np.arange(10, 60, 10)
    return {
        "curves": pd.DataFrame({"step": steps, "train/masked_gene": 7 - steps / 50, "lr": 0.1}),
        "validation": pd.DataFrame(
            {
                "step": [25, 50],
                "val/masked_gene": [7.0, 6.0],
                "val/decode_counts": [0.7, 0.6],
                "val_trivial/masked_gene": [6.5, 6.5],
                "val_trivial/decode_counts": [0.5, 0.5],
                "val/total": [8.0, 7.0],
            }
        ),
        "embeddings": {
            "genemodel": rng.normal(size=(n, 4)) + 8 * kind[:, None],
            "random weights": rng.normal(size=(n, 4)),
            "PCA": rng.normal(size=(n, 4)) + 8 * kind[:, None],
        },
        "obs": obs,
        "corpus_text": "120 cells",
        "settings": {"model": {"width": 4}},
        "held_out_by": "donor",
    }


def test_objectives_are_those_of_the_last_validation(run):
    table = objective_table(run["validation"])
    assert table.loc["masked_gene", ["held_out", "trivial"]].tolist() == [6.0, 6.5]
    assert table.loc["decode_counts", "ratio"] == pytest.approx(1.2)
    assert table.loc["masked_gene", "unit"] == "nats per hidden gene"
    with pytest.raises(DataError, match="has no rows"):
        objective_table(run["validation"].iloc[:0])


def test_scores_separate_a_good_from_a_random_embedding(run):
    table = embedding_scores(run["embeddings"], run["obs"])
    assert (
        table.loc["genemodel", "knn_accuracy"]
        > 0.99
        > 0.75
        > table.loc["random weights", "knn_accuracy"]
    )
    assert table.loc["genemodel", "accuracy_across_species"] > 0.99
    assert table.loc["genemodel", "same_batch_ratio"] == pytest.approx(1.0, abs=0.2)
    bare = embedding_scores(run["embeddings"], run["obs"][[]])
    assert list(bare.columns) == ["effective_rank", "mean_cosine"]


def test_the_demo_report_tells_what_happened(run, tmp_path):
    report = write_demo_report(tmp_path / "report.html", **run)
    reader = read(report.path.read_text(encoding="utf-8"))
    assert reader.seen.count("img") == 3
    assert (
        "1 of 2 objectives beat the best trivial predictor of the same quantity: masked gene"
        in (reader.words)
    )
    assert "120 held-out cells (by donor), 50 training steps" in reader.words
    assert all(
        word in reader.words for word in ("random weights", "PCA", "120 cells", "model.width")
    )
    assert "masked_gene" in report.to_string() and "knn_accuracy" in report.to_string()


def test_a_demo_without_labels_still_reports(run, tmp_path):
    report = write_demo_report(
        tmp_path / "r.html", **{**run, "obs": run["obs"][[]], "held_out_by": "", "settings": None}
    )
    words = read(report.path.read_text(encoding="utf-8")).words
    assert "nothing to colour" in words and "cells the model was trained on" in words


def test_embeddings_of_other_cells_are_refused(run, tmp_path):
    with pytest.raises(DataError, match="'genemodel' has 120 cells and obs has 119"):
        write_demo_report(tmp_path / "r.html", **{**run, "obs": run["obs"].iloc[1:]})


def test_a_demo_of_one_batch_a_species_has_no_section_without_a_table(run, tmp_path):
    obs = run["obs"].assign(batch=run["obs"]["species"].astype(str))
    for name, given in (("with", run["obs"]), ("without", obs)):
        page = write_demo_report(
            tmp_path / f"{name}.html", **{**run, "obs": given}
        ).path.read_text()
        sections = re.findall(r"<section>(.*?)</section>", page, re.DOTALL)
        by_type = [section for section in sections if "cell type by cell type" in section]
        assert len(by_type) == (name == "with")
        assert all("<table>" in section for section in by_type)
