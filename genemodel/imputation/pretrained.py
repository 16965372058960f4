"""Denoise with the count decoder of a pre-trained model as it is: nothing is trained.

The model makes a vector of every cell, its decoder the share of every gene that it knows. What the
cells at hand settle is in closed form: one factor a gene (another chemistry counts other genes
more), and how far true rates stray from the decoder, both on a tenth of the molecules of some
cells, which neither the vector nor the evidence has seen.

Axes: C cells, D width, G genes of the data that the model knows, S sampled cells.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import scipy.sparse as sp
import torch

from genemodel.bundle.bundle import Bundle
from genemodel.cells.source import Source
from genemodel.errors import ConfigError, DataError
from genemodel.expression.thinning import split_molecules
from genemodel.imputation.model import ImputationModel
from genemodel.imputation.network import (
    BLOCK_CELLS,
    Decoder,
    DecoderSettings,
)
from genemodel.imputation.starting import decoder_nats, settle_factors
from genemodel.imputation.training import (
    TrainedDecoder,
    calibrated,
)
from genemodel.inference.cell_vectors import embedder
from genemodel.inference.counts import VocabularyCells, VocabularyChunk, blocks_of
from genemodel.inference.progress import Progress

logger = logging.getLogger(__name__)

type Bring = Callable[[sp.csr_matrix], sp.csr_matrix]

# Cells that settle factors and dispersion, in so many stretches spread evenly over the data: files
# are sorted by sample. At 2,000 cells the dispersion of a gene is as sure as its neighbours'.
_SETTLED, _STRETCHES = 2048, 32


def has_decoder(bundle: Bundle) -> bool:
    """Whether the model can impute without training."""
    return "decode_counts.gene.weight" in bundle.heads


def refuse_without_decoder(bundle: Bundle) -> None:
    """Refuse a model that cannot impute without training."""
    if has_decoder(bundle):
        return
    has = ", ".join(sorted({name.split(".")[0] for name in bundle.heads})) or "no heads"
    raise ConfigError(
        f"model is a Bundle without a count decoder (it has {has}), so it imputes nothing by "
        "itself: pre-train one that does (pretrain: task.decode_counts.weight=1), or train on "
        "these cells: leave model out, or read its cell vectors with "
        "`genemodel finetune task=impute`, in Python gm.impute(…, backbone='frozen')."
    )


class PretrainedImputation:
    """The count decoder of a bundle over the genes of some data.

    Parameters
    ----------
    cells
        The data, of one species, over the vocabulary of a bundle that has a count decoder.
    seed
        Of the split of molecules.

    Attributes
    ----------
    model
        Of no cells yet.
    known_G
        Columns of the data that the model knows.

    Raises
    ------
    DataError
        No cell has counts.
    """

    def __init__(self, cells: VocabularyCells, *, seed: int) -> None:
        bundle = cells.bundle
        ((species, match),) = cells.matches.items()
        self.cells = cells
        self.known_G = np.flatnonzero(match.token_G >= 0)
        token_G = torch.from_numpy(match.token_G[self.known_G].astype(np.int64))
        weight = {
            name: bundle.heads[f"decode_counts.{name}"].detach().float().cpu()
            for name in ("gene.weight", "base_SV")
        }
        settings = DecoderSettings(latent=bundle.model.settings.width, calibration_cells=_SETTLED)
        decoder = Decoder.of_vectors(
            weight["gene.weight"][token_G], weight["base_SV"][species, token_G]
        )
        sample_SG = self._sample()
        fraction = settings.calibration_fraction
        seen_SG, held_SG = split_molecules(
            sample_SG, 1.0 - fraction, np.random.default_rng(seed), dtype=np.float32
        )
        latent_SD = decoder.encode(seen_SG[:, self.known_G], self._vectors(seen_SG))
        seen_SG, held_SG = seen_SG[:, self.known_G], held_SG[:, self.known_G]
        settle_factors(decoder.head, latent_SD, seen_SG)
        code_S = torch.zeros(len(latent_SD), dtype=torch.long)
        dispersion_G, coverage = calibrated(
            decoder.head, latent_SD, code_S, seen_SG, held_SG, fraction, seed
        )
        nats = decoder_nats(decoder.head, latent_SD, held_SG)
        self.model = ImputationModel(
            TrainedDecoder(decoder.eval(), dispersion_G, nats, coverage, [(0, nats)]),
            sp.csr_matrix((0, len(self.known_G)), dtype=np.float32),
            np.arange(len(self.known_G)),
            np.zeros(0, np.int64),
            (),
            settings,
            genes=[str(name) for name in cells.source.genes.index[self.known_G]],
            where=cells.source.where,
            bundle=bundle,
        )
        self.model.training = bundle.training  # of these cells nothing was learnt but factors
        self.model.tell(sample_SG.shape[0], seed=seed, model=bundle.fingerprint, tune="frozen")
        if unknown := match.token_G.size - self.known_G.size:
            logger.warning(
                "%s: the model does not know %s of %s genes, which get NaN.",
                cells.source.where, f"{unknown:,}", f"{match.token_G.size:,}",
            )  # fmt: skip

    def _sample(self) -> sp.csr_matrix:
        """Read counts of known genes of some cells that have any, (S, genes of the data)."""
        n = len(self.cells)
        size = -(-_SETTLED // _STRETCHES) if n > _SETTLED else max(n, 1)
        starts = np.linspace(0, n - size, _STRETCHES if n > _SETTLED else 1).astype(int)
        blocks = [
            counts_CG
            for start in starts.tolist()
            for _, counts_CG in self.cells.blocks(start=start, stop=start + size)
        ]
        known_G = np.zeros(len(self.cells.source.genes), np.float32)
        known_G[self.known_G] = 1
        sample_SG = sp.csr_matrix((0, known_G.size), dtype=np.float32)
        if blocks:
            sample_SG = sp.csr_matrix(sp.vstack(blocks, format="csr") @ sp.diags(known_G))
            sample_SG.sum_duplicates()
            sample_SG.eliminate_zeros()
            sample_SG = sample_SG[sample_SG.getnnz(1) > 0]
        if not sample_SG.shape[0]:
            raise DataError(
                f"{self.cells.source.where}: no cell that was looked at has counts of a gene that "
                "the model knows: check layer and species."
            )
        return sample_SG

    def _vectors(self, seen_SG: sp.csr_matrix) -> np.ndarray:
        """Vectors of the sampled cells, of the molecules that are shown."""
        chunks = (
            self.cells.over_vocabulary(0, seen_SG[start : start + BLOCK_CELLS])
            for start in range(0, seen_SG.shape[0], BLOCK_CELLS)
        )
        return np.concatenate([rows_CD for _, rows_CD in embedder(self.cells.bundle).over(chunks)])

    def bring(self, counts_CG: sp.csr_matrix) -> sp.csr_matrix:
        """Give the counts of the genes that the model knows."""
        known_CG = counts_CG[:, self.known_G].astype(np.float32)
        known_CG.sum_duplicates()
        return known_CG


def median_library(source: Source, bring: Bring) -> float:
    """Median of the counts of the model's genes of all cells that have any, in one pass."""
    parts = [np.asarray(bring(counts_CG).sum(1)).ravel() for _, counts_CG in blocks_of(source)]
    library_C = np.concatenate(parts)
    return float(np.median(library_C[library_C > 0]))


