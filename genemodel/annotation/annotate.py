"""Cell types of a labelled reference onto other cells, with a confidence that means something.

Axes: C cells of the query, D width, G genes, H held-out cells of the reference, K neighbours, R
cells of the reference, L labels.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast

import numpy as np
import pandas as pd

import genemodel
from genemodel.annotation.label_head import label_counts
from genemodel.annotation.labels import label_names, probabilities_of
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.cells.annotations import without_counts
from genemodel.cells.copies import may_copy
from genemodel.cells.input_settings import (
    OF_ONE_FILE,
    InputOptions,
    InputSettings,
    for_reference,
    reads_cells,
)
from genemodel.cells.whole_file import read_anndata
from genemodel.embedding.contamination import note_contamination
from genemodel.embedding.embed import writable_h5ad, write_whole
from genemodel.errors import ConfigError, DataError, GenemodelError
from genemodel.expression.neighbours import nearest, without
from genemodel.genes.species import species_name
from genemodel.genes.vocabulary import GeneVocabulary
from genemodel.inference.cell_vectors import embedding_of
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.gene_counts import GeneCounts, read_counts
from genemodel.inference.obs_keys import (
    batch_names,
    check_in_memory,
    check_key_added,
    check_label_is_no_batch,
    column,
    keys_of,
    label_codes,
)
from genemodel.integration.model import IntegratedModel
from genemodel.loading import EMBED
from genemodel.settings import ModelText, PathText, SpeciesText, check_seed, either_seed, renamed

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "genemodel_label"
UNKNOWN = "unknown"
UNKNOWN_BELOW = 0.5
# Share of known cells that stay known: 1 in 20 is what leaving types out costs at most.
KEEP = 0.95
# Genes below which cells of two files have next to nothing in common but noise.
MIN_GENES = 50
CALIBRATION_CELLS = 5000
MIN_REFERENCE = 50
BLOCK = 2048
FOLDS = 5
CROSS_VALIDATED_CELLS = 20_000
# Strength of the linear transfer: inverse penalty and length of the vectors, of little weight.
INVERSE_PENALTY, LENGTH, MOST_STEPS = 0.1, 3.0, 500

type Transfer = Literal["knn", "linear"]
type Way = Literal["head", "knn", "linear"]
TRANSFERS: tuple[Way, ...] = ("head", "knn", "linear")


@renamed(query="adata")
@either_seed
@may_copy
@reads_cells
def annotate(
    adata: "AnnData",
    reference: "AnnData | None" = None,
    model: Bundle | IntegratedModel | str | Path | None = None,
    *,
    label_key: str = "",
    batch_key: str | Sequence[str] = (),
    key_added: str = KEY,
    transfer: Way = "head",
    k: int = 15,
    unknown: float = UNKNOWN_BELOW,
    far_quantile: float | None = KEEP,
    reference_layer: str | None = None,
    reference_species: str | int | None = None,
    reference_column: str | None = None,
    reference_genome: str | None = None,
    seed: int = 0,
    **options: Unpack[InputOptions],
) -> None:
    """Label cells by the labelled cells of a reference, or by a model that tells labels apart.

    Parameters
    ----------
    adata
        Raw counts. Written are ``obs[key_added]`` (categorical, with ``unknown``),
        ``obs[key_added + "_confidence"]`` (float32) and ``uns[key_added]``; with
        ``transfer="head"`` also ``obs[key_added + "_novelty"]`` (float32) and
        ``obsm[key_added + "_probability"]``, whose columns ``uns[key_added]["labels"]`` names.
    reference
        Raw counts with labels; it may be of another species. None for a model that was fine-tuned
        to classify (``genemodel finetune task=classify``): its own calibrated probabilities are
        taken; ``transfer``, ``batch_key``, ``k`` and ``far_quantile`` say nothing then.
    model
        From :func:`genemodel.load` or :func:`genemodel.integrate`, or the path of its folder. The
        head needs none; given one, neighbours in its embedding vote where that helps. "knn" and
        "linear" read nothing but its embedding.
    label_key
        obs column of the reference; cells without a label are left out.
    batch_key
        obs column or columns of the reference that tell its batches or donors apart. With two or
        more of them the head chooses and calibrates on batches held out, which is what a query is;
        without, on its own cells, with molecules lost gene by gene as in another chemistry.
    key_added
        Where the labels go.
    transfer
        "head": regularised logistic regression on log-normalised variable genes, see Notes. "knn":
        the nearest reference cells in the model's embedding vote. "linear": logistic regression on
        that embedding.
    k
        Neighbours that vote, the nearer the more, and whose distance says what is far.
    unknown
        A label of lower confidence becomes ``unknown``; 0 for never.
    far_quantile
        This share of the reference's own cells stays known at least, when they are asked for as a
        query is; a cell that is farther from every type than the limit becomes ``unknown``. None
        for never.
    reference_layer, reference_species, reference_column, reference_genome
        As ``layer``, ``species``, ``column`` and ``genome``, of the reference. Genes of different
        species are joined by the orthologs of the built-in vocabulary.
    seed
        Of samples, folds and decompositions.
    **options
        How the cells are read; the last three of these are for both sides.

    Raises
    ------
    ConfigError
        A setting out of range.
    DataError
        No raw counts, no such column, fewer than two labels, too few labelled cells, or hardly any
        gene in common.

    Notes
    -----
    The head takes 2,000 genes that vary within the reference's batches and that both sides have,
    brings every cell's log counts to one length, and fits multinomial logistic regression, every
    label weighing the same, to their 200 leading components. On held-out batches it chooses the
    penalty, whether neighbours vote too, and the temperature that makes probabilities true. What
    all recognised populations of the query differ by from the reference's (a condition, a
    laboratory) is taken off where they agree on it. **Confidence** is the probability of the label,
    given that the cell is of one of the reference's types. **Novelty** says whether it is: the
    head's doubt, distances to the types and the cell's company become one number, weighed and
    limited so that it tells *types left out of the reference* from cells of the others. A quarter
    of the query at least is taken to be of known types, so look at ``share_far`` where
    that may not be so. Labels therefore depend on the query as a whole: annotate it at once.

    ``uns[key_added]["training"]`` holds how many of the query's cells the model has been trained on
    (:func:`genemodel.contamination`).

    "knn" and "linear" calibrate on the reference's own cells, by isotonic regression, and are
    over-confident about any query that differs from them.
    """
    reading = InputSettings.given(options)
    there = reading.but(
        layer=reference_layer, species=reference_species, column=reference_column,
        genome=reference_genome, transpose=False,
    )  # fmt: skip
    missing_labels = reading.missing_labels
    query = adata  # beside the reference
    check_in_memory(query, "query", "genemodel annotate")
    if reference is not None:
        check_in_memory(reference, "reference", "genemodel annotate")
    _check(transfer, k, unknown, far_quantile, key_added, seed)
    if model is not None:
        model = model_for("annotate", EMBED, model)
    if reference is None:
        if model is None:
            raise ConfigError(
                "reference is missing: give labelled cells, or a model that tells labels apart "
                "itself (genemodel finetune task=classify)."
            )
        classify(query, model, key_added, unknown, reading)
        return
    if model is None and transfer != "head":
        raise ConfigError(
            f"transfer={transfer} reads the vectors of a model, but model is missing: give what "
            "genemodel.load or integrate returns, or take transfer=head."
        )
    if not label_key:
        raise ConfigError("label_key is missing: name the obs column of the reference's labels.")
    label_R, labels = label_codes(
        reference.obs, label_key, where="reference", missing_labels=missing_labels
    )
    batch_R = None
    if batch_key:
        check_label_is_no_batch(keys_of(batch_key), label_key)
        batch_R = batch_names(
            reference.obs, keys_of(batch_key), where="reference", missing_labels=missing_labels
        )
    if query.n_obs == 0:
        raise DataError("query has no cells.")
    vectors = None
    if model is not None:
        vectors = (
            _vectors(reference, model, there, "reference"),
            _vectors(query, model, reading, "query"),
        )
    if transfer == "head":
        pair = _counts(query, reference, reading, there)
        usable = np.flatnonzero((label_R >= 0) & (pair.reference_RG.getnnz(1) > 0))
    else:
        reference_RD, query_CD = cast(tuple[np.ndarray, np.ndarray], vectors)
        usable = np.flatnonzero((label_R >= 0) & np.isfinite(reference_RD).all(1))
    least = max(MIN_REFERENCE, k + 1)
    if len(usable) < least:
        raise DataError(
            f"reference: {len(usable)} cells have a label in obs[{label_key!r}] and genes that "
            f"{'the query has too' if transfer == 'head' else 'the model knows'}; {least} are "
            "needed."
        )
    present, label_U = np.unique(label_R[usable], return_inverse=True)
    labels = [labels[code] for code in present]
    if len(labels) < 2:
        raise DataError(
            f"reference: only {labels[0]!r} is left in obs[{label_key!r}] among cells with counts "
            "in the genes used; two labels at least are needed."
        )
    about: dict[str, Any] = {}
    if transfer == "head":
        answer = label_counts(
            pair.reference_RG[usable],
            label_U,
            pair.query_CG,
            batch_R=None if batch_R is None else batch_R[usable],
            vectors=None if vectors is None else (vectors[0][usable], vectors[1]),
            k=k,
            keep=far_quantile,
            far=pair.other_species,
            seed=seed,
        )
        found = Transferred(
            np.where(answer.seen_C, answer.probability_CL.argmax(1), -1),
            np.where(answer.seen_C, answer.probability_CL.max(1), 0.0),
            answer.far_C,
            np.inf if far_quantile is None else answer.limit,
            answer.about.get("held_out_accuracy", float("nan")),
        )
        about = answer.about
        query.obs[f"{key_added}_novelty"] = answer.novelty_C.astype(np.float32)
        query.obsm[f"{key_added}_probability"] = answer.probability_CL.astype(np.float32)
    else:
        found = transfer_labels(
            reference_RD[usable], label_U, query_CD,
            transfer=transfer, k=k, far_quantile=far_quantile, seed=seed,
        )  # fmt: skip
    unknown_C = found.unknown_C(unknown)
    names_C = found.names(labels, unknown)
    categories = list(dict.fromkeys([*labels, UNKNOWN]))
    query.obs[key_added] = pd.Categorical(names_C, categories=categories)
    query.obs[f"{key_added}_confidence"] = found.confidence_C.astype(np.float32)
    query.uns[key_added] = {
        "genemodel": genemodel.__version__,
        "label_key": label_key,
        "labels": labels,
        "reference_cells": len(usable),
        "transfer": transfer,
        "k": k,
        "unknown_below": float(unknown),
        "far_beyond": found.far_beyond if np.isfinite(found.far_beyond) else "never",
        "held_out_accuracy": found.held_out_accuracy,
        "share_unknown": float(unknown_C.mean()),
        "share_doubtful": float((found.confidence_C < unknown).mean()),
        "share_far": float(found.far_C.mean()),
        "seed": seed,
        **about,
    }
    if model is not None:
        note_contamination(query, model, key_added, reading)
    if found.far_C.mean() > 0.5:
        logger.warning(
            "%.0f %% of the query lies farther from the reference than its own cells from each "
            "other and is called unknown: check species, layer and tissue. far_quantile=None "
            "labels them all the same.",
            100 * found.far_C.mean(),
        )


@dataclass(frozen=True)
class _Pair:
    """Counts of both sides in the genes that both have, and whether their species differ."""

    reference_RG: Any
    query_CG: Any
    other_species: bool


def _counts(
    query: "AnnData", reference: "AnnData", reading: InputSettings, there: InputSettings
) -> _Pair:
    """Read both sides and keep the genes that both have, by orthologs where species differ."""
    of_query, of_reference = _species_of(query, reading), _species_of(reference, there)
    known = bool(of_query) and bool(of_reference)

    def both(vocabulary: GeneVocabulary | None) -> tuple[GeneCounts, GeneCounts, list[str]]:
        pair = [
            _named(
                what,
                partial(
                    read_counts,
                    adata,
                    bundle=None,
                    vocabulary=vocabulary,
                    reading=how if vocabulary else how.but(species=None),
                ),
            )  # fmt: skip
            for what, adata, how in (
                ("query", query, reading),
                ("reference", reference, there),
            )
        ]
        seen = [{one.genes[column] for column in one.seen()} for one in pair]
        shared = [gene for gene in pair[1].genes if gene in seen[0] and gene in seen[1]]
        return pair[0], pair[1], shared

    vocabulary = GeneVocabulary.builtin() if known and len(of_query | of_reference) > 1 else None
    cells, labelled, genes = both(vocabulary)
    if vocabulary is None and known and len(genes) < MIN_GENES:
        # One species, named in two ways: symbols on one side, ids on the other.
        cells, labelled, genes = both(GeneVocabulary.builtin())
    if len(genes) < MIN_GENES:
        raise DataError(
            f"query and reference have counts in {len(genes)} genes of the same name "
            f"({', '.join(cells.genes[:3])} against {', '.join(labelled.genes[:3])}); "
            f"{MIN_GENES} are needed. Name the species of both (species=, reference_species=, or "
            "an obs column species), so that ids, symbols and orthologs are matched."
        )
    query_CG, reference_RG = (
        one.counts_CG[:, pd.Index(one.genes).get_indexer(pd.Index(genes))]
        .tocsr()
        .astype(np.float32)
        for one in (cells, labelled)
    )
    return _Pair(reference_RG, query_CG, known and not of_query <= of_reference)


def _species_of(adata: "AnnData", reading: InputSettings) -> set[str]:
    """Species of the cells as far as they are said: by the setting, or the obs column species."""
    species = reading.species
    if species is not None and not species.startswith("obs:"):
        return {species_name(species)}
    key = "species" if species is None else species.removeprefix("obs:")
    if key not in adata.obs:
        return set()
    names = column(adata.obs, key, "species").dropna()
    return {species_name(str(name)) for name in pd.unique(names)}


def _named[T](what: str, read: Callable[[], T]) -> T:
    """Say of which of two objects an error is."""
    try:
        return read()
    except GenemodelError as error:
        said = for_reference(str(error)) if what == "reference" else str(error)
        raise type(error)(f"{what}: {said}") from error


def classify(
    query: "AnnData",
    model: Bundle | IntegratedModel,
    key_added: str,
    unknown: float,
    reading: InputSettings,
) -> None:
    """Label cells by what the model itself has learnt to tell apart."""
    if not isinstance(model, Bundle):
        raise ConfigError(
            f"model is a {type(model).__name__}, which tells no labels apart by itself: give a "
            "labelled reference, or a model made by `genemodel finetune task=classify`."
        )
    cells = VocabularyCells(query, model, reading)
    probability_CL = probabilities_of(cells.chunks(), model, len(cells))
    write_labels(query, probability_CL, model, key_added=key_added, unknown=unknown)
    note_contamination(query, model, key_added, reading)


def write_labels(
    adata: "AnnData",
    probability_CL: np.ndarray,
    model: Bundle,
    *,
    key_added: str = KEY,
    unknown: float = UNKNOWN_BELOW,
) -> None:
    """Write labels, confidence and probabilities of a model that tells labels apart."""
    labels = label_names(model)
    seen_C = np.isfinite(probability_CL).all(1)
    winner_C, confidence_C = np.full(len(seen_C), -1), np.zeros(len(seen_C))
    winner_C[seen_C] = probability_CL[seen_C].argmax(1)
    confidence_C[seen_C] = probability_CL[seen_C].max(1)
    unknown_C = (confidence_C < unknown) | ~seen_C
    names_C = np.array([*labels, UNKNOWN], dtype=object)[np.where(unknown_C, -1, winner_C)]
    categories = list(dict.fromkeys([*labels, UNKNOWN]))
    adata.obs[key_added] = pd.Categorical(names_C, categories=categories)
    adata.obs[f"{key_added}_confidence"] = confidence_C.astype(np.float32)
    adata.obsm[f"{key_added}_probability"] = probability_CL
    adata.uns[key_added] = {
        "genemodel": genemodel.__version__,
        "model": model.fingerprint,
        "labels": labels,
        "unknown_below": float(unknown),
        "share_unknown": float(unknown_C.mean()),
        **{f"held_out_{k}": v for k, v in model.provenance.get("labels", {}).items()},
    }


def _check(
    transfer: str,
    k: int,
    unknown: float,
    far_quantile: float | None,
    key_added: str,
    seed: int,
) -> None:
    if transfer not in TRANSFERS:
        raise ConfigError(f"transfer={transfer!r}: there are {', '.join(TRANSFERS)}.")
    if k < 1:
        raise ConfigError(f"k={k}: at least one neighbour must vote.")
    if not 0 <= unknown <= 1:
        raise ConfigError(f"unknown={unknown}: a confidence lies between 0 and 1.")
    if far_quantile is not None and not 0 < far_quantile <= 1:
        raise ConfigError(f"far_quantile={far_quantile}: must be above 0 and at most 1, or None.")
    check_key_added(key_added, "obs")
    check_seed(seed)


def _vectors(
    adata: "AnnData",
    model: Bundle | IntegratedModel,
    reading: InputSettings,
    what: str,
) -> np.ndarray:
    return _named(what, lambda: _embedded(adata, model, reading))


def _embedded(
    adata: "AnnData", model: Bundle | IntegratedModel, reading: InputSettings
) -> np.ndarray:
    if isinstance(model, IntegratedModel):
        return model.encode(adata, **reading.options())
    cells = VocabularyCells(adata, model, reading)
    return embedding_of(cells, model)


def _unit(rows_CD: np.ndarray) -> np.ndarray:
    return rows_CD / np.maximum(np.linalg.norm(rows_CD, axis=1, keepdims=True), 1e-8)


@dataclass(frozen=True)
class Transferred:
    """Labels of the query's cells before any is called unknown.

    Attributes
    ----------
    winner_C
        Code of the best label, -1 for a cell without a vector.
    confidence_C
        Probability that it is right; 0 without a vector.
    far_C
        Whether the cell is farther from the reference than ``far_beyond``.
    far_beyond
        Mean distance of the neighbours; infinite where nothing is too far.
    held_out_accuracy
        Share of held-out reference cells that got their own label.
    """

    winner_C: np.ndarray
    confidence_C: np.ndarray
    far_C: np.ndarray
    far_beyond: float
    held_out_accuracy: float

    def unknown_C(self, below: float) -> np.ndarray:
        """Tell the cells that are far, doubtful or without a vector."""
        return (self.confidence_C < below) | self.far_C | (self.winner_C < 0)

    def best(self, labels: list[str]) -> np.ndarray:
        """Name the best label of every cell, ``unknown`` only without a vector."""
        return np.array([*labels, UNKNOWN], dtype=object)[self.winner_C]

    def names(self, labels: list[str], below: float) -> np.ndarray:
        """Name the labels, ``unknown`` where the confidence is below this or the cell is far."""
        names_C = self.best(labels)
        names_C[self.unknown_C(below)] = UNKNOWN
        return names_C


def transfer_labels(
    reference_RD: np.ndarray,
    label_R: np.ndarray,
    query_CD: np.ndarray,
    *,
    transfer: Transfer = "knn",
    k: int = 15,
    far_quantile: float | None = 0.99,
    seed: int = 0,
) -> Transferred:
    """Label vectors by labelled vectors of the same embedding; see :func:`annotate`.

    Every row of the reference has a label and a finite vector; the query may lack vectors (NaN).
    """
    finite_C = np.isfinite(query_CD).all(1)
    centre_D = reference_RD.mean(0)
    unit_RD, unit_CD = _unit(reference_RD - centre_D), _unit(query_CD[finite_C] - centre_D)
    neighbours = _Transfer(unit_RD, label_R, int(label_R.max()) + 1, k)
    held_H, winner_H, share_H, distance_H = neighbours.held_out(seed)
    winner_U, share_U, distance_U = neighbours.vote(unit_CD)
    if transfer == "linear":
        held_H, winner_H, share_H = _cross_validated(unit_RD, label_R, seed)
        winner_U, share_U = _linear(unit_RD, label_R, unit_CD)
    calibration = _Calibration.of(share_H, winner_H == label_R[held_H])
    n = len(query_CD)
    winner_C, confidence_C = np.full(n, -1), np.zeros(n)
    winner_C[finite_C], confidence_C[finite_C] = winner_U, calibration.confidence(share_U)
    limit = np.inf if far_quantile is None else float(np.quantile(distance_H, far_quantile))
    far_C = np.zeros(n, bool)
    far_C[finite_C] = distance_U > limit
    return Transferred(winner_C, confidence_C, far_C, limit, calibration.accuracy)


@dataclass(frozen=True)
class _Calibration:
    """How the reference fares when cells of it are labelled by the others."""

    regression: Any
    accuracy: float
    n_held_out: int

    @classmethod
    def of(cls, share_H: np.ndarray, right_H: np.ndarray) -> "_Calibration":
        from sklearn.isotonic import IsotonicRegression

        regression = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        regression.fit(share_H, right_H.astype(float))
        return cls(regression, float(right_H.mean()), len(right_H))

    def confidence(self, share_C: np.ndarray) -> np.ndarray:
        """Probability that a label with this share of the votes is right."""
        if not len(share_C):
            return np.zeros(0)
        # No finite number of right answers proves that the next one is right.
        most = 1 - 1 / (self.n_held_out + 2)
        return np.minimum(self.regression.predict(share_C), most)


def _linear(
    unit_RD: np.ndarray, label_R: np.ndarray, unit_CD: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Most probable label of each cell by logistic regression, and its probability."""
    from sklearn.linear_model import LogisticRegression

    if not len(unit_CD) or len(np.unique(label_R)) == 1:
        return np.full(len(unit_CD), label_R[0]), np.ones(len(unit_CD))
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=MOST_STEPS)
    model.fit(LENGTH * unit_RD, label_R)
    probability_CL = model.predict_proba(LENGTH * unit_CD)
    return model.classes_[probability_CL.argmax(1)], probability_CL.max(1)


