"""What a run starts from, and what it releases: bundle, corpus statistics, new weights."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from genemodel.bundle.bundle import VOCABULARY, Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.statistics import GeneStatistics, PrincipalGenes
from genemodel.errors import DataError
from genemodel.genes.knowledge import KnowledgeTable, file_digest, find_tables, read_provenance
from genemodel.genes.vocabulary import EOS, N_SPECIAL, GeneVocabulary
from genemodel.heads.decode_counts import CountDecoder
from genemodel.heads.labels import Labels
from genemodel.heads.pretraining import PretrainingObjectives
from genemodel.model.gene_model import GeneModel
from genemodel.model.tuning import merged, tune
from genemodel.settings import to_values
from genemodel.train.new_genes import NewGenes
from genemodel.train.settings import PretrainSettings

logger = logging.getLogger(__name__)


def open_start(path: str, corpus: Corpus) -> tuple[Bundle, str, GeneVocabulary]:
    """Read the bundle to start from, its fingerprint, and the vocabulary that it has learnt.

    That must be the corpus's, or the beginning of it; the bundle is given grown to the corpus's.
    """
    start = Bundle.load(path, device="cpu")
    mine, theirs = corpus.vocabulary, start.vocabulary
    if mine.fingerprint == theirs.fingerprint:
        return start, start.fingerprint, theirs
    if not mine.extends(theirs):
        raise DataError(
            f"corpus {corpus.path} was built with vocabulary {mine.fingerprint[:12]} "
            f"({', '.join(mine.species)}; {len(mine):,} tokens), but {path} knows "
            f"{theirs.fingerprint[:12]} ({', '.join(theirs.species)}; {len(theirs):,} tokens), "
            "which is not its beginning. "
            f"Build the corpus with that (corpus build: vocabulary={Path(path) / VOCABULARY}), or "
            "begin with new weights."
        )
    logger.info(
        "The corpus's vocabulary has %s tokens more than that of %s.",
        f"{len(mine) - len(theirs):,}", path,
    )  # fmt: skip
    return start.grown(mine), start.fingerprint, theirs


def shaped_like(start: Bundle, settings: PretrainSettings) -> PretrainSettings:
    """Take architecture and context from the bundle; the budget of a step stays the run's."""
    context = start.tokens.context
    logger.info(
        "Starting from %s: its architecture and its context of %s tokens are taken.",
        settings.start, f"{context:,}",
    )  # fmt: skip
    budget = max(settings.tokens.budget, context)
    tokens = replace(settings.tokens, context=context, budget=budget, style=start.tokens.style)
    return replace(settings, model=start.model.settings, tokens=tokens)


def medians_of(corpus: Corpus, start: Bundle | None) -> np.ndarray:
    """Medians that scale the counts: those a model has learnt with, the corpus's for new genes."""
    medians_V = np.asarray(corpus.medians_V)
    if start is None:
        return medians_V
    return np.where(np.isfinite(start.medians_V), start.medians_V, medians_V)


def training_batches(corpus: Corpus, key: str, train_cells: np.ndarray) -> tuple[np.ndarray, int]:
    """Technical batch of every cell, numbered over the training cells; −1 for all others.

    A batch is named together with its data set, because names like "1" recur between data sets.
    """
    batch_C = np.full(len(corpus), -1, np.int64)
    if not key:
        return batch_C, 0
    code_C, _ = corpus.codes("dataset", key)
    known = train_cells[code_C[train_cells] >= 0]
    names, codes = np.unique(code_C[known], return_inverse=True)
    batch_C[known] = codes
    return batch_C, int(names.size)


def labels_of(corpus: Corpus, key: str, train_cells: np.ndarray) -> Labels:
    """Labels of all cells, numbered over the training cells.

    Raises
    ------
    DataError
        Fewer than two labels among the training cells.
    """
    code_N, names = corpus.codes(key)
    count_L = np.bincount(code_N[train_cells][code_N[train_cells] >= 0], minlength=len(names))
    kept_L = np.flatnonzero(count_L)
    if kept_L.size < 2:
        raise DataError(
            f"corpus {corpus.path}: the training cells have "
            f"{'one label only' if kept_L.size else 'no labels'} in column {key!r} "
            "(task.labels.label_key): there is nothing to tell apart. Name another column, or "
            "hold other groups out (holdout.by, holdout.groups)."
        )
    new_L = np.full(len(names) + 1, -1, np.int32)  # the last place is where -1 points to
    new_L[kept_L] = np.arange(kept_L.size)
    return Labels(tuple(names[i] for i in kept_L), new_L[code_N], count_L[kept_L])


