"""Lowerings timed on a GPU while a model is compiled: what was fastest runs, and is right."""

import json

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear
from flashsvd_compile.tuning import race
from tests.spelled import assert_as_good_as_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HEADS, HEAD_DIM, RANK = 6, 64, 40
HIDDEN = HEADS * HEAD_DIM
OPTIONS = {"autotune": True}


class Layer(nn.Module):
    def __init__(self, rank):
        super().__init__()
        self.qkv = nn.ModuleList(PerHeadLowRankLinear(HIDDEN, HEADS, HEAD_DIM, RANK) for _ in "qkv")
        self.out = LowRankLinear(HIDDEN, HIDDEN, 72)
        self.up, self.down = LowRankLinear(HIDDEN, 1536, rank), LowRankLinear(1536, HIDDEN, rank)

    def forward(self, x, mask):
        q, k, v = (p(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2) for p in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.parametrize(
    ("rank", "batch", "length", "dtype"),
    [
        (64, 8, 500, torch.bfloat16),
        (240, 3, 333, torch.bfloat16),
        (40, 2, 197, torch.bfloat16),
        (72, 2, 128, torch.float32),
    ],
    ids=str,
)
@torch.no_grad()
def test_the_fastest_runs_and_is_right(rank, batch, length, dtype, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = Layer(rank).cuda().to(dtype)
    lengths = torch.randint(1, length + 1, (batch, 1, 1, 1), device="cuda")
    mask = torch.arange(length, device="cuda") < lengths
    x = torch.randn(batch, length, HIDDEN, device="cuda", dtype=dtype)
    state = torch.cuda.get_rng_state()
    compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
    compiled(x, mask)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert_as_good_as_eager(model, compiled, (x, mask))
    told = fsc.explain(model, x, mask, options=OPTIONS)
    kept = [json.loads(path.read_text())["ms"] for path in (tmp_path / "lowerings").iterdir()]
    planned = [s.plan for s in told.sites if s.plan and s.plan.known_from == "measured before"]
    assert planned
    for plan in planned:
        own = next(ms for ms in kept if ms.get(plan.lowering) == pytest.approx(plan.seconds * 1e3))
        assert own[plan.lowering] <= 1.03 * min(own.values())
    torch._dynamo.reset()
    monkeypatch.setattr(race, "_measured", lambda *_: pytest.fail("nothing is timed twice"))
    torch.compile(model, backend="flashsvd", options=OPTIONS)(x, mask)
