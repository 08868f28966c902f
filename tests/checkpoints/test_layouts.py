"""Checkpoints in other tools' layouts give the logits of the products of their factors."""

import json
import re

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile.compress.modules import (
    FusedPerHeadLowRankLinear,
    LowRankLinear,
    PerHeadLowRankLinear,
)

transformers = pytest.importorskip("transformers")
from tests.checkpoints.written import (  # noqa: E402
    assert_same_logits,
    dense_model,
    layer_linears,
    make_product_,
    rest_of,
    write,
)


def _factored(dense, names, only=lambda path: True, up="weight"):
    """Tensors with factors named by ``names(path)`` for down and up; the bias goes to the up."""
    tensors, linears = {}, {p: m for p, m in layer_linears(dense).items() if only(p)}
    for i, (path, linear) in enumerate(linears.items()):
        down, up_ = make_product_(linear, rank=3 + i % 4)
        down_name, up_name = names(path)
        tensors |= {f"{down_name}.weight": down, f"{up_name}.weight": up_}
        if linear.bias is not None:
            tensors[f"{up_name}.bias"] = linear.bias.detach().clone()
    return tensors | rest_of(dense, *linears, biases=False)


def _beside(path):
    stem = path.removesuffix("_proj")
    return f"{stem}_v_proj", f"{stem}_u_proj"


def _below(down, up):
    return lambda path: (f"{path}.{down}", f"{path}.{up}")


# id -> (format, families, names of down and up)
NAMES = {
    "svdllm": _beside,
    "asvd": _below("BLinear", "ALinear"),
    "dobisvd": _below("ALinear", "BLinear"),
    "flashsvd": _below("v_proj", "u_proj"),
}


@pytest.mark.parametrize("family", ["bert", "llama", "opt", "mistral"])
@pytest.mark.parametrize("format", NAMES)
def test_pairs_of_linears(format, family, tmp_path):
    dense = dense_model(family)
    write(tmp_path, dense, _factored(dense, NAMES[format]))
    loaded = fsc.load_checkpoint(tmp_path)
    assert type(loaded) is type(dense)
    assert_same_logits(loaded, dense)
    linears = {p for p, m in loaded.named_modules() if isinstance(m, LowRankLinear)}
    assert linears == set(layer_linears(dense))
    assert {loaded.get_submodule(p).method for p in linears} == {format}
    assert_same_logits(fsc.load_checkpoint(tmp_path, format=format), dense)


def test_dense_and_factored_layers_mix(tmp_path):
    dense = dense_model("llama")
    tensors = _factored(dense, NAMES["asvd"], only=lambda path: "layers.0" in path)
    ranks = {"model.layers.0.mlp.up_proj": 77}  # stale
    write(tmp_path, dense, tensors, model_type="asvd_llama", truncation_ranks=ranks,
          architectures=["ASVDLlamaForCausalLM"])  # fmt: skip
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, LowRankLinear)
    assert isinstance(loaded.model.layers[1].mlp.up_proj, nn.Linear)


def test_the_head_may_be_factored(tmp_path):
    dense = dense_model("llama")
    down, up = make_product_(dense.lm_head, 5)
    tensors = rest_of(dense, "lm_head")
    tensors |= {"lm_head.BLinear.weight": down, "lm_head.ALinear.weight": up}
    write(tmp_path, dense, tensors)
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)


def test_a_bias_on_the_down_factor_is_lifted(tmp_path):
    dense = dense_model("opt")
    path = "model.decoder.layers.0.fc1"
    linear = dense.get_submodule(path)
    down, up = make_product_(linear, 5)
    on_down = torch.randn(5, dtype=torch.float64)
    tensors = rest_of(dense, path) | {  # the layer's own bias stays where it was
        f"{path}.BLinear.weight": down, f"{path}.BLinear.bias": on_down,
        f"{path}.ALinear.weight": up,
    }  # fmt: skip
    write(tmp_path, dense, tensors)
    with torch.no_grad():
        linear.bias += up @ on_down
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)


def test_the_layers_own_bias_on_the_down_factor(tmp_path):
    dense = dense_model("opt")
    path = "model.decoder.layers.0.fc1"
    down, up = make_product_(dense.get_submodule(path), 5)
    tensors = rest_of(dense, path, biases=False) | {
        f"{path}.ALinear.weight": down, f"{path}.BLinear.weight": up,
        f"{path}.ALinear.bias": dense.get_submodule(path).bias.detach().clone(),
    }  # fmt: skip
    write(tmp_path, dense, tensors)
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)


