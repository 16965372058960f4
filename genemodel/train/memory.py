"""Does a micro-batch fit the device's memory? Found out before the first step, not after a day.

Shapes are constant, so what one micro-batch takes, all take. One is taken forward and backward with
as much memory set aside as the optimiser and the exchange will need later; where that is too much,
micro-batches are dealt into 2, 4, … pieces, until every rank can take them. The cells of a step,
what is hidden of them and what the losses are divided by stay the same.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator

import torch

from genemodel.errors import ConfigError
from genemodel.model.devices import is_out_of_memory
from genemodel.train.exchange import Exchange

logger = logging.getLogger(__name__)

# Kinds of devices that say when their memory is full. On a CPU the system ends the process.
PROBED = ("cuda",)

# Set aside on top of what can be counted: NCCL's buffers, made with the first exchange, and holes
# between blocks, which another order of allocations leaves elsewhere.
MARGIN = 256 * 2**20


def pieces_that_fit(rehearse: Callable[[int], None], exchange: Exchange, most: int) -> int:
    """Find the smallest number of pieces, 1, 2, 4, …, in which every rank can take a micro-batch.

    Parameters
    ----------
    rehearse
        Takes one micro-batch in so many pieces forward and backward, on this rank alone.
    exchange
        All ranks try the same numbers: what one of them cannot do, none does.
    most
        Where to give up.

    Raises
    ------
    ConfigError
        It does not fit in any number of pieces.
    """
    device = exchange.fabric.device
    if device.type not in PROBED or exchange.kind == "fsdp":  # no rank of FSDP computes alone
        return 1
    pieces = 1
    while True:
        failure = _failure(rehearse, pieces)
        failed = exchange.sum_(torch.full((), float(failure is not None), device=device)).item()
        if not failed:
            break
        said = (failure or "another rank has said so").splitlines()[0][:200]
        # Graphs of a shape that does not fit are of no more use.
        torch.compiler.reset()
        if 2 * pieces > most:
            raise ConfigError(
                f"{device} is out of memory ({said}), also with every micro-batch in {pieces} "
                "pieces: free memory, train on a CPU, or with less held at once "
                "(pretrain, finetune: trainer.activation_checkpointing=true, a smaller "
                "tokens.context or a smaller model)."
            )
        pieces *= 2
    if pieces > 1:
        logger.warning(
            "A micro-batch does not fit the memory of %s (%s): it is taken in %d pieces. The "
            "global batch stays, and so do the numbers but for the order of sums; steps take "
            "longer. To avoid it, free memory or hold less at once "
            "(pretrain, finetune: tokens.budget ÷ %d and trainer.accumulate × %d, or "
            "trainer.activation_checkpointing=true).",
            device, said, pieces, pieces, pieces,
        )  # fmt: skip
    return pieces


def _failure(rehearse: Callable[[int], None], pieces: int) -> str | None:
    """Rehearse; what was said where memory ran out."""
    failure = None
    try:
        rehearse(pieces)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = str(error) or type(error).__name__
    # Only here is the traceback gone, which held everything that the pass had computed.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return failure


@contextlib.contextmanager
def set_aside(n_bytes: int, device: torch.device) -> Iterator[None]:
    """Hold as much memory of a GPU as a run will need later, besides the margin."""
    held = None
    if device.type == "cuda":
        held = torch.empty(n_bytes + MARGIN, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        del held


def later_bytes(exchange: Exchange, optimisers: list[torch.optim.Optimizer]) -> int:
    """Bytes that the first step will allocate and keep: moments, and sums of ordered gradients."""
    total = 0
    for optimiser in optimisers:
        moments = 1 if isinstance(optimiser, torch.optim.Muon) else 2
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                if not optimiser.state.get(parameter):
                    total += moments * parameter.nbytes
    if exchange.kind == "ordered":
        learning = exchange.learning()
        # The totals, and every rank's gradient of one parameter at a time.
        total += sum(p.nbytes for p in learning)
        total += exchange.world * max((p.nbytes for p in learning), default=0)
    return total
