"""Compute what was asked of a model, block after block of cells, and hand it to where it goes.

Axes: C cells, P output columns (genes asked for), U unmeasured genes among them.
"""

from typing import Any

import numpy as np

import genemodel
from genemodel.imputation.asked import Wanted
from genemodel.imputation.impute_genes import Columns, Unmeasured
from genemodel.imputation.model import ImputationModel, Kind
from genemodel.imputation.plan import Plan
from genemodel.imputation.posterior import GammaPosterior
from genemodel.imputation.ways import Block, Ready
from genemodel.settings import to_values


def write(plan: Plan, ready: Ready) -> int:
    """Write all layers and what says how they were made; returns how many cells have no counts."""
    wanted, sink = plan.asked.wanted, plan.sink
    empty = 0
    for block in ready.blocks:
        library_C = block.library_C
        empty += int((library_C == 0).sum())
        rows = slice(block.start, block.start + len(library_C))
        ratio_C = block.model.library_ratio(ready.library, block.rows)
        found = _posterior(block, ready, wanted, plan.unmeasured, ratio_C)
        if wanted.kind == "log":
            value_CP = found.log_mean(ratio_C * library_C)
            sink.write(wanted.layers.key, rows, value_CP.astype(np.float32))
            continue
        # One stream of chance a block: the order in which blocks are made cannot matter.
        generator = np.random.default_rng((wanted.seed, block.start))
        layers = wanted.layers
        for name, values_CP in zip(layers.names, layers.values(found, generator), strict=True):
            sink.write(name, rows, values_CP.astype(np.float32))
    dispersion_P = _dispersion(ready.model, plan.unmeasured, ready.columns)
    sink.finish(_provenance(plan, ready.model), dispersion_P)
    return empty


def _posterior(
    block: Block,
    ready: Ready,
    wanted: Wanted,
    unmeasured: Unmeasured | None,
    ratio_C: np.ndarray,
) -> GammaPosterior:
    """Rates of the cells of a block, NaN for a gene that nobody predicts."""
    columns, measured_P = ready.columns, ready.columns.measured_P
    whose: Kind = "decoder" if wanted.kind == "decoder" else "posterior"
    found = block.model.posterior(
        block.rows, genes=columns.column_P[measured_P], library=ready.library, batch=wanted.batch,
        kind=whose,
    )  # fmt: skip
    if measured_P.all():
        return found
    shape_CP = np.ones((len(ratio_C), len(columns.names)))
    rate_CP = np.full_like(shape_CP, np.nan)
    shape_CP[:, measured_P], rate_CP[:, measured_P] = found.shape_CG, found.rate_CG
    if unmeasured is not None and block.chunk is not None:
        mean_CU = unmeasured.mean(block.chunk) * ratio_C[:, None]
        predicted_P = columns.predicted_P
        shape_CP[:, predicted_P] = unmeasured.theta_U
        rate_CP[:, predicted_P] = unmeasured.theta_U / np.maximum(mean_CU, 1e-12)
    return GammaPosterior(shape_CP, rate_CP)


def _dispersion(
    model: ImputationModel, unmeasured: Unmeasured | None, columns: Columns
) -> np.ndarray:
    dispersion_P = np.full(len(columns.names), np.nan)
    measured_P = columns.measured_P
    dispersion_P[measured_P] = model.dispersion_G[columns.column_P[measured_P]]
    if unmeasured is not None:
        dispersion_P[columns.predicted_P] = 1.0 / unmeasured.theta_U
    return dispersion_P


def _provenance(plan: Plan, model: ImputationModel) -> dict[str, Any]:
    """Say what was done, for ``uns``: plain values only."""
    way, wanted, source = plan.asked.way, plan.asked.wanted, plan.source
    coverage = model.trained.coverage
    about: dict[str, Any] = {
        "genemodel": genemodel.__version__,
        "counts": source.counts.name,
        "kind": wanted.kind,
        "library": "as sequenced" if wanted.library is None else wanted.library,
        "batch": "as measured" if wanted.batch is None else wanted.batch,
        "batches": list(model.batches),
        "seed": wanted.seed,
        "settings": to_values(model.settings),
        "passes": model.trained.history[-1][0],
        "heldout_nats_per_molecule": model.trained.heldout_nats,
        "dispersion_median": float(np.median(model.trained.dispersion_G)),
        "coverage": {
            "definition": "90 % randomised interval, molecules set aside",
            "share_of_molecules": model.settings.calibration_fraction,
            "overall": coverage.overall,
            "by_gene_decile": np.array(coverage.by_gene_decile),
            "by_predicted_mean_from": np.array([low for low, _, _ in coverage.by_mean]),
            "by_predicted_mean": np.array([share for _, share, _ in coverage.by_mean]),
            "entries": np.array([n for _, _, n in coverage.by_mean]),
        },
        "unmeasured": plan.columns.unmeasured,
        "trained": "here" if way.trained is None else "on other cells",
    }
    if way.as_it_is:
        about |= {"trained": "in pre-training", "model": model.provenance["model"]}
    elif way.bundle is not None and plan.columns.unmeasured:
        about["model"] = way.bundle.fingerprint
    return about
