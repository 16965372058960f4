"""How far a long pass over cells is: a bar where somebody looks on, lines in the log elsewhere."""

import logging
import time
from types import TracebackType
from typing import Any, Self

from tqdm.auto import tqdm

from genemodel.settings import somebody_looks_on

logger = logging.getLogger(__name__)

# Seconds between two lines of a log, and before the first, which a short pass never reaches.
EVERY_S = 30.0
FIRST_S = 10.0


class Progress:
    """Counts cells, and says how many, how fast and how long still.

    Parameters
    ----------
    what
        The work, as the first word of every line.
    total
        All cells.
    done
        Cells of an earlier session.
    unit
        What is counted, where it is not cells.
    """

    def __init__(self, what: str, total: int, *, done: int = 0, unit: str = "cells") -> None:
        self.what, self.total, self.done, self._before = what, total, done, done
        self.unit = unit
        self._begin = self._said = time.perf_counter()
        # When the first cells were through, and how many: what comes before them (starting
        # processes, compiling) says nothing about the cells to come.
        self._warm: tuple[float, int] | None = None
        self._wait_s = FIRST_S
        self._bar: Any = None
        if somebody_looks_on():
            self._bar = tqdm(
                total=total, initial=done, desc=what, unit=f" {unit}", unit_scale=True, leave=False
            )

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Close the bar; say the rate when all went well."""
        if self._bar is not None:
            self._bar.close()
        if error is None and self.done > self._before:
            seconds = time.perf_counter() - self._begin
            logger.info(
                "%s: %s %s in %s (%s %s/s).",
                self.what, f"{self.done - self._before:,}", self.unit, duration(seconds),
                _shown((self.done - self._before) / max(seconds, 1e-9)), self.unit,
            )  # fmt: skip

    def add(self, cells: int) -> None:
        """Note that so many more are done."""
        self.done += cells
        if self._bar is not None:
            self._bar.update(cells)
            return
        now = time.perf_counter()
        if self._warm is None:
            self._warm = now, self.done
            return
        if now - self._said < self._wait_s or self.done >= self.total:
            return
        self._said, self._wait_s = now, EVERY_S
        since, first = self._warm
        rate = (self.done - first) / max(now - since, 1e-9)
        logger.info(
            "%s: %s of %s %s (%d %%), %s %s/s, %s left.",
            self.what, f"{self.done:,}", f"{self.total:,}", self.unit,
            100 * self.done // self.total, _shown(rate), self.unit,
            duration((self.total - self.done) / rate),
        )  # fmt: skip


def _shown(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """Write a length of time as people do: ``40 s``, ``3 min 20 s``, ``2 h 05 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
