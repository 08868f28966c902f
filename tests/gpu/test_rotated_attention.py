"""RoPE in the attention kernel compiled for a GPU: every mask, in groups, in 16 bits and 32."""

from functools import partial

import pytest
import torch
from flashsvd_compile.kernels.tiles import TileConfig

from tests.gpu import launched_attention
from tests.gpu.test_attention_kernel import DESCRIBED, DTYPES, MASKS, random_operands
from tests.kernels.test_rotated_attention import eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def turned_operands(
    dtype, *, head_dim=64, rotary_dim=None, pair=None, half=False, tables=None, lifted="qv",
    ranks=(32, 32, 32), normed=False, **given,
):  # fmt: skip
    """Two angles for each pair, unless tables are ``half`` as wide."""
    latents, keywords = random_operands(
        dtype, lifted=lifted, head_dims=(head_dim, head_dim), ranks=ranks, **given
    )
    rotary_dim = rotary_dim or head_dim
    rows = (latents[0].shape[0], latents[0].shape[2], rotary_dim // 2 if half else rotary_dim)
    for name in ("cos", "sin"):
        keywords[name] = torch.randn(rows, device="cuda").to(tables or dtype)
    if normed:
        keywords |= {"q_norm": torch.randn(head_dim, device="cuda").to(dtype), "q_norm_eps": 1e-6}
    return latents, keywords | {"rotary_dim": rotary_dim, "rotary_pair": pair or rotary_dim // 2}


assert_right = partial(launched_attention.assert_right, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("mask", ["none", "padding", "any", "added_hard"])
def test_masks_and_groups(mask, is_causal, groups, dtype):
    heads = 6 if groups > 1 else 2
    assert_right(
        *turned_operands(
            dtype, heads=heads, latent_heads=heads // groups, queries=150, keys=170,
            mask=MASKS[mask], is_causal=is_causal, ranks=(40, 24, 48),
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tables", [None, torch.float32], ids=str)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "pair"),
    [(64, 64, 32), (64, 64, 1), (64, 16, 8), (128, 128, 64), (128, 64, 1), (80, 32, 16),
     (39, 26, 13), (256, 256, 128)],
)  # fmt: skip
def test_spellings(head_dim, rotary_dim, pair, half, tables, dtype):
    if dtype == torch.float32 and head_dim == 256:
        pytest.skip("no tile of exact float32 is so wide")
    assert_right(
        *turned_operands(
            dtype, head_dim=head_dim, rotary_dim=rotary_dim, pair=pair, half=half, tables=tables,
            queries=200, keys=333, is_causal=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (128, 128), (128, 64), (80, 32)])
def test_normalised(head_dim, rotary_dim, dtype):
    assert_right(
        *turned_operands(
            dtype, head_dim=head_dim, rotary_dim=rotary_dim, normed=True, heads=6, latent_heads=2,
            queries=200, keys=333, is_causal=True,
        )
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [7, 64, 129, 1024])
@pytest.mark.parametrize("lifted", ["q", "qv"])
def test_ranks(lifted, rank, dtype):
    assert_right(
        *turned_operands(
            dtype, head_dim=128, ranks=(rank, 32, 40), lifted=lifted, queries=130, keys=300
        )
    )


@pytest.mark.parametrize("tile", [DESCRIBED, TileConfig(64, 64, 4, 3), TileConfig(128, 32, 8, 4),
                                  TileConfig(16, 32, 4, 2)], ids=str)  # fmt: skip
def test_tiles(tile):
    assert_right(
        *turned_operands(torch.bfloat16, queries=300, keys=500, ranks=(64, 64, 64)), tile=tile
    )
