"""The notebooks under docs are kept with their outputs, and each of them runs, small."""

import copy
import os
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the notebooks need genemodel[dev]")
nbclient = pytest.importorskip("nbclient", reason="the notebooks need genemodel[dev]")
pytest.importorskip("ipykernel", reason="the notebooks need genemodel[dev]")
run_sync = pytest.importorskip("jupyter_core.utils").run_sync
pytest.importorskip("scib_metrics", reason="gm.evaluate scores with genemodel[bench]")

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
# What each prints, small too, where something went as its text says.
SAYS = {
    "across_species": "tokens are of genes of both",
    "import_and_perturb": "58 of 58 tensors are equal to the bit",
    "integrate_annotate_impute": "the loaded model gives the same: True",
    "pretrain_finetune": "right of those answered",
    "quick_start": "AnnData, X: holds log1p of counts",
}
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
MOST_BYTES = 1.5e6


def _read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook):
    return [output for cell in _code(notebook) for output in cell.outputs]


def _figures(notebook):
    return sum("image/png" in output.get("data", {}) for output in _outputs(notebook))


def _printed(notebook):
    return "".join(
        output["text"] for output in _outputs(notebook) if output.get("name") == "stdout"
    )


def test_every_notebook_is_known():
    assert list(SAYS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_it_is_kept_with_its_outputs_and_says_nothing_of_where_it_was_run(name):
    notebook = _read(name)
    assert _figures(notebook), "a notebook shows something"
    assert SAYS[name] in _printed(notebook)
    executed = [cell.execution_count for cell in _code(notebook)]
    assert executed == list(range(1, len(executed) + 1)), "./scripts/docs notebooks runs them"
    assert (FOLDER / f"{name}.ipynb").stat().st_size < MOST_BYTES
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "small"}
    for output in _outputs(notebook):
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output["text"]
        words = str(output.get("text", "")) + str(
            {kind: data for kind, data in output.get("data", {}).items() if "image" not in kind}
        )
        assert not re.search(r"/(home|root|tmp|work|opt|usr|Users)/|\d{4}-\d\d-\d\d", words)


def _small(notebook):
    """The notebook with the values that its parameters have here."""
    small = copy.deepcopy(notebook)
    (parameters,) = [c for c in small.cells if "parameters" in c.metadata.get("tags", [])]
    for name, value in parameters.metadata["small"].items():
        line = rf"(?m)^{name} = .*$"
        assert len(re.findall(line, parameters.source)) == 1, name
        parameters.source = re.sub(line, f"{name} = {value!r}", parameters.source)
    for cell in _code(small):
        cell.outputs, cell.execution_count = [], None
    return small


@pytest.fixture(scope="module")
def kernel():
    """A kernel for all: importing what a notebook needs takes longer than running it small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER.parents[1])]))
        manager = nbclient.NotebookClient(nbformat.v4.new_notebook()).create_kernel_manager()
        run_sync(manager.start_kernel)()
    yield manager
    run_sync(manager.shutdown_kernel)(now=True)


# What a kernel that has just been started in a folder does not have to be told.
AS_IF_NEW = """
%reset -f
import os, tempfile
os.chdir({here!r})
os.environ["TMPDIR"], tempfile.tempdir = {away!r}, None
%reset -f
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_small(name, kernel, tmp_path):
    kept = _read(name)
    small = _small(kept)
    here, away = tmp_path / "here", tmp_path / "away"
    here.mkdir()
    away.mkdir()
    begin = AS_IF_NEW.format(here=str(here), away=str(away))
    small.cells.insert(0, nbformat.v4.new_code_cell(begin))
    client = nbclient.NotebookClient(small, km=kernel, timeout=300)
    client.execute()
    client.kc.stop_channels()
    assert _figures(small) == _figures(kept)
    assert SAYS[name] in _printed(small)
    assert not list(here.iterdir()), "it leaves nothing behind"
    caches = ("matplotlib", "numba", "torchinductor")  # of libraries
    left = [path.name for path in away.iterdir() if not path.name.startswith(caches)]
    assert not left, "nor in the folder for what is temporary"
