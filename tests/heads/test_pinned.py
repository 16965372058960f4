"""Losses and gradient norms of a few micro-batches, as they were before anything was sped up.

A faster way to the same sums may add them up in another order and nothing else.
"""

import dataclasses

import pytest
import torch

SHAPES = {
    "set": {},
    "ranks": {
        "norm": "post",
        "activation": "swiglu",
        "position": "rank",
        "bias": True,
        "embedding_norm": True,
    },
}
# (shape, seed of the cells, epoch): summed loss, items and trivial loss of every objective, and
# the norm of the gradient of the sum of their means.
PINNED = {
    ("set", 0, 0): {
        "masked_gene": (174.8659210205078, 29, 176.37974548339844),
        "masked_value": (180.2332305908203, 24, 166.84625244140625),
        "decode_counts": (1024.8011474609375, 160, 1021.9488525390625),
        "norm": 25.92743682861328,
    },
    ("set", 5, 3): {
        "masked_gene": (165.9493408203125, 29, 164.75282287597656),
        "masked_value": (161.29811096191406, 24, 157.32748413085938),
        "decode_counts": (1105.4720458984375, 160, 1081.788330078125),
        "norm": 26.361873626708984,
    },
    ("ranks", 0, 0): {
        "masked_gene": (176.8373260498047, 29, 176.37974548339844),
        "masked_value": (181.2027587890625, 24, 166.84625244140625),
        "decode_counts": (1038.688232421875, 160, 1021.9488525390625),
        "norm": 16.421266555786133,
    },
    ("ranks", 5, 3): {
        "masked_gene": (165.29136657714844, 29, 164.75282287597656),
        "masked_value": (167.7622528076172, 24, 157.32748413085938),
        "decode_counts": (1099.513671875, 160, 1081.788330078125),
        "norm": 19.086021423339844,
    },
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (5, 3)])
def test_losses_and_gradients_are_what_they_were(pack_random, away, shape, seed, epoch):
    model, task = away(**SHAPES[shape])
    prepared = task.prepare(dataclasses.replace(pack_random(seed), epoch=epoch))
    parts = task(model, model(prepared.seen), prepared)
    sum(part.total / part.items for part in parts.values()).backward()
    gradients = [
        w.grad.flatten() for w in (*task.parameters(), *model.parameters()) if w.grad is not None
    ]
    got = {
        name: (float(part.total.detach()), int(part.items), float(part.trivial))
        for name, part in parts.items()
    }
    got["norm"] = float(torch.cat(gradients).norm())
    for name, want in PINNED[shape, seed, epoch].items():
        assert got[name] == pytest.approx(want, rel=1e-5), name
