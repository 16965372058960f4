"""Models of every kind from their folders, and what each kind is good for."""

from pathlib import Path
from typing import overload

import torch

from genemodel.adapt.imputation_model import ImputationModel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.directory import BUNDLE, IMPUTATION, INTEGRATION, kind_of, refusal
from genemodel.errors import ConfigError
from genemodel.inference.integrated_model import IntegratedModel
from genemodel.model.devices import device_of
from genemodel.writing import found_again

type Model = Bundle | IntegratedModel | ImputationModel

# By what a folder says that it is.
MODELS: dict[str, type[Model]] = {
    BUNDLE: Bundle,
    INTEGRATION: IntegratedModel,
    IMPUTATION: ImputationModel,
}
# Of these kinds are the models that can do it; `genemodel.load` gives any of them.
EMBED = (Bundle, IntegratedModel)
IMPUTE = (ImputationModel, Bundle)
TOLD = (Bundle, IntegratedModel, ImputationModel)


def load(path: str | Path, *, device: str | torch.device = "auto") -> Model:
    """Read a model of whatever kind the folder holds.

    Parameters
    ----------
    path
        What pre-training wrote to RUN/bundle, what fine-tuning wrote to RUN/model (embeds) or
        RUN/imputation_model (imputes), or what ``save`` of any of these wrote.
    device
        Where to put the weights of a transformer; ``auto`` takes a GPU where there is one. The
        networks on counts, of which the other two kinds are made, run on the CPU.

    Returns
    -------
    Bundle, IntegratedModel or ImputationModel
        Each with ``provenance``, ``history`` and ``describe()``.

    Raises
    ------
    DataError
        There is none in the folder, or it is damaged.
    """
    kind = _kind_of(path)
    device_of(device)
    return kind.load(path, device=device)


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
    verb: str, kinds: tuple[type, ...], model: object, *, device: str | torch.device = "auto"
) -> object:
    """Return a model that can do something, read from its folder where a path is given.

    Parameters
    ----------
    verb
        What it is to do, for the refusal.
    kinds
        Such as :data:`EMBED`.
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
        found: type = _kind_of(model)
        said = f"model={model} is {_named(found)}"
        if issubclass(found, kinds):
            model = load(model, device=device)
    else:
        said = f"model is {_named(type(model))}"
    if isinstance(model, kinds):
        return model
    able = " or ".join(_named(kind) for kind in kinds)
    raise ConfigError(f"{said}, which cannot {verb}: give {able}, or the path of its folder.")


def _kind_of(path: str | Path) -> type[Model]:
    path = found_again(Path(path))
    kind = MODELS.get(kind_of(path) or "")
    if kind is None:
        raise refusal(path)
    return kind


def _named(kind: type) -> str:
    return f"{'an' if kind.__name__[0] in 'AEIOUaeiou' else 'a'} {kind.__name__}"
