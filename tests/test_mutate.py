"""The table of mutants applies to the package as it is, and names tests that are there."""

import ast
import re

import pytest


@pytest.fixture(scope="module")
def mutate(repository):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "scripts"))
        import mutate
    return mutate


def test_every_mutant_applies_once_and_leaves_a_program(mutate, repository):
    names = [one.name for one in mutate.MUTANTS]
    assert len(names) == len(set(names)) >= 40
    for one in mutate.MUTANTS:
        text = (repository / "genemodel" / one.file).read_text("utf-8")
        mutated = one.applied_to(text)
        assert mutated is not None, f"{one.name}: {text.count(one.old)} times in {one.file}"
        assert mutated != text and ast.parse(mutated), one.name
        assert one.applied_to(text + text) is None and one.applied_to("") is None


def test_every_mutant_names_tests_that_are_there(mutate, repository):
    for one in mutate.MUTANTS:
        assert one.tests, one.name
        for test in one.tests:
            path, _, name = test.partition("::")
            text = (repository / path).read_text("utf-8")
            assert not name or re.search(rf"^def {name}\(", text, re.MULTILINE), test


def test_a_mutant_is_killed_survives_or_does_not_apply(mutate, tmp_path, monkeypatch, capsys):
    """On a package of one line with a test that looks at the half of it."""
    for part in ("genemodel", "tests"):
        (tmp_path / part).mkdir()
    (tmp_path / "genemodel" / "__init__.py").write_text("")
    (tmp_path / "genemodel" / "sums.py").write_text("def add(a, b):\n    return a + b  # sum\n")
    (tmp_path / "tests" / "test_sums.py").write_text(
        "from genemodel.sums import add\n\n\ndef test_add():\n    assert add(2, 2) == 4\n"
    )
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    monkeypatch.setattr(mutate, "REPOSITORY", tmp_path)
    monkeypatch.setattr(mutate, "COPIED", ("genemodel", "tests", "pyproject.toml"))

    def table(*rows):
        made = [mutate.mutant(*row, "it breaks", "test_sums.py::test_add") for row in rows]
        monkeypatch.setattr(mutate, "MUTANTS", tuple(made))

    table(
        ("minus", "sums.py", "a + b", "a - b"), ("times", "sums.py", "a + b", "a * b"),
        ("gone", "sums.py", "a / b", "a"),
    )  # fmt: skip
    assert mutate.main(["--no-baseline"]) == 1
    minus, times, gone, _ = capsys.readouterr().out.splitlines()
    assert minus.startswith("killed") and times.startswith("survived") and "it breaks" in times
    assert gone.startswith("does not apply") and "there 0 times" in gone
    assert (tmp_path / "genemodel" / "sums.py").read_text().count("a + b") == 1
    with pytest.raises(SystemExit):
        mutate.main(["--only", "nobody"])
    assert "nobody" in capsys.readouterr().err


def test_only_failing_tests_kill_and_only_after_passing_ones(mutate, monkeypatch, capsys):
    codes = iter([0, 1, 0, 1, 0, None, 0, 4, 1])
    monkeypatch.setattr(mutate, "run_tests", lambda *_, **__: (next(codes), "said"))
    monkeypatch.setattr(mutate, "COPIED", ("genemodel",))
    only = ["--only", mutate.MUTANTS[0].name]
    ended = []
    for _ in range(4):
        ended.append((mutate.main(only), capsys.readouterr().out.split("  ")[0]))
    assert ended == [(0, "killed")] * 3 + [(1, "does not apply")]
    assert mutate.main(only) == 1 and "fail without any mutant" in capsys.readouterr().out
