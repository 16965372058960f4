"""Advice can be followed: every setting that a message names is one that its reader has.

Messages are all strings of the package (docstrings apart). Who can see one is asked of the code: a
message can be shown by a verb or call whose function reaches the function that holds it. What is
reached is over-approximated, so a message is never thought to be hidden where it is not: a method
counts as called wherever a method of its name is, and its class is in use.
"""

import ast
import dataclasses
import functools
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import genemodel
from genemodel.cells.input_settings import (
    NAMES,
    OF_ONE_FILE,
    InputOptions,
    InputSettings,
    for_reference,
)
from genemodel.command import cli, config_files
from genemodel.settings import _all_names, _members, setting_types

PACKAGE = Path(genemodel.__file__).parent
CALLS = {
    f"gm.{name}": getattr(genemodel, name)
    for name in (
        "annotate", "attention", "contamination", "embed", "evaluate", "impute", "integrate",
        "load", "network", "perturb", "respond", "trajectory",
    )
} | {
    "gm.Corpus.build": genemodel.Corpus.build,
    "gm.Corpus.append": genemodel.Corpus.append,
    "IntegratedModel.embed": genemodel.IntegratedModel.embed,
}  # fmt: skip
# -- the code ------------------------------------------------------------------------------------


@dataclass
class Node:
    """A function, a method or a module's constant: what it says and what it refers to.

    ``attributes``: names asked of what is known to be one of these classes, or of anything (None).
    """

    module: str
    owner: str | None
    body: list[ast.AST]
    messages: list[tuple[int, str]] = field(default_factory=list)
    references: set[str] = field(default_factory=set)
    attributes: set[tuple[str | None, str]] = field(default_factory=set)


@dataclass
class Code:
    """All nodes by ``module:name`` or ``module:Class.name``."""

    nodes: dict[str, Node]
    bases: dict[str, list[str]]

    def methods(self, cls: str) -> dict[str, str]:
        """Methods of a class by their names, those of its bases too."""
        found = {}
        for base in self.bases.get(cls, []):
            found |= self.methods(base)
        start = f"{cls}."
        return found | {n[len(start) :]: n for n in self.nodes if n.startswith(start)}


# Python calls these itself; what refuses settings is asked for by who has them.
IMPLICIT = {
    "__init__", "__enter__", "__exit__", "__iter__", "__next__", "__call__", "__len__",
    "__getitem__", "forward",
}  # fmt: skip
# Of a list, a text and so on, where nothing says that it is of a class of ours.
BUILTIN = {name for kind in (list, dict, set, str) for name in dir(kind)}


# Constants that are regular expressions, whose `match` is none of a vocabulary.
PATTERNS: set[str] = set()


@functools.cache
def code() -> Code:
    """Read the package."""
    trees = {
        ".".join((*p.relative_to(PACKAGE.parent).with_suffix("").parts,)).removesuffix(
            ".__init__"
        ): ast.parse(p.read_text())
        for p in sorted(PACKAGE.rglob("*.py"))
    }
    nodes: dict[str, Node] = {}
    bases: dict[str, list[str]] = {}
    raw_bases: dict[str, tuple[str, list[ast.expr]]] = {}
    for module, tree in trees.items():
        for item in tree.body:
            match item:
                case ast.FunctionDef():
                    nodes[f"{module}:{item.name}"] = Node(module, None, [item])
                case ast.ClassDef():
                    cls = f"{module}:{item.name}"
                    bases[cls] = []
                    raw_bases[cls] = (module, item.bases)
                    rest: list[ast.AST] = []
                    for inner in item.body:
                        if isinstance(inner, ast.FunctionDef):
                            nodes[f"{cls}.{inner.name}"] = Node(module, cls, [inner])
                        elif not isinstance(inner, ast.Expr):
                            rest.append(inner)
                    nodes[cls] = Node(module, cls, rest)
                case ast.Assign() | ast.AnnAssign():
                    targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                    for target in targets:
                        if isinstance(target, ast.Name):
                            nodes[f"{module}:{target.id}"] = Node(module, None, [item])
                            if item.value is not None and "re.compile" in ast.unparse(item.value):
                                PATTERNS.add(f"{module}:{target.id}")
    known = set(nodes)
    imports = {module: _imports(tree, known, trees) for module, tree in trees.items()}
    for cls, (module, found) in raw_bases.items():
        for base in found:
            if isinstance(base, ast.Name):
                at = _resolve(base.id, module, imports[module], known)
                if at in bases:
                    bases[cls].append(at)
    for node in nodes.values():
        _look(node, imports[node.module], known, trees, bases)
    return Code(nodes, bases)


