"""Columns of obs as codes: batches from one column or several, labels with gaps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from genemodel.cells.missing_labels import without_placeholders
from genemodel.errors import ConfigError, DataError
from genemodel.settings import did_you_mean

JOIN = " | "
# Where vectors go by default: those of embedding, with whatever model, and those that an
# integration trained on these very cells writes. Of one object neither replaces the other.
EMBEDDED, INTEGRATED = "X_genemodel", "X_integrated"


def keys_of(batch_key: str | Sequence[str]) -> tuple[str, ...]:
    """Return the columns as a tuple; refuses none at all."""
    keys = (batch_key,) if isinstance(batch_key, str) else tuple(batch_key)
    if not keys or not all(keys):
        raise DataError("batch_key names no obs column: give the column of the technical batch.")
    if len(set(keys)) < len(keys):
        raise ConfigError(f"batch_key={list(keys)} names a column twice: name each once.")
    return keys


def check_in_memory(cells: object, name: str, of_files: str) -> None:
    """Refuse a path, or anything else that is no AnnData, where results are written into one.

    Parameters
    ----------
    cells
        What was given.
    name
        Of the argument.
    of_files
        The verb of the command line that does the same with files.
    """
    from anndata import AnnData

    if not isinstance(cells, AnnData):
        given = f"the path {cells}" if isinstance(cells, str | Path) else type(cells).__name__
        raise ConfigError(
            f"{name} is {given}: expected an AnnData, into which the result is written. Read a "
            f"file with anndata.read_h5ad, or give it to `{of_files}`."
        )


def check_key_added(key_added: str, where: str = "obsm") -> None:
    """Refuse a name under which nothing can be stored in a file."""
    if not key_added:
        raise ConfigError(f"key_added is empty: give the key of {where} to write.")
    if "/" in key_added:
        raise ConfigError(
            f"key_added={key_added}: a slash divides folders in an h5ad; leave it out."
        )


def check_label_is_no_batch(batch_keys: Sequence[str], label_key: str | None) -> None:
    """Refuse one column as what is to go and as what is to stay."""
    if label_key and label_key in batch_keys:
        raise ConfigError(
            f"label_key={label_key} is a column of batch_key too: what tells the technical batches "
            "apart cannot be the cell type. Name another column, or leave label_key out."
        )


def column(obs: pd.DataFrame, key: str, what: str, where: str = "adata") -> pd.Series:
    """Return a column of obs, or refuse and name what there is."""
    if list(obs.columns).count(key) > 1:
        raise DataError(
            f"{where}.obs has two columns of the name {key!r} ({what}), and nothing says which one "
            "is meant. Rename one of them."
        )
    if key not in obs.columns:
        known = [str(name) for name in obs.columns]
        raise DataError(
            f"{where}.obs has no column {key!r} ({what}){did_you_mean(key, known, '.')} "
            f"It has {', '.join(known) or 'no columns: give an h5ad whose obs has it'}."
        )
    return obs[key]


def batch_names(
    obs: pd.DataFrame,
    keys: Sequence[str],
    where: str = "adata",
    missing_labels: Sequence[str] = (),
    what: str = "batch_key",
    *,
    settled: bool = False,
) -> np.ndarray:
    """Name the batch of every cell: the values of the columns, joined.

    ``what`` the columns are, for messages. ``missing_labels`` changes which texts stand for a
    missing value; ``settled`` says that this has been seen to, as in a corpus.

    Raises
    ------
    DataError
        A column is not there or has missing values.
    """
    parts = []
    for key in keys:
        values = without_placeholders(
            column(obs, key, what, where), missing_labels, column=key, where=where, settled=settled
        )
        missing = int(values.isna().sum())
        if missing:
            raise DataError(
                f"{where}.obs[{key!r}] ({what}) is missing in {missing:,} of {len(obs):,} "
                "cells: fill it or leave those cells out."
            )
        parts.append(values.astype(str).to_numpy(dtype=object))
    names = parts[0]
    for part in parts[1:]:
        names = names + JOIN + part
    return names


def label_codes(
    obs: pd.DataFrame,
    key: str,
    what: str = "label_key",
    where: str = "adata",
    missing_labels: Sequence[str] = (),
    *,
    settled: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """Code the labels, -1 where missing, or where a text stands for that.

    ``missing_labels`` and ``settled`` as in :func:`batch_names`.

    Raises
    ------
    DataError
        The column is not there or holds fewer than two labels.
    """
    values = column(obs, key, what, where)
    values = without_placeholders(values, missing_labels, column=key, where=where, settled=settled)
    known = values.notna().to_numpy()
    names = sorted({str(value) for value in values[known]})
    if len(names) < 2:
        raise DataError(
            f"{where}.obs[{key!r}] ({what}) holds {len(names)} different labels: at least two are "
            "needed."
        )
    place = {name: code for code, name in enumerate(names)}
    code_C = np.full(len(obs), -1, np.int64)
    code_C[known] = [place[str(value)] for value in values[known]]
    return code_C, names
