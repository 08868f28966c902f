"""Whole models on a GPU through the public door: the route that ran, and how right it is."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from transformers import (
    BertConfig,
    BertModel,
    LlamaModel,
    PhiModel,
    ViTConfig,
    ViTModel,
)

import flashsvd_compile as fsc
from flashsvd_compile.planner.device import device_for
from flashsvd_compile.planner.named_devices import DATA_SHEETS, device_named

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORCED = {"attention": "rank_space", "feed_forward": "streamed", "autotune": False}


def bert(attention: str = "sdpa") -> BertModel:
    config = BertConfig(
        vocab_size=100, hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=424, max_position_embeddings=512, attn_implementation=attention,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False).eval().cuda()
    fsc.compress_(model, keep=0.6)
    return model


def vit() -> ViTModel:
    config = ViTConfig(
        hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=424,
        image_size=48, patch_size=4,
    )  # fmt: skip
    model = ViTModel(config, add_pooling_layer=False).eval().cuda()
    fsc.compress_(model, keep=0.6)
    return model


def tokens(batch: int, length: int, padded: bool) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": torch.randint(0, 100, (batch, length), device="cuda")}
    if padded:
        lengths = torch.randint(1, length + 1, (batch, 1), device="cuda")
        inputs["attention_mask"] = (torch.arange(length, device="cuda") < lengths).long()
    return inputs


@torch.no_grad()
def check(model, compiled, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Ours errs no more than 1.1 times what the unfused eager model errs, plus a few ulp."""
    exact = copy.deepcopy(model).double()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    kept = inputs.get("attention_mask")
    reference, eager, ours = (
        (out if kept is None else out[kept.bool()]).double()
        for out in (exact(**doubled)[0], model(**inputs)[0], compiled(**inputs)[0])
    )
    assert ours.isfinite().all()
    budget = 1.1 * (eager - reference).norm() + 4 * torch.finfo(dtype).eps * reference.norm() / 64
    assert (ours - reference).norm() <= budget


