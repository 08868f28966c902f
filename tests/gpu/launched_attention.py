"""The attention kernel's result on a GPU, beside the same in operators one after another."""

import torch
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_operands import AttentionOperands

from tests.kernels.test_attention import to_float64


def assert_right(eager, latents, keywords, **launch):
    """No further from float64 than 1.1 × ``eager``, plus two roundings of it and of the bias; all
    written."""
    dtype, exact = latents[0].dtype, eager(*to_float64(latents, keywords))
    batch, heads, queries, head_dim_v = exact.shape
    memory = torch.full(
        (batch, queries, heads, head_dim_v), float("nan"), dtype=dtype, device="cuda"
    )
    output = rank_space_attention(
        AttentionOperands(*latents, **keywords), out=memory.transpose(1, 2), **launch
    )
    budget = 1.1 * (eager(latents, keywords) - exact).norm()
    rounded = exact.norm()
    if keywords.get("v_bias") is not None:
        rounded += keywords["v_bias"].double()[:, None].expand_as(exact).norm()
    budget += 2 * torch.finfo(dtype).eps * rounded
    error = (output - exact).norm()
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}"