def test_a_bias_that_is_infinite_when_it_is_lifted_is_told(tmp_path):
    dense = dense_model("opt")
    path = "model.decoder.layers.0.fc1"
    tensors = rest_of(dense, path) | {
        f"{path}.BLinear.weight": torch.ones(5, 24), f"{path}.ALinear.weight": torch.ones(40, 5),
        f"{path}.BLinear.bias": torch.full((5,), 6e4),
    }  # fmt: skip
    write(tmp_path, dense, {k: v.half() for k, v in tensors.items()})
    with pytest.raises(fsc.CheckpointError, match=r"fc1 has values that are not finite"):
        fsc.load_checkpoint(tmp_path)


@pytest.mark.parametrize("most", ["rest", "factors"])
def test_computed_buffers_take_the_dtype_of_the_weights_not_the_configs(most, tmp_path):
    """Gemma scales its embeddings by √24, a buffer, which bfloat16 would round."""
    config = transformers.Gemma3TextConfig(
        hidden_size=24, num_attention_heads=3, num_key_value_heads=1, head_dim=8, vocab_size=50,
        num_hidden_layers=2, intermediate_size=40,
    )  # fmt: skip
    dense = transformers.Gemma3ForCausalLM(config).double().eval()
    tensors = _factored(dense, NAMES["svdllm"])
    if most == "factors":
        is_factor = re.compile(r".*_[uv]_proj\.weight")
        tensors = {k: v if is_factor.fullmatch(k) else v.float() for k, v in tensors.items()}
    write(tmp_path, dense, tensors, dtype="bfloat16")
    loaded = fsc.load_checkpoint(tmp_path)
    scale, expected = loaded.model.embed_tokens.embed_scale, loaded.config.dtype
    assert expected == (torch.float64 if most == "rest" else torch.float32)
    assert scale.dtype == expected
    assert scale == torch.tensor(24**0.5, dtype=expected)
    fsc.save_pretrained(loaded.bfloat16(), tmp_path / "saved")
    wider = fsc.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert wider.model.embed_tokens.embed_scale == torch.tensor(24**0.5, dtype=torch.float32)


def test_factors_take_the_dtype_of_the_rest(tmp_path):
    dense = dense_model("llama")
    tensors = _factored(dense, NAMES["svdllm"])
    is_factor = re.compile(r".*_[uv]_proj\.weight")
    tensors = {k: v.float() if is_factor.fullmatch(k) else v.half() for k, v in tensors.items()}
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    write(tmp_path, dense, tensors)
    loaded = fsc.load_checkpoint(tmp_path)
    dtypes = {name: p.dtype for name, p in loaded.named_parameters()}
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {torch.float16}
    assert loaded.config.dtype == torch.float16


def test_values_beyond_the_dtype_of_the_rest_are_told(tmp_path):
    dense = dense_model("llama")
    tensors = _factored(dense, NAMES["svdllm"])
    tensors = {k: v.float() if "_proj" in k else v.half() for k, v in tensors.items()}
    tensors["model.layers.1.mlp.up_v_proj.weight"][0, 0] = 1e6
    write(tmp_path, dense, tensors)
    with pytest.raises(fsc.CheckpointError, match=r"layers\.1\.mlp\.up_proj .*not finite"):
        fsc.load_checkpoint(tmp_path)


# ---- Basis Sharing ------------------------------------------------------------------------------

GROUPS = {f"{stem}_groups": [[0, 1]] for stem in ("q", "k", "v", "up", "gate")}


def _shared(dense):
    """Both layers' q, k, v, up and gate on one basis, o and down on their own."""
    tensors = {}
    for path, linear in layer_linears(dense).items():
        local = f"{path.removesuffix('_proj')}_basis.weight"
        other = local.replace("layers.1", "layers.0")
        down, up = make_product_(linear, 5)
        if f"{path.split('.')[-1].removesuffix('_proj')}_groups" in GROUPS and other in tensors:
            down = tensors[other]
            with torch.no_grad():
                linear.weight.copy_(up @ down)
        tensors |= {local: down, f"{path}.weight": up}
    return rest_of(dense, *layer_linears(dense)) | tensors


def _by_layer(tensors):
    """The same bases a second time, as model.q_basis.0.weight."""
    found = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"model\.layers\.(\d+)\..*?(\w+)_basis\.weight", name):
            found[f"model.{match[2]}_basis.{match[1]}.weight"] = tensor
    return found


