"""A step of a head reads the device once, as a step of pre-training does."""

import numpy as np
import pytest
import scipy.sparse as sp
from device_traffic import DeviceTraffic, as_if_on_a_device

import genemodel as gm
from genemodel.adapt.head_run import HeadRun
from genemodel.adapt.imputation import DecoderSettings, train_decoder
from genemodel.adapt.integration import train_integration
from genemodel.adapt.integration_head import IntegrationSettings
from genemodel.adapt.training_cells import TrainingCells
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
