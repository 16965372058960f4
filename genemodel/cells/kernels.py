"""Compiled loops over counts, for checking and building. Imported only where they run."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

# Multipliers of the splitmix64 finaliser: every input bit reaches every output bit.
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_STEP = np.uint64(0x9E3779B97F4A7C15)


@numba.njit(nogil=True, cache=True)
def _scan(values: npt.NDArray[Any]) -> Any:
    nans = infinite = negative = fractional = zeros = 0
    largest = 0.0
    for i in range(len(values)):
        value = np.float64(values[i])
        if value != value:
            nans += 1
        elif value == np.inf or value == -np.inf:
            infinite += 1
        else:
            if value < 0:
                negative += 1
            elif value == 0:
                zeros += 1
            if value != np.rint(value):
                fractional += 1
            largest = max(largest, value)
    return nans, infinite, negative, fractional, zeros, largest


def scan(values: npt.NDArray[Any]) -> tuple[int, int, int, int, int, float]:
    """Count NaN, infinite, negative, fractional and zero values; also give the largest one."""
    if values.dtype not in (np.int32, np.int64, np.float32, np.float64):
        values = values.astype(np.float64 if values.dtype.kind == "f" else np.int64)
    nans, infinite, negative, fractional, zeros, largest = _scan(values)
    return nans, infinite, negative, fractional, zeros, float(largest)


@numba.njit(nogil=True, cache=True)
def _mixed(value):  # type: ignore[no-untyped-def]
    value = value + _STEP
    value = (value ^ (value >> np.uint64(30))) * _MIX_1
    value = (value ^ (value >> np.uint64(27))) * _MIX_2
    return value ^ (value >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _summarise(indptr, indices, data, mito_V, library_C, mito_C, checksum_C):  # type: ignore[no-untyped-def]
    for c in range(len(indptr) - 1):
        library = np.int64(0)
        mito = np.int64(0)
        checksum = np.uint64(0)
        for k in range(indptr[c], indptr[c + 1]):
            count = np.int64(data[k])
            library += count
            if mito_V[indices[k]]:
                mito += count
            checksum += _mixed((np.uint64(indices[k]) << np.uint64(32)) ^ np.uint64(count))
        library_C[c] = library
        mito_C[c] = mito
        checksum_C[c] = checksum


def summarise(
    indptr: npt.NDArray[np.integer[Any]],
    indices: npt.NDArray[np.integer[Any]],
    data: npt.NDArray[np.integer[Any]],
    mito_V: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Per cell: the sum of counts, that of mitochondrial genes, and a checksum of its content.

    The checksum is a sum over the cell's (gene, count) pairs, so their order does not matter.
    """
    n_cells = len(indptr) - 1
    library_C = np.empty(n_cells, np.int64)
    mito_C = np.empty(n_cells, np.int64)
    checksum_C = np.empty(n_cells, np.uint64)
    _summarise(indptr, indices, data, mito_V, library_C, mito_C, checksum_C)
    return library_C, mito_C, checksum_C


# A fingerprint is of a part of the vocabulary, because the same cell in another file often lacks
# some genes (rare ones left out, names that match no more): with 12 to 24 genes a part, drawn by a
# hash of the token, most parts of it are whole, and no two cells of real data were met that agree
# in one. Poorer parts tell nothing.
PRINTS = 3
_PART_GENES = 12
_LEAST_GENES = 6


@numba.njit(nogil=True, cache=True)
def _fingerprints(indptr, indices, data, n_tokens, finer, print_CP):  # type: ignore[no-untyped-def]
    n_prints = print_CP.shape[1]
    genes_P = np.zeros(n_prints, np.int64)
    for c in range(len(indptr) - 1):
        n_genes = 0
        for k in range(indptr[c], indptr[c + 1]):
            n_genes += indices[k] < n_tokens
        level = finer
        while n_genes >> (level - finer + 1) >= _PART_GENES:
            level += 1
        if level < 0:
            continue
        genes_P[:] = 0
        for k in range(indptr[c], indptr[c + 1]):
            token = np.uint64(indices[k])
            if indices[k] < n_tokens:
                # Of 2^level parts the first ones; shifting by all 64 bits would shift by none.
                part = np.int64(_mixed(~token) >> np.uint64(1) >> np.uint64(63 - level))
                if part < n_prints:
                    genes_P[part] += 1
                    count = np.uint64(np.int64(data[k]))
                    print_CP[c, part] += _mixed((token << np.uint64(32)) ^ count)
        for p in range(n_prints):
            mixed = _mixed(print_CP[c, p] ^ np.uint64(level))
            print_CP[c, p] = mixed if genes_P[p] >= _LEAST_GENES else np.uint64(0)


def fingerprints(
    indptr: npt.NDArray[np.integer[Any]],
    indices: npt.NDArray[np.integer[Any]],
    data: npt.NDArray[Any],
    n_tokens: int,
    finer: int = 0,
) -> npt.NDArray[np.uint64]:
    """Fingerprints of each cell, by which it is known again in another file, uint64 (C, P).

    Parameters
    ----------
    indptr, indices, data
        Whole counts over a vocabulary, CSR without explicit zeros; the order in a row does not
        matter.
    n_tokens
        Tokens from here on are passed over.
    finer
        Of parts half as large for each 1. How large they are depends on the number of genes of a
        cell: of one that may have lost genes those at 0, -1 and 1 are looked up.

    Returns
    -------
    Of each of the first parts; 0 where it has too few genes to tell a cell by.
    """
    print_CP = np.zeros((len(indptr) - 1, PRINTS), np.uint64)
    _fingerprints(indptr, indices, data, n_tokens, finer, print_CP)
    return print_CP
