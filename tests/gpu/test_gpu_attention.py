"""Attention kernels against the block-diagonal oracle: ragged cells, tails, widths of heads."""

import numpy as np
import pytest
import torch
from attention_oracle import attend_reference

from genemodel.model.attention import attend, attend_padded

# Number format: bound on outputs and, as a share of its length, on gradients.
TOLERANCE = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (2e-2, 1e-2)}
CONTEXT = 160  # a thread block of the kernel has 128 queries, so some cells need two


def starts_of(lengths, budget, places):
    """As the packer makes them: cells, a tail cut to the context, places without tokens."""
    edges = np.concatenate([[0], np.cumsum(lengths)])
    tail = np.minimum(edges[-1] + CONTEXT * np.arange(1, places - len(lengths) + 1), budget)
    return torch.from_numpy(np.concatenate([edges, tail]).astype(np.int32))


CASES = {
    "ragged": ([1, 2, 63, 64, 65, 127, 128, 129, 160], 1024, 16),
    "no tail": ([160, 160, 160], 480, 8),
    "tail alone": ([3], 512, 8),
    "no cell": ([], 320, 8),
    "one token each": ([1] * 64, 64, 64),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [attend, attend_padded])
def test_outputs_and_gradients_equal_the_oracle(device, case, width, dtype, way):
    lengths, budget, places = CASES[case]
    starts = starts_of(lengths, budget, places)
    assert starts[-1] == budget and starts.diff().max() <= CONTEXT
    torch.manual_seed(0)
    # Both begin with the same, rounded, numbers.
    given = [torch.randn(budget, 2, width).to(dtype) for _ in range(4)]
    q, k, v = (x.to(device, copy=True).requires_grad_() for x in given[:3])
    out = way(q, k, v, starts.to(device), CONTEXT)
    assert out.dtype == dtype and out.device.type == device.type
    out.backward(given[3].to(device))
    q64, k64, v64 = (x.to(torch.float64, copy=True).requires_grad_() for x in given[:3])
    wanted = attend_reference(q64, k64, v64, starts, CONTEXT)
    wanted.backward(given[3].double())
    bound, length = TOLERANCE[dtype]
    torch.testing.assert_close(out.detach().cpu().double(), wanted.detach(), rtol=bound, atol=bound)
    for found, truth in ((q, q64), (k, k64), (v, v64)):
        difference = found.grad.cpu().double() - truth.grad
        # A cell of one token has no gradient but through its value.
        assert difference.norm() <= length * max(truth.grad.norm(), v64.grad.norm())
