"""Attention on lifted operands: the plain expression that rank space is measured against.

    softmax(scale · (P_q V_qᵀ + b_q) (P_k V_kᵀ)ᵀ + mask) (P_v V_vᵀ + b_v)

or, with a soft-cap or a sink, what ``attention_scores.py`` makes of q, k (with b_k) and v.

Plain differentiable torch for any dtype and device, with the operands of
:mod:`attention_operands`. Q, K and V exist at full width, [B, H, ·, D]; each is rounded to the
dtype once, as an unfused model does.
"""

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_band import mask_of
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_scores import attend_by_scores
from flashsvd_compile.kernels.head_norm import normalized
from flashsvd_compile.kernels.rotation import rotated
from torch import Tensor


def lifted_attention(of: AttentionOperands) -> Tensor:
    """Lift q, k and v, then attend. Returns [B, H, M, D_v] in memory laid out [B, M, H, D_v]."""
    shape = of.shape  # operands that do not fit are named before they meet
    queries = lift(of.q, of.q_factor, of.q_bias, of.num_heads)
    if of.q_norm_eps:
        queries = normalized(queries, of.q_norm, of.q_norm_eps)
    if of.cos is not None and of.sin is not None:
        queries = rotated(queries, of.cos, of.sin, of.rotary_dim, of.rotary_pair)
    keys = lift(of.k, of.k_factor, of.counted_k_bias, of.num_heads)
    values = lift(of.v, of.v_factor, of.v_bias, of.num_heads)
    mask = mask_of(of, (slice(0, shape.queries), slice(0, shape.keys)))
    if not of.is_plain:
        output, _ = attend_by_scores(of, queries, keys, values, None, mask)
        return output.transpose(1, 2).contiguous().transpose(1, 2)
    output = F.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=of.is_causal and mask is None,
        scale=of.scale,
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


def lift(latent: Tensor, factor: Tensor | None, bias: Tensor | None, num_heads: int) -> Tensor:
    """latent factorᵀ + bias for each head, [B, H, rows, D]; absent ones change nothing."""
    lifted = repeat_heads(latent, num_heads, 1)
    if factor is not None:
        lifted = torch.einsum("bhmr,hdr->bhmd", lifted, repeat_heads(factor, num_heads, 0))
    if bias is not None:
        lifted = lifted + repeat_heads(bias, num_heads, 0)[:, None, :]
    return lifted
