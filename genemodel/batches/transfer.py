"""Micro-batches to a device, copied while the device works on the ones before.

On CUDA a thread takes micro-batches from their stream, lays the tensors of each end to end in
page-locked memory and sends them as one copy on a stream of its own, two ahead of the consumer.
The consumer's stream waits for the copy on the device; the host never does. One copy instead of
one a tensor keeps the thread short: it shares Python's lock with the thread that launches kernels.
"""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from genemodel.batches.batch import CellBatch

AHEAD = 2  # one being copied while one waits
_ALIGNED = 256  # bytes; what CUDA's own allocations are aligned to
# Sizes differ a little from one micro-batch to the next: buffers of whole MiB are used again.
_ROUNDED = 2**20


class Ahead[S, M, T]:
    """Iterate in a thread of its own, some items ahead of whoever takes them.

    An error in the thread reaches the consumer at the item it belongs to.

    Parameters
    ----------
    items
        What to iterate over; closed at the end if it can be.
    prepare
        Applied to every item in the thread.
    finish
        Applied to what ``prepare`` gave, in the consumer's thread.
    depth
        Items ahead; 0 needs no thread.

    Attributes
    ----------
    waited_s
        Seconds that the consumer has waited so far.
    """

    def __init__(
        self,
        items: Iterable[S],
        prepare: Callable[[S], M],
        finish: Callable[[M], T],
        depth: int = AHEAD,
    ) -> None:
        self._items, self._prepare, self._finish, self._depth = items, prepare, finish, depth
        self.waited_s = 0.0

    def __iter__(self) -> Generator[T]:
        """Yield the items in their order."""
        source = iter(self._items)
        coming = self._in_thread(source) if self._depth else self._at_once(source)
        try:
            while True:
                begin = time.perf_counter()
                found = next(coming, None)
                self.waited_s += time.perf_counter() - begin
                if found is None:
                    return
                # Taken out of its list, so that nothing here holds what the consumer lets go.
                yield self._finish(found.pop())
        finally:
            coming.close()
            if hasattr(source, "close"):
                source.close()

    def _at_once(self, source: Iterator[S]) -> Generator[list[M]]:
        for item in source:
            yield [self._prepare(item)]

    def _in_thread(self, source: Iterator[S]) -> Generator[list[M]]:
        # A pool's futures would cost the consumer ten times as long for each item.
        ready: queue.SimpleQueue[list[M] | BaseException | None] = queue.SimpleQueue()
        places = threading.Semaphore(self._depth)
        left = False

        def run() -> None:
            try:
                while True:
                    places.acquire()
                    if left:
                        return
                    for item in source:
                        ready.put([self._prepare(item)])
                        del item
                        break
                    else:
                        ready.put(None)
                        return
            except BaseException as error:  # noqa: BLE001
                ready.put(error)

        thread = threading.Thread(target=run, name="genemodel-ahead", daemon=True)
        thread.start()
        try:
            while (found := ready.get()) is not None:
                if isinstance(found, BaseException):
                    raise found
                places.release()
                yield found
        finally:
            left = True
            places.release()
            thread.join()


