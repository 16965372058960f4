"""What an integration learns, from what."""

import numpy as np
import pytest
import torch
from scipy import sparse

from genemodel.expression.variable_genes import select_genes
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.integration.head import IntegrationHead, IntegrationSettings
from genemodel.integration.training import train_integration
from genemodel.model.count_encoder import CountEncoder


def random_counts(n=60, genes=30, seed=0):
    rng = np.random.default_rng(seed)
    return sparse.csr_matrix(rng.poisson(0.8, (n, genes)).astype(np.float32))


def train(counts, batch, *, labels=None, **options):
    cells = TrainingCells.held(counts, batch, label_C=labels)
    return train_integration(cells, where=HeadRun(device="cpu"), **options)


def test_cell_vectors_are_standardised_and_missing_ones_are_neutral():
    counts, batch = random_counts(), np.arange(60) % 2
    vectors = np.random.default_rng(0).normal(5, 3, (60, 4)).astype(np.float32)
    vectors[7] = np.nan
    settings = IntegrationSettings(steps=3, passes=0, hidden=8, rank=4, latent=3)
    trained = train(counts, batch, vectors_NF=vectors, settings=settings)
    known = np.delete(vectors, 7, 0)
    np.testing.assert_allclose(trained.net.encoder.beside.mean_F, known.mean(0), rtol=1e-5)
    assert np.isfinite(trained.embedding_CD).all()
    assert len(trained.history) == 3
    assert list(trained.history) == ["step", "kl", "nats_per_count"]


def test_passes_raise_the_number_of_steps():
    counts, batch = random_counts(), np.arange(60) % 2
    settings = IntegrationSettings(
        steps=2, passes=3, batch_cells=10, hidden=8, rank=4, latent=3, correct=False
    )
    trained = train(counts, batch, settings=settings)
    assert trained.steps == 18 and trained.history["step"].iloc[-1] == 18
    assert trained.correction is None
    np.testing.assert_array_equal(trained.embedding_CD, trained.latent_CD)


def test_above_full_passes_more_cells_take_no_more_steps():
    settings = IntegrationSettings(steps=1, passes=20, full_passes=1000)
    assert settings.steps_over(500, 100) == 100
    assert settings.steps_over(1000, 100) == settings.steps_over(10**6, 100) == 200
    trained = train(
        random_counts(), np.arange(60) % 2,
        settings=IntegrationSettings(
            steps=2, passes=3, full_passes=20, batch_cells=10, hidden=8, rank=4, latent=3,
            correct=False, few_cells=0,
        ),
    )  # fmt: skip
    assert trained.steps == 6


SMALL = {"passes": 0, "few_cells": 0, "hidden": 16, "rank": 4, "latent": 4, "correct": False}


def late(trained, name):
    return float(trained.history[name].tail(10).mean())


def test_the_weight_of_the_divergence_pulls_the_latent_to_the_prior():
    counts, batch = random_counts(120), np.arange(120) % 2
    free, held = (
        train(counts, batch, settings=IntegrationSettings(steps=150, kl_weight=weight, **SMALL))
        for weight in (0.0, 2.0)
    )
    assert late(held, "kl") < 0.2 * late(free, "kl")


@pytest.mark.parametrize("keep_min", [1.0, 0.1])
def test_the_whole_counts_are_explained_however_few_are_shown(keep_min):
    """At its start the decoder says each gene's mean share, whatever the encoder was shown."""
    counts, batch = random_counts(120), np.arange(120) % 2
    settings = IntegrationSettings(
        steps=3, batch_cells=120, peak_rate=1e-9, keep_min=keep_min, **SMALL
    )
    found = train(counts, batch, settings=settings).history["nats_per_count"][0]
    whole = torch.from_numpy(counts.toarray())
    share = (whole / whole.sum(1, keepdim=True)).mean(0)
    size = torch.full((30,), 0.7).exp()
    mean = share * whole.sum(1, keepdim=True)
    exact = torch.distributions.NegativeBinomial(size, logits=(mean / size).log())
    nats = -exact.log_prob(whole).sum() / whole.sum()
    assert found == pytest.approx(float(nats), rel=0.01)


