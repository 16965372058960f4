"""Pages made from the package itself: one a verb, one a public name, and the list of guides.

Nothing here names a verb, a setting or a function: a new one has its page by being there.
"""

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import genemodel
from genemodel.command import config_files
from genemodel.command.cli import VERBS, Verb
from genemodel.settings import setting_types

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# The order in which a reader meets the guides; pages that are not named here follow by their names.
GUIDES = [
    "install", "which_method", "inputs", "genes", "corpus", "knowledge", "training", "embedding",
    "finetuning", "integration", "few_cells", "annotation", "imputation", "perturbation",
    "response", "gene_tasks", "networks", "trajectories", "contamination", "evaluate", "importing",
    "hub", "command_line", "gpu", "clusters", "scale",
]  # fmt: skip
# Pages that have a place of their own in the index.
PLACED = {
    "index",
    "results",
    "decisions",
    "experiments",
    "contributing",
    "changelog",
    "api",
    "verbs",
}
# Functions first, then what they hand back, then what is handed to them.
KINDS = ("Functions", "Models and data", "Settings", "Plots")

COMMAND_LINE = """# The command line

`genemodel VERB [group=choice] [key=value ...] [--config-dir DIR]`

Three rules cover all settings:

1. Pick with `group=choice`, for example `model=small` or `log=wandb`.
2. Change with `group.key=value`, for example `optim.lr=3e-4`; lists are written `[a,b]`.
3. Anything unknown is refused with the nearest known name; nothing is ever silently ignored.

Your own choices live in a folder of YAML files that `--config-dir DIR` adds:
`DIR/experiment/mine.yaml` becomes `experiment=mine`. The files hold values only. They cannot build
objects, read the environment or refer to each other, so a configuration from a stranger is data,
not code.

`genemodel VERB --help` prints what these pages say, and `genemodel config VERB ...` what the verb
would run with.

| verb | what it does |
|---|---|"""


def setup(app: "Sphinx") -> dict[str, bool]:
    app.connect("builder-inited", write_pages)
    app.connect("source-read", list_guides)
    app.connect("autodoc-process-signature", without_factories)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def write_pages(app: "Sphinx") -> None:
    source = Path(app.srcdir)
    pages = dict(verb_pages(source)) | dict(api_pages())
    for name, text in pages.items():
        file = source / f"{name}.md"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    for folder in ("api", "verbs"):
        for file in (source / folder).glob("*.md"):
            if f"{folder}/{file.stem}" not in pages:
                file.unlink()  # of a name that is gone


def list_guides(app: "Sphinx", name: str, source: list[str]) -> None:
    """Fill the index: the README, and the guides in the known order, then every other one."""
    if name == "index":
        source[0] = source[0].replace("@readme@", readme(Path(app.srcdir).parent))
        there = {path.stem for path in Path(app.srcdir).glob("*.md")} - PLACED
        guides = [page for page in GUIDES if page in there]
        guides += sorted(there - set(GUIDES))
        source[0] = source[0].replace("@guides@", "\n".join(guides))


def without_factories(app: "Sphinx", what: str, name: str, *rest: Any) -> tuple[str, str] | None:
    """Leave out the signature of a class whose fields make their own defaults: it says nothing."""
    signature = rest[2]
    return ("", "") if what == "class" and signature and "<factory>" in signature else None


