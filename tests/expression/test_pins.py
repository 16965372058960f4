"""The numbers that every user of the arithmetic of counts gave before it was written once.

Each case is a small run of a place that normalises, thins, scores, searches neighbours, chooses
genes or finds components. Its result is pinned by four numbers: the sum, the sum of squares and two
sums with fixed weights, which no reordering leaves as they are.
"""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from genemodel.annotation.annotate import transfer_labels
from genemodel.evaluation import baselines, imputation_baselines
from genemodel.evaluation.baselines import Conditions
from genemodel.expression.variable_genes import select_genes, variable_counts
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import DecoderSettings
from genemodel.integration import overcorrection
from genemodel.integration.head import IntegrationSettings
from genemodel.integration.shared_clusters import SharedClusterCorrection
from genemodel.integration.training import train_integration
from genemodel.metrics import imputation as imputation_metrics
from genemodel.metrics import light as lm
from genemodel.reports import plots

PINS = Path(__file__).with_name("pins.json")
# A training, and a layout still more, take a rounding further; the rest is as good as float32.
ROUNDING = {"integration": 2e-4, "imputation": 2e-4, "layout": 0.02}


def cells(n_cells=300, n_genes=160, seed=0):
    """Four types in three batches, the last type in the first batch alone."""
    rng = np.random.default_rng(seed)
    batch_C = rng.integers(0, 3, n_cells)
    type_C = np.where(batch_C == 0, rng.integers(0, 4, n_cells), rng.integers(0, 3, n_cells))
    profile_TG = rng.gamma(0.6, 1.0, (4, n_genes)) + 0.02
    rate_CG = profile_TG[type_C] * np.exp(0.5 * rng.standard_normal((3, n_genes)))[batch_C]
    rate_CG *= rng.uniform(300, 900, (n_cells, 1)) / rate_CG.sum(1, keepdims=True)
    return sparse.csr_matrix(rng.poisson(rate_CG).astype(np.float32)), batch_C, type_C


def points(seed=0, n=600, width=8):
    rng = np.random.default_rng(seed)
    batch_C, type_C = rng.integers(0, 3, n), rng.integers(0, 5, n)
    values_CD = 3 * rng.normal(size=(5, width))[type_C] + rng.normal(size=(n, width))
    return (values_CD + rng.normal(size=(3, width))[batch_C]).astype("f4"), batch_C, type_C


def integration():
    counts_CG, batch_C, type_C = cells()
    settings = IntegrationSettings(n_genes=100, steps=12, passes=0, hidden=16, latent=6, rank=8)
    held = TrainingCells.held(counts_CG, batch_C, label_C=type_C)
    found = train_integration(held, settings=settings, where=HeadRun(device="cpu"))
    losses = found.history[["kl", "label"]].to_numpy()
    return {"losses": losses, "latent": found.latent_CD, "embedding": found.embedding_CD}


def genes_of_an_integration():
    counts_CG, batch_C, _ = cells(n_genes=400)
    return {"genes": select_genes(counts_CG, batch_C, 80)}


def correction():
    values_CD, batch_C, _ = points()
    fitted = SharedClusterCorrection()
    moved_CD = fitted.fit_transform(values_CD, batch_C)
    return {
        "moved": moved_CD,
        "evidence": fitted.evidence_C,
        "offset": fitted.offset_KBD,
        "known": fitted.map_known(values_CD[:50], batch_C[:50]),
        "new": fitted.map_batch(values_CD[batch_C == 1] + 0.5),
    }


def overcorrected():
    values_CD, _, type_C = points()
    fewer = np.flatnonzero((type_C != 3) | (np.arange(600) % 3 == 0))
    values_CD, type_C = values_CD[fewer], type_C[fewer]
    merged_CD = values_CD.copy()
    merged_CD[type_C == 3] += values_CD[type_C == 1].mean(0) - values_CD[type_C == 3].mean(0)
    found = overcorrection.vanished(values_CD, merged_CD, type_C, np.array([3]))
    return {"found": [(one.into, one.foreign_before, one.foreign_after) for one in found]}


def imputation():
    counts_CG, batch_C, _ = cells(n_cells=120, n_genes=60)
    settings = DecoderSettings(hidden=16, latent=4, epochs=3, batch_cells=32)
    model = ImputationModel.train(counts_CG, batch_C, ("a", "b", "c"), settings)
    found = model.posterior(batch="mean", library="median")
    return {
        "nats": [model.trained.heldout_nats],
        "coverage": [model.trained.coverage.overall],
        "dispersion": model.dispersion_G,
        "mean": found.mean,
        "log": found.log_mean(model.library_C),
        "draws": found.draws(2, np.random.default_rng(0)),
    }


