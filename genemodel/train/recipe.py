"""Pre-train: from a corpus and settings to a run directory with a bundle in it."""

import contextlib
import copy
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist
from torch import Tensor

import genemodel
from genemodel.bundle.bundle import ABOUT as BUNDLE_ABOUT
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.history import STEP, no_history
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.cells.corpus import Corpus
from genemodel.cells.loader import CellStream, inverse_medians
from genemodel.cells.manifest import MANIFEST
from genemodel.cells.mapped import shared
from genemodel.cells.order import ORDER_VERSION
from genemodel.cells.split import hold_out, usual_groups
from genemodel.errors import ConfigError
from genemodel.model.compiling import compile_for_training
from genemodel.model.devices import Ways, check_device
from genemodel.model.flops import device_peak
from genemodel.model.tuning import rate_shares
from genemodel.settings import check_out_folder, difference, parse, to_values
from genemodel.tasks.labels import Labels
from genemodel.train.checkpoint import Checkpoint, newest_checkpoint
from genemodel.train.data import RankStream
from genemodel.train.exchange import Kind, make_fabric
from genemodel.train.loop import Loop, Losses, Progress, stopped_name
from genemodel.train.processes import (
    OUT_OF_TIME,
    Processes,
    StopSignals,
    Unfinished,
    find_processes,
    requeue,
    supervise,
)
from genemodel.train.ranks import BUILD, Ranks
from genemodel.train.record import VALIDATION, Record, keep_rows_up_to
from genemodel.train.settings import PretrainSettings, TrainerSettings
from genemodel.train.weights import (
    build,
    bundle_of,
    labels_of,
    medians_of,
    open_start,
    shaped_like,
    training_batches,
)
from genemodel.writing import whole

logger = logging.getLogger(__name__)

# Settings that may differ when a run goes on: they change what is shown, kept or waited for, or who
# does the work, never a number that is learnt. devices, num_nodes and accumulate are looked at
# together: their product may not change.
FREE_ON_RESUME = (
    "out",
    "start",  # where the bundle lies; what it holds is compared by itself
    "log.",
    "trainer.max_minutes",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.accumulate",
    "trainer.hang_minutes",
    "trainer.requeue",
    "trainer.profile",
    "trainer.activation_checkpointing",
    # What to do about a bad step is decided when one has been met.
    "trainer.on_nonfinite",
    "trainer.on_spike",
    "trainer.spike_deviations",
    "trainer.max_skips",
)

# Loggers of Lightning; which of the last two speaks depends on what was imported.
_TALKATIVE = (
    "lightning.fabric",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
)


@dataclass(frozen=True)
class _Plan:
    """A run that nothing speaks against: everything that could be refused has been looked at."""

    settings: PretrainSettings
    run: Path
    corpus: Corpus
    start: Bundle | None
    about: dict[str, Any]
    checkpoint: Checkpoint | None
    processes: Processes
    accelerator: str
    ways: Ways
    train_cells: np.ndarray
    held_out: np.ndarray
    labels: Labels | None

    @property
    def complete(self) -> bool:
        """Whether there is nothing left to do."""
        found = self.checkpoint
        return found is not None and bool(
            found.step >= self.settings.trainer.max_steps or found.about.get("ended")
        )

    @property
    def kind(self) -> Kind:
        """How gradients of processes meet."""
        trainer = self.settings.trainer
        if trainer.strategy == "fsdp" and self.processes.world > 1:
            return "fsdp"
        if trainer.deterministic:
            return "ordered"
        return "ddp" if self.processes.world > 1 else "alone"


def pretrain(settings: PretrainSettings) -> Path:
    """Pre-train a model, or go on with the run that is in ``settings.out``.

    With ``trainer.devices`` above 1, and no launcher around it, it starts one process a device and
    waits for them.

    Parameters
    ----------
    settings
        See :class:`~genemodel.train.settings.PretrainSettings`.

    Returns
    -------
    Directory of the bundle with the best held-out loss.

    Raises
    ------
    ConfigError
        If the run directory holds a run with other settings, or a setting is impossible here.
    DataError
        If the corpus cannot be used.
    Unfinished
        A ``SystemExit``: a signal or ``trainer.max_minutes`` ended the run before its last step.
        It is saved, and the same call goes on.
    """
    plan = _plan(settings)
    if plan.complete:
        logger.info(
            "%s is complete (%s steps): nothing to do. Choose another out= for a new run.",
            plan.run, f"{plan.checkpoint.step if plan.checkpoint else 0:,}",
        )  # fmt: skip
    elif plan.processes.to_be_started:
        supervise(to_values(settings), plan.processes)
    else:
        with _quiet_but_first(plan.processes.rank):
            _train(plan)
    return plan.run / "bundle"


