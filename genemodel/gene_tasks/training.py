"""Fine-tuning a model to tell labels of genes apart, through the one loop; folds of whole families.

What is held out are genes, not cells: a gene of the fold is read as any other, and its label is
unknown. Axes: C cells, G genes of a task, V vocabulary, L labels, R genes that are asked for.
"""

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import pandas as pd
import torch

from genemodel.batches.held import HeldCells
from genemodel.batches.loader import Cells, rank_scale
from genemodel.batches.order import Layout
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.beneath import beneath_of, learnt_from
from genemodel.finetuning.head_run import HeadRun, train_head
from genemodel.finetuning.setting_ranges import check_numbers
from genemodel.gene_tasks.families import grouped_folds
from genemodel.gene_tasks.passes import TokenSums, run, with_context
from genemodel.gene_tasks.tables import GeneTask
from genemodel.heads.gene_labels import NAME, GeneLabelHead, GeneLabelObjective, token_weights
from genemodel.inference.counts import VocabularyCells, VocabularyChunk, corpus_chunks
from genemodel.model.gene_model import GeneModel
from genemodel.model.tuning import TuningSettings, merged, rate_shares, tune
from genemodel.settings import PathText, to_values
from genemodel.train.reading import Built, Reading
from genemodel.train.settings import OptimSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GeneLabelSettings:
    """One recipe for labels of genes.

    Attributes
    ----------
    task
        Which task of the table; empty where it has one only.
    groups
        Table of gene families (gene, family), which folds keep together; empty for those of HGNC.
    folds
        Folds for the predictions of genes that were not learnt from; 0 for none.
    min_cells
        Genes that fewer cells hold within the context get no prediction.
    context
        Most tokens of a cell; 0 for the model's own number. More reaches genes of low expression,
        and only models that read no ranks can.
    steps, batch_cells
        Optimiser steps, and cells of usual length for each.
    peak_rate, weight_decay, warm_up
        AdamW with a cosine schedule; the share of the steps in which the rate rises.
    dropout
        Of the hidden state of a gene, in training.
    balanced
        Whether labels count alike, however many genes have them. Genes always do, however many
        cells hold them.
    """

    task: str = ""
    groups: PathText = ""
    folds: int = 5
    min_cells: int = 5
    context: int = 0
    steps: int = 200
    batch_cells: int = 16
    peak_rate: float = 1e-3
    weight_decay: float = 0.01
    warm_up: float = 0.1
    dropout: float = 0.1
    balanced: bool = True

    def __post_init__(self) -> None:
        check_numbers(
            self, positive=("min_cells", "steps", "batch_cells"), shares=("warm_up",),
            not_negative=("folds", "context", "weight_decay"),
        )  # fmt: skip
        if self.folds == 1:
            raise ConfigError("folds=1 leaves nothing to learn from: set 2 or more, or 0 for none.")
        if self.peak_rate <= 0 or not 0 <= self.dropout < 1:
            raise ConfigError("peak_rate must be above 0, and dropout in [0, 1).")


@dataclass(frozen=True)
class GeneCells:
    """Cells whose genes are learnt from and predicted.

    Attributes
    ----------
    cells
        As the loop streams them.
    used
        Numbers of those with counts, ascending.
    n_V
        Cells that hold each gene of the vocabulary.
    mean_genes
        Genes of a cell.
    species
        Whose genes they are.
    chunks
        The same cells for a pass.
    layout
        How they are read in training; None as a corpus is.
    manifest
        What to write down of them.
    """

    cells: Cells
    used: np.ndarray
    n_V: np.ndarray
    n_genes_C: np.ndarray
    species: tuple[str, ...]
    chunks: Callable[[], Iterator[VocabularyChunk]]
    layout: Layout | None
    manifest: Callable[[], TrainingManifest]

    @classmethod
    def held(cls, source: VocabularyCells, name: str = "AnnData") -> Self:
        """Take cells into memory."""
        import scipy.sparse as sp

        parts = list(source.chunks())
        counts_CV = sp.vstack([part.counts_CV for part in parts], format="csr")
        species_C = np.concatenate([part.species_C for part in parts])
        cells = HeldCells(counts_CV, where=source.source.where, species_C=species_C)
        names = source.bundle.species

        def manifest() -> TrainingManifest:
            of_C = np.array(names, dtype=object)[species_C]
            return TrainingManifest.of_counts(counts_CV, np.flatnonzero(used_C), of_C, name=name)

        used_C = np.asarray(cells.label("library")) > 0
        return cls._checked(
            cells, np.flatnonzero(used_C), np.asarray(cells.counts_CG.getnnz(0), np.int64),
            np.asarray(cells.label("n_genes")), tuple(names[s] for s in np.unique(species_C)),
            lambda: iter(parts), cells.layout, manifest,
        )  # fmt: skip

    @classmethod
    def of_corpus(cls, corpus: Corpus, bundle: Bundle) -> Self:
        """Take the cells of a corpus, which is read from its files all along."""
        used = np.flatnonzero(np.asarray(corpus.label("library")) > 0)
        n_V = np.zeros(len(corpus.vocabulary), np.int64)
        for chunk in corpus_chunks(corpus, used, bundle):
            n_V += np.bincount(chunk.counts_CV.indices, minlength=n_V.size)
        return cls._checked(
            corpus, used, n_V, np.asarray(corpus.label("n_genes")),
            tuple(corpus.codes("species")[1]), lambda: corpus_chunks(corpus, used, bundle), None,
            lambda: TrainingManifest.of(corpus, used),
        )  # fmt: skip

    @classmethod
    def _checked(cls, cells: Cells, used: np.ndarray, *others: Any) -> Self:
        if not used.size:
            raise DataError(f"{cells.path}: no cell has counts of a gene that the model knows.")
        return cls(cells, used, *others)