def build(
    settings: PretrainSettings,
    corpus: Corpus,
    train_cells: np.ndarray,
    n_batches: int,
    start: Bundle | None = None,
    labels: Labels | None = None,
    new_genes: NewGenes | None = None,
) -> tuple[GeneModel, PretrainingObjectives]:
    """Build backbone and objectives with their starting points: a bundle, or the training cells.

    Genes that the bundle has not begin as ``new_genes`` says, at random without.
    """
    model = new_model(settings, corpus) if start is None else start.model.train()
    statistics = GeneStatistics.measure(corpus, train_cells, seed=settings.seed)
    objectives = PretrainingObjectives(
        settings.task,
        width=settings.model.width,
        statistics=statistics,
        n_batches=n_batches,
        measured_XV=torch.from_numpy(np.asarray(corpus.measured_SV)),
        seed=settings.seed,
        labels=labels,
        first_gene=EOS + 1 if settings.model.hosts == "geneformer_v2" else N_SPECIAL,
    )
    taken = objectives.start_from(start.heads) if start is not None else []
    new = {name: head for name, head in objectives.heads.items() if name not in taken}
    if start is not None and new:
        logger.info("New heads, which the bundle has not or not all of: %s.", ", ".join(new))
    decoder = new.get("decode_counts")
    if model.embedding.components is not None and (start is None or decoder is not None):
        components = PrincipalGenes.measure(
            corpus, train_cells, settings.model.components, seed=settings.seed
        )
        if start is None:
            model.embedding.components.start_at(
                torch.from_numpy(components.loading_VK), torch.from_numpy(components.offset_SK)
            )
        if isinstance(decoder, CountDecoder):
            decoder.start_at(components)
    if new_genes is not None:
        new_genes.begin(model, objectives, corpus, train_cells, seed=settings.seed)
    tune(model, settings.backbone)
    return model, objectives


def new_model(settings: PretrainSettings, corpus: Corpus) -> GeneModel:
    """Make a backbone of new weights for the genes of the corpus.

    Raises
    ------
    DataError
        The shape is that of a published model, and the genes are not.
    """
    hosts = settings.model.hosts
    published = corpus.vocabulary.provenance.get("published", "native")
    if hosts == "genecompass" or (hosts != "native" and hosts != published):
        raise DataError(
            f"model.hosts={hosts} with new weights: "
            + (
                "the knowledge of GeneCompass is in its checkpoint. Start from the bundle "
                "(pretrain: start=BUNDLE)."
                if hosts == "genecompass"
                else f"the vocabulary of corpus {corpus.path} is not that of an imported model. "
                "Build it with that (corpus build: vocabulary=BUNDLE/vocabulary.tsv.gz)."
            )
        )
    vocabulary = corpus.vocabulary
    knowledge = {}
    for key, path in find_tables(settings.model.knowledge, settings.knowledge_dir).items():
        table = KnowledgeTable.read(path, vocabulary)
        logger.info(
            "Knowledge %s: %s of %s genes known, %s numbers each.",
            key, f"{table.n_known:,}", f"{len(vocabulary):,}", table.table_VP.shape[1],
        )  # fmt: skip
        knowledge[key] = (torch.from_numpy(table.table_VP), torch.from_numpy(table.present_V))
    return GeneModel(
        settings.model,
        n_tokens=len(vocabulary),
        n_species=len(vocabulary.species),
        context=settings.tokens.context,
        knowledge=knowledge,
    )


def knowledge_of(settings: PretrainSettings) -> dict[str, dict[str, str]]:
    """Say what the tables of a run with new weights are: sha256 of the file, and its own words.

    Raises
    ------
    ConfigError
        A table is not there.
    """
    if settings.start:
        return {}  # the bundle has its own
    return {
        key: {"sha256": file_digest(path), **read_provenance(path)}
        for key, path in find_tables(settings.model.knowledge, settings.knowledge_dir).items()
    }


def bundle_of(
    model: GeneModel,
    weights: Mapping[str, Tensor],
    vocabulary: GeneVocabulary,
    medians_V: np.ndarray,
    settings: PretrainSettings,
    provenance: dict[str, Any],
    history: pd.DataFrame,
    label_names: tuple[str, ...] = (),
    kept: Mapping[str, Tensor] | None = None,
    training: TrainingManifest | None = None,
) -> Bundle:
    """Release what was trained, adapters merged.

    Parameters
    ----------
    model
        The backbone.
    weights
        Of model and objectives, as :class:`~genemodel.train.losses.Losses` names them.
    vocabulary, medians_V, settings, provenance, history, label_names
        Kept with them.
    kept
        Weights of heads that were not trained and still hold.
    training
        The cells trained on.
    """
    prefix = "objectives.heads."
    return Bundle(
        model=merged(model),
        vocabulary=vocabulary,
        tokens=settings.tokens,
        medians_V=medians_V,
        heads=dict(kept or {})
        | {
            name.removeprefix(prefix): tensor.detach().cpu().clone()
            for name, tensor in weights.items()
            if name.startswith(prefix)
        },
        settings={"pretraining": to_values(settings.task), "labels": list(label_names)},
        provenance=provenance,
        history=history,
        training=training,
    )
