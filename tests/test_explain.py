"""``explain`` tells every site, compiles nothing, and leaves no trace on later compiles."""

import inspect
import json
from unittest.mock import patch

import pytest
import torch
from torch import nn

from flashsvd_compile import Explanation, explain
from flashsvd_compile.options import Options, OptionsError
from flashsvd_compile.report import SiteReport
from tests.spelled import LONE_PRODUCTS, OPTIONS, Attention, hidden_states, low_rank

ISOLATES = "isolate_recompiles" in inspect.signature(torch.compile).parameters


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(*low_rank(30, 60), nn.GELU(), *low_rank(60, 30))

    def forward(self, x, *, scale=1.0):
        return x + self.mlp(self.attention(x, x)) * scale


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(), Layer()])

    def forward(self, x, *, scale=1.0):
        for layer in self.layers:
            x = layer(x, scale=scale)
        return x


pytestmark = pytest.mark.usefixtures("fresh_inference")


def fused(explanation: Explanation) -> list[tuple[str, str, str | None]]:
    sites = [s for s in explanation.sites if s.kind not in LONE_PRODUCTS]
    return [(s.kind, s.where, s.lowering) for s in sites]


EXPECTED = [
    ("attention", "layers.0.attention", "rank_space"),
    ("feed_forward", "layers.0.mlp", "row_blocks"),
    ("attention", "layers.1.attention", "rank_space"),
    ("feed_forward", "layers.1.mlp", "row_blocks"),
]


def test_sites():
    told = explain(Model(), hidden_states(), options=OPTIONS)
    assert fused(told) == EXPECTED
    site = told.sites[0]
    assert isinstance(site, SiteReport)
    assert site.plan.lowering == site.lowering
    assert site.reason.code.value == "planned"
    assert len(told.graphs) == 1
    assert "aten.scaled_dot_product_attention" in told.graphs[0].before
    assert "flashsvd.rank_space_attention" in told.graphs[0].after


def test_text_and_json():
    told = explain(Model(), hidden_states(), options=OPTIONS)
    text = str(told)
    for part in (
        "2 attention rank_space",
        "in 1 graph; passes took",
        "normalize",
        "layers.1.mlp",
        "row_blocks",
        "planned",
    ):
        assert part in text
    record = json.loads(json.dumps(told.to_dict()))
    assert set(record) == {
        "sites", "graphs", "seconds", "peaks", "memory", "totals", "device", "factoring",
    }  # fmt: skip
    assert [s["where"] for s in record["sites"] if s["kind"] == "attention"] == [
        "layers.0.attention",
        "layers.1.attention",
    ]
    assert set(record["seconds"][0]) == {
        "normalize", "walk", "analysis", "plan", "rewrite", "measure",
    }  # fmt: skip
    assert set(record["sites"][0]) == {"kind", "where", "lowering", "reason", "plan"}
    assert set(record["sites"][0]["reason"]) == {
        "code",
        "observed",
        "required",
        "node",
        "source",
    }


# ---- for a device that need not be there ---------------------------------------------------------


def on_meta(batch: int = 128) -> tuple[Model, torch.Tensor]:
    return Model().bfloat16().to("meta"), hidden_states(batch, 256).bfloat16().to("meta")


@pytest.mark.parametrize(
    ("device", "sram_kib"), [("h100", 227), ("A100", 163), ("rtx 4090", 99), ("L4", 99)]
)
def test_a_gpu_by_its_name(device, sram_kib):
    told = explain(*on_meta(), device=device)
    assert [lowering for _, _, lowering in fused(told)] == ["rank_space", "streamed_whole"] * 2
    assert all(0 < s.plan.sram_bytes <= sram_kib * 1024 for s in told.sites if s.plan.tile)
    assert told.device == device.lower().replace(" ", "")
    assert f"planned for {told.device}: " in str(told)
    assert told.to_dict()["device"] == told.device


def test_tiles_are_of_the_named_generation():
    def sources(device):
        told = explain(*on_meta(), device=device)
        return {s.plan.tiling.source for s in told.sites if s.kind == "attention"}

    assert sources("h100") == {"table sm_90"}
    assert sources("a10") == {"portable list"}


def test_the_rates_of_the_named_device_count():
    def seconds(device):
        return [site.plan.seconds for site in explain(*on_meta(), device=device).sites if site.plan]

    assert all(h100 < l4 for h100, l4 in zip(seconds("h100"), seconds("l4"), strict=True))


def test_blocks_of_rows_are_those_of_the_named_device():
    def block_rows(device):
        told = explain(*on_meta(), device=device, options={"feed_forward": "row_blocks"})
        return told.sites[1].plan.block_rows

    assert block_rows("cpu") == block_rows(None) < block_rows("l4") < block_rows("h100")


def test_a_named_device_leaves_compiling_as_it_was():
    model, x = Model(), hidden_states()
    before = fused(explain(model, x, options=OPTIONS))
    explain(model, x, options=OPTIONS, device="h100")
    assert fused(explain(model, x, options=OPTIONS)) == before
    assert fused(explain(model, x, options=OPTIONS, device=torch.device("cpu"))) == before


