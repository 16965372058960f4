"""Gamma posterior of expression rates, its calibration, its check, and Rubin's rules.

A decoder's answer is a prior; a cell's own counts are evidence; the posterior is closed. How far
rates stray from the decoder is learned from molecules that neither trained it nor entered as
evidence. No network here: any prior mean will do.

Axes: C cells, G genes, M posterior draws, Q quantile levels, K grid points, N stored (non-zero)
entries. A rate is in counts at the cell's own library unless an exposure says otherwise.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numba
import numpy as np
import scipy.sparse as sp
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaincinv
from scipy.stats import nbinom

from genemodel.errors import DataError
from genemodel.expression.likelihood import negative_binomial_by_gene
from genemodel.expression.normalise import depth_factor

Floats = NDArray[np.floating]
DISPERSION_SHAPES_K: NDArray[np.float64] = np.geomspace(0.05, 2000.0, 20)
_SMALLEST_MEAN = 1e-12


@numba.njit(nogil=True, cache=True)
def _expected_log1p(
    shape_CG: NDArray[np.float64],
    rate_CG: NDArray[np.float64],
    scale_C: NDArray[np.float64],
    out_CG: NDArray[np.float64],
) -> None:
    n_cells, n_genes = shape_CG.shape
    for cell in range(n_cells):
        scale = scale_C[cell]
        for gene in range(n_genes):
            shape, rate = shape_CG[cell, gene], rate_CG[cell, gene]
            mean = shape / rate
            if not mean < 50.0:
                # Second order around the mean; NaN stays NaN.
                curve = scale / (1.0 + scale * mean)
                variance = mean + mean * mean / shape
                out_CG[cell, gene] = np.log1p(scale * mean) - 0.5 * curve * curve * variance
                continue
            probability = math.exp(-shape * math.log1p(1.0 / rate))
            left, left_mean, total = 1.0 - probability, mean, 0.0
            count = 0
            while left > 1e-7 and count < 400:
                count += 1
                probability *= (shape + count - 1.0) / (count * (1.0 + rate))
                left -= probability
                left_mean -= count * probability
                total += probability * math.log1p(scale * count)
            if left > 1e-7 and left_mean > 0.0:
                total += left * math.log1p(scale * left_mean / left)
            out_CG[cell, gene] = total


def expected_log1p(
    shape_CG: NDArray[np.float64], rate_CG: NDArray[np.float64], scale_C: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean of log(1 + scale · y) over new counts y of cells whose rates are Gamma distributed.

    Summed over the negative binomial of y; above a mean of 50 to second order around it.

    Parameters
    ----------
    shape_CG, rate_CG
        Gamma parameters of the rates, (C, G).
    scale_C
        Factor of every cell, such as 10,000 ÷ library.

    Returns
    -------
    numpy.ndarray
        (C, G); NaN where the rate is.
    """
    out_CG = np.empty(np.shape(shape_CG))
    _expected_log1p(
        np.ascontiguousarray(shape_CG, dtype=np.float64),
        np.ascontiguousarray(rate_CG, dtype=np.float64),
        np.ascontiguousarray(scale_C, dtype=np.float64),
        out_CG,
    )
    return out_CG


