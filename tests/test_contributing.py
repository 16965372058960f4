"""The worked examples of CONTRIBUTING.md do what they say."""

import re
from pathlib import Path

import pytest

_FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = ("objective", "metric", "method", "species", "source")


def _section(repository: Path, title: str) -> str:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = re.split(r"(?m)^## ", text)
    return next(section for section in sections if section.startswith(f"{title}\n"))


@pytest.mark.parametrize("what", EXAMPLES)
def test_the_example_runs(what, repository, tmp_path, monkeypatch):
    blocks = _FENCE.findall(_section(repository, f"A new {what}"))
    assert len(blocks) == 1 and "assert " in blocks[0], "an example that proves something"
    monkeypatch.chdir(tmp_path)
    code = compile(blocks[0], f"CONTRIBUTING.md, a new {what}", "exec")
    exec(code, {"__name__": f"contributing_{what}"})


def test_no_example_is_left_out(repository):
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(_FENCE.findall(text)) == len(EXAMPLES)
