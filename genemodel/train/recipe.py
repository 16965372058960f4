"""Pre-train: from a corpus and settings to a run directory with a bundle in it."""

import json
import logging
import os
import platform
import signal
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch

import genemodel
from genemodel.bundle.bundle import ABOUT as BUNDLE_ABOUT
from genemodel.bundle.bundle import VOCABULARY, Bundle
from genemodel.cells.corpus import Corpus
from genemodel.cells.loader import CellStream, inverse_medians
from genemodel.cells.manifest import MANIFEST
from genemodel.cells.order import Position
from genemodel.cells.split import split_cells, usual_groups
from genemodel.cells.statistics import GeneStatistics, PrincipalGenes
from genemodel.cells.tokens import TokenSettings
from genemodel.errors import ConfigError, DataError
from genemodel.genes.knowledge import KnowledgeTable
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.model.gene_model import GeneModel
from genemodel.model.tuning import merged, rate_shares, tune
from genemodel.settings import check_out_folder, difference, parse, to_values
from genemodel.tasks.decode_counts import CountDecoder
from genemodel.tasks.pretraining import PretrainingObjectives
from genemodel.train.checkpoint import Checkpoint, CheckpointDirectory, newest_checkpoint
from genemodel.train.data import StepData
from genemodel.train.module import TrainingModule
from genemodel.train.settings import PretrainSettings, TrainerSettings
from genemodel.train.watch import Watch, keep_rows_up_to

logger = logging.getLogger(__name__)

# Settings that may differ when a run goes on: they change what is shown, kept or waited for, never
# a number that is learnt.
FREE_ON_RESUME = (
    "out",
    "start",  # where the bundle lies; what it holds is compared by itself
    "log.",
    "trainer.max_minutes",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
)


class Interrupted(SystemExit):
    """A run was stopped by a signal after saving; carries the shell's code for that signal."""


def pretrain(settings: PretrainSettings) -> Path:
    """Pre-train a model, or go on with the run that is in ``settings.out``.

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
    """
    run = Path(settings.out)
    refuse_folder(run)
    trainer_settings = settings.trainer
    corpus = Corpus.open(settings.corpus)
    torch.manual_seed(settings.seed)  # new genes of a grown vocabulary start at random
    start, origin = open_start(settings.start, corpus) if settings.start else (None, "")
    if start is not None:
        settings = shaped_like(start, settings)
    values = to_values(settings)
    content = {"corpus": corpus.fingerprint, "start": origin}
    checkpoint = find_checkpoint(run, values, content)
    if checkpoint is not None and (
        checkpoint.step >= trainer_settings.max_steps or checkpoint.about.get("ended")
    ):
        logger.info(
            "%s is complete (%s steps): nothing to do. Choose another out= for a new run.",
            run, f"{checkpoint.step:,}",
        )  # fmt: skip
        return run / "bundle"
    accelerator, precision = choose_device(trainer_settings)

    train_cells, held_out = split(settings, corpus)
    batch_codes, n_batches = training_batches(
        corpus, settings.task.decode_counts.batch_key, train_cells
    )
    medians_V = medians_of(corpus, start)
    inverse_median_V = inverse_medians(medians_V)

    def stream(cells: np.ndarray, rank: int, world: int, **options: Any) -> CellStream:
        return CellStream(
            corpus, cells, settings.tokens, seed=settings.seed,
            inverse_median_V=inverse_median_V, batch_codes=batch_codes,
            rank=rank, world_size=world, **options,
        )  # fmt: skip

    position = Position(**checkpoint.about["position"]) if checkpoint else Position()
    data = StepData(
        lambda rank, world: stream(train_cells, rank, world, position=position),
        lambda rank, world: stream(held_out, rank, world, endless=False),
        accumulate=trainer_settings.accumulate,
        validation_batches=trainer_settings.validation_batches,
    )

    torch.manual_seed(settings.seed)
    model, objectives = build(settings, corpus, train_cells, n_batches, start)
    if trainer_settings.compile:
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True)
    module = TrainingModule(
        model,
        objectives,
        optim=settings.optim,
        max_steps=trainer_settings.max_steps,
        seed=settings.seed,
        about={"settings": values, **content},
        rate_shares=rate_shares(model, settings.backbone),
    )
    n = sum(p.numel() for p in model.parameters())
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    logger.info(
        "Model: %s parameters, %s of them learn, %s, %s.",
        f"{n:,}", f"{learning:,}", accelerator, precision,
    )  # fmt: skip

    begin = time.time()

    def release(trained: TrainingModule) -> None:
        provenance = {
            "genemodel": genemodel.__version__,
            "torch": version("torch"),
            "python": platform.python_version(),
            **content,
            "cells": int(train_cells.size),
            "steps": trained.steps_done,
            "seed": settings.seed,
            "validation": trained.validation,
            "session_minutes": round((time.time() - begin) / 60, 1),
        }
        bundle_of(trained, corpus.vocabulary, medians_V, settings, provenance).save(run / "bundle")

    watch = Watch(run, trainer_settings, settings.log, on_improvement=release, values=values)
    run.mkdir(parents=True, exist_ok=True)
    # What the trainer says about devices at level INFO has been said above, in fewer words.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    devices, nodes = processes(trainer_settings)
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy="ddp" if devices * nodes > 1 else "auto",
        precision=cast(Any, precision),
        max_epochs=-1,
        max_steps=-1,  # Watch counts steps: with two optimisers Lightning counts each twice
        val_check_interval=trainer_settings.validate_every,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=[watch],
        plugins=[CheckpointDirectory()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run,
    )
    if trainer.is_global_zero:
        (run / "settings.json").write_text(json.dumps(values, indent=1) + "\n")
        if checkpoint is None:
            keep_rows_up_to(run / "validation.csv", -1)
    if start is not None and checkpoint is None:
        # What was there before is the first to beat: a run that only harms releases its start.
        trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, ckpt_path=str(checkpoint.path) if checkpoint else None)

    if watch.signal is not None and not watch.finished:
        logger.info(
            "Stopped by %s after step %s, saved. The same command goes on from there.",
            signal.Signals(watch.signal).name, f"{module.steps_done:,}",
        )  # fmt: skip
        raise Interrupted(128 + watch.signal)
    if trainer.is_global_zero:
        if not (run / "bundle").exists():
            # Too short for a validation: look once, so that the bundle says how good it is.
            trainer.validate(module, data, verbose=False)
        logger.info("Bundle: %s", run / "bundle")
    return run / "bundle"


