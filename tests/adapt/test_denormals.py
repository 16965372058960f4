"""Denormal numbers are zeros inside, and what they are outside."""

import torch

from genemodel.adapt.denormals import denormals_flushed


def test_flushed_inside_and_restored_outside():
    tiny = torch.tensor([1e-30])
    with denormals_flushed():
        assert (tiny * 1e-10).item() == 0.0
    assert (tiny * 1e-10).item() > 0.0
