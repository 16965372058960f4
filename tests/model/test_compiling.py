"""Compiled regions: a fixed number of graphs, the same numbers, and a fall-back that is said."""

import copy

import numpy as np
import pytest
import torch
from device_traffic import as_if_on_a_device

from genemodel.model import compiling
from genemodel.model.compiling import compile_encoder, compile_for_training

# What a training micro-batch runs: hiding, embedding, block, readout; before and in the gene
# loss's chunks; value head; count decoder.
REGIONS = 8


def step(model, task, batch, *, validation=False, half=False):
    prepared = task.prepare(batch, validation=validation)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        parts = task(model, model(prepared.seen), prepared)
    return sum(part.total / part.items.clamp_min(1) for part in parts.values())


def gradients(model, task, batch, **options):
    model.zero_grad()
    task.zero_grad()
    loss = step(model, task, batch, **options)
    loss.backward()
    kept = [w.grad for w in (*model.parameters(), *task.parameters()) if w.grad is not None]
    return float(loss.detach()), torch.cat([g.flatten() for g in kept])


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    compiling._compiled.cache_clear()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("device_ways", [False, True])
def test_compiled_losses_and_gradients_are_the_same(pack_random, away, fresh, half, device_ways):
    model, task = away()
    compiled = copy.deepcopy(model), copy.deepcopy(task)
    assert compile_for_training(*compiled, backend="aot_eager")
    batch = pack_random()
    with torch._dynamo.config.patch(error_on_recompile=True):
        want, gradient = gradients(model, task, batch, half=half)
        if device_ways:
            with as_if_on_a_device():
                got, found = gradients(*compiled, batch, half=half)
        else:
            got, found = gradients(*compiled, batch, half=half)
    assert got == pytest.approx(want, rel=1e-3 if half else 1e-5)
    assert (found - gradient).norm() < (0.02 if half else 1e-5) * gradient.norm()


def test_the_number_of_graphs_is_fixed_over_fifty_packed_batches(pack_random, away, fresh):
    """Whatever the cells and their expressed genes: one graph a region, and one in validation."""
    model, task = away()
    compile_for_training(model, task, backend="aot_eager")
    rng = np.random.default_rng(0)
    batches = [
        pack_random(seed, lengths=tuple(rng.integers(3, 62, rng.integers(1, 5))))
        for seed in range(50)
    ]
    assert len({(b.n_cells, b.full_gene_N.shape[0]) for b in batches}) > 40
    graphs = []
    with as_if_on_a_device():
        for n, batch in enumerate(batches):
            step(model, task, batch).backward()
            if n % 10 == 0:
                model.eval(), task.eval()
                with torch.inference_mode():
                    step(model, task, batch, validation=True)
                model.train(), task.train()
            graphs.append(fresh["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] == 2 * REGIONS
    assert not fresh["graph_break"] and not fresh["recompiles"]


def test_a_copy_of_a_compiled_model_is_a_model_of_its_own(pack_random, away, fresh):
    model, task = away()
    compile_for_training(model, task, backend="aot_eager")
    batch = pack_random()
    with torch.no_grad():
        before = model(batch).cell_CD
        other = copy.deepcopy(model)
        for weight in other.parameters():
            weight.mul_(2.0)
        assert not torch.equal(other(batch).cell_CD, before)
        assert torch.equal(model(batch).cell_CD, before)


def test_without_a_compiler_the_steps_stay_as_they_are_and_it_is_said(
    away, monkeypatch, caplog, tmp_path
):
    model, task = away()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not compile_for_training(model, task)
    assert caplog.text.count("Nothing is compiled") == 1
    assert "g++ or clang++ is not on the PATH" in caplog.text
    assert not task.heads["decode_counts"].compiled and model.embedding._compiled_call_impl is None
    assert not compile_encoder(model)
