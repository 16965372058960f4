"""Vectors of genes: of their tokens alone, or of their hidden states in cells, averaged exactly.

Axes: C cells, G genes of the data, V vocabulary, R genes of the table, L labels of cells, D width.
"""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, get_args

import numpy as np
import pandas as pd
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import bundle_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import ConfigError
from genemodel.gene_tasks.passes import TokenSums, run, with_context
from genemodel.genes.vocabulary import N_SPECIAL
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.obs_keys import check_key_added, label_codes
from genemodel.perturbation.genes import GeneNames

if TYPE_CHECKING:
    from anndata import AnnData

type Kind = Literal["static", "contextual"]
KEY = "gene_vectors"


@reads_cells
def gene_vectors(
    adata: "AnnData | str | Path | None",
    model: Bundle | str | Path,
    *,
    kind: Kind = "static",
    genes: Sequence[str] | None = None,
    label_key: str | None = None,
    spread: bool = False,
    min_cells: int = 1,
    blocks: int | None = None,
    context: int = 0,
    key_added: str = KEY,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    **options: Unpack[InputOptions],
) -> pd.DataFrame:
    """Give the vectors that a model has of genes.

    Parameters
    ----------
    adata
        AnnData, whose ``varm`` is written, or the path of anything that can be embedded. None with
        ``kind="static"``: all genes of the model.
    model
        From :func:`genemodel.load` or the path of its folder; imported models as well.
    kind
        ``"static"``: of the token alone, before any cell. ``"contextual"``: the hidden state of the
        gene in a cell, averaged over all cells that hold it.
    genes
        Symbols or ids of those that are wanted; default all that the data measure.
    label_key
        obs column: contextual vectors for every label of it, too.
    spread
        Also the standard deviation over cells of every number (columns ``sd0`` …).
    min_cells
        Leave out genes that fewer cells hold.
    blocks
        How many blocks of the model a hidden state has been through; default as many as the vector
        of a cell (for imported models all but the last, as is usual with them).
    context
        Most tokens of a cell; 0 for the model's own number. More reaches genes of low expression,
        and only models that read no ranks can.
    key_added
        Key in ``varm`` and ``uns`` of an AnnData; with ``label_key`` it gets the vectors over all
        cells.
    batch_size
        Most cells at once, for small devices; cannot change the result.
    device
        Default: where the model is.
    **options
        How the cells are read.

    Returns
    -------
    DataFrame
        One row a gene, index ``gene`` (Ensembl id), or ``(label, gene)`` with ``label_key``.
        Columns: ``symbol``, ``n_cells`` (contextual) or ``seen`` (static: whether the model was
        trained on cells that hold the gene), then ``v0`` … of the vector.

    Raises
    ------
    ConfigError
        Settings contradict each other.
    DataError
        A gene or a column is unknown.

    Notes
    -----
    Sums are kept in float64, one table for all cells, so a vector depends on neither the number of
    cells at once nor their order beyond how a device rounds a single cell's hidden state.
    """
    reading = InputSettings.given(options)
    check_key_added(key_added, "varm")
    bundle = bundle_for("give vectors of genes", model, device)
    found = table_of(
        adata, bundle, reading, kind=kind, genes=genes, label_key=label_key, spread=spread,
        min_cells=min_cells, blocks=blocks, context=context, batch_size=batch_size,
    )  # fmt: skip
    if found.cells is not None and not isinstance(adata, str | Path):
        told = {
            "genemodel": genemodel.__version__, "model": bundle.fingerprint, "kind": kind,
            "genes": len(found.whole), "cells": len(found.cells), "label_key": label_key or "",
            "context": context or bundle.tokens.context,
        }  # fmt: skip
        _keep(adata, found, key_added, told)
    return found.table


@dataclass(frozen=True)
class Tables:
    """Vectors as they were asked for, and over all cells; of which cells and what genes are called.

    ``cells`` are None where no cell was given.
    """

    table: pd.DataFrame
    whole: pd.DataFrame
    cells: VocabularyCells | None
    names: GeneNames


