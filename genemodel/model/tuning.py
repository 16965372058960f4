"""Which weights of a pre-trained backbone learn on, how fast, and through what.

Low-rank adapters (Hu et al. 2022) stand in for changes of the hidden matrices; they are added to
the matrices when a model is released, so that a tuned model is a model like any other.
"""

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from genemodel.errors import ConfigError
from genemodel.model.gene_model import Block, GeneModel
from genemodel.model.settings import ModelSettings

Tune = Literal["frozen", "lora", "last", "full", "scratch"]


@dataclass(frozen=True)
class TuningSettings:
    """What of the backbone learns.

    Attributes
    ----------
    tune
        ``frozen``: nothing. ``lora``: low-rank changes of the matrices of all blocks. ``last``: the
        top blocks and the final norm. ``full``: everything. ``scratch``: everything, from new
        weights.
    rank, alpha
        Of ``lora``: width of the change, and its weight, which is alpha ÷ rank.
    layers
        Of ``last``: how many blocks from the top.
    layer_decay
        Learning rate of a block as a share of that of the block above it. The top block has the
        full rate, the embeddings the lowest; 1 gives the same to all.
    """

    tune: Tune = "full"
    rank: int = 8
    alpha: float = 16.0
    layers: int = 1
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        for name in ("rank", "layers"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"backbone.{name} is {getattr(self, name)}: it must be at least 1."
                )
        if self.alpha <= 0:
            raise ConfigError(f"backbone.alpha is {self.alpha}: it must be positive.")
        if not 0 < self.layer_decay <= 1:
            raise ConfigError(
                f"backbone.layer_decay is {self.layer_decay}: it is a share, above 0 and at most 1."
            )


class AdaptedLinear(nn.Linear):
    """A frozen matrix with a product of two thin matrices added, of which one starts at zero."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank
        self.down_RI = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.up_OR = nn.Parameter(torch.zeros(self.out_features, rank))

    def sum(self) -> Tensor:
        """Add the change to the matrix, (O, I)."""
        return self.weight + self.scale * (self.up_OR @ self.down_RI)

    def forward(self, x_TI: Tensor) -> Tensor:
        """(T, I) → (T, O)."""
        return F.linear(x_TI, self.sum(), self.bias)


def refuse_scratch(tuning: TuningSettings) -> None:
    """Refuse new weights where a head is put on a model that is there."""
    if tuning.tune == "scratch":
        raise ConfigError(
            "backbone='scratch' means new weights, which pre-training makes: `genemodel finetune "
            "backbone=scratch`, or gm.pretrain; then give the bundle with backbone='frozen'."
        )


def check_fits(settings: TuningSettings, shape: ModelSettings) -> None:
    """Refuse more blocks or a larger rank than a model of this shape has."""
    if settings.tune == "last" and settings.layers > shape.layers:
        raise ConfigError(
            f"backbone.layers is {settings.layers}, but the model has {shape.layers} blocks: "
            f"set it to at most {shape.layers}, or backbone=full."
        )
    if settings.tune == "lora":
        smallest = min(shape.width, shape.ffn)
        if settings.rank >= smallest:
            raise ConfigError(
                f"backbone.rank is {settings.rank}, but the matrices of the model are {smallest} "
                f"wide: set it well below, such as 8, or backbone=full."
            )


def tune(model: GeneModel, settings: TuningSettings, *, cells_only: bool = False) -> None:
    """Freeze what is not to learn, and put in the adapters where they are asked for.

    Parameters
    ----------
    model
        Changed in place.
    settings
        What learns.
    cells_only
        The loss sees vectors of cells alone: blocks above those that they are read from have no
        part in it, and are frozen.

    Raises
    ------
    ConfigError
        More blocks or a larger rank than the model has.
    """
    shape = model.settings
    everything = settings.tune in ("full", "scratch")
    model.requires_grad_(everything)
    check_fits(settings, shape)
    top = len(model.blocks)
    if cells_only and model.cell_stop is not None:
        top = model.cell_stop
        for block in model.blocks[top:]:
            block.requires_grad_(False)
    if settings.tune == "last":
        for part in (*model.blocks[max(0, top - settings.layers) : top], model.final_norm):
            part.requires_grad_(True)
    elif settings.tune == "lora":
        for owner, name, matrix in _matrices(model, top):
            setattr(owner, name, AdaptedLinear(matrix, settings.rank, settings.alpha))


def merged(model: GeneModel) -> GeneModel:
    """Return the model with its adapters added to the matrices; itself where it has none."""
    if not any(isinstance(matrix, AdaptedLinear) for _, _, matrix in _matrices(model)):
        return model
    plain = copy.deepcopy(model)
    for owner, name, matrix in _matrices(plain):
        if not isinstance(matrix, AdaptedLinear):
            continue
        linear = nn.Linear(1, 1, bias=False, device="meta")
        linear.in_features, linear.out_features = matrix.in_features, matrix.out_features
        linear.weight, linear.bias = nn.Parameter(matrix.sum().detach()), matrix.bias
        setattr(owner, name, linear)
    return plain


def rate_shares(model: GeneModel, settings: TuningSettings) -> dict[str, float]:
    """Learning rate of every parameter by name, as a share of the run's."""
    top = len(model.blocks)
    shares = {}
    for name, _ in model.named_parameters():
        depth = 0
        if name.startswith("embedding."):
            depth = top
        elif name.startswith("blocks."):
            depth = top - 1 - int(name.split(".")[1])
        shares[name] = settings.layer_decay**depth
    return shares


def _matrices(model: GeneModel, top: int | None = None) -> list[tuple[nn.Module, str, nn.Linear]]:
    """All matrices of the blocks below ``top``, with where they are."""
    found: list[tuple[nn.Module, str, nn.Linear]] = []
    for block in model.blocks[:top]:
        assert isinstance(block, Block)
        found += [(block, "qkv", block.qkv), (block, "out", block.out)]
        found += [(block.ffn, "up", block.ffn.up), (block.ffn, "down", block.ffn.down)]
    return found