def calibrate_dispersion(
    prior_mean: Floats | Callable[[slice], Floats],
    count_CG: sp.csr_matrix,
    held_CG: sp.csr_matrix,
    exposure_ratio: float,
    *,
    shapes_K: NDArray[np.float64] = DISPERSION_SHAPES_K,
    n_bins: int = 10,
    n_iterations: int = 200,
    block: int = 256,
) -> NDArray[np.float64]:
    """Dispersion of the prior per gene, by the predictive likelihood of held-out molecules.

    For every shape of a grid the posterior given ``count_CG`` predicts ``held_CG``; the resulting
    (K, G) likelihood is combined with a non-parametric prior over the grid, learned by EM within
    bins of expression, so that a gene with few molecules borrows from genes like it. Because the
    decoder has seen ``count_CG`` already, this measures what those counts still add, and so
    corrects for their being used twice.

    Parameters
    ----------
    prior_mean
        Decoder's mean at the exposure of ``count_CG``, positive, (C, G); or a function that gives
        it for a slice of cells, so that it never exists whole.
    count_CG, held_CG
        Evidence, and molecules unseen by the decoder and by the evidence; CSR (C, G).
    exposure_ratio
        Exposure of ``held_CG`` over that of ``count_CG``, e.g. 1/9.
    shapes_K
        Candidate shapes (inverse dispersions).
    n_bins, n_iterations, block
        Bins of total expression, EM steps, cells at a time.

    Returns
    -------
    numpy.ndarray
        Dispersion (G,): posterior geometric mean of 1 / shape.
    """
    n_genes = count_CG.shape[1]
    n_bins = min(n_bins, n_genes)
    score_KG = np.zeros((len(shapes_K), n_genes))
    for start in range(0, count_CG.shape[0], block):
        cells = slice(start, start + block)
        seen_CG = count_CG[cells].toarray()
        prior_CG = prior_mean(cells) if callable(prior_mean) else prior_mean[cells]
        for k, shape in enumerate(shapes_K.tolist()):
            mean_CG, shape_CG = _posterior_mean(prior_CG, seen_CG, shape)
            score_KG[k] += negative_binomial_by_gene(
                held_CG[cells], exposure_ratio * mean_CG, shape_CG
            )
    total_G = np.asarray(count_CG.sum(axis=0)).ravel()
    bin_G = np.argsort(np.argsort(total_G, kind="stable"), kind="stable") * n_bins // n_genes
    likelihood_KG = np.exp(score_KG - score_KG.max(axis=0))
    log_shape_G = np.empty(n_genes)
    for b in range(n_bins):
        member_KG = likelihood_KG[:, bin_G == b]
        weight_K = np.full(len(shapes_K), 1.0 / len(shapes_K))
        for _ in range(n_iterations):
            share_KG = member_KG * weight_K[:, None]
            share_KG /= share_KG.sum(axis=0)
            weight_K = share_KG.mean(axis=1) + 1e-6
            weight_K /= weight_K.sum()
        log_shape_G[bin_G == b] = np.log(shapes_K) @ share_KG
    return np.exp(-log_shape_G)


def _posterior_mean(prior_mean_CG: Floats, count_CG: Floats, shape: float) -> tuple[Floats, Floats]:
    """Posterior mean and shape at unit exposure."""
    shape_CG = count_CG + shape
    return prior_mean_CG * shape_CG / (prior_mean_CG + shape), shape_CG


