"""The same attention in many spellings: one site each, in rank space, as exact as eager."""

import random
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import flashsvd_compile as fsc
from tests.spelled import (
    ALL_LOW_RANK,
    ATTENDS,
    FUSED_CUTS,
    HEAD_DIM,
    HEAD_LAYOUTS,
    HEADS,
    HIDDEN,
    OPTIONS,
    PROJECTIONS,
    RANK,
    Attention,
    FusedAttention,
    Spelled,
    attention_inputs,
    check,
    hidden_states,
    low_rank,
    no_pass_may_fail,
    projection,
    sdpa,
    to_heads,
)

ONE_SITE = ["attention rank_space"]


@pytest.fixture(autouse=True)
def _no_grad():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


# ---- each spelling once -------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections(name, tmp_path):
    model = Attention(name, name, name)
    check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_head_layouts(layout, tmp_path):
    model = Attention(layout=layout)
    check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


@pytest.mark.parametrize("attend", ATTENDS)
def test_attends(attend, tmp_path):
    model = Attention(attend=attend)
    check(model, attention_inputs(attend), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


FUSED = [("sequential", cut) for cut in FUSED_CUTS] + [
    ("conv1d", "split"), ("conv1d", "unbind"), ("per_head_module", "chunk"),
    ("per_head_module", "select"), ("latents", None), ("one_latent", None),
]  # fmt: skip


@pytest.mark.parametrize(("fused", "cut"), FUSED)
def test_fused_projections(fused, cut, tmp_path):
    model = FusedAttention(fused, cut, attend="by_hand")
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


# ---- at changing sizes, compiled once -----------------------------------------------------------

SIZES = ((2, 5, 7), (3, 6, 9), (4, 11, 8))


def _calls(attend, self_attention=False):
    calls = []
    for batch, queries, keys in SIZES:
        args = attention_inputs(attend, batch, queries, keys)
        calls.append(args[:1] + args[2:] if self_attention else args)
    return calls


@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_at_dynamic_sizes(name, tmp_path):
    model, calls = Attention(name, name, name), _calls("sdpa")
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK, dynamic=True)


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_head_layouts_at_dynamic_sizes(layout, tmp_path):
    model, calls = Attention(layout=layout), _calls("sdpa")
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK, dynamic=True)


@pytest.mark.parametrize("attend", ATTENDS)
def test_attends_at_dynamic_sizes(attend, tmp_path):
    model, calls = Attention(attend=attend), _calls(attend)
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK, dynamic=True)


@pytest.mark.parametrize(("fused", "cut"), FUSED)
def test_fused_projections_at_dynamic_sizes(fused, cut, tmp_path):
    model, calls = FusedAttention(fused, cut), _calls("sdpa", self_attention=True)
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK, dynamic=True)


# ---- mixtures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_random_mixtures(seed, tmp_path):
    """Every input in a spelling and of a rank of its own; some are dense."""
    rng = random.Random(seed)
    names = [rng.choice((*PROJECTIONS, "dense")) for _ in range(3)]
    if names == ["dense"] * 3:
        names[0] = "raw"
    ranks = tuple(rng.choice((2, 3, 5, 6)) for _ in range(3))
    layout, attend = rng.choice(list(HEAD_LAYOUTS)), rng.choice(list(ATTENDS))
    told = {
        arm: "dense" if name == "dense" else str(rank)
        for arm, name, rank in zip("qkv", names, ranks, strict=True)
    }
    model = Attention(*names, layout=layout, attend=attend, ranks=ranks)
    dynamic = seed % 2 == 1
    calls = _calls(attend) if dynamic else [attention_inputs(attend)]
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=told, dynamic=dynamic)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_random_sizes(data):
    """Any spelling at any size; equal sizes, ones and ranks above the width among them."""
    size = st.integers(1, 6)
    names = [data.draw(st.sampled_from((*PROJECTIONS, "dense"))) for _ in range(3)]
    layout, attend = (data.draw(st.sampled_from(list(t))) for t in (HEAD_LAYOUTS, ATTENDS))
    heads, dim = data.draw(size), data.draw(size)
    ranks = tuple(data.draw(st.integers(1, dim)) for _ in range(3))
    model = Attention(*names, layout, attend, ranks, heads, dim)
    args = attention_inputs(attend, *(data.draw(size) for _ in range(3)), heads)
    with tempfile.TemporaryDirectory() as directory, torch.no_grad():
        check(model, args, into=Path(directory), dynamic=data.draw(st.booleans()))


