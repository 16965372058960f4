import dataclasses
import logging
import subprocess
import sys
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from genemodel.command import cli, config_files
from genemodel.errors import ConfigError, DataError
from genemodel.settings import _is_path, _members, is_address, parse, setting_types


@dataclass(frozen=True)
class Model:
    width: int = 8
    layers: int = 2


@dataclass(frozen=True)
class Cook:
    dish: str
    minutes: float = 5.0
    guests: tuple[str, ...] = ()
    oven: Literal["gas", "electric"] = "gas"
    model: Model = field(default_factory=Model)
    bundle: str | None = None


ran: list[Cook] = []


def cook(settings: Cook) -> str:
    ran.append(settings)
    logging.getLogger("genemodel.kitchen").info("heating %s", settings.dish)
    match settings.dish:
        case "stone":
            raise DataError("dish: a stone cannot be cooked; take a carrot")
        case "break":
            raise KeyboardInterrupt
        case "bug":
            raise ZeroDivisionError("ours")
        case "disk":
            raise OSError(28, "No space left on device", "runs/a")
    return f"cooked {settings.dish}"


FILES = {
    "cook.yaml": """# Cooks one dish.
# It takes a while.
defaults:
  - _self_
  - model: small
  - experiment: null
dish: ???        # what to cook
minutes: 5.0     # how long
guests: []       # who eats
oven: gas        # gas or electric
bundle: null     # a trained cook
""",
    "model/small.yaml": "# Two layers.\nwidth: 8     # of a token\nlayers: 2    # blocks\n",
    "model/large.yaml": "# Six layers.\nwidth: 64    # of a token\nlayers: 6    # blocks\n",
    "experiment/feast.yaml": """# @package _global_
# A feast on the large model.
defaults:
  - override /model: large
minutes: 90
model:
  layers: 7
""",
    "experiment/code.yaml": "# @package _global_\nmodel:\n  _target_: os.system\n",
    "experiment/environment.yaml": "# @package _global_\ndish: ${oc.env:HOME}\n",
    "experiment/broken.yaml": "# @package _global_\nmodel: [1,\n",
    "experiment/stranger.yaml": "# @package _global_\ndefaults:\n  - override /optim: fast\n",
    "experiment/typo.yaml": "# @package _global_\nminuets: 3\n",
}


@pytest.fixture
def kitchen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "configs"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    verb = cli.Verb(
        summary="cook one dish",
        config="cook",
        settings=f"{__name__}:Cook",
        function=f"{__name__}:cook",
        examples=("cook dish=soup", "cook dish=soup model=large"),
    )
    monkeypatch.setattr(cli, "VERBS", {"cook": verb, "food buy": verb, "food store": verb})
    monkeypatch.setattr(config_files, "config_folder", lambda: folder)
    monkeypatch.setitem(sys.modules, __name__, sys.modules[cook.__module__])
    ran.clear()
    return folder


@pytest.fixture
def said(kitchen: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str) -> tuple[int, str, str]:
        status = cli.main(words)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


Said = Callable[..., tuple[int, str, str]]


def test_words_become_the_settings_of_the_function(said: Said) -> None:
    status, out, err = said(
        "cook", "dish=soup", "minutes=3", "guests=[ann,bob]", "model=large", "model.layers=9"
    )
    assert (status, out, err) == (0, "cooked soup\n", "heating soup\n")
    assert ran == [Cook("soup", 3.0, ("ann", "bob"), "gas", Model(64, 9))]


def test_an_experiment_changes_groups_and_values_and_the_words_win(said: Said) -> None:
    assert said("cook", "experiment=feast", "dish=cake", "minutes=1")[0] == 0
    assert ran == [Cook("cake", 1.0, model=Model(64, 7))]


def test_what_one_call_composes_is_not_the_next_ones(kitchen: Path) -> None:
    """The files are composed once; what is given to the caller is the caller's."""
    first = config_files.compose("cook", ["dish=soup", "model.width=77", "guests=[ann]"])
    assert first["model"]["width"] == 77
    first["guests"].append("bob")
    again = config_files.compose("cook", ["dish=soup"])
    assert again["model"]["width"] == 8 and again["guests"] == []