def posterior_gamma(
    count_CG: Floats,
    prior_mean_CG: Floats,
    prior_dispersion_G: Floats,
    exposure_CG: ArrayLike = 1.0,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shape and rate of the Gamma posterior of every (cell, gene) rate.

    Parameters
    ----------
    count_CG
        Observed counts.
    prior_mean_CG
        Decoder's mean at the cell's library.
    prior_dispersion_G
        Prior variance over squared prior mean.
    exposure_CG
        Broadcastable to (C, G): one where the gene was measured, zero where it was not (the
        answer is then the prior: prediction from the decoder only).

    Returns
    -------
    tuple of numpy.ndarray
        ``shape_CG = 1/dispersion + count`` and ``rate_CG = 1/(dispersion * mean) + exposure``.
    """
    prior_shape_G = 1.0 / np.asarray(prior_dispersion_G, dtype=np.float64)
    exposure_CG = np.broadcast_to(np.asarray(exposure_CG, dtype=np.float64), prior_mean_CG.shape)
    return (
        prior_shape_G + np.where(exposure_CG > 0, count_CG, 0.0),
        prior_shape_G / np.maximum(prior_mean_CG, _SMALLEST_MEAN) + exposure_CG,
    )


def posterior_draws(
    shape_CG: Floats,
    rate_CG: Floats,
    n_draws: int,
    generator: np.random.Generator,
) -> NDArray[np.float32]:
    """Multiple imputations: independent draws from the posterior, (M, C, G) float32.

    Parameters
    ----------
    shape_CG, rate_CG
        From ``posterior_gamma``.
    n_draws
        M.
    generator
        Source of randomness.
    """
    draw_MCG = np.empty((n_draws, *shape_CG.shape), dtype=np.float32)
    for m in range(n_draws):
        draw_MCG[m] = generator.standard_gamma(shape_CG) / rate_CG
    return draw_MCG


def rate_quantiles(shape_CG: Floats, rate_CG: Floats, level_Q: ArrayLike) -> NDArray[np.float64]:
    """Quantiles of the rate itself (credible interval), (Q, C, G)."""
    level_Q11 = np.asarray(level_Q, dtype=np.float64).reshape(-1, 1, 1)
    return gammaincinv(shape_CG, level_Q11) / rate_CG


@dataclass(frozen=True, slots=True, repr=False)
class GammaPosterior:
    """Gamma distributions of the rates of some cells and genes.

    Attributes
    ----------
    shape_CG, rate_CG
        Parameters, float64 (C, G). The rate is NaN where a cell without counts was asked for at
        another library than its own.
    """

    shape_CG: NDArray[np.float64]
    rate_CG: NDArray[np.float64]

    def __repr__(self) -> str:
        return f"GammaPosterior({' cells × '.join(f'{n:,}' for n in self.shape_CG.shape)} genes)"

    @property
    def mean(self) -> NDArray[np.float64]:
        """Posterior mean, (C, G)."""
        return self.shape_CG / self.rate_CG

    @property
    def sd(self) -> NDArray[np.float64]:
        """Posterior standard deviation of the rate (not of a new count), (C, G)."""
        return np.sqrt(self.shape_CG) / self.rate_CG

    def log_mean(self, library_C: NDArray[np.floating]) -> NDArray[np.float64]:
        """Give the expected log1p CP10k of another measurement of the same cells, (C, G).

        Parameters
        ----------
        library_C
            Counts of that measurement per cell, to which the rates belong.
        """
        # Below one count the logarithm of a share would be of the library and not of the cell.
        scale_C = depth_factor(np.maximum(library_C, 1.0).astype(np.float64))
        return expected_log1p(self.shape_CG, self.rate_CG, scale_C)

    def quantiles(self, levels: Sequence[float]) -> NDArray[np.float64]:
        """Quantiles of the rate, (Q, C, G)."""
        return rate_quantiles(self.shape_CG, self.rate_CG, levels)

    def draws(self, n: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Draw rates independently, (M, C, G) float32."""
        return posterior_draws(self.shape_CG, self.rate_CG, n, generator)


def randomised_pit(
    held_CG: Floats,
    shape_CG: Floats,
    rate_CG: Floats,
    exposure: float,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Randomised probability integral transform of held-out counts, (C, G) in [0, 1].

    ``u = F(y - 1) + v * P(y)`` with ``v`` uniform. If and only if the predictive distribution is
    right, ``u`` is uniform, whatever the discreteness; hence ``0.05 <= u <= 0.95`` is a 90 %
    interval whose boundary counts belong to it with the probability that makes it exact.
    """
    success_CG = rate_CG / (rate_CG + exposure)
    uniform_CG = generator.random(held_CG.shape)
    pit_CG = uniform_CG * np.exp(shape_CG * np.log(success_CG))  # y = 0: no mass below
    row_N, column_N = np.nonzero(held_CG)
    held_N, shape_N = held_CG[row_N, column_N], shape_CG[row_N, column_N]
    success_N = success_CG[row_N, column_N]
    below_N = nbinom.cdf(held_N - 1, shape_N, success_N)
    mass_N = nbinom.pmf(held_N, shape_N, success_N)
    pit_CG[row_N, column_N] = below_N + uniform_CG[row_N, column_N] * mass_N
    return pit_CG


def tally_coverage(
    pit_CG: Floats, group_CG: NDArray[np.integer], n_groups: int, level: float = 0.9
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Entries inside the randomised central interval, and all entries, per group.

    Parameters
    ----------
    pit_CG
        From :func:`randomised_pit`.
    group_CG, n_groups
        Group of every entry, 0..n_groups-1, broadcastable to (C, G), e.g. the gene's decile.
    level
        Nominal coverage.

    Returns
    -------
    tuple of numpy.ndarray
        Two arrays (n_groups,) that add up over blocks of cells; their ratio is the coverage.
    """
    tail = (1.0 - level) / 2.0
    inside_CG = (pit_CG >= tail) & (pit_CG <= 1.0 - tail)
    group_N = np.broadcast_to(group_CG, pit_CG.shape).ravel()
    total = np.bincount(group_N, minlength=n_groups).astype(np.float64)
    hits = np.bincount(group_N, weights=inside_CG.ravel(), minlength=n_groups)
    return hits, total


def rubin_pool(
    estimates_MG: Floats, variances_MG: Floats, complete_df: float = math.inf
) -> tuple[Floats, Floats, Floats, Floats]:
    """Pool a per-gene statistic over M imputations by Rubin's rules.

    Parameters
    ----------
    estimates_MG
        The statistic in every imputed data set, (M, G), M >= 2.
    variances_MG
        Its squared standard error in every imputed data set.
    complete_df
        Degrees of freedom the analysis would have without missing data; finite values apply the
        small-sample adjustment of Barnard and Rubin (1999).

    Returns
    -------
    tuple of numpy.ndarray
        Pooled estimate, total variance, degrees of freedom, fraction of missing information; (G,).

    Raises
    ------
    DataError
        If M < 2 or the shapes differ.

    Notes
    -----
    Rubin (1987), chapter 3: total = within + (1 + 1/M) between; degrees of freedom
    ``(M - 1) / lambda**2`` with ``lambda`` the share of the total that the between part makes up.
    """
    estimates_MG = np.asarray(estimates_MG, dtype=np.float64)
    variances_MG = np.asarray(variances_MG, dtype=np.float64)
    n_draws = estimates_MG.shape[0] if estimates_MG.ndim else 0
    if n_draws < 2 or estimates_MG.shape != variances_MG.shape:
        raise DataError(
            f"rubin_pool: estimates have shape {estimates_MG.shape}, variances "
            f"{variances_MG.shape}; both must be (M, genes) with at least two imputations M. Ask "
            "impute for draws=5 or more."
        )
    within_G = variances_MG.mean(axis=0)
    between_G = (1.0 + 1.0 / n_draws) * estimates_MG.var(axis=0, ddof=1)
    total_G = within_G + between_G
    share_G = np.divide(between_G, total_G, out=np.zeros_like(total_G), where=total_G > 0)
    with np.errstate(divide="ignore"):
        df_G = (n_draws - 1) / share_G**2
    if math.isfinite(complete_df):
        observed_G = (complete_df + 1) / (complete_df + 3) * complete_df * (1.0 - share_G)
        with np.errstate(divide="ignore"):
            df_G = 1.0 / (1.0 / df_G + 1.0 / observed_G)
    increase_G = np.divide(
        between_G, within_G, out=np.full_like(total_G, np.inf), where=within_G > 0
    )
    missing_G = np.where(
        np.isinf(increase_G), 1.0, (increase_G + 2.0 / (df_G + 3.0)) / (increase_G + 1.0)
    )
    missing_G = np.where(between_G == 0, 0.0, missing_G)
    return estimates_MG.mean(axis=0), total_G, df_G, missing_G
