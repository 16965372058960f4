"""What an integration is of: batches, labels, counts and cell vectors, refused before training.

Axes: C cells, F features of a cell vector, G genes, V vocabulary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.cells.input_settings import InputSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.cell_vectors import corpus_vectors
from genemodel.inference.gene_counts import GeneCounts, read_counts
from genemodel.inference.obs_keys import batch_names, check_label_is_no_batch, label_codes
from genemodel.integration.head import IntegrationSettings
from genemodel.model.tuning import TuningSettings, check_fits, refuse_scratch
from genemodel.settings import check_seed

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

# Half of the smallest draws that were measured (docs/few_cells.md): below it nobody has looked.
MIN_CELLS = 50


@dataclass(frozen=True)
class Plan:
    """What an integration will be made of; see :func:`plan_integration`.

    Attributes
    ----------
    data
        The cells.
    bundle, tuning
        Model beneath, and what of it learns.
    batches, code_C
        Names of the batches in order, and which of them every cell is of.
    labels, label_C
        Cell types, and that of every cell, -1 where unknown; None without labels.
    """

    data: "AnnData | Corpus"
    bundle: Bundle | None
    tuning: TuningSettings
    batches: list[str]
    code_C: np.ndarray
    labels: list[str]
    label_C: np.ndarray | None

    @property
    def live(self) -> bool:
        """Whether the loss reaches the model beneath; otherwise its vectors are made once."""
        return self.bundle is not None and self.tuning.tune != "frozen"


def plan_integration(
    data: "AnnData | Corpus",
    keys: Sequence[str],
    label_key: str | None,
    bundle: Bundle | None,
    tuning: TuningSettings,
    *,
    reading: InputSettings,
    settings: IntegrationSettings,
    seed: int,
) -> Plan:
    """Settle what can be settled without the counts.

    Raises
    ------
    DataError
        A column that is not there or has gaps; a single batch; fewer than 50 cells.
    ConfigError
        A backbone that is to learn, or gene vectors to start from, and no model.
    """
    check_seed(seed)
    _check_tuning(bundle, tuning)
    if settings.gene_vectors and bundle is None:
        raise ConfigError("gene_vectors=true needs a pre-trained model: give model=.")
    check_label_is_no_batch(keys, label_key)
    settled = isinstance(data, Corpus)
    obs = data.obs() if isinstance(data, Corpus) else data.obs
    name_C, batches = batches_of(obs, keys, reading.missing_labels, settled=settled)
    label_C: np.ndarray | None = None
    labels: list[str] = []
    if label_key is not None:
        label_C, labels = label_codes(
            obs, label_key, missing_labels=reading.missing_labels, settled=settled
        )
    if len(name_C) < MIN_CELLS:
        raise DataError(
            f"adata has {len(name_C)} cells: fewer than {MIN_CELLS} cannot be integrated."
        )
    code_C = np.searchsorted(np.array(batches, dtype=object), name_C)
    return Plan(data, bundle, tuning, batches, code_C, labels, label_C)


@dataclass(frozen=True)
class Read:
    """The cells of an integration.

    Attributes
    ----------
    cells
        For training.
    genes
        Name of every column of the counts; of a vocabulary, the tokens' numbers as text.
    vocabulary
        What the tokens are of; None for own gene names.
    species_C
        Species code of every cell in the model beneath, or in the vocabulary.
    features_CF
        Vectors of the cells by a model that stays as it is.
    counts
        Of cells in memory.
    """

    cells: TrainingCells
    genes: list[str]
    vocabulary: GeneVocabulary | None
    species_C: np.ndarray | None
    features_CF: np.ndarray | None
    counts: GeneCounts | None

    def manifest(self, data: "AnnData | Corpus", gene_G: np.ndarray) -> TrainingManifest:
        """Take down the cells that were trained on.

        Those in memory over the vocabulary, or over the genes ``gene_G`` that the model reads.
        """
        train = self.cells.train
        if isinstance(data, Corpus):
            return TrainingManifest.of(data, train)
        assert self.counts is not None
        told = (
            sorted(set(data.obs["dataset"].dropna().astype(str))) if "dataset" in data.obs else []
        )
        name = told[0] if len(told) == 1 else "AnnData"
        if self.vocabulary is None:
            return TrainingManifest.of_counts(self.counts.counts_CG[:, gene_G], train, name=name)
        assert self.counts.species_C is not None
        species_C = np.array(self.vocabulary.species, dtype=object)[self.counts.species_C]
        counts_CV = self.counts.over(self.vocabulary)
        return TrainingManifest.of_counts(counts_CV, train, species_C, name=name)


def read_cells(
    plan: Plan, *, reading: InputSettings, held_out: np.ndarray | None, seed: int
) -> Read:
    """Read the counts, and make the vectors that stay as they are.

    Raises
    ------
    DataError
        No raw counts, or a batch without any.
    """
    data, bundle = plan.data, plan.bundle
    if isinstance(data, Corpus):
        vocabulary: GeneVocabulary | None = data.vocabulary if bundle is None else bundle.vocabulary
        assert vocabulary is not None
        cells = TrainingCells.of_corpus(
            data, plan.code_C, label_C=plan.label_C, held_out=held_out, seed=seed
        )
        _refuse_lost(plan, cells)
        features_CF = species_C = None
        if bundle is not None:
            code_N, names = data.codes("species")
            species_C = np.array([bundle.species.index(name) for name in names])[code_N]
            features_CF = None if plan.live else corpus_vectors(data, bundle)
        genes = [str(token) for token in range(len(vocabulary))]
        return Read(cells, genes, vocabulary, species_C, features_CF, None)
    vocabulary = None
    if bundle is not None:
        vocabulary = bundle.vocabulary
    elif reading.species is not None:
        vocabulary = GeneVocabulary.builtin()
    counts = read_counts(
        data, bundle=bundle, vocabulary=vocabulary, reading=reading, features=not plan.live
    )
    if vocabulary is not None and not plan.live:
        # Most of a vocabulary is in no single data set, and would only take memory.
        counts = counts.only(counts.seen())
    cells = TrainingCells.held(
        counts.counts_CG, plan.code_C, label_C=plan.label_C, held_out=held_out,
        species_C=None if bundle is None else counts.species_C, seed=seed,
    )  # fmt: skip
    _refuse_lost(plan, cells)
    return Read(cells, counts.genes, vocabulary, counts.species_C, counts.features_CF, counts)


def _refuse_lost(plan: Plan, cells: TrainingCells) -> None:
    """Refuse a batch whose every cell is without counts; tell of single cells."""
    used_C, n_cells = cells.used, len(plan.code_C)
    if len(used_C) < n_cells:
        logger.warning(
            "%s of %s cells have no counts and get NaN.",
            f"{n_cells - len(used_C):,}", f"{n_cells:,}",
        )  # fmt: skip
    lost = sorted(set(range(len(plan.batches))) - set(plan.code_C[used_C].tolist()))
    if len(used_C) < MIN_CELLS or lost:
        lacking = (
            f"batch {plan.batches[lost[0]]!r} has" if lost else f"fewer than {MIN_CELLS} cells have"
        )
        raise DataError(
            f"adata: {lacking} {'no cell with' if lost else ''} counts of known genes: leave it "
            "out, or check layer and species."
        )


def _check_tuning(bundle: Bundle | None, tuning: TuningSettings) -> None:
    """Refuse a backbone that is to learn where there is none, or not as asked for."""
    refuse_scratch(tuning)
    if bundle is None:
        if tuning.tune != "frozen":
            raise ConfigError(
                f"backbone={tuning.tune!r} adapts a pre-trained model: give model=BUNDLE, or "
                "leave backbone out."
            )
        return
    check_fits(tuning, bundle.model.settings)


def batches_of(
    obs: "pd.DataFrame",
    keys: Sequence[str],
    missing_labels: Sequence[str] = (),
    *,
    settled: bool = False,
    one: str = "there is nothing to integrate. Use gm.embed",
) -> tuple[np.ndarray, list[str]]:
    """Name the batch of every cell, and all batches in order; refuses fewer than two.

    ``one`` says what a single batch means and what to do about it.
    """
    name_C = batch_names(obs, keys, missing_labels=missing_labels, settled=settled)
    batches = sorted(set(name_C))
    if len(batches) < 2:
        raise DataError(
            f"adata.obs[{', '.join(map(repr, keys))}] (batch_key) holds "
            f"{'one batch only' if batches else 'no cells'}: {one}, or name the column that tells "
            "the batches apart."
        )
    if 2 * len(batches) > len(name_C):
        raise DataError(
            f"adata.obs[{', '.join(map(repr, keys))}] (batch_key) holds {len(batches):,} batches "
            f"of {len(name_C):,} cells, so that most are of one cell: nothing can be learnt of "
            "them. Name a column of batches, not of cells or of measurements."
        )
    return name_C, batches
