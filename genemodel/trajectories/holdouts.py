"""What is held out: donors, times between two others, or cells.

Axes: C cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from genemodel.trajectories.times import Times

type Kind = Literal["donors", "times", "cells"]
FOLDS = 5
# Donors are held out one by one up to this many, then in as many groups.
MOST_FOLDS = 10


@dataclass(frozen=True)
class Fold:
    """Cells that are learnt from and cells that are asked for, by their rows."""

    kind: Kind
    train: np.ndarray
    test: np.ndarray


def folds(times: Times, donor_C: np.ndarray | None, seed: int) -> Iterator[Fold]:
    """Give all folds.

    Where donors are named, ``donors`` holds out every cell of a donor and asks for those whose time
    another donor has; of the other cells the time itself would be held out, too. Without, ``cells``
    are held out, whose neighbours of the same sample stay: too kind. ``times`` holds out each time
    between two others, of all donors.
    """
    code_C = times.code_C
    known_C = code_C >= 0
    if donor_C is not None:
        rng = np.random.default_rng(seed)
        donors = rng.permutation(np.unique(donor_C[known_C]))
        for group in np.array_split(donors, min(len(donors), MOST_FOLDS)):
            out_C = known_C & np.isin(donor_C, group)
            train = np.flatnonzero(known_C & ~out_C)
            test = np.flatnonzero(out_C & np.isin(code_C, code_C[train]))
            if test.size and np.unique(code_C[train]).size > 1:
                yield Fold("donors", train, test)
    else:
        rows = np.flatnonzero(known_C)
        fold_N = np.empty(rows.size, np.int64)
        rng = np.random.default_rng(seed)
        for time in range(len(times.names)):  # every time in every fold
            here = np.flatnonzero(code_C[rows] == time)
            fold_N[rng.permutation(here)] = np.arange(here.size) % FOLDS
        for fold in range(FOLDS):
            yield Fold("cells", rows[fold_N != fold], rows[fold_N == fold])
    for time in times.inner:
        yield Fold(
            "times", np.flatnonzero(known_C & (code_C != time)), np.flatnonzero(code_C == time)
        )
