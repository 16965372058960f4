"""How cells are read: the settings that every verb and every call on cells has, in one place.

A model that was trained on a file must read it again, so what one verb can be told about a file
all of them can, under the same name and with the same default.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self, TypedDict

from genemodel.cells.missing_labels import placeholders
from genemodel.errors import ConfigError
from genemodel.settings import SpeciesText, did_you_mean

# Smallest share of gene names that must be genes of a vocabulary: a third is what panels of
# several technologies have in common with it, another species' names have less.
MIN_FRACTION = 0.3


class InputOptions(TypedDict, total=False):
    """The same as keyword arguments of a call; see :class:`InputSettings`."""

    layer: str | None
    species: str | int | None
    column: str | None
    genome: str | None
    transpose: bool
    allow_fractional: bool
    min_fraction: float
    missing_labels: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class InputSettings:
    """How cells are read.

    Attributes
    ----------
    layer
        Where the raw counts are: default ``X``; ``"raw"``, or the name of a layer. Anything but
        raw counts is refused, and no other matrix is taken instead.
    species
        One species for all cells, by its name, Latin name, taxon (``9606``, ``NCBITaxon:9606``) or
        assembly (``GRCh38``); or ``"obs:COLUMN"`` for one a cell. By default the obs column
        ``species`` (or CELLxGENE's ``organism``), or the only one that a model knows.
    column
        Column of ``var`` that holds the gene names, ``"index"`` for its index. By default index
        and columns are looked at, and the one with most known genes is taken.
    genome
        Of a reference of several genomes the one to take, as 10x files name it.
    transpose
        Turn what is read from a file: its rows are the genes. Tables are turned by themselves where
        names tell.
    allow_fractional
        Round expected or corrected counts (RSEM, alevin, SoupX, CellBender) to the nearest whole
        number, halves to the even one, instead of refusing them.
    min_fraction
        Smallest share of the gene names that a vocabulary must know.
    missing_labels
        Texts in columns of batches, labels, donors and species that stand for a missing value,
        beside the usual ones (``nan``, ``Unknown``, ``unassigned`` …); ``"-unknown"`` makes a label
        of one.
    """

    layer: str | None = None
    species: SpeciesText | None = None
    column: str | None = None
    genome: str | None = None
    transpose: bool = False
    allow_fractional: bool = False
    min_fraction: float = MIN_FRACTION
    missing_labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("layer", "species", "column", "genome"):
            value = getattr(self, name)
            # An empty text is how a command line says none; a taxon may be given as a number.
            object.__setattr__(self, name, str(value) if value not in (None, "") else None)
        if not 0 <= self.min_fraction <= 1:
            raise ConfigError(f"min_fraction is {self.min_fraction}: it must be between 0 and 1")
        placeholders(self.missing_labels)
        object.__setattr__(self, "missing_labels", tuple(self.missing_labels))

    @classmethod
    def given(cls, options: Mapping[str, Any], **others: Any) -> Self:
        """Make them of the keyword arguments of a call.

        Raises
        ------
        TypeError
            One is none of them: what Python says of any wrong argument.
        """
        for name in options:
            if name not in NAMES:
                raise TypeError(
                    f"got an unexpected keyword argument {name!r}{did_you_mean(name, NAMES)}"
                )
        return cls(**options, **others)

    def part[T](self, kind: type[T]) -> T:
        """Take the fields of one of the classes that the settings of a verb are made of."""
        return kind(**{f.name: getattr(self, f.name) for f in fields(kind)})  # type: ignore[arg-type]

    @property
    def reading(self) -> "InputSettings":
        """These alone, of a verb whose settings have further fields."""
        return self.part(InputSettings)

    def but(self, **changes: Any) -> Self:
        """Return a copy with some changed."""
        return replace(self, **changes)

    @property
    def changed(self) -> list[str]:
        """Names of those that are not as they are by default."""
        default = InputSettings()
        return [name for name in NAMES if getattr(self, name) != getattr(default, name)]

    def options(self) -> dict[str, Any]:
        """Give all of them as keyword arguments."""
        return {name: getattr(self, name) for name in NAMES}

    def counting(self) -> dict[str, Any]:
        """Give those that say which numbers are the counts, and of which genes."""
        names = ("layer", "column", "genome", "transpose", "allow_fractional")
        return {name: getattr(self, name) for name in names}

    def opening(self) -> dict[str, Any]:
        """Give those that :func:`~genemodel.cells.sources.open_source` reads."""
        return self.counting() | {
            "species": self.species, "missing_labels": self.missing_labels,
        }  # fmt: skip


NAMES = tuple(f.name for f in fields(InputSettings))
# Those that say where things stand in one file; of two files each has its own. The others say what
# is accepted, of both.
OF_ONE_FILE = ("layer", "species", "column", "genome", "transpose")
_ONE_FILE = re.compile(rf"(?<![\w.])({'|'.join(OF_ONE_FILE)})(?==)")


def for_reference(message: str) -> str:
    """Name in a message on the second file of a verb the settings of that file."""
    return _ONE_FILE.sub(r"reference_\1", message)


def _documented() -> str:
    """Describe them as parameters, in the words of the class."""
    text = inspect.cleandoc(InputSettings.__doc__ or "")
    return text.partition("Attributes\n----------\n")[2].strip()


def reads_cells[F: Callable[..., Any]](function: F) -> F:
    """Name and describe the :class:`InputOptions` of a call in its signature and its help.

    The call takes them as ``**options``; what they are is written down in one place, and shown in
    each.
    """
    signature = inspect.signature(function)
    own = list(signature.parameters.values())
    options = own.pop()
    assert options.kind is inspect.Parameter.VAR_KEYWORD
    own += [
        inspect.Parameter(
            f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default,
            annotation=InputOptions.__annotations__[f.name],
        )
        for f in fields(InputSettings)
    ]  # fmt: skip
    function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    text = inspect.cleandoc(function.__doc__ or "")
    begin, place, rest = text.partition("**options\n")
    assert place, f"{function.__qualname__} does not describe **options"
    _, _, behind = rest.partition("\n")  # one line: where they are described
    function.__doc__ = f"{begin}{_documented()}\n{behind}"
    return function
