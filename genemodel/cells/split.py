"""Hold-out splits: whole groups of cells, never single cells.

Cells of one donor or one experiment resemble each other. A split by cell puts near copies of the
held-out cells into training, and every score on them is flattered.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from genemodel.errors import ConfigError, DataError
from genemodel.settings import nearest

if TYPE_CHECKING:
    from genemodel.cells.corpus import Corpus


def split_cells(
    corpus: "Corpus",
    *,
    by: str,
    holdout: Sequence[str] | float,
    seed: int = 0,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Split the cells of a corpus into training cells and held-out cells.

    Parameters
    ----------
    corpus
        An open corpus.
    by
        Column whose groups stay whole. Groups other than data sets are told apart by data set
        first: donor 1 of one study is not donor 1 of another.
    holdout
        Names of groups (of data sets, or of ``by`` with or without the data set), or the share of
        groups to draw.
    seed
        Of the draw.

    Returns
    -------
    train_cells, held_out_cells
        Ascending cell numbers. Cells without a group are never held out.

    Raises
    ------
    ConfigError
        The column or a group does not exist; nothing, or everything, would be held out.
    DataError
        There are fewer than two groups.
    """
    codes_C, names = corpus.codes(by) if by == "dataset" else corpus.codes("dataset", by)
    present = np.unique(codes_C[codes_C >= 0])
    if present.size < 2:
        raise DataError(
            f"Corpus {corpus.path}: column {by!r} has {present.size} group(s), and a hold-out needs "
            f"two. Set holdout.by to one of {', '.join(_splittable(corpus)) or '(no column can)'}."
        )
    if isinstance(holdout, int | float):
        if not 0 < holdout < 1:
            raise ConfigError(
                f"holdout.fraction is {holdout}: it is a share of groups, between 0 and 1."
            )
        n = min(max(1, round(holdout * present.size)), present.size - 1)
        chosen = np.random.default_rng(seed).permutation(present)[:n]
    else:
        chosen = np.unique(np.concatenate([_find(name, names, by, corpus) for name in holdout]))
    held = np.isin(codes_C, chosen)
    if held.all():
        raise ConfigError(
            f"Holding out {', '.join(names[c] for c in chosen[:5])} leaves no cell to train on: "
            "hold out fewer groups."
        )
    return np.flatnonzero(~held), np.flatnonzero(held)


def _find(name: str, names: list[str], by: str, corpus: "Corpus") -> list[int]:
    """Codes of the groups a name stands for: the whole name, or its last part."""
    from genemodel.cells.corpus import JOINT

    found = [
        code
        for code, full in enumerate(names)
        if name == full or (by != "dataset" and name == full.split(JOINT)[-1])
    ]
    if not found:
        near = nearest(name, names)
        raise ConfigError(
            f"Corpus {corpus.path}: no group {name!r} in column {by!r}; it has "
            f"{', '.join(names[:8])}{' …' if len(names) > 8 else ''}."
            + (f" Did you mean {near!r}?" if near else "")
        )
    return found


def _splittable(corpus: "Corpus") -> list[str]:
    """Columns with two groups or more."""
    return [c for c in corpus.columns if np.unique(corpus.codes(c)[0]).size > 1]
