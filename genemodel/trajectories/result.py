"""What came of it: tables, what they are worth in words, and files."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from genemodel.embedding.embed import write_whole
from genemodel.settings import some
from genemodel.trajectories import populations
from genemodel.writing import whole_directory

if TYPE_CHECKING:
    from anndata import AnnData

TABLES = ("placing", "placing_long", "populations", "populations_long", "genes", "steps")


@dataclass(repr=False)
class TrajectoryResult:
    """What came of it; a part that was not asked for is None.

    Attributes
    ----------
    placing
        One row a kind of hold-out and method: error in units of time, Kendall's τ, and how much
        worse than ours over donors.
    placing_long
        One row a kind, method, donor and time.
    populations
        One row a method: distances of the population it predicts at a held-out time.
    populations_long
        One row a held-out time, donor and method.
    genes
        One row a gene, the strongest first: correlation with time, and change a step.
    steps
        With a model, one row a step and gene that was perturbed: statistics of ``gm.perturb``.
    summary
        Plain values.
    """

    placing: pd.DataFrame | None = None
    placing_long: pd.DataFrame | None = None
    populations: pd.DataFrame | None = None
    populations_long: pd.DataFrame | None = None
    genes: pd.DataFrame | None = None
    steps: pd.DataFrame | None = None
    summary: dict[str, Any] = field(default_factory=dict)

    def tables(self) -> dict[str, pd.DataFrame]:
        """Give those that are there, by name."""
        there = {name: getattr(self, name) for name in TABLES}
        return {name: table for name, table in there.items() if table is not None}

    def __repr__(self) -> str:
        shown = [
            table.head(12).round(4).to_string(index=False)
            for name, table in self.tables().items() if not name.endswith("_long")
        ]  # fmt: skip
        return "\n\n".join([*shown, self.describe()])

    def describe(self) -> str:
        """Say in a few lines what the numbers are worth."""
        return described(self.summary, self.placing, self.populations)


def described(
    summary: dict[str, Any], placed: pd.DataFrame | None, predicted: pd.DataFrame | None
) -> str:
    """Say in lines what the tables say."""
    unit = "units of the column" if summary["measured"] else "steps"
    lines = [f"{summary['cells']:,} cells at {some(summary['times'], 12)}."]
    if placed is not None:
        for held_out, own in placed.groupby("held_out", sort=False):
            best = own.loc[own["error"].idxmin()]
            ours = own[own["method"] == summary["placed_by"]].iloc[0]
            lines.append(
                f"Placed with {held_out} held out: {ours['method']} is off by {ours['error']:.3g} "
                f"{unit}; "
                + ("no method is better." if best["method"] == ours["method"] else
                   f"best is {best['method']}, {best['error']:.3g}.")
            )  # fmt: skip
    if predicted is not None:
        own = predicted[~predicted["method"].isin(populations.FLOORS)]
        best = own.loc[own["energy"].idxmin()]
        ours = own[own["method"] == populations.OURS].iloc[0]
        lines.append(
            f"Population of a time held out, energy distance: {ours['method']} "
            f"{ours['energy']:.3g}; "
            + ("no method is better." if best["method"] == ours["method"] else
               f"best is {best['method']}, {best['energy']:.3g}.")
        )  # fmt: skip
    if "replicates" in summary:
        lines.append(
            f"{summary['significant']:,} of {summary['genes']:,} genes go with time (FDR < .05, "
            f"replicates: {summary['replicates']}); {summary['null_significant']:.3g} on shuffled "
            "times."
            + (
                " Cells are no replicates: name donors with donor_key."
                if summary["replicates"] == "cells"
                else ""
            )
        )
    for step, auc in summary.get("auc", {}).items():
        told = summary["agreement"].get(step)
        lines.append(
            f"{step}: the model tells the two times apart with AUC {auc:.3f}"
            + ("; not asked." if told is None else
               f"; its shifts and the change of expression agree by {told:.2f} (rank).")
        )  # fmt: skip
    if placed is not None and not summary["donor_key"]:
        lines.append("No donors were named: cells held out have their neighbours left, too kind.")
    return "\n".join(lines)


def for_uns(result: TrajectoryResult) -> dict[str, Any]:
    """Give what an h5ad keeps in ``uns``."""
    return {name: table.copy() for name, table in result.tables().items()} | {
        "summary": result.summary
    }


def is_ours(out: Path) -> bool:
    """Whether a folder holds an earlier result, or nothing."""
    there = [out / f"{name}.csv" for name in TABLES]
    empty = out.is_dir() and not any(out.iterdir())
    return empty or ((out / "summary.txt").is_file() and any(path.is_file() for path in there))


def write_result(result: TrajectoryResult, notes: "AnnData", out: Path) -> None:
    """Write tables, a summary and the annotated cells as a folder, whole or not at all."""
    with whole_directory(out) as folder:
        for name, table in result.tables().items():
            table.to_csv(folder / f"{name}.csv", index=False)
        (folder / "summary.txt").write_text(result.describe() + "\n", encoding="utf-8")
        write_whole(notes, folder / "cells.h5ad")