def annotation():
    values_CD, _, type_C = points()
    found = transfer_labels(values_CD[:400], type_C[:400], values_CD[400:], k=7)
    return {
        "winner": found.winner_C,
        "confidence": found.confidence_C,
        "far": [found.far_beyond, found.far_C.sum(), found.held_out_accuracy],
    }


def light_metrics():
    values_CD, batch_C, type_C = points()
    index_CK, distance_CK = lm.neighbours(values_CD, 12)
    table = lm.biology_and_batch(values_CD, batch_C, type_C, before_CD=values_CD[:, ::-1])
    return {
        "index": index_CK,
        "distance": distance_CK,
        "others": lm.cross_batch_neighbours(values_CD, batch_C, 9),
        "table": table.drop(columns="lost_into").to_numpy(float),
    }


def reference_pca():
    counts_CG, _, _ = cells()
    return {
        "pca": np.abs(lm.pca_of_lognorm(counts_CG, n_comps=5, n_hvg=60)),
        "genes": variable_counts(counts_CG, 40),
    }


def split_scores():
    counts_CG, _, _ = cells()
    split = imputation_metrics.mcv_split(counts_CG, 0.8, 3)
    rate_CG = split.train.toarray() * 0.7 + 0.2
    table = imputation_metrics.score_denoised({"other": rate_CG}, split)
    expected_CG = rate_CG / rate_CG.sum(1, keepdims=True)
    truth = imputation_metrics.score_against_expectation({"train": split.train}, expected_CG)
    coverage = imputation_metrics.predictive_coverage(rate_CG, split, sd=0.3 * rate_CG)
    return {
        "train": split.train.toarray(),
        "test": split.test.toarray(),
        "scores": table.to_numpy(float),
        "truth": truth.to_numpy(float),
        "coverage": coverage[["coverage", "coverage_closed"]].to_numpy(float),
    }


def integration_baselines():
    counts_CG, batch_C, _ = cells()
    adata = ad.AnnData(counts_CG)
    adata.obs["batch"] = batch_C.astype(str)
    conditions = Conditions(batch_key="batch", n_hvg=90, n_comps=6)
    return {
        "variable": baselines.variable_log(adata, conditions).toarray(),
        "none": np.abs(baselines.none(adata, conditions)),
        "combat": np.abs(baselines.combat(adata, conditions)),
        "random_weights": baselines.random_weights(adata, conditions),
    }


def imputation_methods():
    counts_CG, _, _ = cells(n_cells=150, n_genes=80)
    adata, conditions = ad.AnnData(counts_CG), Conditions(n_comps=6)
    # Not kNN-smoothing: cells that are each other's nearest become equal, and a tie decides.
    names = ("magic", "magic_log", "alra", "mice")
    return {name: getattr(imputation_baselines, name)(adata, conditions) for name in names}


def layout():
    values_CD, _, _ = points(n=120)
    near_CK, far_CK = lm.neighbours(values_CD, 14)
    graph = plots._fuzzy_graph(near_CK, far_CK)
    found_C2, at = plots.umap_of(values_CD)
    return {"graph": graph.toarray(), "spread": found_C2.std(0), "at": at}


CASES = [
    integration, genes_of_an_integration, correction, overcorrected, imputation, annotation,
    light_metrics, reference_pca, split_scores, integration_baselines, imputation_methods, layout,
]  # fmt: skip


def summary(values) -> list[float]:
    flat_N = np.asarray(values, dtype=np.float64).ravel()
    flat_N = np.where(np.isfinite(flat_N), flat_N, -9.0)
    at_N = np.arange(1, len(flat_N) + 1)
    weights = (np.ones(len(flat_N)), flat_N, np.cos(at_N), np.sin(0.7 * at_N**1.5))
    return [float(flat_N @ weight_N) for weight_N in weights]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_numbers_are_those_from_before(case) -> None:
    expected = json.loads(PINS.read_text())[case.__name__]
    found = case()
    assert set(found) == set(expected)
    rounding = ROUNDING.get(case.__name__, 1e-6)
    for name, values in found.items():
        flat_N = np.asarray(values, dtype=np.float64).ravel()
        flat_N = np.abs(flat_N[np.isfinite(flat_N)])
        allowed = rounding * (flat_N.sum() + 1e-9)
        allowed = [allowed, rounding * (flat_N @ flat_N + 1e-9), allowed, allowed]
        off = np.abs(np.subtract(summary(values), expected[name]))
        assert (off <= allowed).all(), (name, off, allowed)
