"""How probable counts are: negative binomial, multinomial and Poisson, in nats.

All of them are dominated by zeros, and their log-gamma terms vanish there: the costly functions are
evaluated at the stored counts only.

Axes: C cells, G genes, D latent dimensions, N stored counts.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    Floats = NDArray[np.floating]


def negative_binomial_loss(
    log_mean_CG: Tensor,
    log_theta_G: Tensor,
    row_N: Tensor,
    gene_N: Tensor,
    count_N: Tensor,
    *,
    measured_CG: Tensor | None = None,
    complete: bool = False,
) -> Tensor:
    """Negative log-likelihood of stored counts, summed over cells and genes.

    Parameters
    ----------
    log_mean_CG
        Log of the mean μ, library included; where a gene was not measured, anything finite.
    log_theta_G
        Log of the size θ of each gene: variance = μ + μ² ÷ θ.
    row_N, gene_N, count_N
        Place and value of the counts that are not zero; one that is stored as zero adds nothing.
    measured_CG
        Genes that count; all by default.
    complete
        Add log Γ(x + 1), which no parameter enters, so that values can be compared with others'.

    Returns
    -------
    Tensor
        Scalar.
    """
    # A zero costs θ·log(1 + μ/θ); a count x adds the difference to it:
    # x·log((μ+θ)/μ) − log Γ(x+θ) + log Γ(θ) + log Γ(x+1), with θ·log((μ+θ)/θ) already paid.
    zero_CG = log_theta_G.exp() * functional.softplus(log_mean_CG - log_theta_G)
    # Flat, because the backward of an index on two axes queues up on a GPU.
    at_N = row_N * log_mean_CG.shape[1] + gene_N
    log_mean_N = log_mean_CG.flatten().index_select(0, at_N)
    log_theta_N = log_theta_G.index_select(0, gene_N)
    theta_N = log_theta_N.exp()
    log_sum_N = log_theta_N + functional.softplus(log_mean_N - log_theta_N)  # log(μ + θ)
    stored_N = (
        count_N * (log_sum_N - log_mean_N) - torch.lgamma(count_N + theta_N) + torch.lgamma(theta_N)
    )
    if complete:
        stored_N = stored_N + torch.lgamma(count_N + 1)
    if measured_CG is not None:
        zero_CG = zero_CG * measured_CG
        stored_N = stored_N * measured_CG.flatten().index_select(0, at_N)
    return zero_CG.sum() + stored_N.sum()


def negative_binomial_by_gene(
    count_CG: sp.csr_matrix, mean_CG: "Floats", shape_CG: ArrayLike
) -> NDArray[np.float64]:
    """Log-likelihood per gene, summed over cells, complete.

    scipy.stats.nbinom gives the same and evaluates every zero: some thirty times slower.

    Parameters
    ----------
    count_CG
        Counts, CSR (C, G).
    mean_CG
        Means, (C, G), positive.
    shape_CG
        Shapes (inverse dispersions), broadcastable to (C, G).

    Returns
    -------
    numpy.ndarray
        (G,).
    """
    shape_CG = np.broadcast_to(np.asarray(shape_CG), mean_CG.shape)
    total_G = -(shape_CG * np.log1p(mean_CG / shape_CG)).sum(axis=0, dtype=np.float64)
    entries = count_CG.tocoo()
    count_N = entries.data.astype(np.float64)
    shape_N = shape_CG[entries.row, entries.col].astype(np.float64)
    mean_N = mean_CG[entries.row, entries.col].astype(np.float64)
    extra_N = (
        gammaln(shape_N + count_N)
        - gammaln(shape_N)
        - gammaln(count_N + 1.0)
        + count_N * np.log(mean_N / (shape_N + mean_N))
    )
    return total_G + np.bincount(entries.col, extra_N, minlength=mean_CG.shape[1])


class MultinomialLoss(torch.autograd.Function):
    """Negative log-likelihood of sparse counts under a softmax over genes, summed over molecules.

    Dense work is one matrix product and one exponential; the gradient with respect to the logits
    is formed in the same buffer, so a batch needs a single (C, G) array.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent_CD: Tensor,
        gene_GD: Tensor,
        bias_G: Tensor,
        row_N: Tensor,
        column_N: Tensor,
        count_N: Tensor,
        library_C: Tensor,
    ) -> Tensor:
        """Score stored entries (row, column, count) under the softmax of the logits."""
        # In half precision a sum over thousands of genes would lose the molecules.
        with torch.autocast(latent_CD.device.type, enabled=False):
            if latent_CD.dtype != gene_GD.dtype:
                latent_CD = latent_CD.to(gene_GD.dtype)
            logit_CG = torch.addmm(bias_G, latent_CD, gene_GD.t())
            partition_C = torch.logsumexp(logit_CG, 1)
            at_N = row_N * logit_CG.shape[1] + column_N
            loss = library_C @ partition_C - count_N @ logit_CG.view(-1)[at_N]
            grad_CG = logit_CG.sub_(partition_C[:, None]).exp_().mul_(library_C[:, None])
            # A stored entry may be there twice, once as nothing.
            grad_CG.view(-1).index_add_(0, at_N, count_N, alpha=-1.0)
        ctx.save_for_backward(grad_CG, latent_CD, gene_GD)
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        """Pass the kept gradient on to latent vectors, gene vectors and biases."""
        grad_CG, latent_CD, gene_GD = ctx.saved_tensors
        return (
            grad_loss * (grad_CG @ gene_GD),
            grad_loss * (grad_CG.t() @ latent_CD),
            grad_loss * grad_CG.sum(0),
            None,
            None,
            None,
            None,
        )


def poisson_losses(count_CG: "Floats", rate_CG: "Floats", *, floor: float) -> tuple[float, float]:
    r"""Sum the Poisson loss and the Poisson deviance over all entries.

    Parameters
    ----------
    count_CG, rate_CG
        Counts, and the rates that they are judged against.
    floor
        Added to a rate before its logarithm is taken, so that a count where the rate is zero costs
        much and not everything.

    Returns
    -------
    tuple of float
        :math:`\sum (r - y \log(r + f))`, the loss without the terms of the counts alone; and
        :math:`2 \sum (y \log\frac{y}{r + f} - y + r)`, the deviance.
    """
    there = count_CG > 0
    count_N = count_CG[there]
    gain = float((count_N * np.log(rate_CG[there] + floor)).sum())
    saturated = float((count_N * (np.log(count_N) - 1.0)).sum())
    loss = float(rate_CG.sum()) - gain
    return loss, 2.0 * (loss + saturated)
