"""Soft-caps and sinks in many spellings: one site each, in rank space, as exact as eager.

Queries are drawn large, so that scores reach the caps and sinks matter. Biases of k count here.
"""

import itertools

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile.reason import Code
from tests.spelled import (
    ALL_LOW_RANK,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    OPTIONS,
    check,
    hidden_states,
    low_rank,
    no_pass_may_fail,
    to_heads,
)

ONE_SITE = ["attention rank_space"]
CAP = 2.0
GROUPS = 2


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ---- spellings ----------------------------------------------------------------------------------


def plain(scores):
    return scores * 0.3


CAPS = {
    "gemma2": lambda s: torch.tanh(s * 0.3 / CAP) * CAP,
    "scale_folded_in": lambda s: CAP * (s * (0.3 / CAP)).tanh(),
    "reciprocal": lambda s: (s * 0.3 * (1 / CAP)).tanh() / (1 / CAP),
    "unscaled": lambda s: CAP * torch.tanh(s / CAP),
    "cap_of_one": lambda s: torch.tanh(s * 0.3),
    "caps_that_differ": lambda s: 3.0 * torch.tanh(s / CAP),
    "negative": lambda s: -CAP * torch.tanh(-0.3 * s / CAP),
    "scaled_after": lambda s: torch.tanh(s * 0.3 / CAP) * CAP * 0.7,
    "tensor_of_a_number": lambda s: torch.tanh(s * 0.3 / CAP) * torch.full((), CAP),
}


def _column(sinks, scores):
    return sinks.reshape(1, -1, 1, 1).expand(scores.size(0), -1, scores.size(2), -1)


def no_sink(sinks, scores):
    return scores.softmax(-1)


def _gpt_oss(sinks, scores):
    joined = torch.cat([scores, _column(sinks, scores)], dim=-1)
    joined = joined - joined.max(dim=-1, keepdim=True).values
    return joined.softmax(-1)[..., :-1]


def _amax(sinks, scores):
    joined = torch.cat([scores, _column(sinks, scores)], dim=3)
    return (joined - joined.amax(-1, keepdim=True).detach()).softmax(-1)[..., : scores.size(-1)]


def _broadcast(sinks, scores):
    column = sinks[None, :, None, None].expand(*scores.shape[:-1], 1)
    return torch.concat([scores, column], -1).softmax(-1).narrow(-1, 0, scores.size(-1))


def _split(sinks, scores):
    joined = torch.cat([scores, _column(sinks, scores)], dim=-1)
    return joined.softmax(-1).split([scores.size(-1), 1], -1)[0]


SINKS = {"gpt_oss": _gpt_oss, "amax": _amax, "broadcast": _broadcast, "split": _split}


class Attention(nn.Module):
    """Over biased low-rank q, k and v; the heads of k and v in groups."""

    def __init__(self, cap=plain, sink=no_sink, mask=None, groups=1):
        super().__init__()
        self.q = low_rank(HIDDEN, HEADS * groups * HEAD_DIM)
        self.k, self.v = (low_rank(HIDDEN, HEADS * HEAD_DIM) for _ in range(2))
        for linear in (self.q[1], self.k[1]):
            nn.init.normal_(linear.weight, std=3.0)
            nn.init.normal_(linear.bias, std=1.0)
        self.sinks = nn.Parameter(torch.randn(HEADS * groups) * 3)
        self.cap, self.sink, self.mask, self.groups = cap, sink, mask, groups

    def forward(self, x):
        q = to_heads(self.q(x), "view_transpose", HEADS * self.groups)
        k, v = (to_heads(p(x), "view_transpose", HEADS) for p in (self.k, self.v))
        if self.groups > 1:
            k, v = (self.repeated(t) for t in (k, v))
        scores = self.cap(q @ k.transpose(2, 3))
        if self.mask is not None:
            scores = self.mask(scores)
        return self.sink(self.sinks, scores) @ v

    def repeated(self, x):
        b, h, n, d = x.shape
        return x[:, :, None].expand(b, h, self.groups, n, d).reshape(b, h * self.groups, n, d)


