"""Everything a training run needs, as frozen values."""

from dataclasses import dataclass, field
from typing import Literal

from genemodel.batches.tokens import TokenSettings
from genemodel.errors import ConfigError
from genemodel.genes.knowledge import FOLDER
from genemodel.heads.pretraining import PretrainingSettings
from genemodel.model.settings import ModelSettings
from genemodel.model.tuning import TuningSettings
from genemodel.settings import ModelText, PathText, SpeciesText, check_seed


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
        Share of the cells of every species that is drawn, in whole groups, where ``groups`` is
        empty.
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
                f"holdout.fraction is {self.fraction}: it is a share of the cells, between 0 and "
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
    horizon_minutes
        Minutes of training, in all sessions, after which the schedule and the run end, where
        ``trainer.max_steps`` does not come first; 0 leaves it to the steps. Not exact on a resume:
        the clock decides.
    final_lr
        Learning rate at the end as a share of the peak.
    weight_decay
        On matrices; never on embeddings, norms, biases or vectors.
    beta1, beta2, eps
        Of AdamW.
    clip
        Largest norm of the whole gradient; 0 switches clipping off.
    average_decay
        Decay a step of a running mean of the weights, which is what is validated and released; 0
        for the weights themselves.
    """

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_steps: int = 100
    decay_fraction: float = 0.2
    horizon_minutes: float = 0.0
    final_lr: float = 0.05
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    clip: float = 1.0
    average_decay: float = 0.0

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
        for name in ("beta1", "beta2", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"optim.{name} is {getattr(self, name)}: it must be from 0 to below 1."
                )
        for name in ("weight_decay", "clip", "horizon_minutes"):
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
        Save and end this session after so many minutes, with exit code 75; the same command goes
        on. 0 for no limit.
    accumulate
        Micro-batches per process and step.
    accelerator
        ``auto`` takes a GPU where there is one.
    devices
        Processes on this node; more than one trains with distributed data parallel.
    num_nodes
        Nodes, when started by torchrun or srun on several.
    strategy
        ``auto``: data parallel (DDP) where there are several processes. ``fsdp``: weights and
        optimiser state are shared out over the processes as well (FSDP2, experimental).
    precision
        ``auto`` is ``bf16-mixed`` on GPUs and ``32-true`` on CPUs.
    compile
        Compile model, heads and losses with torch.compile (constant shapes: one graph).
    deterministic
        The same numbers to the bit on every run, and for any number of processes with the same
        micro-batches a step. Deterministic kernels, one thread on a CPU, and gradients added in the
        order of micro-batches, for which all of every micro-batch are sent to all processes.
    activation_checkpointing
        Forget what is inside a block and compute it again in the backward pass: less memory, about
        a third more work.
    validate_every, validation_batches
        Steps between validations, and micro-batches looked at in each, over all processes.
    checkpoint_every, keep_checkpoints
        Steps between checkpoints, and how many are kept.
    early_stopping
        Validations without improvement before the run ends; 0 never ends it early.
    early_stopping_gain
        What a validation has to gain on the best one to count as an improvement there.
    log_every
        Steps between rows of metrics.csv.
    hang_minutes
        A run of several processes in which no step is finished for so long ends, with the rank that
        is waited for by name.
    requeue
        Under Slurm: put the job into the queue again (``scontrol requeue``) once a signal or
        ``max_minutes`` has ended it, saved.
    on_nonfinite
        What to do when a loss or the gradient is not finite; the weights are not touched. ``stop``
        the run, ``skip`` the step, or ``roll_back`` to the last checkpoint and go on with the data
        behind the step.
    on_spike
        The same for a loss that jumps: ``note`` it and go on, ``skip``, ``roll_back`` or ``stop``.
    spike_deviations
        A jump is a total loss so many robust standard deviations above the recent median; 0 for
        none.
    max_skips
        Steps skipped or rolled back in all before the run stops after all.
    profile
        Steps to profile after the first five, into profile/; 0 for none.
    """

    max_steps: int = 1000
    max_minutes: float = 0.0
    accumulate: int = 1
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: Literal["auto", "fsdp"] = "auto"
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    compile: bool = False
    deterministic: bool = False
    activation_checkpointing: bool = False
    validate_every: int = 200
    validation_batches: int = 20
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    early_stopping: int = 0
    early_stopping_gain: float = 0.0
    log_every: int = 10
    hang_minutes: float = 10.0
    requeue: bool = False
    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    on_spike: Literal["note", "skip", "roll_back", "stop"] = "note"
    spike_deviations: float = 12.0
    max_skips: int = 10
    profile: int = 0

    def __post_init__(self) -> None:
        if self.hang_minutes <= 0:
            raise ConfigError(
                f"trainer.hang_minutes is {self.hang_minutes}: it must be positive; give a large "
                "number to wait for long."
            )
        for name in (
            "max_steps", "accumulate", "devices", "num_nodes", "validate_every",
            "validation_batches", "checkpoint_every", "keep_checkpoints", "log_every",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"trainer.{name} is {getattr(self, name)}: it must be at least 1."
                )
        for name in (
            "max_minutes", "early_stopping", "early_stopping_gain", "spike_deviations", "max_skips",
            "profile",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ConfigError(
                    f"trainer.{name} is {getattr(self, name)}: it cannot be negative; 0 switches "
                    "it off."
                )


@dataclass(frozen=True)
class LogSettings:
    """Where metrics go besides ``metrics.csv`` and ``validation.csv`` in the run directory.

    Attributes
    ----------
    kind
        ``csv`` for the files alone, ``wandb`` for Weights & Biases as well.
    entity, project, group, name, tags
        Of the run at Weights & Biases: whose account or team, which project, what it is grouped
        with, what it is called (empty: as the run directory), and words to find it by.
    mode
        ``offline`` writes files to sync later; ``online`` sends while training, and writes offline
        where it cannot. The key comes from ``WANDB_API_KEY`` or an earlier ``wandb login``.
    system
        Send how busy processors, memory, disks and network of the host are.
    """

    kind: Literal["csv", "wandb"] = "csv"
    entity: str = ""
    project: str = "genemodel"
    group: str = ""
    name: str = ""
    tags: tuple[str, ...] = ()
    mode: Literal["offline", "online"] = "offline"
    system: bool = True


@dataclass(frozen=True)
class NewGenesSettings:
    """How genes begin that the bundle of ``start`` has not: those of a new species above all.

    Attributes
    ----------
    begin
        ``known``: a gene with orthologs as the mean of theirs, one with knowledge as what knowledge
        says of its vector, a species as the mean of those known, a decoder's gene at its average;
        all other genes at random. ``random``: everything at random.
    orthologs
        Table of orthologs (as ``genemodel species`` takes it) between ``to`` and the new species;
        empty for none.
    to
        The species whose orthologs these are; the model knows it.
    knowledge
        Tables (names in ``knowledge_dir``, or files) that have both genes that the model has learnt
        and new ones: a ridge regression of learnt gene vectors on them says how the new ones begin.
    """

    begin: Literal["known", "random"] = "known"
    orthologs: PathText = ""
    to: SpeciesText = "human"
    knowledge: tuple[PathText, ...] = ()


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
    knowledge_dir
        Folder in which names of knowledge tables are looked up.
    new_genes
        How genes begin that the bundle of ``start`` has not.
    tokens, model, backbone, task, optim, trainer, log, holdout
        Groups of settings.
    """

    corpus: PathText
    out: PathText
    start: ModelText = ""
    seed: int = 0
    knowledge_dir: PathText = FOLDER
    new_genes: NewGenesSettings = field(default_factory=NewGenesSettings)
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
        if self.trainer.strategy == "fsdp" and self.optim.average_decay:
            raise ConfigError(
                f"optim.average_decay={self.optim.average_decay} keeps whole weights on every "
                "process, which trainer.strategy=fsdp has not: set it to 0, or "
                "trainer.strategy=auto."
            )
        tune = self.backbone.tune
        if not self.start and tune not in ("full", "scratch"):
            raise ConfigError(
                f"backbone={tune} leaves weights as they are, and without start there are only new "
                "ones: set start=BUNDLE, or backbone=full."
            )
        if not self.start and self.tokens.style != self.model.hosts:
            raise ConfigError(
                f"tokens.style={self.tokens.style}, but model.hosts={self.model.hosts}: both come "
                "with an imported model. Leave both out, or set start=BUNDLE."
            )
        if self.start and tune == "scratch":
            raise ConfigError(
                f"backbone=scratch means new weights, but start={self.start} names some: leave "
                "start out, or set backbone=full."
            )
