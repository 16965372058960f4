"""Fine-tuning by the command line: a file or a corpus in; embedding, imputed counts and models out.

::

    out/finetune.json      settings, and what data and model were
    out/backbone/          a training run of the backbone alone: corpus/, metrics.csv, checkpoints/,
                           bundle/
    out/heads/integrate/   a training run of a head: metrics.csv, checkpoints/, …
    out/embedded.h5ad      task integrate: all that the data hold but counts, embedding
    out/model/             … the IntegratedModel
    out/imputed.h5ad       task impute: … layers with mean and standard deviation
    out/imputation_model/  … the ImputationModel
    out/classifier/        task classify: a bundle that tells the labels apart, calibrated
    out/labels.h5ad        … all that the data hold but counts, labels and confidence
    out/genes.tsv          task genes: labels of genes by models that had not learnt their family
    out/gene_classifier/   … a bundle that tells labels of genes apart
    out/curves.csv         losses of the heads
    out/report.html        cells before and after, scores by label, then all of these curves

Every training is a run of the one loop: on any device, over ranks, and resumed exactly. A head's
loss reaches what of the backbone learns. Where a warm-up is asked for, or the backbone is new, it
is first trained alone, with the objectives of pre-training. Axes: C cells, V vocabulary, G genes.
"""

import csv
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.annotation.annotate import KEY as LABEL
from genemodel.annotation.annotate import UNKNOWN_BELOW, classify, write_labels
from genemodel.annotation.labels import calibrate, probabilities_of
from genemodel.batches.grouped import GroupedCells
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import VOCABULARY, Bundle
from genemodel.bundle.directory import file_of, sha256
from genemodel.bundle.history import STEP
from genemodel.bundle.hub import local_model
from genemodel.cells.annotations import without_counts
from genemodel.cells.contract import find_counts
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.obs_columns import COLUMNS
from genemodel.cells.source import Source
from genemodel.cells.sources import open_source
from genemodel.cells.whole_file import read_anndata
from genemodel.command import config_files
from genemodel.command.finetune_genes import GeneRun, known_tasks
from genemodel.command.finetune_settings import FinetuneSettings as FinetuneSettings
from genemodel.corpus.corpus import Corpus
from genemodel.corpus.manifest import MANIFEST
from genemodel.embedding.embed import write_whole
from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.finetuning.head_run import HeadRun
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.heads.pretraining import PretrainingSettings
from genemodel.imputation.impute import impute
from genemodel.imputation.impute_corpus import impute_corpus, one_species
from genemodel.imputation.model import ImputationModel
from genemodel.inference.counts import corpus_chunks
from genemodel.inference.obs_keys import (
    batch_names,
    keys_of,
    label_codes,
)
from genemodel.integration.integrate import integrate_cells
from genemodel.integration.model import IntegratedModel
from genemodel.integration.plan import batches_of
from genemodel.model.devices import device_of
from genemodel.model.settings import ModelSettings
from genemodel.model.tuning import TuningSettings, check_fits
from genemodel.settings import (
    check_out_folder,
    difference,
    nearest,
    parse,
    to_values,
)
from genemodel.train.job import choose_device
from genemodel.train.recipe import FREE_ON_RESUME, pretrain, split
from genemodel.train.record import METRICS
from genemodel.train.settings import (
    PretrainSettings,
)
from genemodel.train.weights import labels_of
from genemodel.writing import whole

if TYPE_CHECKING:
    from anndata import AnnData

    from genemodel.reports.finetuning import Integrated

logger = logging.getLogger(__name__)

ABOUT, CURVES, REPORT = "finetune.json", "curves.csv", "report.html"
BACKBONE, HEADS = "backbone", "heads"
EMBEDDED, MODEL = "embedded.h5ad", "model"
IMPUTED, IMPUTATION_MODEL = "imputed.h5ad", "imputation_model"
LABELLED, CLASSIFIER = "labels.h5ad", "classifier"
GENES, GENE_CLASSIFIER = "genes.tsv", "gene_classifier"
RUN = "settings.json"
RESULTS = (
    EMBEDDED, MODEL, IMPUTED, IMPUTATION_MODEL, LABELLED, CLASSIFIER, GENES, GENE_CLASSIFIER,
    CURVES, REPORT,
)  # fmt: skip
# Settings that change no number: they may differ when a run goes on.
_FREE = ("out", "overwrite", "device", "input", "model", *FREE_ON_RESUME)


