"""Pre-train: from a corpus and settings to a run directory with a bundle in it."""

import copy
import functools
import logging
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import genemodel
from genemodel.batches.loader import rank_scale
from genemodel.batches.order import ORDER_VERSION
from genemodel.batches.views import View
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.directory import file_of
from genemodel.bundle.history import STEP, no_history
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.manifest import MANIFEST
from genemodel.corpus.mapped import shared
from genemodel.corpus.split import Grouped, hold_out, usual_groups
from genemodel.errors import ConfigError
from genemodel.heads.labels import Labels
from genemodel.model.compiling import compile_for_training
from genemodel.model.devices import Ways, check_device
from genemodel.model.gene_model import GeneModel
from genemodel.model.tuning import rate_shares
from genemodel.settings import check_out_folder, difference, parse, to_values
from genemodel.train.checkpoint import Checkpoint
from genemodel.train.job import (
    Job,
    checkpoint_of,
    choose_device,
    is_complete,
    kind_of,
    quiet_but_first,
    refuse_other_micro_batches,
)
from genemodel.train.loop import Progress
from genemodel.train.new_genes import NewGenes
from genemodel.train.processes import Processes, find_processes, supervise
from genemodel.train.reading import Built, Reading
from genemodel.train.record import VALIDATION
from genemodel.train.settings import HoldoutSettings, PretrainSettings
from genemodel.train.weights import (
    build,
    bundle_of,
    knowledge_of,
    labels_of,
    medians_of,
    open_start,
    shaped_like,
    training_batches,
)

logger = logging.getLogger(__name__)

# Settings that may differ when a run goes on: they change what is shown, kept or waited for, or who
# does the work, never a number that is learnt. devices, num_nodes and accumulate are looked at
# together: their product may not change.
FREE_ON_RESUME = (
    "out",
    "start",  # where the bundle lies; what it holds is compared by itself
    "log.",
    "knowledge_dir",  # where tables lie; what they hold is compared by itself
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
    new_genes: NewGenes | None


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
    if is_complete(plan.checkpoint, plan.settings.trainer):
        logger.info(
            "%s is complete (%s steps): nothing to do. Choose another out= for a new run.",
            plan.run, f"{plan.checkpoint.step if plan.checkpoint else 0:,}",
        )  # fmt: skip
    elif plan.processes.to_be_started:
        supervise(settings, pretrain, plan.processes)
    else:
        _job(plan).train()
        with quiet_but_first(plan.processes.rank):
            logger.info("Bundle: %s", plan.run / "bundle")
    return plan.run / "bundle"


def _plan(settings: PretrainSettings) -> _Plan:
    """Look at everything that could be refused."""
    run = Path(settings.out)
    refuse_folder(run)
    processes = find_processes(settings.trainer.devices, settings.trainer.num_nodes)
    # Whoever started this process has said it all before.
    with quiet_but_first(processes.rank or processes.started == "us"):
        accelerator = choose_device(settings.trainer, processes)
        corpus = Corpus.open(settings.corpus)
        torch.manual_seed(settings.seed)  # new genes of a grown vocabulary start at random
        start, origin, new_genes = None, "", None
        if settings.start:
            start, origin, learnt = open_start(settings.start, corpus)
            new_genes = NewGenes.read(settings.new_genes, settings.knowledge_dir, learnt, start)
            settings = shaped_like(start, settings)
        knowledge = knowledge_of(settings)
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
            "knowledge": knowledge,
            "micro_batches": processes.world * settings.trainer.accumulate,
            "order": ORDER_VERSION,
        }
        checkpoint = find_checkpoint(run, about)
        train_cells, held_out = split(settings.holdout, corpus, settings.corpus)
        labels = None
        if settings.task.labels.weight > 0:
            labels = labels_of(corpus, settings.task.labels.label_key, train_cells)
    return _Plan(
        settings, run, corpus, start, about, checkpoint, processes, accelerator, ways,
        shared(train_cells), shared(held_out), labels, new_genes,
    )  # fmt: skip


