import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

import genemodel
from genemodel.command import config_files

pytest.importorskip("hatchling", reason="hatchling is in the [dev] extra")


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=repository,
        check=True,
        capture_output=True,
        timeout=120,
    )
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run(
        [*pip, "--disable-pip-version-check", "--target", str(target), str(wheel)],
        check=True,
        capture_output=True,
        timeout=120,
    )
    return target


def _outside(
    code: str, installed: Path, repository: Path, cwd: Path
) -> subprocess.CompletedProcess:
    """Run code with the installed package and with no way to the checkout."""
    start = (
        "import sys, os\n"
        f"sys.path = [{str(installed)!r}] + [p for p in sys.path if p and "
        f"os.path.realpath(p) != {str(repository)!r}]\n"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "import genemodel\n"
        f"assert genemodel.__file__.startswith({str(installed)!r}), genemodel.__file__\n"
    )
    return subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )


def test_an_experiment_composes_from_an_installed_wheel(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    done = _outside(
        "import json\n"
        "from genemodel.command.config_files import compose, config_folder\n"
        "values = compose('pretrain', ['experiment=pretrain_base', 'seed=3'])\n"
        "print(json.dumps([str(config_folder()), values]))\n",
        installed,
        repository,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    folder, values = json.loads(done.stdout)
    assert folder == str(installed / "genemodel" / "configs")
    assert values["seed"] == 3
    assert values["model"]["layers"] == 12
    assert values["trainer"]["precision"] == "bf16-mixed"


def test_the_command_of_an_installed_wheel_answers(
    installed: Path, repository: Path, tmp_path: Path
) -> None:
    done = _outside(
        "from genemodel.command.cli import main\nraise SystemExit(main(['pretrain', '--help']))\n",
        installed,
        repository,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "model.width=256" in done.stdout
    assert (installed / "bin" / "genemodel").is_file()


def test_the_wheel_holds_every_file_the_package_reads(wheel: Path, repository: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    configs = repository / "configs"
    for file in configs.rglob("*.yaml"):
        assert f"genemodel/configs/{file.relative_to(configs)}" in inside
    for file in (repository / "genemodel").rglob("*"):
        if file.is_file() and "__pycache__" not in file.parts:
            assert str(file.relative_to(repository)) in inside
    assert not [name for name in inside if name.startswith(("tests/", "scripts/", "docs/"))]
    assert [name for name in inside if name.endswith("licenses/LICENSE")]


def test_the_version_has_one_source(wheel: Path) -> None:
    assert f"genemodel-{genemodel.__version__}-" in wheel.name
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA"))
    text = zipfile.ZipFile(wheel).read(metadata).decode()
    assert f"\nVersion: {genemodel.__version__}\n" in text
    assert "Requires-Python: >=3.12" in text


def _project(repository: Path) -> dict[str, Any]:
    return tomllib.loads((repository / "pyproject.toml").read_text())["project"]


def _pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {_normal(name): version for name, version in pins.items()}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_are_lower_bounds_and_each_has_an_exact_version(repository: Path) -> None:
    from packaging.requirements import Requirement

    project, pins = _project(repository), _pins(repository)
    wanted = [*project["dependencies"]]  # type: ignore[misc]
    for extra in project["optional-dependencies"].values():  # type: ignore[attr-defined]
        wanted += extra
    for text in wanted:
        requirement = Requirement(text)
        assert [clause.operator for clause in requirement.specifier] == [">="], text
        assert pins[_normal(requirement.name)] in requirement.specifier, text
    assert pins["torch"] == "2.13.0"


def test_constraints_are_exact_and_name_no_place(repository: Path) -> None:
    for line in (repository / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!+]+", line), line


def test_continuous_integration_runs_on_every_python_that_is_promised(repository: Path) -> None:
    project = _project(repository)
    kind = "Programming Language :: Python :: 3."
    promised = {c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith(kind)}
    assert project["requires-python"] == f">={min(promised, key=_as_numbers)}"
    workflow = yaml.safe_load((repository / ".github/workflows/test.yml").read_text())
    tests = workflow["jobs"]["test"]
    assert set(tests["strategy"]["matrix"]["python"]) == promised
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    said = [step["run"] for step in steps if "run" in step]
    assert "./scripts/test" in said and "./scripts/docs" in said
    extras = re.search(r'ensure_environment "([^"]+)"', "".join(said))
    assert extras and f"{extras[0]}\n" in (repository / "scripts/test").read_text()
    assert set(extras[1].split(",")) <= set(project["optional-dependencies"])
    # The Python that was asked for is the one that is used.
    python = "${{ steps.python.outputs.python-path }}"
    assert all(step["env"]["GENEMODEL_PYTHON"] == python for step in steps if "run" in step)


def _as_numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")]


def test_the_conda_recipe_requires_what_the_package_does(repository: Path) -> None:
    project = _project(repository)
    recipe = yaml.safe_load((repository / "recipe/recipe.yaml").read_text())
    assert recipe["context"]["version"] == genemodel.__version__
    named = {"torch": "pytorch", "matplotlib": "matplotlib-base"}  # as conda-forge calls them
    wanted = {"python": project["requires-python"]}
    for text in project["dependencies"]:
        name, bound = re.fullmatch(r"([\w-]+)(>=[\d.]+)", text).groups()  # type: ignore[union-attr]
        wanted[named.get(name, name)] = bound
    assert dict(line.split(" ") for line in recipe["requirements"]["run"]) == wanted
    ((command, entry),) = project["scripts"].items()
    assert recipe["build"]["python"]["entry_points"] == [f"{command} = {entry}"]
    assert recipe["about"]["summary"] == project["description"]
    assert recipe["about"]["license"] == project["license"]


def test_the_image_is_built_from_the_exact_versions_and_is_nobodys_root(repository: Path) -> None:
    lines = (repository / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    lines = [line for line in lines if line and not line.startswith("#")]
    assert "ARG PYTHON=3.12" in lines  # on which constraints.txt was resolved
    installs = [part for line in lines for part in line.split("pip install")[1:]]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in part for part in installs)
    users = [line for line in lines if line.startswith("USER ")]
    assert (
        users
        and users[-1] != "USER root"
        and lines.index(users[-1])
        > max(n for n, line in enumerate(lines) if line.startswith("RUN "))
    )
    copied = [
        word for line in lines if line.startswith("COPY ") and "--from" not in line
        for word in line.split()[1:-1]
    ]  # fmt: skip
    kept = (repository / ".dockerignore").read_text()
    for name in copied:
        assert (repository / name).exists() and f"\n!{name}\n" in kept, name


def test_the_checkout_uses_its_own_configs(repository: Path) -> None:
    assert config_files.config_folder() == repository / "configs"


def test_scripts_can_be_run(repository: Path) -> None:
    for name in ("scripts/demo", "scripts/test", ".ci/run"):
        assert os.access(repository / name, os.X_OK), name
        subprocess.run(["bash", "-n", str(repository / name)], check=True)


def _ensure_environment(repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f'. "{repository}/scripts/environment.sh"; ensure_environment ""'],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
    )


def test_set_up_refuses_a_python_that_is_too_old(repository: Path, tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = _ensure_environment(
        repository, GENEMODEL_PYTHON=str(old), GENEMODEL_VENV=str(tmp_path / "venv")
    )
    assert done.returncode == 2
    assert "does not run as Python >= 3.12" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_set_up_leaves_a_folder_that_is_not_its_own(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    done = _ensure_environment(repository, GENEMODEL_VENV=str(tmp_path))
    assert done.returncode == 2
    assert "was not made by these scripts" in done.stderr
    assert (tmp_path / "thesis.txt").exists()
