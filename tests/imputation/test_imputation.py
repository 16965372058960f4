"""The decoder: its loss against autograd, what it learns, what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from genemodel.errors import ConfigError, DataError
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.imputation.network import (
    Decoder,
    DecoderSettings,
    ImputationHead,
    decode_fraction,
)
from genemodel.imputation.training import train_decoder


def train(counts, batch=None, settings=None, *, seed=0):
    batch = np.zeros(counts.shape[0], int) if batch is None else batch
    cells = TrainingCells.held(counts, batch, seed=seed)
    return train_decoder(cells, settings, where=HeadRun(device="cpu"), seed=seed)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def two_groups(rng, n=240, g=60):
    """Counts of two groups of cells with unlike profiles, and their true shares."""
    share = rng.dirichlet(np.full(g, 2.0), 2)[np.arange(n) % 2]
    return sp.csr_matrix(rng.poisson(share * 150.0)).astype(np.float32), share


QUICK = DecoderSettings(hidden=16, latent=4, epochs=10, batch_cells=32, learning_rate=1e-2)


def test_the_decoder_finds_the_groups(rng):
    counts, share = two_groups(rng)
    trained = train(counts, settings=QUICK)
    found = decode_fraction(trained.decoder, counts, np.zeros(240, int))
    np.testing.assert_allclose(found.sum(1), 1.0, rtol=1e-4)
    raw = counts.toarray() / counts.sum(1)
    assert np.abs(found - share).mean() < 0.5 * np.abs(share.mean(0) - share).mean()
    assert np.abs(found - share).mean() < 0.7 * np.abs(np.asarray(raw) - share).mean()
    assert [epoch for epoch, _ in trained.history] == [5, 10]
    assert trained.heldout_nats == min(nats for _, nats in trained.history)
    assert abs(trained.coverage.overall - 0.9) < 0.02
    assert sum(n for _, _, n in trained.coverage.by_mean) == counts.shape[0] * counts.shape[1]
    assert np.median(trained.dispersion_G) < 0.1  # nothing but Poisson noise around the profiles


def test_the_seed_decides_and_the_callers_randomness_is_left_alone(rng):
    counts, _ = two_groups(rng, n=60, g=30)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (
        train(counts, settings=replace(QUICK, epochs=1), seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(3), expected)
    np.testing.assert_array_equal(first.dispersion_G, again.dispersion_G)
    assert first.heldout_nats == again.heldout_nats != other.heldout_nats


def test_unknown_batch_is_the_mean_of_the_offsets(rng):
    head = Decoder.new(7, 2, QUICK).head
    with torch.no_grad():
        head.offset_BD.normal_(generator=torch.Generator().manual_seed(0))
    latent, code = torch.randn(1, 4), torch.tensor([-1])
    mean = latent + head.offset_BD.mean(0)
    expected = torch.log_softmax(head.bias_G + mean @ head.gene_GD.T, 1)
    torch.testing.assert_close(head.log_fraction(latent, code), expected)


def test_the_offset_holds_a_part_of_the_batch_effect(rng):
    # Only a part: the encoder is not told the batch, sees its effect and may carry it as well.
    share = rng.dirichlet(np.full(40, 2.0), 2)
    batch = np.arange(200) % 2
    counts = sp.csr_matrix(rng.poisson(share[batch] * 200.0)).astype(np.float32)
    trained = train(counts, batch, settings=QUICK)
    own = decode_fraction(trained.decoder, counts, batch)
    swapped = decode_fraction(trained.decoder, counts, 1 - batch)
    assert np.abs(own - share[batch]).mean() < 0.6 * np.abs(swapped - share[batch]).mean()


def test_passes_fall_with_the_number_of_cells():
    settings = DecoderSettings()
    assert [settings.passes(n) for n in (10, 50_000, 100_000, 10**9)] == [40, 40, 20, 1]


def test_calibration_on_a_sample_of_the_cells_agrees(rng):
    counts, _ = two_groups(rng)
    whole = train(counts, settings=QUICK)
    some = train(counts, settings=replace(QUICK, calibration_cells=120))
    assert whole.heldout_nats == some.heldout_nats
    entries = sum(n for _, _, n in some.coverage.by_mean)
    assert entries == 120 * counts.shape[1]
    ratio = np.log(some.dispersion_G / whole.dispersion_G)
    assert 0 < np.abs(ratio).mean() < 1.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"thin_low": 0.9, "thin_high": 0.3}, "low before high"),
        ({"calibration_fraction": 0.7}, "between 0 and 0.5"),
        ({"epochs": 0}, "epochs=0: must be 1 or more"),
        ({"latent": 0}, "latent=0: must be 1 or more"),
        ({"dropout": 1.5}, "dropout=1.5: must be between 0 and 1"),
        ({"patience": -1}, "patience=-1: must not be negative"),
        ({"learning_rate": 0.0}, "learning_rate=0.0: must be above 0"),
    ],
)
def test_impossible_settings_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        DecoderSettings(**change)


def test_genes_without_counts_are_refused(rng):
    counts, _ = two_groups(rng, n=30)
    empty = sp.csr_matrix(counts.toarray() * (np.arange(60) > 0))
    with pytest.raises(DataError, match="without any count"):
        train(empty, settings=QUICK)


def test_the_weights_that_are_used_are_a_running_mean(rng):
    counts, _ = two_groups(rng, n=60, g=30)
    one_step = replace(QUICK, epochs=1, batch_cells=60, dropout=0.0, learning_rate=1.0)

    def weights(**change):
        return train(counts, settings=replace(one_step, **change)).decoder.head.gene_GD.detach()

    start = weights(learning_rate=1e-30)
    last, mean = weights(average_decay=0.0), weights()
    # After one step the decay is 2 ÷ 11, far below its largest.
    torch.testing.assert_close(mean, start + (last - start) * 9 / 11, rtol=1e-4, atol=1e-6)
    assert (last - start).abs().max() > 1e-4


def test_training_predicts_the_molecules_that_were_not_shown(rng, monkeypatch):
    """Shown and other molecules add up to those of the cell, in steps and in checks."""
    counts, _ = two_groups(rng, n=60, g=30)
    seen, prepare_itself = [], ImputationHead.prepare

    def dense(batch, count_N):
        out = np.zeros((60, 30))
        out[batch.cell_C[batch.full_cell_N].numpy(), batch.full_gene_N.numpy()] = count_N.numpy()
        return out

    def prepare(head, batch, **options):
        prepared = prepare_itself(head, batch, **options)
        told = dense(batch, batch.shown_N), dense(batch, prepared.count_N)
        seen.append((head.training, *told))
        return prepared

    monkeypatch.setattr(ImputationHead, "prepare", prepare)
    settings = replace(QUICK, epochs=2, batch_cells=60, calibration_fraction=0.2, check_every=2)
    train(counts, settings=settings)
    whole = counts.toarray()
    (_, first, other), (_, second, _) = [step for step in seen if step[0]]
    ((_, judged, aside),) = [look for look in seen if not look[0]]
    # In steps those set aside are not there at all; in a look they are what is predicted.
    np.testing.assert_array_equal(judged + aside, whole)
    np.testing.assert_array_equal(first + other, judged)
    assert aside.sum() / whole.sum() == pytest.approx(0.2, abs=0.03)
    share = first.sum(1) / judged.sum(1)
    assert share.min() > 0.1 and share.max() < 1 and share.std() > 0.1  # drawn per cell
    assert (first != second).any()  # and anew in every pass


def test_the_best_check_is_kept_and_patience_counts_from_it(rng, monkeypatch):
    """The look is told; the model released is that of the best, and the training ends after it."""
    from genemodel.train.loop import Loop

    counts, _ = two_groups(rng, n=60, g=30)
    told, seen = [3.0, 1.0, 2.0, 1.5, 1.2, 0.5], []

    def means(loop, rows):
        head = loop.losses.objectives
        seen.append(head.gene_GD.detach().clone())
        name = f"val/{ImputationHead.LOSS}"
        nats = told[len(seen) - 1]
        return {
            name: nats, f"val_trivial/{ImputationHead.LOSS}": 1.0, "val/total": nats, "step": 0.0
        }  # fmt: skip

    monkeypatch.setattr(Loop, "_means", means)
    settings = replace(QUICK, epochs=6, check_every=1, patience=2)
    trained = train(counts, settings=settings)
    assert [found for _, found in trained.history] == told[:5] and trained.heldout_nats == 1.0
    torch.testing.assert_close(trained.decoder.head.gene_GD.detach(), seen[1], rtol=0, atol=0)
    assert not torch.equal(seen[1], seen[4])


def test_the_mean_of_all_batches_is_that_of_their_cells():
    """A batch of one cell must not move every cell as much as one of hundreds."""
    batch = np.repeat([0, 1, 2], [60, 39, 1])
    counts = sp.csr_matrix(np.random.default_rng(0).poisson(2.0, (100, 30))).astype(np.float32)
    share_B = TrainingCells.held(counts, batch).share_B
    torch.testing.assert_close(share_B, torch.tensor([0.6, 0.39, 0.01]))
    head = ImputationHead(np.full(30, 1 / 30), 3, DecoderSettings(latent=4), share_B=share_B)
    with torch.no_grad():
        head.offset_BD.copy_(torch.arange(12.0).reshape(3, 4))
        head.offset_BD[2] = 1000.0
        shifted = head.shifted(torch.zeros(2, 4), torch.tensor([-1, 1]))
    torch.testing.assert_close(shifted[0], share_B @ head.offset_BD.detach())
    torch.testing.assert_close(shifted[1], head.offset_BD[1].detach())
    trained = train(counts, batch, replace(QUICK, epochs=1))
    torch.testing.assert_close(trained.decoder.head.share_B, share_B)
    # Saved without shares, all batches weigh the same, as they did then.
    before = head.state_dict()
    del before["share_B"]
    again = ImputationHead(np.full(30, 1 / 30), 3, DecoderSettings(latent=4), share_B=share_B)
    again.load_state_dict(before)
    torch.testing.assert_close(again.share_B, torch.full((3,), 1 / 3))
