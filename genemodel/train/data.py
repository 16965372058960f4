"""A rank's micro-batches, on its device."""

import contextlib
from collections.abc import Generator
from itertools import batched

import torch

from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import CellStream
from genemodel.batches.order import Position
from genemodel.batches.transfer import on_device


class RankStream:
    """Micro-batches of one rank in their pieces, with the position after each, on its device.

    Attributes
    ----------
    waited_s
        Seconds that whoever iterates has waited so far.
    """

    def __init__(self, stream: CellStream, device: torch.device) -> None:
        self._items = on_device(stream, device)
        self._pieces = stream.pieces

    @property
    def waited_s(self) -> float:
        """Seconds waited for micro-batches so far."""
        return self._items.waited_s

    def __iter__(self) -> Generator[tuple[list[CellBatch], Position]]:
        """Yield micro-batches until the stream ends."""
        items = iter(self._items)
        with contextlib.closing(items):
            for pieces in batched(items, self._pieces):
                yield [batch for batch, _ in pieces], pieces[0][1]
