"""Integration methods that others published, run on the same cells as our models.

Each is a function ``(adata, conditions) -> array (n_cells, width)``. ``adata.X`` holds raw counts;
nothing in ``adata`` may be changed. Heavy packages are imported by the function that needs them, so
that one that is absent stops only its own method.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.errors import DataError

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

_SCANORAMA_WIDTH = 100  # its own default
_UNLABELLED = "genemodel: no label"


@dataclass
class Conditions:
    """What is the same for every method of one comparison.

    Attributes
    ----------
    batch_key, label_key
        Columns of ``adata.obs``; ``None`` where there is none.
    seed
        Seed of the methods that draw random numbers.
    n_hvg, n_comps
        Highly variable genes, and principal components, that the linear methods work on.
    n_jobs
        Threads a method may use, where it lets itself be told.
    scvi_epochs
        Epochs of scVI; ``None`` = its own heuristic (400 below 20,000 cells).
    shared
        What one method left for another in the same comparison (the scVI model for scANVI).
    borrowed_seconds
        Time that went into what was taken from `shared`: it counts for the method that took it.
    """

    batch_key: str | None = None
    label_key: str | None = None
    seed: int = 0
    n_hvg: int = 2000
    n_comps: int = 30
    n_jobs: int = 1
    scvi_epochs: int | None = None
    shared: dict[str, Any] = field(default_factory=dict)
    borrowed_seconds: float = 0.0

    def batch_of(self, adata: "AnnData") -> np.ndarray:
        """Batch of each cell as strings, (n_cells,)."""
        if self.batch_key is None:
            raise DataError("this method corrects a batch effect and needs batch_key")
        return adata.obs[self.batch_key].astype(str).to_numpy(dtype=object)


def log_normalised(adata: "AnnData") -> "AnnData":
    """Copy with X = log(1 + 10,000 × share of the cell's counts)."""
    import scanpy as sc
    from anndata import AnnData

    counts = sp.csr_matrix(adata.X, dtype=np.float32, copy=True)
    logged = AnnData(counts, obs=adata.obs.copy(), var=adata.var[[]].copy())
    sc.pp.normalize_total(logged, target_sum=1e4)
    sc.pp.log1p(logged)
    return logged


def highly_variable(
    logged: "AnnData", n_hvg: int, batch_key: str | None = None, min_cells: int = 20
) -> np.ndarray:
    """Mask (n_genes,) of the most variable genes of log-normalised data.

    Scanpy's "seurat" dispersions. Ranked within each batch and combined, as the scIB study
    recommends, so that a gene that only marks a batch is not preferred; over all cells where a
    batch has fewer than ``min_cells`` cells.
    """
    import scanpy as sc

    if logged.n_vars <= n_hvg:
        return np.asarray(logged.X.getnnz(axis=0)).ravel() > 0
    by_batch = None
    if batch_key is not None:
        sizes = logged.obs[batch_key].value_counts()
        sizes = sizes[sizes > 0]
        by_batch = batch_key if len(sizes) > 1 and sizes.min() >= min_cells else None
    found = sc.pp.highly_variable_genes(
        logged, flavor="seurat", n_top_genes=n_hvg, batch_key=by_batch, inplace=False
    )
    return found["highly_variable"].to_numpy()


def _variable_log(adata: "AnnData", conditions: Conditions) -> "AnnData":
    logged = log_normalised(adata)
    return logged[:, highly_variable(logged, conditions.n_hvg, conditions.batch_key)].copy()


def _principal(array_CG: Any, conditions: Conditions) -> np.ndarray:
    import scanpy as sc

    n_comps = min(conditions.n_comps, min(array_CG.shape) - 1)
    return np.asarray(sc.pp.pca(array_CG, n_comps=n_comps, random_state=conditions.seed))


def none(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """No integration: PCA of the log-normalised highly variable genes."""
    return _principal(_variable_log(adata, conditions).X, conditions)


def combat(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """ComBat (Johnson, Li & Rabinovic 2007; scanpy's implementation), then PCA."""
    import scanpy as sc

    logged = _variable_log(adata, conditions)
    logged.X = logged.X.toarray()
    batch = pd.Categorical(conditions.batch_of(adata))
    smallest = int(batch.value_counts().min())
    if smallest < 2:
        raise DataError(
            "ComBat estimates a variance within each batch and needs 2 cells per batch, but the "
            f"smallest batch of {conditions.batch_key!r} has {smallest}"
        )
    logged.obs["batch"] = batch
    return _principal(sc.pp.combat(logged, key="batch", inplace=False), conditions)


def harmony(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Harmony (Korsunsky et al. 2019; harmonypy 2 with its defaults) on the PCA."""
    import harmonypy

    pca_CD = none(adata, conditions).astype(np.float64)
    batch = pd.DataFrame({"batch": conditions.batch_of(adata)})
    done = harmonypy.run_harmony(
        pca_CD,
        batch,
        "batch",
        verbose=False,
        random_state=conditions.seed,
        ncores=conditions.n_jobs,
    )
    corrected = np.asarray(done.Z_corr)
    # harmonypy below 2 returns components × cells
    return corrected if corrected.shape[0] == adata.n_obs else corrected.T


def scanorama(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Scanorama (Hie, Bryson & Berger 2019) with its defaults, one data set per batch."""
    from scanorama import integrate

    logged = _variable_log(adata, conditions)
    batch_C = conditions.batch_of(adata)
    genes = list(logged.var_names)
    rows_of = [np.flatnonzero(batch_C == batch) for batch in pd.unique(batch_C)]
    parts, _ = integrate(
        [sp.csr_matrix(logged.X[rows]) for rows in rows_of],
        [genes] * len(rows_of),
        verbose=0,
        dimred=min(_SCANORAMA_WIDTH, logged.n_vars - 1, logged.n_obs - 1),
        seed=conditions.seed,
    )
    result_CD = np.empty((adata.n_obs, parts[0].shape[1]), dtype=np.float32)
    for rows, part in zip(rows_of, parts, strict=True):
        result_CD[rows] = part
    return result_CD


def scvi(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Embed with scVI (Lopez et al. 2018; scvi-tools, its defaults), counts of variable genes."""
    model, _, kept_C = _scvi_model(adata, conditions)
    return _latent(model, kept_C)


def scanvi(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Embed with scANVI (Xu et al. 2021; scvi-tools, its defaults), from scVI and the labels."""
    from scvi.model import SCANVI

    if conditions.label_key is None:
        raise DataError("scANVI learns from labels and needs label_key")
    base, seconds, kept_C = _scvi_model(adata, conditions)
    conditions.borrowed_seconds += seconds
    model = SCANVI.from_scvi_model(base, unlabeled_category=_UNLABELLED, labels_key="label")
    epochs = None if conditions.scvi_epochs is None else max(2, conditions.scvi_epochs // 40)
    model.train(max_epochs=epochs, **_quiet_training())
    return _latent(model, kept_C)


def _quiet_training() -> dict[str, Any]:
    return {
        "accelerator": "auto",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }


def _scvi_model(adata: "AnnData", conditions: Conditions) -> tuple[Any, float, np.ndarray]:
    """Train scVI, or take the one that was trained for these cells with this seed.

    Returns the model, the seconds that its training took where it is taken over (else 0), and which
    cells it holds: those with a count among the variable genes.
    """
    import scvi as scvi_tools
    from anndata import AnnData

    key = f"scvi, seed {conditions.seed}"
    if key in conditions.shared:
        return conditions.shared[key]
    start = time.perf_counter()
    variable = highly_variable(log_normalised(adata), conditions.n_hvg, conditions.batch_key)
    counts = sp.csr_matrix(adata.X[:, variable], dtype=np.float32)
    kept_C = np.asarray(counts.sum(axis=1)).ravel() > 0
    data = AnnData(counts[kept_C])
    data.obs_names = [str(i) for i in range(data.n_obs)]
    data.obs["batch"] = pd.Categorical(conditions.batch_of(adata)[kept_C])
    data.obs["label"] = _labels(adata, conditions)[kept_C]
    scvi_tools.settings.seed = conditions.seed
    scvi_tools.model.SCVI.setup_anndata(data, batch_key="batch", labels_key="label")
    model = scvi_tools.model.SCVI(data)
    model.train(max_epochs=conditions.scvi_epochs, **_quiet_training())
    seconds = time.perf_counter() - start
    conditions.shared[key] = (model, seconds, kept_C)
    return model, 0.0, kept_C


def _labels(adata: "AnnData", conditions: Conditions) -> pd.Categorical:
    if conditions.label_key is None:
        return pd.Categorical([_UNLABELLED] * adata.n_obs)
    label = adata.obs[conditions.label_key].astype(object)
    return pd.Categorical(label.where(label.notna(), _UNLABELLED).astype(str))


def _latent(model: Any, kept_C: np.ndarray) -> np.ndarray:
    """Latent means; a cell without any count among the variable genes gets the mean of all."""
    latent = np.asarray(model.get_latent_representation())
    if kept_C.all():
        return latent
    logger.info("%d cells have no count among the variable genes", int((~kept_C).sum()))
    latent_CD = np.tile(latent.mean(axis=0), (len(kept_C), 1))
    latent_CD[kept_C] = latent
    return latent_CD


def random(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Control: Gaussian noise. The best batch score there is, and no biology at all."""
    shape = (adata.n_obs, conditions.n_comps)
    return np.random.default_rng(conditions.seed).standard_normal(shape).astype(np.float32)


def random_weights(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Control: a two-layer network that was never trained, on the log-normalised variable genes.

    What an architecture gives without having learnt anything; a trained encoder must be better.
    """
    logged = _variable_log(adata, conditions)
    draw = np.random.default_rng(conditions.seed)
    width = 256
    first_GH = draw.standard_normal((logged.n_vars, width), dtype=np.float32)
    hidden_CH = np.maximum(logged.X @ first_GH / np.sqrt(logged.n_vars), 0.0)
    second_HD = draw.standard_normal((width, conditions.n_comps), dtype=np.float32)
    return np.asarray(hidden_CH @ second_HD / np.sqrt(width), dtype=np.float32)


def genemodel(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Our own, with the defaults of `genemodel.integrate`: fine-tuned on these cells, no labels."""
    from genemodel.inference.integrate import integrate

    copy = adata.copy()
    integrate(copy, batch_key=conditions.batch_key, seed=conditions.seed)
    return np.asarray(copy.obsm["X_genemodel"])


Integration = Callable[["AnnData", Conditions], np.ndarray]