class _Words(TypedDict):
    """Which texts of a column stand for a missing value."""

    missing_labels: Sequence[str]
    settled: bool


def finetune(settings: FinetuneSettings) -> Path:
    """Fine-tune on a file or a corpus of counts, or go on with the run that is in the folder.

    Returns
    -------
    The folder; what is in it is said at the top of this module.

    Raises
    ------
    ConfigError
        The folder holds a run with other settings, data or model; an impossible setting.
    DataError
        The data cannot be read or used.
    """
    out = Path(settings.out)
    check_out_folder(out)
    device_of(settings.device)
    bundle = Bundle.load(settings.model, device=settings.device) if settings.model else None
    corpus, adata, reading, content = _read(settings)
    # Whatever would be refused after stage 1 is refused before it.
    words: _Words = {
        "missing_labels": settings.missing_labels, "settled": corpus is not None,
    }  # fmt: skip
    keys = keys_of(settings.batch_key) if settings.batch_key else ()
    if settings.classifies:
        label_codes(adata.obs, settings.label_key, **words)
    elif settings.integrates:
        batches_of(adata.obs, keys, **words)
        if settings.label_key:
            label_codes(adata.obs, settings.label_key, **words)
    elif keys:
        batch_names(adata.obs, keys, **words)
    if corpus is None:
        find_counts(adata, where=settings.input, **reading.counting())
    _refuse_impossible(settings, bundle, corpus, adata)
    if settings.labels_genes:
        content += sha256(known_tasks(settings, bundle))
    values = to_values(settings)
    about = {
        "settings": values,
        "data": content,
        "model": bundle.fingerprint if bundle is not None else "",
    }
    _refuse_another_run(out, about, overwrite=settings.overwrite)
    if all((out / name).exists() for name in _wanted(settings)):
        logger.info("%s is complete: nothing to do. Choose another out= for a new run.", out)
        return out
    new = not out.exists()
    try:
        if settings.trains_alone:
            bundle = _adapt(settings, bundle, corpus, adata, reading, about)
        _note(out, about)
        if settings.classifies and bundle is not None:
            _label(settings, corpus, adata, reading, bundle)
        if settings.integrates and not (out / EMBEDDED).exists():
            _integrate(settings, corpus, adata, reading, bundle, about)
        if settings.imputes and not (out / IMPUTATION_MODEL).exists():
            _impute(settings, corpus, adata, reading, bundle, about)
        if settings.labels_genes and bundle is not None and not (out / GENE_CLASSIFIER).exists():
            _label_genes(settings, corpus, adata, reading, bundle, about)
    except GenemodelError:
        # A refusal that only the genes or the counts deep in the file could give.
        if new and out.is_dir() and [path.name for path in out.iterdir()] == [ABOUT]:
            shutil.rmtree(out)
        raise
    _report(settings, values, corpus, adata, reading)
    return out


def _refuse_impossible(
    settings: FinetuneSettings, bundle: Bundle | None, corpus: Corpus | None, adata: "AnnData"
) -> None:
    """Refuse what training would refuse after other work has been done."""
    choose_device(settings.trainer)
    if corpus is not None and settings.imputes:
        one_species(corpus)
    if corpus is not None and bundle is not None and not settings.trains_alone:
        mine, theirs = corpus.vocabulary, bundle.vocabulary
        if mine.fingerprint != theirs.fingerprint:
            file = local_model(settings.model) / VOCABULARY
            raise DataError(
                f"input={settings.input} was built with vocabulary {mine.fingerprint[:12]}, and "
                f"model={settings.model} reads {theirs.fingerprint[:12]}: build the corpus with "
                f"the latter (corpus build: vocabulary={file}), or "
                "set warm_up=true, which lets the model grow where it can."
            )
    if bundle is not None:
        check_fits(settings.backbone, bundle.model.settings)
    by = settings.holdout.by
    known = list(corpus.columns) if corpus is not None else [str(c) for c in adata.obs.columns]
    if by not in ("", "auto", *COLUMNS, *known):
        near = nearest(by, known)
        raise DataError(
            f"holdout.by={by}: input={settings.input} has no such obs column"
            + (f", did you mean {near}?" if near else f"; it has {', '.join(known) or 'none'}.")
        )


