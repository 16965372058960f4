"""Copies that overlap: in order, equal, from buffers that are free, awaited where they are used."""

import dataclasses
import threading
import time

import numpy as np
import pytest
import torch

from genemodel.batches import transfer
from genemodel.batches.transfer import Ahead, on_device


class LazyDevice:
    """A device that copies as late as it may: only when somebody waits for the event."""

    def __init__(self):
        self.locked = 0
        self.log = []
        self.thread = None

    def page_locked(self, n_bytes):
        self.locked += 1
        return torch.zeros(n_bytes, dtype=torch.uint8)

    def copy(self, source):
        self.thread = threading.get_ident()
        self.log.append("copy")
        copied = torch.full_like(source, 255)
        return copied, _Once(lambda: copied.copy_(source))

    def wait_on_host(self, event):
        self.log.append("host")
        event.wait()

    def hand_over(self, copy, event):
        assert threading.get_ident() != self.thread
        self.log.append("hand over")
        event.wait()


class _Once:
    """An event: whoever waits first makes it happen, and others wait for its end."""

    def __init__(self, happen):
        self._happen, self._lock = happen, threading.Lock()

    def wait(self):
        with self._lock:
            if self._happen is not None:
                self._happen()
                self._happen = None


@pytest.fixture
def batches(pack_random):
    made = [pack_random(seed, lengths=(40, 7 + seed, 90, 23)) for seed in range(9)]
    return [(batch, f"after {i}") for i, batch in enumerate(made)]


def assert_equal(found, wanted):
    for field in dataclasses.fields(wanted):
        a, b = getattr(found, field.name), getattr(wanted, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype and a.is_contiguous() and not a._is_view()
            assert torch.equal(a, b), field.name
        elif isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b)
        else:
            assert a == b


def test_on_the_cpu_micro_batches_stay_as_they_are(batches):
    found = list(on_device(iter(batches), "cpu"))
    assert all(a.gene_T is b.gene_T for (a, _), (b, _) in zip(found, batches, strict=True))
    assert [after for _, after in found] == [after for _, after in batches]


def test_what_arrives_equals_what_was_sent_although_buffers_are_used_again(batches):
    device = LazyDevice()
    for (found, after), (wanted, wanted_after) in zip(
        transfer._overlapped(iter(batches), device), batches, strict=True
    ):
        time.sleep(0.01)  # the thread gets as far ahead as it may
        assert after == wanted_after
        assert_equal(found, wanted)
    assert device.locked == transfer.AHEAD
    # One copy a micro-batch; the consumer's stream waits for each, the host for none it needs.
    assert device.log.count("copy") == device.log.count("hand over") == len(batches)


def test_a_larger_micro_batch_gets_a_larger_buffer(batches, pack_random, monkeypatch):
    monkeypatch.setattr(transfer, "_ROUNDED", 256)
    large = pack_random(3, lengths=(90,) * 8, budget=1024)
    mixed = [batches[0], (large, ""), batches[1], batches[2], (large, ""), batches[3]]
    found = list(transfer._overlapped(mixed, LazyDevice()))
    for (a, _), (b, _) in zip(found, mixed, strict=True):
        assert_equal(a, b)


def test_no_more_than_two_are_taken_ahead():
    taken = []

    def numbers():
        for i in range(20):
            taken.append(i)
            yield i

    ahead = iter(Ahead(numbers(), lambda x: x, lambda x: x))
    for i in range(5):
        assert next(ahead) == i
        until = time.monotonic() + 30
        while len(taken) < i + 1 + transfer.AHEAD and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.02)
        assert len(taken) == i + 1 + transfer.AHEAD
    ahead.close()
    assert len(taken) == 5 + transfer.AHEAD


def test_an_error_reaches_the_consumer_at_its_place_and_closes_the_source():
    closed = []

    def numbers():
        try:
            yield 0
            yield 1
            raise OSError("disk")
        finally:
            closed.append(True)

    found = []
    with pytest.raises(OSError, match="disk"):
        for number in Ahead(numbers(), lambda x: x, lambda x: x):
            found.append(number)
    assert found == [0, 1] and closed
    assert not [t for t in threading.enumerate() if t.name.startswith("genemodel-ahead")]


def test_the_time_waited_is_that_of_the_consumer(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(transfer.time, "perf_counter", lambda: clock[0])

    def slow(seconds):
        for i in range(6):
            clock[0] += seconds
            yield i

    def consumed(ahead, seconds):
        for _ in ahead:
            clock[0] += seconds
        return ahead.waited_s

    def as_it_is(item):
        return item

    assert consumed(Ahead(slow(5), as_it_is, as_it_is, depth=0), 100) == 30
    assert consumed(Ahead(slow(0), as_it_is, as_it_is), 100) == 0
    assert consumed(Ahead(slow(5), as_it_is, as_it_is), 0) >= 5


@pytest.mark.gpu
def test_copies_to_a_gpu_equal_what_was_sent(batches):
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    for (found, _), (wanted, _) in zip(on_device(batches, "cuda"), batches, strict=True):
        assert found.device.type == "cuda"
        # Work on the consumer's stream, while later micro-batches are copied.
        torch.cuda._sleep(1_000_000)
        assert_equal(found.to("cpu"), wanted)