def test_two_word_verbs(said: Said) -> None:
    assert said("food", "store", "dish=rice")[0] == 0
    assert ran[0].dish == "rice"
    status, out, _ = said("food")
    assert status == 2
    assert "food buy" in out and "food store" in out and "cook one" in out


@pytest.mark.parametrize(
    "text",
    [
        "data/my file (1).h5ad",
        "~/x.h5ad",
        "Zürich#2=3.h5ad",
        "data/*.h5ad",
        "C:\\cells",
        "50%",
    ],
)
def test_a_path_is_taken_as_it_stands(said: Said, text: str) -> None:
    assert said("cook", f"dish={text}")[0] == 0
    assert ran[0].dish == text


def test_a_group_of_another_name_is_a_value(said: Said) -> None:
    """``bundle`` has no group here, so whatever stands after it is its value."""
    said("cook", "dish=a", "bundle=runs/a/bundle")
    assert ran[0].bundle == "runs/a/bundle"


def test_a_mapping_is_merged_into_its_group(said: Said) -> None:
    said("cook", "dish=a", "model={layers: 3}")
    assert ran[0].model == Model(8, 3)


def test_the_users_own_folder_adds_choices(said: Said, tmp_path: Path) -> None:
    own = tmp_path / "my configs" / "experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text("# @package _global_\n# Mine.\nminutes: 11\n")
    folder = str(own.parent)
    assert said("cook", "experiment=mine", "dish=a", "--config-dir", folder)[0] == 0
    assert ran[0].minutes == 11.0
    assert "mine" in said("cook", "--help", f"--config-dir={folder}")[1]
    (own / "feast.yaml").write_text("# @package _global_\nminutes: 12\n")
    status, _, err = said("cook", "experiment=feast", "dish=a", "--config-dir", folder)
    assert status == 2
    assert "feast.yaml has the name of a file that genemodel ships" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("cok", "unknown verb 'cok': did you mean 'cook'?"),
        ("confg", "did you mean 'config'?"),
        ("qqqqq", "unknown verb 'qqqqq' `genemodel --help` lists the verbs."),
        ("food sell", "unknown verb 'food sell' There are: food buy, food store"),
        ("food stroe", "did you mean 'food store'?"),
        ("cook dsh=a", "unknown setting 'dsh': did you mean 'dish'?"),
        ("cook dish=a model.widht=3", "did you mean 'model.width'?"),
        ("cook dish=a layers=3", "unknown setting 'layers': did you mean 'model.layers'?"),
        ("cook dish=a experimnt=feast", "did you mean 'experiment'?"),
        ("cook dish=a model=lrge", "no choice 'lrge': did you mean model=large? There are: large,"),
        ("cook dish=a experiment=qq", "no choice 'qq' There are: broken, code,"),
        ("cook dish=a oven=gass", "must be one of gas, electric, not the text 'gass'"),
        ("cook dish=a minutes=long", "'minutes' must be a number, not the text 'long'"),
        ("cook dish=a,b", "several values at once; write dish=[a,b]"),
        ("cook dish=[a", "'dish=[a': the value cannot be read"),
        ("cook soup", "'soup' is not of the form key=value"),
        ("cook ~dish", "cannot be removed; write dish=null"),
        ("cook a+b=3", "'a+b' is not the name of a setting"),
        ("cook model@x=large", "a group has one place only; write model="),
        ("cook dish.x=3", "'dish' must be a text, not a group of settings (x)"),
        ("cook minutes.x=3", "'minutes' is 5.0, not a group of settings"),
        ("cook", "setting 'dish' has no default and must be given: dish=..."),
        ("cook dish=null", "'dish' must be a text, not null"),
        ("cook dish=7", "must be a text, not the whole number 7"),
        ("cook dish=${oc.env:HOME}", "interpolation is not supported"),
        ("cook dish=a model._target_=os.system", "'model._target_' asks to build an object"),
        ("cook dish=a experiment=code", "'model._target_' asks to build an object"),
        ("cook experiment=environment", "'dish' is '${oc.env:HOME}': interpolation"),
        ("cook dish=a experiment=broken", "cook with experiment=broken do not compose"),
        ("cook dish=a experiment=stranger", "optim"),
        ("cook dish=a experiment=typo", "unknown setting 'minuets': did you mean 'minutes'?"),
        ("cook dish=a hydra.run.dir=x", "unknown setting 'hydra'"),
        ("cook --pan=wok", "unknown option '--pan'; there are --help"),
        ("cook --hepl", "unknown option '--hepl': did you mean '--help'?"),
        ("cook --dish=a", "Settings are written key=value, without dashes."),
        ("cook --config-dir", "--config-dir needs a folder"),
        ("cook --config-dir nowhere", "--config-dir nowhere: no such folder"),
        ("cook dish=stone", "dish: a stone cannot be cooked; take a carrot"),
        ("cook dish=disk", "No space left on device: runs/a"),
        ("config fod", "unknown verb 'fod'"),
        ("config food", "'food' is not a complete verb"),
    ],
)
def test_refusals(said: Said, words: str, expected: str) -> None:
    status, out, err = said(*words.split())
    assert status == 2
    assert out == ""
    message = err.splitlines()[-1]
    assert message.startswith("genemodel: error: ")
    assert expected in message
    assert "Traceback" not in err and err.count("\n") == 1 + len(ran)


