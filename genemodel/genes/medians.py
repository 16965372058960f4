"""Non-zero medians of every token, streamed over any number of cells in bounded memory.

Each token has a histogram whose bins are kept in pages of 128, allocated when first used.

Raw counts (``per_10k=False``): counts up to 65,535 have a bin each, so their medians are exact.
Larger ones share bins of 1/128 octave: relative error at most 1/256 (0.4 %). Should the pages
outgrow ``max_pages``, counts above 255 move into such bins too and ``exact`` turns False; whether
that happens depends on the cells only, not on their order nor on how partial results were merged.

Counts per 10,000 (``per_10k=True``): count / library * 10^4 is continuous, and every value lies in
a bin of 1/128 octave: relative error at most 1/256 (0.4 %) from 6e-8 up. A token needs at most
38 pages (19 kB), typically 5 to 10.
"""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from genemodel.errors import DataError
from genemodel.expression.normalise import DEPTH

EXACT_UP_TO = 65_535
RELATIVE_ERROR = 1 / 256

_SLOTS = 128
_EXACT_PAGES = (EXACT_UP_TO + 1) // _SLOTS
_FIRST_OCTAVE = 8  # counts below 256 = 2^8 are exact even in octave bins
_LAST_OCTAVE = 30
_PER_10K_OCTAVES = (-24, 13)  # 6e-8 .. 16,384 counts per 10,000
_MAX_PAGES = 1 << 19


