"""No rank beyond what the kernels run within a shared-memory budget; none lowered that fits."""

import copy
import itertools

import pytest
import torch
from flashsvd_compile.kernels import attention_tiles, feed_forward_tiles
from flashsvd_compile.kernels.attention_extents import AttentionExtents
from transformers import BertConfig, BertModel

import flashsvd_compile as fsc
from flashsvd_compile.options import OptionsError


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=512,
        vocab_size=100,
    )  # fmt: skip
    return BertModel(config, add_pooling_layer=False).eval()


def given(method):
    if method == "svd":
        return {}
    ids = torch.randint(0, 100, (4, 16))
    return {"calibration": [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]}


def attends(rank, sram_bytes):
    extents = AttentionExtents(64, 64, rank, rank, rank, True, True, 4, mask="any")
    found = attention_tiles.default_tile(extents, sram_bytes)
    return bool(found or attention_tiles.last_resort(extents, sram_bytes))


def streams(rank, width, sram_bytes):
    return feed_forward_tiles.default_tile(
        rank_up=rank, rank_gate=None, rank_down=rank, intermediate_size=width, element_bytes=4,
        sram_bytes=sram_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("method", ["svd", "whitened", "planned"])
@pytest.mark.parametrize("kib", [12, 16, 32])
def test_every_rank_has_a_tile(model, method, kib):
    report = fsc.compress_(model, keep=0.7, method=method, sram_budget=f"{kib}KiB", **given(method))
    factored = [row for row in report.rows if row.rank is not None]
    assert factored
    for row in factored:
        if row.kind == "matrix":
            assert streams(row.rank, 512 if ".attention." not in row.path else 256, kib * 1024)
        else:
            assert attends(row.rank, kib * 1024)


def test_what_fits_is_left_as_it_was(model):
    same = fsc.compress_(copy.deepcopy(model), keep=0.5)
    capped = fsc.compress_(model, keep=0.5, sram_budget="227KiB")
    assert [row.rank for row in capped.rows] == [row.rank for row in same.rows]


def test_a_smaller_budget_never_raises_a_rank(model):
    ranks = [
        [row.rank for row in fsc.compress_(copy.deepcopy(model), 0.7, sram_budget=kib * 1024).rows]
        for kib in (12, 16, 24, 48, 99)
    ]
    for less, more in itertools.pairwise(ranks):
        assert all(small <= large for small, large in zip(less, more, strict=True))
    assert ranks[0] != ranks[-1]


def test_no_tile_at_all(model):
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"sram_budget is 4096 bytes, and encoder\.layer\.0\..*"):
        fsc.compress_(model, keep=0.5, sram_budget="4KiB")
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("budget", ["4 KiBit", -1, 0, "much"])
def test_no_size(model, budget):
    with pytest.raises(OptionsError, match="sram_budget"):
        fsc.compress_(model, keep=0.5, sram_budget=budget)
