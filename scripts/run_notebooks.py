"""Executes the notebooks of the documentation in full and stores their outputs.

    python scripts/run_notebooks.py [NAME ...]

Progress bars are not stored. What else goes to stderr is printed here, to be looked at, and not
stored either; nor is when and where it ran.
"""

import sys
import tempfile
import time
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
TIMEOUT_SECONDS = 3600


def kept(output: nbformat.NotebookNode) -> bool:
    """Whether a reader is shown it: no progress bar, no widget without its page."""
    widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return not widget and output.get("name") != "stderr"


def run(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        nbclient.NotebookClient(notebook, timeout=TIMEOUT_SECONDS, resources=resources).execute()
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        for output in cell.outputs:
            if output.get("name") == "stderr" and "\r" not in output["text"]:  # no progress bar
                print(f"{path.stem}, cell {number}, stderr: {output['text'][-2000:]}")
        cell.outputs = [output for output in cell.outputs if kept(output)]
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    nbformat.write(notebook, path)
    size, seconds = path.stat().st_size / 1e6, time.perf_counter() - begin
    print(f"{path.stem}: {seconds:.0f} s, {size:.2f} MB", flush=True)


def main(names: list[str]) -> None:
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not names or path.stem in names:
            run(path)


if __name__ == "__main__":
    main(sys.argv[1:])
