"""Optimisers and the learning-rate schedule."""

import math
from collections.abc import Mapping
from typing import Any

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


def build_optimisers(
    module: nn.Module, settings: OptimSettings, rate_shares: Mapping[str, float] | None = None
) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon for the block matrices and AdamW for the rest.

    Parameters
    ----------
    module
        Whose trainable parameters are meant.
    settings
        Of the optimisers.
    rate_shares
        By parameter name, the share of the learning rate that it gets; 1 where not named. Every
        group of an optimiser carries its share as ``group["share"]``.
    """
    groups = parameter_groups(module)
    muon = settings.name == "muon"
    decayed = groups["decayed"] + ([] if muon else groups["matrices"])
    share_of = {
        id(parameter): (rate_shares or {}).get(name, 1.0)
        for name, parameter in module.named_parameters()
    }

    def by_share(parameters: list[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
        shares = sorted({share_of[id(p)] for p in parameters}, reverse=True)
        return [
            {
                "params": [p for p in parameters if share_of[id(p)] == share],
                "weight_decay": weight_decay,
                "share": share,
            }
            for share in shares
        ]

    adamw = torch.optim.AdamW(
        by_share(decayed, settings.weight_decay) + by_share(groups["plain"], 0.0),
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
    if not muon or not groups["matrices"]:
        return [adamw]
    return [
        adamw,
        torch.optim.Muon(
            by_share(groups["matrices"], settings.weight_decay),
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            adjust_lr_fn="match_rms_adamw",  # so that one learning rate serves both
        ),
    ]


def lr_share(step: int, max_steps: int, settings: OptimSettings, minutes: float = 0.0) -> float:
    """Learning rate of ``step`` (from 0) as a share of the peak.

    ``minutes`` of training count as well where the settings give the schedule minutes: whichever
    of the two is further decides.
    """
    warmup = min(settings.warmup_steps, max_steps)
    if step < warmup:
        return (step + 1) / warmup
    late = minutes / settings.horizon_minutes if settings.horizon_minutes else 0.0
    if settings.schedule == "wsd":
        decay = max(1, round(settings.decay_fraction * max_steps))
        left = max_steps - max(step, late * max_steps)
        if left >= decay:
            return 1.0
        return settings.final_lr + (1 - settings.final_lr) * max(left, 0) / decay
    progress = min(1.0, max((step - warmup) / max(1, max_steps - warmup), late))
    return settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * progress))
