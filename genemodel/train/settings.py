"""Everything a training run needs, as frozen values."""

from dataclasses import dataclass, field
from typing import Literal

from genemodel.cells.tokens import TokenSettings
from genemodel.errors import ConfigError
from genemodel.model.settings import ModelSettings
from genemodel.model.tuning import TuningSettings
from genemodel.settings import PathText, check_seed
from genemodel.tasks.pretraining import PretrainingSettings


@dataclass(frozen=True)
class HoldoutSettings:
    """Which cells are kept for validation: whole groups, never single cells.

    Attributes
    ----------
    by
        obs column whose groups are held out (``dataset``, ``donor``, …); ``auto`` takes the first
        of donor, dataset and batch that has several groups; empty holds nothing out.
    groups
        Names of the groups to hold out; empty draws them at random.
    fraction
        Share of the groups drawn when ``groups`` is empty.
    seed
        Address of the draw.
    """

    by: str = "donor"
    groups: tuple[str, ...] = ()
    fraction: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(
                f"holdout.fraction is {self.fraction}: it is a share of the groups, between 0 and "
                "1. To hold nothing out set holdout.by=''."
            )


@dataclass(frozen=True)
class OptimSettings:
    """Optimiser and learning-rate schedule.

    Attributes
    ----------
    name
        ``adamw`` for everything, or ``muon`` for the hidden matrices with AdamW for the rest.
    lr
        Peak learning rate (of AdamW; Muon's is matched to its update size).
    schedule
        ``cosine``: warm-up, then cosine to ``final_lr``. ``wsd``: warm-up, stable, linear decay.
    warmup_steps
        Linear warm-up from 0.
    decay_fraction
        Share of the run spent in the final decay of ``wsd``.
    final_lr
        Learning rate at the end as a share of the peak.
    weight_decay
        On matrices; never on embeddings, norms, biases or vectors.
    beta1, beta2, eps
        Of AdamW.
    clip
        Largest norm of the whole gradient; 0 switches clipping off.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    final_lr: float = 0.05
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"optim.lr is {self.lr}: it must be positive.")
        if self.warmup_steps < 0:
            raise ConfigError(f"optim.warmup_steps is {self.warmup_steps}: it cannot be negative.")
        for name in ("decay_fraction", "final_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"optim.{name} is {getattr(self, name)}: it is a share between 0 and 1."
                )
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optim.{name} is {getattr(self, name)}: it must be from 0 to below 1."
                )
        for name in ("weight_decay", "clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name} is {getattr(self, name)}: it cannot be negative.")
        if self.eps <= 0:
            raise ConfigError(f"optim.eps is {self.eps}: it must be positive.")


@dataclass(frozen=True)
class TrainerSettings:
    """How long, on what, and how often to look and save.

    Attributes
    ----------
    max_steps
        Optimiser steps of the whole run.
    max_minutes
        Stop, with a checkpoint, after this many minutes of this session; 0 for no limit.
    accumulate
        Micro-batches per process and step.
    accelerator
        ``auto`` takes a GPU where there is one.
    devices
        Processes on this node; more than one trains with distributed data parallel.
    num_nodes
        Nodes, when started by torchrun or srun on several.
    precision
        ``auto`` is ``bf16-mixed`` on GPUs and ``32-true`` on CPUs.
    compile
        Compile the blocks with torch.compile (constant shapes: one graph).
    validate_every, validation_batches
        Steps between validations, and micro-batches looked at in each.
    checkpoint_every, keep_checkpoints
        Steps between checkpoints, and how many are kept.
    early_stopping
        Validations without improvement before the run ends; 0 never ends it early.
    log_every
        Steps between rows of metrics.csv.
    """

    max_steps: int = 1000
    max_minutes: float = 0.0
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    compile: bool = False
    validate_every: int = 200
    validation_batches: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    early_stopping: int = 0
    log_every: int = 10

    def __post_init__(self) -> None:
        for name in (
            "max_steps", "accumulate", "devices", "num_nodes", "validate_every",
            "validation_batches", "checkpoint_every", "keep_checkpoints", "log_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"trainer.{name} is {getattr(self, name)}: it must be at least 1."
                )
        for name in ("max_minutes", "early_stopping"):
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"trainer.{name} is {getattr(self, name)}: it cannot be negative; 0 means no "
                    "limit."
                )


@dataclass(frozen=True)
class LogSettings:
    """Where metrics go besides ``metrics.csv`` and ``validation.csv`` in the run directory.

    Attributes
    ----------
    kind
        ``csv`` for the files alone, ``wandb`` for Weights & Biases as well.
    project, name
        Of the run at Weights & Biases.
    mode
        ``offline`` writes files to sync later; ``online`` sends while training. The key comes from
        the environment only.
    """

    kind: Literal["csv", "wandb"] = "csv"
    project: str = "genemodel"
    name: str = ""
    mode: Literal["offline", "online"] = "offline"


@dataclass(frozen=True)
class PretrainSettings:
    """A pre-training run.

    Attributes
    ----------
    corpus
        Directory of a corpus made by ``genemodel corpus build``.
    out
        Run directory. If it holds an unfinished run with the same settings, that run goes on.
    start
        Bundle directory whose weights are the start; empty for new weights. Architecture and
        context are then the bundle's, whatever ``model`` and ``tokens.context`` say.
    seed
        Of initialisation, order and masks.
    tokens, model, backbone, task, optim, trainer, log, holdout
        Groups of settings.
    """

    corpus: PathText
    out: PathText
    start: PathText = ""
    seed: int = 0
    tokens: TokenSettings = field(default_factory=TokenSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    backbone: TuningSettings = field(default_factory=TuningSettings)
    task: PretrainingSettings = field(default_factory=PretrainingSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    log: LogSettings = field(default_factory=LogSettings)
    holdout: HoldoutSettings = field(default_factory=HoldoutSettings)

    def __post_init__(self) -> None:
        check_seed(self.seed)
        tune = self.backbone.tune
        if not self.start and tune not in ("full", "scratch"):
            raise ConfigError(
                f"backbone={tune} leaves weights as they are, and without start there are only new "
                "ones: set start=BUNDLE, or backbone=full."
            )
        if self.start and tune == "scratch":
            raise ConfigError(
                f"backbone=scratch means new weights, but start={self.start} names some: leave "
                "start out, or set backbone=full."
            )
