"""Denoising methods that others published, run on the same molecules as our models.

Each is a function ``(adata, conditions) -> array or CSR (n_cells, n_genes)``. ``adata.X`` holds the
raw training counts; the result is in the same units: the counts that the method believes these
cells would show at this depth without sampling noise.

kNN-smoothing, MAGIC and ALRA are our own short implementations of the published algorithms. In
one thing they are treated alike and more kindly than their own packages do: where an algorithm does
not return to the depth of the input, each cell is scaled back to its own number of molecules.
Without it the Poisson score judges the lost factor and not the denoising.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from genemodel.evaluation.baselines import (
    SCVI_LOGGERS,
    Conditions,
    counts_of,
    highly_variable,
    hushed,
    quiet_training,
)
from genemodel.expression.components import principal_components, singular_vectors
from genemodel.expression.neighbours import nearest
from genemodel.expression.normalise import DEPTH, log_normalised, normalised
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import BLOCK_CELLS

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True)
class Denoised:
    """What an imputation method may return instead of a bare matrix, to be judged on its intervals.

    Attributes
    ----------
    mean
        Denoised counts, (n_cells, n_genes), at the depth of the counts given.
    sd
        Standard deviation of the same rates, without sampling noise.
    """

    mean: np.ndarray | sp.csr_matrix
    sd: np.ndarray | sp.csr_matrix | None = None


def _library(counts: Any) -> np.ndarray:
    return np.asarray(counts.sum(axis=1), dtype=np.float32).reshape(-1, 1)


def _to_library(profile_CG: np.ndarray, library_C1: np.ndarray) -> np.ndarray:
    """Scale each cell to its own number of molecules; a cell without any profile stays zero."""
    total_C1 = profile_CG.sum(axis=1, keepdims=True)
    return profile_CG * (library_C1 / np.where(total_C1 > 0, total_C1, 1.0))


def none(adata: "AnnData", conditions: Conditions) -> sp.csr_matrix:
    """No denoising: the counts themselves."""
    return counts_of(adata)


def gene_mean(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Every cell gets the average profile, scaled to its own number of molecules."""
    counts = counts_of(adata)
    share_G = np.asarray(counts.sum(axis=0)).ravel() / counts.sum()
    return _library(counts) * share_G[None, :].astype(np.float32)