def _imports(tree: ast.AST, known: set[str], trees: dict[str, ast.Module]) -> dict[str, str]:
    """Names that a module imports, anywhere in it, and what of the package they are."""
    found: dict[str, str] = {}
    for item in ast.walk(tree):
        if isinstance(item, ast.ImportFrom) and (item.module or "").startswith("genemodel"):
            for alias in item.names:
                here = f"{item.module}.{alias.name}"
                found[alias.asname or alias.name] = (
                    here if here in trees else f"{item.module}:{alias.name}"
                )
        elif isinstance(item, ast.Import):
            for alias in item.names:
                if alias.name in trees:
                    found[alias.asname or alias.name.partition(".")[0]] = alias.name
    # What a package hands on from its modules.
    for name, at in list(found.items()):
        module, _, attribute = at.partition(":")
        if attribute and at not in known and module in trees:
            further = _imports(trees[module], known, {}) if module.endswith("genes") else {}
            found[name] = further.get(attribute, at)
    return found


def _resolve(name: str, module: str, imports: dict[str, str], known: set[str]) -> str | None:
    own = f"{module}:{name}"
    return own if own in known else imports.get(name)


def _look(
    node: Node,
    imports: dict[str, str],
    known: set[str],
    trees: dict[str, ast.Module],
    bases: dict[str, list[str]],
) -> None:
    docstrings = set()
    for root in node.body:
        for item in ast.walk(root):
            inner = getattr(item, "body", None)
            if isinstance(inner, list) and inner and isinstance(inner[0], ast.Expr):
                docstrings.add(id(inner[0].value))
    hints = _hints(node, imports, known, bases)
    stack = list(node.body)
    while stack:
        item = stack.pop()
        match item:
            case ast.Name(id=name):
                at = _resolve(name, node.module, imports, known)
                if at is not None:
                    node.references.add(at)
            case ast.Attribute(value=ast.Name(id=base), attr=attribute):
                at = _resolve(base, node.module, imports, known)
                if base in ("self", "cls") and node.owner is not None:
                    node.attributes.add((node.owner, attribute))
                elif at is not None and at in trees:
                    node.references.add(f"{at}:{attribute}")
                elif at is not None and f"{at}.{attribute}" in known:
                    node.references.add(f"{at}.{attribute}")
                elif at not in PATTERNS:
                    for kind in hints.get(base, [None]):
                        node.attributes.add((kind, attribute))
            case ast.Attribute(value=ast.Call(func=ast.Name(id="super")), attr=attribute):
                node.references |= {f"{base}.{attribute}" for base in bases.get(node.owner, ())}
            case ast.Attribute(attr=attribute):
                node.attributes.add((None, attribute))
        # An annotation makes nothing.
        stack += [
            inner
            for name, value in ast.iter_fields(item)
            if name not in ("annotation", "returns")
            for inner in (value if isinstance(value, list) else [value])
            if isinstance(inner, ast.AST)
        ]
    node.messages = list(_strings(node.body, docstrings))


def _hints(
    node: Node, imports: dict[str, str], known: set[str], bases: dict[str, list[str]]
) -> dict[str, list[str | None]]:
    """Classes of ours that the parameters and variables of a function are said or seen to be."""
    found: dict[str, list[str | None]] = {}

    def classes(hint: ast.AST) -> list[str | None]:
        text = ast.unparse(hint)
        names = [_resolve(word, node.module, imports, known) for word in re.findall(r"\w+", text)]
        return [at for at in names if at in bases]

    for root in node.body:
        for item in ast.walk(root):
            match item:
                case ast.arg(arg=name, annotation=ast.AST() as hint):
                    found[name] = classes(hint) or [None]
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call(func=function)):
                    if here := classes(function):
                        found.setdefault(name, here)
                case ast.AnnAssign(target=ast.Name(id=name), annotation=hint):
                    found.setdefault(name, classes(hint) or [None])
    return {name: kinds for name, kinds in found.items() if kinds}


def _strings(roots: list[ast.AST], docstrings: set[int]) -> Iterator[tuple[int, str]]:
    """Texts with a NUL for every value that is put in."""
    stack: list[ast.AST] = list(roots)
    while stack:
        item = stack.pop()
        if isinstance(item, ast.JoinedStr):
            yield (
                item.lineno,
                "".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in item.values),
            )
            stack += [
                inner
                for v in item.values
                if isinstance(v, ast.FormattedValue)
                for inner in ast.walk(v.value)
                if isinstance(inner, ast.Constant | ast.JoinedStr)
            ]
        elif isinstance(item, ast.Constant):
            if isinstance(item.value, str) and id(item) not in docstrings:
                yield item.lineno, item.value
        else:
            stack += ast.iter_child_nodes(item)


