"""Losses and gradient norms of a few micro-batches, as they were before anything was sped up.

A faster way to the same sums may add them up in another order and nothing else.
"""

import dataclasses

import numpy as np
import pytest
import torch

from genemodel.cells.statistics import GeneStatistics
from genemodel.genes.vocabulary import N_SPECIAL
from genemodel.model.gene_model import GeneModel
from genemodel.model.settings import ModelSettings
from genemodel.tasks.pretraining import PretrainingObjectives, PretrainingSettings

N_TOKENS = 203
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


def made(shape):
    """Make a model and objectives whose every weight is away from its start."""
    rng = np.random.default_rng(0)
    present = np.ones((2, N_TOKENS), bool)
    present[:, :N_SPECIAL] = False
    statistics = GeneStatistics(
        frequency_SV=rng.dirichlet(np.ones(N_TOKENS), 2),
        mean_value_SV=rng.uniform(1, 5, (2, N_TOKENS)),
        rate_SV=rng.dirichlet(np.ones(N_TOKENS), 2),
        dispersion_V=rng.uniform(0.5, 3, N_TOKENS),
        present_SV=present,
    )
    measured = torch.ones(1, N_TOKENS, dtype=torch.bool)
    measured[:, :N_SPECIAL] = False
    torch.manual_seed(0)
    task = PretrainingObjectives(
        PretrainingSettings(), width=32, statistics=statistics, n_batches=2, measured_XV=measured,
        seed=0,
    )  # fmt: skip
    model = GeneModel(
        ModelSettings(layers=2, width=32, heads=2, ffn=48, components=6, **SHAPES[shape]),
        n_tokens=N_TOKENS, n_species=2, context=128,
    )  # fmt: skip
    with torch.no_grad():
        for weight in (*task.parameters(), *model.parameters()):
            weight.add_(0.05 * torch.randn_like(weight))
    return model, task


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (5, 3)])
def test_losses_and_gradients_are_what_they_were(pack_random, shape, seed, epoch):
    model, task = made(shape)
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
