"""``genemodel evaluate``: our models and the published methods, on the same cells, in one table.

Axes: C cells, G genes, D embedding width.
"""

import importlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.missing_labels import without_placeholders
from genemodel.errors import ConfigError, DataError
from genemodel.evaluation import annotation, own_metrics
from genemodel.evaluation.baselines import Conditions, column
from genemodel.evaluation.meter import Meter
from genemodel.evaluation.methods import FAILURES, MIN_CELLS, Denoised, Method, Own, choose
from genemodel.evaluation.models import (
    Model,
    contaminations,
    loaded,
    model_methods,
    refuse_unreadable,
)
from genemodel.inference.obs_keys import check_label_is_no_batch
from genemodel.metrics import imputation as imputation_metrics
from genemodel.metrics import scib as metrics
from genemodel.model.tuning import Tune
from genemodel.reports.comparison import BOTH, EvaluationResult, clear, write_embedding
from genemodel.settings import ModelText, check_out_folder, check_seed, nearest, renamed

if TYPE_CHECKING:
    from anndata import AnnData

    from genemodel.corpus.corpus import Corpus

logger = logging.getLogger(__name__)

COVERAGE_LEVELS = (0.5, 0.8, 0.9, 0.95)


@renamed(data="input")
@dataclass(frozen=True)
class EvaluateSettings(InputSettings):
    """Settings of ``genemodel evaluate``, see ``configs/evaluate.yaml``."""

    input: Path
    out: Path
    task: Literal["integrate", "impute", "annotate"] = "integrate"
    batch_key: str | None = None
    label_key: str | None = None
    methods: tuple[str, ...] | None = None
    models: tuple[ModelText, ...] = ()
    obsm: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    max_cells: int | None = None
    sizes: tuple[int, ...] = ()
    draws: int = 3
    corpus: Path | None = None
    backbones: tuple[Tune, ...] = ("frozen",)
    n_hvg: int = 2000
    n_comps: int = 30
    scvi_epochs: int | None = None
    hidden_labels: float = 0.0
    keep: float = imputation_metrics.KEEP
    mixture: tuple[str, ...] = ()
    umaps: bool = True
    n_jobs: int = 1


