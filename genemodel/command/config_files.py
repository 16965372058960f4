"""Finding, reading and composing the YAML files under ``configs/``.

Hydra composes plain values here and does nothing else: no object is built from a file, no resolver
runs, nothing is read from the environment. A file therefore cannot be code, whoever wrote it.
The library proper never comes here; :mod:`genemodel.settings` checks whatever this module returns.
"""

import copy
import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from genemodel.errors import ConfigError
from genemodel.settings import nearest, unknown_setting

# A group of files, or one file of a group, and the dataclass whose fields it must list, all of
# them and no others. tests/command/test_cli.py holds every YAML file to this table.
GROUPS: dict[str, str] = {
    "backbone": "genemodel.model.tuning:TuningSettings",
    "gene_labels": "genemodel.gene_tasks.training:GeneLabelSettings",
    "holdout": "genemodel.train.settings:HoldoutSettings",
    "imputation": "genemodel.imputation.network:DecoderSettings",
    "integration": "genemodel.integration.head:IntegrationSettings",
    "log": "genemodel.train.settings:LogSettings",
    "model": "genemodel.model.settings:ModelSettings",
    "new_genes": "genemodel.train.settings:NewGenesSettings",
    "optim": "genemodel.train.settings:OptimSettings",
    "task/pretraining": "genemodel.heads.pretraining:PretrainingSettings",
    "tokens": "genemodel.batches.tokens:TokenSettings",
    "trainer": "genemodel.train.settings:TrainerSettings",
}

# Keys by which a file would ask Hydra to build an object, that is to run code.
_BUILDING_KEY = re.compile(r"_(target|partial|recursive|convert|args)_")
_SETTING_NAME = re.compile(r"[A-Za-z_][\w-]*(\.[\w-]+)*")
# The group whose choices change everything else.
_EXPERIMENT = "experiment"
# Where the folder of a run says what its settings were.
OF_A_RUN = ("settings.json", "finetune.json")
# How a YAML file says that a value must be given.
_REQUIRED = "???"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line of a YAML file: a key with its value as written and its comment."""

    key: str
    value: str
    comment: str


def config_folder() -> Path:
    """Give the folder of the YAML files: inside an installed package, or beside it in a checkout.

    Raises
    ------
    ConfigError
        Neither place has one: the installation is incomplete.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(
        f"no folder of configurations at {package / 'configs'} or {package.parent / 'configs'}: "
        "the installation is incomplete, install genemodel again"
    )


def checked_user_folder(folder: Path) -> Path:
    """Check a user's own folder of YAML files and return it as an absolute path.

    Raises
    ------
    ConfigError
        It does not exist, or a file in it has the name of a shipped one and would be ignored.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"--config-dir {folder}: no such folder; give the folder that holds your groups, "
            "for example one with experiment/mine.yaml"
        )
    shipped = config_folder()
    for file in sorted(folder.rglob("*.yaml")):
        name = file.relative_to(folder)
        if (shipped / name).exists():
            raise ConfigError(
                f"{file} has the name of a file that genemodel ships ({name}), so one of the two "
                "would be ignored; give yours another name"
            )
    return folder.resolve()


def defaults_of(config_name: str) -> dict[str, str | None]:
    """Read which groups a composed file takes, with the choice it makes; None where it makes none.

    Parameters
    ----------
    config_name
        Name of a file directly under ``configs/``, without ``.yaml``.

    Returns
    -------
    Group -> default choice, in the file's order.
    """
    content = _read(config_folder() / f"{config_name}.yaml")
    groups: dict[str, str | None] = {}
    for item in content.get("defaults", []):
        if isinstance(item, Mapping):
            for group, choice in item.items():
                groups[str(group).removeprefix("optional ").removeprefix("override ")] = choice
    return groups


def choices(group: str, user_folder: Path | None = None) -> dict[str, str]:
    """List the choices of a group, shipped ones and the user's, each with its opening comment."""
    found: dict[str, str] = {}
    for root in (config_folder(), user_folder):
        if root is None or not (root / group).is_dir():
            continue
        for file in sorted((root / group).glob("*.yaml")):
            found[file.stem] = opening_comment(file)
    return found