@pytest.mark.parametrize(("device", "nearest"), [("h10", "h100"), ("rtx4900", "rtx4090"), ("", "")])
def test_a_device_that_nobody_knows(device, nearest):
    with pytest.raises(ValueError, match=f"unknown device {device!r}.*nearest is '{nearest}"):
        explain(Model(), hidden_states(), device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda")])
def test_a_gpu_of_a_machine_that_has_none(device):
    with pytest.raises(ValueError, match=r"no GPU here to be device 'cuda.*h100, h200"):
        explain(Model(), hidden_states(), device=device)


def test_a_near_miss_has_a_reason_and_no_plan():
    class Shared(Layer):
        def forward(self, x):
            wide = self.mlp[2](self.mlp[:2](x))
            return self.mlp[3:](wide), wide

    told = explain(Shared(), hidden_states(), options=OPTIONS)
    (miss,) = [s for s in told.sites if s.kind == "feed_forward"]
    assert (miss.lowering, miss.plan) == (None, None)
    assert miss.reason.code.value == "wide_has_other_user"
    assert "test_explain.py" in str(miss.reason) or "activation.py" in str(miss.reason)


def test_nothing_is_compiled():
    with patch("torch._inductor.compile_fx.compile_fx", side_effect=AssertionError):
        told = explain(Model(), hidden_states(), options={"max_autotune": True})
    assert told.sites


def test_kwargs_and_parsed_options():
    told = explain(Model(), x=hidden_states(), scale=2.0, options=Options.parse(OPTIONS))
    assert fused(told) == EXPECTED


def test_wrong_options():
    with pytest.raises(OptionsError, match="'attention'"):
        explain(Model(), hidden_states(), options={"atention": "auto"})


@pytest.mark.parametrize("of", ["compiled", "compiled_in_place", "flashsvd"])
def test_a_compiled_model_is_its_model(of):
    model = Model()
    if of == "compiled_in_place":
        model.compile(backend="eager")
    elif of == "compiled":
        model = torch.compile(model, backend="eager")
    else:
        model = torch.compile(model, backend="flashsvd", options=OPTIONS)
    x = hidden_states()
    before = model(x)
    assert fused(explain(model, x, options=OPTIONS)) == EXPECTED
    assert torch.equal(model(x), before)


def test_functions():
    model = Model()

    def twice(x):
        return model(model(x))

    told = explain(twice, hidden_states(), options=OPTIONS)
    assert len(fused(told)) == 8
    assert {s.where.split(".")[0] for s in told.sites} == {"model"}
    assert fused(explain(torch.compile(twice, backend="eager"), hidden_states(), options=OPTIONS))


def test_several_graphs():
    model = Model()

    def broken(x):
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    told = explain(broken, hidden_states(), options=OPTIONS)
    assert len(told.graphs) == len(told.seconds) == 2
    assert len(fused(told)) == 8
    assert "in 2 graphs" in str(told)


def test_no_sites():
    told = explain(nn.Linear(3, 3), torch.randn(2, 3))
    assert told.sites == ()
    assert "no sites" in str(told)


def test_a_failing_pass_raises_what_it_raised():
    broken = patch("flashsvd_compile.pipeline.plan_site", side_effect=ValueError("broken pass"))
    with broken, pytest.raises(ValueError, match=r"^broken pass$"):
        explain(Model(), hidden_states())


# ---- other compiles -----------------------------------------------------------------------------


class Count:
    def __init__(self) -> None:
        self.shapes: list[tuple] = []

    def __call__(self, gm, example_inputs):
        self.shapes.append(
            tuple(gm.graph.find_nodes(op="placeholder")[-1].meta["example_value"].shape)
        )
        return gm.forward


def test_explaining_does_not_make_later_compiles_dynamic():
    model, count = Model(), Count()
    explain(model, hidden_states(batch=2))
    run = torch.compile(model, backend=count)
    run(hidden_states(batch=3))
    run(hidden_states(batch=3))
    explain(model, hidden_states(batch=4))
    assert len(count.shapes) == 1
    assert all(isinstance(size, int) for size in count.shapes[0])


@pytest.mark.skipif(not ISOLATES, reason="this torch counts all compiles of one code together")
@torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
def test_the_recompile_limit_is_not_touched():
    model, count = Model(), Count()
    run = torch.compile(model, backend=count, dynamic=False)
    for batch in (2, 3, 4, 5):
        assert fused(explain(model, hidden_states(batch), options=OPTIONS)) == EXPECTED
    run(hidden_states(2))
    run(hidden_states(3))
    assert len(count.shapes) == 2


@torch._dynamo.config.patch(recompile_limit=1)
def test_the_recompile_limit_does_not_limit():
    model = Model()
    run = torch.compile(model, backend="eager", dynamic=False)
    for batch in (2, 3, 4):
        run(hidden_states(batch))
    for batch in (2, 3, 4, 5):
        assert fused(explain(model, hidden_states(batch), options=OPTIONS)) == EXPECTED


@pytest.mark.parametrize(("rank", "code"), [(27, "no_fused_lowering"), (28, "rank_too_large")])
def test_ranks_that_cost_more_than_the_matrix_are_told(rank, code):
    """64 · 48 / (64 + 48) = 27.4."""
    model = nn.Sequential(nn.Linear(64, rank, bias=False), nn.Linear(rank, 48))
    (site,) = explain(model, torch.randn(5, 64)).sites
    assert (site.kind, site.lowering, site.reason.code.value) == ("chain", "unfused", code)
    told = "a rank under 28, or the matrix itself: flashsvd_compile.merge_"
    assert site.reason.required == (told if rank == 28 else "")


def test_per_head_ranks_are_held_against_a_heads_own_matrix():
    class PerHead(nn.Module):
        def __init__(self, rank: int) -> None:
            super().__init__()
            self.down = nn.Parameter(torch.randn(4, rank, 64))
            self.lift = nn.Parameter(torch.randn(4, 16, rank))

        def forward(self, x):
            latent = torch.einsum("bmi,hri->bhmr", x, self.down)
            return torch.einsum("bhmr,hdr->bhmd", latent, self.lift)

    x = torch.randn(2, 5, 64)  # 64 · 16 / (64 + 16) = 12.8
    codes = [explain(PerHead(rank), x).sites[0].reason.code.value for rank in (12, 13)]
    assert codes == ["no_fused_lowering", "rank_too_large"]
