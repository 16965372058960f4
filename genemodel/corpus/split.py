"""Hold-out splits of a corpus by donor, data set or another group; never by cell.

Cells of one donor resemble each other: a model that saw some of them in training looks better on
the others than it will on a new donor. So whole groups are held out, in the order of a hash of
their names: the same on every machine and for any order of the sources. A share of a grown corpus
may hold out other groups than before; name the groups to keep them held out.
"""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from genemodel.corpus.corpus import JOINT
from genemodel.errors import ConfigError, DataError
from genemodel.settings import some

logger = logging.getLogger(__name__)

# Names of these are only unique within a data set.
_WITHIN_DATASET = ("donor", "batch")
_SHOWN = 12
# A larger hold-out is more often an accident of few or uneven groups than a wish.
_LARGE = 0.3


class Grouped(Protocol):
    """Cells with columns of names: a corpus, or the table of cells in memory."""

    @property
    def path(self) -> Path | str:
        """Where they are, for messages."""

    @property
    def columns(self) -> list[str]:
        """Columns that can be asked for."""

    def __len__(self) -> int:
        """Count the cells."""

    def codes(self, *columns: str) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Give the number of every cell's name, -1 where it has none, and the names."""


@dataclass(frozen=True)
class Split:
    """Cells to train on and cells held out.

    Attributes
    ----------
    train, held_out
        Ascending cell numbers, int64. Cells whose group is not known are trained on: nothing says
        whether they belong to a held-out group, but they are no group's test.
    groups
        Names of the groups held out, ascending.
    """

    train: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.int64]
    groups: tuple[str, ...]

    def describe(self) -> str:
        """Say how many cells are held out, and of which groups."""
        share = self.held_out.size / (self.train.size + self.held_out.size)
        return (
            f"{self.train.size:,} cells to train on, {self.held_out.size:,} ({share:.1%}) held "
            f"out: {some(self.groups, _SHOWN)}"
        )


def hold_out(
    corpus: Grouped,
    *,
    by: str = "donor",
    groups: Sequence[str] = (),
    fraction: float = 0.1,
    seed: int = 0,
) -> Split:
    """Divide the cells of a corpus into training and held-out cells.

    Parameters
    ----------
    corpus
        An open corpus.
    by
        Column whose groups stay together. Donors and batches are told apart by data set:
        ``by="donor"`` means (dataset, donor).
    groups
        Names of the groups to hold out (a donor's name alone, or ``"dataset / donor"``); empty
        draws them.
    fraction
        About this share of the cells of every species is drawn, of whole groups: in the order of
        a hash, each group that brings the share nearer to it; the smallest where none does. A
        species with one group only is trained on.
    seed
        Changes which groups are drawn.

    Raises
    ------
    DataError
        The column is missing everywhere, or no species has two groups of it to draw from.
    ConfigError
        A named group does not exist, all are held out, or the share is impossible.
    """
    if isinstance(groups, str):
        raise ConfigError(f"holdout.groups is the text {groups!r}: give a list of groups")
    if not 0 < fraction < 1:
        raise ConfigError(
            f"holdout.fraction={fraction} is no share of the cells: give a number between 0 and 1"
        )
    codes_C, names = _groups(corpus, by)
    cells_SG = _cells_of(corpus, codes_C, len(names))
    present = np.flatnonzero(cells_SG.sum(0))
    if groups:
        held = {i for name in groups for i in _named(name, names, present, by)}
        if len(held) == present.size:
            raise ConfigError(
                f"holdout.groups names all {present.size} groups of {by}: none is left to train on"
            )
    else:
        rank_G = sorted(present.tolist(), key=lambda i: _hash(names[i], seed))
        held = _drawn(corpus, cells_SG, rank_G, fraction)
        if not held:
            raise DataError(_too_few(corpus, by, [names[i] for i in present]))
        _name_species_not_held(corpus, cells_SG[:, sorted(held)])
    out_C = np.isin(codes_C, sorted(held))
    split = Split(
        np.flatnonzero(~out_C), np.flatnonzero(out_C), tuple(sorted(names[i] for i in held))
    )
    _warn_if_large(split, cells_SG.sum(0), names, by)
    return split


def _cells_of(corpus: Grouped, codes_C: npt.NDArray[np.integer], n: int) -> npt.NDArray[np.int64]:
    """Count the cells of every species in every group; cells of no known group are left out."""
    species_C, species = corpus.codes("species")
    known_C = codes_C >= 0
    place_C = species_C[known_C].astype(np.int64) * n + codes_C[known_C]
    return np.bincount(place_C, minlength=len(species) * n).reshape(len(species), n)


