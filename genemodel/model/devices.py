"""Devices by name and by what they can, checked before anything is loaded onto one."""

import contextlib
import importlib.util
import os
import shutil
from dataclasses import dataclass
from typing import Literal

import torch

from genemodel.errors import ConfigError
from genemodel.model.attention import flash_fits
from genemodel.model.settings import ModelSettings

# FlashAttention-2's variable-length kernel, and bfloat16 in hardware, begin with Ampere.
AMPERE = (8, 0)
VOLTA = (7, 0)

Precision = Literal["auto", "32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Ways:
    """How a model runs on a device.

    Attributes
    ----------
    precision
        ``32-true`` or ``bf16-mixed``.
    attention
        ``flash``: the variable-length kernel. ``padded``: cells padded to the context, because that
        kernel does not go; twice to four times the arithmetic. ``cells``: a loop over cells (CPU).
    compiled
        Whether regions are compiled.
    remarks
        What is not as fast as it could be, and why; one sentence each, for the log.
    """

    precision: Literal["32-true", "bf16-mixed"]
    attention: Literal["flash", "padded", "cells"]
    compiled: bool
    remarks: tuple[str, ...]


def check_device(
    settings: ModelSettings,
    device: torch.device,
    precision: Precision = "auto",
    *,
    compiled: bool = False,
    capability: tuple[int, int] | None = None,
) -> Ways:
    """Choose how a model runs on a device, before anything is loaded onto it.

    Parameters
    ----------
    settings
        Shape of the model.
    device
        Where it is to run.
    precision
        As asked for; ``auto`` is ``bf16-mixed`` on GPUs that calculate in it, else ``32-true``.
    compiled
        Whether compiling is asked for.
    capability
        Of the GPU; default: asked of the driver.

    Raises
    ------
    ConfigError
        ``bf16-mixed`` is asked for on a GPU older than Ampere (V100, T4), which has neither
        arithmetic nor an attention kernel for it.
    """
    remarks: list[str] = []
    missing = why_not_compiled(device) if compiled else None
    if missing is not None:
        remarks.append(f"nothing is compiled, because {missing}: every step takes longer")
    compiled = compiled and missing is None
    if device.type != "cuda":
        return Ways(
            "bf16-mixed" if precision == "bf16-mixed" else "32-true",
            "cells" if is_host(device) else "padded",
            compiled,
            tuple(remarks),
        )
    major, minor = capability or torch.cuda.get_device_capability(device)
    old = (major, minor) < AMPERE
    if old and precision == "bf16-mixed":
        raise ConfigError(
            f"trainer.precision=bf16-mixed, but this GPU has compute capability {major}.{minor}, "
            "and bfloat16 begins with 8.0 (A100 and later): set trainer.precision=32-true or auto."
        )
    if old or precision == "32-true":
        why = f"compute capability {major}.{minor} is below 8.0" if old else "precision is 32-true"
        remarks.append(
            f"{why}: full precision, and attention on cells padded to the context, which is two to "
            "four times its arithmetic"
        )
        return Ways("32-true", "padded", compiled, tuple(remarks))
    if not flash_fits(settings.head_width):
        remarks.append(
            f"attention heads are {settings.head_width} wide (model.width / model.heads), and the "
            "variable-length kernel takes multiples of 8 up to 256: cells are padded to the "
            "context instead, which is two to four times its arithmetic"
        )
        return Ways("bf16-mixed", "padded", compiled, tuple(remarks))
    return Ways("bf16-mixed", "flash", compiled, tuple(remarks))


def calculates_in_half(device: torch.device) -> bool:
    """Whether a device is a GPU that calculates in bfloat16."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= AMPERE


def why_not_compiled(device: torch.device) -> str | None:
    """Say what torch.compile lacks for this device, or None where nothing is."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < VOLTA:
            return "triton writes code for compute capability 7.0 and later"
    variable, usual = ("CXX", ("g++", "clang++")) if is_host(device) else ("CC", ("gcc", "clang"))
    named = os.environ.get(variable, "").split()[:1] or usual
    if not any(shutil.which(name) for name in named):
        return f"there is no C compiler ({' or '.join(named)} is not on the PATH)"
    return None


def half_of(device: torch.device) -> torch.dtype | None:
    """Return autocast's number format on this device, or None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


# What else torch says when memory runs out, besides OutOfMemoryError.
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the host, does not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_host(device: torch.device) -> bool:
    """Whether numbers on this device can be read without waiting for it."""
    return device.type == "cpu"


def full_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for a while."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def device_of(name: str | torch.device) -> torch.device:
    """Return the device of this name; ``auto`` is a GPU where there is one.

    Raises
    ------
    ConfigError
        No such kind of device, or none of it here.
    """
    if isinstance(name, str) and name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"device={name}: there is no such device; set auto, cpu, cuda, or cuda:1 and so on for "
            "another GPU."
        ) from error
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        here = "no GPU" if not n_gpus else "1 GPU" if n_gpus == 1 else f"{n_gpus} GPUs"
        raise ConfigError(
            f"device={name}, but torch sees {here} here: set device=auto or cpu, or check the "
            "driver with nvidia-smi."
        )
    return device