@renamed(data="adata")
@reads_cells
def evaluate(
    adata: "AnnData | str | Path",
    *,
    task: Literal["integrate", "impute", "annotate"] = "integrate",
    batch_key: str | None = None,
    label_key: str | None = None,
    methods: Sequence[str] | Mapping[str, Own | None] | None = None,
    models: "Sequence[str | Path | Model]" = (),
    obsm: Sequence[str] = (),
    metrics: Mapping[str, own_metrics.Function | own_metrics.Metric] | None = None,
    seeds: Sequence[int] = (0,),
    max_cells: int | None = None,
    corpus: "Corpus | str | Path | None" = None,
    backbones: Sequence[Tune] = ("frozen",),
    n_hvg: int = 2000,
    n_comps: int = 30,
    scvi_epochs: int | None = None,
    hidden_labels: float = 0.0,
    keep: float = imputation_metrics.KEEP,
    mixture: Sequence[str] = (),
    umaps: bool = True,
    n_jobs: int = 1,
    out: str | Path | None = None,
    **options: Unpack[InputOptions],
) -> EvaluationResult:
    """Score models, published methods and controls on the same cells.

    Parameters
    ----------
    adata
        AnnData, or the path of a file or folder, with raw counts.
    task
        "integrate": embeddings, judged on biology kept and batch removed. "impute": denoised
        counts, judged on molecules set aside (molecular cross-validation) and, where ``mixture``
        is given, on the known truth. "annotate": labels carried from one batch or species to
        another and back.
    batch_key
        Column of ``obs`` with the technical batch; needed to integrate, and to annotate, where it
        may be the species.
    label_key
        Column with cell types; needed to annotate. Without it only batch removal can be scored.
    methods
        Names of the methods to run, or a mapping of names to your own functions AnnData -> array,
        or (reference, query, label_key) -> labels to annotate; default all there are. See
        `genemodel.evaluation.methods.choose`. "none" always runs.
    models
        Trained models or their folders. One fine-tuned by `genemodel.integrate` embeds the cells. A
        pre-trained bundle is scored as it is, tuned on these cells, and, as a control, with its
        weights drawn at random.
    obsm
        Embeddings that stand in ``adata.obsm`` already, by whatever tool, to be scored as well.
    metrics
        Your own, beside those of the task: names to functions of arrays that return a number, see
        `genemodel.evaluation.own_metrics`; ``Metric(function, better="low")`` says which way is
        better.
    seeds
        Seeds of the random methods, and of the molecular split.
    max_cells
        Take this many cells at random; default all.
    corpus
        Folder of a corpus: "corpus_pca", its principal components with these cells projected, is
        what a model that was pre-trained on it has to beat without having been tuned.
    backbones
        How bundles are tuned on these cells: "frozen", "lora", "last", "full".
    n_hvg, n_comps
        Variable genes and principal components of the linear methods.
    scvi_epochs
        Epochs of scVI; default its own rule (400 below 20,000 cells: slow without a GPU).
    hidden_labels
        Share of the cells whose label is hidden from the methods that learn from labels. At 0, as
        is usual, these are judged on labels they have seen, and the table says so.
    keep
        Share of the molecules that the methods see, for "impute".
    mixture
        Columns of ``obs`` with known mixing proportions: the expected profile of every cell is then
        known, and the correlation with it is scored too.
    umaps
        Draw UMAPs into the report.
    n_jobs
        Threads that a method may use where it can be told.
    out
        Folder for the report and the tables; default: nothing is written.
    **options
        How the cells are read.

    Returns
    -------
    EvaluationResult

    Raises
    ------
    ConfigError
        Settings that contradict each other or name an unknown method.
    DataError
        A column, layer or file that is not there, or counts that are not raw.
    """
    reading = InputSettings.given(options)
    seeds = tuple(seeds)
    if not seeds:
        raise ConfigError("seeds is empty: give at least one, seeds=[0]")
    if task == "impute" and obsm:
        raise ConfigError("obsm gives embeddings, which task=impute cannot score: leave it out")
    if not 0.0 <= hidden_labels < 1.0:
        raise ConfigError(f"hidden_labels={hidden_labels}: a share of the cells, from 0 to below 1")
    if hidden_labels and label_key is None:
        raise ConfigError(f"hidden_labels={hidden_labels}: name the labels with label_key")
    _check_numbers(
        seeds,
        max_cells=max_cells,
        n_hvg=n_hvg,
        n_comps=n_comps,
        n_jobs=n_jobs,
        scvi_epochs=scvi_epochs,
    )
    if task != "impute" and batch_key is not None:
        check_label_is_no_batch((batch_key,), label_key)
    if out is not None:
        check_out_folder(Path(out))
    for tune in backbones:
        if tune not in get_args(Tune) or tune == "scratch":
            raise ConfigError(
                f"backbones={list(backbones)}: frozen, lora, last or full, not {tune!r}"
            )
    own_ones = own_metrics.checked(metrics or {}, task)
    chosen, skipped = choose(task, methods, has_labels=label_key is not None)
    keys = [batch_key, label_key, *mixture]
    cells, where, reading = _cells(adata, reading, max_cells, keys, list(obsm))
    for key in filter(None, (batch_key, label_key)):
        cells.obs[key] = without_placeholders(
            cells.obs[key], reading.missing_labels, column=key, where=where
        )
    if task == "integrate" and batch_key is None:
        raise ConfigError(
            f"{where}: name the column of the technical batch with batch_key; obs has "
            f"{', '.join(map(str, cells.obs.columns)) or 'no columns'}"
        )
    if task == "integrate":
        _refuse_batches(cells, cast(str, batch_key), label_key, where)
        skipped |= _leave_out_learners(chosen, cells, label_key)
    ready = loaded(models, task)
    refuse_unreadable(ready, cells, reading, task)
    own = model_methods(ready, task, backbones, reading)
    given = {f"obsm:{key}": _standing(key) for key in obsm} | own
    contaminated = contaminations(ready, cells, reading)
    size = {"cells": cells.n_obs, "genes": cells.n_vars}
    directions: list[annotation.Direction] = []
    if task == "annotate":
        if batch_key is None or label_key is None:
            raise ConfigError(
                f"{where}: to annotate, name the column of batches or species with batch_key and "
                f"that of cell types with label_key; obs has "
                f"{', '.join(map(str, cells.obs.columns)) or 'no columns'}"
            )
        directions, left_out = annotation.directions(cells, batch_key, label_key)
        skipped |= left_out
        given = {
            name: replace(one, run=annotation.transferred(one.run, "linear", cells=cells))
            for name, one in given.items()
        }
        cells = annotation.shared_genes(cells, batch_key)
        size["genes that all batches have"] = cells.n_vars
    chosen |= given
    if corpus is None and "corpus_pca" in chosen:
        del chosen["corpus_pca"]
        skipped["corpus_pca"] = "it projects on a corpus; name its folder with corpus"
    conditions = Conditions(
        corpus=None if corpus is None else _corpus(corpus),
        reading=reading,
        batch_key=batch_key,
        label_key=label_key,
        n_hvg=n_hvg,
        n_comps=n_comps,
        n_jobs=n_jobs,
        scvi_epochs=scvi_epochs,
    )
    for name, reason in skipped.items():
        logger.info("%s is skipped: %s", name, reason)
    if task == "integrate" and importlib.util.find_spec("scib_metrics") is None:
        raise ConfigError(
            "task=integrate is scored by scib-metrics, which is not installed: pip install "
            "'genemodel[bench]'. task=impute and task=annotate need nothing more."
        )
    comparison = _Comparison(
        cells, conditions, chosen, seeds, dict(skipped), hidden_labels,
        out=None if out is None else Path(out), extra=own_ones,
    )  # fmt: skip
    if task == "integrate":
        result = comparison.integrate()
    elif task == "annotate":
        result = comparison.annotate(directions)
    else:
        result = comparison.impute(keep, tuple(mixture))
    result.contamination = contaminated
    result.undefined |= comparison.undefined
    result.own_metrics = {name: metric.better for name, metric in own_ones.items()}
    result.encoders = {name: m.encoder for name, m in chosen.items() if m.encoder}
    ran = {name: m for name, m in chosen.items() if name not in comparison.skipped}
    result.software = {name: said for name, m in ran.items() if (said := m.software())}
    result.settings = {
        "data": where,
        **size,
        "task": task,
        "batch_key": batch_key,
        "label_key": label_key,
        "seeds": seeds,
        "max_cells": max_cells,
        "n_hvg": n_hvg,
        "n_comps": n_comps,
        "scvi_epochs": scvi_epochs,
        "hidden_labels": hidden_labels,
        "n_jobs": n_jobs,
    } | ({"keep": keep, "mixture": tuple(mixture)} if task == "impute" else {})
    if out is not None:
        result.write(out, umaps=umaps)
    return result