def refuse_folder(run: Path) -> None:
    """Refuse to write a run into what is something else, or cannot be written."""
    check_out_folder(run)
    others = (
        (MANIFEST, "a corpus"), (BUNDLE_ABOUT, "a model"), ("finetune.json", "a fine-tuning run"),
    )  # fmt: skip
    for name, what in others:
        if (run / name).is_file():
            raise ConfigError(f"out={run} is {what} (it holds {name}): choose another folder.")


def processes(settings: TrainerSettings) -> tuple[int, int]:
    """Count processes per node and nodes: torchrun's, or those the settings ask for."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    return settings.devices, settings.num_nodes


def open_start(path: str, corpus: Corpus) -> tuple[Bundle, str]:
    """Read the bundle to start from, and its fingerprint.

    Its vocabulary must be the corpus's, or the beginning of it.
    """
    start = Bundle.load(path, device="cpu")
    mine, theirs = corpus.vocabulary, start.vocabulary
    if mine.fingerprint == theirs.fingerprint:
        return start, start.fingerprint
    if not mine.extends(theirs):
        raise DataError(
            f"corpus {corpus.path} was built with vocabulary {mine.fingerprint[:12]} "
            f"({', '.join(mine.species)}; {len(mine):,} tokens), but start={path} knows "
            f"{theirs.fingerprint[:12]} ({', '.join(theirs.species)}; {len(theirs):,} tokens), "
            "which is not its beginning. "
            f"Build the corpus with vocabulary={Path(path) / VOCABULARY}, or leave start out."
        )
    logger.info(
        "The corpus's vocabulary has %s tokens more than that of %s: they start new.",
        f"{len(mine) - len(theirs):,}", path,
    )  # fmt: skip
    return start.grown(mine), start.fingerprint


def shaped_like(start: Bundle, settings: PretrainSettings) -> PretrainSettings:
    """Take architecture and context from the bundle; the budget of a step stays the run's."""
    context = start.tokens.context
    logger.info(
        "Starting from %s: its architecture and its context of %s tokens are taken.",
        settings.start, f"{context:,}",
    )  # fmt: skip
    tokens = TokenSettings(context, max(settings.tokens.budget, context))
    return replace(settings, model=start.model.settings, tokens=tokens)


def medians_of(corpus: Corpus, start: Bundle | None) -> np.ndarray:
    """Medians that scale the counts: those a model has learnt with, the corpus's for new genes."""
    medians_V = np.asarray(corpus.medians_V, np.float32)
    if start is None:
        return medians_V
    return np.where(np.isfinite(start.medians_V), start.medians_V, medians_V)


def find_checkpoint(
    run: Path, values: dict[str, Any], content: dict[str, str]
) -> Checkpoint | None:
    """Find where an earlier session of the same run stopped; refuse another run's directory."""
    checkpoint = newest_checkpoint(run / "checkpoints") if run.exists() else None
    if checkpoint is None:
        return None
    # A setting that is newer than the run had its default then.
    before = to_values(parse(PretrainSettings, checkpoint.about["settings"]))
    changed = [line for line in difference(before, values) if not line.startswith(FREE_ON_RESUME)]
    changed += [
        f"{name}: its content is not what the run started with"
        for name, fingerprint in content.items()
        if checkpoint.about.get(name, "") != fingerprint
    ]
    if changed:
        raise ConfigError(
            f"{run} holds a run of {checkpoint.step:,} steps with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet them back to go on with that run, or choose another out= for a new one."
        )
    logger.info("Going on from %s.", checkpoint.path)
    return checkpoint


