"""The weights of a published model, from the files in which they come; nothing is executed."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from genemodel.errors import DataError
from genemodel.importers.known import KnownFile, recognised
from genemodel.importers.pointers import refuse_pointer

# In the order in which they are looked for: the safe one first.
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"
# Put before every name by wrappers of training.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """Tensors with what is said of them.

    Attributes
    ----------
    folder, path
        Where they are.
    tensors
        By name, prefixes of wrappers taken off; floats as float32.
    config
        ``config.json``; empty where there is none.
    sha256
        Of the file of the weights.
    known
        Which published file it is, if any.
    numel
        Numbers in the file.
    """

    folder: Path
    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    known: KnownFile | None = None
    numel: int = 0


def read_checkpoint(folder: Path, names: tuple[str, ...] = WEIGHTS) -> Checkpoint:
    """Read weights and configuration of a folder.

    Raises
    ------
    DataError
        There are none, or they are damaged, pointers or no tensors.
    """
    if folder.is_file():
        raise DataError(f"{folder} is a file: name the folder that holds it.")
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist: name the folder of a published model.")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        there = sorted(one.name for one in folder.iterdir())[:8]
        raise DataError(
            f"{folder} has no {' or '.join(names)} (it has {', '.join(there) or 'nothing'}): name "
            "the folder of one model, such as Geneformer/Geneformer-V2-104M."
        )
    refuse_pointer(path)
    digest, known = recognised(path)
    raw = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    tensors = {
        name: tensor.float() if tensor.dtype in _FLOATS else tensor for name, tensor in raw.items()
    }
    numel = sum(tensor.numel() for tensor in raw.values())
    return Checkpoint(
        folder, path, _unwrapped(tensors), read_json(folder / CONFIG), digest, known, numel
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration; empty where there is no such file.

    Raises
    ------
    DataError
        It is damaged or no object.
    """
    if not path.is_file():
        return {}
    refuse_pointer(path)
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}).") from error
    if not isinstance(values, dict):
        raise DataError(f"{path} holds no settings but a {type(values).__name__}.")
    return values


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read ({error}): it is damaged or cut off. Copy it again."
        ) from error


def _pickled(path: Path) -> dict[str, Tensor]:
    """Read a ``.bin``: torch's own restricted reader, from the file without a copy of it."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # noqa: BLE001 - torch raises whatever its reader meets
        # Its own words advise to read the file without that restriction.
        raise DataError(
            f"{path} is refused ({type(error).__name__} of torch's reader for tensors): it is "
            "damaged, or holds more than tensors, which could run anything. Take the published "
            "file again, best as model.safetensors."
        ) from None
    if isinstance(found, Mapping) and isinstance(found.get("state_dict"), Mapping):
        found = found["state_dict"]
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{path} holds no table of tensors but a {type(found).__name__}.")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{path} holds {str(name)[:60]!r}, a {type(value).__name__}, among its tensors: it "
                "is no file of weights (optimizer, scheduler and training arguments are not read)."
            )
    return dict(found)


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take prefixes off that all names have."""
    again = True
    while again:
        again = False
        for prefix in _PREFIXES:
            if tensors and all(name.startswith(prefix) for name in tensors):
                tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
                again = True
    return tensors


# -- adapters ---------------------------------------------------------------------------------

_LORA = re.compile(r"^(?:base_model\.model\.)?(.+)\.lora_(A|B)(?:\.\w+)?\.weight$")
_SAVED = re.compile(
    r"^(?:base_model\.model\.)?(.+?)(?:\.modules_to_save(?:\.\w+)?)?\.(weight|bias)$"
)


def with_adapter(base: Checkpoint, folder: Path) -> Checkpoint:
    """Add low-rank changes that peft has written to the matrices that they are of.

    Raises
    ------
    DataError
        It is another kind of adapter, or of another model.
    """
    settings = read_json(folder / ADAPTER_CONFIG)
    kind = settings.get("peft_type", "LORA")
    for name, wanted in (("peft_type", "LORA"), ("use_dora", None), ("fan_in_fan_out", None)):
        value = settings.get(name)
        if value and value != wanted:
            raise DataError(
                f"{folder / ADAPTER_CONFIG}: {name} is {value!r}, and only plain LoRA is read "
                f"(this is {kind}). Merge it with peft (merge_and_unload) and import the result."
            )
    patterns = {**settings.get("rank_pattern", {}), **settings.get("alpha_pattern", {})}
    if patterns:
        raise DataError(
            f"{folder / ADAPTER_CONFIG} has ranks or weights of their own for some matrices: merge "
            "it with peft (merge_and_unload) and import the result."
        )
    adapter = read_checkpoint(folder, ADAPTER)
    try:
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / ADAPTER_CONFIG} has no r or lora_alpha ({error}).") from error
    scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
    tensors = dict(base.tensors)
    thin: dict[str, dict[str, Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        if low := _LORA.match(name):
            thin.setdefault(f"{low[1]}.weight", {})[low[2]] = tensor
        elif saved := _SAVED.match(name):
            tensors[f"{saved[1]}.{saved[2]}"] = tensor
        else:
            raise DataError(f"{adapter.path} holds {name}, which is no LoRA weight.")
    for name, parts in thin.items():
        old = tensors.get(name)
        if old is None or set(parts) != {"A", "B"}:
            raise DataError(
                f"{adapter.path} changes {name}, which "
                f"{'the base model has not' if old is None else 'it holds half of only'}: it is "
                "the adapter of another model."
            )
        change = parts["B"] @ parts["A"]
        if change.shape != old.shape or parts["A"].shape[0] != rank:
            raise DataError(
                f"{adapter.path}: the change of {name} is {tuple(change.shape)} of rank "
                f"{parts['A'].shape[0]}, but the matrix is {tuple(old.shape)} and r is {rank}."
            )
        tensors[name] = old + scale * change
    return Checkpoint(
        base.folder, base.path, tensors, {**base.config, "adapter": settings}, base.sha256,
        base.known, base.numel + adapter.numel,
    )  # fmt: skip
