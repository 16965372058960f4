"""bf16-mixed on a CPU against full precision: every objective, its loss and its gradient."""

import pytest
import torch

OBJECTIVES = ("masked_gene", "masked_value", "decode_counts")


def gradients(pack_random, away, name, *, half, residual="float32", **shape):
    model, task = away(residual=residual, **shape)
    prepared = task.prepare(pack_random())
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        part = task(model, model(prepared.seen), prepared)[name]
    (part.total / part.items).backward()
    gradient = [
        torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten()
        for w in (*task.parameters(), *model.parameters())
    ]
    assert all(w.grad is None or w.grad.dtype == w.dtype for w in model.parameters())
    return float(part.total.detach()), torch.cat(gradient)


@pytest.mark.parametrize("residual", ["float32", "bfloat16"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_full_precision(pack_random, away, name, norm, residual):
    """Eight bits of mantissa: losses within 0.1 %, gradients within 2 % of their length."""
    exact, wanted = gradients(pack_random, away, name, half=False, norm=norm)
    rough, got = gradients(pack_random, away, name, half=True, residual=residual, norm=norm)
    assert rough != exact
    assert rough == pytest.approx(exact, rel=1e-3)
    assert (got - wanted).norm() < 0.02 * wanted.norm()
