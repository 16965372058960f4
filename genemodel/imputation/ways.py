"""The model that predicts, and the cells it is asked about, block after block.

It was trained elsewhere, is the decoder of a bundle as it is, or is trained on these cells.

Axes: C cells, E width of a gene vector, G genes of the data.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.training_manifest import TrainingManifest
from genemodel.cells.source import Source
from genemodel.finetuning.beneath import backbone_of, beneath_of, learnt_from
from genemodel.finetuning.head_run import HeadRun
from genemodel.imputation.impute_genes import Columns, Unmeasured
from genemodel.imputation.model import MEDIAN_LIBRARY, ImputationModel, Library
from genemodel.imputation.network import BLOCK_CELLS
from genemodel.imputation.plan import Plan
from genemodel.imputation.pretrained import (
    Bring,
    PretrainedImputation,
    in_a_stream,
    joined,
    median_library,
)
from genemodel.imputation.starting import pretrained_vectors
from genemodel.imputation.token_backbone import TokenBackbone
from genemodel.inference.cell_vectors import embedding_of
from genemodel.inference.counts import VocabularyCells, VocabularyChunk
from genemodel.model.tuning import TuningSettings


@dataclass(frozen=True)
class Block:
    """Consecutive cells: row of the first, and which of a model's cells they are.

    ``chunk`` has their counts by token, where genes are predicted that were not measured.
    """

    start: int
    model: ImputationModel
    rows: slice
    chunk: VocabularyChunk | None

    @property
    def library_C(self) -> np.ndarray:
        """Counts of every cell."""
        return self.model.library_C[self.rows]


@dataclass
class Ready:
    """A model that can be asked.

    Attributes
    ----------
    model
        Of the cells, or of none where they are read in a stream.
    columns
        Genes that are written, by their place among those of the model.
    library
        At which rates are wanted.
    blocks
        The cells.
    kept
        Models of those that have been gone through and fit into memory.
    """

    model: ImputationModel
    columns: Columns
    library: Library
    blocks: Iterator[Block]
    kept: list[ImputationModel]

    def result(self) -> ImputationModel:
        """Give the model of all cells that are in memory, once they have been gone through."""
        return joined(self.kept) if self.kept else self.model


def make_ready(plan: Plan, run: HeadRun) -> Ready:
    """Train where something is to be trained, and begin to read the cells."""
    way = plan.asked.way
    if way.trained is not None:
        return _of_other_cells(plan, way.trained)
    if way.as_it_is:
        return _as_it_is(plan)
    model = _trained_here(plan, run)
    return _in_memory(plan, model)


def _of_other_cells(plan: Plan, trained: ImputationModel) -> Ready:
    """Ask a model of other cells than those it was trained on."""
    order, code_C, where = plan.order, plan.code_C, plan.source.where
    assert order is not None and code_C is not None
    if plan.counts_CG is None:
        none_CG = sp.csr_matrix((0, len(trained.genes)), dtype=np.float32)
        model = trained.of(none_CG, code_C[:0], order.there_W, where=where)
        return _streamed(plan, model, plan.columns, order.apply, code_C, order.there_W)
    counts_CG = order.apply(plan.counts_CG.astype(np.float32))
    features_CF = None if plan.over is None else embedding_of(plan.over, plan.over.bundle)
    model = trained.of(counts_CG, code_C, order.there_W, where=where, features_CF=features_CF)
    return _in_memory(plan, model)


def _as_it_is(plan: Plan) -> Ready:
    """Ask the decoder of a bundle, which knows no batches."""
    assert plan.over is not None
    pretrained = PretrainedImputation(plan.over, seed=plan.asked.wanted.seed)
    columns = plan.columns.among(pretrained.known_G)
    code_C = np.zeros(plan.source.n_cells, np.int64)
    return _streamed(plan, pretrained.model, columns, pretrained.bring, code_C)


def _trained_here(plan: Plan, run: HeadRun) -> ImputationModel:
    """Train a decoder on the cells."""
    way, source, start, tuning = plan.asked.way, plan.source, plan.asked.way.start, None
    over = plan.over if start is not None else None
    gene_vectors_GE = backbone = None
    if over is not None and way.gene_vectors:
        gene_vectors_GE = _gene_vectors(over)
    if over is not None and way.tuning is not None:
        tuning = way.tuning
        backbone = _over_tokens(over, tuning)
    model = ImputationModel.train(
        plan.counts_CG,
        plan.code_C,
        plan.batches,
        way.settings,
        genes=[str(name) for name in source.genes.index],
        batch_keys=plan.batch_keys,
        gene_vectors_GE=gene_vectors_GE,
        backbone=backbone,
        run=run,
        seed=plan.asked.wanted.seed,
        where=source.where,
    )
    if start is not None:
        model.provenance["model"] = start.fingerprint
    model.provenance["backbone"] = "" if tuning is None else tuning.tune
    model.training = learnt_from(_manifest(source, model, over), start)
    model.vocabulary = None if start is None else start.vocabulary
    if over is None or tuning is None:
        return model
    beneath = _beneath(over.bundle, model, tuning)
    return model.with_vectors(beneath, embedding_of(over, beneath))


def _gene_vectors(over: VocabularyCells) -> np.ndarray:
    """Pre-trained vector of every gene of the data, NaN for a gene outside the vocabulary, (G, E).

    A gene of several species has that of the first.
    """
    token_G = np.full(len(over.source.genes), -1)
    for match in over.matches.values():
        token_G = np.where(token_G >= 0, token_G, match.token_G)
    vectors_GE: np.ndarray = pretrained_vectors(over.bundle)[token_G]
    vectors_GE[token_G < 0] = np.nan
    return vectors_GE


def _over_tokens(over: VocabularyCells, tuning: TuningSettings) -> TokenBackbone:
    """Find the tokens of the data's own genes, for a transformer beneath."""
    bundle = over.bundle
    ((_, match),) = over.matches.items()
    return TokenBackbone(
        backbone_of(bundle, tuning), len(bundle.vocabulary), match.token_G, over.species_C
    )