def table_of(
    adata: "AnnData | str | Path | None",
    bundle: Bundle,
    reading: InputSettings,
    *,
    kind: Kind,
    genes: Sequence[str] | None,
    label_key: str | None,
    spread: bool,
    min_cells: int,
    blocks: int | None,
    context: int,
    batch_size: int | None,
) -> Tables:
    """Make the tables of :func:`gene_vectors`, which writes them beside genes as well."""
    if kind not in get_args(Kind.__value__):
        raise ConfigError(f"kind is {kind!r}: it must be static or contextual.")
    if kind == "static":
        for name, value, default in (
            ("label_key", label_key, None), ("spread", spread, False), ("blocks", blocks, None),
            ("context", context, 0),
        ):  # fmt: skip
            if value != default:
                raise ConfigError(
                    f"{name}={value} says nothing to kind=static, whose vectors are of no cell: "
                    "leave it out, or set kind=contextual."
                )
    elif adata is None:
        raise ConfigError("kind=contextual needs cells, and none are given: set kind=static.")
    layers = len(bundle.model.blocks)
    if blocks is not None and not 0 <= blocks <= layers:
        raise ConfigError(f"blocks is {blocks}, but the model has {layers}: set 0 to {layers}.")
    if adata is None:
        species = bundle.species
        if reading.species is not None:
            species = (bundle.species[bundle.vocabulary.species_code(reading.species)],)
        names = GeneNames(bundle.vocabulary, species)
        table = static_table(bundle, _wanted(bundle, species, genes, None), names)
        return Tables(table, table, None, names)
    cells = VocabularyCells(adata, bundle, reading)
    # A file that we opened is closed; an AnnData is its owner's.
    with closing(cells) if isinstance(adata, str | Path) else nullcontext():
        species = tuple(bundle.species[s] for s in cells.matches)
        names = GeneNames(bundle.vocabulary, species)
        wanted = _wanted(bundle, species, genes, cells)
        if kind == "static":
            table = static_table(bundle, wanted, names)
            return Tables(table, table, cells, names)
        found = contextual(
            cells, bundle, wanted, _obs(adata, cells) if label_key else None, label_key,
            reading, spread=spread, blocks=blocks, context=context, batch_size=batch_size,
        )  # fmt: skip
    whole = found.table(names, min_cells)
    return Tables(found.by_label(names, min_cells) if label_key else whole, whole, cells, names)


@dataclass(frozen=True)
class Contextual:
    """Sums over cells of the hidden states of genes; L labels, the last for cells without one."""

    token_R: np.ndarray
    labels: list[str]
    n_LR: np.ndarray
    sum_LRD: np.ndarray
    square_LRD: np.ndarray | None

    def table(self, names: GeneNames, min_cells: int = 1) -> pd.DataFrame:
        """Average over all cells."""
        square_RD = None if self.square_LRD is None else self.square_LRD.sum(0)
        return self._averaged(names, self.n_LR.sum(0), self.sum_LRD.sum(0), square_RD, min_cells)

    def by_label(self, names: GeneNames, min_cells: int = 1) -> pd.DataFrame:
        """Average over the cells of every label."""
        tables = {}
        for i, label in enumerate(self.labels):
            square_RD = None if self.square_LRD is None else self.square_LRD[i]
            tables[label] = self._averaged(
                names, self.n_LR[i], self.sum_LRD[i], square_RD, min_cells
            )
        return pd.concat(tables, names=["label"])

    def _averaged(
        self,
        names: GeneNames,
        n_R: np.ndarray,
        sum_RD: np.ndarray,
        square_RD: np.ndarray | None,
        min_cells: int,
    ) -> pd.DataFrame:
        kept = np.flatnonzero(n_R >= max(min_cells, 1))
        mean_RD = sum_RD[kept] / n_R[kept, None]
        parts = {"n_cells": n_R[kept]}
        spread_RD = None
        if square_RD is not None:
            variance_RD = square_RD[kept] / n_R[kept, None] - mean_RD**2
            spread_RD = np.sqrt(np.maximum(variance_RD, 0.0))
        return _frame(names, self.token_R[kept], parts, mean_RD, spread_RD)


