"""Training a head: quietly in a notebook, or in a folder with devices, ranks and exact resume."""

import contextlib
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from genemodel.batches.order import ORDER_VERSION
from genemodel.bundle.history import STEP, no_history
from genemodel.errors import ConfigError
from genemodel.model.devices import calculates_in_half, check_device, device_of
from genemodel.model.settings import ModelSettings
from genemodel.settings import difference
from genemodel.train.processes import Processes, Unfinished, find_processes, supervise
from genemodel.train.reading import Built, Reading
from genemodel.train.record import METRICS, VALIDATION
from genemodel.train.settings import LogSettings, OptimSettings, TrainerSettings

if TYPE_CHECKING:
    from genemodel.train.job import Job

# Rows of a head's metrics.csv, which is what its history is made of.
_ROWS = 200


class OtherProcess(SystemExit):
    """Another process of the run goes on with what has been trained; this one is done."""

    def __init__(self) -> None:
        super().__init__(0)


@dataclass(frozen=True)
class HeadRun:
    """Where a head is trained and on what.

    Attributes
    ----------
    folder
        Of the run, which can go on after an interruption; None for a short-lived one.
    trainer, log
        As in pre-training, but for the steps, which the head's own settings say.
    device
        Where the folder-less training runs: auto, cpu, cuda, cuda:1.
    content
        What the run depends on besides settings; a run goes on only with the same.
    again
        Settings and verb with which further processes are started, where there are several.
    """

    folder: Path | None = None
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    log: LogSettings = field(default_factory=LogSettings)
    device: str | torch.device = "auto"
    content: Mapping[str, str] = field(default_factory=dict)
    again: tuple[Any, Callable[[Any], object]] | None = None

    @property
    def target(self) -> torch.device:
        """Device of what follows the training."""
        return device_of(self.device)


