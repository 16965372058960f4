"""Fine-tuning by the command line: a file in, an embedded file and a model out."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from genemodel.adapt.integration_net import IntegrationSettings
from genemodel.bundle.bundle import Bundle
from genemodel.cells.matrices import refuse_damage
from genemodel.errors import ConfigError, DataError
from genemodel.inference.integrate import integrate
from genemodel.inference.integrated_model import KEY

logger = logging.getLogger(__name__)

EMBEDDED, MODEL = "embedded.h5ad", "model"


@dataclass(frozen=True)
class FinetuneSettings:
    """Fine-tune on a file.

    Attributes
    ----------
    data
        h5ad with raw counts.
    out
        Folder that is made: embedded.h5ad and model/.
    batch_key
        obs column of the technical batch; several for nested ones.
    task
        What to fine-tune for.
    label_key
        obs column of cell types, missing where unknown; empty for none.
    model
        Bundle directory; empty to train from scratch.
    layer
        Where the raw counts are; empty for X.
    species
        One species for all cells or obs:COLUMN; empty for the obs column species (with a model)
        or the data's own gene names (without).
    key_added
        Key in obsm.
    device
        Where the bundle runs: auto, cpu, cuda, cuda:1 …
    seed
        Of initial weights, order, thinning and clustering.
    overwrite
        Replace what is in the folder.
    integration
        The recipe of task integrate.
    """

    data: str
    out: str
    batch_key: tuple[str, ...]
    task: Literal["integrate"] = "integrate"
    label_key: str = ""
    model: str = ""
    layer: str = ""
    species: str = ""
    key_added: str = KEY
    device: str = "auto"
    seed: int = 0
    overwrite: bool = False
    integration: IntegrationSettings = field(default_factory=IntegrationSettings)


def finetune(settings: FinetuneSettings) -> Path:
    """Fine-tune on a file of counts.

    Returns
    -------
    The folder, with ``embedded.h5ad`` (obs, embedding, provenance; without counts) and ``model``,
    for :meth:`genemodel.inference.integrated_model.IntegratedModel.load`.

    Raises
    ------
    ConfigError
        The folder holds results already.
    DataError
        The file cannot be read or used.
    """
    import anndata as ad

    out, data = Path(settings.out), Path(settings.data)
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out={out} is a file: name a folder.")
    there = [name for name in (EMBEDDED, MODEL) if (out / name).exists()]
    if there and not settings.overwrite:
        raise ConfigError(
            f"out={out} holds {' and '.join(there)} already: set overwrite=true, or another folder."
        )
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"out={out}: the folder {out.absolute().parent} does not exist.")
    if not data.is_file():
        raise DataError(f"data={data} is no file: name an h5ad file with raw counts.")
    model = Bundle.load(settings.model, device=settings.device) if settings.model else None
    with refuse_damage(str(data)):
        adata = ad.read_h5ad(data)
    result = integrate(
        adata,
        batch_key=settings.batch_key,
        label_key=settings.label_key or None,
        model=model,
        layer=settings.layer or None,
        species=settings.species or None,
        key_added=settings.key_added,
        settings=settings.integration,
        seed=settings.seed,
    )
    out.mkdir(exist_ok=True)
    result.save(out / MODEL)
    embedded = ad.AnnData(obs=adata.obs)
    embedded.obsm[settings.key_added] = adata.obsm[settings.key_added]
    embedded.uns[settings.key_added] = adata.uns[settings.key_added]
    partial = out / f".{EMBEDDED}.partial"
    embedded.write_h5ad(partial)
    partial.replace(out / EMBEDDED)
    logger.info("%s: %d cells embedded without their batch.", out / EMBEDDED, embedded.n_obs)
    return out