def readme(repository: Path) -> str:
    """Take the README with its links as they are from the site's first page."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    for file, page in {
        "CONTRIBUTING.md": "contributing.md",
        "CHANGELOG.md": "changelog.md",
    }.items():
        text = text.replace(f"]({file})", f"]({page})")
    return text.replace("](docs/", "](")


# ------------------------------------------------------------------------------------------- verbs


def verb_pages(source: Path) -> Iterator[tuple[str, str]]:
    names = sorted(VERBS, key=list(VERBS).index)
    rows = [f"| [`genemodel {name}`]({slug(name)}.md) | {VERBS[name].summary} |" for name in names]
    listed = "\n".join(map(slug, names))
    toctree = f"```{{toctree}}\n:hidden:\n{listed}\n```\n"
    yield "verbs/index", "\n".join([COMMAND_LINE, *rows, "", toctree])
    for name in names:
        yield f"verbs/{slug(name)}", verb_page(name, VERBS[name], source)


def slug(verb: str) -> str:
    return verb.replace(" ", "_")


def verb_page(name: str, verb: Verb, source: Path) -> str:
    root = config_files.config_folder()
    file = root / f"{verb.config}.yaml"
    settings = reach(verb.settings)
    lines = [f"# genemodel {name}", "", f"*{verb.summary[0].upper()}{verb.summary[1:]}.*", ""]
    lines += [escaped(config_files.opening_comment(file)), ""]
    lines += ["```bash", *(f"genemodel {example}" for example in verb.examples), "```", ""]
    guides = mentions(f"genemodel {name}", source)
    if guides:
        lines += [
            "Read on: " + " · ".join(f"[{title}](../{page}.md)" for page, title in guides),
            "",
        ]
    groups = config_files.defaults_of(verb.config)
    # `experiment` and the like choose values of other groups and have no field of their own.
    types = setting_types(settings)
    lines += ["## Settings", "", *table(config_files.entries(file), types), ""]
    for group, chosen in groups.items():
        known = config_files.choices(group)
        if not known:
            continue
        lines += [f"## `{group}=` {chosen or '(none by default)'}", ""]
        lines += ["| choice | what it is |", "|---|---|"]
        lines += [f"| `{choice}` | {escaped(words)} |" for choice, words in known.items()]
        lines.append("")
        inner = root / group / f"{chosen}.yaml"
        if chosen is not None and inner.is_file():
            fields = group_types(types.get(group))
            lines += [f"Settings of `{group}={chosen}`:", ""]
            lines += [*table(config_files.entries(inner), fields, f"{group}."), ""]
    public = python_name(verb)
    if public:
        lines += [f"In Python: [`genemodel.{public}`](../api/{public}.md).", ""]
    return "\n".join(lines)


def table(entries: Any, types: dict[str, Any], prefix: str = "") -> list[str]:
    rows = ["| setting | takes | default | |", "|---|---|---|---|"]
    for entry in entries:
        value = "*required*" if entry.value == "???" else f"`{entry.value}`".replace("|", "\\|")
        kind = shown_type(types[entry.key]) if entry.key in types else ""
        rows.append(f"| `{prefix}{entry.key}` | {kind} | {value} | {escaped(entry.comment)} |")
    return rows if len(rows) > 2 else ["It has no settings of its own."]


def group_types(hint: Any) -> dict[str, Any]:
    """Give the fields of the dataclass, or dataclasses, that a setting may hold."""
    classes = [hint] if dataclasses.is_dataclass(hint) else typing.get_args(hint)
    found: dict[str, Any] = {}
    for one in classes:
        if isinstance(one, type) and dataclasses.is_dataclass(one):
            found |= setting_types(one)
    return found


def shown_type(hint: Any) -> str:
    """Say in words what a setting takes."""
    words = {int: "whole number", float: "number", str: "text", bool: "true, false", Path: "path"}
    if isinstance(hint, typing.TypeAliasType):
        # Checked texts: paths and addresses, names of species.
        known = {"PathText": "path", "ModelText": "path or `hf://…`"}
        return known.get(hint.__name__) or shown_type(hint.__value__)
    if hint is type(None):
        return "null"
    if hint in words:
        return words[hint]
    origin, members = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin is typing.Annotated:
        return shown_type(members[0])
    if origin in (tuple, list):
        inner = [member for member in members if member is not Ellipsis]
        return "list of " + " or ".join(dict.fromkeys(map(shown_type, inner)))
    if members:
        return " or ".join(dict.fromkeys(filter(None, map(shown_type, members))))
    return "group" if dataclasses.is_dataclass(hint) else getattr(hint, "__name__", "")


def python_name(verb: Verb) -> str | None:
    """Find the public function of a verb: what it runs, or one of the same module and name."""
    module, _, function = verb.function.partition(":")
    stem = re.sub(r"^run_|_(file|model)$", "", function)
    for name in genemodel.__all__:
        value = getattr(genemodel, name)
        if inspect.isfunction(value) and (value.__module__, name) == (module, name):
            if name in (function, stem) or name.startswith(f"{stem}_"):
                return name
    stem = verb.config
    public = getattr(genemodel, stem, None) if stem in genemodel.__all__ else None
    return stem if inspect.isfunction(public) else None


def mentions(command: str, source: Path) -> list[tuple[str, str]]:
    """Find the guides that show a command at work, with their titles."""
    found = []
    for page in sorted(source.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if page.stem in PLACED or not re.search(rf"(?m)^{re.escape(command)}(?=[ \n])", text):
            continue
        title = next((line[2:] for line in text.splitlines() if line.startswith("# ")), page.stem)
        found.append((page.stem, title.replace("`", "")))
    return found


def reach(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def escaped(words: str) -> str:
    """Keep the words of a comment from being read as Markdown or as a table; code stays code."""
    parts = words.split("`")
    parts[::2] = [re.sub(r"([|*_<>\[\]$])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


# ----------------------------------------------------------------------------------- public names


def api_pages() -> Iterator[tuple[str, str]]:
    names: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for name in genemodel.__all__:
        value = getattr(genemodel, name)
        if name.startswith("__"):
            continue
        names[kind_of(name, value)].append(name)
        yield f"api/{name}", api_page(name, value)
    lines = ["# API", "", "```python", "import genemodel as gm", "```", ""]
    for kind, members in names.items():
        lines += [f"## {kind}", "", "| | |", "|---|---|"]
        lines += [f"| [`gm.{name}`]({name}.md) | {first_line(name)} |" for name in members]
        lines.append("")
    ordered = [name for members in names.values() for name in members]
    yield "api/index", "\n".join([*lines, "```{toctree}", ":hidden:", *ordered, "```", ""])


def kind_of(name: str, value: Any) -> str:
    if inspect.ismodule(value):
        return "Plots"
    if name.endswith("Settings"):
        return "Settings"
    return "Models and data" if inspect.isclass(value) else "Functions"


def first_line(name: str) -> str:
    text = inspect.getdoc(getattr(genemodel, name)) or ""
    return escaped(" ".join(text.split("\n\n")[0].split()).replace("``", ""))


def api_page(name: str, value: Any) -> str:
    lines = [f"# gm.{name}", "", "```{eval-rst}"]
    if inspect.ismodule(value):
        lines += [f".. automodule:: {value.__name__}", "   :members:"]
    elif inspect.isclass(value):
        lines += [f".. autoclass:: genemodel.{name}", "   :members:"]
        lines += [] if name.endswith("Settings") else ["   :inherited-members: object"]
        earlier = list(getattr(value, "__renamed__", {}))  # names that are still answered
        lines += [f"   :exclude-members: {', '.join(earlier)}"] if earlier else []
    else:
        lines += [f".. autofunction:: genemodel.{name}"]
    return "\n".join([*lines, "```", ""])
