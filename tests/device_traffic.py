"""What a step would make a GPU do, counted without one: waits, bytes, queues of equal indices.

A dispatch mode sees every operation that is not inside a compiled region, on real CPU tensors, on
meta tensors or on fake CUDA tensors.

>>> with DeviceTraffic("meta") as traffic:
...     step()
>>> assert traffic.waits == []
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The host must know a number that lies on the device, or how many there are of something.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "equal", "is_nonzero", "repeat_interleave", "bincount",
}  # fmt: skip
COPYING = {"_to_copy", "copy_", "_pin_memory"}
# Additions to rows named by an index: rows that are named often make threads queue up.
# (embedding_dense_backward is none of them: its kernel cuts a long run into partial sums.)
ADDING = {"index_put_", "index_put", "_index_put_impl_", "index_add", "index_add_",
          "scatter_add", "scatter_add_", "scatter_reduce"}  # fmt: skip
# Views, allocations and questions, which move nothing.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias",
    "lift_fresh", "is_same_size", "sym_size", "sym_numel", "set_",
}  # fmt: skip


class DeviceTraffic(TorchDispatchMode):
    """Counts operations on tensors of one kind of device outside compiled regions.

    Parameters
    ----------
    device
        Kind of device that counts: ``cuda`` for fake tensors, ``meta``, or ``cpu`` where CPU
        tensors stand in for those of a GPU (copies to a device are then not seen).

    Attributes
    ----------
    waits
        Operations for which the host would wait for the device, in order.
    bytes, by_op
        Read and written by every operation but views, in all and by name.
    ops
        How often every operation came.
    largest
        Elements of the largest tensor that was made.
    longest_run
        For every adding operation, how often its most frequent index came at most; only where
        indices are real.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device = device
        self.waits: list[str] = []
        self.bytes = 0
        self.by_op: Counter[str] = Counter()
        self.ops: Counter[str] = Counter()
        self.largest = 0
        self.longest_run: Counter[str] = Counter()

    def __enter__(self) -> Self:
        """Begin to count."""
        if self.device == "cpu":
            self._reads = HostReads(self.waits)
            self._reads.__enter__()
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        """End."""
        super().__exit__(*exception)
        if self.device == "cpu":
            self._reads.__exit__(*exception)

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled regions be compiled while this mode is on."""
        return True

    inside = 0  # depth of compiled regions that are running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count, then do."""
        kwargs = kwargs or {}
        if DeviceTraffic.inside:
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name == "_local_scalar_dense" and self._counts(inputs[0]) and not _is_real(inputs[0]):
            # Nothing is known about it; go on with something that stops no step.
            self.waits.append(name)
            return {torch.bool: False}.get(inputs[0].dtype, 1.0)
        out = func(*args, **kwargs)
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(self._counts(x) for x in inputs + outputs):
            return out
        if self._waits(name, args, kwargs, inputs, outputs):
            self.waits.append(name)
        if name in FREE or func.is_view:
            return out
        self.ops[name] += 1
        self.largest = max([self.largest, *(x.numel() for x in outputs)])
        moved = sum(x.numel() * x.element_size() for x in inputs + outputs)
        self.bytes += moved
        self.by_op[name] += moved
        if name in ADDING:
            self._note_run(name, args)
        return out

    def _counts(self, x: Tensor) -> bool:
        return x.device.type == self.device

    def _waits(
        self, name: str, args: Any, kwargs: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> bool:
        if name in WAITING:
            return True
        if name in ("index", *ADDING):
            # A mask asks how many of it are true.
            return any(x.dtype == torch.bool for x in _indices(name, args))
        if name in COPYING:
            kinds = {x.device.type for x in inputs + outputs}
            lazy = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            return len(kinds) > 1 and not lazy
        return False

    def _note_run(self, name: str, args: Any) -> None:
        index = [x for x in _indices(name, args) if _is_real(x)]
        if not index:
            return
        rows = torch.stack(torch.broadcast_tensors(*index)).flatten(1)
        with torch.utils._python_dispatch._disable_current_modes():
            run = int(torch.unique(rows, dim=1, return_counts=True)[1].max()) if rows.numel() else 0
        self.longest_run[name] = max(self.longest_run[name], run)


def apart(graph: Any, _inputs: Any) -> Any:
    """Backend of torch.compile that runs regions as they are, and uncounted."""

    def compiler(part: Any, _inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            DeviceTraffic.inside += 1
            try:
                return part.forward(*args)
            finally:
                DeviceTraffic.inside -= 1

        return make_boxed_func(run)

    return aot_autograd(fw_compiler=compiler)(graph, _inputs)


class HostReads(TorchFunctionMode):
    """Notes where CPU tensors are read as a whole, which no dispatch tells of."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note, then do."""
        name = getattr(func, "__name__", "")
        if name in ("tolist", "numpy", "cpu", "__array__"):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


def _is_real(x: Tensor) -> bool:
    return x.device.type != "meta" and type(x).__name__ != "FakeTensor"


def _indices(name: str, args: Any) -> list[Tensor]:
    at = args[1] if name.startswith(("index_put", "_index_put")) or name == "index" else args[2]
    return [x for x in (at if isinstance(at, (list, tuple)) else [at]) if isinstance(x, Tensor)]


def moved_to(module: torch.nn.Module, device: str) -> torch.nn.Module:
    """Give a module new, empty weights on a device; under a fake mode that may be ``cuda``."""
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype, device=device)
                part._parameters[name] = torch.nn.Parameter(empty, weight.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
    return module


def emptied_to(batch: Any, device: str) -> Any:
    """Give a batch new, empty tensors on a device."""
    return batch._with_tensors(lambda x: torch.empty(x.shape, dtype=x.dtype, device=device))


@contextlib.contextmanager
def as_if_on_a_device() -> Iterator[None]:
    """Let CPU tensors take the ways of a device, on which nothing may be read."""
    from unittest.mock import patch

    with (
        patch("genemodel.heads.masked_gene.is_host", lambda _: False),
        patch("genemodel.model.gene_model.is_host", lambda _: False),
    ):
        yield


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Make CUDA tensors without values, and CUDA autocast, where there is no GPU."""
    from unittest.mock import patch

    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        FakeTensorMode(),
    ):
        yield
