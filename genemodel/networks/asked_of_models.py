"""Networks that a model is asked for, and which model can be asked for which.

Axes: S sources (transcription factors), T targets, D width, V vocabulary.
"""

import numpy as np
import torch
import torch.nn.functional as F

from genemodel.bundle.bundle import Bundle
from genemodel.imputation.pretrained import has_decoder
from genemodel.inference.progress import Progress
from genemodel.networks.attention import run
from genemodel.networks.attention_sums import AttentionSums
from genemodel.networks.cells import Genes, NetworkCells, batches
from genemodel.perturbation.passes import How, Perturber

# Sums over (factor, gene of the vocabulary) are held for so many factors at a time.
_FACTORS_AT_ONCE = 256


def why_not(method: str, bundle: Bundle | None) -> str | None:
    """Say why a model cannot be asked for a network; None where it can."""
    if bundle is None:
        return f"{method} asks a model: set model to the folder of a bundle"
    style = bundle.tokens.style
    if method == "jacobian":
        if not has_decoder(bundle):
            return (
                "jacobian differentiates the count decoder, which this model lacks: pre-train one "
                "with it (pretrain: task.decode_counts.weight=1)"
            )
        if not bundle.model.settings.values or style != "native":
            return (
                "jacobian differentiates by the values of genes, and this model reads their ranks: "
                "take perturbation"
            )
    if method == "perturbation" and style in ("geneformer_v1", "genecompass"):
        return (
            f"perturbation of genes is not made for models of {style}, whose cells have no opening "
            "token or values of their own: take attention"
        )
    return None


def attention_network(
    cells: NetworkCells, bundle: Bundle, genes: Genes, batch_tokens: int = 0
) -> np.ndarray:
    """How much targets look at sources, mean over heads and over the cells that hold both, (S, T).

    As a multiple of what any token of the cell gets.
    """
    sums = AttentionSums(bundle.model.eval(), genes.targets, genes.sources)
    run(sums, cells, bundle, batch_tokens)
    return sums.mean()[0].T


@torch.no_grad()
def vector_network(bundle: Bundle, genes: Genes) -> np.ndarray:
    """Cosine of the model's input vectors of genes, (S, T).

    The mean vector of the genes at hand is taken off first: all vectors share a direction, which
    would make every cosine large.
    """
    together = genes.together
    tokens = torch.from_numpy(together).to(bundle.device)
    vector_GD = bundle.model.embedding.genes(tokens).float()
    unit_GD = F.normalize(vector_GD - vector_GD.mean(0), dim=1).cpu().numpy()
    at_S, at_T = np.searchsorted(together, genes.sources), np.searchsorted(together, genes.targets)
    found_ST: np.ndarray = unit_GD[at_S] @ unit_GD[at_T].T
    return found_ST


def perturbation_network(
    cells: NetworkCells, bundle: Bundle, genes: Genes, batch_tokens: int = 0
) -> np.ndarray:
    """How far a target's state moves when a source is deleted from the cell, (S, T).

    One minus the cosine before and after, mean over the cells that hold both, less what moves the
    target on average over all sources: some genes move whatever is deleted. NaN where no cell holds
    both.
    """
    perturber = Perturber(
        bundle, How(operation="delete", held=False, mode="cls_and_gene"), budget=batch_tokens
    )
    window = cells.window
    rows, no_states = np.arange(len(window)), np.empty((0, bundle.model.settings.width))
    shift_ST = np.full((genes.sources.size, genes.targets.size), np.nan)
    n_ST = np.zeros(shift_ST.shape)
    # Of a gene beyond the context nothing is deleted.
    held = sum(
        int(np.isin(batch.gene_T[: batch.n_tokens].numpy(), genes.sources).sum())
        for batch in batches(cells, bundle)
    )
    with Progress("perturb", held, unit="variants") as progress:
        for at in range(0, genes.sources.size, _FACTORS_AT_ONCE):
            some = genes.sources[at : at + _FACTORS_AT_ONCE]
            tokens_P = [(int(token),) for token in some]
            sums = perturber.shifts(window, rows, tokens_P, no_states, None, progress.add).genes
            assert sums is not None
            n = sums.n_PV[:, genes.targets].astype(np.float64)
            with np.errstate(invalid="ignore", divide="ignore"):
                shift_ST[at : at + len(some)] = 1.0 - sums.sum_PV[:, genes.targets] / n
            n_ST[at : at + len(some)] = n
    total_T = np.where(n_ST > 0, shift_ST * n_ST, 0.0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (shift_ST - total_T / n_ST.sum(0)).astype(np.float32)