@dataclass(frozen=True)
class TrainedGeneLabels:
    """A model that has learnt, adapters merged, and its head; both on the CPU."""

    model: GeneModel
    head: GeneLabelHead
    history: pd.DataFrame
    steps: int

    def beside(self, bundle: Bundle) -> Bundle:
        """Put it in the place of the model of a bundle, whose heads it has none of."""
        return replace(bundle, model=self.model.to(bundle.device), heads={})


def train_gene_labels(
    data: GeneCells,
    bundle: Bundle,
    code_V: np.ndarray,
    n_labels: int,
    tuning: TuningSettings,
    settings: GeneLabelSettings,
    where: HeadRun,
    *,
    seed: int = 0,
) -> TrainedGeneLabels:
    """Train a head, and what of the backbone learns, on the genes that have a label.

    Parameters
    ----------
    data
        The cells.
    bundle
        The model; it is copied, and stays as it is.
    code_V
        Label of every token, -1 for all that must not be learnt from.
    n_labels
        L.
    tuning, settings, where, seed
        Of the training.

    Raises
    ------
    DataError
        No cell holds a gene with a label.
    ConfigError
        The training went out of bounds, or ``context`` is more than the model knows.
    """
    bundle = with_context(bundle, settings.context)
    weight_V = token_weights(code_V, data.n_V, balanced=settings.balanced)
    if not weight_V.any():
        raise DataError(f"{data.cells.path}: no cell holds a gene with a label to learn from.")
    length = float(bundle.tokens.lengths(data.n_genes_C[data.used]).mean())
    budget = max(bundle.tokens.context, round(settings.batch_cells * length))
    tokens = replace(bundle.tokens, budget=budget, places=0)
    reading = Reading(
        data.cells, tokens, rank_scale(bundle.medians_V, tokens.style), data.used,
        layout=data.layout,
    )  # fmt: skip

    def build() -> Built:
        model = copy.deepcopy(bundle.model).cpu()
        tune(model, tuning)
        head = GeneLabelHead(model.settings.width, n_labels, settings.dropout)
        objective = GeneLabelObjective(head, code_V, weight_V, data.n_V)
        return Built(model.train(), objective, rate_shares(model, tuning))

    trained = train_head(
        where,
        values=to_values(settings) | {"backbone": to_values(tuning)},
        reading=reading,
        optim=OptimSettings(
            lr=settings.peak_rate, warmup_steps=round(settings.warm_up * settings.steps),
            final_lr=0.0, weight_decay=settings.weight_decay, beta2=0.999, clip=1.0,
        ),
        steps=settings.steps,
        build=build,
        seed=seed,
        rate="gene_labels.peak_rate",
        backbone=bundle.model.settings,
    )  # fmt: skip
    built = trained.loaded(build, seed)
    assert isinstance(built.model, GeneModel) and isinstance(built.objectives, GeneLabelObjective)
    model = merged(built.model).cpu().eval()
    return TrainedGeneLabels(
        model, built.objectives.head.cpu().eval(), trained.history, trained.steps
    )


