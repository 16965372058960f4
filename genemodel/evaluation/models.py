"""Trained models among the methods of a comparison: as they are, tuned, and with weights of noise.

Axes: C cells, G genes, D embedding width.
"""

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError, GenemodelError
from genemodel.evaluation import imputation_baselines
from genemodel.evaluation.baselines import Conditions, tuned
from genemodel.evaluation.methods import FAILURES, MIN_CELLS, Denoised, Method, Task
from genemodel.model.tuning import Tune

if TYPE_CHECKING:
    from anndata import AnnData

    from genemodel.bundle.bundle import Bundle
    from genemodel.embedding.contamination import Contamination
    from genemodel.imputation.model import ImputationModel
    from genemodel.integration.model import IntegratedModel

type Model = Bundle | IntegratedModel | ImputationModel

logger = logging.getLogger(__name__)


def loaded(models: "Sequence[str | Path | Model]", task: Task) -> "dict[str, Model]":
    """Load trained models by name, before anything runs: a wrong path is refused at once."""
    from genemodel.bundle.given import model_for
    from genemodel.imputation.impute import IMPUTE
    from genemodel.loading import EMBED

    verb: str
    kinds: tuple[Any, ...]
    verb, kinds = ("impute", IMPUTE) if task == "impute" else ("embed", EMBED)
    found: dict[str, Model] = {}
    for number, given in enumerate(models):
        name = f"model {number}"
        model = cast(Model, model_for(verb, kinds, given))
        if isinstance(given, str | Path):
            name = f"model {_short_name(Path(given))}"
            if name in found:  # runs of one name: the folders above tell them apart
                name = f"model {Path(given)}"
        if name in found:
            raise ConfigError(f"models: {given} is named twice")
        found[name] = model
    return found


def refuse_unreadable(
    models: "Mapping[str, Model]", cells: "AnnData", reading: InputSettings, task: Task
) -> None:
    """Refuse models that cannot read these cells before any method runs."""
    from genemodel.bundle.bundle import Bundle
    from genemodel.imputation.model import LARGEST_IN_MEMORY, ImputationModel
    from genemodel.inference.counts import VocabularyCells
    from genemodel.inference.gene_counts import gene_order

    size = 2 * 4.0 * cells.n_obs * cells.n_vars  # mean and deviation, float32
    if task == "impute" and models and size > LARGEST_IN_MEMORY:
        raise ConfigError(
            f"{cells.n_obs:,} cells × {cells.n_vars:,} genes imputed by a model take "
            f"{size / 1e9:.1f} GB (most is {LARGEST_IN_MEMORY / 1e9:.0f} GB): score a sample, with "
            "max_cells."
        )
    for name, model in models.items():
        try:
            if isinstance(model, Bundle):
                VocabularyCells(cells, model, reading)
            elif isinstance(model, ImputationModel):
                gene_order(
                    list(map(str, cells.var_names)), model.genes, read_W=model.kept_G,
                    where="the data", remedy="Leave it out of models.",
                )  # fmt: skip
            else:
                model.encode(cells[:MIN_CELLS].copy(), **reading.options())
        except GenemodelError as error:
            raise type(error)(f"{name} cannot read these cells: {error}") from error
        except FAILURES:
            continue  # of a few cells; all of them may do


def contaminations(
    models: "Mapping[str, Model]", cells: "AnnData", reading: InputSettings
) -> "dict[str, Contamination]":
    """How many of the cells each model was trained on, for those that can read them."""
    from genemodel.embedding.contamination import contamination

    found = {}
    for name, model in models.items():
        try:
            found[name] = contamination(cells, model, **reading.options())
        except GenemodelError:
            continue  # it will fail as a method, with the reason
        logger.info("%s: %s", name, found[name].text())
    return found


def model_methods(
    models: "Mapping[str, Model]",
    task: Task,
    backbones: Sequence[Tune] = ("frozen",),
    reading: InputSettings | None = None,
) -> dict[str, Method]:
    """Methods for trained models; of a bundle: as it is, tuned in each way, untrained."""
    from genemodel.bundle.bundle import Bundle
    from genemodel.imputation.model import ImputationModel

    reading = reading or InputSettings()
    found: dict[str, Method] = {}
    for name, model in models.items():
        if isinstance(model, ImputationModel):
            found[name] = Method(
                _imputer(model, reading), kind="ours", encoder=f"{_beside(model)}, not trained here"
            )
        elif isinstance(model, Bundle):
            of_bundle = _imputing if task == "impute" else _embedding
            found |= of_bundle(name, model, backbones, reading)
        else:
            found[name] = Method(_encoder(model, reading), kind="ours", encoder=_beside(model))
    return found


def _beside(model: "IntegratedModel | ImputationModel") -> str:
    if model.bundle is None:
        return "a network on counts; no transformer"
    return "a network on counts, beside the cell vectors of a frozen transformer"


def _transformer(bundle: "Bundle") -> str:
    shape = bundle.model.settings
    return f"the transformer ({shape.layers} × {shape.width})"


