"""Response prediction: learn from perturbed and control cells, predict what was not perturbed.

Axes: U units, G genes, M single targets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import pandas as pd
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.whole_file import read_anndata
from genemodel.errors import ConfigError, DataError
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.obs_keys import check_in_memory, check_key_added
from genemodel.inference.progress import Progress
from genemodel.metrics.response import ALPHA
from genemodel.model.devices import device_of
from genemodel.response import vectors as known
from genemodel.response.design import WHAT, Design, design_of
from genemodel.response.mixture import OURS, fit_mixture, ingredients
from genemodel.response.null_test import NullTest, null_test
from genemodel.response.panels import MEAN, REPLICATE
from genemodel.response.result import ResponseResult, is_ours, tables_of, write_result
from genemodel.response.sampling import cells_with_effect
from genemodel.response.scoring import Scores, measure, noise_of, score
from genemodel.response.screen import Origin
from genemodel.response.settings import (
    MIN_CELLS,
    MIN_COUNTS,
    AskedResponse,
    Holdout,
    RespondSettings,
)
from genemodel.response.vectors import symbols_of
from genemodel.settings import check_replaced_folder, some, texts, to_values

if TYPE_CHECKING:
    from anndata import AnnData

KEY = "genemodel_respond"
_INDEX = ("part", "perturbation", "context", "dose")


@reads_cells
def respond(
    adata: "AnnData",
    perturbation_key: str,
    control: str,
    *,
    holdout: Holdout = "targets",
    label_key: str = "",
    dose_key: str = "",
    batch_key: str = "",
    donor_key: str = "",
    guide_key: str = "",
    predict: str | Sequence[str] = (),
    folds: int = 0,
    repeats: int = 3,
    permutations: int = 499,
    min_cells: int = MIN_CELLS,
    min_counts: float = MIN_COUNTS,
    combination: str = "+",
    knowledge: str | Sequence[str] = (),
    cells: int = 0,
    model: Bundle | str | Path | None = None,
    seed: int = 0,
    key_added: str = KEY,
    **options: Unpack[InputOptions],
) -> ResponseResult:
    """Predict how cells respond to a perturbation, and score the prediction on what is held out.

    Parameters
    ----------
    adata
        Raw counts. ``uns[key_added]`` gets the tables of scores and tests, and a summary.
    perturbation_key
        obs column of what was done to a cell.
    control
        Its value of cells to which nothing was done.
    holdout
        What is predicted without having been seen: ``"targets"`` (perturbations),
        ``"cell_types"``, ``"doses"`` or ``"donors"``.
    label_key
        obs column of the cell type or condition within which effects are measured.
    dose_key
        obs column of the dose: numbers, of which the order counts.
    batch_key
        obs column within which perturbed and control cells are compared; with
        ``holdout="donors"`` what is batch within a donor.
    donor_key
        obs column of donors, with ``holdout="donors"``.
    guide_key
        obs column of the guide: guides of one target should do the same.
    predict
        Also predict these, which were not measured: targets (``"A+B"`` together), doses, or
        contexts that hold controls only; these by themselves where nothing is named.
    folds
        Parts in which things are held out; 0: five for targets, else each alone.
    repeats
        Times that controls are dealt into halves and cells drawn.
    permutations
        Shuffles of the test whether there is an effect at all.
    min_cells
        Fewest cells of a perturbation in a context, and of its controls.
    min_counts
        Fewest molecules of a gene that a group of median size is expected to hold.
    combination
        Text between the targets of a combination.
    knowledge
        Files of what is known of targets: sets of genes (``.gmt``), or tables with a gene and
        numbers in every row; by symbol.
    cells
        Cells to make for every prediction; 0 for none.
    model
        A bundle or its folder, whose vectors of genes are tried.
    seed
        Of all chance.
    key_added
        Key in ``uns``.
    **options
        How the cells are read.

    Returns
    -------
    ResponseResult
        ``predicted``, ``measured``, ``scores``, ``scaled`` and ``tests`` are DataFrames.

    Raises
    ------
    ConfigError
        Settings contradict each other.
    DataError
        A column or the control is unknown, or there are too few cells.
    """
    asked = AskedResponse(
        perturbation_key=perturbation_key, control=control, holdout=holdout, label_key=label_key,
        dose_key=dose_key, batch_key=batch_key, donor_key=donor_key, guide_key=guide_key,
        predict=texts(predict), folds=folds, repeats=repeats, permutations=permutations,
        min_cells=min_cells, min_counts=min_counts, combination=combination,
        knowledge=texts(knowledge), cells=cells, seed=seed,
    )  # fmt: skip
    reading = InputSettings.given(options)
    check_key_added(key_added, "uns")
    check_in_memory(adata, "adata", "genemodel respond")
    if model is not None and holdout != "targets":
        raise ConfigError(
            f"model gives vectors of targets, and holdout={holdout} predicts targets that were "
            "measured: leave model out."
        )
    bundle = None if model is None else model_for("respond", (Bundle,), model)
    result = _respond(adata, asked, reading, bundle, "adata")
    adata.uns[key_added] = {
        "scores": result.scores.copy(), "scaled": result.scaled.copy(),
        "tests": result.tests.copy(), "words": result.words(),
        "settings": {k: v for k, v in to_values(asked).items() if v not in ("", [])},
    }  # fmt: skip
    return result


def respond_file(settings: RespondSettings) -> str:
    """Do the same with the cells of a file; returns what to print."""
    out = Path(settings.out)
    check_replaced_folder(out, "respond", is_ours, overwrite=settings.overwrite)
    for path in settings.knowledge:
        if not Path(path).is_file():
            raise DataError(f"knowledge={path}: there is no such file.")
    bundle = None
    if settings.model:
        bundle = model_for("respond", (Bundle,), settings.model, device=device_of(settings.device))
    adata, reading = read_anndata(settings.input, settings.reading)
    result = _respond(adata, settings.asked, reading, bundle, settings.input)
    write_result(result, out)
    return f"{result.describe()}\nTables and a page are in {out}"


def _respond(
    adata: "AnnData",
    asked: AskedResponse,
    reading: InputSettings,
    bundle: Bundle | None,
    where: str,
) -> ResponseResult:
    for path in asked.knowledge:
        if not Path(path).is_file():
            raise DataError(f"knowledge={path}: there is no such file.")
    design = design_of(adata, asked, reading, where)
    folds = design.folds(asked)
    tables = _fixed_vectors(design, asked, bundle, adata, reading, where)
    group_U = design.groups(asked.holdout)
    screen = design.screen

    def vectors_of(origin: Origin) -> dict[str, np.ndarray]:
        if asked.holdout != "targets":
            return {}
        column_M = np.array(known.columns_of(design.genes, design.part_names))
        own = {}
        if (column_M >= 0).sum() >= 2:
            controls = np.concatenate(origin.rows)
            own[known.CO_EXPRESSION] = known.co_expression(
                screen.counts_CG[controls], column_M, asked.seed
            )
        return known.of_perturbations(own | tables, design.parts)

    tests = null_test(screen, design.guide_C, asked.permutations, asked.seed)
    total = asked.repeats * sum(map(len, folds))
    with Progress("respond", total, unit="predictions") as progress:
        scores = score(
            screen, folds, group_U, asked.holdout, vectors_of,
            repeats=asked.repeats, seed=asked.seed, advance=progress.add,
        )  # fmt: skip
    return _result(design, asked, reading, tests, scores, group_U, vectors_of, bundle)


def _fixed_vectors(
    design: Design,
    asked: AskedResponse,
    bundle: Bundle | None,
    adata: "AnnData",
    reading: InputSettings,
    where: str,
) -> dict[str, np.ndarray]:
    """Vectors of single targets that no cell of the screen takes part in."""
    tables = {}
    if bundle is not None:
        # Refuses cells of another species, as every verb with a model does.
        codes = np.unique(VocabularyCells(adata, bundle, reading).species_C)
        names = [bundle.species[code] for code in codes]
        if len(names) != 1:
            raise DataError(f"{where}: has cells of {', '.join(names)}; a screen is of one species")
        tables[known.MODEL] = known.of_model(bundle, design.part_names, names[0])
        if np.isfinite(tables[known.MODEL]).all(1).sum() < 2:
            raise DataError(
                f"{where}: the model knows fewer than two of the perturbed genes "
                f"({some(design.part_names)}). Leave model out"
            )
    for text in asked.knowledge:
        path = Path(text)
        is_sets = path.name.removesuffix(".gz").endswith(".gmt")
        name = path.name.removesuffix(".gz").removesuffix(".gmt").removesuffix(".tsv")
        read = known.of_sets if is_sets else known.of_table
        tables[name] = read(path, design.part_names)
    return tables


def _result(
    design: Design,
    asked: AskedResponse,
    reading: InputSettings,
    tests: NullTest,
    scores: Scores,
    group_U: np.ndarray,
    vectors_of: Any,
    bundle: Bundle | None,
) -> ResponseResult:
    screen = design.screen
    context_U = np.array([unit.context for unit in screen.units])
    null = tests.null_contexts(context_U)
    judged = scores.units[~np.isin(context_U[scores.units["unit"]], null)]
    about: dict[str, Any] = {"best_baseline": None}
    raw, scaled = pd.DataFrame(), pd.DataFrame()
    if len(judged):
        raw, scaled, about = tables_of(judged, group_U, asked.seed)
    held = np.array(scores.asked, int)
    units = [screen.units[u] for u in held]
    rows = [
        ("held out", u.perturbation, u.context, float(design.dose_values[u.dose - 1]))
        for u in units
    ]
    predicted_UG = scores.predicted_UG[held]
    new, doses = design.unmeasured(asked)
    if len(new):
        whole = screen.whole()
        measured = measure(
            screen, whole, screen.units, noise_of(screen), vectors_of(whole), asked.seed
        )
        parts = ingredients(asked.holdout, list(measured.vectors))
        mixture = fit_mixture(measured, group_U, parts, asked.seed)
        predicted_UG = np.concatenate([predicted_UG, mixture.predict(measured, new, parts)])
        rows += [
            ("new", int(p), int(x), dose)
            for p, x, dose in zip(new.perturbation_T, new.context_T, doses, strict=True)
        ]
    if not asked.dose_key:
        rows = [(part, p, x, float("nan")) for part, p, x, _ in rows]
    predicted = _frame(design, rows, predicted_UG)
    table = pd.DataFrame({
        "perturbation": [screen.perturbations[u.perturbation] for u in screen.units],
        "context": [screen.contexts[u.context] for u in screen.units],
        "dose": [screen.doses[u.dose - 1] if asked.dose_key else "" for u in screen.units],
        "cells": [len(u.rows) for u in screen.units],
        "controls": [len(screen.controls[u.context]) for u in screen.units],
        "p": tests.p_U, "fdr": tests.fdr_U,
        "supported": [tests.fdr_U[n] < ALPHA for n in range(len(screen.units))],
        "verdict": [
            "null: no effect is claimed" if u.context in null else
            ("told from controls" if tests.fdr_U[n] < ALPHA else "not told from controls")
            for n, u in enumerate(screen.units)
        ],
    })  # fmt: skip
    if not asked.dose_key:
        table = table.drop(columns="dose")
    settings = to_values(asked) | {
        key: value for key, value in to_values(reading).items() if key in reading.changed
    }
    words = _words(design, asked, table, null, tests, about)
    if asked.holdout == "targets" and len(new):
        unknown = {
            screen.perturbations[p] for p in new.perturbation_T
            if not any(np.isfinite(v[p]).all() for v in measured.vectors.values())
        }  # fmt: skip
        if unknown:
            words.append(
                f"No vector is known of {some(sorted(unknown))}: predicted as the others respond."
            )
    summary = {
        "words": words, "held_out": f"{len(np.unique(group_U))} {WHAT[asked.holdout]}",
        "cells": int(sum(len(u.rows) for u in screen.units) + sum(map(len, screen.controls))),
        "genes": len(screen.genes), "depth": screen.depth, "notes": design.notes,
        "null_contexts": [screen.contexts[x] for x in null],
        "guides_p": {
            screen.contexts[x]: float(p) for x, p in enumerate(tests.p_guides_X) if np.isfinite(p)
        },
        "model": None if bundle is None else bundle.fingerprint, **about,
        "settings": {key: value for key, value in settings.items() if value not in ("", [], None)},
    }  # fmt: skip
    made = _made(design, asked, rows, predicted_UG) if asked.cells else None
    return ResponseResult(
        predicted, _frame(design, rows[: len(held)], scores.measured_UG[held]), table, raw,
        scaled, scores.units, scores.mixtures, made, summary,
    )  # fmt: skip


def _frame(
    design: Design,
    rows: Sequence[tuple[str, int, int, float]],
    effect_UG: np.ndarray,
) -> pd.DataFrame:
    screen = design.screen
    index = pd.MultiIndex.from_tuples(
        [(part, screen.perturbations[p], screen.contexts[x], dose) for part, p, x, dose in rows],
        names=_INDEX,
    )
    table = pd.DataFrame(effect_UG, index=index, columns=screen.genes)
    table.attrs["symbols"] = symbols_of(design.genes)
    return table


def _made(
    design: Design,
    asked: AskedResponse,
    rows: Sequence[tuple[str, int, int, float]],
    effect_UG: np.ndarray,
) -> "AnnData":
    """Cells of all predictions."""
    import anndata as ad

    screen, whole = design.screen, design.screen.whole()
    rng = np.random.default_rng(asked.seed)
    parts, notes = [], []
    for (part, p, x, dose), effect_G in zip(rows, effect_UG, strict=True):
        parts.append(
            cells_with_effect(
                whole.counts(x), whole.control_XG[x], effect_G, asked.cells, rng,
                depth=screen.depth,
            )
        )  # fmt: skip
        notes.append((part, screen.perturbations[p], screen.contexts[x],
                      dose))  # fmt: skip
    obs = pd.DataFrame([note for note in notes for _ in range(asked.cells)], columns=list(_INDEX))
    obs.index = pd.Index([f"made_{n}" for n in range(len(obs))])
    made = ad.AnnData(sp.vstack(parts, format="csr").astype(np.float32), obs=obs)
    made.var_names = screen.genes
    return made


def _words(
    design: Design,
    asked: AskedResponse,
    table: pd.DataFrame,
    null: list[int],
    tests: NullTest,
    about: dict[str, Any],
) -> list[str]:
    screen = design.screen
    told = int(table["supported"].sum())
    words = [
        f"{told} of {len(table)} groups of perturbed cells are told from controls "
        f"({asked.permutations} shuffles, false discovery rate 5 %)."
    ]
    for x in null:
        words.append(
            f"{screen.contexts[x]}: NULL. No perturbation is told from controls, so no effect is "
            "claimed, whatever a score says; it takes no part in the scores."
        )
    for x, p in enumerate(tests.p_guides_X):
        if np.isfinite(p):
            alike = "more alike than" if p < ALPHA else "no more alike than"
            words.append(
                f"{screen.contexts[x]}: guides of one target are {alike} guides of two (p {p:.3f})."
            )
    if about["best_baseline"] is not None:
        gain = about["gain"]
        side = "above" if gain >= 0 else "BELOW"
        words.append(
            f"{OURS} scores {about['total']:.3f} between {MEAN} (0) and {REPLICATE} (1), "
            f"{abs(gain):.3f} {side} the best baseline, {about['best_baseline']} (95 % of draws of "
            f"the {WHAT[asked.holdout]}: {about['gain_low']:.3f} to {about['gain_high']:.3f})."
        )
    elif len(null) < len(screen.contexts):
        words.append(
            f"In none of the six scores is {REPLICATE} better than {MEAN} by enough to tell "
            "methods apart."
        )
    return words + [f"{note[:1].upper()}{note[1:]}." for note in design.notes]