@dataclass(frozen=True)
class Trained:
    """What a training leaves: weights by name, losses, and how far it came."""

    weights: dict[str, Tensor]
    history: pd.DataFrame
    steps: int

    def loaded(self, build: Callable[[], Built], seed: int) -> Built:
        """Build again what was trained, with its weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            built = build()
        for module, prefix in ((built.model, "model."), (built.objectives, "objectives.")):
            own = {k: v for k, v in self.weights.items() if k.startswith(prefix)}
            module.load_state_dict({k.removeprefix(prefix): v for k, v in own.items()})
        return built


def train_head(
    where: HeadRun,
    *,
    values: Mapping[str, Any],
    reading: Reading,
    optim: OptimSettings,
    steps: int,
    build: Callable[[], Built],
    seed: int,
    rate: str,
    looks: Mapping[str, Any] | None = None,
    backbone: ModelSettings | None = None,
) -> Trained:
    """Train, or go on, or find that it is done.

    Parameters
    ----------
    where
        Folder and devices.
    values
        The head's settings as plain values.
    reading, optim, steps, build, seed
        Of the training.
    rate
        What the head's settings call the learning rate.
    looks
        Fields of :class:`TrainerSettings` that say when it looks at held-out molecules or cells.
    backbone
        Shape of the transformer beneath, where there is one.

    Raises
    ------
    ConfigError
        The folder holds a run with other settings, data or model.
    ConfigError
        The numbers went out of bounds.
    KeyboardInterrupt
        Where there is no folder to go on from.
    OtherProcess
        This process was one of several, and is done.
    """
    # With it comes Lightning, which whoever only imports this need not wait for.
    from genemodel.train import job as training

    trainer = where.trainer
    if where.folder is None:
        device = where.target
        trainer = replace(
            trainer, accelerator="gpu" if device.type == "cuda" else "cpu",
            checkpoint_every=steps, keep_checkpoints=1,
        )  # fmt: skip
    if trainer.strategy == "fsdp":
        raise ConfigError(
            "trainer.strategy=fsdp shards a transformer in pre-training; heads are small: set "
            "trainer.strategy=auto."
        )
    trainer = replace(
        trainer, **{"max_steps": steps, "log_every": max(1, steps // _ROWS), **(looks or {})}
    )
    processes = find_processes(trainer.devices, trainer.num_nodes)
    accelerator = training.choose_device(trainer, processes)
    device = torch.device("cuda" if accelerator == "gpu" else "cpu")
    if backbone is not None:
        precision: str = check_device(backbone, device, trainer.precision).precision
    elif trainer.precision == "auto":
        precision = "bf16-mixed" if calculates_in_half(device) else "32-true"
    else:
        precision = trainer.precision
    about = {
        "settings": {**values, "steps": steps, "seed": seed},
        "cells": hashlib.sha256(np.ascontiguousarray(reading.train_cells)).hexdigest(),
        **where.content,
        "micro_batches": processes.world * trainer.accumulate,
        "order": ORDER_VERSION,
    }
    # The caller's random numbers are the caller's.
    with torch.random.fork_rng(), _folder(where) as run:
        checkpoint = training.checkpoint_of(run)
        if checkpoint is not None:
            _refuse_another(run, checkpoint.about, about, trainer.accumulate)
        if not (training.is_complete(checkpoint, trainer) and (run / training.WEIGHTS).exists()):
            if processes.to_be_started and where.again is not None:
                supervise(*where.again, processes)
            else:
                job = training.Job(
                    run=run, about=about, reading=reading, trainer=trainer, optim=optim,
                    log=where.log, seed=seed, build=build, processes=processes,
                    accelerator=accelerator, precision=precision,
                    kind=training.kind_of(trainer, processes), checkpoint=checkpoint,
                    quiet=where.folder is None,
                )  # fmt: skip
                _train(job, where, rate)
        if _is_one_of_many(processes):
            raise OtherProcess
        return Trained(training.read_weights(run), _history(run), steps)


def _train(job: "Job", where: HeadRun, rate: str) -> None:
    from genemodel.train.loop import TrainingStopped

    try:
        job.train()
    except Unfinished as stopped:
        if where.folder is None:  # nothing to go on from: as any other interrupted call
            raise KeyboardInterrupt from stopped
        raise
    except TrainingStopped as stopped:
        if where.folder is None and "not finite" in str(stopped):
            raise out_of_bounds(rate, job.optim.lr) from stopped
        raise


def out_of_bounds(rate: str, value: float) -> ConfigError:
    """Make the error of a training whose numbers are no numbers any more."""
    return ConfigError(
        f"The training went out of bounds ({rate}={value:g}): its numbers are no longer finite. "
        f"Set a lower {rate}, such as a tenth of it."
    )


def _is_one_of_many(processes: Processes) -> bool:
    """Whether somebody else does what follows the training."""
    return processes.world > 1 and (
        processes.started == "us" or (processes.started != "alone" and processes.rank > 0)
    )


@contextlib.contextmanager
def _folder(where: HeadRun) -> Iterator[Path]:
    if where.folder is not None:
        yield where.folder
        return
    with tempfile.TemporaryDirectory(prefix="genemodel-head-") as folder:
        yield Path(folder) / "run"


def _refuse_another(
    run: Path, earlier: Mapping[str, Any], about: Mapping[str, Any], accumulate: int
) -> None:
    changed = list(difference(earlier["settings"], about["settings"]))
    changed += [
        f"{name}: not what the run started with"
        for name in about
        if name not in ("settings", "micro_batches") and earlier.get(name) != about[name]
    ]
    from genemodel.train.job import refuse_other_micro_batches

    changed += refuse_other_micro_batches(
        earlier["micro_batches"], about["micro_batches"], accumulate
    )
    if changed:
        raise ConfigError(
            f"{run} holds a run with other settings:\n  " + "\n  ".join(changed)
            + "\nSet them back to go on with that run, or choose another folder for a new one."
        )  # fmt: skip


def _history(run: Path) -> pd.DataFrame:
    """Losses of a run: those of its looks where there are any, else those of its steps."""
    if (run / VALIDATION).exists():
        table, kind = pd.read_csv(run / VALIDATION), "val/"
    elif (run / METRICS).exists():
        table, kind = pd.read_csv(run / METRICS), "train/"
    else:
        return no_history()
    names = [c for c in table if c.startswith(kind) and c != "val/total"]
    history = table[["step", *names]].rename(columns={c: c.removeprefix(kind) for c in names})
    history = history.rename(columns={"step": STEP})
    return history.astype({STEP: "int64"})
