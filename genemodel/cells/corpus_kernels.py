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
            mixed = (np.uint64(indices[k]) << np.uint64(32)) ^ np.uint64(count)
            mixed = (mixed + _STEP) & np.uint64(0xFFFFFFFFFFFFFFFF)
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
            checksum += mixed ^ (mixed >> np.uint64(31))
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
