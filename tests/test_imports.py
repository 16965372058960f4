import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path

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
    loaded, seconds = _loaded(f"from genemodel.command.cli import main; main([{words}])")
    assert not loaded & HEAVY
    assert seconds < 2


# What trains brings the library that it trains with.
TRAINING = {"pretrain", "finetune", "FinetuneSettings", "ablate", "AblateSettings"}


def test_every_public_name_is_there_and_brings_no_training_library() -> None:
    names = [name for name in genemodel.__all__ if name not in {"__version__", *TRAINING}]
    loaded, _ = _loaded(
        "import genemodel\n"
        f"for name in {names!r}:\n"
        "    assert getattr(genemodel, name) is not None\n"
        "    assert name in dir(genemodel)\n"
    )
    assert not loaded & {"lightning", "scanpy", "hydra", "wandb", "scvi"}


def test_what_trains_is_public_whichever_module_was_imported_before() -> None:
    """A module of a public name's own name would take its place once it is imported."""
    _fresh(
        "import importlib, inspect, genemodel\n"
        "for module, attribute in genemodel._PUBLIC.values(): importlib.import_module(module)\n"
        "for name, (module, attribute) in genemodel._PUBLIC.items():\n"
        "    found = getattr(genemodel, name)\n"
        "    assert inspect.ismodule(found) == (not attribute), name\n"
        "    assert found.__name__.endswith(attribute), name\n"
    )


def test_editors_see_what_is_reached_on_first_use() -> None:
    """The imports for type checkers, the table and ``__all__`` are one list."""
    tree = ast.parse(Path(genemodel.__file__).read_text(encoding="utf-8"))
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    table = {
        name: f"{module}.{attribute}".rstrip(".")
        for name, (module, attribute) in genemodel._PUBLIC.items()
    }
    assert seen == table
    assert sorted(genemodel.__all__) == sorted([*table, "__version__"])


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'embbed'"):
        genemodel.embbed  # noqa: B018


def test_names_of_the_version_before_are_still_there() -> None:
    from genemodel.adapt.integration_net import IntegrationSettings
    from genemodel.cli import main
    from genemodel.command import cli

    assert main is cli.main
    assert IntegrationSettings is genemodel.IntegrationSettings
