"""One lift for q, k and v, of which q and k are bent: v stays a latent, they get what is left.

What is left is a product of the rows that q and k read, and of no others; where that cannot be,
all stays as it was, with the reason.
"""

import pytest
import torch
from torch import nn

import flashsvd_compile as fsc
from flashsvd_compile import contest, pipeline
from flashsvd_compile.analysis.calls import packet, value
from flashsvd_compile.analysis.contraction import read_contraction
from flashsvd_compile.options import Options
from flashsvd_compile.pipeline import rewrite
from flashsvd_compile.planner.budget import BudgetError
from flashsvd_compile.tuning import race
from tests.spelled import (
    FUSED_CUTS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    OPTIONS,
    QUERIES,
    RANK,
    Spelled,
    assert_as_good_as_eager,
    assert_same_gradients,
    check,
    fused_projection,
    hidden_states,
    low_rank,
    sdpa,
    to_heads,
)

pytestmark = pytest.mark.usefixtures("fresh_inference")

aten = torch.ops.aten
WIDTH = HEADS * HEAD_DIM
ONE_SITE = ["attention rank_space"]
ONLY_V = {"q": "dense", "k": "dense", "v": str(RANK)}


def bent(x):
    """Something that no lift passes through."""
    return torch.tanh(x) * x.size(-1) ** 0.25


def bending(q, k, v):
    return sdpa(bent(q), bent(k), v)


def heads(x):
    return to_heads(x, "view_transpose", x.size(-1) // HEAD_DIM)


class Fused(nn.Module):
    """``attend(q, k, v)`` of what ``cut`` makes of one projection to ``width``."""

    def __init__(self, cut, attend=bending, qkv=None, width=3 * WIDTH):
        super().__init__()
        self.qkv, self.cut, self.attend = qkv or low_rank(HIDDEN, width), cut, attend

    def forward(self, x):
        return self.attend(*self.cut(self.qkv(x)))


def rewritten(model, *args, dynamic=None, **options):
    found = []

    def backend(gm, inputs):
        found.append(rewrite(gm, inputs, Options.parse(OPTIONS | options)))
        return found[-1].module.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, dynamic=dynamic)(*args)
    (only,) = found
    return only


def products(model, *args, **options):
    """The operators that multiply with a weight behind the first, each with the weight's shape."""
    found = []
    for node in rewritten(model, *args, **options).module.graph.nodes:
        if (product := read_contraction(node)) is not None:
            found.append((packet(node).__name__, tuple(value(product.right).shape)))
    return found


# ---- what is left is one product of rows side by side --------------------------------------------

SIDE_BY_SIDE = ("linear", (2 * WIDTH, RANK))
PER_HEAD = ("bmm", (HEADS, RANK, 2 * HEAD_DIM))
LEFT = {
    **{("sequential", cut): [SIDE_BY_SIDE] for cut in FUSED_CUTS},
    ("sequential", "parts_last"): [PER_HEAD],
    ("sequential", "chunked_per_head"): [PER_HEAD],
    ("conv1d", "split"): [SIDE_BY_SIDE],
    ("conv1d", "unbind"): [SIDE_BY_SIDE],
    ("conv1d", "chunked_per_head"): [PER_HEAD],
    # A latent for each head, and of each part: cut as the heads are.
    ("per_head_module", "chunk"): [("bmm", (2 * HEADS, RANK, HEAD_DIM))],
    ("per_head_module", "select"): [("bmm", (2 * HEADS, RANK, HEAD_DIM))],
    # Latents of q and k are not side by side over the heads: a copy of both, or a product each.
    ("per_head_module", "chunked_per_head"): [("bmm", (HEADS, RANK, HEAD_DIM))] * 2,
}


@pytest.mark.parametrize(("fused", "cut"), LEFT)
def test_what_is_left(fused, cut, tmp_path):
    model = Fused(FUSED_CUTS[cut], qkv=fused_projection(fused))
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ONLY_V)
    assert products(model, hidden_states())[1:] == LEFT[fused, cut]


