"""A model that a user gives: the object, or the path of its folder."""

from pathlib import Path
from typing import Any, overload

import torch

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.directory import CLASSES, kind_of, refusal
from genemodel.bundle.hub import local_model
from genemodel.errors import ConfigError
from genemodel.model.devices import device_of
from genemodel.writing import found_again


@overload
def model_for[A](
    verb: str, kinds: tuple[type[A]], model: object, *, device: str | torch.device = ...
) -> A: ...
@overload
def model_for[A, B](
    verb: str, kinds: tuple[type[A], type[B]], model: object, *, device: str | torch.device = ...
) -> A | B: ...
@overload
def model_for[A, B, C](
    verb: str,
    kinds: tuple[type[A], type[B], type[C]],
    model: object,
    *,
    device: str | torch.device = ...,
) -> A | B | C: ...
def model_for(
    verb: str, kinds: tuple[Any, ...], model: object, *, device: str | torch.device = "auto"
) -> object:
    """Return a model that can do something, read from its folder where a path is given.

    Parameters
    ----------
    verb
        What it is to do, for the refusal.
    kinds
        Classes of models that can; each with ``FOLDER``, the kind that its folder names.
    model
        A model or a path.
    device
        Where to put one that is read.

    Raises
    ------
    ConfigError
        It is of another kind; looked at before any weights are read.
    DataError
        There is no model in the folder, or it is damaged.
    """
    if isinstance(model, str | Path):
        found = model_kind(model)
        said = f"model={model} is {_named(CLASSES[found])}"
        for kind in kinds:
            if kind.FOLDER == found:
                device_of(device)
                return kind.load(model, device=device)
    else:
        said = f"model is {_named(type(model).__name__)}"
        if isinstance(model, kinds):
            return model
    able = " or ".join(_named(kind.__name__) for kind in kinds)
    raise ConfigError(f"{said}, which cannot {verb}: give {able}, or the path of its folder.")


def bundle_for(verb: str, model: object, device: str | torch.device | None) -> Bundle:
    """Return the pre-trained model that a call is given, on a device or where it is."""
    bundle = model_for(verb, (Bundle,), model, device="auto" if device is None else device)
    return bundle if device is None else bundle.on(device_of(device))


def model_kind(path: str | Path) -> str:
    """Say of which kind the model in a folder is; refuses a folder without one."""
    path = found_again(local_model(path))
    kind = kind_of(path)
    if kind not in CLASSES:
        raise refusal(path)
    return kind


def _named(kind: str) -> str:
    return f"{'an' if kind[0] in 'AEIOUaeiou' else 'a'} {kind}"
