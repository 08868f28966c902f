"""Attention on lifted operands: the plain expression that rank space is measured against.

    softmax(scale · (P_q V_qᵀ + b_q) (P_k V_kᵀ)ᵀ + mask) (P_v V_vᵀ + b_v)

Plain differentiable torch for any dtype and device, with the operands of
:mod:`attention_operands`. Q, K and V exist at full width, [B, H, ·, D]; each is rounded to the
dtype once, as an unfused model does.
"""

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_operands import attention_shape
from torch import Tensor


def lifted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    num_heads: int,
    q_factor: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_factor: Tensor | None = None,
    v_factor: Tensor | None = None,
    v_bias: Tensor | None = None,
    mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float,
) -> Tensor:
    """Lift q, k and v, then attend. Returns [B, H, M, D_v] in memory laid out [B, M, H, D_v]."""
    shape = attention_shape(
        q,
        k,
        v,
        num_heads=num_heads,
        q_factor=q_factor,
        q_bias=q_bias,
        k_factor=k_factor,
        v_factor=v_factor,
        v_bias=v_bias,
        mask=mask,
    )
    queries = lift(q, q_factor, q_bias, num_heads)
    keys = lift(k, k_factor, None, num_heads)
    values = lift(v, v_factor, v_bias, num_heads)
    if mask is not None:
        mask = attention_mask(mask, is_causal, shape.queries, shape.keys, q.dtype)
    output = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=is_causal and mask is None,
        scale=scale,
    )
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def repeat_heads(operand: Tensor, num_heads: int, dim: int) -> Tensor:
    """Give each of ``num_heads`` heads the head that it reads; a single one is not copied."""
    if operand.shape[dim] == 1:
        sizes = [-1] * operand.dim()
        sizes[dim] = num_heads
        return operand.expand(sizes)
    repeats = num_heads // operand.shape[dim]
    return operand if repeats == 1 else operand.repeat_interleave(repeats, dim)


def attention_mask(
    mask: Tensor, is_causal: bool, queries: int, keys: int, dtype: torch.dtype
) -> Tensor:
    """``mask`` with causality in it, in a dtype that SDPA takes beside operands of ``dtype``."""
    if is_causal:
        row = torch.arange(queries, device=mask.device)[:, None]
        visible = torch.arange(keys, device=mask.device)[None, :] <= row
        if mask.dtype == torch.bool:
            return mask & visible
        mask = mask.masked_fill(~visible, float("-inf"))
    return mask if mask.dtype == torch.bool else mask.to(torch.promote_types(mask.dtype, dtype))


def lift(latent: Tensor, factor: Tensor | None, bias: Tensor | None, num_heads: int) -> Tensor:
    """latent factorᵀ + bias for each head, [B, H, rows, D]; absent ones change nothing."""
    lifted = repeat_heads(latent, num_heads, 1)
    if factor is not None:
        lifted = torch.einsum("bhmr,hdr->bhmd", lifted, repeat_heads(factor, num_heads, 0))
    if bias is not None:
        lifted = lifted + repeat_heads(bias, num_heads, 0)[:, None, :]
    return lifted
