"""Steps of micro-batches for Lightning, from a position that is saved with every checkpoint."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import lightning.pytorch as pl
import torch

from genemodel.cells.batch import CellBatch
from genemodel.cells.loader import CellStream
from genemodel.cells.order import Position


@dataclass(frozen=True, slots=True)
class Step:
    """Micro-batches of one optimiser step on one rank, and the position after it."""

    batches: list[CellBatch]
    position: Position


class Steps:
    """Group a stream into optimiser steps; iterating again starts a new stream."""

    def __init__(
        self, stream: Callable[[], CellStream], accumulate: int, limit: int | None = None
    ) -> None:
        self.make_stream = stream
        self.accumulate = accumulate
        self.limit = limit
        self.stream: CellStream | None = None

    def __iter__(self) -> Iterator[Step]:
        self.stream = self.make_stream()
        batches: list[CellBatch] = []
        for n, (batch, position) in enumerate(self.stream, start=1):
            batches.append(batch)
            if len(batches) == self.accumulate:
                yield Step(batches, position)
                batches = []
            if self.limit is not None and n >= self.limit:
                return


class StepData(pl.LightningDataModule):
    """Training and validation steps.

    Parameters
    ----------
    train, validation
        Make the streams; called once the ranks are known.
    accumulate
        Micro-batches per rank and step.
    validation_batches
        Micro-batches per rank and validation.
    """

    def __init__(
        self,
        train: Callable[[int, int], CellStream],
        validation: Callable[[int, int], CellStream],
        *,
        accumulate: int,
        validation_batches: int,
    ) -> None:
        super().__init__()
        self._train, self._validation = train, validation
        self.accumulate, self.validation_batches = accumulate, validation_batches
        self.train_steps: Steps | None = None

    def _ranks(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> Steps:
        """Endless steps from the saved position."""
        self.train_steps = Steps(lambda: self._train(*self._ranks()), self.accumulate)
        return self.train_steps

    def val_dataloader(self) -> Steps:
        """Yield the same held-out micro-batches every time."""
        return Steps(lambda: self._validation(*self._ranks()), 1, self.validation_batches)

    def transfer_batch_to_device(
        self, batch: Step, device: torch.device, dataloader_idx: int
    ) -> Step:
        """Copy a step, from page-locked memory where that lets the copy overlap work."""
        cuda = device.type == "cuda"
        return Step(
            [(b.pin_memory() if cuda else b).to(device, non_blocking=cuda) for b in batch.batches],
            batch.position,
        )

    @property
    def waited_s(self) -> float:
        """Seconds the training loop has waited for data so far."""
        stream = self.train_steps.stream if self.train_steps else None
        return stream.waited_s if stream else 0.0
