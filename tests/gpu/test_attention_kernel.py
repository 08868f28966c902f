"""Rank-space attention compiled for a GPU: real tiles, real roundings, real address widths."""

import itertools
from functools import partial

import pytest
import torch
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_reference import lifted_attention
from flashsvd_compile.kernels.tile_tables import tables_of
from flashsvd_compile.kernels.tiles import TileConfig
from torch.nn.attention import SDPBackend, sdpa_kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROWS = (1, 17, 128, 513, 4097)
RANKS = (1, 8, 15, 16, 37, 40, 64, 96, 128)
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 256)

TILES = sorted(
    {
        TileConfig(*fields)
        for generation in ("sm_90", "portable")
        for table in tables_of("attention", generation)
        for fields in table.tiles
    },
    key=str,
)


def random_operands(
    dtype, *, batch=2, heads=2, queries=128, keys=128, head_dims=(64, 64), ranks=(32, 32, 32),
    lifted="qkv", latent_heads=None, bias=True, is_causal=False, mask=None,
):  # fmt: skip
    """Operands of order 1; latents are [B, M, H, R] in memory, as projections leave them."""

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, device="cuda") * scale).to(dtype)

    wide = (head_dims[0], *head_dims)
    latents, operands = [], {}
    for name, rank, width, rows in zip("qkv", ranks, wide, (queries, keys, keys), strict=True):
        columns = rank if name in lifted else width
        latents.append(normal(batch, rows, latent_heads or heads, columns).transpose(1, 2))
        if name in lifted:
            operands[f"{name}_factor"] = normal(heads, width, rank, scale=rank**-0.5)
    if bias:
        operands |= {"q_bias": normal(heads, wide[0]), "v_bias": normal(heads, wide[2])}
    if mask is not None:
        mask = mask(batch, heads, queries, keys)
    common = {"num_heads": heads, "scale": wide[0] ** -0.5, "is_causal": is_causal, "mask": mask}
    return latents, operands | common


def padding(batch, heads, queries, keys):
    """The first batch sees nothing."""
    seen = torch.arange(batch, device="cuda")[:, None] * keys // batch
    return (torch.arange(keys, device="cuda") < seen)[:, None, None]


