"""Sites in all but one respect: what stood in the way is told, and results stay as they were.

A near-miss of a whole site is reported as skipped. Where only one input of an attention is spoilt,
that input counts as dense and the others still run in rank space.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.spelled import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEYS,
    QUERIES,
    Attention,
    attention_inputs,
    check,
    hidden_states,
    low_rank,
    sdpa,
    to_heads,
)


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ---- attention ----------------------------------------------------------------------------------


class OneAttention(nn.Module):
    """``attend(self, q, k, v)`` over low-rank q, k and v, [B, H, M, D]."""

    def __init__(self, attend, training=False):
        super().__init__()
        self.q, self.k, self.v = (low_rank(HIDDEN, HEADS * HEAD_DIM) for _ in range(3))
        self.norm = nn.LayerNorm(HEAD_DIM)
        self.temperature = nn.Parameter(torch.tensor(0.4))
        self.register_buffer("table", torch.zeros(QUERIES, QUERIES))
        self.attend = attend
        self.train(training)

    def forward(self, x):
        q, k, v = (to_heads(p(x), "view_transpose", HEADS) for p in (self.q, self.k, self.v))
        return self.attend(self, q, k, v)


def _scores(q, k):
    return q @ k.transpose(2, 3)


def _rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def _rope(x):
    angles = torch.arange(x.size(2), dtype=x.dtype)[:, None] * torch.ones(HEAD_DIM, dtype=x.dtype)
    rotated = torch.cat([-x[..., HEAD_DIM // 2 :], x[..., : HEAD_DIM // 2]], -1)
    return x * angles.cos() + rotated * angles.sin()


def _softmax(scores, v):
    return scores.softmax(-1) @ v


def _written_table(self, q, k, v):
    self.table.copy_(torch.ones(QUERIES, QUERIES))
    out = _softmax(_scores(q, k) + self.table, v)
    self.table.zero_()
    return out


def _returned_probabilities(self, q, k, v):
    weights = (_scores(q, k) * 0.3).softmax(-1)
    return weights @ v, weights


def _returned_scores(self, q, k, v):
    scores = _scores(q, k) * 0.3
    return _softmax(scores, v), scores.amax(-1)


def _renormalised(self, q, k, v):
    weights = (_scores(q, k) * 0.3).softmax(-1)
    weights = weights * (weights > 0.1)
    return weights / weights.sum(-1, keepdim=True) @ v


def _autocast_off_inside(self, q, k, v):
    scores = _scores(q, k)
    with torch.autocast("cpu", enabled=False):
        weights = (scores * 0.3).softmax(-1)
    return weights @ v


def _square_mask(q):
    return torch.ones(q.size(2), q.size(2), dtype=torch.int64).tril()


# name: (attend, code, what is observed, the line of this file that is named; None: another file)
SKIPPED = {
    "returned_probabilities": (
        _returned_probabilities, "wide_has_other_user", "is also read by output"),
    "scores_with_another_reader": (
        _returned_scores, "wide_has_other_user", "is also read by amax"),
    "softmax_over_heads": (
        lambda self, q, k, v: _scores(q, k).softmax(1) @ v, "softmax_axis", "softmax over dim 1"),
    "values_over_the_queries": (
        lambda self, q, k, v: _scores(q, k).softmax(-1).transpose(2, 3) @ v,
        "softmax_axis", "contracted over another axis"),
    "learned_temperature": (
        lambda self, q, k, v: _softmax(_scores(q, k) * self.temperature, v),
        "data_dependent_scale", "aten.mul.Tensor"),
    "scale_from_the_input": (
        lambda self, q, k, v: _softmax(_scores(q, k) / q.abs().amax(), v),
        "data_dependent_scale", "aten.div.Tensor"),
    "renormalised": (_renormalised, "op_not_carried", "aten.gt.Scalar"),
    "integer_mask_added": (
        lambda self, q, k, v: _softmax(_scores(q, k) + _square_mask(q), v),
        "op_not_carried", "aten.add.Tensor"),
    "fill_that_leaves_weight": (
        lambda self, q, k, v: _softmax(_scores(q, k).masked_fill(_square_mask(q) == 0, -9.0), v),
        "op_not_carried", "aten.masked_fill"),
    "mask_then_scale": (
        lambda self, q, k, v: _softmax((_scores(q, k) + self.table) * 0.3, v),
        "data_dependent_scale", "aten.mul.Tensor"),
    "mask_written_in_place": (_written_table, "op_not_carried", "aten.add.Tensor"),
    "values_added_to": (
        lambda self, q, k, v: torch.baddbmm(
            v.flatten(0, 1), _scores(q, k).softmax(-1).flatten(0, 1), v.flatten(0, 1)),
        "op_not_carried", "adds to the weighted values"),
    "log_softmax": (
        lambda self, q, k, v: _scores(q, k).log_softmax(-1) @ v,
        "op_not_carried", "aten.log_softmax"),
    "autocast_inside": (_autocast_off_inside, "region_crossed", "autocast or grad mode changes"),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_attention_is_skipped(name, tmp_path):
    attend, code, observed = SKIPPED[name]
    sites = check(OneAttention(attend), (hidden_states(),), into=tmp_path)
    skipped = [s for s in sites if s["kind"] == "attention"]
    assert skipped, "no near-miss was reported"
    assert all(s["lowering"] is None for s in skipped), skipped
    reason = skipped[0]["reason"]
    assert reason["code"] == code
    assert observed in reason["observed"]
    assert reason["node"]
    assert reason["source"].startswith("test_near_misses.py:")


@pytest.mark.parametrize("attend", [
    lambda self, q, k, v: sdpa(q, k, v, dropout_p=0.5),
    lambda self, q, k, v: F.dropout(_scores(q, k).softmax(-1), 0.5) @ v,
], ids=("sdpa", "by_hand"))  # fmt: skip
def test_active_dropout_is_skipped(attend, tmp_path):
    model, x = OneAttention(attend, training=True), hidden_states()
    explained = _reasons(model, x)
    assert [code for code, _ in explained] == ["dropout_active"]
    compiled = torch.compile(model, backend="flashsvd", options={"compiler": "eager"})
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(compiled(x), want)


def _reasons(model, *args):
    from flashsvd_compile import explain

    torch._dynamo.reset()
    found = explain(model, *args, options={"compiler": "eager"}).sites
    return [(s.reason.code.value, s.reason) for s in found if s.lowering is None]


def _returned_key(self, q, k, v):
    return sdpa(q, k, v), k


def _padded_key(self, q, k, v):
    return sdpa(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)))


def _fake_quantised(x):
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _bits(x):
    return x.view(torch.int32).view(torch.float32) if x.dtype == torch.float32 else x


# name: (attend, which inputs stay latents)
DENSE = {
    "returned_key": (_returned_key, {"q", "v"}),
    "rms_norm_on_query": (lambda self, q, k, v: sdpa(_rms_norm(q), k, v), {"k", "v"}),
    "layer_norm_on_query_and_key": (
        lambda self, q, k, v: sdpa(self.norm(q), self.norm(k), v), {"v"}),
    "rope": (lambda self, q, k, v: sdpa(_rope(q), _rope(k), v), {"q", "v"}),
    "activated_query": (lambda self, q, k, v: sdpa(F.elu(q) + 1, k, v), {"k", "v"}),
    "padded_keys": (_padded_key, {"q"}),
    "flipped_keys": (lambda self, q, k, v: sdpa(q, k.flip(2), v.flip(2)), {"q"}),
    "query_written_in_part": (
        lambda self, q, k, v: sdpa(q.contiguous().index_fill_(2, torch.tensor([0]), 0.0), k, v),
        {"k", "v"}),
    "fake_quantised_key": (lambda self, q, k, v: sdpa(q, _fake_quantised(k), v), {"q", "v"}),
    "reinterpreted_key": (lambda self, q, k, v: sdpa(q, _bits(k), v), {"q", "v"}),
    "key_scaled_by_a_tensor": (
        lambda self, q, k, v: sdpa(q, k * self.temperature, v), {"q", "v"}),
    "causal_roll": (lambda self, q, k, v: sdpa(q.roll(1, 2), k, v, is_causal=True), {"k", "v"}),
}  # fmt: skip


@pytest.mark.parametrize("name", DENSE)
def test_one_input_is_dense(name, tmp_path):
    attend, latents = DENSE[name]
    told = {arm: "4" if arm in latents else "dense" for arm in "qkv"}
    check(OneAttention(attend), (hidden_states(),), into=tmp_path, found=["attention rank_space"],
          ranks=told)  # fmt: skip


def test_dense_attention_is_no_near_miss(tmp_path):
    model = Attention("dense", "dense", "dense")
    check(model, attention_inputs("sdpa"), into=tmp_path, found=[])


def test_masked_out_rows_agree(tmp_path):
    """A query that sees no key: zero after SDPA, NaN by hand with -inf, an average with a fill."""
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril(-1)
    models = [
        OneAttention(lambda self, q, k, v: sdpa(q, k, v, mask)),
        OneAttention(lambda self, q, k, v: _softmax(_scores(q, k).masked_fill(~mask, -1e9), v)),
    ]
    for index, model in enumerate(models):
        into = tmp_path / str(index)
        into.mkdir()
        check(model, (hidden_states(),), into=into, found=["attention rank_space"])


def test_where_eager_has_nan_so_may_we(tmp_path):
    mask = torch.ones(QUERIES, QUERIES, dtype=torch.bool).tril(-1)
    model = OneAttention(
        lambda self, q, k, v: _softmax(_scores(q, k).masked_fill(~mask, -math.inf), v)
    )
    x = hidden_states()
    got = torch.compile(model, backend="flashsvd", options={"compiler": "eager"})(x)
    want = model(x)
    assert want[:, :, 0].isnan().all()
    torch.testing.assert_close(got[:, :, 1:], want[:, :, 1:])


# ---- feed-forward -------------------------------------------------------------------------------


class OneFeedForward(nn.Module):
    def __init__(self, middle, training=False):
        super().__init__()
        self.gate, self.up = low_rank(HIDDEN, INTERMEDIATE), low_rank(HIDDEN, INTERMEDIATE)
        self.down, self.other_down = (low_rank(INTERMEDIATE, HIDDEN) for _ in range(2))
        self.norm = nn.LayerNorm(INTERMEDIATE)
        self.slope = nn.Parameter(torch.full((INTERMEDIATE,), 0.2))
        self.middle = middle
        self.train(training)

    def forward(self, x):
        return self.middle(self, self.up(x))


def _returned_intermediate(self, h):
    h = F.gelu(h)
    return self.down(h), h


def _summed_intermediate(self, h):
    h = F.gelu(h)
    return self.down(h) + h.sum(-1, keepdim=True)


def _two_downs(self, h):
    h = F.relu(h)
    return self.down(h), self.other_down(h)


def _returned_gate(self, h):
    h = h * h.sigmoid()
    return self.down(h), h


def _gelu_off_in_the_fourth_digit(self, h):
    inner = math.sqrt(2 / math.pi) * (h + 0.0448 * h.pow(3))
    return self.down(0.5 * h * (1 + torch.tanh(inner)))


def _autocast_off_in_the_middle(self, h):
    with torch.autocast("cpu", enabled=False):
        h = F.gelu(h)
    return self.down(h)


def _written_in_part(self, h):
    h = F.gelu(h)
    h[..., 0] = 1.0
    return self.down(h)


FEED_FORWARD_SKIPPED = {
    "returned_intermediate": (
        _returned_intermediate, "wide_has_other_user", "is also read by output"),
    "intermediate_with_another_reader": (
        _summed_intermediate, "wide_has_other_user", "is also read by sum"),
    "gate_with_another_reader": (_returned_gate, "wide_has_other_user", "is also read by output"),
    "two_downs": (_two_downs, "wide_has_other_user", "is also read by linear"),
    "mish": (lambda self, h: self.down(F.mish(h)), "activation_unknown", "aten.mish"),
    "leaky_relu": (
        lambda self, h: self.down(F.leaky_relu(h, 0.01)), "activation_unknown", "leaky_relu"),
    "gelu_off_in_the_fourth_digit": (
        _gelu_off_in_the_fourth_digit, "activation_unknown", "aten.tanh"),
    "doubled": (lambda self, h: self.down(F.gelu(h) * 2), "activation_unknown", "aten.mul"),
    "layer_norm_inside": (
        lambda self, h: self.down(self.norm(F.gelu(h))), "op_not_carried", "aten.layer_norm"),
    "prelu": (lambda self, h: self.down(F.prelu(h.transpose(1, 2), self.slope).transpose(1, 2)),
              "op_not_carried", "aten.prelu"),
    "softmax_gate": (lambda self, h: self.down(h.softmax(-1)), "op_not_carried", "aten.softmax"),
    "torch_glu": (
        lambda self, h: self.down(F.glu(torch.cat([h, h], -1), -1)), "op_not_carried", "aten.glu"),
    "autocast_inside": (
        _autocast_off_in_the_middle, "region_crossed", "autocast or grad mode changes"),
    "written_in_part": (_written_in_part, "mutated", "written in place"),
    "float8": (lambda self, h: self.down(_fake_quantised(F.gelu(h))), "op_not_carried", "aten.to"),
}  # fmt: skip


@pytest.mark.parametrize("name", FEED_FORWARD_SKIPPED)
def test_feed_forward_is_skipped(name, tmp_path):
    middle, code, observed = FEED_FORWARD_SKIPPED[name]
    sites = check(OneFeedForward(middle), (hidden_states(),), into=tmp_path)
    skipped = [s for s in sites if s["kind"] == "feed_forward"]
    assert skipped, "no near-miss was reported"
    assert all(s["lowering"] is None for s in skipped), skipped
    reason = skipped[0]["reason"]
    assert reason["code"] == code
    assert observed in reason["observed"]
    assert reason["node"]
    assert reason["source"].startswith("test_near_misses.py:")


def test_active_dropout_in_a_feed_forward_is_skipped():
    model = OneFeedForward(lambda self, h: self.down(F.dropout(F.gelu(h), 0.5)), training=True)
    assert [code for code, _ in _reasons(model, hidden_states())] == ["dropout_active"]


def test_a_tensor_beside_its_own_transpose_is_no_gate(tmp_path):
    """Both operands come from one lift, but not from the same place of it."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = low_rank(HIDDEN, KEYS * 4), low_rank(KEYS * 4, HIDDEN)

        def forward(self, x):
            h = self.up(x)
            return self.down(F.silu(h) * h.transpose(1, 2))

    sites = check(Square(), (torch.randn(2, KEYS * 4, HIDDEN),), into=tmp_path)
    assert not any(s["kind"] == "feed_forward" and s["lowering"] for s in sites)


