"""From shifts of cells to a table of genes: the published statistics, and what they leave out.

Columns of Geneformer's in-silico statistics keep their names and their meaning; there every cell
counts as a replicate. Beside them stand donors as replicates, genes that are alike as the null, and
what the same change does without any model.

Axes: W variants, P perturbations, C cells, S states, K nulls, B donors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from genemodel.perturbation.passes import Shifts

ALPHA = 0.05
# The published pool of random shifts.
POOL, POOL_SEED = 100_000, 42
# Cells of a donor below which its mean is mostly noise, and donors below which nothing replicates.
MIN_DONOR_CELLS, MIN_DONORS = 3, 3
# Genes alike below which their spread says nothing.
MIN_NULLS = 8
# Null values that its distribution is fitted to.
MOST_FITTED = 20_000
# Perturbations below which two components are not told apart.
MIN_MIXTURE = 20


@dataclass(frozen=True)
class Tested:
    """What the statistics are made of.

    Attributes
    ----------
    shifts
        Of all perturbations.
    facts
        One row a perturbation: what it is called and what it is like.
    n_test
        The first so many were asked for, the others are nulls.
    nulls
        Of every tested perturbation its nulls' numbers.
    states
        Goal, start, alternatives; empty where there is no goal.
    donor_C
        Code of every row's donor, or None.
    n_cells
        Cells that were perturbed.
    covered_P
        Perturbations above the floor of coverage.
    anchor
        Number of the anchor's own perturbation, or None.
    parts_P
        For a combination the numbers of its parts, else empty.
    """

    shifts: Shifts
    facts: pd.DataFrame
    n_test: int
    nulls: list[list[int]]
    states: tuple[str, ...]
    donor_C: np.ndarray | None
    n_cells: int
    covered_P: np.ndarray
    anchor: int | None = None
    parts_P: Sequence[tuple[int, ...]] = ()


def adjusted(p_P: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's false discovery rate; NaN stays NaN and does not count."""
    out_P = np.full(p_P.shape, np.nan)
    known = np.isfinite(p_P)
    if known.any():
        out_P[known] = stats.false_discovery_control(p_P[known])
    return out_P


def statistics(tested: Tested) -> pd.DataFrame:
    """Make the table of the perturbations that were asked for."""
    shifts, n_test = tested.shifts, tested.n_test
    n_P = len(tested.facts)
    detected_W = shifts.place_W > 0
    n_detected_P = np.bincount(shifts.perturbation_W[detected_W], minlength=n_P)
    table = tested.facts.iloc[:n_test, :3].reset_index(drop=True)
    goal = bool(tested.states)
    value_W = shifts.state_WS[:, 0] if goal else shifts.cosine_W
    spans = _spans(shifts.perturbation_W, n_P)
    if goal:
        _towards(table, tested, spans)
    else:
        _against_null(table, tested, spans, n_detected_P)
    table["N_Detections"] = n_detected_P[:n_test]
    table["Coverage"] = n_detected_P[:n_test] / max(1, tested.n_cells)
    table["Covered"] = tested.covered_P[:n_test]
    table[["Mean_rank", "Mean_expression"]] = tested.facts[["Mean_rank", "Mean_expression"]].iloc[
        :n_test
    ]
    _donors_and_nulls(table, tested, value_W, spans)
    held_W = shifts.held_WS[:, 0] if goal and len(shifts.held_WS) else shifts.held_W
    if len(held_W):
        table["Position_preserving_shift"] = _means(held_W, spans)[:n_test]
    table["Expression_shift"] = _means(shifts.plain_W, spans)[:n_test]
    if any(tested.parts_P):
        # A cosine is 1 where nothing happens: what adds up is what is lost of it.
        _combinations(table, tested, _means(value_W if goal else value_W - 1, spans))
    key = "Goal_end_FDR" if goal else "Test_vs_null_FDR"
    shift = "Shift_to_goal_end" if goal else "Test_avg_shift"
    table.insert(
        table.columns.get_loc("N_Detections") + 1, "Sig",
        (table[key] < ALPHA).astype(int) * table["Covered"].astype(int),
    )  # fmt: skip
    table["Supported"] = _supported(table)
    return table.sort_values(
        ["Sig", shift, key], ascending=[False, not goal, True], kind="stable"
    ).reset_index(drop=True)


def _supported(table: pd.DataFrame) -> pd.Series:
    """Covered, beyond genes that are alike and, where there are donors, the same in them."""
    known = table["Covered"] & (table["Matched_FDR"] < ALPHA)
    if "Donor_pval" in table:
        # Asked of the few that are beyond their nulls, so that it need not stand for all again.
        known &= table["Donor_pval"] < ALPHA
    return known.astype(int)


