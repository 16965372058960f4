"""The packing plan: every cell once, within budget, full."""

import numpy as np
import pytest

from genemodel.batches.loader import CellStream
from genemodel.batches.packing import places_for, plan_bins, tail_pieces
from genemodel.batches.tokens import TokenSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import ConfigError
from genemodel.genes.vocabulary import PAD


@pytest.mark.parametrize("seed", range(3))
def test_every_cell_is_in_exactly_one_bin_within_budget(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 2048, 777)
    bins = plan_bins(lengths, 4096, 64)
    assert sorted(np.concatenate(bins).tolist()) == list(range(777))
    assert max(lengths[b].sum() for b in bins) <= 4096
    assert max(len(b) for b in bins) <= 64


def test_fill_is_at_least_099_at_16k_tokens():
    lengths = np.clip(np.random.default_rng(0).lognormal(7.0, 0.55, 8192), 50, 2048).astype(int)
    bins = plan_bins(lengths, 16_384, 512)
    fill = lengths.sum() / (len(bins) * 16_384)
    assert fill >= 0.99


def test_cells_stay_near_their_place():
    lengths = np.random.default_rng(0).integers(500, 1500, 5000)
    order = np.concatenate(plan_bins(lengths, 16_384, 512))
    assert np.abs(order - np.arange(5000)).max() < 1000


def test_the_cell_limit_binds_for_tiny_cells():
    assert [len(b) for b in plan_bins(np.full(10, 2), 1000, 4)] == [4, 4, 2]


def test_no_cells_no_bins():
    assert plan_bins(np.array([], int), 100, 4) == []


def test_bins_without_room_for_a_cell_are_refused():
    with pytest.raises(AssertionError, match="bins of -3 cells"):
        plan_bins(np.array([4, 5]), 100, -3)


def test_the_tail_is_cut_into_pieces_no_longer_than_a_cell_may_be(pack_random):
    for cells, budget in (([0, 1, 2, 3], 256), ([1], 1000), ([2], 400), ([0, 1, 2], 140)):
        batch = pack_random(cells=cells, budget=budget, context=64)
        starts = batch.starts_C1.numpy()
        lengths = np.diff(starts)
        assert starts[0] == 0 and starts[-1] == budget
        assert (
            lengths[: len(cells)].tolist() == batch.length_C.tolist() == batch.lengths_C().tolist()
        )
        assert batch.length_C.sum() == batch.n_tokens and batch.n_cells == len(cells)
        tail = lengths[len(cells) :]
        assert tail.max() <= 64 == batch.longest
        assert tail.sum() == budget - batch.n_tokens
        assert (tail[tail > 0][:-1] == 64).all()
        expected = np.repeat(np.arange(lengths.size), lengths)
        assert np.array_equal(batch.segment_T.numpy(), expected)
        assert (batch.gene_T[batch.n_tokens :] == PAD).all()


def test_lengths_stay_on_the_host(pack_random):
    moved = pack_random().to("meta")
    assert moved.gene_T.device.type == "meta"
    assert moved.lengths_C().tolist() == [41, 8, 91, 24]


@pytest.mark.parametrize("mean", [2.0, 40.0, 300.0, 1276.0, 1950.0, 2048.0])
@pytest.mark.parametrize("budget", [2048, 16_384, 65_536])
def test_chosen_places_do_not_cost_fill(budget, mean):
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean), 0.4, 8192), 2, 2048).astype(int)
    settings = TokenSettings(2048, budget).placed(lengths.mean())
    assert settings.places == places_for(budget, 2048, lengths.mean())
    assert 2 * budget / lengths.mean() <= settings.places or settings.places == 8
    wide, narrow = (plan_bins(lengths, budget, n) for n in (10**9, settings.max_cells))
    assert len(narrow) <= 1.02 * len(wide) + 1
    # The longest tail there can be still finds its places.
    for b in narrow:
        assert len(b) + tail_pieces(budget - lengths[b].sum(), 2048) <= settings.places


def test_places_that_do_not_hold_the_tail_are_refused():
    with pytest.raises(ConfigError, match=r"tokens\.places is 8.*may need 9"):
        TokenSettings(2048, 16_384, 8)
    assert TokenSettings(2048, 16_384, 9).max_cells == 1
    assert TokenSettings(2048, 16_384, 9).placed(100.0).places == 9


def test_a_stream_has_the_same_places_for_training_and_held_out_cells(tiny_corpus):
    corpus = Corpus.open(tiny_corpus)
    inverse = np.ones(len(corpus.vocabulary), np.float32)
    found = set()
    for cells in (np.arange(len(corpus)), np.arange(40)):
        stream = CellStream(
            corpus, cells, TokenSettings(64, 512), seed=0, inverse_median_V=inverse, endless=False
        )
        found |= {batch.species_C.shape[0] for batch, _ in stream}
    mean = np.minimum(corpus.n_genes_C + 1, 64).mean()
    assert found == {places_for(512, 64, mean)}