def in_a_stream(
    model: ImputationModel,
    source: Source,
    cells: VocabularyCells | None,
    bring: Bring,
    batch_C: np.ndarray,
    measured_G: np.ndarray | None = None,
) -> Iterator[tuple[int, ImputationModel, VocabularyChunk | None]]:
    """Read cells block after block, and give the model of each.

    Parameters
    ----------
    model
        Trained, or of a bundle.
    source
        The cells.
    cells
        The same over the vocabulary of the model's bundle, if it has one.
    bring
        Brings their counts in the order of the model's genes.
    batch_C, measured_G
        As in :meth:`ImputationModel.of`, of all cells.

    Yields
    ------
    Row of the first cell, the model of these cells, and their counts by token where a bundle reads
    them.
    """

    def of(start: int, counts_CG: sp.csr_matrix, rows_CD: np.ndarray | None) -> ImputationModel:
        code_C = batch_C[start : start + counts_CG.shape[0]]
        return model.of(
            bring(counts_CG), code_C, measured_G, where=source.where, features_CF=rows_CD
        )

    with Progress("impute", source.n_cells) as progress:
        if model.bundle is None:
            for start, counts_CG in blocks_of(source, BLOCK_CELLS):
                yield start, of(start, counts_CG, None), None
                progress.add(counts_CG.shape[0])
            return
        assert cells is not None, "cells over the vocabulary of the bundle"
        over = cells
        held: deque[sp.csr_matrix] = deque()

        def chunks() -> Iterator[VocabularyChunk]:
            for start, counts_CG in over.blocks(BLOCK_CELLS):
                held.append(counts_CG)
                yield over.over_vocabulary(start, counts_CG)

        for chunk, rows_CD in embedder(model.bundle).over(chunks(), progress.add):
            yield chunk.start, of(chunk.start, held.popleft(), rows_CD), chunk


def joined(blocks: list[ImputationModel]) -> ImputationModel:
    """Return one model of the cells of several blocks."""
    vectors = [block.features_CF for block in blocks if block.features_CF is not None]
    counts_CG = sp.csr_matrix(sp.vstack([block.counts_CG for block in blocks], format="csr"))
    return blocks[0].of(
        counts_CG,
        np.concatenate([block.batch_C for block in blocks]),
        blocks[0].measured_G,
        where=blocks[0].where,
        features_CF=np.concatenate(vectors) if vectors else None,
    )
