"""Queries that RoPE turns, however it is spelled, are read as the latent of what is turned.

Keys are turned as well and read at full width; what is no rotation of a lift stays at full width,
too, and right.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashsvd_compile as fsc
from tests.spelled import (
    HEADS,
    HIDDEN,
    OPTIONS,
    QUERIES,
    RANK,
    assert_same_gradients,
    check,
    hidden_states,
    low_rank,
    sdpa,
)

pytestmark = pytest.mark.usefixtures("fresh_inference")

HEAD_DIM = 16
HALF = HEAD_DIM // 2
WIDTH = HEADS * HEAD_DIM
ONE_SITE = ["attention rank_space"]
TURNED = {"q": str(RANK), "k": "dense", "v": str(RANK)}
WIDE = {"q": "dense", "k": "dense", "v": str(RANK)}


def angles(x, rotary_dim=HEAD_DIM, *, axis=-2):
    """[M, rotary_dim / 2] of the positions along ``axis``."""
    rates = torch.arange(rotary_dim // 2, dtype=x.dtype, device=x.device).exp2().reciprocal()
    return torch.arange(x.size(axis), dtype=x.dtype, device=x.device)[:, None] * rates


def swapped_halves(x):
    half = x.size(-1) // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def swapped_neighbours(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def llama(x):
    both = torch.cat((angles(x), angles(x)), -1)
    return x * both.cos() + swapped_halves(x) * both.sin()


def of_the_batch(x):
    """Positions of each entry of the batch: tables [B, 1, M, D]."""
    begin = torch.arange(x.size(0), dtype=x.dtype)[:, None, None]
    both = (torch.cat((angles(x), angles(x)), -1) + begin)[:, None]
    return x * both.cos() + swapped_halves(x) * both.sin()


def partial(x):
    """GPT-NeoX, Phi: a part of the features turns, the others pass."""
    turning, rest = x[..., :HALF], x[..., HALF:]
    both = angles(x, HALF).repeat(1, 2)
    turned = turning * both.cos() + swapped_halves(turning) * both.sin()
    return torch.cat((turned, rest), -1)


def nothing_passes(x):
    """Phi-3: a part that turns is all, and what passes is empty."""
    turning, rest = x[..., :HEAD_DIM], x[..., HEAD_DIM:]
    return torch.cat((llama(turning), rest), -1)


def halves_apart(x):
    """GPT-OSS: each half on its own, by tables of an angle for each pair."""
    cos, sin = angles(x).cos(), angles(x).sin()
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def neighbours(x):
    """Cohere: in float32, and back."""
    both = angles(x).float().repeat_interleave(2, -1)
    y = x.float() if x.dtype == torch.float32 else x
    return (y * both.cos() + swapped_neighbours(y) * both.sin()).to(x.dtype)


def gptj(x):
    """Heads behind the positions, and neighbours of a part of the features."""
    x = x.transpose(1, 2)
    turning, rest = x[..., :HALF], x[..., HALF:]
    cos, sin = (t.repeat_interleave(2, 1)[:, None] for t in
                (angles(x, HALF, axis=1).cos(), angles(x, HALF, axis=1).sin()))  # fmt: skip
    turned = turning * cos + swapped_neighbours(turning) * sin
    return torch.cat([turned, rest], -1).transpose(1, 2)


def apart_to_halves(x):
    """DeepSeek-V3: neighbours become halves first."""
    x = x.unflatten(-1, (HALF, 2)).transpose(-1, -2).flatten(-2)
    return llama(x)


def complex_numbers(x):
    """Llama-4, DeepSeek-V2."""
    turn = torch.polar(torch.ones_like(angles(x)), angles(x))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn).flatten(-2)


def backwards(x):
    both = torch.cat((angles(x), angles(x)), -1)
    return x * both.cos() - swapped_halves(x) * both.sin()


def twice_as_large(x):
    both = torch.cat((angles(x), angles(x)), -1)
    return (both.cos() * x + both.sin() * swapped_halves(x)) * 2 / 3


def scaled_before(x):
    return llama(x * 0.5)


def other_angles(x):
    """Nothing says that both of a pair turn by one angle."""
    both = torch.cat((angles(x), angles(x) * 3), -1)
    return x * both.cos() + swapped_halves(x) * both.sin()


def at_one_position(x):
    both = torch.cat((angles(x), angles(x)), -1)[3:4]
    return x * both.cos() + swapped_halves(x) * both.sin()


SPELLINGS = (
    llama, of_the_batch, partial, nothing_passes, halves_apart, neighbours, gptj, apart_to_halves,
    complex_numbers, backwards, twice_as_large, scaled_before, other_angles, at_one_position,
)  # fmt: skip


class Turning(nn.Module):
    """Attention over low-rank q, k and v, of which ``turn`` makes q and k."""

    def __init__(self, turn=llama, attend=sdpa, kv_heads=HEADS, bias=True):
        super().__init__()
        self.q = low_rank(HIDDEN, WIDTH, bias=bias)
        self.k, self.v = (low_rank(HIDDEN, kv_heads * HEAD_DIM, bias=bias) for _ in "kv")
        self.register_buffer("table", torch.randn(HEADS, 1, HEAD_DIM))
        self.turn, self.attend = turn, attend

    def forward(self, x):
        q, k, v = (
            p(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        if k.size(1) != HEADS:
            k, v = (y.repeat_interleave(HEADS // y.size(1), 1) for y in (k, v))
        return self.attend(self.turn(q), llama(k), v)


@pytest.mark.parametrize("turn", SPELLINGS, ids=lambda turn: turn.__name__)
def test_spellings(turn, tmp_path):
    check(Turning(turn), (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=TURNED)


@pytest.mark.parametrize("turn", [llama, partial, complex_numbers], ids=lambda turn: turn.__name__)
def test_dynamic_sizes(turn, tmp_path):
    calls = [(hidden_states(batch, rows),) for batch, rows in ((2, 5), (3, 6), (4, 11))]
    check(Turning(turn), *calls, into=tmp_path, found=ONE_SITE, ranks=TURNED, dynamic=True)


def test_one_position(tmp_path):
    check(Turning(), (hidden_states(rows=1),), into=tmp_path, found=ONE_SITE, ranks=TURNED)


@pytest.mark.parametrize("kv_heads", [1, HEADS])
@pytest.mark.parametrize("bias", [False, True])
def test_groups_and_biases(kv_heads, bias, tmp_path):
    model = Turning(kv_heads=kv_heads, bias=bias)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=TURNED)


def test_by_hand_with_a_mask(tmp_path):
    def attend(q, k, v):
        hidden = torch.ones(QUERIES, QUERIES, dtype=torch.bool).triu(1)
        scores = (q @ k.mT * 0.3).masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v

    check(Turning(attend=attend), (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=TURNED)


def test_tables_of_another_dtype(tmp_path):
    """In 16 bits, by tables in 32."""

    def turn(x):
        both = torch.cat((angles(x).float(), angles(x).float()), -1)
        wide = x.to(both.dtype)
        return (wide * both.cos() + swapped_halves(wide) * both.sin()).to(x.dtype)

    model = Turning(turn).bfloat16()
    x = hidden_states().bfloat16()
    check(model, (x,), into=tmp_path, found=ONE_SITE, ranks=TURNED)


def test_values_that_are_dense(tmp_path):
    """As a cache has them: the queries alone are low-rank."""
    model = Turning()
    model.v = nn.Sequential(model.v, nn.Tanh())
    ranks = {"q": str(RANK), "k": "dense", "v": "dense"}
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ranks)


def test_one_lift_for_all(tmp_path):
    """k gets what is left of it."""

    class Fused(Turning):
        def __init__(self):
            super().__init__()
            self.qkv = low_rank(HIDDEN, 3 * WIDTH)

        def forward(self, x):
            q, k, v = (
                part.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
                for part in self.qkv(x).chunk(3, -1)
            )
            return self.attend(llama(q), llama(k), v)

    check(Fused(), (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=TURNED)


def test_gradients(tmp_path):
    model, x = Turning(partial), hidden_states()
    with torch.enable_grad():
        compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
        assert_same_gradients(model, compiled, x)
        (site,) = (s for s in fsc.explain(model, x, options=OPTIONS).sites if s.kind == "attention")
    assert site.plan.site.query.rotation is not None


# ---- normalised before --------------------------------------------------------------------------


def rms_norm(x, weight=None, eps=1e-2):
    """As Llama's, which Qwen-3 has for each head."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return wide.to(x.dtype) if weight is None else weight * wide.to(x.dtype)


