"""Figures of genes: what they are worth to an answer, and where their vectors lie."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.reports.plots import _OURS, _THEIRS, _clean, _new, embedding_panels, umap_of

# Genes from which on a layout of neighbours says something; fewer are drawn in two components.
LEAST_FOR_UMAP = 30


def attribution_bars(table: pd.DataFrame, *, labels: Sequence[str] | None, most: int) -> np.ndarray:
    """Draw the strongest genes of every label as bars, for and against it.

    Parameters
    ----------
    table
        Of ``genemodel.attribute``.
    labels
        Those that are drawn; default all, at most 12.
    most
        Genes of each.
    """
    for column in ("symbol", "attribution"):
        if column not in table:
            raise DataError(
                f"The table has no column {column!r}: give what genemodel.attribute returned."
            )
    parts: dict[str, pd.DataFrame] = {"": table}
    if isinstance(table.index, pd.MultiIndex):
        known = list(dict.fromkeys(table.index.get_level_values(0)))
        wanted = known[:12] if labels is None else list(labels)
        missing = [label for label in wanted if label not in known]
        if missing:
            raise DataError(f"The table has no label {missing[0]!r}; it has {', '.join(known)}.")
        parts = {label: table.loc[label] for label in wanted}
    rows = min(len(parts), 4)
    _, grid = _new(
        -(-len(parts) // 4), rows, width=2.7, height=0.8 + 0.19 * most, panels=len(parts)
    )
    axes = grid.ravel()
    for unused in axes[len(parts) :]:
        unused.set_visible(False)
    for (label, part), here in zip(parts.items(), axes, strict=False):
        strength = part["attribution"].abs().sort_values(ascending=False, kind="stable")
        shown = part.loc[strength.index[:most]].iloc[::-1]
        value = shown["attribution"].to_numpy(float)
        place = np.arange(len(shown))
        here.barh(place, value, color=np.where(value >= 0, _OURS, _THEIRS), height=0.75)
        here.axvline(0, color="#888888", lw=0.8)
        here.set_yticks(place, list(shown["symbol"].astype(str)), fontsize=7)
        here.tick_params(axis="y", length=0)
        here.set_ylim(-0.7, len(shown) - 0.3)
        here.set_xlabel("mean attribution")
        here.set_title(str(label), fontsize=9)
        _clean(here)
    drawn: np.ndarray = axes[: len(parts)]
    return drawn


def gene_map(
    table: pd.DataFrame,
    color: Mapping[str, object] | pd.Series | pd.DataFrame | str | None,
    *,
    seed: int,
    most: int,
) -> np.ndarray:
    """Lay the vectors of genes out in the plane, a panel for each colouring.

    Parameters
    ----------
    table
        Of ``genemodel.gene_vectors``.
    color
        Labels of genes by id or symbol, or a column of the table; default the cells that hold them.
    seed, most
        Of the layout; genes laid out at most, those of most cells, labelled ones before others.
    """
    vector = table.filter(regex=r"^v\d+$")
    if vector.shape[1] < 2:
        raise DataError(
            "The table has no vectors (columns v0, v1 …): give what genemodel.gene_vectors gave."
        )
    if isinstance(table.index, pd.MultiIndex):
        raise DataError(
            "The table has vectors for every label of cells: take those of one, table.loc[LABEL]."
        )
    obs = _colours(table, color)
    if not obs.notna().any(axis=None):
        raise DataError("color names no gene of the table: give Ensembl ids or symbols.")
    order = np.argsort(~obs.notna().any(axis=1).to_numpy(), kind="stable")
    if "n_cells" in table:
        order = np.lexsort((-table["n_cells"].to_numpy(), ~obs.notna().any(axis=1).to_numpy()))
    kept = np.sort(order[:most])
    vector_GD = vector.to_numpy(np.float32)[kept]
    if len(kept) < LEAST_FOR_UMAP:
        centred_GD = vector_GD - vector_GD.mean(0)
        left, size, _ = np.linalg.svd(centred_GD, full_matrices=False)
        layout = (left[:, :2] * size[:2], np.arange(len(kept)))
        title = "gene vectors, two components"
    else:
        length_G1 = np.linalg.norm(vector_GD, axis=1, keepdims=True)
        layout = umap_of(vector_GD / np.maximum(length_G1, 1e-12), seed=seed, most=most)
        title = "gene vectors, UMAP of directions"
    axes = embedding_panels(layout, obs.iloc[kept], list(obs.columns), title=title)
    for name, ax in zip(obs.columns, axes, strict=False):
        ax.set_ylabel("")
        ax.set_title(f"{name}, {len(layout[1]):,} genes", fontsize=9)
    axes[0].figure.suptitle(title, fontsize=9)
    return axes


def _colours(
    table: pd.DataFrame, color: Mapping[str, object] | pd.Series | pd.DataFrame | str | None
) -> pd.DataFrame:
    if color is None:
        color = "n_cells" if "n_cells" in table else "seen"
    if isinstance(color, str):
        if color not in table:
            raise DataError(
                f"The table has no column {color!r}; it has symbol, n_cells or seen. Labels of "
                "genes are given as a mapping from gene to label."
            )
        if color == "n_cells":
            return pd.DataFrame({"log10 n_cells": np.log10(table["n_cells"].clip(lower=1))})
        return table[[color]].astype(str)
    if isinstance(color, pd.DataFrame):
        return pd.concat([_colours(table, color[name]) for name in color], axis=1)
    name = str(getattr(color, "name", None) or "label")
    known = {str(gene): value for gene, value in dict(color).items()}
    found = [
        known.get(str(gene), known.get(str(symbol)))
        for gene, symbol in zip(table.index, table["symbol"], strict=True)
    ]
    # Numbers become numbers again, and are drawn on a scale.
    return pd.DataFrame({name: pd.Series(found, index=table.index, dtype=object).infer_objects()})
