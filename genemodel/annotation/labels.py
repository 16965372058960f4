"""Labels by a backbone that was fine-tuned to tell them apart: probabilities, and calibration.

Axes: C cells, H held-out cells, L labels, V vocabulary.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from genemodel.batches.batch import CellBatch
from genemodel.bundle.bundle import Bundle
from genemodel.errors import DataError
from genemodel.heads.labels import LabelHead, Labels, LabelSettings, fitted_temperature
from genemodel.heads.published import PublishedClassifier
from genemodel.inference.counts import VocabularyChunk, corpus_chunks
from genemodel.inference.forward import Forward

if TYPE_CHECKING:
    from genemodel.corpus.corpus import Corpus

logger = logging.getLogger(__name__)

# Bins of equal numbers of cells, by confidence, over which its error is averaged (Guo et al. 2017
# take 15 bins of equal width, most of which are empty where a model is sure).
BINS = 15
# Held-out cells that the temperature is fitted on, at most: one number needs no more.
MOST_CALIBRATION_CELLS = 20_000


def label_names(bundle: Bundle) -> list[str]:
    """Labels that a bundle tells apart, in the order of its logits; empty where it does not."""
    return list(bundle.settings.get("labels") or []) or _published_names(bundle)


def _published_names(bundle: Bundle) -> list[str]:
    """Labels of an imported classifier of cells, as its publishers name them."""
    published = bundle.settings.get("published") or {}
    if PublishedClassifier.NAME + ".weight" not in bundle.heads or published["head"] != "cells":
        return []
    named = published["config"].get("id2label") or {}
    return [str(named.get(str(i), f"label {i}")) for i in range(published["n_labels"])]


def labeller(bundle: Bundle, *, calibrated: bool = True) -> Forward:
    """Make what labels chunks of cells with a bundle: logits, float32 (C, L).

    Raises
    ------
    DataError
        The bundle was not fine-tuned to classify.
    """
    names = label_names(bundle)
    if not names:
        raise DataError(
            "This model tells no labels apart: fine-tune it with `genemodel finetune "
            "task=classify label_key=...`, or give a labelled reference."
        )
    nothing = Labels(tuple(names), np.zeros(0, np.int32), np.ones(len(names)))
    if _published_names(bundle):
        published = PublishedClassifier(bundle.heads).to(bundle.device).eval()
        return Forward(bundle, lambda cell_BD, _: published(cell_BD).float(), len(names))
    width = bundle.model.settings.width
    head: Any = bundle.head("labels", LabelHead(width, nothing, LabelSettings()))
    head.eval()

    def read_out(cell_BD: Tensor, batch: CellBatch) -> Tensor:
        logits_BL: Tensor = head.logits(cell_BD).float()
        return logits_BL / head.temperature if calibrated else logits_BL

    return Forward(bundle, read_out, len(names))


@dataclass(frozen=True)
class HeldOut:
    """How well labels are told apart in cells of groups that were not trained on.

    Attributes
    ----------
    cells
        How many have a label that was trained on.
    accuracy, macro_f1
        Of the most probable label; the mean over the labels that these cells have.
    calibration_error
        Mean distance of confidence and accuracy, with the temperature.
    temperature
        That logits are divided by.
    by_label
        Of every label that these cells have: how many, the share called right, the share that is
        right among those called so (None where none is), and what it is most often mistaken for.
    """

    cells: int
    accuracy: float
    macro_f1: float
    calibration_error: float
    temperature: float
    by_label: dict[str, dict[str, Any]]


def calibrate(
    bundle: Bundle, corpus: "Corpus", held_out: np.ndarray, code_N: np.ndarray
) -> HeldOut:
    """Fit the temperature of a bundle's labels on held-out cells; changes the bundle.

    Parameters
    ----------
    bundle
        With a label head.
    corpus, held_out
        Where the cells are, and which.
    code_N
        Label of every cell of the corpus in the bundle's order, -1 without.

    Notes
    -----
    The error is measured by two-fold cross-fitting: each half with the temperature of the other.
    """
    held_out = held_out[code_N[held_out] >= 0]
    if held_out.size > MOST_CALIBRATION_CELLS:
        chosen = np.random.default_rng(0).choice(held_out, MOST_CALIBRATION_CELLS, replace=False)
        held_out = np.sort(chosen)
    forward = labeller(bundle, calibrated=False)
    chunks = corpus_chunks(corpus, held_out, bundle)
    parts = [logits_CL for _, logits_CL in forward.over(chunks)]
    logits_HL = torch.from_numpy(np.concatenate(parts))
    code_H = torch.from_numpy(code_N[held_out].astype(np.int64))
    seen_H = torch.isfinite(logits_HL).all(1)
    logits_HL, code_H = logits_HL[seen_H], code_H[seen_H]
    temperature = fitted_temperature(logits_HL, code_H)
    bundle.heads["labels.temperature"] = torch.tensor(temperature).to(bundle.device)
    probability_HL = torch.empty_like(logits_HL)
    half_H = torch.arange(code_H.numel()) % 2 == 0
    for fold_H in (half_H, ~half_H):
        other = fitted_temperature(logits_HL[~fold_H], code_H[~fold_H])
        probability_HL[fold_H] = (logits_HL[fold_H] / other).softmax(-1)
    winner_H, true_H = probability_HL.argmax(1).numpy(), code_H.numpy()
    return HeldOut(
        temperature=temperature,
        by_label=by_label(label_names(bundle), winner_H, true_H),
        **scores(probability_HL.numpy(), true_H),
    )


def by_label(
    names: Sequence[str], winner_C: np.ndarray, code_C: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Say of every label that cells have how they were called."""
    found = {}
    for code in np.unique(code_C):
        of_it, called = code_C == code, winner_C == code
        wrong, times = np.unique(winner_C[of_it & ~called], return_counts=True)
        found[names[code]] = {
            "cells": int(of_it.sum()),
            "called right": float(called[of_it].mean()),
            "right when called": float(of_it[called].mean()) if called.any() else None,
            "most often mistaken for": names[wrong[times.argmax()]] if wrong.size else "",
        }
    return found


