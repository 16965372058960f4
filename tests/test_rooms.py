"""The directions in which the rooms may import, read from the source and not from a run."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "genemodel"

# From the top down: a room may import itself and what stands above it.
ORDER = (
    ("errors",),
    ("settings", "writing"),
    ("expression",),
    ("genes",),
    ("cells",),
    ("simulation",),
    ("corpus",),
    ("batches",),
    ("model",),
    ("heads",),
    ("bundle",),
    ("train",),
    ("knowledge",),
    ("inference",),
    ("finetuning",),
    ("integration",),
    ("imputation",),
    ("loading",),
    ("hub",),
    ("embedding",),
    ("importers",),
    ("annotation",),
    ("perturbation",),
    ("gene_tasks",),
    ("attribution",),
    ("metrics",),
    ("networks",),
    ("trajectories",),
    ("reports",),
    ("response",),
    ("evaluation",),
    ("command",),
    ("__main__", "adapt", "cli"),  # adapt, cli: names of the version before
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}

# Library -> the rooms that may import it; a library that is not named here is free for all.
ALLOWED: dict[str, set[str]] = {
    "lightning": {"train"},
    "hydra": {"command"},
    "omegaconf": {"command"},
    "scanpy": {"metrics", "reports", "evaluation", "command"},
    "scvi": {"evaluation"},
    "scib_metrics": {"metrics", "evaluation"},
    "wandb": {"train"},
    # Whoever reads files, matches genes or writes a page needs none of it.
    "torch": set(LEVEL) - {"errors", "settings", "writing", "genes", "simulation", "reports"},
}
# Too slow to import for whoever only wants the room: only inside functions, or for type checkers.
ONLY_WHEN_USED = {
    "scanpy",
    "scvi",
    "scib_metrics",
    "wandb",
    "matplotlib",
    "umap",
    "pynndescent",
    "transformers",
    "huggingface_hub",
}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "core", "base"}


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "configs" not in path.parts)


def _room(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def _imports(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Give each imported module, its line, and whether it is imported with the file itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from _walk(tree, path, at_import=True)


def _walk(node: ast.AST, path: Path, *, at_import: bool) -> Iterator[tuple[str, int, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child.lineno, at_import
        elif isinstance(child, ast.ImportFrom):
            module = child.module or ""
            if child.level:
                package = ["genemodel", *path.relative_to(PACKAGE).parts[:-1]]
                kept = package[: len(package) - child.level + 1]
                module = ".".join([*kept, module] if module else kept)
            if module == "genemodel":
                for alias in child.names:
                    yield f"genemodel.{alias.name}", child.lineno, at_import
            else:
                yield module, child.lineno, at_import
        else:
            later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            checkers_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
            yield from _walk(child, path, at_import=at_import and not later and not checkers_only)


def test_every_room_has_its_place() -> None:
    rooms = {_room(path) for path in _files()} - {"__init__"}
    assert rooms <= set(LEVEL), "say in ORDER where the new room stands"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_room_imports_only_what_stands_above_it(path: Path) -> None:
    room = _room(path)
    if room == "__init__":  # reaches every room, but only when a name is asked for
        assert [name for name, _, now in _imports(path) if now and "genemodel" in name] == []
        return
    for name, line, _ in _imports(path):
        parts = name.split(".")
        if parts[0] != "genemodel" or len(parts) == 1 or parts[1] not in LEVEL:
            continue
        assert LEVEL[parts[1]] <= LEVEL[room], f"{path}:{line} imports {name} from below"


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_libraries_stay_in_their_rooms(path: Path) -> None:
    for name, line, now in _imports(path):
        library = name.partition(".")[0]
        if library in ALLOWED:
            assert _room(path) in ALLOWED[library], f"{path}:{line} imports {library}"
        if library in ONLY_WHEN_USED:
            assert not now, f"{path}:{line} imports {library} before it is used"


def test_no_room_is_a_drawer_for_everything() -> None:
    for path in _files():
        names = {part.removesuffix(".py") for part in path.relative_to(PACKAGE).parts}
        assert not names & FORBIDDEN_NAMES, path


@pytest.mark.parametrize("path", _files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_pickle_no_prints_no_silent_environment(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for name, line, _ in _imports(path):
        assert name.partition(".")[0] not in {"pickle", "dill", "cloudpickle"}, f"{path}:{line}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if path.stem != "cli":
                assert called != "print", f"{path}:{node.lineno} prints"
            assert called not in {"eval", "exec", "warnings.filterwarnings", "os.putenv"}, (
                f"{path}:{node.lineno} calls {called}"
            )
            if called == "torch.load":
                assert "weights_only=True" in ast.unparse(node), f"{path}:{node.lineno}"
        if isinstance(node, ast.Assign):
            for target in node.targets:
                assert not ast.unparse(target).startswith("os.environ["), f"{path}:{node.lineno}"


def _graph(package: Path) -> dict[str, set[str]]:
    """Which module imports which when it runs, functions included, by names within the package.

    What only a type checker reads is left out.
    """
    modules = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        if "configs" not in parts and parts[-1] != "__init__":
            modules[".".join(parts)] = path
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                node.body = []
        found: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found |= {node.module or "", *(f"{node.module}.{a.name}" for a in node.names)}
        graph[name] = {one.removeprefix("genemodel.") for one in found} & set(modules) - {name}
    return graph


def _circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Modules that reach each other: the strongly connected components of more than one."""
    reach = {name: set(found) for name, found in graph.items()}
    grew = True
    while grew:
        grew = False
        for name, found in reach.items():
            more = found.union(*(reach[one] for one in found))
            grew |= len(more) > len(found)
            reach[name] = more
    return {
        frozenset(one for one in found if name in reach[one])
        for name, found in reach.items() if name in found
    }  # fmt: skip


