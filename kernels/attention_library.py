"""Rank-space attention on library operators, for a CPU or any device without the Triton kernel.

    q̃      = (P_q V_qᵀ + b_q) V_k,  or  P_q (V_qᵀ V_k) + b_q V_k  where that is cheaper
    latent = SDPA(q̃, P_k, P_v)                       at width max(R_k, R_v)
    output = latent V_vᵀ + b_v

Operands: ``attention_operands.py``. K and V never exist at full width, and P_k and P_v of fewer
heads than H are not repeated. torch's flash attention on CPU takes one width for all three and
unit strides along it (torch 2.13: ``use_flash_attention_cpp``), or else falls back to scores in
memory: the narrower latent is padded with zero columns, which change neither scores nor output. A
GPU's does so where the width is no multiple of 16 bytes, or where heads come in groups and there is
a mask or more than 16 bits (torch 2.11: ``sdp_utils.cpp``): there latents are padded and repeated.
A soft-cap or a sink SDPA does not have: there scores of a block of queries at a time are in memory
(``attention_scores.py``), at the two ranks as they are.
Each operator rounds to the dtype: q̃ (and V_qᵀ V_k), the latent output, the output.
"""

import math

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_band import blocks_of, mask_of
from flashsvd_compile.kernels.attention_operands import AttentionOperands, AttentionShape
from flashsvd_compile.kernels.attention_reference import repeat_heads
from flashsvd_compile.kernels.attention_scores import attend_by_scores
from flashsvd_compile.kernels.head_norm import normalized
from flashsvd_compile.kernels.rotation import rotated
from torch import Tensor

GPU_ALIGNED_BYTES = 16


def rank_space_attention_library(of: AttentionOperands) -> Tensor:
    """[B, H, M, D_v] in memory laid out [B, M, H, D_v]; differentiable."""
    shape, num_heads = of.shape, of.num_heads
    queries = _rank_space_queries(of)
    if not of.is_plain:
        whole = slice(0, shape.queries), slice(0, shape.keys)
        return _by_scores(of, queries, mask_of(of, whole))
    latent, seen = _attended(of, queries)
    output = _lift(latent, of.v_factor, None if shape.keys == 0 else of.v_bias, num_heads)
    if seen is not None:
        output = torch.where(seen, output, 0.0)
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def _attended(of: AttentionOperands, queries: Tensor) -> tuple[Tensor, Tensor | None]:
    """The latent output [B, H, M, R_v], and which queries see a key, where a bias asks for it."""
    num_heads, width = of.num_heads, attended_width(of)
    has_mask = of.mask is not None or of.is_banded
    in_groups = not of.q.is_cuda or (not has_mask and of.q.element_size() == 2)
    # The least common multiple divides num_heads, as both do.
    kv_heads = math.lcm(of.k.shape[1], of.v.shape[1]) if in_groups else num_heads
    queries, keys, values = (
        _pad_rank(x, width)
        for x in (queries, repeat_heads(of.k, kv_heads, 1), repeat_heads(of.v, kv_heads, 1))
    )
    latents, seen = [], []
    for block in blocks_of(of):
        mask = mask_of(of, block)
        rows, shown = block
        latents.append(
            F.scaled_dot_product_attention(
                queries[:, :, rows],
                keys[:, :, shown],
                values[:, :, shown],
                attn_mask=mask,
                is_causal=of.is_causal and mask is None,
                scale=of.scale,
                enable_gqa=kv_heads != num_heads,
            )
        )
        if of.v_bias is not None and mask is not None:
            seen.append(_sees_a_key(mask))
    return _joined(latents)[..., : of.shape.rank_v], _joined(seen) if seen else None


def _joined(blocks: list[Tensor]) -> Tensor:
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)


def _by_scores(of: AttentionOperands, queries: Tensor, mask: Tensor | None) -> Tensor:
    num_heads, shift = of.num_heads, None
    if of.counted_k_bias is not None and of.k_factor is not None:
        # q b_k, one number for all keys
        columns = repeat_heads(of.counted_k_bias, num_heads, 0)[:, :, None]
        shift = _lift(of.q, of.q_factor, of.q_bias, num_heads) @ columns
    keys, values = (repeat_heads(x, num_heads, 1) for x in (of.k, of.v))
    latent, weight = attend_by_scores(of, queries, keys, values, shift, mask)
    output = _lift(latent, of.v_factor, None, num_heads)
    if of.v_bias is not None:
        output = output + weight * repeat_heads(of.v_bias, num_heads, 0)[:, None, :]
    return output.transpose(1, 2).contiguous().transpose(1, 2)