@functools.cache
def reached(start: tuple[str, ...]) -> frozenset[str]:
    """Nodes that a function may come to."""
    everything = code()
    methods = {cls: everything.methods(cls) for cls in everything.bases}
    heirs: dict[str, set[str]] = {cls: {cls} for cls in everything.bases}
    for cls in everything.bases:
        for base in everything.bases[cls]:
            heirs[base].add(cls)
    done: set[str] = set()
    live: set[str] = set()  # classes
    asked: set[tuple[str | None, str]] = {(None, name) for name in IMPLICIT}
    queue = [*start]

    def answering(kind: str | None, name: str, classes: set[str]) -> set[str]:
        if kind is None:
            if name in BUILTIN and name not in IMPLICIT:
                return set()
            return {methods[cls][name] for cls in classes if name in methods[cls]}
        return {methods[cls][name] for cls in heirs.get(kind, ()) if name in methods[cls]}

    while queue:
        name = queue.pop()
        if name in done or name not in everything.nodes:
            continue
        done.add(name)
        node = everything.nodes[name]
        new = set(node.references)
        if name in everything.bases and name not in live:
            live.add(name)
            new |= set(everything.bases[name])
            for kind, method in asked:
                if kind is None:
                    new |= answering(kind, method, {name})
        if node.owner is not None and node.owner != name:
            new.add(node.owner)
        for kind, method in node.attributes - asked:
            new |= answering(kind, method, live)
        asked |= node.attributes
        queue += new - done
    return frozenset(done)


# -- what a verb and a call can be told ------------------------------------------------------------


def _classes(hint: object) -> Iterator[type]:
    for member in _members(hint):
        if dataclasses.is_dataclass(member):
            yield typing.cast(type, member)
            for inner in setting_types(typing.cast(type, member)).values():
                yield from _classes(inner)


@functools.cache
def settings_of_verb(name: str) -> frozenset[str]:
    """Names of a verb's settings, those of groups with and without the group."""
    names = set(_all_names(cli._reach(cli.VERBS[name].settings)))
    return frozenset(names | {one.rpartition(".")[2] for one in names})


def settings_of_call(name: str) -> frozenset[str]:
    """Names of a call's arguments, and the fields of settings among these."""
    function = CALLS[name]
    names = set(inspect.signature(function).parameters)
    for hint in inspect.get_annotations(inspect.unwrap(function)).values():
        for word in re.findall(r"\w*Settings", str(hint)):
            cls = getattr(genemodel, word, None)
            if cls is not None:
                names |= {one.rpartition(".")[2] for one in _all_names(cls)}
    return frozenset(names)


def _entry(function: object) -> str:
    function = inspect.unwrap(function)  # type: ignore[arg-type]
    return f"{function.__module__}:{function.__qualname__}"


@functools.cache
def of_verb(name: str) -> frozenset[str]:
    """Nodes that a verb reaches: its function, and the refusals of its settings."""
    verb = cli.VERBS[name]
    cls = cli._reach(verb.settings)
    classes = {cls, *(c for hint in setting_types(cls).values() for c in _classes(hint))}
    starts = [verb.function]
    for one in classes:
        at = f"{one.__module__}:{one.__qualname__}"
        starts += [at, *(m for n, m in code().methods(at).items() if n == "__post_init__")]
    return reached(tuple(starts))


@functools.cache
def of_call(name: str) -> frozenset[str]:
    """Nodes that a call reaches."""
    return reached((_entry(CALLS[name]),))


# -- what a message names --------------------------------------------------------------------------

