"""Packed attention against a block-diagonal oracle, forward and backward, eager and compiled."""

import numpy as np
import pytest
import torch
from attention_oracle import attend_reference
from device_traffic import DeviceTraffic, fake_cuda

from genemodel.batches.packing import plan_bins
from genemodel.batches.tokens import TokenSettings
from genemodel.model.attention import (
    attend,
    attend_padded,
    flash_fits,
)


def case(seed=0, tokens=300, heads=3, width=16):
    torch.manual_seed(seed)
    starts = torch.tensor([0, 1, 90, 200, 290, tokens, tokens, tokens], dtype=torch.int32)
    qkv = [torch.randn(tokens, heads, width, requires_grad=True) for _ in range(3)]
    return *qkv, starts


def check_equal(out, expected, inputs):
    """Outputs are equal, and so are the gradients of any sum of theirs."""
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    got, want = (torch.autograd.grad(x, inputs, weight) for x in (out, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_output_and_gradients_equal_the_oracle():
    q, k, v, starts = case()
    out, expected = attend(q, k, v, starts, 300), attend_reference(q, k, v, starts, 300)
    check_equal(out, expected, (q, k, v))


def test_a_cell_cannot_see_its_neighbours():
    q, k, v, starts = case()
    before = attend(q, k, v, starts, 300)
    with torch.no_grad():
        k[:90] += 5
        v[:90] -= 3
    after = attend(q, k, v, starts, 300)
    assert torch.equal(before[90:], after[90:])
    assert not torch.equal(before[:90], after[:90])


def test_the_custom_operator_passes_torchs_own_checks():
    q, k, v, starts = case(tokens=295)
    torch.library.opcheck(
        torch.ops.genemodel.attend_per_cell,
        (q, k, v, starts),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cuda_equals_the_oracle(dtype):
    q, k, v, starts = case(width=64)
    q, k, v = (x.detach().cuda().to(dtype).requires_grad_() for x in (q, k, v))
    starts = starts.cuda()
    out = attend(q, k, v, starts, 300)
    want = attend_reference(q.float(), k.float(), v.float(), starts, 300)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(out.float(), want, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(want)
    got = torch.autograd.grad((out.float() * weight).sum(), (q, k, v))
    wanted = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=5 * tolerance, atol=5 * tolerance)


# Queries of one thread block of FlashAttention-2, at head widths up to 128.
_QUERIES_A_BLOCK = 128


def thread_blocks(
    length_C: np.ndarray, *, places: int, longest: int, heads: int
) -> tuple[int, int]:
    """Thread blocks that the variable-length kernel starts, and those that have work."""
    launched = -(-longest // _QUERIES_A_BLOCK) * places * heads
    useful = int((-(-np.asarray(length_C, np.int64) // _QUERIES_A_BLOCK)).sum()) * heads
    return launched, useful


@pytest.mark.parametrize("budget", [16_384, 65_536])
def test_most_thread_blocks_of_the_grid_have_work(budget):
    """At most five are started for one that is needed, at lengths as real cells have them."""
    lengths = np.random.default_rng(0).lognormal(7.1, 0.55, 8192).clip(100, 2048).astype(int)
    assert 1200 < lengths.mean() < 1350
    settings = TokenSettings(2048, budget).placed(lengths.mean())
    counts = [
        thread_blocks(lengths[b], places=settings.places, longest=settings.context, heads=4)
        for b in plan_bins(lengths, budget, settings.max_cells)
    ]
    launched, useful = np.sum(counts, 0)
    assert 1 < launched / useful <= 5
    # The grid of a tail in one piece and a place for every 32 tokens, for comparison.
    before, _ = thread_blocks(lengths[:13], places=513, longest=16_384, heads=4)
    assert before == 262_656


@pytest.mark.parametrize("longest", [110, 300])
def test_padded_attention_equals_the_oracle(longest):
    """The way of GPUs without the variable-length kernel, tried where there is no GPU."""
    q, k, v, starts = case()
    out, expected = (f(q, k, v, starts, longest) for f in (attend_padded, attend_reference))
    check_equal(out, expected, (q, k, v))


@pytest.mark.parametrize(("width", "fits"), [(64, True), (256, True), (264, False), (20, False)])
def test_heads_that_the_kernel_has_no_room_for_are_padded(width, fits):
    assert flash_fits(width) == fits
    with fake_cuda(), DeviceTraffic("cuda") as traffic:
        q = torch.empty(64, 2, width, dtype=torch.bfloat16, device="cuda")
        starts = torch.tensor([0, 30, 64], dtype=torch.int32).to("cuda", non_blocking=True)
        assert attend(q, q, q, starts, 64).shape == q.shape
    assert traffic.ops["_varlen_attn"] == fits and traffic.waits == []
