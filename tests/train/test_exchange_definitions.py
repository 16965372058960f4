"""Gradients of ranks: a sum, in the order of micro-batches, and not an average."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from genemodel.settings import parse, to_values
from genemodel.train import loop
from genemodel.train.checkpoint import newest_checkpoint
from genemodel.train.exchange import Exchange
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings

# Adam does not see how large a gradient is. So plain descent, without clipping.
DESCENT = """
import json, sys
import torch
from genemodel.settings import parse
from genemodel.train import loop
from genemodel.train.recipe import pretrain
from genemodel.train.settings import PretrainSettings

def descent(module, optim, shares):
    learning = [p for p in module.parameters() if p.requires_grad]
    return [torch.optim.SGD([{"params": learning, "share": 1.0}], lr=optim.lr)]

loop.build_optimisers = descent
pretrain(parse(PretrainSettings, json.load(open(sys.argv[1]))))
"""


def test_ordered_sums_go_by_rank_within_micro_batch(monkeypatch):
    """Rounding tells the order: 1 + 1e8 - 1e8 is 0 in float32, and from behind it is 1."""
    shares = iter([[1.0, 1e8, -1e8], [4.0, 5.0, 6.0]])

    def gathered(parts, own):
        for part, share in zip(parts, next(shares), strict=True):
            part.fill_(share)

    monkeypatch.setattr(dist, "all_gather", gathered)
    exchange = Exchange.__new__(Exchange)
    exchange.kind, exchange.world, exchange.rank, exchange._totals = "ordered", 3, 1, None
    exchange.module = torch.nn.Linear(1, 1, bias=False)
    for last in (False, True):
        with exchange.micro_batch(last=last):
            exchange.module.weight.grad = torch.ones(1, 1)
        assert exchange.module.weight.grad is None
    exchange.finish()
    assert exchange.module.weight.grad.item() == 15.0 and exchange.factor == 1.0


def ranks(settings, folder, processes):
    (folder / "run.py").write_text(DESCENT)
    (folder / "settings.json").write_text(json.dumps(to_values(settings)))
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(folder / "run.py"),
            str(folder / "settings.json"),
        ],
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        },
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_ranks_descend_as_one_does_alone_dropout_included(tiny_corpus, tmp_path, monkeypatch):
    values = {
        "corpus": str(tiny_corpus), "out": str(tmp_path / "alone"),
        "tokens": {"context": 64, "budget": 512},
        "model": {
            "layers": 1, "width": 16, "heads": 2, "ffn": 16, "components": 4, "dropout": 0.2,
        },
        "optim": {"lr": 0.01, "warmup_steps": 1, "clip": 0.0},
        "trainer": {
            "max_steps": 3, "accelerator": "cpu", "accumulate": 4, "validation_batches": 1,
        },
    }  # fmt: skip
    alone = parse(PretrainSettings, values)
    both = dataclasses.replace(
        alone, out=str(tmp_path / "both"),
        trainer=dataclasses.replace(alone.trainer, accumulate=2, devices=2),
    )  # fmt: skip
    start = {}

    def descent(module, optim, shares):
        start.update({k: v.clone() for k, v in module.state_dict().items()})
        learning = [p for p in module.parameters() if p.requires_grad]
        return [torch.optim.SGD([{"params": learning, "share": 1.0}], lr=optim.lr)]

    monkeypatch.setattr(loop, "build_optimisers", descent)
    pretrain(alone)
    ranks(both, tmp_path, 2)
    wanted, found = (
        newest_checkpoint(tmp_path / out / "checkpoints").state()["module"]
        for out in ("alone", "both")
    )
    moved = sum(float((wanted[k] - start[k]).square().sum()) for k in wanted) ** 0.5
    apart = sum(float((wanted[k] - found[k]).square().sum()) for k in wanted) ** 0.5
    assert moved > 1e-3 and apart < 0.01 * moved
