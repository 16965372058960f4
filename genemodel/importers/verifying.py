"""What ``import verify=true`` prints: tensors, checksums, and the loss on masked genes.

Whoever has the published weights can close the claim with it: the loss of the published model on
published cells is a number that nobody gets by chance.

Axes: T tokens, M masked tokens, D width, V vocabulary.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from genemodel.batches.batch import CellBatch
from genemodel.batches.loader import pack, rank_scale
from genemodel.batches.packing import plan_bins
from genemodel.batches.published import pack_sequences
from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError, DataError
from genemodel.genes.vocabulary import CELL, EOS, MASK
from genemodel.heads.masking import eligible, uniform
from genemodel.heads.published import PublishedGeneHead
from genemodel.importers.exporting import head_of, source_tokens
from genemodel.inference.counts import VocabularyCells, window_of

logger = logging.getLogger(__name__)

# As in the models' own training: of the genes, how many, and what becomes of them.
FRACTION = 0.15
# Cells that the loss is measured on, at most.
MOST_CELLS = 500
_SEED, _PURPOSE = 0, 77


def verification(
    bundle: Bundle, cells: Path | None = None, reading: InputSettings | None = None
) -> list[str]:
    """Say what can be checked of an imported model, a line each."""
    said = bundle.provenance
    unique = sum(p.numel() for p in bundle.model.parameters()) + sum(
        tensor.numel() for tensor in bundle.heads.values()
    )
    lines = [
        f"tensors: {said['tensors']}; numbers in the file: {said['numbers']:,}; here: {unique:,}",
        *(f"sha256 of {name}: {digest}" for name, digest in said["weights"].items()),
        *(f"sha256 of {name}: {digest}" for name, digest in said["dictionaries"].items()),
        f"sha256 of weights and vocabulary here: {bundle.fingerprint}",
    ]
    if head_of(bundle) != "masked":
        return [*lines, "loss on masked genes: the model has no head for it"]
    if cells is None:
        return [*lines, "loss on masked genes: not measured; give cells=FILE (counts, or an npz "
                "with tokens and offsets)"]  # fmt: skip
    loss, accuracy, n_masked, n_cells = masked_gene_loss(bundle, cells, reading)
    n_genes = len(bundle.vocabulary)
    return [
        *lines,
        f"loss on masked genes: {loss:.4f} nats, right {accuracy:.2%} of the time, over "
        f"{n_masked:,} of {n_cells:,} cells (a uniform guess: {np.log(n_genes):.4f})",
    ]


@torch.inference_mode()
def masked_gene_loss(
    bundle: Bundle, cells: str | Path, reading: InputSettings | None = None
) -> tuple[float, float, int, int]:
    """Measure the loss on masked genes as in the model's training, without its randomness.

    15 % of all tokens but ``<pad>`` and ``<mask>`` are masked, the same ones every time; all of
    them by ``<mask>``.

    Parameters
    ----------
    bundle
        With its published head.
    cells
        Counts in any file that ``embed`` reads; or an npz with ``tokens`` (published tokens, cells
        end to end) and ``offsets``.
    reading
        How counts are read.

    Returns
    -------
    Mean loss in nats, share of masked genes that score highest, masked genes, and cells.
    """
    model = bundle.model.eval()
    head = PublishedGeneHead(model.settings, len(bundle.vocabulary))
    head = bundle.head(PublishedGeneHead.NAME, head).eval()  # type: ignore[assignment]
    total, right, n_masked, n_cells = 0.0, 0, 0, 0
    for batch in _batches(bundle, Path(cells), reading):
        cell_T = batch.cell_C[batch.segment_T]
        chosen_T = eligible(batch.gene_T) | (batch.gene_T == CELL)
        if model.settings.hosts != "geneformer_v2":  # GeneCompass's species token is no target
            chosen_T = eligible(batch.gene_T)
        drawn_T = uniform(_SEED, _PURPOSE, 0, cell_T, batch.gene_T)
        (at_M,) = torch.nonzero(chosen_T & (drawn_T < FRACTION), as_tuple=True)
        gene_T, value_T = batch.gene_T.clone(), batch.value_T.clone()
        gene_T[at_M], value_T[at_M] = MASK, -1.0
        hidden_TD = model(replace(batch, gene_T=gene_T, value_T=value_T)).hidden_TD
        logit_MV = head(hidden_TD[at_M], model.embedding.token.weight)
        wanted_M = batch.gene_T[at_M]
        total += float(F.cross_entropy(logit_MV, wanted_M, reduction="sum"))
        right += int((logit_MV.argmax(1) == wanted_M).sum())
        n_masked += len(at_M)
        n_cells += batch.n_cells
    if not n_masked:
        raise DataError(f"{cells}: no cell has a gene of the model.")
    return total / n_masked, right / n_masked, n_masked, n_cells


def _batches(bundle: Bundle, path: Path, reading: InputSettings | None) -> Iterator[CellBatch]:
    if path.suffix == ".npz":
        yield from _sequences(bundle, path)
        return
    view = VocabularyCells(path, bundle, reading)
    tokens = bundle.tokens
    scale_V = rank_scale(bundle.medians_V, tokens.style)
    try:
        for chunk in view.chunks(stop=min(len(view), MOST_CELLS)):
            window = window_of(chunk)
            rows = np.flatnonzero(chunk.library_C > 0)
            length_C = window.lengths_C(tokens)[rows]
            for chosen in plan_bins(length_C, tokens.budget, tokens.max_cells):
                yield pack(window, rows[chosen], scale_V, tokens)
    finally:
        view.close()


def _sequences(bundle: Bundle, path: Path) -> Iterator[CellBatch]:
    """Pack published sequences as they are."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            tokens, offsets = stored["tokens"].astype(np.int64), stored["offsets"].astype(np.int64)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} has no arrays tokens and offsets ({error}).") from error
    if bundle.tokens.style == "genecompass":
        raise ConfigError(f"cells={path}: token sequences have no values; give counts.")
    source_V = source_tokens(bundle)
    if tokens.size and tokens.max() > source_V.max():
        raise DataError(
            f"{path} has the token {tokens.max():,}; the model has {source_V.max() + 1:,}: the "
            "sequences are of another version."
        )
    ours_Q = np.zeros(int(source_V.max()) + 1, np.int64)
    ours_Q[source_V[source_V >= 0]] = np.flatnonzero(source_V >= 0)
    v2 = bundle.tokens.style == "geneformer_v2"
    context = bundle.tokens.context
    own = []
    for a, b in zip(offsets[:MOST_CELLS], offsets[1:], strict=False):
        genes = ours_Q[tokens[a:b]]
        if v2 and (not genes.size or genes[0] != CELL):
            genes = np.concatenate([[CELL], genes[: context - 2], [EOS]])
        own.append(genes[:context])
    length_C = np.array([genes.size for genes in own])
    for chosen in plan_bins(length_C, bundle.tokens.budget, bundle.tokens.max_cells):
        yield pack_sequences(bundle.tokens, [own[c] for c in chosen], chosen)
