"""The figure of predicted and measured responses, from their tables."""

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots import _GREY, _OURS, _clean, _new

# Panels across.
_ACROSS = 3
# Genes with the largest measured effect that are named, where there is room.
_NAMED = 5


def response_panels(
    predicted: pd.DataFrame, measured: pd.DataFrame, tests: pd.DataFrame, *, most: int = 6
) -> "np.ndarray":
    """Draw the predicted over the measured effect of every gene, for what responds most.

    Parameters
    ----------
    predicted, measured
        Effects, rows as in a result of ``genemodel.respond``.
    tests
        Whether each is told from controls.
    most
        Panels, the largest measured effects first.
    """
    if not len(measured):
        raise DataError("Nothing was held out; no effect can be drawn.")
    sure = {
        (row["perturbation"], row["context"], str(row.get("dose", ""))): bool(row["supported"])
        for _, row in tests.iterrows()
    }  # fmt: skip
    size = np.square(measured.to_numpy(float)).sum(1)
    shown = np.argsort(-size, kind="stable")[:most]
    rows = -(-len(shown) // _ACROSS)
    figure, axes = _new(rows, min(_ACROSS, len(shown)), width=3.3, height=3.1)
    for ax, at in zip(axes.ravel(), shown, strict=False):
        _, perturbation, context, dose = measured.index[at]
        x, y = measured.iloc[at].to_numpy(float), predicted.iloc[at].to_numpy(float)
        told = sure.get((perturbation, context, "" if np.isnan(dose) else f"{dose:g}"), False)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        ax.plot([low, high], [low, high], color="#888888", lw=1, ls="--", zorder=0)
        ax.scatter(x, y, s=7, color=_OURS if told else _GREY, lw=0, rasterized=True)
        symbols = measured.attrs.get("symbols", list(measured.columns))
        named: list[int] = []
        for gene in np.argsort(-np.abs(x), kind="stable")[:_NAMED]:
            near = [abs(y[gene] - y[other]) + abs(x[gene] - x[other]) for other in named]
            if near and min(near) < 0.12 * (high - low):  # names would lie on each other
                continue
            named.append(int(gene))
            ax.annotate(
                str(symbols[gene]), (x[gene], y[gene]), xytext=(-3, 2), ha="right",
                textcoords="offset points", fontsize=6,
            )  # fmt: skip
        title = f"{perturbation} in {context}" + ("" if np.isnan(dose) else f", {dose:g}")
        note = "" if told else "\nnot told from controls"
        r = np.corrcoef(x, y)[0, 1] if x.std() > 0 and y.std() > 0 else np.nan
        ax.set_title(title + (f" (r {r:.2f})" if np.isfinite(r) else "") + note, fontsize=8)
        ax.set_xlabel("measured effect", fontsize=8)
        ax.set_ylabel("predicted effect", fontsize=8)
        _clean(ax)
    for ax in axes.ravel()[len(shown) :]:
        ax.set_visible(False)
    return axes.ravel()[: len(shown)]
