"""``genemodel import``: the folder of a published model becomes a bundle."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import genemodel
from genemodel.batches.published import CONTEXT, PublishedStyle
from genemodel.batches.tokens import TokenSettings
from genemodel.bundle.bundle import Bundle
from genemodel.cells.input_settings import InputSettings
from genemodel.errors import ConfigError, DataError
from genemodel.importers.architecture import (
    WORD,
    Recognised,
    Taker,
    encoder_state,
    head_state,
    recognise,
)
from genemodel.importers.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    read_checkpoint,
    read_json,
    with_adapter,
)
from genemodel.importers.dictionaries import (
    Dictionaries,
    find_dictionaries,
    genecompass_vocabulary,
    geneformer_vocabulary,
)
from genemodel.importers.genecompass import fusion_state, homologs, value_head_state
from genemodel.importers.known import LICENCES
from genemodel.model.gene_model import GeneModel
from genemodel.model.hosted import FoldedFusion, FusionShape, HostedEmbedding, KnowledgeFusion
from genemodel.model.settings import ModelSettings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ImportSettings(InputSettings):
    """Settings of ``genemodel import``, see ``configs/import.yaml``."""

    input: Path
    out: Path | None = None
    dictionaries: Path | None = None
    medians: Path | None = None
    base: Path | None = None
    cell: Literal["genes", "opening"] | None = None
    cell_layer: int | None = None
    folded: bool = False
    verify: bool = False
    cells: Path | None = None
    overwrite: bool = False


def import_model(
    path: str | Path,
    *,
    dictionaries: str | Path | None = None,
    medians: str | Path | None = None,
    base: str | Path | None = None,
    cell: Literal["genes", "opening"] | None = None,
    cell_layer: int | None = None,
    folded: bool = False,
) -> Bundle:
    """Read a published model, Geneformer or GeneCompass, as a bundle.

    Parameters
    ----------
    path
        Its folder, with ``model.safetensors`` or ``pytorch_model.bin``, and ``config.json``; or
        that of a LoRA adapter.
    dictionaries, medians, base, cell, cell_layer, folded
        As in :class:`ImportSettings`.

    Returns
    -------
    Bundle, on the CPU. Nothing in any file is executed.

    Raises
    ------
    DataError
        It is another model, or a file is missing, damaged, or of another model.
    """
    folder = Path(path).expanduser()
    checkpoint = _read(folder, None if base is None else Path(base).expanduser())
    found = recognise(checkpoint)
    given = None if dictionaries is None else Path(dictionaries).expanduser()
    own_medians = None if medians is None else Path(medians).expanduser()
    if given is not None and not given.exists():
        raise ConfigError(f"dictionaries={given} does not exist.")
    if own_medians is not None and not own_medians.is_file():
        raise ConfigError(f"medians={own_medians} is no file.")
    said = find_dictionaries(checkpoint.folder, found.n_tokens, given, own_medians)
    style: PublishedStyle
    if found.family == "genecompass":
        made = genecompass_vocabulary(said, homologs(found).numpy())
        style = "genecompass"
    else:
        made, style = geneformer_vocabulary(said)
    shape = _cells_of(replace(found.settings, hosts=style), found, cell, cell_layer)
    source_V = torch.from_numpy(made.source_V)
    take = Taker(found.tensors, str(checkpoint.path))
    word_QD = found.tensors[WORD]
    state = encoder_state(take, found, source_V)
    fusion, noted = None, dict[str, Any]()
    if found.family == "genecompass":
        fusion, more, noted = fusion_state(take, found, source_V, word_QD)
        state |= more
    heads, about_head = head_state(take, found, source_V, word_QD)
    if found.family == "genecompass":
        heads |= value_head_state(take, shape.width)
    take.finish()
    context = shape.max_rank + 1 + (style == "genecompass")
    tokens = TokenSettings(context, max(16_384, context), style=style)
    model = _model(shape, fusion, state, made.source_V.size, found.n_species, context)
    if folded:
        fold(model)
    bundle = Bundle(
        model=model.eval(),
        vocabulary=made.vocabulary,
        tokens=tokens,
        medians_V=made.medians_V,
        heads={name: tensor.clone() for name, tensor in heads.items()},
        settings={"published": {**about_head, "config": _kept(checkpoint, about_head)}},
        provenance=_provenance(checkpoint, found, said, noted, folded=folded),
    )
    usual = CONTEXT[style]
    if context != usual:
        logger.info("Up to %s tokens of a cell are read; published: %s.", context, usual)
    logger.info("%s: %s.", folder, found.name)
    return bundle


def _read(folder: Path, base: Path | None) -> Checkpoint:
    if not (folder / ADAPTER_CONFIG).is_file():
        if base is not None:
            raise ConfigError(
                f"base={base}, but {folder} has no {ADAPTER_CONFIG}: it is no adapter, leave base "
                "out."
            )
        return read_checkpoint(folder)
    if base is None:
        named = str(read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
        candidates = [Path(named), folder / named, folder.parent / Path(named).name]
        base = next((one for one in candidates if named and one.is_dir()), None)
        if base is None:
            raise DataError(
                f"{folder} is a LoRA adapter of {named or 'a model that it does not name'}, which "
                "is not here: give base=FOLDER of that model."
            )
    return with_adapter(read_checkpoint(base), folder)


def _cells_of(
    shape: ModelSettings, found: Recognised, cell: str | None, cell_layer: int | None
) -> ModelSettings:
    """Take cells from where the publishers do: GeneCompass and classifiers from the first token."""
    from_opening = found.family == "genecompass" or found.head == "cells"
    if cell is None:
        cell = "opening" if from_opening else "genes"
    if cell_layer is None:
        cell_layer = 0 if from_opening or shape.layers == 1 else 1
    return replace(shape, cell=cell, cell_layer=cell_layer)  # type: ignore[arg-type]


def _model(
    shape: ModelSettings,
    fusion: FusionShape | None,
    state: dict[str, Tensor],
    n_tokens: int,
    n_species: int,
    context: int,
) -> GeneModel:
    with torch.device("meta"):
        model = GeneModel(
            shape, n_tokens=n_tokens, n_species=n_species, context=context, fusion=fusion
        )
    model.load_state_dict(
        {name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True
    )
    return model.requires_grad_(True)


def fold(model: GeneModel) -> None:
    """Fold the knowledge of a hosted GeneCompass, in place; nothing for another model."""
    embedding = model.embedding
    if isinstance(embedding, HostedEmbedding) and isinstance(embedding.fusion, KnowledgeFusion):
        folded: FoldedFusion = embedding.fusion.folded(embedding.token)
        embedding.fusion = folded


# What export writes again, as it was; the rest follows from the weights.
_KEPT = (
    "attention_probs_dropout_prob", "initializer_range", "classifier_dropout", "id2label",
    "label2id", "problem_type", "training_args",
)  # fmt: skip


def _kept(checkpoint: Checkpoint, about_head: dict[str, Any]) -> dict[str, Any]:
    kept = {name: checkpoint.config[name] for name in _KEPT if name in checkpoint.config}
    labels, n_labels = kept.get("id2label"), about_head.get("n_labels")
    if n_labels is not None and isinstance(labels, dict) and len(labels) != n_labels:
        raise DataError(
            f"{checkpoint.folder}: config.json names {len(labels)} labels, but the classifier "
            f"tells {n_labels} apart."
        )
    return kept


def _provenance(
    checkpoint: Checkpoint,
    found: Recognised,
    said: Dictionaries,
    noted: dict[str, Any],
    *,
    folded: bool,
) -> dict[str, Any]:
    config = checkpoint.config
    return {
        "genemodel": genemodel.__version__,
        "imported": found.name,
        "family": found.family,
        "from": str(checkpoint.folder),
        "licence": LICENCES[found.family],
        "weights": {checkpoint.path.name: checkpoint.sha256},
        "dictionaries": said.files,
        "tensors": len(checkpoint.tensors),
        "numbers": checkpoint.numel,
        **({"adapter": config["adapter"].get("base_model_name_or_path", "")} if "adapter" in config
           else {}),
        **({"folded": True} if folded else {}),
        **noted,
    }  # fmt: skip


def run_import(settings: ImportSettings) -> str:
    """Import a model and write the bundle; returns what was found, and how to go on."""
    folder = settings.input.expanduser()
    out = settings.out or folder.resolve().parent / f"{folder.resolve().name}.bundle"
    if settings.cells is not None and not settings.verify:
        raise ConfigError(f"cells={settings.cells} is for verify=true: set that too.")
    if settings.cells is not None and not settings.cells.expanduser().exists():
        raise ConfigError(f"cells={settings.cells} does not exist.")
    if out.exists() and not settings.overwrite:
        raise ConfigError(f"out={out} exists: set overwrite=true, or another out.")
    bundle = import_model(
        folder, dictionaries=settings.dictionaries, medians=settings.medians, base=settings.base,
        cell=settings.cell, cell_layer=settings.cell_layer, folded=settings.folded,
    )  # fmt: skip
    bundle.save(out)
    lines = [f"{bundle!r}", f"recognised: {bundle.provenance['imported']}"]
    if settings.verify:
        from genemodel.importers.verifying import verification

        lines += verification(bundle, settings.cells, settings.reading)
    lines += [f"in {out}; use it with: genemodel embed model={out} input=... output=..."]
    return "\n".join(lines)