def qwen3(self, x):
    return llama(rms_norm(x, self.weight))


def without_a_weight(self, x):
    return partial(rms_norm(x))


def gemma3(self, x):
    """A weight that is one more than its parameter."""
    return llama(rms_norm(x) * (1.0 + self.weight))


def one_operator(self, x):
    return neighbours(F.rms_norm(x, (HEAD_DIM,), self.weight, 1e-2))


def squared_by_hand(self, x):
    return llama(x * ((x * x).mean(-1, keepdim=True) + 1e-2) ** -0.5 * self.weight)


def scaled_behind(self, x):
    return llama(rms_norm(x, self.weight)) * 0.7


NORMS = (qwen3, without_a_weight, gemma3, one_operator, squared_by_hand, scaled_behind)


@pytest.mark.parametrize("turn", NORMS, ids=lambda turn: turn.__name__)
def test_normalised_queries(turn, tmp_path):
    model = Turning()
    model.weight = nn.Parameter(torch.randn(HEAD_DIM))
    model.turn = lambda q: turn(model, q)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=TURNED)


def layer_norm(self, x):
    return llama(F.layer_norm(x, (HEAD_DIM,), self.weight))


def of_all_heads(self, x):
    flat = rms_norm(x.transpose(1, 2).flatten(2))
    return llama(flat.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2))


