"""``copy=True``: a call that writes into an AnnData writes into a copy of it instead."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from genemodel.errors import ConfigError

_COPY = """copy
    Leave ``adata`` as it is and write into a copy, which is returned{beside}.
"""


def may_copy[F: Callable[..., Any]](function: F) -> F:
    """Let a call on an AnnData, its first argument, take ``copy=True`` as scanpy's do.

    What the call itself returns comes behind the copy, as a pair; where it returns nothing the copy
    comes alone.
    """

    @functools.wraps(function)
    def call(*given: Any, copy: bool = False, **named: Any) -> Any:
        if not copy:
            return function(*given, **named)
        first = given[0] if given else named.pop("adata", None)
        if first is None or isinstance(first, str | Path):
            raise ConfigError("copy=True is for an AnnData; a file is never changed: leave it out.")
        adata = first.to_memory() if first.isbacked else first.copy()
        found = function(adata, *given[1:], **named)
        return adata if found is None else (adata, found)

    signature = inspect.signature(function)
    taken = inspect.Parameter(
        "copy", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool
    )
    own = list(signature.parameters.values())
    call.__signature__ = signature.replace(parameters=[*own, taken])  # type: ignore[attr-defined]
    beside = "" if "None" in str(signature.return_annotation) else " before what else is"
    text = inspect.cleandoc(function.__doc__ or "")
    described = _COPY.format(beside=beside)
    for section in ("Returns", "Raises", "Notes"):
        begin, head, rest = text.partition(f"\n\n{section}\n---")
        if head:
            call.__doc__ = f"{begin}\n{described.rstrip()}{head}{rest}"
            break
    return cast("F", call)
