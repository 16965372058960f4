"""A rank's micro-batches, on its device."""

from collections.abc import Iterator

import torch

from genemodel.cells.batch import CellBatch
from genemodel.cells.loader import CellStream
from genemodel.cells.order import Position


class RankStream:
    """Micro-batches of one rank with the position after each, copied to its device."""

    def __init__(self, stream: CellStream, device: torch.device, limit: int | None = None) -> None:
        self.stream, self.device, self.limit = stream, device, limit

    @property
    def waited_s(self) -> float:
        return self.stream.waited_s

    def __iter__(self) -> Iterator[tuple[list[CellBatch], Position]]:
        number = self.stream.rank
        for batch, position in self.stream:
            if self.limit is not None and number >= self.limit:
                return
            number += self.stream.world_size
            yield [batch.to(self.device)], position
