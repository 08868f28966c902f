"""What torch's attention on a CPU holds beside its operands and output, against its allocations."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashsvd_compile as fsc
from bench.measure import peak_transient_bytes
from flashsvd_compile.compress.modules import PerHeadLowRankLinear
from flashsvd_compile.memory.cpu_attention import flash_scratch_bytes, mask_scratch_bytes

pytestmark = pytest.mark.usefixtures("fresh_inference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "rows", "keys", "width"),
    [(2, 3, 20, 20, 8), (1, 2, 191, 700, 16), (2, 1, 333, 100, 33), (1, 4, 1024, 1024, 8)],
)
def test_as_allocated(batch, heads, rows, keys, width, dtype):
    q, k = (torch.randn(batch, heads, n, width, dtype=dtype) for n in (rows, keys))
    held = peak_transient_bytes(lambda: F.scaled_dot_product_attention(q, k, k), "cpu")
    assert held - q.nbytes == flash_scratch_bytes(batch, heads, rows, keys, width, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 300, 200), (1, 1, 1, 200), (2, 3, 300, 200)], ids=str)
def test_a_boolean_mask_is_added_as_numbers(shape, dtype):
    q, k = (torch.randn(2, 3, n, 16, dtype=dtype) for n in (300, 200))
    mask = torch.rand(shape) < 0.9

    def held(mask):
        return peak_transient_bytes(
            lambda: F.scaled_dot_product_attention(q, k, k, attn_mask=mask), "cpu"
        )

    assert held(mask) - held(None) == mask_scratch_bytes(mask, 300, 200, False, dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(PerHeadLowRankLinear(64, 4, 16, 8) for _ in "qkv")

    def forward(self, x, mask):
        q, k, v = (p(x).unflatten(-1, (4, 16)).transpose(1, 2) for p in self.qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + mixed.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("kind", ["boolean", "added"])
def test_masks_of_all_scores_count(kind):
    scores = torch.randn(1, 1, 500, 500)
    mask = scores < 1 if kind == "boolean" else scores
    options = {"attention": "rank_space"}
    totals = fsc.explain(
        Attention(), torch.randn(1, 500, 64), mask, options=options, measure=True
    ).totals
    measured = totals.measured.compiled.peak.total_bytes
    assert measured == pytest.approx(totals.total_bytes, rel=0.01)
    assert measured > scores.nbytes * (1 if kind == "boolean" else 0.25)
