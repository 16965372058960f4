"""Names of devices, checked before anything is loaded onto one."""

import contextlib

import torch

from genemodel.errors import ConfigError


def half_of(device: torch.device) -> torch.dtype | None:
    """Number format of autocast on this device, or None where it is off."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


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
