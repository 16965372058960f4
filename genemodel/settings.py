"""Composed values to frozen dataclasses, strictly.

A settings dataclass is the only description of what may be set: the command line, a YAML file
and Python fill the same one. :func:`parse` refuses what it does not know instead of ignoring it,
because a setting that silently does nothing makes its user believe a result that was never
produced.
"""

import dataclasses
import difflib
import functools
import inspect
import json
import logging
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, cast

from genemodel.errors import ConfigError

logger = logging.getLogger(__name__)

_ABSENT = "(absent)"
_NONE = type(None)

# A setting that holds the path of a file or folder and stays a text; `Path` says the same.
type PathText = str
# A setting that names a model: the path of its folder, or its address on the hub
# (`hf://org/name@revision`).
type ModelText = str
# A setting that names a species; taxa are numbers, and stay texts too.
type SpeciesText = str

# What stands before the colon of an address that may lack slashes (`s3:bucket`).
_SCHEMES = frozenset(
    "abfs abfss adl az azure box dbfs dropbox file ftp gcs gdrive github gs hdfs hf http https "
    "lakefs local memory oci oss rsync s3 s3a scp sftp smb ssh wasb webdav webhdfs".split()
)


class MissingSettingError(ConfigError):
    """Settings without a default were not given; everything that was given is in order."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        one = len(names) == 1
        super().__init__(
            f"{'setting' if one else 'settings'} {', '.join(map(repr, names))} "
            f"{'has' if one else 'have'} no default and must be given: "
            + " ".join(f"{name}=..." for name in names)
        )


def check_seed(seed: int, name: str = "seed") -> None:
    """Refuse a seed that the generators of numpy, scikit-learn and torch do not all take."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"{name} is {seed}: a seed is a whole number from 0 to 4294967295.")


def check_least(settings: object, **least: float) -> None:
    """Refuse numbers of settings that are smaller than they can mean."""
    for name, smallest in least.items():
        if getattr(settings, name) < smallest:
            raise ConfigError(
                f"{name} is {getattr(settings, name)}: it must be at least {smallest}."
            )


def texts(values: str | Path | Iterable[str | Path]) -> tuple[str, ...]:
    """Take one text or several, as a call may be given either."""
    return (str(values),) if isinstance(values, str | Path) else tuple(map(str, values))


def is_address(text: str) -> bool:
    """Whether a text is an address (``s3://…``, ``user@host:…``) and not a path.

    Before the first slash of a path stands no colon, unless it is all of a file's name.
    """
    first, slash, _ = text.partition("/")
    scheme, colon, _ = first.partition(":")
    return bool(colon) and (
        bool(slash) or "@" in scheme or re.split(r"[+:]", scheme.lower())[0] in _SCHEMES
    )


def refuse_address(name: str, value: str | Path) -> None:
    """Refuse an address where the path of a file or folder belongs.

    Taken as a path, it would be missing, or results would go to a folder called ``s3:``.
    """
    if is_address(str(value)):
        raise ConfigError(
            f"{name}={value} is an address, not a path: files are read and written only where they "
            "can be mapped, locked and renamed in one step, on this machine or a shared file "
            "system. Copy the file here first; for results choose a folder here and copy it "
            f"afterwards. (A local path with a colon is written ./{value})"
        )


def check_out_folder(out: Path) -> None:
    """Refuse a folder for results that is not there and cannot be made, or cannot be written in."""
    refuse_address("out", out)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file: name a folder.")
    above = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"out={out}: {above} is no folder that you may write in.")


def check_replaced_folder(
    out: Path, verb: str, is_ours: Callable[[Path], bool], *, overwrite: bool
) -> None:
    """Refuse a folder for results that is there, unless it is the verb's own and to be replaced."""
    check_out_folder(out)
    if out.exists() and not overwrite:
        raise ConfigError(f"out={out} exists: set overwrite=true, or another name.")
    if out.exists() and not is_ours(out):
        raise ConfigError(f"out={out} was not written by {verb}: name another folder.")


# What stands before the name of a model on the hub.
HUB = "hf://"
_HUB_ADDRESS = re.compile(r"hf://[\w.-]+/[\w.-]+(@[\w./-]+)?")


