"""Which tokens are hidden: randomness with an address, on the device, in constant shapes.

A token's number depends on (seed, purpose, epoch, cell, gene) and on nothing else, so packing,
batch size, world size and a restart cannot change what is hidden.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from genemodel.genes.vocabulary import MASK, N_SPECIAL
from genemodel.model.gene_model import HIDDEN_VALUE


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele et al. 2014); int64 products wrap, shifts are made logical."""
    x = x + _GOLDEN
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _MIX_1
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _MIX_2
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def uniform(seed: int, purpose: int, epoch: int, *address: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) that depend on their address only.

    Parameters
    ----------
    seed, purpose, epoch
        Address parts shared by all.
    address
        int64 tensors that broadcast; one number comes back for each element.
    """
    return uniform_at(key_of(seed, purpose, epoch, address[0].device), *address)


def key_of(seed: int, purpose: int, epoch: int, device: torch.device) -> Tensor:
    """Make the shared part of an address, filled in on the device: nothing is copied to it."""
    key = _signed((seed * 1_000_003 + purpose * 8_191 + epoch) & (2**64 - 1))
    return torch.full((), key, dtype=torch.int64, device=device)


def uniform_at(key: Tensor, *address: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) at addresses below a :func:`key_of`."""
    x = _mix(key)
    for part in address:
        x = _mix(x ^ _mix(part))
    return ((x >> 40) & ((1 << 24) - 1)).float() / (1 << 24)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Positions hidden for one objective, padded to a constant number.

    ``index_M`` are positions in T; where ``real_M`` is False the entry is padding.
    """

    index_M: Tensor
    real_M: Tensor

    @property
    def n(self) -> Tensor:
        """How many are real."""
        return self.real_M.sum()


@dataclass(frozen=True, slots=True)
class Hidden:
    """Tokens hidden for one objective: what the model made of them, and what they were.

    ``real_M`` as in :class:`Chosen`.
    """

    hidden_MD: Tensor
    gene_M: Tensor
    species_M: Tensor
    value_M: Tensor
    real_M: Tensor


def choose(uniform_T: Tensor, eligible_T: Tensor, low: float, high: float) -> Chosen:
    """Choose eligible tokens whose number lies in [low, high), in packing order.

    The number of places is fixed by T and the share: a quarter above the expectation, and where
    chance asks for more the surplus stays visible.
    """
    n_tokens = uniform_T.shape[0]
    places = min(n_tokens, int(n_tokens * (high - low) * 1.25) + 16)
    chosen_T = eligible_T & (uniform_T >= low) & (uniform_T < high)
    order_T = torch.sort(chosen_T.to(torch.uint8), descending=True, stable=True).indices
    index_M = order_T[:places]
    return Chosen(index_M, chosen_T[index_M])


def eligible(gene_T: Tensor, first_gene: int = N_SPECIAL) -> Tensor:
    """Genes of real cells: not special tokens, not the dummy tail; shape (T,), bool.

    ``first_gene`` is the lowest token of a gene: a hosted Geneformer V2 closes cells with a token.
    """
    return gene_T >= first_gene


def hide(
    gene_T: Tensor, value_T: Tensor, genes: Chosen | None, values: Chosen | None
) -> tuple[Tensor, Tensor]:
    """Replace chosen identities by ``MASK`` and chosen values by the hidden-value sign."""
    if genes is not None:
        keep_M = gene_T[genes.index_M]
        gene_T = gene_T.index_copy(
            0, genes.index_M, torch.where(genes.real_M, torch.full_like(keep_M, MASK), keep_M)
        )
    if values is not None:
        keep_M = value_T[values.index_M]
        value_T = value_T.index_copy(
            0,
            values.index_M,
            torch.where(values.real_M, torch.full_like(keep_M, HIDDEN_VALUE), keep_M),
        )
    return gene_T, value_T
