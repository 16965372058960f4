"""From an AnnData's columns to a screen: who is perturbed how, where, and against which controls.

Axes: C cells, G genes, P perturbations.
"""

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.contract import find_counts
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.missing_labels import is_missing, placeholders, without_placeholders
from genemodel.errors import DataError
from genemodel.response.predictors import Asked
from genemodel.response.screen import Screen, Unit
from genemodel.response.settings import TARGET_FOLDS, AskedResponse
from genemodel.response.vectors import columns_of
from genemodel.settings import nearest, some

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

# Things to hold out: one is predicted from the others, and choosing leaves out one more of these.
_LEAST = 3
# Between the two names of a context that is a cell type of a donor.
_OF = " of "
WHAT = {
    "targets": "perturbations", "cell_types": "cell types", "doses": "doses", "donors": "donors",
}  # fmt: skip


@dataclass(frozen=True)
class Design:
    """A screen, and what is asked of it.

    Attributes
    ----------
    screen
        All cells that count.
    genes
        Names and columns of its genes.
    guide_C
        Code of each cell's guide, −1 for none; None where guides are not known.
    part_names, parts
        Names of single targets, and of which of them each perturbation is made.
    dose_values
        Doses by rank, from rank 1.
    notes
        What was left out, in words.
    """

    screen: Screen
    genes: pd.DataFrame
    guide_C: np.ndarray | None
    part_names: list[str]
    parts: list[tuple[int, ...]]
    dose_values: np.ndarray
    notes: list[str]

    def groups(self, holdout: str) -> np.ndarray:
        """Code of what each unit is held out with, (U,)."""
        of = {"targets": "perturbation", "cell_types": "context", "doses": "dose",
              "donors": "donor"}[holdout]  # fmt: skip
        return np.array([getattr(unit, of) for unit in self.screen.units])

    def folds(self, asked: AskedResponse) -> list[np.ndarray]:
        """Units that are held out together.

        Raises
        ------
        DataError
            There are too few things to hold any out.
        """
        group_U = self.groups(asked.holdout)
        groups = np.unique(group_U)
        if len(groups) < _LEAST:
            raise DataError(
                f"holdout={asked.holdout}: {len(groups)} {WHAT[asked.holdout]} have at least "
                f"{asked.min_cells} cells and as many controls; {_LEAST} are needed, two to learn "
                "from. Lower min_cells, or hold out something else."
            )
        n = asked.folds or (TARGET_FOLDS if asked.holdout == "targets" else len(groups))
        n = min(n, len(groups))
        dealt = np.random.default_rng(asked.seed).permutation(len(groups)) % n
        return [np.flatnonzero(np.isin(group_U, groups[dealt == fold])) for fold in range(n)]

    def unmeasured(self, asked: AskedResponse) -> tuple[Asked, list[float]]:
        """Give what is asked for and was not measured, and the doses of it.

        Raises
        ------
        DataError
            A dose is no number, or a context has no controls or all perturbations.
        """
        screen = self.screen
        there = {(u.perturbation, u.context) for u in screen.units}
        contexts = range(len(screen.contexts))
        wanted: list[tuple[int, int, float]] = []  # perturbation, context, dose
        if asked.holdout == "targets":
            new = [screen.perturbations.index(name) for name in dict.fromkeys(asked.predict)]
            top = float(self.dose_values[-1])
            wanted = [(p, x, top) for p in new for x in contexts if (p, x) not in there]
        elif asked.holdout == "doses":
            wanted = [(p, x, _number(text)) for text in asked.predict for p, x in sorted(there)]
        else:
            for name in asked.predict:
                if name not in screen.contexts:
                    near = nearest(name, screen.contexts)
                    raise DataError(
                        f"predict names {name!r}, and no context of that name has "
                        f"{asked.min_cells} controls; there are {some(screen.contexts)}"
                        + (f". Did you mean {near!r}?" if near else "")
                    )
            chosen = [
                x for x in contexts if not asked.predict or screen.contexts[x] in asked.predict
            ]
            doses = sorted({(u.perturbation, u.dose) for u in screen.units})
            wanted = [
                (p, x, float(self.dose_values[rank - 1]))
                for p, rank in doses for x in chosen if (p, x) not in there
            ]  # fmt: skip
        known = np.r_[0.0, self.dose_values]
        # Beyond the last dose is one rank further, however far.
        ranks = [
            float(np.interp(dose, known, np.arange(len(known)))) if dose <= known[-1]
            else float(len(known)) for _, _, dose in wanted
        ]  # fmt: skip
        return Asked(
            np.array([p for p, _, _ in wanted], int), np.array([x for _, x, _ in wanted], int),
            np.array(ranks),
        ), [dose for _, _, dose in wanted]  # fmt: skip


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise DataError(f"predict names {text!r}: with holdout=doses give numbers.") from error


