"""Cells through a model: order, pieces where memory runs out, few shapes."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import genemodel as gm
from genemodel.annotation.annotate import annotate
from genemodel.batches.tokens import TokenSettings
from genemodel.cells.input_settings import InputSettings
from genemodel.corpus.statistics import GeneStatistics
from genemodel.errors import ConfigError
from genemodel.heads.decode_counts import CountDecoder
from genemodel.imputation.impute_genes import Unmeasured
from genemodel.inference import forward as module
from genemodel.inference.cell_vectors import embedder, embedding_of
from genemodel.inference.counts import SHARD_CELLS, VocabularyCells
from genemodel.inference.forward import Forward, compiles, places
from genemodel.inference.gene_counts import read_counts
from genemodel.model.devices import is_out_of_memory
from genemodel.simulation.cells import synthetic


@pytest.fixture(scope="module")
def human():
    return synthetic(160, species=("human",), n_genes=800, genes_per_cell=150, seed=3)["human"]


@pytest.fixture
def scarce(monkeypatch):
    """Make ``scarce(tokens)``: from then on a batch of more tokens or ``cells`` finds no memory.

    Returns the tokens of every batch that was tried.
    """

    def make(tokens, cells=10**9, error=None):
        error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        tried = []
        real = Forward._run

        def run(self, job, batch):
            tried.append(batch.gene_T.shape[0])
            if batch.gene_T.shape[0] > tokens or batch.n_cells > cells:
                raise error
            return real(self, job, batch)

        monkeypatch.setattr(Forward, "_run", run)
        return tried

    return make


def vectors(adata, model, **options):
    adata = adata.copy()
    gm.embed(adata, model, **options)
    return adata.obsm["X_genemodel"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["cuda", "host", "torch-cpu", "cublas"],
)
def test_when_memory_runs_out_batches_shrink_and_vectors_do_not_change(
    random_bundle, human, scarce, caplog, error
):
    assert is_out_of_memory(error) and not is_out_of_memory(RuntimeError("shape mismatch"))
    whole = vectors(human, random_bundle)
    tried = scarce(300, error=error)
    with caplog.at_level(logging.WARNING, logger="genemodel"):
        np.testing.assert_array_equal(vectors(human, random_bundle), whole)
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert said == [
        "cpu is out of memory with batches of 1,024 tokens: from here on at most 256 tokens and 8 "
        "cells go at once, which changes no result."
    ]
    # Remembered: 1,024 and 512 fail once, though batches of 1,024 were packed ahead already.
    assert [n for n in tried if n > 300] == [1024, 512]


def test_a_shrunk_batch_is_remembered_over_chunks(random_bundle, human, scarce):
    cells = VocabularyCells(human, random_bundle)
    tried = scarce(600)
    forward = embedder(random_bundle)
    first = [values for _, values in forward.over(cells.chunks(50))]
    again = [values for _, values in forward.over(cells.chunks(50))]
    assert [n for n in tried if n > 600] == [1024]
    np.testing.assert_array_equal(np.concatenate(first), np.concatenate(again))


def test_a_single_cell_that_does_not_fit_is_refused_with_the_way_out(random_bundle, human, scarce):
    scarce(100)
    with pytest.raises(ConfigError, match=r"cpu is out of memory with a single cell of 128 tokens"):
        gm.embed(human, random_bundle)


def test_other_errors_are_not_taken_for_a_lack_of_memory(random_bundle, human, scarce):
    tried = scarce(10, error=RuntimeError("expected scalar type Float but found BFloat16"))
    with pytest.raises(RuntimeError, match="scalar type"):
        gm.embed(human, random_bundle)
    assert len(tried) == 1


def test_every_way_through_the_backbone_shrinks(random_bundle, human, scarce):
    """Labels and cell vectors for integration go through the same pass."""
    human = human.copy()
    human.obs["type"] = np.where(np.arange(len(human)) % 2, "a", "b")
    query = human[:40].copy()

    def results():
        labelled = query.copy()
        annotate(labelled, human, random_bundle, label_key="type", k=5)
        features = read_counts(
            human, bundle=random_bundle, vocabulary=None, reading=InputSettings()
        ).features_CF
        return labelled.obs["genemodel_label"].tolist(), features

    labels, features = results()
    tried = scarce(256)
    labels_then, features_then = results()
    assert max(tried) > 256
    assert labels == labels_then
    np.testing.assert_array_equal(features, features_then)


def test_rates_of_unmeasured_genes_shrink_by_cells(random_bundle, human, scarce):
    """What takes memory there is cells × vocabulary, however short the cells are."""
    n = len(random_bundle.vocabulary)
    torch.manual_seed(1)
    decoder = CountDecoder(
        16, GeneStatistics.empty(2, n), 1, torch.zeros(1, n, dtype=torch.bool)
    )  # fmt: skip
    with torch.no_grad():
        decoder.projection.project.weight.normal_(std=0.3)
        decoder.gene.weight.normal_()
    heads = {f"decode_counts.{k}": v.clone() for k, v in decoder.state_dict().items()}
    bundle = replace(random_bundle, heads=heads, tokens=TokenSettings(128, 8192))
    human_tokens = bundle.vocabulary.tokens_of("human")[[5, 700]]
    unmeasured = Unmeasured(VocabularyCells(human, bundle), human_tokens)
    chunk = next(unmeasured.cells.chunks())
    whole = unmeasured.mean(chunk)
    assert np.isfinite(whole).all() and np.ptp(whole, axis=0).min() > 0
    tried = scarce(10**9, cells=9)
    np.testing.assert_array_equal(unmeasured.mean(chunk), whole)
    assert len(tried) >= 160 / 9
    before = len(tried)
    unmeasured.mean(chunk)  # remembered: no more tries than batches
    assert len(tried) - before == 160 / 8


def test_chunks_come_back_whole_in_order_and_count_every_cell(random_bundle, human):
    human = human.copy()
    counts = human.X.tolil()
    counts[[3, *range(40, 60)]] = 0  # a whole chunk without any gene among them
    human.X = counts.tocsr()
    cells = VocabularyCells(human, random_bundle)
    done = []
    found = list(embedder(random_bundle).over(cells.chunks(20), done.append))
    assert [chunk.start for chunk, _ in found] == list(range(0, 160, 20))
    assert sum(done) == 160
    empty = np.isnan(np.concatenate([values for _, values in found])).all(1)
    assert np.flatnonzero(empty).tolist() == [3, *range(40, 60)]


def test_no_chunk_crosses_a_border_between_shards(random_bundle, human, monkeypatch):
    from genemodel.inference import counts

    assert SHARD_CELLS % counts.CHUNK_CELLS == 0
    monkeypatch.setattr(counts, "SHARD_CELLS", 48)
    cells = VocabularyCells(human, random_bundle)
    starts = [chunk.start for chunk in cells.chunks(20)]
    assert starts == [0, 20, 40, 48, 68, 88, 96, 116, 136, 144]
    assert [chunk.start for chunk in cells.chunks(20, start=50, stop=99)] == [50, 70, 90, 96]


def test_reading_that_fails_is_not_swallowed(random_bundle):
    def chunks():
        raise OSError("gone")
        yield

    with pytest.raises(OSError, match="gone"):
        list(embedder(random_bundle).over(chunks()))


def test_few_shapes_whatever_the_cells(random_bundle, human, monkeypatch):
    """Cells sorted by length fill 4 to 40 places a batch here: one graph a rung of the ladder."""
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda m, **o: real(m, backend=counter, **o))
    human = human.copy()
    counts = human.X.tocsr()
    # From full cells down to cells of a few genes.
    for row in range(160):
        begin, end = counts.indptr[row : row + 2]
        counts.data[begin + max(3, int((end - begin) * (1 - row / 160))) : end] = 0
    human.X = counts
    bundle = replace(random_bundle, model=random_bundle.model)
    rooms = set()
    packed = Forward._pack

    def pack(self, job):
        batch = packed(self, job)
        rooms.add(batch.species_C.shape[0])
        return batch

    monkeypatch.setattr(Forward, "_pack", pack)
    whole = vectors(human, bundle)
    compiled = vectors(human, bundle, compile=True)
    torch._dynamo.reset()
    assert 2 <= counter.frame_count == len(rooms) <= 4
    np.testing.assert_allclose(compiled, whole, rtol=1e-5, atol=1e-6)


def test_places_double_from_eight_up_to_the_limit():
    assert [places(n, 512) for n in (1, 8, 9, 100, 512)] == [8, 8, 16, 128, 512]
    assert len({places(n, 512) for n in range(1, 513)}) == 7
    assert places(5, 5) == 5 and places(40, 50) == 50


def test_compiling_depends_on_all_cells_and_not_on_the_share_of_a_device():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert compiles("auto", gpu, module.COMPILE_FROM_CELLS)
    assert not compiles("auto", gpu, module.COMPILE_FROM_CELLS - 1)
    assert not compiles("auto", cpu, 10**9)
    assert compiles(True, cpu, 1) and not compiles(False, gpu, 10**9)


def test_the_embedding_is_the_slow_obvious_loop(random_bundle, human):
    """One cell a batch, on one thread, without anything ahead."""
    from genemodel.batches.loader import inverse_medians, pack
    from genemodel.inference.counts import window_of

    cells = VocabularyCells(human, random_bundle)
    chunk = next(cells.chunks())
    inverse_V = inverse_medians(random_bundle.medians_V)
    with torch.inference_mode():
        slow = [
            random_bundle.model(
                pack(window_of(chunk), np.array([row]), inverse_V, random_bundle.tokens)
            ).cell_CD[0]
            for row in range(160)
        ]
    np.testing.assert_allclose(
        embedding_of(cells, random_bundle), torch.stack(slow), rtol=1e-5, atol=1e-6
    )
