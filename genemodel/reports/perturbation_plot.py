"""The figure of an in-silico perturbation, from its table."""

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots import _GREY, _OURS, _THEIRS, _clean, _new


def perturbation_panels(table: pd.DataFrame, *, most: int = 20) -> "np.ndarray":
    """Draw shifts against their evidence, and the strongest beside those of matched genes.

    Parameters
    ----------
    table
        Statistics of a perturbation.
    most
        Genes of the right panel, by evidence and then by size.
    """
    shift = "Shift_to_goal_end" if "Shift_to_goal_end" in table else "Test_avg_shift"
    what = "shift towards the goal" if shift == "Shift_to_goal_end" else "cosine before and after"
    table = table[np.isfinite(table[shift])]
    if not len(table):
        raise DataError("No gene has a shift; nothing can be drawn.")
    tested = np.isfinite(table["Matched_pval"]).to_numpy()
    p_value = table["Matched_pval"].to_numpy(float).clip(1e-300)
    supported = table["Supported"].to_numpy(bool)
    by_evidence = np.lexsort((-table["Excess_shift"].abs(), np.where(tested, p_value, 2.0)))
    shown = table.iloc[by_evidence[:most]].sort_values(shift)
    figure, axes = _new(1, 2, width=5.2, height=max(3.4, 1.2 + 0.19 * len(shown)))
    left, right = axes[0]
    if tested.any():
        x, y = table[shift].to_numpy(float), -np.log10(p_value)
        for chosen, colour, label in (
            (tested & ~supported, _GREY, "not supported"),
            (tested & supported, _OURS, "supported"),
        ):
            left.scatter(
                x[chosen], y[chosen], s=14, color=colour, lw=0, rasterized=True,
                label=f"{label} ({int(chosen.sum()):,})",
            )  # fmt: skip
        named = [at for at in by_evidence[:5] if tested[at]]
        for at in named:
            left.annotate(
                str(table["Gene_name"].iloc[at]), (x[at], y[at]), xytext=(4, 2),
                textcoords="offset points", fontsize=7,
            )  # fmt: skip
        left.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2
        )
        left.margins(x=0.12)
    else:
        left.text(0.5, 0.5, "no matched genes (nulls)", ha="center", transform=left.transAxes)
    left.set_xlabel(f"{what}, mean of cells")
    left.set_ylabel("−log₁₀ p against matched genes")
    place = np.arange(len(shown))
    null = shown["Matched_null_shift"].to_numpy(float)
    right.hlines(place, null, shown[shift], color="#CCCCCC", lw=1.5, zorder=1)
    right.plot(null, place, ls="", marker="|", ms=9, color="#666666", label="matched genes")
    held = "Position_preserving_shift"
    if held in shown:
        right.plot(shown[held], place, ls="", marker="o", ms=4, mfc="none", color=_THEIRS,
                   label="others held in place")  # fmt: skip
    right.plot(shown[shift], place, ls="", marker="o", ms=4, color=_OURS, label="perturbed")
    low, high = right.get_xlim()
    if low < 0 < high:
        right.axvline(0, color="#888888", lw=1, ls="--", zorder=0)
    right.set_yticks(place, list(shown["Gene_name"].astype(str)), fontsize=7)
    right.tick_params(axis="y", length=0)
    right.set_ylim(-0.7, len(shown) - 0.3)
    right.set_xlabel(what)
    right.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    for ax in axes[0]:
        ax.ticklabel_format(axis="x", style="sci", scilimits=(-3, 3), useOffset=False)
        _clean(ax)
    figure.suptitle(
        f"{len(table):,} perturbations, the {len(shown)} with most evidence", fontsize=9
    )
    return axes[0]