@pytest.mark.parametrize(("fused", "cut"), [
    ("sequential", "slice"), ("sequential", "parts_last"), ("per_head_module", "chunk"),
    ("per_head_module", "chunked_per_head")])  # fmt: skip
def test_at_dynamic_sizes(fused, cut, tmp_path):
    model = Fused(FUSED_CUTS[cut], qkv=fused_projection(fused))
    calls = [(hidden_states(batch, rows),) for batch, rows in ((2, 5), (3, 6), (4, 11))]
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ONLY_V, dynamic=True)


def _grouped(x):
    """Phi-3: more heads of queries than of keys and values."""
    q, k, v = x.split([WIDTH, HEAD_DIM, HEAD_DIM], -1)
    return heads(q), heads(k), heads(v)


def _falcon(x):
    """Heads of queries, and one of keys and values, by an index."""
    x = x.view(*x.shape[:2], HEADS + 2, HEAD_DIM)
    return (part.transpose(1, 2) for part in (x[..., :-2, :], x[..., [-2], :], x[..., [-1], :]))


def _falcon_grouped(x):
    """Groups of heads, each with keys and values of its own that an index has repeated."""
    x = x.view(*x.shape[:2], HEADS, 4, HEAD_DIM)
    parts = x[:, :, :, :2], x[:, :, :, [2, 2]], x[:, :, :, [3, 3]]
    return (part.flatten(2, 3).transpose(1, 2) for part in parts)


def _keys_and_values_again(x):
    q, kv = x.split([WIDTH, 2 * WIDTH], -1)
    return map(heads, (q, *kv.chunk(2, -1)))


def _values_first(x):
    v, q, k = x.chunk(3, -1)
    return map(heads, (q, k, v))


def _values_in_the_middle(x):
    q, v, k = x.chunk(3, -1)
    return map(heads, (q, k, v))


def _halves_of_the_query(x):
    """Rows that are read in parts, and twice."""
    q, k, v = x.chunk(3, -1)
    first, second = x[..., : WIDTH // 2], x[..., WIDTH // 2 : WIDTH]
    return heads(torch.cat([first, second], -1) + q), heads(k), heads(v)


def _both_at_once(x):
    """Rows that are read in parts, and together in another shape."""
    q, k, v = x.chunk(3, -1)
    both = x[..., : 2 * WIDTH].view(*x.shape[:2], 2, WIDTH)
    return heads(q + both[:, :, 0]), heads(k + both[:, :, 1]), heads(v)


def _last_query(x):
    q, k, v = x[:, -1:, :WIDTH], x[..., WIDTH : 2 * WIDTH], x[..., 2 * WIDTH :]
    return map(heads, (q, k, v))


def _every_third(x):
    """q, k and v of each feature: rows that are alone."""
    return (heads(x[..., i::3]) for i in range(3))


OTHER_CUTS = {
    "grouped": (_grouped, WIDTH + 2 * HEAD_DIM, [("linear", (WIDTH + HEAD_DIM, RANK))]),
    "falcon": (_falcon, WIDTH + 2 * HEAD_DIM, [("linear", (WIDTH + HEAD_DIM, RANK))]),
    "falcon_grouped": (
        _falcon_grouped, 4 * WIDTH, [("bmm", (HEADS, RANK, 3 * HEAD_DIM))]),
    "keys_and_values_again": (_keys_and_values_again, 3 * WIDTH, [SIDE_BY_SIDE]),
    "values_first": (_values_first, 3 * WIDTH, [SIDE_BY_SIDE]),
    "values_in_the_middle": (
        _values_in_the_middle, 3 * WIDTH, [("linear", (WIDTH, RANK))] * 2),
    "halves_of_the_query": (_halves_of_the_query, 3 * WIDTH, [SIDE_BY_SIDE]),
    "both_at_once": (_both_at_once, 3 * WIDTH, [SIDE_BY_SIDE]),
    "last_query": (_last_query, 3 * WIDTH, [("linear", (WIDTH, RANK))] * 2),
    "every_third": (_every_third, 3 * WIDTH, [("linear", (WIDTH, RANK))] * 2),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHER_CUTS)
def test_other_cuts(name, tmp_path):
    cut, width, left = OTHER_CUTS[name]
    model = Fused(cut, width=width)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ONLY_V)
    assert products(model, hidden_states())[1:] == left


