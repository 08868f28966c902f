"""`LatentCache` itself: bytes, rows, hooks, and what it refuses."""

import copy
import gc

import pytest
import torch
import transformers
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile.compress.joint_modules import NarrowHeadsLinear
from flashsvd_compile.compress.modules import LowRankLinear, PerHeadLowRankLinear
from tests.test_decoders import FAMILIES, RANK, VOCABULARY, decoder, dense, factored

pytestmark = pytest.mark.usefixtures("fresh_inference")

POSITIONS_BYTES = 8


def tokens(rows=2, length=5):
    return torch.randint(3, VOCABULARY, (rows, length))


def with_config(family, **changes):
    name, config, _ = FAMILIES[family]
    cls = getattr(transformers, name)
    return cls(cls.config_class(**{**copy.deepcopy(config), **changes})).eval()


def bytes_of(cache):
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    held += [
        layer.rotation.positions for layer in cache.layers if layer.rotation and layer.is_first
    ]
    return sum(x.numel() * x.element_size() for x in held)


def per_head(model, kind=PerHeadLowRankLinear, rank=5):
    """k_proj and v_proj of each layer by random factors of each head."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for path, module in list(model.named_modules()):
        if path.endswith(("k_proj", "v_proj")):
            biased = module.bias is not None
            heads = module.out_features // width
            layer = kind(module.in_features, heads, width, rank, bias=biased)
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, layer)
    return model


# ---- bytes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 3])
def test_bytes_of_whole_matrix_factors(layers):
    model = factored(with_config("llama", num_hidden_layers=layers))
    cache = fsc.LatentCache(model)
    ids = tokens()
    model(ids, attention_mask=torch.ones_like(ids), position_ids=torch.arange(5).expand(2, 5),
          past_key_values=cache)  # fmt: skip
    assert cache.bytes_per_token == layers * 2 * RANK * 4 + POSITIONS_BYTES
    assert cache.dense_bytes_per_token == layers * 2 * 2 * 12 * 4  # 2 heads of 12
    assert bytes_of(cache) == ids.numel() * cache.bytes_per_token
    for keys, values, _ in cache:
        assert keys.shape == values.shape == (2, 5, RANK)


@pytest.mark.parametrize("kind", [PerHeadLowRankLinear, NarrowHeadsLinear])
def test_bytes_of_factors_of_heads(kind):
    model = per_head(dense("opt"), kind)  # 4 heads of 12, learned positions
    cache = fsc.LatentCache(model)
    model(ids := tokens(), past_key_values=cache)
    assert cache.bytes_per_token == 4 * (5 + 5) * 4
    assert cache.bytes_per_token / cache.dense_bytes_per_token == (5 + 5) / (2 * 12)
    assert bytes_of(cache) == ids.numel() * cache.bytes_per_token


def test_rows_of_like_positions_share_them():
    model = factored(dense("llama"))
    cache = fsc.LatentCache(model)
    model(tokens(rows=3), past_key_values=cache)
    assert cache.layers[0].rotation.positions.tolist() == [[0, 1, 2, 3, 4]]


# ---- factors, norms and ways to turn ---------------------------------------------------------


def _same_steps(model):
    """Logits of a prompt and of two steps are those of a dense cache."""
    cache, plain = fsc.LatentCache(model), transformers.DynamicCache(config=model.config)
    for length in (6, 1, 3):
        ids = tokens(length=length)
        got, want = (model(ids, past_key_values=c).logits for c in (cache, plain))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 10


CLASSES = {
    "llama": ("LlamaForCausalLM", {}),
    "yarn": ("LlamaForCausalLM", {"rope_parameters": {
        "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "linear": ("LlamaForCausalLM", {"rope_parameters": {
        "rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "part of a head turns": ("PhiForCausalLM", {"partial_rotary_factor": 0.5}),
    "interleaved": ("CohereForCausalLM", {"use_qk_norm": False}),
    "a norm of heads, interleaved": ("CohereForCausalLM", {"use_qk_norm": True}),
    "a norm of all features": ("Olmo2ForCausalLM", {}),
    "two kinds of RoPE": ("Gemma3ForCausalLM", {"head_dim": 16, "num_hidden_layers": 6,
                                                "sliding_window": 4, "layer_types": [
        "sliding_attention", "full_attention"] * 3}),
}  # fmt: skip


@pytest.mark.parametrize("case", CLASSES)
@pytest.mark.parametrize("make", [factored, per_head], ids=["matrix", "heads"])
def test_ways_to_make_keys(case, make):
    name, changes = CLASSES[case]
    cls = getattr(transformers, name)
    config = {**FAMILIES["llama"][1], "num_hidden_layers": 2, **changes}
    model = make(cls(cls.config_class(**config)).eval())
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    _same_steps(model)


def test_compressed_models():
    model = with_config("qwen2", num_hidden_layers=2)
    fsc.compress_(model, keep=0.5)
    assert isinstance(model.model.layers[0].self_attn.k_proj, LowRankLinear | PerHeadLowRankLinear)
    _same_steps(model)


def test_layers_that_rotate_alike_share_positions():
    cls = transformers.Gemma3ForCausalLM
    config = {**FAMILIES["llama"][1], **CLASSES["two kinds of RoPE"][1]}
    cache = fsc.LatentCache(factored(cls(cls.config_class(**config)).eval()))
    assert len({id(layer.rotation) for layer in cache.layers}) == 2
    assert [layer.is_first for layer in cache.layers] == [True, True] + [False] * 4
    assert [layer.is_last for layer in cache.layers] == [False] * 4 + [True, True]


# ---- the interface of caches --------------------------------------------------------------------


def _filled(model, positions=True):
    cache = fsc.LatentCache(model)
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    model(ids, attention_mask=mask, past_key_values=cache, **given)
    return cache


def _held(cache):
    for layer in cache.layers:
        yield layer.keys
        yield layer.values
        if layer.rotation is not None:
            yield layer.rotation.positions[:, None]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ],
    ids=["reorder", "select", "repeat"],
)
def test_rows(change, rows):
    cache = _filled(factored(with_config("llama", num_hidden_layers=2)))
    want = [x[rows] for x in _held(cache)]
    change(cache)
    # Layers share positions: each change of rows must reach them once.
    assert all(map(torch.equal, _held(cache), want))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_crop_and_go_on(family):
    model = factored(with_config(family, num_hidden_layers=2))
    cache, plain = fsc.LatentCache(model), transformers.DynamicCache(config=model.config)
    for c in (cache, plain):
        c.activate_past_recording()
    for length in (6, 5, 5):  # the window of one of them is 8
        ids = tokens(length=length)
        got, want = (model(ids, past_key_values=c).logits for c in (cache, plain))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
        cache.crop(-3)
        plain.crop(-3)
        assert cache.get_seq_length() == plain.get_seq_length()
        assert cache.get_mask_sizes(4, 0) == plain.get_mask_sizes(4, 0)
        assert cache.layers[0].rotation.positions.shape[1] == cache.layers[0].keys.shape[2]


def test_reset_is_a_new_cache():
    model = factored(with_config("llama", num_hidden_layers=2))
    cache = _filled(model)
    assert len(cache) == 2
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(rows=3)
    got = model(ids, past_key_values=cache).logits
    assert torch.equal(got, model(ids, past_key_values=fsc.LatentCache(model)).logits)


def test_a_copy_goes_its_own_way_and_shares_the_model():
    model = factored(dense("llama"))
    cache = _filled(model)
    copied = copy.deepcopy(cache)
    assert copied.layers[0].rotation.module is model.model.rotary_emb
    model(tokens(length=1), past_key_values=copied)
    assert (cache.get_seq_length(), copied.get_seq_length()) == (5, 6)
    assert cache.layers[0].rotation.positions.shape[1] == 5


# ---- hooks --------------------------------------------------------------------------------------


def _hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_hooks_live_as_long_as_a_cache_does():
    model = factored(with_config("llama", num_hidden_layers=2))
    first = fsc.LatentCache(model)
    second = copy.deepcopy(fsc.LatentCache(model))
    assert _hooks(model) == 2  # one for each layer, whatever the number of caches
    del first
    gc.collect()
    assert _hooks(model) == 2
    model(tokens(), past_key_values=second)
    del second
    gc.collect()
    assert _hooks(model) == 0


def test_a_refused_model_is_left_without_hooks():
    model = dense("llama")
    with pytest.raises(ValueError, match="not factored"):
        fsc.LatentCache(model)
    assert _hooks(model) == 0


def test_other_caches_of_the_model_are_left_alone():
    model = factored(dense("llama"))
    ids = tokens()
    before = model(ids, use_cache=True)
    cache = _filled(model)
    kept = [x.clone() for x in _held(cache)]
    after = model(ids, use_cache=True)
    assert torch.equal(before.logits, after.logits)
    assert type(after.past_key_values) is transformers.DynamicCache
    assert all(map(torch.equal, kept, _held(cache)))


def test_the_trial_draws_no_random_numbers():
    model = factored(with_config("llama", attention_dropout=0.5)).train()
    state = torch.get_rng_state()
    fsc.LatentCache(model)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training


# ---- what is refused ----------------------------------------------------------------------------


def _half_dense(name):
    model = dense("llama")
    attention = model.model.layers[0].self_attn
    for other in {"k_proj", "v_proj"} - {name}:
        setattr(attention, other, LowRankLinear(48, 24, 4, bias=False))
    return model


def _altered_keys():
    model = factored(dense("llama"))
    model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda m, a, y: 2 * y)
    return model


def _dynamic_rope():
    return factored(with_config("llama", rope_parameters={
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}))  # fmt: skip


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: _half_dense("k_proj"), r"layers\.0\.self_attn\.k_proj, which may make keys, is a "
                                        r"Linear, not factored.*compress_"),
        (lambda: _half_dense("v_proj"), r"layers\.0\.self_attn\.v_proj, which makes values, is a "
                                        r"Linear, not factored.*LowRankLinear"),
        (lambda: decoder("phi3"), r"self_attn\.qkv_proj makes more than values at once"),
        (lambda: decoder("gpt2"), r"attn\.c_attn makes more than values at once"),
        (lambda: decoder("deepseek_v3"), r"layers\.0\.self_attn: its values are not what"),
        (lambda: decoder("bart"), "cross-attention"),
        (_altered_keys, "its keys are not what comes of `k_proj`"),
        (_dynamic_rope, "rope_type 'dynamic'.*fixed frequencies"),
    ],
    ids=["dense k", "dense v", "fused", "conv1d", "MLA", "cross-attention", "altered", "rope"],
)  # fmt: skip
def test_what_is_not_understood_is_refused(make, told):
    with pytest.raises(ValueError, match=told):
        fsc.LatentCache(make())


def test_a_model_of_transformers_is_needed():
    with pytest.raises(TypeError, match="got Linear"):
        fsc.LatentCache(nn.Linear(3, 3))


@pytest.mark.parametrize("has_its_own", [False, True])
def test_another_model_s_cache(has_its_own):
    cache, other = fsc.LatentCache(factored(dense("llama"))), factored(dense("llama"))
    own = fsc.LatentCache(other) if has_its_own else None
    with pytest.raises(RuntimeError, match="not made for"):
        other(tokens(), past_key_values=cache)
    del own


def test_a_compiled_model_is_seen_through():
    model = factored(dense("llama"))
    cache = fsc.LatentCache(torch.compile(model, backend="eager"))
    assert _hooks(model) == 1
    assert len(cache) == 1
