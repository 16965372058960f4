"""Activation checkpointing: the same numbers from less memory, compiled or not."""

import pytest
import torch

SHAPE = {"layers": 4, "width": 32, "heads": 2, "ffn": 128}


def one_step(away, pack_random, *, recompute, backend=None, half=False, **shape):
    """Losses, gradient, and bytes kept from the forward pass for the backward one."""
    model, task = away(**{**SHAPE, **shape})
    model.recompute = recompute
    if backend is not None:
        torch.compiler.reset()
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True, backend=backend)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(3)
    prepared = task.prepare(pack_random())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            parts = task(model, model(prepared.seen), prepared)
    sum(part.total / part.items for part in parts.values()).backward()
    gradient = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {k: part.total.detach() for k, part in parts.items()}, torch.cat(gradient), kept


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("shape", [{}, {"norm": "post"}, {"dropout": 0.3}])
def test_losses_and_gradients_are_those_of_what_is_kept(away, pack_random, backend, shape):
    losses, gradient, _ = one_step(
        away, pack_random, recompute=False, backend=backend, half=True, **shape
    )
    again, gradient_again, _ = one_step(
        away, pack_random, recompute=True, backend=backend, half=True, **shape
    )
    assert again == losses
    assert torch.equal(gradient_again, gradient)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_only_what_goes_into_a_block_is_kept(away, pack_random, backend):
    """Every block more costs its input, (T, D) float32, and no more."""
    sizes = {}
    for recompute in (False, True):
        for layers in (2, 6):
            _, _, kept = one_step(
                away, pack_random, recompute=recompute, backend=backend, layers=layers
            )
            sizes[recompute, layers] = sum(kept.values())
    per_block = {r: (sizes[r, 6] - sizes[r, 2]) / 4 for r in (False, True)}
    assert per_block[True] <= 256 * 32 * 4
    assert per_block[False] > 8 * per_block[True]


def test_nothing_is_computed_twice_without_a_gradient(away, pack_random):
    model, task = away(**SHAPE)
    model.recompute = True
    with torch.no_grad():
        encoded = model(task.prepare(pack_random()).seen)
    assert encoded.hidden_TD.grad_fn is None