def _wanted(settings: FinetuneSettings) -> list[str]:
    """Results that a finished run has; in each pair the second is written last."""
    names = [MODEL, EMBEDDED] if settings.integrates else []
    if settings.classifies:
        names = [CLASSIFIER, LABELLED]
    elif settings.labels_genes:
        names = [GENES, GENE_CLASSIFIER]
    return [*names, *([IMPUTED, IMPUTATION_MODEL] if settings.imputes else []), REPORT]


def _note(out: Path, about: dict[str, Any]) -> None:
    """Write down what the run is."""
    out.mkdir(parents=True, exist_ok=True)
    with whole(out / ABOUT) as partial:
        partial.write_text(json.dumps(about, indent=1) + "\n")


def _refuse_another_run(out: Path, about: dict[str, Any], *, overwrite: bool) -> None:
    """Refuse a folder with a run of other settings, data or model; clear it if that is wanted."""
    known = file_of(out)
    for name, what in (
        (known, "a corpus" if known == MANIFEST else "a model"), (RUN, "a training run"),
    ):  # fmt: skip
        if name is not None and (out / name).is_file():
            raise ConfigError(f"out={out} is {what} (it holds {name}): choose another folder.")
    there = [name for name in RESULTS if (out / name).exists()]
    parts = [name for name in (BACKBONE, HEADS) if (out / name).exists()]
    if overwrite and (there or parts) and not (out / ABOUT).is_file():
        raise ConfigError(
            f"out={out} holds {', '.join(there + parts)}, and no {ABOUT} that says that they "
            "are of fine-tuning: overwrite=true replaces nothing else. Choose another folder."
        )
    begun = bool(there) or (out / BACKBONE / "checkpoints").exists() or (out / HEADS).exists()
    # A folder that is not ours is not cleared, whatever it is called.
    begun = begun or (bool(parts) and not (out / ABOUT).exists())
    if overwrite or not begun:
        for name in (*there, *parts):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            else:
                (out / name).unlink(missing_ok=True)
        return
    try:
        earlier = json.loads((out / ABOUT).read_text())
        before = to_values(parse(FinetuneSettings, earlier["settings"]))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"out={out} holds {', '.join(there + parts)}, and no {ABOUT} that says how it was "
            "made: choose another folder."
        ) from error
    changed = [line for line in difference(before, about["settings"]) if not line.startswith(_FREE)]
    changed += [
        f"{name}: its content is not what the run started with"
        for name in ("data", "model")
        if earlier.get(name) != about[name]
    ]
    if changed:
        raise ConfigError(
            f"out={out} holds a run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet them back to go on with that run, choose another folder, or set "
            "overwrite=true to start anew."
        )


# -- data ------------------------------------------------------------------------------------------


def _read(
    settings: FinetuneSettings,
) -> tuple[Corpus | None, "AnnData", InputSettings, str]:
    """Read the cells, and say how their counts are; the last is a fingerprint of what was read."""
    import anndata as ad

    data = Path(settings.input)
    if (data / MANIFEST).is_file():
        corpus = Corpus.open(data)
        reading = settings.reading
        # The labels of a corpus are learnt by the code; batches and beside labels are read here.
        free = () if settings.classifies else ("missing_labels",)
        if settled := [name for name in reading.changed if name not in free]:
            raise ConfigError(
                f"input={data} is a corpus, whose {' and '.join(settled)} "
                f"{'was' if len(settled) == 1 else 'were'} settled when it was built: leave "
                f"{' and '.join(settled)} out."
            )
        # The corpus is streamed: what is said of its cells is enough.
        obs = corpus.obs()
        obs.index = obs.index.astype(str)
        return corpus, ad.AnnData(obs=obs), reading, corpus.fingerprint
    if not data.exists():
        raise DataError(
            f"input={data} is no file: name a file of raw counts, or the folder of a corpus."
        )
    files = sorted(p for p in data.rglob("*") if p.is_file()) if data.is_dir() else [data]
    adata, reading = read_anndata(data, settings.reading)
    return None, adata, reading, "".join(sha256(file) for file in files)


