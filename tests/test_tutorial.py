"""The notebook under docs: its text is the one source, and it runs, small, without a screen."""

import copy
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebook needs genemodel[dev]")
nbclient = pytest.importorskip("nbclient", reason="the notebook needs genemodel[dev]")
pytest.importorskip("ipykernel", reason="the notebook needs genemodel[dev]")
pytest.importorskip("scib_metrics", reason="gm.evaluate scores with genemodel[bench]")

# Without labels the metrics need no compilation, which would take longer than all the rest.
SMALL = {
    "n_cells": 320,
    "n_genes": 400,
    "n_cell_types": 3,
    "steps": 30,
    "draws": 2,
    "judged_by": None,
}
N_FIGURES = 9


@pytest.fixture(scope="module")
def notebook(repository: Path):
    return nbformat.read(repository / "docs" / "tutorial.ipynb", as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _figures(notebook):
    return [
        output["data"]["image/png"]
        for cell in _code(notebook)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]


def test_it_is_kept_with_its_outputs_and_says_nothing_of_where_it_was_run(notebook, repository):
    assert len(_figures(notebook)) == N_FIGURES
    assert [cell.execution_count for cell in _code(notebook)] == list(
        range(1, len(_code(notebook)) + 1)
    )
    assert (repository / "docs" / "tutorial.ipynb").stat().st_size < 1.5e6
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags"}
    for output in (output for cell in _code(notebook) for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output["text"]
        words = str(output.get("text", "")) + str(
            {kind: data for kind, data in output.get("data", {}).items() if "image" not in kind}
        )
        assert not re.search(r"/(home|root|tmp|work|opt|usr|Users)/|\d{4}-\d\d-\d\d", words)


@pytest.mark.slow
def test_it_runs_small(notebook, tmp_path):
    small = copy.deepcopy(notebook)
    parameters = [cell for cell in small.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(parameters) == 1
    for name, value in SMALL.items():
        line = rf"(?m)^{name} = .*$"
        assert len(re.findall(line, parameters[0].source)) == 1, name
        parameters[0].source = re.sub(line, f"{name} = {value!r}", parameters[0].source)
    for cell in _code(small):
        cell.outputs, cell.execution_count = [], None
    client = nbclient.NotebookClient(small, timeout=120, resources={"metadata": {"path": tmp_path}})
    client.execute()
    assert len(_figures(small)) == N_FIGURES
    printed = "".join(
        output["text"]
        for cell in _code(small)
        for output in cell.outputs
        if output.get("name") == "stdout"
    )
    assert "the loaded model gives the same: True" in printed
    assert not list(tmp_path.iterdir()), "it leaves nothing behind"