def causal(scores):
    rows = torch.arange(scores.size(2))
    seen = rows[None, :] <= rows[:, None]
    return scores + torch.where(seen, 0.0, -1e30)


def window(scores):
    rows = torch.arange(scores.size(2))
    seen = (rows[None, :] <= rows[:, None]) & (rows[:, None] - rows[None, :] < 3)
    return scores.masked_fill(~seen, float("-inf"))


def padding(scores):
    hidden = torch.arange(scores.size(3)) < 2
    return scores.masked_fill(hidden, float("-inf"))


MASKS = {"none": None, "causal": causal, "window": window, "padding": padding}


@pytest.mark.parametrize("cap", CAPS)
def test_caps(cap, tmp_path):
    check(Attention(CAPS[cap]), (hidden_states(),), into=tmp_path, found=ONE_SITE,
          ranks=ALL_LOW_RANK)  # fmt: skip


@pytest.mark.parametrize("sink", SINKS)
def test_sinks(sink, tmp_path):
    check(Attention(sink=SINKS[sink]), (hidden_states(),), into=tmp_path, found=ONE_SITE,
          ranks=ALL_LOW_RANK)  # fmt: skip


COMBINED = list(itertools.product(("plain", "capped"), ("none", "gpt_oss"), MASKS, (1, GROUPS)))


@pytest.mark.parametrize(("cap", "sink", "mask", "groups"), COMBINED[8:])
@pytest.mark.parametrize("dynamic", [False, True])
def test_together(cap, sink, mask, groups, dynamic, tmp_path):
    model = Attention(
        CAPS["gemma2"] if cap == "capped" else plain,
        no_sink if sink == "none" else SINKS[sink],
        MASKS[mask],
        groups,
    )
    calls = [(hidden_states(b, m),) for b, m in ((2, 5), (4, 7))[: 1 + dynamic]]
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK, dynamic=dynamic)


@pytest.mark.parametrize("sink", ["none", "gpt_oss"])
@pytest.mark.parametrize("rows", [1, 2])
def test_few_rows(rows, sink, tmp_path):
    model = Attention(CAPS["gemma2"], SINKS.get(sink, no_sink))
    for batch in (1, 2):
        into = tmp_path / str(batch)
        into.mkdir()
        check(model, (hidden_states(batch, rows),), into=into)


@pytest.mark.parametrize(("cap", "sink"), [("gemma2", no_sink), ("plain", _gpt_oss)])
def test_a_cpu_leaves_them_to_unfused(cap, sink):
    """Where neither is asked for by name: a GPU's kernel has them, a CPU's library has not."""
    model, x = Attention(CAPS.get(cap, plain), sink), hidden_states(8, 512)

    def lowering(**where):
        (found,) = (s for s in fsc.explain(model, x, **where).sites if s.kind == "attention")
        return found

    on_cpu = lowering()
    assert on_cpu.lowering == "unfused"
    assert on_cpu.reason.code is Code.NOT_PROFITABLE
    assert "on a CPU" in on_cpu.reason.observed
    model, x = model.bfloat16(), x.bfloat16()
    assert lowering(device="h100").lowering == "rank_space"


# ---- gradients ----------------------------------------------------------------------------------


TRAINED = [
    *itertools.product(("gemma2",), (no_sink, _gpt_oss), ("none", "causal"), ("aot_eager",)),
    *itertools.product(("plain",), (_gpt_oss,), ("none", "causal"), ("aot_eager",)),
    ("gemma2", _gpt_oss, "causal", "inductor"),
]


