"""Attention as its gradient recomputes it: plain torch, at the width that costs less.

In rank space (``attention_library.py``) a pair of a query and a key costs twice the wider latent,
lifted (``attention_reference.py``) D + D_v; backward and forward alike, and so do the bytes of what
SDPA keeps for its own gradient. Operands: ``attention_operands.py``.
"""

from flashsvd_compile.kernels.attention_library import (
    attended_width,
    rank_space_attention_library,
)
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention
from torch import Tensor


def recomputed_attention(of: AttentionOperands) -> Tensor:
    """[B, H, M, D_v] in memory laid out [B, M, H, D_v]; differentiable."""
    lifted_columns = of.shape.head_dim_qk + of.shape.head_dim_v
    if 2 * attended_width(of) <= lifted_columns:
        return rank_space_attention_library(of)
    return lifted_attention(of)
