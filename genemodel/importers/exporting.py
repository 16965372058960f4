"""``genemodel export``: an imported model back in the layout that ``transformers`` reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

import genemodel
from genemodel.bundle.bundle import Bundle
from genemodel.bundle.given import model_for
from genemodel.bundle.hub import local_model
from genemodel.errors import ConfigError, DataError
from genemodel.importers.architecture import KIND, POSITION, WORD
from genemodel.importers.checkpoint import CONFIG
from genemodel.model.gene_model import Block
from genemodel.settings import ModelText
from genemodel.writing import whole_directory

_WEIGHTS = "model.safetensors"
_CLASSES = {
    "masked": "BertForMaskedLM", "none": "BertModel", "cells": "BertForSequenceClassification",
    "genes": "BertForTokenClassification",
}  # fmt: skip
_DICTIONARY, _MEDIANS = "token_dictionary.json", "gene_median_dictionary.json"


@dataclass(frozen=True)
class ExportSettings:
    """Settings of ``genemodel export``, see ``configs/export.yaml``."""

    model: ModelText
    format: Literal["hf"] = "hf"
    out: Path | None = None
    overwrite: bool = False


def export_model(
    model: Bundle | str | Path,
    out: str | Path,
    *,
    format: Literal["hf"] = "hf",
    overwrite: bool = False,
) -> Path:
    """Write an imported Geneformer as transformers reads it.

    Parameters
    ----------
    model
        A bundle that was imported, or tuned from one, or the path of its folder.
    out
        Folder to write: ``config.json``, ``model.safetensors``, and the dictionaries as JSON.
    format
        ``hf``.
    overwrite
        Replace a folder that this has written.

    Returns
    -------
    ``out``. ``transformers`` loads it without a warning, and the tensors of a model that was
    imported and not changed are equal to the bit.

    Raises
    ------
    ConfigError
        BERT cannot express the model, or the folder exists.
    """
    if format != "hf":
        raise ConfigError(f"format={format!r}: there is hf, the layout of transformers.")
    bundle = model_for("export", (Bundle,), model, device="cpu")
    out = Path(out).expanduser()
    _refuse_inexpressible(bundle)
    if out.exists() and not (overwrite and (out / _WEIGHTS).is_file()):
        raise ConfigError(
            f"out={out} exists"
            + (" and is not what export writes: choose another." if overwrite else
               ": set overwrite=true, or another out.")
        )  # fmt: skip
    source_V = source_tokens(bundle)
    tensors = bert_tensors(bundle, source_V)
    moved = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_directory(out, needed=sum(one.nbytes for one in moved.values())) as folder:
        save_file(moved, folder / _WEIGHTS, metadata={"format": "pt"})
        _write(folder / CONFIG, _config(bundle, source_V))
        names = bundle.vocabulary.token_ids()
        genes = {
            names[token]: int(source_V[token])
            for token in np.argsort(source_V)
            if source_V[token] >= 0 and not names[token].startswith("<")
        }
        _write(folder / _DICTIONARY, {**_specials(bundle), **genes})
        medians = {
            names[token]: float(bundle.medians_V[token])
            for token in np.flatnonzero(np.isfinite(bundle.medians_V))
        }
        _write(folder / _MEDIANS, medians)
    return out


def _write(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def _refuse_inexpressible(bundle: Bundle) -> None:
    shape = bundle.model.settings
    why = None
    if shape.hosts == "genecompass":
        why = (
            "is a GeneCompass, whose values, knowledge and species token no class of transformers "
            "has: it stays a bundle"
        )
    elif shape.hosts == "native":
        own = [
            said
            for said, is_so in (
                ("normalises before its blocks", shape.norm == "pre"),
                ("reads the values of genes", shape.values),
                ("has no positions", shape.position == "none"),
                ("gates its feed-forward part", shape.activation == "swiglu"),
                ("adds species and depth to the cell token", True),
            )
            if is_so
        ]
        why = f"is a model of our own, which BERT cannot express: it {', '.join(own)}"
    if why is not None:
        raise ConfigError(
            f"format=hf: the bundle {why}. What `genemodel import` made of a Geneformer, and what "
            "was tuned from that, can be exported."
        )


def _specials(bundle: Bundle) -> dict[str, int]:
    said = bundle.vocabulary.provenance.get("published_tokens", "")
    found = dict(part.split("=") for part in said.split())
    if not {"pad", "mask"} <= set(found):
        raise DataError(
            "The vocabulary of the bundle does not say which published tokens its special ones "
            "are: it was grown or made anew. Export the model that was imported."
        )
    return {f"<{role}>": int(token) for role, token in found.items()}


def source_tokens(bundle: Bundle) -> np.ndarray:
    """Give the published token of each of ours, int64 (V,); −1 for a cell token that is not one.

    Genes have in both the same order, and fill what the special tokens leave.
    """
    special = _specials(bundle)
    order = [special["<pad>"], special["<mask>"], special.get("<cls>", -1)]
    if "<eos>" in special:
        order.append(special["<eos>"])
    n = len(bundle.vocabulary)
    left = np.setdiff1d(np.arange(n - (order[2] < 0)), order)
    return np.concatenate([order, left]).astype(np.int64)


def bert_tensors(bundle: Bundle, source_V: np.ndarray) -> dict[str, Tensor]:
    """Give the tensors of a hosted Geneformer under BERT's names, in BERT's order of tokens."""
    state = bundle.model.state_dict()
    to_Q = torch.from_numpy(np.argsort(source_V)[int((source_V < 0).sum()) :].copy())
    found = {
        WORD: state["embedding.token.weight"][to_Q],
        POSITION: state["embedding.rank.weight"],
        KIND: state["embedding.kind.weight"],
        **_pair(state, "embedding.norm", "bert.embeddings.LayerNorm"),
    }
    for i, block in enumerate(bundle.model.blocks):
        assert isinstance(block, Block)
        own, ours = f"bert.encoder.layer.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            parts = state[f"{ours}.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                found[f"{own}.attention.self.{name}.{kind}"] = part.clone()
        found |= _pair(state, f"{ours}.out", f"{own}.attention.output.dense")
        found |= _pair(state, f"{ours}.norm1", f"{own}.attention.output.LayerNorm")
        found |= _pair(state, f"{ours}.ffn.up", f"{own}.intermediate.dense")
        found |= _pair(state, f"{ours}.ffn.down", f"{own}.output.dense")
        found |= _pair(state, f"{ours}.norm2", f"{own}.output.LayerNorm")
    heads, kind_of = bundle.heads, head_of(bundle)
    if kind_of == "masked":
        transform = "cls.predictions.transform"
        found |= _pair(heads, "published_gene.dense", f"{transform}.dense")
        found |= _pair(heads, "published_gene.norm", f"{transform}.LayerNorm")
        found["cls.predictions.bias"] = heads["published_gene.bias_V"][to_Q]
    if kind_of in ("cells", "genes"):
        found |= _pair(heads, "published_classifier", "classifier")
    if kind_of in ("cells", "none") and "published_pooler.weight" in heads:
        found |= _pair(heads, "published_pooler", "bert.pooler.dense")
    if kind_of == "none":  # BertModel has no name around it
        found = {name.removeprefix("bert."): tensor for name, tensor in found.items()}
    return found


def _pair(state: dict[str, Tensor], ours: str, theirs: str) -> dict[str, Tensor]:
    return {f"{theirs}.{part}": state[f"{ours}.{part}"] for part in ("weight", "bias")}


def head_of(bundle: Bundle) -> str:
    """Say which published head a bundle has: masked, cells, genes or none."""
    if "published_gene.bias_V" in bundle.heads:
        return "masked"
    if "published_classifier.weight" in bundle.heads:
        return "cells" if "published_pooler.weight" in bundle.heads else "genes"
    return "none"


def _config(bundle: Bundle, source_V: np.ndarray) -> dict[str, Any]:
    shape, head = bundle.model.settings, head_of(bundle)
    kept = dict(bundle.settings.get("published", {}).get("config", {}))
    if head not in ("cells", "genes"):
        for name in ("id2label", "label2id", "problem_type"):
            kept.pop(name, None)
    return {
        "attention_probs_dropout_prob": shape.dropout,
        "initializer_range": 0.02,
        **kept,
        "architectures": [_CLASSES[head]],
        "model_type": "bert",
        "vocab_size": int((source_V >= 0).sum()),
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.ffn,
        "hidden_act": shape.activation,
        "hidden_dropout_prob": shape.dropout,
        "max_position_embeddings": shape.max_rank + 1,
        "type_vocab_size": 2,
        "layer_norm_eps": shape.norm_eps,
        "pad_token_id": _specials(bundle)["<pad>"],
        "position_embedding_type": "absolute",
        "tie_word_embeddings": True,
        "dtype": "float32",
        "genemodel": genemodel.__version__,
    }


def run_export(settings: ExportSettings) -> str:
    """Export a bundle; returns where it is, and how it is loaded."""
    path = local_model(settings.model)
    out = settings.out or path.resolve().parent / f"{path.resolve().name}.hf"
    bundle = model_for("export", (Bundle,), path, device="cpu")
    written = export_model(bundle, out, format=settings.format, overwrite=settings.overwrite)
    loader = _CLASSES[head_of(bundle)]
    return f"{bundle!r}\nin {written}; load it with: {loader}.from_pretrained({str(written)!r})"
