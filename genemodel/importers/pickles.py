"""Gene dictionaries out of pickle files, of which nothing is ever executed.

A pickle is a program. This reads it as a list of instructions (:func:`pickletools.genops`) and
carries out only those that build plain values: dictionaries, lists, tuples, text, bytes, numbers.
Of all the names that it may call, eight have a meaning here, and each means a few lines of this
file: nothing is imported, and numpy sees bytes only after kind, size and shape have been checked.
"""

import pickletools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from genemodel.errors import DataError
from genemodel.importers.pointers import refuse_pointer

# The largest published table (a GeneCompass prior) has 126 MB.
_LARGEST = 1 << 30
_MULTIARRAY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_MEANINGS = {
    **{f"{module}.scalar": "scalar" for module in _MULTIARRAY},
    **{f"{module}._reconstruct": "array" for module in _MULTIARRAY},
    **{f"{module}._frombuffer": "buffer" for module in _NUMERIC},
    "numpy.dtype": "dtype",
    "numpy.ndarray": "ndarray",
    "_codecs.encode": "encode",
    "collections.OrderedDict": "dict",
    # No bytes at all, up to protocol 2.
    "__builtin__.bytes": "bytes",
}
# Numbers alone: no objects, no text, no fields.
_KINDS = {
    *(f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)), "f2", "f4", "f8", "b1"
}  # fmt: skip
_CONSTANTS = {
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "INT", "LONG",
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
}  # fmt: skip
_FIXED: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_MARK = object()


class _RefusedError(Exception):
    """What a pickle holds that no dictionary needs."""


@dataclass(frozen=True)
class _Name:
    """A name that has a meaning here."""

    meaning: str


@dataclass
class _Kind:
    """The number format of an array."""

    code: str
    order: str = "<"

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.code)


@dataclass
class _Array:
    """An array of which nothing but its existence has been read yet."""

    values: np.ndarray | None = None


def read_pickle(path: str | Path) -> Any:
    """Read the plain values of a pickle file.

    Returns
    -------
    Dictionaries, lists, tuples, text, bytes and numbers; arrays of numbers as numpy arrays.

    Raises
    ------
    DataError
        It is missing, a git-lfs pointer, cut off, no pickle, or holds anything else.
    """
    path = Path(path)
    refuse_pointer(path)
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} has more than 1 GiB: no gene dictionary is that large.")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror or error}).") from error
    try:
        return _plain(_run(data))
    except _RefusedError as error:
        raise DataError(
            f"{path} is refused: it holds {error}. A gene dictionary is made of text and numbers "
            "alone, and nothing in it is executed here. Take the file from its publisher again, or "
            "write the dictionary as JSON."
        ) from None
    except (
        ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error
    ) as error:  # fmt: skip
        raise DataError(
            f"{path} is no complete pickle file ({error}): copy it again from where it came from."
        ) from error


def _plain(value: Any) -> Any:
    """Refuse what was begun and not finished."""
    if isinstance(value, _Name | _Kind) or value is _MARK:
        raise _RefusedError("a bare name instead of values")
    if isinstance(value, _Array):
        return _finished(value)
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, _Array):
                value[key] = _finished(item)
            elif isinstance(item, _Name | _Kind):
                raise _RefusedError("a bare name instead of values")
    return value


