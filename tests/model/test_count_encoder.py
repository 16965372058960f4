"""An encoder of counts: what it reads of a micro-batch is what it reads of a table."""

import numpy as np
import scipy.sparse as sp
import torch

from genemodel.batches.batch import sums_within
from genemodel.batches.held import HeldCells
from genemodel.batches.loader import CellStream
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.views import View
from genemodel.imputation.network import (
    Decoder,
    DecoderSettings,
    SparseCountEncoder,
)
from genemodel.model.count_encoder import CountEncoder

COUNTS = sp.csr_matrix(np.random.default_rng(0).poisson(0.7, (50, 30)).astype(np.float32))


def batch_of(view=None):
    cells = HeldCells(COUNTS, where="cells")
    stream = CellStream(
        cells, np.arange(50), TokenSettings(2, 100, 100), seed=0, endless=False, view=view,
        inverse_median_V=np.ones(30, np.float32), layout=cells.layout,
    )  # fmt: skip
    return next(iter(stream))[0]


def test_genes_are_taken_from_their_places():
    gene_G = np.array([3, 7, 11, 29])
    encoder = CountEncoder(gene_G, 30, hidden=8, dropout=0.0).eval()
    batch = batch_of()
    order = batch.cell_C[: batch.n_cells].numpy()
    table = torch.from_numpy(COUNTS[order][:, gene_G].toarray())
    torch.testing.assert_close(encoder(batch).cell_CD, encoder.read(table))


def test_only_what_is_shown_is_read():
    encoder = CountEncoder(np.arange(30), 30, hidden=8, dropout=0.0).eval()
    sparse = SparseCountEncoder(np.arange(30), 30, DecoderSettings(hidden=8, latent=4)).eval()
    batch = batch_of(View(0, 0.2, 0.6))
    shown = torch.zeros(batch.n_cells, 30)
    shown[batch.full_cell_N, batch.full_gene_N] = batch.shown_N
    assert (shown.sum() / batch.full_count_N.sum()) < 0.7
    torch.testing.assert_close(encoder(batch).cell_CD, encoder.read(shown))
    decoder = Decoder.new(30, 1, DecoderSettings(hidden=8, latent=4)).eval()
    decoder.encoder = sparse
    torch.testing.assert_close(
        sparse(batch).cell_CD, decoder.encode(sp.csr_matrix(shown.numpy())), rtol=1e-4, atol=1e-5
    )


def test_a_vector_that_is_not_there_is_neutral():
    encoder = CountEncoder(np.arange(30), 30, hidden=8, dropout=0.0, n_features=3).eval()
    encoder.beside.standardise(torch.tensor([[1.0, 2, 3], [3, 2, 1], [torch.nan, 0, 0]]))
    assert encoder.beside.mean_F.tolist() == [2, 2, 2]
    table = torch.from_numpy(COUNTS.toarray())
    absent = torch.full((50, 3), torch.nan)
    mean = encoder.beside.mean_F.expand(50, 3)
    torch.testing.assert_close(encoder.read(table, absent), encoder.read(table, mean))
    assert (encoder.read(table, mean + 1) - encoder.read(table, mean)).abs().max() > 1e-3


def test_sums_within_cells():
    cell_N = torch.tensor([0, 0, 1, 3, 3, 3])
    value_N = torch.tensor([1.0, 2, 4, 8, 16, 32])
    assert sums_within(value_N, cell_N, 5).tolist() == [3, 4, 0, 56, 0]
