"""What came of a perturbation: tables, what they are worth in words, and files.

Axes: P perturbations, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.embedding.embed import write_whole
from genemodel.perturbation.genes import GeneNames
from genemodel.perturbation.passes import GeneSums
from genemodel.settings import some
from genemodel.writing import whole_directory

if TYPE_CHECKING:
    from anndata import AnnData

# Correlations of fewer genes say nothing.
MIN_CORRELATED = 10


@dataclass(repr=False)
class PerturbationResult:
    """What came of it.

    Attributes
    ----------
    statistics
        One row a gene or group that was asked for, the strongest first.
    shifts
        One row a cell and perturbation, nulls included: cell, Gene, Gene_name, part, rank,
        cosine_similarity, shift_to_STATE, and with the other genes held ``held_…``.
    gene_shifts
        One row a perturbed gene and another gene (``…_and_gene``), else None.
    summary
        Plain values: separation of the states, how far rank and detection alone explain the
        shifts, which genes were refused, which model it was.
    """

    statistics: pd.DataFrame
    shifts: pd.DataFrame
    gene_shifts: pd.DataFrame | None
    summary: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"{self.statistics.to_string(max_rows=20)}\n{self.describe()}"

    def _repr_html_(self) -> str:
        return self.statistics.to_html(max_rows=20) + f"<pre>{self.describe()}</pre>"

    def describe(self) -> str:
        """Say in a few lines what the numbers are worth."""
        return described(self.summary)


def gene_table(
    sums: GeneSums, of_each: pd.DataFrame, names: GeneNames, n_test: int
) -> pd.DataFrame:
    """Geneformer's aggregate_gene_shifts, and how much of it is the affected gene's own habit."""
    p, v = np.nonzero(sums.n_PV[:n_test])
    n = sums.n_PV[p, v].astype(np.float64)
    mean = sums.sum_PV[p, v] / n
    spread = np.sqrt(np.maximum(sums.square_PV[p, v] / n - mean**2, 0.0))
    # Over all perturbations, nulls too: some genes move whatever is perturbed.
    with np.errstate(invalid="ignore", divide="ignore"):
        usual_V = sums.sum_PV.sum(0) / sums.n_PV.sum(0)
    table = pd.DataFrame({
        "Perturbed": of_each["Gene"].to_numpy()[p],
        "Gene_name": of_each["Gene_name"].to_numpy()[p],
        "Ensembl_ID": of_each["Ensembl_ID"].to_numpy()[p],
        "Affected": names.number_V[v],
        "Affected_gene_name": [names.symbol((int(t),)) for t in v],
        "Affected_Ensembl_ID": [names.ensembl((int(t),)) for t in v],
        "Cosine_sim_mean": mean,
        "Cosine_sim_stdev": spread,
        "N_Detections": n.astype(np.int64),
        "Affected_usual": usual_V[v],
        "Cosine_excess": mean - usual_V[v],
    })  # fmt: skip
    return table.sort_values(["Perturbed", "Cosine_excess"], kind="stable").reset_index(drop=True)


def identity_r2(shift_P: np.ndarray, table: pd.DataFrame) -> float:
    """Share of the shifts' variance that rank, detection and mean of a gene predict, held out."""
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.model_selection import cross_val_predict

    known = np.isfinite(shift_P) & np.isfinite(table["Mean_rank"].to_numpy(float))
    if known.sum() < 3 * MIN_CORRELATED:
        return float("nan")
    features = table.loc[known, ["Mean_rank", "Coverage", "Mean_expression"]].to_numpy(float)
    forest = RandomForestRegressor(100, min_samples_leaf=5, random_state=0)
    found = cross_val_predict(forest, features, shift_P[known], cv=5)
    left = ((shift_P[known] - found) ** 2).sum() / (
        (shift_P[known] - shift_P[known].mean()) ** 2
    ).sum()
    return float(1 - left)


def correlation(a: np.ndarray, b: Iterable[float]) -> float:
    """Return the rank correlation of what both have; NaN where that is too little."""
    from scipy.stats import spearmanr

    other = np.asarray(list(b), float)
    known = np.isfinite(a) & np.isfinite(other)
    if known.sum() < MIN_CORRELATED or np.ptp(a[known]) == 0 or np.ptp(other[known]) == 0:
        return float("nan")
    return float(spearmanr(a[known], other[known]).statistic)


def described(summary: dict[str, Any]) -> str:
    """Say in lines what a summary says."""
    lines = []
    if "auc" in summary:
        lines.append(
            f"{summary['goal']} is told from {summary['start']} with AUC {summary['auc']:.3f} on "
            f"{summary['auc_held_out']} held out."
        )
    lines.append(
        f"{summary['cells']:,} cells, {summary['perturbations']:,} perturbations asked for, "
        f"{summary['null_perturbations']:,} more for comparison."
    )
    if summary["below_floor"]:
        lines.append(f"In too few cells and not tested: {some(summary['below_floor'])}.")
    donors = summary.get("donors")
    lines.append(
        f"{summary['significant']:,} significant with cells as replicates (Sig), "
        f"{summary['supported']:,} against genes that are alike"
        + (f" and across {donors:,} donors" if donors else "; no donors were named")
        + " (Supported)."
    )
    for key, what in (
        ("identity_r2", "Rank, detection and mean alone predict R² {:.2f} of the shifts."),
        ("without_model_spearman", "Rank correlation with the same change, no model: {:.2f}."),
        ("position_preserving_spearman", "With the other genes kept in place: {:.2f}."),
    ):  # fmt: skip
        value = summary.get(key, float("nan"))
        if np.isfinite(value):
            lines.append(what.format(value))
    return "\n".join(lines)


def top(result: PerturbationResult) -> str:
    """Show the first rows of the table, for a terminal."""
    columns = [
        name for name in (
            "Gene_name", "Shift_to_goal_end", "Goal_end_FDR", "Test_avg_shift",
            "Test_vs_null_FDR", "Matched_FDR", "Donor_FDR", "N_Detections", "Supported",
        ) if name in result.statistics
    ]  # fmt: skip
    return result.statistics[columns].head(10).to_string(index=False)


def for_uns(result: PerturbationResult) -> dict[str, Any]:
    """Give what an h5ad keeps in ``uns``."""
    return {"statistics": result.statistics.copy(), "summary": result.summary}


def is_ours(out: Path) -> bool:
    """Whether a folder holds an earlier result, or nothing."""
    return (out / "statistics.csv").is_file() or (out.is_dir() and not any(out.iterdir()))


def write_result(result: PerturbationResult, notes: "AnnData", out: Path, tables: str) -> None:
    """Write tables, a summary and the annotated cells as a folder, whole or not at all."""
    with whole_directory(out) as folder:
        result.statistics.to_csv(folder / "statistics.csv", index=False)
        large = {"shifts": result.shifts, "gene_shifts": result.gene_shifts}
        for name, table in large.items():
            if table is None:
                continue
            if tables == "parquet":
                table.to_parquet(folder / f"{name}.parquet", index=False)
            else:
                table.to_csv(folder / f"{name}.csv.gz", index=False)
        (folder / "summary.txt").write_text(result.describe() + "\n", encoding="utf-8")
        write_whole(notes, folder / "cells.h5ad")
