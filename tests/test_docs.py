"""Pages that are made from the package: every verb, setting and public name has its place."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest

import genemodel
from genemodel.command import config_files
from genemodel.command.cli import VERBS
from genemodel.settings import setting_types

REPOSITORY = Path(__file__).parents[1]
DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(DOCS / "_ext"))
    try:
        import generated_pages
    finally:
        sys.path.pop(0)
    return generated_pages


@pytest.mark.parametrize("name", VERBS)
def test_the_page_of_a_verb_has_every_setting_with_its_default(pages, name):
    page = pages.verb_page(name, VERBS[name], DOCS)
    file = config_files.config_folder() / f"{VERBS[name].config}.yaml"
    for entry in config_files.entries(file):
        value = "*required*" if entry.value == "???" else f"`{entry.value}`".replace("|", "\\|")
        row = next(line for line in page.splitlines() if line.startswith(f"| `{entry.key}` |"))
        assert f"| {value} |" in row
        kind = row.split("|")[2].strip()
        assert kind and "Text" not in kind, f"{entry.key}: the page does not say what it takes"
    for group, chosen in config_files.defaults_of(VERBS[name].config).items():
        fields = pages.group_types(setting_types(pages.reach(VERBS[name].settings)).get(group))
        if chosen is not None and fields:
            assert all(f"| `{group}.{key}" in page for key in fields), group


def test_every_public_name_has_a_page(pages):
    made = dict(pages.api_pages())
    names = [name for name in genemodel.__all__ if not name.startswith("__")]
    assert {f"api/{name}" for name in names} | {"api/index"} == set(made)
    for name in names:
        row = next(line for line in made["api/index"].splitlines() if f"`gm.{name}`" in line)
        assert len(row.split("|")[2].strip()) > 10, f"gm.{name} says nothing of itself"


def test_a_verb_names_its_function_in_python(pages):
    named = {name: pages.python_name(verb) for name, verb in VERBS.items()}
    assert named["embed"] == "embed" and named["import"] == "import_model"
    assert named["evaluate"] == "evaluate" and named["demo"] is None


@pytest.mark.parametrize(
    ("hint", "said"),
    [
        (int | None, "whole number or null"),
        (tuple[str, ...], "list of text"),
        (Path, "path"),
        (bool, "true, false"),
    ],
)
def test_types_are_said_in_words(pages, hint, said):
    assert pages.shown_type(hint) == said
    assert not dataclasses.is_dataclass(hint)


def _linked(file: Path) -> list[str]:
    text = re.sub(r"(?ms)^```.*?^```", "", file.read_text(encoding="utf-8"))
    return re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)


PAGES = sorted([*REPOSITORY.glob("*.md"), *DOCS.glob("*.md")])


@pytest.mark.parametrize("file", PAGES, ids=[page.name for page in PAGES])
def test_links_between_pages_lead_somewhere(file):
    made = ("api/", "verbs/")
    for link in _linked(file):
        if "://" not in link and not link.startswith(made):
            assert (file.parent / link).exists(), f"{file.name} links {link}"


def test_the_first_screen_is_short():
    assert len((REPOSITORY / "README.md").read_text(encoding="utf-8").split()) <= 450


def test_the_picture_of_the_first_screen_is_that_of_the_quick_start():
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    try:
        import readme_picture
    finally:
        sys.path.pop(0)
    assert readme_picture.OUT.read_bytes() == readme_picture.figure()
