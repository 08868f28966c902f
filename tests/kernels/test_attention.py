"""Rank-space attention, interpreted kernel and library route, against the lifted expression."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from flashsvd_compile.kernels import attention
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_extents import AttentionExtents, widened
from flashsvd_compile.kernels.attention_library import rank_space_attention_library
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention
from flashsvd_compile.kernels.attention_sram import sram_bytes_of
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.primitives import launch
from flashsvd_compile.kernels.tiles import TileConfig
from torch.nn.attention import SDPBackend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=16, block_n=16, num_warps=4, num_stages=2)
DESCRIBED = replace(TILE, is_described=True)
IMPLEMENTATIONS = [
    pytest.param(partial(rank_space_attention, tile=TILE), id="kernel"),
    pytest.param(partial(rank_space_attention, tile=DESCRIBED), id="described"),
    pytest.param(rank_space_attention_library, id="library"),
]
HARD, SOFT = float("-inf"), torch.finfo(torch.float32).min


def operands(
    *,
    batch=2,
    heads=2,
    queries=19,
    keys=37,
    head_dim=32,
    head_dim_v=32,
    ranks=(16, 16, 16),
    lifted="qkv",
    latent_heads=(2, 2, 2),
    factor_heads=2,
    bias=True,
    mask=None,
    is_causal=False,
    dtype=torch.float32,
    seed=0,
):
    """(q, k, v), keywords: random operands of order 1, latents as transposed [B, M, H, R] views."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    wide = (head_dim, head_dim, head_dim_v)
    latents, factors = [], {}
    for name, rank, width, n, rows in zip(
        "qkv", ranks, wide, latent_heads, (queries, keys, keys), strict=True
    ):
        columns = rank if name in lifted else width
        latents.append(random(batch, rows, n, columns).transpose(1, 2))
        if name in lifted:
            factors[f"{name}_factor"] = random(factor_heads, width, rank) / rank**0.5
    biases = {}
    if bias:
        biases = {"q_bias": random(heads, head_dim), "v_bias": random(heads, head_dim_v)}
    if mask is not None:
        mask = mask(batch, heads, queries, keys, generator).to(DEVICE)
    common = {
        "num_heads": heads,
        "mask": mask,
        "is_causal": is_causal,
        "scale": head_dim**-0.5,
    }
    return tuple(latents), factors | biases | common