def test_ctrl_c_is_no_error_of_ours(said: Said) -> None:
    assert said("cook", "dish=break") == (130, "", "heating break\ngenemodel: stopped\n")


def test_our_own_mistake_keeps_its_traceback_and_asks_for_a_report(kitchen: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        cli.main(["cook", "dish=bug"])
    assert "please report" in caught.value.__notes__[0]


def test_config_prints_what_would_run(said: Said) -> None:
    status, out, err = said("config", "cook", "dish=soup", "experiment=feast")
    assert (status, err) == (0, "")
    assert ran == []
    import yaml

    assert parse(Cook, yaml.safe_load(out)) == Cook("soup", 90.0, model=Model(64, 7))


def test_config_names_what_is_still_missing(said: Said) -> None:
    status, out, err = said("config", "cook")
    assert status == 0
    assert "'dish' has no default" in err
    assert "minutes: 5.0" in out
    assert said("config", "cook", "minutse=3")[0] == 2


def test_help_of_a_verb_names_every_key_and_choice(said: Said) -> None:
    status, out, _ = said("cook", "--help")
    assert status == 0
    assert "Cooks one dish. It takes a while." in out
    for text in ("dish=(required)", "what to cook", "minutes=5.0", "guests=[]", "who eats"):
        assert text in out
    assert "group model (model=choice; small by default)" in out
    assert "model.width=8" in out and "of a token" in out
    assert "large" in out and "Six layers." in out
    assert "A feast on the large model." in out
    assert "  genemodel cook dish=soup model=large" in out


def test_overview_lists_the_verbs(said: Said) -> None:
    for words in ([], ["--help"], ["-h"]):
        status, out, _ = said(*words)
        assert status == 0
        assert "cook one dish" in out and "config VERB" in out


def test_reading_a_commented_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "# Opening.\n\ndefaults:\n  - model: x\n# above\n# and on\na: 1\n"
        "b: 'x # y'  # behind\nc:\n  d: [1, 2]  # inner\n  # above e\n  e: null\nf:   # empty\n"
    )
    assert config_files.entries(file) == [
        config_files.Entry("a", "1", "above and on"),
        config_files.Entry("b", "'x # y'", "behind"),
        config_files.Entry("c.d", "[1, 2]", "inner"),
        config_files.Entry("c.e", "null", "above e"),
        config_files.Entry("f", "null", "empty"),
    ]
    assert config_files.opening_comment(file) == "Opening."


