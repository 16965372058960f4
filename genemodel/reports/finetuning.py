"""The report of a fine-tuning: what came of it, then whether the backbone gained and heads settled.

Axes: C cells, D width of an embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genemodel.metrics import light as light_metrics
from genemodel.reports import plots
from genemodel.reports.page import Report

_POINTS = 150
SHOWN = 3_000
"""Cells that are laid out and scored at most."""


@dataclass(frozen=True)
class Integrated:
    """Cells before and after.

    Attributes
    ----------
    before_CD, after_CD
        Principal components of their log-normalised counts; their embedding.
    obs
        One row a cell.
    batch_keys, label_key
        Columns of ``obs``: what was to go, and what was to stay; empty without labels.
    """

    before_CD: np.ndarray
    after_CD: np.ndarray
    obs: pd.DataFrame
    batch_keys: Sequence[str]
    label_key: str = ""


def write_finetune_report(
    path: Path,
    *,
    curves: pd.DataFrame,
    backbone: tuple[pd.DataFrame, pd.DataFrame] | None = None,
    integrated: Integrated | None = None,
    labels: pd.DataFrame | None = None,
    coverage: pd.DataFrame | None = None,
    facts: Mapping[str, str] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """Write the page.

    Parameters
    ----------
    path
        The HTML file.
    curves
        Losses of the heads: ``task``, ``step``, ``loss``, ``value``.
    backbone
        ``metrics.csv`` and ``validation.csv`` of the adaptation of the backbone; None without one.
    integrated
        Cells that were integrated.
    labels
        How held-out cells of every label were called: a row a label.
    coverage
        Of the intervals of imputed counts: a row per slice of predicted means.
    facts
        What else is to be said of the heads, by name.
    settings
        Quoted at the end.
    """
    report = Report("genemodel: fine-tuning", ", ".join(dict.fromkeys(curves["task"])))
    if integrated is not None:
        _integrated(report, integrated)
    if labels is not None:
        report.section("Labels of cells held out").table(
            labels,
            "Cells of groups that were not trained on. called right: share of a label's cells that "
            "get it; right when called: share of the cells that get it that have it.",
        )
    if coverage is not None:
        report.section("Imputed counts").table(
            coverage,
            "Share of counts set aside that lie in the 90 % interval, by the mean predicted for "
            "them: 0.9 is exact.",
        )
    if facts:
        table = pd.DataFrame({"": list(facts.values())}, index=list(facts))
        report.section("What is known of the result").table(table)
        report.text(
            "Training losses say that a head has settled, not that its answer is good: genemodel "
            "evaluate scores it beside published methods on the same cells."
        )
    if backbone is not None:
        _backbone(report, *backbone)
    for task, part in curves.groupby("task", sort=False):
        report.section(f"The head: {task}")
        wide = part.pivot(index="step", columns="loss", values="value")
        # Single steps are too noisy to be read.
        every = max(1, len(wide) // _POINTS)
        wide = wide.groupby((pd.RangeIndex(len(wide)) // every) * every + every).mean()
        if every == 1:
            wide.index = sorted(part["step"].unique())
        wide = wide.rename(columns="train/{}".format).rename_axis("step").reset_index()
        held = "nats_per_molecule" in set(part["loss"])
        report.figure(
            plots.loss_curves(wide.rename(columns=lambda name: _held_out(str(name)))),
            "Loss on molecules set aside, by pass." if held else "Training loss, by step.",
        )
    if settings:
        report.settings(settings)
    return report.write(path)


def _integrated(report: Report, found: Integrated) -> None:
    """UMAPs of the same cells before and after, and what of biology and batch is in either."""
    columns = [*found.batch_keys, *([found.label_key] if found.label_key else [])]
    before, after = "before (PCA)", "after"
    layouts = {before: plots.umap_of(found.before_CD), after: plots.umap_of(found.after_CD)}
    report.section("Before and after").figure(
        plots.embedding_grid(layouts, found.obs, columns),
        f"UMAP of the same {len(found.obs):,} cells: principal components of log-normalised "
        "counts, and the embedding. Colours of a batch should mix, those of a label stay apart.",
    )
    batch = found.obs[list(found.batch_keys)].astype(str).agg(" · ".join, axis=1)
    if batch.nunique() < 2:
        report.text("There is one batch, so that mixing cannot be scored.")
        return
    arrays = {before: found.before_CD, after: found.after_CD}
    if not found.label_key or found.obs[found.label_key].nunique() < 2:
        ratio = {
            name: float(light_metrics.same_batch_share(array_CD, batch)["ratio"].iloc[-1])
            for name, array_CD in arrays.items()
        }
        report.table(
            pd.DataFrame({"same-batch ratio": ratio}),
            "Neighbours from a cell's own batch over what chance gives: 1 is mixed. Without labels "
            "nobody can say whether cell types were mixed with the batches: name them, label_key=.",
        )
        return
    kept_C = found.obs[found.label_key].notna().to_numpy()
    label, batch = found.obs.loc[kept_C, found.label_key].astype(str), batch[kept_C]
    scored = {
        name: light_metrics.biology_and_batch(
            array_CD[kept_C], batch, label, before_CD=found.before_CD[kept_C]
        )
        for name, array_CD in arrays.items()
    }
    table = pd.DataFrame({"cells": scored[after]["n"]})
    for metric, words in (("knn_accuracy", "type kept"), ("same_batch_ratio", "batch left")):
        for name, scores in scored.items():
            table[f"{words}, {name}"] = scores[metric]
    table["now inside"] = scored[after]["lost_into"]
    report.table(
        table.rename_axis(found.label_key),
        "type kept: share of a type's cells that their 15 nearest cells call right, 1 is best. "
        "batch left: neighbours from a cell's own batch, within its type, over what chance gives, "
        "1 is mixed. now inside: the type that one has vanished into which was apart before.",
    )


def _held_out(name: str) -> str:
    return "val/nats_per_molecule" if name == "train/nats_per_molecule" else name


def _backbone(report: Report, metrics: pd.DataFrame, validation: pd.DataFrame) -> None:
    """Loss on held-out cells before and after, with the trivial predictor, and the curves."""
    report.section("The backbone on these cells")
    used = validation.loc[validation["val/total"].idxmin()]
    first = validation.iloc[0]
    rows = {
        name.replace("_", " "): {
            "trivial": float(used[f"val_trivial/{name}"]),
            **({"before": float(first[f"val/{name}"])} if first["step"] == 0 else {}),
            "after": float(used[f"val/{name}"]),
        }
        for name in plots.curve_names(validation)
    }
    if used["step"] == 0:
        report.text("Nothing was gained on held-out cells: the backbone is used as it was.")
    report.table(
        pd.DataFrame(rows).T,
        f"Loss on held-out cells; used are the weights of step {int(used['step']):,}",
    )
    trivial = {name: float(used[f"val_trivial/{name}"]) for name in plots.curve_names(validation)}
    report.figure(
        plots.loss_curves(pd.concat([metrics, validation], ignore_index=True), trivial),
        "Training loss, loss on held-out cells, and the trivial predictor (dashed).",
    )
