"""Tiny models of transformers, and the dense weights that checkpoints' factors multiply to.

Tests write a checkpoint in a tool's layout themselves; `Product` draws the factors of one linear
and puts their product into a dense model, whose logits are what the loaded model must give.
"""

import json

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

# No two sizes are equal: heads of width 8, 24 features, 40 in the feed-forward.
_SIZES = {
    "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "vocab_size": 50,
    "max_position_embeddings": 32,
}  # fmt: skip
_GATED = _SIZES | {"intermediate_size": 40, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "bert": (BertForMaskedLM, lambda: BertConfig(**_SIZES, intermediate_size=40)),
    "gpt2": (GPT2LMHeadModel, lambda: GPT2Config(n_embd=24, n_head=3, n_layer=2, n_inner=40,
                                                 vocab_size=50, n_positions=32)),
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**_GATED)),
    "llama_tied": (LlamaForCausalLM, lambda: LlamaConfig(**_GATED, tie_word_embeddings=True)),
    "mistral": (MistralForCausalLM, lambda: MistralConfig(**_GATED)),
    "opt": (OPTForCausalLM, lambda: OPTConfig(**_SIZES, ffn_dim=40, word_embed_proj_dim=24)),
}  # fmt: skip

TOKENS = torch.tensor([[1, 5, 3, 9, 2]])


def dense_model(family: str) -> nn.Module:
    """A random model in float64; its biases are not zero."""
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    model = kind(config()).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@torch.no_grad()
def make_product_(linear: nn.Module, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors down [r, in] and up [out, r], whose product is then the linear's weight."""
    out_features, in_features = linear.weight.shape
    down = torch.randn(rank, in_features, dtype=torch.float64) / in_features**0.5
    up = torch.randn(out_features, rank, dtype=torch.float64) / rank**0.5
    linear.weight.copy_(up @ down)
    return down, up


def layer_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All linears but those of a head, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layer" in path
    }


def write(directory, model, tensors, **config):
    """The tensors as safetensors, and a config.json of the model's with other values in it."""
    directory.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    stored = json.loads(model.config.to_json_string())
    stored |= {"architectures": [type(model).__name__]} | config
    (directory / "config.json").write_text(json.dumps(stored))


def rest_of(model: nn.Module, *factored: str, biases: bool = True) -> dict[str, torch.Tensor]:
    """The state dict without the weights (and biases, unless kept) of the factored linears."""
    gone = {f"{path}.weight" for path in factored}
    if not biases:
        gone |= {f"{path}.bias" for path in factored}
    return {k: v.clone() for k, v in model.state_dict().items() if k not in gone}


def assert_same_logits(loaded: nn.Module, dense: nn.Module) -> None:
    assert not loaded.training
    torch.testing.assert_close(logits(loaded), logits(dense), rtol=1e-10, atol=1e-10)
