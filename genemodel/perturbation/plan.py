"""Which cells and genes are perturbed, towards what: all that is known before a variant is made.

Axes: C cells, P perturbations, W variants, S states, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

import genemodel
from genemodel.batches.window import Window
from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.cells.missing_labels import without_placeholders
from genemodel.errors import ConfigError, DataError
from genemodel.expression.normalise import DEPTH
from genemodel.importers.exporting import source_tokens
from genemodel.inference.counts import VocabularyCells, VocabularyChunk, window_of
from genemodel.inference.obs_keys import batch_names, column
from genemodel.perturbation.genes import (
    GeneNames,
    GeneTable,
    MatchedGenes,
    Perturbation,
    asked_for,
    facts,
    with_nulls,
)
from genemodel.perturbation.passes import Perturber, Shifts
from genemodel.perturbation.result import PerturbationResult, correlation, gene_table, identity_r2
from genemodel.perturbation.settings import Asked
from genemodel.perturbation.states import States, states_of
from genemodel.perturbation.statistics import Tested, statistics
from genemodel.settings import did_you_mean, some, to_values
from genemodel.writing import in_bytes

logger = logging.getLogger(__name__)

# Sums over every pair of a perturbed and another gene are held in memory.
GENE_SUMS_BYTES = 2 * 1024**3
# Of those three arrays: float32 and two of float64.
GENE_SUM_BYTES = 20


@dataclass
class Plan:
    """Everything that is known before the first variant is made.

    Attributes
    ----------
    rows
        Cells that are perturbed, by their row in the window.
    variants_C
        How many variants each has.
    """

    asked: Asked
    bundle: Bundle
    perturber: Perturber
    window: Window
    rows: np.ndarray
    cell_names: np.ndarray
    variants_C: np.ndarray
    perturbations: list[Perturbation]
    n_test: int
    nulls: list[list[int]]
    names: GeneNames
    table: GeneTable
    states: States
    goal_V: np.ndarray | None
    donor_C: np.ndarray | None
    anchor: int | None
    parts_P: list[tuple[int, ...]]
    refused: list[str]

    @property
    def n_variants(self) -> int:
        """Variants of all cells."""
        return int(self.variants_C.sum())

    @property
    def of_genes(self) -> bool:
        """Whether every other gene is measured too."""
        return self.asked.how.of_genes

    def shifts(self, cells: np.ndarray, done: Callable[[int], object]) -> Shifts:
        """Perturb some of the cells, given by their number among those that are perturbed."""
        found = self.perturber.shifts(
            self.window, self.rows[cells], [one.tokens for one in self.perturbations],
            self.states.vectors_SD, self.goal_V, done,
        )  # fmt: skip
        number = {int(row): int(cell) for row, cell in zip(self.rows[cells], cells, strict=True)}
        found.cell_W = np.array([number[int(row)] for row in found.cell_W], np.int64)
        order = np.lexsort((found.perturbation_W, found.cell_W))
        for name in Shifts.ARRAYS:
            values = getattr(found, name)
            setattr(found, name, values[order] if len(values) else values)
        return found

    def result(self, shifts: Shifts) -> PerturbationResult:
        """Make the tables."""
        of_each = facts(self.perturbations, self.names, self.table)
        covered_P = np.ones(len(self.perturbations), bool)  # those below the floor were not begun
        tested = Tested(
            shifts, of_each, self.n_test, self.nulls, self.states.names, self.donor_C,
            self.rows.size, covered_P, self.anchor, self.parts_P,
        )  # fmt: skip
        table = statistics(tested)
        gene_shifts = None
        if shifts.genes is not None:
            gene_shifts = gene_table(shifts.genes, of_each, self.names, self.n_test)
        summary = self._summary(table)
        return PerturbationResult(table, self._long(shifts, of_each), gene_shifts, summary)

    def _long(self, shifts: Shifts, of_each: pd.DataFrame) -> pd.DataFrame:
        part_P = np.array([one.part for one in self.perturbations])
        p = shifts.perturbation_W
        columns: dict[str, Any] = {
            "cell": pd.Categorical.from_codes(shifts.cell_W, pd.Index(self.cell_names)),
            "Gene": of_each["Gene"].to_numpy()[p],
            "Gene_name": of_each["Gene_name"].to_numpy()[p],
            "part": part_P[p],
            "rank": shifts.place_W,
            "cosine_similarity": shifts.cosine_W,
        }
        for s, name in enumerate(self.states.names):
            columns[f"shift_to_{name}"] = shifts.state_WS[:, s]
        if len(shifts.held_W):
            columns["held_cosine_similarity"] = shifts.held_W
            for s, name in enumerate(self.states.names):
                columns[f"held_shift_to_{name}"] = shifts.held_WS[:, s]
        columns["without_model"] = shifts.plain_W
        return pd.DataFrame(columns)

    def _summary(self, table: pd.DataFrame) -> dict[str, Any]:
        goal = bool(self.states.names)
        shift = table["Shift_to_goal_end" if goal else "Test_avg_shift"].to_numpy(float)
        out: dict[str, Any] = {
            "genemodel": genemodel.__version__,
            "model": self.bundle.fingerprint,
            "asked": {k: v for k, v in to_values(self.asked).items() if v is not None},
            "cells": int(self.rows.size),
            "perturbations": self.n_test,
            "null_perturbations": len(self.perturbations) - self.n_test,
            "below_floor": list(self.refused),
            "identity_r2": identity_r2(shift, table),
            "without_model_spearman": correlation(shift, table["Expression_shift"]),
            "significant": int(table["Sig"].sum()),
            "supported": int(table["Supported"].sum()),
        }
        if "Position_preserving_shift" in table:
            held = table["Position_preserving_shift"]
            out["position_preserving_spearman"] = correlation(shift, held)
        if goal:
            out |= {"auc": self.states.auc, "auc_held_out": self.states.held_out}
            out["goal"], out["start"] = self.states.names[:2]
        if self.donor_C is not None:
            out["donors"] = int(np.unique(self.donor_C).size)
        return out


def plan_of(
    cells: VocabularyCells,
    obs: pd.DataFrame,
    bundle: Bundle,
    asked: Asked,
    reading: InputSettings,
    batch_tokens: int,
    where: str,
) -> Plan:
    """Choose cells, genes and nulls, and measure the states.

    Parameters
    ----------
    cells, obs
        The cells, and their annotations row for row.
    bundle, asked, reading
        The model, what is wanted, how the cells are read.
    batch_tokens
        Most tokens at once; 0 for the model's own.
    where
        Names the cells in messages.

    Raises
    ------
    DataError
        A gene, column or state is unknown, nothing is above the floor, or the states do not
        separate.
    """
    start_C, state_C, chosen = _choose(obs, asked, reading, where)
    chunk, kept = _counts(cells, chosen)
    start_C, window = start_C[kept], window_of(chunk)
    rows = np.flatnonzero(start_C)
    if not rows.size:
        raise DataError(f"{where}: no cell to perturb has a gene of the model's vocabulary.")
    perturber = Perturber(bundle, asked.how, budget=batch_tokens)
    table = GeneTable.of(perturber, window, rows)
    species = [bundle.species[s] for s in np.unique(chunk.species_C[rows])]
    # Whoever knows a Geneformer's tables knows its tokens.
    published = bundle.tokens.style.startswith("geneformer")
    names = GeneNames(bundle.vocabulary, species, source_tokens(bundle) if published else None)
    covered_V = table.covered_V(asked.min_cells, asked.min_coverage)
    wanted = asked_for(
        asked.genes, names, combos=asked.combos, anchor=asked.anchor_gene, covered_V=covered_V
    )
    wanted, refused = _above_floor(wanted, table, covered_V, names, asked, rows.size, where)
    parts_P = _parts(wanted)
    anchor = None
    if asked.anchor_gene:
        single = (*names.tokens([asked.anchor_gene], "anchor_gene"),)
        anchor = next((p for p, one in enumerate(wanted) if one.tokens == single), None)
    n_test, nulls = len(wanted), list[list[int]]([] for _ in wanted)
    everything = wanted
    if asked.nulls:
        matched = MatchedGenes(table, covered_V)
        everything, nulls = with_nulls(wanted, matched, asked.nulls, table)
    _refuse_large(asked, len(everything), len(bundle.vocabulary))
    donor_C = None
    if asked.donor_key:
        names_C = batch_names(
            obs.iloc[chosen[kept]], (asked.donor_key,), where, reading.missing_labels, "donor_key"
        )
        _, donor_C = np.unique(names_C.astype(str), return_inverse=True)
    states, goal_V = _states(perturber, window, chunk, state_C, kept, asked, donor_C)
    variants_C = _variants(perturber, window, rows, everything)
    logger.info(
        "%s: %s cells × %s perturbations (%s of them nulls): %s variants.",
        where, f"{rows.size:,}", f"{len(everything):,}", f"{len(everything) - n_test:,}",
        f"{variants_C.sum():,}",
    )  # fmt: skip
    cell_names = obs.index[chosen[kept]].astype(str).to_numpy()[rows]
    return Plan(
        asked, bundle, perturber, window, rows, cell_names,
        variants_C, everything, n_test, nulls, names, table, states, goal_V,
        None if donor_C is None else donor_C[rows], anchor, parts_P, refused,
    )  # fmt: skip


def _choose(
    obs: pd.DataFrame, asked: Asked, reading: InputSettings, where: str
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Choose cells: which are perturbed, the state of each, and their rows, ascending."""
    rng = np.random.default_rng(asked.seed)

    def sample(rows: np.ndarray) -> np.ndarray:
        if asked.max_cells and rows.size > asked.max_cells:
            return np.sort(rng.choice(rows, asked.max_cells, replace=False))
        return rows

    if not asked.state_key:
        chosen = sample(np.arange(len(obs)))
        return np.ones(chosen.size, bool), None, chosen
    values = column(obs, asked.state_key, "state_key", where)
    values = without_placeholders(
        values, reading.missing_labels, column=asked.state_key, where=where
    )
    # Not by Series.map, which makes NaN of None, and NaN has no order among texts.
    text_C = np.array([None if pd.isna(v) else str(v) for v in values], dtype=object)
    known = sorted({value for value in text_C if value is not None})
    rows = []
    for name in asked.states or (asked.start_state,):
        here = np.flatnonzero(text_C == name)
        if not here.size:
            raise DataError(
                f"{where}: no cell has {asked.state_key}={name!r}"
                f"{did_you_mean(name, known, '.')} The column holds {some(known)}."
            )
        rows.append(sample(here))
    chosen = np.sort(np.concatenate(rows))
    state_C = text_C[chosen].astype(str)
    return state_C == asked.start_state, state_C, chosen


