"""How gradients of several processes become one: the only place that knows the strategy.

======== ==========================================================================================
kind     what happens
======== ==========================================================================================
alone    nothing: one process
ddp      torch's DistributedDataParallel: averaged while the last micro-batch goes backward
fsdp     FSDP2: parameters, gradients and optimiser state are sharded over the processes
ordered  every micro-batch's gradient is gathered and added in the order of micro-batches, so that
         the sum is the same to the bit for any number of processes; costs a gather of all
         gradients a micro-batch instead of one exchange a step
======== ==========================================================================================

The loss of a step is a sum over all micro-batches divided by the global number of items, so what
is wanted is the *sum* of the ranks' gradients. DDP and FSDP average: :attr:`Exchange.factor`
undoes it.
"""

import contextlib
import inspect
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn

from genemodel.train.processes import Processes

Kind = Literal["alone", "ddp", "fsdp", "ordered"]


def make_fabric(
    kind: Kind, processes: Processes, *, accelerator: str, precision: Any, hang_minutes: float
) -> Fabric:
    """Join the processes under Lightning's strategies; devices and precision come with them."""
    environment: Any = {
        "torchrun": TorchElasticEnvironment,
        # Its own handler of signals would save in the middle of a step, and train on.
        "slurm": lambda: SLURMEnvironment(auto_requeue=False),
    }.get(processes.started, LightningEnvironment)()
    # Later than the watch over the ranks, which can say who is missing.
    timeout = timedelta(minutes=hang_minutes + 2)
    strategy: Any = "auto"
    if kind == "fsdp":
        strategy = ModelParallelStrategy(
            parallelize_fn=_shard, data_parallel_size=processes.world, tensor_parallel_size=1,
            timeout=timeout,
        )  # fmt: skip
    elif processes.world > 1:
        # Buffers are constants here; sending them with every forward pass would be for nothing.
        known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {sync: False, "gradient_as_bucket_view": True}
        strategy = DDPStrategy(timeout=timeout, **options)
    return Fabric(
        accelerator=accelerator,
        devices=processes.here,
        num_nodes=processes.nodes,
        strategy=strategy,
        precision=precision,
        plugins=[environment] if processes.world > 1 else None,
    )


def _shard(module: Any, mesh: Any) -> Any:
    """Shard every block by itself and the rest as a whole (FSDP2)."""
    from torch.distributed.fsdp import fully_shard

    data_mesh = mesh["data_parallel"]
    for block in module.model.blocks:
        fully_shard(block, mesh=data_mesh)
    fully_shard(module, mesh=data_mesh)
    return module


class Exchange:
    """Sums over ranks, of gradients and of numbers.

    Parameters
    ----------
    fabric
        Launched.
    module
        Whose trainable parameters are meant; wrapped as the kind asks for.
    kind
        See the top of this module.
    """

    def __init__(self, fabric: Fabric, module: nn.Module, kind: Kind) -> None:
        self.fabric, self.kind = fabric, kind
        self.world, self.rank = fabric.world_size, fabric.global_rank
        if kind == "ordered":
            module = module.to(fabric.device)
            for tensor in (*module.parameters(), *module.buffers()):
                if self.world > 1:
                    dist.broadcast(tensor.detach(), 0)
            self.forward: Any = module
        elif kind == "alone":
            self.forward = module.to(fabric.device)
        else:
            fabric.strategy.module_to_device(module)
            self.forward = fabric.strategy.setup_module(module)
        # FSDP2 changes the module in place; its parameters are then the shards.
        self.module = module
        self._totals: list[Tensor] | None = None

    @property
    def factor(self) -> float:
        """What a loss is multiplied by so that the exchanged gradient is a sum over ranks."""
        return float(self.world) if self.kind in ("ddp", "fsdp") else 1.0

    def learning(self) -> list[nn.Parameter]:
        """Parameters that learn."""
        return [p for p in self.module.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def micro_batch(self, *, last: bool, whole: bool = True) -> Any:
        """Surround a forward and a backward pass; gradients meet in the last.

        ``whole`` says that a micro-batch is complete with it, and not one of its first pieces.
        """
        if self.kind in ("ddp", "fsdp") and not last:
            control = self.fabric.strategy._backward_sync_control
            with control.no_backward_sync(self.forward, True):  # type: ignore[union-attr]
                yield
        else:
            yield
        if self.kind == "ordered" and whole:
            self._add_in_order()

    def _add_in_order(self) -> None:
        parameters = self.learning()
        if self._totals is None:
            self._totals = [torch.zeros_like(p) for p in parameters]
        for p, total in zip(parameters, self._totals, strict=True):
            own = p.grad if p.grad is not None else torch.zeros_like(p)
            if self.world == 1:
                total += own
            else:
                parts = [torch.empty_like(own) for _ in range(self.world)]
                dist.all_gather(parts, own.contiguous())
                for part in parts:
                    total += part
            p.grad = None

    def finish(self) -> None:
        """Put the summed gradients where the optimisers look for them."""
        if self._totals is not None:
            for p, total in zip(self.learning(), self._totals, strict=True):
                p.grad = total
            self._totals = None

    def sum_(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; no rank waits for its device."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, rows: Tensor) -> Tensor:
        """Stack every rank's tensor of one shape along a new first axis."""
        if self.world == 1:
            return rows[None]
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.stack(parts)

    def gather_objects(self, value: Any) -> list[Any]:
        """Plain values of every rank, in their order."""
        if self.world == 1:
            return [value]
        parts: list[Any] = [None] * self.world
        dist.all_gather_object(parts, value)
        return parts

    def clip_(self, largest: float) -> Tensor:
        """Clip the gradient to a norm; returns the norm before, on the device."""
        grads: Iterable[nn.Parameter] = [p for p in self.learning() if p.grad is not None]
        norm = torch.nn.utils.clip_grad_norm_(grads, largest or float("inf"), foreach=True)
        if self.kind == "fsdp":
            norm = norm.full_tensor()  # type: ignore[attr-defined]
        return norm

    # -- state -----------------------------------------------------------------------------------

    def state(self, optimisers: list[torch.optim.Optimizer]) -> dict[str, Any]:
        """Whole weights and optimiser states; under FSDP gathered, and complete on rank 0 only."""
        if self.kind != "fsdp":
            return {
                "module": self.module.state_dict(),
                "optimisers": [optimiser.state_dict() for optimiser in optimisers],
            }
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
            get_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return {
            "module": get_model_state_dict(self.module, options=options),
            "optimisers": [
                get_optimizer_state_dict(self.module, optimiser, options=options)
                for optimiser in optimisers
            ],
        }

    def load(self, state: dict[str, Any], optimisers: list[torch.optim.Optimizer]) -> None:
        """Take up what :meth:`state` returned."""
        if self.kind != "fsdp":
            self.module.load_state_dict(state["module"])
            for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
                optimiser.load_state_dict(saved)
            return
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.module, state["module"], options=options)
        for optimiser, saved in zip(optimisers, state["optimisers"], strict=True):
            set_optimizer_state_dict(self.module, optimiser, saved, options=options)
