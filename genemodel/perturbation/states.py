"""Start, goal and alternative states: where they lie, and whether a model tells them apart.

Axes: C cells, D width, S states.
"""

from dataclasses import dataclass

import numpy as np

from genemodel.errors import DataError

# Folds where there are no donors.
FOLDS = 5


@dataclass(frozen=True)
class States:
    """The states that shifts are measured towards, the goal first and the start second.

    Attributes
    ----------
    names
        Goal, start, alternatives; empty where there is no goal.
    vectors_SD
        Mean of the unit vectors of the state's cells.
    auc
        Of telling start from goal by cosine, on donors (or cells) that the means did not see; NaN
        without a goal.
    held_out
        What was held out for it: ``donors`` or ``cells``.
    """

    names: tuple[str, ...]
    vectors_SD: np.ndarray
    auc: float = float("nan")
    held_out: str = ""


def units(cell_CD: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1."""
    return cell_CD / np.linalg.norm(cell_CD, axis=1, keepdims=True).clip(1e-12)


def separation(
    cell_CD: np.ndarray, is_goal_C: np.ndarray, donor_C: np.ndarray | None, seed: int
) -> tuple[float, str]:
    """Say how well a held-out cell's state is told by which mean it is closer to.

    Parameters
    ----------
    cell_CD
        Unit vectors of the cells of both states.
    is_goal_C
        Which are of the goal.
    donor_C
        Codes of the donors; a donor's cells are held out together. None: cells are.
    seed
        Of the folds where there are no donors.

    Returns
    -------
    AUC, and what was held out. With donors it is the mean over those with both states where there
    are any, so that differences between donors cannot pass for the state; else of all cells.
    """
    from sklearn.metrics import roc_auc_score

    fold_C, held_out = donor_C, "donors"
    if fold_C is None or np.unique(fold_C).size < 2 or not _splits(fold_C, is_goal_C):
        held_out = "cells"
        rng = np.random.default_rng(seed)
        fold_C = np.empty(is_goal_C.size, np.int64)
        for state in (False, True):  # both states in every fold
            here = np.flatnonzero(is_goal_C == state)
            fold_C[rng.permutation(here)] = np.arange(here.size) % FOLDS
    score_C = np.empty(is_goal_C.size)
    for fold in np.unique(fold_C):
        out = fold_C == fold
        goal_D, start_D = (
            units(cell_CD[~out & (is_goal_C == state)].mean(0, keepdims=True))[0]
            for state in (True, False)
        )
        score_C[out] = cell_CD[out] @ (goal_D - start_D)
    both = [d for d in np.unique(fold_C) if 0 < is_goal_C[fold_C == d].mean() < 1]
    if held_out == "donors" and both:
        of_donors = [roc_auc_score(is_goal_C[fold_C == d], score_C[fold_C == d]) for d in both]
        return float(np.mean(of_donors)), held_out
    return float(roc_auc_score(is_goal_C, score_C)), held_out


def _splits(donor_C: np.ndarray, is_goal_C: np.ndarray) -> bool:
    """Whether both states are left whichever donor is out."""
    return all(
        is_goal_C[donor_C != d].any() and not is_goal_C[donor_C != d].all()
        for d in np.unique(donor_C)
    )


def states_of(
    cell_CD: np.ndarray,
    name_C: np.ndarray,
    names: tuple[str, ...],
    donor_C: np.ndarray | None,
    *,
    min_auc: float,
    seed: int,
    setting: str,
) -> States:
    """Measure the states, and stop where start and goal do not separate.

    Parameters
    ----------
    cell_CD, name_C
        Vectors of cells and the state of each.
    names
        Goal, start, alternatives.
    donor_C
        Codes of donors, or None.
    min_auc
        The least that lets a shift mean anything; 0 for any.
    seed
        See :func:`separation`.
    setting
        What names the states, for the refusal.

    Raises
    ------
    DataError
        The states do not separate.
    """
    unit_CD = units(cell_CD)
    vectors_SD = np.stack([unit_CD[name_C == name].mean(0) for name in names])
    both_C = np.isin(name_C, names[:2])
    auc, held_out = separation(
        unit_CD[both_C], name_C[both_C] == names[0],
        None if donor_C is None else donor_C[both_C], seed,
    )  # fmt: skip
    if auc < min_auc:
        raise DataError(
            f"{setting}: the model does not tell {names[1]!r} from {names[0]!r}: AUC {auc:.3f} on "
            f"{held_out} held out, below min_auc={min_auc:g}, so that a shift between them means "
            "nothing. Fine-tune the model on this column first (`genemodel finetune task=classify "
            "label_key=...`), choose other states, or set min_auc=0 to see the numbers all the "
            "same."
        )
    return States(names, vectors_SD.astype(np.float32), auc, held_out)