def check_model_text(name: str, value: str | Path) -> None:
    """Refuse what is neither the path of a folder nor the address of a model on the hub."""
    if str(value).startswith(HUB):
        if not _HUB_ADDRESS.fullmatch(str(value)):
            raise ConfigError(
                f"{name}={value} is no address of a model on the hub: write hf://ORG/NAME, or "
                "hf://ORG/NAME@REVISION for a branch, a tag or a commit."
            )
        return
    refuse_address(name, value)


# Texts that have been said, each of which is said once.
_SAID: set[str] = set()


def note_once(text: str) -> None:
    """Say something to the user, once in a process."""
    if text not in _SAID:
        _SAID.add(text)
        logger.warning("%s", text)


def renamed_keys(
    values: Mapping[str, object], names: Mapping[str, str], whose: str = ""
) -> dict[str, object]:
    """Put the names of today in the place of names of before, with a note.

    Parameters
    ----------
    values
        By name.
    names
        Old name -> name of today.
    whose
        The call or verb, for the note.

    Raises
    ------
    ConfigError
        A value is given by both names.
    """
    found: dict[str, object] = {}
    for key, value in values.items():
        name = names.get(key, key)
        if name in found or (name != key and name in values):
            raise ConfigError(f"{key} and {name} are one setting by two names: leave {key} out.")
        if name != key:
            note_once(f"Note: {whose + ': ' if whose else ''}{key}= is now called {name}=.")
        found[name] = value
    return found


class renamed:
    """Accept the names that parameters of a call, or settings of a class, had before.

    Each is noted once; a class also answers to them as attributes.

    Parameters
    ----------
    **names
        Old name of the one of today.
    """

    def __init__(self, **names: str) -> None:
        self.names = names

    def __call__[F: Callable[..., Any]](self, function: F) -> F:
        """Wrap a function, or the constructor of a class."""
        whose = function.__name__
        if not inspect.isclass(function):
            return cast("F", _accepting(function, self.names, whose))
        cls: Any = function
        cls.__init__ = _accepting(cls.__init__, self.names, whose)
        for old, new in self.names.items():
            setattr(cls, old, property(functools.partial(_attribute, new)))
        cls.__renamed__ = {**getattr(cls, "__renamed__", {}), **self.names}
        return function


def _attribute(name: str, settings: object) -> object:
    return getattr(settings, name)


def _accepting(function: Any, names: Mapping[str, str], whose: str) -> Any:
    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if not names.keys().isdisjoint(named):
            named = renamed_keys(named, names, f"gm.{whose}")
        return function(*given, **named)

    return call


def either_seed[F: Callable[..., Any]](function: F) -> F:
    """Let a call take ``random_state``, as scanpy's do, for its ``seed``."""

    @functools.wraps(function)
    def call(*given: Any, **named: Any) -> Any:
        if "random_state" in named:
            if "seed" in named:
                raise TypeError(f"{function.__name__}() got seed and random_state: give one")
            named["seed"] = named.pop("random_state")
        return function(*given, **named)

    return cast("F", call)