def design_of(adata: "AnnData", asked: AskedResponse, reading: InputSettings, where: str) -> Design:
    """Prove the counts, and sort cells into units and controls.

    Raises
    ------
    DataError
        A column or the control is not there, or too few cells are left.
    """
    counts = find_counts(adata, where=where, **reading.counting())
    columns = {
        key: _column(adata, getattr(asked, key), reading, where, asked.control)
        for key in ("perturbation_key", "label_key", "batch_key", "donor_key", "guide_key")
        if getattr(asked, key)
    }
    name_C = columns.pop("perturbation_key")
    notes: list[str] = []
    if asked.control not in set(name_C.dropna()):
        known = sorted(set(name_C.dropna()))
        near = nearest(asked.control, known)
        raise DataError(
            f"{where}: control={asked.control} is no value of obs[{asked.perturbation_key!r}], "
            f"which has {some(known)}" + (f". Did you mean {near!r}?" if near else "")
        )
    named = ["perturbation_key"] + [key for key in columns if key != "guide_key"]
    kept_C = name_C.notna().to_numpy().copy()
    for key in named[1:]:
        kept_C &= columns[key].notna().to_numpy()
    if not kept_C.all():
        notes.append(f"{(~kept_C).sum():,} cells have no value in one of the columns")
    is_control_C = (name_C == asked.control).to_numpy() & kept_C
    rank_C, dose_values = _doses(adata, asked, is_control_C, kept_C, where)
    context_C = _contexts(columns, len(name_C))
    matrix_CG = counts.read(0, adata.n_obs).tocsr()
    empty = int((np.diff(matrix_CG.indptr) == 0).sum())
    if empty:
        raise DataError(f"{where}: {empty:,} cells have no counts at all; drop them first")

    contexts, controls = [], []
    for name in sorted(set(context_C[kept_C])):
        rows = np.flatnonzero(is_control_C & (context_C == name))
        if len(rows) >= max(asked.min_cells, 4):
            contexts.append(name)
            controls.append(rows)
        else:
            notes.append(f"{name} has {len(rows)} controls and is left out")
    if not contexts:
        raise DataError(
            f"{where}: no context has {asked.min_cells} cells with "
            f"obs[{asked.perturbation_key!r}] = {asked.control}. Lower min_cells, or leave "
            "label_key out"
        )
    measured = sorted(set(name_C[kept_C & ~is_control_C]))
    new = asked.predict if asked.holdout == "targets" else ()
    perturbations = [*measured, *(name for name in dict.fromkeys(new) if name not in measured)]
    donor_of = {name: name.rpartition(_OF)[2] for name in contexts}
    donors = sorted(set(donor_of.values())) if asked.donor_key else ["-"]
    units, few = [], 0
    for p, perturbation in enumerate(perturbations):
        of_p_C = (name_C == perturbation).to_numpy() & kept_C
        for x, context in enumerate(contexts):
            for rank in range(1, len(dose_values) + 1):
                rows = np.flatnonzero(of_p_C & (context_C == context) & (rank_C == rank))
                donor = donors.index(donor_of[context]) if asked.donor_key else 0
                if len(rows) >= asked.min_cells:
                    units.append(Unit(p, x, donor, rank, rows))
                else:
                    few += bool(len(rows))
    if few:
        notes.append(f"{few} groups have fewer than {asked.min_cells} cells")
    if not units:
        raise DataError(
            f"{where}: no perturbation has {asked.min_cells} cells in a context with controls. "
            "Lower min_cells"
        )
    genes, kept_G = _deep_enough(matrix_CG, counts.genes, units, asked.min_counts, where)
    if not kept_G.all():
        notes.append(f"{(~kept_G).sum():,} of {len(kept_G):,} genes are too shallow to be judged")
    matrix_CG = sp.csr_matrix(matrix_CG[:, kept_G])
    part_names, parts = _parts(perturbations, asked.combination)
    column_M = columns_of(genes, part_names)
    batch = columns.get("batch_key")
    guide = columns.get("guide_key")
    screen = Screen(
        counts_CG=matrix_CG, genes=list(genes.index.astype(str)), perturbations=perturbations,
        contexts=contexts, donors=donors, doses=[f"{dose:g}" for dose in dose_values],
        units=units, controls=controls,
        batch_C=np.zeros(len(name_C), int) if batch is None
        else np.maximum(pd.factorize(batch)[0], 0),
        targets=[tuple(column_M[m] for m in of if column_M[m] >= 0) for of in parts],
        members=_members(perturbations, part_names, parts),
    )  # fmt: skip
    for note in notes:
        logger.info("%s: %s", where, note)
    return Design(
        screen, genes, None if guide is None else pd.factorize(guide)[0], part_names, parts,
        dose_values, notes,
    )  # fmt: skip