class Layers(nn.Module):
    """A low-rank layer, ``between`` over its output, and attention that reads nothing else."""

    def __init__(self, between):
        super().__init__()
        self.first, self.second = low_rank(HIDDEN, HIDDEN), low_rank(HIDDEN, HIDDEN)
        self.norm, self.scales = nn.LayerNorm(HIDDEN), nn.Parameter(torch.rand(HIDDEN))
        self.attention = OneAttention(lambda self, q, k, v: sdpa(q, k, v))
        self.between = between

    def forward(self, x):
        y = self.first(x)
        return self.attention(self.between(self, x, y)), y


# What comes between a layer and the next one's q, k and v without making a feed-forward of it.
LAYER_OUTPUTS = {
    "nothing": lambda self, x, y: y,
    "views": lambda self, x, y: y.flatten(0, 1).view(y.shape),
    "halved": lambda self, x, y: y * 0.5 + 1.0,
    "sum_of_two_layers": lambda self, x, y: y + self.second(x),
    "layer_scale": lambda self, x, y: y * self.scales,
    "layer_norm": lambda self, x, y: self.norm(y),
}


@pytest.mark.parametrize("between", LAYER_OUTPUTS)
def test_the_output_of_a_layer_is_no_feed_forward(between, tmp_path):
    """Wide, between low-rank products, with several readers: and yet nobody's intermediate."""
    check(Layers(LAYER_OUTPUTS[between]), (hidden_states(),), into=tmp_path,
          found=["attention rank_space"])  # fmt: skip


