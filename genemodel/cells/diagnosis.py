"""Saying what the values of an expression matrix are: counts, logarithms, CPM, scaled data."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

# A count that does not fit int32 is no count of a cell.
LARGEST = 2**31 - 1
# Relative spread below which the sums of all cells count as equal.
_EQUAL_SUMS = 2e-3
# Share of values that must fit a pattern.
_MOST = 0.95
# Distance from a whole number that floating-point arithmetic explains.
_NOISE = 1e-3
# exp() of more than this is no expression value; keeps the logarithm test finite.
_LARGEST_LOG = 30.0
_LOGARITHMS = (("log1p", 1.0), ("log2(x + 1)", np.log(2.0)), ("log10(x + 1)", np.log(10.0)))


@dataclass(frozen=True)
class Finding:
    """What a matrix holds.

    Attributes
    ----------
    kind
        ``counts``, ``fractional`` or ``noise`` (both acceptable after rounding), or the name of
        what makes it unusable.
    text
        The same in words, with the evidence.
    """

    kind: str
    text: str

    @property
    def is_counts(self) -> bool:
        """Whether these are raw counts as they stand."""
        return self.kind == "counts"

    @property
    def can_be_rounded(self) -> bool:
        """Whether rounding gives counts."""
        return self.kind in ("fractional", "noise")


def diagnose(sample: sp.csr_matrix) -> Finding:
    """Say what the values of some cells are.

    Parameters
    ----------
    sample
        (C, G); any real type.
    """
    from genemodel.cells.kernels import scan

    values = sample.data
    nans, infinite, negative, fractional, zeros, largest = scan(values)
    n = values.size
    if nans:
        return Finding("nan", f"NaN in {nans:,} of {n:,} stored values")
    if infinite:
        return Finding("infinite", f"infinite values ({infinite:,} of {n:,} stored)")
    if negative:
        return Finding(
            "negative",
            f"negative values ({negative / n:.0%} of those stored, smallest "
            f"{values.min():.3g}): scaled, centred or corrected data",
        )
    if zeros == n:
        return Finding("zero", "nothing but zeros")
    if largest > LARGEST:
        return Finding("large", f"values up to {largest:.3g}, more than a cell can hold")
    if fractional:
        return _diagnose_fractional(sample)
    return Finding("counts", "raw counts")


def _diagnose_fractional(sample: sp.csr_matrix) -> Finding:
    """Tell logarithms, rescaled counts and expected counts apart."""
    sample = sp.csr_matrix(sample, dtype=np.float64)
    sample.eliminate_zeros()
    values = sample.data
    whole = np.rint(values)
    noise = np.where(whole == 0, 1e-5, np.clip(1e-4 * whole, _NOISE, 0.05))
    if (np.abs(values - whole) <= noise).all():
        distance = np.abs(values - whole).max()
        return Finding(
            "noise", f"whole numbers with floating-point noise (up to {distance:.1g} beside)"
        )
    total = equal_sums(sample)
    if total is not None:
        return _diagnose_total(sample, total)
    if values.max() <= _LARGEST_LOG:
        for name, base in _LOGARITHMS:
            back = sample.copy()
            back.data = np.expm1(values * base)
            total = equal_sums(back)
            if total is not None:
                return Finding(
                    "log",
                    f"{name} of normalised counts (undone, every cell sums to {total:,.0f})",
                )
            # Whole numbers are what log2 makes of 1, 3, 7 …, but expected counts have them too.
            back.data[values == whole] = 0
            back.eliminate_zeros()
            if _near_whole(back.data):
                return Finding("log", f"{name} of counts (undone, the values are whole numbers)")
            if _whole_ratios(back):
                return Finding(
                    "log",
                    f"{name} of normalised counts (undone, the values of a cell are whole "
                    "multiples of its smallest)",
                )
    if (values == whole).mean() < 0.5 and _whole_ratios(sample):
        return Finding(
            "normalised",
            "counts divided by a size factor (the values of a cell are whole multiples of its "
            "smallest)",
        )
    share = float((np.abs(values - whole) > _NOISE).mean())
    return Finding("fractional", f"fractional values ({share:.0%} of those stored)")


def _diagnose_total(sample: sp.csr_matrix, total: float) -> Finding:
    if abs(total - 1e6) < 0.01 * 1e6:
        if _whole_ratios(sample):
            return Finding("cpm", "CPM, counts per million (every cell sums to 1,000,000)")
        return Finding("tpm", "TPM or CPM, transcripts per million (every cell sums to 1,000,000)")
    if abs(total - 1e4) < 0.01 * 1e4:
        return Finding("cp10k", "CP10k, counts per 10,000 (every cell sums to 10,000)")
    return Finding("normalised", f"normalised counts (every cell sums to {total:,.5g})")


def equal_sums(sample: sp.csr_matrix) -> float | None:
    """Return the sum that all cells with counts share, or None."""
    sums = np.asarray(sample.sum(axis=1)).ravel()
    sums = sums[sums > 0]
    if sums.size < 3 or sums.std() > _EQUAL_SUMS * sums.mean():
        return None
    return float(sums.mean())


def _near_whole(values: npt.NDArray[np.float64]) -> bool:
    close = np.abs(values - np.rint(values)) <= _NOISE * np.maximum(values, 1.0)
    return bool(close[values < 200].mean() > _MOST) if (values < 200).any() else False


def _whole_ratios(sample: sp.csr_matrix) -> bool:
    """Whether the values of each cell are whole multiples of its smallest value."""
    ratios = np.concatenate(
        [
            sample.data[start:stop] / sample.data[start:stop].min()
            for start, stop in zip(sample.indptr[:-1], sample.indptr[1:], strict=True)
            if stop - start >= 3
        ]
        or [np.empty(0)]
    )
    informative = ratios[(ratios > 1.0 + _NOISE) & (ratios < 200)]
    if informative.size < 0.02 * ratios.size or informative.size < 10:
        return False
    return bool((np.abs(informative - np.rint(informative)) < 2e-3 * informative).mean() > _MOST)