def _without_local(tensors, layer):
    return {k: v for k, v in tensors.items() if not ("_basis" in k and f"layers.{layer}." in k)}


@pytest.mark.parametrize("stored", ["local", "twice", "by_layer", "once"])
def test_shared_bases(stored, tmp_path):
    dense = dense_model("llama")
    tensors = _shared(dense)
    again = _by_layer(tensors)
    if stored == "twice":
        tensors |= again
    elif stored == "by_layer":
        tensors = _without_local(_without_local(tensors, 0), 1) | again
    elif stored == "once":  # the second layer's shared bases are told by the config alone
        private = {k: v for k, v in tensors.items() if "o_basis" in k or "down_basis" in k}
        tensors = _without_local(tensors, 1) | private
    write(tmp_path, dense, {k: v.clone() for k, v in tensors.items()},
          architectures=["ShareLlamaForCausalLM"], **GROUPS)  # fmt: skip
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    first, second = loaded.model.layers
    assert first.self_attn.q_proj.u is second.self_attn.q_proj.u
    assert first.mlp.gate_proj.u is second.mlp.gate_proj.u
    assert first.mlp.down_proj.u is not second.mlp.down_proj.u


# Linears of a layer by the name of their basis, in families that store bases by layer only.
BY_LAYER = {
    "opt": ("model.decoder.", "layers", {
        "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
        "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
    }),
    "gpt2": ("transformer.", "h", {
        "attn": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj",
    }),
}  # fmt: skip


@pytest.mark.parametrize("family", BY_LAYER)
def test_bases_of_other_families(family, tmp_path):
    dense = dense_model(family)
    prefix, layers, linears = BY_LAYER[family]
    tensors = {k: v.clone() for k, v in dense.state_dict().items() if k != "lm_head.weight"}
    for stem, name in linears.items():
        basis = None
        for n in range(2):
            path = f"{prefix}{layers}.{n}.{name}"
            weight = dense.get_submodule(path).weight
            out_features, in_features = weight.T.shape if family == "gpt2" else weight.shape
            if basis is None:
                basis = torch.randn(6, in_features, dtype=torch.float64) / in_features**0.5
            up = torch.randn(out_features, 6, dtype=torch.float64)
            product = up @ basis
            weight.data.copy_(product.T if family == "gpt2" else product)
            tensors[f"{path}.weight"] = up
            tensors[f"{prefix}{stem}_basis.{n}.weight"] = basis.clone()
    write(tmp_path, dense, tensors)
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    first, second = (
        loaded.get_submodule(f"{prefix}{layers}.{n}.{linears['up']}") for n in range(2)
    )
    assert first.method == "basis_sharing"
    assert first.u is second.u


def test_bases_that_share_memory_in_a_pickle(tmp_path):
    dense = dense_model("llama")
    tensors = _shared(dense)
    write(tmp_path, dense, {})
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors | _by_layer(tensors), tmp_path / "pytorch_model.bin")
    loaded = fsc.load_checkpoint(tmp_path, format="basis_sharing")
    assert_same_logits(loaded, dense)
    assert loaded.model.layers[0].self_attn.k_proj.u is loaded.model.layers[1].self_attn.k_proj.u


def test_bases_that_differ_are_not_shared_whatever_the_config_says(tmp_path):
    dense = dense_model("llama")
    tensors = {}
    for path, linear in layer_linears(dense).items():
        down, up = make_product_(linear, 4)
        tensors |= {f"{path.removesuffix('_proj')}_basis.weight": down, f"{path}.weight": up}
    write(tmp_path, dense, rest_of(dense, *layer_linears(dense)) | tensors, **GROUPS)
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)


def test_bases_of_another_dtype_stay_shared(tmp_path):
    dense = dense_model("llama")
    tensors = {k: v.half() if "_basis" in k else v.float() for k, v in _shared(dense).items()}
    write(tmp_path, dense, tensors)
    first, second = fsc.load_checkpoint(tmp_path).model.layers
    assert first.mlp.up_proj.u is second.mlp.up_proj.u
    assert first.mlp.up_proj.u.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.q_basis.1.weight",
            r"layers\.1\..*q_basis\.weight and .*q_basis\.1\.weight .* differ",
        ),
        ("model.q_basis.2.weight", r"no place for model\.q_basis\.2\.weight"),
    ],
)
def test_bases_by_layer_that_are_others(name, message, tmp_path):
    dense = dense_model("llama")
    tensors = {k: v.clone() for k, v in _shared(dense).items()}
    write(tmp_path, dense, tensors | {name: torch.ones(5, 24, dtype=torch.float64)})
    with pytest.raises(fsc.CheckpointError, match=message):
        fsc.load_checkpoint(tmp_path)