def _embedding(
    name: str, bundle: "Bundle", backbones: Sequence[Tune], reading: InputSettings
) -> dict[str, Method]:
    transformer = _transformer(bundle)
    found = {
        name: Method(
            _embedder(bundle, reading),
            kind="ours",
            encoder=f"{transformer} as it is, not trained here",
        )
    }
    for tune in backbones:
        found[f"{name} {_said(tune)}"] = Method(
            _tuner(bundle, tune, reading), kind="ours", seeded=True,
            encoder=f"a network on counts, beside the cell vectors of {transformer}, {tune}",
        )  # fmt: skip
    found[f"{name} untrained"] = Method(_untrained(bundle, reading), kind="control", seeded=True)
    return found


def _imputing(
    name: str, bundle: "Bundle", backbones: Sequence[Tune], reading: InputSettings
) -> dict[str, Method]:
    from genemodel.imputation.pretrained import has_decoder

    transformer, found = _transformer(bundle), dict[str, Method]()
    if has_decoder(bundle):
        found[name] = Method(
            _imputer(bundle, reading), kind="ours", seeded=True,
            encoder=f"{transformer} and its count decoder, not trained here; genes that it does "
            "not know at their mean",
        )  # fmt: skip
    for tune in backbones:
        found[f"{name} {_said(tune)}"] = Method(
            _imputer(bundle, reading, tune), kind="ours", seeded=True,
            encoder=f"a network on counts, beside the cell vectors of {transformer}, {tune}",
        )  # fmt: skip
    return found


def _said(tune: Tune) -> str:
    return "tuned" if tune == "frozen" else tune


def _short_name(path: Path) -> str:
    """Name the run that a model lies in: ``runs/lung/backbone/bundle`` is lung's backbone."""
    parts = list(path.resolve().parts)
    if len(parts) > 1 and parts[-1] in ("bundle", "model", "imputation_model"):
        parts.pop()
    return "/".join(parts[-2:]) if parts[-1] == "backbone" else parts[-1]


def _shared_genes(cells: "AnnData", model: "ImputationModel") -> list[str]:
    known = set(model.genes)
    return [str(name) for name in cells.var_names if name in known]


def _imputer(
    model: "Bundle | ImputationModel", reading: InputSettings, backbone: Tune | None = None
) -> Any:
    """Denoise with a model as it is, or with a decoder trained beside its cell vectors."""
    from genemodel.imputation.model import ImputationModel

    def run(adata: "AnnData", conditions: Conditions) -> Denoised:
        from genemodel.imputation.impute import impute

        cells, key = adata.copy(), "denoised"
        named: dict[str, Any] = {}
        if isinstance(model, ImputationModel):
            named["genes"] = _shared_genes(cells, model)
        elif backbone is not None:
            named |= {"backbone": backbone, "batch_key": conditions.batch_key}
        impute(
            cells, model, key_added=key, uncertainty=True, seed=conditions.seed,
            **named, **reading.options(),
        )  # fmt: skip
        made = []
        for name in (key, f"{key}_sd"):
            if "genes" not in named:
                made.append(np.asarray(cells.layers[name]))
                continue
            table = cast(Any, cells.obsm[name]).reindex(columns=list(cells.var_names))
            made.append(table.to_numpy(np.float32))
        mean_CG, sd_CG = made
        unknown_G = np.isnan(mean_CG).all(0)
        if unknown_G.any():
            mean_CG[:, unknown_G] = imputation_baselines.gene_mean(adata, conditions)[:, unknown_G]
            sd_CG[:, unknown_G] = 0.0
        return Denoised(mean_CG, sd_CG)

    return run


def _encoder(model: "IntegratedModel", reading: InputSettings) -> Any:
    def encode(adata: "AnnData", conditions: Conditions) -> np.ndarray:
        return model.encode(adata, **reading.options())

    return encode


def _embedder(bundle: "Bundle", reading: InputSettings) -> Any:
    def embed(adata: "AnnData", conditions: Conditions) -> np.ndarray:
        from genemodel.embedding.embed import embed
        from genemodel.inference.obs_keys import EMBEDDED

        cells = adata.copy()
        embed(cells, bundle, **reading.options())
        return np.asarray(cast(Any, cells.obsm[EMBEDDED]))

    return embed


def _tuner(bundle: "Bundle", backbone: Tune, reading: InputSettings) -> Any:
    def tune(adata: "AnnData", conditions: Conditions) -> np.ndarray:
        options = reading.options()
        return tuned(adata, conditions, model=bundle, backbone=backbone, **options)

    return tune


def _untrained(bundle: "Bundle", reading: InputSettings) -> Any:
    """Control: the same architecture with the matrices drawn anew."""

    def embed(adata: "AnnData", conditions: Conditions) -> np.ndarray:
        import torch

        model = copy.deepcopy(bundle.model)
        draw = torch.Generator(device="cpu").manual_seed(conditions.seed)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    noise = torch.randn(weight.shape, generator=draw)
                    weight.copy_(0.02 * noise.to(weight))
        return np.asarray(_embedder(replace(bundle, model=model), reading)(adata, conditions))

    return embed