def test_an_installation_without_files_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_files, "__file__", "/nowhere/genemodel/command/config_files.py")
    with pytest.raises(ConfigError, match="install genemodel again"):
        config_files.config_folder()


# -- the shipped files -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_its_file_its_keys_and_its_function(name: str) -> None:
    verb = cli.VERBS[name]
    settings = cli._reach(verb.settings)
    assert callable(cli._reach(verb.function))
    fields = setting_types(settings)
    file = config_files.config_folder() / f"{verb.config}.yaml"
    own = {entry.key.partition(".")[0] for entry in config_files.entries(file)}
    groups = set(config_files.defaults_of(verb.config))
    assert not own & groups
    # Were _self_ not first, the file's own values would silently win over an experiment's.
    assert not groups or config_files._read(file)["defaults"][0] == "_self_"
    assert own | (groups - {"experiment"}) == set(fields)
    assert config_files.opening_comment(file)
    assert all(entry.comment for entry in config_files.entries(file))


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_yaml_and_python_give_a_setting_the_same_default(name: str) -> None:
    verb = cli.VERBS[name]
    composed = config_files.compose(verb.config)
    groups = config_files.defaults_of(verb.config)
    for one in dataclasses.fields(cli._reach(verb.settings)):
        if one.name in groups:
            continue
        if one.default is dataclasses.MISSING and one.default_factory is dataclasses.MISSING:
            assert one.name not in composed, f"{one.name} is required in Python"
        else:
            default = one.default
            if one.default_factory is not dataclasses.MISSING:
                default = one.default_factory()
            plain = list(default) if isinstance(default, tuple) else default
            assert composed[one.name] == plain, one.name


def _example_value(kind: object) -> object:
    return 1 if kind in (int, float) else ["x"] if "tuple" in str(kind) else "x"


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_the_examples_of_every_verb_are_accepted(name: str) -> None:
    import shlex

    for example in cli.VERBS[name].examples:
        words = shlex.split(example)
        found, overrides = cli._verb_of(words)
        assert found == name
        parse(cli._reach(cli.VERBS[name].settings), cli._values(name, overrides, None))


