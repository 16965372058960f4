"""An ordered obs column: cells placed on it, a population between two times, genes that move it.

Axes: C cells, F width of cell vectors, G genes.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import scipy.sparse as sp
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.annotations import without_counts
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.cells.whole_file import read_anndata
from genemodel.errors import ConfigError, DataError
from genemodel.expression.variable_genes import select_genes
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.gene_counts import GeneCounts, read_counts
from genemodel.inference.obs_keys import batch_names, check_in_memory, check_key_added
from genemodel.inference.progress import Progress
from genemodel.integration.head import IntegrationSettings
from genemodel.model.devices import device_of
from genemodel.perturbation.genes import GeneNames
from genemodel.perturbation.settings import MIN_AUC, MIN_CELLS, MIN_COVERAGE, NULLS, Asked
from genemodel.perturbation.statistics import adjusted
from genemodel.perturbation.variants import Operation
from genemodel.settings import check_replaced_folder, texts, to_values
from genemodel.trajectories.movers import agreement, by_model, with_time
from genemodel.trajectories.placing import Placer
from genemodel.trajectories.populations import Interpolator, crossing, population_table
from genemodel.trajectories.result import TrajectoryResult, for_uns, is_ours, write_result
from genemodel.trajectories.settings import (
    N_GENES,
    PARTS,
    PERTURBED,
    PERTURBED_CELLS,
    STEPS,
    TimeAsked,
    TrajectorySettings,
)
from genemodel.trajectories.times import Times, times_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "genemodel_time"


@reads_cells
def trajectory(
    adata: "AnnData",
    *,
    time_key: str,
    order: Sequence[str] = (),
    donor_key: str = "",
    model: Bundle | str | Path | None = None,
    parts: Sequence[str] = PARTS,
    n_genes: int = N_GENES,
    steps: int = STEPS,
    genes: str | Sequence[str] = (),
    n_perturbed: int = PERTURBED,
    perturb_type: Operation = "delete",
    nulls: int = NULLS,
    min_cells: int = MIN_CELLS,
    min_coverage: float = MIN_COVERAGE,
    min_auc: float = MIN_AUC,
    max_cells: int = PERTURBED_CELLS,
    key_added: str = KEY,
    device: str | torch.device = "auto",
    seed: int = 0,
    **options: Unpack[InputOptions],
) -> TrajectoryResult:
    """Place cells on an ordered column, predict the cells between two times, rank what moves them.

    Every answer stands beside what the plain methods say of the same held-out donors and times.

    Parameters
    ----------
    adata
        Raw counts. ``obs[key_added]`` gets the time that a cell is placed at without its donor (or,
        without donors, without its own fold), ``uns[key_added]`` the tables.
    time_key
        obs column of times or stages: numbers, texts with one number each (``300_minutes``), or
        ordered categories.
    order
        Its values from the earliest to the latest, where they are names; cells of other values are
        placed and not learnt from.
    donor_key
        obs column of donors (animals, lines, batches), which are held out and are the replicates.
    model
        From :func:`genemodel.load`, or the path of its folder: cells are placed by its vectors too,
        the latent reads them, and it is asked about genes. Default none.
    parts
        Of ``"place"``, ``"populations"`` and ``"genes"``.
    n_genes
        Variable genes that cells are placed by and populations compared in.
    steps
        Training steps of the latent and its decoder, for every time held out.
    genes
        Genes that the model is asked about; empty for those that go with time most.
    n_perturbed
        How many those are.
    perturb_type
        What is done to them: ``"delete"``, ``"overexpress"``, ``"inhibit"`` or ``"activate"``.
    nulls
        Genes alike in rank, detection and mean that each gene is compared with.
    min_cells, min_coverage
        Least number and share of the cells that a gene must be held by.
    min_auc
        A step whose two times the model tells apart less well is left out; 0 for none.
    max_cells
        Most cells of a time in which genes are perturbed.
    key_added
        Column of ``obs`` and key of ``uns``.
    device
        Where to train and to ask the model.
    seed
        Of folds, samples, decompositions and training.
    **options
        How the cells are read.

    Returns
    -------
    TrajectoryResult
        Tables as DataFrames.

    Raises
    ------
    ConfigError
        Settings contradict each other.
    DataError
        The column is not there, has no order or fewer than three times; no raw counts.
    """
    asked = TimeAsked(
        time_key=time_key, order=texts(order), donor_key=donor_key, parts=texts(parts),
        n_genes=n_genes, steps=steps, genes=texts(genes), n_perturbed=n_perturbed,
        perturb_type=perturb_type, nulls=nulls, min_cells=min_cells, min_coverage=min_coverage,
        min_auc=min_auc, max_cells=max_cells, seed=seed,
    )  # fmt: skip
    reading = InputSettings.given(options)
    check_in_memory(adata, "adata", "genemodel trajectory")
    check_key_added(key_added, "obs")
    if key_added == time_key:
        raise ConfigError(
            f"key_added={key_added} is the time_key: what cells are learnt from would be replaced. "
            "Give another name."
        )
    bundle = None if model is None else model_for("trajectory", (Bundle,), model, device=device)
    if asked.genes and (bundle is None or "genes" not in asked.parts):
        raise ConfigError(
            "genes names genes that a model is asked about: give model= and leave 'genes' in "
            "parts, or leave them out."
        )
    result, time_C = _made(adata, bundle, asked, reading, device_of(device))
    if time_C is not None:
        adata.obs[key_added] = time_C.astype(np.float32)
    adata.uns[key_added] = for_uns(result)
    return result


def trajectory_file(settings: TrajectorySettings) -> str:
    """Do the same with the cells of a file, and write tables; returns what to print."""
    out, path = Path(settings.out), Path(settings.input)
    check_replaced_folder(out, "trajectory", is_ours, overwrite=settings.overwrite)
    if not path.exists():
        raise DataError(f"input={path} does not exist.")
    adata, reading = read_anndata(path, settings.reading)
    given: dict[str, Any] = {
        name: getattr(settings.asked, name) for name in TimeAsked.__dataclass_fields__
    }
    result = trajectory(
        adata, **given, model=settings.model or None, key_added=settings.key_added,
        device=settings.device, **reading.options(),
    )  # fmt: skip
    write_result(result, without_counts(adata), out)
    return f"{result!r}\nTables are in {out}"


def _made(
    adata: "AnnData",
    bundle: Bundle | None,
    asked: TimeAsked,
    reading: InputSettings,
    device: torch.device,
) -> tuple[TrajectoryResult, np.ndarray | None]:
    times = times_of(adata.obs, asked.time_key, asked.order, missing_labels=reading.missing_labels)
    donor_C = _donors(adata.obs, asked.donor_key, reading)
    if bundle is not None:
        bundle = bundle.on(device)
    counts = read_counts(
        adata, bundle=bundle, vocabulary=None, reading=reading,
        features=bool({"place", "populations"} & set(asked.parts)),
    )  # fmt: skip
    counts = counts.only(counts.seen())
    names = counts.genes if bundle is None else _symbols(counts, bundle)
    chosen = select_genes(counts.counts_CG, crossing(times, donor_C), asked.n_genes)
    variable_CG = sp.csr_matrix(counts.counts_CG[:, chosen])
    usable = np.flatnonzero(np.asarray(variable_CG.sum(1)).ravel() > 0)
    if usable.size < adata.n_obs:
        logger.warning(
            "%s of %s cells have no counts of the variable genes and are left out.",
            f"{adata.n_obs - usable.size:,}", f"{adata.n_obs:,}",
        )  # fmt: skip
    here = replace(times, code_C=times.code_C[usable])
    variable_CG = variable_CG[usable]
    own_C = None if donor_C is None else donor_C[usable]
    vectors_CF = None if counts.features_CF is None else counts.features_CF[usable]
    result, time_C = TrajectoryResult(), None
    result.summary = _summary(here, asked, bundle, own_C)
    if "place" in asked.parts:
        n_folds = int((here.code_C >= 0).sum()) + sum(
            int((here.code_C == time).sum()) for time in here.inner
        )
        with Progress("place", n_folds) as progress:
            placed = Placer(variable_CG, here, own_C, vectors_CF, asked.seed).place(progress.add)
        result.placing, result.placing_long = placed.table, placed.long
        result.summary["placed_by"] = placed.method
        time_C = np.full(adata.n_obs, np.nan)
        time_C[usable] = placed.time_C
    if "populations" in asked.parts:
        between = Interpolator(
            variable_CG, here, own_C, vectors_CF, IntegrationSettings(steps=asked.steps, passes=0),
            device=device, seed=asked.seed,
        )  # fmt: skip
        with Progress("populations", len(here.inner), unit="times") as progress:
            result.populations_long = between.long(progress.add)
        result.populations = population_table(result.populations_long)
    for table in (result.placing, result.populations):
        if table is not None:
            table["FDR"] = adjusted(table["pval"].to_numpy(float))
    _name_donors(result, adata.obs, asked, reading)
    if "genes" in asked.parts:
        result.genes, said = with_time(
            counts.counts_CG, names, times, donor_C, asked.seed,
            min_cells=asked.min_cells, min_coverage=asked.min_coverage,
        )  # fmt: skip
        result.summary |= said
        if bundle is not None:
            _ask(result, adata, bundle, times, asked, reading)
    return result, time_C


def _donors(obs: "pd.DataFrame", donor_key: str, reading: InputSettings) -> np.ndarray | None:
    """Code the donors; None where they are not named."""
    if not donor_key:
        return None
    names_C = batch_names(obs, (donor_key,), "adata", reading.missing_labels, "donor_key")
    donors, donor_C = np.unique(names_C.astype(str), return_inverse=True)
    if donors.size < 2:
        raise DataError(
            f"adata.obs[{donor_key!r}] (donor_key) holds one donor: none can be held out. Name "
            "another column, or leave donor_key out."
        )
    return np.asarray(donor_C)


def _name_donors(
    result: TrajectoryResult, obs: "pd.DataFrame", asked: TimeAsked, reading: InputSettings
) -> None:
    """Put names in the place of codes."""
    for table in (result.placing_long, result.populations_long):
        if table is None:
            continue
        if not asked.donor_key:
            table["donor"] = "all"
            continue
        names_C = batch_names(obs, (asked.donor_key,), "adata", reading.missing_labels, "donor_key")
        names = np.append(np.unique(names_C.astype(str)), "all")
        table["donor"] = names[table["donor"].to_numpy(int)]


def _symbols(counts: GeneCounts, bundle: Bundle) -> list[str]:
    """Name columns that are tokens."""
    assert counts.species_C is not None
    names = GeneNames(bundle.vocabulary, [bundle.species[s] for s in np.unique(counts.species_C)])
    return [names.symbol((int(token),)) for token in counts.genes]


def _summary(
    times: Times, asked: TimeAsked, bundle: Bundle | None, donor_C: np.ndarray | None
) -> dict[str, Any]:
    known_C = times.code_C >= 0
    return {
        "genemodel": genemodel.__version__,
        "model": "" if bundle is None else bundle.fingerprint,
        "asked": {k: v for k, v in to_values(asked).items() if v is not None},
        "times": list(times.names),
        "values": times.value_T.tolist(),
        "measured": times.measured,
        "cells": int(known_C.sum()),
        "unknown_cells": int((~known_C).sum()),
        "donor_key": asked.donor_key,
        "donors": 0 if donor_C is None else int(np.unique(donor_C[known_C]).size),
    }


def _ask(
    result: TrajectoryResult,
    adata: "AnnData",
    bundle: Bundle,
    times: Times,
    asked: TimeAsked,
    reading: InputSettings,
) -> None:
    """Perturb genes, and lay the shifts beside the change of expression."""
    assert result.genes is not None
    genes = asked.genes or tuple(result.genes["Gene"].head(asked.n_perturbed))
    perturbed = Asked(
        genes=genes, perturb_type=asked.perturb_type, donor_key=asked.donor_key,
        # Of genes' mean where nothing opens a cell.
        emb_mode="cls" if bundle.tokens.opens else "cell",
        nulls=asked.nulls, min_cells=asked.min_cells, min_coverage=asked.min_coverage,
        min_auc=asked.min_auc, max_cells=asked.max_cells, seed=asked.seed,
    )  # fmt: skip
    cells = VocabularyCells(adata, bundle, reading)
    result.steps, auc = by_model(cells, adata.obs, bundle, times, perturbed, reading, "adata")
    result.summary["auc"] = auc
    result.summary["agreement"] = agreement(result.genes, result.steps, asked.perturb_type)
