"""What came of it: networks as tables of edges, their scores, and files.

Axes: S sources (transcription factors), T targets.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genemodel.settings import some
from genemodel.writing import whole_directory

# Methods whose sign says activation or repression: their strength is the size.
SIGNED = ("jacobian", "pearson", "partial")
SCORES, SUMMARY = "scores.tsv", "network.json"


@dataclass(repr=False)
class NetworkResult:
    """Networks of one set of genes.

    Attributes
    ----------
    edges
        Method -> its edges, the strongest first: source, target, weight.
    scores
        One row a method and truth, rows that know nothing of regulation among them; None without a
        truth.
    summary
        Plain values: cells, genes, model, which methods were left out and why.
    """

    edges: dict[str, pd.DataFrame]
    scores: pd.DataFrame | None
    summary: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.describe()

    def describe(self) -> str:
        """Say in a table and a few lines what came of it."""
        summary = self.summary
        lines = [
            f"{summary['cells']:,} cells of {summary['species']}, {summary['tfs']:,} transcription "
            f"factors, {summary['targets']:,} targets."
        ]
        lines += [f"Left out: {why}." for why in summary["left_out"].values()]
        if self.scores is None:
            n = [f"{name} {len(table):,}" for name, table in self.edges.items()]
            return "\n".join([*lines, f"Edges: {some(n)}."])
        for name, table in self.scores.groupby("truth", sort=False):
            first = table.iloc[0]
            lines.append(
                f"\n{first['edges']:,} edges of {first['tfs']:,} factors to {first['targets']:,} "
                f"genes (truth: {name}); {first['density']:.3f} of the pairs."
            )
            lines.append(shown(table).to_string(index=False))
            lines.append(_verdict(table))
        return "\n".join(lines)


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """Give scores as they are printed: estimate, and its interval over factors."""
    columns: dict[str, Any] = {"method": table["method"]}
    for name, title in (
        ("auprc_ratio", "AUPRC ratio"), ("epr", "EPR"), ("matched_auroc", "matched AUROC"),
        ("over_expression", "over expression"),
    ):  # fmt: skip
        if name in table:
            columns[title] = [
                _with_interval(*values)
                for values in table[[name, f"{name}_low", f"{name}_high"]].to_numpy(float)
            ]
    columns["said"] = [f"{value:.0%}" for value in table["said"]]
    if "stability" in table:
        columns["stability"] = [_number(value) for value in table["stability"]]
    return pd.DataFrame(columns)


def _number(value: float) -> str:
    return "–" if not np.isfinite(value) else f"{value:.2f}"


def _with_interval(value: float, low: float, high: float) -> str:
    if not np.isfinite(low):
        return _number(value)
    return f"{value:.2f} ({low:.2f}–{high:.2f})"


def _verdict(table: pd.DataFrame) -> str:
    """Say who is above what knows nothing, interval and all."""

    def named(above: pd.Series) -> str:
        return some(table.loc[above, "method"].tolist())

    return (
        "Above, by the interval over factors: mean expression, in AUPRC: "
        f"{named(table['over_expression_low'] > 0)}; chance, among matched pairs: "
        f"{named(table['matched_auroc_low'] > 0.5)}."
    )


def edge_table(
    weight_ST: np.ndarray, strength_ST: np.ndarray, names: tuple[list[str], list[str]], most: int
) -> pd.DataFrame:
    """Edges of a network, the strongest first.

    Parameters
    ----------
    weight_ST
        What is written; pairs with NaN are no edges.
    strength_ST
        What decides the order.
    names
        Of sources and targets.
    most
        How many; 0 for all.
    """
    s, t = np.nonzero(np.isfinite(weight_ST))
    order = np.argsort(-strength_ST[s, t], kind="stable")
    order = order[:most] if most else order
    s, t = s[order], t[order]
    source, target = (np.asarray(side, dtype=object) for side in names)
    return pd.DataFrame(
        {"source": source[s], "target": target[t], "weight": weight_ST[s, t].astype(np.float64)}
    )


def for_uns(result: NetworkResult) -> dict[str, Any]:
    """Give what an h5ad keeps in ``uns``."""
    kept: dict[str, Any] = {"edges": {name: table.copy() for name, table in result.edges.items()}}
    if result.scores is not None:
        kept["scores"] = result.scores.copy()
    return kept | {"summary": result.summary}


def is_ours(out: Path) -> bool:
    """Whether a folder holds an earlier result, or nothing."""
    return (out / SUMMARY).is_file() or (out.is_dir() and not any(out.iterdir()))


def write_result(result: NetworkResult, out: Path) -> None:
    """Write tables and a summary as a folder, whole or not at all."""
    with whole_directory(out) as folder:
        for name, table in result.edges.items():
            table.to_csv(folder / f"{name}.tsv", sep="\t", index=False)
        about: dict[str, Any] = {"summary": result.summary}
        if result.scores is not None:
            result.scores.to_csv(folder / SCORES, sep="\t", index=False)
            about["scores"] = _plain(result.scores)
        text = json.dumps(about, indent=1, sort_keys=True, allow_nan=False)
        (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
        (folder / "summary.txt").write_text(result.describe() + "\n", encoding="utf-8")


def _plain(table: pd.DataFrame) -> list[Mapping[str, Any]]:
    """Rows as JSON has them: null where there is no number."""
    rows: list[Mapping[str, Any]] = []
    for row in table.to_dict(orient="records"):
        rows.append({
            str(key): None if isinstance(value, float) and not np.isfinite(value) else value
            for key, value in row.items()
        })  # fmt: skip
    return rows
