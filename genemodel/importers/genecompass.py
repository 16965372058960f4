"""GeneCompass's own tensors: species token, knowledge, fusion, value head.

Axes: V tokens of our vocabulary, Q of the published one, S species, D width.
"""

from typing import Any

import torch
from torch import Tensor

from genemodel.errors import DataError
from genemodel.importers.architecture import PRIORS, Recognised, Taker
from genemodel.model.hosted import FusionShape

_EMBEDDINGS = "bert.embeddings"
HOMOLOGS = f"{_EMBEDDINGS}.homologous_index"
SPECIES = ("human", "mouse")


def homologs(found: Recognised) -> Tensor:
    """For a human token that of its mouse homolog, itself for all others; int64 (Q,)."""
    index_Q = found.tensors.get(HOMOLOGS)
    if index_Q is None:
        return torch.arange(found.n_tokens)
    if index_Q.shape != (found.n_tokens,) or index_Q.is_floating_point():
        raise DataError(f"{HOMOLOGS} is {tuple(index_Q.shape)}: {found.n_tokens:,} tokens belong.")
    index_Q = index_Q.long()
    if index_Q.min() < 0 or index_Q.max() >= found.n_tokens:
        raise DataError(f"{HOMOLOGS} points beyond the {found.n_tokens:,} tokens: it is damaged.")
    return index_Q


def fusion_state(
    take: Taker, found: Recognised, source_V: Tensor, word_QD: Tensor
) -> tuple[FusionShape, dict[str, Tensor], dict[str, Any]]:
    """Give the shape of the fusion, its weights under our names, and what is to be noted.

    Raises
    ------
    DataError
        There are other species than human and mouse, or no knowledge and no values to fuse.
    """
    width = found.settings.width
    if found.n_species != len(SPECIES):
        raise DataError(
            f"{take.where} has {found.n_species} species tokens; GeneCompass has two (human and "
            "mouse), and of a model that was extended nobody here knows the further species."
        )
    homolog_Q = homologs(found)
    take.drop(HOMOLOGS)
    cat = take.tensors.get(f"{_EMBEDDINGS}.concat_embeddings.cat_fc.weight")
    if cat is None:
        raise DataError(f"{take.where} lacks {_EMBEDDINGS}.concat_embeddings.cat_fc.weight.")
    priors: list[tuple[str, int, int]] = []
    for name in PRIORS:
        table = take.tensors.get(f"{_EMBEDDINGS}.{name}_knowledge")
        if table is not None:
            if table.ndim != 2 or table.shape[0] != found.n_tokens:
                raise DataError(
                    f"{take.where}: {_EMBEDDINGS}.{name}_knowledge is {tuple(table.shape)}, but "
                    f"{found.n_tokens:,} rows belong there."
                )
            priors.append((name, int(table.shape[0]), int(table.shape[1])))
    beside = int(cat.shape[1]) - width * (1 + len(priors))
    if beside not in (0, 1):
        raise DataError(
            f"{take.where}: the fusion reads {cat.shape[1]:,} numbers, which are not a gene of "
            f"{width}, a value and {len(priors)} priors of {width} each."
        )
    shape = FusionShape(values=bool(beside), priors=tuple(priors))
    ours = "embedding.fusion"
    concat = f"{_EMBEDDINGS}.concat_embeddings"
    state = {
        **take.linear(f"{concat}.cat_fc", f"{ours}.up", width, int(cat.shape[1])),
        **take.norm(f"{concat}.cat_ln", f"{ours}.norm", width),
        **take.linear(f"{concat}.cat_proj", f"{ours}.down", width, width),
        "embedding.species.weight": take.take("bert.cls_embedding.weight", len(SPECIES), width),
        f"{ours}.alpha": take.tensors.pop("emb_warmup.alpha", torch.ones(())).float().reshape(()),
    }
    for name, table_rows, columns in priors:
        own = f"{ours}.tables.{name}"
        state[f"{own}.table_QP"] = take.take(f"{_EMBEDDINGS}.{name}_knowledge", table_rows, columns)
        projection = f"{_EMBEDDINGS}.{name}_embeddings.linear1"
        state |= take.linear(projection, f"{own}.project", width, columns)
    own_V = source_V.clamp_min(0)
    state[f"{ours}.row_SV"] = torch.stack([own_V, homolog_Q[own_V]])
    steps = take.tensors.pop("emb_warmup.steps", None)
    noted = {} if steps is None else {"training_passes": int(steps)}
    return shape, state, noted


def value_head_state(take: Taker, width: int) -> dict[str, Tensor]:
    """Give the weights of the value head, where there is one."""
    own, ours = "cls4value.predictions", "published_value"
    if f"{own}.transform.dense.weight" not in take.tensors:
        return {}
    state = {
        **take.linear(f"{own}.transform.dense", f"{ours}.dense", width, width),
        **take.norm(f"{own}.transform.LayerNorm", f"{ours}.norm", width),
        f"{ours}.out.weight": take.take(f"{own}.decoder.weight", 1, width),
    }
    bias = take.take(f"{own}.bias", 1)
    take.twin(f"{own}.decoder.bias", bias, f"{own}.bias")
    state[f"{ours}.out.bias"] = bias
    return state
