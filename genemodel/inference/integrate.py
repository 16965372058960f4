"""AnnData → batch-robust embedding, in one call: train on these cells, then embed them.

Axes: C cells, D width, E width of gene vectors, G genes, V vocabulary.
"""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import genemodel
from genemodel.adapt.integration import Integration, Progress, train_integration
from genemodel.adapt.integration_net import IntegrationSettings
from genemodel.adapt.overcorrection import private_populations, vanished
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.history import history_of
from genemodel.errors import ConfigError, DataError
from genemodel.expression.components import singular_vectors
from genemodel.expression.normalise import log_normalised
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.collapse import collapse, warn_of_collapse
from genemodel.inference.gene_counts import GeneCounts, read_counts
from genemodel.inference.integrated_model import IntegratedModel
from genemodel.inference.models import model_for
from genemodel.inference.obs_keys import (
    INTEGRATED,
    batch_names,
    check_key_added,
    check_label_is_no_batch,
    keys_of,
    label_codes,
)
from genemodel.settings import check_seed, to_values

if TYPE_CHECKING:
    import pandas as pd
    import scipy.sparse as sp
    from anndata import AnnData

logger = logging.getLogger(__name__)

MIN_CELLS = 50


def integrate(
    adata: "AnnData",
    *,
    batch_key: str | Sequence[str],
    label_key: str | None = None,
    model: Bundle | str | Path | None = None,
    layer: str | None = None,
    species: str | None = None,
    key_added: str = INTEGRATED,
    settings: IntegrationSettings | None = None,
    seed: int = 0,
    missing_labels: Sequence[str] = (),
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
    layer
        Where the raw counts are; default ``X``. Anything but raw counts is refused.
    species
        One species for all cells, or ``"obs:COLUMN"``. With a model it is looked up in the obs
        column ``species`` by default. Without a model it may be left out: genes are then known by
        the data's own names; where it is given, by the built-in vocabulary, in which orthologs of
        human and mouse are one.
    key_added
        Key in ``obsm`` and ``uns``.
    settings
        The recipe; the default is one for every data set.
    seed
        Of initial weights, order, thinning and clustering.
    missing_labels
        Texts in these columns that stand for a missing value, beside the usual ones
        (``nan``, ``Unknown``, ``unassigned`` …); ``"-unknown"`` makes a label of one.

    Returns
    -------
    IntegratedModel
        Embeds further cells, of batches it has not seen too, without training again.

    Raises
    ------
    DataError
        No raw counts; a column that is not there or has gaps; a single batch; fewer than 50 cells.

    Notes
    -----
    ``obsm[key_added]`` is float32 (n_obs, latent), in input order; NaN for cells without counts.
    A warning names populations of one batch that have moved onto others.
    """
    start = time.perf_counter()
    settings = settings or IntegrationSettings()
    check_key_added(key_added)
    check_seed(seed)
    bundle = None if model is None else model_for("integrate", (Bundle,), model)
    keys = keys_of(batch_key)
    check_label_is_no_batch(keys, label_key)
    name_C, batches = batches_of(adata.obs, keys, missing_labels)
    label_C: np.ndarray | None = None
    labels: list[str] = []
    if label_key is not None:
        label_C, labels = label_codes(adata.obs, label_key, missing_labels=missing_labels)
    if adata.n_obs < MIN_CELLS:
        raise DataError(
            f"adata has {adata.n_obs} cells: fewer than {MIN_CELLS} cannot be integrated."
        )
    vocabulary = None
    if bundle is not None:
        vocabulary = bundle.vocabulary
    elif species is not None:
        vocabulary = GeneVocabulary.builtin()
    counts = read_counts(adata, bundle=bundle, vocabulary=vocabulary, layer=layer, species=species)
    if vocabulary is not None:
        # Most of a vocabulary is in no single data set, and would only take the place of genes.
        counts = counts.only(counts.seen())
    used_C = np.flatnonzero(np.asarray(counts.counts_CG.sum(1)).ravel() > 0)
    if len(used_C) < adata.n_obs:
        logger.warning(
            "%s of %s cells have no counts and get NaN.",
            f"{adata.n_obs - len(used_C):,}", f"{adata.n_obs:,}",
        )  # fmt: skip
    code_C = np.searchsorted(np.array(batches, dtype=object), name_C)[used_C]
    lost = sorted(set(range(len(batches))) - set(code_C.tolist()))
    if len(used_C) < MIN_CELLS or lost:
        where = f"batch {batches[lost[0]]!r} has" if lost else "fewer than 50 cells have"
        raise DataError(
            f"adata: {where} {'no cell with' if lost else ''} counts of known genes: leave it out, "
            "or check layer and species."
        )
    if label_C is not None:
        label_C = label_C[used_C]
    trained = _train(counts, used_C, code_C, label_C, bundle, settings, seed)
    embedding_CD = np.full((adata.n_obs, settings.latent), np.nan, np.float32)
    embedding_CD[used_C] = trained.embedding_CD
    result = IntegratedModel(
        net=trained.net,
        correction=trained.correction,
        genes=[counts.genes[column] for column in trained.gene_G],
        settings=settings,
        batch_keys=keys,
        batches=batches,
        labels=labels,
        bundle=bundle,
        vocabulary=vocabulary,
        history=history_of(trained.history),
    )
    result.provenance = {
        "genemodel": genemodel.__version__,
        "task": "integrate",
        "batch_key": list(keys),
        "label_key": label_key or "",
        "model": "" if bundle is None else bundle.fingerprint,
        "settings": to_values(settings),
        "seed": seed,
        "cells": len(used_C),
        "genes": len(trained.gene_G),
        "steps": len(trained.history),
        "losses": _last_losses(trained.history),
        "seconds": round(time.perf_counter() - start, 2),
        **collapse(embedding_CD),
        **_evidence(trained, code_C, batches),
    }
    result.provenance["vanished"] = _guard(
        trained, counts.counts_CG[used_C], code_C, label_C, labels, seed
    )
    warn_of_collapse(result.provenance, "integrate")
    adata.obsm[key_added] = embedding_CD
    adata.uns[key_added] = dict(result.provenance)
    return result


def batches_of(
    obs: "pd.DataFrame", keys: Sequence[str], missing_labels: Sequence[str] = ()
) -> tuple[np.ndarray, list[str]]:
    """Name the batch of every cell, and all batches in order; refuses fewer than two."""
    name_C = batch_names(obs, keys, missing_labels=missing_labels)
    batches = sorted(set(name_C))
    if len(batches) < 2:
        raise DataError(
            f"adata.obs[{', '.join(map(repr, keys))}] (batch_key) holds "
            f"{'one batch only' if batches else 'no cells'}: there is nothing to integrate. Use "
            "gm.embed, or name the column that tells the batches apart."
        )
    if 2 * len(batches) > len(name_C):
        raise DataError(
            f"adata.obs[{', '.join(map(repr, keys))}] (batch_key) holds {len(batches):,} batches "
            f"of {len(name_C):,} cells, so that most are of one cell: nothing can be learnt of "
            "them. Name a column of batches, not of cells or of measurements."
        )
    return name_C, batches


def _train(
    counts: GeneCounts,
    used_C: np.ndarray,
    code_C: np.ndarray,
    label_C: np.ndarray | None,
    model: Bundle | None,
    settings: IntegrationSettings,
    seed: int,
) -> Integration:
    """Train with a bar where somebody looks on, and lines in the log elsewhere."""
    vectors_GE = None
    if settings.gene_vectors:
        if model is None:
            raise ConfigError("gene_vectors=true needs a pre-trained model: give model=.")
        weight_VE = model.model.embedding.token.weight.detach().float().cpu().numpy()
        vectors_GE = weight_VE[[int(token) for token in counts.genes]]
    bar: Any = None
    if sys.stderr.isatty():
        from tqdm import tqdm

        bar = tqdm(desc="integrate", unit="step", leave=False)
    last = -1

    def show(step: int, steps: int, losses: dict[str, float]) -> None:
        nonlocal last
        if bar is not None:
            bar.total, bar.n = steps, step
            bar.set_postfix({name: f"{value:.1f}" for name, value in losses.items()})
        elif 10 * step // steps > last:
            last = 10 * step // steps
            said = ", ".join(f"{name} {value:.2f}" for name, value in losses.items())
            logger.info("step %d of %d: %s", step, steps, said)

    progress: Progress = show
    try:
        return train_integration(
            counts.counts_CG[used_C],
            code_C,
            labels_C=label_C,
            cell_features_CF=None if counts.features_CF is None else counts.features_CF[used_C],
            gene_embeddings_GE=vectors_GE,
            settings=settings,
            seed=seed,
            progress=progress,
        )
    finally:
        if bar is not None:
            bar.close()


def _last_losses(history: list[dict[str, float]]) -> dict[str, float]:
    """Mean of the last fifty steps."""
    last = history[-50:]
    return {name: float(np.mean([row[name] for row in last])) for name in last[0]}


def _evidence(trained: Integration, code_C: np.ndarray, batches: list[str]) -> dict[str, Any]:
    """How much of every batch is shared with another one, 0 to 1, in the order of the batches."""
    if trained.correction is None:
        return {}
    evidence_C = trained.correction.evidence_C
    share_B = np.bincount(code_C, evidence_C) / np.bincount(code_C)
    return {"batches": list(batches), "shared_evidence": share_B.tolist()}


def _guard(
    trained: Integration,
    counts_CG: "sp.csr_matrix",
    code_C: np.ndarray,
    label_C: np.ndarray | None,
    labels: list[str],
    seed: int,
) -> list[str]:
    """Warn of populations of one batch that have moved onto others; returns their names."""
    if trained.correction is None and label_C is None:
        return []
    n_cells = len(code_C)
    evidence_C = np.ones(n_cells) if trained.correction is None else trained.correction.evidence_C
    if label_C is None:
        from sklearn.cluster import KMeans

        n_clusters = min(30, max(2, n_cells // 50))
        fitted = KMeans(n_clusters, n_init=1, max_iter=25, random_state=seed)
        population_C = fitted.fit_predict(trained.latent_CD).astype(np.int64)
        names = [f"cluster {number}" for number in range(n_clusters)]
        before_CD = trained.latent_CD
    else:
        # Labels also tell what the network itself has merged: compare with the counts.
        population_C, names = label_C, labels
        before_CD = _components(counts_CG[:, trained.gene_G], seed)
    private_P = private_populations(population_C, code_C, evidence_C, trusted=label_C is not None)
    found = vanished(before_CD, trained.embedding_CD, population_C, private_P, seed=seed)
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
