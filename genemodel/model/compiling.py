"""What is compiled: the regions of model and objectives, each one graph of constant shape.

A region is a module that is called as a whole, or a function that a module runs through its
:class:`Regions`. Between them lie only gathers of rows and sums of scalars.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

from genemodel.model.devices import why_not_compiled
from genemodel.model.gene_model import GeneModel

logger = logging.getLogger(__name__)


@functools.cache
def _compiled(function: Callable[..., Any], backend: str | Callable[..., Any]) -> Any:
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


class Regions:
    """Runs functions as they are, or compiled once a backend is set.

    Compiled functions are shared by all that run them, so copies of a module stay copies.
    """

    def __init__(self) -> None:
        self.backend: str | Callable[..., Any] | None = None

    def run[F: Callable[..., Any]](self, function: F) -> F:
        """Return the function to call."""
        if self.backend is None:
            return function
        return cast(F, _compiled(function, self.backend))


class Compilable(Protocol):
    """Objectives that know their own regions."""

    def compile_regions(self, backend: str | Callable[..., Any]) -> None:
        """Compile every region."""


def compile_encoder(model: GeneModel, *, backend: str | Callable[..., Any] = "inductor") -> bool:
    """Compile embedding, blocks and readout of a model, in place.

    Returns
    -------
    Whether it was done: without a compiler the model stays as it is, and one warning says so.
    """
    if backend == "inductor":
        missing = why_not_compiled(next(model.parameters()).device)
        if missing is not None:
            logger.warning(
                "Nothing is compiled, because %s: the same numbers, but every step takes longer.",
                missing,
            )
            return False
    for part in (model.embedding, *model.blocks, model.final_norm):
        part.compile(dynamic=False, fullgraph=True, backend=backend)
    return True


def compile_for_training(
    model: GeneModel, objectives: Compilable, *, backend: str | Callable[..., Any] = "inductor"
) -> bool:
    """Compile everything a training step runs on a micro-batch, in place.

    Returns
    -------
    Whether it was done; see :func:`compile_encoder`.
    """
    if not compile_encoder(model, backend=backend):
        return False
    objectives.compile_regions(backend)
    return True
