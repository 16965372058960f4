"""Wall time and memory of a method."""

import ctypes
import gc
import resource
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self


class Meter:
    """Wall time, and the peak of this process's memory above where it started.

    A thread reads the resident memory fifty times a second. What earlier work freed is given back
    to the system first where that is possible (glibc); what it did not give back and the method
    takes over is not seen, so the figure is a lower bound. Where the system has no ``/proc``, the
    growth of the process's own peak stands in.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.peak_mb = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        gc.collect()
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
        self._before = self._highest = _resident_mb()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._start = time.perf_counter()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self._highest = max(self._highest, _resident_mb())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.seconds = time.perf_counter() - self._start
        self._stop.set()
        self._thread.join()
        self.peak_mb = max(self._highest, _resident_mb()) - self._before


def _resident_mb() -> float:
    statistics = Path("/proc/self/statm")
    if statistics.exists():
        return int(statistics.read_text().split()[1]) * resource.getpagesize() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