def over_positions(self, x):
    return llama(x * torch.rsqrt(x.pow(2).mean(-2, keepdim=True) + 1e-2))


def of_a_part(self, x):
    return llama(torch.cat((rms_norm(x[..., :HALF]), rms_norm(x[..., HALF:])), -1))


def behind_the_turn(self, x):
    return rms_norm(llama(x), self.weight)


def without_a_turn(self, x):
    return rms_norm(x, self.weight)


def twice(self, x):
    return llama(rms_norm(rms_norm(x)))


def weighed_twice(self, x):
    return llama(rms_norm(x, self.weight) * self.weight)


def weight_for_each_head(self, x):
    return llama(rms_norm(x) * self.table)


def scaled_ahead(self, x):
    return llama(rms_norm(x * 0.5, self.weight))


def of_another_scale(self, x):
    return llama(x * torch.rsqrt((2 * x).pow(2).mean(-1, keepdim=True) + 1e-2))


def cubed(self, x):
    return llama(x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-2))


def shifted_twice(self, x):
    return llama(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-2 + 1e-2))


def of_the_keys(self, x):
    return llama(x * torch.rsqrt(x.flip(1).pow(2).mean(-1, keepdim=True) + 1e-2))


OTHER_NORMS = (
    layer_norm, of_all_heads, over_positions, of_a_part, behind_the_turn, without_a_turn, twice,
    weighed_twice, weight_for_each_head, scaled_ahead, of_another_scale, cubed, shifted_twice,
    of_the_keys,
)  # fmt: skip


@pytest.mark.parametrize("turn", OTHER_NORMS, ids=lambda turn: turn.__name__)
def test_other_norms(turn, tmp_path):
    model = Turning()
    model.weight = nn.Parameter(torch.randn(HEAD_DIM))
    model.turn = lambda q: turn(model, q)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=WIDE)


