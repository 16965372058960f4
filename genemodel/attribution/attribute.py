"""Which genes a head's answer about a cell rests on: the call on AnnData.

Axes: C cells, G genes of the data, V vocabulary, T tokens, L labels, D width.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack, cast

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor

import genemodel
from genemodel.annotation.labels import label_names, labeller
from genemodel.attribution.integrated_gradients import Score, genes_of, integrated_gradients
from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import pack, rank_scale
from genemodel.batches.packing import plan_bins
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import bundle_for
from genemodel.cells.input_settings import InputOptions, InputSettings, reads_cells
from genemodel.errors import ConfigError, DataError
from genemodel.heads.labels import LabelHead, Labels, LabelSettings
from genemodel.heads.published import PublishedClassifier
from genemodel.inference.cell_vectors import cell_projection, embedding_of
from genemodel.inference.counts import VocabularyCells, VocabularyChunk, window_of
from genemodel.inference.obs_keys import check_in_memory, check_key_added, label_codes
from genemodel.inference.progress import Progress
from genemodel.model.gene_model import Encoded
from genemodel.perturbation.genes import GeneNames
from genemodel.settings import nearest

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

KEY = "attributions"
# Of the change of the score: above it the path needs more points.
LARGEST_GAP = 0.05


@reads_cells
def attribute(
    adata: "AnnData",
    model: Bundle | str | Path,
    target: str | np.ndarray | None = None,
    *,
    state_key: str = "",
    start_state: str = "",
    goal_state: str = "",
    label_key: str | None = None,
    steps: int = 16,
    key_added: str = KEY,
    batch_tokens: int = 0,
    device: str | torch.device | None = None,
    **options: Unpack[InputOptions],
) -> pd.DataFrame:
    """Say by integrated gradients what each gene of a cell is worth to a model's answer about it.

    Parameters
    ----------
    adata
        Cells, in memory.
    model
        With labels of cells (fine-tuned with ``task=classify``, or an imported cell classifier), or
        any bundle for a direction of the embedding; or the path of its folder.
    target
        A label: its logit, less the mean over labels. None: of each cell the label it is given. An
        array (D,): how far the cell lies along this direction of :func:`genemodel.embed`.
    state_key, start_state, goal_state
        Or the direction from the mean embedding of the cells of one state to that of another.
    label_key
        obs column: means for the cells of every label of it. Default: all cells, or where the
        target is each cell's own label, the cells of every such label.
    steps
        Points of the path from the cell with all its genes hidden (the mask token, hidden values;
        their number and ranks stay) to the cell as it is; each is a forward and a backward pass.
    key_added
        Key in ``layers`` (cells × genes, sparse), ``uns`` and, with ``_score`` and ``_baseline``
        behind, in ``obs``.
    batch_tokens
        Most tokens at once; 0 for the model's own budget. Cannot change the result.
    device
        Default: where the model is.
    **options
        How the cells are read.

    Returns
    -------
    DataFrame
        One row a gene, index ``gene`` (Ensembl id) or ``(label, gene)``, the strongest first:
        ``symbol``, ``n_cells`` that hold it, ``attribution`` (mean over all cells of the label,
        0 where not held) and ``where_held`` (mean over those that hold it).

    Raises
    ------
    ConfigError
        Settings contradict each other.
    DataError
        The model tells no labels apart, or has no such label.

    Notes
    -----
    The attributions of a cell's genes add up to ``obs[KEY_score] - obs[KEY_baseline]``
    (completeness); ``uns[key]["largest_gap"]`` says how far off the worst cell is. They say what
    the *model* reads, not what causes anything in a cell; genes beyond the context have none.
    """
    reading = InputSettings.given(options)
    check_key_added(key_added, "layers")
    check_in_memory(adata, "adata", "genemodel embed")
    if steps < 1:
        raise ConfigError(f"steps is {steps}: at least one point is needed; 16 are usual.")
    states = (state_key, start_state, goal_state)
    if any(states) and (not all(states) or target is not None):
        raise ConfigError(
            "A direction between states needs state_key, start_state and goal_state, and no target."
        )
    bundle = bundle_for("be asked for attributions", model, device)
    bundle.model.eval()
    cells = VocabularyCells(adata, bundle, reading)
    if all(states):
        target = _direction(adata, cells, bundle, reading, state_key, start_state, goal_state)
    score, code_C, said = _scorer(cells, bundle, target)
    if label_key is not None:
        group_C, groups = label_codes(adata.obs, label_key, missing_labels=reading.missing_labels)
    elif code_C is not None:
        names = label_names(bundle)
        group_C, groups = code_C, [names[code] for code in np.unique(code_C[code_C >= 0])]
        group_C = np.where(code_C < 0, -1, np.searchsorted(np.unique(code_C[code_C >= 0]), code_C))
    else:
        group_C, groups = np.zeros(adata.n_obs, np.int64), []
    found = _attributions(cells, bundle, score, steps, batch_tokens)
    _keep(adata, cells, found, key_added, {
        "genemodel": genemodel.__version__, "model": bundle.fingerprint, "target": said,
        "baseline": "mask", "steps": steps, "largest_gap": found.largest_gap,
    })  # fmt: skip
    names_of = GeneNames(bundle.vocabulary, tuple(bundle.species[s] for s in cells.matches))
    if not groups:
        return _means(found.worth_CV, names_of)
    tables = {g: _means(found.worth_CV[group_C == i], names_of) for i, g in enumerate(groups)}
    return pd.concat(tables, names=["label"])


@dataclass(frozen=True)
class _Found:
    """Attributions of all cells over the vocabulary, and both ends of every path."""

    worth_CV: sp.csr_matrix
    score_C: np.ndarray
    baseline_C: np.ndarray

    @property
    def largest_gap(self) -> float:
        """Largest distance from completeness, as a share of the usual change of the score."""
        change_C = self.score_C - self.baseline_C
        gap_C = np.abs(np.asarray(self.worth_CV.sum(1)).ravel() - change_C)
        usual = float(np.nanmedian(np.abs(change_C))) if np.isfinite(change_C).any() else 0.0
        return float(np.nanmax(gap_C, initial=0.0) / max(usual, 1e-12))


def _scorer(
    cells: VocabularyCells, bundle: Bundle, target: str | np.ndarray | None
) -> tuple[Score, np.ndarray | None, str]:
    """Return what is attributed, the label of every cell where that is its own, and words."""
    if isinstance(target, np.ndarray):
        width = bundle.model.settings.width
        if target.shape != (width,) or not np.isfinite(target).all() or not target.any():
            raise ConfigError(
                f"target has shape {target.shape}: a direction has one number for each of the "
                f"{width} of the embedding, finite and not all zero."
            )
        unit_D = torch.from_numpy(target / np.linalg.norm(target)).float().to(bundle.device)
        project = cell_projection(bundle)
        return (lambda encoded, _: project(encoded.cell_CD) @ unit_D), None, "a direction"
    names = label_names(bundle)
    if not names:
        raise DataError(
            "This model tells no labels of cells apart: fine-tune it with `genemodel finetune "
            "task=classify`, or give target an array, or state_key, start_state and goal_state."
        )
    if target is not None and target not in names:
        near = nearest(target, names)
        raise DataError(
            f"target={target!r}: the model knows {', '.join(names)}"
            + (f". Did you mean {near!r}?" if near else ".")
        )
    logits = _logits(bundle, names)
    if target is not None:
        code = names.index(target)
        return (lambda encoded, _: _less_mean(logits(encoded))[:, code]), None, target
    code_C = np.full(len(cells), -1, np.int64)
    for chunk, logit_CL in labeller(bundle).over(cells.chunks()):
        known_C = np.isfinite(logit_CL).all(1)
        code_C[chunk.start : chunk.start + len(logit_CL)][known_C] = logit_CL[known_C].argmax(1)
    code_N = torch.from_numpy(code_C).to(bundle.device)

    def own(encoded: Encoded, batch: CellBatch) -> Tensor:
        # Places without a cell are scored as well, and mean nothing.
        code = code_N[batch.cell_C.clamp_min(0)].clamp_min(0)
        return _less_mean(logits(encoded)).gather(1, code[:, None])[:, 0]

    return own, code_C, "each cell's label"


def _logits(bundle: Bundle, names: list[str]) -> Any:
    if f"{PublishedClassifier.NAME}.weight" in bundle.heads and not bundle.settings.get("labels"):
        published = PublishedClassifier(bundle.heads).to(bundle.device).eval()
        return lambda encoded: published(encoded.cell_CD)
    nothing = Labels(tuple(names), np.zeros(0, np.int32), np.ones(len(names)))
    width = bundle.model.settings.width
    head = cast(LabelHead, bundle.head("labels", LabelHead(width, nothing, LabelSettings())))
    head.eval()
    return lambda encoded: head.logits(encoded.cell_CD) / head.temperature


def _less_mean(logit_CL: Tensor) -> Tensor:
    """Take off what all labels have in common, which no probability depends on."""
    return logit_CL - logit_CL.mean(1, keepdim=True)


def _direction(
    adata: "AnnData",
    cells: VocabularyCells,
    bundle: Bundle,
    reading: InputSettings,
    key: str,
    start: str,
    goal: str,
) -> np.ndarray:
    """Mean embedding of the goal less that of the start, float64 (D,)."""
    code_C, names = label_codes(adata.obs, key, "state_key", missing_labels=reading.missing_labels)
    for setting, state in (("start_state", start), ("goal_state", goal)):
        if state not in names:
            near = nearest(state, names)
            raise DataError(
                f"{setting}={state}: adata.obs[{key!r}] has {', '.join(names)}"
                + (f". Did you mean {near!r}?" if near else ".")
            )
    vector_CD = embedding_of(cells, bundle).astype(np.float64)
    known_C = np.isfinite(vector_CD).all(1)
    ends = [vector_CD[known_C & (code_C == names.index(s))].mean(0) for s in (goal, start)]
    return np.asarray(ends[0] - ends[1])


def _batches(
    chunk: VocabularyChunk, bundle: Bundle, budget: int
) -> Iterator[tuple[CellBatch, np.ndarray]]:
    """Pack the cells of a chunk that have a known gene, like lengths together."""
    window = window_of(chunk)
    rows = np.flatnonzero(chunk.library_C > 0)
    length_C = window.lengths_C(bundle.tokens)
    rows = rows[np.argsort(-length_C[rows], kind="stable")]
    scale_V = rank_scale(bundle.medians_V, bundle.tokens.style)
    if not rows.size:
        return
    most = max(budget, int(length_C[rows].max()))
    for chosen in plan_bins(length_C[rows], most, bundle.tokens.max_cells):
        here = rows[chosen]
        n = int(length_C[here].sum())
        yield pack(window, here, scale_V, bundle.tokens, budget=n, max_cells=here.size), here


def _attributions(
    cells: VocabularyCells,
    bundle: Bundle,
    score: Score,
    steps: int,
    batch_tokens: int,
) -> _Found:
    budget = max(batch_tokens or bundle.tokens.budget, bundle.tokens.context)
    n_cells = len(cells)
    score_C, baseline_C = np.full(n_cells, np.nan), np.full(n_cells, np.nan)
    cell_N, gene_N, worth_N = [], [], []
    with Progress("attribute", n_cells) as progress:
        for chunk in cells.chunks():
            for batch, _ in _batches(chunk, bundle, budget):
                batch = batch.to(bundle.device)
                found = integrated_gradients(bundle.model, batch, score, steps=steps)
                n, n_real = batch.n_tokens, batch.n_cells
                number_C = batch.cell_C[:n_real].cpu().numpy()
                score_C[number_C] = found.score_C[:n_real].cpu().numpy()
                baseline_C[number_C] = found.baseline_C[:n_real].cpu().numpy()
                is_gene_T = genes_of(bundle.model, batch)[:n].cpu().numpy()
                cell_N.append(batch.cell_C[batch.segment_T[:n]].cpu().numpy()[is_gene_T])
                gene_N.append(batch.gene_T[:n].cpu().numpy()[is_gene_T])
                worth_N.append(found.worth_T[:n].float().cpu().numpy()[is_gene_T])
                progress.add(n_real)
    shape = n_cells, len(bundle.vocabulary)
    if not cell_N:
        raise DataError(f"{cells.source.where}: no cell has a gene that the model knows.")
    worth_CV = sp.csr_matrix(
        (np.concatenate(worth_N), (np.concatenate(cell_N), np.concatenate(gene_N))), shape
    )
    result = _Found(worth_CV, score_C, baseline_C)
    if result.largest_gap > LARGEST_GAP:
        logger.warning(
            "The attributions of a cell are off its score by %.0f %% of the usual change: set "
            "steps higher than %d.", 100 * result.largest_gap, steps,
        )  # fmt: skip
    return result


def _means(worth_CV: sp.csr_matrix, names: GeneNames) -> pd.DataFrame:
    n_V = worth_CV.getnnz(0)
    token_R = np.flatnonzero(n_V)
    sum_R = np.asarray(worth_CV.sum(0)).ravel()[token_R]
    order = np.argsort(-np.abs(sum_R), kind="stable")
    token_R, sum_R = token_R[order], sum_R[order]
    index = pd.Index([names.ensembl([int(t)]) for t in token_R], name="gene")
    return pd.DataFrame(
        {
            "symbol": [names.symbol([int(t)]) for t in token_R],
            "n_cells": n_V[token_R],
            "attribution": sum_R / max(worth_CV.shape[0], 1),
            "where_held": sum_R / n_V[token_R],
        },
        index=index,
    )


def _keep(
    adata: "AnnData", cells: VocabularyCells, found: _Found, key: str, told: dict[str, Any]
) -> None:
    """Write attributions beside the counts: of genes that share a token, on the first."""
    token_G = cells.tokens_beside(adata.n_vars, "attributions cannot stand beside them")
    column_V = np.full(found.worth_CV.shape[1], -1, np.int64)
    for column in range(len(token_G) - 1, -1, -1):
        if token_G[column] >= 0:
            column_V[token_G[column]] = column
    entries = found.worth_CV.tocoo()
    layer_CG = sp.csr_matrix(
        (entries.data, (entries.row, column_V[entries.col])), (adata.n_obs, adata.n_vars)
    )
    adata.layers[key] = layer_CG
    adata.obs[f"{key}_score"], adata.obs[f"{key}_baseline"] = found.score_C, found.baseline_C
    adata.uns[key] = told
