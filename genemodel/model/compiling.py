"""What is compiled: the regions of model and objectives, each one graph of constant shape.

A region is a module that is called as a whole, or a function that a module runs through its
:class:`Regions`. Between them lie only gathers of rows and sums of scalars.
"""

import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch

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


def why_not_compiled(device: torch.device) -> str | None:
    """Say what torch.compile lacks for this device, or None where nothing is."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    named = os.environ.get("CXX" if device.type == "cpu" else "CC")
    usual = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    if not any(shutil.which(name) for name in ((named,) if named else usual)):
        wanted = named or " or ".join(usual[:2])
        return f"there is no C compiler ({wanted} is not on the PATH)"
    return None


def compile_encoder(model: GeneModel, *, backend: str | Callable[..., Any] = "inductor") -> bool:
    """Compile embedding, blocks and readout of a model, in place.

    Returns
    -------
    Whether it was done: without a compiler the model stays as it is, and one warning says so.
    """
    if backend == "inductor":
        missing = why_not_compiled(next(model.parameters()).device)
        if missing is not None:
            logger.warning("Nothing is compiled, steps take longer: %s.", missing)
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