# -- the backbone alone ----------------------------------------------------------------------------


def _adapt(
    settings: FinetuneSettings,
    bundle: Bundle | None,
    corpus: Corpus | None,
    adata: "AnnData",
    reading: InputSettings,
    about: dict[str, Any],
) -> Bundle:
    """Go on with pre-training on the user's cells; returns the adapted bundle."""
    run = Path(settings.out) / BACKBONE
    _note(Path(settings.out), about)
    batch_column = "batch"
    if corpus is None:
        corpus = _corpus(settings, bundle, adata, reading, run / "corpus")
    elif len(settings.batch_key) > 1:
        raise ConfigError(
            f"batch_key={list(settings.batch_key)}: a corpus has one technical batch. Name one "
            "column, or build the corpus with a column that joins them."
        )
    else:
        batch_column = settings.batch_key[0] if settings.batch_key else "batch"
    task = PretrainingSettings()
    if bundle is not None and "pretraining" in bundle.settings:
        task = parse(PretrainingSettings, bundle.settings["pretraining"], where="model: objectives")
    if task.labels.weight:  # a model that told other labels apart
        task = PretrainingSettings()
    task = replace(task, decode_counts=replace(task.decode_counts, batch_key=batch_column))
    if settings.classifies:
        task = _only_labels(task, settings.label_key)
    fresh = settings.backbone.tune == "scratch"
    if bundle is None:
        shape = config_files.compose("pretrain", [f"model={settings.size}"])["model"]
        model, tokens = parse(ModelSettings, shape), settings.tokens
    else:
        context = bundle.tokens.context
        model = bundle.model.settings
        tokens = TokenSettings(
            context, max(settings.tokens.budget, context), style=bundle.tokens.style
        )
    what = "labels" if settings.classifies else "the backbone alone on these cells"
    logger.info("Training %s (backbone %s).", what, settings.backbone.tune)
    path = pretrain(
        PretrainSettings(
            corpus=str(corpus.path),
            out=str(run),
            start="" if fresh else settings.model,
            seed=settings.seed,
            tokens=tokens,
            model=model,
            backbone=settings.backbone,
            task=task,
            optim=settings.optim,
            trainer=settings.trainer,
            log=settings.log,
            holdout=settings.holdout,
        )
    )
    adapted = Bundle.load(path, device=settings.device)
    if adapted.provenance["steps"] == 0 and not settings.classifies:
        logger.warning(
            "The warm-up did not lower the loss on held-out cells: the backbone is used as it was. "
            "Try a lower optim.lr, or leave warm_up out."
        )
    return adapted


def _only_labels(task: PretrainingSettings, label_key: str) -> PretrainingSettings:
    """Leave the labels as the one objective."""
    return replace(
        task,
        masked_gene=replace(task.masked_gene, weight=0.0),
        masked_value=replace(task.masked_value, weight=0.0),
        decode_counts=replace(task.decode_counts, weight=0.0),
        labels=replace(task.labels, weight=1.0, label_key=label_key),
    )


def _corpus(
    settings: FinetuneSettings,
    bundle: Bundle | None,
    adata: "AnnData",
    reading: InputSettings,
    path: Path,
) -> Corpus:
    """Build a corpus of the cells, or open the one that is there."""
    if path.exists():
        return Corpus.open(path)
    vocabulary = bundle.vocabulary if bundle is not None else GeneVocabulary.builtin()
    path.parent.mkdir(parents=True, exist_ok=True)
    source = _source(settings, vocabulary, adata, reading)
    return Corpus.build(
        [source],
        path,
        vocabulary=vocabulary,
        keep=_kept(settings),
        min_fraction=reading.min_fraction,
    )