# ---- Palu ---------------------------------------------------------------------------------------


def _grouped(ranks):
    """Keys and values of an OPT in groups of these ranks: 24 features, as many for each."""
    size = 24 // len(ranks)
    dense = dense_model("opt")
    paths = [p for p in layer_linears(dense) if p.endswith(("k_proj", "v_proj"))]
    tensors = rest_of(dense, *paths, biases=False)
    for path in paths:
        linear = dense.get_submodule(path)
        down = torch.randn(sum(ranks), 24, dtype=torch.float64) / 5
        tensors[f"{path}.VT.weight"] = down
        products = []
        for g, (rows, r) in enumerate(zip(down.split(ranks), ranks, strict=True)):
            up = torch.randn(size, r, dtype=torch.float64)
            tensors[f"{path}.U.{g}.weight"] = up
            tensors[f"{path}.U.{g}.bias"] = linear.bias[size * g :][:size].detach().clone()
            products.append(up @ rows)
        linear.weight.data.copy_(torch.cat(products))
    return dense, tensors


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 5, 3), (8, 1, 8), (1, 2) * 6])
def test_groups_of_heads(ranks, tmp_path):
    dense, tensors = _grouped(ranks)
    write(tmp_path, dense, tensors)
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    module = loaded.model.decoder.layers[0].self_attn.k_proj
    assert isinstance(module, PerHeadLowRankLinear)
    assert module.u.shape == (len(ranks), max(ranks), 24)
    assert module.method == "palu"


@pytest.mark.parametrize("at", ["", "VT."])
def test_one_bias_for_all_groups(at, tmp_path):
    dense, tensors = _grouped((2, 5, 3))
    path = "model.decoder.layers.0.self_attn.k_proj"
    linear, count = dense.get_submodule(path), 10 if at else 24
    bias = torch.randn(count, dtype=torch.float64)
    if at:  # beside those of the groups, on the latents of all of them
        ups = [tensors[f"{path}.U.{g}.weight"] for g in range(3)]
        added = torch.block_diag(*ups) @ bias
        linear.bias.data += added
    else:
        linear.bias.data.copy_(bias)
        tensors = {k: v for k, v in tensors.items() if not re.fullmatch(rf"{path}\.U\..*bias", k)}
    write(tmp_path, dense, tensors | {f"{path}.{at}bias": bias})
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)
    write(tmp_path, dense, tensors | {f"{path}.{at}bias": bias[1:]})
    with pytest.raises(fsc.CheckpointError, match=rf"bias is \[{count - 1}\], expected {count}"):
        fsc.load_checkpoint(tmp_path)


def test_a_bias_for_all_groups_and_one_for_each(tmp_path):
    dense, tensors = _grouped((2, 5, 3))
    bias = {"model.decoder.layers.0.self_attn.k_proj.bias": torch.zeros(24, dtype=torch.float64)}
    write(tmp_path, dense, tensors | bias)
    with pytest.raises(fsc.CheckpointError, match=r"U\.2\.bias.* are for the same or no block"):
        fsc.load_checkpoint(tmp_path)


def test_one_group_is_a_matrix_and_palus_model_type_is_known(tmp_path):
    dense = dense_model("mistral")
    path = "model.layers.1.self_attn.k_proj"
    down, up = make_product_(dense.get_submodule(path), 4)
    tensors = rest_of(dense, path) | {f"{path}.VT.weight": down, f"{path}.U.0.weight": up}
    write(tmp_path, dense, tensors, model_type="palumistral",
          architectures=["PaluMistralForCausalLM"], head_wise_ranks={path: [9]})  # fmt: skip
    loaded = fsc.load_checkpoint(tmp_path, format="palu")
    assert_same_logits(loaded, dense)
    assert isinstance(loaded.get_submodule(path), LowRankLinear)


# ---- FlashSVD's first version -------------------------------------------------------------------


def _heads(rank, *, inputs=24, heads=3, dim=8):
    u = torch.randn(heads, inputs, rank, dtype=torch.float64) / 5
    v = torch.randn(heads, rank, dim, dtype=torch.float64)
    weight = torch.einsum("hir,hrd->hdi", u, v).flatten(0, 1)
    return u, v, weight


