"""Smaller GPUs' tiles on the GPU at hand, and tiles measured on it, through the public door."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile import pipeline
from flashsvd_compile.planner.device import device_for
from flashsvd_compile.planner.tiling import MAX_TIMED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORCED = {"attention": "rank_space", "feed_forward": "streamed"}
SEED = 0
HIDDEN = 320


class Attention(nn.Module):
    """Three heads with latents of their own, and a mask whose rows differ."""

    def __init__(self, rank: int, head_dim: int = 64) -> None:
        super().__init__()
        self.rank = rank
        self.down = nn.ModuleList(nn.Linear(HIDDEN, 3 * rank, bias=False) for _ in "qkv")
        self.factors = nn.ParameterList(torch.randn(3, rank, head_dim) * rank**-0.5 for _ in "qkv")

    def forward(self, x, mask):
        latents = [u(x).unflatten(-1, (3, self.rank)).transpose(1, 2) for u in self.down]
        q, k, v = (p @ f for p, f in zip(latents, self.factors, strict=True))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class FeedForward(nn.Module):
    def __init__(self, rank: int, gated: bool) -> None:
        super().__init__()

        def low_rank(rows, columns):
            return nn.Sequential(nn.Linear(rows, rank, bias=False), nn.Linear(rank, columns))

        self.up, self.down = low_rank(HIDDEN, 424), low_rank(424, HIDDEN)
        self.gate = low_rank(HIDDEN, 424) if gated else None

    def forward(self, x, _mask):
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        return self.down(F.silu(self.gate(x)) * self.up(x))


MODELS = {
    **{f"attention_{rank}": lambda rank=rank: Attention(rank) for rank in (16, 37, 64)},
    "attention_96": lambda: Attention(96, head_dim=128),
    "attention_200": lambda: Attention(200, head_dim=256),
    **{
        f"feed_forward_{rank}": lambda rank=rank: FeedForward(rank, False) for rank in (37, 64, 128)
    },
    "gated_64": lambda: FeedForward(64, True),
    "gated_101": lambda: FeedForward(101, True),
}


def inputs(dtype, rows=150):
    x = torch.randn(2, rows, HIDDEN, device="cuda", dtype=dtype)
    mask = torch.rand(2, 1, rows, rows, device="cuda") > 0.4
    return x, mask


def check(model, compiled, given):
    """Ours errs no more than 1.1 times what the unfused eager model errs, plus a few ulp."""
    doubled = [x.double() if x.is_floating_point() else x for x in given]
    eager = model(*given)
    ours = compiled(*given)
    exact = model.double()(*doubled)
    model.to(eager.dtype)
    assert ours.isfinite().all()
    budget = 1.1 * (eager - exact).norm() + 2 * torch.finfo(eager.dtype).eps * exact.norm()
    assert (ours - exact).norm() <= budget


def planned(model, given, options):
    found = fsc.explain(model, *given, options=options)
    (site,) = [s for s in found.sites if s.kind not in ("chain", "siblings")]
    return site


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("budget", [48, 64, 99, 164, 227])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@torch.no_grad()
def test_every_budget_is_right(model, budget, dtype):
    if budget * 1024 > device_for(torch.device("cuda")).sram_bytes:
        pytest.skip("more than this GPU has")
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    options = {**FORCED, "sram_budget": f"{budget}KiB", "compiler": "eager", "autotune": False}
    model, given = model().cuda().to(dtype), inputs(dtype)
    site = planned(model, given, options)
    if site.lowering == "unfused":
        assert site.reason.code.value == "sram"
        return
    assert site.plan.sram_bytes <= budget * 1024
    check(model, torch.compile(model, backend="flashsvd", options=options), given)


@pytest.mark.parametrize("generation", ["sm_86", "sm_120", ""])
@pytest.mark.parametrize("model", ["attention_64", "feed_forward_64", "gated_101"])
@torch.no_grad()
def test_the_portable_list_is_right(model, generation, monkeypatch):
    """As on a GPU that no table is for: 99 KiB, and tiles in the portable order."""
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    device = replace(device_for(torch.device("cuda")), generation=generation, sram_bytes=99 * 1024)
    monkeypatch.setattr(pipeline, "device_for", lambda _: device)
    options = {**FORCED, "compiler": "eager", "autotune": False}
    model, given = MODELS[model]().cuda().bfloat16(), inputs(torch.bfloat16)
    assert planned(model, given, options).plan.tiling.source == "portable list"
    check(model, torch.compile(model, backend="flashsvd", options=options), given)


@pytest.mark.parametrize("model", ["attention_37", "feed_forward_64", "gated_64"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@torch.no_grad()
def test_tiles_are_measured_once_and_kept(model, compiler, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    options = {**FORCED, "compiler": compiler, "autotune": True}
    model, given = MODELS[model]().cuda().bfloat16(), inputs(torch.bfloat16)
    assert "measured" not in planned(model, given, options).plan.tiling.source
    state = torch.cuda.get_rng_state()
    check(model, torch.compile(model, backend="flashsvd", options=options), given)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    assert 1 < len(record["ms"]) <= MAX_TIMED
    assert all(ms > 0 for ms in record["ms"].values())
    assert record["ms"][str(record["tile"])] == min(record["ms"].values())
    site = planned(model, given, options)
    assert (list(site.plan.tile), site.plan.tiling.source) == (record["tile"], "measured before")


@torch.no_grad()
def test_what_is_measured_at_one_length_serves_dynamic_lengths(monkeypatch, tmp_path):
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    model = MODELS["feed_forward_64"]().cuda().bfloat16()
    compiled = torch.compile(
        model, backend="flashsvd", dynamic=True, options={**FORCED, "autotune": True}
    )
    for rows in (150, 77, 300):
        check(model, compiled, inputs(torch.bfloat16, rows))
    assert list(tmp_path.glob("*.json"))