def _finished(array: _Array) -> np.ndarray:
    if array.values is None:
        raise _RefusedError("an array without content")
    return array.values


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _CONSTANTS:
            stack.append(argument)
        elif name in _FIXED:
            stack.append(_FIXED[name])
        elif name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            if len(stack) != 1:
                raise ValueError("values are left over")
            return stack.pop()
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"):
            stack.append({"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}[name]())
        elif name in ("DICT", "LIST", "TUPLE"):
            items = _to_mark(stack)
            stack.append(
                _pairs(items) if name == "DICT" else items if name == "LIST" else tuple(items)
            )
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack.append(tuple(_take(stack, int(name[-1]))))
        elif name in ("SETITEM", "SETITEMS"):
            items = _take(stack, 2) if name == "SETITEM" else _to_mark(stack)
            _exactly(stack[-1], dict).update(_pairs(items))
        elif name in ("APPEND", "APPENDS"):
            items = _take(stack, 1) if name == "APPEND" else _to_mark(stack)
            _exactly(stack[-1], list).extend(items)
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            _to_mark(stack)
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            stack.append(_named(*_take(stack, 2)))
        elif name == "REDUCE":
            called, arguments = _take(stack, 2)
            stack.append(_call(called, _exactly(arguments, tuple)))
        elif name == "BUILD":
            (state,) = _take(stack, 1)
            _build(stack[-1], state)
        else:
            raise _RefusedError(f"the instruction {name}")
    raise ValueError("it ends in the middle")


def _take(stack: list[Any], n: int) -> list[Any]:
    if len(stack) < n or any(item is _MARK for item in stack[-n:]):
        raise ValueError("a value is missing")
    taken = stack[-n:]
    del stack[-n:]
    return taken


def _to_mark(stack: list[Any]) -> list[Any]:
    at = len(stack) - 1
    while stack[at] is not _MARK:
        at -= 1
        if at < 0:
            raise ValueError("a mark is missing")
    items = stack[at + 1 :]
    del stack[at:]
    return items


def _exactly(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _RefusedError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _pairs(items: list[Any]) -> dict[Any, Any]:
    if len(items) % 2:
        raise ValueError("a key has no value")
    for key in items[::2]:
        if not isinstance(key, str | int | float | bytes | tuple) and key is not None:
            raise _RefusedError(f"a {type(key).__name__} as a key")
    return dict(zip(items[::2], items[1::2], strict=True))


def _named(module: Any, name: Any) -> _Name:
    meaning = _MEANINGS.get(f"{module}.{name}")
    if meaning is None:
        raise _RefusedError(f"a call of {module}.{name}")
    return _Name(meaning)


def _call(called: Any, arguments: tuple[Any, ...]) -> Any:
    if not isinstance(called, _Name):
        raise _RefusedError("a call of a value")
    match called.meaning, arguments:
        case "dict", ():
            return {}
        case "bytes", ():
            return b""
        case "dict", (list() as pairs,):
            return _pairs([part for pair in pairs for part in _exactly_pair(pair)])
        case "dtype", (str() as code, *_):
            if code not in _KINDS:
                raise _RefusedError(f"numbers of the format {code[:40]!r}")
            return _Kind(code)
        case "scalar", (_Kind() as kind, bytes() as data):
            return _numbers(kind, data, ()).item()
        case "encode", (str() as text, "latin1" | "latin-1"):
            return text.encode("latin-1")
        case "array", (_Name("ndarray"), tuple(), bytes()):
            return _Array()
        case "buffer", (bytes() | bytearray() as data, _Kind() as kind, tuple() as shape, *_):
            return _numbers(kind, bytes(data), shape, fortran=arguments[3:4] == ("F",))
    raise _RefusedError(f"an unusual {called.meaning}")


def _exactly_pair(pair: Any) -> tuple[Any, Any]:
    if not isinstance(pair, list | tuple) or len(pair) != 2:
        raise _RefusedError("an unusual dict")
    return pair[0], pair[1]


def _build(target: Any, state: Any) -> None:
    match target, state:
        case _Kind(), (int(), "<" | ">" | "|" | "=" as order, None, None, None, *_):
            target.order = order
        case (
            _Array(values=None),
            (int(), tuple() as shape, _Kind() as kind, bool() | 0 | 1 as fortran, bytes() as data),
        ):
            target.values = _numbers(kind, data, shape, fortran=bool(fortran))
        case _:
            raise _RefusedError(f"a change of a {type(target).__name__.lstrip('_').lower()}")


def _numbers(kind: _Kind, data: bytes, shape: Any, *, fortran: bool = False) -> np.ndarray:
    if len(shape) > 2 or any(type(n) is not int or n < 0 for n in shape):
        raise _RefusedError(f"an array of the shape {str(shape)[:60]}")
    size = 1
    for n in shape:
        size *= n
    if size * kind.dtype.itemsize != len(data):
        raise _RefusedError(
            f"an array of the shape {shape} in {len(data):,} bytes, which do not fit"
        )
    flat = np.frombuffer(data, kind.dtype)
    return flat.reshape(shape, order="F" if fortran else "C")
