"""Whole models on a GPU through the public door: the route that ran, and how right it is."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, ViTConfig, ViTModel

import flashsvd_compile as fsc

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FORCED = {"attention": "rank_space", "feed_forward": "streamed"}


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
    return {(s.kind, s.lowering) for s in found.sites if s.kind != "chain"}


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