def test_scaled_and_biased_by_hand(tmp_path):
    made = Spelled(
        lambda self, x: (x @ self.u @ self.v) * 0.5 + self.b,
        u=(HIDDEN, RANK), v=(RANK, 3 * WIDTH), b=(3 * WIDTH,),
    )  # fmt: skip
    for cut in ("chunk", "chunked_per_head"):
        into = tmp_path / cut
        into.mkdir()
        model = Fused(FUSED_CUTS[cut], qkv=made)
        check(model, (hidden_states(),), into=into, found=ONE_SITE, ranks=ONLY_V)
        assert products(model, hidden_states())[1:] == LEFT["sequential", cut]


def test_keys_that_are_not_bent_stay_latents_too(tmp_path):
    model = Fused(FUSED_CUTS["chunk"], lambda q, k, v: sdpa(q.sigmoid(), k, v))
    ranks = {"q": "dense", "k": str(RANK), "v": str(RANK)}
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ranks)
    assert products(model, hidden_states())[1:] == [("linear", (WIDTH, RANK))]


@pytest.mark.parametrize("cut", ["slice", "chunked_per_head"])
def test_under_autocast(cut, tmp_path):
    model = Fused(FUSED_CUTS[cut])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ONLY_V)


def test_two_attentions_of_one_lift(tmp_path):
    """The values of each are what the other's keys and queries are for it: other rows."""

    def attend(*parts):
        q, k, v, q2, k2, v2 = map(heads, parts)
        return bending(q, k, v), bending(q2, k2, v2)

    model = Fused(lambda x: x.chunk(6, -1), attend, width=6 * WIDTH)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE * 2, ranks=ONLY_V)
    graph = rewritten(model, hidden_states()).module.graph
    wide = [n for n in graph.nodes if value(n) is not None and 6 * WIDTH in _shape(n)]
    assert all(n.op == "placeholder" for n in wide)


def _shape(node):
    return tuple(getattr(value(node), "shape", ()))


def test_updated_weights_are_seen():
    model, x = Fused(FUSED_CUTS["chunked_per_head"]), hidden_states()
    compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
    before = compiled(x)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 3)
    assert_as_good_as_eager(model, compiled, (x,))
    assert not torch.allclose(before, compiled(x))


def test_no_weight_and_no_latent_is_copied():
    """Each product reads views: nothing of a weight's size is written."""
    for fused, cut in LEFT:
        model = Fused(FUSED_CUTS[cut], qkv=fused_projection(fused))
        graph = rewritten(model, hidden_states()).module.graph
        for node in graph.nodes:
            if node.op == "call_function" and packet(node) in (aten.linear, aten.bmm):
                for operand in node.args[:2]:
                    storage = value(operand).untyped_storage()._cdata
                    assert storage == value(_origin(operand)).untyped_storage()._cdata


def _origin(node):
    """What ``node`` is a view of, however often."""
    views = (aten.reshape, aten.permute, aten.slice, aten.select, aten.expand, aten.view,
             aten.transpose, aten.flatten, aten.unflatten, aten.as_strided)  # fmt: skip
    while node.op == "call_function" and packet(node) in views:
        node = node.args[0]
    return node


# ---- what stays as it was ------------------------------------------------------------------------


def _values_kept(q, k, v):
    return bending(q, k, v), v


