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
from genemodel.reports.page import Report
from genemodel.settings import some
from genemodel.writing import remove, whole

if TYPE_CHECKING:
    from genemodel.embedding.contamination import Contamination

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
        "accuracy_called": ("if called", "high"),
        "unknown": ("unknown", "low"),
        "unknown_new": ("new unknown", "high"),
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
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        methods = some(list(dict.fromkeys(self.table["method"])), 6)
        return f"EvaluationResult({self.task}: {methods}; skipped: {len(self.skipped)})"

    def summary(self) -> pd.DataFrame:
        """One row per method, best first: mean over seeds (and directions), and ``n_seeds``."""
        wide = self._means(["method"])
        wide["n_seeds"] = self.table.groupby("method")["seed"].nunique()
        by = next((name for name in _SORT[self.task] if name in wide), None)
        if by is not None:
            wide = wide.sort_values(by, ascending=self.task == "impute", kind="stable")
        wide.columns.name = None
        return wide

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

    def report(self, *, umaps: bool = True) -> Report:
        """Lay the comparison out as one page; see `genemodel.reports.page`."""
        if self.task == "integrate":
            return _integration_report(self, umaps).settings(self.settings)
        if self.task == "annotate":
            return _annotation_report(self).settings(self.settings)
        return _imputation_report(self).settings(self.settings)


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


def _opening(
    result: EvaluationResult, title: str, explanation: str, bars: list[str], caption: str
) -> Report:
    """Title, the table and the figure that matter, and what did not run."""
    from genemodel.reports import plots

    settings = result.settings
    size = f"{settings.get('cells', 0):,} cells × {settings.get('genes', 0):,} genes"
    report = Report(title, f"{settings.get('data', '')} · {size}")
    table = result.headline()
    titles = dict(result.columns().values())
    best: dict[str, Literal["high", "low"]] = {
        name: direction
        for name in table.columns
        if (direction := titles.get(str(name))) is not None
    }
    report.section("Scores").text(explanation)
    report.table(
        table,
        "Mean over the seeds, best first; ± is their standard deviation for the first column. "
        "s = wall seconds, MB = peak of memory above where the method started (a lower bound).",
        best=best,
    )
    for note in (*result.encoder_notes(), *result.contamination_notes()):
        report.text(note)
    ours = list(dict.fromkeys(result.table.loc[result.table["kind"] == "ours", "method"]))
    report.figure(plots.metric_bars(result.summary()[bars], highlight=ours), caption)
    if result.skipped:
        report.section("Not in the table").table(
            pd.DataFrame(
                {"reason": list(result.skipped.values())},
                index=pd.Index(list(result.skipped), name="method"),
            )
        )
    return report


def _integration_report(result: EvaluationResult, umaps: bool) -> Report:
    there = set(result.headline().columns)
    labelled = "bio" in there
    words = (
        "bio: are cell types kept apart (isolated labels, k-means NMI and ARI, silhouette, cLISI). "
        if labelled
        else "There are no labels, so only the mixing of batches can be scored, and a random "
        "embedding is best at it. "
    )
    if "total" in there:
        words += (
            "batch: are batches mixed within them (BRAS, iLISI, kBET, graph connectivity, PCR). "
            "total = 0.6 bio + 0.4 batch, all by scib-metrics; each is 1 at best. kNN: share of "
            "cells whose type is called right by their 15 nearest cells of other batches.\n\nRead "
            "bio and batch together. Random coordinates mix batches perfectly and know no biology: "
            "the row 'random' shows how much of a total that alone gives."
        )
    elif "batch*" in there:
        words += "batch* = mean of iLISI, PCR and kBET over all cells."
        if labelled:
            words += (
                f" Here {result.undefined.get('total', 'labels and batches do not cross')}: what "
                "is taken of a batch may be a type, so batch, total, BRAS and kBET by label are "
                "not defined, and batch* is high where types that differ are mixed."
            )
    else:
        words += "There is one batch, so that mixing cannot be scored."
    bars = ["bio", "batch", "total"] if "total" in there else ["bio", "batch_unlabelled"]
    bars = bars if labelled else ["batch_unlabelled", "ilisi", "pcr"]
    report = _opening(
        result,
        "Integration",
        words,
        [name for name in bars if name in result.summary()],
        "Higher is better.",
    )
    if result.labels_note():
        report.text(result.labels_note())
    summary = result.summary()
    if umaps:
        report.section("UMAPs").text(
            "The same cells in every panel. 'none' is before integration. Colours: batch above, "
            "cell type below. A good method mixes the colours above and separates those below."
            if labelled
            else "The same cells in every panel, coloured by batch. 'none' is before integration."
        )
        for axes, names in _umaps(result):
            report.figure(axes, f"UMAP of {', '.join(names)}.")
    if result.cell_types is not None:
        _cell_type_section(report, result.cell_types, list(summary.index))
    report.section("All metrics").table(summary, "Mean over the seeds; scroll to the right.")
    _time_section(report, summary)
    return report


