"""A trace of what a run's steps take."""

import logging
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Steps left out of a profile: to compile and warm up, and for the profiler itself.
_UNPROFILED = (3, 2)


class Profiler:
    """A trace of a few steps after the first ones, for chrome://tracing or Perfetto."""

    def __init__(self, run: Path, steps: int, rank: int) -> None:
        self._profiler: Any = None
        self._left = sum(_UNPROFILED)  # before the first step that is profiled
        if not steps:
            return
        from torch.profiler import ProfilerActivity, profile, schedule

        folder = run / "profile"
        folder.mkdir(parents=True, exist_ok=True)
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)

        def write(profiler: Any) -> None:
            if self._left >= 0:
                return
            path = folder / f"rank-{rank}.json"
            profiler.export_chrome_trace(str(path))
            where = "device" if torch.cuda.is_available() else "cpu"
            key = f"self_{where}_time_total"
            table = profiler.key_averages().table(sort_by=key, row_limit=30)
            path.with_suffix(".txt").write_text(table)
            logger.info("Profile of %d steps: %s", min(-self._left, steps), path)

        wait, warmup = _UNPROFILED
        self._profiler = profile(
            activities=activities,
            schedule=schedule(wait=wait, warmup=warmup, active=steps, repeat=1),
            on_trace_ready=write,
        )
        self._profiler.start()

    def step(self) -> None:
        """Tell that a step is done."""
        self._left -= 1
        if self._profiler is not None:
            self._profiler.step()

    def close(self) -> None:
        """End the recording."""
        if self._profiler is None:
            return
        self._profiler.stop()
        if self._left >= 0:
            logger.warning(
                "Nothing was profiled: the run ended within the %d steps that are left out.",
                sum(_UNPROFILED),
            )
