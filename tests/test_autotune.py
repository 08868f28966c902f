"""From an option to a tile in the graph: who is measured, who is not, and what the report says.

A device of a given generation is made up beside CPU tensors, on which the same operators run on
libraries, and a clock stands for events (see ``tuning/test_fastest.py``).
"""

import pytest
import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.tiles import TileConfig
from torch import nn
from torch._subclasses import FakeTensorMode

import flashsvd_compile as fsc
from flashsvd_compile import pipeline
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.tiling import MAX_TIMED
from flashsvd_compile.tuning import circumstances, fastest

KIB = 1024
TENSOR_CORES = {2: 2e14, 4: 1.9e13}


class Attention(nn.Module):
    """Four heads of 32 at rank 8."""

    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(128, 4 * 8, bias=False, dtype=dtype) for _ in "qkv")
        self.factors = nn.ParameterList(torch.randn(4, 8, 32, dtype=dtype) / 3 for _ in "qkv")

    def forward(self, x):
        latents = [u(x).unflatten(-1, (4, 8)).transpose(1, 2) for u in self.down]
        q, k, v = (p @ f for p, f in zip(latents, self.factors, strict=True))
        return F.scaled_dot_product_attention(q, k, v)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """``gpu(generation, sram_kib)`` puts one in place and returns the tiles that get timed."""
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    timed = []

    def fake_clock(runs, device, deadline):
        timed.extend(runs)
        return {tile: float(-index) for index, tile in enumerate(runs)}  # the last is fastest

    def put(generation, sram_kib=99):
        device = Device("made up", "cuda", sram_kib * KIB, TENSOR_CORES, 3.6e12, 3e12, 4e-6,
                        generation)  # fmt: skip
        monkeypatch.setattr(pipeline, "device_for", lambda device_of_site: device)
        monkeypatch.setattr(fastest, "_can_be_timed", lambda device: True)
        monkeypatch.setattr(fastest, "_free_bytes", lambda device: 2**33)
        monkeypatch.setattr(circumstances, "device_name", lambda device: generation)
        monkeypatch.setattr(fastest, "_timed", fake_clock)
        return timed

    return put


def run(options=None, length=50, mode=None):
    """Compiles, runs and checks; returns the plan as explained afterwards."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(2, length, 128, dtype=torch.bfloat16)
    options = {"attention": "rank_space", "compiler": "eager"} | (options or {})
    with torch.no_grad():
        compiled = torch.compile(model, backend="flashsvd", options=options)
        torch.testing.assert_close(compiled(x), model(x), atol=0.05, rtol=0.05)
        return told(options, model, x)


def told(options, model=None, x=None):
    model = model or Attention()
    x = torch.randn(2, 50, 128, dtype=torch.bfloat16) if x is None else x
    with torch.no_grad():
        explanation = fsc.explain(model, x, options=options)
    (site,) = [s for s in explanation.sites if s.kind == "attention"]
    assert site.lowering == "rank_space"
    assert site.plan.tiling.source in str(explanation)
    (graph,) = explanation.graphs
    assert f"tile = {list(site.plan.tile)}" in graph.after
    assert site.to_dict()["plan"]["tile_from"] == site.plan.tiling.source
    return site.plan


@pytest.mark.parametrize("generation", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120", ""])
def test_an_unknown_gpu_is_measured_once(gpu, generation):
    timed = gpu(generation)
    plan = run()
    assert 1 < len(timed) <= MAX_TIMED
    assert plan.tile == timed[-1]
    assert (plan.tiling.source, plan.tiling.is_measured) == ("measured before", True)
    assert 0 < plan.sram_bytes <= 99 * KIB
    count = len(timed)
    assert run().tile == plan.tile
    assert len(timed) == count


def test_a_gpu_with_a_table_is_not_measured(gpu):
    timed = gpu("sm_90", 227)
    plan = run()
    assert timed == []
    assert plan.tiling.source == "table sm_90"
    assert TileConfig(*plan.tile) == TileConfig(128, 32, 4, 4, max_registers=128)


@pytest.mark.parametrize("options", [{"autotune": True}, {"max_autotune": True}], ids=str)
def test_but_is_where_that_is_asked(gpu, options):
    timed = gpu("sm_90", 227)
    assert run(options).tile == timed[-1]


@pytest.mark.parametrize(
    "options", [{"autotune": False}, {"autotune": False, "max_autotune": True}]
)
def test_switched_off_nothing_is_measured_nor_read(gpu, options):
    timed = gpu("sm_86")
    options = {"autotune": False} | options
    first = run(options)
    assert timed == []
    assert first.tiling.source == "portable list"
    assert run().tile != first.tile
    assert run(options).tile == first.tile


@pytest.mark.parametrize("budget", [20, 48, 64])
def test_a_budget_of_shared_memory_holds_for_what_is_timed(gpu, budget):
    timed = gpu("sm_86")
    run()
    timed.clear()
    plan = run({"sram_budget": f"{budget}KiB"})
    sizes = dict(plan.tiling.candidates)
    assert len(timed) > 1
    assert all(0 < sizes[tile] <= budget * KIB for tile in timed)
    assert plan.tile == timed[-1]


def test_lengths_of_one_power_of_two_share_a_measurement(gpu):
    timed = gpu("sm_86")
    run(length=50)
    count = len(timed)
    run(length=60)
    assert len(timed) == count
    run(length=70)
    assert len(timed) == 2 * count


def test_dynamic_lengths_are_measured_at_the_example(gpu):
    timed = gpu("sm_86")
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(2, 50, 128, dtype=torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    options = {"attention": "rank_space", "compiler": "eager"}
    with torch.no_grad():
        compiled = torch.compile(model, backend="flashsvd", options=options)
        compiled(x)
        count = len(timed)
        assert 1 < count <= MAX_TIMED
        other = torch.randn(2, 200, 128, dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(other), model(other), atol=0.05, rtol=0.05)
    assert len(timed) == count


def test_explaining_measures_nothing(gpu):
    timed = gpu("sm_86")
    plan = told({"attention": "rank_space"})
    assert timed == []
    assert plan.tiling.source == "portable list"


def test_fake_inputs_are_not_measured(gpu):
    timed = gpu("sm_86")
    torch._dynamo.reset()
    options = {"attention": "rank_space", "compiler": "eager"}
    with FakeTensorMode(), torch.no_grad():
        model = Attention()
        compiled = torch.compile(model, backend="flashsvd", options=options)
        compiled(torch.randn(2, 50, 128, dtype=torch.bfloat16))
    assert timed == []
