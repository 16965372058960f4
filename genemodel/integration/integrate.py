"""AnnData → batch-robust embedding, in one call: train on these cells, then embed them.

Axes: C cells, D width, E width of gene vectors, G genes, V vocabulary.
"""

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import scipy.sparse as sp
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.bundle.history import STEP
from genemodel.cells.copies import may_copy
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.corpus.corpus import Corpus
from genemodel.expression.components import singular_vectors
from genemodel.expression.normalise import log_normalised
from genemodel.finetuning.beneath import backbone_of, beneath_of, learnt_from
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.inference.cell_vectors import encode
from genemodel.inference.collapse import collapse, warn_of_collapse
from genemodel.inference.counts import VocabularyChunk
from genemodel.inference.obs_keys import (
    INTEGRATED,
    check_in_memory,
    check_key_added,
    keys_of,
)
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.linear_start import MakesVectors
from genemodel.integration.model import IntegratedModel
from genemodel.integration.overcorrection import private_populations, vanished
from genemodel.integration.plan import Plan, Read, plan_integration, read_cells
from genemodel.integration.sparing import names_for_readers, rows_of, told
from genemodel.integration.training import Integration, train_integration
from genemodel.model.tuning import Tune, TuningSettings
from genemodel.settings import either_seed, to_values

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)


@either_seed
@may_copy
@reads_cells
def integrate(
    adata: "AnnData",
    *,
    batch_key: str | Sequence[str],
    label_key: str | None = None,
    model: Bundle | str | Path | None = None,
    backbone: Tune | TuningSettings = "frozen",
    key_added: str = INTEGRATED,
    settings: IntegrationSettings | None = None,
    device: str | torch.device = "auto",
    seed: int = 0,
    **options: Unpack[InputOptions],
) -> IntegratedModel:
    """Train an embedding that is free of the technical batch, and embed the cells with it.

    Parameters
    ----------
    adata
        Raw counts; ``obsm[key_added]`` and ``uns[key_added]`` are written.
    batch_key
        obs column of the technical batch, or several nested ones (donor, study, platform), whose
        combinations are then the batches.
    label_key
        obs column of cell types, missing where unknown; they are learnt, and kept apart.
    model
        A pre-trained model, or the path of its folder, whose cell vectors are read besides the
        counts; default none.
    backbone
        What of the model learns: ``"frozen"``, nothing, so that its vectors are made once; or
        ``"lora"``, ``"last"`` or ``"full"``, which the loss of the embedding then reaches.
    key_added
        Key in ``obsm`` and ``uns``.
    settings
        The recipe; the default is one for every data set.
    device
        Where to train: ``auto`` takes a GPU where there is one.
    seed
        Of initial weights, order, thinning and clustering.
    **options
        How the cells are read.

    Returns
    -------
    IntegratedModel
        Embeds further cells, of batches it has not seen too, without training again.

    Raises
    ------
    DataError
        No raw counts; a column that is not there or has gaps; a single batch; fewer than 50 cells.
    ConfigError
        A backbone that is to learn, and no model.

    Notes
    -----
    Without a model the species may be left out: genes are then known by the data's own names; where
    it is given, by the built-in vocabulary, in which orthologs of human and mouse are one.

    ``obsm[key_added]`` is float32 (n_obs, latent), in input order; NaN for cells without counts.
    A warning names populations of one batch that have moved onto others, or would have.
    """
    check_in_memory(adata, "adata", "genemodel finetune task=integrate")
    check_key_added(key_added)
    bundle = None if model is None else model_for("integrate", (Bundle,), model)
    tuning = backbone if isinstance(backbone, TuningSettings) else TuningSettings(tune=backbone)
    result, embedding_CD = integrate_cells(
        adata, keys_of(batch_key), label_key, bundle, tuning,
        reading=InputSettings.given(options), settings=settings or IntegrationSettings(),
        where=HeadRun(device=device), seed=seed,
    )  # fmt: skip
    adata.obsm[key_added] = embedding_CD
    adata.uns[key_added] = dict(result.provenance)
    return result


