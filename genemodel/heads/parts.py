"""What an objective hands back: sums and how many items they run over, never means.

Ranks and micro-batches hold different numbers of items. Averaging their means gives a wrong
gradient; sums divided by the global number of items do not.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class LossPart:
    """One objective on one micro-batch.

    Attributes
    ----------
    total
        Sum of the loss over its items, differentiable, scalar.
    items
        How many items, scalar tensor without gradient.
    trivial
        The same sum for the best predictor that ignores the cell, scalar without gradient; None
        where nobody asked for it.

    All three stay on the device: reading one waits for it.
    """

    total: Tensor
    items: Tensor
    trivial: Tensor | None = None
