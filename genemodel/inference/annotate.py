"""Cell types of a labelled reference onto other cells, with a confidence that means something.

Axes: C cells of the query, D width, K neighbours, R cells of the reference, L labels.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.cells.matrices import refuse_damage
from genemodel.errors import ConfigError, DataError
from genemodel.inference.counts import VocabularyCells
from genemodel.inference.embed import embed_chunks
from genemodel.inference.integrated_model import ABOUT, IntegratedModel
from genemodel.inference.obs_keys import label_codes

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "genemodel_label"
UNKNOWN = "unknown"
CALIBRATION_CELLS = 5000
MIN_REFERENCE = 50
BLOCK = 2048


def annotate(
    query: "AnnData",
    reference: "AnnData",
    model: Bundle | IntegratedModel,
    *,
    label_key: str,
    key_added: str = KEY,
    k: int = 15,
    unknown: float = 0.5,
    far_quantile: float | None = 0.99,
    layer: str | None = None,
    reference_layer: str | None = None,
    species: str | None = None,
    reference_species: str | None = None,
    seed: int = 0,
) -> None:
    """Label cells by their nearest labelled cells in a model's embedding.

    Parameters
    ----------
    query
        Raw counts; ``obs[key_added]`` (categorical), ``obs[key_added + "_confidence"]`` (float32)
        and ``uns[key_added]`` are written.
    reference
        Raw counts with labels. It may be of another species that the model knows.
    model
        From :func:`genemodel.load` or :func:`genemodel.integrate`.
    label_key
        obs column of the reference; cells without a label are left out.
    key_added
        Where the labels go.
    k
        Neighbours that vote, the nearer the more.
    unknown
        A label of lower confidence becomes ``unknown``; 0 for never.
    far_quantile
        A cell farther from the reference than this share of the reference's own cells are from
        each other becomes ``unknown``; None for never, as when another species or technique is
        far as a whole.
    layer, reference_layer
        Where the raw counts are; default ``X``.
    species, reference_species
        One species for all cells, or ``"obs:COLUMN"``; default the obs column ``species``.
    seed
        Which reference cells are held out for calibration, where there are more than 5,000.

    Raises
    ------
    ConfigError
        A setting out of range.
    DataError
        No raw counts, no such column, fewer than two labels, or too few labelled cells.

    Notes
    -----
    Confidence is the probability that the label is right among cells like those of the reference:
    each of up to 5,000 reference cells is labelled by the others as if it were of the query, and an
    isotonic regression maps the share of votes to how often that was right. A query that differs
    from the reference is labelled less well than that; ``uns[key_added]`` holds the numbers.
    """
    _check(k, unknown, far_quantile, key_added)
    label_R, labels = label_codes(reference.obs, label_key, where="reference")
    if query.n_obs == 0:
        raise DataError("query has no cells.")
    reference_RD = _vectors(reference, model, reference_layer, reference_species)
    usable = np.flatnonzero((label_R >= 0) & np.isfinite(reference_RD).all(1))
    reference_RD, label_R = reference_RD[usable], label_R[usable]
    if len(usable) < max(MIN_REFERENCE, k + 1):
        raise DataError(
            f"reference: {len(usable)} cells have a label in obs[{label_key!r}] and genes that the "
            f"model knows; {max(MIN_REFERENCE, k + 1)} are needed."
        )
    query_CD = _vectors(query, model, layer, species)
    finite_C = np.isfinite(query_CD).all(1)
    centre_D = reference_RD.mean(0)
    transfer = _Transfer(_unit(reference_RD - centre_D), label_R, len(labels), k)
    calibration = transfer.calibrate(seed)
    winner_C = np.zeros(query.n_obs, np.int64)
    share_C = np.zeros(query.n_obs)
    distance_C = np.full(query.n_obs, np.inf)
    winner_C[finite_C], share_C[finite_C], distance_C[finite_C] = transfer.vote(
        _unit(query_CD[finite_C] - centre_D)
    )
    confidence_C = calibration.confidence(share_C)
    confidence_C[~finite_C] = 0.0
    limit = np.inf
    if far_quantile is not None:
        limit = float(np.quantile(calibration.distance_R, far_quantile))
    doubtful_C = confidence_C < unknown
    far_C = (distance_C > limit) & finite_C
    names_C = np.array(labels, dtype=object)[winner_C]
    names_C[doubtful_C | far_C | ~finite_C] = UNKNOWN
    categories = list(dict.fromkeys([*labels, UNKNOWN]))
    query.obs[key_added] = pd.Categorical(names_C, categories=categories)
    query.obs[f"{key_added}_confidence"] = confidence_C.astype(np.float32)
    query.uns[key_added] = {
        "genemodel": genemodel.__version__,
        "label_key": label_key,
        "labels": labels,
        "reference_cells": len(usable),
        "k": k,
        "unknown_below": float(unknown),
        "far_beyond": limit if np.isfinite(limit) else "never",
        "held_out_accuracy": calibration.accuracy,
        "share_unknown": float((doubtful_C | far_C | ~finite_C).mean()),
        "share_doubtful": float(doubtful_C.mean()),
        "share_far": float(far_C.mean()),
        "seed": seed,
    }
    if far_C.mean() > 0.5:
        logger.warning(
            "%.0f %% of the query lies farther from the reference than its own cells from each "
            "other and is called unknown: check species, layer and tissue. far_quantile=None "
            "labels them all the same.",
            100 * far_C.mean(),
        )


def _check(k: int, unknown: float, far_quantile: float | None, key_added: str) -> None:
    if k < 1:
        raise ConfigError(f"k={k}: at least one neighbour must vote.")
    if not 0 <= unknown <= 1:
        raise ConfigError(f"unknown={unknown}: a confidence lies between 0 and 1.")
    if far_quantile is not None and not 0 < far_quantile <= 1:
        raise ConfigError(f"far_quantile={far_quantile}: must be above 0 and at most 1, or None.")
    if not key_added:
        raise ConfigError("key_added is empty: name the obs column to write.")


def _vectors(
    adata: "AnnData", model: Bundle | IntegratedModel, layer: str | None, species: str | None
) -> np.ndarray:
    if isinstance(model, IntegratedModel):
        return model.encode(adata, layer=layer, species=species)
    if not isinstance(model, Bundle):
        raise ConfigError(
            f"model is a {type(model).__name__}: give what genemodel.load or genemodel.integrate "
            "returns."
        )
    cells = VocabularyCells(adata, model, layer=layer, species=species)
    return np.concatenate([part for _, part in embed_chunks(cells, model)])


def _unit(rows_CD: np.ndarray) -> np.ndarray:
    return rows_CD / np.maximum(np.linalg.norm(rows_CD, axis=1, keepdims=True), 1e-8)


@dataclass(frozen=True)
class _Calibration:
    """How the reference fares when each of its cells is labelled by the others."""

    regression: Any
    accuracy: float
    distance_R: np.ndarray

    def confidence(self, share_C: np.ndarray) -> np.ndarray:
        """Probability that a label with this share of the votes is right."""
        # No finite number of right answers proves that the next one is right.
        most = 1 - 1 / (len(self.distance_R) + 2)
        return np.minimum(self.regression.predict(share_C), most)


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
        winners, shares, distances = [], [], []
        for start in range(0, len(unit_CD), BLOCK):
            block = slice(start, start + BLOCK)
            square_CR = np.maximum(2 - 2 * unit_CD[block] @ self.unit_RD.T, 0)
            n = len(square_CR)
            if itself_C is not None:
                square_CR[np.arange(n), itself_C[block]] = np.inf
            near_CK = np.argpartition(square_CR, self.k - 1, axis=1)[:, : self.k]
            distance_CK = np.sqrt(np.take_along_axis(square_CR, near_CK, 1))
            # The scale of a cell's own surroundings: near and far mean the same everywhere.
            width_C1 = np.maximum(distance_CK.mean(1, keepdims=True), 1e-8)
            weight_CK = np.exp(-distance_CK / width_C1)
            votes_CL = np.zeros((n, self.n_labels))
            np.add.at(votes_CL, (np.arange(n)[:, None], self.label_R[near_CK]), weight_CK)
            winners.append(votes_CL.argmax(1))
            shares.append(votes_CL.max(1) / votes_CL.sum(1))
            distances.append(distance_CK.mean(1))
        if not winners:
            return np.zeros(0, np.int64), np.zeros(0), np.zeros(0)
        return np.concatenate(winners), np.concatenate(shares), np.concatenate(distances)

    def calibrate(self, seed: int) -> _Calibration:
        from sklearn.isotonic import IsotonicRegression

        rng = np.random.default_rng(seed)
        held = np.sort(rng.permutation(len(self.unit_RD))[:CALIBRATION_CELLS])
        winner_R, share_R, distance_R = self.vote(self.unit_RD[held], held)
        right_R = (winner_R == self.label_R[held]).astype(float)
        regression = IsotonicRegression(y_min=0.0, y_max=1.0, out_of_bounds="clip")
        regression.fit(share_R, right_R)
        return _Calibration(regression, float(right_R.mean()), distance_R)


@dataclass(frozen=True)
class AnnotateSettings:
    """Annotate a file.

    Attributes
    ----------
    model
        Bundle directory, or what finetune wrote to <out>/model.
    query
        h5ad with raw counts.
    reference
        h5ad with raw counts and labels.
    label_key
        obs column of the reference.
    output
        h5ad to write: obs with labels and confidence, without counts.
    key_added
        obs column of the labels.
    k
        Neighbours that vote.
    unknown
        Labels of lower confidence become unknown.
    far_quantile
        Cells farther than this share of the reference's own become unknown; none for never.
    layer, reference_layer
        Where the raw counts are; empty for X.
    species, reference_species
        One species for all cells or obs:COLUMN; empty for the obs column species.
    device
        auto, cpu, cuda, cuda:1 …
    seed
        Which reference cells are held out for calibration.
    overwrite
        Replace an existing output.
    """

    model: str
    query: str
    reference: str
    label_key: str
    output: str
    key_added: str = KEY
    k: int = 15
    unknown: float = 0.5
    far_quantile: float | None = 0.99
    layer: str = ""
    reference_layer: str = ""
    species: str = ""
    reference_species: str = ""
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False


def annotate_file(settings: AnnotateSettings) -> Path:
    """Annotate a file with the labels of another one.

    Returns
    -------
    The output path.
    """
    import anndata as ad

    output = Path(settings.output)
    if output.suffix != ".h5ad":
        raise ConfigError(f"output={output} does not end in .h5ad: it is written as one.")
    if output.exists() and not settings.overwrite:
        raise ConfigError(f"output={output} exists: set overwrite=true, or another name.")
    if not output.absolute().parent.is_dir():
        raise ConfigError(f"output={output}: the folder {output.parent} does not exist.")
    cells = {}
    for name in ("query", "reference"):
        path = Path(getattr(settings, name))
        if not path.is_file():
            raise DataError(f"{name}={path} is no file: name an h5ad file with raw counts.")
        with refuse_damage(str(path)):
            cells[name] = ad.read_h5ad(path)
    model: Bundle | IntegratedModel
    if (Path(settings.model) / ABOUT).is_file():
        model = IntegratedModel.load(settings.model, device=settings.device)
    else:
        model = Bundle.load(settings.model, device=settings.device)
    annotate(
        cells["query"],
        cells["reference"],
        model,
        label_key=settings.label_key,
        key_added=settings.key_added,
        k=settings.k,
        unknown=settings.unknown,
        far_quantile=settings.far_quantile,
        layer=settings.layer or None,
        reference_layer=settings.reference_layer or None,
        species=settings.species or None,
        reference_species=settings.reference_species or None,
        seed=settings.seed,
    )
    labelled = ad.AnnData(obs=cells["query"].obs)
    labelled.uns[settings.key_added] = cells["query"].uns[settings.key_added]
    partial = output.with_name(f".{output.name}.partial")
    labelled.write_h5ad(partial)
    partial.replace(output)
    logger.info(
        "%s: %d cells labelled, %.1f %% unknown.",
        output, labelled.n_obs, 100 * labelled.uns[settings.key_added]["share_unknown"],
    )  # fmt: skip
    return output
