"""Heads on a device: the losses of a CPU, in full and in mixed precision."""

import numpy as np
import pytest

import genemodel as gm
from genemodel import DecoderSettings, IntegrationSettings
from genemodel.finetuning.head_run import HeadRun
from genemodel.integration.integrate import integrate_cells
from genemodel.model.tuning import TuningSettings
from genemodel.train.settings import TrainerSettings

SHORT = IntegrationSettings(steps=20, passes=0, hidden=16, rank=8, latent=6, batch_cells=40)


@pytest.fixture(scope="module")
def human():
    return gm.synthetic(
        200, species=("human",), n_batches=2, n_genes=600, genes_per_cell=80, seed=4
    )["human"]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("tune", [None, "frozen", "lora"])
def test_an_embedding_has_the_losses_of_a_cpu(random_bundle, human, device, tune, precision):
    losses = {}
    for where in ("cpu", str(device)):
        trainer = TrainerSettings(precision="32-true" if where == "cpu" else precision)
        model, embedding_CD = integrate_cells(
            human.copy(), ("batch",), None, random_bundle if tune else None,
            TuningSettings(tune=tune or "frozen"), settings=SHORT, seed=0,
            where=HeadRun(device=where, trainer=trainer),
        )  # fmt: skip
        assert np.isfinite(embedding_CD).all()
        losses[where] = model.history["nats_per_count"].iloc[[0, -1]].to_numpy()
    # Chance is another on a device after the first step; the first has the same start.
    first = {"32-true": 1e-4, "bf16-mixed": 1e-2}[precision]
    wanted, found = losses["cpu"], losses[str(device)]
    assert found[0] == pytest.approx(wanted[0], rel=max(first, 2e-2))
    assert found[1] == pytest.approx(wanted[1], rel=0.1)


@pytest.mark.parametrize("tune", [None, "frozen", "full"])
def test_imputation_has_the_losses_of_a_cpu(random_bundle, human, device, tune):
    settings = DecoderSettings(hidden=16, latent=4, epochs=4, check_every=2, batch_cells=40)
    found = [
        gm.impute(
            human.copy(), random_bundle if tune else None, backbone=tune, settings=settings,
            device=where,
        ).trained.heldout_nats
        for where in ("cpu", str(device))
    ]  # fmt: skip
    assert found[1] == pytest.approx(found[0], rel=5e-3)