def opening_comment(file: Path) -> str:
    """Give the comment that a YAML file opens with, without the lines that are words to Hydra."""
    words: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if not text.startswith("#"):
            break
        if not text.lstrip("# ").startswith("@package"):
            words.append(text.lstrip("# "))
    return " ".join(words).strip()


def _read(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not readable YAML: {_one_line(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold 'key: value' lines, not a {type(content).__name__}")
    return content


def entries(file: Path) -> list[Entry]:
    """Read the keys of a YAML file in order, with values as written and comments.

    Parameters
    ----------
    file
        A YAML file. A comment belongs to the key on its line, or else to the key right below it.

    Returns
    -------
    One entry for each key that has a value of its own, or of a file of the group that this one
    begins from; keys of nested groups are dotted. The list ``defaults``, which is a word to Hydra,
    is left out.
    """
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return []
    found = {entry.key: entry for base in _bases(file) for entry in entries(base)}
    found |= {entry.key: entry for entry in _entries(root, text, text.splitlines(), "")}
    return list(found.values())


def _bases(file: Path) -> list[Path]:
    """Files of the same group whose values a file begins from: ``defaults: [standard, _self_]``."""
    named = _read(file).get("defaults", [])
    return [
        file.with_name(f"{name}.yaml") for name in named
        if isinstance(name, str) and name != "_self_"
    ]  # fmt: skip


def values_of(file: Path) -> dict[str, Any]:
    """Read the values of a file of a group, on top of those that it begins from."""
    values: dict[str, Any] = {}
    for base in _bases(file):
        values |= values_of(base)
    own = _read(file)
    own.pop("defaults", None)
    return values | own


def _entries(node: yaml.MappingNode, text: str, lines: list[str], prefix: str) -> Iterator[Entry]:
    for key, value in node.value:
        if not prefix and key.value == "defaults":
            continue
        name = f"{prefix}{key.value}"
        if isinstance(value, yaml.MappingNode) and not value.flow_style and value.value:
            yield from _entries(value, text, lines, f"{name}.")
            continue
        written = text[value.start_mark.index : value.end_mark.index].strip()
        # A block list ends where the next key starts; its own line holds only the key.
        end = value.end_mark if value.start_mark.line == key.start_mark.line else key.end_mark
        if not written:
            written, end = "null", key.end_mark
        comment = lines[end.line][end.column :].partition("#")[2].strip()
        yield Entry(name, " ".join(written.split()), comment or _above(lines, key.start_mark))


def _above(lines: list[str], mark: yaml.Mark) -> str:
    """Join the comment lines right above a key, at the key's own indentation."""
    words: list[str] = []
    for line in reversed(lines[: mark.line]):
        text = line.strip()
        if not text.startswith("#") or len(line) - len(line.lstrip()) != mark.column:
            break
        words.insert(0, text.lstrip("# "))
    return " ".join(words)


def names_of(config_name: str) -> dict[str, Any]:
    """Read which settings a composed file has: name -> value, or what a group holds.

    Known without any library but YAML, so that a misspelt name is answered before the program that
    it is for has been loaded.
    """
    folder = config_folder()
    names = values_of(folder / f"{config_name}.yaml")
    for group, choice in defaults_of(config_name).items():
        if choice is not None:
            names[group] = values_of(folder / group / f"{choice}.yaml")
    return names


def refuse_unknown(values: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Refuse names that no setting has, with the nearest that one has.

    Parameters
    ----------
    values
        What was composed.
    names
        From :func:`names_of`.
    """
    _refuse_unknown(values, names, "", names)


def _refuse_unknown(
    values: Mapping[str, Any], names: Mapping[str, Any], where: str, root: Mapping[str, Any]
) -> None:
    for key, value in values.items():
        if key not in names:
            raise ConfigError(unknown_setting(key, where, names, _dotted(root)))
        inner = names[key]
        if isinstance(inner, Mapping) and inner and isinstance(value, Mapping):
            _refuse_unknown(value, inner, f"{where}.{key}" if where else key, root)


def _dotted(names: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, inner in names.items():
        yield f"{prefix}{key}"
        if isinstance(inner, Mapping):
            yield from _dotted(inner, f"{prefix}{key}.")


def values_of_run(path: Path) -> dict[str, Any]:
    """Read the settings that a run was made with.

    Parameters
    ----------
    path
        ``settings.json`` or ``finetune.json`` of a run, the folder of the run, or what
        ``genemodel config`` printed.

    Raises
    ------
    ConfigError
        There are none.
    """
    files = [path]
    if path.is_dir():
        files = [path / name for name in OF_A_RUN if (path / name).is_file()]
        if not files:
            raise ConfigError(f"--from {path}: the folder holds none of {', '.join(OF_A_RUN)}")
    if not files[0].is_file():
        raise ConfigError(f"--from {path}: no such file; give the settings.json of a run")
    try:
        # As JSON first: YAML reads 1e-05 as a text.
        content = json.loads(files[0].read_text(encoding="utf-8"))
    except ValueError:
        content = _read(files[0])
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
        content = content["settings"]
    if not isinstance(content, dict):
        raise ConfigError(f"--from {files[0]}: holds no settings, but {type(content).__name__}")
    return content


def compose(
    config_name: str,
    overrides: Sequence[str] = (),
    *,
    user_folder: Path | None = None,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compose the plain values of a run.

    Parameters
    ----------
    config_name
        Name of a file directly under ``configs/``, without ``.yaml``.
    overrides
        ``group=choice`` for the groups that the file takes, ``key=value`` for everything else;
        values follow Hydra's grammar (``[a,b]``, ``null``, quotes), and a text that the grammar
        does not know, such as a path with brackets, is taken as it stands.
    user_folder
        A folder with the user's own groups.
    base
        Values of a run, from :func:`values_of_run`, that stand in the place of the defaults.

    Returns
    -------
    Nested plain values. Required values that were not given are left out. Keys are not checked
    here: :func:`genemodel.settings.parse` does that.

    Raises
    ------
    ConfigError
        An override that cannot be read, an unknown choice (with the nearest), an interpolation or a
        key that would build an object.
    """
    # Importing Hydra takes longer than printing the help.
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    groups = defaults_of(config_name)
    picked: dict[str, str | None] = {}
    assigned: list[tuple[str, Any]] = []
    for text in overrides:
        key, value = _override(text)
        if key in groups and (value is None or isinstance(value, str | int | float)):
            picked[key] = None if value is None else _checked_choice(key, str(value), user_folder)
        else:
            assigned.append((key, value))
    if (experiment := picked.get(_EXPERIMENT)) is not None:
        _check_experiment(experiment, user_folder)
    hydra_overrides = [
        f"{group}={'null' if choice is None else choice}" for group, choice in picked.items()
    ]
    if user_folder is not None:
        quoted = f"file://{user_folder}".replace("\\", "\\\\").replace("'", "\\'")
        hydra_overrides.append(f"hydra.searchpath=['{quoted}']")
    # The shipped files stay as they are while a process runs; a user's may be edited in between.
    by_hydra = _shipped_by_hydra if user_folder is None else _by_hydra
    try:
        values = by_hydra(str(config_folder()), config_name, tuple(hydra_overrides))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        made = " ".join(f"{group}={choice}" for group, choice in picked.items())
        raise ConfigError(
            f"the files of {config_name}{' with ' + made if made else ''} do not compose: "
            f"{_one_line(error)}"
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"{config_name}.yaml must hold 'key: value' lines")
    plain = {str(key): copy.deepcopy(value) for key, value in values.items()}
    if isinstance(experiment := plain.get(_EXPERIMENT), dict) and _EXPERIMENT in groups:
        # Of a file without its line `# @package _global_`, which means the same.
        del plain[_EXPERIMENT]
        for key, value in experiment.items():
            _assign(plain, str(key), value)
    if base is not None:
        if picked.get(_EXPERIMENT) is not None:
            raise ConfigError(
                f"{_EXPERIMENT}={picked[_EXPERIMENT]}: a run's settings say all that an experiment "
                "would; leave it or --from out"
            )
        for key, value in base.items():
            if key not in picked:
                _assign(plain, str(key), value)
    for key, value in assigned:
        _assign(plain, key, value)
    _refuse_code(plain, "")
    return _without_missing(plain)


def _by_hydra(folder: str, config_name: str, overrides: tuple[str, ...]) -> Any:
    import hydra
    from omegaconf import OmegaConf

    with hydra.initialize_config_dir(folder, version_base="1.3"):
        composed = hydra.compose(config_name, overrides=list(overrides))
    return OmegaConf.to_container(composed, resolve=False, throw_on_missing=False)


# A sweep, a notebook and a suite of tests compose the same files again and again: .3 s each.
_shipped_by_hydra = functools.lru_cache(maxsize=64)(_by_hydra)


def _check_experiment(choice: str, user_folder: Path | None) -> None:
    """Refuse a file that chooses groups without the line by which it may."""
    for root in (config_folder(), user_folder):
        file = None if root is None else root / _EXPERIMENT / f"{choice}.yaml"
        if file is None or not file.is_file():
            continue
        text = file.read_text(encoding="utf-8")
        if not re.search(r"^#\s*@package\s+_global_", text, re.M) and re.search(
            r"^defaults:", text, re.M
        ):
            raise ConfigError(
                f"{file} chooses groups in its defaults, for which its first line has to be "
                "`# @package _global_`: add that line"
            )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _override(text: str) -> tuple[str, Any]:
    """Split one override into its key and its plain value."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from hydra.errors import HydraException

    left, equals, right = text.partition("=")
    key = left.strip().lstrip("+")
    if left.startswith("~"):
        raise ConfigError(f"{text!r}: a setting cannot be removed; write {left[1:]}=null")
    if not equals:
        raise ConfigError(f"{text!r} is not of the form key=value or group=choice")
    if "@" in key:
        raise ConfigError(f"{text!r}: a group has one place only; write {key.split('@')[0]}=...")
    if not _SETTING_NAME.fullmatch(key):
        raise ConfigError(
            f"{text!r}: {key!r} is not the name of a setting; write key=value, "
            "with dots for nested settings"
        )
    try:
        parsed: Override = OverridesParser.create().parse_override(f"{key}={right}")
        if parsed.is_sweep_override():
            raise ConfigError(
                f"{text!r}: several values at once; write {key}=[{right}] for a list, "
                f"run a job each with -m, or quote the text: {key}='\"{right}\"'"
            )
        return key, parsed.value()
    except HydraException as error:
        if right.strip()[:1] in tuple("[{'\""):
            raise ConfigError(
                f"{text!r}: the value cannot be read ({_one_line(error)}); lists are written "
                f"'{key}=[a,b]', and a text with special characters '{key}=\"...\"'"
            ) from error
        # A path may hold brackets, blanks and letters that the grammar has no rule for.
        return key, right


def _checked_choice(group: str, choice: str, user_folder: Path | None) -> str:
    known = choices(group, user_folder)
    if choice in known:
        return choice
    near = nearest(choice, known)
    if not known:
        raise ConfigError(f"group {group!r} has no choices yet, so {group}={choice} cannot be made")
    raise ConfigError(
        f"group {group!r} has no choice {choice!r}"
        + (f": did you mean {group}={near}?" if near else "")
        + f" There are: {', '.join(known)}"
    )


def _assign(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    place = values
    for depth, step in enumerate(path):
        inner = place.get(step)
        if inner is None or inner == _REQUIRED:
            inner = place[step] = {}
        if not isinstance(inner, dict):
            above = ".".join(path[: depth + 1])
            raise ConfigError(
                f"{key!r} cannot be set: {above!r} is {inner!r}, not a group of settings; "
                f"set {above} as a whole"
            )
        place = inner
    if isinstance(value, dict) and isinstance(place.get(last), dict):
        for inner_key, inner_value in value.items():
            _assign(place[last], str(inner_key), inner_value)
    else:
        place[last] = value


def _refuse_code(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            name = f"{where}.{key}" if where else str(key)
            if _BUILDING_KEY.fullmatch(str(key)):
                raise ConfigError(
                    f"setting {name!r} asks to build an object, which configurations may not do; "
                    "remove it and choose by name"
                )
            _refuse_code(inner, name)
    elif isinstance(value, list):
        for place, inner in enumerate(value):
            _refuse_code(inner, f"{where}[{place}]")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(
            f"setting {where!r} is {value!r}: interpolation is not supported; write the value"
        )


def _without_missing(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_missing(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if value != _REQUIRED
    }
