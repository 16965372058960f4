"""An obs column as times: which values there are, in which order, and how far apart.

Axes: C cells, T times.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from genemodel.cells.missing_labels import without_placeholders
from genemodel.errors import ConfigError, DataError
from genemodel.inference.obs_keys import column
from genemodel.settings import did_you_mean, some

# With two times there is nothing between two others.
MIN_TIMES = 3
# Cells of a time below which neither its place nor its population can be measured.
MIN_CELLS = 10
# More values than this are a measurement, whose neighbours say nothing about a population.
MOST_TIMES = 60
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Times:
    """The times of cells.

    Attributes
    ----------
    names
        Values of the column, the earliest first.
    value_T
        What they are as numbers.
    code_C
        Number of every cell's time; -1 where it is missing or not in the order.
    measured
        Whether the numbers are those in the column, so that differences mean something; else they
        are 0, 1, 2 …
    """

    names: list[str]
    value_T: np.ndarray
    code_C: np.ndarray
    measured: bool

    @property
    def value_C(self) -> np.ndarray:
        """Time of every cell, NaN where unknown."""
        return np.where(self.code_C >= 0, self.value_T[self.code_C], np.nan)

    @property
    def inner(self) -> range:
        """Times that lie between two others."""
        return range(1, len(self.names) - 1)


def times_of(
    obs: pd.DataFrame,
    time_key: str,
    order: Sequence[str] = (),
    *,
    missing_labels: Sequence[str] = (),
    where: str = "adata",
) -> Times:
    """Read an ordered column.

    Parameters
    ----------
    obs, time_key
        The column: numbers, texts that hold one number each (``300_minutes``, ``E15.5``), or
        categories in order.
    order
        Its values from the earliest on; cells of other values are unknown. By default the numbers
        say, or the order of an ordered categorical.
    missing_labels
        See :class:`~genemodel.cells.input_settings.InputSettings`.
    where
        Names the cells in messages.

    Raises
    ------
    DataError
        The column is not there, has no order, or fewer than three times with cells enough.
    ConfigError
        ``order`` names a value twice.
    """
    values = without_placeholders(
        column(obs, time_key, "time_key", where), missing_labels, column=time_key, where=where
    )
    text_C = np.array([None if pd.isna(v) else _text(v) for v in values], dtype=object)
    known = list(dict.fromkeys(text for text in text_C if text is not None))
    named = [str(name) for name in order]
    if len(set(named)) < len(named):
        raise ConfigError(f"order={some(named)} names a value twice.")
    for name in named:
        if name not in known:
            raise DataError(
                f"{where}: order names {name!r}, which no cell has in obs[{time_key!r}]"
                f"{did_you_mean(name, known, '.')} The column holds {some(known)}."
            )
    number = {name: _number(name) for name in known}
    if named:
        names = named
    elif isinstance(values.dtype, pd.CategoricalDtype) and values.dtype.ordered:
        names = [_text(v) for v in values.cat.categories if _text(v) in number]
    elif all(number[name] is not None for name in known):
        names = sorted(known, key=lambda name: float(number[name] or 0.0))
    else:
        without = [name for name in known if number[name] is None]
        raise DataError(
            f"{where}: obs[{time_key!r}] (time_key) has no order: {some(without)} "
            f"{'is' if len(without) == 1 else 'are'} no number. Give the values from the earliest "
            f"to the latest, order=[{','.join(known[:3])},…]; cells of values that are left out "
            "are placed and not learnt from."
        )
    code_C = np.array([names.index(t) if t in set(names) else -1 for t in text_C], np.int64)
    n_T = np.bincount(code_C[code_C >= 0], minlength=len(names))
    few = [f"{name} ({n})" for name, n in zip(names, n_T, strict=True) if n < MIN_CELLS]
    if few:
        raise DataError(
            f"{where}: obs[{time_key!r}] has fewer than {MIN_CELLS} cells of {some(few)}. Leave "
            "these values out by naming the others in order=."
        )
    if not MIN_TIMES <= len(names) <= MOST_TIMES:
        raise DataError(
            f"{where}: obs[{time_key!r}] (time_key) holds {len(names)} times"
            + (
                f": at least {MIN_TIMES} are needed, so that one lies between two others."
                if len(names) < MIN_TIMES
                else f", more than {MOST_TIMES}: make stages of them, with enough cells each."
            )
        )
    number_T = [number[name] for name in names]
    value_T = np.arange(len(names), dtype=float)
    measured = all(value is not None for value in number_T)
    if measured:
        value_T = np.array(number_T, float)
        # An order that the numbers contradict was given on purpose: then they are names.
        if not (np.diff(value_T) > 0).all():
            value_T, measured = np.arange(len(names), dtype=float), False
    return Times(names, value_T, code_C, measured)


def _text(value: object) -> str:
    """Text of a value; 3.0 is 3, because a missing value makes integers floats."""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _number(name: str) -> float | None:
    """Give the one number in a text, or None."""
    found = _NUMBER.findall(name.replace("_", " "))
    # A hyphen that joins (day-3) is no sign.
    return float(found[0].lstrip("-") if "-" in name[1:] else found[0]) if len(found) == 1 else None
