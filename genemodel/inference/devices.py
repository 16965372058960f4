"""One device or several, by any of their names."""

from collections.abc import Sequence

import torch

from genemodel.errors import ConfigError
from genemodel.model.devices import device_of

type Devices = str | int | Sequence[str | int]


def devices_of(given: "Devices | torch.device") -> list[torch.device]:
    """Return the devices of these names; a number is a GPU.

    Raises
    ------
    ConfigError
        No such device here, one GPU named twice, or GPUs and CPUs together.
    """
    if isinstance(given, str | int | torch.device):
        return [_one(given)]
    if not given:
        raise ConfigError("device names none: set auto, cpu, cuda:0, or a list such as [0,1].")
    if len(given) == 1:
        return [_one(given[0])]
    if "auto" in given:
        raise ConfigError(
            "device=auto chooses one device and cannot stand in a list: name each, as in [0,1]."
        )
    found = [_one(name) for name in given]
    if len({device.type for device in found}) > 1:
        raise ConfigError(
            f"device={_shown(given)}: vectors of GPUs and CPUs differ in the last digits, so one "
            "kind has to make them all; name GPUs only, or CPUs only."
        )
    if found[0].type != "cpu":
        found = [torch.device(device.type, device.index or 0) for device in found]
        if len(set(found)) < len(found):
            raise ConfigError(
                f"device={_shown(given)} names one device twice, which gains nothing: name each "
                "once."
            )
    return found


def _one(name: "str | int | torch.device") -> torch.device:
    return device_of(f"cuda:{name}" if isinstance(name, int) else name)


def _shown(given: Sequence[str | int]) -> str:
    return f"[{','.join(map(str, given))}]"