class NonzeroMedians:
    """Accumulates median, sum and number of non-zero counts per token.

    Parameters
    ----------
    n_tokens
        V, size of the vocabulary.
    per_10k
        Medians of counts per 10,000 of the cell's library instead of raw counts.
    max_pages
        Pages (512 bytes each) above which raw counts over 255 are binned; see the module.

    Attributes
    ----------
    sum_V
        float64, sum of the raw counts per token (exact for whole numbers below 2^53).
    nonzero_V
        int64, cells in which the token was counted.
    n_cells
        Cells seen.
    exact
        Whether every raw count up to 65,535 still has a bin of its own; False with `per_10k`.
    """

    def __init__(
        self, n_tokens: int, per_10k: bool = False, *, max_pages: int = _MAX_PAGES
    ) -> None:
        self.n_tokens = n_tokens
        self.per_10k = per_10k
        self.max_pages = max_pages
        self.n_cells = 0
        self.exact = not per_10k
        self.sum_V = np.zeros(n_tokens, dtype=np.float64)
        self.nonzero_V = np.zeros(n_tokens, dtype=np.int64)
        low, high = _PER_10K_OCTAVES
        n_kinds = high - low + 1 if per_10k else _EXACT_PAGES + _LAST_OCTAVE - _FIRST_OCTAVE + 1
        self._page_VP = np.zeros((n_tokens, n_kinds), dtype=np.int32)
        self._pages = np.zeros((0, _SLOTS), dtype=np.uint32)
        self._n_pages = 0

    # -- filling ----------------------------------------------------------------------------------

    def update(
        self, X: sp.csr_matrix | sp.csr_array, library_C: npt.ArrayLike | None = None
    ) -> None:
        """Add cells.

        Parameters
        ----------
        X
            Counts (C, V). Explicit zeros are ignored.
        library_C
            Total counts of each cell, by which `per_10k` divides; by default the row sums of `X`.

        Raises
        ------
        DataError
            Wrong width; negative, NaN, infinite or, without `per_10k`, fractional counts; a library
            below the cell's own counts.
        """
        from genemodel.genes.kernels import check_columns, count_pages

        if X.shape[1] != self.n_tokens:
            raise DataError(
                f"the counts have {X.shape[1]:,} columns, the medians are for "
                f"{self.n_tokens:,} tokens: project the counts onto the vocabulary first"
            )
        X = X if isinstance(X, sp.csr_matrix | sp.csr_array) else sp.csr_matrix(X)
        check_columns(X)
        data = _checked_counts(X.data, whole=not self.per_10k)
        scale_C = self._scale_C(X, data, library_C)
        indptr, indices = X.indptr, X.indices
        at = 0
        while True:
            at, self._n_pages = count_pages(
                at,
                indptr,
                indices,
                data,
                scale_C,
                self._layout(),
                self._page_VP,
                self._pages,
                self._n_pages,
                self.sum_V,
                self.nonzero_V,
            )
            if at == len(indices):
                break
            self._reserve(self._n_pages + 1)
        self.n_cells += X.shape[0]
        if self.exact and self._n_pages > self.max_pages:
            self._coarsen()

    def _layout(self) -> tuple[int, int, int]:
        """See ``kernels.count_pages``."""
        if self.per_10k:
            return 0, 0, _PER_10K_OCTAVES[0]
        return (EXACT_UP_TO if self.exact else 255), _EXACT_PAGES, _FIRST_OCTAVE

    def _scale_C(
        self,
        X: sp.csr_matrix | sp.csr_array,
        data: npt.NDArray[Any],
        library_C: npt.ArrayLike | None,
    ) -> npt.NDArray[np.float64]:
        """10,000 / library of each cell; empty for raw counts."""
        if not self.per_10k:
            return np.zeros(0)
        # Differences of a running sum, which (unlike reduceat) is right for empty rows.
        running = np.concatenate([[0.0], np.cumsum(data, dtype=np.float64)])
        own = running[X.indptr[1:]] - running[X.indptr[:-1]]
        library = own if library_C is None else np.asarray(library_C, dtype=np.float64)
        if library.shape != own.shape:
            raise DataError(
                f"library_C has shape {library.shape}, the counts are of {len(own):,} cells"
            )
        enough = (library >= own * (1 - 1e-6)) & np.isfinite(library)
        if not enough.all():
            at = int(np.argmin(enough))
            raise DataError(
                f"cell {at}: library {library[at]:g} is below the sum of its counts {own[at]:g} or "
                "not a number; give the total over all genes, or none"
            )
        return np.divide(DEPTH, library, out=np.zeros_like(library), where=library > 0)

    def _reserve(self, n: int) -> None:
        """Make room for at least `n` pages, doubling."""
        if n > len(self._pages):
            grown = np.zeros((max(n, 1024, 2 * len(self._pages)), _SLOTS), dtype=np.uint32)
            grown[: self._n_pages] = self._pages[: self._n_pages]
            self._pages = grown

    def _rows(
        self, tokens: npt.NDArray[np.integer[Any]], kinds: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.int64]:
        """Rows of `_pages` for distinct (token, page) pairs, allocated where missing."""
        missing = np.flatnonzero(self._page_VP[tokens, kinds] == 0)
        self._reserve(self._n_pages + len(missing))
        fresh = np.arange(1, len(missing) + 1, dtype=np.int32) + self._n_pages
        self._page_VP[tokens[missing], kinds[missing]] = fresh
        self._n_pages += len(missing)
        return self._page_VP[tokens, kinds].astype(np.int64) - 1

    def _coarsen(self) -> None:
        """Move counts above 255 from bins of their own into octave bins."""
        fine = _FIRST_OCTAVE - 6  # pages of counts 0..255
        tokens, kinds, counts = self._contents()
        old = NonzeroMedians(self.n_tokens, max_pages=self.max_pages)
        self._page_VP, self._pages, self._n_pages = old._page_VP, old._pages, 0
        keep = (kinds < fine) | (kinds >= _EXACT_PAGES)
        self._pages_add(tokens[keep], kinds[keep], counts[keep])
        for kind in np.unique(kinds[~keep]).tolist():
            at = kinds == kind
            octave = (kind * _SLOTS).bit_length() - 1
            width = max(1, _SLOTS >> (octave - 7))
            first = ((kind * _SLOTS) >> (octave - 7)) & 127
            moved = np.zeros((int(at.sum()), _SLOTS), dtype=np.uint32)
            moved[:, first : first + width] = counts[at].reshape(len(moved), width, -1).sum(axis=2)
            page = np.full(len(moved), _EXACT_PAGES + octave - _FIRST_OCTAVE)
            self._pages_add(tokens[at], page, moved)
        self.exact = False

    def _pages_add(
        self,
        tokens: npt.NDArray[np.integer[Any]],
        kinds: npt.NDArray[np.integer[Any]],
        counts: npt.NDArray[np.uint32],
    ) -> None:
        # Reserve first: _rows may replace the array that the addition writes to.
        rows = self._rows(tokens, kinds)
        self._pages[rows] += counts

    def _contents(
        self,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        tokens, kinds = np.nonzero(self._page_VP)
        return tokens, kinds, self._pages[self._page_VP[tokens, kinds] - 1]

    # -- results ----------------------------------------------------------------------------------

    def medians_V(self) -> npt.NDArray[np.float32]:
        """Median over the cells in which the token is not zero; NaN where it never was.

        With an even number of cells the two middle values are averaged.
        """
        from genemodel.genes.kernels import middle_bins

        bins = middle_bins(self._page_VP, self._pages, self.nonzero_V)
        return np.where(bins[:, 0] < 0, np.nan, self._values(bins).mean(axis=1)).astype(np.float32)

    def _values(self, bins: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Value of a bin: the count itself, or the middle of the octave bin."""
        page, slot = bins // _SLOTS, bins % _SLOTS
        first = _PER_10K_OCTAVES[0] if self.per_10k else _FIRST_OCTAVE - _EXACT_PAGES
        binned = np.ldexp((_SLOTS + slot + 0.5) / _SLOTS, (page + first).astype(np.int32))
        if self.per_10k:
            return binned
        return np.where(page < _EXACT_PAGES, bins.astype(np.float64), binned)

    # -- merging and storing ----------------------------------------------------------------------

    def merge(self, other: "NonzeroMedians") -> Self:
        """Add another accumulator's cells to this one; returns this one."""
        if (self.n_tokens, self.per_10k) != (other.n_tokens, other.per_10k):
            raise DataError(
                f"medians of {self.n_tokens:,} tokens (per_10k={self.per_10k}) cannot take in "
                f"those of {other.n_tokens:,} (per_10k={other.per_10k})"
            )
        if self.exact and not other.exact:
            self._coarsen()
        elif other.exact and not self.exact:
            other = NonzeroMedians.from_state(other.state())
            other._coarsen()
        self._pages_add(*other._contents())
        self.sum_V += other.sum_V
        self.nonzero_V += other.nonzero_V
        self.n_cells += other.n_cells
        if self.exact and self._n_pages > self.max_pages:
            self._coarsen()
        return self

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """Everything as arrays, for ``numpy.savez``; the inverse is :meth:`from_state`."""
        tokens, kinds, counts = self._contents()
        return {
            "settings": np.array(
                [self.n_tokens, self.per_10k, self.exact, self.n_cells, self.max_pages], np.int64
            ),
            "sum_V": self.sum_V.copy(),
            "nonzero_V": self.nonzero_V.copy(),
            "token_N": tokens.astype(np.int32),
            "page_N": kinds.astype(np.int16),
            "count_NS": counts,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Rebuild an accumulator from :meth:`state`."""
        keys = ("settings", "sum_V", "nonzero_V", "token_N", "page_N", "count_NS")
        missing = [key for key in keys if key not in state]
        if missing:
            raise DataError(f"stored medians lack {', '.join(missing)}: build them again")
        n_tokens, per_10k, exact, n_cells, max_pages = np.asarray(state["settings"]).tolist()
        result = cls(n_tokens, bool(per_10k), max_pages=max_pages)
        result.exact, result.n_cells = bool(exact), n_cells
        result.sum_V = np.array(state["sum_V"], dtype=np.float64)
        result.nonzero_V = np.array(state["nonzero_V"], dtype=np.int64)
        counts = np.asarray(state["count_NS"], dtype=np.uint32)
        if (
            result.sum_V.shape != (n_tokens,)
            or result.nonzero_V.shape != (n_tokens,)
            or int(counts.sum(dtype=np.int64)) != int(result.nonzero_V.sum())
        ):
            raise DataError("stored medians are damaged (their parts disagree): build them again")
        result._pages_add(np.asarray(state["token_N"]), np.asarray(state["page_N"]), counts)
        return result


def _checked_counts(data: npt.NDArray[Any], *, whole: bool) -> npt.NDArray[Any]:
    """Refuse what cannot be counts."""
    if not len(data):
        return data
    low, high = data.min(), data.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise DataError("counts hold NaN or infinite values: give raw counts")
    if low < 0:
        raise DataError(f"counts hold negative values (lowest {low}): give raw counts")
    if high >= 1 << 31:
        raise DataError(f"counts reach {high}, above 2,147,483,647: give counts of single cells")
    if whole and data.dtype.kind == "f":
        fractional = data != np.floor(data)
        if fractional.any():
            raise DataError(
                f"counts hold fractions (such as {data[fractional][0]:g}): exact medians need "
                "whole raw counts; use per_10k=True for fractional ones"
            )
    return data
