"""A step of a head reads the device once, as a step of pre-training does."""

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from device_traffic import DeviceTraffic, as_if_on_a_device, emptied_to, fake_cuda, moved_to

import genemodel as gm
from genemodel.finetuning.head_run import HeadRun
from genemodel.finetuning.training_cells import TrainingCells
from genemodel.imputation.network import (
    DecoderSettings,
    ImputationHead,
    SparseCountEncoder,
)
from genemodel.imputation.training import train_decoder
from genemodel.integration.head import IntegrationHead, IntegrationSettings
from genemodel.integration.training import train_integration
from genemodel.model.count_encoder import CountEncoder, CountsBesideBackbone
from genemodel.train.loop import Loop
from genemodel.train.settings import TrainerSettings


@pytest.fixture
def waits(monkeypatch):
    """Reads of the device, a list for each step."""
    gradient_itself, apply_itself = Loop._gradient, Loop._apply
    found = []

    def gradient(loop, *args, **options):
        with as_if_on_a_device(), DeviceTraffic("cpu") as traffic:
            report = gradient_itself(loop, *args, **options)
        found.append(list(traffic.waits))
        return report

    def apply(loop, *args):
        with as_if_on_a_device(), DeviceTraffic("cpu") as traffic:
            applied = apply_itself(loop, *args)
        found[-1] += traffic.waits
        return applied

    monkeypatch.setattr(Loop, "_gradient", gradient)
    monkeypatch.setattr(Loop, "_apply", apply)
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("task", ["integrate", "impute"])
def test_one_look_a_step(waits, task, accumulate):
    rng = np.random.default_rng(0)
    counts = sp.csr_matrix(rng.poisson(0.8, (60, 30)).astype(np.float32))
    batch_C = np.arange(60) % 2
    where = HeadRun(device="cpu", trainer=TrainerSettings(accumulate=accumulate))
    if task == "integrate":
        cells = TrainingCells.held(counts, batch_C, label_C=np.arange(60) % 3)
        settings = IntegrationSettings(
            steps=4, passes=0, hidden=8, rank=4, latent=3, batch_cells=20, correct=False
        )
        train_integration(cells, settings=settings, where=where)
    else:
        cells = TrainingCells.held(counts, batch_C)
        settings = DecoderSettings(hidden=8, latent=3, epochs=2, batch_cells=20)
        train_decoder(cells, settings, where=where)
    assert waits and [len(step) for step in waits] == [1] * len(waits), waits


@pytest.mark.parametrize("tune", ["frozen", "lora"])
def test_one_look_a_step_with_a_transformer_beneath(waits, random_bundle, tune):
    human = gm.synthetic(80, species=("human",), n_batches=2, n_genes=600, genes_per_cell=40)[
        "human"
    ]
    settings = DecoderSettings(hidden=8, latent=3, epochs=1, batch_cells=40)
    gm.impute(human, random_bundle, backbone=tune, settings=settings, device="cpu")
    assert waits and [len(step) for step in waits] == [1] * len(waits), waits


def parts_of(name, pack_random, away):
    """A micro-batch with a view of it, an encoder with a transformer beneath, and the head."""
    model, _ = away()
    gene_G = np.arange(5, 60)
    if name == "impute":
        encoder = SparseCountEncoder(gene_G, 203, DecoderSettings(hidden=8, latent=3), 32)
        share_G = np.full(len(gene_G), 1 / len(gene_G))
        head = ImputationHead(share_G, 2, DecoderSettings(hidden=8, latent=3), encoder.place_V)
    else:
        encoder = CountEncoder(
            gene_G, 203, hidden=8, dropout=0.1, n_features=32, feature_dropout=0.2
        )
        settings = IntegrationSettings(hidden=8, rank=4, latent=3)
        head = IntegrationHead(
            len(gene_G), 2, settings, place_V=encoder.place_V.clone(),
            label_N=np.arange(2000) % 3, n_labels=3,
        )  # fmt: skip
    batch = pack_random()
    batch = dataclasses.replace(batch, shown_count_N=(batch.full_count_N / 2).floor())
    return CountsBesideBackbone(encoder, model, torch.nn.Identity()), head, batch


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("task", ["integrate", "impute"])
def test_a_micro_batch_waits_for_nothing_on_cuda(pack_random, away, task, autocast):
    """Forward pass and losses, in full and in mixed precision, every branch for CUDA."""
    model, head, batch = parts_of(task, pack_random, away)
    with fake_cuda():
        model, head = moved_to(model, "cuda"), moved_to(head, "cuda")
        with DeviceTraffic("cuda") as traffic:
            prepared = head.prepare(emptied_to(batch, "cuda"))
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                parts = head(model, model(prepared.seen), prepared)
        assert all(part.total.device.type == "cuda" for part in parts.values())
        assert all(part.total.dtype == torch.float32 for part in parts.values())
    assert traffic.waits == []


@pytest.mark.parametrize("task", ["integrate", "impute"])
def test_mixed_precision_gives_nearly_the_same_losses(pack_random, away, task):
    """On a CPU, where bf16 is tried as well: within two per cent."""
    found = []
    for half in (False, True):
        torch.manual_seed(0)
        model, head, batch = parts_of(task, pack_random, away)
        torch.manual_seed(1)
        prepared = head.prepare(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            parts = head(model, model(prepared.seen), prepared)
        sum(part.total for part in parts.values()).backward()
        assert all(torch.isfinite(w.grad).all() for w in head.parameters() if w.grad is not None)
        found.append([float(part.total.detach()) for part in parts.values()])
    assert found[1] == pytest.approx(found[0], rel=0.02)