def _spans(perturbation_W: np.ndarray, n_P: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of the rows by perturbation, and where each perturbation begins."""
    by_W = np.argsort(perturbation_W, kind="stable")
    return by_W, np.searchsorted(perturbation_W[by_W], np.arange(n_P + 1))


def _rows(spans: tuple[np.ndarray, np.ndarray], p: int) -> np.ndarray:
    by_W, begin_P1 = spans
    return by_W[begin_P1[p] : begin_P1[p + 1]]


def _means(value_W: np.ndarray, spans: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    n_P = spans[1].size - 1
    return np.array([
        value_W[rows].mean(dtype=np.float64) if (rows := _rows(spans, p)).size else np.nan
        for p in range(n_P)
    ])  # fmt: skip


def _towards(table: pd.DataFrame, tested: Tested, spans: tuple[np.ndarray, np.ndarray]) -> None:
    """Geneformer's goal_state_shift: rank-sum against a pool of all genes' shifts."""
    rng = np.random.default_rng(POOL_SEED)
    columns = [("Shift_to_goal_end", "Goal_end_vs_random_pval", "Goal_end_FDR", 0)]
    columns += [
        (f"Shift_to_alt_end_{name}", f"Alt_end_vs_random_pval_{name}", f"Alt_end_FDR_{name}", s)
        for s, name in enumerate(tested.states) if s >= 2
    ]  # fmt: skip
    for shift, p_value, fdr, s in columns:
        value_W = tested.shifts.state_WS[:, s]
        pool = value_W
        if pool.size > POOL:
            pool = rng.choice(pool, POOL, replace=False)
        table[shift] = _means(value_W, spans)[: tested.n_test]
        table[p_value] = [_rank_sum(value_W[_rows(spans, p)], pool) for p in range(tested.n_test)]
        table[fdr] = adjusted(table[p_value].to_numpy(float))


def _against_null(
    table: pd.DataFrame,
    tested: Tested,
    spans: tuple[np.ndarray, np.ndarray],
    n_detected_P: np.ndarray,
) -> None:
    """Geneformer's vs_null and mixture_model, on the cosine of a cell before and after."""
    value_W = tested.shifts.cosine_W
    mean_P = _means(value_W, spans)
    table["Test_avg_shift"] = mean_P[: tested.n_test]
    null_mean, p_values, n_null = [], [], []
    for p in range(tested.n_test):
        rows = [_rows(spans, k) for k in tested.nulls[p]]
        of_nulls = np.concatenate([value_W[r] for r in rows]) if rows else np.empty(0)
        null_mean.append(of_nulls.mean() if of_nulls.size else np.nan)
        p_values.append(_rank_sum(value_W[_rows(spans, p)], of_nulls))
        n_null.append(int(n_detected_P[tested.nulls[p]].sum()) if tested.nulls[p] else 0)
    table["Null_avg_shift"] = null_mean
    table["Test_vs_null_avg_shift"] = table["Test_avg_shift"] - table["Null_avg_shift"]
    table["Test_vs_null_pval"] = p_values
    table["Test_vs_null_FDR"] = adjusted(np.array(p_values, float))
    table["N_Detections_test"] = n_detected_P[: tested.n_test]
    table["N_Detections_null"] = n_null
    known = np.isfinite(mean_P[: tested.n_test])
    if known.sum() >= MIN_MIXTURE:
        component, share = _impact(mean_P[: tested.n_test][known])
        table["Impact_component"], table["Impact_component_percent"] = 0, np.nan
        table.loc[known, "Impact_component"] = component
        table.loc[known, "Impact_component_percent"] = share


def _impact(mean_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two normal components; that with the lower cosine is the impact, whichever comes first."""
    from sklearn.mixture import GaussianMixture

    scale = mean_P.std() or 1.0
    x = ((mean_P - mean_P.mean()) / scale)[:, None]
    mixture = GaussianMixture(2, random_state=0).fit(x)
    impact = int(np.argmin(mixture.means_[:, 0]))
    share = mixture.predict_proba(x)[:, impact]
    return (share > 0.5).astype(int), 100 * share


def _rank_sum(values: np.ndarray, pool: np.ndarray) -> float:
    if not values.size or not pool.size:
        return float("nan")
    return float(stats.ranksums(values, pool).pvalue)


def donor_means(
    value_W: np.ndarray, donor_W: np.ndarray, perturbation_W: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Mean of every perturbation in every donor, (P, B); NaN below ``MIN_DONOR_CELLS`` cells."""
    n_P, n_B = shape
    at_W = perturbation_W * n_B + donor_W
    n = np.bincount(at_W, minlength=n_P * n_B)
    total = np.bincount(at_W, value_W.astype(np.float64), n_P * n_B)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.where(n >= MIN_DONOR_CELLS, total / n, np.nan)
    return mean.reshape(n_P, n_B)


def matched_test(value_P: np.ndarray, nulls: Sequence[Sequence[int]]) -> pd.DataFrame:
    """Compare each tested value with those of genes that are alike.

    A value's distance from the median of its nulls is measured in their spread (median absolute
    deviation, which one gene with an effect among them does not stretch). How far such distances
    go by chance is learnt from the nulls of all tests together: Student's t with the degrees of
    freedom and the scale that fit them, because the tails of shifts are much heavier than normal.

    Returns
    -------
    Null_genes, Matched_null_shift (median), Excess_shift, Matched_pval, Matched_FDR.
    """
    rows, distance_P, pool = [], np.full(len(nulls), np.nan), []
    every = 1 + sum(map(len, nulls)) // MOST_FITTED
    for p, own in enumerate(nulls):
        null_K = value_P[list(own)]
        null_K = null_K[np.isfinite(null_K)]
        n = null_K.size
        middle = float(np.median(null_K)) if n else np.nan
        rows.append((n, middle, value_P[p] - middle))
        spread = stats.median_abs_deviation(null_K, scale="normal") if n >= MIN_NULLS else 0.0
        if spread > 0:
            distance_P[p] = (value_P[p] - middle) / spread
            if p % every == 0:
                pool.append(_left_out(null_K))
    table = pd.DataFrame(rows, columns=["Null_genes", "Matched_null_shift", "Excess_shift"])
    table["Matched_pval"] = np.nan
    if pool:
        freedom, _, scale = stats.t.fit(np.concatenate(pool), floc=0)
        table["Matched_pval"] = 2 * stats.t.sf(np.abs(distance_P) / scale, freedom)
    table["Matched_FDR"] = adjusted(table["Matched_pval"].to_numpy(float))
    return table


def _left_out(null_K: np.ndarray) -> np.ndarray:
    """Distance of every null from the others, as a test's is from all of them."""
    n = null_K.size
    others_KK = null_K[(np.arange(n)[:, None] + np.arange(1, n)) % n]
    spread_K = stats.median_abs_deviation(others_KK, axis=1, scale="normal")
    there = spread_K > 0
    return (null_K[there] - np.median(others_KK[there], axis=1)) / spread_K[there]


def _donors_and_nulls(
    table: pd.DataFrame,
    tested: Tested,
    value_W: np.ndarray,
    spans: tuple[np.ndarray, np.ndarray],
) -> None:
    n_P, n_test = len(tested.facts), tested.n_test
    value_P = _means(value_W, spans)
    donor_PB = None
    if tested.donor_C is not None:
        donor_W = tested.donor_C[tested.shifts.cell_W]
        shape = n_P, int(tested.donor_C.max(initial=0)) + 1
        donor_PB = donor_means(value_W, donor_W, tested.shifts.perturbation_W, shape)
        with np.errstate(invalid="ignore"):
            n_B = np.isfinite(donor_PB).sum(1)
            total = np.nansum(donor_PB, axis=1)
            of_donors_P = np.where(n_B > 0, total / np.maximum(n_B, 1), np.nan)
        # A donor counts once, however many of its cells there are.
        value_P = np.where(np.isfinite(of_donors_P), of_donors_P, value_P)
    found = matched_test(value_P, tested.nulls)
    for name in found:
        table[name] = found[name]
    if donor_PB is None:
        return
    p_values, signs, counts = [], [], []
    for p in range(n_test):
        own = tested.nulls[p]
        null_KB = donor_PB[own] if own else np.full((1, donor_PB.shape[1]), np.nan)
        known_B = np.isfinite(donor_PB[p]) & np.isfinite(null_KB).any(0)
        excess_B = donor_PB[p, known_B] - np.nanmean(null_KB[:, known_B], axis=0)
        n = excess_B.size
        counts.append(n)
        mean = excess_B.mean() if n else np.nan
        signs.append(float((np.sign(excess_B) == np.sign(mean)).mean()) if n else np.nan)
        tests = n >= MIN_DONORS and np.ptp(excess_B) > 0
        p_values.append(float(stats.ttest_1samp(excess_B, 0.0).pvalue) if tests else np.nan)
    table["Donor_mean_shift"] = value_P[:n_test]
    table["N_Donors"] = counts
    table["Donor_same_sign"] = signs
    table["Donor_pval"] = p_values
    table["Donor_FDR"] = adjusted(np.array(p_values, float))


def _combinations(table: pd.DataFrame, tested: Tested, mean_P: np.ndarray) -> None:
    """Geneformer's columns of combinations: together, less the sum of each alone."""
    columns: dict[str, list[float]] = {
        name: []
        for name in (
            "Anchor_shift", "Test_token_shift", "Sum_of_indiv_shifts", "Combo_shift",
            "Combo_minus_sum_shift",
        )
    }  # fmt: skip
    for p in range(tested.n_test):
        parts = tested.parts_P[p]
        anchor = other = total = together = np.nan
        if parts:
            total, together = float(mean_P[list(parts)].sum()), float(mean_P[p])
            if tested.anchor in parts:
                assert tested.anchor is not None
                anchor = float(mean_P[tested.anchor])
                other = float(sum(mean_P[q] for q in parts if q != tested.anchor))
        row = (anchor, other, total, together, together - total)
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)
    if tested.anchor is None:
        del columns["Anchor_shift"], columns["Test_token_shift"]
    for name, values in columns.items():
        table[name] = values
