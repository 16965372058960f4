"""Cells by group (batch, type, source), in time that does not grow with the number of groups.

Axes: C cells.
"""

import numpy as np


def rows_by_group(code_C: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Give every code that occurs with the rows that have it, both ascending."""
    order = np.argsort(code_C, kind="stable")
    sorted_C = code_C[order]
    first = np.flatnonzero(np.r_[True, sorted_C[1:] != sorted_C[:-1]][: len(order)])
    parts = np.split(order, first[1:])
    return [(int(sorted_C[at]), rows) for at, rows in zip(first, parts, strict=False)]