def contextual(
    cells: VocabularyCells,
    bundle: Bundle,
    wanted: np.ndarray,
    obs: pd.DataFrame | None,
    label_key: str | None,
    reading: InputSettings,
    *,
    spread: bool = False,
    blocks: int | None = None,
    context: int = 0,
    batch_size: int | None = None,
) -> Contextual:
    """Run all cells through a model, and add up the hidden states of these tokens."""
    bundle = with_context(bundle, context)
    labels: list[str] = []
    group_C, n_groups = None, 1
    if label_key is not None and obs is not None:
        code_C, labels = label_codes(obs, label_key, missing_labels=reading.missing_labels)
        n_groups = len(labels) + 1
        group_C = np.where(code_C < 0, len(labels), code_C).astype(np.int64)
    sums = TokenSums(
        rows_of(wanted, len(bundle.vocabulary)), lambda hidden_TD: hidden_TD,
        bundle.model.settings.width, group_C=group_C, n_groups=n_groups, squares=spread,
        device=bundle.device,
    )  # fmt: skip
    run(
        bundle, cells.chunks(), sums, len(cells), what="gene vectors", blocks=blocks,
        batch_size=batch_size,
    )  # fmt: skip
    return Contextual(wanted, labels, sums.n_LR, sums.sum_LRF, sums.square_LRF if spread else None)


def rows_of(token_R: np.ndarray, n_tokens: int) -> np.ndarray:
    """Row of every token in a list of tokens, int64 (V,); -1 for the others."""
    row_V = np.full(n_tokens, -1, np.int64)
    row_V[token_R] = np.arange(len(token_R))
    return row_V


@torch.no_grad()
def static_table(bundle: Bundle, token_R: np.ndarray, names: GeneNames) -> pd.DataFrame:
    """Look vectors up: identity and knowledge of a gene, as the model adds them."""
    token = torch.from_numpy(token_R).to(bundle.device)
    vector_RD = bundle.model.embedding.genes(token).float().cpu().numpy()
    return _frame(names, token_R, {"seen": np.isfinite(bundle.medians_V[token_R])}, vector_RD)


def _frame(
    names: GeneNames,
    token_R: np.ndarray,
    parts: dict[str, np.ndarray],
    vector_RD: np.ndarray,
    spread_RD: np.ndarray | None = None,
) -> pd.DataFrame:
    index = pd.Index([names.ensembl([int(t)]) for t in token_R], name="gene")
    blocks = [
        pd.DataFrame({"symbol": [names.symbol([int(t)]) for t in token_R], **parts}, index=index)
    ]
    for prefix, values_RD in (("v", vector_RD), ("sd", spread_RD)):
        if values_RD is not None:
            columns = [f"{prefix}{i}" for i in range(values_RD.shape[1])]
            blocks.append(pd.DataFrame(values_RD.astype(np.float32), index=index, columns=columns))
    return pd.concat(blocks, axis=1)


def _wanted(
    bundle: Bundle,
    species: tuple[str, ...],
    genes: Sequence[str] | None,
    cells: VocabularyCells | None,
) -> np.ndarray:
    """Tokens of the genes that are asked for, ascending unless they are named."""
    if genes is not None:
        named = GeneNames(bundle.vocabulary, species).tokens(list(genes), "genes")
        return np.array(list(dict.fromkeys(named)), np.int64)
    if cells is None:
        tokens = [bundle.vocabulary.tokens_of(one) for one in species]
        found = np.unique(np.concatenate(tokens)).astype(np.int64)
    else:
        found = np.flatnonzero(cells.measured_SV.any(0))
    return found[found >= N_SPECIAL]


def _obs(adata: "AnnData | str | Path", cells: VocabularyCells) -> pd.DataFrame:
    """All columns of obs; those of a source are the few that a corpus keeps."""
    if isinstance(adata, str | Path):
        from genemodel.cells.annotations import read_annotations

        table: pd.DataFrame = read_annotations(Path(adata), cells.source).obs
        return table
    return adata.obs


def _keep(adata: "AnnData | Any", found: Tables, key: str, told: dict[str, Any]) -> None:
    """Write the vectors beside the genes of an AnnData, NaN for those without."""
    cells, names, table = found.cells, found.names, found.whole
    assert cells is not None
    token_G = cells.tokens_beside(adata.n_vars, "vectors cannot stand beside its genes")
    row = {gene: i for i, gene in enumerate(table.index)}
    at_G = np.array([row.get(names.ensembl([int(t)]), -1) if t >= 0 else -1 for t in token_G])
    vector_RD = table.filter(regex=r"^v\d+$").to_numpy(np.float32)
    out_GD = np.full((len(token_G), vector_RD.shape[1]), np.nan, np.float32)
    out_GD[at_G >= 0] = vector_RD[at_G[at_G >= 0]]
    adata.varm[key] = out_GD
    adata.uns[key] = told