def some(names: Sequence[str], most: int = 8) -> str:
    """Name the first of many, and say how many more there are; ``none`` where there are none."""
    more = f", … {len(names) - most:,} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that was most likely meant.

    Parameters
    ----------
    name
        What was written.
    known
        The names that exist.

    Returns
    -------
    The closest known name (case, hyphens and small misspellings forgiven; else the shortest one
    that contains `name` or is contained in it), or None where nothing is near.
    """
    by_folded: dict[str, str] = {}
    for candidate in known:
        by_folded.setdefault(_folded(candidate), candidate)
    wanted = _folded(name)
    if wanted in by_folded:
        return by_folded[wanted]
    close = difflib.get_close_matches(wanted, by_folded, n=1, cutoff=0.6)
    if close:
        return by_folded[close[0]]
    if len(wanted) < 2:
        return None
    containing = [
        folded for folded in by_folded if len(folded) > 1 and (wanted in folded or folded in wanted)
    ]
    return (
        by_folded[min(containing, key=lambda folded: (len(folded), folded))] if containing else None
    )


def _folded(name: str) -> str:
    return name.casefold().replace("-", "_").strip()


def parse[T](cls: type[T], values: Mapping[str, object], *, where: str = "") -> T:
    """Make a settings dataclass from plain values, refusing whatever does not fit.

    Parameters
    ----------
    cls
        A dataclass. Its fields may be ``bool``, ``int``, ``float``, ``str``, ``Path``,
        ``Literal``, other settings dataclasses, ``tuple[X, ...]``, ``tuple[X, Y]``, ``list[X]``,
        ``dict[str, X]`` and unions of these. A union of several dataclasses is told apart by a
        ``Literal`` field that they share, for example ``kind``.
    values
        Plain values as YAML or JSON give them: mappings, sequences, numbers, strings, None.
    where
        Name of the place the values come from, put before every key in messages.

    Returns
    -------
    An instance of `cls`. An ``int`` is accepted for a ``float``; a ``bool`` never for a number; a
    list for a tuple; one text or number for a list of any length; a string for a path (``~`` is
    expanded). Where nothing is a value (null, an empty text or an empty list by default), ``null``,
    ``''`` and ``None`` all say it.

    Raises
    ------
    ConfigError
        An unknown key (with the nearest known one), a value of the wrong type, a choice that does
        not exist, a number that is not finite, or whatever the dataclass itself refuses.
    MissingSettingError
        Everything given is in order, but fields without a default are missing; all are named.
    """
    missing: list[str] = []
    parsed = _parse_dataclass(cls, values, where, missing, cls)
    if missing:
        raise MissingSettingError(missing)
    return cast("T", parsed)


def to_values(settings: object) -> dict[str, Any]:
    """Give the plain, JSON-able values of a settings dataclass, the inverse of :func:`parse`.

    Parameters
    ----------
    settings
        An instance of a settings dataclass.

    Returns
    -------
    Nested dictionaries, lists, numbers, strings and None, in field order; paths become strings.
    """
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        raise TypeError(f"a settings dataclass is expected, not {settings!r}")
    return {
        field.name: _to_plain(
            getattr(settings, field.name), f"{type(settings).__name__}.{field.name}"
        )
        for field in dataclasses.fields(settings)
        if field.init
    }


def difference(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """List what changed between two sets of plain values.

    Parameters
    ----------
    old, new
        Nested plain values, as :func:`to_values` gives them.

    Returns
    -------
    One line for each changed setting, such as ``optim.lr: 0.001 -> 0.002``, in the order of `old`,
    then the settings that only `new` has. A setting that one side lacks shows as ``(absent)``.
    """
    old_leaves, new_leaves = dict(_leaves(old)), dict(_leaves(new))
    lines = []
    for key in [*old_leaves, *(key for key in new_leaves if key not in old_leaves)]:
        before = json.dumps(old_leaves[key], sort_keys=True) if key in old_leaves else _ABSENT
        after = json.dumps(new_leaves[key], sort_keys=True) if key in new_leaves else _ABSENT
        if before != after and not _same_number(old_leaves.get(key), new_leaves.get(key)):
            lines.append(f"{key}: {before} -> {after}")
    return lines


def _same_number(old: object, new: object) -> bool:
    """1 and 1.0 are the same setting; 1 and True are not."""
    return _is_number(old) and _is_number(new) and old == new


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{name}.")
        else:
            yield name, value


def _to_plain(value: object, where: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_values(value)
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, tuple | list):
        return [_to_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(f"{where} holds a {type(value).__name__}, which is not a plain value")


def setting_types(cls: type) -> dict[str, Any]:
    """Give the settable fields of a settings dataclass with their resolved types, in order."""
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls!r} is not a dataclass")
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _parse_dataclass(
    cls: type, values: object, where: str, missing: list[str], root: type
) -> object:
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{_named(where)} must be a group of settings ({', '.join(setting_types(cls))}), "
            f"not {_shown(values)}"
        )
    hints = setting_types(cls)
    values = renamed_keys(values, getattr(cls, "__renamed__", {}))
    for key in values:
        if key not in hints:
            raise ConfigError(unknown_setting(str(key), where, hints, _all_names(root)))
    arguments: dict[str, object] = {}
    n_missing = len(missing)
    for field in dataclasses.fields(cls):
        if not field.init:
            continue
        name = _join(where, field.name)
        if field.name in values:
            value = values[field.name]
            nothing = _nothing(field, hints[field.name])
            if value in _NOTHING and nothing is not _SOMETHING:
                arguments[field.name] = nothing
                continue
            arguments[field.name] = _parse_value(hints[field.name], value, name, missing, root)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(name)
    if len(missing) > n_missing:
        return None
    try:
        return cls(**arguments)
    except ConfigError as error:
        # A dataclass knows its own keys but not where it stands.
        if where and where not in str(error):
            raise ConfigError(f"{where}: {error}") from error
        raise


# How a user may say that there is nothing; the last is Python's word, where YAML's is null.
_NOTHING: tuple[object, ...] = (None, "", "None")
_SOMETHING = object()


def _nothing(field: "dataclasses.Field[Any]", hint: Any) -> object:
    """Give what a field holds where there is nothing; ``_SOMETHING`` where it cannot be empty."""
    default = field.default
    if default is dataclasses.MISSING and field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if _NONE in _members(hint):
        return None
    return default if isinstance(default, str | tuple) and not default else _SOMETHING


def unknown_setting(key: str, where: str, known: Iterable[str], everywhere: Iterable[str]) -> str:
    """Say that a setting does not exist, and which was most likely meant.

    Parameters
    ----------
    key, where
        What was written, and the group in which.
    known
        What may stand there.
    everywhere
        Dotted names of all settings.
    """
    hints = list(known)
    message = f"unknown setting {_join(where, key)!r}"
    elsewhere = [name for name in everywhere if _folded(name.rpartition(".")[2]) == _folded(key)]
    near = nearest(key, hints)
    if near is not None:
        return f"{message}: did you mean {_join(where, near)!r}?"
    if elsewhere:
        return f"{message}: did you mean {elsewhere[0]!r}?"
    known = ", ".join(hints) if hints else "nothing can be set here"
    return f"{message}; known here: {known}"


def _all_names(cls: type, prefix: str = "", within: tuple[type, ...] = ()) -> Iterable[str]:
    if cls in within:
        return
    for name, hint in setting_types(cls).items():
        yield f"{prefix}{name}"
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                yield from _all_names(cast("type", member), f"{prefix}{name}.", (*within, cls))


def _members(hint: Any) -> tuple[Any, ...]:
    """Give the alternatives of a union, or the type itself, with aliases resolved."""
    while isinstance(hint, typing.TypeAliasType):
        hint = hint.__value__
    if typing.get_origin(hint) in (Union, types.UnionType):
        return tuple(inner for member in typing.get_args(hint) for inner in _members(member))
    return (hint,)


def _is_path(hint: Any) -> bool:
    """Whether a type is, or may be, the path of a file or folder."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(map(_is_path, typing.get_args(hint)))
    return hint is Path or hint is PathText or hint is ModelText


