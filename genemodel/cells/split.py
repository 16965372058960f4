"""Hold-out splits of a corpus by donor, data set or another group; never by cell.

Cells of one donor resemble each other: a model that saw some of them in training looks better on
the others than it will on a new donor. So whole groups are held out, in the order of a hash of
their names: the same on every machine and for any order of the sources. A share of a grown corpus
may hold out other groups than before; name the groups to keep them held out.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from genemodel.cells.corpus import JOINT, Corpus
from genemodel.errors import ConfigError, DataError

# Names of these are only unique within a data set.
_WITHIN_DATASET = ("donor", "batch")
_SHOWN = 12


def split_cells(
    corpus: Corpus,
    *,
    by: str = "donor",
    holdout: Sequence[str] | float = 0.1,
    seed: int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Divide the cells of a corpus into training and held-out cells.

    Parameters
    ----------
    corpus
        An open corpus.
    by
        Column whose groups stay together. Donors and batches are told apart by data set:
        ``by="donor"`` means (dataset, donor).
    holdout
        Names of groups to hold out (a donor's name alone, or ``"dataset / donor"``); or the share
        of groups to hold out, 0 < share < 1, of which at least one is.
    seed
        Changes which groups a share picks.

    Returns
    -------
    train_cells, heldout_cells
        Ascending cell numbers, int64. Cells whose group is not known are trained on: nothing says
        whether they belong to a held-out group, but they are no group's test.

    Raises
    ------
    DataError
        The column is missing everywhere or has one group only.
    ConfigError
        A named group does not exist, all are held out, or the share is impossible.
    """
    codes_C, groups = _groups(corpus, by)
    present = np.unique(codes_C[codes_C >= 0])
    if present.size < 2:
        raise DataError(_too_few(corpus, by, [groups[i] for i in present]))
    if isinstance(holdout, str):
        raise ConfigError(f"holdout is the text {holdout!r}: give a list of groups, or a share")
    if isinstance(holdout, float | int):
        if not 0 < holdout < 1:
            raise ConfigError(
                f"holdout={holdout} is no share of the groups: give a number between 0 and 1, or "
                "the names of groups"
            )
        n = min(present.size - 1, max(1, round(holdout * present.size)))
        order = sorted(present.tolist(), key=lambda i: _hash(groups[i], seed))
        held = np.array(order[:n])
    else:
        held = np.array([i for name in holdout for i in _named(name, groups, present, by)])
        if not held.size:
            raise ConfigError("holdout is an empty list: name at least one group, or give a share")
        if np.unique(held).size == present.size:
            raise ConfigError(
                f"holdout names all {present.size} groups of {by}: none is left to train on"
            )
    out_C = np.isin(codes_C, held)
    return np.flatnonzero(~out_C), np.flatnonzero(out_C)


def usual_groups(corpus: Corpus) -> str:
    """Find the column to hold out by: the first of donor, dataset and batch that can be divided.

    Returns
    -------
    The column; empty where each of them is missing for some cells or has one group only.
    """
    for by in ("donor", "dataset", "batch"):
        codes_C, _ = _groups(corpus, by)
        if (codes_C >= 0).all() and np.unique(codes_C).size >= 2:
            return by
    return ""


def _groups(corpus: Corpus, by: str) -> tuple[npt.NDArray[np.int32], list[str]]:
    if by in _WITHIN_DATASET:
        return corpus.codes("dataset", by)
    return corpus.codes(by)


def _named(
    name: str, groups: Sequence[str], present: npt.NDArray[np.integer], by: str
) -> list[int]:
    """Find the groups that a name means: the full name, or the part after the data set."""
    found = [int(i) for i in present if groups[i] == name]
    found = found or [int(i) for i in present if groups[i].split(JOINT, 1)[-1] == name]
    if not found:
        raise ConfigError(
            f"holdout: there is no {by} {name!r} in the corpus; it has "
            f"{_shown([groups[i] for i in present])}"
        )
    return found


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _too_few(corpus: Corpus, by: str, groups: list[str]) -> str:
    """Say what the column holds and which other columns would do."""
    others = []
    for column in corpus.columns:
        if column != by:
            codes_C, _ = _groups(corpus, column)
            n = np.unique(codes_C[codes_C >= 0]).size
            if n > 1:
                others.append(f"{column} ({n} groups)")
    found = f"has one group only ({groups[0]})" if groups else "is missing in every source"
    return (
        f"corpus {corpus.path}: cannot hold out by {by}, which {found}. "
        + (f"Split by {', '.join(others)}, " if others else "Add more sources, ")
        + f"or map the column when building (columns={{'{by}': ...}})"
    )


def _shown(names: list[str]) -> str:
    more = f", … {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