def gene_median(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Every cell gets the median profile (zeros count), scaled to its own number of molecules."""
    counts = counts_of(adata)
    library_C1 = _library(counts)
    shares = sp.csc_matrix(counts.multiply(1.0 / np.maximum(library_C1, 1.0)))
    # a gene seen in at most half of the cells has median zero
    often = np.flatnonzero(np.diff(shares.indptr) * 2 >= adata.n_obs)
    median_G = np.zeros(adata.n_vars, dtype=np.float32)
    median_G[often] = np.median(shares[:, often].toarray(), axis=0)
    return _to_library(np.tile(median_G, (adata.n_obs, 1)), library_C1)


def knn_smoothing(
    adata: "AnnData", conditions: Conditions, *, k: int = 15, n_comps: int = 10
) -> np.ndarray:
    """kNN-smoothing 2 (Wagner, Yan & Yanai 2018), implemented here.

    The counts of a cell and of its k nearest neighbours are added up. Neighbours are found in steps
    of 1, 3, 7, … k, each step on the sums of the step before, after scaling to the median depth,
    the Freeman–Tukey transform √x + √(x + 1) and PCA.
    """
    counts = counts_of(adata)
    k = min(k, adata.n_obs - 1)
    summed = counts
    step = 0
    while True:
        step += 1
        k_now = min(2**step - 1, k)
        nearest_CK = _nearest_cells(_freeman_tukey(summed), k_now, n_comps, conditions.seed)
        n_cells = adata.n_obs
        chosen = sp.csr_matrix(
            (
                np.ones(nearest_CK.size, dtype=np.float32),
                nearest_CK.ravel(),
                np.arange(0, nearest_CK.size + 1, nearest_CK.shape[1]),
            ),
            shape=(n_cells, n_cells),
        )
        summed = sp.csr_matrix(chosen @ counts)
        summed.sort_indices()  # the order of a sum decides its last bit, and that a tie
        if k_now == k:
            return _to_library(summed.toarray(), _library(counts))


def _freeman_tukey(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Give √x + √(x + 1) - 1 at the median depth: the -1 keeps zeros and drops out of the PCA."""
    scaled = normalised(counts, depth=float(np.median(_library(counts))))
    scaled.data = np.sqrt(scaled.data) + np.sqrt(scaled.data + 1.0) - 1.0
    return scaled


def _nearest_cells(data: Any, k: int, n_comps: int, seed: int) -> np.ndarray:
    """Each cell itself, then its k nearest others in the PCA of ``data``: (n_cells, k + 1)."""
    place_CD = principal_components(data, n_comps, seed)
    found_CK, _ = nearest(place_CD, place_CD, k + 1)
    # where several cells lie on one point, a cell may be absent from its own neighbours
    itself_C = np.arange(len(found_CK))
    absent_C = (found_CK != itself_C[:, None]).all(axis=1)
    found_CK[absent_C, -1] = itself_C[absent_C]
    return found_CK


def magic(
    adata: "AnnData",
    conditions: Conditions,
    *,
    knn: int = 5,
    decay: float = 1.0,
    t: int = 3,
    n_comps: int = 100,
    logarithm: bool = False,
) -> np.ndarray:
    """MAGIC (van Dijk et al. 2018); settings of the Open Problems run.

    Implemented here and equal to magic-impute 3.0.0 given the same components (six further
    packages, some without a release in years, would come with it).

    Square roots of depth-normalised counts (`magic_log`: their log1p); a kernel
    exp(-(d / d_knn)^decay) between cells on their PCA, d_knn the distance to the knn-th neighbour,
    cut below 10⁻⁴ and at 3 × knn neighbours, made symmetric; its rows scaled to 1; the data
    multiplied by it t times; transformed back.
    """
    counts = counts_of(adata)
    library_C1 = _library(counts)
    there, back = (np.log1p, np.expm1) if logarithm else (np.sqrt, np.square)
    bent = normalised(counts)
    bent.data = there(bent.data)
    place_CD = principal_components(bent, n_comps, conditions.seed)
    knn = min(knn, adata.n_obs - 1)
    n_near = min(3 * knn, adata.n_obs - 1) + 1  # the cell itself is its own first neighbour
    index_CK, distance_CK = nearest(place_CD, place_CD, n_near)
    width_C1 = np.maximum(distance_CK[:, knn : knn + 1], 1e-12)
    weight_CK = np.exp(-((distance_CK / width_C1) ** decay))
    weight_CK[weight_CK < 1e-4] = 0.0
    kernel = sp.csr_matrix(
        (weight_CK.ravel(), index_CK.ravel(), np.arange(0, index_CK.size + 1, n_near)),
        shape=(adata.n_obs, adata.n_obs),
    )
    kernel = sp.csr_matrix((kernel + kernel.T) / 2)
    step = sp.csr_matrix(kernel.multiply(1.0 / kernel.sum(axis=1))).astype(np.float32)
    smooth_CG = bent.toarray()
    for _ in range(t):
        smooth_CG = step @ smooth_CG
    return _to_library(back(smooth_CG), library_C1)


def magic_log(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """MAGIC on logarithms instead of square roots, which suits the Poisson score better."""
    return magic(adata, conditions, logarithm=True)


def alra(adata: "AnnData", conditions: Conditions, *, max_rank: int = 100) -> np.ndarray:
    """ALRA (Linderman et al. 2022), implemented here.

    Truncated SVD of the log-normalised counts, whose rank is where the gaps between singular values
    rise out of those of the noise; per gene, values not above the size of the most negative ones
    (their 0.1 % quantile) are technical zeros; the rest is scaled to the mean and spread of the
    gene's observed non-zero values; observed values are never set to zero.
    """
    counts = counts_of(adata)
    logged = log_normalised(counts)
    n_values = min(max_rank, min(logged.shape) - 1)
    left, size, right = singular_vectors(logged, n_values, passes=4, seed=conditions.seed)
    rank = _rank_above_noise(size)
    observed_CG = logged.toarray()
    low_CG = ((left[:, :rank] * size[:rank]) @ right[:rank]).astype(np.float32)
    for start in range(0, adata.n_vars, 256):
        genes = slice(start, start + 256)
        low_CG[:, genes] = _alra_genes(low_CG[:, genes], observed_CG[:, genes])
    return _to_library(np.expm1(low_CG), _library(counts))


def _rank_above_noise(size: np.ndarray) -> int:
    """Last gap between singular values that exceeds the noise gaps (the last fifth) by 6 s.d."""
    gap = size[:-1] - size[1:]
    noise = gap[int(0.8 * len(gap)) :]
    if len(noise) < 2:
        return len(size)
    above = np.flatnonzero(gap > noise.mean() + 6 * noise.std(ddof=1))
    return int(above.max()) + 1 if len(above) else 1


def _alra_genes(low_CG: np.ndarray, observed_CG: np.ndarray) -> np.ndarray:
    """Threshold and rescale some genes."""
    cut_G = np.abs(np.quantile(low_CG, 0.001, axis=0))
    kept = low_CG > cut_G
    seen = observed_CG > 0
    mean_low_G, sd_low_G = _moments(low_CG, kept)
    mean_G, sd_G = _moments(observed_CG, seen)
    scale_G = np.where((sd_low_G > 0) & (sd_G > 0), sd_G / np.where(sd_low_G > 0, sd_low_G, 1), 1)
    scaled = np.where(kept, (low_CG - mean_low_G) * scale_G + mean_G, 0.0)
    scaled = np.maximum(scaled, 0.0)
    return np.where((scaled == 0) & seen, observed_CG, scaled).astype(np.float32)


def _moments(values_CG: np.ndarray, where_CG: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per gene of the entries chosen; zero where there is none."""
    n_G = np.maximum(where_CG.sum(axis=0), 1)
    mean_G = (values_CG * where_CG).sum(axis=0) / n_G
    variance_G = (((values_CG - mean_G) ** 2) * where_CG).sum(axis=0) / np.maximum(n_G - 1, 1)
    return mean_G, np.sqrt(variance_G)


def scvi(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Denoise with scVI (Lopez et al. 2018; scvi-tools, its defaults), all genes: rate × depth."""
    import pandas as pd
    import scvi as scvi_tools
    from anndata import AnnData

    counts = counts_of(adata)
    library_C1 = _library(counts)
    kept_C = library_C1.ravel() > 0
    data = AnnData(counts[kept_C])
    data.obs_names = [str(i) for i in range(data.n_obs)]
    batch_key = None
    if conditions.batch_key is not None:
        data.obs["batch"] = pd.Categorical(conditions.batch_of(adata)[kept_C])
        batch_key = "batch"
    with hushed(*SCVI_LOGGERS):
        scvi_tools.settings.seed = conditions.seed
        scvi_tools.model.SCVI.setup_anndata(data, batch_key=batch_key)
        model = scvi_tools.model.SCVI(data)
        model.train(max_epochs=conditions.scvi_epochs, **quiet_training())
    result_CG = np.zeros(counts.shape, dtype=np.float32)
    result_CG[kept_C] = model.get_normalized_expression(library_size=1, return_numpy=True)
    return result_CG * library_C1


def mice(adata: "AnnData", conditions: Conditions, *, n_genes: int = 100) -> np.ndarray:
    """Chained equations in the manner of MICE (van Buuren 2011) on the most variable genes.

    scikit-learn's IterativeImputer, zeros taken for missing values as is usual when it is used on
    single cells, each gene regressed on 20 others, the more correlated the likelier, 5 rounds. All
    other genes keep their counts: regressing every gene on every other does not scale.
    """
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer

    counts = counts_of(adata)
    logged = log_normalised(counts)
    seen_G = logged.getnnz(axis=0) >= 10
    variable_G = highly_variable(logged[:, seen_G], n_genes)
    genes = np.flatnonzero(seen_G)[variable_G]
    if len(genes) < 2:
        return counts.toarray()
    value_CG = logged[:, genes].toarray().astype(np.float64)
    value_CG[value_CG == 0] = np.nan
    imputer = IterativeImputer(
        max_iter=5,
        n_nearest_features=min(20, len(genes) - 1),
        min_value=0.0,
        max_value=float(np.nanmax(value_CG)),
        random_state=conditions.seed,
    )
    filled_CG = np.expm1(imputer.fit_transform(value_CG)) / DEPTH * _library(counts)
    result_CG = counts.toarray()
    result_CG[:, genes] = filled_CG
    return result_CG


def genemodel_log(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Ours, for those who go on with logarithms: what log1p CP10k of a replicate is expected to be.

    The same model as `genemodel`, answering in logarithms, taken back to counts.
    """
    return _expected_logarithm(adata, conditions, None)


def genemodel_log_half(adata: "AnnData", conditions: Conditions) -> np.ndarray:
    """Ours in logarithms, of a replicate of half the depth.

    The shallower the replicate, the lower the expected logarithm of a rare gene, the lower the
    squared error against held-out counts and the higher the Poisson loss: a second point of that
    trade, beside `genemodel_log`.
    """
    return _expected_logarithm(adata, conditions, "0.5x")


def genemodel(adata: "AnnData", conditions: Conditions) -> Denoised:
    """Ours with its defaults: a decoder and a posterior, trained on these molecules."""
    model = _trained(adata, conditions)
    mean_CG = np.empty(adata.shape, dtype=np.float32)
    sd_CG = np.empty_like(mean_CG)
    for rows in _blocks(adata.n_obs):
        posterior = model.posterior(rows)
        mean_CG[rows], sd_CG[rows] = posterior.mean, posterior.sd
    return Denoised(mean_CG, sd_CG)


def _expected_logarithm(
    adata: "AnnData", conditions: Conditions, library: str | None
) -> np.ndarray:
    model = _trained(adata, conditions)
    library_C = model.library_ratio(library) * model.library_C
    logged_CG = np.empty(adata.shape, dtype=np.float32)
    for rows in _blocks(adata.n_obs):
        logged_CG[rows] = model.posterior(rows, library=library).log_mean(library_C[rows])
    return _to_library(np.expm1(logged_CG), _library(counts_of(adata)))


def _blocks(n_cells: int) -> list[slice]:
    return [slice(start, start + BLOCK_CELLS) for start in range(0, n_cells, BLOCK_CELLS)]


def _trained(adata: "AnnData", conditions: Conditions) -> ImputationModel:
    """Our model of these cells; trained once per seed, its time counted for all that take it."""
    key = f"genemodel imputation, seed {conditions.seed}"
    if key in conditions.shared:
        model, seconds = conditions.shared[key]
        conditions.borrowed_seconds += seconds
        return model
    start = time.perf_counter()
    codes_C, names = None, np.empty(0, dtype=object)
    if conditions.batch_key is not None:
        names, codes_C = np.unique(conditions.batch_of(adata).astype(str), return_inverse=True)
    model = ImputationModel.train(
        counts_of(adata), codes_C, tuple(map(str, names)), seed=conditions.seed
    )
    conditions.shared[key] = (model, time.perf_counter() - start)
    return model
