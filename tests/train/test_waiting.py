"""A whole training step reads the device once, however many micro-batches it has."""

import pytest
from device_traffic import DeviceTraffic, as_if_on_a_device

from genemodel.settings import parse
from genemodel.train.loop import Loop
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_look_a_step(tiny_corpus, tmp_path, monkeypatch, name, accumulate):
    gradient_itself, apply_itself = Loop._gradient, Loop._apply
    waits = []

    def gradient(loop, *args, **options):
        with as_if_on_a_device(), DeviceTraffic("cpu") as traffic:
            found = gradient_itself(loop, *args, **options)
        waits.append(list(traffic.waits))
        return found

    def apply(loop, *args):
        with as_if_on_a_device(), DeviceTraffic("cpu") as traffic:
            found = apply_itself(loop, *args)
        waits[-1] += traffic.waits
        return found

    monkeypatch.setattr(Loop, "_gradient", gradient)
    monkeypatch.setattr(Loop, "_apply", apply)
    values = {
        "corpus": str(tiny_corpus), "out": str(tmp_path / "run"),
        "tokens": {"context": 64, "budget": 512},
        "model": {"layers": 1, "width": 16, "heads": 2, "ffn": 16, "dropout": 0.1},
        "optim": {"name": name},
        "trainer": {
            "max_steps": 3, "accelerator": "cpu", "accumulate": accumulate, "log_every": 2,
            "validation_batches": 1,
        },
    }  # fmt: skip
    pretrain(parse(PretrainSettings, values))
    assert waits == [["tolist"]] * 3