def attended_width(of: AttentionOperands) -> int:
    """Columns of queries, keys and values that SDPA is given."""
    multiple = GPU_ALIGNED_BYTES // of.q.element_size() if of.q.is_cuda else 1
    return -(-max(of.shape.rank_k, of.shape.rank_v) // multiple) * multiple


def _rank_space_queries(of: AttentionOperands) -> Tensor:
    """q̃ [B, H, M, R_k], unscaled."""
    q, q_factor, q_bias, k_factor, num_heads = (
        of.q, of.q_factor, of.q_bias, of.k_factor, of.num_heads,
    )  # fmt: skip
    if k_factor is None:
        queries = _lift(q, q_factor, q_bias, num_heads)
        if of.cos is None or of.sin is None:
            return queries
        if of.q_norm_eps:
            queries = normalized(queries, of.q_norm, of.q_norm_eps)
        return rotated(queries, of.cos, of.sin, of.rotary_dim, of.rotary_pair)
    to_rank_k = k_factor.transpose(-1, -2)
    if q_factor is None or not _is_absorbing_cheaper(of.shape):
        return _lift(_lift(q, q_factor, q_bias, num_heads), to_rank_k, None, num_heads)
    factor_heads = math.lcm(q_factor.shape[0], k_factor.shape[0])
    to_rank_k = repeat_heads(to_rank_k, factor_heads, 0)
    absorbed = to_rank_k @ repeat_heads(q_factor, factor_heads, 0)  # [heads, R_k, R_q]
    if q_bias is not None:
        heads = math.lcm(factor_heads, q_bias.shape[0])
        columns = repeat_heads(q_bias, heads, 0)[:, :, None]
        q_bias = (repeat_heads(to_rank_k, heads, 0) @ columns).squeeze(-1)  # b_q V_k
    return _lift(q, absorbed, q_bias, num_heads)


def _lift(latent: Tensor, factor: Tensor | None, bias: Tensor | None, num_heads: int) -> Tensor:
    """latent factorᵀ + bias for each head, in one product over all rows of a head."""
    batch, _, rows, _ = latent.shape
    latent = repeat_heads(latent, num_heads, 1)
    if bias is not None:
        bias = repeat_heads(bias, num_heads, 0)[:, None, :]
    if factor is None:
        return latent if bias is None else latent + bias
    of_heads = latent.transpose(0, 1).flatten(1, 2)  # [H, B·M, R], a view of memory [B, M, H, R]
    to_full_width = repeat_heads(factor, num_heads, 0).transpose(1, 2)
    if bias is None:
        lifted = torch.bmm(of_heads, to_full_width)
    else:
        lifted = torch.baddbmm(bias, of_heads, to_full_width)
    return lifted.unflatten(1, (batch, rows)).transpose(0, 1)


def _is_absorbing_cheaper(shape: AttentionShape) -> bool:
    """Multiplications of V_qᵀ V_k once and R_q × R_k a query, against D × (R_q + R_k) a query."""
    rows = shape.batch * shape.queries
    ranks = shape.rank_q * shape.rank_k
    two_lifts = shape.head_dim_qk * (shape.rank_q + shape.rank_k)
    return (shape.head_dim_qk + rows) * ranks < rows * two_lifts


def _pad_rank(operand: Tensor, width: int) -> Tensor:
    """Zero columns up to ``width``, and a stride of 1 along them."""
    if operand.shape[-1] < width:
        return F.pad(operand, (0, width - operand.shape[-1]))
    return operand if operand.stride(-1) == 1 else operand.contiguous()


def _sees_a_key(mask: Tensor) -> Tensor:
    """Which queries see a key at all, [B|1, H|1, M|1, 1]."""
    is_seen = mask if mask.dtype == torch.bool else mask != float("-inf")
    return is_seen.any(-1, keepdim=True)
