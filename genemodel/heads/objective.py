"""What can be learnt: the one contract of everything that trains.

To add an objective, write a module with the members of :class:`Objective`, and hand it with a model
to a :class:`~genemodel.train.job.Job`. The loop then does the rest::

    prepared = objective.prepare(batch)             # on the device, without gradient
    encoded = model(prepared.seen)                  # any encoder: GeneModel, CountEncoder, …
    parts = objective(model, encoded, prepared)     # {name: LossPart}, sums and not means

A loss is a *sum* over items, and ``prepared.items`` says how many there are: the loop adds both up
over micro-batches and processes and divides once, so that a step means the same however its cells
are dealt. Randomness comes from addresses (:mod:`genemodel.heads.masking`) or from torch, which the
loop seeds for every micro-batch; both survive a restart and any number of processes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.heads.masking import Chosen, Hidden
from genemodel.heads.parts import LossPart
from genemodel.model.gene_model import Encoded, GeneModel


class Prepared(Protocol):
    """A micro-batch, ready to be learnt from."""

    @property
    def seen(self) -> CellBatch:
        """What the model reads."""

    @property
    def items(self) -> Mapping[str, Tensor]:
        """Number of items of every loss, scalars on the device."""


class Objective(Protocol):
    """Heads and losses; also a :class:`torch.nn.Module`.

    One may have ``silent``, the names of losses whose values say nothing to a reader, and beside
    each a loss of weight 0 that does: those are left out of tables, lines and curves.
    """

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every loss in the total, by name; the order is that of all reports."""

    def weights_at(self, share: float) -> dict[str, float]:
        """Weights after this share of the steps, where they change on the way."""

    def prepare(self, batch: CellBatch, *, validation: bool = False) -> Prepared:
        """Hide, count, look up; the same for the same cells in the same epoch."""

    def __call__(
        self, model: Any, encoded: Encoded, prepared: Any, *, trivial: bool = True
    ) -> dict[str, LossPart]:
        """Cost of every loss; with ``trivial`` also of predictors that ignore the cell."""

    def forward_flops(self, model: Any, lengths_C: np.ndarray) -> int:
        """Operations of one forward pass over cells of these lengths."""


@dataclass(frozen=True, slots=True)
class Passed:
    """A micro-batch after its pass through the backbone, for the heads of one objective.

    Attributes
    ----------
    model
        The backbone.
    encoded
        What it made of the cells.
    truth
        The cells as they are.
    hidden
        The tokens that were hidden for this head; None where none are.
    """

    model: GeneModel
    encoded: Encoded
    truth: CellBatch
    hidden: Hidden | None


class Head(Protocol):
    """One of several heads that share a pass, such as those of pre-training; also a Module."""

    starts_anew: bool
    """Whether its weights are of the cells of a run, and of no use to another one."""

    def count(self, batch: CellBatch, chosen: Chosen | None) -> Tensor:
        """Count the items of its loss; ``chosen`` are the tokens that are hidden for it."""

    def cost(self, passed: Passed, *, trivial: bool) -> tuple[Tensor, Tensor | None]:
        """Sum its loss over the items; with ``trivial`` also that of its trivial predictor."""

    def compile_region(self, backend: str | Callable[..., Any]) -> None:
        """Compile what of it is a graph of constant shapes, in place."""
