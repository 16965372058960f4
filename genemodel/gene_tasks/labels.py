"""Labels of genes by a model that was fine-tuned to tell them apart, ours or a published one."""

from collections.abc import Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import numpy as np
import pandas as pd
import torch
from torch import nn

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import bundle_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import DataError
from genemodel.gene_tasks.training import GeneCells, mean_logits
from genemodel.genes.vocabulary import N_SPECIAL
from genemodel.heads.gene_labels import NAME, GeneLabelHead, labels_in
from genemodel.heads.published import PublishedClassifier
from genemodel.inference.counts import VocabularyCells
from genemodel.perturbation.genes import GeneNames

if TYPE_CHECKING:
    from anndata import AnnData


def gene_head(bundle: Bundle) -> tuple[nn.Module, list[str]]:
    """Return what scores hidden states of genes, and the names of its labels.

    Raises
    ------
    DataError
        The model has no such head.
    """
    names = list(labels_in(bundle.settings))
    if names:
        head = GeneLabelHead(bundle.model.settings.width, len(names))
        return bundle.head(NAME, head).eval(), names
    published = bundle.settings.get("published") or {}
    if published.get("head") == "genes":
        named = published["config"].get("id2label") or {}
        names = [str(named.get(str(i), f"label {i}")) for i in range(published["n_labels"])]
        return PublishedClassifier(bundle.heads).to(bundle.device).eval(), names
    raise DataError(
        "This model tells no labels of genes apart: fine-tune it with `genemodel finetune "
        "task=genes genes=TABLE`, or import a published gene classifier."
    )


@reads_cells
def classify_genes(
    adata: "AnnData | str | Path",
    model: Bundle | str | Path,
    *,
    genes: Sequence[str] | None = None,
    min_cells: int | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    **options: Unpack[InputOptions],
) -> pd.DataFrame:
    """Label genes by their hidden states in cells, one prediction a gene.

    Parameters
    ----------
    adata
        AnnData or the path of a file with raw counts, read into memory.
    model
        Fine-tuned with ``task=genes``, or an imported gene classifier; or the path of its folder.
    genes
        Symbols or ids; default all that the data measure, whether or not they were learnt from.
    min_cells
        Genes that fewer cells hold get no label; default that of the fine-tuning.
    batch_size
        Most cells at once, for small devices; cannot change the result.
    device
        Default: where the model is.
    **options
        How the cells are read.

    Returns
    -------
    DataFrame
        One row a gene, index ``gene`` (Ensembl id): ``symbol``, ``n_cells``, ``label``, the
        probability of every label (``p_LABEL``), and ``trained_on``, where a label was learnt. Of
        such a gene the prediction says nothing new: those of cross-validation are in ``genes.csv``
        of the fine-tuning.

    Raises
    ------
    DataError
        The model has no head of genes, or a gene is unknown.
    """
    reading = InputSettings.given(options)
    bundle = bundle_for("label genes", model, device)
    head, labels = gene_head(bundle)
    told = bundle.settings.get(NAME) or {}
    least = told.get("min_cells", 1) if min_cells is None else min_cells
    cells = VocabularyCells(adata, bundle, reading)
    with nullcontext() if not isinstance(adata, str | Path) else closing(cells):
        names = GeneNames(bundle.vocabulary, tuple(bundle.species[s] for s in cells.matches))
        if genes is None:
            token_R = np.flatnonzero(cells.measured_SV.any(0))
            token_R = token_R[token_R >= N_SPECIAL]
        else:
            token_R = np.array(list(dict.fromkeys(names.tokens(list(genes), "genes"))), np.int64)
        data = GeneCells.held(cells)
    n_R, logit_RL = mean_logits(bundle, head, len(labels), data, token_R, batch_size=batch_size)
    enough_R = n_R >= max(least, 1)
    probability_RL = np.full(logit_RL.shape, np.nan)
    part_RL = np.exp(logit_RL[enough_R] - logit_RL[enough_R].max(1, keepdims=True))
    probability_RL[enough_R] = part_RL / part_RL.sum(1, keepdims=True)
    label_R = np.full(len(token_R), None, dtype=object)
    label_R[enough_R] = np.array(labels, dtype=object)[probability_RL[enough_R].argmax(1)]
    table = {
        "symbol": [names.symbol([int(t)]) for t in token_R],
        "n_cells": n_R,
        "label": label_R,
        **{f"p_{label}": probability_RL[:, i] for i, label in enumerate(labels)},
        "trained_on": np.isin(token_R, np.array(told.get("tokens", []), np.int64)),
    }
    index = pd.Index([names.ensembl([int(t)]) for t in token_R], name="gene")
    return pd.DataFrame(table, index=index)