def choose_device(settings: TrainerSettings) -> tuple[str, str]:
    """Resolve ``auto`` for accelerator and precision, and refuse what is not here."""
    cuda = torch.cuda.is_available()
    accelerator = settings.accelerator
    if accelerator == "auto":
        accelerator = "gpu" if cuda else "cpu"
    if accelerator == "gpu" and not cuda:
        raise ConfigError(
            "trainer.accelerator=gpu, but torch sees no GPU here: set trainer.accelerator=cpu, or "
            "check the driver with nvidia-smi."
        )
    if accelerator == "gpu" and settings.devices > torch.cuda.device_count():
        raise ConfigError(
            f"trainer.devices={settings.devices}, but this node has {torch.cuda.device_count()} "
            "GPUs: set trainer.devices to at most that."
        )
    precision = settings.precision
    if precision == "auto":
        precision = "bf16-mixed" if accelerator == "gpu" else "32-true"
    return accelerator, precision


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
    train_cells, held_out = split_cells(
        corpus,
        by=by,
        holdout=list(settings.holdout.groups) or settings.holdout.fraction,
        seed=settings.holdout.seed,
    )
    logger.info(
        "Corpus %s: %s cells to train on, %s held out by %s.",
        settings.corpus, f"{train_cells.size:,}", f"{held_out.size:,}", by,
    )  # fmt: skip
    return train_cells, held_out


def training_batches(corpus: Corpus, key: str, train_cells: np.ndarray) -> tuple[np.ndarray, int]:
    """Technical batch of every cell, numbered over the training cells; −1 for all others.

    A batch is named together with its data set, because names like "1" recur between data sets.
    """
    batch_C = np.full(len(corpus), -1, np.int64)
    if not key:
        return batch_C, 0
    code_C, _ = corpus.codes("dataset", key)
    known = train_cells[code_C[train_cells] >= 0]
    names, codes = np.unique(code_C[known], return_inverse=True)
    batch_C[known] = codes
    return batch_C, int(names.size)


def build(
    settings: PretrainSettings,
    corpus: Corpus,
    train_cells: np.ndarray,
    n_batches: int,
    start: Bundle | None = None,
) -> tuple[GeneModel, PretrainingObjectives]:
    """Build backbone and objectives with their starting points: a bundle, or the training cells."""
    model = new_model(settings, corpus) if start is None else start.model.train()
    statistics = GeneStatistics.measure(corpus, train_cells, seed=settings.seed)
    objectives = PretrainingObjectives(
        settings.task,
        width=settings.model.width,
        statistics=statistics,
        n_batches=n_batches,
        measured_XV=torch.from_numpy(np.asarray(corpus.measured_SV)),
        seed=settings.seed,
    )
    taken = objectives.start_from(start.heads) if start is not None else []
    new = {name: head for name, head in objectives.heads.items() if name not in taken}
    if start is not None and new:
        logger.info("New heads, which the bundle has not or not all of: %s.", ", ".join(new))
    decoder = new.get("decode_counts")
    if model.embedding.components is not None and (start is None or decoder is not None):
        components = PrincipalGenes.measure(
            corpus, train_cells, settings.model.components, seed=settings.seed
        )
        if start is None:
            model.embedding.components.start_at(
                torch.from_numpy(components.loading_VK), torch.from_numpy(components.offset_SK)
            )
        if isinstance(decoder, CountDecoder):
            decoder.start_at(components)
    tune(model, settings.backbone)
    return model, objectives


def new_model(settings: PretrainSettings, corpus: Corpus) -> GeneModel:
    """Make a backbone of new weights for the genes of the corpus."""
    vocabulary = corpus.vocabulary
    knowledge = {}
    for name in settings.model.knowledge:
        table = KnowledgeTable.read(name, vocabulary)
        key = Path(name).name.split(".")[0]
        knowledge[key] = (torch.from_numpy(table.table_VP), torch.from_numpy(table.present_V))
    return GeneModel(
        settings.model,
        n_tokens=len(vocabulary),
        n_species=len(vocabulary.species),
        context=settings.tokens.context,
        knowledge=knowledge,
    )


def bundle_of(
    module: TrainingModule,
    vocabulary: GeneVocabulary,
    medians_V: np.ndarray,
    settings: PretrainSettings,
    provenance: dict[str, Any],
) -> Bundle:
    """Release what was trained, adapters merged."""
    assert isinstance(module.model, GeneModel)
    heads = {
        name.removeprefix("heads."): tensor.detach().cpu().clone()
        for name, tensor in module.objectives.state_dict().items()
    }
    return Bundle(
        model=merged(module.model),
        vocabulary=vocabulary,
        tokens=settings.tokens,
        medians_V=medians_V,
        heads=heads,
        settings={"pretraining": to_values(settings.task)},
        provenance=provenance,
    )
