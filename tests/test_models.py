"""Encoders of transformers, factored in several spellings: every layer is fused, and right."""

import copy
import json
from collections import Counter

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    DeiTConfig,
    DeiTModel,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
    ViTModel,
)

from flashsvd_compile import compress_, explain
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear
from tests.spelled import LONE_PRODUCTS, OPTIONS, no_pass_may_fail

LAYERS, HEADS = 2, 4
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 72,
}
_PIXELS = {"image_size": 16, "patch_size": 4}

FAMILIES = {
    "bert": (BertModel, BertConfig, {"vocab_size": 50, **_SIZES}),
    "roberta": (RobertaModel, RobertaConfig, {"vocab_size": 50, **_SIZES}),
    "distilbert": (
        DistilBertModel,
        DistilBertConfig,
        {"vocab_size": 50, "dim": 32, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 72},
    ),
    "vit": (ViTModel, ViTConfig, {**_PIXELS, **_SIZES}),
    "deit": (DeiTModel, DeiTConfig, {**_PIXELS, **_SIZES}),
}
IMAGES = ("vit", "deit")


# ---- spellings of a low-rank layer ---------------------------------------------------------------


class RawMatmul(nn.Module):
    """x u v + b with bare parameters."""

    def __init__(self, layer) -> None:
        super().__init__()
        u, v = layer.u, layer.v
        if u.dim() == 3:  # per head: the heads' latents side by side
            u, v = u.flatten(0, 1), torch.block_diag(*v)
        self.u, self.v = nn.Parameter(u.detach().t().clone()), nn.Parameter(v.detach().t().clone())
        self.b = layer.bias

    def forward(self, x):
        y = torch.matmul(x @ self.u, self.v)
        return y if self.b is None else y + self.b


class HeadEinsum(nn.Module):
    """One factor pair a head, contracted by einsum."""

    def __init__(self, layer) -> None:
        super().__init__()
        self.u = nn.Parameter(layer.u.detach().transpose(1, 2).clone())  # [H, in, r]
        self.v = nn.Parameter(layer.v.detach().transpose(1, 2).clone())  # [H, r, D]
        self.b = layer.bias

    def forward(self, x):
        latent = torch.einsum("bmd,hdr->bmhr", x, self.u)
        y = torch.einsum("bmhr,hre->bmhe", latent, self.v).flatten(2)
        return y if self.b is None else y + self.b


def _sequential(layer):
    raw = RawMatmul(layer)
    down = nn.Linear(*raw.u.shape, bias=False)
    up = nn.Linear(*raw.v.shape, bias=raw.b is not None)
    down.weight = nn.Parameter(raw.u.detach().t().contiguous())
    up.weight = nn.Parameter(raw.v.detach().t().contiguous())
    up.bias = raw.b
    return nn.Sequential(down, up)


def _respell(model, spell):
    """Replace the layers that ``compress_`` made by the same factors in another spelling."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (LowRankLinear, PerHeadLowRankLinear)):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, spell(layer))


def _einsum_heads(layer):
    return HeadEinsum(layer) if isinstance(layer, PerHeadLowRankLinear) else layer


SPELLINGS = {
    "compress_": lambda layer: layer,
    "sequential": _sequential,
    "raw_matmul": RawMatmul,
    "per_head_einsum": _einsum_heads,
}


# ---- models and inputs ---------------------------------------------------------------------------


def make(family, attention, spelling):
    model_type, config_type, sizes = FAMILIES[family]
    torch.manual_seed(0)
    model = model_type(config_type(attn_implementation=attention, **sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # transformers starts them at zero
            nn.init.normal_(parameter, std=0.1)
    compress_(model, keep=0.5)
    _respell(model, SPELLINGS[spelling])
    return model


def inputs(family, batch=2, rows=9, padded=True):
    if family in IMAGES:
        return {"pixel_values": torch.randn(batch, 3, 16, 16)}
    given = {"input_ids": torch.randint(0, 50, (batch, rows))}
    if padded:
        given["attention_mask"] = torch.ones(batch, rows, dtype=torch.long)
        given["attention_mask"][1:, 5:] = 0
    return given


def in_float64(model, given):
    double = copy.deepcopy(model).double()
    return double(**{k: v.double() if v.is_floating_point() else v for k, v in given.items()})[0]


def assert_as_good_as_eager(model, compiled, given):
    exact, want, have = in_float64(model, given), model(**given)[0], compiled(**given)[0]
    eps = torch.finfo(want.dtype).eps
    budget = 1.1 * (want - exact).abs().max() + 8 * eps * exact.abs().max()
    assert (have - exact).abs().max() <= budget


def fused(sites):
    """How often each kind was lowered how; nothing may be skipped."""
    assert [site["reason"] for site in sites if site["lowering"] is None] == []
    return Counter((s["kind"], s["lowering"]) for s in sites if s["kind"] not in LONE_PRODUCTS)


EVERY_LAYER = {("attention", "rank_space"): LAYERS, ("feed_forward", "row_blocks"): LAYERS}


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    with torch.no_grad(), no_pass_may_fail():
        yield


def compile_(model, **kwargs):
    options = {**OPTIONS, **kwargs.pop("options", {})}
    return torch.compile(model, backend="flashsvd", options=options, **kwargs)


@pytest.mark.parametrize(
    ("family", "attention", "spelling"),
    [  # each attention meets each family and each spelling
        (family, ("sdpa", "eager")[(row + column) % 2], spelling)
        for row, family in enumerate(FAMILIES)
        for column, spelling in enumerate(SPELLINGS)
    ],
)
def test_every_layer_is_fused_and_right(family, attention, spelling, tmp_path):
    model, given = make(family, attention, spelling), inputs(family)
    compiled = compile_(model, options={"debug_dir": tmp_path})
    assert_as_good_as_eager(model, compiled, given)
    sites = json.loads((tmp_path / "graph_0" / "sites.json").read_text())["sites"]
    assert fused(sites) == EVERY_LAYER
    assert not (tmp_path / "graph_1" / "sites.json").exists()


@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", "sdpa"), ("bert", "eager"), ("roberta", "eager"), ("distilbert", "sdpa"),
     ("vit", "sdpa"), ("deit", "eager")],
)  # fmt: skip
def test_explain(family, attention):
    model, given = make(family, attention, "compress_"), inputs(family)
    told = explain(model, options=OPTIONS, **given)
    assert fused(told.to_dict()["sites"]) == EVERY_LAYER
    paths = dict(model.named_modules())
    assert all(site.where in paths for site in told.sites)


@pytest.mark.parametrize(
    ("family", "attention"),
    [("bert", "sdpa"), ("bert", "eager"), ("roberta", "sdpa"), ("distilbert", "eager")],
)
def test_without_a_padding_mask(family, attention, tmp_path):
    model, given = make(family, attention, "compress_"), inputs(family, padded=False)
    assert_as_good_as_eager(model, compile_(model, options={"debug_dir": tmp_path}), given)
    sites = json.loads((tmp_path / "graph_0" / "sites.json").read_text())["sites"]
    assert fused(sites) == EVERY_LAYER


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_any_size(family):
    model = make(family, "sdpa", "compress_")
    compiled = compile_(model, dynamic=True)
    for batch, rows in ((2, 9), (3, 13)):
        assert_as_good_as_eager(model, compiled, inputs(family, batch, rows))


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_new_weights_are_seen(family):
    model, given = make(family, "sdpa", "compress_"), inputs(family)
    compiled = compile_(model)
    before = compiled(**given)[0]
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.05)
    assert not torch.allclose(compiled(**given)[0], before)
    assert_as_good_as_eager(model, compiled, given)
