"""Latents that grow by concatenation, as a cache of latents has them, and what only looks so."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flashsvd_compile import LatentCache
from tests.spelled import OPTIONS, check
from tests.test_decoders import decoder, prompts

BATCH, NEW, KEPT, HIDDEN, HEADS, HEAD_DIM, RANK = 2, 3, 5, 30, 3, 8, 4


class Appending(nn.Module):
    """Attention over kept latents of keys and values, and those of x behind them."""

    def __init__(self, along=1, rank=RANK, derived=False):
        super().__init__()
        out = HEADS * HEAD_DIM
        self.q = nn.Linear(HIDDEN, out)
        self.down = nn.Linear(HIDDEN, RANK, bias=False)
        self.lift_k, self.lift_v = (nn.Linear(rank, out) for _ in range(2))
        self.along, self.derived = along, derived

    def forward(self, x, kept):
        if self.derived:
            kept = kept.softmax(-1)
        latents = torch.cat((kept, self.down(x)), dim=self.along)
        q, k, v = (
            y.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for y in (self.q(x), self.lift_k(latents), self.lift_v(latents))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)


def call(kept=KEPT, width=RANK):
    return torch.randn(BATCH, NEW, HIDDEN), torch.randn(BATCH, kept, width)


pytestmark = pytest.mark.usefixtures("fresh_inference")


@pytest.mark.parametrize("dynamic", [False, True])
def test_kept_and_new_latents_are_latents(tmp_path, dynamic):
    calls = [call(), call(kept=9)] if dynamic else [call()]
    check(
        Appending(), *calls, into=tmp_path, found=["attention rank_space"],
        ranks={"q": "dense", "k": str(RANK), "v": str(RANK)}, dynamic=dynamic,
    )  # fmt: skip


def test_latents_side_by_side_are_none(tmp_path):
    """Of the same tokens: a wider input, of which nothing says that it was ever low-rank."""
    check(Appending(along=-1, rank=2 * RANK), call(kept=NEW), into=tmp_path, found=[])


def test_what_the_graph_computes_otherwise_is_none(tmp_path):
    check(Appending(derived=True), call(), into=tmp_path, found=[])


def test_latents_as_wide_as_heads_together_are_none(tmp_path):
    model = Appending(rank=HEADS * HEAD_DIM)
    model.down = nn.Linear(HIDDEN, HEADS * HEAD_DIM, bias=False)
    check(model, call(width=HEADS * HEAD_DIM), into=tmp_path, found=[])


@pytest.mark.parametrize(("family", "latents"), [("llama", "qv"), ("qwen3", "qv"), ("opt", "kqv")])
def test_decoding_with_a_latent_cache_keeps_values_in_rank_space(family, latents, tmp_path):
    """Keys, too, where they do not turn, and queries in any case; the same in the prefill as in
    steps."""
    model, inputs = decoder(family), prompts()
    options = {**OPTIONS, "debug_dir": str(tmp_path)}
    compiled = torch.compile(model.forward, backend="flashsvd", options=options)
    cache = LatentCache(model)
    mask = inputs["attention_mask"]
    compiled(**inputs, past_key_values=cache)
    for _ in range(3):
        mask = F.pad(mask, (0, 1), value=1)
        token = torch.ones((2, 1), dtype=torch.long)
        compiled(input_ids=token, attention_mask=mask, past_key_values=cache)
    dumps = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("graph_*/sites.json"))]
    assert len(dumps) == 2
    for dump in dumps:
        (site,) = (site for site in dump["sites"] if site["kind"] == "attention")
        ranks = site["plan"]["ranks"]
        assert site["lowering"] == "rank_space"
        assert {name for name, rank in ranks.items() if rank != "dense"} == set(latents)
