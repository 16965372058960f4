"""Gradients of several processes against one process that does all micro-batches itself.

Run as a program this file is the processes: ``python test_exchange.py OUT`` forks those of every
case and writes what they have learnt to OUT. SGD, because Adam would hide a wrong scale.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from genemodel.train.exchange import Exchange, make_fabric
from genemodel.train.processes import Processes

MICRO_BATCHES, STEPS, CLIP = 4, 3, 0.5
CASES = [
    *(("ordered", world) for world in (1, 2, 4)),
    *(("ddp", world) for world in (2, 4)),
    *(("fsdp", world) for world in (2, 4)),
    ("alone", 1),
]  # fmt: skip


class Toy(nn.Module):
    """Blocks in a model, as what is sharded; and a parameter that no loss reaches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Module()
        self.model.blocks = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 5)])
        self.head = nn.Linear(5, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x):
        for block in self.model.blocks:
            x = torch.tanh(block(x))
        return self.head(x)


def micro_batches(step):
    """Of unequal sizes, as the numbers of masked genes are."""
    rng = torch.Generator().manual_seed(step)
    return [torch.randn(3 + 5 * i, 6, generator=rng) for i in range(MICRO_BATCHES)]


def learn(exchange):
    """Train as the loop does; returns the norm of every step."""
    optimiser = torch.optim.SGD(exchange.learning(), lr=0.5, momentum=0.9)
    norms = []
    for step in range(STEPS):
        optimiser.zero_grad(set_to_none=True)
        mine = micro_batches(step)[exchange.rank :: exchange.world]
        items = exchange.sum_(torch.tensor(float(sum(len(x) for x in mine))))
        for i, x in enumerate(mine):
            with exchange.micro_batch(last=i + 1 == len(mine)):
                loss = (exchange.forward(x) - x.sum(1, keepdim=True)).square().sum()
                (loss * exchange.factor / items).backward()
        exchange.finish()
        norms.append(float(exchange.clip_(CLIP)))
        optimiser.step()
    return norms


def plain():
    """Do without any of it."""
    module = Toy()
    learning = [p for p in module.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(learning, lr=0.5, momentum=0.9)
    norms = []
    for step in range(STEPS):
        optimiser.zero_grad()
        batches = micro_batches(step)
        items = torch.tensor(float(sum(len(x) for x in batches)))
        for x in batches:
            loss = (module(x) - x.sum(1, keepdim=True)).square().sum()
            (loss * 1.0 / items).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(learning, CLIP, foreach=True)))
        optimiser.step()
    return {"norms": norms, "weights": listed(module.state_dict())}


def listed(state):
    return {name: tensor.flatten().tolist() for name, tensor in state.items()}


def one_rank(kind, world, rank, port, out):
    os.environ |= {
        "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world), "NODE_RANK": "0",
        "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    processes = Processes(world, 1, rank, "us")
    fabric = make_fabric(kind, processes, accelerator="cpu", precision="32-true", hang_minutes=1)
    fabric.launch()
    exchange = Exchange(fabric, Toy(), kind)
    norms = learn(exchange)
    # What is saved comes back, sharded or not.
    state = exchange.state([])
    again = exchange.gather_objects((rank, kind))
    assert again == [(r, kind) for r in range(world)]
    rows = exchange.gather(torch.full((2,), float(rank)))
    assert rows.tolist() == [[float(r)] * 2 for r in range(world)]
    if rank == 0:
        with torch.no_grad():
            saved = {name: tensor.clone() for name, tensor in state["module"].items()}
    else:
        saved = {}
    saved = fabric.broadcast(saved)
    weights = listed(saved)  # loading takes the values out of it
    with torch.no_grad():
        for p in exchange.learning():
            p.zero_()
    exchange.load({"module": saved, "optimisers": []}, [])
    loaded = exchange.state([])["module"]
    if rank == 0:
        assert listed(loaded) == weights
        result = {"norms": norms, "weights": weights}
        (out / f"{kind}-{world}.json").write_text(json.dumps(result))


def program(out):
    torch.set_num_threads(1)
    for kind, world in CASES:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        children = []
        for rank in range(world):
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    one_rank(kind, world, rank, port, out)
                    code = 0
                finally:
                    sys.stderr.flush()
                    if code:
                        import traceback

                        traceback.print_exc()
                    os._exit(code)
            children.append(pid)
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0, f"{kind} on {world}"


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    out = tmp_path_factory.mktemp("exchange")
    done = subprocess.run(
        [sys.executable, __file__, str(out)],
        env=dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return {
        (kind, world): json.loads((out / f"{kind}-{world}.json").read_text())
        for kind, world in CASES
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ordered_is_one_process_to_the_bit(learnt, world):
    assert learnt["ordered", world] == learnt["alone", 1]


@pytest.mark.slow
def test_one_process_is_plain_torch_to_the_bit(learnt):
    torch.set_num_threads(1)
    assert learnt["alone", 1] == plain()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "world"), [case for case in CASES if case[0] in ("ddp", "fsdp")])
def test_other_strategies_differ_by_rounding_only(learnt, kind, world):
    got, expected = learnt[kind, world], learnt["alone", 1]
    # A gradient averaged instead of summed would be a half or a quarter of it.
    assert got["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert min(expected["norms"]) > CLIP  # clipping took part
    assert got["weights"].keys() == expected["weights"].keys()
    for name, values in expected["weights"].items():
        assert got["weights"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


if __name__ == "__main__":
    program(Path(sys.argv[1]))
