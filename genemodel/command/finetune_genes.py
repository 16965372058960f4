"""``genemodel finetune task=genes``: cells and labelled genes in; predictions and a model out.

Axes: G genes of the task, L labels.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd

from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.command.finetune_settings import FinetuneSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError
from genemodel.finetuning.head_run import HeadRun
from genemodel.gene_tasks.tables import GeneTask, one_task, read_tasks
from genemodel.gene_tasks.training import (
    CrossValidated,
    GeneCells,
    cross_validate,
    labelled_bundle,
    train_gene_labels,
)
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.counts import VocabularyCells
from genemodel.metrics.gene_labels import gene_scores
from genemodel.model.tuning import TuningSettings
from genemodel.perturbation.genes import GeneNames

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)


def known_tasks(settings: FinetuneSettings, bundle: Bundle | None) -> Path:
    """Refuse a table that could not be learnt from, before anything is; return where it is."""
    vocabulary = GeneVocabulary.builtin() if bundle is None else bundle.vocabulary
    _task(settings, vocabulary, vocabulary.species)
    return Path(settings.genes)


def _task(
    settings: FinetuneSettings, vocabulary: GeneVocabulary, species: tuple[str, ...]
) -> GeneTask:
    head = settings.gene_labels
    tasks = read_tasks(settings.genes, vocabulary, species, task=head.task, groups=head.groups)
    return one_task(tasks, settings.genes, "gene_labels.task")


@dataclass
class GeneRun:
    """What is learnt, and from which cells; ``table`` has a row for every labelled gene."""

    settings: FinetuneSettings
    bundle: Bundle
    data: GeneCells
    task: GeneTask
    table: pd.DataFrame = field(default_factory=pd.DataFrame)

    @classmethod
    def of(
        cls,
        settings: FinetuneSettings,
        data: "AnnData | Corpus",
        reading: InputSettings,
        bundle: Bundle,
    ) -> Self:
        """Read cells and table."""
        if isinstance(data, Corpus):
            cells = GeneCells.of_corpus(data, bundle)
        else:
            cells = GeneCells.held(
                VocabularyCells(data, bundle, reading), Path(settings.input).stem
            )
        return cls(settings, bundle, cells, _task(settings, bundle.vocabulary, cells.species))

    def train(
        self, tuning: TuningSettings, where: Callable[[str], HeadRun]
    ) -> tuple[Bundle, pd.DataFrame]:
        """Predict fold by fold, then train on all genes; the model and its losses."""
        head, task, seed = self.settings.gene_labels, self.task, self.settings.seed
        n_held = int((self.data.n_V[task.token_G] > 0).sum())
        logger.info(
            "%s: %s of %s labelled genes are held by the cells; labels %s.",
            task.name, f"{n_held:,}", f"{len(task):,}", ", ".join(task.labels),
        )  # fmt: skip
        if not n_held:
            raise ConfigError(
                f"genes={self.settings.genes}: no cell of input={self.settings.input} holds one of "
                "them: give cells of the tissue that the labels are about."
            )
        told = "not measured: folds is 0"
        validated: CrossValidated | None = None
        if head.folds:
            validated = cross_validate(
                self.data, self.bundle, task, tuning, head,
                lambda fold: where(f"genes/fold{fold}"), seed=seed,
            )  # fmt: skip
            scores = gene_scores(task.code_G, validated.logit_GL, seed=seed)
            told = (
                f"{scores.genes:,} genes, AUROC {scores.auroc:.3f} ({scores.auroc_low:.3f} to "
                f"{scores.auroc_high:.3f}), AUPRC {scores.auprc:.3f} ({scores.auprc_low:.3f} to "
                f"{scores.auprc_high:.3f}; {scores.positives / max(scores.genes, 1):.3f} by chance)"
            )
            logger.info("%s: %s.", task.name, told)
        self.table = self._rows(validated)
        trained = train_gene_labels(
            self.data, self.bundle, task.codes(len(self.bundle.vocabulary)), len(task.labels),
            tuning, head, where("genes/all"), seed=seed,
        )  # fmt: skip
        made = labelled_bundle(self.bundle, trained, self.data, task, tuning, head)
        made.provenance["gene_labels"] = told
        return made, trained.history

    def _rows(self, found: CrossValidated | None) -> pd.DataFrame:
        task = self.task
        names = GeneNames(self.bundle.vocabulary, self.data.species)
        index = pd.Index([names.ensembl([int(t)]) for t in task.token_G], name="gene")
        rows = {
            "symbol": [names.symbol([int(t)]) for t in task.token_G],
            "label": np.array(task.labels, dtype=object)[task.code_G],
            "family": task.family_G,
        }
        if found is not None:
            known_G = np.isfinite(found.logit_GL).all(1)
            said_G = np.full(len(task), "", dtype=object)
            said_G[known_G] = np.array(task.labels, dtype=object)[found.logit_GL[known_G].argmax(1)]
            rows |= {"fold": found.fold_G, "n_cells": found.n_G, "predicted": said_G}
            rows |= {
                f"p_{label}": found.probability_GL[:, i] for i, label in enumerate(task.labels)
            }
        return pd.DataFrame(rows, index=index)
