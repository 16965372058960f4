"""Compiled loops of this room. Imported only where they run: numba takes a moment to load."""

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genemodel.errors import DataError

# Position of the single set bit of a 64-bit word, by multiplication with a de Bruijn sequence.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT: npt.NDArray[np.int64] = np.zeros(64, dtype=np.int64)
for _i in range(64):
    _BIT[((1 << _i) * 0x03F79D71B4CB0A89 & 0xFFFFFFFFFFFFFFFF) >> 58] = _i

_INT32_MAX = 2**31 - 1


@numba.njit(nogil=True, cache=True)
def _project(indptr, indices, data, token_G, n_tokens, out_indptr, out_indices, out_data, limit):  # type: ignore[no-untyped-def]
    """Sum each row by token: a dense accumulator, and a bitmap that gives the tokens in order.

    Positions are unsigned, which spares every access the test for a negative index.
    """
    sums = np.zeros(n_tokens, dtype=np.float64)
    words = np.zeros((n_tokens + 63) >> 6, dtype=np.uint64)
    one, six = np.uint64(1), np.uint64(6)
    at = np.uint64(0)
    fits = True
    for row in range(len(indptr) - 1):
        for k in range(indptr[row], indptr[row + 1]):
            found = token_G[np.uint64(indices[k])]
            if found >= 0:
                token = np.uint64(found)
                words[token >> six] |= one << (token & np.uint64(63))
                sums[token] += data[k]
        for w in range(len(words)):
            bits = words[w]
            if bits == 0:
                continue
            words[w] = 0
            first = np.uint64(w) << six
            while bits != 0:
                low = bits & (~bits + one)
                bits ^= low
                token = first + np.uint64(_BIT[(low * _DE_BRUIJN) >> np.uint64(58)])
                total = sums[token]
                sums[token] = 0.0
                if total != 0.0:
                    if total > limit:
                        fits = False
                    out_indices[at] = token
                    out_data[at] = total
                    at += one
        out_indptr[row + 1] = at
    return at, fits


def check_columns(X: sp.csr_matrix | sp.csr_array) -> None:
    """Refuse a matrix whose entries lie outside it: compiled loops do not look."""
    if len(X.indices) and not (X.indices.min() >= 0 and X.indices.max() < X.shape[1]):
        raise DataError(
            f"the sparse counts are damaged: an entry in column {X.indices.max()} of {X.shape[1]}"
        )
    if (
        len(X.indptr) != X.shape[0] + 1
        or X.indptr[0] != 0
        or X.indptr[-1] > len(X.indices)
        or len(X.indices) != len(X.data)
        or (np.diff(X.indptr) < 0).any()
    ):
        raise DataError("the sparse counts are damaged: their row pointers do not fit their data")


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
def count_pages(  # type: ignore[no-untyped-def]
    start, indptr, indices, data, scale_C, layout, page_VP, pages, n_pages, sum_V, nonzero_V
):
    """Add cells to the paged histograms, from entry `start` until the pages run out.

    With ``scale_C`` (not empty) the value of an entry is its count times the cell's scale, and its
    page the octave; without, counts up to ``layout[0]`` have a bin each, and larger ones follow by
    octave from page ``layout[1]`` on. ``layout[2]`` is the first octave. ``page_VP`` holds 1 + the
    page's row in ``pages``, 0 where there is none.

    An octave out of range counts in the nearest page. Returns the first entry not added (all of
    them, when it equals their number) and the number of pages in use.
    """
    scaled = len(scale_C) > 0
    exact_up_to, octave_page, first_octave = layout
    for cell in range(len(indptr) - 1):
        if indptr[cell + 1] <= start:
            continue
        for k in range(max(start, indptr[cell]), indptr[cell + 1]):
            count = data[k]
            if count == 0:
                continue
            # A positive float32 is 8 bits of exponent, then the mantissa, of which 7 are kept.
            if scaled:
                bits = np.float32(count * scale_C[cell]).view(np.int32) >> 16
                kind, slot = np.int64(bits >> 7) - 127 - first_octave, np.int64(bits & 127)
            elif count <= exact_up_to:
                kind, slot = np.int64(count) >> 7, np.int64(count) & 127
            else:
                value = np.int64(count)
                octave = 7
                while value >> octave > 1:
                    octave += 1
                kind, slot = octave_page + octave - first_octave, (value >> (octave - 7)) & 127
            kind = min(max(kind, 0), page_VP.shape[1] - 1)
            token = np.uint64(indices[k])
            page = page_VP[token, np.uint64(kind)]
            if page == 0:
                if n_pages == len(pages):
                    return k, n_pages
                n_pages += 1
                page = n_pages
                page_VP[token, np.uint64(kind)] = page
            pages[np.uint64(page - 1), np.uint64(slot)] += 1
            sum_V[token] += count
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