def _job(plan: _Plan) -> Job:
    """Say what is trained, on which cells, and what is released."""
    settings, corpus, start = plan.settings, plan.corpus, plan.start
    trainer, processes = settings.trainer, plan.processes
    batch_codes, n_batches = training_batches(
        corpus, settings.task.decode_counts.batch_key, plan.train_cells
    )
    medians_V = medians_of(corpus, start)
    kind = kind_of(trainer, processes)
    decoding = settings.task.decode_counts
    view = None
    if decoding.weight > 0 and decoding.keep_min < 1:
        view = View(settings.seed, decoding.keep_min, decoding.keep_max)
    begin = time.time()
    # Under FSDP the model's own parameters become shards: what is released is another copy.
    plain: list[GeneModel] = []

    # The same at every release but one before the first step, which has learnt from no cell.
    before = start.training if start is not None else TrainingManifest()
    seen = functools.cache(
        lambda: TrainingManifest.after(before, TrainingManifest.of(corpus, plan.train_cells))
    )

    def build_all() -> Built:
        model, objectives = build(
            settings, corpus, plan.train_cells, n_batches, start, plan.labels, plan.new_genes
        )
        model.recompute = trainer.activation_checkpointing
        if kind == "fsdp" and processes.rank == 0:
            plain.append(copy.deepcopy(model))
        return Built(model, objectives, rate_shares(model, settings.backbone))

    def release(built: Built, progress: Progress, weights: Mapping[str, Tensor]) -> None:
        provenance = {
            "genemodel": genemodel.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
            "corpus": plan.about["corpus"],
            "start": plan.about["start"],
            "knowledge": plan.about["knowledge"]
            or (start.provenance.get("knowledge", {}) if start is not None else {}),
            "cells": int(plan.train_cells.size),
            "steps": progress.step,
            "seed": settings.seed,
            "validation": progress.validation,
            "session_minutes": round((time.time() - begin) / 60, 1),
        }
        model: Any = built.model
        if plain:
            model, prefix = plain[0], "model."
            model.load_state_dict(
                {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
            )
        # The look that this release is for has been written down.
        rows = plan.run / VALIDATION
        history = pd.read_csv(rows) if rows.exists() else no_history()
        history[STEP] = history[STEP].astype(int)
        # Heads that this run does not train still fit a backbone that it does not change.
        kept = {}
        if start is not None and settings.backbone.tune == "frozen":
            trained: Any = built.objectives
            kept = {
                name: weight
                for name, weight in start.heads.items()
                if name.split(".")[0] not in trained.heads
            }
        bundle_of(
            model, weights, corpus.vocabulary, medians_V, settings, provenance, history,
            plan.labels.names if plan.labels is not None else (), kept,
            seen() if progress.step else before,
        ).save(plan.run / "bundle")  # fmt: skip

    return Job(
        run=plan.run,
        about=plan.about,
        reading=Reading(
            corpus, settings.tokens, rank_scale(medians_V, settings.tokens.style),
            plan.train_cells, plan.held_out,
            batch_codes=shared(batch_codes), view=view, held_view=view,
        ),
        trainer=trainer,
        optim=settings.optim,
        log=settings.log,
        seed=settings.seed,
        build=build_all,
        processes=processes,
        accelerator=plan.accelerator,
        precision=plan.ways.precision,
        kind=kind,
        release=release,
        compile=compile_for_training if plan.ways.compiled else None,
        checkpoint=plan.checkpoint,
        look_first=start is not None and plan.checkpoint is None,
        name_cells=lambda cells: named_cells(corpus, cells),
    )  # fmt: skip


def refuse_folder(run: Path) -> None:
    """Refuse to write a run into what is something else, or cannot be written."""
    check_out_folder(run)
    known = file_of(run)
    others = (
        (known, "a corpus" if known == MANIFEST else "a model"),
        ("finetune.json", "a fine-tuning run"),
    )
    for name, what in others:
        if name is not None and (run / name).is_file():
            raise ConfigError(f"out={run} is {what} (it holds {name}): choose another folder.")


def find_checkpoint(run: Path, about: Mapping[str, Any]) -> Checkpoint | None:
    """Find where an earlier session of the same run stopped; refuse another run's directory.

    Any number of processes may go on with a run, as long as a step has the same micro-batches:
    their number in all is what the order of the data, the losses and the schedule depend on.
    """
    checkpoint = checkpoint_of(run)
    if checkpoint is None:
        return None
    earlier = checkpoint.about
    if earlier.get("order") != about["order"]:
        raise ConfigError(
            f"{run} holds a run of {checkpoint.step:,} steps that another version of genemodel "
            "began, which read the cells in another order: finish it with that version, or begin "
            f"a new run from its model in another folder (pretrain: start={run / 'bundle'} out=…)."
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
    # Runs of before keep no hash of their tables: what they hold is in the checkpoint.
    then = {key: one["sha256"] for key, one in earlier.get("knowledge", {}).items()}
    changed += [
        f"model.knowledge: table {key} is not what the run started with"
        for key, one in about["knowledge"].items()
        if "knowledge" in earlier and then.get(key) != one["sha256"]
    ]
    changed += refuse_other_micro_batches(
        earlier["micro_batches"], about["micro_batches"], about["settings"]["trainer"]["accumulate"]
    )
    if changed:
        raise ConfigError(
            f"{run} holds a run of {checkpoint.step:,} steps with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet them back to go on with that run, or choose another out= for a new one."
        )
    logger.info("Going on from %s.", checkpoint.path)
    return checkpoint


def split(holdout: HoldoutSettings, cells: Grouped, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return cells to train on and cells to validate on; the same where nothing is held out."""
    by = holdout.by
    if by == "auto":
        by = usual_groups(cells)
    if not by:
        every = np.arange(len(cells))
        logger.warning(
            "Nothing is held out (holdout.by is %s): validation losses are on training cells "
            "and say nothing about new ones.",
            "auto, and there are no groups" if holdout.by else "empty",
        )
        return every, every
    held = hold_out(
        cells, by=by, groups=holdout.groups, fraction=holdout.fraction, seed=holdout.seed
    )
    logger.info("Cells of %s, by %s: %s.", where, by, held.describe())
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