@pytest.mark.parametrize("place", ["svd_layers.{}", "bert.encoder.layer.{}.block"])
def test_bert_blocks(place, tmp_path):
    dense = dense_model("bert")
    tensors, factored = {}, []
    for n, layer in enumerate(dense.bert.encoder.layer):
        at = place.format(n)
        attention = layer.attention.self
        for x, linear in zip("qkv", (attention.query, attention.key, attention.value), strict=True):
            u, v, weight = _heads(4)
            linear.weight.data.copy_(weight)
            tensors[f"{at}.P{x}"], tensors[f"{at}.V{x}"] = u[None], v[None]
            tensors[f"{at}.b{x}"] = linear.bias.detach().view(1, 3, 1, 8).clone()
        whole = {"o": layer.attention.output.dense, "1": layer.intermediate.dense,
                 "2": layer.output.dense}  # fmt: skip
        for x, linear in whole.items():
            down, up = make_product_(linear, 7)
            tensors[f"{at}.U{x}"], tensors[f"{at}.V{x}"] = down.T, up.T
            tensors[f"{at}.b{x}{'_attn' if x == 'o' else ''}"] = linear.bias.detach().clone()
        for name, norm in (("ln1", layer.attention.output.LayerNorm),
                           ("ln2", layer.output.LayerNorm)):  # fmt: skip
            tensors |= {f"{at}.{name}.{k}": v.detach().clone() for k, v in norm.named_parameters()}
        factored.append(f"bert.encoder.layer.{n}.")
    rest = {k: v.clone() for k, v in dense.state_dict().items() if not k.startswith("bert.encoder")}
    write(tmp_path, dense, tensors | rest)
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    assert isinstance(loaded.bert.encoder.layer[0].attention.self.query, PerHeadLowRankLinear)


def test_a_bert_with_a_norm_of_its_own_is_refused(tmp_path):
    dense = dense_model("bert")
    write(tmp_path, dense, {"svd_layers.0.Pq": torch.ones(1), "norm.weight": torch.ones(24)})
    with pytest.raises(fsc.CheckpointError, match=r"norm\.weight beside svd_layers"):
        fsc.load_checkpoint(tmp_path)


@pytest.mark.parametrize("files", ["one", "by_layer"])
def test_gpt2_blocks(files, tmp_path):
    """Query, key and value with different ranks, fused into one module."""
    dense = dense_model("gpt2")
    blocks = []
    for layer in dense.transformer.h:
        block, weights, biases = {}, [], layer.attn.c_attn.bias.detach().view(3, 3, 8)
        for i, x in enumerate("qkv"):
            u, v, weight = _heads(3 + i)
            block |= {f"{x}_U": u.permute(1, 0, 2), f"{x}_V": v, f"{x}_b": biases[i].clone()}
            weights.append(weight)
        layer.attn.c_attn.weight.data.copy_(torch.cat(weights).T)
        for x, linear in (("out", layer.attn.c_proj), ("fc1", layer.mlp.c_fc),
                          ("fc2", layer.mlp.c_proj)):  # fmt: skip
            down, up = make_product_(linear, 6)  # Conv1D's weight is [in, out]: their product too
            block |= {f"{x}_U": up, f"{x}_V": down, f"{x}_b": linear.bias.detach().clone()}
        blocks.append({k: v.contiguous() for k, v in block.items()})
    linears = ("c_attn", "c_proj", "c_fc")
    rest = {k: v.clone() for k, v in dense.state_dict().items() if k.split(".")[-2] not in linears}
    del rest["lm_head.weight"]  # tied
    if files == "one":
        rest |= {
            f"transformer.h.{n}.block.{k}": v for n, b in enumerate(blocks) for k, v in b.items()
        }
    else:
        for n, block in enumerate(blocks):
            torch.save(block, tmp_path / f"gpt2_block_{n}.pt")
    write(tmp_path, dense, rest)
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    fused = loaded.transformer.h[1].attn.c_attn
    assert isinstance(fused, FusedPerHeadLowRankLinear)
    assert fused.u.shape == (3, 3, 5, 24)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight


