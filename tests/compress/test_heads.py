"""Head layouts from names, attributes and shapes; contradictions give none."""

from types import SimpleNamespace

import pytest
from torch import nn

from flashsvd_compile.compress.heads import HeadLayout, find_head_layouts


def layouts_of(linears, attributes, config=None):
    """Layouts found in a model with one attention module at ``block.attn``."""
    attention = nn.Module()
    for name, out in linears.items():
        attention.add_module(name, nn.Linear(24, out))
    for name, value in attributes.items():
        setattr(attention, name, value)
    model, block = nn.Module(), nn.Module()
    model.add_module("block", block)
    block.add_module("attn", attention)
    if config is not None:
        model.config = SimpleNamespace(**config)
    outs = {f"block.attn.{name}": out for name, out in linears.items()}
    found = find_head_layouts(model, outs)
    return {path.removeprefix("block.attn."): layout for path, layout in found.items()}


FOUND = {
    "bert": (
        {"query": 24, "key": 24, "value": 24, "dense": 24},
        {"num_attention_heads": 4, "attention_head_size": 6},
        None,
        {"query": (1, 4, 6), "key": (1, 4, 6), "value": (1, 4, 6)},
    ),
    "heads alone": (
        {"q_lin": 24, "k_lin": 24, "v_lin": 24},
        {"n_heads": 3},
        None,
        {"q_lin": (1, 3, 8), "k_lin": (1, 3, 8), "v_lin": (1, 3, 8)},
    ),
    "grouped, head_dim alone": (
        {"q_proj": 48, "k_proj": 16, "v_proj": 16, "o_proj": 24},
        {"head_dim": 8, "num_key_value_groups": 3},
        None,
        {"q_proj": (1, 6, 8), "k_proj": (1, 2, 8), "v_proj": (1, 2, 8)},
    ),
    "config of the root": (
        {"q": 24, "k": 8, "v": 8},
        {},
        {"num_attention_heads": 6, "num_key_value_heads": 2},
        {"q": (1, 6, 4), "k": (1, 2, 4), "v": (1, 2, 4)},
    ),
    "attribute before config": (
        {"q": 24, "k": 24, "v": 24},
        {"num_heads": 4},
        {"num_attention_heads": 6},
        {"q": (1, 4, 6), "k": (1, 4, 6), "v": (1, 4, 6)},
    ),
    "fused": ({"c_attn": 72}, {"num_heads": 4, "head_dim": 6}, None, {"c_attn": (3, 4, 6)}),
    "fused, heads alone": ({"qkv": 72}, {"num_heads": 4}, None, {"qkv": (3, 4, 6)}),
}

NOT_FOUND = {
    "nothing declared": ({"q": 24, "k": 24, "v": 24}, {}, None),
    "no value": ({"q_proj": 24, "k_proj": 24}, {"num_heads": 4}, None),
    "heads do not divide": ({"q": 24, "k": 24, "v": 24}, {"num_heads": 5}, None),
    "heads contradict head_dim": (
        {"q": 24, "k": 24, "v": 24},
        {"num_heads": 4, "head_dim": 8},
        None,
    ),
    "gate beside the query": (
        {"q_proj": 48, "k_proj": 24, "v_proj": 24},
        {"head_dim": 8},
        {"num_attention_heads": 3},
    ),
    "kv heads contradict": (
        {"q": 24, "k": 8, "v": 8},
        {"num_heads": 6, "num_key_value_heads": 3},
        None,
    ),
    "kv heads do not divide": ({"q": 24, "k": 16, "v": 16}, {"num_heads": 6}, None),
    "values of another width": ({"q": 24, "k": 24, "v": 12}, {"num_heads": 4}, None),
    "heads differ by stage": ({"q": 24, "k": 24, "v": 24}, {"num_heads": [2, 4]}, None),
    "fused and grouped": ({"qkv_proj": 40}, {"head_dim": 8, "num_heads": 3}, None),
    "fused, kv heads fewer": (
        {"qkv": 72},
        {"num_heads": 4, "head_dim": 6, "num_kv_heads": 2},
        None,
    ),
    "feed-forward": ({"up": 24, "down": 24}, {"num_heads": 4}, None),
}


@pytest.mark.parametrize(("linears", "attributes", "config", "expected"), FOUND.values(), ids=FOUND)
def test_layouts_are_derived(linears, attributes, config, expected):
    found = layouts_of(linears, attributes, config)
    assert found == {name: HeadLayout(*layout) for name, layout in expected.items()}


@pytest.mark.parametrize(("linears", "attributes", "config"), NOT_FOUND.values(), ids=NOT_FOUND)
def test_contradictions_give_no_layout(linears, attributes, config):
    assert layouts_of(linears, attributes, config) == {}
