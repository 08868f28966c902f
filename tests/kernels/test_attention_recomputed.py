"""Which width attention's gradient recomputes at, and that both give what lifted attention does."""

import pytest
import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_recomputed import recomputed_attention
from flashsvd_compile.kernels.attention_reference import lifted_attention

from tests.kernels.test_attention import operands, padding

D = 32


@pytest.fixture
def attended(monkeypatch):
    """Columns of keys and values, for each call of SDPA."""
    seen, attend = [], F.scaled_dot_product_attention

    def record(q, k, v, **options):
        seen.append((k.shape[-1], v.shape[-1]))
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    return seen


@pytest.mark.parametrize(
    ("ranks", "lifted", "width"),
    [
        ((40, 16, 16), "qkv", 16),  # queries are brought to the keys' rank
        ((16, 8, 24), "qkv", 24),
        ((16, 16, D), "qkv", D),  # as many columns as lifted, and no lift of keys
        ((16, 16, D + 8), "qkv", D),
        ((16, D + 8, 16), "qkv", D),
        ((16, 16, 16), "qv", D),  # dense keys
    ],
)
def test_the_narrower_form_is_recomputed(attended, ranks, lifted, width):
    latents, keywords = operands(ranks=ranks, lifted=lifted, mask=padding, dtype=torch.float64)
    tensors = [
        *latents,
        *(x for x in keywords.values() if torch.is_tensor(x) and x.is_floating_point()),
    ]
    for x in tensors:
        x.requires_grad_()
    of = AttentionOperands(*latents, **keywords)
    got = recomputed_attention(of)
    assert attended == [(width, width)]
    expected = lifted_attention(of)
    torch.testing.assert_close(got, expected)
    grad = torch.randn_like(expected)
    for have, want in zip(
        torch.autograd.grad(got, tensors, grad), torch.autograd.grad(expected, tensors, grad),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(have, want)
