"""Genes that go with time, and genes that move a cell forward when a model is asked.

Axes: B donors, C cells, G genes, T times.
"""

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy import stats

from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import DataError
from genemodel.expression.normalise import log_normalised
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.progress import Progress
from genemodel.perturbation.plan import plan_of
from genemodel.perturbation.result import correlation
from genemodel.perturbation.settings import MIN_CELLS, MIN_COVERAGE, Asked
from genemodel.perturbation.statistics import ALPHA, adjusted
from genemodel.perturbation.variants import Operation
from genemodel.trajectories.times import MIN_CELLS as MIN_TIME_CELLS
from genemodel.trajectories.times import Times

logger = logging.getLogger(__name__)

SHUFFLES = 20
# obs column of the states for a perturbation.
STATE = "genemodel_time"
# Donors below which a mean over them is no test.
MIN_DONORS = 3


def with_time(
    counts_CG: sp.csr_matrix,
    names: list[str],
    times: Times,
    donor_C: np.ndarray | None,
    seed: int,
    *,
    min_cells: int = MIN_CELLS,
    min_coverage: float = MIN_COVERAGE,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Correlate log expression with time.

    Replicates are donors: where three or more have several times each, the correlation over each
    one's cells (t test over donors of Fisher's z); else, where four or more are of one time each,
    the correlation of their means with time (t, donors − 2). Only without donors are they cells,
    with p values that are far too small; ``summary["replicates"]`` says which it was, and
    ``null_significant`` how many genes the same test finds on shuffled times.

    Returns
    -------
    The table, and the summary.
    """
    rows = np.flatnonzero(times.code_C >= 0)
    log_CG = sp.csc_matrix(log_normalised(counts_CG[rows]))
    value_C, code_C = times.value_C[rows], times.code_C[rows]
    kept = np.flatnonzero(log_CG.getnnz(0) >= max(min_cells, min_coverage * rows.size, 1))
    log_CG = log_CG[:, kept]
    own_C = None if donor_C is None else donor_C[rows]
    test = _Test.of(value_C, own_C)
    r_G, p_G, agree_G = test.run(log_CG, value_C)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(SHUFFLES):
        null_p = test.run(log_CG, test.shuffled(value_C, rng))[1]
        found.append(int((adjusted(null_p) < ALPHA).sum()))
    table = pd.DataFrame({
        "Gene": [names[g] for g in kept], "Time_correlation": r_G, "Time_pval": p_G,
        "Time_FDR": adjusted(p_G), "Donor_same_sign": agree_G,
        "Detected": np.diff(log_CG.indptr) / rows.size,
    })  # fmt: skip
    mean_TG = np.stack([
        np.asarray(log_CG[code_C == t].mean(0)).ravel() for t in range(len(times.names))
    ])  # fmt: skip
    for t, step in enumerate(step_names(times)):
        table[f"Change_{step}"] = mean_TG[t + 1] - mean_TG[t]
    table = table.sort_values(
        ["Time_FDR", "Time_correlation"], key=lambda v: -v.abs() if v.name != "Time_FDR" else v,
        kind="stable",
    ).reset_index(drop=True)  # fmt: skip
    summary = {
        "replicates": test.what, "genes": len(table),
        "significant": int((table["Time_FDR"] < ALPHA).sum()),
        "null_significant": float(np.mean(found)),
    }  # fmt: skip
    return table, summary


def step_names(times: Times) -> list[str]:
    """Name the steps from one time to the next."""
    # A slash divides folders in an h5ad.
    names = [name.replace("/", "_") for name in times.names]
    return [f"{a}_to_{b}" for a, b in zip(names, names[1:], strict=False)]


@dataclass(frozen=True)
class _Test:
    """Correlation of genes with time over replicates of one of three kinds."""

    what: str
    donor_C: np.ndarray | None
    donors: np.ndarray

    @classmethod
    def of(cls, value_C: np.ndarray, donor_C: np.ndarray | None) -> "_Test":
        """Choose by what the donors are."""
        if donor_C is None:
            return cls("cells", None, np.empty(0))
        donors = np.unique(donor_C)
        several = np.array([
            d for d in donors
            if np.ptp(value_C[donor_C == d]) > 0 and (donor_C == d).sum() >= MIN_TIME_CELLS
        ])  # fmt: skip
        if several.size >= MIN_DONORS:
            return cls("donors of several times", donor_C, several)
        if donors.size >= MIN_DONORS + 1:
            return cls("donors of one time", donor_C, donors)
        return cls("cells", None, np.empty(0))

    def shuffled(self, value_C: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Shuffle times among what is exchangeable: a donor's cells, donors, or cells."""
        if self.donor_C is None:
            return rng.permutation(value_C)
        out_C = value_C.copy()
        if self.what == "donors of several times":
            for donor in self.donors:
                here = np.flatnonzero(self.donor_C == donor)
                out_C[here] = rng.permutation(value_C[here])
            return out_C
        mean_B = np.array([value_C[self.donor_C == d].mean() for d in self.donors])
        for donor, value in zip(self.donors, rng.permutation(mean_B), strict=True):
            out_C[self.donor_C == donor] = value
        return out_C

    def run(
        self, log_CG: sp.csc_matrix, value_C: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Give correlations, p values, and the share of donors that agree."""
        if self.donor_C is None:
            r_G = pearson(log_CG, value_C)
            return r_G, _of_r(r_G, value_C.size), np.full(r_G.size, np.nan)
        if self.what == "donors of one time":
            mean_BG = np.stack([
                np.asarray(log_CG[self.donor_C == d].mean(0)).ravel() for d in self.donors
            ])  # fmt: skip
            value_B = np.array([value_C[self.donor_C == d].mean() for d in self.donors])
            r_G = pearson(sp.csc_matrix(mean_BG), value_B)
            return r_G, _of_r(r_G, value_B.size), np.full(r_G.size, np.nan)
        r_BG = np.stack([
            pearson(log_CG[self.donor_C == d], value_C[self.donor_C == d]) for d in self.donors
        ])  # fmt: skip
        r_G, z_BG = r_BG.mean(0), np.arctanh(r_BG.clip(-0.999999, 0.999999))
        with np.errstate(invalid="ignore", divide="ignore"):
            p_G = stats.ttest_1samp(z_BG, 0.0, axis=0).pvalue
        p_G = np.where(z_BG.std(0) > 0, p_G, np.nan)
        return r_G, p_G, (np.sign(r_BG) == np.sign(r_G)).mean(0)


def pearson(log_CG: sp.csc_matrix, value_C: np.ndarray) -> np.ndarray:
    """Correlation of every column with a vector; 0 for one that does not vary."""
    n = value_C.size
    centred_C = value_C - value_C.mean()
    mean_G = np.asarray(log_CG.mean(0), np.float64).ravel()
    square_G = np.asarray(log_CG.multiply(log_CG).mean(0), np.float64).ravel()
    sd_G = np.sqrt(np.maximum(square_G - mean_G**2, 0.0))
    spread = centred_C.std()
    with np.errstate(invalid="ignore", divide="ignore"):
        r_G = np.asarray(log_CG.T @ centred_C).ravel() / (n * sd_G * spread)
    return np.where((sd_G > 1e-9) & (spread > 0), r_G, 0.0)


def _of_r(r_G: np.ndarray, n: int) -> np.ndarray:
    r_G = r_G.clip(-1 + 1e-12, 1 - 1e-12)
    t_G = r_G * np.sqrt((n - 2) / (1 - r_G**2))
    return np.asarray(2 * stats.t.sf(np.abs(t_G), n - 2))


def by_model(
    cells: VocabularyCells,
    obs: pd.DataFrame,
    bundle: Bundle,
    times: Times,
    asked: Asked,
    reading: InputSettings,
    where: str,
) -> tuple[pd.DataFrame, dict[str, float]]:
    """Perturb genes of the cells of every time and measure the shift towards the next time.

    Parameters
    ----------
    cells, obs, bundle, times
        The cells and the model.
    asked
        Genes, operation, donors, nulls; its states are filled in step by step.
    reading, where
        As in :func:`~genemodel.perturbation.plan.plan_of`.

    Returns
    -------
    Statistics of :func:`genemodel.perturb` with a column ``Step``, of the steps whose two times the
    model tells apart; and how well it tells those of every step (AUC).

    Raises
    ------
    DataError
        It tells none apart, or a gene is unknown.
    """
    states = [times.names[c] if c >= 0 else None for c in times.code_C]
    obs = obs.assign(**{STATE: pd.Series(states, index=obs.index, dtype=object)})
    parts, auc = [], {}
    for t, step in enumerate(step_names(times)):
        own = replace(
            asked, state_key=STATE, start_state=times.names[t], goal_state=times.names[t + 1],
            min_auc=0.0,
        )  # fmt: skip
        plan = plan_of(cells, obs, bundle, own, reading, 0, where)
        auc[step] = float(plan.states.auc)
        if auc[step] < asked.min_auc:
            logger.warning(
                "%s: the model does not tell %s from %s (AUC %.3f, below min_auc=%g): no gene is "
                "perturbed there.", where, times.names[t], times.names[t + 1], auc[step],
                asked.min_auc,
            )  # fmt: skip
            continue
        with Progress("perturb", plan.n_variants, unit="variants") as progress:
            shifts = plan.shifts(np.arange(plan.rows.size), progress.add)
        parts.append(plan.result(shifts).statistics.assign(Step=step))
    if not parts:
        raise DataError(
            f"{where}: the model tells no time from the next one (AUC at most "
            f"{max(auc.values()):.3f}, below min_auc={asked.min_auc:g}). Fine-tune it on these "
            "cells first (`genemodel finetune task=classify label_key=...`), leave model out, or "
            "set min_auc=0."
        )
    found = pd.concat(parts, ignore_index=True)
    return found[["Step", *[name for name in found if name != "Step"]]], auc


def agreement(genes: pd.DataFrame, steps: pd.DataFrame, operation: Operation) -> dict[str, float]:
    """Rank correlation of a step's shifts with the change of the same genes in that step.

    A gene that rises should, deleted, move a cell back, and over-expressed forward: the shifts of
    deletion are turned round.
    """
    sign = -1.0 if operation in ("delete", "inhibit") else 1.0
    change = genes.drop_duplicates("Gene").set_index("Gene")
    found = {}
    for step, own in steps.groupby("Step", sort=False):
        shift = sign * own["Shift_to_goal_end"].to_numpy(float)
        found[str(step)] = correlation(shift, change[f"Change_{step}"].reindex(own["Gene_name"]))
    return found
