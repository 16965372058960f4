"""The report of a fine-tuning: did the backbone gain on held-out cells, did the heads settle."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from genemodel.reports import plots
from genemodel.reports.page import Report

_POINTS = 150


def write_finetune_report(
    path: Path,
    *,
    curves: pd.DataFrame,
    backbone: tuple[pd.DataFrame, pd.DataFrame] | None = None,
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
    facts
        What else is to be said of the heads, by name.
    settings
        Quoted at the end.
    """
    report = Report("genemodel: fine-tuning", ", ".join(dict.fromkeys(curves["task"])))
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
    if facts:
        table = pd.DataFrame({"": list(facts.values())}, index=list(facts))
        report.section("What is known of the result").table(table)
        report.text(
            "Training losses say that a head has settled, not that its answer is good: genemodel "
            "evaluate scores it beside published methods on the same cells."
        )
    if settings:
        report.settings(settings)
    return report.write(path)


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
