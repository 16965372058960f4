"""``genemodel evaluate genes``: what models know of genes, beside what is known without them.

It is a verb of its own, not a task of ``evaluate``: there every setting and every score is of
cells, and none of them says anything about a table of genes.

Axes: C cells, V vocabulary, G genes of a task, R genes of all tasks, F features, L labels.
"""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, get_args

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import ConfigError, DataError
from genemodel.evaluation.evaluate import read_cells
from genemodel.evaluation.gene_features import (
    coexpression_components,
    expression_features,
    gene_set_components,
    out_of_fold,
)
from genemodel.finetuning.head_run import HeadRun
from genemodel.gene_tasks.families import grouped_folds
from genemodel.gene_tasks.passes import TokenSums, run, with_context
from genemodel.gene_tasks.tables import GeneTask, read_tasks
from genemodel.gene_tasks.training import GeneCells, GeneLabelSettings, cross_validate
from genemodel.gene_tasks.vectors import rows_of
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.counts import VocabularyCells
from genemodel.metrics.gene_labels import auroc_gain, gene_scores
from genemodel.model.devices import device_of
from genemodel.model.gene_model import initialise
from genemodel.model.tuning import Tune, TuningSettings
from genemodel.settings import ModelText, PathText, check_out_folder, check_seed
from genemodel.writing import whole

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

# What everything is compared with.
BASELINE = "expression"


@dataclass(frozen=True, kw_only=True)
class EvaluateGenesSettings(InputSettings):
    """Settings of ``genemodel evaluate genes``, see ``configs/evaluate_genes.yaml``."""

    input: Path
    genes: PathText
    out: Path
    tasks: tuple[str, ...] = ()
    models: tuple[ModelText, ...] = ()
    groups: PathText = ""
    gene_sets: PathText = ""
    backbones: tuple[Tune, ...] = ("last",)
    seeds: tuple[int, ...] = (0,)
    draws: int = 1000
    max_cells: int | None = None
    device: str = "auto"
    gene_labels: GeneLabelSettings = field(default_factory=GeneLabelSettings)


@dataclass(repr=False)
class GeneTasksResult:
    """Scores of all methods on all tasks.

    Attributes
    ----------
    table
        One row a task, method and seed: genes, positives, AUROC and AUPRC with intervals, and the
        gain in AUROC on the baseline of expression with its interval.
    predictions
        Log probability of the last label by every method, one row a gene and task.
    skipped
        Tasks without enough genes: name to reason.
    """

    table: pd.DataFrame
    predictions: pd.DataFrame
    skipped: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        methods = self.table["method"].nunique()
        return f"GeneTasksResult({self.table['task'].nunique()} tasks, {methods} methods)"

    def text(self) -> str:
        """Give the tables to print."""
        parts = []
        for task, rows in self.table.groupby("task", sort=False):
            lines = [f"{task}: {rows['genes'].iloc[0]:,} genes, {rows['positives'].iloc[0]:,} of "
                     f"{rows['positive'].iloc[0]}"]  # fmt: skip
            for method, own in rows.groupby("method", sort=False):
                at = own.mean(numeric_only=True)
                seeds = f", mean of {len(own)} seeds" if len(own) > 1 else ""
                gain = "" if method == BASELINE or not np.isfinite(at["gain"]) else (
                    f"; {at['gain']:+.3f} ({at['gain_low']:+.3f} to {at['gain_high']:+.3f}) "
                    f"on {BASELINE}"
                )  # fmt: skip
                lines.append(
                    f"  {method:<34} AUROC {at['auroc']:.3f} ({at['auroc_low']:.3f} to "
                    f"{at['auroc_high']:.3f}), AUPRC {at['auprc']:.3f}{gain}{seeds}"
                )
            parts.append("\n".join(lines))
        parts += [f"{name} is left out: {why}" for name, why in self.skipped.items()]
        parts.append(
            "One prediction a gene, by models that had not learnt its family; intervals of 95 % "
            "over genes. expression_all is of all labelled genes, also those that no cell holds."
        )
        return "\n\n".join(parts)

    def write(self, out: str | Path) -> None:
        """Write scores.csv and predictions.csv."""
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        for name, table in (("scores", self.table), ("predictions", self.predictions)):
            with whole(out / f"{name}.csv") as partial:
                table.to_csv(partial, index=False)