def integrate_cells(
    data: "AnnData | Corpus",
    keys: tuple[str, ...],
    label_key: str | None,
    bundle: Bundle | None,
    tuning: TuningSettings,
    *,
    reading: InputSettings | None = None,
    settings: IntegrationSettings,
    where: HeadRun,
    seed: int,
    held_out: np.ndarray | None = None,
) -> tuple[IntegratedModel, np.ndarray]:
    """Train on cells in memory or on a corpus, which may be larger; see :func:`integrate`.

    Parameters
    ----------
    data
        The cells; a corpus is read, and of ``reading`` only ``missing_labels`` says something.
    keys, label_key
        Columns of batches and labels.
    bundle, tuning
        Model beneath, and what of it learns.
    reading
        How the cells are read.
    settings, where, seed
        Of the training.
    held_out
        Numbers of cells that are looked at and not trained on.

    Returns
    -------
    tuple
        The model, and the embedding of all cells, (C, D), NaN for cells without counts.
    """
    start = time.perf_counter()
    reading = reading or InputSettings()
    plan = plan_integration(
        data, keys, label_key, bundle, tuning, reading=reading, settings=settings, seed=seed
    )
    read = read_cells(plan, reading=reading, held_out=held_out, seed=seed)
    trained = _train(plan, read, settings, where, seed)
    result, embedding_CD = _model_of(plan, read, trained, keys, settings)
    result.provenance = {
        "genemodel": genemodel.__version__,
        "task": "integrate",
        "batch_key": list(keys),
        "label_key": label_key or "",
        "model": "" if result.bundle is None else result.bundle.fingerprint,
        "backbone": "" if bundle is None else tuning.tune,
        "settings": to_values(settings),
        "seed": seed,
        "cells": len(read.cells.used),
        "genes": len(trained.gene_G),
        "steps": trained.steps,
        **({} if trained.start is None else {"vector_share": trained.start.share}),
        "losses": _last_losses(trained.history),
        "seconds": round(time.perf_counter() - start, 2),
        **collapse(embedding_CD),
        **_evidence(trained, plan.code_C[read.cells.used], plan.batches),
    }
    known = names_for_readers(
        result.genes, read.vocabulary, None if isinstance(data, Corpus) else data.var
    )
    result.provenance["vanished"] = [
        *_guard(trained, read.cells, plan.labels, seed),
        *told(
            trained.private, plan.batches, known, correct=settings.correct,
            spare=settings.spare_private,
        ),
    ]  # fmt: skip
    result.provenance["private_cells"] = rows_of(trained.private, read.cells.used)
    warn_of_collapse(result.provenance, "integrate")
    return result, embedding_CD


def _train(
    plan: Plan, read: Read, settings: IntegrationSettings, where: HeadRun, seed: int
) -> Integration:
    """Train on cells that were read."""
    bundle, vectors_VE, makes_vectors, backbone = plan.bundle, None, None, None
    if bundle is not None:
        makes_vectors = _vectors_of(bundle, read.cells, read.genes, read.species_C)
        if settings.gene_vectors:
            weight_VE = bundle.model.embedding.token.weight.detach().float().cpu().numpy()
            vectors_VE = weight_VE[[int(token) for token in read.genes]]
        if plan.live:
            backbone = backbone_of(bundle, plan.tuning)
    return train_integration(
        read.cells,
        settings=settings,
        vectors_NF=read.features_CF,
        backbone=backbone,
        gene_vectors_VE=vectors_VE,
        makes_vectors=makes_vectors,
        where=where,
        seed=seed,
    )


def _model_of(
    plan: Plan,
    read: Read,
    trained: Integration,
    keys: tuple[str, ...],
    settings: IntegrationSettings,
) -> tuple[IntegratedModel, np.ndarray]:
    """Make the model that embeds further cells, and the embedding of these."""
    bundle, used_C = plan.bundle, read.cells.used
    training = learnt_from(read.manifest(plan.data, trained.gene_G), bundle)
    if trained.backbone is not None and bundle is not None:
        how = f"{plan.tuning.tune}, beneath an integration of {len(used_C):,} cells"
        bundle = beneath_of(bundle, trained.backbone, how, trained.history, training)
    embedding_CD = np.full((len(plan.code_C), settings.latent), np.nan, np.float32)
    embedding_CD[used_C] = trained.embedding_CD
    model = IntegratedModel(
        net=trained.net,
        correction=trained.correction,
        genes=[read.genes[column] for column in trained.gene_G],
        settings=settings,
        batch_keys=keys,
        batches=plan.batches,
        labels=plan.labels,
        bundle=bundle,
        vocabulary=read.vocabulary,
        history=trained.history,
        training=training,
    )
    return model, embedding_CD