def test_gradients_of_normalised_queries():
    model, x = Turning(), hidden_states()
    model.weight = nn.Parameter(torch.randn(HEAD_DIM))
    model.turn = lambda q: qwen3(model, q)
    with torch.enable_grad():
        compiled = torch.compile(model, backend="flashsvd", options=OPTIONS)
        assert_same_gradients(model, compiled, x)


# ---- what stays at full width -------------------------------------------------------------------


def by_head(self, x):
    return x * self.table + swapped_halves(x) * self.table.flip(0)


def wrong_partner(self, x):
    both = torch.cat((angles(x), angles(x)), -1)
    return x * both.cos() + x.roll(3, -1) * both.sin()


def no_pairs(self, x):
    """Each feature beside the next: partners that are none of each other."""
    both = torch.cat((angles(x), angles(x)), -1)
    return x * both.cos() + torch.cat((-x[..., 1:], x[..., :1]), -1) * both.sin()


def one_sign(self, x):
    both = torch.cat((angles(x), angles(x)), -1)
    half = torch.cat((x[..., HALF:], x[..., :HALF]), -1)
    return x * both.cos() + half * both.sin()


def scaled_apart(self, x):
    both = torch.cat((angles(x), angles(x)), -1)
    return x * both.cos() + swapped_halves(x) * 0.5 * both.sin()


def passing_scaled(self, x):
    turning, rest = x[..., :HALF], x[..., HALF:] * 2
    both = angles(x, HALF).repeat(1, 2)
    return torch.cat((turning * both.cos() + swapped_halves(turning) * both.sin(), rest), -1)


def last_ones_turn(self, x):
    rest, turning = x[..., :HALF], x[..., HALF:]
    both = angles(x, HALF).repeat(1, 2)
    return torch.cat((rest, turning * both.cos() + swapped_halves(turning) * both.sin()), -1)


def turned_twice(self, x):
    return llama(llama(x))


def three_terms(self, x):
    return llama(x) + x


def squared(self, x):
    return llama(x) * x


def unlike_tables(self, x):
    """An angle for each pair of cosines, and for each feature of sines."""
    cos, sin = angles(x).cos(), torch.cat((angles(x), angles(x)), -1).sin()
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos, second * cos), -1) + swapped_halves(x) * sin


def in_disorder(self, x):
    both = torch.cat((angles(x), angles(x)), -1)
    order = torch.cat((both[:, 1:], both[:, :1]), -1)
    first, second = x.chunk(2, -1)
    cos = order.cos()
    left = torch.cat((first * cos[:, HALF:], second * cos[:, :HALF]), -1)
    return left + swapped_halves(x) * both.sin()


def written_table(self, x):
    both = torch.cat((angles(x), angles(x)), -1)
    cos = both.cos()
    turned = x * cos + swapped_halves(x) * both.sin()
    cos.zero_()
    return turned


def active_dropout(self, x):
    return llama(F.dropout(x, 0.0, True)) * torch.sigmoid(x)


def biased_behind_a_cut(self, x):
    first, second = x.chunk(2, -1)
    return llama(torch.cat((first + self.table[:, :, :HALF], second), -1))


def by_scalars(self, x):
    return x * self.table.sum() + swapped_halves(x) * self.table.mean()


def cooled(self, x):
    return llama(x * self.table.sum())


def conjugate(self, x):
    turn = torch.polar(torch.ones_like(angles(x)), angles(x))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turn.conj()).flatten(-2)


def last_positions(self, x):
    """Tables of more positions than queries are left of."""
    return llama(x)[:, :, -2:]


def some_heads(self, x):
    return torch.cat((llama(x[:, 1:]), x[:, :1]), 1)