@reads_cells
def evaluate_genes(
    data: "AnnData | str | Path",
    genes: str | Path,
    *,
    tasks: Sequence[str] = (),
    models: "Sequence[str | Path | Bundle]" = (),
    groups: str | Path = "",
    gene_sets: str | Path = "",
    backbones: Sequence[Tune] = ("last",),
    seeds: Sequence[int] = (0,),
    draws: int = 1000,
    max_cells: int | None = None,
    device: str | torch.device = "auto",
    gene_labels: GeneLabelSettings | None = None,
    out: str | Path | None = None,
    **options: Unpack[InputOptions],
) -> GeneTasksResult:
    """Score what models know of genes on labelled genes, beside what is known without them.

    Parameters
    ----------
    data
        AnnData or file with raw counts.
    genes
        Table with columns gene and label, and task where it has several.
    tasks
        Names of the tasks; default all.
    models
        Bundles or their folders, with one vocabulary. Of each: logistic regression on its static
        vectors and on those in cells, the same with its weights drawn at random, and fine-tuning.
    groups
        Table of gene families that folds keep together; default those of HGNC.
    gene_sets
        GMT file, for a baseline of what is annotated.
    backbones
        How models are fine-tuned on the labels; none where empty.
    seeds
        Of folds and trainings.
    draws
        Of the bootstrap over genes.
    max_cells
        Take so many cells at random; default all.
    device
        Where models run.
    gene_labels
        Recipe of the fine-tuning; its folds, least cells and context are those of all methods.
    out
        Folder for scores.csv and predictions.csv; default: nothing is written.
    **options
        How the cells are read.

    Returns
    -------
    GeneTasksResult

    Raises
    ------
    ConfigError
        Settings contradict each other, or the models have several vocabularies.
    DataError
        A table cannot be read, or no task has genes enough.
    """
    head = gene_labels or GeneLabelSettings()
    if head.task or head.groups:
        raise ConfigError(
            "gene_labels.task and gene_labels.groups are tasks and groups here: leave them out."
        )
    if not head.folds:
        raise ConfigError("gene_labels.folds=0 predicts no gene: set 2 or more.")
    for tune in backbones:
        if tune not in get_args(Tune) or tune == "scratch":
            raise ConfigError(
                f"backbones={list(backbones)}: frozen, lora, last or full, not {tune!r}"
            )
    if not seeds:
        raise ConfigError("seeds is empty: give at least one, seeds=[0]")
    for seed in seeds:
        check_seed(seed, f"seeds={list(seeds)}: one")
    if draws < 0 or (max_cells is not None and max_cells < 1):
        raise ConfigError(
            f"draws={draws}, max_cells={max_cells}: draws must not be negative (0: no intervals), "
            "and at least one cell is needed."
        )
    if out is not None:
        check_out_folder(Path(out))
    device_of(device)
    ready = {
        _name(one): model_for("tell genes apart", (Bundle,), one, device=device) for one in models
    }
    vocabularies = {one.vocabulary.fingerprint for one in ready.values()}
    if len(vocabularies) > 1:
        raise ConfigError(
            f"models={list(ready)} read {len(vocabularies)} vocabularies, and genes could not be "
            "the same to all of them: score each by itself."
        )
    adata, where, reading = read_cells(data, InputSettings.given(options))
    if max_cells is not None and max_cells < adata.n_obs:
        rows = np.random.default_rng(0).permutation(adata.n_obs)[:max_cells]
        adata = adata[np.sort(rows)].copy()
    first = next(iter(ready.values()), None) or _nothing(GeneVocabulary.builtin())
    source = VocabularyCells(adata, first, reading)
    cells = GeneCells.held(source)
    comparison = _Comparison(
        cells, first, ready, head, tuple(backbones), gene_sets, draws, source.measured_SV.any(0)
    )
    read = [
        one for name in tasks or ("",)
        for one in read_tasks(genes, first.vocabulary, cells.species, task=name, groups=groups)
    ]  # fmt: skip
    skipped: dict[str, str] = {}
    for task in read:
        for seed in seeds:
            try:
                comparison.score(task, seed)
            except DataError as error:
                skipped[task.name] = str(error)
                logger.warning("%s is left out: %s", task.name, error)
                break
        if out is not None and comparison.rows:
            # Written after every task: what has been scored is not lost with what follows.
            comparison.result(skipped).write(out)
    if not comparison.rows:
        raise DataError(f"{where}: no task could be scored: {skipped}")
    return comparison.result(skipped)