def _kept(settings: FinetuneSettings) -> tuple[str, ...]:
    """Name the obs columns that the corpus has to hold beside the usual ones."""
    by = (settings.holdout.by,) if settings.holdout.by not in ("", "auto") else ()
    return (*by, settings.label_key) if settings.classifies else by


def _source(
    settings: FinetuneSettings, vocabulary: GeneVocabulary, adata: "AnnData", reading: InputSettings
) -> Source:
    """Open the cells for a corpus, with the technical batch under the corpus's name for it."""
    if reading.species is None and len(vocabulary.species) == 1:
        reading = reading.but(species=vocabulary.species[0])
    source = open_source(
        adata,
        **reading.opening(),
        # Not kept as it is: what stands for a missing label is none.
        columns={settings.label_key: settings.label_key} if settings.classifies else None,
        keep=_kept(settings),
        name=Path(settings.input).stem,
    )
    if settings.batch_key:
        name_C = batch_names(
            adata.obs, settings.batch_key, where="data", missing_labels=settings.missing_labels
        )
        source.obs["batch"] = pd.Categorical(name_C)
    return source


# -- heads -----------------------------------------------------------------------------------------


def _head_run(settings: FinetuneSettings, name: str, about: dict[str, Any]) -> HeadRun:
    """Where a head is trained."""
    return HeadRun(
        folder=Path(settings.out) / HEADS / name,
        trainer=settings.trainer,
        log=settings.log,
        device=settings.device,
        content={"data": about["data"], "model": about["model"]},
        again=(settings, finetune),
    )


def _tuning(settings: FinetuneSettings) -> TuningSettings:
    """Say what the loss of a head reaches; new weights have been trained, and stay."""
    if settings.backbone.tune == "scratch":
        return TuningSettings(tune="frozen")
    return settings.backbone


def _held_out(
    settings: FinetuneSettings, corpus: Corpus | None, adata: "AnnData"
) -> np.ndarray | None:
    if not settings.hold_out:
        return None
    groups = corpus if corpus is not None else GroupedCells(adata.obs, settings.input)
    _, held_out = split(settings.holdout, groups, settings.input)
    # Where nothing can be held out, both sides are all cells.
    return held_out if held_out.size < len(groups) else None


def _integrate(
    settings: FinetuneSettings,
    corpus: Corpus | None,
    adata: "AnnData",
    reading: InputSettings,
    bundle: Bundle | None,
    about: dict[str, Any],
) -> None:
    out = Path(settings.out)
    result, embedding_CD = integrate_cells(
        adata if corpus is None else corpus,
        keys_of(settings.batch_key),
        settings.label_key or None,
        bundle,
        _tuning(settings),
        reading=reading,
        settings=settings.integration,
        where=_head_run(settings, "integrate", about),
        seed=settings.seed,
        held_out=_held_out(settings, corpus, adata),
    )
    _add_curves(out / CURVES, "integrate", result.history)
    result.save(out / MODEL)
    embedded = without_counts(adata)
    embedded.obsm[settings.key_added] = embedding_CD
    embedded.uns[settings.key_added] = dict(result.provenance)
    write_whole(embedded, out / EMBEDDED)
    logger.info("%s: %d cells embedded without their batch.", out / EMBEDDED, embedded.n_obs)