def lowerings(model, inputs, options) -> set[tuple[str, str | None]]:
    with torch.no_grad():
        found = fsc.explain(model, **inputs, options=options)
    return {(s.kind, s.lowering) for s in found.sites if s.kind not in ("chain", "siblings")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
def test_bert_is_right_in_every_dtype(dtype, attention, padded):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = bert(attention).to(dtype)
    inputs = tokens(3, 77, padded)
    wanted = {("attention", "rank_space"), ("feed_forward", "streamed")}
    assert lowerings(model, inputs, FORCED) == wanted
    options = {**FORCED, "compiler": "eager"}
    check(model, torch.compile(model, backend="flashsvd", options=options), inputs, dtype)


def test_bert_under_inductor_serves_many_lengths_from_one_graph():
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = bert().to(torch.bfloat16)
    # Inductor's padding of small matmuls guards the number of rows, in any model.
    options = {**FORCED, "shape_padding": False}
    compiled = torch.compile(model, backend="flashsvd", options=options, dynamic=True)
    for batch, length in ((2, 64), (3, 129), (5, 17), (4, 300)):
        check(model, compiled, tokens(batch, length, padded=True), torch.bfloat16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_vit_under_inductor(mode):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = vit().to(torch.bfloat16)
    compiled = torch.compile(model, backend="flashsvd", mode=mode)
    for _ in range(3):  # CUDA graphs record on the second call and replay on the third
        pixels = torch.randn(4, 3, 48, 48, device="cuda")
        check(model, compiled, {"pixel_values": pixels}, torch.bfloat16)


@pytest.mark.parametrize(
    ("model_class", "norms"), [(LlamaModel, {}), (PhiModel, {"qk_layernorm": True})]
)
def test_rotated_queries_and_keys_under_inductor(model_class, norms):
    """Llama's queries are latents that the kernel turns. Phi's have a LayerNorm for each head, and
    are read at full width: the kernel scales their scores, by a number that Inductor makes a
    float64."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    config = model_class.config_class(
        vocab_size=100, hidden_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=424, use_cache=False, **norms,
    )  # fmt: skip
    model = model_class(config).eval().cuda()
    fsc.compress_(model, keep=0.4)
    model.to(torch.bfloat16)
    inputs = tokens(3, 77, padded=False)
    assert ("attention", "rank_space") in lowerings(model, inputs, FORCED)
    compiled = torch.compile(model, backend="flashsvd", options=FORCED)
    check(model, compiled, inputs, torch.bfloat16)


def test_row_blocks_on_a_gpu():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = bert().to(torch.bfloat16)
    options = {"attention": "unfused", "feed_forward": "row_blocks", "compiler": "eager"}
    inputs = tokens(3, 100, padded=True)
    wanted = {("attention", "unfused"), ("feed_forward", "row_blocks")}
    assert lowerings(model, inputs, options) == wanted
    check(model, torch.compile(model, backend="flashsvd", options=options), inputs, torch.bfloat16)


def test_gradients_reach_the_factors():
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = bert()
    inputs = tokens(2, 33, padded=True)
    compiled = torch.compile(model, backend="flashsvd", options=FORCED)
    compiled(**inputs)[0].square().mean().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(**inputs)[0].square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("budget", ["48KiB", "64KiB", "99KiB", "164KiB"])
def test_a_smaller_sram_budget_still_runs(budget):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = bert().to(torch.bfloat16)
    options = {**FORCED, "compiler": "eager", "sram_budget": budget}
    with torch.no_grad():
        found = fsc.explain(model, **tokens(2, 50, True), options=options)
    plans = [s.plan for s in found.sites if s.lowering in ("rank_space", "streamed")]
    assert plans
    assert all(p.sram_bytes <= int(budget.removesuffix("KiB")) * 1024 for p in plans)
    compiled = torch.compile(model, backend="flashsvd", options=options)
    check(model, compiled, tokens(2, 50, True), torch.bfloat16)


WARM_START = """
import json, torch
from torch import nn
from torch._dynamo.utils import counters

torch.manual_seed(0)
linear = lambda i, r, o: nn.Sequential(nn.Linear(i, r, bias=False), nn.Linear(r, o))
class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (linear(128, 32, 128) for _ in "qkv")
        self.up, self.down = linear(128, 32, 512), linear(512, 32, 128)
    def forward(self, x):
        q, k, v = (m(x).unflatten(-1, (2, 64)).transpose(1, 2) for m in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.down(nn.functional.gelu(self.up(mixed.transpose(1, 2).flatten(2))))
model = Layer().to("cuda", torch.bfloat16)
options = {"attention": "rank_space", "feed_forward": "streamed"}
with torch.no_grad():
    x = torch.randn(2, 100, 128, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="flashsvd", options=options)
    torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.02)
events = {kind: dict(counters[kind]) for kind in ("inductor", "aot_autograd")}
print(json.dumps(events))
"""


def test_a_warm_start_finds_the_kernels_in_the_caches(tmp_path):
    """The launches that Inductor sees are cached with the graph; the kernels are not lost on it."""
    found = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", WARM_START],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(json.loads(done.stdout.splitlines()[-1])["aot_autograd"])
    assert [run.get("autograd_cache_bypass", 0) for run in found] == [0, 0]
    assert [run.get("autograd_cache_hit", 0) for run in found] == [0, 1]


def test_inductor_writes_the_launches_itself():
    """No operator of ours is called, and nothing is copied before a kernel writes its output."""
    torch._dynamo.reset()
    model = bert().to(torch.bfloat16)
    compiled = torch.compile(model, backend="flashsvd", options=FORCED)
    with torch.no_grad():
        _, (code,) = run_and_get_code(lambda: compiled(**tokens(2, 64, padded=True)))
    assert "rank_space_attention_kernel" in code
    assert "_feed_forward_kernel" in code
    assert "torch.ops.flashsvd" not in code


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_writes_launches_with_tensor_descriptors(dynamic):
    torch.manual_seed(0)
    torch._dynamo.reset()
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a Hopper's tiles")
    model = LatentAttention(rank=64).to("cuda", torch.bfloat16)
    options = {"attention": "rank_space"}
    compiled = torch.compile(model, backend="flashsvd", options=options, dynamic=dynamic)
    codes = []
    for batch, rows in ((2, 100), (3, 513), (5, 64)):
        x = torch.randn(batch, rows, 128, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(x.double())
            eager = model(x)
            ours, code = run_and_get_code(lambda x=x: compiled(x))
        codes += code
        budget = 1.1 * (eager - exact).norm() + 2 * torch.finfo(x.dtype).eps * exact.norm()
        assert (ours - exact).norm() <= budget
    assert codes
    for code in codes:
        assert "TensorDescriptor.from_tensor" in code
        assert "torch.ops.flashsvd" not in code


class LatentAttention(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Sequential(nn.Linear(128, rank, bias=False), nn.Linear(rank, 128)) for _ in "qkv"
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (m(x).unflatten(-1, (1, 128)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_a_named_device_is_the_one_that_is_here():
    here = device_for(torch.device("cuda:0"))
    plain = here.name.lower().replace(" ", "")
    found = [name for name in DATA_SHEETS if name in plain]
    if not found:
        pytest.skip(f"no data sheet of {here.name}")
    named = device_named(max(found, key=len))  # "l40s", not "l4"
    for what in ("generation", "multiprocessors", "sram_bytes"):
        assert getattr(named, what) == getattr(here, what)