_VERB = "|".join(sorted(cli.VERBS, key=len, reverse=True))
# `genemodel embed layer=…`, and (corpus build, corpus append: layer=…): of those verbs.
_COMMAND = re.compile(rf"genemodel ({_VERB})\b([^`]*)")
_OF_VERBS = re.compile(rf"\(((?:{_VERB})(?:, (?:{_VERB}))*): ([^()]*)\)")
# A call of another function, whose arguments are no settings.
_OTHER_CALL = re.compile(r"[\w\]]\([^()]*\)")
_SETTING = re.compile(r"(?<![\w.\-/\[<?&%@])([a-z][a-z_0-9]*(?:\.[a-z_0-9]+)*)=(?![=>])")
_LEAVE_OUT = re.compile(r"\b[Ll]eave ([a-z_]+) out\b")
_WITH_UNDERSCORE = re.compile(r"(?<![\w.\"'])[a-z]+(?:_[a-z]+)+(?![\w(.])")
# What a value is refused of: who lacks the setting has not given the value.
_SUBJECT = re.compile(r"^\n?(?:[\w.\0]+(?:, [\w.]+)?: )?([a-z][a-z_0-9.]*)(?:=| is \0)")
# How settings are written, on the command line.
_GRAMMAR = {"key", "group"}
# Messages that a verb or call comes to by the code, but not with the arguments that it gives.
DROPPED = (
    "genemodel.corpus.building:FEW_GENES", "genemodel.corpus.building:MUCH_MITO",
    "genemodel.corpus.building:BuildOptions.of",
)  # fmt: skip
NEVER_SHOWN: dict[str, dict[str, str]] = {
    "any": {
        "genemodel.genes.medians:NonzeroMedians.merge": "all parts are made with the same per_10k",
    },
    # Cells are dropped only where a building says so.
    "demo": {
        **dict.fromkeys(DROPPED, "nothing is dropped by default"),
        "genemodel.corpus.assembly:build": "a corpus that is there is opened",
    },
    "gm.evaluate": {
        "genemodel.metrics.scib:_reference": "every comparison scores 'none'",
        "genemodel.inference.obs_keys:check_key_added": "the keys are ours",
        "genemodel.imputation.asked:checked_output": "nothing is written to a file",
        "genemodel.imputation.plan:_refuse_other_genes": "the cells hold what their counts hold",
        "genemodel.imputation.plan:_refuse_too_large": "looked at before any method runs",
        "genemodel.imputation.plan:_order": "looked at before any method runs",
        "genemodel.imputation.pretrained:refuse_without_decoder": "only bundles with one impute so",
    },
    "evaluate": {
        "genemodel.metrics.scib:_reference": "every comparison scores 'none'",
        "genemodel.inference.obs_keys:check_key_added": "the keys are ours",
        "genemodel.imputation.asked:checked_output": "nothing is written to a file",
        "genemodel.imputation.plan:_refuse_other_genes": "the cells hold what their counts hold",
        "genemodel.imputation.plan:_refuse_too_large": "looked at before any method runs",
        "genemodel.imputation.plan:_order": "looked at before any method runs",
        "genemodel.imputation.pretrained:refuse_without_decoder": "only bundles with one impute so",
    },
    "finetune": {
        **dict.fromkeys(DROPPED, "nothing is dropped by default"),
        "genemodel.imputation.asked:checked_output": "an AnnData and a file are given",
        "genemodel.imputation.plan:_refuse_other_genes": "of results in memory",
        "genemodel.imputation.plan:_refuse_too_large": "of results in memory",
    },
}


@functools.cache
def every_setting() -> frozenset[str]:
    """Names that any verb knows."""
    return frozenset().union(*map(settings_of_verb, cli.VERBS))