def test_what_is_shown_of_the_counts_changes_no_gradient_and_is_in_units(monkeypatch):
    """Nats a count, complete: the trained loss per cell lacks a constant and may be negative."""
    counts, batch = random_counts(120), np.arange(120) % 2
    settings = IntegrationSettings(steps=12, batch_cells=40, **SMALL)
    shown = train(counts, batch, settings=settings)
    assert list(shown.history.columns) == ["step", "kl", "nats_per_count"]
    assert (shown.history["nats_per_count"] > 0).all()
    weights_at, prepare, forward = (
        getattr(IntegrationHead, name) for name in ("weights_at", "prepare", "forward")
    )
    unit = IntegrationHead.READ
    monkeypatch.setattr(IntegrationHead, "silent", ())

    def without(values):
        return {name: value for name, value in values.items() if name != unit}

    def prepared_without(self, *args, **more):
        made = prepare(self, *args, **more)
        made.items = without(made.items)
        return made

    def forward_without(self, model, encoded, prepared, **more):
        prepared.items = {**prepared.items, unit: torch.ones(())}
        return without(forward(self, model, encoded, prepared, **more))

    monkeypatch.setattr(IntegrationHead, "weights_at", lambda s, x: without(weights_at(s, x)))
    monkeypatch.setattr(IntegrationHead, "prepare", prepared_without)
    monkeypatch.setattr(IntegrationHead, "forward", forward_without)
    plain = train(counts, batch, settings=settings)
    assert list(plain.history.columns) == ["step", "counts", "kl"]
    for name, weight in plain.net.state_dict().items():
        torch.testing.assert_close(shown.net.state_dict()[name], weight, rtol=0, atol=0)


def test_labels_are_learnt_from_the_vector_of_the_same_cell():
    """Counts say nothing about the labels; each cell's own vector says all."""
    rng = np.random.default_rng(0)
    counts, batch, label = random_counts(120), np.arange(120) % 2, rng.integers(0, 3, 120)
    vectors = np.eye(3, dtype=np.float32)[label]
    settings = IntegrationSettings(
        steps=150, batch_cells=60, dropout=0.0, feature_dropout=0.0, **SMALL
    )
    trained = train(counts, batch, labels=label, vectors_NF=vectors, settings=settings)
    assert late(trained, "label") < 0.5
    with torch.no_grad():
        logits = trained.net.head.to_label(torch.from_numpy(trained.latent_CD))
    assert (logits.argmax(1).numpy() == label).mean() > 0.95
    without = train(counts, batch, labels=label, settings=settings)
    assert late(without, "label") > 0.7


def test_vectors_are_hidden_from_the_share_of_cells_that_is_asked_for(monkeypatch):
    counts, batch = random_counts(), np.arange(60) % 2
    vectors = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    seen, read_itself = [], CountEncoder.read

    def read(net, counts_CG, features_CF=None, measured_G=None):
        if net.training:
            seen.append(features_CF.isnan().all(1).float().mean().item())
        return read_itself(net, counts_CG, features_CF, measured_G)

    monkeypatch.setattr(CountEncoder, "read", read)
    for share in (0.0, 0.5):
        seen.clear()
        settings = IntegrationSettings(steps=20, feature_dropout=share, **SMALL)
        train(counts, batch, vectors_NF=vectors, settings=settings)
        assert np.mean(seen) == pytest.approx(share, abs=0.06 if share else 0.0)


def test_the_decoder_is_told_the_batch_in_training():
    """A gene that one batch alone has ends in that batch's offsets."""
    counts = random_counts(120).toarray()
    batch = np.arange(120) % 2
    counts[:, 0] = 6 * batch
    settings = IntegrationSettings(steps=80, batch_cells=60, **SMALL)
    head: IntegrationHead = train(sparse.csr_matrix(counts), batch, settings=settings).net.head
    with torch.no_grad():
        told = [head.log_share(torch.zeros(1, 4), torch.tensor([b]))[0].exp() for b in (0, 1)]
    at = int(np.flatnonzero(select_genes(sparse.csr_matrix(counts), batch, 30) == 0)[0])
    assert told[1][at] > 3 * told[0][at]