def _counts(cells: VocabularyCells, chosen: np.ndarray) -> tuple[VocabularyChunk, np.ndarray]:
    """Read the counts of some cells, and say which of them hold a known gene."""
    parts, species, library, total = [], [], [], []
    for chunk in cells.chunks():
        a, b = np.searchsorted(chosen, [chunk.start, chunk.start + chunk.counts_CV.shape[0]])
        here = chosen[a:b] - chunk.start
        if here.size:
            parts.append(chunk.counts_CV[here])
            species.append(chunk.species_C[here])
            library.append(chunk.library_C[here])
            # A published model ranks by shares of all counts, those of genes without a token too.
            total.append(chunk.library_C[here] if chunk.total_C is None else chunk.total_C[here])
    counts_CV = sp.vstack(parts, format="csr")
    library_C = np.concatenate(library)
    kept = np.flatnonzero(library_C > 0)
    if kept.size < chosen.size:
        logger.warning(
            "%s: %s of %s cells have no gene of the vocabulary and are left out.",
            cells.source.where, f"{chosen.size - kept.size:,}", f"{chosen.size:,}",
        )  # fmt: skip
    species_C = np.concatenate(species)
    total_C = np.concatenate(total)[kept]
    return VocabularyChunk(0, counts_CV[kept], species_C[kept], library_C[kept], total_C), kept


