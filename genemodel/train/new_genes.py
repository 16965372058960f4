"""How genes and species begin that a bundle has not: from orthologs and knowledge, not from noise.

What is set, and from what:

=======================  =======================  ================================  ===============
of a new gene            with orthologs           without, with knowledge           with neither
=======================  =======================  ================================  ===============
gene vector              mean of the orthologs'   predicted from knowledge (ridge)  random
loading of components    mean                     predicted                         0
decoder's gene vector    mean                     predicted                         0: its average
knowledge in the model   mean                     absent, as the tables say         absent
=======================  =======================  ================================  ===============

A new species begins as the mean of those known, and its offset of the components at the one that
centres its own training cells. Whatever else a head has of a gene starts at the statistics of the
training cells, as always.

Axes: V vocabulary, D width, P columns of knowledge, S species.
"""

import logging
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from genemodel.bundle.bundle import Bundle
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.statistics import mean_values
from genemodel.errors import DataError
from genemodel.genes.knowledge import KnowledgeTable, find_tables
from genemodel.genes.orthologs import ortholog_means
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.heads.decode_counts import CountDecoder
from genemodel.heads.pretraining import PretrainingObjectives
from genemodel.model.gene_model import GeneEmbedding, GeneModel, KnowledgeEmbedding
from genemodel.train.settings import NewGenesSettings

logger = logging.getLogger(__name__)

# Penalties of the ridge regression tried; leave-one-out chooses.
_PENALTIES = np.logspace(-1, 6, 15)


@dataclass(frozen=True)
class NewGenes:
    """What is known of the genes that a bundle's vocabulary has grown by.

    Attributes
    ----------
    n_tokens, n_species
        Those that the bundle knows; new ones follow.
    means_VV
        Weights of the orthologs of every new token; empty rows without.
    known_VP, has_V
        Knowledge of every token, and which tokens have any; None where no table is given.
    learnt_V
        Tokens that the bundle has seen in training.
    """

    n_tokens: int
    n_species: int
    means_VV: sp.csr_matrix
    known_VP: np.ndarray | None
    has_V: np.ndarray
    learnt_V: np.ndarray

    @classmethod
    def read(
        cls,
        settings: NewGenesSettings,
        knowledge_dir: str,
        before: GeneVocabulary,
        grown: Bundle,
    ) -> Self | None:
        """Read the tables; None where nothing is new, or new genes shall begin at random.

        Raises
        ------
        DataError
            A table cannot be read, or says nothing about any of the new species.
        """
        now = grown.vocabulary
        if len(now) == len(before) and now.species == before.species:
            return None
        if settings.begin == "random":
            return None
        known_VP, has_V = None, np.zeros(len(now), bool)
        tables = [
            KnowledgeTable.read(path, now)
            for path in find_tables(settings.knowledge, knowledge_dir).values()
        ]
        if tables:
            flags = [table.present_V[:, None].astype(np.float32) for table in tables]
            known_VP = np.concatenate([*(table.table_VP for table in tables), *flags], 1)
            has_V = np.any([table.present_V for table in tables], 0)
        learnt_V = np.isfinite(grown.medians_V)
        return cls(
            len(before), len(before.species), _orthologs(settings, before, now), known_VP, has_V,
            learnt_V,
        )  # fmt: skip

    def begin(
        self,
        model: GeneModel,
        objectives: PretrainingObjectives,
        corpus: Corpus,
        train_cells: np.ndarray,
        *,
        seed: int,
    ) -> None:
        """Set where new genes and species begin, in place."""
        embedding = model.embedding
        assert isinstance(embedding, GeneEmbedding), "an imported model's genes do not grow"
        ours = np.arange(len(self.has_V)) >= self.n_tokens
        has_means = ours & (np.diff(self.means_VV.indptr) > 0)
        predicted = ours & ~has_means & self.has_V
        said = self._set(embedding.token.weight.data, has_means, predicted, None)
        for table in embedding.knowledge.values():
            assert isinstance(table, KnowledgeEmbedding)
            _inherit_knowledge(table, self.means_VV, has_means)
        if embedding.components is not None:
            loading = embedding.components.loading.weight.data
            self._set(loading, has_means, predicted, ours)
        decoder = dict(objectives.heads.items()).get("decode_counts")
        if isinstance(decoder, CountDecoder):
            self._set(decoder.gene.weight.data, has_means, predicted, ours)
        species_SD = embedding.species.weight.data
        species_SD[self.n_species :] = species_SD[: self.n_species].mean(0)
        if embedding.components is not None and embedding.species.num_embeddings > self.n_species:
            mean_SV = torch.from_numpy(mean_values(corpus, train_cells, seed=seed))
            centre_SK = -mean_SV @ embedding.components.loading.weight.data
            embedding.components.offset.weight.data[self.n_species :] = centre_SK[self.n_species :]
        logger.info(
            "New genes: %s begin at their orthologs, %s at what knowledge says%s, %s at random.",
            f"{int(has_means.sum()):,}", f"{int(predicted.sum()) if said else 0:,}", said,
            f"{int((ours & ~has_means & ~(predicted if said else has_means)).sum()):,}",
        )  # fmt: skip

    def _set(
        self,
        weight_VD: Tensor,
        has_means: np.ndarray,
        predicted: np.ndarray,
        empty: np.ndarray | None,
    ) -> str:
        """Set the rows of new genes; those of ``empty`` of which nothing is known become 0.

        Returns
        -------
        How well knowledge predicts the learnt vectors; empty where it does not.
        """
        values = weight_VD.numpy()
        before = values.copy()
        if empty is not None:
            values[empty] = 0
        values[has_means] = self.means_VV[np.flatnonzero(has_means)] @ before
        if self.known_VP is None or not predicted.any():
            return ""
        guess, r2 = _ridge(self.known_VP, before, self.learnt_V & self.has_V, predicted)
        if r2 <= 0:  # the mean would do better
            return ""
        values[predicted] = guess
        return f" (leave-one-out R² {r2:.3f})"