def _check_numbers(seeds: tuple[int, ...], **counts: int | None) -> None:
    """Refuse numbers of which nothing can be made, and a seed that comes twice."""
    for seed in seeds:
        check_seed(seed, f"seeds={list(seeds)}: one")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds={list(seeds)}: one comes twice; it would count as a spread of 0")
    for name, number in counts.items():
        least = MIN_CELLS if name == "max_cells" else 2 if name == "n_hvg" else 1
        if number is not None and number < least:
            raise ConfigError(f"{name}={number}: it must be at least {least}")


def _refuse_batches(cells: "AnnData", batch_key: str, label_key: str | None, where: str) -> None:
    """Refuse batches with gaps, or cells with nothing to score, before any method runs."""
    batch = column(cells, batch_key)
    if batch.isna().any():
        raise DataError(
            f"{where}: obs[{batch_key!r}] (batch_key) is missing in {int(batch.isna().sum()):,} of "
            f"{len(batch):,} cells: fill it or leave those cells out"
        )
    labels = 0 if label_key is None else column(cells, label_key).nunique()
    if label_key is not None and (n := int(column(cells, label_key).notna().sum())) < MIN_CELLS:
        raise DataError(
            f"{where}: obs[{label_key!r}] (label_key) is missing in all but {n} of {len(batch):,} "
            "cells, and only cells with a label are scored: fill it, or leave label_key out"
        )
    if batch.nunique() < 2 and labels < 2:
        raise DataError(
            f"{where}: obs[{batch_key!r}] (batch_key) holds one batch only and there are no two "
            "labels: nothing could be scored. Name a column of batches, or of labels with label_key"
        )

    if 2 * batch.nunique() > len(batch):
        raise DataError(
            f"{where}: obs[{batch_key!r}] (batch_key) holds {batch.nunique():,} batches of "
            f"{len(batch):,} cells, so that most are of one cell: nothing could be mixed. Name a "
            "column of batches, not of cells or of measurements"
        )


