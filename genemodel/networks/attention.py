"""``gm.attention``: which genes of a cell look at which.

Axes: C cells, G genes, A layers × heads or one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import bundle_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import ConfigError, DataError
from genemodel.inference.obs_keys import check_in_memory, check_key_added
from genemodel.inference.progress import Progress
from genemodel.networks.attention_sums import AttentionSums
from genemodel.networks.cells import NetworkCells, batches, read_network_cells
from genemodel.settings import check_seed

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "genemodel_attention"
# Genes where none are named: as many as a figure can show.
N_GENES = 50
# Of fewer cells a mean is one of noise.
MIN_CELLS = 10


@dataclass(repr=False)
class AttentionResult:
    """Attention between genes, mean over the cells that hold both.

    Attributes
    ----------
    genes
        Names, of rows and columns.
    weights
        float32 (G, G): row looks at column; or (layers × heads, G, G). NaN where no cell holds
        both.
    cells
        How many cells hold both, (G, G).
    heads
        Layer and head of every matrix; empty where they were averaged.
    summary
        Plain values: model, cells, settings.
    """

    genes: list[str]
    weights: np.ndarray
    cells: np.ndarray
    heads: list[tuple[int, int]]
    summary: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        apart = f" in {len(self.heads)} heads" if self.heads else ""
        return (
            f"AttentionResult({len(self.genes)} genes{apart}, {self.summary['cells']:,} cells)\n"
            f"{self.pairs(10).to_string(index=False)}"
        )

    def matrix(self, layer: int | None = None, head: int | None = None) -> pd.DataFrame:
        """Row looks at column; of layers and heads that were kept apart one, or their mean.

        Raises
        ------
        DataError
            They were averaged, or there is no such layer or head.
        """
        weights = self.weights
        if layer is None and head is None:
            mean = weights if weights.ndim == 2 else weights.mean(0)
            return pd.DataFrame(mean, index=self.genes, columns=self.genes)
        if not self.heads:
            raise DataError(
                "Layers and heads were averaged: ask for one with gm.attention(…, per_head=True)."
            )
        at = [
            a for a, (own_layer, own_head) in enumerate(self.heads)
            if layer in (None, own_layer) and head in (None, own_head)
        ]  # fmt: skip
        if not at:
            raise DataError(
                f"There is no layer {layer} with head {head}; there are "
                f"{', '.join(f'{a}.{b}' for a, b in self.heads)} (layer.head)."
            )
        return pd.DataFrame(weights[at].mean(0), index=self.genes, columns=self.genes)

    def pairs(
        self, most: int = 100, *, layer: int | None = None, head: int | None = None,
        min_cells: int = MIN_CELLS,
    ) -> pd.DataFrame:  # fmt: skip
        """Strongest pairs of two genes, as columns query, key, weight, cells.

        Parameters
        ----------
        most
            How many; 0 for all.
        layer, head
            As in :meth:`matrix`.
        min_cells
            Cells that hold both.
        """
        weight = self.matrix(layer, head).to_numpy()
        there = np.isfinite(weight) & (self.cells >= min_cells)
        np.fill_diagonal(there, False)
        q, k = np.nonzero(there)
        order = np.argsort(-weight[q, k], kind="stable")
        order = order[:most] if most else order
        q, k = q[order], k[order]
        names = np.asarray(self.genes, dtype=object)
        return pd.DataFrame({
            "query": names[q], "key": names[k], "weight": weight[q, k], "cells": self.cells[q, k],
        })  # fmt: skip


@reads_cells
def attention(
    adata: "AnnData",
    model: Bundle | str | Path,
    *,
    genes: Sequence[str] = (),
    n_genes: int = N_GENES,
    layers: Sequence[int] = (),
    heads: Sequence[int] = (),
    per_head: bool = False,
    relative: bool = True,
    max_cells: int = 2000,
    batch_tokens: int = 0,
    device: str | torch.device | None = None,
    seed: int = 0,
    key_added: str = KEY,
    **options: Unpack[InputOptions],
) -> AttentionResult:
    """Measure which genes look at which, in a transformer's attention, mean over cells.

    The model runs as it does for :func:`genemodel.embed`; memory grows with the genes that are
    asked for, and neither with the cells nor with the length of a cell squared.

    Parameters
    ----------
    adata
        Raw counts of one species. ``uns[key_added]`` gets the result.
    model
        A bundle of any kind, imported ones too, or the path of its folder.
    genes
        Symbols or Ensembl ids; by default the ``n_genes`` that are in most cells' input.
    n_genes
        How many, where none are named.
    layers, heads
        Blocks and heads from 0; default all.
    per_head
        Keep layers and heads apart, instead of averaging over them.
    relative
        Attention as a multiple of its mean in the cell, 1 ÷ tokens: 1 is what any token gets.
        ``False``: as a share of all that a gene looks at.
    max_cells
        Most cells that are looked at; 0 for all.
    batch_tokens
        Most tokens at once; 0 for the model's own budget.
    device
        Default: where the model is.
    seed
        Of the sample of cells.
    key_added
        Key in ``uns``.
    **options
        How the cells are read.

    Returns
    -------
    AttentionResult
        ``matrix()`` and ``pairs()`` are DataFrames.

    Raises
    ------
    ConfigError
        Settings contradict each other, or the cells are of several species.
    DataError
        A gene is unknown.

    Notes
    -----
    Attention says where a model looks, not what acts on what: independent tests find co-expression
    in it and little beyond.
    """
    check_key_added(key_added, "uns")
    check_in_memory(adata, "adata", "genemodel network")
    check_seed(seed)
    reading = InputSettings.given(options)
    bundle = bundle_for("attend", model, device)
    cells = read_network_cells(
        adata, bundle.vocabulary, reading, max_cells=max_cells, seed=seed, who="the model"
    )
    tokens = _genes(cells, bundle, genes, n_genes)
    bundle.model.eval()
    sums = AttentionSums(
        bundle.model, tokens, tokens, layers=tuple(layers), heads=tuple(heads), apart=per_head,
        relative=relative,
    )  # fmt: skip
    run(sums, cells, bundle, batch_tokens)
    mean = sums.mean()
    result = AttentionResult(
        unique_names(cells, tokens),
        mean if per_head else mean[0],
        sums.n_QS,
        [(layer, head) for layer in sums.layers for head in sums.heads] if per_head else [],
        {
            "genemodel": genemodel.__version__, "model": bundle.fingerprint, "cells": len(cells),
            "layers": list(sums.layers), "heads": list(sums.heads), "relative": relative,
            "seed": seed,
        },
    )  # fmt: skip
    adata.uns[key_added] = {
        "genes": np.asarray(result.genes, dtype=object), "weights": result.weights,
        "cells": result.cells, "heads": np.asarray(result.heads, np.int64).reshape(-1, 2),
        "summary": result.summary,
    }  # fmt: skip
    return result


def from_uns(kept: Mapping[str, Any]) -> AttentionResult:
    """Give back what ``uns`` keeps, after a file too."""
    heads = [(int(layer), int(head)) for layer, head in np.asarray(kept["heads"]).reshape(-1, 2)]
    return AttentionResult(
        [str(name) for name in kept["genes"]], np.asarray(kept["weights"]),
        np.asarray(kept["cells"]), heads, dict(kept["summary"]),
    )  # fmt: skip


def run(sums: AttentionSums, cells: NetworkCells, bundle: Bundle, batch_tokens: int = 0) -> None:
    """Let all cells pass."""
    with Progress("attention", len(cells)) as progress:
        for batch in batches(cells, bundle, batch_tokens=batch_tokens):
            sums.add(batch)
            progress.add(batch.n_cells)


def unique_names(cells: NetworkCells, tokens: np.ndarray) -> list[str]:
    """Symbols, or ids where two genes share one."""
    symbols = [cells.names.symbol((int(t),)) for t in tokens]
    different, n = np.unique(symbols, return_counts=True)
    shared = set(different[n > 1].tolist())
    return [
        cells.names.ensembl((int(t),)) if name in shared or not name else name
        for t, name in zip(tokens, symbols, strict=True)
    ]


def _genes(cells: NetworkCells, bundle: Bundle, genes: Sequence[str], n_genes: int) -> np.ndarray:
    """Tokens of the genes that are named, or of those in most cells' input."""
    if len(genes):
        names = [genes] if isinstance(genes, str) else [str(name) for name in genes]
        tokens = cells.names.tokens(names, "genes")
        if len(set(tokens)) < len(tokens):
            raise ConfigError("genes names a gene twice.")
        return np.asarray(tokens, np.int64)
    if n_genes < 1:
        raise ConfigError(f"n_genes is {n_genes}: it must be at least 1.")
    # Of a deep cell the context takes a part, and what is not in it attends to nothing.
    held_V = np.zeros(len(bundle.vocabulary), np.int64)
    for batch in batches(cells, bundle):
        held_V += np.bincount(batch.gene_T[: batch.n_tokens].numpy(), minlength=held_V.size)
    held_V[~cells.measured_V] = 0  # special tokens of all styles too
    most = np.argsort(-held_V, kind="stable")[:n_genes]
    return most[held_V[most] > 0]