@pytest.mark.parametrize("arm", range(3), ids="qkv")
@pytest.mark.parametrize("dense", [True, False], ids=("dense_among", "low_rank_among"))
def test_one_input_unlike_the_others(arm, dense, tmp_path):
    names = ["dense" if (i == arm) == dense else "sequential" for i in range(3)]
    told = {key: "dense" if name == "dense" else "4" for key, name in zip("qkv", names)}  # noqa: B905
    model = Attention(*names, attend="by_hand")
    check(model, attention_inputs("by_hand"), into=tmp_path, found=ONE_SITE, ranks=told)


@pytest.mark.parametrize("rank", [HEAD_DIM, HEAD_DIM + 3], ids=("head_dim", "above_head_dim"))
@pytest.mark.parametrize("name", ["sequential", "shared_latent", "conv1d"])
def test_ranks_up_to_and_above_head_dim(name, rank, tmp_path):
    """A latent shared by the heads may be wider than one head: still narrower than all of them."""
    model = Attention(name, name, name, ranks=(rank,) * 3)
    check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE)


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_one_symbol_for_batch_and_rows(layout, tmp_path):
    """Torch gives equal sizes one symbol at first: a row count is then (s0**2)//s0."""
    model, calls = Attention(layout=layout), [attention_inputs("sdpa", 4, 4, 4)]
    check(model, *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK, dynamic=True)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_ranks_of_one(name, tmp_path):
    model = Attention(name, name, name, ranks=(1, 1, 1))
    check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE)


# ---- grouped-query attention --------------------------------------------------------------------

GROUPS = 2


def _repeat_kv(x):
    b, h, n, d = x.shape
    return x[:, :, None].expand(b, h, GROUPS, n, d).reshape(b, h * GROUPS, n, d)


def _repeat_interleave(x):
    return torch.repeat_interleave(x, GROUPS, dim=1)