def _leave_out_learners(
    chosen: dict[str, Method], cells: "AnnData", label_key: str | None
) -> dict[str, str]:
    """Take the methods that learn from labels out where there are no two labels; say why."""
    labels = (
        [] if label_key is None else sorted(map(str, column(cells, label_key).dropna().unique()))
    )
    if label_key is None or len(labels) > 1:
        return {}
    why = f"it learns from labels, and obs[{label_key!r}] holds {', '.join(labels) or 'none'} alone"
    return {name: why for name in [n for n, m in chosen.items() if m.labels] if chosen.pop(name)}


def _cells(
    data: "AnnData | str | Path",
    reading: InputSettings,
    max_cells: int | None,
    keys: Sequence[str | None],
    obsm: Sequence[str],
) -> "tuple[AnnData, str, InputSettings]":
    """Read, prove the counts, check the columns, sample.

    Returns an AnnData with counts in X, its name, and what is still to be said of how it is read.
    """
    from anndata import AnnData

    from genemodel.cells.contract import find_counts

    adata, where, reading = read_cells(data, reading)
    known = [str(name) for name in adata.obs.columns]
    for key in keys:
        if key is not None and key not in adata.obs:
            near = nearest(key, known)
            raise DataError(
                f"{where}: obs has no column {key!r}; it has "
                f"{', '.join(map(repr, known)) or 'none'}"
                + (f". Did you mean {near!r}?" if near else "")
            )
        if key is not None and known.count(key) > 1:
            raise DataError(
                f"{where}: obs has two columns of the name {key!r}, and nothing says which one is "
                "meant. Rename one of them"
            )
    if adata.n_obs < MIN_CELLS:
        raise DataError(
            f"{where}: has {adata.n_obs} cells; fewer than {MIN_CELLS} say nothing about a method"
        )
    for key in obsm:
        if key not in adata.obsm:
            raise DataError(
                f"{where}: obsm has no {key!r}; it has {', '.join(map(repr, adata.obsm)) or 'none'}"
            )
    counts = find_counts(adata, where=where, **reading.counting())
    rows = np.arange(adata.n_obs)
    if max_cells is not None and max_cells < adata.n_obs:
        rows = np.sort(np.random.default_rng(0).permutation(adata.n_obs)[:max_cells])
        logger.info("%s: %d of %d cells, drawn at random", where, max_cells, adata.n_obs)
    matrix_CG = counts.read(0, adata.n_obs)[rows].astype(np.float32)
    empty = int((np.diff(matrix_CG.indptr) == 0).sum())
    if empty:
        raise DataError(f"{where}: {empty} cells have no counts at all; drop them first")
    obs = cast(pd.DataFrame, adata.obs).iloc[rows].copy()
    kept = AnnData(matrix_CG, obs=obs, var=counts.genes.copy())
    for key in obsm:
        kept.obsm[key] = np.asarray(cast(Any, adata.obsm[key]))[rows]
    species = reading.species
    if species is not None and "species" not in keys:
        if species.startswith("obs:"):
            kept.obs["species"] = column(kept, species.removeprefix("obs:")).to_numpy()
        else:
            kept.obs["species"] = species
    return (
        kept,
        where,
        InputSettings(
            column=reading.column,
            min_fraction=reading.min_fraction,
            missing_labels=reading.missing_labels,
        ),
    )


def read_cells(
    data: "AnnData | str | Path", reading: InputSettings
) -> "tuple[AnnData, str, InputSettings]":
    """Give the AnnData, read where a path is given, its name, and what is left to say of it."""
    from genemodel.cells.whole_file import read_anndata

    if not isinstance(data, str | Path):
        return data, "AnnData", reading
    path = Path(data)
    if not path.exists():
        raise DataError(f"{path} does not exist; name a file of raw counts")
    adata, reading = read_anndata(path, reading)
    return adata, str(path), reading


def _corpus(given: "Corpus | str | Path") -> "Corpus":
    from genemodel.corpus.corpus import Corpus

    return given if isinstance(given, Corpus) else Corpus.open(given)


def _standing(key: str) -> Method:
    def read(adata: "AnnData", conditions: Conditions) -> np.ndarray:
        return np.asarray(cast(Any, adata.obsm[key]))

    return Method(read, kind="own")