def _plan(settings: PretrainSettings) -> _Plan:
    """Look at everything that could be refused."""
    run = Path(settings.out)
    refuse_folder(run)
    processes = find_processes(settings.trainer.devices, settings.trainer.num_nodes)
    # Whoever started this process has said it all before.
    with _quiet_but_first(processes.rank or processes.started == "us"):
        accelerator = choose_device(settings.trainer, processes)
        corpus = Corpus.open(settings.corpus)
        torch.manual_seed(settings.seed)  # new genes of a grown vocabulary start at random
        start, origin = open_start(settings.start, corpus) if settings.start else (None, "")
        if start is not None:
            settings = shaped_like(start, settings)
        ways = check_device(
            settings.model,
            torch.device("cuda" if accelerator == "gpu" else "cpu"),
            settings.trainer.precision,
            compiled=settings.trainer.compile,
        )
        for remark in ways.remarks:
            logger.warning("%s.", remark[:1].upper() + remark[1:])
        about = {
            "settings": to_values(settings),
            "corpus": corpus.fingerprint,
            "start": origin,
            "micro_batches": processes.world * settings.trainer.accumulate,
            "order": ORDER_VERSION,
        }
        checkpoint = find_checkpoint(run, about)
        train_cells, held_out = split(settings, corpus)
        labels = None
        if settings.task.labels.weight > 0:
            labels = labels_of(corpus, settings.task.labels.label_key, train_cells)
    return _Plan(
        settings, run, corpus, start, about, checkpoint, processes, accelerator, ways,
        shared(train_cells), shared(held_out), labels,
    )  # fmt: skip


def _train(plan: _Plan) -> None:
    """Train on this rank, and say how it has ended."""
    processes, minutes = plan.processes, plan.settings.trainer.hang_minutes
    with (
        Ranks(plan.run, processes.rank, processes.world, minutes) as ranks,
        StopSignals(logger.info) as signals,
    ):
        try:
            loop = _loop(plan, ranks, signals)
        except RuntimeError as error:
            # An operation between ranks breaks where another rank has ended.
            lost = ranks.explain(error)
            if lost is None:
                raise
            raise lost from error
    _say_goodbye(loop, plan)