def on_device[T](
    items: Iterable[tuple[CellBatch, T]], device: torch.device | str
) -> Ahead[tuple[CellBatch, T], Any, tuple[CellBatch, T]]:
    """Micro-batches on ``device``, in their order; on the CPU as they are.

    Parameters
    ----------
    items
        Micro-batches on the CPU, each with something that stays as it is (a
        :class:`~genemodel.batches.order.Position`).
    device
        Where to.

    Returns
    -------
    Something to iterate over; ``waited_s`` counts what the consumer has waited.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Ahead(items, lambda item: item, lambda item: (item[0].to(device), item[1]), depth=0)
    return _overlapped(items, Cuda(device))


def _overlapped[T](
    items: Iterable[tuple[CellBatch, T]], calls: "Calls"
) -> Ahead[tuple[CellBatch, T], "tuple[_Sent, T]", tuple[CellBatch, T]]:
    copier = _Copier(calls)
    return Ahead(
        items,
        lambda item: (copier.send(item[0]), item[1]),
        lambda sent: (copier.receive(sent[0]), sent[1]),
    )


class Calls(Protocol):
    """What copying beside the work asks of a device."""

    def page_locked(self, n_bytes: int) -> Tensor:
        """Host memory that can be copied from without waiting, uint8."""

    def copy(self, source: Tensor) -> tuple[Tensor, Any]:
        """Begin a copy beside the work; give the copy, and the event of its end."""

    def wait_on_host(self, event: Any) -> None:
        """Return once the event has happened."""

    def hand_over(self, copy: Tensor, event: Any) -> None:
        """Let what the calling thread launches from now on wait for the event."""


class Cuda:
    """The calls for a GPU."""

    def __init__(self, device: torch.device) -> None:
        # Another thread's current device would be the first one.
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        self._side = torch.cuda.Stream(self._device)

    def page_locked(self, n_bytes: int) -> Tensor:
        """See :class:`Calls`."""
        return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, source: Tensor) -> tuple[Tensor, Any]:
        """See :class:`Calls`."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._side):
            copied = source.to(self._device, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._side)
        return copied, event

    def wait_on_host(self, event: Any) -> None:
        """See :class:`Calls`."""
        event.synchronize()

    def hand_over(self, copy: Tensor, event: Any) -> None:
        """See :class:`Calls`."""
        current = torch.cuda.current_stream(self._device)
        current.wait_event(event)
        # It was allocated for the side stream, which must not have it back before this one's end.
        copy.record_stream(current)


@dataclass
class _Sent:
    """A micro-batch on its way: its shapes, where each tensor begins, the bytes, their arrival."""

    shape: CellBatch
    offsets: list[int]
    copy: Tensor
    event: Any


class _Copier:
    """Send micro-batches through two page-locked buffers."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._slots: deque[tuple[Tensor, Any]] = deque()

    def send(self, batch: CellBatch) -> _Sent:
        """Begin to copy; called by the thread."""
        tensors: list[Tensor] = []

        def noted(tensor: Tensor) -> Tensor:
            tensors.append(tensor)
            return tensor

        _change(batch, noted)
        offsets, end = [], 0
        for tensor in tensors:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        buffer = self._free(-(-max(end, 1) // _ROUNDED) * _ROUNDED)
        for tensor, offset in zip(tensors, offsets, strict=True):
            _inside(buffer, offset, tensor).copy_(tensor)
        copy, event = self._calls.copy(buffer)
        self._slots.append((buffer, event))
        # The thread lets go of the tensors on the CPU, which takes longer than making their shapes.
        return _Sent(_change(batch, lambda tensor: tensor.to("meta")), offsets, copy, event)

    def _free(self, n_bytes: int) -> Tensor:
        """Give a page-locked buffer whose last copy has ended."""
        if len(self._slots) < AHEAD:
            return self._calls.page_locked(n_bytes)
        buffer, event = self._slots.popleft()
        self._calls.wait_on_host(event)
        return buffer if buffer.numel() == n_bytes else self._calls.page_locked(n_bytes)

    def receive(self, sent: _Sent) -> CellBatch:
        """Give the micro-batch on the device; called by the thread that will use it."""
        self._calls.hand_over(sent.copy, sent.event)
        offsets = iter(sent.offsets)
        return _change(sent.shape, lambda tensor: _inside(sent.copy, next(offsets), tensor))


def _change(batch: CellBatch, change: Callable[[Tensor], Tensor]) -> CellBatch:
    """Replace what belongs on a device, always in the same order."""
    return batch._with_tensors(change)


def _inside(buffer: Tensor, offset: int, like: Tensor) -> Tensor:
    """Part of a buffer as a tensor of its own: compiled code would ask of a view whose it is."""
    part = torch.empty(0, dtype=like.dtype, device=buffer.device)
    stride = torch.empty(like.shape, device="meta").stride()
    return part.set_(buffer.untyped_storage(), offset // like.itemsize, like.shape, stride)
