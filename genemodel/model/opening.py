"""The vectors of the cells alone: the last block calculates the opening tokens and no others.

Axes as in ``genemodel.batches.batch``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from genemodel.batches.batch import CellBatch
from genemodel.model.gene_model import Block, GeneModel, opening_tokens


def encode_opening(model: GeneModel, batch: CellBatch) -> Tensor:
    """Give the cells' opening tokens as the model leaves them, (C, D), and calculate no more.

    They are ``model(batch).cell_CD`` of a model whose vectors are those of the opening tokens: of
    the last block only that token's query, output and feed-forward part are needed, and keys and
    values of the others. A published model is read below its last block, which is left out.
    """
    x_TD = model.embedding(batch)
    read = model.blocks[: model.cell_stop]
    for block in read[:-1]:
        x_TD = block(x_TD, batch.starts_C1, batch.longest)
    last = read[-1]
    assert isinstance(last, Block)
    first_C, _ = opening_tokens(batch.starts_C1, x_TD.shape[0])
    x_CD = _opening(last, x_TD, first_C, batch.segment_T)
    if model.final_norm.pre:
        x_CD = F.layer_norm(
            x_CD, x_CD.shape[-1:], model.final_norm.weight, model.final_norm.bias,
            model.final_norm.eps,
        )  # fmt: skip
    return x_CD


def _opening(block: Block, x_TD: Tensor, first_C: Tensor, segment_T: Tensor) -> Tensor:
    """Give rows ``first_C`` of ``block(x_TD)``, (C, D)."""
    x_CD = x_TD.index_select(0, first_C)
    if block.pre:
        x_CD = x_CD + _attended(block, block.norm1(x_TD), first_C, segment_T)
        return x_CD + block.ffn(block.norm2(x_CD))
    stream = x_TD.dtype
    x_CD = block.norm1(x_CD + _attended(block, x_TD, first_C, segment_T)).to(stream)
    return block.norm2(x_CD + block.ffn(x_CD)).to(stream)


def _attended(block: Block, x_TD: Tensor, first_C: Tensor, segment_T: Tensor) -> Tensor:
    """Attention of the opening tokens over their cells, (C, D)."""
    width = x_TD.shape[1]
    weight, bias = block.qkv.weight, block.qkv.bias
    q_CD = F.linear(x_TD[first_C], weight[:width], None if bias is None else bias[:width])
    kv = F.linear(x_TD, weight[width:], None if bias is None else bias[width:])
    k_THK, v_THK = kv.view(kv.shape[0], 2, block.heads, -1).unbind(1)
    q_CHK = q_CD.view(q_CD.shape[0], block.heads, -1)
    score_TH = (q_CHK.index_select(0, segment_T) * k_THK).sum(-1).float()
    score_TH = score_TH * q_CHK.shape[-1] ** -0.5
    n_C, heads = q_CHK.shape[:2]
    index_TH = segment_T[:, None].expand(-1, heads)
    top_CH = torch.full((n_C, heads), float("-inf"), device=score_TH.device)
    top_CH = top_CH.scatter_reduce(0, index_TH, score_TH, "amax")
    weight_TH = torch.exp(score_TH - top_CH.index_select(0, segment_T))
    total_CH = torch.zeros_like(top_CH).index_add(0, segment_T, weight_TH)
    mixed = v_THK.float() * weight_TH[..., None]
    out_CHK = torch.zeros_like(q_CHK, dtype=torch.float32).index_add(0, segment_T, mixed)
    out_CHK = out_CHK / total_CH.clamp_min(torch.finfo(torch.float32).tiny)[..., None]
    return block.out(out_CHK.to(x_TD.dtype).flatten(1))