def test_an_activation_before_three_projections_is_a_feed_forward(tmp_path):
    model = Layers(lambda self, x, y: F.relu(y))
    sites = check(model, (hidden_states(),), into=tmp_path)
    missed = [s["reason"]["code"] for s in sites if s["kind"] == "feed_forward"]
    assert missed == ["wide_has_other_user"] * 3


def test_a_linear_middle_is_no_feed_forward(tmp_path):
    model = OneFeedForward(lambda self, h: self.down(h * 2.0 + 1.0))
    check(model, (hidden_states(),), into=tmp_path, found=[])


# ---- memory that somebody else may see ----------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True], ids=("itself", "what_it_became"))
def test_a_result_written_in_place_through_a_view(apart, tmp_path):
    def attend(self, q, k, v):
        out = _softmax(_scores(q, k) * 0.3, v)
        if apart:
            out = out * 2
        out.view(-1)[:7] = 0.5
        return out, out.mT

    found = ["attention rank_space"] if apart else ["attention skipped"]
    check(OneAttention(attend), (hidden_states(),), into=tmp_path, found=found)


def test_an_intermediate_changed_through_a_view_made_before(tmp_path):
    def middle(self, h):
        seen = h.view(-1)
        F.relu(h, inplace=True)
        return self.down(h) + seen.sum()

    sites = check(OneFeedForward(middle), (hidden_states(),), into=tmp_path)
    assert not any(s["kind"] == "feed_forward" and s["lowering"] for s in sites)


def test_a_key_changed_through_dropout_that_is_off(tmp_path):
    def attend(self, q, k, v):
        F.dropout(k, 0.1, training=False).add_(1.0)
        return sdpa(q, k, v)

    check(OneAttention(attend), (hidden_states(),), into=tmp_path)


def test_an_input_written_after_it_was_read(tmp_path):
    class Cache(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = OneAttention(lambda self, q, k, v: sdpa(q, k, v))

        def forward(self, x):
            x = x.clone()
            out = self.inner(x)
            x[:, 0] = 0.0
            return out + self.inner(x)

    check(Cache(), (hidden_states(),), into=tmp_path)


def test_results_leave_with_the_strides_of_eager():
    model = OneAttention(lambda self, q, k, v: _softmax(_scores(q, k) * 0.3, v))
    compiled = torch.compile(
        model, backend="flashsvd", options={"compiler": "eager", "attention": "rank_space"}
    )
    x = hidden_states()
    assert compiled(x).stride() == model(x).stride()
