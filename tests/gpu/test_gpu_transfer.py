"""Copies beside the work, under stress: sizes that change, work in the way, other streams."""

import contextlib
import dataclasses

import pytest
import torch

from genemodel.batches.transfer import on_device


def digest(batch):
    """A number that depends on every element of a batch and its place, made where the batch is."""
    total = torch.zeros((), dtype=torch.float64, device=batch.device)
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            place = torch.arange(1, value.numel() + 1, device=value.device, dtype=torch.float64)
            total = total * 1.0001 + (value.flatten().double() * place).sum()
    return total


@pytest.fixture(scope="module")
def batches(pack_random):
    made = []
    for seed in range(200):
        cells = 1 + seed * 7 % 40
        lengths = tuple(5 + (seed * 31 + i * 17) % 100 for i in range(cells))
        made.append((pack_random(seed, lengths=lengths, budget=8192, max_cells=64), seed))
    return made


@pytest.mark.parametrize("own_stream", [False, True])
def test_whatever_is_in_the_way_what_arrives_is_what_was_sent(batches, device, own_stream):
    wanted = torch.stack([digest(batch) for batch, _ in batches])
    gpu = device.type == "cuda"
    stream = torch.cuda.Stream() if gpu and own_stream else None
    found, numbers = [], []
    with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
        for batch, number in on_device(iter(batches), device):
            assert batch.device.type == device.type
            if gpu and number % 3:
                torch.cuda._sleep(300_000 * (number % 5))  # the consumer lags behind the copies
            found.append(digest(batch))
            numbers.append(number)
            # Memory that was given back too early would be written over here.
            torch.full((2**20,), -1.0, device=device)
            del batch
        result = torch.stack(found).cpu()
    assert numbers == [number for _, number in batches]
    torch.testing.assert_close(result, wanted, rtol=1e-12, atol=0)
