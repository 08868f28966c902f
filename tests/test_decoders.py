"""Decoders of transformers with every linear factored: right in prefill and in each decode step.

Weights are drawn so that scores are large: at initialisation's own scale soft-caps, sinks and masks
change next to nothing. Prompts are padded on the left.
"""

import copy

import pytest
import torch
import transformers
from torch import nn
from torch._dynamo.utils import counters
from transformers.pytorch_utils import Conv1D

from flashsvd_compile import compress_, explain
from flashsvd_compile.compress.modules import FusedPerHeadLowRankLinear, LowRankLinear
from tests.spelled import OPTIONS, no_pass_may_fail

RANK, NEW_TOKENS, VOCABULARY = 12, 32, 61
WINDOW = 8  # shorter than the prompts

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
_SIZES = {
    **_TOKENS,
    "hidden_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GATED = {**_SIZES, "intermediate_size": 96, "num_key_value_heads": 2}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_TWO_KINDS_OF_LAYERS = {**_GATED, "num_hidden_layers": 2}
_GEMMA2 = {
    **_TWO_KINDS_OF_LAYERS,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": WINDOW,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 10.0,
}
_GPT2 = {**_TOKENS, "n_embd": 48, "n_layer": 1, "n_head": 4, "n_positions": 128}
_GPT_OSS = {
    **_TWO_KINDS_OF_LAYERS,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
}
_DEEPSEEK = {
    **_TWO_KINDS_OF_LAYERS,
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
}
_T5 = {
    **_TOKENS,
    "d_model": 48,
    "d_kv": 12,
    "d_ff": 96,
    "num_layers": 1,
    "num_heads": 4,
    "decoder_start_token_id": 1,
}
_BART = {
    **_TOKENS,
    "d_model": 48,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}

TAKEN = "rank_space"
# name -> class, configuration, what is expected of its attention: how it runs, or what it lacks
FAMILIES = {
    "llama": ("LlamaForCausalLM", _GATED, TAKEN),
    "llama3": ("LlamaForCausalLM", {**_GATED, "rope_parameters": _LLAMA3}, TAKEN),
    "mistral": ("MistralForCausalLM", {**_GATED, "sliding_window": WINDOW}, TAKEN),
    "qwen2": ("Qwen2ForCausalLM", _GATED, TAKEN),
    "qwen3": ("Qwen3ForCausalLM", {**_GATED, "head_dim": 16}, TAKEN),
    "gemma2": ("Gemma2ForCausalLM", _GEMMA2, TAKEN),
    "phi3": ("Phi3ForCausalLM", _GATED, TAKEN),
    "gpt2": ("GPT2LMHeadModel", _GPT2, TAKEN),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        {**_SIZES, "intermediate_size": 96, "rotary_pct": 0.5},
        TAKEN,
    ),
    "falcon": ("FalconForCausalLM", {**_SIZES, "parallel_attn": True}, TAKEN),
    "opt": ("OPTForCausalLM", {**_SIZES, "ffn_dim": 96, "word_embed_proj_dim": 48}, TAKEN),
    "gpt_oss": ("GptOssForCausalLM", _GPT_OSS, TAKEN),
    "deepseek_v3": ("DeepseekV3ForCausalLM", _DEEPSEEK, "mutated"),
    "t5": ("T5ForConditionalGeneration", _T5, TAKEN),
    "bart": ("BartForConditionalGeneration", _BART, TAKEN),
}
ENCODER_DECODERS = ("t5", "bart")
# Experts' grouped products take no float64, and Gemma-2's mask overflows where it is converted.
NO_FLOAT64 = ("gemma2", "gpt_oss", "deepseek_v3")


def factored(model: nn.Module) -> nn.Module:
    """Every linear of the layers by two factors, but for what routes to experts."""
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, (nn.Linear, Conv1D)) and name not in ("lm_head", "gate", "router"):
            is_linear = isinstance(module, nn.Linear)
            out, inner = module.weight.shape if is_linear else module.weight.shape[::-1]
            rank = min(RANK, min(out, inner) // 2)
            layer = LowRankLinear(inner, out, rank, bias=module.bias is not None)
            setattr(model.get_submodule(parent), name, layer)
    return model


def dense(family: str) -> nn.Module:
    name, config, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**copy.deepcopy(config))).eval()


