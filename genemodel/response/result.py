"""What came of it: predictions, scores beside baselines, what they are worth in words, and files.

Axes: U units, G genes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.metrics.response import METRICS
from genemodel.reports.page import Report
from genemodel.reports.response_plot import response_panels
from genemodel.response.mixture import OURS
from genemodel.response.panels import MEAN, REPLICATE, VALUES, panel, scaled_panel, telling
from genemodel.writing import whole_directory

if TYPE_CHECKING:
    from anndata import AnnData

_DRAWS = 500
_INTERVAL = (0.025, 0.975)


@dataclass(repr=False)
class ResponseResult:
    """What came of it.

    Attributes
    ----------
    predicted
        Effects on the log profile, one row a perturbation, context and dose, one column a gene:
        of what was held out (``part`` is ``held out``) and of what was not measured (``new``).
    measured
        The same of what was held out, measured from controls that nothing was learned from.
    tests
        One row a perturbation, context and dose: its cells, and whether they are told from
        controls (``p``, ``fdr``, ``supported``).
    scores
        One row a method: the six scores.
    scaled
        The same between the mean response (0) and a repeat of the experiment (1), their mean
        ``total``, and its interval over what was held out.
    units
        One row a repeat, held-out unit and method: what ``scores`` are made of.
    mixtures
        What ours chose, by repeat and fold.
    cells
        Cells that were made of predictions, or None.
    summary
        Plain values.
    """

    predicted: pd.DataFrame
    measured: pd.DataFrame
    tests: pd.DataFrame
    scores: pd.DataFrame
    scaled: pd.DataFrame
    units: pd.DataFrame
    mixtures: pd.DataFrame
    cells: "AnnData | None" = None
    summary: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.describe()

    def _repr_html_(self) -> str:
        return self.scaled.to_html(float_format="{:.3f}".format) + f"<pre>{self.words()}</pre>"

    def words(self) -> str:
        """Say in a few lines what the predictions are worth."""
        return "\n".join(self.summary["words"])

    def describe(self) -> str:
        """Show both tables and what they are worth."""
        tables = (
            ("Scores", self.scores),
            (f"Scaled: {MEAN} 0, {REPLICATE} 1", self.scaled),
        )
        shown = "\n\n".join(
            f"{title}\n{table.to_string(float_format='{:.3f}'.format, na_rep='–')}"
            for title, table in tables if len(table)
        )  # fmt: skip
        return f"{shown}\n\n{self.words()}".lstrip()

    def report(self) -> Report:
        """Make a page of it."""
        page = Report(
            "Response to perturbations",
            f"{self.summary['held_out']} held out, {self.summary['cells']:,} cells",
        )
        page.section("What it is worth").text("\n\n".join(self.summary["words"]))
        if len(self.scaled):
            page.section("Scores").table(
                self.scaled,
                "Between the mean response (0) and a repeat of the experiment (1). A dash: the "
                "repeat is hardly better than the mean response, so the score tells nothing apart.",
                best={"total": "high"},
            )
            page.table(
                self.scores, "The six scores themselves.",
                best={name: way for name, way in METRICS.items() if name in self.scores},  # type: ignore[misc]
            )  # fmt: skip
            page.section("Predicted and measured").figure(
                response_panels(self.predicted, self.measured, self.tests),
                "Effects of what was held out, as predicted by genemodel and as measured.",
            )
        page.section("Is there an effect").table(
            self.tests, "Perturbed cells against controls, labels shuffled.", index=False
        )
        if len(self.mixtures):
            page.section("What genemodel chose").table(self.mixtures, index=False)
        return page.settings(self.summary["settings"])


def tables_of(
    units: pd.DataFrame, group_of: np.ndarray, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, Any]]:
    """Make the two tables of methods, and what ours is to the best baseline.

    Parameters
    ----------
    units
        Scores by repeat, unit and method.
    group_of
        What every unit was held out with: drawn together.
    seed
        Of the bootstrap.
    """
    values = {
        str(name): rows.set_index("unit")[list(VALUES)]
        for name, rows in units.groupby("method", sort=False)
    }
    arrays = {name: rows.to_numpy(float) for name, rows in values.items()}
    scores = pd.DataFrame({name: panel(array) for name, array in arrays.items()}).T
    scaled = pd.DataFrame(scaled_panel(arrays)).T
    names = telling(arrays)
    group_N = group_of[next(iter(values.values())).index.to_numpy(int)]
    groups = np.unique(group_N)
    rows_of = [np.flatnonzero(group_N == group) for group in groups]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(_DRAWS):
        at = np.concatenate([rows_of[g] for g in rng.integers(len(groups), size=len(groups))])
        one = scaled_panel({name: array[at] for name, array in arrays.items()}, names)
        drawn.append({name: parts["total"] for name, parts in one.items()})
    draws = pd.DataFrame(drawn)
    scaled["total_low"], scaled["total_high"] = (
        draws.quantile(q).reindex(scaled.index) for q in _INTERVAL
    )
    others = [name for name in scaled.index if name not in (OURS, REPLICATE)]
    about: dict[str, Any] = {"best_baseline": None}
    totals = scaled["total"]
    if totals[others].notna().any():
        best = str(totals[others].idxmax())
        gain = draws[OURS] - draws[best]
        about = {
            "best_baseline": best,
            "total": float(totals[OURS]),
            "best_total": float(totals[best]),
            "gain": float(totals[OURS] - totals[best]),
            "gain_low": float(gain.quantile(_INTERVAL[0])),
            "gain_high": float(gain.quantile(_INTERVAL[1])),
        }
    return scores, scaled, about


def write_result(result: ResponseResult, out: Path) -> None:
    """Write tables, a summary, a page and made cells as a folder, whole or not at all."""
    with whole_directory(out) as folder:
        for name in ("scores", "scaled"):
            getattr(result, name).to_csv(folder / f"{name}.csv", index_label="method")
        for name in ("tests", "mixtures", "units"):
            getattr(result, name).to_csv(folder / f"{name}.csv", index=False)
        for name in ("predicted", "measured"):
            getattr(result, name).to_csv(folder / f"{name}.csv.gz")
        (folder / "summary.json").write_text(
            json.dumps(result.summary, indent=1, ensure_ascii=False), encoding="utf-8"
        )
        (folder / "summary.txt").write_text(result.describe() + "\n", encoding="utf-8")
        result.report().write(folder / "report.html")
        if result.cells is not None:
            result.cells.write_h5ad(folder / "cells.h5ad", compression="gzip")


def is_ours(out: Path) -> bool:
    """Whether a folder holds an earlier result, or nothing."""
    return (out / "scaled.csv").is_file() or (out.is_dir() and not any(out.iterdir()))
