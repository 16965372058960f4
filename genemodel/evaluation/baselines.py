"""Integration methods that others published, run on the same cells as our models.

Each is a function ``(adata, conditions) -> array (n_cells, width)``. ``adata.X`` holds raw counts;
nothing in ``adata`` may be changed. Heavy packages are imported by the function that needs them, so
that one that is absent stops only its own method.
"""

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.input_settings import InputOptions, InputSettings
from genemodel.errors import DataError
from genemodel.expression.components import principal_components
from genemodel.expression.normalise import log_normalised

if TYPE_CHECKING:
    from anndata import AnnData

    from genemodel.bundle.bundle import Bundle
    from genemodel.corpus.corpus import Corpus
    from genemodel.model.tuning import Tune

logger = logging.getLogger(__name__)

SCVI_LOGGERS = (
    "lightning.pytorch",
    "lightning.fabric",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
    "scvi",
)
_SCANORAMA_WIDTH = 100  # its own default
UNLABELLED = "genemodel: no label"


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
    corpus
        Whose principal components the cells are projected on; ``None`` where there is none.
    reading
        How genes are named in ``adata``.
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
    corpus: "Corpus | None" = None
    reading: InputSettings = field(default_factory=InputSettings)
    shared: dict[str, Any] = field(default_factory=dict)
    borrowed_seconds: float = 0.0

    def batch_of(self, adata: "AnnData") -> np.ndarray:
        """Batch of each cell as strings, (n_cells,)."""
        if self.batch_key is None:
            raise DataError("this method corrects a batch effect and needs batch_key")
        return column(adata, self.batch_key).astype(str).to_numpy(dtype=object)


def column(adata: "AnnData", key: str) -> pd.Series:
    """Return a column of ``obs`` as objects, missing values kept."""
    return pd.Series(np.asarray(adata.obs[key], dtype=object))


def counts_of(adata: "AnnData") -> sp.csr_matrix:
    """Raw counts of the cells, float32 CSR (n_cells, n_genes); a copy."""
    return sp.csr_matrix(cast(Any, adata.X), dtype=np.float32, copy=True)


def highly_variable(
    logged_CG: sp.csr_matrix, n_hvg: int, batch_C: np.ndarray | None = None, min_cells: int = 20
) -> np.ndarray:
    """Choose the most variable genes of log-normalised data, as a mask (n_genes,).

    Scanpy's "seurat" dispersions. Ranked within each batch and combined, as the scIB study
    recommends, so that a gene that only marks a batch is not preferred; batches of fewer than
    ``min_cells`` cells have no say. Over all cells where fewer than two batches have one.
    """
    import scanpy as sc
    from anndata import AnnData

    seen_G = logged_CG.getnnz(axis=0) > 0
    if seen_G.sum() <= n_hvg:
        return seen_G
    data = AnnData(logged_CG)
    by_batch = None
    if batch_C is not None:
        size_B = pd.Series(batch_C).value_counts()
        large = size_B.index[size_B >= min_cells]
        if len(large) > 1:
            by_batch = "batch"
            data.obs[by_batch] = pd.Categorical(batch_C)
            data = data[data.obs[by_batch].isin(large).to_numpy()].copy()
    found = sc.pp.highly_variable_genes(
        data, flavor="seurat", n_top_genes=n_hvg, batch_key=by_batch, inplace=False
    )
    return cast(pd.DataFrame, found)["highly_variable"].to_numpy(dtype=bool)


def variable_log(adata: "AnnData", conditions: Conditions) -> sp.csr_matrix:
    """Log-normalised counts of the highly variable genes."""
    logged_CG = log_normalised(counts_of(adata))
    batch_C = None if conditions.batch_key is None else conditions.batch_of(adata)
    return logged_CG[:, highly_variable(logged_CG, conditions.n_hvg, batch_C)]