def _column(
    adata: "AnnData", key: str, reading: InputSettings, where: str, control: str
) -> pd.Series:
    """Give a column as text, NaN where missing; the control's name never stands for that."""
    columns = [str(name) for name in adata.obs.columns]
    if key not in columns:
        near = nearest(key, columns)
        raise DataError(
            f"{where}: obs has no column {key!r}; it has {some(columns)}"
            + (f". Did you mean {near!r}?" if near else "")
        )
    if columns.count(key) > 1:
        raise DataError(
            f"{where}: obs has two columns of the name {key!r}, and nothing says which one is "
            "meant. Rename one of them"
        )
    words = reading.missing_labels
    if is_missing(control, placeholders(words)):  # it may be called "none"
        words = (*words, f"-{control}")
    values = without_placeholders(pd.Series(adata.obs[key]), words, column=key, where=where).astype(
        object
    )
    return values.where(values.isna(), values.map(str))


def _doses(
    adata: "AnnData",
    asked: AskedResponse,
    is_control_C: np.ndarray,
    kept_C: np.ndarray,
    where: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Rank of every cell's dose, 0 for controls, and the doses."""
    treated_C = kept_C & ~is_control_C
    if not asked.dose_key:
        return treated_C.astype(int), np.ones(1)
    if asked.dose_key not in adata.obs:
        near = nearest(asked.dose_key, [str(name) for name in adata.obs.columns])
        raise DataError(
            f"{where}: obs has no column {asked.dose_key!r}"
            + (f". Did you mean {near!r}?" if near else "")
        )
    values = pd.Series(adata.obs[asked.dose_key]).astype(object)
    dose_C = pd.to_numeric(values, errors="coerce").to_numpy(float)
    wrong = treated_C & ~np.isfinite(dose_C)
    if wrong.any():
        raise DataError(
            f"{where}: obs[{asked.dose_key!r}] of {int(wrong.sum()):,} perturbed cells is no "
            f"number ({some(sorted({str(v) for v in values[wrong]}))}). Give doses in one unit"
        )
    if (treated_C & (dose_C <= 0)).any():
        raise DataError(
            f"{where}: obs[{asked.dose_key!r}] is 0 or less in perturbed cells, and 0 is what "
            f"controls have. Name them {asked.control} in obs[{asked.perturbation_key!r}]"
        )
    doses = np.unique(dose_C[treated_C])
    return np.where(treated_C, np.searchsorted(doses, dose_C) + 1, 0), doses


def _contexts(columns: dict[str, pd.Series], n: int) -> np.ndarray:
    label, donor = columns.get("label_key"), columns.get("donor_key")
    if label is None and donor is None:
        return np.full(n, "all cells", object)
    if label is None or donor is None:
        only = donor if label is None else label
        return only.fillna("").to_numpy(object)  # type: ignore[union-attr]
    return (label.fillna("") + _OF + donor.fillna("")).to_numpy(object)


def _deep_enough(
    counts_CG: sp.csr_matrix, genes: pd.DataFrame, units: list[Unit], least: float, where: str
) -> tuple[pd.DataFrame, np.ndarray]:
    size = float(np.median([len(unit.rows) for unit in units]))
    kept_G = np.asarray(counts_CG.mean(0)).ravel() * size >= least
    if kept_G.sum() < _LEAST:
        raise DataError(
            f"{where}: {int(kept_G.sum())} genes are expected to have min_counts={least:g} counts "
            f"in a group of {size:g} cells. Lower min_counts"
        )
    return genes[kept_G], kept_G


def _parts(perturbations: list[str], between: str) -> tuple[list[str], list[tuple[int, ...]]]:
    split = [[part.strip() for part in name.split(between)] for name in perturbations]
    names = list(dict.fromkeys(part for of in split for part in of))
    return names, [tuple(names.index(part) for part in of) for of in split]


def _members(
    perturbations: list[str], part_names: list[str], parts: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    code = {name: p for p, name in enumerate(perturbations)}
    return [
        (p,) if len(of) == 1 else tuple(code.get(part_names[m], -1) for m in of)
        for p, of in enumerate(parts)
    ]