def _label(
    settings: FinetuneSettings,
    given: Corpus | None,
    adata: "AnnData",
    reading: InputSettings,
    bundle: Bundle,
) -> None:
    """Calibrate on held-out cells, and label all cells."""
    out = Path(settings.out)
    run = out / BACKBONE
    made = parse(PretrainSettings, json.loads((run / RUN).read_text()))
    corpus = Corpus.open(made.corpus)
    train_cells, held_out = split(made.holdout, corpus, made.corpus)
    labels = labels_of(corpus, settings.label_key, train_cells)
    if held_out.size < len(corpus):
        found = calibrate(bundle, corpus, held_out, labels.code_N)
        bundle.provenance["labels"] = asdict(found)
        logger.info(
            "%s held-out cells: accuracy %.3f, macro-F1 %.3f, calibration error %.3f.",
            f"{found.cells:,}", found.accuracy, found.macro_f1, found.calibration_error,
        )  # fmt: skip
    else:
        logger.warning("Nothing is held out: the confidence of the labels is not calibrated.")
    bundle.save(out / CLASSIFIER)
    curve = pd.read_csv(run / METRICS)
    losses = {STEP: curve["step"], "cross-entropy": curve["train/labels"]}
    _add_curves(out / CURVES, "classify", pd.DataFrame(losses))
    if given is None:
        classify(adata, bundle, LABEL, UNKNOWN_BELOW, reading)
    labelled = without_counts(adata)
    if given is not None:
        every = np.arange(len(corpus))
        chunks = corpus_chunks(corpus, every, bundle)
        write_labels(labelled, probabilities_of(chunks, bundle, every.size), bundle)
    write_whole(labelled, out / LABELLED)
    logger.info("%s: %s cells labelled.", out / LABELLED, f"{labelled.n_obs:,}")


def _impute(
    settings: FinetuneSettings,
    corpus: Corpus | None,
    adata: "AnnData",
    reading: InputSettings,
    bundle: Bundle | None,
    about: dict[str, Any],
) -> None:
    out = Path(settings.out)
    run = _head_run(settings, "impute", about)
    tuning = None if bundle is None else _tuning(settings)
    if corpus is not None:
        result = impute_corpus(
            corpus, out / IMPUTED, keys_of(settings.batch_key), bundle, tuning,
            settings=settings.imputation, run=run, seed=settings.seed,
        )  # fmt: skip
    else:
        result = impute(
            adata,
            bundle,
            batch_key=settings.batch_key,
            uncertainty=True,
            settings=settings.imputation,
            seed=settings.seed,
            output=out / IMPUTED,
            overwrite=True,
            backbone=tuning,
            run=run,
            **reading.options(),
        )
    _add_curves(out / CURVES, "impute", result.history)
    result.save(out / IMPUTATION_MODEL)
    logger.info("%s: %s", out / IMPUTED, result.trained.coverage)


def _label_genes(
    settings: FinetuneSettings,
    corpus: Corpus | None,
    adata: "AnnData",
    reading: InputSettings,
    bundle: Bundle,
    about: dict[str, Any],
) -> None:
    """Tell labels of genes apart: fold by fold, and then by a model of all of them."""
    out = Path(settings.out)
    run = GeneRun.of(settings, adata if corpus is None else corpus, reading, bundle)
    result, history = run.train(_tuning(settings), lambda name: _head_run(settings, name, about))
    _add_curves(out / CURVES, "genes", history)
    with whole(out / GENES) as partial:
        run.table.to_csv(partial, sep="\t")
    result.save(out / GENE_CLASSIFIER)


def _add_curves(path: Path, task: str, history: pd.DataFrame) -> None:
    """Write the losses of one head, one row a number; those of an earlier attempt go."""
    kept: list[list[str]] = []
    if path.exists():
        with path.open(newline="") as file:
            kept = [row for row in list(csv.reader(file))[1:] if row[0] != task]
    with whole(path) as partial, partial.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["task", "step", "loss", "value"])
        writer.writerows(kept)
        for row in history.to_dict("records"):
            step = int(row.pop(STEP))
            writer.writerows([task, step, name, f"{value:.6g}"] for name, value in row.items())


def encoder_of(settings: FinetuneSettings) -> str:
    """Say which encoder a result is of: a transformer is one only where it is read."""
    tune = settings.backbone.tune
    origin = settings.model or f"new weights ({settings.size})"
    learnt = {
        "frozen": "nothing of which learnt here",
        "scratch": "trained on these cells alone",
        "full": "all of which learnt here",
    }.get(tune, f"of which {tune} learnt here")
    if settings.classifies or settings.labels_genes:
        return f"the transformer of {origin}, {learnt}"
    if not settings.model and tune != "scratch":
        return "a network on counts, trained here; no transformer"
    return f"a network on counts, beside the cell vectors of the transformer of {origin}, {learnt}"