def test_no_files_import_each_other() -> None:
    found = _circles(_graph(PACKAGE))
    assert not found, [sorted(circle) for circle in found]


def test_circles_are_found_wherever_they_close(tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    (room / "a.py").write_text("from genemodel.room.b import f\n")
    (room / "b.py").write_text("def f():\n    from genemodel.room import c\n")
    (room / "c.py").write_text("import genemodel.room.a\n")
    (room / "d.py").write_text(
        "from typing import TYPE_CHECKING\nimport genemodel.room.e\n"
        "if TYPE_CHECKING:\n    from genemodel.room.a import f\n"
    )
    (room / "e.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from genemodel.room.d import g\n"
    )
    assert _circles(_graph(tmp_path)) == {frozenset({"room.a", "room.b", "room.c"})}


def test_the_reader_of_imports_sees_what_it_must(tmp_path: Path) -> None:
    """The tests above prove nothing if the reader misses an import."""
    package = tmp_path / "genemodel" / "cells"
    package.mkdir(parents=True)
    file = package / "a.py"
    file.write_text(
        "import a.b\nfrom genemodel import model\nfrom ..train import x\nfrom . import y\n"
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import scanpy\n"
        "def f():\n    import lightning.pytorch as pl\n"
    )
    original = PACKAGE
    try:
        globals()["PACKAGE"] = tmp_path / "genemodel"
        found = {(name, now) for name, _, now in _imports(file)}
    finally:
        globals()["PACKAGE"] = original
    assert found == {
        ("a.b", True),
        ("genemodel.model", True),
        ("genemodel.train", True),
        ("genemodel.cells", True),
        ("typing", True),
        ("scanpy", False),
        ("lightning.pytorch", False),
    }


def test_contributing_names_the_rooms_in_their_order() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE)
    named = [name.strip("`/") for row in rows for name in row.split(", ")]
    assert named == [room for rooms in ORDER[:-1] for room in rooms]