def _name(model: "str | Path | Bundle") -> str:
    if isinstance(model, Bundle):
        return model.fingerprint[:8]
    path = Path(model)
    return path.parent.name if path.name in ("bundle", "model") and path.parent.name else path.name


def _nothing(vocabulary: GeneVocabulary) -> Bundle:
    """Stand in for a model, where only counts are to be read over a vocabulary."""
    from genemodel.batches.tokens import TokenSettings
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings

    shape = ModelSettings(layers=1, width=2, heads=1, ffn=2, components=0)
    model = GeneModel(
        shape, n_tokens=len(vocabulary), n_species=len(vocabulary.species), context=2048
    )
    return Bundle(model.eval(), vocabulary, TokenSettings(), np.ones(len(vocabulary), np.float32))


def _anywhere(device: torch.device) -> Callable[[int], HeadRun]:
    """Train each fold in a folder of its own that goes with it."""
    return lambda fold: HeadRun(device=device)


@dataclass
class _Comparison:
    """What all tasks share: cells, vectors of all genes by every model, and the rows so far."""

    cells: GeneCells
    first: Bundle
    models: dict[str, Bundle]
    head: GeneLabelSettings
    backbones: tuple[Tune, ...]
    gene_sets: str | Path
    draws: int
    measured_V: np.ndarray
    rows: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[pd.DataFrame] = field(default_factory=list)
    _kept: dict[tuple[str, int], tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    _counts_CV: sp.csr_matrix | None = None

    @property
    def counts_CV(self) -> sp.csr_matrix:
        if self._counts_CV is None:
            parts = [chunk.counts_CV for chunk in self.cells.chunks()]
            self._counts_CV = sp.vstack(parts, format="csr").astype(np.float32)
        return self._counts_CV

    def result(self, skipped: dict[str, str]) -> GeneTasksResult:
        return GeneTasksResult(
            pd.DataFrame(self.rows), pd.concat(self.predictions, ignore_index=True), dict(skipped)
        )

    def _contextual(self, name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Cells that hold each gene of the vocabulary, and its mean hidden state there."""
        random = name.startswith("random:")
        key = (name, seed if random else 0)
        if key not in self._kept:
            bundle = with_context(self.models[name.removeprefix("random:")], self.head.context)
            if random:
                model = copy.deepcopy(bundle.model)
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    initialise(model)
                bundle = replace(bundle, model=model)
            token_R = np.flatnonzero(self.measured_V & (self.cells.n_V > 0))
            sums = TokenSums(
                rows_of(token_R, len(bundle.vocabulary)), lambda hidden_TD: hidden_TD,
                bundle.model.settings.width, device=bundle.device,
            )  # fmt: skip
            run(bundle, self.cells.chunks(), sums, self.cells.used.size, what=f"vectors of {name}")
            n_V = np.zeros(len(bundle.vocabulary), np.int64)
            n_V[token_R] = sums.n_LR[0]
            vector_VD = np.zeros((len(bundle.vocabulary), bundle.model.settings.width), np.float32)
            vector_VD[token_R] = sums.sum_LRF[0] / np.maximum(sums.n_LR[0], 1)[:, None]
            self._kept[key] = n_V, vector_VD
        return self._kept[key]

    def _features(self, task: GeneTask, seed: int) -> Iterator[tuple[str, str, np.ndarray]]:
        """Give name, kind and features of every method."""
        token_G = task.token_G
        expression_GF = expression_features(self.counts_CV, token_G)
        yield "mean_expression", "baseline", expression_GF[:, :1]
        yield BASELINE, "baseline", expression_GF
        yield "coexpression_pca", "baseline", coexpression_components(self.counts_CV, token_G, seed)
        if self.gene_sets:
            yield (
                "gene_sets",
                "baseline",
                gene_set_components(
                    self.gene_sets, self.first.vocabulary, self.cells.species, token_G, seed
                ),
            )
        for name, bundle in self.models.items():
            with torch.no_grad():
                token = torch.from_numpy(token_G).to(bundle.device)
                static_GD = bundle.model.embedding.genes(token).float().cpu().numpy()
            yield f"static:{name}", "ours", static_GD
            yield f"contextual:{name}", "ours", self._contextual(name, seed)[1][token_G]
            random = f"random:{name}"
            yield f"contextual:{random}", "control", self._contextual(random, seed)[1][token_G]

    def score(self, whole_task: GeneTask, seed: int) -> None:
        """Score every method on the genes that all of them can say something about."""
        n_V = self.cells.n_V
        for name in self.models:
            n_V = np.minimum(n_V, self._contextual(name, seed)[0])
        task = whole_task.only(n_V[whole_task.token_G] >= self.head.min_cells)
        if len(np.unique(task.code_G)) < len(task.labels):
            raise DataError(
                f"{len(task)} of {len(whole_task)} genes are held by {self.head.min_cells} cells "
                "or more, and a label has none of them: give other cells, or set "
                "gene_labels.context higher."
            )
        fold_G = grouped_folds(task.code_G, task.family_G, self.head.folds, seed)
        logger.info(
            "%s: %s of %s genes are scored, in %d folds of %d families.", whole_task.name,
            f"{len(task):,}", f"{len(whole_task):,}", fold_G.max() + 1, len(set(task.family_G)),
        )  # fmt: skip
        said: dict[str, tuple[str, np.ndarray]] = {}
        for method, kind, feature_GF in self._features(task, seed):
            found = out_of_fold(feature_GF, task.code_G, task.family_G, fold_G, seed)
            said[method] = kind, found
        for name, bundle in self.models.items():
            for tune in self.backbones:
                found = cross_validate(
                    self.cells, bundle, task, TuningSettings(tune=tune), self.head,
                    _anywhere(bundle.device), fold_G=fold_G, seed=seed,
                ).logit_GL  # fmt: skip
                said[f"finetuned ({tune}):{name}"] = "ours", found
        for method, (kind, score_GL) in said.items():
            self._add(task, method, kind, seed, score_GL, said[BASELINE][1])
        rows = {"task": task.name, "seed": seed, "gene": task.gene_G, "fold": fold_G,
                "label": np.array(task.labels, dtype=object)[task.code_G]}  # fmt: skip
        rows |= {
            method: score_GL[:, -1] - np.logaddexp.reduce(score_GL[:, :-1], axis=1)
            for method, (_, score_GL) in said.items()
        }
        self.predictions.append(pd.DataFrame(rows))
        try:
            every_G = grouped_folds(whole_task.code_G, whole_task.family_G, self.head.folds, seed)
        except DataError:
            return
        expression_GF = expression_features(self.counts_CV, whole_task.token_G)
        found = out_of_fold(expression_GF, whole_task.code_G, whole_task.family_G, every_G, seed)
        self._add(whole_task, f"{BASELINE}_all", "baseline", seed, found, None)

    def _add(
        self,
        task: GeneTask,
        method: str,
        kind: str,
        seed: int,
        score_GL: np.ndarray,
        other_GL: np.ndarray | None,
    ) -> None:
        scores = gene_scores(task.code_G, score_GL, draws=self.draws, seed=seed)
        gain = (np.nan, np.nan, np.nan)
        if other_GL is not None and self.draws:
            gain = auroc_gain(task.code_G, score_GL, other_GL, draws=self.draws, seed=seed)
        self.rows.append({
            "task": task.name, "method": method, "kind": kind, "seed": seed,
            "positive": task.labels[-1], **scores.values(),
            "gain": gain[0], "gain_low": gain[1], "gain_high": gain[2],
        })  # fmt: skip
        logger.info("%s, %s: AUROC %.3f.", task.name, method, scores.auroc)


def run_evaluate_genes(settings: EvaluateGenesSettings) -> str:
    """Run ``genemodel evaluate genes`` and return the table to print."""
    values = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    data, genes, out = values.pop("input"), values.pop("genes"), values.pop("out")
    result = evaluate_genes(data, genes, out=out, **values)
    return f"{result.text()}\n\nWritten to {out}: scores.csv, predictions.csv"