def _ridge(
    x_VP: np.ndarray, y_VD: np.ndarray, fit: np.ndarray, wanted: np.ndarray
) -> tuple[np.ndarray, float]:
    """Predict vectors from knowledge; with the share of variance explained by leave-one-out."""
    from sklearn.linear_model import RidgeCV

    found = RidgeCV(_PENALTIES).fit(x_VP[fit], y_VD[fit])
    variance = float(y_VD[fit].var(0).mean())
    r2 = 1 + float(np.mean(found.best_score_)) / max(variance, 1e-30)
    return np.asarray(found.predict(x_VP[wanted]), y_VD.dtype), r2


def _inherit_knowledge(
    table: KnowledgeEmbedding, means_VV: sp.csr_matrix, has_means: np.ndarray
) -> None:
    """Let new genes have the mean of what the model's own table says of their orthologs."""
    rows = np.flatnonzero(has_means)
    present_V = table.present_V.numpy().astype(np.float32)
    share = means_VV[rows] @ present_V
    known = share > 0
    values = (means_VV[rows] @ table.table_VP.numpy())[known] / share[known, None]
    table.table_VP[rows[known]] = torch.from_numpy(values)
    table.present_V[rows[known]] = True


def _orthologs(
    settings: NewGenesSettings, before: GeneVocabulary, now: GeneVocabulary
) -> sp.csr_matrix:
    """Weights of known orthologs for every new token."""
    total = sp.csr_matrix((len(now), len(now)), dtype=np.float32)
    if not settings.orthologs:
        return total
    before.species_code(settings.to)  # refuses what the model does not know
    refused: list[DataError] = []
    new = now.species[len(before.species) :]
    for species in new:
        try:
            total = total + ortholog_means(now, species, settings.orthologs, settings.to)
        except DataError as error:  # one table may speak of one of several species
            refused.append(error)
    if new and len(refused) == len(new):
        raise refused[0]
    return sp.csr_matrix(total)
