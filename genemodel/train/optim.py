"""Optimisers and the learning-rate schedule."""

import math

import torch
from torch import nn

from genemodel.train.settings import OptimSettings


def parameter_groups(module: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Put every trainable parameter into exactly one group.

    Returns
    -------
    ``matrices``: weights of linear layers inside blocks (Muon's share); ``decayed``: other linear
    weights; ``plain``: embeddings, norms, biases, vectors (no weight decay).
    """
    groups: dict[str, list[nn.Parameter]] = {"matrices": [], "decayed": [], "plain": []}
    owner = {
        id(part.weight): name
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    seen: set[int] = set()
    for parameter in module.parameters():
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        name = owner.get(id(parameter))
        if name is None:
            groups["plain"].append(parameter)
        else:
            groups["matrices" if ".blocks." in f".{name}" else "decayed"].append(parameter)
    return groups


def build_optimisers(module: nn.Module, settings: OptimSettings) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the block matrices and AdamW for the rest."""
    groups = parameter_groups(module)
    muon = settings.name == "muon"
    decayed = groups["decayed"] + ([] if muon else groups["matrices"])
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": settings.weight_decay},
            {"params": groups["plain"], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    if not muon:
        return [adamw]
    return [
        adamw,
        torch.optim.Muon(
            groups["matrices"],
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that one learning rate serves both
        ),
    ]


def lr_share(step: int, max_steps: int, settings: OptimSettings) -> float:
    """Learning rate of ``step`` (from 0) as a share of the peak."""
    warmup = min(settings.warmup_steps, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "wsd":
        decay = max(1, round(settings.decay_fraction * max_steps))
        left = max_steps - step
        if left >= decay:
            return 1.0
        return settings.final_lr + (1 - settings.final_lr) * max(left, 0) / decay
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
