"""A training run of any kind: its product says what is learnt from which cells; this does the rest.

Pre-training, embedding, imputation and labels all come here, so each of them has devices, mixed
precision, ranks, exact resume, early stopping and the same files.
"""

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from genemodel.batches.order import Position
from genemodel.bundle.directory import read_tensors
from genemodel.errors import ConfigError
from genemodel.model.flops import device_peak
from genemodel.train.checkpoint import Checkpoint, newest_checkpoint
from genemodel.train.data import RankStream
from genemodel.train.exchange import Kind, make_fabric
from genemodel.train.loop import Loop, Progress, stopped_name
from genemodel.train.losses import Losses
from genemodel.train.processes import OUT_OF_TIME, Processes, StopSignals, Unfinished, requeue
from genemodel.train.ranks import BUILD, Ranks
from genemodel.train.reading import Built, Reading
from genemodel.train.record import VALIDATION, Record, keep_rows_up_to
from genemodel.train.settings import LogSettings, OptimSettings, TrainerSettings
from genemodel.writing import whole

logger = logging.getLogger(__name__)

# Loggers of Lightning; which of the last two speaks depends on what was imported.
_TALKATIVE = (
    "lightning.fabric",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
)
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Job:
    """A run that nothing speaks against: everything that could be refused has been looked at.

    Attributes
    ----------
    run
        Folder of the run.
    about
        What has to be the same for a run to go on; ``about["settings"]`` are its settings.
    reading
        Of the cells.
    trainer, optim, log, seed
        Of the run.
    build
        Makes the module, once the seed is set; called on every rank.
    release
        Called on the first rank with the weights of a look better than all before; where there are
        no looks, with those of the end. Default: they are written to ``weights.safetensors``.
    precision, accelerator, processes, kind
        What it runs on.
    compile
        Compiles model and objectives in place.
    checkpoint
        To go on from.
    look_first
        Whether what there is before the first step is the first to beat.
    name_cells
        Says in words which cells these are.
    quiet
        Say little on the way.
    """

    run: Path
    about: Mapping[str, Any]
    reading: Reading
    trainer: TrainerSettings
    optim: OptimSettings
    log: LogSettings
    seed: int
    build: Callable[[], Built]
    processes: Processes
    accelerator: str
    precision: str
    kind: Kind
    release: Callable[[Built, Progress, Mapping[str, Tensor]], None] | None = None
    compile: Callable[[Any, Any], object] | None = None
    checkpoint: Checkpoint | None = None
    look_first: bool = False
    name_cells: Callable[[np.ndarray], str] = lambda cells: f"{cells.size} cells"
    quiet: bool = False

    def train(self) -> None:
        """Train on this rank, and say how it has ended.

        Raises
        ------
        Unfinished
            A ``SystemExit``: a signal or ``trainer.max_minutes`` ended the run before its last
            step. It is saved, and the same call goes on.
        """
        processes = self.processes
        with quiet_but_first(processes.rank):
            with (
                Ranks(
                    self.run, processes.rank, processes.world, self.trainer.hang_minutes
                ) as ranks,
                StopSignals(logger.info) as signals,
            ):
                try:
                    loop = self._loop(ranks, signals)
                except RuntimeError as error:
                    # An operation between ranks breaks where another rank has ended.
                    lost = ranks.explain(error)
                    if lost is None:
                        raise
                    raise lost from error
            self._say_goodbye(loop)

    def _loop(self, ranks: Ranks, signals: StopSignals) -> Loop:
        """Meet the other ranks, build everything, and train."""
        run, trainer, reading = self.run, self.trainer, self.reading
        fabric = make_fabric(
            self.kind, self.processes, accelerator=self.accelerator, precision=self.precision,
            hang_minutes=trainer.hang_minutes,
        )  # fmt: skip
        fabric.launch()
        ranks.at(BUILD)
        rank, world = fabric.global_rank, fabric.world_size
        # Every rank has found one; a file system may have shown them different ones.
        checkpoint = fabric.broadcast(self.checkpoint)
        torch.manual_seed(self.seed)
        built = self.build()
        built.model.to(fabric.device)
        built.objectives.to(fabric.device)
        if self.compile is not None:
            self.compile(built.model, built.objectives)
        learning = sum(p.numel() for p in built.model.parameters() if p.requires_grad)
        say = logger.debug if self.quiet else logger.info
        say(
            "Model: %s parameters, %s of them learn, %s × %s, %s, %d micro-batches a step.",
            f"{sum(p.numel() for p in built.model.parameters()):,}", f"{learning:,}", world,
            self.accelerator, self.precision, world * trainer.accumulate,
        )  # fmt: skip
        run.mkdir(parents=True, exist_ok=True)
        if rank == 0:
            with whole(run / "settings.json") as partial:
                partial.write_text(json.dumps(self.about["settings"], indent=1) + "\n")
            if checkpoint is None:
                keep_rows_up_to(run / VALIDATION, -1)
        release = self.release or (lambda _, progress, weights: write_weights(run, weights))
        ways: dict[str, Any] = {"rank": rank, "world_size": world, "seed": self.seed}
        cuda = fabric.device.type == "cuda"

        def train(position: Position, pieces: int) -> RankStream:
            return reading.stream(
                reading.train_cells, fabric.device, position=position, pieces=pieces,
                layout=reading.layout, view=reading.view, **ways,
            )  # fmt: skip

        def validation(pieces: int) -> RankStream:
            assert reading.held_out is not None
            return reading.stream(
                reading.held_out, fabric.device, endless=False, view=reading.held_view,
                limit=trainer.validation_batches, pieces=pieces, **ways,
            )  # fmt: skip

        loop = Loop(
            run,
            fabric,
            Losses(built.model, built.objectives),
            kind=self.kind,
            optim=self.optim,
            trainer=trainer,
            seed=self.seed,
            train=train,
            validation=None if reading.held_out is None else validation,
            record=Record(
                run, trainer, self.log, values=self.about["settings"], rank=rank, world=world,
                peak=device_peak(torch.cuda.get_device_name(fabric.device)) if cuda else None,
                quiet=self.quiet, silent=getattr(built.objectives, "silent", ()),
            ),
            ranks=ranks,
            about=self.about,
            rate_shares=built.rate_shares,
            on_improvement=lambda progress, weights: release(built, progress, weights),
            name_cells=self.name_cells,
            most_pieces=reading.tokens.most_pieces,
        )  # fmt: skip
        with _deterministic(trainer.deterministic):
            loop.make_room()
            if checkpoint is not None:
                loop.restore(checkpoint)
            elif self.look_first:
                loop.look()
            loop.fit(signals)
        return loop

    def _say_goodbye(self, loop: Loop) -> None:
        """Leave the other ranks, and say how the run has ended."""
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        stopped_by, done = loop.stopped_by, loop.progress.step
        if stopped_by is None:
            return
        logger.info(
            "Stopped by %s after step %s of %s%s; the schedule is not finished. The same command "
            "goes on from there.",
            stopped_name(stopped_by), f"{done:,}", f"{self.trainer.max_steps:,}",
            ", saved" if done else "",
        )  # fmt: skip
        if self.trainer.requeue and self.processes.rank == 0:
            requeue()
        raise Unfinished(OUT_OF_TIME if stopped_by == "max_minutes" else 128 + int(stopped_by))


