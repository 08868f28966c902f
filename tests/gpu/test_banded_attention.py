"""Windows and continued causality in the attention kernel compiled for a GPU."""

from functools import partial

import pytest
import torch
from flashsvd_compile.kernels.tiles import TileConfig

from tests.gpu import launched_attention
from tests.gpu.test_attention_kernel import DESCRIBED, DTYPES, MASKS, random_operands
from tests.kernels.test_banded_attention import eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

QUERIES, KEYS = 300, 340
BANDS = {
    "window": {"is_causal": True, "behind": 100},
    "short_window": {"is_causal": True, "behind": 7},
    "both_ways": {"is_causal": True, "ahead": 33, "behind": 33},
    "behind_only": {"behind": 90},
    "continued": {"is_causal": True, "ahead": KEYS - QUERIES},
    "continued_window": {"is_causal": True, "ahead": KEYS - QUERIES, "behind": 120},
    "strictly_before": {"is_causal": True, "ahead": -1},
    "later_keys_only": {"behind": -130},
}


assert_right = partial(launched_attention.assert_right, eager)


def banded(dtype, band, **given):
    latents, keywords = random_operands(dtype, **{"queries": QUERIES, "keys": KEYS, **given})
    return latents, {**keywords, "is_causal": False, **band}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", ["none", "padding", "any", "added_hard"])
@pytest.mark.parametrize("band", BANDS)
def test_masks(band, mask, dtype):
    assert_right(*banded(dtype, BANDS[band], mask=MASKS[mask], ranks=(40, 24, 48)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("band", BANDS)
def test_described(band, dtype):
    given = banded(dtype, BANDS[band], ranks=(32, 32, 32), queries=512, keys=512)
    assert_right(*given, tile=DESCRIBED)


@pytest.mark.parametrize("tile", [(128, 64, 8, 3), (64, 128, 4, 2), (64, 32, 4, 3), (32, 32, 4, 2)])
@pytest.mark.parametrize("band", ["window", "continued_window"])
def test_tiles(band, tile):
    given = banded(torch.bfloat16, BANDS[band], ranks=(64, 64, 64), queries=512, keys=512)
    assert_right(*given, tile=TileConfig(*tile))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [0.0, 20.0])
def test_in_groups_and_capped(softcap, dtype):
    latents, keywords = banded(dtype, BANDS["window"], heads=6, latent_heads=2)
    assert_right(latents, {**keywords, "softcap": softcap})


def test_one_query():
    band = {"is_causal": True, "ahead": KEYS - 1, "behind": 64 - KEYS}
    assert_right(*banded(torch.bfloat16, band, queries=1))


def test_a_long_window_of_many_keys():
    band = {"is_causal": True, "behind": 1000}
    assert_right(*banded(torch.bfloat16, band, queries=3000, keys=3000, batch=1, heads=2))
