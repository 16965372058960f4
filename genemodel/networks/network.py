"""Gene regulatory networks from a model and from the cells alone, scored beside each other.

Axes: C cells, S sources (transcription factors), T targets.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Unpack, cast

import numpy as np
import pandas as pd
import torch

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import bundle_for, model_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.obs_keys import batch_names, check_in_memory, check_key_added
from genemodel.metrics.networks import stability
from genemodel.model.devices import device_of
from genemodel.networks.asked_of_models import (
    attention_network,
    perturbation_network,
    vector_network,
    why_not,
)
from genemodel.networks.attention import unique_names
from genemodel.networks.cells import Genes, NetworkCells, choose_genes, read_network_cells
from genemodel.networks.classical import grnboost, partial, pearson
from genemodel.networks.jacobian import jacobian
from genemodel.networks.result import (
    SIGNED,
    NetworkResult,
    edge_table,
    for_uns,
    is_ours,
    write_result,
)
from genemodel.networks.scoring import Truth, null_networks, score_table
from genemodel.networks.settings import (
    MAX_EDGES,
    METHODS,
    MIN_CELLS,
    MIN_COVERAGE,
    OF_A_MODEL,
    Asked,
    Method,
    NetworkSettings,
)
from genemodel.networks.truth import factors, read_edges
from genemodel.settings import check_replaced_folder, texts, to_values

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "genemodel_network"
# Donor halves of fewer cells give networks of noise.
_FEWEST_CELLS = 20


@reads_cells
def network(
    adata: "AnnData",
    model: Bundle | str | Path | None = None,
    *,
    methods: Method | Sequence[Method] = (),
    tfs: str | Sequence[str] = (),
    n_genes: int = 1000,
    truth: str | Path = "",
    truth_kind: str = "",
    prior: str | Path | Sequence[str | Path] = (),
    show: Literal["cell", "network"] = "cell",
    donor_key: str = "",
    max_cells: int = 2000,
    jacobian_cells: int = 200,
    min_cells: int = MIN_CELLS,
    min_coverage: float = MIN_COVERAGE,
    max_edges: int = MAX_EDGES,
    bootstraps: int = 500,
    workers: int = 1,
    batch_tokens: int = 0,
    device: str | torch.device | None = None,
    seed: int = 0,
    key_added: str = KEY,
    **options: Unpack[InputOptions],
) -> NetworkResult:
    """Infer gene regulatory networks, and score them against known edges.

    Parameters
    ----------
    adata
        Raw counts of one species. ``uns[key_added]`` gets edges, scores and a summary.
    model
        A bundle, or the path of its folder; without one only methods that need none.
    methods
        ``"attention"``, ``"gene_vectors"``, ``"perturbation"`` and ``"jacobian"`` ask the model;
        ``"pearson"``, ``"partial"`` and ``"grnboost"`` ask the cells. By default all that can be
        had.
    tfs
        Transcription factors, which edges start from: symbols or Ensembl ids, or one file with a
        name in the first column of every line. By default those of ``truth``; without it every
        gene.
    n_genes
        Targets: so many of the most variable genes, and the transcription factors.
    truth
        Table of known edges: columns tf (or source) and target.
    truth_kind
        Of a table with a column ``kind``: the one that is taken.
    prior
        Tables of edges that the model was told: scores are also given without them.
    show
        What a model sees of a cell: ``"cell"``, all its genes, as in training, of which a context
        that is shorter leaves out most; or ``"network"``, the genes of the network alone, so that
        pairs of them meet.
    donor_key
        obs column of donors: networks of both halves of them are compared.
    max_cells
        Most cells that are looked at; 0 for all.
    jacobian_cells
        Most cells for the Jacobian, which goes backwards through the model once a dimension.
    min_cells, min_coverage
        Least number and share of the cells that hold a gene.
    max_edges
        Edges kept of a method, the strongest; 0 for all.
    bootstraps
        Resamples of the transcription factors for intervals.
    workers
        Processes for grnboost.
    batch_tokens
        Most tokens at once; 0 for the model's own budget.
    device
        Default: where the model is.
    seed
        Of samples, halves, trees and resamples.
    key_added
        Key in ``uns``.
    **options
        How the cells are read.

    Returns
    -------
    NetworkResult
        ``edges`` and ``scores`` are DataFrames.

    Raises
    ------
    ConfigError
        Settings contradict each other, or a method that was named cannot be had of this model.
    DataError
        A gene, column or table is unknown, or no transcription factor is in enough cells.
    """
    asked = Asked(
        methods=cast("tuple[Method, ...]", texts(methods)), tfs=texts(tfs), n_genes=n_genes,
        truth=str(truth), truth_kind=truth_kind, prior=texts(prior), show=show,
        donor_key=donor_key, max_cells=max_cells, jacobian_cells=jacobian_cells,
        min_cells=min_cells, min_coverage=min_coverage, max_edges=max_edges,
        bootstraps=bootstraps, workers=workers, batch_tokens=batch_tokens, seed=seed,
    )  # fmt: skip
    reading = InputSettings.given(options)
    check_key_added(key_added, "uns")
    check_in_memory(adata, "adata", "genemodel network")
    bundle = None if model is None else bundle_for("network", model, device)
    result = _networks(adata, bundle, asked, reading)
    adata.uns[key_added] = for_uns(result)
    return result


def network_file(settings: NetworkSettings) -> str:
    """Write networks of the cells of a file as a folder of tables; returns what to print."""
    out = Path(settings.out)
    check_replaced_folder(out, "network", is_ours, overwrite=settings.overwrite)
    if not Path(settings.input).exists():
        raise DataError(f"input={settings.input} does not exist.")
    bundle = None
    if settings.model:
        bundle = model_for("network", (Bundle,), settings.model, device=device_of(settings.device))
    result = _networks(settings.input, bundle, settings.asked, settings.reading)
    write_result(result, out)
    return f"{result.describe()}\nTables are in {out}"


def _networks(
    data: "AnnData | str", bundle: Bundle | None, asked: Asked, reading: InputSettings
) -> NetworkResult:
    methods, left_out = _possible(asked, bundle)
    vocabulary = GeneVocabulary.builtin() if bundle is None else bundle.vocabulary
    cells = read_network_cells(
        data, vocabulary, reading, max_cells=asked.max_cells, seed=asked.seed,
        who="the built-in vocabulary" if bundle is None else "the model",
    )  # fmt: skip
    halves = _halves(cells, asked, reading)
    edges = None
    if asked.truth:
        edges = read_edges(asked.truth, cells.names, "truth", kind=asked.truth_kind)
    priors = [read_edges(path, cells.names, "prior") for path in asked.prior]
    genes = _genes(cells, asked, edges)
    truths = [] if edges is None else [Truth.of(edges, genes)]
    if edges is not None and not truths[0].n_edges:
        raise DataError(
            f"truth={asked.truth}: none of its edges is between the {genes.sources.size:,} "
            f"transcription factors and {genes.targets.size:,} targets of these cells: set tfs or "
            "n_genes, or lower min_coverage."
        )
    if priors:
        truths.append(truths[0].without(np.concatenate(priors), genes))
    weights = {method: _weights(method, cells, bundle, genes, asked) for method in methods}
    strengths = {method: strength(method, weight) for method, weight in weights.items()}
    scores = None
    if truths:
        mean_T = cells.log_means(genes.targets)
        mean_S = cells.log_means(genes.sources)
        everything = strengths | null_networks(genes, mean_S, mean_T, asked.seed)
        tables = [
            score_table(everything, each, mean_T, bootstraps=asked.bootstraps, seed=asked.seed)
            for each in truths if each.n_edges
        ]  # fmt: skip
        scores = pd.concat(tables, ignore_index=True)
    stable = _stabilities(halves, strengths, bundle, genes, asked, truths)
    if stable and scores is not None:
        scores["stability"] = scores["method"].map(stable).astype(float)
    names = unique_names(cells, genes.sources), unique_names(cells, genes.targets)
    return NetworkResult(
        {
            method: edge_table(
                np.where(genes.no_loops_ST, weight, np.nan), strengths[method], names,
                asked.max_edges,
            )
            for method, weight in weights.items()
        },
        scores,
        {
            "genemodel": genemodel.__version__,
            "model": "" if bundle is None else bundle.fingerprint,
            "asked": to_values(asked), "cells": len(cells), "species": cells.species,
            "tfs": int(genes.sources.size), "targets": int(genes.targets.size),
            "left_out": left_out, "stability": stable,
        },
    )  # fmt: skip


def strength(method: str, weight_ST: np.ndarray) -> np.ndarray:
    """Give what pairs are ordered by: the size of a weight whose sign means something else."""
    return np.abs(weight_ST) if method in SIGNED else weight_ST


def _possible(asked: Asked, bundle: Bundle | None) -> tuple[list[Method], dict[str, str]]:
    """Which methods can be had, and why others cannot; one that was named is refused."""
    wanted = asked.methods or METHODS
    left_out: dict[str, str] = {}
    for method in wanted:
        why = why_not(method, bundle) if method in OF_A_MODEL else None
        if why is not None and asked.methods:
            raise ConfigError(f"methods={list(asked.methods)}: {why}; or leave {method} out.")
        if why is not None:
            left_out[method] = why
    for why in left_out.values():
        logger.info("Left out: %s.", why)
    return [method for method in wanted if method not in left_out], left_out


def _genes(cells: NetworkCells, asked: Asked, edges: np.ndarray | None) -> Genes:
    tfs = None
    if asked.tfs:
        tfs = factors(asked.tfs, cells.names)
    elif edges is not None:
        tfs = np.unique(edges[:, 0])
    setting = "tfs" if asked.tfs else "truth"
    genes = choose_genes(
        cells, tfs, n_genes=asked.n_genes, min_cells=asked.min_cells,
        min_coverage=asked.min_coverage,
        say=lambda n: f"{setting} names {n:,} transcription factors that are known here",
    )  # fmt: skip
    if tfs is None:
        logger.info(
            "%s: no tfs and no truth are given: edges start from each of %s genes.",
            cells.where, f"{genes.sources.size:,}",
        )  # fmt: skip
    return genes


def _weights(
    method: Method, cells: NetworkCells, bundle: Bundle | None, genes: Genes, asked: Asked
) -> np.ndarray:
    """Make one network, (S, T)."""
    logger.info("%s: %s of %s cells.", cells.where, method, f"{len(cells):,}")
    if method in OF_A_MODEL:
        assert bundle is not None
        if asked.show == "network":
            cells = cells.showing(genes.together)
        match method:
            case "attention":
                return attention_network(cells, bundle, genes, asked.batch_tokens)
            case "gene_vectors":
                return vector_network(bundle, genes)
            case "perturbation":
                return perturbation_network(cells, bundle, genes, asked.batch_tokens)
        some = cells
        if len(cells) > asked.jacobian_cells:
            rng = np.random.default_rng(asked.seed)
            some = cells.take(np.sort(rng.choice(len(cells), asked.jacobian_cells, replace=False)))
        return jacobian(some, bundle, genes, asked.batch_tokens)
    together = genes.together
    values_CG = cells.values(together)
    sources = np.searchsorted(together, genes.sources)
    targets = np.searchsorted(together, genes.targets)
    if method == "pearson":
        return pearson(values_CG[:, sources], values_CG[:, targets])
    if method == "partial":
        weight_ST, shrinkage = partial(values_CG, sources, targets)
        logger.info("%s: the covariance is shrunk by %.3f.", cells.where, shrinkage)
        return weight_ST
    return grnboost(values_CG, sources, targets, seed=asked.seed, workers=asked.workers)


def _halves(
    cells: NetworkCells, asked: Asked, reading: InputSettings
) -> tuple[NetworkCells, NetworkCells] | None:
    """Divide cells by their donors; about half of the cells on each side."""
    if not asked.donor_key:
        return None
    names_C = batch_names(
        cells.obs, (asked.donor_key,), cells.where, reading.missing_labels, "donor_key"
    ).astype(str)
    donors, donor_C, n_D = np.unique(names_C, return_inverse=True, return_counts=True)
    if donors.size < 2:
        raise DataError(
            f"{cells.where}.obs[{asked.donor_key!r}] names one donor: two or more can be halved. "
            "Leave donor_key out."
        )
    order = np.random.default_rng(asked.seed).permutation(donors.size)
    # The largest first, always to the smaller side.
    order = order[np.argsort(-n_D[order], kind="stable")]
    side_D, size = np.zeros(donors.size, bool), [0, 0]
    for donor in order:
        side = int(size[1] < size[0])
        side_D[donor], size[side] = bool(side), size[side] + int(n_D[donor])
    if min(size) < _FEWEST_CELLS:
        raise DataError(
            f"{cells.where}: half of the donors of donor_key={asked.donor_key} have {min(size)} "
            f"cells, and {_FEWEST_CELLS} are needed: leave donor_key out."
        )
    first_C = ~side_D[donor_C]
    return cells.take(np.flatnonzero(first_C)), cells.take(np.flatnonzero(~first_C))


def _stabilities(
    halves: tuple[NetworkCells, NetworkCells] | None,
    strengths: dict[Method, np.ndarray],
    bundle: Bundle | None,
    genes: Genes,
    asked: Asked,
    truths: list[Truth],
) -> dict[str, float]:
    """Jaccard index of the strongest edges of both halves of the donors.

    As many as there are known edges, of the pairs that count; without a truth as many as there are
    targets.
    """
    if halves is None:
        return {}
    counts_ST = truths[0].counts_ST if truths else genes.no_loops_ST
    k = truths[0].n_edges if truths else genes.targets.size
    found: dict[str, float] = {}
    for method in strengths:
        if method == "gene_vectors":  # of no cells, so the same whatever the donors
            continue
        one, other = (
            strength(method, _weights(method, half, bundle, genes, asked)) for half in halves
        )
        found[method] = stability(one, other, counts_ST, k)
    return found
