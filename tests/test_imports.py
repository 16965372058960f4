import json
import os
import subprocess
import sys
import time

import pytest

import genemodel

HEAVY = {"lightning", "scanpy", "hydra", "wandb", "torch", "anndata", "pandas", "matplotlib"}


def _fresh(code: str) -> tuple[str, float]:
    """Run code in a new interpreter; give what it printed and how long all of it took."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - start


def _loaded(code: str) -> tuple[set[str], float]:
    printed, seconds = _fresh(
        f"{code}\nimport sys, json\n"
        "print('|' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    return set(json.loads(printed.rpartition("|")[2])), seconds


def test_importing_the_package_is_light() -> None:
    loaded, seconds = _loaded("import genemodel; dir(genemodel)")
    assert not loaded & HEAVY
    assert seconds < 4


@pytest.mark.parametrize("words", ["'--help'", "'pretrain', '--help'", "'corpus'"])
def test_help_answers_quickly_and_imports_nothing_heavy(words: str) -> None:
    loaded, seconds = _loaded(f"from genemodel.cli import main; main([{words}])")
    assert not loaded & HEAVY
    assert seconds < 2


def test_every_public_name_is_there_and_brings_no_training_library() -> None:
    names = [name for name in genemodel.__all__ if name != "__version__"]
    loaded, _ = _loaded(
        "import genemodel\n"
        f"for name in {names!r}:\n"
        "    assert getattr(genemodel, name) is not None\n"
        "    assert name in dir(genemodel)\n"
    )
    assert not loaded & {"lightning", "scanpy", "hydra", "wandb", "scvi"}


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'embbed'"):
        genemodel.embbed  # noqa: B018