def is_complete(checkpoint: Checkpoint | None, trainer: TrainerSettings) -> bool:
    """Whether there is nothing left to train."""
    return checkpoint is not None and bool(
        checkpoint.step >= trainer.max_steps or checkpoint.about.get("ended")
    )


def kind_of(trainer: TrainerSettings, processes: Processes) -> Kind:
    """How gradients of processes meet."""
    if trainer.strategy == "fsdp" and processes.world > 1:
        return "fsdp"
    if trainer.deterministic:
        return "ordered"
    return "ddp" if processes.world > 1 else "alone"


def choose_device(settings: TrainerSettings, processes: Processes | None = None) -> str:
    """Resolve ``auto`` for accelerator and precision, and refuse what is not here."""
    cuda = torch.cuda.is_available()
    here = settings.devices if processes is None else processes.here
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if cuda else "cpu"
    if accelerator == "gpu" and not cuda:
        raise ConfigError(
            "trainer.accelerator=gpu, but torch sees no GPU here: set trainer.accelerator=cpu, or "
            "check the driver with nvidia-smi."
        )
    if accelerator == "gpu" and here > torch.cuda.device_count():
        raise ConfigError(
            f"{here} processes are asked for on this node (trainer.devices, or the launcher's), "
            f"but it has {torch.cuda.device_count()} GPUs: set at most that."
        )
    if accelerator == "gpu" and settings.deterministic and not _cublas_is_told():
        raise ConfigError(
            "trainer.deterministic=true on a GPU needs CUBLAS_WORKSPACE_CONFIG=:4096:8 in the "
            "environment before Python starts, or cuBLAS may add in another order: export it and "
            "give the command again."
        )
    if settings.strategy == "fsdp" and settings.deterministic:
        raise ConfigError(
            "trainer.strategy=fsdp sums shards in an order of its own: set "
            "trainer.deterministic=false, or trainer.strategy=auto."
        )
    return accelerator


