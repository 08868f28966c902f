"""Decoders of transformers that turn queries, each in its spelling: queries are latents in the
prefill and in each step beside a cache, and logits are as good as the model's own."""

import json

import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache

from tests.spelled import OPTIONS, no_pass_may_fail
from tests.test_decoders import FAMILIES, VOCABULARY, factored, prompts

_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_GPTJ = {
    "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 1, "n_head": 4, "n_positions": 64,
    "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
_NEOX = {k: x for k, x in _SIZES.items() if k != "num_key_value_heads"}

MODELS = {
    **{name: FAMILIES[name][:2] for name in ("llama", "llama3", "mistral", "qwen2", "phi3")},
    "gemma2": FAMILIES["gemma2"][:2],
    "qwen3": FAMILIES["qwen3"][:2],
    "gemma3": ("Gemma3ForCausalLM", {**_SIZES, "head_dim": 16, "sliding_window": 8}),
    "gpt_oss": FAMILIES["gpt_oss"][:2],
    "gpt_neox": ("GPTNeoXForCausalLM", {**_NEOX, "rotary_pct": 0.5}),
    "phi": ("PhiForCausalLM", {**_SIZES, "partial_rotary_factor": 0.5}),
    "cohere": ("CohereForCausalLM", {**_SIZES, "use_qk_norm": False}),
    "glm": ("GlmForCausalLM", {**_SIZES, "head_dim": 16, "partial_rotary_factor": 0.5}),
    "gptj": ("GPTJForCausalLM", _GPTJ),
    "olmo": ("OlmoForCausalLM", _SIZES),
    "stablelm": ("StableLmForCausalLM", {**_SIZES, "partial_rotary_factor": 0.25}),
    "falcon": FAMILIES["falcon"][:2],
    "smollm3": ("SmolLM3ForCausalLM", {**_SIZES, "no_rope_layers": [1]}),
    "ernie": ("Ernie4_5ForCausalLM", {**_SIZES, "head_dim": 16}),
    "helium": ("HeliumForCausalLM", {**_SIZES, "head_dim": 16}),
    "granite": ("GraniteForCausalLM", _SIZES),
    "starcoder2": ("Starcoder2ForCausalLM", _SIZES),
}


def decoder(name: str) -> nn.Module:
    cls, config = MODELS[name]
    model_class = getattr(transformers, cls)
    model = factored(model_class(model_class.config_class(**config)).eval())
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1:
            is_score = any(part in path for part in ("q_", "k_", "query", "qkv"))
            nn.init.normal_(parameter, std=(2 if is_score else 1) * parameter.shape[-1] ** -0.5)
        elif "bias" in path:
            nn.init.normal_(parameter, std=0.3)
    return model


def steps(forward):
    """Logits of a prompt, and of two tokens behind it, one at a time."""
    inputs, cache = prompts(), DynamicCache()
    mask = inputs["attention_mask"]
    found = [forward(**inputs, past_key_values=cache, use_cache=True).logits]
    for token in (5, 7):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        ids = torch.full((mask.shape[0], 1), token)
        out = forward(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        found.append(out.logits)
    return [logits[:, -1] for logits in found]


@pytest.mark.usefixtures("fresh_inference")
@pytest.mark.parametrize("name", MODELS)
def test_queries_are_latents_in_prefill_and_decoding(name, tmp_path):
    model = decoder(name)
    torch.manual_seed(1)
    expected = steps(model)
    torch.manual_seed(1)
    options = {**OPTIONS, "debug_dir": str(tmp_path)}
    with no_pass_may_fail():
        got = steps(torch.compile(model, backend="flashsvd", options=options))
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    dumps = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("graph_*/sites.json"))]
    assert len(dumps) >= 2
    for dump in dumps:
        found = [site for site in dump["sites"] if site["kind"] == "attention"]
        assert [site["lowering"] for site in found] == ["rank_space"] * len(found)
        assert found
        assert all(site["plan"]["ranks"]["q"] != "dense" for site in found)
        assert all(site["plan"]["ranks"]["k"] == "dense" for site in found)