def _query_kept(q, k, v):
    return bending(q, k, v), q


def _past_the_query(q, k, v):
    last = torch.as_strided(q, (1,), (1,), 2 * WIDTH)
    return bending(q, k, v) + last


def _query_written_to(q, k, v):
    q = q.mul_(2)
    return bending(q, k, v)


def _values_written_to(q, k, v):
    v[..., 0] = 1.0
    return bending(q, k, v)


def _whole_read(x):
    q, k, v = map(heads, x.chunk(3, -1))
    return q * x.mean(), k, v


def _rows_of_both(x):
    q, k, v = x.split(WIDTH, -1)
    return heads(q), heads(k) + heads(x[..., WIDTH + 1 : 2 * WIDTH + 1]), heads(v)


def _summed(x):
    q, k, v = map(heads, (x + 1.0).chunk(3, -1))
    return q, k, v


def _double(x):
    q, k, v = map(heads, x.double().chunk(3, -1))
    return q.float(), k.float(), v.float()


def _cut_without_autocast(x):
    with torch.autocast("cpu", enabled=False):
        q, k = x[..., :WIDTH], x[..., WIDTH : 2 * WIDTH]
    return map(heads, (q, k, x[..., 2 * WIDTH :]))


# name: (cut, attend, code, what is observed)
KEPT = {
    "values_kept": ("chunk", _values_kept, "wide_has_other_user", "is also read by output"),
    "query_kept": ("chunk", _query_kept, "wide_has_other_user", "is read by output"),
    "past_the_query": ("chunk", _past_the_query, "wide_has_other_user", "read by as_strided"),
    "whole_read": (_whole_read, bending, "wide_has_other_user", "is also read by mean"),
    "rows_of_both": (_rows_of_both, bending, "wide_has_other_user", "is also read by add"),
    "double": (_double, bending, "dtype", "float64"),
    "cut_without_autocast": (
        _cut_without_autocast, bending, "region_crossed", "autocast or grad mode changes"),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_it_stays_as_it_was(name, tmp_path):
    cut, attend, code, observed = KEPT[name]
    model = Fused(FUSED_CUTS[cut] if isinstance(cut, str) else cut, attend)
    (site,) = check(model, (hidden_states(),), into=tmp_path, found=["attention skipped"])
    assert site["reason"]["code"] == code, site["reason"]
    assert observed in site["reason"]["observed"]
    assert site["reason"]["node"]


@pytest.mark.parametrize("attend", [_query_written_to, _values_written_to])
def test_a_lift_that_is_written_to_is_none(attend, tmp_path):
    """Whoever writes into a part writes into the memory of all."""
    check(Fused(FUSED_CUTS["chunk"], attend), (hidden_states(),), into=tmp_path, found=[])


def test_training_keeps_the_whole_lift():
    model, x = Fused(FUSED_CUTS["chunk"]), hidden_states()
    with torch.enable_grad():
        (site,) = (s for s in fsc.explain(model, x, options=OPTIONS).sites if s.kind == "attention")
        assert (site.lowering, site.reason.code.value) == (None, "gradients")
        compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
        assert_same_gradients(model, compiled, x)


def test_factors_that_are_concatenated(tmp_path):
    """Rows of several factors: none can be cut."""

    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(low_rank(HIDDEN, WIDTH) for _ in "qkv")

        def forward(self, x):
            return torch.cat([part(x) for part in self.parts], -1)

    model = Fused(FUSED_CUTS["chunk"], qkv=Grouped())
    sites = check(model, (hidden_states(),), into=tmp_path, found=["attention skipped"])
    assert sites[0]["reason"]["code"] == "bad_layout"


def test_unfused_leaves_the_lift_whole_and_a_chain():
    model, x = Fused(FUSED_CUTS["chunk"]), hidden_states()
    assert products(model, x, attention="unfused")[1:] == [("linear", (3 * WIDTH, RANK))]
    kinds = {how: [s.kind for s in fsc.explain(model, x, options={"attention": how}).sites]
             for how in ("unfused", "rank_space")}  # fmt: skip
    assert kinds == {"unfused": ["chain", "attention"], "rank_space": ["attention"]}


# ---- numbers -------------------------------------------------------------------------------------


def test_flops():
    model, x = Fused(FUSED_CUTS["chunk"]), hidden_states()
    tokens, pairs = 2 * QUERIES, 2 * HEADS * QUERIES * QUERIES
    for how in ("rank_space", "unfused"):
        found = fsc.explain(model, x, options={"attention": how})
        (site,) = (s for s in found.sites if s.kind == "attention")
        unfused = tokens * 3 * WIDTH * RANK + pairs * 2 * HEAD_DIM
        planned = tokens * 2 * WIDTH * RANK + pairs * (HEAD_DIM + RANK) + tokens * WIDTH * RANK
        assert site.numbers["unfused_flops"] == 2 * unfused
        assert site.numbers["flops"] == 2 * (planned if how == "rank_space" else unfused)
        latents = tokens * HIDDEN * RANK  # of the chain that the lift is where attention stays
        told = 2 * (unfused + (latents if how == "unfused" else 0))
        assert found.totals.unfused_flops == told


def test_what_is_timed_is_what_differs(monkeypatch, tmp_path):
    """With the whole lift, or with what is left of it: both give q, k and the result."""
    monkeypatch.setenv("FLASHSVD_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(contest, "MAX_TIMES_AS_LONG", 1e9)  # sizes are tiny
    contests = []

    def told(runs, device, rounds):
        contests.append({name: run() for name, run in runs.items()})
        return {name: 1.0 + (name == "unfused") for name in runs}

    monkeypatch.setattr(race, "median_ms", told)
    model, x = Fused(FUSED_CUTS["chunked_per_head"]), hidden_states()
    options = {"autotune": True, "compiler": "eager"}
    compiled = torch.compile(model, backend="flashsvd", options=options)
    assert_as_good_as_eager(model, compiled, (x,))
    (one,) = (c for c in contests if "rank_space" in c)
    assert [tuple(t.shape) for t in one["unfused"]] == [(2, HEADS, QUERIES, HEAD_DIM)] * 3
    for mine, theirs in zip(one["rank_space"], one["unfused"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    (site,) = (s for s in fsc.explain(model, x, options=options).sites if s.kind == "attention")
    assert (site.lowering, site.plan.known_from) == ("rank_space", "measured before")


@pytest.fixture(params=[1, 2])
def threads(request):
    """What attention holds on a CPU depends on them, and so what plans do not tell."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("fused", ["sequential", "per_head_module"])
def test_a_memory_budget_counts_what_is_left(fused, monkeypatch):
    """What a plan holds within the budget is known before the graph is rewritten, or soon after."""
    rewrites, rewrite = [], pipeline._rewrite
    monkeypatch.setattr(
        pipeline, "_rewrite", lambda *a, **k: rewrites.append(a) or rewrite(*a, **k)
    )
    model, x = Fused(FUSED_CUTS["chunk"], qkv=fused_projection(fused)), hidden_states(2, 700)
    held = {how: fsc.explain(model, x, options={"attention": how}).peaks[0].transient_bytes
            for how in ("rank_space", "unfused")}  # fmt: skip
    assert held["rank_space"] < held["unfused"]
    told = fsc.explain(model, x, options={"memory_budget": held["rank_space"]})
    (site,) = (s for s in told.sites if s.kind == "attention")
    assert (site.lowering, site.plan.blocks) == ("rank_space", None)
    assert told.peaks[0].transient_bytes == held["rank_space"]
    with pytest.raises(BudgetError):  # latents that others read are in no block
        fsc.explain(model, x, options={"memory_budget": held["rank_space"] - 1})
    assert len(rewrites) < 40
