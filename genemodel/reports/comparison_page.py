"""The page of a comparison: the table and the figure that matter, then what stands behind them."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd

from genemodel.reports import plots
from genemodel.reports.page import Report, versions

if TYPE_CHECKING:
    from genemodel.reports.comparison import EvaluationResult


def report_of(result: "EvaluationResult", *, umaps: bool = True) -> Report:
    """Lay a comparison out as one page."""
    if result.task == "integrate":
        report = _integration_report(result, umaps)
    elif result.task == "annotate":
        report = _annotation_report(result)
    else:
        report = _imputation_report(result)
    return report.settings(result.settings)


def _opening(
    result: "EvaluationResult", title: str, explanation: str, bars: list[str], caption: str
) -> Report:
    """Title, the table and the figure that matter, and what did not run."""
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
        f"Mean over the seeds. {result.order_note()} ± is their standard deviation for the first "
        "column. Marked: the best of its column, controls aside. "
        "s = wall seconds, MB = peak of memory above where the method started (a lower bound).",
        best=best,
        never_best=result.controls(),
    )
    for note in (
        *result.encoder_notes(), *result.contamination_notes(), result.software_note()
    ):  # fmt: skip
        report.text(note)
    report.packages(versions(("scanpy", "scib-metrics")))
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


def _integration_report(result: "EvaluationResult", umaps: bool) -> Report:
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
            "bio and batch together. Random coordinates mix batches perfectly and know no biology"
            + (
                ": the row 'random' shows how much of a total that alone gives."
                if "random" in result.summary().index
                else "."
            )
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


def _umaps(result: "EvaluationResult", across: int = 4) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Panels of a few methods at a time; every figure starts with the state before."""
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
    costs = summary[["seconds", "peak_mb"]].rename(columns={"peak_mb": "peak MB"})
    report.section("Time and memory").figure(
        plots.metric_bars(costs),
        "Wall seconds and peak memory above the start, of the method alone; scoring is not in it. "
        "One after the other in one process, so the peak is a lower bound.",
    )


def _annotation_report(result: "EvaluationResult") -> Report:
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
        title: way for title, way in result.columns().values() if way is not None
    }
    for name, one in result.directions().items():
        table = one.headline().drop(columns=["s", "MB"])
        report.section(name).table(
            table,
            one.order_note(),
            best={key: way for key, way in best.items() if key in table},
            never_best=result.controls(),
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


def _imputation_report(result: "EvaluationResult") -> Report:
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


def _count_section(report: Report, result: "EvaluationResult", order: list[str]) -> None:
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
