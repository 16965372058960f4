"""Where a decoder starts: at gene vectors, or as the count decoder of a pre-trained model.

Axes: G genes decoded, V genes of the cells, D latent dimensions, E width of a gene vector, F width
of a cell vector, K components, N neighbours, S sampled cells.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor

from genemodel.bundle.bundle import Bundle
from genemodel.expression.components import principal_components
from genemodel.expression.neighbours import nearest_others
from genemodel.expression.normalise import log_normalised
from genemodel.imputation.network import BLOCK_CELLS, ImputationHead, SparseCountEncoder
from genemodel.imputation.posterior import Floats

logger = logging.getLogger(__name__)

# The plain predictor: few neighbours, because few cells have few like them.
_NEIGHBOURS, _COMPONENTS = 10, 20


@dataclass(frozen=True)
class Shown:
    """Some cells: what was shown and set aside of them, and vectors of what was shown.

    Attributes
    ----------
    vector_SF
        Cell vectors of a pre-trained model.
    seen_SG, held_SG
        Counts, CSR.
    """

    vector_SF: Tensor
    seen_SG: sp.csr_matrix
    held_SG: sp.csr_matrix


def pretrained_vectors(bundle: Bundle) -> NDArray[np.float32]:
    """Gene vectors of a pre-trained model by token, (V, E).

    Those of the count decoder where the model has one, because they say what ours are to say.
    """
    weight_VE = bundle.heads.get("decode_counts.gene.weight", bundle.model.embedding.token.weight)
    return np.asarray(weight_VE.detach().float().cpu().numpy(), np.float32)


@torch.no_grad()
def start_at_vectors(encoder: SparseCountEncoder, head: ImputationHead, vectors_GE: Floats) -> None:
    """Start genes at the principal components of pre-trained vectors, as large as otherwise.

    Genes whose row is NaN start at random, and so do columns beyond the components.
    """
    vectors = torch.as_tensor(vectors_GE, dtype=torch.float32)
    known_G = torch.isfinite(vectors).all(1)
    if int(known_G.sum()) < 2:
        return
    centred_GE = vectors[known_G] - vectors[known_G].mean(0)
    left_GE, size_E, _ = torch.linalg.svd(centred_GE, full_matrices=False)
    score_GE = left_GE * size_E
    for target in (encoder.input_GH, head.gene_GD):
        k = min(score_GE.shape[1], target.shape[1])
        chosen_GE = score_GE[:, :k]
        target[known_G, :k] = chosen_GE / chosen_GE.std().clamp_min(1e-12) * target.std()


@torch.no_grad()
def start_at_decoder(
    head: ImputationHead, gene_VF: Tensor, gene_G: NDArray[np.integer], cells: Shown
) -> None:
    """Start as the count decoder of a pre-trained model, with a factor a gene of the cells at hand.

    Parameters
    ----------
    head
        As wide as the model's cell vectors.
    gene_VF
        Gene vectors of the model's decoder, by token; genes behind them are unknown to it and start
        without a direction.
    gene_G
        Genes decoded, by their place among those of the cells: tokens first.
    cells
        They settle the factors.
    """
    place_G = torch.from_numpy(np.asarray(gene_G, np.int64))
    known_G = place_G < len(gene_VF)
    head.gene_GD.zero_()
    head.gene_GD[known_G] = gene_VF[place_G[known_G]].to(head.gene_GD)
    settle_factors(head, cells.vector_SF, cells.seen_SG)


# Of what neighbours tell beyond the average cell. On 200 cells, where the start gained, the decoder
# told .78 and .85 of it (Kang); where it lost, .36 and .39 (bone marrow, a tissue not seen before).
_TOLD = 0.6


@torch.no_grad()
def knows(head: ImputationHead, cells: Shown) -> bool:
    """Whether a decoder tells about as much of what was set aside as the neighbours of a cell do.

    Of a model that does not know the tissue it is a worse start than none.
    """
    average, told = average_nats(cells), decoder_nats(head, cells.vector_SF, cells.held_SG)
    by_neighbours = neighbour_nats(cells)
    enough = average - told > _TOLD * max(average - by_neighbours, 0.0)
    logger.info(
        "molecules set aside cost %.3f nats each by the average cell, %.3f by neighbours, %.3f by "
        "the model's count decoder: the training starts %s.",
        average, by_neighbours, told, "as that decoder" if enough else "anew",
    )  # fmt: skip
    return enough


def decoder_nats(head: ImputationHead, latent_SD: Tensor, held_SG: sp.csr_matrix) -> float:
    """Negative log-likelihood per molecule set aside; NaN where none was."""
    total = 0.0
    for rows, share_CG in log_shares(head, latent_SD):
        part = held_SG[rows].tocoo()
        total -= float((share_CG[part.row, part.col].double().numpy() * part.data).sum())
    return total / float(held_SG.sum()) if held_SG.nnz else float("nan")


def average_nats(cells: Shown) -> float:
    """As :func:`decoder_nats`, told by the average of what was seen."""
    share_G = np.asarray(cells.seen_SG.sum(0), np.float64).ravel() + 1e-9
    held_G = np.asarray(cells.held_SG.sum(0)).ravel()
    return float(-(held_G @ np.log(share_G / share_G.sum())) / max(held_G.sum(), 1.0))


def neighbour_nats(cells: Shown) -> float:
    """As :func:`decoder_nats`, told by what was seen in a cell and its neighbours together.

    The average cell is added once, so that nothing is impossible.
    """
    seen_SG, held_SG = cells.seen_SG, cells.held_SG
    place_SK = principal_components(log_normalised(seen_SG), _COMPONENTS, 0)
    near_SN = nearest_others(place_SK, min(_NEIGHBOURS, len(place_SK) - 1))[0]
    mean_1G = np.asarray(seen_SG.mean(0), np.float64).reshape(1, -1) + 1e-9
    total = 0.0
    for start in range(0, len(near_SN), BLOCK_CELLS):
        rows = slice(start, start + BLOCK_CELLS)
        near_CN = near_SN[rows]
        pooled_CG = seen_SG[rows] + sum(seen_SG[near_C] for near_C in near_CN.T)
        told_CG = pooled_CG.toarray() + mean_1G
        part = held_SG[rows].tocoo()
        share_N = told_CG[part.row, part.col] / told_CG.sum(1)[part.row]
        total -= float((np.log(share_N) * part.data).sum())
    return total / float(held_SG.sum()) if held_SG.nnz else float("nan")


# The factors shift the softmax that they were computed with: after two rounds by less than 1 %.
_ROUNDS = 2


@torch.no_grad()
def settle_factors(head: ImputationHead, latent_SD: Tensor, seen_SG: sp.csr_matrix) -> None:
    """Multiply every gene of a decoder by how much more of it these cells hold than it expects.

    The factor is Gamma distributed around 1 with a variance that the genes share, estimated by
    moments, and worth one molecule at least: a gene of a few stays near where the decoder has it.
    """
    library_S1 = torch.from_numpy(np.asarray(seen_SG.sum(1), np.float32))
    found_G = torch.from_numpy(np.asarray(seen_SG.sum(0), np.float64).ravel())
    for _ in range(_ROUNDS):
        expected_G = torch.zeros_like(found_G)
        for rows, share_CG in log_shares(head, latent_SD):
            expected_G += (share_CG.exp() * library_S1[rows]).sum(0).double()
        expected_G.clamp_min_(1e-9)
        # Of rare genes one molecule would be a large factor: they weigh as little as they tell.
        weight_G = (1.0 + expected_G) ** -2
        excess = (weight_G * ((found_G - expected_G) ** 2 - expected_G)).sum()
        if excess <= 0:  # no more than chance
            return
        prior = max(1.0, float((weight_G * expected_G**2).sum() / excess))
        head.bias_G.add_(((found_G + prior) / (expected_G + prior)).log().float())


def log_shares(head: ImputationHead, latent_SD: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Log shares of blocks of cells, of unknown batch."""
    for start in range(0, len(latent_SD), BLOCK_CELLS):
        rows = slice(start, start + BLOCK_CELLS)
        unknown_C = torch.full((len(latent_SD[rows]),), -1)
        yield rows, head.log_fraction(latent_SD[rows], unknown_C)
