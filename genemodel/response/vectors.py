"""What is known of a perturbation's target: vectors from cells, from a model, from knowledge.

Axes: C cells, G genes, P perturbations, F features.
"""

import gzip
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.errors import DataError
from genemodel.expression.components import singular_vectors
from genemodel.expression.normalise import log_normalised
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.settings import some

CO_EXPRESSION, MODEL = "co-expression", "model"
COMPONENTS = 20
# Columns of var that may name genes, beside the index.
_NAMES = ("gene_symbol", "gene_symbols", "gene_name", "gene_names", "symbol", "feature_name")


def columns_of(genes: pd.DataFrame, names: Sequence[str]) -> list[int]:
    """Find the column of each gene by any name that ``var`` has for it; −1 where there is none."""
    place: dict[str, int] = {}
    for column in (None, *_NAMES):
        if column is not None and column not in genes:
            continue
        values = genes.index if column is None else genes[column]
        for at, value in enumerate(values.astype(str)):
            place.setdefault(value.upper(), at)
    return [place.get(name.upper(), -1) for name in names]


def symbols_of(genes: pd.DataFrame) -> list[str]:
    """Give the names that a reader knows genes by."""
    column = next((name for name in _NAMES if name in genes), None)
    values = genes.index if column is None else genes[column]
    return [str(value) for value in values]


def co_expression(control_CG: sp.csr_matrix, column_M: np.ndarray, seed: int) -> np.ndarray:
    """Components of genes in control cells, of these columns; NaN rows for −1, (M, F)."""
    logged_CG = log_normalised(control_CG)
    mean_G = np.asarray(logged_CG.mean(0)).ravel()
    square_G = np.asarray(logged_CG.multiply(logged_CG).mean(0)).ravel()
    deviation_G = np.sqrt(np.maximum(square_G - mean_G**2, 0.0))
    scale_G = np.divide(1.0, deviation_G, out=np.zeros_like(mean_G), where=deviation_G > 1e-6)
    scaled_CG = logged_CG @ sp.diags(scale_G.astype(np.float32))
    n = min(COMPONENTS + 1, min(scaled_CG.shape) - 1)
    _, size_F, right_FG = singular_vectors(scaled_CG, n, passes=4, seed=seed)
    # The first is how much of everything a cell has.
    table_GF = (right_FG[1:] * size_F[1:, None]).T.astype(np.float64)
    return np.where(column_M[:, None] >= 0, table_GF[np.maximum(column_M, 0)], np.nan)


def of_model(bundle: Bundle, names: Sequence[str], species: str) -> np.ndarray:
    """Give the vectors that a model has of genes, knowledge included; NaN where unknown, (M, F)."""
    import torch

    token_M = tokens_of(bundle.vocabulary, names, species)
    with torch.no_grad():
        every = torch.arange(len(bundle.vocabulary), device=bundle.device)
        table_VF = bundle.model.embedding.genes(every).float().cpu().numpy().astype(np.float64)
    return np.where(token_M[:, None] >= 0, table_VF[np.maximum(token_M, 0)], np.nan)


def tokens_of(vocabulary: GeneVocabulary, names: Sequence[str], species: str) -> np.ndarray:
    """Tokens of genes by symbol, id or alias; −1 where unknown."""
    rows = vocabulary.species_rows(species)
    place: dict[str, int] = {}
    for key in ("ensembl_id", "symbol"):
        for name, token in zip(rows[key], rows["token"], strict=True):
            place.setdefault(str(name).upper(), int(token))
    return np.array([place.get(name.upper(), -1) for name in names])


def of_sets(path: Path, names: Sequence[str]) -> np.ndarray:
    """Membership of genes in named sets of a GMT file, rare ones weighing more, (M, F)."""
    place = {name.upper(): m for m, name in enumerate(names)}
    columns: list[np.ndarray] = []
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        for number, line in enumerate(file, start=1):
            fields = line.rstrip("\n").split("\t")
            if len(fields) < 3:
                raise DataError(
                    f"{path}, line {number}: {len(fields)} fields. Every line of a GMT file is a "
                    "set's name, a note and its genes, separated by tabs."
                )
            held = [place[gene.upper()] for gene in fields[2:] if gene.upper() in place]
            if len(held) >= 2:  # a set of one tells nothing of the others
                column = np.zeros(len(names))
                column[held] = np.log((len(names) + 1) / len(held))
                columns.append(column)
    if not columns:
        raise DataError(
            f"{path} has no set that holds two of the perturbed genes ({some(list(names))}): name "
            "a file of sets of the same species, with symbols."
        )
    table_MF = np.stack(columns, 1)
    return np.where(table_MF.any(1, keepdims=True), table_MF, np.nan)


def of_table(path: Path, names: Sequence[str]) -> np.ndarray:
    """Rows of a tab-separated table: a gene's name, then numbers; NaN where it has none, (M, F)."""
    place = {name.upper(): m for m, name in enumerate(names)}
    found: dict[int, list[float]] = {}
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else path.open()
    with opened as file:
        for number, line in enumerate(file, start=1):
            gene, *values = line.rstrip("\n").split("\t")
            if gene.upper() not in place:
                continue
            try:
                found[place[gene.upper()]] = [float(value) for value in values]
            except ValueError as error:
                raise DataError(
                    f"{path}, line {number}: {error}. Every row is a gene and numbers, separated "
                    "by tabs."
                ) from error
    if len(found) < 2 or len({len(row) for row in found.values()}) > 1:
        raise DataError(
            f"{path} has vectors of one length for {len(found)} of the perturbed genes "
            f"({some(list(names))}): it needs those of two or more."
        )
    table_MF = np.full((len(names), len(next(iter(found.values())))), np.nan)
    for m, row in found.items():
        table_MF[m] = row
    return table_MF


def of_perturbations(
    tables: Mapping[str, np.ndarray], members: Sequence[tuple[int, ...]]
) -> dict[str, np.ndarray]:
    """Vectors of perturbations from those of single genes: of a combination the mean."""
    return {
        source: np.stack([table_MF[list(of)].mean(0) for of in members])
        for source, table_MF in tables.items()
        if np.isfinite(table_MF).all(1).sum() >= 2
    }
