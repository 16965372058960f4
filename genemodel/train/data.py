"""A rank's micro-batches, on its device."""

from collections.abc import Iterator

import torch

from genemodel.cells.batch import CellBatch
from genemodel.cells.loader import CellStream
from genemodel.cells.order import Position
from genemodel.cells.transfer import on_device


class RankStream:
    """Micro-batches of one rank with the position after each, copied to its device.

    Attributes
    ----------
    waited_s
        Seconds that whoever iterates has waited so far.
    """

    def __init__(self, stream: CellStream, device: torch.device) -> None:
        self._items = on_device(stream, device)

    @property
    def waited_s(self) -> float:
        """Seconds waited for micro-batches so far."""
        return self._items.waited_s

    def __iter__(self) -> Iterator[tuple[list[CellBatch], Position]]:
        """Yield micro-batches until the stream ends."""
        for batch, position in self._items:
            yield [batch], position