def _loop(plan: _Plan, ranks: Ranks, signals: StopSignals) -> Loop:
    """Meet the other ranks, build everything, and train."""
    settings, run, corpus, start = plan.settings, plan.run, plan.corpus, plan.start
    trainer = settings.trainer
    batch_codes, n_batches = training_batches(
        corpus, settings.task.decode_counts.batch_key, plan.train_cells
    )
    batch_codes = shared(batch_codes)
    medians_V = medians_of(corpus, start)
    inverse_median_V = inverse_medians(medians_V)
    fabric = make_fabric(
        plan.kind, plan.processes, accelerator=plan.accelerator, precision=plan.ways.precision,
        hang_minutes=trainer.hang_minutes,
    )  # fmt: skip
    fabric.launch()
    ranks.at(BUILD)
    rank, world = fabric.global_rank, fabric.world_size
    # Every rank has found one; a file system may have shown them different ones.
    checkpoint = fabric.broadcast(plan.checkpoint)

    def stream(cells: np.ndarray, **options: Any) -> RankStream:
        cell_stream = CellStream(
            corpus, cells, settings.tokens, seed=settings.seed,
            inverse_median_V=inverse_median_V, batch_codes=batch_codes,
            rank=rank, world_size=world, **options,
        )  # fmt: skip
        return RankStream(cell_stream, fabric.device)

    torch.manual_seed(settings.seed)
    model, objectives = build(settings, corpus, plan.train_cells, n_batches, start, plan.labels)
    model.recompute = trainer.activation_checkpointing
    plain = copy.deepcopy(model) if plan.kind == "fsdp" and rank == 0 else model
    model.to(fabric.device)
    objectives.to(fabric.device)
    if plan.ways.compiled:
        compile_for_training(model, objectives)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "Model: %s parameters, %s of them learn, %s × %s, %s, %d micro-batches a step.",
        f"{sum(p.numel() for p in model.parameters()):,}", f"{learning:,}", world,
        plan.accelerator, plan.ways.precision, world * trainer.accumulate,
    )  # fmt: skip
    begin = time.time()
    # Heads that this run does not train still fit a backbone that it does not change.
    frozen = start is not None and settings.backbone.tune == "frozen"
    kept = {
        name: weight
        for name, weight in (start.heads if frozen and start is not None else {}).items()
        if name.split(".")[0] not in objectives.heads
    }

    # The same at every release but one before the first step, which has learnt from no cell.
    before = start.training if start is not None else TrainingManifest()
    trained = functools.cache(
        lambda: TrainingManifest.after(before, TrainingManifest.of(corpus, plan.train_cells))
    )

    def release(progress: Progress, weights: Mapping[str, Tensor]) -> None:
        provenance = {
            "genemodel": genemodel.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
            "corpus": plan.about["corpus"],
            "start": plan.about["start"],
            "cells": int(plan.train_cells.size),
            "steps": progress.step,
            "seed": settings.seed,
            "validation": progress.validation,
            "session_minutes": round((time.time() - begin) / 60, 1),
        }
        if plain is not model:
            prefix = "model."
            plain.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
        # The look that this release is for has been written down.
        history = pd.read_csv(run / VALIDATION) if (run / VALIDATION).exists() else no_history()
        history[STEP] = history[STEP].astype(int)
        bundle_of(
            plain, weights, corpus.vocabulary, medians_V, settings, provenance, history,
            plan.labels.names if plan.labels is not None else (), kept,
            trained() if progress.step else before,
        ).save(run / "bundle")  # fmt: skip

    run.mkdir(parents=True, exist_ok=True)
    if rank == 0:
        with whole(run / "settings.json") as partial:
            partial.write_text(json.dumps(plan.about["settings"], indent=1) + "\n")
        if checkpoint is None:
            keep_rows_up_to(run / VALIDATION, -1)
    cuda = fabric.device.type == "cuda"
    loop = Loop(
        run,
        fabric,
        Losses(model, objectives),
        kind=plan.kind,
        optim=settings.optim,
        trainer=trainer,
        seed=settings.seed,
        train=lambda position, pieces: stream(
            plan.train_cells, position=position, pieces=pieces
        ),
        validation=lambda pieces: stream(
            plan.held_out, endless=False, limit=trainer.validation_batches, pieces=pieces
        ),
        record=Record(
            run, trainer, settings.log, values=plan.about["settings"], rank=rank, world=world,
            peak=device_peak(torch.cuda.get_device_name(fabric.device)) if cuda else None,
        ),
        ranks=ranks,
        about=plan.about,
        rate_shares=rate_shares(model, settings.backbone),
        on_improvement=release,
        name_cells=lambda cells: named_cells(corpus, cells),
        most_pieces=settings.tokens.most_pieces,
    )  # fmt: skip
    with _deterministic(trainer.deterministic):
        loop.make_room()
        if checkpoint is not None:
            loop.restore(checkpoint)
        elif start is not None:
            # What was there before is the first to beat: a run that only harms releases its start.
            loop.look()
        loop.fit(signals)
    return loop


