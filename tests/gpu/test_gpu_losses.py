"""Every objective on a device against full precision on a CPU: masks, losses and gradients."""

import pytest
import torch

OBJECTIVES = ("masked_gene", "masked_value", "decode_counts")
SHAPES = {
    "pre": {},
    "post": {"norm": "post", "activation": "swiglu", "position": "rank", "bias": True},
    "bf16 stream": {"residual": "bfloat16"},
    "recomputed": {"recompute": True},
}
# precision: loss, and length of the difference of the gradients as a share of the gradient's.
# fp32 differs by the order of sums; bf16 has eight bits of mantissa, about 0.4 % a number.
TOLERANCE = {"fp32": (1e-5, 1e-4), "bf16": (2e-3, 3e-2)}


def step(pack_random, away, name, device, half, recompute=False, **shape):
    """What is hidden, the loss of one objective, and the gradient of its mean."""
    model, task = away(**shape)
    model.to(device)
    model.recompute = recompute
    task.to(device)
    prepared = task.prepare(pack_random().to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        part = task(model, model(prepared.seen), prepared)[name]
    (part.total / part.items).backward()
    hidden = torch.stack([prepared.seen.gene_T.double(), prepared.seen.value_T.double()])
    gradient = [
        torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten()
        for w in (*task.parameters(), *model.parameters())
    ]
    assert all(w.grad is None or w.grad.dtype == w.dtype for w in model.parameters())
    numbers = torch.stack([part.total.detach().double(), part.trivial.double()])
    return hidden.cpu(), numbers.cpu(), torch.cat(gradient).cpu()


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_and_gradients_are_those_of_full_precision_on_a_cpu(
    pack_random, away, device, name, shape, precision
):
    loss, length = TOLERANCE[precision]
    cpu = torch.device("cpu")
    hidden, wanted, gradient = step(pack_random, away, name, cpu, False, **SHAPES[shape])
    found = step(pack_random, away, name, device, precision == "bf16", **SHAPES[shape])
    assert torch.equal(found[0], hidden)  # addresses, not a generator
    torch.testing.assert_close(found[1], wanted, rtol=loss, atol=0)
    assert (found[2] - gradient).norm() <= length * gradient.norm()


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True])
def test_compiled_losses_are_those_that_are_not(pack_random, away, gpu, half):
    """All objectives at once, through inductor; what needs none is in `tests/model`."""
    from genemodel.model.compiling import compile_for_training

    found = []
    for compiled in (False, True):
        model, task = away()
        model.to(gpu)
        task.to(gpu)
        if compiled:
            assert compile_for_training(model, task, backend="inductor")
        prepared = task.prepare(pack_random().to(gpu))
        with torch.autocast(gpu.type, torch.bfloat16, enabled=half):
            parts = task(model, model(prepared.seen), prepared)
        sum(part.total / part.items for part in parts.values()).backward()
        gradient = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
        found.append(([float(part.total.detach()) for part in parts.values()], torch.cat(gradient)))
    loss, length = TOLERANCE["bf16" if half else "fp32"]
    assert found[1][0] == pytest.approx(found[0][0], rel=loss)
    assert (found[1][1] - found[0][1]).norm() <= length * found[0][1].norm()