@dataclass
class _Comparison:
    """Runs the methods one after the other, scores each and writes what is scored so far."""

    cells: "AnnData"
    conditions: Conditions
    methods: dict[str, Method]
    seeds: tuple[int, ...]
    skipped: dict[str, str]
    hidden_labels: float = 0.0
    out: Path | None = None
    extra: dict[str, own_metrics.Metric] = field(default_factory=dict)
    undefined: dict[str, str] = field(default_factory=dict)
    records: list[dict[str, Any]] = field(default_factory=list)
    kept: bool = False

    def _runs(self, every_seed: bool) -> list[tuple[str, Method, int]]:
        return [
            (name, method, seed)
            for seed in self.seeds
            for name, method in self.methods.items()
            if every_seed or method.seeded or seed == self.seeds[0]
        ]

    def _run(self, name: str, method: Method, seed: int, adata: "AnnData", label: str) -> Any:
        """Run one method; a failure is recorded and gives None."""
        self.conditions.seed = seed
        self.conditions.borrowed_seconds = 0.0
        logger.info("%s %s%s", label, name, f", seed {seed}" if len(self.seeds) > 1 else "")
        try:
            # loading a library is paid once, by whichever method comes first: not in its time
            for package in ("scanpy", *method.packages):
                importlib.import_module(package)
            with Meter() as meter:
                found = method.run(adata, self.conditions)
        except FAILURES as error:
            logger.debug("%s failed", name, exc_info=True)
            reason = str(error).strip().splitlines() or [type(error).__name__]
            # an error of ours is a sentence; of anyone else's the type says more than the text
            kind = "" if isinstance(error, DataError) else f"{type(error).__name__}: "
            self.skipped[name] = f"failed: {kind}{' '.join(reason)[:300]}"
            logger.warning("%s %s", name, self.skipped[name])
            return None
        self._record(
            name,
            seed,
            {
                "seconds": meter.seconds + self.conditions.borrowed_seconds,
                # R works in a process of its own, which the meter does not see
                "peak_mb": float("nan") if method.r_packages else meter.peak_mb,
            },
        )
        return found

    def _record(self, name: str, seed: int, values: Mapping[str, float], **of: str) -> None:
        row = {"method": name, "kind": self.methods[name].kind, "seed": seed}
        self.records += [
            {**row, "metric": metric, "value": float(value), **of}
            for metric, value in values.items()
        ]

    def _own_scores(self, name: str, *given: Any) -> dict[str, float]:
        """Score with the user's metrics; why one has no value is kept."""
        values, failed = own_metrics.scored(self.extra, *given)
        self.undefined |= {f"{name}: {metric}": why for metric, why in failed.items()}
        return values

    def _table(self, scored: set[str]) -> pd.DataFrame:
        table = pd.DataFrame(self.records)
        return table[table["method"].isin(scored)].reset_index(drop=True)

    def _keep(self, result: EvaluationResult, name: str, embedding_CD: Any = None) -> None:
        """Have the scores so far on disk before the next method starts."""
        if self.out is None:
            return
        if not self.kept:
            clear(self.out)
            logger.info("Scores are in %s as each method ends.", self.out)
        self.kept = True
        result.write_tables(self.out)
        if embedding_CD is not None:
            write_embedding(self.out, name, embedding_CD)

    def _with_labels_hidden(self, seed: int) -> "AnnData":
        """Give the cells with a share of the labels missing, the same ones for every method."""
        if self.hidden_labels == 0.0:
            return self.cells
        key = cast(str, self.conditions.label_key)
        label = column(self.cells, key)
        hidden_C = np.random.default_rng(seed).random(len(label)) < self.hidden_labels
        shown = self.cells.copy()
        shown.obs[key] = pd.Categorical(label.mask(hidden_C, None))
        return shown

    def integrate(self) -> EvaluationResult:
        first = self.seeds[0]
        by_run: dict[tuple[str, int], np.ndarray] = {}
        per_type: list[pd.DataFrame] = []
        undefined: dict[str, str] = {}

        def result() -> EvaluationResult:
            once = {name: array for (name, seed), array in by_run.items() if seed == first}
            return EvaluationResult(
                "integrate",
                self._table({name for name, _ in by_run}),
                self.skipped,
                saw_labels=[name for name in once if self.methods[name].labels],
                cell_types=pd.concat(per_type, ignore_index=True) if per_type else None,
                embeddings=once,
                obs=cast(pd.DataFrame, self.cells.obs),
                undefined=undefined,
            )

        runs = self._runs(every_seed=False)
        for number, (name, method, seed) in enumerate(runs, start=1):
            shown = self._with_labels_hidden(seed) if method.labels else self.cells
            found = self._run(name, method, seed, shown, f"[{number}/{len(runs)}]")
            problem = None if found is None else _embedding_problem(found, self.cells.n_obs)
            if problem is not None:
                self.skipped[name] = f"failed: {problem}"
                logger.warning("%s %s", name, self.skipped[name])
            if found is None or problem is not None:
                if (name, seed) == ("none", first):  # what the others are compared with
                    raise DataError(
                        f"the uncorrected embedding could not be computed: {self.skipped[name]}"
                    )
                continue
            array_CD = np.asarray(found, dtype=np.float32)
            undefined |= self._score(name, seed, array_CD, by_run.get(("none", first), array_CD))
            by_run[name, seed] = array_CD
            if seed == first:
                per_type += self._by_type(name, array_CD, by_run["none", first])
            self._keep(result(), name, array_CD if seed == first else None)
        self.conditions.shared.clear()  # trained models are no longer needed
        return result()

    def _score(
        self, name: str, seed: int, array_CD: np.ndarray, before_CD: np.ndarray
    ) -> dict[str, str]:
        """Record the scores of an embedding; returns what has no value, and why."""
        logger.info("  scoring %s", name)
        scores = metrics.score_embeddings(
            {name: array_CD},
            self._batch(),
            self._label(),
            pre=before_CD,
            extra=True,
            n_jobs=self.conditions.n_jobs,
        )
        own = self._own_scores(name, array_CD, self.cells.obs)
        self._record(name, seed, {str(k): float(v) for k, v in scores.loc[name].items()} | own)
        return dict(scores.attrs["undefined"])

    def _by_type(
        self, name: str, array_CD: np.ndarray, before_CD: np.ndarray
    ) -> list[pd.DataFrame]:
        """Biology and batch of every cell type, where there are two types and batches."""
        label = self._label()
        if label is None or label.nunique() < 2 or self._batch().nunique() < 2:
            return []
        return [metrics.score_cell_types({name: array_CD}, self._batch(), label, pre=before_CD)]

    def _batch(self) -> pd.Series:
        return column(self.cells, cast(str, self.conditions.batch_key))

    def _label(self) -> pd.Series | None:
        key = self.conditions.label_key
        return None if key is None else column(self.cells, key)

    def annotate(self, directions: list[annotation.Direction]) -> EvaluationResult:
        per_label: list[pd.DataFrame] = []
        obs = cast(pd.DataFrame, self.cells.obs)
        calls = {
            one.name: pd.DataFrame(
                {"direction": one.name, "true": one.true_Q}, index=obs.index[one.query_Q]
            )
            for one in directions
        }
        scored: set[str] = set()

        def result() -> EvaluationResult:
            table = self._table(scored)
            return EvaluationResult(
                "annotate",
                table.assign(direction=table["direction"].fillna(BOTH)),
                self.skipped,
                cell_types=pd.concat(per_label, ignore_index=True),
                calls=pd.concat(calls.values()),
                obs=obs,
                judged={one.name: one.n_judged for one in directions},
            )

        runs = self._runs(every_seed=False)
        for number, (name, method, seed) in enumerate(runs, start=1):
            found = self._run(name, method, seed, self.cells, f"[{number}/{len(runs)}]")
            if found is None:
                continue
            problem = annotation.problem(found, directions)
            if problem is not None:
                self.skipped[name] = f"failed: {problem}"
                logger.warning("%s %s", name, self.skipped[name])
                continue
            scored.add(name)
            for direction, called in zip(directions, found, strict=True):
                scores = annotation.scores(direction, called)
                scores |= self._own_scores(name, called.label_Q, direction.true_Q)
                self._record(name, seed, scores, direction=direction.name)
                if seed == self.seeds[0]:
                    per_label.append(annotation.per_label(direction, name, called))
                    calls[direction.name][name] = called.label_Q
            self._keep(result(), name)
        self.conditions.shared.clear()
        if not scored:
            raise DataError(f"no method ran: {_reasons(self.skipped)}")
        return result()

    def impute(self, keep: float, mixture: tuple[str, ...]) -> EvaluationResult:
        from anndata import AnnData

        from genemodel.metrics.imputation import mcv_split, score_denoised

        obs, var = cast(pd.DataFrame, self.cells.obs), cast(pd.DataFrame, self.cells.var)
        coverage: list[pd.DataFrame] = []
        statistics: dict[str, pd.DataFrame] = {}
        scored: set[str] = set()

        def result() -> EvaluationResult:
            return EvaluationResult(
                "impute",
                self._table(scored),
                self.skipped,
                coverage=pd.concat(coverage, ignore_index=True),
                obs=obs,
                gene_statistics=statistics,
            )

        runs = self._runs(every_seed=True)
        split, split_seed = None, None
        for number, (name, method, seed) in enumerate(runs, start=1):
            if split is None or split_seed != seed:
                split, split_seed = mcv_split(cast(Any, self.cells.X), keep, seed), seed
                train = AnnData(
                    split.train.astype(np.float32),
                    obs=obs.copy(),
                    var=var.iloc[np.flatnonzero(split.gene_kept_G)].copy(),
                )
                expected_CG = self._expected(mixture)
            found = self._run(name, method, seed, train, f"[{number}/{len(runs)}]")
            if found is None:
                continue
            given = found if isinstance(found, Denoised) else Denoised(found)
            try:
                scores = score_denoised({name: given.mean}, split).loc[name].to_dict()
            except DataError as error:
                self.skipped[name] = f"failed: {error}"
                logger.warning("%s %s", name, self.skipped[name])
                continue
            covered = imputation_metrics.predictive_coverage(
                given.mean, split, sd=given.sd, levels=COVERAGE_LEVELS
            )
            scores |= _coverage_scores(covered)
            if expected_CG is not None:
                truth = imputation_metrics.score_against_expectation(
                    {name: given.mean}, expected_CG[:, split.gene_kept_G]
                )
                scores |= truth.loc[name].to_dict()
            scores |= self._own_scores(name, given.mean, split.test)
            self._record(name, seed, cast(dict[str, float], scores))
            scored.add(name)
            if seed == self.seeds[0]:
                covered.insert(0, "method", name)
                coverage.append(covered)
                if not statistics:
                    statistics["held-out counts"] = imputation_metrics.gene_statistics(
                        split.test, split, counts=True
                    )
                statistics[name] = imputation_metrics.gene_statistics(given.mean, split)
            self._keep(result(), name)
        if not scored:
            raise DataError(f"no method ran: {_reasons(self.skipped)}")
        return result()

    def _expected(self, mixture: tuple[str, ...]) -> np.ndarray | None:
        if not mixture:
            return None
        obs = cast(pd.DataFrame, self.cells.obs)
        try:
            proportions_CP = obs[list(mixture)].to_numpy(dtype=float)
        except ValueError as error:
            raise DataError(f"mixture={list(mixture)}: not all are numbers: {error}") from error
        batch = self.conditions.batch_key
        group_C = None if batch is None else self.conditions.batch_of(self.cells)
        return imputation_metrics.mixture_expectation(
            cast(Any, self.cells.X), proportions_CP, group_C=group_C
        )


