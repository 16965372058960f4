"""Figures from plain arrays: what a reader wants to see before believing a number.

Every function draws into given Axes or makes its own figure, says how many cells or genes it shows,
and returns the Axes. Legends stand outside, points are small and rasterised, colours stay apart for
colour-blind readers, and panels that are to be compared share their limits.

matplotlib and umap are imported where they are used: importing this module costs nothing.
"""

from genemodel.reports.plots.cells import _fuzzy_graph as _fuzzy_graph
from genemodel.reports.plots.cells import embedding_grid, embedding_panel, embedding_panels, umap_of
from genemodel.reports.plots.corpus import source_panels
from genemodel.reports.plots.counts import calibration, mean_variance, zero_fraction
from genemodel.reports.plots.drawing import _GREY as _GREY
from genemodel.reports.plots.drawing import _OURS as _OURS
from genemodel.reports.plots.drawing import _THEIRS as _THEIRS
from genemodel.reports.plots.drawing import _axes as _axes
from genemodel.reports.plots.drawing import _clean as _clean
from genemodel.reports.plots.drawing import _lab as _lab
from genemodel.reports.plots.drawing import _new as _new
from genemodel.reports.plots.drawing import category_colours, into, palette
from genemodel.reports.plots.scores import confusion, interval_rows, metric_bars
from genemodel.reports.plots.training import curve_names, loss_curves, throughput_curves

__all__ = [
    "calibration",
    "category_colours",
    "confusion",
    "curve_names",
    "embedding_grid",
    "embedding_panel",
    "embedding_panels",
    "interval_rows",
    "into",
    "loss_curves",
    "mean_variance",
    "metric_bars",
    "palette",
    "source_panels",
    "throughput_curves",
    "umap_of",
    "zero_fraction",
]