def _umaps(result: EvaluationResult, across: int = 4) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Panels of a few methods at a time; every figure starts with the state before."""
    from genemodel.reports import plots

    keys = [result.settings.get("batch_key"), result.settings.get("label_key")]
    columns = [key for key in keys if key is not None]
    order = [name for name in result.summary().index if name in result.embeddings]
    layouts = {name: plots.umap_of(result.embeddings[name], most=3000) for name in order}
    others = [name for name in order if name != "none"]
    for start in range(0, max(len(others), 1), across - 1):
        names = ["none", *others[start : start + across - 1]]
        shown = {name: layouts[name] for name in names}
        yield plots.embedding_grid(shown, result.obs, columns), names


def _cell_type_section(report: Report, cell_types: pd.DataFrame, order: list[str]) -> None:
    table = cell_types[cell_types["cell_type"] != "all"]
    columns = {
        "knn_accuracy": "Share of cells of a type that their 15 nearest cells call right: biology.",
        "same_batch_ratio": "Neighbours from the cell's own batch, within the type, ÷ chance: 1 is "
        "mixed, above 1 the batch still shows.",
    }
    report.section("Cell types")
    for name, caption in columns.items():
        wide = table.pivot_table(index="cell_type", columns="method", values=name, sort=False)
        report.table(wide[[method for method in order if method in wide]], caption)
    lost = table[table["lost_into"] != ""]
    if len(lost):
        report.text(
            "Over-correction: types that were apart before and sit inside another type after."
        )
        shown = lost[["method", "cell_type", "lost_into", "n"]]
        report.table(shown, "A lost type.", index=False)
    else:
        report.text("No method pulled a cell type into another one that it was apart from before.")


def _time_section(report: Report, summary: pd.DataFrame) -> None:
    from genemodel.reports import plots

    costs = summary[["seconds", "peak_mb"]].rename(columns={"peak_mb": "peak MB"})
    report.section("Time and memory").figure(
        plots.metric_bars(costs),
        "Wall seconds and peak memory above the start, of the method alone; scoring is not in it. "
        "One after the other in one process, so the peak is a lower bound.",
    )


def _annotation_report(result: EvaluationResult) -> Report:
    from genemodel.reports import plots

    report = _opening(
        result,
        "Annotation",
        "Labels of one side given to the cells of the other, by genes that all batches measured. "
        "accuracy, F1 (macro) and balanced (mean over the labels): cells whose label the reference "
        "has, unknown counted as wrong. forced: the same, had every cell to be named. if called: "
        "accuracy among the cells not called unknown. unknown: their share; new unknown: their "
        "share among the cells whose label the reference lacks, where 1 is right. ECE: how far the "
        "confidence is from how often it is right. AUROC: how well novelty (baselines: 1 - "
        "confidence) tells cells of a label left out of the reference, each in turn. The baselines "
        "always answer. Means over the directions.",
        ["accuracy", "macro_f1", "accuracy_forced", "macro_f1_forced"],
        "Mean over the directions; higher is better.",
    )
    calls, types = cast(pd.DataFrame, result.calls), cast(pd.DataFrame, result.cell_types)
    kinds = result.table.drop_duplicates("method").set_index("method")["kind"]
    best: dict[str, Literal["high", "low"]] = {
        title: way for title, way in COLUMNS["annotate"].values() if way is not None
    }
    for name, one in result.directions().items():
        table = one.headline().drop(columns=["s", "MB"])
        report.section(name).table(
            table, "Best first.", best={key: way for key, way in best.items() if key in table}
        )
        here = calls[calls["direction"] == name]
        for method in [method for method in table.index if kinds[method] == "ours"]:
            report.figure(
                plots.confusion(here["true"], here[method]),
                f"{method}: what the cells of each label were called. Labels that the reference "
                "lacks have no column of their own; 'unknown' is right for them.",
            )
        of = types[types["direction"] == name]
        of = of.assign(
            cell_type=of["cell_type"].where(of["accuracy"].notna(), of["cell_type"] + " (new)"),
            right=of["accuracy"].fillna(of["unknown"]),
        )
        wide = of.pivot_table(
            index=["cell_type", "n"], columns="method", values="right", sort=False
        ).reset_index("n")
        report.table(
            wide[["n", *[method for method in table.index if method in wide]]],
            "Share of each cell type that is called right; for one that the reference lacks (new), "
            "unknown is right. n cells.",
        )
    summary = result.summary()
    report.section("All metrics").table(summary, "Mean over the directions and seeds.")
    _time_section(report, summary)
    return report


def _imputation_report(result: EvaluationResult) -> Report:
    keep = result.settings.get("keep", float("nan"))
    truth = "truth_pearson_cell" in set(result.table["metric"])
    report = _opening(
        result,
        "Imputation",
        "Molecular cross-validation: every molecule went at random to the methods (with "
        f"probability {keep:g}) or was set aside. MSE (log scale, depth taken away) and Poisson "
        "(loss on counts) are judged on the molecules set aside, as ratios to no denoising: below "
        "1 is better than doing nothing. r and rho: Pearson and Spearman correlation over all "
        "entries, zeros included. zeros: mean error of the share of zeros of a gene. 90 % int.: "
        "share of the counts set aside that lie in the 90 % interval, randomised so that 0.9 is "
        "exact; methods without an uncertainty of their own are taken for Poisson."
        + (
            " truth: correlation with the profile expected from the known mixture." if truth else ""
        ),
        ["mse_ratio", "poisson_ratio", "pearson_cell", "pearson_gene"]
        + (["truth_pearson_cell"] if truth else []),
        "Ratios: lower is better. Correlations: higher is better.",
    )
    summary = result.summary()
    if result.coverage is not None:
        _coverage_section(report, result.coverage, list(summary.index))
    _count_section(report, result, list(summary.index))
    report.section("All metrics").table(summary, "Mean over the seeds; scroll to the right.")
    _time_section(report, summary)
    return report


def _coverage_section(report: Report, coverage: pd.DataFrame, order: list[str]) -> None:
    from genemodel.reports import plots

    whole = coverage[coverage["entries"] == "all"]
    levels = sorted(whole["level"].unique())
    curves = {
        name: [
            float(whole[(whole["method"] == name) & (whole["level"] == level)]["coverage"].iloc[0])
            for level in levels
        ]
        for name in order
    }
    at = coverage[(coverage["level"] == 0.9) & (coverage["entries"] != "all")]
    wide = at.pivot_table(index="entries", columns="method", values="coverage", sort=False)
    report.section("Intervals").figure(
        plots.calibration(levels, curves), "Observed against nominal coverage of held-out counts."
    )
    report.table(
        wide[[name for name in order if name in wide]],
        "Coverage of the 90 % interval per expression decile (1 lowest, 10 highest) and for the "
        "entries with a count.",
    )


def _count_section(report: Report, result: EvaluationResult, order: list[str]) -> None:
    from genemodel.reports import plots

    statistics = dict(result.gene_statistics)
    observed = statistics.pop("held-out counts", None)
    if observed is None:
        return
    best = [name for name in order if name in statistics and name != "none"][:2]
    curves = {"held-out counts": (observed["mean"].to_numpy(), observed["variance"].to_numpy())}
    curves |= {
        name: (statistics[name]["mean"].to_numpy(), statistics[name]["variance"].to_numpy())
        for name in best
    }
    report.section("Would drawn counts look like the data?").figure(
        plots.mean_variance(curves),
        "Mean and variance of each gene at the held-out depth: the counts set aside, and Poisson "
        "draws from the denoised rates.",
    )
    for name in best:
        report.figure(
            plots.zero_fraction(observed["zeros"].to_numpy(), statistics[name]["zeros"].to_numpy()),
            f"Share of zeros of each gene, {name}.",
        )
