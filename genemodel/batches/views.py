"""Which molecules of a cell an encoder is shown, and which are left to be explained.

Every molecule is kept with a probability, whatever the others do. Its randomness has an address,
(seed, purpose, epoch, cell, gene), so that packing, ranks and a restart change nothing.

Axes: C cells, N stored genes of the cells end to end.
"""

import math
from dataclasses import dataclass

import numpy as np
from numba import njit

# Purposes of randomness; part of every address, so streams never coincide.
_ASIDE, _SHARE, _THIN = 11, 12, 13
# With more trials a binomial is drawn as the normal of its mean and variance: of 200 molecules the
# error is below a tenth of a standard deviation, and read counts reach 1e6.
_MOST_TRIALS = 200


@dataclass(frozen=True)
class View:
    """How molecules are shared out.

    Attributes
    ----------
    seed
        Address of all randomness.
    low, high
        The share of a cell's molecules that is shown is uniform between them, anew in every epoch.
    aside
        Share of the molecules that is set aside for good: the same ones in every epoch.
    judged
        False: those set aside are as if they were not there. True: they are what is to be
        explained, and all others are shown.
    """

    seed: int
    low: float = 1.0
    high: float = 1.0
    aside: float = 0.0
    judged: bool = False

    def apply(
        self,
        begin_C: np.ndarray,
        end_C: np.ndarray,
        gene_N: np.ndarray,
        count_N: np.ndarray,
        cell_C: np.ndarray,
        epoch: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Share out the molecules of some cells.

        Parameters
        ----------
        begin_C, end_C
            Where each cell's genes lie in ``gene_N`` and ``count_N``.
        cell_C
            Permanent numbers of the cells.
        epoch
            Of the data.

        Returns
        -------
        tuple
            Counts that are there and counts that are shown, float32, cell after cell.
        """
        begin_C, end_C = np.asarray(begin_C, np.int64), np.asarray(end_C, np.int64)
        cell_C = np.asarray(cell_C, np.int64)
        n_stored = int((end_C - begin_C).sum())
        there_N, rest_N = np.empty(n_stored, np.float32), np.empty(n_stored, np.float32)
        _share_out(begin_C, end_C, gene_N, count_N, cell_C,
                   self.aside, self.aside, _key(self.seed, _ASIDE, 0), np.uint64(0),
                   there_N, rest_N)  # fmt: skip
        if self.judged:
            return there_N, rest_N
        if self.low >= 1.0:
            return rest_N, rest_N
        ends_C = np.cumsum(end_C - begin_C)
        starts_C = ends_C - (end_C - begin_C)
        shown_N = np.empty(n_stored, np.float32)
        genes_N = joined(begin_C, end_C, gene_N, n_stored)
        _share_out(starts_C, ends_C, genes_N, rest_N, cell_C,
                   1.0 - self.high, 1.0 - self.low, _key(self.seed, _THIN, epoch),
                   _key(self.seed, _SHARE, epoch), rest_N, shown_N)  # fmt: skip
        return rest_N, shown_N


def shown_cells(
    begin_C: np.ndarray,
    end_C: np.ndarray,
    gene_N: np.ndarray,
    shown_N: np.ndarray,
    n_tokens: int | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lay the genes with a shown molecule end to end; none at or above ``n_tokens``.

    Returns
    -------
    tuple
        Where each cell begins and ends, genes, counts, and molecules of every cell, at least 1.
    """
    below = np.iinfo(np.int64).max if n_tokens is None else n_tokens
    ends_C = np.empty(begin_C.size, np.int64)
    library_C = np.empty(begin_C.size, np.float32)
    genes_N, counts_N = np.empty(shown_N.size, gene_N.dtype), np.empty(shown_N.size, np.float32)
    n = _shown(begin_C, end_C, gene_N, shown_N, below, ends_C, library_C, genes_N, counts_N)
    begins_C = np.concatenate([[0], ends_C[:-1]]) if ends_C.size else ends_C
    return begins_C, ends_C, genes_N[:n], counts_N[:n], library_C


@njit(nogil=True, cache=True)
def _shown(  # type: ignore[no-untyped-def]
    begin_C, end_C, gene_N, shown_N, below, ends_C, library_C, genes_N, counts_N
):
    at = 0
    read = 0
    for c in range(begin_C.shape[0]):
        total = 0.0
        for j in range(begin_C[c], end_C[c]):
            if shown_N[read] > 0 and gene_N[j] < below:
                genes_N[at] = gene_N[j]
                counts_N[at] = shown_N[read]
                total += shown_N[read]
                at += 1
            read += 1
        ends_C[c] = at
        library_C[c] = max(total, 1.0)
    return at


def lay_out(
    begin_C: np.ndarray,
    end_C: np.ndarray,
    gene_N: np.ndarray,
    out_gene_N: np.ndarray,
    out_cell_N: np.ndarray,
) -> None:
    """Write genes and numbers of consecutive cells end to end."""
    out_gene_N[:] = joined(np.asarray(begin_C, np.int64), np.asarray(end_C, np.int64), gene_N,
                           out_gene_N.size)  # fmt: skip
    out_cell_N[:] = np.repeat(np.arange(begin_C.size), end_C - begin_C)


def _key(seed: int, purpose: int, epoch: int) -> np.uint64:
    return np.uint64((seed * 1_000_003 + purpose * 8_191 + epoch) & (2**64 - 1))


@njit(nogil=True, cache=True)
def joined(begin_C, end_C, gene_N, n_stored):  # type: ignore[no-untyped-def]
    """Lay what the cells own of an array end to end, (n_stored,)."""
    out_N = np.empty(n_stored, gene_N.dtype)
    at = 0
    for c in range(begin_C.shape[0]):
        for j in range(begin_C[c], end_C[c]):
            out_N[at] = gene_N[j]
            at += 1
    return out_N


@njit(nogil=True, cache=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """SplitMix64's finaliser (Steele et al. 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(nogil=True, cache=True)
def _uniform(x):  # type: ignore[no-untyped-def]
    """Make a number in (0, 1) of 53 bits, never an end."""
    return (np.float64(x >> np.uint64(11)) + 0.5) * 2.0**-53


@njit(nogil=True, cache=True)
def binomial(n, p, bits):  # type: ignore[no-untyped-def]
    """Draw how many of ``n`` trials succeed, from 64 random bits."""
    if p <= 0.0 or n == 0:
        return 0
    if p >= 1.0:
        return n
    if n > _MOST_TRIALS:
        radius = math.sqrt(-2.0 * math.log(_uniform(bits)))
        normal = radius * math.cos(2.0 * math.pi * _uniform(_mix(bits)))
        drawn = math.floor(n * p + math.sqrt(n * p * (1.0 - p)) * normal + 0.5)
        return min(max(int(drawn), 0), n)
    # The smallest k whose distribution function reaches the number; from the shorter side.
    share = min(p, 1.0 - p)
    number = _uniform(bits)
    chance = (1.0 - share) ** n
    reached, k, odds = chance, 0, share / (1.0 - share)
    while number > reached and k < n:
        k += 1
        chance *= odds * (n - k + 1) / k
        reached += chance
    return k if p <= 0.5 else n - k


@njit(nogil=True, cache=True)
def _share_out(  # type: ignore[no-untyped-def]
    begin_C, end_C, gene_N, count_N, cell_C, low, high, key, share_key, there_N, kept_N
):
    """Take a share of every cell's molecules away, uniform between ``low`` and ``high``."""
    at = 0
    for c in range(begin_C.shape[0]):
        cell = _mix(np.uint64(cell_C[c]))
        share = low
        if high > low:
            share += (high - low) * _uniform(_mix(_mix(share_key) ^ cell))
        own = _mix(_mix(key) ^ cell)
        for j in range(begin_C[c], end_C[c]):
            count = int(count_N[j])
            taken = 0
            if share > 0.0:
                taken = binomial(count, share, _mix(own ^ _mix(np.uint64(gene_N[j]))))
            there_N[at] = count
            kept_N[at] = count - taken
            at += 1
