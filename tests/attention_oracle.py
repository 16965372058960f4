"""Attention said slowly: what kernels are compared with on the CPU and on a GPU."""

import torch
from torch import Tensor


def attend_reference(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, starts_C1: Tensor, longest: int
) -> Tensor:
    """Say slowly what `attend` does: one block-diagonal score matrix, then softmax."""
    assert int(starts_C1.diff().max()) <= longest
    token = torch.arange(q_THK.shape[0], device=q_THK.device)
    cell_T = torch.searchsorted(starts_C1[1:].contiguous(), token.to(starts_C1.dtype), right=True)
    score_HTT = torch.einsum("thk,shk->hts", q_THK, k_THK) * q_THK.shape[-1] ** -0.5
    score_HTT = score_HTT.masked_fill(cell_T[:, None] != cell_T[None, :], float("-inf"))
    return torch.einsum("hts,shk->thk", score_HTT.softmax(-1), v_THK)
