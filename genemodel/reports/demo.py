"""The report of the demo: does it learn, and what is its embedding worth on held-out cells."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from genemodel.errors import DataError
from genemodel.inference.collapse import effective_rank, mean_cosine
from genemodel.metrics import light as light_metrics
from genemodel.reports import plots
from genemodel.reports.page import Report

__all__ = ["DemoReport", "embedding_scores", "objective_table", "write_demo_report"]

# What each objective's loss is, and what predicts the same quantity without a model.
_OBJECTIVES = {
    "masked_gene": ("nats per hidden gene", "gene frequencies of the species"),
    "masked_value": ("squared error per hidden value", "mean value of the gene in the species"),
    "decode_counts": (
        "nats per expressed gene",
        "pseudobulk of the species at the cell's library size",
    ),
}
_MODEL, _RANDOM, _PCA = "genemodel", "random weights", "PCA"


@dataclass(frozen=True)
class DemoReport:
    """What the report says, as tables.

    Attributes
    ----------
    path
        The page.
    objectives
        Held-out loss of every objective beside its trivial predictor.
    scores
        Scores of every embedding of the held-out cells.
    """

    path: Path
    objectives: pd.DataFrame
    scores: pd.DataFrame

    def to_string(self) -> str:
        """Return both tables as text for a terminal."""
        parts = []
        if not self.objectives.empty:
            table = self.objectives[["held_out", "trivial", "ratio"]].round(4)
            parts.append("Held-out loss against the best trivial predictor\n" + table.to_string())
        if not self.scores.empty:
            table = self.scores.round(3)
            parts.append("Embeddings of held-out cells\n" + table.to_string(na_rep="-"))
        return "\n\n".join(parts)


def objective_table(validation: pd.DataFrame) -> pd.DataFrame:
    """Return the last validation as a table of objectives.

    Parameters
    ----------
    validation
        One row per validation: ``step``, ``val/NAME``, ``val_trivial/NAME``.

    Returns
    -------
    DataFrame
        Rows: objectives. ``held_out`` and ``trivial`` loss, ``ratio`` (below 1: it learns),
        ``unit``, ``trivial_predictor``.
    """
    if validation.empty:
        raise DataError("The validation table has no rows; the run stopped before it validated.")
    last = validation.iloc[-1]
    rows = {}
    for name in plots.curve_names(validation):
        trivial = float(last.get(f"val_trivial/{name}", np.nan))
        held_out = float(last[f"val/{name}"])
        unit, predictor = _OBJECTIVES.get(name, ("", ""))
        rows[name] = {
            "held_out": held_out,
            "trivial": trivial,
            "ratio": held_out / trivial if trivial else float("nan"),
            "unit": unit,
            "trivial_predictor": predictor,
        }
    columns = ["held_out", "trivial", "ratio", "unit", "trivial_predictor"]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns)


def embedding_scores(
    embeddings: Mapping[str, np.ndarray], obs: pd.DataFrame, *, k: int = 15
) -> pd.DataFrame:
    """Score embeddings of the same cells by what ``obs`` allows.

    Cells of different species are never each other's batch: the batch scores are computed within a
    species and averaged by cells. Where species share cell types, the label transfer between
    species is scored too.

    Returns
    -------
    DataFrame
        One row per embedding. With cell types: ``knn_accuracy``, ``silhouette``,
        ``accuracy_across_batches``, ``accuracy_across_species``; with batches: ``same_batch_ratio``
        (1 is perfect mixing); always ``effective_rank`` and ``mean_cosine``.
    """
    rows = {}
    labelled = _usable(obs, "cell_type")
    batched = _usable(obs, "batch")
    two_species = _usable(obs, "species")
    for name, values_CD in embeddings.items():
        row: dict[str, float] = {}
        if labelled:
            label = obs["cell_type"]
            row["knn_accuracy"] = light_metrics.knn_accuracy(values_CD, label, k=k)
            row["silhouette"] = light_metrics.silhouette(values_CD, label)
        if batched:
            species = obs["species"].astype(str).to_numpy() if "species" in obs else np.array([""])
            parts = [(species == s) for s in np.unique(species)] if two_species else [slice(None)]
            mixing, across, cells = [], [], []
            for part in parts:
                batch = obs["batch"][part].astype(str)
                if batch.nunique() < 2:
                    continue
                label = obs["cell_type"][part] if labelled else None
                mixing.append(_ratio(values_CD[part], batch, label, k))
                if label is not None:
                    across.append(
                        light_metrics.knn_accuracy(values_CD[part], label, batch=batch, k=k)
                    )
                cells.append(len(batch))
            if across:
                row["accuracy_across_batches"] = _weighted(across, cells)
            if mixing:
                row["same_batch_ratio"] = _weighted(mixing, cells)
        if labelled and two_species:
            row["accuracy_across_species"] = light_metrics.knn_accuracy(
                values_CD, obs["cell_type"], batch=obs["species"].astype(str), k=k
            )
        row["effective_rank"] = effective_rank(values_CD)
        row["mean_cosine"] = mean_cosine(values_CD)
        rows[name] = row
    order = [
        "knn_accuracy", "silhouette", "accuracy_across_batches", "accuracy_across_species",
        "same_batch_ratio", "effective_rank", "mean_cosine",
    ]  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index")
    return table[[column for column in order if column in table]]


def _usable(obs: pd.DataFrame, column: str) -> bool:
    return column in obs and obs[column].dropna().astype(str).nunique() > 1


def _ratio(values_CD: np.ndarray, batch: pd.Series, label: pd.Series | None, k: int) -> float:
    return float(
        light_metrics.same_batch_share(values_CD, batch, label, k=k)["ratio"].to_numpy()[-1]
    )


def _weighted(values: Sequence[float], weights: Sequence[int]) -> float:
    known = np.isfinite(values)
    if not known.any():
        return float("nan")
    return float(np.average(np.asarray(values)[known], weights=np.asarray(weights)[known]))


def write_demo_report(
    path: str | os.PathLike[str],
    *,
    curves: pd.DataFrame,
    validation: pd.DataFrame,
    embeddings: Mapping[str, np.ndarray],
    obs: pd.DataFrame,
    corpus_text: str = "",
    settings: Mapping[str, Any] | None = None,
    held_out_by: str = "",
    seed: int = 0,
    title: str = "genemodel: from raw counts to an embedding",
) -> DemoReport:
    """Write the report of a demo run.

    Parameters
    ----------
    path
        The HTML file.
    curves
        Training log: ``step``, ``train/NAME``, ``lr``, ``tokens_per_s`` ...
    validation
        Validation log: ``step``, ``val/NAME``, ``val_trivial/NAME``.
    embeddings
        Name to (C, D) array; the first is ours, further ones are baselines of the same cells.
    obs
        The cells' annotation; of cell_type, batch and species what is there is used.
    corpus_text
        Description of the corpus as text.
    settings
        Settings of the run, quoted in the report.
    held_out_by
        Column whose groups were held out; empty if none were.
    seed
        Of the layouts.
    title
        Heading of the page.

    Returns
    -------
    DemoReport
        The tables of the report.

    Raises
    ------
    DataError
        If embeddings and obs are not of the same cells, or a table is empty.
    """
    if not embeddings:
        raise DataError("The demo report needs at least one embedding; none was given.")
    for name, values_CD in embeddings.items():
        if len(values_CD) != len(obs):
            raise DataError(
                f"The embedding {name!r} has {len(values_CD):,} cells and obs has {len(obs):,}; "
                "pass the same cells."
            )
    objectives = objective_table(validation)
    scores = embedding_scores(embeddings, obs)
    held = f"held-out cells (by {held_out_by})" if held_out_by else "cells the model was trained on"
    report = Report(
        title,
        f"{len(obs):,} {held}, {int(curves['step'].max()):,} training steps",
    )
    _learning(report, curves, validation, objectives)
    _embeddings(report, embeddings, obs, scores, held, seed)
    if corpus_text:
        report.section("The corpus").preformatted(corpus_text)
    if settings:
        report.settings(settings)
    return DemoReport(report.write(path), objectives, scores)


def _learning(
    report: Report, curves: pd.DataFrame, validation: pd.DataFrame, objectives: pd.DataFrame
) -> None:
    report.section("Does it learn?")
    won = objectives.index[objectives["ratio"] < 1].str.replace("_", " ")
    report.text(
        f"{len(won)} of {len(objectives)} objectives beat the best trivial predictor of the same "
        f"quantity{': ' + ', '.join(won) if len(won) else ''}. A ratio below 1 means that the "
        "model knows more than averages."
    )
    report.table(
        objectives.rename(index=lambda name: str(name).replace("_", " ")),
        "Loss on held-out cells at the last validation, and of the trivial predictor there",
    )
    joined = pd.concat([curves, validation], ignore_index=True)
    trivial = {str(name): float(value) for name, value in objectives["trivial"].dropna().items()}
    report.figure(
        plots.loss_curves(joined, trivial),
        "Training loss, loss on held-out cells, and the trivial predictor (dashed). The first "
        "2 % of the steps may lie outside the frame.",
    )
    if any(name in curves for name in ("lr", "tokens_per_s", "cells_per_s")):
        report.figure(
            plots.throughput_curves(curves),
            "Learning rate, gradient norm, speed and waiting by step.",
        )


def _embeddings(
    report: Report,
    embeddings: Mapping[str, np.ndarray],
    obs: pd.DataFrame,
    scores: pd.DataFrame,
    held: str,
    seed: int,
) -> None:
    report.section("What is the embedding worth?")
    report.text(
        f"The same {len(obs):,} {held}, embedded by the model, by a model of the same shape with "
        "random weights, and by PCA of log-normalised counts. PCA has seen these very cells; the "
        "model has not. A short demo run is no contest: the table is here to be honest, whatever "
        "it says."
        if held.startswith("held-out") and _PCA in embeddings and _RANDOM in embeddings
        else f"Embeddings of {len(obs):,} {held}."
    )
    directions = {
        "knn_accuracy": "high",
        "silhouette": "high",
        "accuracy_across_batches": "high",
        "accuracy_across_species": "high",
        "same_batch_ratio": "low",
    }
    report.table(
        scores,
        "kNN accuracy: share of cells whose 15 nearest neighbours mostly have their cell type "
        "(across batches or species: only neighbours from another one vote). Silhouette: of cell "
        "types, −1 to 1. Same-batch ratio: neighbours from the own batch within a cell type over "
        "what chance gives; 1 is perfect mixing. Best values are marked.",
        best={column: d for column, d in directions.items() if column in scores},  # type: ignore[misc]
    )
    columns = [column for column in ("cell_type", "batch", "species") if _usable(obs, column)]
    if not columns:
        report.text(
            "The cells carry neither cell types nor batches, so there is nothing to colour."
        )
        return
    layouts = {name: plots.umap_of(values_CD, seed=seed) for name, values_CD in embeddings.items()}
    report.figure(
        plots.embedding_grid(layouts, obs, columns),
        "UMAP of every embedding, coloured by "
        + ", ".join(c.replace("_", " ") for c in columns)
        + ". Same cells, same settings, same seed; distances between far clusters mean little.",
    )
    if _usable(obs, "cell_type") and _usable(obs, "batch"):
        _by_type(report, embeddings, obs)


def _by_type(report: Report, embeddings: Mapping[str, np.ndarray], obs: pd.DataFrame) -> None:
    first = next(iter(embeddings))
    tables = []
    species = obs["species"].astype(str).to_numpy() if "species" in obs else np.full(len(obs), "")
    for name in np.unique(species):
        part = species == name
        if obs["batch"][part].nunique() < 2 or obs["cell_type"][part].nunique() < 2:
            continue
        before_CD = embeddings[_PCA][part] if _PCA in embeddings else None
        table = light_metrics.biology_and_batch(
            embeddings[first][part], obs["batch"][part], obs["cell_type"][part], before_CD=before_CD
        )
        tables.append((table.drop(columns="n_batches"), f"{name or 'all'}: {part.sum():,} cells"))
    if not tables:
        # One batch of every species is held out: there is nothing to be mixed with.
        return
    report.section("Biology and batch, cell type by cell type").text(
        f"{first}: biology kept (kNN accuracy to connectivity) and batch removed (same-batch "
        "ratio, iLISI, batch silhouette) side by side, because either is easy without the other. "
        "The last column names the type into which a type of one batch vanished."
    )
    for table, caption in tables:
        report.table(table, caption)