def _above_floor(
    wanted: list[Perturbation],
    table: GeneTable,
    covered_V: np.ndarray,
    names: GeneNames,
    asked: Asked,
    n_cells: int,
    where: str,
) -> tuple[list[Perturbation], list[str]]:
    """Leave out genes that too few cells hold; what is over-expressed needs none."""
    if asked.perturb_type == "overexpress":
        return wanted, []
    every = all if asked.group_needs == "all" else any
    kept = [one for one in wanted if every(covered_V[token] for token in one.tokens)]
    refused = [
        f"{names.symbol(one.tokens)} ({max(int(table.n_V[t]) for t in one.tokens):,} cells)"
        for one in wanted if one not in kept
    ]  # fmt: skip
    if not kept:
        raise DataError(
            f"{where}: none of the genes is held by min_cells={asked.min_cells} and "
            f"min_coverage={asked.min_coverage:g} of the {n_cells:,} cells that are perturbed"
            + (f": {some(refused)}" if refused else "")
            + ". Give more cells or other genes, or lower the floor."
        )
    if refused:
        logger.warning(
            "%s: held by fewer than min_cells=%d or min_coverage=%g of %s cells, and not tested: "
            "%s.", where, asked.min_cells, asked.min_coverage, f"{n_cells:,}", some(refused),
        )  # fmt: skip
    return kept, refused


