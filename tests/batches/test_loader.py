"""One global sequence of micro-batches, whoever reads it; every cell once an epoch."""

import errno
import os
import threading
from collections import Counter

import numpy as np
import pytest
import torch

from genemodel.batches.loader import CellStream, inverse_medians
from genemodel.batches.order import EpochOrder, Layout, Position
from genemodel.batches.packing import plan_bins
from genemodel.batches.tokens import TokenSettings
from genemodel.corpus.corpus import Corpus
from genemodel.errors import DataError

# Windows of 64 cells in four or five parts, so that a small corpus has many of them.
LANES = Layout(lanes=4, block=4, window_blocks=16, part_blocks=4)


@pytest.fixture(scope="module")
def corpus(make_cells, vocabulary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader") / "corpus"
    return Corpus.build(
        {"a": make_cells(500, seed=1), "b": make_cells(433, seed=2)}, folder,
        vocabulary=vocabulary, species="human", chunk_cells=200,
    )  # fmt: skip


def stream(corpus, *, cells=None, layout=LANES, **options):
    return CellStream(
        corpus, np.arange(len(corpus)) if cells is None else cells, TokenSettings(64, 512),
        **{"seed": 3, **options}, layout=layout,
        inverse_median_V=np.ones(len(corpus.vocabulary), np.float32),
    )  # fmt: skip


def take(found, n=None):
    """Cells, epoch and position of the next micro-batches."""
    batches = iter(found)
    taken = []
    while (n is None or len(taken) < n) and (item := next(batches, None)) is not None:
        batch, position = item
        taken.append((batch.cell_C[: batch.n_cells].tolist(), batch.epoch, position))
    batches.close()
    return taken


@pytest.fixture(scope="module")
def alone(corpus):
    """What one process takes: three epochs and a bit."""
    return take(stream(corpus), 240)


def cells_of(found):
    return [cells for cells, _, _ in found]


def test_the_sequence_is_what_its_description_says(corpus, alone):
    """Windows of all epochs to lanes in turn, each packed by itself; micro-batches in turn."""
    settings, n = TokenSettings(64, 512), len(corpus)
    lanes = [[] for _ in range(LANES.lanes)]
    n_windows = EpochOrder(n, 3, 0, layout=LANES).n_windows
    for number in range(4 * n_windows):
        epoch, window = divmod(number, n_windows)
        cells, _ = EpochOrder(n, 3, epoch, layout=LANES).cells(window)
        lengths = np.minimum(corpus.n_genes_C[cells], settings.context - 1) + 1
        bins = plan_bins(lengths, settings.budget, settings.max_cells)
        lanes[number % LANES.lanes] += [(cells[rows].tolist(), epoch) for rows in bins]
    for i, (cells, epoch, _) in enumerate(alone):
        assert (cells, epoch) == lanes[i % LANES.lanes][i // LANES.lanes]


def test_every_cell_is_taken_once_an_epoch(corpus, alone):
    seen = {}
    for cells, epoch, _ in alone:
        seen.setdefault(epoch, []).extend(cells)
    assert sorted(seen)[:2] == [0, 1]
    for epoch in (0, 1):
        assert sorted(seen[epoch]) == list(range(len(corpus)))


@pytest.mark.parametrize("seed", [0, 11])
@pytest.mark.parametrize("n_cells", [1, 63, 64, 257, 900])
@pytest.mark.parametrize("lanes", [1, 2, 8])
def test_every_cell_is_taken_once_whatever_the_number_of_lanes(corpus, seed, n_cells, lanes):
    cells = np.sort(np.random.default_rng(seed).permutation(len(corpus))[:n_cells])
    layout = Layout(lanes, block=4, window_blocks=16, part_blocks=4)
    epochs = Counter()
    # Lanes stand in different epochs for a while; the first is over when all have left it.
    for batch, position in stream(corpus, cells=cells, seed=seed, layout=layout):
        if batch.epoch == 0:
            epochs.update(batch.cell_C[: batch.n_cells].tolist())
        if all(epoch > 0 for epoch, _, _ in position.lanes):
            break
    assert epochs == Counter(cells.tolist())


@pytest.mark.parametrize("world", [2, 3, 4, 6, 8])
def test_the_global_sequence_does_not_depend_on_the_world_size(corpus, alone, world):
    n = 120 // world
    ranks = [take(stream(corpus, rank=r, world_size=world), n) for r in range(world)]
    for i in range(n * world):
        cells, epoch, position = ranks[i % world][i // world]
        assert (cells, epoch) == alone[i][:2]
        # All ranks of a round are told the end of the round, as one process tells it.
        assert position == alone[i // world * world + world - 1][2]


def test_a_position_is_valid_for_any_world_size(corpus, alone):
    position, taken = Position(), []
    for world, rounds in ((2, 9), (1, 13), (4, 7), (3, 11), (2, 5), (8, 2), (1, 20)):
        ranks = [
            take(stream(corpus, rank=r, world_size=world, position=position), rounds)
            for r in range(world)
        ]
        for i in range(rounds):
            taken += [ranks[r][i][0] for r in range(world)]
        (position,) = {ranks[r][-1][2] for r in range(world)}
        assert position.taken == len(taken)
    assert taken == cells_of(alone)[: len(taken)]


def test_a_stream_restarts_anywhere(corpus, alone):
    for k in (1, 2, 19, 20, 77, 160):
        assert take(stream(corpus, position=alone[k - 1][2]), 12) == alone[k : k + 12]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("layout", [Layout(), LANES])
def test_a_limit_counts_micro_batches_of_all_ranks(corpus, world, layout):
    wanted = cells_of(take(stream(corpus, layout=layout), 13))
    got = {}
    for rank in range(world):
        mine = take(stream(corpus, rank=rank, world_size=world, limit=13, layout=layout))
        assert len(mine) == len(range(rank, 13, world))
        got.update({rank + i * world: cells for i, (cells, _, _) in enumerate(mine)})
    assert [got[i] for i in range(13)] == wanted


def test_one_epoch_has_one_lane_and_ends(corpus):
    once = take(stream(corpus, layout=None, endless=False))
    assert sorted(c for cells in cells_of(once) for c in cells) == list(range(len(corpus)))
    assert once[-1][2] == Position(len(once), ((1, 0, 0),))
    short = take(stream(corpus, layout=None, endless=False, limit=10**6))
    assert short == once


def test_a_micro_batch_holds_the_counts_of_its_cells(corpus):
    """Also where it takes its cells from two parts."""
    found, parts = stream(corpus), []
    whole = CellStream.read_part
    found.read_part = lambda cells: parts.append(set(cells.tolist())) or whole(found, cells)
    joined = 0
    batches = iter(found)
    for _ in range(70):
        batch, _ = next(batches)
        cells = batch.cell_C[: batch.n_cells].tolist()
        joined += not any(set(cells) <= part for part in parts)
        for place, cell in enumerate(cells):
            block = corpus.read(cell, cell + 1)
            mine = batch.full_cell_N == place
            assert torch.equal(batch.full_gene_N[mine], torch.from_numpy(block.gene_N).long())
            np.testing.assert_array_equal(batch.full_count_N[mine].numpy(), block.count_N)
            assert float(batch.library_C[place]) == block.count_N.sum() == corpus.library_C[cell]
            assert int(batch.panel_C[place]) == corpus.source_C[cell]
    batches.close()
    assert joined > 5


def cells_read(corpus, monkeypatch, n, **options):
    read = []
    whole = CellStream.read_part
    monkeypatch.setattr(
        CellStream, "read_part", lambda s, cells: read.extend(cells.tolist()) or whole(s, cells)
    )
    taken = [cell for cells in cells_of(take(stream(corpus, **options), n)) for cell in cells]
    monkeypatch.undo()
    return read, taken


@pytest.mark.parametrize("world", [1, 2, 4, 8, 3])
def test_a_rank_reads_only_what_it_takes(corpus, monkeypatch, world):
    """The micro-batches of one round of windows, and nothing of other lanes or ranks."""
    for rank in range(min(world, 2)):
        read, taken = cells_read(corpus, monkeypatch, None, rank=rank, world_size=world, limit=40)
        assert sorted(read) == sorted(taken)


def test_a_restart_does_not_read_what_is_consumed(corpus, monkeypatch):
    position = take(stream(corpus), 30)[-1][2]
    read, taken = cells_read(corpus, monkeypatch, None, position=position, limit=12)
    assert sorted(read) == sorted(taken)


def test_a_position_of_other_cells_is_refused(corpus, alone):
    position = alone[40][2]
    with pytest.raises(DataError, match="of other cells"):
        stream(corpus, position=position, layout=Layout())
    with pytest.raises(DataError, match="of other cells"):
        stream(corpus, cells=np.arange(100), position=position)
    epoch, window, _ = position.lanes[0]
    beyond = Position(position.taken, ((epoch, window, 999), *position.lanes[1:]))
    with pytest.raises(DataError, match="micro-batch 999"):
        take(stream(corpus, position=beyond), 1)


def within(seconds, run):
    """Run in a thread, so that a hang is a failure; give what it raised."""
    raised = []

    def caught():
        try:
            run()
        except Exception as error:  # noqa: BLE001
            raised.append(error)

    thread = threading.Thread(target=caught, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), "hangs"
    return raised[0] if raised else None


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "unreadable"])
def test_damage_met_while_reading_reaches_whoever_iterates(
    make_cells, vocabulary, tmp_path, monkeypatch, damage
):
    Corpus.build(
        {"a": make_cells(200, seed=1), "b": make_cells(200, seed=2)}, tmp_path / "corpus",
        vocabulary=vocabulary, species="human",
    )  # fmt: skip
    opened = Corpus.open(tmp_path / "corpus")
    (shard,) = (opened.path / "cells.zarr" / opened.manifest.groups[1].name).glob("X/data/c/0")
    raw = bytearray(shard.read_bytes())
    match damage:
        case "flipped":
            raw[40] ^= 1
            shard.write_bytes(raw)
        case "cut":
            shard.write_bytes(raw[:-30])
        case "gone":
            shard.unlink()
        case "unreadable":
            pread = os.pread

            def broken(handle, size, offset):
                if os.fstat(handle).st_ino == shard.stat().st_ino:
                    raise OSError(errno.EIO, "Input/output error")
                return pread(handle, size, offset)

            monkeypatch.setattr(os, "pread", broken)
    error = within(60, lambda: take(stream(opened), 100))
    assert isinstance(error, DataError)
    assert f"{opened.manifest.groups[1].name}/X/data/c/0 is damaged" in str(error)
    assert not [
        t for t in threading.enumerate() if t.name.startswith(("genemodel-pack", "genemodel-read"))
    ]


def test_genes_are_ranked_by_their_counts_over_their_medians(corpus):
    """Which genes a cell keeps within its context is decided by the medians."""
    rng = np.random.default_rng(0)
    medians_V = rng.uniform(0.2, 5.0, len(corpus.vocabulary))
    medians_V[::7] = np.nan  # never seen: as if 1
    stream = CellStream(
        corpus, np.arange(40), TokenSettings(20, 512), seed=3, endless=False,
        inverse_median_V=inverse_medians(medians_V),
    )  # fmt: skip
    cut = 0
    for batch, _ in stream:
        for place in range(batch.n_cells):
            own = batch.full_cell_N == place
            gene, count = batch.full_gene_N[own].numpy(), batch.full_count_N[own].numpy()
            value = count / np.nan_to_num(medians_V, nan=1.0)[gene]
            expected = gene[np.lexsort((gene, -value.astype(np.float32)))][:19]
            a, b = int(batch.starts_C1[place]), int(batch.starts_C1[place + 1])
            assert batch.gene_T[a + 1 : b].tolist() == expected.tolist()
            cut += len(gene) > 19
    assert cut > 10
