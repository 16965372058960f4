"""Compiled loops of this room. Imported only where they run: numba takes a moment to load."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

# Position of the single set bit of a 64-bit word, by multiplication with a de Bruijn sequence.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT = np.zeros(64, dtype=np.int64)
for _i in range(64):
    _BIT[((1 << _i) * 0x03F79D71B4CB0A89 & 0xFFFFFFFFFFFFFFFF) >> 58] = _i

_INT32_MAX = 2**31 - 1


@numba.njit(nogil=True, cache=True)
def _project(indptr, indices, data, token_G, n_tokens, out_indptr, out_indices, out_data, limit):  # type: ignore[no-untyped-def]
    """Sum each row by token: a dense accumulator, and a bitmap that gives the tokens in order."""
    sums = np.zeros(n_tokens, dtype=np.float64)
    words = np.zeros((n_tokens + 63) >> 6, dtype=np.uint64)
    one = np.uint64(1)
    at = 0
    fits = True
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            token = token_G[indices[k]]
            if token >= 0:
                words[token >> 6] |= one << np.uint64(token & 63)
                sums[token] += data[k]
        for w in range(len(words)):
            bits = words[w]
            if bits == 0:
                continue
            words[w] = 0
            while bits != 0:
                low = bits & (~bits + one)
                bits ^= low
                token = (w << 6) + _BIT[(low * _DE_BRUIJN) >> np.uint64(58)]
                total = sums[token]
                sums[token] = 0.0
                if total != 0.0:
                    if total > limit:
                        fits = False
                    out_indices[at] = token
                    out_data[at] = total
                    at += 1
        out_indptr[row + 1] = at
    return at, fits


def project(
    indptr: npt.NDArray[np.integer[Any]],
    indices: npt.NDArray[np.integer[Any]],
    data: npt.NDArray[Any],
    token_G: npt.NDArray[np.int32],
    n_tokens: int,
    dtype: type[np.float32] | type[np.int32],
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any], bool]:
    """CSR arrays (C, G) -> CSR arrays (C, V), and whether every sum fits the type.

    Sums run in float64, so those of int32 and of whole float32 counts are exact.
    """
    if data.dtype not in (np.int32, np.int64, np.float32, np.float64):
        data = data.astype(np.float32 if data.dtype.kind == "f" else np.int64)
    wide = len(data) > _INT32_MAX
    out_indptr = np.zeros(len(indptr), dtype=np.int64 if wide else np.int32)
    out_indices = np.empty(len(data), dtype=np.int64 if wide else np.int32)
    out_data = np.empty(len(data), dtype=dtype)
    limit = float(_INT32_MAX) if dtype is np.int32 else np.inf
    n, fits = _project(
        indptr, indices, data, token_G, n_tokens, out_indptr, out_indices, out_data, limit
    )
    if n < 0.9 * len(data):
        out_indices, out_data = out_indices[:n].copy(), out_data[:n].copy()
    return out_indptr, out_indices[:n], out_data[:n], bool(fits)


SLOTS = 128  # bins of one page


@numba.njit(nogil=True, cache=True)
def count_pages(start, indices, page_N, slot_N, data, page_VP, pages, n_pages, sum_V, nonzero_V):  # type: ignore[no-untyped-def]
    """Add entries to the paged histograms, from entry `start` until the pages run out.

    Returns the first entry not added (all of them, when it equals their number) and the number of
    pages in use. ``page_VP`` holds 1 + the page's row in ``pages``, 0 where there is none.
    """
    for k in range(start, len(indices)):
        if data[k] == 0:
            continue
        token = indices[k]
        page = page_VP[token, page_N[k]]
        if page == 0:
            if n_pages == len(pages):
                return k, n_pages
            n_pages += 1
            page = n_pages
            page_VP[token, page_N[k]] = page
        pages[page - 1, slot_N[k]] += 1
        sum_V[token] += data[k]
        nonzero_V[token] += 1
    return len(indices), n_pages


@numba.njit(nogil=True, cache=True)
def middle_bins(page_VP, pages, nonzero_V):  # type: ignore[no-untyped-def]
    """Bins (V, 2) that hold the lower and upper middle entry of every gene; -1 where unseen."""
    bins = np.full((len(nonzero_V), 2), -1, dtype=np.int64)
    for token in range(len(nonzero_V)):
        n = nonzero_V[token]
        if n == 0:
            continue
        lower, upper = (n - 1) // 2, n // 2
        seen = 0
        for p in range(page_VP.shape[1]):
            if page_VP[token, p] == 0:
                continue
            row = pages[page_VP[token, p] - 1]
            for slot in range(SLOTS):
                if row[slot] == 0:
                    continue
                seen += row[slot]
                if bins[token, 0] < 0 and seen > lower:
                    bins[token, 0] = p * SLOTS + slot
                if seen > upper:
                    bins[token, 1] = p * SLOTS + slot
                    break
            if bins[token, 1] >= 0:
                break
    return bins
