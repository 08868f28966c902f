"""Attention's gradient on a GPU: right in every form of mask and heads, and no scores in memory."""

import pytest
import torch
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention
from flashsvd_compile.lowering import ops

from tests.kernels.test_attention import any_bool, operands, padding

pytestmark = pytest.mark.gpu

TENSORS = ("q_factor", "q_bias", "k_factor", "v_factor", "v_bias")
NUMBERS = ("num_heads", "is_causal", "scale")
ROWS = 2048


def gradients(attend, latents, keywords, grad):
    leaves = [x.detach().requires_grad_() for x in (*latents, *(keywords[n] for n in TENSORS))]
    factors = dict(zip(TENSORS, leaves[3:], strict=True))
    return torch.autograd.grad(attend(*leaves[:3], **{**keywords, **factors}), leaves, grad)


def lifted(q, k, v, **keywords):
    return lifted_attention(AttentionOperands(q, k, v, **keywords))


def operator(q, k, v, **keywords):
    tensors = [keywords.get(name) for name in (*TENSORS, "mask")]
    numbers = {name: keywords[name] for name in NUMBERS}
    return ops.rank_space_attention(q, k, v, *tensors, **numbers, tile=[])


FORMS = {
    "padding": {"mask": padding},
    "any mask": {"mask": any_bool},
    "causal": {"is_causal": True},
    "rank 40": {"ranks": (40, 40, 40)},
    # columns that no kernel of SDPA takes as they are
    "odd ranks": {"ranks": (20, 12, 36), "mask": padding},
    "groups": {"heads": 4, "latent_heads": (4, 2, 2), "mask": padding},
    "one latent": {"heads": 4, "latent_heads": (1, 1, 1), "factor_heads": 4, "is_causal": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_gradients(form, dtype):
    sizes = {"queries": ROWS, "keys": ROWS, "head_dim": 64, "head_dim_v": 64}
    latents, keywords = operands(**sizes, dtype=dtype, **form)
    grad = torch.randn(2, keywords["num_heads"], ROWS, 64, device="cuda", dtype=dtype)
    wide = [x.double() for x in latents]
    wide_keywords = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x
        for name, x in keywords.items()
    }
    exact = gradients(lifted, wide, wide_keywords, grad.double())
    eager = gradients(lifted, latents, keywords, grad)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    got = gradients(operator, latents, keywords, grad)
    held = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
    if form.get("mask") is not any_bool:  # SDPA adds a mask as numbers: as many as scores, there
        assert held < 2 * keywords["num_heads"] * ROWS * ROWS * grad.element_size()
    for have, want, truth in zip(got, eager, exact, strict=True):
        eps = torch.finfo(dtype).eps
        budget = 1.1 * (want.double() - truth).norm() + 4 * eps * truth.norm() / ROWS**0.5
        assert (have.double() - truth).norm() <= budget
