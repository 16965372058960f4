"""Models of every kind from their folders, and what each kind is good for."""

from pathlib import Path

import torch

from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_kind
from genemodel.imputation.model import ImputationModel
from genemodel.integration.model import IntegratedModel
from genemodel.model.devices import device_of

type Model = Bundle | IntegratedModel | ImputationModel

# By what a folder says that it is.
MODELS: dict[str, type[Model]] = {
    kind.FOLDER: kind for kind in (Bundle, IntegratedModel, ImputationModel)
}
# Of these kinds are the models that can do it; `genemodel.load` gives any of them.
EMBED = (Bundle, IntegratedModel)
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
    kind = MODELS[model_kind(path)]
    device_of(device)
    return kind.load(path, device=device)