@pytest.mark.parametrize(("cap", "sink", "mask", "compiler"), TRAINED)
def test_gradients(cap, sink, mask, compiler):
    """Of sinks and of the bias of k, too, which softmax no longer drops."""
    model, x = Attention(CAPS.get(cap, plain), sink, MASKS[mask]), hidden_states()
    torch._dynamo.reset()
    fast = torch.compile(model, backend="flashsvd", options={**OPTIONS, "compiler": compiler})
    grads = []
    with torch.enable_grad(), no_pass_may_fail():
        for run in (model, fast):
            model.zero_grad()
            run(x).square().sum().backward()
            grads.append([p.grad for p in model.parameters()])
    for (name, _), want, got in zip(model.named_parameters(), *grads, strict=True):
        if want is None:
            assert name == "sinks"
            continue
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_in_blocks_of_the_batch_and_of_heads():
    """Where a budget has latents made block by block, caps, sinks and biases of k go along."""
    from flashsvd_compile.lowering import ops

    b, m, rank = 3, 6, 4
    x = torch.randn(b, m, HIDDEN)
    u = [torch.randn(HEADS * rank, HIDDEN) / 3 for _ in "qkv"]
    factors = [torch.randn(HEADS, HEAD_DIM, rank) for _ in "qkv"]
    biases = [torch.randn(HEADS, HEAD_DIM) for _ in "qkv"]
    sinks = torch.randn(HEADS)
    latents = [(x @ w.t()).unflatten(-1, (HEADS, rank)).transpose(1, 2) for w in u]
    lifts = (factors[0], biases[0], factors[1], factors[2], biases[2], None)
    numbers = {
        "num_heads": HEADS, "is_causal": True, "scale": 0.3, "tile": [], "softcap": CAP,
    }  # fmt: skip
    want = ops.rank_space_attention(*latents, *lifts, biases[1], sinks, **numbers)
    got = ops.rank_space_attention_blocks(
        x, x, x, *lifts, u[0], None, u[1], None, u[2], None, biases[1], sinks,
        heads=[HEADS] * 3, block_batch=2, block_heads=1, **numbers,
    )  # fmt: skip
    torch.testing.assert_close(got, want)


# ---- near-misses --------------------------------------------------------------------------------


def _second_column(sinks, scores):
    column = _column(sinks, scores)
    return torch.cat([scores, column, column], -1).softmax(-1)[..., :-2]


def _two_columns(sinks, scores):
    column = _column(sinks, scores).expand(-1, -1, -1, 2)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-2]


def _on_the_left(sinks, scores):
    return torch.cat([_column(sinks, scores), scores], -1).softmax(-1)[..., 1:]


def _sliced_wrongly(sinks, scores):
    return torch.cat([scores, _column(sinks, scores)], -1).softmax(-1)[..., 1:]


def _sliced_before(sinks, scores):
    joined = torch.cat([scores, _column(sinks, scores)], -1)
    return (joined - joined.amax(-1, keepdim=True))[..., :-1].softmax(-1)


def _of_each_query(sinks, scores):
    return torch.cat([scores, scores[..., :1] * 0.5], -1).softmax(-1)[..., :-1]


def _doubled(sinks, scores):
    return (torch.cat([scores, _column(sinks, scores)], -1) * 2).softmax(-1)[..., :-1]


def _other_maximum(sinks, scores):
    joined = torch.cat([scores, _column(sinks, scores)], -1)
    return (joined - joined.amax(-2, keepdim=True)).softmax(-1)[..., :-1]


def _behind_queries(sinks, scores):
    column = sinks.reshape(1, -1, 1, 1).expand(scores.size(0), -1, 1, scores.size(3))
    return torch.cat([scores, column], 2).softmax(-1)[:, :, :-1]


def _twice(sinks, scores):
    joined = torch.cat([scores, _column(sinks, scores)], -1)
    return joined.softmax(-1).softmax(-1)[..., :-1]