def none(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """No integration: PCA of the log-normalised highly variable genes."""
    logged_CG = variable_log(adata, conditions)
    return principal_components(logged_CG, conditions.n_comps, conditions.seed)


def corpus_pca(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Project the cells on principal components of a corpus; nothing is learnt from the cells.

    Log-normalised counts of the genes that the corpus's vocabulary knows, minus the mean of their
    species there; a gene that was not measured counts as average.
    """
    from genemodel.cells.sources import open_source
    from genemodel.corpus.statistics import PrincipalGenes
    from genemodel.inference.gene_counts import read_counts

    corpus = conditions.corpus
    if corpus is None:
        raise DataError("corpus_pca needs a corpus: name its folder with corpus=")
    key = f"components of {corpus.path}"
    if key not in conditions.shared:
        conditions.shared[key] = PrincipalGenes.measure(
            corpus, np.arange(len(corpus)), conditions.n_comps
        )
    found: PrincipalGenes = conditions.shared[key]
    counts = read_counts(
        adata, bundle=None, vocabulary=corpus.vocabulary, reading=conditions.reading
    )
    species = open_source(adata, column=conditions.reading.column).obs["species"].astype(str)
    species_C = np.array([corpus.vocabulary.species.index(name) for name in species])
    # Scores as those of a PCA: of unequal variance, the first component's the largest.
    loading_VK = found.loading_VK * np.linalg.norm(found.deviation_VK, axis=0)
    average_SK = (found.mean_SV * counts.measured_G) @ loading_VK
    return np.asarray(log_normalised(counts.counts_CG) @ loading_VK - average_SK[species_C], "f4")


def combat(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """ComBat (Johnson, Li & Rabinovic 2007; scanpy's implementation), then PCA."""
    import scanpy as sc
    from anndata import AnnData

    batch = pd.Categorical(conditions.batch_of(adata))
    smallest = int(batch.value_counts().min())
    if smallest < 2:
        raise DataError(
            "ComBat estimates a variance within each batch and needs 2 cells per batch, but the "
            f"smallest batch of {conditions.batch_key!r} has {smallest}"
        )
    data = AnnData(variable_log(adata, conditions).toarray())
    data.obs["batch"] = batch
    with np.errstate(divide="ignore"):  # its first step may start from an estimate of 0
        corrected_CG = sc.pp.combat(data, key="batch", inplace=False)
    return principal_components(corrected_CG, conditions.n_comps, conditions.seed)


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

    logged_CG = variable_log(adata, conditions)
    batch_C = conditions.batch_of(adata)
    genes = [str(gene) for gene in range(logged_CG.shape[1])]
    rows_of = [np.flatnonzero(batch_C == batch) for batch in pd.unique(batch_C)]
    with hushed():
        parts, _ = integrate(
            [logged_CG[rows] for rows in rows_of],
            [genes] * len(rows_of),
            verbose=0,
            dimred=min(_SCANORAMA_WIDTH, min(logged_CG.shape) - 1),
            seed=conditions.seed,
        )
    result_CD = np.empty((adata.n_obs, parts[0].shape[1]), dtype=np.float32)
    for rows, part in zip(rows_of, parts, strict=True):
        result_CD[rows] = part
    return result_CD


def scvi(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Embed with scVI (Lopez et al. 2018; scvi-tools, its defaults), counts of variable genes."""
    model, _, kept_C = scvi_model(adata, conditions)
    return _latent(model, kept_C)


def scanvi(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Embed with scANVI (Xu et al. 2021; scvi-tools, its defaults), from scVI and the labels."""
    from scvi.model import SCANVI

    if conditions.label_key is None:
        raise DataError("scANVI learns from labels and needs label_key")
    base, seconds, kept_C = scvi_model(adata, conditions)
    conditions.borrowed_seconds += seconds
    model = SCANVI.from_scvi_model(base, unlabeled_category=UNLABELLED, labels_key="label")
    epochs = None if conditions.scvi_epochs is None else max(2, conditions.scvi_epochs // 40)
    with hushed(*SCVI_LOGGERS):
        model.train(max_epochs=epochs, **quiet_training())
    return _latent(model, kept_C)


@contextlib.contextmanager
def hushed(*loggers: str) -> Iterator[None]:
    """Keep a library's chatter off the terminal: log lines below errors, warnings, prints."""
    before = {name: logging.getLogger(name).level for name in loggers}
    try:
        for name in loggers:
            logging.getLogger(name).setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def quiet_training() -> dict[str, Any]:
    """Arguments that make scvi-tools train without progress bars and log folders."""
    return {
        "accelerator": "auto",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }


def scvi_model(adata: "AnnData", conditions: Conditions) -> tuple[Any, float, np.ndarray]:
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
    counts = counts_of(adata)
    batch_C = conditions.batch_of(adata)
    counts = counts[:, highly_variable(log_normalised(counts), conditions.n_hvg, batch_C)]
    kept_C = np.asarray(counts.sum(axis=1)).ravel() > 0
    data = AnnData(counts[kept_C])
    data.obs_names = [str(i) for i in range(data.n_obs)]
    data.obs["batch"] = pd.Categorical(batch_C[kept_C])
    data.obs["label"] = pd.Categorical(_labels(adata, conditions)[kept_C])
    with hushed(*SCVI_LOGGERS):
        scvi_tools.settings.seed = conditions.seed
        scvi_tools.model.SCVI.setup_anndata(data, batch_key="batch")
        model = scvi_tools.model.SCVI(data)
        model.train(max_epochs=conditions.scvi_epochs, **quiet_training())
    seconds = time.perf_counter() - start
    conditions.shared[key] = (model, seconds, kept_C)
    return model, 0.0, kept_C


def _labels(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    if conditions.label_key is None:
        return np.full(adata.n_obs, UNLABELLED, dtype=object)
    label = column(adata, conditions.label_key)
    return label.where(label.notna(), UNLABELLED).astype(str).to_numpy(dtype=object)


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
    logged_CG = variable_log(adata, conditions)
    draw = np.random.default_rng(conditions.seed)
    n_genes, width = logged_CG.shape[1], 256
    first_GH = draw.standard_normal((n_genes, width), dtype=np.float32)
    hidden_CH = np.maximum(np.asarray(logged_CG @ first_GH) / np.sqrt(n_genes), 0.0)
    second_HD = draw.standard_normal((width, conditions.n_comps), dtype=np.float32)
    return np.asarray(hidden_CH @ second_HD / np.sqrt(width), dtype=np.float32)


Integration = Callable[["AnnData", Conditions], np.ndarray]


def genemodel(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Ours with its defaults: trained on these cells without labels, then embedded."""
    return tuned(adata, conditions)


def genemodel_labels(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Ours with its defaults and the labels, as scANVI has them."""
    return tuned(adata, conditions, label_key=conditions.label_key)


def tuned(
    adata: "AnnData",
    conditions: Conditions,
    *,
    label_key: str | None = None,
    model: "Bundle | None" = None,
    backbone: "Tune" = "frozen",
    **options: Unpack[InputOptions],
) -> np.ndarray:
    """Embed with `genemodel.integrate`, from scratch or from a pre-trained model."""
    from genemodel.inference.obs_keys import INTEGRATED
    from genemodel.integration.integrate import integrate

    if conditions.batch_key is None:
        raise DataError("genemodel.integrate removes a batch effect and needs batch_key")
    copy = adata.copy()
    options.setdefault("missing_labels", conditions.reading.missing_labels)
    integrate(
        copy,
        batch_key=conditions.batch_key,
        label_key=label_key,
        model=model,
        backbone=backbone,
        seed=conditions.seed,
        **options,
    )
    return np.asarray(cast(Any, copy.obsm[INTEGRATED]))