def decoder(family: str) -> nn.Module:
    model = factored(dense(family))
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            is_score = any(part in name for part in ("q_", "k_", "query", "qkv", "c_attn"))
            nn.init.normal_(parameter, std=(2 if is_score else 1) * parameter.shape[-1] ** -0.5)
        elif "bias" in name or "sinks" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def prompts() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 13))
    mask = torch.ones_like(ids)
    ids[0, :4] = mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, forward, cache, inputs):
    model.forward = forward
    try:
        return model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, cache_implementation=cache,
            disable_compile=True, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    finally:
        del model.forward


@pytest.mark.usefixtures("fresh_inference")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_is_taken_or_told_why_not(family):
    _, config, expected = FAMILIES[family]
    inputs = prompts()
    if family in ENCODER_DECODERS:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :5]
    sites = explain(decoder(family), **inputs, use_cache=False, options=OPTIONS).sites
    found = [site for site in sites if site.kind == "attention"]
    attentions = 3 if family in ENCODER_DECODERS else config.get("num_hidden_layers", 1)
    assert len(found) == attentions
    if expected == TAKEN:
        assert [site.lowering for site in found] == [TAKEN] * attentions
    else:
        assert [site.lowering for site in found] == [None] * attentions
        assert all(expected in str(site.reason) for site in found)


@pytest.mark.usefixtures("fresh_inference")
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])
def test_fused_projections_compressed_by_head_are_taken(family, monkeypatch):
    name, config, _ = FAMILIES[family]
    heads = {"num_key_value_heads": config["num_attention_heads"]} if family == "phi3" else {}
    monkeypatch.setitem(FAMILIES, family, (name, {**config, **heads}, TAKEN))
    model = dense(family)
    compress_(model, keep=0.4)
    assert any(isinstance(module, FusedPerHeadLowRankLinear) for module in model.modules())
    sites = explain(model, **prompts(), use_cache=False, options=OPTIONS).sites
    (site,) = (site for site in sites if site.kind == "attention")
    assert site.lowering == TAKEN, site.reason
    call = {**prompts(), "use_cache": False}
    torch._dynamo.reset()
    with no_pass_may_fail():
        got = torch.compile(model, backend="flashsvd", options=OPTIONS)(**call).logits
    want, truth = model(**call).logits, model.double()(**call).logits
    seen = call["attention_mask"].bool()
    eps = torch.finfo(torch.float32).eps
    budget = 1.1 * (want - truth)[seen].abs().max() + 64 * eps * truth[seen].abs().max()
    assert (got - truth)[seen].abs().max() <= budget


@pytest.mark.usefixtures("fresh_inference")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_dense_attention_is_not_missed(family):
    sites = explain(dense(family), **prompts(), use_cache=False, options=OPTIONS).sites
    assert not [site for site in sites if site.kind == "attention"]


@pytest.mark.usefixtures("fresh_inference")
@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic_cache", "static_cache"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generates_what_the_model_does(family, cache):
    model, inputs = decoder(family), prompts()
    eager = model.forward
    expected = generated(model, eager, cache, inputs)
    counters.clear()
    with no_pass_may_fail():
        compiled = torch.compile(eager, backend="flashsvd", options=OPTIONS)
        got = generated(model, compiled, cache, inputs)
    # Lengths of a dynamic cache become symbolic when the second is seen.
    assert counters["stats"]["unique_graphs"] == (3 if cache is None else 2)
    assert not counters["graph_break"]
    assert torch.equal(got.sequences, expected.sequences)
    if family in NO_FLOAT64:
        return
    exact_model = model.double()
    exact = generated(exact_model, exact_model.forward, cache, inputs)
    assert torch.equal(exact.sequences, expected.sequences)
    eps = torch.finfo(torch.float32).eps
    for have, want, truth in zip(got.logits, expected.logits, exact.logits, strict=True):
        budget = 1.1 * (want - truth).abs().max() + 64 * eps * truth.abs().max()
        assert (have - truth).abs().max() <= budget
