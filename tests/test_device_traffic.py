"""A micro-batch makes nobody wait for the device, and nothing queue up on it."""

import contextlib

import numpy as np
import pytest
import torch
from device_traffic import (
    DeviceTraffic,
    apart,
    as_if_on_a_device,
    emptied_to,
    fake_cuda,
    moved_to,
)

from genemodel.model.compiling import compile_for_training


def micro_batch(
    model, task, batch, *, trivial=True, autocast=None, backward=True, validation=False
):
    prepared = task.prepare(batch, validation=validation)
    half = torch.autocast(autocast, torch.bfloat16) if autocast else contextlib.nullcontext()
    with half:
        parts = task(model, model(prepared.seen), prepared, trivial=trivial)
    loss = sum(part.total / part.items for part in parts.values())
    if backward:
        loss.backward()
    return parts


WAITS = {
    "float": lambda x, i: float(x.sum()),
    "tolist": lambda x, i: x[:3].tolist(),
    "mask": lambda x, i: x[x > 0],
    "mask_put": lambda x, i: x.index_put((x > 0,), torch.zeros((), device=x.device)),
    "nonzero": lambda x, i: x.nonzero(),
    "unique": lambda x, i: i.unique(),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_counter_sees_what_waits(name):
    x, i = torch.randn(8), torch.arange(8)
    with DeviceTraffic("cpu") as traffic:
        WAITS[name](x, i)
    assert traffic.waits
    with DeviceTraffic("cpu") as traffic:
        y = x.index_select(0, i) + 1
        y.index_add_(0, torch.zeros(8, dtype=torch.long), x)
    assert traffic.waits == [] and traffic.longest_run == {"index_add_": 8}
    assert traffic.by_op["index_select"] == 8 * (4 + 8 + 4)


def test_the_counter_sees_copies_between_host_and_device():
    with fake_cuda():
        x = torch.ones(4, device="cuda")
        for copy in (
            lambda: torch.tensor(3, device="cuda"),
            lambda: torch.ones(4).to("cuda"),
            lambda: x.cpu(),
            lambda: x + torch.tensor([1.0, 2.0, 3.0, 4.0], device="cuda"),
        ):
            with DeviceTraffic("cuda") as traffic:
                copy()
            assert traffic.waits == ["_to_copy"]
        with DeviceTraffic("cuda") as traffic:
            torch.full((), 3, device="cuda") + x * 2
            torch.ones(4).to("cuda", non_blocking=True)
        assert traffic.waits == []


@pytest.mark.parametrize(
    "shape", [{}, {"norm": "post", "position": "rank", "residual": "bfloat16"}]
)
@pytest.mark.parametrize("autocast", [None, "cuda"])
@pytest.mark.parametrize("validation", [False, True])
def test_a_micro_batch_waits_for_nothing_on_cuda(pack_random, away, shape, autocast, validation):
    """Hiding, forward pass and losses, in full and in mixed precision, every branch for CUDA."""
    model, task = away(**shape)
    batch = pack_random()
    with fake_cuda():
        model, task = moved_to(model, "cuda"), moved_to(task, "cuda")
        with DeviceTraffic("cuda") as traffic:
            parts = micro_batch(
                model, task, emptied_to(batch, "cuda"), autocast=autocast, backward=False,
                validation=validation,
            )  # fmt: skip
        assert all(part.total.device.type == "cuda" for part in parts.values())
        assert all(part.items.device.type == "cuda" for part in parts.values())
    assert traffic.waits == []
    # The half-precision kernel of torch, or cells padded to one length.
    flash, padded = traffic.ops["_varlen_attn"], traffic.ops["searchsorted"]
    assert (flash, padded) == ((2, 0) if autocast else (0, 2))


def test_a_micro_batch_with_its_backward_waits_for_nothing(pack_random, away):
    model, task = away()
    batch = emptied_to(pack_random(), "meta")
    model, task = moved_to(model, "meta"), moved_to(task, "meta")
    with DeviceTraffic("meta") as traffic:
        micro_batch(model, task, batch)
    assert traffic.waits == [] and sum(traffic.ops.values()) > 200


def test_no_gradient_is_added_up_over_a_long_run_of_equal_indices(pack_random, away):
    """Threads that add to one row wait for each other: none waits for more than the cells."""
    model, task = away()
    batch = pack_random(lengths=(120, 90, 100, 70, 110, 60), budget=1024)
    places = batch.cell_C.shape[0]
    with as_if_on_a_device(), DeviceTraffic("cpu") as traffic:
        micro_batch(model, task, batch)
    assert traffic.waits == []
    assert {"index_add", "index_put_"} & set(traffic.longest_run)
    assert max(traffic.longest_run.values()) <= places < 20


# Operations without a deterministic way on CUDA, by torch.use_deterministic_algorithms.
UNDETERMINED = {
    "cumsum", "logcumsumexp", "histc", "kthvalue", "median", "put_", "bincount", "scatter_reduce",
    "scatter_reduce_", "nll_loss2d_forward", "_embedding_bag", "grid_sampler_2d", "_cdist_forward",
    "max_pool3d_with_indices", "adaptive_avg_pool2d_backward", "resize_",
}  # fmt: skip


def test_every_operation_has_a_deterministic_way(pack_random, away):
    """Nothing that torch would refuse with ``trainer.deterministic=true``, and the same bits."""
    model, task = away()
    batch = pack_random()
    before = torch.are_deterministic_algorithms_enabled()
    gradients = []
    try:
        torch.use_deterministic_algorithms(True)
        for _ in range(2):
            model.zero_grad()
            with as_if_on_a_device(), DeviceTraffic("cpu") as traffic:
                micro_batch(model, task, batch)
            kept = [w.grad.flatten() for w in model.parameters() if w.grad is not None]
            gradients.append(torch.cat(kept))
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(*gradients)
    assert not UNDETERMINED & set(traffic.ops)


def small(pack_random, repository, device):
    """``small`` over 36,287 tokens with all objectives, and 13 cells of real lengths."""
    import yaml

    from genemodel.corpus.statistics import GeneStatistics
    from genemodel.heads.pretraining import PretrainingObjectives, PretrainingSettings
    from genemodel.model.gene_model import GeneModel
    from genemodel.model.settings import ModelSettings
    from genemodel.settings import parse

    n_tokens = 36_287
    lengths = np.random.default_rng(0).lognormal(7.1, 0.55, 13).clip(100, 2047).astype(int)
    batch = pack_random(
        lengths=tuple(lengths), n_tokens=n_tokens, budget=16_384, context=2048, max_cells=24
    )
    assert batch.fill > 0.95 and batch.cell_C.shape == (32,)
    values = yaml.safe_load((repository / "configs" / "model" / "small.yaml").read_text())
    settings = parse(ModelSettings, values)
    model = GeneModel(settings, n_tokens=n_tokens, n_species=2, context=2048)
    task = PretrainingObjectives(
        PretrainingSettings(), width=settings.width, n_batches=20, seed=0,
        statistics=GeneStatistics.empty(2, n_tokens),
        measured_XV=torch.ones(3, n_tokens, dtype=torch.bool),
    )  # fmt: skip
    return moved_to(model, device), moved_to(task, device), emptied_to(batch, device)


def test_the_logits_of_all_masked_rows_are_never_held(pack_random, repository):
    made = small(pack_random, repository, "meta")
    with fake_cuda():
        model, task = (moved_to(part, "cuda") for part in made[:2])
        with DeviceTraffic("cuda") as traffic:
            micro_batch(
                model, task, emptied_to(made[2], "cuda"), autocast="cuda", backward=False
            )  # fmt: skip
    masked = int(0.15 * 1.25 * 16_384) + 16
    assert 1024 * 36_287 >= traffic.largest > 0.2 * masked * 36_287


def test_little_is_moved_outside_what_is_compiled(pack_random, repository):
    """Inputs and outputs of all operations outside compiled regions, forward and backward.

    At 16,384 tokens and 36,287 genes; it was 9.2 GB when the blocks alone were compiled.
    """
    model, task, batch = small(pack_random, repository, "meta")
    compile_for_training(model, task, backend=apart)
    for shown in (True, False):
        micro_batch(model, task, batch, trivial=shown)  # compiles
        for weight in (*model.parameters(), *task.parameters()):
            weight.grad = None
        with DeviceTraffic("meta") as traffic:
            micro_batch(model, task, batch, trivial=shown)
        assert traffic.waits == []
        assert 0.1e9 < traffic.bytes < 0.5e9
        assert sum(traffic.ops.values()) < 60
        # No logits of all masked rows, and nothing that queues up.
        assert "index_put_" not in traffic.ops
    torch._dynamo.reset()