def _beneath(bundle: Bundle, model: ImputationModel, tuning: TuningSettings) -> Bundle:
    """Give the bundle as the training has left it."""
    if tuning.tune == "frozen":
        return bundle
    learnt = model.trained.backbone
    assert learnt is not None
    how = f"{tuning.tune}, beneath an imputation"
    return beneath_of(bundle, learnt, how, model.history, model.training)


def _manifest(
    source: Source, model: ImputationModel, over: VocabularyCells | None
) -> TrainingManifest:
    """Take down the cells of a training: over a vocabulary, or over the data's own genes."""
    counts_CV, species_C = model.counts_CG, None
    if over is not None:
        blocks = [chunk.counts_CV for chunk in over.chunks()]
        counts_CV = sp.vstack(blocks, format="csr")
        species_C = np.array(over.bundle.species, dtype=object)[over.species_C]
    return TrainingManifest.of_counts(
        counts_CV, np.flatnonzero(model.library_C > 0), species_C, name=source.name,
        file=source.file, licence=source.licence, citation=source.citation,
    )  # fmt: skip


# -- the cells -----------------------------------------------------------------------------------


def _in_memory(plan: Plan, model: ImputationModel) -> Ready:
    """Go through the cells that a model holds."""
    blocks = _blocks(model, plan.unmeasured)
    return Ready(model, plan.columns, plan.asked.wanted.library, blocks, [])


def _blocks(model: ImputationModel, unmeasured: Unmeasured | None) -> Iterator[Block]:
    if unmeasured is not None:
        for chunk in unmeasured.cells.chunks(BLOCK_CELLS):
            stop = chunk.start + chunk.counts_CV.shape[0]
            yield Block(chunk.start, model, slice(chunk.start, stop), chunk)
        return
    for start in range(0, len(model), BLOCK_CELLS):
        stop = min(start + BLOCK_CELLS, len(model))
        yield Block(start, model, slice(start, stop), None)


def _streamed(
    plan: Plan,
    model: ImputationModel,
    columns: Columns,
    bring: Bring,
    code_C: np.ndarray,
    there_G: np.ndarray | None = None,
) -> Ready:
    """Go through cells as they are read; those of a file are not kept, for they may be many."""
    library, kept = plan.asked.wanted.library, list[ImputationModel]()
    if library == MEDIAN_LIBRARY:
        library = median_library(plan.source, bring)
    made = in_a_stream(model, plan.source, plan.over, bring, code_C, there_G)
    keep = not plan.asked.of_a_file

    def blocks() -> Iterator[Block]:
        for start, own, chunk in made:
            if keep:
                kept.append(own)
            yield Block(start, own, slice(0, len(own)), chunk)

    return Ready(model, columns, library, blocks(), kept)