# name: (cap, sink, code, what is observed)
SKIPPED = {
    "cap_of_each_head": (
        lambda s: torch.tanh(s / 2) * torch.ones(HEADS, 1, 1).cumsum(0), no_sink,
        "data_dependent_scale", "aten.mul.Tensor"),
    "capped_twice": (
        lambda s: torch.tanh(torch.tanh(s)), no_sink, "op_not_carried", "tanh.default of capped"),
    "tanh_of_masked_scores": (
        lambda s: torch.tanh(causal(s)), no_sink, "op_not_carried", "tanh.default of masked"),
    "cap_of_nothing": (
        lambda s: torch.tanh(s) * 0.0, no_sink, "data_dependent_scale", "aten.mul.Tensor"),
    "sin": (lambda s: torch.sin(s), no_sink, "op_not_carried", "aten.sin"),
    "second_column": (plain, _second_column, "op_not_carried", "cat.default of 3 tensors"),
    "two_columns": (plain, _two_columns, "op_not_carried", "cat.default of 2 columns"),
    "on_the_left": (plain, _on_the_left, "op_not_carried", "scores behind something else"),
    "sliced_wrongly": (plain, _sliced_wrongly, "op_not_carried", "weights with a sink"),
    "sliced_before": (plain, _sliced_before, "op_not_carried", "scores beside a sink"),
    "of_each_query": (plain, _of_each_query, "bad_layout", "differs between queries"),
    "doubled": (plain, _doubled, "op_not_carried", "aten.mul.Tensor of scores beside a sink"),
    "other_maximum": (plain, _other_maximum, "op_not_carried", "aten.sub.Tensor of scores"),
    "behind_queries": (plain, _behind_queries, "softmax_axis", "softmax over dim -1"),
    "softmax_twice": (plain, _twice, "softmax_axis", "softmax over dim -1"),
}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_near_misses_are_skipped(name, tmp_path):
    cap, sink, code, observed = SKIPPED[name]
    sites = check(Attention(cap, sink), (hidden_states(),), into=tmp_path)
    skipped = [s for s in sites if s["kind"] == "attention"]
    assert skipped, "no near-miss was reported"
    assert all(s["lowering"] is None for s in skipped), skipped
    reason = skipped[0]["reason"]
    assert (reason["code"], observed in reason["observed"]) == (code, True), reason
    assert reason["source"].startswith("test_capped_attention.py:")


class ReadElsewhere(Attention):
    """``read``: what leaves the model beside the output, of weights with the sink's column."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        q, k, v = (to_heads(p(x), "view_transpose", HEADS) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(2, 3) * 0.3
        weights = torch.cat([scores, _column(self.sinks, scores)], -1).softmax(-1)
        return weights[..., :-1] @ v, self.read(weights)


@pytest.mark.parametrize(
    "read",
    [lambda w: w, lambda w: w[..., -1], lambda w: w[..., :-1]],
    ids=["all", "the_sinks", "the_keys"],
)
def test_weights_that_are_read_elsewhere(read, tmp_path):
    sites = check(ReadElsewhere(read), (hidden_states(),), into=tmp_path)
    skipped = [s for s in sites if s["kind"] == "attention"]
    assert skipped
    assert all(s["lowering"] is None for s in skipped)
    assert "wide_has_other_user" in {s["reason"]["code"] for s in skipped}


def test_values_beside_a_sink_of_their_own(tmp_path):
    """The sink's column is never cut off: values are padded instead."""

    class Padded(Attention):
        def forward(self, x):
            q, k, v = (to_heads(p(x), "view_transpose", HEADS) for p in (self.q, self.k, self.v))
            scores = q @ k.transpose(2, 3) * 0.3
            weights = torch.cat([scores, _column(self.sinks, scores)], -1).softmax(-1)
            return weights @ nn.functional.pad(v, (0, 0, 0, 1))

    sites = check(Padded(), (hidden_states(),), into=tmp_path)
    (skipped,) = [s for s in sites if s["kind"] == "attention"]
    assert skipped["lowering"] is None
    assert "of the sink's column, too" in skipped["reason"]["observed"]