def _is_model(hint: Any) -> bool:
    """Whether a type is, or may be, the path or the address of a model."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(map(_is_model, typing.get_args(hint)))
    return hint is ModelText


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _parse_value(hint: Any, value: object, where: str, missing: list[str], root: type) -> object:
    members = _members(hint)
    if value is None and _NONE in members:
        return None
    if isinstance(value, str | Path) and _is_path(hint):
        if not str(value).strip():
            raise ConfigError(f"{_named(where)} must be a path, not an empty text")
        (check_model_text if _is_model(hint) else refuse_address)(where, value)
    if type(value) is int and SpeciesText in (hint, *typing.get_args(hint)):
        value = str(value)
    rest = tuple(member for member in members if member is not _NONE)
    if not rest:
        raise ConfigError(f"{_named(where)} must be {_expected(hint)}, not {_shown(value)}")
    if len(rest) == 1:
        return _parse_one(rest[0], value, where, hint, missing, root)
    return _parse_union(rest, value, where, hint, missing, root)


def _parse_union(
    members: tuple[Any, ...], value: object, where: str, hint: Any, missing: list[str], root: type
) -> object:
    classes = [member for member in members if dataclasses.is_dataclass(member)]
    if isinstance(value, Mapping) and classes:
        return _parse_dataclass(_chosen(classes, value, where), value, where, missing, root)
    # An exact type wins over a conversion: `int | float` keeps 1 an int, `str | Path` keeps a str.
    for member in members:
        if isinstance(member, type) and type(value) is member:
            return _parse_one(member, value, where, hint, missing, root)
    fitting = [member for member in members if _fits(member, value)]
    if not fitting:
        raise ConfigError(f"{_named(where)} must be {_expected(hint)}, not {_shown(value)}")
    return _parse_one(fitting[0], value, where, hint, missing, root)


def _fits(member: Any, value: object) -> bool:
    """Whether a value has the outer shape of a type, so that a deeper error is the right one."""
    origin = typing.get_origin(member)
    if origin is Literal:
        return value in typing.get_args(member) or (
            isinstance(value, str) and all(isinstance(c, str) for c in typing.get_args(member))
        )
    if origin in (tuple, list):
        return isinstance(value, tuple | list)
    if origin is dict or dataclasses.is_dataclass(member):
        return isinstance(value, Mapping)
    if member is float:
        return _is_number(value)
    if member is Path:
        return isinstance(value, str | Path)
    return type(value) is member


def _chosen(classes: list[Any], values: Mapping[str, object], where: str) -> type:
    """Pick the dataclass of a union by the ``Literal`` field that all of them have."""
    if len(classes) == 1:
        return cast("type", classes[0])
    tags: dict[str, dict[object, type]] = {}
    for cls in classes:
        for name, hint in setting_types(cls).items():
            if typing.get_origin(hint) is Literal:
                for choice in typing.get_args(hint):
                    tags.setdefault(name, {})[choice] = cls
    shared = [name for name, found in tags.items() if len(set(found.values())) == len(classes)]
    if not shared:
        raise TypeError(f"{where}: {classes} share no Literal field that tells them apart")
    tag, found = shared[0], tags[shared[0]]
    name = _join(where, tag)
    if tag not in values:
        raise ConfigError(f"{name!r} is missing: it must be one of {_choices(found)}")
    if values[tag] not in found:
        raise ConfigError(_no_choice(name, values[tag], found))
    return found[values[tag]]


def _choices(known: Iterable[object]) -> str:
    return ", ".join(str(choice) for choice in known)


def _no_choice(where: str, value: object, known: Iterable[object]) -> str:
    known = list(known)
    near = nearest(value, map(str, known)) if isinstance(value, str) else None
    hint = f" (did you mean {near!r}?)" if near is not None else ""
    return f"{_named(where)} must be one of {_choices(known)}, not {_shown(value)}{hint}"


def _parse_one(
    kind: Any, value: object, where: str, hint: Any, missing: list[str], root: type
) -> object:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _parse_dataclass(cast("type", kind), value, where, missing, root)
    if origin is Literal:
        for choice in typing.get_args(kind):
            if type(choice) is type(value) and choice == value:
                return value
        others = [m for m in _members(hint) if m is not _NONE and typing.get_origin(m) != Literal]
        if others:
            raise ConfigError(f"{_named(where)} must be {_expected(hint)}, not {_shown(value)}")
        raise ConfigError(_no_choice(where, value, typing.get_args(kind)))
    if origin in (tuple, list):
        return _parse_sequence(kind, value, where, hint, missing, root)
    if origin is dict:
        return _parse_mapping(kind, value, where, hint, missing, root)
    if kind is float and _is_number(value):
        number = float(cast("float", value))
        if not math.isfinite(number):
            raise ConfigError(f"{_named(where)} must be a finite number, not {value}")
        return number
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if kind not in (bool, int, float, str, Path):
        raise TypeError(f"{where}: settings of type {kind!r} are not supported")
    raise ConfigError(
        f"{_named(where)} must be {_expected(hint)}, not {_shown(value)}{_remedy(kind, value)}"
    )


def _parse_sequence(
    kind: Any, value: object, where: str, hint: Any, missing: list[str], root: type
) -> object:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    fixed = origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis)
    if not fixed and isinstance(value, str | int | float):
        value = (value,)
    if not isinstance(value, tuple | list):
        raise ConfigError(f"{_named(where)} must be {_expected(hint)}, not {_shown(value)}")
    if fixed:
        if len(value) != len(inner):
            raise ConfigError(
                f"{_named(where)} must be {_expected(hint)}, "
                f"not {len(value)} values {_shown(value)}"
            )
        kinds: list[Any] = list(inner)
    else:
        kinds = [inner[0]] * len(value)
    items = [
        _parse_value(item_kind, item, f"{where}[{place}]", missing, root)
        for place, (item_kind, item) in enumerate(zip(kinds, value, strict=True))
    ]
    return tuple(items) if origin is tuple else items


def _parse_mapping(
    kind: Any, value: object, where: str, hint: Any, missing: list[str], root: type
) -> dict[str, object]:
    key_kind, item_kind = typing.get_args(kind)
    if key_kind is not str:
        raise TypeError(f"{where}: only dict[str, ...] is supported, not {kind!r}")
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_named(where)} must be {_expected(hint)}, not {_shown(value)}")
    for key in value:
        if not isinstance(key, str):
            raise ConfigError(f"{_named(where)} has the key {_shown(key)}; keys must be text")
    return {
        key: _parse_value(item_kind, item, _join(where, key), missing, root)
        for key, item in value.items()
    }


def _remedy(kind: Any, value: object) -> str:
    if kind is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind is str and isinstance(value, bool | int | float):
        return f"; write it in quotes, '\"{value}\"'"
    if kind is bool and isinstance(value, str | int):
        return "; write true or false"
    return ""


def _named(where: str) -> str:
    return f"setting {where!r}" if where else "the settings"


_PLAIN_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a path",
    _NONE: "null",
}


def _expected(hint: Any) -> str:
    words: list[str] = []
    for member in _members(hint):
        origin, inner = typing.get_origin(member), typing.get_args(member)
        if member in _PLAIN_WORDS:
            words.append(_PLAIN_WORDS[member])
        elif origin is Literal:
            words.append(f"one of {_choices(inner)}")
        elif origin is list or (origin is tuple and len(inner) == 2 and inner[1] is Ellipsis):
            words.append(f"a list of items, each {_expected(inner[0])}")
        elif origin is tuple:
            words.append(f"a list of {len(inner)} items ({', '.join(map(_expected, inner))})")
        else:
            words.append("a group of settings")
    return " or ".join(dict.fromkeys(words))


def _shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, Mapping):
        return f"a group of settings ({', '.join(map(str, value))})"
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    kind = {bool: "true/false value", int: "whole number", float: "number", str: "text"}
    name = kind.get(type(value), type(value).__name__)
    return f"the {name} {str(value).lower() if isinstance(value, bool) else text}"


# -- what is said on the way ---------------------------------------------------------------------

# As scanpy numbers and names them; a hint is what a log calls info.
_VERBOSITY = {
    "error": logging.ERROR, "warning": logging.WARNING, "info": logging.INFO, "hint": logging.INFO,
    "debug": logging.DEBUG,
}  # fmt: skip


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "") -> str:
    """Give the end of a refusal that asks for the nearest known name, where one is near."""
    near = nearest(name, known)
    return otherwise if near is None else f": did you mean {near!r}?"


def somebody_looks_on() -> bool:
    """Whether a bar is seen where standard error goes: on a terminal or in a notebook."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return sys.stderr.isatty() or hasattr(shell, "kernel")


if typing.TYPE_CHECKING:
    verbosity: str | int


class _Settings(types.ModuleType):
    """The module, with a property: ``genemodel.settings.verbosity = "info"``, or 0 to 4."""

    @property
    def verbosity(self) -> str:
        """What is said on the way: error, warning (default), info or debug."""
        level = logging.getLogger("genemodel").getEffectiveLevel()
        return min(_VERBOSITY, key=lambda name: abs(_VERBOSITY[name] - level))

    @verbosity.setter
    def verbosity(self, value: str | int) -> None:
        names = list(_VERBOSITY)
        name = names[value] if value in range(len(names)) and type(value) is int else value
        if name not in _VERBOSITY:
            raise ConfigError(
                f"verbosity={value!r}: one of {', '.join(names)}, or 0 to {len(names) - 1}."
            )
        library = logging.getLogger("genemodel")
        library.setLevel(_VERBOSITY[name])
        # Asked to speak, it does: in a script or notebook that has set up no log of its own.
        if not library.hasHandlers():
            library.addHandler(logging.StreamHandler())


sys.modules[__name__].__class__ = _Settings
