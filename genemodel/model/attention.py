"""The one door to attention: packed cells in, packed cells out, whatever the device.

``attend`` lets every token see the tokens of its own cell and no others. On CUDA in half precision
it is torch's own ``varlen_attn``, and cells padded to one length where that kernel does not go
(full precision, heads too wide). On a CPU it is a loop over cells around the fused kernel, which
beats padding with a mask because nothing is computed on padding; a custom operator, so that a
compiled model stays one graph. None of them waits for the device.

Axes: T tokens, H heads, K head width, C cells.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


def attend(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, starts_C1: Tensor, longest: int) -> Tensor:
    """Softmax attention within every cell.

    Parameters
    ----------
    q_THK, k_THK, v_THK
        Queries, keys and values of the packed tokens.
    starts_C1
        First token of every cell, int32; the last entry is T; empty cells are allowed.
    longest
        No cell is longer; only an upper bound, so a constant keeps compiled shapes constant.

    Returns
    -------
    Tensor of shape (T, H, K).
    """
    if q_THK.device.type != "cpu":
        if q_THK.dtype not in (torch.bfloat16, torch.float16) or not flash_fits(q_THK.shape[2]):
            return attend_padded(q_THK, k_THK, v_THK, starts_C1, longest)
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(q_THK, k_THK, v_THK, starts_C1, starts_C1, longest, longest)
        assert isinstance(out, Tensor)  # the log-sum-exp comes only when asked for
        return out
    out, _ = _per_cell(q_THK, k_THK, v_THK, starts_C1)
    return out


def flash_fits(head_width: int) -> bool:
    """Whether FlashAttention-2 has a kernel for heads of this width."""
    return head_width % 8 == 0 and head_width <= 256


def attend_padded(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, starts_C1: Tensor, longest: int
) -> Tensor:
    """Pad every place to ``longest`` and mask: any device, any precision, constant shapes.

    It computes on padding, two to four times as much as there is to compute.
    """
    n_tokens = q_THK.shape[0]
    first_C1, length_C1 = starts_C1[:-1, None].long(), starts_C1.diff()[:, None]
    rank_L = torch.arange(longest, device=q_THK.device)
    # Padding reads rows that follow, each another one: no row gathers the gradients of all of it.
    token_CL = (first_C1 + rank_L) % n_tokens
    # A place without tokens looks at a stranger: a softmax over nothing is not a number.
    sees_CL = (rank_L < length_C1) | (rank_L == 0)
    q, k, v = (
        x.index_select(0, token_CL.flatten()).unflatten(0, token_CL.shape).transpose(1, 2)
        for x in (q_THK, k_THK, v_THK)
    )  # (C, H, longest, K)
    out_CHLK = F.scaled_dot_product_attention(q, k, v, sees_CL[:, None, None, :])
    token_T = torch.arange(n_tokens, device=q_THK.device, dtype=starts_C1.dtype)
    place_T = torch.searchsorted(starts_C1[1:].contiguous(), token_T, right=True)
    row_T = place_T * longest + token_T - starts_C1[place_T]
    return out_CHLK.transpose(1, 2).flatten(0, 1).index_select(0, row_T)


def _spans(starts_C1: Tensor) -> list[tuple[int, int]]:
    edges = starts_C1.tolist()
    return [(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True) if b > a]


def _heads_first(x_THK: Tensor, a: int, b: int) -> Tensor:
    return x_THK[a:b].transpose(0, 1).unsqueeze(0)  # (1, H, tokens, K)


@torch.library.custom_op("genemodel::attend_per_cell", mutates_args=())
def _per_cell(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, starts_C1: Tensor
) -> tuple[Tensor, Tensor]:
    out_THK = torch.empty_like(q_THK, memory_format=torch.contiguous_format)
    logsumexp_TH = q_THK.new_zeros(q_THK.shape[:2], dtype=torch.float32)
    for a, b in _spans(starts_C1):
        q, k, v = (_heads_first(x, a, b) for x in (q_THK, k_THK, v_THK))
        out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
        out_THK[a:b] = out[0].transpose(0, 1)
        logsumexp_TH[a:b] = logsumexp[0].transpose(0, 1)
    return out_THK, logsumexp_TH


@_per_cell.register_fake
def _(q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, starts_C1: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q_THK, memory_format=torch.contiguous_format), q_THK.new_empty(
        q_THK.shape[:2], dtype=torch.float32
    )


@torch.library.custom_op("genemodel::attend_per_cell_backward", mutates_args=())
def _per_cell_backward(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    out_THK: Tensor,
    logsumexp_TH: Tensor,
    starts_C1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_THK, v_THK)
    )
    for a, b in _spans(starts_C1):
        grad, q, k, v, out = (
            _heads_first(x, a, b) for x in (grad_THK, q_THK, k_THK, v_THK, out_THK)
        )
        # The kernel reads the log-sum-exp with heads outside and tokens inside.
        logsumexp = logsumexp_TH[a:b].transpose(0, 1).unsqueeze(0)
        pieces = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, logsumexp, 0.0, False
        )
        for total, piece in zip((grad_q, grad_k, grad_v), pieces, strict=True):
            total[a:b] = piece[0].transpose(0, 1)
    return grad_q, grad_k, grad_v


@_per_cell_backward.register_fake
def _(
    grad_THK: Tensor,
    q_THK: Tensor,
    k_THK: Tensor,
    v_THK: Tensor,
    out_THK: Tensor,
    logsumexp_TH: Tensor,
    starts_C1: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THK, k_THK, v_THK)
    )
    return q, k, v


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    q_THK, k_THK, v_THK, starts_C1 = inputs
    ctx.save_for_backward(q_THK, k_THK, v_THK, *output, starts_C1)


def _backward(ctx: Any, grad_THK: Tensor, _grad_logsumexp_TH: Tensor) -> tuple[Tensor | None, ...]:
    return *_per_cell_backward(grad_THK, *ctx.saved_tensors), None


_per_cell.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.genemodel.attend_per_cell, get_raw=True)
def _flops(
    q_THK: Tensor, k_THK: Tensor, v_THK: Tensor, starts_C1: Tensor, *_: Any, **__: Any
) -> int:
    return sum(4 * (b - a) ** 2 for a, b in _spans(starts_C1)) * q_THK.shape[1] * q_THK.shape[2]


@register_flop_formula(torch.ops.genemodel.attend_per_cell_backward, get_raw=True)
def _flops_backward(grad_THK: Tensor, q_THK: Tensor, *others: Any, **_: Any) -> int:
    # Five matrix products against the forward's two: the scores are computed once more.
    starts_C1 = others[-1]
    return sum(10 * (b - a) ** 2 for a, b in _spans(starts_C1)) * q_THK.shape[1] * q_THK.shape[2]