def _integrated(
    settings: FinetuneSettings, corpus: Corpus | None, adata: "AnnData", reading: InputSettings
) -> "Integrated":
    """Read some of the cells again, as they were and as they are."""
    import anndata as ad

    from genemodel.metrics.light import pca_of_lognorm
    from genemodel.reports.finetuning import SHOWN, Integrated

    embedded = ad.read_h5ad(Path(settings.out) / EMBEDDED)
    after_CD = np.asarray(embedded.obsm[settings.key_added])
    cells = np.flatnonzero(np.isfinite(after_CD).all(axis=1))
    if cells.size > SHOWN:
        cells = np.random.default_rng(settings.seed).choice(cells, SHOWN, replace=False)
        cells.sort()
    ranges = [(int(cell), int(cell) + 1) for cell in cells]
    if corpus is not None:
        counts_CG = corpus.read_blocks(ranges).to_csr(len(corpus.vocabulary))
    else:
        counts = find_counts(adata, where=settings.input, **reading.counting())
        counts_CG = sp.vstack([counts.read(*one) for one in ranges], format="csr")
    return Integrated(
        pca_of_lognorm(counts_CG, n_comps=30, seed=settings.seed),
        after_CD[cells],
        embedded.obs.iloc[cells],
        keys_of(settings.batch_key),
        settings.label_key,
    )


def _report(
    settings: FinetuneSettings,
    values: dict[str, Any],
    corpus: Corpus | None,
    adata: "AnnData",
    reading: InputSettings,
) -> None:
    """Lay the result out on one page, with all curves behind it."""
    from genemodel.reports.finetuning import write_finetune_report

    out = Path(settings.out)
    labels = coverage = None
    facts = {"what reads the cells": encoder_of(settings)}
    logger.info("%s: the cells were read by %s.", out, facts["what reads the cells"])
    if settings.integrates:
        about = IntegratedModel.load(out / MODEL, device="cpu").provenance
        facts["embedding"] = (
            f"{about['cells']:,} cells, {about['genes']:,} genes, effective rank "
            f"{about['effective_rank']:.1f}, mean cosine {about['mean_cosine']:.3f}"
        )
        facts["populations that may be over-corrected"] = ", ".join(about["vanished"]) or "none"
    if settings.classifies:
        held = Bundle.load(out / CLASSIFIER, device="cpu").provenance.get("labels")
        labels = pd.DataFrame(held["by_label"]).T.convert_dtypes() if held else None
        facts["labels on held-out cells"] = "not measured: nothing is held out" if not held else (
            f"{held['cells']:,} cells, accuracy {held['accuracy']:.3f}, macro-F1 "
            f"{held['macro_f1']:.3f}, calibration error {held['calibration_error']:.3f}"
        )  # fmt: skip
    if settings.labels_genes:
        told = Bundle.load(out / GENE_CLASSIFIER, device="cpu").provenance["gene_labels"]
        facts["labels of genes of families that were not learnt from"] = told
    if settings.imputes:
        found = ImputationModel.load(out / IMPUTATION_MODEL).trained.coverage
        facts["imputed counts"] = str(found)
        coverage = pd.DataFrame(
            {"held": [share for _, share, _ in found.by_mean],
             "counts": [n for *_, n in found.by_mean]},
            index=pd.Index([f"from {low:g}" for low, *_ in found.by_mean], name="predicted mean"),
        )  # fmt: skip
    run = out / BACKBONE
    adapted = (run / METRICS).exists()
    write_finetune_report(
        out / REPORT,
        curves=pd.read_csv(out / CURVES),
        backbone=(pd.read_csv(run / "metrics.csv"), pd.read_csv(run / "validation.csv"))
        if adapted
        else None,
        integrated=_integrated(settings, corpus, adata, reading) if settings.integrates else None,
        labels=labels,
        coverage=coverage,
        facts=facts,
        settings=values,
    )