def scores(probability_CL: np.ndarray, code_C: np.ndarray) -> dict[str, Any]:
    """Accuracy, macro F1 and calibration error of probabilities against the truth."""
    from sklearn.metrics import f1_score

    winner_C, confidence_C = probability_CL.argmax(1), probability_CL.max(1)
    right_C = winner_C == code_C
    labels = np.unique(code_C)
    return {
        "cells": int(code_C.size),
        "accuracy": float(right_C.mean()) if code_C.size else float("nan"),
        "macro_f1": float(
            f1_score(code_C, winner_C, labels=labels, average="macro", zero_division=0)
        ) if code_C.size else float("nan"),
        "calibration_error": calibration_error(confidence_C, right_C),
    }  # fmt: skip


def calibration_error(confidence_C: np.ndarray, right_C: np.ndarray, bins: int = BINS) -> float:
    """Average |accuracy - mean confidence| over bins of equally many cells (expected error)."""
    if not confidence_C.size:
        return float("nan")
    order = np.argsort(confidence_C, kind="stable")
    parts = np.array_split(order, min(bins, order.size))
    gaps = [abs(right_C[p].mean() - confidence_C[p].mean()) * p.size for p in parts]
    return float(np.sum(gaps) / order.size)


def probabilities_of(chunks: Iterator[VocabularyChunk], bundle: Bundle, n_cells: int) -> np.ndarray:
    """Calibrated probability of every label for every cell, float32 (C, L); NaN without genes."""
    forward = labeller(bundle)
    out_CL = np.full((n_cells, forward.columns), np.nan, np.float32)
    for chunk, logits_CL in forward.over(chunks):
        probability_CL = nn.functional.softmax(torch.from_numpy(logits_CL), -1).numpy()
        out_CL[chunk.start : chunk.start + len(logits_CL)] = probability_CL
    return out_CL
