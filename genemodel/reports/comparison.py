"""The outcome of a comparison: tables, the text for a terminal, files and the report page."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import quote

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.settings import some
from genemodel.writing import remove, whole

if TYPE_CHECKING:
    from genemodel.embedding.contamination import Contamination
    from genemodel.reports.page import Report

# Metric -> heading in the terminal and the report, and which direction is better.
COLUMNS: dict[str, dict[str, tuple[str, Literal["high", "low"] | None]]] = {
    "integrate": {
        "total": ("total", "high"),
        "bio": ("bio", "high"),
        "batch": ("batch", "high"),
        "batch_unlabelled": ("batch*", "high"),
        "kmeans_nmi": ("NMI", "high"),
        "kmeans_ari": ("ARI", "high"),
        "clisi": ("cLISI", "high"),
        "ilisi": ("iLISI", "high"),
        "kbet": ("kBET", "high"),
        "graph_connectivity": ("connect", "high"),
        "pcr": ("PCR", "high"),
        "knn_accuracy_across": ("kNN", "high"),
    },
    "impute": {
        "mse_ratio": ("MSE", "low"),
        "poisson_ratio": ("Poisson", "low"),
        "pearson_cell": ("r cell", "high"),
        "pearson_gene": ("r gene", "high"),
        "spearman_gene": ("rho gene", "high"),
        "zero_fraction_error": ("zeros", "low"),
        "coverage_90": ("90 % int.", None),
        "truth_pearson_cell": ("truth", "high"),
        "truth_pearson_gene": ("truth gene", "high"),
    },
    "annotate": {
        "accuracy": ("accuracy", "high"),
        "macro_f1": ("F1", "high"),
        "balanced_accuracy": ("balanced", "high"),
        "accuracy_forced": ("forced", "high"),
        "macro_f1_forced": ("forced F1", "high"),
        # Neither way is better by itself: the first rises with every cell that is not answered, and
        # whoever never answers, or always does, has the others.
        "accuracy_called": ("if called", None),
        "unknown": ("unknown", None),
        "unknown_new": ("new unknown", None),
        "ece": ("ECE", "low"),
        "unknown_auroc": ("AUROC", "high"),
    },
}
# What the terminal leaves out first where 100 columns are too few; summary.csv has everything.
_LESS = {
    "integrate": ("connect", "ARI", "cLISI", "PCR", "±"),
    "impute": ("rho gene", "truth gene", "zeros", "±"),
    "annotate": ("balanced", "if called", "forced", "±"),
}
_WIDTH = 100
_SORT = {
    "integrate": ("total", "bio", "batch_unlabelled"),
    "impute": ("poisson_ratio",),
    "annotate": ("accuracy_forced",),
}
# The directions of a comparison differ among themselves, and each is known up to the chance of its
# cells: with a variance of at most 1/4 a cell and of about .07² between directions, the weights of
# a mean of such shares are n / (n + 50). A batch of one cell weighs 1/50 of one of many.
_SURE_CELLS = 50
BOTH = "all"  # what a row of all directions together says for its direction
EMBEDDINGS, REPORT, SO_FAR = "embeddings.npz", "report.html", "embeddings"
TABLES = tuple(
    f"{name}.csv"
    for name in ("scores", "summary", "skipped", "cell_types", "coverage", "contamination", "calls")
)
_MOST_DIRECTIONS = 4  # that the terminal shows one by one


@dataclass(repr=False)
class EvaluationResult:
    """The outcome of a comparison.

    Attributes
    ----------
    task
        "integrate", "impute" or "annotate".
    table
        Tidy: one row per ``method``, ``kind``, ``seed`` and ``metric``, with its ``value``; to
        annotate per ``direction`` too ("all" for time and memory).
    skipped
        Methods that did not run, or failed, with the reason.
    saw_labels
        Methods that learnt from the labels they are judged by.
    cell_types
        Integration with labels: biology and batch per cell type of every method (first seed).
        Annotation: cells, accuracy and share unknown per direction, method and cell type.
    calls
        Annotation: true label and that of every method (first seed) of each cell as a query.
    coverage
        Imputation: coverage of prediction intervals per method, level and group of genes.
    embeddings
        Integration: method -> array, first seed.
    obs
        ``obs`` of the cells compared.
    encoders
        Ours: method -> what turned counts into what is scored.
    contamination
        Models that were given: how many of these cells they had been trained on.
    undefined
        Metrics without a value on these cells, and why.
    own_metrics
        Those of the user, and which way is better.
    judged
        Annotation: cells of every direction that the means over directions count.
    software
        Method -> packages that computed it, with their versions, where they are not ours.
    settings
        How it was done.
    """

    task: str
    table: pd.DataFrame
    skipped: dict[str, str]
    saw_labels: list[str] = field(default_factory=list)
    cell_types: pd.DataFrame | None = None
    coverage: pd.DataFrame | None = None
    calls: pd.DataFrame | None = None
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    obs: pd.DataFrame = field(default_factory=pd.DataFrame)
    gene_statistics: dict[str, pd.DataFrame] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    contamination: "dict[str, Contamination]" = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    own_metrics: dict[str, Literal["high", "low"] | None] = field(default_factory=dict)
    judged: dict[str, int] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        methods = some(list(dict.fromkeys(self.table["method"])), 6)
        return f"EvaluationResult({self.task}: {methods}; skipped: {len(self.skipped)})"

    def summary(self) -> pd.DataFrame:
        """One row per method, best first: mean over seeds (and directions), and ``n_seeds``."""
        wide = self._means(["method"])
        wide["n_seeds"] = self.table.groupby("method")["seed"].nunique()
        by = self._sorted_by(wide)
        if by is not None:
            wide = wide.sort_values(by, ascending=self.task == "impute", kind="stable")
        wide.columns.name = None
        return wide

    def _sorted_by(self, summary: pd.DataFrame) -> str | None:
        return next((name for name in _SORT[self.task] if name in summary), None)

    def order_note(self) -> str:
        """Say by which column the methods are sorted; empty where none has a value."""
        by = self._sorted_by(self.summary())
        if by is None:
            return ""
        title, direction = COLUMNS[self.task][by]
        return f"Sorted by {title}, {'lowest' if direction == 'low' else 'highest'} first."

    def software_note(self) -> str:
        """Say which packages computed the methods that ran, with their versions."""
        ran = set(self.table["method"])
        said = [f"{name}: {packages}" for name, packages in self.software.items() if name in ran]
        return f"Software: {'; '.join(said)}." if said else ""

    def spread(self) -> pd.DataFrame:
        """Give the standard deviation over the seeds, shaped as `summary`; nan with one seed."""
        by_seed = self._means(["method", "seed"])
        return by_seed.groupby("method").std().reindex(self.summary().index)

    def _means(self, by: list[str]) -> pd.DataFrame:
        """Mean of every metric, each direction by how sure it is: n cells weigh n / (n + 50)."""
        known = self.table[self.table["value"].notna()]
        weight = pd.Series(1.0, known.index)
        if self.judged and "direction" in known:
            n = known["direction"].map(self.judged)
            weight = (n / (n + _SURE_CELLS)).fillna(1.0)
        of = {"index": by, "columns": "metric", "aggfunc": "sum", "sort": False}
        parts = known.assign(weight=weight, weighed=weight * known["value"])
        return cast(
            pd.DataFrame,
            parts.pivot_table(values="weighed", **cast(Any, of))
            / parts.pivot_table(values="weight", **cast(Any, of)),
        )

    def directions(self) -> "dict[str, EvaluationResult]":
        """Give the comparison of every direction alone; empty where there are none."""
        if "direction" not in self.table:
            return {}
        names = [str(name) for name in self.table["direction"].unique() if name != BOTH]
        return {
            name: replace(self, table=self.table[self.table["direction"].isin([name, BOTH])])
            for name in names
        }

    def columns(self) -> dict[str, tuple[str, Literal["high", "low"] | None]]:
        """Headings of the metrics and which way is better, the user's own behind the others."""
        return COLUMNS[self.task] | {name: (name, way) for name, way in self.own_metrics.items()}

    def headline(self) -> pd.DataFrame:
        """Choose the columns that a reader needs first, under short names."""
        summary = self.summary()
        names = {name: title for name, (title, _) in self.columns().items() if name in summary}
        names = {name: title for name, title in names.items() if summary[name].notna().any()}
        table = summary[list(names)].rename(columns=names)
        first = next(iter(names), None)
        spread = self.spread()
        if first is not None and first in spread and spread[first].notna().any():
            table.insert(1, "±", spread[first])
        table["s"] = summary["seconds"]
        table["MB"] = summary["peak_mb"]
        return table

    def text(self) -> str:
        """Lay the comparison out for a terminal of 100 columns."""
        table = self.headline()
        lines = _aligned(self.task, table)
        for column in _LESS[self.task]:
            if len(lines[0]) > _WIDTH and column in table:
                table = table.drop(columns=column)
                lines = _aligned(self.task, table)
        lines.insert(1, "─" * len(lines[0]))
        each = self.directions()
        if 1 < len(each) <= _MOST_DIRECTIONS:
            for name, one in each.items():
                own = one.headline()
                # A column that is empty in one direction is not in its table.
                shown = own[[name for name in table if name in own and name not in ("s", "MB")]]
                lines += ["", *_aligned(name, shown)]
            lines.append("")
        return "\n".join([*lines, *self._notes()])

    def controls(self) -> list[str]:
        """Methods that are there to lose."""
        return list(dict.fromkeys(self.table.loc[self.table["kind"] == "control", "method"]))

    def labels_note(self) -> str:
        """Say which methods were judged on labels they had seen; empty where none was."""
        if not self.saw_labels:
            return ""
        hidden = self.settings.get("hidden_labels", 0.0)
        share = "the" if hidden == 0 else f"{1 - hidden:.0%} of the"
        advice = " hidden_labels=0.5 hides half of them." if hidden == 0 else ""
        return (
            f"{', '.join(self.saw_labels)} learnt from {share} labels that bio is judged by: "
            f"compare them with each other, not with the rest.{advice}"
        )

    def encoder_notes(self) -> list[str]:
        """Say of our methods that ran what encoded the cells, those of one encoder together."""
        names: dict[str, list[str]] = {}
        ran = set(self.table["method"])
        for name, encoder in self.encoders.items():
            if name in ran:
                names.setdefault(encoder, []).append(name)
        return [f"{', '.join(those)}: by {encoder}." for encoder, those in names.items()]

    def contamination_notes(self) -> list[str]:
        """Say of every model that was given how many of these cells it had been trained on."""
        return [f"{name}: {found.text()}." for name, found in self.contamination.items()]

    def contamination_table(self) -> pd.DataFrame:
        """Give a row per model: cells it can read, those that it was trained on, their sources."""
        rows = [
            {
                "model": name,
                "cells": found.n_cells,
                "in_training": found.values()["in_training"],
                "sources": "; ".join(f"{n} in {source}" for source, n in found.by_source.items()),
                "complete": found.complete,
            }
            for name, found in self.contamination.items()
        ]
        return pd.DataFrame(rows)

    def _notes(self) -> list[str]:
        notes = [f"skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        notes += [self.order_note(), self.software_note()]
        notes += self.encoder_notes()
        notes += self.contamination_notes()
        has = set(self.table["metric"])
        if self.task == "integrate":
            known = self.table[self.table["value"].notna()]
            shown = set(known["metric"])
            if "batch_unlabelled" in has and "bio" in shown:
                notes.append(
                    f"{self.undefined.get('total', 'batch and total have no value')}: BRAS, kBET, "
                    "batch and total are not defined. batch* = mean of iLISI, PCR, kBET over all "
                    "cells; not comparable with batch, and high where types that differ are mixed."
                )
            elif "batch_unlabelled" in has:
                notes.append(
                    "no labels: biology cannot be scored. batch* = mean of iLISI, PCR, kBET over "
                    "all cells; not comparable with batch, and a random embedding is best at it."
                )
            elif "total" not in shown:
                notes.append("one batch: mixing cannot be scored; bio alone (scib-metrics).")
            else:
                notes.append(
                    "total = 0.6 bio + 0.4 batch (scib-metrics); kNN: cell types called from other "
                    "batches. Read bio and batch together: noise wins on batch alone."
                )
            notes.append(self.labels_note())
        elif self.task == "annotate":
            notes.append(
                "Mean over the directions (one of n cells weighs n / (n + 50)). accuracy, F1 "
                "(macro), balanced: cells whose label the reference has, unknown counted as "
                "wrong. forced: never unknown. if called: among the cells not called unknown. "
                "new unknown: share called unknown of the cells "
                "whose label the reference lacks. Baselines always answer. ECE: calibration error. "
                "AUROC: novelty, of each label left out of the reference in turn."
            )
        else:
            notes.append(
                "MSE and Poisson are ratios to no denoising: below 1 is better; r over all "
                "entries, zeros too; zeros: mean error of the share of zeros; 90 % int.: coverage "
                "of held-out counts."
            )
        # Those of one method; what no method could have is said above.
        failed = {what: why for what, why in self.undefined.items() if ": " in what}
        notes += [f"no value: {what}: {why}" for what, why in failed.items()]
        return [
            line
            for note in notes
            if note
            for line in textwrap.wrap(note, _WIDTH - 2, break_on_hyphens=False)
        ]

    def write(self, out: str | Path, *, umaps: bool = True) -> Path:
        """Write tables, embeddings and ``report.html`` into a folder and return the report's path.

        Parameters
        ----------
        out
            Folder; made where it does not exist. Files of an earlier comparison are replaced.
        umaps
            Draw UMAPs (some seconds for every method).
        """
        folder = Path(out)
        self.write_tables(folder)
        if self.embeddings:
            with _told(folder), whole(folder / EMBEDDINGS) as partial, partial.open("wb") as file:
                np.savez_compressed(file, allow_pickle=False, **cast(Any, self.embeddings))
        remove(folder / SO_FAR)
        return self.report(umaps=umaps).write(folder / REPORT)

    def write_tables(self, folder: Path) -> None:
        """Write the tables into a folder, each whole or not at all."""
        skipped = pd.DataFrame(
            {"method": list(self.skipped), "reason": list(self.skipped.values())}
        )
        tables = {"scores": self.table, "skipped": skipped}
        if self.cell_types is not None:
            tables["cell_types"] = self.cell_types
        if self.coverage is not None:
            tables["coverage"] = self.coverage
        if self.contamination:
            tables["contamination"] = self.contamination_table()
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in tables.items():
                with whole(folder / f"{name}.csv") as partial:
                    table.to_csv(partial, index=False)
            with whole(folder / "summary.csv") as partial:
                self.summary().to_csv(partial)
            if self.calls is not None:
                with whole(folder / "calls.csv") as partial:
                    self.calls.to_csv(partial, index_label="cell")

    def report(self, *, umaps: bool = True) -> "Report":
        """Lay the comparison out as one page; see `genemodel.reports.page`."""
        from genemodel.reports.comparison_page import report_of

        return report_of(self, umaps=umaps)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"the comparison cannot be written to {folder}: {error.strerror}"
        ) from error