def named(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Settings that a message names: of whoever reads it, and of a verb that it names."""
    of_verbs = [(verb, rest) for verb, rest in _COMMAND.findall(text)]
    text = _COMMAND.sub("", text)
    of_verbs += [(v, rest) for verbs, rest in _OF_VERBS.findall(text) for v in verbs.split(", ")]
    text = _OTHER_CALL.sub("", _OF_VERBS.sub("", text))
    theirs = [(verb, name) for verb, rest in of_verbs for name in _SETTING.findall(rest)]
    if " " not in text:  # a key, not a message
        return set(), theirs
    found = set(_SETTING.findall(text)) - _GRAMMAR
    found |= {name for name in _LEAVE_OUT.findall(text) if name in every_setting()}
    found |= {word for word in _WITH_UNDERSCORE.findall(text) if word in every_setting()}
    return found, theirs


def can_be_shown(text: str, known: frozenset[str]) -> bool:
    """Whether the value that a message refuses can have been given."""
    subject = _SUBJECT.match(text)
    return subject is None or subject[1] in known


def is_page(text: str) -> bool:
    """Whether a text is a piece of a page or a figure."""
    return bool(re.search(r"<\w|^ class=", text))


def wrong(who: str, nodes: frozenset[str], known: frozenset[str]) -> list[str]:
    """List messages of these nodes that name settings which are not known."""
    found = []
    for name in sorted(nodes):
        node = code().nodes[name]
        if name in NEVER_SHOWN.get(who, {}) or name in NEVER_SHOWN.get("any", {}):
            continue
        for line, text in node.messages:
            if is_page(text) or not can_be_shown(text, known):
                continue
            own, _ = named(text)
            if unknown := sorted(own - known):
                found.append(f"{name} (line {line}): {', '.join(unknown)} in {text!r}")
    return found


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_every_setting_that_a_message_of_a_verb_names_is_one_of_the_verb(verb):
    assert not wrong(verb, of_verb(verb), settings_of_verb(verb))


@pytest.mark.parametrize("call", list(CALLS))
def test_every_setting_that_a_message_of_a_call_names_is_one_of_the_call(call):
    nodes = of_call(call)
    assert not wrong(call, nodes, settings_of_call(call))


def test_commands_in_messages_are_commands():
    found = [
        f"{name}: {verb} {setting}="
        for name, node in code().nodes.items()
        for _, text in node.messages
        for verb, setting in named(text)[1]
        if setting not in settings_of_verb(verb)
    ]
    assert not found


# -- what is read by all ---------------------------------------------------------------------------

# Verbs and calls that read cells.
VERBS = [
    "demo", "corpus build", "corpus append", "finetune", "embed", "impute", "annotate", "evaluate",
]  # fmt: skip
READING = [name for name in CALLS if name != "gm.load"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_that_reads_cells_has_all_input_settings_in_the_same_words(verb):
    settings = cli._reach(cli.VERBS[verb].settings)
    assert issubclass(settings, InputSettings)
    own = {f.name: f.default for f in dataclasses.fields(settings)}
    lines = {}
    for name in ("corpus_build", cli.VERBS[verb].config):
        entries = config_files.entries(config_files.config_folder() / f"{name}.yaml")
        lines[name] = {e.key: (e.value, e.comment) for e in entries if e.key in NAMES}
    for one in dataclasses.fields(InputSettings):
        assert own[one.name] == one.default
    assert lines["corpus_build"] == lines[cli.VERBS[verb].config]
    assert list(lines["corpus_build"]) == list(NAMES)


@pytest.mark.parametrize("call", READING)
def test_a_call_that_reads_cells_takes_and_describes_all_input_settings(call):
    function = CALLS[call]
    parameters = inspect.signature(function).parameters
    for one in dataclasses.fields(InputSettings):
        assert parameters[one.name].default == one.default
        assert f"\n{one.name}\n" in inspect.cleandoc(function.__doc__)
    with pytest.raises(TypeError, match="unexpected keyword argument 'layr': did you mean 'layer'"):
        InputSettings.given({"layr": "counts"})


def test_the_options_of_calls_are_the_settings():
    assert tuple(InputOptions.__annotations__) == NAMES


@pytest.mark.parametrize("who", [*VERBS, *READING])
def test_whoever_reads_cells_can_be_shown_what_readers_say(who):
    """The graph of calls holds what it must; were it empty, nothing would ever be wrong."""
    nodes = of_verb(who) if who in cli.VERBS else of_call(who)
    assert {
        "genemodel.cells.contract:_way_out", "genemodel.cells.contract:choose_counts",
        "genemodel.genes.match:_refuse_too_few", "genemodel.genes.match:_kind_of_names",
        "genemodel.cells.obs_columns:ColumnPlan.apply", "genemodel.genes.recognition:TURN_OBJECT",
        "genemodel.cells.missing_labels:found",
    } <= nodes  # fmt: skip


def test_a_message_on_the_reference_names_the_settings_of_the_reference():
    said = "x.h5ad: set layer=counts, or species=obs:COLUMN; allow_fractional=true rounds (column=)"
    assert for_reference(said) == (
        "x.h5ad: set reference_layer=counts, or reference_species=obs:COLUMN; "
        "allow_fractional=true rounds (reference_column=)"
    )
    assert {f"reference_{name}" for name in OF_ONE_FILE} <= settings_of_verb("annotate")
    assert for_reference(for_reference(said)) == for_reference(said)


@pytest.mark.parametrize(
    ("text", "own", "theirs"),
    [
        ("set layer=counts, or batch_key", {"layer", "batch_key"}, []),
        ("\0: leave transpose out", {"transpose"}, []),
        ("as with adata.obs.astype(dtype=str)", set(), []),
        ("`genemodel species name=x out=...` adds it; species=x", {"species"},
         [("species", "name"), ("species", "out")]),
        ("leave them out (corpus build, corpus append: min_genes=3)", set(),
         [("corpus build", "min_genes"), ("corpus append", "min_genes")]),
    ],
)  # fmt: skip
def test_settings_in_a_text_are_found(text, own, theirs):
    assert named(text) == (own, theirs)