def padding(batch, heads, queries, keys, generator):
    """The first batch sees no key at all."""
    return (torch.arange(keys) < torch.arange(batch)[:, None] * keys // batch)[:, None, None]


def any_bool(batch, heads, queries, keys, generator):
    mask = torch.rand(batch, heads, queries, keys, generator=generator) > 0.4
    mask[0, -1, queries // 2] = False
    return mask


def per_query(batch, heads, queries, keys, generator):
    return torch.arange(queries)[None, None, :, None] % 3 > 0


def transposed_bool(batch, heads, queries, keys, generator):
    return torch.rand(batch, 1, keys, queries, generator=generator).transpose(2, 3) > 0.3


def added(hidden, batch, heads, queries, keys, generator):
    """A bias a score, a third of the keys hidden, and one query with every key hidden."""
    mask = torch.randn(1, heads, queries, keys, generator=generator)
    mask = mask.masked_fill(torch.rand(mask.shape, generator=generator) < 0.3, hidden)
    mask[0, 0, queries // 2] = hidden
    return mask


def hidden_at(*spans):
    """Keys hidden from all queries, as fractions of their number: [start, stop) of each span."""

    def mask(batch, heads, queries, keys, generator):
        seen = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
        for start, stop in spans:
            seen[1:, ..., round(start * keys) : round(stop * keys)] = False
        return seen

    return mask


CASES = {
    "plain": {},
    "rank_1": {"ranks": (1, 1, 1)},
    "ranks_8_15_37": {"ranks": (8, 15, 37)},
    "rank_40_runs_as_32_and_16": {"ranks": (40, 40, 40), "head_dim": 40, "head_dim_v": 80},
    "ranks_above_head_dim": {"ranks": (96, 129, 40)},
    "dense_q": {"lifted": "kv"},
    "dense_k": {"lifted": "qv", "head_dim": 48},
    "dense_v": {"lifted": "qk", "head_dim_v": 40},
    "only_v_lifted": {"lifted": "v"},
    "all_dense": {"lifted": ""},
    "no_bias": {"bias": False},
    "shared_latents": {"heads": 4, "latent_heads": (1, 1, 1), "factor_heads": 4},
    "grouped_latents": {"heads": 4, "latent_heads": (4, 2, 2)},
    "k_and_v_grouped_apart": {"heads": 6, "latent_heads": (6, 2, 3), "factor_heads": 1},
    "one_query_one_key": {"queries": 1, "keys": 1},
    "no_keys": {"keys": 0},
    "no_keys_masked": {"keys": 0, "mask": padding},
    "no_queries": {"queries": 0},
    "no_batch": {"batch": 0},
    "whole_tiles": {"queries": 32, "keys": 32},
    "causal": {"is_causal": True},
    "causal_more_queries": {"is_causal": True, "queries": 50, "keys": 20},
    "causal_whole_tiles": {"is_causal": True, "queries": 32, "keys": 32},
    "padding": {"mask": padding},
    "padding_on_the_left": {"mask": hidden_at((0, 0.6))},
    "padding_on_the_left_causal": {"mask": hidden_at((0, 0.6)), "is_causal": True},
    "padding_of_whole_tiles": {"mask": hidden_at((0, 0.25), (0.5, 1)), "keys": 64},
    "padding_whole_tiles_causal": {"mask": hidden_at((0.5, 1)), "keys": 64, "is_causal": True},
    "holes": {"mask": hidden_at((0.1, 0.15), (0.4, 0.7)), "keys": 80},
    "more_keys_than_scanned_at_once": {
        "mask": hidden_at((0, 0.6), (0.9, 1)),
        "keys": 1500,
        "batch": 1,
        "queries": 5,
    },
    "any_bool": {"mask": any_bool},
    "any_bool_causal": {"mask": any_bool, "is_causal": True},
    "per_query": {"mask": per_query},
    "transposed_bool": {"mask": transposed_bool},
    "added_hard": {"mask": partial(added, HARD)},
    "added_soft": {"mask": partial(added, SOFT)},
    "added_soft_causal": {"mask": partial(added, SOFT), "is_causal": True},
    "bfloat16": {"dtype": torch.bfloat16, "ranks": (40, 24, 16), "mask": padding},
    "float16": {"dtype": torch.float16, "mask": any_bool, "is_causal": True},
    "bfloat16_dense_qk": {"dtype": torch.bfloat16, "lifted": "v"},
}


def to_float64(latents, keywords):
    def convert(x):
        return x.double() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x

    return [convert(x) for x in latents], {name: convert(x) for name, x in keywords.items()}


def assert_as_exact_as_eager(output, latents, keywords):
    """At most 1.1 times the lifted expression's own error against float64, plus 4 ulp of 1."""
    wide_latents, wide_keywords = to_float64(latents, keywords)
    exact = lifted_attention(AttentionOperands(*wide_latents, **wide_keywords))
    assert output.shape == exact.shape
    if exact.numel() == 0:
        return
    eager_error = (lifted_attention(AttentionOperands(*latents, **keywords)) - exact).abs().max()
    error = (output - exact).abs().max()
    ulp = torch.finfo(output.dtype).eps * max(1.0, exact.abs().max().item())
    assert error <= 1.1 * eager_error + 4 * ulp


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_matches_lifted(implementation, case):
    latents, keywords = operands(**case)
    assert_as_exact_as_eager(
        implementation(AttentionOperands(*latents, **keywords)), latents, keywords
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    "mask", [padding, any_bool, partial(added, HARD)], ids=["padding", "any", "added"]
)
def test_a_query_without_keys_gives_exactly_zero(implementation, mask, is_causal):
    latents, keywords = operands(mask=mask, is_causal=is_causal)
    shape = (2, 2, 19, 37)
    seen = keywords["mask"]
    seen = seen if seen.dtype == torch.bool else seen > HARD
    seen = seen.expand(shape)
    if is_causal:
        seen = seen & torch.ones(19, 37, dtype=torch.bool, device=DEVICE).tril()
    blind = ~seen.any(-1)
    assert blind.any()
    assert not blind.all()
    output = implementation(AttentionOperands(*latents, **keywords))
    assert (output[blind] == 0).all()
    assert (output[~blind] != 0).any(-1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_soft_mask_over_a_whole_row_weighs_keys_equally(implementation):
    latents, keywords = operands(mask=partial(added, SOFT), bias=False)
    output = implementation(AttentionOperands(*latents, **keywords))
    values = torch.einsum("bnr,dr->bnd", latents[2][:, 0], keywords["v_factor"][0])
    torch.testing.assert_close(output[:, 0, 19 // 2], values.mean(1))


@pytest.mark.parametrize(
    "implementation", [*IMPLEMENTATIONS, pytest.param(lifted_attention, id="lifted")]
)
def test_output_memory_is_by_position(implementation):
    latents, keywords = operands()
    output = implementation(AttentionOperands(*latents, **keywords))
    assert output.transpose(1, 2).is_contiguous()


def test_any_strides():
    """Stride 0 over the batch, a non-unit last stride, factors transposed, a sliced mask."""
    latents, keywords = operands(mask=any_bool)
    q, k, v = latents
    k = k[:1].expand(2, -1, -1, -1)
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    keywords["q_factor"] = keywords["q_factor"].transpose(1, 2).contiguous().transpose(1, 2)
    keywords["v_bias"] = keywords["v_bias"][:, :1].expand(-1, 32)
    keywords["mask"] = keywords["mask"].repeat(1, 1, 1, 2)[..., ::2]
    for implementation in (partial(rank_space_attention, tile=TILE), rank_space_attention_library):
        assert_as_exact_as_eager(
            implementation(AttentionOperands(q, k, v, **keywords)), (q, k, v), keywords
        )


@pytest.mark.parametrize(
    ("case", "is_described"),
    [
        ({}, True),
        ({"heads": 4, "latent_heads": (4, 2, 1), "ranks": (40, 32, 32)}, True),
        ({"lifted": "v", "head_dim": 16}, True),
        ({"ranks": (16, 24, 16)}, False),
        ({"ranks": (16, 16, 32)}, False),
        ({"lifted": "v", "head_dim": 40}, False),
    ],
)
def test_only_ranks_that_fill_their_tile_are_described(case, is_described, monkeypatch):
    latents, keywords = operands(**case)
    assert reads_by_descriptors(latents, keywords, monkeypatch) == is_described


@pytest.mark.parametrize(
    "respell",
    [
        lambda k: k.transpose(2, 3).contiguous().transpose(2, 3),
        lambda k: F.pad(k, (0, 1))[..., :-1],
        lambda k: F.pad(k, (1, 3))[..., 1:-3],
        lambda k: k[:1].expand(k.shape),
    ],
    ids=["rank_outermost", "odd_rows", "begins_within_16_bytes", "repeated"],
)
def test_latents_that_no_descriptor_takes_are_read_by_address(respell, monkeypatch):
    (q, k, v), keywords = operands()
    latents = (q, respell(k), v)
    # What is copied before the launch, as its rank is not innermost, may be described after all.
    copied = latents[1].stride(-1) != 1
    assert reads_by_descriptors(latents, keywords, monkeypatch) == copied


def reads_by_descriptors(latents, keywords, monkeypatch):
    """Whether the kernel does; its result is checked as well."""
    seen = []

    def spy(*args, DESCRIBED, **constants):
        seen.append(DESCRIBED)
        launch(*args, DESCRIBED=DESCRIBED, **constants)

    monkeypatch.setattr(attention, "launch", spy)
    output = rank_space_attention(AttentionOperands(*latents, **keywords), tile=DESCRIBED)
    assert_as_exact_as_eager(output, latents, keywords)
    return seen[0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_kernel_writes_every_element_and_nothing_beside(is_causal):
    latents, keywords = operands(ranks=(16, 40, 40), head_dim_v=40, is_causal=is_causal)
    memory = torch.full((2, 19 + 2, 3, 40 + 8), float("nan"), device=DEVICE)
    out = memory[:, 1:-1, :2, :40].transpose(1, 2)
    returned = rank_space_attention(AttentionOperands(*latents, **keywords), tile=TILE, out=out)
    assert returned is out
    assert_as_exact_as_eager(out, latents, keywords)
    assert memory.isnan().sum() == memory.numel() - out.numel()


def test_padding_of_tiles_never_reads_beyond_the_keys():
    """NaN right behind the last key and the last rank must not reach the output."""
    latents, keywords = operands(ranks=(15, 15, 15), keys=37)
    padded = []
    for latent in latents:
        memory = torch.full((2, 2, 48, 32), float("nan"), device=DEVICE)
        view = memory[:, :, : latent.shape[2], : latent.shape[3]]
        view.copy_(latent)
        padded.append(view)
    output = rank_space_attention(AttentionOperands(*padded, **keywords), tile=TILE)
    assert_as_exact_as_eager(output, latents, keywords)


@pytest.mark.parametrize(
    ("tile", "is_causal"),
    [((16, 32), False), ((32, 16), True), ((64, 16), True), ((16, 64), True), ((64, 64), False)],
)
def test_every_tile_shape_agrees(tile, is_causal):
    latents, keywords = operands(queries=70, keys=70, batch=1, is_causal=is_causal, mask=any_bool)
    config = TileConfig(*tile, num_warps=4, num_stages=2)
    assert_as_exact_as_eager(
        rank_space_attention(AttentionOperands(*latents, **keywords), tile=config),
        latents,
        keywords,
    )


def hole(batch, heads, queries, keys, generator):
    return ~((torch.arange(keys) > 0) & (torch.arange(keys) < 5))[None, None, None]


FAR_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize(
    ("factor", "mask", "dtype"),
    [  # each dtype meets each mask and each factor
        (factor, mask, FAR_DTYPES[(row + column) % 3])
        for row, factor in enumerate((-60, -8, 8, 60))
        for column, mask in enumerate((None, hole, any_bool, partial(added, SOFT)))
    ],
)
def test_scores_far_from_those_of_the_first_tile(dtype, mask, factor):
    """The first tile's maximum serves all keys unless a sum tells that it is too far from theirs:
    when keys that follow score higher by far, or those of the first tile did and are hidden.
    """
    (q, k, v), keywords = operands(ranks=(16, 16, 16), keys=48, mask=mask, dtype=dtype)
    k[:, :, slice(1, 5) if mask is hole else slice(30, 40)] *= factor
    output = rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)
    wide_latents, wide_keywords = to_float64((q, k, v), keywords)
    exact = lifted_attention(AttentionOperands(*wide_latents, **wide_keywords))
    eager_error = (lifted_attention(AttentionOperands(q, k, v, **keywords)) - exact).norm()
    # Scores of hundreds carry their rounding into the exponent: both err by much, and not alike.
    ulp = torch.finfo(dtype).eps * exact.norm()
    assert (output - exact).norm() <= 4 * (eager_error + ulp)


@pytest.mark.parametrize(("position", "seen"), [(40, slice(0, 64)), (1, slice(2, 64))])
def test_float16_neither_overflows_nor_loses_digits(position, seen):
    """One key scores 14 above the others: e¹⁴ is beyond float16, and e⁻¹⁴ below its full digits.
    It follows the first tile in one case, and in the other it is of that tile, and hidden.
    """
    q = torch.zeros(1, 1, 4, 16, dtype=torch.float16, device=DEVICE)
    k = torch.zeros(1, 1, 64, 16, dtype=torch.float16, device=DEVICE)
    q[..., 0] = 1
    k[..., position, 0] = 14
    v = torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(0)).to(q)
    mask = torch.ones(1, 1, 1, 64, dtype=torch.bool, device=DEVICE)
    mask[..., : seen.start] = False
    mask[..., 0] = True
    operands_ = {"num_heads": 1, "scale": 1.0, "mask": mask}
    exact = lifted_attention(AttentionOperands(q.double(), k.double(), v.double(), **operands_))
    output = rank_space_attention(AttentionOperands(q, k, v, **operands_), tile=TILE)
    assert (output - exact).abs().max() <= 4 * torch.finfo(torch.float16).eps


def test_hidden_tiles_are_not_read():
    (q, k, v), keywords = operands(keys=96)
    keys = torch.arange(96, device=DEVICE)
    keywords["mask"] = ((keys >= 32) & (keys < 64))[None, None, None]
    expected = rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)
    for latent in (k, v):
        latent[:, :, :32] = float("nan")
        latent[:, :, 64:] = float("nan")
    assert torch.equal(
        rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE), expected
    )


def test_a_query_that_is_not_a_number_and_sees_nothing_gives_zero():
    (q, k, v), keywords = operands(mask=padding)
    q = q.clone()
    q[0, 0, 3] = float("nan")
    assert rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)[0].eq(0).all()


def test_a_query_that_is_not_a_number_spoils_its_own_row_only():
    (q, k, v), keywords = operands()
    clean = rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)
    q = q.clone()
    q[0, 0, 3] = float("nan")
    spoilt = rank_space_attention(AttentionOperands(q, k, v, **keywords), tile=TILE)
    assert spoilt[0, 0, 3].isnan().all()
    spoilt[0, 0, 3] = clean[0, 0, 3]
    torch.testing.assert_close(spoilt, clean, rtol=0, atol=1e-6)


def test_a_batch_beyond_one_axis_of_the_grid(monkeypatch):
    monkeypatch.setattr("flashsvd_compile.kernels.attention.MAX_GRID_EXTENT", 3)
    for batch in (3, 4, 7):
        latents, keywords = operands(batch=batch, mask=padding)
        output = rank_space_attention(AttentionOperands(*latents, **keywords), tile=TILE)
        assert_as_exact_as_eager(output, latents, keywords)


def test_default_tile_runs():
    latents, keywords = operands(batch=1, ranks=(40, 24, 40))
    assert_as_exact_as_eager(
        rank_space_attention(AttentionOperands(*latents, **keywords)), latents, keywords
    )


@pytest.mark.parametrize("change", ["latent", "factor", "mask"])
def test_library_takes_flash_attention_and_never_the_scores(change, monkeypatch):
    """What reaches SDPA is what torch runs as flash on CPU, K and V still in rank space."""
    latents, keywords = operands(
        heads=4,
        ranks=(16, 16, 40) if change == "factor" else (16, 24, 16),
        latent_heads=(4, 2, 2) if change == "latent" else (1, 1, 1),
        mask=any_bool if change == "mask" else None,
    )
    calls = []
    attend = F.scaled_dot_product_attention

    def record(q, k, v, **options):
        calls.append((k, v))
        choice = torch._fused_sdp_choice(
            q, k, v, options["attn_mask"], 0.0, options["is_causal"],
            enable_gqa=options["enable_gqa"],
        )  # fmt: skip
        assert DEVICE != "cpu" or choice == SDPBackend.FLASH_ATTENTION.value
        return attend(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    rank_space_attention_library(AttentionOperands(*latents, **keywords))
    ((k, v),) = calls
    assert k.shape[1] == latents[1].shape[1]
    assert k.shape[-1] == v.shape[-1] == max(latents[1].shape[-1], latents[2].shape[-1])


def assert_differentiable(implementation, latents, keywords, names):
    """By finite differences, in the latents and in the keywords that are ``names``, of float64."""
    inputs = [*latents, *(keywords[name] for name in names)]

    def call(q, k, v, *rest):
        given = keywords | dict(zip(names, rest, strict=True))
        return implementation(AttentionOperands(q, k, v, **given))

    assert torch.autograd.gradcheck(call, [x.detach().requires_grad_() for x in inputs])


@pytest.mark.parametrize("implementation", [rank_space_attention_library, lifted_attention])
def test_differentiable(implementation):
    small = {"head_dim": 5, "head_dim_v": 6, "ranks": (3, 4, 2)}
    latents, keywords = to_float64(*operands(batch=1, queries=3, keys=4, mask=any_bool, **small))
    names = ["q_factor", "q_bias", "k_factor", "v_factor", "v_bias"]
    assert_differentiable(implementation, latents, keywords, names)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"k_factor": torch.zeros(2, 32, 17)}, r"k_factor must be \[heads, 32, 16\]"),
        ({"q_bias": torch.zeros(2, 31)}, r"q_bias must be \[heads, 32\]"),
        ({"v_factor": torch.zeros(3, 32, 16)}, "v_factor has 3 heads, which must divide"),
        ({"v_bias": torch.zeros(2, 32).half()}, "v_bias is torch.float16"),
        ({"mask": torch.ones(2, 2, 19, 36).bool()}, "mask must be 4-D"),
        ({"mask": torch.ones(19, 37).bool()}, "mask must be 4-D"),
        ({"mask": torch.ones(2, 2, 19, 37).int()}, "mask must be bool or floating"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize(
    "implementation", [*IMPLEMENTATIONS, pytest.param(lifted_attention, id="lifted")]
)
def test_operands_that_do_not_fit_are_named(implementation, broken, message):
    latents, keywords = operands()
    broken = {name: x.to(DEVICE) for name, x in broken.items()}
    with pytest.raises(ValueError, match=message):
        implementation(AttentionOperands(*latents, **(keywords | broken)))


def test_latents_that_do_not_fit_are_named():
    (q, k, v), keywords = operands()
    with pytest.raises(ValueError, match=r"q must be \[batch, heads, rows, rank\]"):
        lifted_attention(AttentionOperands(q[0], k, v, **keywords))
    with pytest.raises(ValueError, match=r"v must be \[2, heads, 37, 16\]"):
        lifted_attention(AttentionOperands(q, k, v[:, :, :-1], **keywords))


def test_kernel_refuses_what_it_cannot_run():
    latents, keywords = operands()
    wide_latents, wide_keywords = to_float64(latents, keywords)
    with pytest.raises(ValueError, match=r"the kernel runs .* q is torch\.float64"):
        rank_space_attention(AttentionOperands(*wide_latents, **wide_keywords))
    with pytest.raises(ValueError, match=r"out must be \[2, 2, 19, 32\]"):
        rank_space_attention(
            AttentionOperands(*latents, **keywords), out=torch.empty(2, 19, 2, 32, device=DEVICE)
        )


def test_shape_of_operands():
    latents, keywords = operands(ranks=(8, 15, 37), head_dim_v=40)
    shape = AttentionOperands(*latents, **keywords).shape
    assert (shape.batch, shape.num_heads, shape.queries, shape.keys) == (2, 2, 19, 37)
    assert (shape.head_dim_qk, shape.head_dim_v) == (32, 40)
    assert (shape.rank_q, shape.rank_k, shape.rank_v) == (8, 15, 37)


@pytest.mark.parametrize("budget", [0, 16, 24, 48, 99])
def test_a_tile_that_is_chosen_again_keeps_the_budget(budget, monkeypatch):
    """Operands whose rank is not innermost in memory take more than the planner could foresee."""
    launched = []
    monkeypatch.setattr(attention, "launch", lambda *given, **_: launched.append(given[2]))
    latents, keywords = operands(ranks=(8, 8, 8))
    keywords["k_factor"] = keywords["k_factor"].transpose(-1, -2).contiguous().transpose(-1, -2)
    of = AttentionOperands(*latents, **keywords)
    budget_bytes = budget * 1024
    rank_space_attention(of, tile=TileConfig(128, 64, 8, 3), sram_budget=budget_bytes)
    (tile,) = launched
    extents = AttentionExtents(
        32, 32, 8, 8, 8, True, True, of.q.element_size(), generation=generation_of(of.q.device)
    )
    most = sram_bytes_of_device(of.q.device, attention.INTERPRETER_SRAM_BYTES)
    assert sram_bytes_of(tile, widened(extents)) <= (budget_bytes or most)
