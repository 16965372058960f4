"""Steps that should not count: losses that are not finite, and losses that jump.

Medians are robust to the jumps that they must find. A loss falls, so the usual level is that of the
last few steps, and the spread is that of the differences from step to step: neither takes the way
down for noise.
"""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping
from typing import Any

# A value this large is as lost as an infinite one.
LARGEST = 1e30
# Losses that are remembered for their spread, and those whose level is the usual one; so many are
# needed before one can be called a jump.
REMEMBERED, NEEDED = 200, 50
# A normal distribution's standard deviation is 1.4826 median absolute deviations.
MAD_TO_SD = 1.4826
# Below this share of the median itself a spread is rounding, not noise.
SMALLEST_SPREAD = 0.002


class Guard:
    """Judge the numbers of a step before its gradient is applied.

    Parameters
    ----------
    deviations
        A total loss so many robust standard deviations above the recent median is a jump; 0 never.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations = deviations
        self.recent: deque[float] = deque(maxlen=REMEMBERED)

    def judge(self, losses: Mapping[str, float], norm: float, total: float) -> str:
        """Return what is wrong with a step, ``""`` where nothing is; remembers good totals."""
        wrong = [
            name
            for name, x in {**losses, "gradient norm": norm}.items()
            if not math.isfinite(x) or abs(x) >= LARGEST
        ]
        if wrong:
            return f"{', '.join(wrong)} not finite"
        jump = self._jump(total)
        if not jump:
            self.recent.append(total)
        return jump

    def _jump(self, total: float) -> str:
        if not self.deviations or len(self.recent) < NEEDED:
            return ""
        recent = list(self.recent)
        middle = statistics.median(recent[-NEEDED:])
        # The difference of two independent losses spreads √2 times as much as one.
        steps = [abs(b - a) for a, b in itertools.pairwise(recent)]
        spread = MAD_TO_SD * statistics.median(steps) / math.sqrt(2)
        spread = max(spread, SMALLEST_SPREAD * abs(middle))
        away = (total - middle) / spread
        if away <= self.deviations:
            return ""
        return f"the loss {total:.4g} is {away:.0f} deviations above the recent {middle:.4g}"

    def accept(self, total: float) -> None:
        """Remember a jump that was let through, so that a new level becomes the usual one."""
        self.recent.append(total)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"recent": list(self.recent)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.recent = deque(state["recent"], maxlen=REMEMBERED)
