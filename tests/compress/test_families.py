"""Models of transformers, tiny and random: the right layers per head, the same output shapes."""

import copy

import pytest
import torch

from flashsvd_compile import compress_
from flashsvd_compile.compress.linears import find_linears

transformers = pytest.importorskip("transformers")
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM  # noqa: E402

# Heads of width 8; 24 features, so that ranks are per head 8·24·keep/32 = 4 at keep 0.7.
SIZES = {
    "hidden_size": 24,
    "num_attention_heads": 3,
    "num_hidden_layers": 2,
    "intermediate_size": 40,
}
TOKENS = {"input_ids": torch.tensor([[1, 5, 3, 9, 2]])}
PIXELS = {"pixel_values": torch.randn(1, 3, 12, 12)}
IMAGE = {"image_size": 12, "patch_size": 4}
GPT2 = {"n_embd": 24, "n_head": 3, "n_layer": 2, "n_inner": 40, "vocab_size": 50}
LLAMA = SIZES | {"vocab_size": 50, "num_key_value_heads": 1}

# id -> (config class, its arguments, inputs, {last name of a per-head layer: shape of its v})
FAMILIES = {
    "bert": (
        "BertConfig",
        SIZES | {"vocab_size": 50},
        TOKENS,
        dict.fromkeys(("query", "key", "value"), (3, 8, 4)),
    ),
    "roberta": (
        "RobertaConfig",
        SIZES | {"vocab_size": 50},
        TOKENS,
        dict.fromkeys(("query", "key", "value"), (3, 8, 4)),
    ),
    "distilbert": (
        "DistilBertConfig",
        {"dim": 24, "n_heads": 3, "n_layers": 2, "hidden_dim": 40, "vocab_size": 50},
        TOKENS,
        dict.fromkeys(("q_lin", "k_lin", "v_lin"), (3, 8, 4)),
    ),
    "vit": ("ViTConfig", SIZES | IMAGE, PIXELS, None),
    "deit": ("DeiTConfig", SIZES | IMAGE, PIXELS, None),
    "gpt2": ("GPT2Config", GPT2, TOKENS, {"c_attn": (3, 3, 8, 4)}),
    "llama": (
        "LlamaConfig",
        LLAMA,
        TOKENS,
        {"q_proj": (3, 8, 4), "k_proj": (1, 8, 4), "v_proj": (1, 8, 4)},
    ),
    "t5": (
        "T5Config",
        {
            "d_model": 24,
            "d_kv": 8,
            "d_ff": 40,
            "num_layers": 2,
            "num_heads": 3,
            "vocab_size": 50,
        },
        TOKENS | {"decoder_input_ids": TOKENS["input_ids"]},
        dict.fromkeys("qkv", (3, 8, 4)),
    ),
}


def build(family, auto=AutoModel):
    config_class, arguments, inputs, per_head = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**arguments)
    return auto.from_config(config).eval(), inputs, per_head


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_factored_on_their_own(family):
    model, inputs, per_head = build(family)
    dense = copy.deepcopy(model)
    report = compress_(model, keep=0.7)
    kinds = {row.path: row.kind for row in report.rows}
    assert {"per_head", "matrix"} == set(kinds.values()), report

    found = {path: model.get_submodule(path) for path, kind in kinds.items() if kind == "per_head"}
    names = {path.rpartition(".")[2] for path in found}
    if per_head is None:  # what ViT calls its projections depends on transformers' version
        assert names in ({"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"})
        per_head = dict.fromkeys(names, (3, 8, 4))
    assert names == per_head.keys()
    for path, module in found.items():
        assert module.v.shape == per_head[path.rpartition(".")[2]], path
        assert module.u.shape == (*module.v.shape[:-2], 4, 24), path

    with torch.no_grad():
        output, expected = model(**inputs)[0], dense(**inputs)[0]
    assert output.shape == expected.shape
    assert output.isfinite().all()
    model._init_weights(model)
    model.init_weights()


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_low_rank_weights_give_the_dense_output(family):
    """Weights of the rank that is kept: whatever differs then is the layout."""
    model, inputs, _ = build(family)
    model.double()
    with torch.no_grad():
        for linear in find_linears(model):
            out, n = linear.weight.shape
            # One direction for all rows, so that any head and any matrix has rank one.
            scale = torch.randn(out, 1, dtype=torch.float64) / 5
            linear.weight.copy_(scale * torch.randn(1, n, dtype=torch.float64))
        expected = model(**inputs)[0]
        report = compress_(model, keep=0.7)
        assert max(row.error for row in report.rows) < 1e-12
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "auto", "head"),
    [
        ("bert", AutoModelForMaskedLM, "cls.predictions.decoder"),
        ("gpt2", AutoModelForCausalLM, "lm_head"),
    ],
)
def test_a_tied_output_embedding_stays_dense_and_tied(family, auto, head):
    model, inputs, _ = build(family, auto)
    (row,) = (row for row in compress_(model).rows if row.path == head)
    assert row.kind == "dense"
    assert row.reason.startswith("its weight is shared with ")
    model.tie_weights()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model(**inputs).logits.shape[-1] == 50


def test_half_precision_model_runs():
    model, inputs, _ = build("bert")
    model.to(torch.bfloat16)
    compress_(model)
    assert model(**inputs)[0].dtype is torch.bfloat16


def test_causal_model_generates():
    model, inputs, _ = build("llama", AutoModelForCausalLM)
    compress_(model)
    tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert tokens.shape[1] <= 9