def _drawn(
    corpus: Grouped, cells_SG: npt.NDArray[np.int64], rank_G: list[int], fraction: float
) -> set[int]:
    """Draw groups until about a share of the cells of every species is held out.

    No species loses the last group that it has.
    """
    species_C, species = corpus.codes("species")
    wanted_S = fraction * np.bincount(species_C, minlength=len(species))
    left_S = np.count_nonzero(cells_SG, axis=1)
    held_S = np.zeros(len(species), np.int64)
    held: set[int] = set()

    def take(group: int) -> bool:
        here_S = cells_SG[:, group] > 0
        if group in held or (left_S[here_S] < 2).any():
            return False
        held.add(group)
        left_S[here_S] -= 1
        held_S[:] += cells_SG[:, group]
        return True

    for s in sorted(range(len(species)), key=lambda s: species[s]):
        having = [group for group in rank_G if cells_SG[s, group]]
        for group in having:
            if held_S[s] + cells_SG[s, group] / 2 < wanted_S[s]:
                take(group)
        if not held_S[s]:  # sorting is stable: of equals the first in the order of the hash
            any(take(group) for group in sorted(having, key=lambda group: cells_SG[s, group]))
    return held


def _name_species_not_held(corpus: Grouped, held_SG: npt.NDArray[np.int64]) -> None:
    species_C, species = corpus.codes("species")
    n_S = np.bincount(species_C, minlength=len(species))
    for s in np.flatnonzero((n_S > 0) & ~held_SG.any(1)):
        logger.warning(
            "No cell of %s is held out: its %s cells are not of several groups.",
            species[s], f"{n_S[s]:,}",
        )  # fmt: skip


def _warn_if_large(
    split: Split, cells_G: npt.NDArray[np.int64], names: Sequence[str], by: str
) -> None:
    n = split.train.size + split.held_out.size
    if split.held_out.size <= _LARGE * n:
        return
    size = dict(zip(names, cells_G.tolist(), strict=True))
    largest = sorted(split.groups, key=lambda name: -size[name])
    logger.warning(
        "%.0f %% of the cells (%s of %s) are held out by %s and not trained on: %s. Set "
        "holdout.groups to fewer or smaller groups, holdout.fraction lower, or holdout.by to a "
        "column with smaller groups.",
        100 * split.held_out.size / n, f"{split.held_out.size:,}", f"{n:,}", by,
        some([f"{name} ({size[name]:,} cells)" for name in largest], _SHOWN),
    )  # fmt: skip


def usual_groups(corpus: Grouped) -> str:
    """Find the column to hold out by: the first of donor, dataset and batch that can be divided.

    Returns
    -------
    The column; empty where each of them is missing for some cells, or no species has two groups.
    """
    for by in ("donor", "dataset", "batch"):
        codes_C, names = _groups(corpus, by)
        cells_SG = _cells_of(corpus, codes_C, len(names))
        if (codes_C >= 0).all() and (np.count_nonzero(cells_SG, axis=1) >= 2).any():
            return by
    return ""


def _groups(corpus: Grouped, by: str) -> tuple[npt.NDArray[np.int32], list[str]]:
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
            f"holdout.groups: there is no {by} {name!r} in the corpus; it has "
            f"{some([groups[i] for i in present], _SHOWN)}"
        )
    return found


def _hash(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()


def _too_few(corpus: Grouped, by: str, groups: list[str]) -> str:
    """Say what the column holds and which other columns would do."""
    others = []
    for column in corpus.columns:
        codes_C, names = _groups(corpus, column)
        cells_SG = _cells_of(corpus, codes_C, len(names))
        if column != by and (np.count_nonzero(cells_SG, axis=1) > 1).any():
            others.append(f"{column} ({np.count_nonzero(cells_SG.sum(0))} groups)")
    found = "which is missing in every source"
    if len(groups) == 1:
        found = f"which has one group only ({groups[0]})"
    elif groups:
        found = f"of which each group is the only one of a species ({some(groups, _SHOWN)})"
    return (
        f"corpus {corpus.path}: cannot hold out by {by}, {found}. "
        + (f"Hold out by {', '.join(others)}, or nothing " if others else "Hold nothing out ")
        + f"(pretrain, finetune: holdout.by={others[0].split()[0] if others else repr('')}, or "
        "holdout=auto for what there is); or add sources whose column is filled "
        f"(corpus build, corpus append: columns={{{by}: COLUMN}})"
    )
