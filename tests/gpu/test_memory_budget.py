"""Memory budgets on a GPU: kept as the allocator counts, by the planned route, and right."""

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from bench.measure import peak_transient_bytes
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS, HEAD_DIM, RANK = 4, 64, 40
HIDDEN = HEADS * HEAD_DIM


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(PerHeadLowRankLinear(HIDDEN, HEADS, HEAD_DIM, RANK) for _ in "qkv")
        self.out = LowRankLinear(HIDDEN, HIDDEN, 64)
        self.up, self.down = LowRankLinear(HIDDEN, 1024, 64), LowRankLinear(1024, HIDDEN, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2))

    def forward(self, x, mask):
        q, k, v = (p(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for p in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.norms[0](x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norms[1](x + self.down(nn.functional.gelu(self.up(x))))


@pytest.mark.parametrize(
    ("batch", "length", "share"), [(8, 512, 0.8), (6, 333, 0.8), (1, 2048, 0.9)]
)
@torch.no_grad()
def test_a_budget_is_kept(batch, length, share):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.ModuleList([Layer(), Layer()]).cuda().bfloat16()
    lengths = torch.randint(1, length + 1, (batch, 1, 1, 1), device="cuda")
    mask = torch.arange(length, device="cuda") < lengths
    x = torch.randn(batch, length, HIDDEN, device="cuda", dtype=torch.bfloat16)

    def run(x, mask):
        for layer in model:
            x = layer(x, mask)
        return x

    free = fsc.explain(run, x, mask, options={"feed_forward": "streamed"}).peaks[0]
    options = {"memory_budget": int(free.transient_bytes * share), "feed_forward": "streamed"}
    told = fsc.explain(run, x, mask, options=options)
    assert any(s.plan is not None and s.plan.blocks is not None for s in told.sites)
    compiled = torch.compile(run, backend="flashsvd", options=options)
    ours, eager = compiled(x, mask), run(x, mask)
    kept = peak_transient_bytes(lambda: compiled(x, mask), "cuda") - x.nbytes
    assert kept <= options["memory_budget"]
    assert abs(told.peaks[0].total_bytes - x.nbytes - kept) <= 0.15 * kept + 2**16
    model.double()
    exact = run(x.double(), mask)
    error, budget = ((y.double() - exact).norm() for y in (ours, eager))
    assert error <= 1.1 * budget
