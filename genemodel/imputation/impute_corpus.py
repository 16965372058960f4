"""A corpus → denoised rates in a file: trained and written in a stream, never held in memory.

Axes: C cells, G genes of the species that were measured.
"""

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.beneath import backbone_of, beneath_of, learnt_from
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import (
    BLOCK_CELLS,
    DecoderSettings,
)
from genemodel.imputation.output import Layers, Tables, ToFile
from genemodel.imputation.starting import pretrained_vectors
from genemodel.imputation.training import train_decoder
from genemodel.inference.cell_vectors import embedder
from genemodel.inference.counts import corpus_chunks
from genemodel.inference.obs_keys import batch_names
from genemodel.inference.progress import Progress
from genemodel.model.tuning import TuningSettings

logger = logging.getLogger(__name__)


def one_species(corpus: Corpus) -> str:
    """Name the species of a corpus whose genes are to be imputed.

    Raises
    ------
    DataError
        It has several.
    """
    species = list(corpus.statistics)
    if len(species) != 1:
        raise DataError(
            f"input={corpus.path} holds {', '.join(species)}: imputed genes are named by one "
            "species. Give the h5ad files of the cells, or a corpus for each species."
        )
    return species[0]


def impute_corpus(
    corpus: Corpus,
    output: Path,
    batch_keys: tuple[str, ...],
    bundle: Bundle | None,
    tuning: TuningSettings | None,
    *,
    settings: DecoderSettings,
    run: HeadRun,
    seed: int,
) -> ImputationModel:
    """Train on a corpus and write mean and standard deviation of the rates of all its cells.

    Parameters
    ----------
    corpus
        Of one species.
    output
        ``.h5ad`` or ``.zarr``; replaced if it is there.
    batch_keys
        Columns of the technical batch; none where omitted.
    bundle, tuning
        Model whose cell vectors are read beside the counts, and what of it learns.
    settings, run, seed
        Of the training.

    Returns
    -------
    ImputationModel
        Of no cells.
    """
    token_G, var = _genes(corpus)
    batches: tuple[str, ...] = ()
    code_C = np.zeros(len(corpus), np.int64)
    if batch_keys:
        names, code_C = np.unique(
            batch_names(corpus.obs(list(batch_keys)), batch_keys, settled=True).astype(str),
            return_inverse=True,
        )
        batches = tuple(map(str, names))
    data = TrainingCells.of_corpus(corpus, code_C, seed=seed)
    seen_G = np.asarray(data.sample_SV.getnnz(0)).ravel()[token_G] > 0
    kept_G = np.flatnonzero(seen_G)
    vectors_GE = None
    if settings.gene_vectors:
        if bundle is None:
            raise ConfigError("gene_vectors=true needs a pre-trained model: give model=BUNDLE.")
        vectors_GE = pretrained_vectors(bundle)[token_G[kept_G]]
    backbone = None if bundle is None or tuning is None else backbone_of(bundle, tuning)
    trained = train_decoder(
        data, settings, gene_G=token_G[kept_G], gene_vectors_GE=vectors_GE, backbone=backbone,
        n_tokens=len(corpus.vocabulary), where=run, seed=seed,
    )  # fmt: skip
    beneath = bundle if backbone is not None else None
    began = bundle if backbone is not None or settings.gene_vectors else None
    training = learnt_from(TrainingManifest.of(corpus, data.used), began)
    if beneath is not None and tuning is not None and tuning.tune != "frozen":
        assert trained.backbone is not None
        how = f"{tuning.tune}, beneath an imputation of {len(data.used):,} cells"
        beneath = beneath_of(beneath, trained.backbone, how, trained.table, training)
    model = ImputationModel(
        trained, data.sample_SV[:, token_G], kept_G, code_C[data.sample], batches, settings,
        genes=list(var.index), batch_keys=batch_keys, where=str(corpus.path), bundle=beneath,
    )  # fmt: skip
    model.unseen_share *= float(model.library_C.sum()) / float(np.sum(corpus.library_C))
    model = model.of(sp.csr_matrix((0, len(token_G)), dtype=np.float32), np.zeros(0, np.int64))
    model.training, model.vocabulary = training, corpus.vocabulary
    model.tell(
        len(data.used), seed=seed, model="" if beneath is None else beneath.fingerprint,
        tune="" if tuning is None or bundle is None else tuning.tune,
    )  # fmt: skip
    obs = corpus.obs()
    obs.index = obs.index.astype(str)
    layers = Layers("imputed", True, 0, ())
    sink = ToFile(output, True, Tables.of_corpus(obs, var), layers)
    with sink.open(), Progress("impute", len(corpus)) as progress:
        for start, block in _blocks(corpus, model, token_G, code_C):
            rows = slice(start, start + len(block))
            found = block.posterior()
            generator = np.random.default_rng((seed, start))
            for name, values_CG in zip(layers.names, layers.values(found, generator), strict=True):
                sink.write(name, rows, values_CG.astype(np.float32))
            progress.add(len(block))
        sink.finish(dict(model.provenance), model.dispersion_G)
    return model


def _genes(corpus: Corpus) -> tuple[np.ndarray, pd.DataFrame]:
    """Tokens of the genes that the corpus measured, and their table."""
    rows = corpus.vocabulary.species_rows(one_species(corpus))
    token_G, first_G = np.unique(np.asarray(rows["token"]), return_index=True)
    measured_G = corpus.measured_SV.any(0)[token_G]
    token_G, first_G = token_G[measured_G], first_G[measured_G]
    symbols = np.asarray(rows["symbol"], dtype=object)[first_G].astype(str)
    names = np.asarray(rows["ensembl_id"], dtype=object)[first_G].astype(str)
    return token_G, pd.DataFrame({"symbol": symbols}, index=pd.Index(names))


def _blocks(
    corpus: Corpus, model: ImputationModel, token_G: np.ndarray, code_C: np.ndarray
) -> Iterator[tuple[int, ImputationModel]]:
    """Yield the model of one block of cells after another, with the number of the first."""
    if model.bundle is None:
        for start in range(0, len(corpus), BLOCK_CELLS):
            stop = min(start + BLOCK_CELLS, len(corpus))
            counts_CV = corpus.read(start, stop).to_csr(len(corpus.vocabulary))
            counts_CG = counts_CV[:, token_G].astype(np.float32)
            yield start, model.of(counts_CG, code_C[start:stop])
        return
    chunks = corpus_chunks(corpus, np.arange(len(corpus)), model.bundle)
    for chunk, vectors_CF in embedder(model.bundle).over(chunks):
        for first in range(0, len(vectors_CF), BLOCK_CELLS):
            rows = slice(first, first + BLOCK_CELLS)
            counts_CG = chunk.counts_CV[rows][:, token_G]
            cells = chunk.start + first + np.arange(counts_CG.shape[0])
            yield int(cells[0]), model.of(counts_CG, code_C[cells], features_CF=vectors_CF[rows])