def a_pair_twice(self, x):
    both = torch.cat((angles(x), angles(x)), -1)
    doubled = torch.cat((-x[..., HALF:], x[..., HALF:]), -1)
    return x * both.cos() + doubled * both.sin()


FULL_WIDTH = (
    by_head, wrong_partner, no_pairs, one_sign, scaled_apart, passing_scaled, last_ones_turn,
    turned_twice, three_terms, squared, unlike_tables, in_disorder, written_table, active_dropout,
    biased_behind_a_cut, a_pair_twice, conjugate, last_positions, some_heads,
    by_scalars, cooled,
)  # fmt: skip


@pytest.mark.parametrize("turn", FULL_WIDTH, ids=lambda turn: turn.__name__)
def test_near_misses(turn, tmp_path):
    model = Turning()
    model.turn = lambda q: turn(model, q)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=WIDE)


def _returned(q, k, v):
    return sdpa(q, k, v), q


def _read_again(q, k, v):
    return sdpa(q, k, v) + q.mean()


@pytest.mark.parametrize("attend", [_returned, _read_again])
def test_turned_queries_that_others_read(attend, tmp_path):
    model = Turning(attend=attend)
    check(model, (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=WIDE)


def test_a_lift_that_others_read(tmp_path):
    class Returned(Turning):
        def forward(self, x):
            y = self.q(x)
            q, k, v = (
                z.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
                for z in (y, self.k(x), self.v(x))
            )
            return sdpa(llama(q), llama(k), v), y

    check(Returned(), (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=WIDE)


def test_keys_as_latents_come_first(tmp_path):
    """Keys that do not turn stay latents, and turned queries are at full width for them."""

    class QueriesAlone(Turning):
        def forward(self, x):
            q, k, v = (
                p(x).unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
                for p in (self.q, self.k, self.v)
            )
            return sdpa(llama(q), k, v)

    ranks = {"q": "dense", "k": str(RANK), "v": str(RANK)}
    check(QueriesAlone(), (hidden_states(),), into=tmp_path, found=ONE_SITE, ranks=ranks)


# ---- plans --------------------------------------------------------------------------------------


def attention_of(model, x, **given):
    (site,) = (s for s in fsc.explain(model, x, **given).sites if s.kind == "attention")
    return site


def test_a_cpu_leaves_them_at_full_width(tmp_path):
    model, x = Turning(), hidden_states(rows=64)
    site = attention_of(model, x)
    assert site.lowering == "unfused" or site.plan.site.query.factor is None
    model.v = nn.Sequential(model.v, nn.Tanh())
    site = attention_of(model, x)
    assert (site.lowering, site.reason.code.value) == ("unfused", "not_profitable")
    assert "turned queries on a CPU" in str(site.reason)


def test_a_gpu_takes_them_and_holds_less():
    """Of what attention had at full width keys are left."""
    model = Turning().to("meta", torch.bfloat16)
    x = torch.randn(2, 2048, HIDDEN, dtype=torch.bfloat16, device="meta")
    told = {
        how: fsc.explain(model, x, device="h100", options={"attention": how})
        for how in ("auto", "unfused")
    }
    (site,) = (s for s in told["auto"].sites if s.kind == "attention")
    assert site.lowering == "rank_space"
    assert site.plan.site.query.rotation is not None
    assert 3 * site.plan.transient_bytes == site.plan.unfused_bytes
    held = [told[how].peaks[0].transient_bytes for how in ("auto", "unfused")]
    assert held[0] < held[1]


def test_in_blocks_of_the_batch(tmp_path):
    model, x = Turning(of_the_batch), hidden_states(batch=4, rows=300)
    whole = fsc.explain(model, x, options={"attention": "rank_space"}).peaks[0].transient_bytes
    options = {**OPTIONS, "memory_budget": whole - 1}
    site = attention_of(model, x, options=options)
    assert site.plan.blocks is not None
    check(model, (x,), into=tmp_path, found=ONE_SITE, options=options)