def _cross_validated(
    unit_RD: np.ndarray, label_R: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of the reference, and the label and probability that a model without them gives."""
    rows = np.random.default_rng(seed).permutation(len(unit_RD))[:CROSS_VALIDATED_CELLS]
    winner_H, share_H = np.zeros(len(rows), np.int64), np.zeros(len(rows))
    for fold in range(FOLDS):
        held = np.arange(len(rows)) % FOLDS == fold
        learnt = rows[~held]
        winner_H[held], share_H[held] = _linear(
            unit_RD[learnt], label_R[learnt], unit_RD[rows[held]]
        )
    return rows, winner_H, share_H


class _Transfer:
    """Weighted votes of the nearest reference cells on the unit sphere."""

    def __init__(self, unit_RD: np.ndarray, label_R: np.ndarray, n_labels: int, k: int) -> None:
        self.unit_RD, self.label_R, self.n_labels, self.k = unit_RD, label_R, n_labels, k

    def vote(
        self, unit_CD: np.ndarray, itself_C: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Winner, its share of the votes, and mean distance of the ``k`` nearest, of each cell.

        ``itself_C`` are rows of the reference that may not vote on themselves.
        """
        found = nearest(unit_CD, self.unit_RD, self.k + (itself_C is not None))
        near_CK, distance_CK = found if itself_C is None else without(found, itself_C)
        n, distance_CK = len(near_CK), distance_CK.astype(np.float64)
        # The scale of a cell's own surroundings: near and far mean the same everywhere.
        width_C1 = np.maximum(distance_CK.mean(1, keepdims=True), 1e-8)
        weight_CK = np.exp(-distance_CK / width_C1)
        winner_C, share_C = np.zeros(n, np.int64), np.zeros(n)
        for start in range(0, n, BLOCK):
            rows = slice(start, start + BLOCK)
            votes_CL = np.zeros((len(near_CK[rows]), self.n_labels))
            at_C1 = np.arange(len(votes_CL))[:, None]
            np.add.at(votes_CL, (at_C1, self.label_R[near_CK[rows]]), weight_CK[rows])
            winner_C[rows] = votes_CL.argmax(1)
            share_C[rows] = votes_CL.max(1) / votes_CL.sum(1)
        return winner_C, share_C, distance_CK.mean(1)

    def held_out(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the reference, and how the other ones vote on them."""
        rng = np.random.default_rng(seed)
        held_H = np.sort(rng.permutation(len(self.unit_RD))[:CALIBRATION_CELLS])
        return held_H, *self.vote(self.unit_RD[held_H], held_H)


@renamed(query="input")
@dataclass(frozen=True)
class AnnotateSettings(InputSettings):
    """Settings of ``genemodel annotate``, see ``configs/annotate.yaml``."""

    input: PathText
    output: PathText
    reference: PathText = ""
    model: ModelText = ""
    label_key: str = ""
    batch_key: tuple[str, ...] = ()
    key_added: str = KEY
    transfer: Literal["head", "knn", "linear"] = "head"
    k: int = 15
    unknown: float = UNKNOWN_BELOW
    far_quantile: float | None = KEEP
    reference_layer: str | None = None
    reference_species: SpeciesText | None = None
    reference_column: str | None = None
    reference_genome: str | None = None
    reference_transpose: bool = False
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False


def annotate_file(settings: AnnotateSettings) -> Path:
    """Annotate a file with the labels of another one.

    Returns
    -------
    The output path.
    """
    output = writable_h5ad(
        settings.output,
        overwrite=settings.overwrite,
        inputs=[path for path in (settings.input, settings.reference) if path],
    )
    check_key_added(settings.key_added, "obs")
    check_seed(settings.seed)
    cells, readings = {}, {}
    if settings.reference and not settings.label_key:
        raise ConfigError("label_key is missing: name the obs column of the reference's labels.")
    for name in ("input", "reference") if settings.reference else ("input",):
        path = Path(getattr(settings, name))
        if not path.exists():
            raise DataError(f"{name}={path} is no file: name one of raw counts.")
        how = settings.reading
        if name == "reference":
            own = {key: getattr(settings, f"reference_{key}") for key in OF_ONE_FILE}
            how = how.but(**own)
        read = partial(read_anndata, path, how)
        cells[name], readings[name] = _named(name, read)
    there = readings.get("reference", InputSettings())
    annotate(
        cells["input"],
        cells.get("reference"),
        model_for("annotate", EMBED, settings.model, device=settings.device)
        if settings.model
        else None,
        label_key=settings.label_key,
        batch_key=settings.batch_key,
        key_added=settings.key_added,
        transfer=settings.transfer,
        k=settings.k,
        unknown=settings.unknown,
        far_quantile=settings.far_quantile,
        reference_layer=there.layer,
        reference_species=there.species,
        reference_column=there.column,
        reference_genome=there.genome,
        seed=settings.seed,
        **readings["input"].options(),
    )
    labelled = without_counts(cells["input"])
    write_whole(labelled, output)
    logger.info(
        "%s: %d cells labelled, %.1f %% unknown.",
        output, labelled.n_obs, 100 * labelled.uns[settings.key_added]["share_unknown"],
    )  # fmt: skip
    return output