def any_bool(batch, heads, queries, keys):
    mask = torch.rand(batch, heads, queries, keys, device="cuda") > 0.4
    mask[:, :, queries // 2] = False
    return mask


def added(hidden, batch, heads, queries, keys):
    mask = torch.randn(1, 1, queries, keys, device="cuda")
    mask = mask.masked_fill(torch.rand_like(mask) < 0.3, hidden)
    mask[:, :, queries // 2] = hidden
    return mask


MASKS = {
    "none": None,
    "padding": padding,
    "any": any_bool,
    "added_hard": partial(added, float("-inf")),
    "added_soft": partial(added, torch.finfo(torch.float32).min),
}


@sdpa_kernel(SDPBackend.MATH)
def reference(latents, keywords):
    """The math form: fused backends differ in what they make of masks."""
    return lifted_attention(AttentionOperands(*latents, **keywords))


def exact_reference(latents, keywords):
    """In float64, whatever the operands are in."""
    double = {
        name: x.double() if isinstance(x, torch.Tensor) and x.dtype != torch.bool else x
        for name, x in keywords.items()
    }
    return reference([x.double() for x in latents], double)


def assert_right(latents, keywords, **launch):
    """No further from float64 than 1.1 × the lifted expression, plus two roundings; all written."""
    q = latents[0]
    exact = exact_reference(latents, keywords)
    batch, heads, queries, head_dim_v = exact.shape
    memory = torch.full(
        (batch, queries, heads, head_dim_v), float("nan"), dtype=q.dtype, device="cuda"
    )
    output = rank_space_attention(
        AttentionOperands(*latents, **keywords), out=memory.transpose(1, 2), **launch
    )
    if exact.numel() == 0:
        return
    budget = 1.1 * (reference(latents, keywords) - exact).norm()
    budget += 2 * torch.finfo(q.dtype).eps * exact.norm()
    error = (output - exact).norm()
    assert error <= budget, f"error {error:.3e}, budget {budget:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rank", [*RANKS, 257])
def test_ranks(rank, dtype):
    assert_right(*random_operands(dtype, ranks=(rank, rank, rank), queries=130, keys=100))


@pytest.mark.parametrize(
    ("ranks", "head_dims"),
    [
        ((RANKS[i % 9], RANKS[(2 * i + 3) % 9], RANKS[(5 * i + 1) % 9]),
         (HEAD_DIMS[i % 7], HEAD_DIMS[(3 * i + 2) % 7]))
        for i in range(21)
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_mixed_ranks_and_head_dims(ranks, head_dims, dtype):
    assert_right(
        *random_operands(
            dtype, ranks=ranks, head_dims=head_dims, queries=70, keys=200, mask=padding
        )
    )


@pytest.mark.parametrize(("queries", "keys"), list(itertools.product(ROWS, ROWS)))
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows(queries, keys, is_causal):
    operands = random_operands(
        torch.bfloat16, batch=1, ranks=(40, 40, 40), queries=queries, keys=keys, is_causal=is_causal
    )
    assert_right(*operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_masks(mask, is_causal, dtype):
    if mask is MASKS["added_soft"] and dtype == torch.float16:
        mask = partial(added, torch.finfo(torch.float16).min)
    latents, keywords = random_operands(
        dtype, queries=150, keys=170, mask=mask, is_causal=is_causal, ranks=(40, 24, 48)
    )
    assert_right(latents, keywords)
    if mask is padding:
        assert (rank_space_attention(AttentionOperands(*latents, **keywords))[0] == 0).all()


DESCRIBED = TileConfig(64, 64, 4, 3, is_described=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("rank", [32, 64, 128])
def test_masks_of_described_latents(rank, mask, is_causal, dtype):
    if dtype == torch.float32 and rank > 32:
        pytest.skip("its tiles do not fit")
    if mask is MASKS["added_soft"] and dtype == torch.float16:
        mask = partial(added, torch.finfo(torch.float16).min)
    operands = random_operands(
        dtype, queries=150, keys=170, mask=mask, is_causal=is_causal, ranks=(40, rank, rank)
    )
    assert_right(*operands, tile=DESCRIBED)


@pytest.mark.parametrize(("queries", "keys"), list(itertools.product(ROWS, ROWS)))
@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_described_latents(queries, keys, is_causal):
    operands = random_operands(
        torch.bfloat16, batch=3, ranks=(64, 64, 64), queries=queries, keys=keys, is_causal=is_causal
    )
    assert_right(*operands, tile=DESCRIBED)


def test_described_latents_of_groups():
    operands = random_operands(torch.bfloat16, heads=6, latent_heads=2, ranks=(64, 64, 64))
    assert_right(*operands, tile=DESCRIBED)


@pytest.mark.parametrize("lifted", ["", "q", "k", "v", "qv", "kv"])
def test_dense_operands(lifted):
    assert_right(*random_operands(torch.bfloat16, lifted=lifted, head_dims=(96, 40), keys=77))


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_tile(tile):
    operands = random_operands(
        torch.bfloat16, queries=300, keys=200, ranks=(40, 64, 37), is_causal=True, mask=padding
    )
    assert_right(*operands, tile=tile)


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("rank", [32, 40, 96])
@pytest.mark.parametrize("seen", [(0, 512), (0, 448), (0, 320), (64, 512), (65, 400), (200, 201)])
def test_keys_seen_from_one_to_another(seen, rank, is_causal):
    """Whole tiles and parts of tiles hidden at either end; every tile must agree."""
    latents, operands = random_operands(
        torch.bfloat16, batch=1, queries=512, keys=512, ranks=(rank,) * 3, is_causal=is_causal
    )
    keys = torch.arange(512, device="cuda")
    operands["mask"] = ((keys >= seen[0]) & (keys < seen[1]))[None, None, None]
    for tile in (None, TileConfig(64, 64, 4, 3), TileConfig(128, 64, 8, 3)):
        assert_right(latents, operands, tile=tile)


@pytest.mark.parametrize("is_causal", [False, True], ids=["", "causal"])
@pytest.mark.parametrize("factor", [4, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_later_keys_that_score_far_higher(dtype, factor, is_causal):
    """Their sums leave the range in which the first tile's maximum serves."""
    latents, operands = random_operands(dtype, queries=300, keys=300, is_causal=is_causal)
    latents[1][:, :, 200:210] *= factor
    output = rank_space_attention(AttentionOperands(*latents, **operands))
    exact = exact_reference(latents, operands)
    # Scores of hundreds round to tenths in 16 bits: both err by much, and not alike.
    assert (output - exact).norm() <= 3 * (reference(latents, operands) - exact).norm()


def test_a_batch_beyond_one_axis_of_the_grid():
    assert_right(*random_operands(torch.bfloat16, batch=70000, heads=1, queries=3, keys=5))


@pytest.mark.parametrize("ranks", [(20, 24, 20), (35, 32, 29), (40, 40, 40), (8, 48, 40)], ids=str)
def test_latents_that_begin_anywhere_in_one_tensor(ranks):
    """A fused projection cut unequally: rows begin at 2, 8 or 16 bytes."""
    _, operands = random_operands(torch.bfloat16, ranks=ranks)
    whole = torch.randn(2, 128, 2, sum(ranks), device="cuda").bfloat16()
    latents = [part.transpose(1, 2) for part in whole.split(ranks, -1)]
    assert_right(latents, operands)


def test_shared_latents_and_empty_extents():
    assert_right(*random_operands(torch.bfloat16, heads=4, latent_heads=1))
    assert_right(*random_operands(torch.bfloat16, heads=4, latent_heads=2))
    assert_right(*random_operands(torch.bfloat16, batch=0))
    assert_right(*random_operands(torch.bfloat16, queries=0))
    assert_right(*random_operands(torch.bfloat16, keys=0))


def test_tf32_where_allowed_and_only_there(monkeypatch):
    latents, keywords = random_operands(torch.float32, ranks=(40, 40, 40))
    exact = rank_space_attention(AttentionOperands(*latents, **keywords))
    assert_right(latents, keywords)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    error = (
        rank_space_attention(AttentionOperands(*latents, **keywords)) - exact
    ).norm() / exact.norm()
    assert 2**-16 < error < 2**-8  # operands are cut to 10 bits after the leading one


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("transposed", ["q", "k", "v", "q_factor", "k_factor", "v_factor", "all"])
def test_operands_whose_rank_is_not_innermost(transposed, rank):
    latents, keywords = random_operands(torch.bfloat16, ranks=(rank, rank, rank), keys=200)
    operands = dict(zip("qkv", latents, strict=True)) | keywords
    for name in ("q", "k", "v", "q_factor", "k_factor", "v_factor"):
        if transposed in (name, "all"):
            operands[name] = operands[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    latents = [operands.pop(name) for name in "qkv"]
    for tile in (TileConfig(128, 32, 4, 4, 128), TileConfig(64, 32, 4, 4)):
        assert_right(latents, operands, tile=tile)


def test_rows_beyond_2_to_the_31_elements():
    """P_k, P_v and the mask lie beyond 2³¹ elements of one buffer, rows 2²⁵ elements apart."""
    keys, stride = 80, 2**25
    latents, keywords = random_operands(torch.bfloat16, batch=1, heads=1, keys=keys, bias=False)
    buffer = torch.empty(keys * stride, dtype=torch.bfloat16, device="cuda")
    far = []
    for column, latent in enumerate(latents[1:]):
        view = buffer.as_strided((1, 1, keys, 32), (0, 0, stride, 1), column * 64)
        view.copy_(latent)
        far.append(view)
    mask = buffer.as_strided((1, 1, 1, keys), (0, 0, 0, stride), 4096)
    mask.copy_(torch.randn(keys))
    assert_right([latents[0], *far], keywords | {"mask": mask})


def test_output_and_queries_beyond_2_to_the_31_elements():
    rows, stride = 130, 2**25
    latents, keywords = random_operands(torch.bfloat16, batch=1, heads=1, queries=rows, bias=False)
    buffer = torch.full((rows * stride,), float("nan"), dtype=torch.bfloat16, device="cuda")
    far = buffer.as_strided((1, 1, rows, 32), (0, 0, stride, 1), 0)
    far.copy_(latents[0])
    out = buffer.as_strided((1, 1, rows, 64), (0, 0, stride, 1), 128)
    rank_space_attention(AttentionOperands(far, *latents[1:], **keywords), out=out)
    near = rank_space_attention(AttentionOperands(*latents, **keywords))
    assert torch.equal(out, near)