def _leaves(cls: type, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Key and type of every setting, those of groups included."""
    for name, hint in setting_types(cls).items():
        inner = [m for m in _members(hint) if dataclasses.is_dataclass(m)]
        for member in inner:
            yield from _leaves(member, f"{prefix}{name}.")
        if not inner:
            yield f"{prefix}{name}", hint


def _takes_paths(hint: object) -> bool:
    return _is_path(hint) or any(map(_takes_paths, typing.get_args(hint)))


_SETTINGS = [
    (name, key, hint)
    for name, verb in cli.VERBS.items()
    for key, hint in _leaves(cli._reach(verb.settings))
]
_PATHS = list(dict.fromkeys((name, key) for name, key, hint in _SETTINGS if _takes_paths(hint)))
_CALLED_LIKE_PATHS = {
    "path", "out", "input", "output", "model", "models", "start", "reference", "genes", "orthologs",
    "vocabulary", "corpus", "sheet", "knowledge",
}  # fmt: skip
# A list of gene names.
# … and sources of a corpus, which may be patterns and addresses.
_NO_PATHS = {
    ("impute", "genes"), ("perturb", "genes"), ("corpus build", "input"),
    ("corpus append", "input"), ("genes", "genes"), ("trajectory", "genes"),
}  # fmt: skip
_ADDRESSES = [
    "s3://bucket/x", "s3:bucket", "gs://b/x", "http://host/x", "abfs://c@a/x", "memory://x",
    "me@host:x", "host:/data/x", "file:///data/x",
]  # fmt: skip


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_an_address_is_refused_where_a_path_belongs(name: str) -> None:
    for key in [key for verb, key in _PATHS if verb == name]:
        values = cli._values(name, [], None)
        *groups, last = key.split(".")
        place = values
        for group in groups:
            place = place.setdefault(group, {})
        for address in _ADDRESSES:
            place[last] = address
            with pytest.raises(ConfigError, match="is an address, not a path") as caught:
                parse(cli._reach(cli.VERBS[name].settings), values)
            assert key in str(caught.value) and address in str(caught.value)


def test_what_is_called_like_a_path_takes_paths() -> None:
    missed = [
        (name, key)
        for name, key, _ in _SETTINGS
        if key.rpartition(".")[2] in _CALLED_LIKE_PATHS and (name, key) not in _PATHS
    ]
    assert set(missed) == _NO_PATHS
    assert len(_PATHS) > 30 and {name for name, _ in _PATHS} == set(cli.VERBS)


@pytest.mark.parametrize("path", ["a.h5ad", "./s3:/x", "sample:1.h5ad", "/data/a:b/c", "../x:y/z"])
def test_a_path_with_a_colon_is_a_path(path: str) -> None:
    assert not is_address(path)


def test_every_group_is_described_and_every_file_lists_exactly_its_fields() -> None:
    folder = config_files.config_folder()
    on_disk = {path.name for path in folder.iterdir() if path.is_dir()} - {"experiment"}
    assert {name.partition("/")[0] for name in config_files.GROUPS} == on_disk
    for file in sorted(path for name in on_disk for path in (folder / name).glob("*.yaml")):
        own = f"{file.parent.name}/{file.stem}"
        key = own if own in config_files.GROUPS else file.parent.name
        settings = cli._reach(config_files.GROUPS[key])
        entries = config_files.entries(file)
        assert [e.key for e in entries if not e.comment] == [], file
        assert config_files.opening_comment(file), file
        values = config_files.values_of(file)
        assert set(_leaves(values)) == set(_fields(settings)), file
        parse(settings, values, where=str(file))


def test_a_file_of_a_group_begins_from_another_one(tmp_path: Path) -> None:
    small = config_files.compose("pretrain")["model"]
    tiny = config_files.config_folder() / "model" / "tiny.yaml"
    entries = {entry.key: entry for entry in config_files.entries(tiny)}
    assert list(entries) == list(small) == list(config_files.values_of(tiny))
    assert (entries["layers"].value, entries["norm"].value) == ("2", small["norm"])
    # A user's own file may begin from a shipped one.
    (tmp_path / "model").mkdir()
    own = "# Mine.\ndefaults: [small, _self_]\nlayers: 3\n"
    (tmp_path / "model" / "mine.yaml").write_text(own, encoding="utf-8")
    mine = config_files.compose("pretrain", ["model=mine"], user_folder=tmp_path)["model"]
    assert mine == small | {"layers": 3} != small


def _leaves(values: dict[str, object], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key, value in values.items():
        inner = isinstance(value, dict) and value
        names += _leaves(value, f"{prefix}{key}.") if inner else [f"{prefix}{key}"]
    return names


def _fields(settings: type, prefix: str = "") -> list[str]:
    names: list[str] = []
    for name, kind in setting_types(settings).items():
        inner = dataclasses.is_dataclass(kind)
        names += _fields(kind, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return names


def test_every_experiment_belongs_to_a_verb_and_composes() -> None:
    folder = config_files.config_folder() / "experiment"
    users = [v for v in cli.VERBS.values() if "experiment" in config_files.defaults_of(v.config)]
    for file in sorted(folder.glob("*.yaml")):
        assert config_files.opening_comment(file), file
        accepted, reasons = [], []
        for verb in users:
            try:
                values = config_files.compose(verb.config, [f"experiment={file.stem}"])
                settings = cli._reach(verb.settings)
                needed = {
                    key: _example_value(kind)
                    for key, kind in setting_types(settings).items()
                    if key not in values
                }
                parse(settings, {**values, **needed})
                accepted.append(verb.config)
            except ConfigError as error:
                reasons.append(str(error))
        assert accepted, f"{file}: {reasons}"


def test_the_command_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "genemodel", "nonsense"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("genemodel: error: unknown verb 'nonsense'")