def _gqa_einsum(q, k, v):
    b, h, m, d = q.shape
    q = q.view(b, h // GROUPS, GROUPS, m, d)
    weights = torch.einsum("bhgmd,bhnd->bhgmn", q, k).mul(0.3).softmax(-1)
    return torch.einsum("bhgmn,bhnd->bhgmd", weights, v).reshape(b, h, m, d)


def _gqa_matmul(q, k, v):
    b, h, m, d = q.shape
    q = q.view(b, h // GROUPS, GROUPS, m, d)
    weights = (q @ k.unsqueeze(2).mT * 0.3).softmax(-1)
    return (weights @ v.unsqueeze(2)).reshape(b, h, m, d)


def _gqa_stacked_rows(q, k, v):
    """The heads of a group as more rows of one head."""
    b, h, m, d = q.shape
    weights = (q.reshape(b, h // GROUPS, GROUPS * m, d) @ k.mT * 0.3).softmax(-1)
    return (weights @ v).view(b, h, m, d)


GQA = {
    "enable_gqa": lambda q, k, v: sdpa(q, k, v, enable_gqa=True),
    "repeat_kv": lambda q, k, v: sdpa(q, _repeat_kv(k), _repeat_kv(v)),
    "repeat_interleave": lambda q, k, v: sdpa(q, _repeat_interleave(k), _repeat_interleave(v)),
    "repeat_kv_by_hand": lambda q, k, v: (
        (q @ _repeat_kv(k).transpose(2, 3) * 0.3).softmax(-1) @ _repeat_kv(v)
    ),
    "einsum": _gqa_einsum,
    "matmul": _gqa_matmul,
    "stacked_rows": _gqa_stacked_rows,
    "multi_query": lambda q, k, v: sdpa(
        q, k[:, :1].expand(-1, q.size(1), -1, -1), v[:, :1].expand(-1, q.size(1), -1, -1)
    ),
}


class GroupedQuery(nn.Module):
    def __init__(self, name, attend):
        super().__init__()
        self.q = projection(name, heads=HEADS * GROUPS)
        self.k, self.v = projection(name), projection(name)
        self.attend = GQA[attend]

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
                   for p in (self.q, self.k, self.v))  # fmt: skip
        return self.attend(q, k, v)


@pytest.mark.parametrize(
    ("attend", "name", "dynamic"),
    [  # each attention and each projection, static and dynamic
        (attend, name, bool((row + column) % 2))
        for row, attend in enumerate(GQA)
        for column, name in enumerate(("sequential", "per_head_module"))
    ],
)
def test_grouped_query_attention(attend, name, dynamic, tmp_path):
    calls = [(hidden_states(b, m),) for b, m, _ in (SIZES if dynamic else SIZES[:1])]
    check(GroupedQuery(name, attend), *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK,
          dynamic=dynamic)  # fmt: skip


class TurnedKeys(GroupedQuery):
    """Queries and keys are turned, so that only values stay low-rank."""

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
                   for p in (self.q, self.k, self.v))  # fmt: skip
        return self.attend(q.sin(), k.sin(), v)


VALUES_LOW_RANK = {"q": "dense", "k": "dense", "v": "4"}


@pytest.mark.parametrize("attend", ["repeat_kv", "repeat_interleave", "repeat_kv_by_hand"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_dense_keys_are_read_before_they_are_repeated(attend, dynamic, tmp_path):
    model, x = TurnedKeys("sequential", attend), hidden_states()
    check(model, (x,), into=tmp_path, found=ONE_SITE, ranks=VALUES_LOW_RANK, dynamic=dynamic)
    (graph,) = fsc.explain(model, x, options=OPTIONS).graphs
    repeats = "repeat_interleave" if attend == "repeat_interleave" else "expand"
    assert f"aten.{repeats}" in graph.before
    assert f"aten.{repeats}" not in graph.after


def _written_before(k):
    repeated = _repeat_interleave(k)
    k.zero_()
    return repeated


def _written_after(repeat):
    def keys(k):
        repeated = repeat(k)
        repeated[:, 1].mul_(3)
        return repeated

    return keys


def _without_gradients(k):
    with torch.no_grad():
        return _repeat_interleave(k)


KEYS = {
    "source written": _written_before,
    "copy written": _written_after(_repeat_kv),
    "copy of one head written": _written_after(
        lambda k: k[:, :1].expand(-1, HEADS * GROUPS, -1, -1).contiguous()
    ),
    "product written": _written_after(
        lambda k: k[:, :1].expand(-1, HEADS * GROUPS, -1, -1) * 2.0
    ),
    "rounded before": lambda k: _repeat_interleave(k.bfloat16()).float(),
    "rounded after": lambda k: _repeat_interleave(k).bfloat16().float(),
    "cut again": lambda k: _repeat_kv(k).repeat(1, 2, 1, 1)[:, 1 : HEADS * GROUPS + 1],
    "one position": lambda k: _repeat_kv(k)[:, :, :1].expand(-1, -1, k.size(2), -1),
    "no gradients": _without_gradients,
}  # fmt: skip


@pytest.mark.parametrize("keys", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_keys_that_are_not_what_was_repeated(keys, dynamic):
    class Repeated(TurnedKeys):
        def forward(self, x):
            k = keys(self.heads(self.k, x).sin())  # before the others: all in one grad mode
            return sdpa(self.heads(self.q, x).sin(), k, _repeat_kv(self.heads(self.v, x)))

        @staticmethod
        def heads(projection, x):
            return projection(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)

    model = Repeated("sequential", "repeat_kv")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="flashsvd", options=OPTIONS, dynamic=dynamic)
    found, x = [], hidden_states()
    for run in (model, compiled):
        model.zero_grad()
        with torch.enable_grad(), no_pass_may_fail():
            out = run(x)
            out.square().sum().backward()
        torch.testing.assert_close(run(x), model(x))
        found.append([out, *(p.grad for p in model.parameters())])
    for plain, ours in zip(*found, strict=True):
        assert (plain is None) == (ours is None)
        if plain is not None:  # gradients of what is rounded are rounded, too
            torch.testing.assert_close(ours, plain, rtol=1e-2, atol=1e-2)


# ---- what surrounds a site ----------------------------------------------------------------------


def test_palu_keeps_queries_dense(tmp_path):
    model = Attention("dense", "groups", "groups")
    ranks = {"q": "dense", "k": "4", "v": "4"}
    check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE, ranks=ranks)


def test_factors_shared_by_query_and_key(tmp_path):
    model = Attention()
    model.k[0].weight, model.k[1].weight = model.q[0].weight, model.q[1].weight
    check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


def test_query_and_key_are_the_same_tensor(tmp_path):
    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.v = projection("sequential"), projection("sequential")

        def forward(self, x):
            q, v = (to_heads(p(x), "view_transpose", HEADS) for p in (self.q, self.v))
            return sdpa(q, q, v)

    check(Same(), (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


def test_layers_that_share_their_factors(tmp_path):
    layer = Attention()

    def twice(x):
        x = layer(x, x)
        return layer(x, x)

    model = Spelled(lambda self, x: twice(x))
    model.layer = layer
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE * 2, ranks=ALL_LOW_RANK)


def test_weights_written_after_compiling_are_seen():
    model = Attention()
    args = attention_inputs("sdpa")
    compiled = torch.compile(model, backend="flashsvd", options={"compiler": "eager"})
    before = compiled(*args)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) / 5)
    torch.testing.assert_close(compiled(*args), model(*args))
    assert not torch.allclose(before, model(*args))


def test_factors_that_are_plain_inputs(tmp_path):
    def attention(x, uq, vq, uk, vk, uv, vv):
        q, k, v = (((x @ u) @ w).view(*x.shape[:2], HEADS, -1).transpose(1, 2)
                   for u, w in ((uq, vq), (uk, vk), (uv, vv)))  # fmt: skip
        return sdpa(q, k, v)

    pair = [torch.randn(HIDDEN, RANK) / 5, torch.randn(RANK, HEADS * HEAD_DIM) / 2]
    check(attention, (hidden_states(), *pair, *pair, *pair), into=tmp_path, found=ONE_SITE,
          ranks=ALL_LOW_RANK)  # fmt: skip


def test_latents_that_are_inputs(tmp_path):
    """A cache of latents: the lift is in the graph, the product that made them is not."""

    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = projection("sequential")
            self.vk, self.vv = (nn.Linear(RANK, HEADS * HEAD_DIM) for _ in range(2))

        def forward(self, x, keys, values):
            q, k, v = (to_heads(t, "view_transpose", HEADS)
                       for t in (self.q(x), self.vk(keys), self.vv(values)))  # fmt: skip
            return sdpa(q, k, v)

    cache = [torch.randn(2, 7, RANK) for _ in range(2)]
    check(Cached(), (hidden_states(), *cache), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


def _expanded(x):
    return x[:1, :1].expand_as(x)


def _strided(x):
    return torch.randn(*x.shape[:2], 2 * x.size(2))[..., ::2]


def _transposed(x):
    return x.transpose(0, 1).contiguous().transpose(0, 1)


CUTS_FROM_THE_END = {
    "features": lambda m, x: _thirds(m.qkv(x), slice(-112, 24), slice(24, 48), slice(-24, None)),
    "all features": lambda m, x: _thirds(
        m.qkv(x), slice(-500, -48), slice(-48, -24), slice(48, 72)
    ),
    "all tokens": lambda m, x: m.qkv(x)[:, -512:].chunk(3, -1),
    "last tokens": lambda m, x: m.qkv(x)[:, -3:].chunk(3, -1),
    "first tokens": lambda m, x: m.qkv(x)[:, -8:2].chunk(3, -1),
}


def _thirds(y, *slices):
    return (y[..., cut] for cut in slices)


@pytest.mark.parametrize("cut", CUTS_FROM_THE_END.values(), ids=CUTS_FROM_THE_END)
@pytest.mark.parametrize("dynamic", [False, True])
def test_cuts_that_begin_before_the_first_element_begin_there(cut, dynamic, tmp_path):
    class FromTheEnd(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = low_rank(HIDDEN, 3 * HEADS * HEAD_DIM)

        def forward(self, x):
            q, k, v = (to_heads(part, "view_transpose", HEADS) for part in cut(self, x))
            return sdpa(q, k, v)

    calls = [(hidden_states(2, 5),), (hidden_states(4, 7),)][: 1 + dynamic]
    check(FromTheEnd(), *calls, into=tmp_path, found=ONE_SITE, dynamic=dynamic)


@pytest.mark.parametrize(
    "shape", [(1, 3, 1, 5, 5), (2, 1, 1, 5, 5), (2, 1, HEADS, 5, 5), (1, 3, HEADS, 5, 5)]
)
def test_masks_of_windows_where_factors_tell_heads_apart(shape, tmp_path):
    def attend(m, x, mask):
        return sdpa(
            *(to_heads(p(x).flatten(0, 1), "view_transpose", HEADS).unflatten(0, (2, 3))
              for p in (m.q, m.k, m.v)), attn_mask=mask,
        )  # fmt: skip

    model = nn.Module()
    model.q, model.k, model.v = (projection("sequential") for _ in "qkv")
    model.forward = lambda x, mask: attend(model, x, mask)
    inputs = torch.randn(2, 3, 5, HIDDEN), torch.randn(shape)
    check(model, inputs, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


class OneLiftForAllHeads(nn.Module):
    """No factor varies along heads, as where heads were narrowed: only the masks tell them from
    the batch."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Linear(HIDDEN, HEADS * RANK, bias=False) for _ in "qkv")
        self.lifts = nn.ModuleList(nn.Linear(RANK, HEAD_DIM, bias=False) for _ in "qkv")

    def forward(self, x, *masks):
        q, k, v = (
            lift(down(x).unflatten(-1, (HEADS, RANK))).transpose(-2, -3)
            for down, lift in zip(self.down, self.lifts, strict=True)
        )
        scores = q @ k.mT / HEAD_DIM**0.5
        for mask in masks:
            is_bool = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask
        return scores.softmax(-1) @ v


def _hidden_keys(*shape):
    return torch.cat([torch.ones(*shape[:-1], 1), torch.rand(*shape[:-1], shape[-1] - 1)], -1) > 0.5


MASKS_OF_SOME = {
    "none": lambda b, m: (),
    "keys of the batch": lambda b, m: (_hidden_keys(b, 1, 1, m),),
    "all heads alike": lambda b, m: (_hidden_keys(b, 1, m, m),),
    "all batches alike": lambda b, m: (torch.randn(1, HEADS, m, m),),
    "one of each": lambda b, m: (_hidden_keys(b, 1, m, m), torch.randn(HEADS, m, m)),
    "the other way round": lambda b, m: (torch.randn(HEADS, 1, m), torch.randn(b, 1, m, 1)),
    "no two alike": lambda b, m: (torch.randn(b, HEADS, m, m),),
}


@pytest.mark.parametrize("masks", MASKS_OF_SOME.values(), ids=MASKS_OF_SOME)
@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_tell_heads_from_the_batch_where_no_factor_does(masks, dynamic, tmp_path):
    calls = [(hidden_states(b, m), *masks(b, m)) for b, m in ((2, 5), (4, 6))[: 1 + dynamic]]
    check(OneLiftForAllHeads(), *calls, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK,
          dynamic=dynamic)  # fmt: skip
    (after,) = tmp_path.glob("graph_*/after.py")
    varies = {mask.shape[-4:-2] for mask in calls[0][1:]}
    told_apart = bool(varies) and varies != {(2, HEADS)}
    assert f"num_heads = {HEADS if told_apart else 1}," in after.read_text()


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_for_one_of_two_batch_dimensions(dynamic, tmp_path):
    """Repeated along the other one, whose size no graph of all sizes knows."""

    def call(outer, inner, rows):
        return torch.randn(outer, inner, rows, HIDDEN), _hidden_keys(outer, 1, 1, rows, rows)

    calls = [call(2, 4, 5), call(6, 3, 7)][: 1 + dynamic]
    check(
        OneLiftForAllHeads(),
        *calls,
        into=tmp_path,
        found=ONE_SITE,
        ranks=ALL_LOW_RANK,
        dynamic=dynamic,
    )


@pytest.mark.parametrize("change", [_expanded, _strided, _transposed], ids=lambda f: f.__name__[1:])
@pytest.mark.parametrize("name", ["sequential", "per_head_einsum", "groups"])
def test_strides_of_the_input_do_not_matter(name, change, tmp_path):
    model = Attention(name, name, name, attend="by_hand")
    args = tuple(change(x) for x in attention_inputs("by_hand"))
    check(model, args, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


@pytest.mark.parametrize("attend", ["sdpa", "by_hand_additive_bn"])
@pytest.mark.parametrize("batch", [0, 1])
def test_batches_of_none_and_one(batch, attend, tmp_path):
    model = Attention(attend=attend)
    found = ONE_SITE if batch else None
    check(model, attention_inputs(attend, batch=batch), into=tmp_path, found=found)


def test_dynamic_sizes_down_to_one_and_none(tmp_path):
    """Sizes 0 and 1 are compiled for themselves, as torch does with every model."""
    calls = [attention_inputs("sdpa", *sizes) for sizes in ((2, 5, 7), (1, 6, 3), (0, 5, 7))]
    check(Attention(), *calls, into=tmp_path, dynamic=True, graphs=3)


def test_residual_stream_written_in_place(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Linear(HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN)
            self.first, self.second = Attention(), Attention()

        def forward(self, x):
            x = self.embed(x)
            x += self.first(y := self.norm(x), y)
            x += self.second(y := self.norm(x), y)
            return x

    check(Block(), (hidden_states(),), into=tmp_path, found=ONE_SITE * 2, ranks=ALL_LOW_RANK)


def test_gradients():
    model, args = Attention(attend="sdpa_bool_bn"), attention_inputs("sdpa_bool_bn")
    compiled = torch.compile(
        model, backend="flashsvd", options={"compiler": "aot_eager", "attention": "rank_space"}
    )
    grads = []
    with torch.enable_grad():
        for run in (model, compiled):
            model.zero_grad()
            run(*args).square().sum().backward()
            # The key's bias has no effect: where eager finds rounding, we find no gradient at all.
            grads.append([0 * p if p.grad is None else p.grad for p in model.parameters()])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want)


def test_a_python_scale_that_changes(tmp_path):
    """Dynamo makes a changing float symbolic; a graph is for one value of it."""
    model = low_rank(HIDDEN, 3 * HEADS * HEAD_DIM)

    def attention(x, scale):
        q, k, v = FUSED_CUTS["unbind"](model(x))
        return sdpa(q, k, v, scale=scale)

    x = hidden_states()
    compiled = torch.compile(attention, backend="flashsvd", options={"compiler": "eager"})
    for scale in (0.2, 0.3, 0.4):
        torch.testing.assert_close(compiled(x, scale), attention(x, scale))


# ---- autocast -----------------------------------------------------------------------------------


@pytest.mark.parametrize("attend", ["sdpa", "by_hand", "upcast", "einsum_where", "bmm"])
@pytest.mark.parametrize("where", ["inside", "around"])
def test_autocast(where, attend, tmp_path):
    inner = Attention(attend=attend)
    cast = torch.autocast("cpu", dtype=torch.bfloat16)

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.inner(*args)

    args = attention_inputs(attend)
    if where == "inside":
        check(Inside(), args, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)
    else:
        with cast:
            check(inner, args, into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)


def test_autocast_with_a_three_operand_einsum(tmp_path):
    model = Attention(*["three_operands"] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(model, attention_inputs("sdpa"), into=tmp_path, found=ONE_SITE, ranks=ALL_LOW_RANK)