def clear(folder: Path) -> None:
    """Remove what an earlier comparison has written, so that none of it stands beside the new."""
    for name in (*TABLES, EMBEDDINGS, REPORT, SO_FAR):
        remove(folder / name)


def write_embedding(folder: Path, name: str, embedding_CD: np.ndarray) -> None:
    """Have the embedding of a method on disk until all are in one file."""
    # Names of models may hold slashes.
    with _told(folder), whole(folder / SO_FAR / f"{quote(name, safe=' ')}.npy") as partial:
        with partial.open("wb") as file:
            np.save(file, embedding_CD, allow_pickle=False)


def _aligned(corner: str, table: pd.DataFrame) -> list[str]:
    """Lay a table of numbers out in columns, all lines equally long."""
    heads = [corner, *map(str, table.columns)]
    rows = [
        [str(name), *(_cell_text(title, value) for title, value in row.items())]
        for name, row in table.iterrows()
    ]
    widths = [max(len(row[i]) for row in [heads, *rows]) for i in range(len(heads))]
    return [
        "  ".join(
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [heads, *rows]
    ]


def _cell_text(title: object, value: object) -> str:
    number = float(cast(Any, value))
    if np.isnan(number):
        return "-"
    if title == "s":
        return f"{number:.1f}" if number < 100 else f"{number:,.0f}"
    if title == "MB":
        return f"{number:,.0f}"
    return f"{number:.3f}"