def _cublas_is_told() -> bool:
    return os.environ.get("CUBLAS_WORKSPACE_CONFIG") in (":4096:8", ":16:8")


def write_weights(run: Path, weights: Mapping[str, Tensor]) -> None:
    """Write weights whole or not at all."""
    with whole(run / WEIGHTS) as partial:
        save_file({k: v.detach().cpu().contiguous() for k, v in weights.items()}, partial)


def read_weights(run: Path) -> dict[str, Tensor]:
    """Read what :func:`write_weights` wrote."""
    return read_tensors(run / WEIGHTS)


def checkpoint_of(run: Path) -> Checkpoint | None:
    """Find the newest checkpoint of a run."""
    return newest_checkpoint(run / "checkpoints") if run.exists() else None


def refuse_other_micro_batches(earlier: int, now: int, accumulate: int) -> list[str]:
    """Say where a step would have other micro-batches than before; no line where it has as many."""
    return [] if earlier == now else [_other_product(earlier, now // accumulate, accumulate)]


def _other_product(micro_batches: int, processes: int, accumulate: int) -> str:
    """Say that a step would have other micro-batches than before, and what has as many."""
    said = (
        f"trainer.accumulate × processes: a step has {micro_batches} micro-batches, now "
        f"{accumulate} × {processes} = {accumulate * processes}"
    )
    if micro_batches % processes == 0:
        return (
            f"{said}; {processes} processes need {micro_batches // processes} each "
            f"(pretrain, finetune: trainer.accumulate={micro_batches // processes})"
        )
    fits = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    nearest = sorted(sorted(fits, key=lambda n: abs(n - processes))[:3])
    pairs = ", ".join(f"{n} with {micro_batches // n} micro-batches each" for n in nearest)
    return f"{said}; {processes} processes cannot share {micro_batches}, but {pairs} can"


@contextlib.contextmanager
def quiet_but_first(rank: int) -> Iterator[None]:
    """Let one rank speak for all: the others only say what is wrong with them."""
    levels = {"genemodel": logging.ERROR} if rank else {}
    # What Fabric says about devices and processes is said here as well, in fewer words.
    for name in _TALKATIVE:
        levels[name] = logging.WARNING
    before = {name: logging.getLogger(name).level for name in levels}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Train with deterministic kernels only.

    On a CPU sums also depend on the number of threads, which depends on the number of processes:
    there it is one.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    if wanted:
        torch.use_deterministic_algorithms(True)
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.set_num_threads(before[1])
