"""Which model some tensors are, and its shape: from names and shapes, never from a preset."""

import logging
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from genemodel.errors import DataError
from genemodel.importers.checkpoint import Checkpoint
from genemodel.model.settings import ModelSettings

logger = logging.getLogger(__name__)

Family = Literal["geneformer", "genecompass"]
# masked: the head of pre-training; cells, genes: a classifier; none: the encoder alone.
Head = Literal["masked", "cells", "genes", "none"]

PRIORS = ("promoter", "co_exp", "gene_family", "peca_grn")
# Every published one, of either family, has heads of this width.
_HEAD_WIDTH = 64
_LAYER = re.compile(r"^bert\.encoder\.layer\.(\d+)\.")
WORD = "bert.embeddings.word_embeddings.weight"
POSITION = "bert.embeddings.position_embeddings.weight"
KIND = "bert.embeddings.token_type_embeddings.weight"

# Tensors by which other models are known, and what to say of them.
_OTHERS: tuple[tuple[str, str], ...] = (
    (
        r"(?:^|\.)embed_tokens\.weight$|input_layernorm",
        "MaxToki or another Llama-like decoder: it predicts the next token with rotary positions, "
        "which no encoder here hosts",
    ),
    (r"^classification_heads\.0\.weight$|^attention_pool\.", "a multi-task classifier of Geneformer"
     ": public code trains it without the published weights (only their configuration is read), so "
     "there is nothing of Geneformer in it. Import the pre-trained folder and fine-tune that"),
    (r"^transformer_encoder\.layers\.|^value_encoder\.", "scGPT: its input is binned values"),
    (r"^(?:encoder\.)?performer|^net\.layers\.layers", "scBERT or another Performer"),
    (r"^pe_embedding\.weight$", "UCE: its genes are protein vectors, not tokens"),
    (r"^(?:roberta|distilbert|esm|electra|deberta)\.", "another kind of BERT than Geneformer's"),
)  # fmt: skip


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes
    ----------
    family, head
        Which model, and what it was made to predict.
    name
        In words, for messages and provenance.
    settings
        Its shape; ``hosts`` says the family's newest style until the dictionary says which.
    tensors
        With all names below ``bert.``, ``cls.``, ``classifier.`` and so on.
    n_tokens, n_species
        Rows of the word embeddings, and of the species tokens (1 without).
    """

    family: Family
    head: Head
    name: str
    settings: ModelSettings
    tensors: dict[str, Tensor]
    n_tokens: int
    n_species: int


def recognise(checkpoint: Checkpoint) -> Recognised:
    """Say what a checkpoint is.

    Raises
    ------
    DataError
        It is another model, named where it is known; or names, shapes and configuration disagree.
    """
    tensors, path = dict(checkpoint.tensors), checkpoint.path
    if "embeddings.word_embeddings.weight" in tensors:  # a bare BertModel
        tensors = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    for pattern, what in _OTHERS:
        if any(re.search(pattern, name) for name in tensors):
            raise DataError(
                f"{path} is refused: it is {what}. Geneformer and GeneCompass are read."
            )
    if WORD not in tensors or POSITION not in tensors:
        some = ", ".join(sorted(tensors)[:3])
        raise DataError(
            f"{path} is neither Geneformer nor GeneCompass: it has no {WORD} (it has {some} …). "
            "These two are read; other models are not."
        )
    family: Family = "geneformer"
    marks = ("_knowledge", "bert.cls_embedding.weight", "concat_embeddings.cat_fc.weight")
    if any(name.endswith(marks) for name in tensors):
        family = "genecompass"
    settings = _shape(checkpoint, tensors, family)
    species = tensors.get("bert.cls_embedding.weight")
    n_species = 1 if species is None else int(species.shape[0])
    head = _head(tensors)
    n_tokens = int(tensors[WORD].shape[0])
    return Recognised(
        family, head, _name(checkpoint, family, settings, n_tokens, head), settings, tensors,
        n_tokens, n_species,
    )  # fmt: skip


def _head(tensors: dict[str, Tensor]) -> Head:
    if "classifier.weight" in tensors:
        return "cells" if "bert.pooler.dense.weight" in tensors else "genes"
    return "masked" if "cls.predictions.transform.dense.weight" in tensors else "none"


def _shape(checkpoint: Checkpoint, tensors: dict[str, Tensor], family: Family) -> ModelSettings:
    path, config = checkpoint.path, checkpoint.config
    n_tokens, width = (int(n) for n in tensors[WORD].shape)
    positions = int(tensors[POSITION].shape[0])
    numbers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    layers = len(numbers)
    if numbers != set(range(layers)) or not layers:
        raise DataError(f"{path}: its layers are {sorted(numbers)}: some are missing.")
    up = tensors.get("bert.encoder.layer.0.intermediate.dense.weight")
    if up is None:
        raise DataError(f"{path} lacks bert.encoder.layer.0.intermediate.dense.weight.")
    if not config:
        logger.warning(
            "%s has no config.json: heads of %d, activation and dropout are those of the published "
            "models.", checkpoint.folder, _HEAD_WIDTH,
        )  # fmt: skip
    usual = "relu" if family == "geneformer" else "gelu"
    heads = config.get("num_attention_heads", max(1, width // _HEAD_WIDTH))
    activation = config.get("hidden_act", usual)
    shape = {
        "vocab_size": n_tokens, "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": int(up.shape[0]), "max_position_embeddings": positions,
        "pad_token_id": 0, "position_embedding_type": "absolute", "type_vocab_size": 2,
        "is_decoder": False,
    }  # fmt: skip
    for name, value in shape.items():
        said = config.get(name, value)
        if said != value:
            raise DataError(
                f"{checkpoint.folder}: config.json: {name} is {said!r}, but the weights say "
                f"{value!r}: they are of two models, or it is a variant that is not read."
            )
    if activation not in ("relu", "gelu"):
        raise DataError(
            f"{checkpoint.folder}: config.json: hidden_act is {activation!r}; relu and gelu are "
            "read, as all published models have them."
        )
    if not isinstance(heads, int) or heads < 1 or width % heads:
        raise DataError(
            f"{checkpoint.folder}: config.json: num_attention_heads is {heads!r}, which does not "
            f"divide the width {width}."
        )
    return ModelSettings(
        layers=layers, width=width, heads=heads, ffn=int(up.shape[0]), norm="post",
        activation=activation, position="rank", max_rank=positions - 1, bias=True, values=False,
        components=0, embedding_norm=True,
        dropout=float(config.get("hidden_dropout_prob", 0.02)),
        norm_eps=float(config.get("layer_norm_eps", 1e-12)),
        hosts="geneformer_v2" if family == "geneformer" else "genecompass",
    )  # fmt: skip


# Layers, width and tokens of the published models.
_SHAPES = {
    (6, 256, 25_426): "Geneformer-V1-10M (gf-6L-30M-i2048)",
    (12, 512, 25_426): "Geneformer V1, 12 layers (gf-12L-30M-i2048)",
    (12, 512, 20_275): "Geneformer gf-12L-95M-i4096",
    (20, 896, 20_275): "Geneformer gf-20L-95M-i4096",
    (12, 768, 20_275): "Geneformer-V2-104M",
    (18, 1152, 20_275): "Geneformer-V2-316M",
    (12, 768, 50_558): "GeneCompass_Base",
    (6, 256, 50_558): "GeneCompass_Small",
}
_MADE_FOR = {
    "masked": "", "none": ", the encoder alone", "cells": ", a classifier of cells",
    "genes": ", a classifier of genes",
}  # fmt: skip


def _name(
    checkpoint: Checkpoint, family: Family, settings: ModelSettings, n_tokens: int, head: Head
) -> str:
    if checkpoint.known is not None:
        return f"{checkpoint.known.model} (the published file, byte for byte)"
    shape = _SHAPES.get((settings.layers, settings.width, n_tokens))
    whose = "Geneformer" if family == "geneformer" else "GeneCompass"
    found = f"of the shape of {shape}" if shape else f"{whose} of another shape"
    return f"{found}{_MADE_FOR[head]} (no published file: other bytes)"


# -- tensors ----------------------------------------------------------------------------------


class Taker:
    """Tensors that are taken one by one, with their shapes checked; none may be left over."""

    def __init__(self, tensors: dict[str, Tensor], where: str) -> None:
        self.tensors, self.where = dict(tensors), where

    def take(self, name: str, *shape: int) -> Tensor:
        """Take one that has to be there."""
        found = self.tensors.pop(name, None)
        if found is None:
            raise DataError(f"{self.where} lacks {name}: the file is cut off, or another model's.")
        if tuple(found.shape) != shape:
            raise DataError(
                f"{self.where}: {name} is {tuple(found.shape)}, but {shape} belongs there."
            )
        return found

    def linear(self, name: str, into: str, rows: int, columns: int) -> dict[str, Tensor]:
        """Take weight and bias of a matrix."""
        return {
            f"{into}.weight": self.take(f"{name}.weight", rows, columns),
            f"{into}.bias": self.take(f"{name}.bias", rows),
        }

    def norm(self, name: str, into: str, width: int) -> dict[str, Tensor]:
        """Take a layer norm."""
        return {f"{into}.{part}": self.take(f"{name}.{part}", width) for part in ("weight", "bias")}

    def twin(self, name: str, of: Tensor, what: str) -> None:
        """Take an alias where it is stored, which has to be equal to what it stands for."""
        found = self.tensors.pop(name, None)
        if found is not None and not torch.equal(found, of):
            raise DataError(
                f"{self.where}: {name} is not equal to {what}, to which it is tied in every "
                "published model: a variant that is not read."
            )

    def drop(self, name: str) -> None:
        """Leave out one that follows from the rest."""
        self.tensors.pop(name, None)

    def finish(self) -> None:
        """Refuse what is left over."""
        if self.tensors:
            left = sorted(self.tensors)
            raise DataError(
                f"{self.where} holds {len(left)} tensors that the model has no place for: "
                f"{', '.join(left[:4])}{' …' if len(left) > 4 else ''}."
            )


def encoder_state(take: Taker, found: Recognised, source_V: Tensor) -> dict[str, Tensor]:
    """Give the weights of a hosted encoder that both families have, under our names.

    ``source_V`` is the published token of each of ours; −1 for one that is never used.
    """
    shape = found.settings
    width, ffn = shape.width, shape.ffn
    word = take.take(WORD, found.n_tokens, width)
    state = {
        "embedding.token.weight": rows(word, source_V),
        "embedding.rank.weight": take.take(POSITION, shape.max_rank + 1, width),
        "embedding.kind.weight": take.take(KIND, 2, width),
        **take.norm("bert.embeddings.LayerNorm", "embedding.norm", width),
    }
    take.drop("bert.embeddings.position_ids")
    for i in range(shape.layers):
        own, ours = f"bert.encoder.layer.{i}", f"blocks.{i}"
        parts = [
            take.linear(f"{own}.attention.self.{name}", name, width, width)
            for name in ("query", "key", "value")
        ]
        for kind in ("weight", "bias"):
            state[f"{ours}.qkv.{kind}"] = torch.cat(
                [t for part in parts for name, t in part.items() if name.endswith(kind)]
            )
        state |= take.linear(f"{own}.attention.output.dense", f"{ours}.out", width, width)
        state |= take.norm(f"{own}.attention.output.LayerNorm", f"{ours}.norm1", width)
        state |= take.linear(f"{own}.intermediate.dense", f"{ours}.ffn.up", ffn, width)
        state |= take.linear(f"{own}.output.dense", f"{ours}.ffn.down", width, ffn)
        state |= take.norm(f"{own}.output.LayerNorm", f"{ours}.norm2", width)
    return state


def rows(table: Tensor, source_V: Tensor, absent: float = 0.0) -> Tensor:
    """Bring rows in our order; ``absent`` for a token that the source has not."""
    taken = table[source_V.clamp_min(0)]
    taken[source_V < 0] = absent
    return taken


def head_state(
    take: Taker, found: Recognised, source_V: Tensor, word_QD: Tensor
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the published head's weights under our names, and what has to be known of it."""
    width = found.settings.width
    if found.head == "masked":
        state, bias = masked_head(take, "cls", "published_gene", width, source_V)
        take.twin("cls.predictions.decoder.weight", word_QD, "the word embeddings")
        take.twin("cls.predictions.decoder.bias", bias, "cls.predictions.bias")
        if "bert.pooler.dense.weight" in take.tensors:
            state |= take.linear("bert.pooler.dense", "published_pooler", width, width)
        return state, {"head": "masked"}
    if found.head == "none":
        state = {}
        if "bert.pooler.dense.weight" in take.tensors:
            state = take.linear("bert.pooler.dense", "published_pooler", width, width)
        return state, {"head": "none"}
    n_labels = int(take.tensors["classifier.weight"].shape[0])
    state = take.linear("classifier", "published_classifier", n_labels, width)
    if found.head == "cells":
        state |= take.linear("bert.pooler.dense", "published_pooler", width, width)
    return state, {"head": found.head, "n_labels": n_labels}


def masked_head(
    take: Taker, own: str, ours: str, width: int, source_V: Tensor
) -> tuple[dict[str, Tensor], Tensor]:
    """Take a head of pre-training: a transform, and a bias for every token."""
    state = {
        **take.linear(f"{own}.predictions.transform.dense", f"{ours}.dense", width, width),
        **take.norm(f"{own}.predictions.transform.LayerNorm", f"{ours}.norm", width),
    }
    bias = take.tensors.pop(f"{own}.predictions.bias", None)
    if bias is None:
        raise DataError(f"{take.where} lacks {own}.predictions.bias.")
    state[f"{ours}.bias_V"] = rows(bias, source_V, -torch.inf)
    return state, bias
