"""Published sequences against a transcription of their papers, one cell and packed."""

import numpy as np
import pytest
import torch

from genemodel.batches.loader import pack, rank_scale
from genemodel.batches.published import pack_sequences, rank_values
from genemodel.batches.tokens import TokenSettings
from genemodel.batches.window import Window
from genemodel.genes.vocabulary import CELL, EOS


def transcribed(style, token_N, count_N, median_N, library):
    """Tokens and values of a cell in the published order, one gene at a time, in float64."""
    scored = []
    for t, x, m in zip(token_N, count_N, median_N, strict=True):
        published = np.log2(1.0 + float(x) / float(m))
        if style != "genecompass":
            published = float(x) / library * 10_000.0 / float(m)
        scored.append((-published, int(t)))
    return [t for _, t in sorted(scored)], np.array([-v for v, _ in sorted(scored)], np.float32)


@pytest.mark.parametrize("style", ["geneformer_v1", "geneformer_v2", "genecompass"])
def test_packed_cells_are_the_published_sequences_of_their_cells(style):
    rng = np.random.default_rng(4)
    size_C = np.array([50, 3, 0 if style != "geneformer_v1" else 1, 120, 90])
    gene_N = np.concatenate([np.sort(rng.choice(np.arange(4, 300), n, False)) for n in size_C])
    ends_C = np.cumsum(size_C)
    count_N = rng.geometric(0.3, gene_N.size).astype(np.float32)
    median_V = rng.uniform(0.5, 3.0, 300)
    median_V[::7] = np.nan
    total_C = rng.integers(500, 900, size_C.size).astype(np.float64)
    unknown = np.full(size_C.size, -1)
    window = Window(
        begin_C=ends_C - size_C, end_C=ends_C, gene_N=gene_N.astype(np.int32), count_N=count_N,
        library_C=total_C.astype(np.float32) - 10, species_C=np.zeros(size_C.size, np.int64),
        batch_C=unknown, panel_C=unknown, cell_C=np.arange(size_C.size), total_C=total_C,
    )  # fmt: skip
    settings = TokenSettings(context=64, budget=256, style=style)
    rows = np.array([3, 0, 1, 2, 4])
    assert window.lengths_C(settings).sum() <= 256
    batch = pack(window, rows, rank_scale(median_V, style), settings, max_cells=6)
    starts = batch.starts_C1.numpy()
    most = {"geneformer_v1": 64, "geneformer_v2": 62, "genecompass": 63}[style]
    for place, row in enumerate(rows):
        own = slice(window.begin_C[row], window.end_C[row])
        token, score = transcribed(
            style, gene_N[own], count_N[own], np.nan_to_num(median_V, nan=1.0)[gene_N[own]],
            total_C[row],
        )  # fmt: skip
        packed = batch.gene_T[starts[place] : starts[place + 1]].numpy()
        rank = batch.rank_T[starts[place] : starts[place + 1]].numpy()
        value = batch.value_T[starts[place] : starts[place + 1]].numpy()
        if style == "geneformer_v2":
            expected = [CELL, *token[:most], EOS]
            assert rank.tolist() == list(range(len(expected)))
        elif style == "geneformer_v1":
            expected = token[:most]
            assert rank.tolist() == list(range(len(expected)))
        else:
            expected = [CELL, *token[:most]]
            assert rank.tolist() == [0, *range(len(expected) - 1)]
            np.testing.assert_array_equal(value[1:], score[:most])
        assert packed.tolist() == expected
        assert batch.length_C[place] == len(expected) == window.lengths_C(settings)[row]
    assert (batch.gene_T[batch.n_tokens :] == 0).all() and starts[-1] == 256
    assert (np.diff(starts) <= 64).all()
    np.testing.assert_array_equal(
        batch.segment_T.numpy(), np.repeat(np.arange(starts.size - 1), np.diff(starts))
    )
    # The same cells as finished sequences are the same batch.
    ours = [batch.gene_T[a:b].numpy() for a, b in zip(starts[:5], starts[1:6], strict=True)]
    values = [batch.value_T[a:b].numpy() for a, b in zip(starts[:5], starts[1:6], strict=True)]
    again = pack_sequences(settings, ours, rows, values=values)
    for name in ("gene_T", "value_T", "rank_T"):
        assert torch.equal(getattr(again, name), getattr(batch, name)), name
    n = batch.n_tokens
    assert torch.equal(again.segment_T[:n], batch.segment_T[:n])
    np.testing.assert_array_equal(again.cell_C[:5].numpy(), batch.cell_C[:5].numpy())
    full = np.concatenate([gene_N[window.begin_C[r] : window.end_C[r]] for r in rows])
    np.testing.assert_array_equal(batch.full_gene_N.numpy(), full)


def test_the_whole_depth_of_a_cell_decides_ties_to_the_last_bit():
    """x/n·10⁴/median of two genes that are equal in real numbers and not in float64."""
    count, median = np.array([1.0, 3.0]), np.array([0.1, 0.3])
    orders = [
        np.lexsort(([9, 8], -rank_values("geneformer_v1", count, median, n)))
        for n in range(4, 2000)
    ]
    assert len({tuple(order) for order in orders}) == 2
