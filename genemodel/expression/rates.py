"""Vectors of cells and genes → shares of a cell's molecules → mean counts at a library.

What all decoders of counts end in: a share is the softmax of logits over the genes that were
measured, a mean is a share of a library. What stands before the logits (projections, offsets of a
batch) is a decoder's own, and so is the likelihood behind the means.

Axes: C cells, D width, G genes.
"""

import torch
from torch import Tensor

# Logarithm of the share of a gene that was not measured: finite, so that its gradient is nothing
# and not NaN; of a million molecules less than 10⁻²⁰ of one.
UNMEASURED = -60.0


def logits(vector_CD: Tensor, gene_GD: Tensor, bias: Tensor) -> Tensor:
    """How much of every gene a vector asks for, and its bias: of genes, (G,), or cells, (C, G).

    In single precision or better: a sum over thousands of genes is to come. Where a bias is of
    genes alone, ``torch.addmm`` gives the same in one pass, but for the last bit of wide vectors.
    """
    logit_CG = vector_CD @ gene_GD.T
    return logit_CG.to(torch.promote_types(logit_CG.dtype, torch.float32)) + bias


def log_shares(logit_CG: Tensor, measured_CG: Tensor | None = None) -> Tensor:
    """Log share of every gene in a cell's molecules, those of the measured genes alone."""
    if measured_CG is not None:
        logit_CG = logit_CG.masked_fill(~measured_CG, UNMEASURED)
    return logit_CG.log_softmax(-1)


def at_library(log_share_CG: Tensor, library_C: Tensor) -> Tensor:
    """Log mean of every count of cells that have so many molecules."""
    return log_share_CG + library_C.log()[:, None]
