"""``genemodel ablate``: what a prior is worth, by the same short run with, without and shuffled.

Every run of one seed takes the same cells in the same order, hides the same genes, begins with the
same weights (but for the projection of its knowledge) and takes the same steps. The control has
the same table with the vectors dealt to the known genes at random: what a model gains from that is
gained by extra parameters and by knowing *which* genes have an entry, not by what entries say.
"""

import csv
import io
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import genemodel
from genemodel.batches.tokens import TokenSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError
from genemodel.genes.knowledge import FOLDER, KnowledgeTable, file_digest, find_tables
from genemodel.heads.pretraining import PretrainingSettings
from genemodel.model.settings import ModelSettings
from genemodel.settings import PathText, check_out_folder, difference, to_values
from genemodel.train.recipe import pretrain
from genemodel.train.record import VALIDATION
from genemodel.train.settings import (
    HoldoutSettings,
    OptimSettings,
    PretrainSettings,
    TrainerSettings,
)
from genemodel.writing import whole

logger = logging.getLogger(__name__)

NONE, SHUFFLED = "none", "shuffled"
RESULT, REPORT, TABLES = "result.json", "ablation", "tables"
# Seeds of the permutations: no run's own.
_SHUFFLE_SEED = 10_000


@dataclass(frozen=True)
class AblateSettings:
    """Settings of ``genemodel ablate``, see ``configs/ablate.yaml``.

    Attributes
    ----------
    corpus
        Of the cells.
    out
        Folder of the runs and of the report; runs that are finished there are kept.
    knowledge
        What is compared: ``none``, tables by name or file, tables together (``family+grn``), and
        ``shuffled``, which stands for the control of every table.
    knowledge_dir
        Folder in which names are looked up.
    seeds
        Runs of each, with seeds 0, 1, ….
    keep_models
        Keep the bundle of every run.
    tokens, model, task, optim, trainer, holdout
        Of every run, as for pre-training.
    """

    corpus: PathText
    out: PathText
    knowledge: tuple[PathText, ...]
    knowledge_dir: PathText = FOLDER
    seeds: int = 3
    keep_models: bool = False
    tokens: TokenSettings = field(default_factory=TokenSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    task: PretrainingSettings = field(default_factory=PretrainingSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    holdout: HoldoutSettings = field(default_factory=HoldoutSettings)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds is {self.seeds}: it must be at least 1")
        if self.model.knowledge:
            raise ConfigError(
                f"model.knowledge={list(self.model.knowledge)}: say it in knowledge=[…], which is "
                "what is compared"
            )
        if not self.holdout.by:
            raise ConfigError(
                "holdout.by is empty: without cells held out nothing can be said of new ones"
            )
        if not self.priors:
            raise ConfigError(
                f"knowledge={list(self.knowledge)} names no table: give for example "
                "knowledge=[none,family,grn,shuffled]"
            )
        if len(set(self.knowledge)) != len(self.knowledge):
            raise ConfigError(f"knowledge={list(self.knowledge)} names something twice")
        if self.trainer.early_stopping or self.optim.horizon_minutes or self.trainer.max_minutes:
            raise ConfigError(
                "trainer.early_stopping, trainer.max_minutes and optim.horizon_minutes end runs at "
                "steps of their own, but runs are compared at equal steps: set them to 0"
            )

    @property
    def priors(self) -> tuple[str, ...]:
        """The tables and combinations of them that are compared."""
        return tuple(name for name in self.knowledge if name not in (NONE, SHUFFLED))


@dataclass(frozen=True)
class Arm:
    """One thing that is compared.

    Attributes
    ----------
    name
        As the report calls it.
    tables
        Its tables.
    shuffled
        Whether their genes are permuted.
    """

    name: str
    tables: tuple[Path, ...] = ()
    shuffled: bool = False


def run_ablate(settings: AblateSettings) -> str:
    """Run the comparison and say what came out; the verb."""
    return str(ablate(settings))


@dataclass(frozen=True)
class Ablation:
    """What the runs came to.

    Attributes
    ----------
    runs
        One row a run and objective: prior, shuffled, seed, objective, loss, trivial.
    summary
        One row a prior and objective: mean and standard error over seeds of the loss, the trivial
        predictor's, and the paired differences to no knowledge and to the own control.
    path
        Of the table that was written.
    """

    runs: pd.DataFrame
    summary: pd.DataFrame
    path: Path

    def __str__(self) -> str:
        """Lay it out to be read."""
        lines = []
        for objective, rows in self.summary.groupby("objective", sort=False):
            lines.append(
                f"{objective} (trivial predictor {rows['trivial'].iloc[0]:.4f}; less is better)"
            )
            lines.append(
                f"  {'knowledge':<28}{'held-out loss':>18}{'to none':>20}{'to shuffled':>20}"
            )
            for row in rows.to_dict("records"):
                lines.append(
                    f"  {row['knowledge']:<28}{_pm(row, 'loss', '.4f'):>20}"
                    f"{_pm(row, 'to_none', '+.4f'):>20}{_pm(row, 'to_shuffled', '+.4f'):>20}"
                )
        lines.append(f"mean ± standard error over seeds, differences paired by seed: {self.path}")
        return "\n".join(lines)


def _pm(row: Mapping[str, Any], name: str, form: str) -> str:
    value, error = row[name], row[f"{name}_se"]
    if not np.isfinite(value):
        return "–"
    return f"{value:{form}}" + (f" ± {error:.4f}" if np.isfinite(error) else "")


def ablate(settings: AblateSettings) -> Ablation:
    """Pre-train the same run for every prior, its shuffled control and seed, and compare.

    Runs that are finished in ``settings.out`` are kept; one that was interrupted goes on.

    Parameters
    ----------
    settings
        See :class:`AblateSettings`.

    Returns
    -------
    Ablation

    Raises
    ------
    ConfigError
        A table is not there, or ``out`` holds runs with other settings.
    DataError
        The corpus or a table cannot be used.
    """
    out = Path(settings.out)
    check_out_folder(out)
    corpus = Corpus.open(settings.corpus)
    arms = arms_of(settings)
    planned = [(arm, seed) for seed in range(settings.seeds) for arm in arms]
    runs = {(arm.name, seed): _run_settings(settings, arm, seed, corpus) for arm, seed in planned}
    finished = {key: _finished(run, corpus) for key, run in runs.items()}  # refuses before work
    rows: list[dict[str, Any]] = []
    for number, (arm, seed) in enumerate(planned, 1):
        run, losses = runs[arm.name, seed], finished[arm.name, seed]
        if losses is None:
            logger.info("Run %d of %d: %s, seed %d.", number, len(planned), arm.name, seed)
            losses = _train(run, corpus, keep=settings.keep_models)
        rows += [
            {"knowledge": arm.name, "shuffled": arm.shuffled, "seed": seed, **one} for one in losses
        ]
    table = pd.DataFrame(rows)
    found = Ablation(table, summarise(table), out / f"{REPORT}.tsv")
    _write(found, settings, arms, corpus)
    return found


def arms_of(settings: AblateSettings) -> list[Arm]:
    """List what is compared: no knowledge first, every prior with its control behind it."""
    arms = [Arm(NONE)] if NONE in settings.knowledge else []
    for name in settings.priors:
        tables = tuple(find_tables(name.split("+"), settings.knowledge_dir).values())
        label = "+".join(path.name.split(".")[0] for path in tables)
        arms.append(Arm(label, tables))
        if SHUFFLED in settings.knowledge:
            arms.append(Arm(f"{label}, {SHUFFLED}", tables, shuffled=True))
    names = [arm.name for arm in arms]
    if len(set(names)) != len(names):
        raise ConfigError(
            f"knowledge={list(settings.knowledge)}: two tables have the same name; rename a file"
        )
    return arms


def _run_settings(
    settings: AblateSettings, arm: Arm, seed: int, corpus: Corpus
) -> PretrainSettings:
    """Give the settings of a run; a shuffled table is written first, because runs read files."""
    out = Path(settings.out)
    tables = arm.tables
    if arm.shuffled:
        tables = tuple(
            _shuffled(path, out / TABLES / f"seed-{seed}", seed, corpus) for path in arm.tables
        )
    return PretrainSettings(
        corpus=settings.corpus,
        out=str(out / "runs" / arm.name.replace(", ", ".") / f"seed-{seed}"),
        seed=seed,
        tokens=settings.tokens,
        model=replace(settings.model, knowledge=tuple(map(str, tables))),
        task=settings.task,
        optim=settings.optim,
        trainer=settings.trainer,
        holdout=settings.holdout,
    )


def _shuffled(path: Path, folder: Path, seed: int, corpus: Corpus) -> Path:
    """Write the control of a table; the same one every time."""
    there = folder / f"{path.name.removesuffix('.gz').removesuffix('.tsv')}.{SHUFFLED}.tsv.gz"
    if not there.is_file():
        table = KnowledgeTable.read_raw(path, corpus.vocabulary)
        table.shuffled(_SHUFFLE_SEED + seed).write(there, corpus.vocabulary)
    return there


def _about(run: PretrainSettings, corpus: Corpus) -> dict[str, Any]:
    """Say what a finished run must agree in: settings, cells, the content of its tables."""
    values = to_values(run)
    del values["out"], values["corpus"], values["knowledge_dir"]
    values["model"]["knowledge"] = [Path(path).name for path in run.model.knowledge]
    digests = {Path(path).name: file_digest(path) for path in run.model.knowledge}
    return {"settings": values, "corpus": {"fingerprint": corpus.fingerprint}, "tables": digests}


def _finished(run: PretrainSettings, corpus: Corpus) -> list[dict[str, Any]] | None:
    """Losses of a run that is there; None where it is not, or not finished."""
    path = Path(run.out) / RESULT
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    if changed := list(difference(stored["about"], _about(run, corpus))):
        raise ConfigError(
            f"{run.out} holds a finished run with other settings:\n  "
            + "\n  ".join(changed)
            + "\nSet them back, or choose another out= for a new comparison."
        )
    losses: list[dict[str, Any]] = stored["losses"]
    return losses


def _train(run: PretrainSettings, corpus: Corpus, *, keep: bool) -> list[dict[str, Any]]:
    """Train one run to its end and keep its losses; its checkpoints go."""
    pretrain(run)
    folder = Path(run.out)
    last = pd.read_csv(folder / VALIDATION).iloc[-1]
    losses = [
        {"objective": name.removeprefix("val/"), "loss": float(last[name]),
         "trivial": float(last[f"val_trivial/{name.removeprefix('val/')}"])}
        for name in last.index
        if name.startswith("val/") and f"val_trivial/{name.removeprefix('val/')}" in last.index
    ]  # fmt: skip
    result = {"about": _about(run, corpus), "step": int(last["step"]), "losses": losses}
    with whole(folder / RESULT) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    if not keep:
        shutil.rmtree(folder / "bundle", ignore_errors=True)
    return losses


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Means and standard errors over seeds, and differences paired by seed.

    Parameters
    ----------
    runs
        As :attr:`Ablation.runs`.

    Returns
    -------
    As :attr:`Ablation.summary`; NaN where there is nothing to compare with, and for the standard
    error of one seed.
    """
    rows = []
    for objective, these in runs.groupby("objective", sort=False):
        loss = these.pivot(index="seed", columns="knowledge", values="loss")
        for name in dict.fromkeys(these["knowledge"]):
            own = these[these["knowledge"] == name]
            row: dict[str, Any] = {
                "objective": objective, "knowledge": name,
                "seeds": len(own), "trivial": own["trivial"].mean(),
                **_mean("loss", loss[name]),
            }  # fmt: skip
            control = f"{name}, {SHUFFLED}"
            row |= _mean(
                "to_none", loss[name] - loss[NONE] if NONE in loss and name != NONE else None
            )
            row |= _mean("to_shuffled", loss[name] - loss[control] if control in loss else None)
            rows.append(row)
    return pd.DataFrame(rows)


def _mean(name: str, values: pd.Series | None) -> dict[str, float]:
    if values is None:
        return {name: np.nan, f"{name}_se": np.nan}
    error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return {name: float(values.mean()), f"{name}_se": float(error)}


def _write(found: Ablation, settings: AblateSettings, arms: Sequence[Arm], corpus: Corpus) -> None:
    """Write the summary as a table, and everything as JSON."""
    text = io.StringIO()
    found.summary.to_csv(text, sep="\t", index=False, quoting=csv.QUOTE_NONE, float_format="%.6g")
    with whole(found.path) as partial:
        partial.write_text(text.getvalue())
    about = {
        "genemodel": genemodel.__version__,
        "corpus": corpus.fingerprint,
        "settings": to_values(settings),
        "tables": {path.name: file_digest(path) for arm in arms for path in arm.tables},
        "runs": found.runs.to_dict("records"),
        "summary": json.loads(found.summary.to_json(orient="records")),
    }
    with whole(found.path.with_suffix(".json")) as partial:
        partial.write_text(json.dumps(about, indent=1) + "\n")