def _embedding_problem(found: Any, n_cells: int) -> str | None:
    if sp.issparse(found):
        return "it returned a sparse matrix; an embedding is a dense array"
    array = np.asarray(found)
    if array.dtype.kind not in "fiu" or array.ndim != 2 or len(array) != n_cells:
        return f"it returned {array.dtype} of shape {array.shape}; expected ({n_cells}, width)"
    bad = int((~np.isfinite(array.astype(np.float64))).any(axis=1).sum())
    return f"it returned values that are not finite for {bad} cells" if bad else None


def _reasons(skipped: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in skipped.items())


def _coverage_scores(covered: pd.DataFrame) -> dict[str, float]:
    """Coverage at 90 %, and the decile of expression that is farthest from it."""
    at = covered[covered["level"] == 0.9].set_index("entries")
    deciles = at.drop(index=[name for name in ("all", "nonzero") if name in at.index])
    off = (deciles["coverage"] - 0.9).abs()
    scores = {
        "coverage_90": float(at["coverage"]["all"]),
        "coverage_90_closed": float(at["coverage_closed"]["all"]),
        "coverage_90_worst_decile": float(deciles["coverage"].iloc[int(off.to_numpy().argmax())]),
    }
    if "nonzero" in at.index:
        scores["coverage_90_nonzero"] = float(at["coverage"]["nonzero"])
    return scores