def _parts(wanted: list[Perturbation]) -> list[tuple[int, ...]]:
    """Give of every combination the numbers of its genes alone, where all of them are there."""
    place = {one.tokens: p for p, one in enumerate(wanted) if len(one.tokens) == 1}
    found: list[tuple[int, ...]] = []
    for one in wanted:
        alone = [place.get((token,)) for token in one.tokens]
        there = len(alone) > 1 and all(p is not None for p in alone)
        found.append(tuple(p for p in alone if p is not None) if there else ())
    return found


def _refuse_large(asked: Asked, n_perturbations: int, n_tokens: int) -> None:
    needed = n_perturbations * n_tokens * GENE_SUM_BYTES
    if asked.how.of_genes and needed > GENE_SUMS_BYTES:
        raise ConfigError(
            f"emb_mode={asked.emb_mode} with {n_perturbations:,} perturbations (nulls={asked.nulls}"
            f" for each gene included) needs {in_bytes(needed)} for every pair of genes: name "
            "fewer genes, set nulls=0, or measure cells alone (emb_mode=cls)."
        )


def _states(
    perturber: Perturber,
    window: Window,
    chunk: VocabularyChunk,
    state_C: np.ndarray | None,
    kept: np.ndarray,
    asked: Asked,
    donor_C: np.ndarray | None,
) -> tuple[States, np.ndarray | None]:
    width = perturber.bundle.model.settings.width
    if not asked.states or state_C is None:
        return States((), np.empty((0, width), np.float32)), None
    state_C = state_C[kept]
    empty = [name for name in asked.states if not (state_C == name).any()]
    if empty:
        raise DataError(f"No cell of {empty[0]!r} has a gene of the model's vocabulary.")
    cell_CD = perturber.vectors(window, np.arange(len(window)))
    states = states_of(
        cell_CD, state_C, asked.states, donor_C, min_auc=asked.min_auc, seed=asked.seed,
        setting=f"state_key={asked.state_key}",
    )  # fmt: skip
    logger.info(
        "%r is told from %r with AUC %.3f, on %s held out.", asked.goal_state, asked.start_state,
        states.auc, states.held_out,
    )  # fmt: skip
    value_CV = chunk.counts_CV[np.flatnonzero(state_C == asked.goal_state)].astype(np.float64)
    library_C = np.asarray(value_CV.sum(1)).ravel()
    value_CV = sp.diags(DEPTH / library_C) @ value_CV
    value_CV.data = np.log1p(value_CV.data)
    return states, np.asarray(value_CV.mean(0)).ravel()


def _variants(
    perturber: Perturber, window: Window, rows: np.ndarray, wanted: Sequence[Perturbation]
) -> np.ndarray:
    """Count the variants of every cell, which is what takes the time."""
    place = {int(row): i for i, row in enumerate(rows)}
    n_C = np.zeros(rows.size, np.int64)
    for batch, here in perturber.batches(window, rows):
        cell_W = perturber.cells_of(batch, [one.tokens for one in wanted])
        n_C[[place[int(row)] for row in here]] = np.bincount(cell_W, minlength=here.size)
    return n_C