def test_llama_blocks(tmp_path):
    dense = dense_model("llama")
    tensors, factored = {}, list(layer_linears(dense))
    whole = {
        "o": "self_attn.o_proj",
        "g": "mlp.gate_proj",
        "u": "mlp.up_proj",
        "d": "mlp.down_proj",
    }
    for n, layer in enumerate(dense.model.layers):
        at = f"model.layers.{n}.block"
        for x, heads in (("q", 3), ("k", 1), ("v", 1)):
            u, v, weight = _heads(4, heads=heads)
            getattr(layer.self_attn, f"{x}_proj").weight.data.copy_(weight)
            tensors[f"{at}.{x}_Us"], tensors[f"{at}.{x}_V"] = v.mT, u.mT
        for x, name in whole.items():
            down, up = make_product_(layer.get_submodule(name), 7)
            tensors[f"{at}.{x}_Us"], tensors[f"{at}.{x}_V"] = up, down
    write(tmp_path, dense, rest_of(dense, *factored) | tensors)
    assert_same_logits(fsc.load_checkpoint(tmp_path), dense)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("svdllm-llama", "TransformersForCausalLM"),
        ("basis_sharing_llama", "BasisSharingLlamaForCausalLM"),
        ("llama", "DobiSVDLlamaForCausalLM"),
    ],
)
def test_tools_names_for_known_models(model_type, architecture, tmp_path):
    dense = dense_model("llama")
    write(tmp_path, dense, _factored(dense, NAMES["flashsvd"]), model_type=model_type,
          architectures=[architecture], auto_map={"AutoModel": "modeling.Other"})  # fmt: skip
    loaded = fsc.load_checkpoint(tmp_path)
    assert_same_logits(loaded, dense)
    assert not hasattr(loaded.config, "auto_map")
    fsc.save_pretrained(loaded, tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["model_type"] == "llama"
    assert saved["architectures"] == ["LlamaForCausalLM"]
    assert "auto_map" not in saved
    assert_same_logits(fsc.from_pretrained(tmp_path / "saved"), dense)


def test_unknown_model_types(tmp_path):
    dense = dense_model("llama")
    write(tmp_path, dense, _factored(dense, NAMES["flashsvd"]), model_type="lama")
    with pytest.raises(fsc.CheckpointError, match=r"no model type 'lama'; say .* with base="):
        fsc.load_checkpoint(tmp_path)
    write(tmp_path, dense, _factored(dense, NAMES["flashsvd"]), architectures=["LamaForCausal"])
    with pytest.raises(fsc.CheckpointError, match=r"none of the architectures \['LamaForCausal'\]"):
        fsc.load_checkpoint(tmp_path)


# ---- the base -----------------------------------------------------------------------------------


def test_bases_of_all_kinds(tmp_path):
    dense = dense_model("llama")
    tensors = _factored(dense, NAMES["svdllm"])
    write(tmp_path, dense, tensors)
    config = json.loads((tmp_path / "config.json").read_text())
    elsewhere = tmp_path / "base"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").unlink()
    file = tmp_path / "model.safetensors"
    with torch.device("meta"):
        on_meta = type(dense)(dense.config)
    before = dense.model.layers[0].mlp.up_proj
    for base in (dense, on_meta, dense.config, elsewhere, str(elsewhere)):
        loaded = fsc.load_checkpoint(file, base=base)
        assert_same_logits(loaded, dense)
        assert loaded is not base
    assert dense.model.layers[0].mlp.up_proj is before
    with pytest.raises(fsc.CheckpointError, match="base="):
        fsc.load_checkpoint(file)
    with pytest.raises(TypeError, match="got int"):
        fsc.load_checkpoint(file, base=3)


def test_a_base_that_is_none_of_transformers(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 5)

        def forward(self, x):
            return self.second(self.first(x).relu())

    dense = Net().double()
    down, up = make_product_(dense.first, 2)
    tensors = rest_of(dense, "first") | {"first.u_proj.weight": up, "first.v_proj.weight": down}
    torch.save(tensors, tmp_path / "net.pt")
    loaded = fsc.load_checkpoint(tmp_path / "net.pt", base=dense)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), dense(x))


@pytest.mark.parametrize("layout", ["svdllm", "palu", "basis_sharing"])
def test_compiled(layout, tmp_path, fresh_inference):
    if layout == "svdllm":
        dense = dense_model("bert")
        write(tmp_path, dense, _factored(dense, NAMES["svdllm"]))
    elif layout == "basis_sharing":
        dense = dense_model("llama")
        write(tmp_path, dense, {k: v.clone() for k, v in _shared(dense).items()})
    else:
        dense, tensors = _grouped((2, 5, 3))
        write(tmp_path, dense, tensors)
    loaded = fsc.load_checkpoint(tmp_path)
    compiled = torch.compile(loaded, backend="flashsvd", options={"compiler": "eager"})
    assert_same_logits(compiled, dense)