def mean_logits(
    bundle: Bundle,
    head: torch.nn.Module,
    n_labels: int,
    data: GeneCells,
    token_R: np.ndarray,
    *,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Average the logits of genes over the cells that hold them; ``n_R`` and ``logit_RL``.

    Logits of a gene that no cell holds are NaN.
    """
    row_V = np.full(len(bundle.vocabulary), -1, np.int64)
    row_V[token_R] = np.arange(len(token_R))
    head = head.to(bundle.device).eval()
    sums = TokenSums(row_V, head, n_labels, device=bundle.device)
    run(
        bundle, data.chunks(), sums, data.used.size, what="gene labels",
        blocks=len(bundle.model.blocks), batch_size=batch_size,
    )  # fmt: skip
    n_R = sums.n_LR[0]
    with np.errstate(invalid="ignore"):
        return n_R, sums.sum_LRF[0] / n_R[:, None]


@dataclass(frozen=True)
class CrossValidated:
    """Predictions of every gene by models that had not learnt its family.

    Attributes
    ----------
    fold_G
        Fold of every gene.
    n_G
        Cells that hold it within the context.
    logit_GL
        Mean logits over these cells; NaN below ``min_cells``.
    histories
        Losses of every fold.
    """

    fold_G: np.ndarray
    n_G: np.ndarray
    logit_GL: np.ndarray
    histories: list[pd.DataFrame]

    @property
    def probability_GL(self) -> np.ndarray:
        """Probability of every label."""
        shifted_GL = np.exp(self.logit_GL - self.logit_GL.max(1, keepdims=True))
        share_GL: np.ndarray = shifted_GL / shifted_GL.sum(1, keepdims=True)
        return share_GL


def cross_validate(
    data: GeneCells,
    bundle: Bundle,
    task: GeneTask,
    tuning: TuningSettings,
    settings: GeneLabelSettings,
    where: Callable[[int], HeadRun],
    *,
    fold_G: np.ndarray | None = None,
    seed: int = 0,
) -> CrossValidated:
    """Predict the genes of each fold by a model trained on those of the others.

    ``where`` says where each fold is trained; ``fold_G`` are folds that others were made with.
    """
    if fold_G is None:
        fold_G = grouped_folds(task.code_G, task.family_G, settings.folds, seed)
    n_G = np.zeros(len(task), np.int64)
    logit_GL = np.full((len(task), len(task.labels)), np.nan)
    histories = []
    reading = with_context(bundle, settings.context)
    for fold in np.unique(fold_G):
        held_G = fold_G == fold
        code_V = task.codes(len(bundle.vocabulary), held_G)
        trained = train_gene_labels(
            data, bundle, code_V, len(task.labels), tuning, settings, where(int(fold)), seed=seed
        )
        histories.append(trained.history)
        n_R, logit_RL = mean_logits(
            trained.beside(reading), trained.head, len(task.labels), data, task.token_G[held_G]
        )
        n_G[held_G] = n_R
        logit_GL[held_G] = np.where(n_R[:, None] >= settings.min_cells, logit_RL, np.nan)
    return CrossValidated(fold_G, n_G, logit_GL, histories)


def labelled_bundle(
    bundle: Bundle,
    trained: TrainedGeneLabels,
    data: GeneCells,
    task: GeneTask,
    tuning: TuningSettings,
    settings: GeneLabelSettings,
) -> Bundle:
    """Make the bundle of a model that tells labels of genes apart."""
    bundle = with_context(bundle, settings.context)
    learnt = task.token_G[data.n_V[task.token_G] > 0]
    how = f"{tuning.tune}, on labels of {len(learnt):,} genes in {data.used.size:,} cells"
    training = learnt_from(data.manifest(), bundle)
    made = beneath_of(bundle, trained.model, how, trained.history, training)
    # Heads of a frozen backbone still hold; those of a changed one do not.
    heads = dict(bundle.heads) if tuning.tune == "frozen" else dict(made.heads)
    own = {f"{NAME}.{k}": v.to(bundle.device) for k, v in trained.head.state_dict().items()}
    told = {
        "task": task.name, "labels": list(task.labels), "tokens": sorted(map(int, learnt)),
        "min_cells": settings.min_cells,
    }  # fmt: skip
    return replace(
        made,
        heads={k: v for k, v in heads.items() if not k.startswith(f"{NAME}.")} | own,
        settings={**bundle.settings, NAME: told},
        provenance={**made.provenance, "steps": trained.steps, "cells": int(data.used.size)},
    )