def _say_goodbye(loop: Loop, plan: _Plan) -> None:
    """Leave the other ranks, and say how the run has ended."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    stopped_by, done = loop.stopped_by, loop.progress.step
    trainer = plan.settings.trainer
    if stopped_by is None:
        logger.info("Bundle: %s", plan.run / "bundle")
        return
    logger.info(
        "Stopped by %s after step %s of %s%s; the schedule is not finished. The same command goes "
        "on from there.",
        stopped_name(stopped_by), f"{done:,}", f"{trainer.max_steps:,}", ", saved" if done else "",
    )  # fmt: skip
    if trainer.requeue and plan.processes.rank == 0:
        requeue()
    raise Unfinished(OUT_OF_TIME if stopped_by == "max_minutes" else 128 + int(stopped_by))


@contextlib.contextmanager
def _quiet_but_first(rank: int) -> Iterator[None]:
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


def refuse_folder(run: Path) -> None:
    """Refuse to write a run into what is something else, or cannot be written."""
    check_out_folder(run)
    others = (
        (MANIFEST, "a corpus"), (BUNDLE_ABOUT, "a model"), ("finetune.json", "a fine-tuning run"),
    )  # fmt: skip
    for name, what in others:
        if (run / name).is_file():
            raise ConfigError(f"out={run} is {what} (it holds {name}): choose another folder.")


def find_checkpoint(run: Path, about: Mapping[str, Any]) -> Checkpoint | None:
    """Find where an earlier session of the same run stopped; refuse another run's directory.

    Any number of processes may go on with a run, as long as a step has the same micro-batches:
    their number in all is what the order of the data, the losses and the schedule depend on.
    """
    checkpoint = newest_checkpoint(run / "checkpoints") if run.exists() else None
    if checkpoint is None:
        return None
    earlier = checkpoint.about
    if earlier.get("order") != about["order"]:
        raise ConfigError(
            f"{run} holds a run of {checkpoint.step:,} steps that another version of genemodel "
            "began, which read the cells in another order: finish it with that version, or begin "
            f"a new run from its model with start={run / 'bundle'} and another out=."
        )
    # A setting that is newer than the run had its default then.
    before = to_values(parse(PretrainSettings, earlier["settings"]))
    changed = [
        line
        for line in difference(before, about["settings"])
        if not line.startswith(FREE_ON_RESUME)
    ]
    changed += [
        f"{name}: its content is not what the run started with"
        for name in ("corpus", "start")
        if earlier.get(name, "") != about[name]
    ]
    if earlier["micro_batches"] != about["micro_batches"]:
        accumulate = about["settings"]["trainer"]["accumulate"]
        processes = about["micro_batches"] // accumulate
        changed.append(_other_product(earlier["micro_batches"], processes, accumulate))
    if changed:
        raise ConfigError(
            f"{run} holds a run of {checkpoint.step:,} steps with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet them back to go on with that run, or choose another out= for a new one."
        )
    logger.info("Going on from %s.", checkpoint.path)
    return checkpoint


def _other_product(micro_batches: int, processes: int, accumulate: int) -> str:
    """Say that a step would have other micro-batches than before, and what has as many."""
    said = (
        f"trainer.accumulate × processes: a step has {micro_batches} micro-batches, now "
        f"{accumulate} × {processes} = {accumulate * processes}"
    )
    if micro_batches % processes == 0:
        return (
            f"{said}; with {processes} processes set trainer.accumulate="
            f"{micro_batches // processes}"
        )
    fits = [n for n in range(1, micro_batches + 1) if micro_batches % n == 0]
    nearest = sorted(sorted(fits, key=lambda n: abs(n - processes))[:3])
    pairs = ", ".join(f"{n} with trainer.accumulate={micro_batches // n}" for n in nearest)
    return f"{said}; {processes} processes cannot share {micro_batches}, but {pairs} can"


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


def split(settings: PretrainSettings, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """Return cells to train on and cells to validate on; the same where nothing is held out."""
    by = settings.holdout.by
    if by == "auto":
        by = usual_groups(corpus)
    if not by:
        every = np.arange(len(corpus))
        logger.warning(
            "Nothing is held out (holdout.by is %s): validation losses are on training cells "
            "and say nothing about new ones.",
            "auto, and there are no groups" if settings.holdout.by else "empty",
        )
        return every, every
    held = hold_out(
        corpus,
        by=by,
        groups=settings.holdout.groups,
        fraction=settings.holdout.fraction,
        seed=settings.holdout.seed,
    )
    logger.info("Corpus %s, by %s: %s.", settings.corpus, by, held.describe())
    return held.train, held.held_out


def named_cells(corpus: Corpus, cells: np.ndarray, most: int = 8) -> str:
    """Say which cells these are, by source: ``cells 17, 20 of kang.h5ad``."""
    parts = []
    source_C = np.asarray(corpus.source_C)[cells]
    for s in np.unique(source_C)[:most]:
        here = cells[source_C == s]
        first = ", ".join(f"{c:,}" for c in here[:most].tolist())
        more = f" and {here.size - most:,} more" if here.size > most else ""
        parts.append(f"cells {first}{more} of {corpus.sources[int(s)].name}")
    left = np.unique(source_C).size - most
    return "; ".join(parts) + (f"; and of {left} more sources" if left > 0 else "")