def _vectors_of(
    bundle: Bundle, cells: TrainingCells, genes: list[str], species_C: np.ndarray | None
) -> MakesVectors:
    """Have a bundle make vectors of sampled cells, of the molecules that it is given."""
    token_G = np.array([int(name) for name in genes], np.int64)
    onto_GV = sp.csr_matrix(
        (np.ones(token_G.size, np.float32), (np.arange(token_G.size), token_G)),
        (token_G.size, len(bundle.vocabulary)),
    )

    def make(row_R: np.ndarray, counts_RG: sp.csr_matrix) -> np.ndarray:
        assert species_C is not None
        counts_RV = sp.csr_matrix(counts_RG @ onto_GV)
        counts_RV.sort_indices()
        library_R = np.asarray(counts_RV.sum(1)).ravel().astype(np.float32)
        return encode(
            VocabularyChunk(0, counts_RV, species_C[cells.sample[row_R]], library_R), bundle
        )

    return make


def _last_losses(history: "pd.DataFrame") -> dict[str, float]:
    """Mean of the last tenth of the training."""
    last = history.tail(max(1, len(history) // 10)).drop(columns=STEP)
    return {str(name): float(value) for name, value in last.mean().items()}


def _evidence(trained: Integration, code_C: np.ndarray, batches: list[str]) -> dict[str, Any]:
    """How much of every batch is shared with another one, 0 to 1, in the order of the batches."""
    if trained.correction is None:
        return {}
    evidence_C = trained.correction.evidence_C
    share_B = np.bincount(code_C, evidence_C) / np.bincount(code_C)
    return {"batches": list(batches), "shared_evidence": share_B.tolist()}


def _guard(trained: Integration, cells: TrainingCells, labels: list[str], seed: int) -> list[str]:
    """Warn of populations of one batch that have moved onto others; returns their names.

    Of many cells those sampled are looked at.
    """
    if trained.correction is None and cells.label_C is None:
        return []
    at_S = np.searchsorted(cells.used, cells.sample)
    code_S, latent_SD = cells.batch_C[cells.sample], trained.latent_CD[at_S]
    n_cells = len(code_S)
    evidence_S = np.ones(n_cells)
    if trained.correction is not None:
        evidence_S = trained.correction.evidence_C[at_S]
    if cells.label_C is None:
        from sklearn.cluster import KMeans

        n_clusters = min(30, max(2, n_cells // 50))
        fitted = KMeans(n_clusters, n_init=1, max_iter=25, random_state=seed)
        population_S = fitted.fit_predict(latent_SD).astype(np.int64)
        names = [f"cluster {number}" for number in range(n_clusters)]
        before_SD = latent_SD
    else:
        # Labels also tell what the network itself has merged: compare with the counts.
        population_S, names = cells.label_C[cells.sample], labels
        before_SD = _components(cells.sample_SV[:, trained.gene_G], seed)
    trusted = cells.label_C is not None
    private_P = private_populations(population_S, code_S, evidence_S, trusted=trusted)
    found = vanished(before_SD, trained.embedding_CD[at_S], population_S, private_P, seed=seed)
    for one in found:
        logger.warning(
            "%s is found in one batch only, but now lies among %s (%.0f %% of its neighbours are "
            "of other populations, %.0f %% before): it may be over-corrected.",
            names[one.population], names[one.into] if one.into >= 0 else "unlabelled cells",
            100 * one.foreign_after, 100 * one.foreign_before,
        )  # fmt: skip
    return [names[one.population] for one in found]


def _components(counts_CG: "sp.csr_matrix", seed: int) -> np.ndarray:
    """Leading directions of the log-normalised counts, float32 (C, 20 or fewer)."""
    n_components = max(1, min(20, counts_CG.shape[1] - 1))
    left_CK, size_K, _ = singular_vectors(
        log_normalised(counts_CG, dtype=np.float64), n_components, passes=3, seed=seed
    )
    return np.asarray(left_CK * size_K, dtype=np.float32)
