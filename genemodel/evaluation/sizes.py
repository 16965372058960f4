"""``genemodel evaluate sizes=[100, 400]``: the same comparison on draws of so many cells.

What a method makes of few cells is seldom what it makes of many: a model that was trained elsewhere
should help most where there is least to learn from.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from genemodel.cells.input_settings import NAMES, InputSettings
from genemodel.errors import ConfigError, DataError
from genemodel.evaluation.evaluate import EvaluateSettings, evaluate, read_cells
from genemodel.evaluation.methods import MIN_CELLS
from genemodel.reports.comparison import COLUMNS
from genemodel.settings import check_out_folder, renamed
from genemodel.writing import whole

if TYPE_CHECKING:
    from anndata import AnnData

    from genemodel.embedding.contamination import Contamination

logger = logging.getLogger(__name__)

# What a table of sizes shows of a task; sizes.csv has every metric.
SHOWN = {
    "integrate": ("knn_accuracy", "bio", "batch", "total"),
    "impute": ("poisson_ratio", "mse_ratio", "coverage_90"),
    "annotate": ("accuracy_forced", "macro_f1", "unknown"),
}


@dataclass(repr=False)
class SizesResult:
    """Scores by number of cells.

    Attributes
    ----------
    task
        As in :func:`~genemodel.evaluation.evaluate.evaluate`.
    table
        Tidy: one row per ``size``, ``draw``, ``method`` and ``metric``, with its ``value``.
    skipped
        Methods that did not run on some draw: (size, draw, method) to the reason.
    encoders
        Ours: method to what turned counts into what is scored.
    contamination
        Models that were given: how many cells of every draw they had been trained on.
    """

    task: str
    table: pd.DataFrame
    skipped: dict[tuple[int, int, str], str] = field(default_factory=dict)
    encoders: dict[str, str] = field(default_factory=dict)
    contamination: "dict[str, list[Contamination]]" = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size:,}" for size in sorted(set(self.table["size"])))
        return f"SizesResult({self.task}: {sizes} cells, {self.table['draw'].nunique()} draws)"

    def summary(self, metric: str) -> pd.DataFrame:
        """Mean over the draws of a metric: one row per method, one column per size."""
        rows = self.table[self.table["metric"] == metric]
        return rows.pivot_table("value", "method", "size", aggfunc="mean", sort=False)

    def text(self) -> str:
        """Give a table per metric, and what is to be known beside them."""
        parts = []
        for metric in SHOWN[self.task]:
            table = self.summary(metric)
            if table.empty:
                continue
            heading = COLUMNS[self.task].get(metric, (metric, None))[0]
            shown = table.rename(columns=lambda size: f"{size:,} cells").round(3)
            shown.columns.name = None
            parts.append(f"{heading} ({metric})\n{shown.rename_axis(None).to_string()}")
        draws = self.table["draw"].nunique()
        parts.append(f"Means of {draws} draw{'s' if draws > 1 else ''} of each size.")
        parts += [f"{name}: {encoder}" for name, encoder in self.encoders.items()]
        for name, draws_of in self.contamination.items():
            counts = [one.n_found for one in draws_of if one.n_found is not None]
            said = draws_of[0].text()
            if counts:
                n_cells = sum(one.n_cells for one in draws_of)
                said = f"{sum(counts):,} of {n_cells:,} cells, of all draws, were in its training"
            parts.append(f"{name}: {said}.")
        parts += [
            f"{size:,} cells, draw {draw}: {method} {reason}"
            for (size, draw, method), reason in self.skipped.items()
        ]
        return "\n\n".join(parts)


@renamed(data="adata")
def evaluate_sizes(
    adata: "AnnData | str | Path",
    *,
    sizes: Sequence[int],
    draws: int = 3,
    out: str | Path | None = None,
    **options: Any,
) -> SizesResult:
    """Score methods on random draws of several numbers of cells.

    Parameters
    ----------
    adata
        As in :func:`~genemodel.evaluation.evaluate.evaluate`.
    sizes
        Numbers of cells.
    draws
        Draws of each; the number of the draw is the seed of every method on it.
    out
        Folder: ``sizes.csv``, and the report of every draw in ``SIZE/DRAW``.
    **options
        The other settings of ``evaluate``.

    Raises
    ------
    ConfigError
        A size that is too small or larger than the data, no draws, or ``seeds`` and ``max_cells``,
        which the draws take the place of.
    """
    wanted = sorted(set(sizes))
    if not wanted or wanted[0] < MIN_CELLS or draws < 1:
        raise ConfigError(
            f"sizes={list(sizes)}, draws={draws}: numbers of cells from {MIN_CELLS} up, and at "
            "least one draw of each"
        )
    for name, empty in (("seeds", (0,)), ("max_cells", None)):
        given = options.pop(name, empty)
        if given is not None and (empty is None or tuple(given) != empty):
            raise ConfigError(
                f"{name}={given} and sizes={wanted}: draws=N says how often, and sizes how many "
                f"cells. Leave {name} out"
            )
    folder = None if out is None else Path(out)
    if folder is not None:
        check_out_folder(folder)
    how = {name: options.pop(name) for name in NAMES if name in options}
    adata, where, reading = read_cells(adata, InputSettings.given(how))
    options |= reading.options()
    if wanted[-1] > adata.n_obs:
        raise ConfigError(f"sizes={wanted}: {where} has {adata.n_obs:,} cells")
    task = str(options.get("task", "integrate"))
    tables: list[pd.DataFrame] = []
    skipped: dict[tuple[int, int, str], str] = {}
    encoders: dict[str, str] = {}
    contamination: dict[str, list[Contamination]] = {}
    for size in wanted:
        for draw in range(draws):
            rows = np.random.default_rng((size, draw)).choice(adata.n_obs, size, replace=False)
            logger.info("%s cells, draw %d of %d", f"{size:,}", draw + 1, draws)
            part = None if folder is None else folder / str(size) / str(draw)
            try:
                result = evaluate(adata[np.sort(rows)].copy(), seeds=(draw,), out=part, **options)
            except DataError as error:
                # A draw may lack a second batch, and the next one have it.
                skipped[size, draw, "all methods"] = str(error)
                logger.warning("%s cells, draw %d: %s", f"{size:,}", draw, error)
                continue
            tables.append(result.table.assign(size=size, draw=draw))
            skipped |= {(size, draw, name): why for name, why in result.skipped.items()}
            encoders |= result.encoders
            for name, found in result.contamination.items():
                contamination.setdefault(name, []).append(found)
            if folder is not None:
                # Written after every draw: what has been scored is not lost with what follows.
                with whole(folder / "sizes.csv") as partial:
                    pd.concat(tables).to_csv(partial, index=False)
    if not tables:
        raise DataError(f"{where}: nothing could be scored on any draw: {skipped}")
    table = pd.concat(tables, ignore_index=True)
    return SizesResult(task, table, skipped, encoders, contamination)


def run(settings: EvaluateSettings) -> str:
    """Run ``genemodel evaluate`` and return the table to print."""
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    data, out = values.pop("input"), values.pop("out")
    sizes, draws = values.pop("sizes"), values.pop("draws")
    if sizes:
        by_size = evaluate_sizes(data, sizes=sizes, draws=draws, out=out, **values)
        return f"{by_size.text()}\n\nWritten to {out}: sizes.csv, and a report of every draw"
    result = evaluate(data, out=out, **values)
    return f"{result.text()}\n\nWritten to {out}: report.html, scores.csv and more"
