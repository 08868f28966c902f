"""Jagged nested tensors: no site is made of them, each says why, and all else goes on as before."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flashsvd_compile as fsc
from tests.spelled import low_rank

pytestmark = pytest.mark.usefixtures("fresh_inference")

LENGTHS = (5, 9, 17)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.norm = (
            low_rank(64, 512, 16),
            low_rank(512, 64, 16),
            nn.LayerNorm(64),
        )

    def forward(self, x):
        return self.norm(x + self.down(F.gelu(self.up(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (low_rank(64, 64, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, [4, 16]).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Residual(nn.Module):
    """Sums of sums, which are written once where they are dense."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FeedForward() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer.down(F.gelu(layer.up(layer.norm(x))))
        return self.layers[0].norm(x)


def jagged():
    entries = [torch.randn(length, 64) for length in LENGTHS]
    return torch.nested.nested_tensor(entries, layout=torch.jagged)


@pytest.mark.parametrize("options", [{}, {"memory_budget": "1GiB", "max_length": 64}], ids=str)
@pytest.mark.parametrize("model", [FeedForward, Attention, Residual])
def test_sites_are_skipped_and_results_are_eagers(model, options, caplog):
    run, x = model(), jagged()
    told = fsc.explain(run, x, options=options)
    assert told.sites
    assert {(site.lowering, site.reason.code.value) for site in told.sites} == {(None, "nested")}
    assert "a nested tensor, [3, " in str(told)
    with caplog.at_level(logging.WARNING, "flashsvd_compile"):
        found = torch.compile(run, backend="flashsvd", options=options)(x)
    assert "a pass failed" not in caplog.text
    torch.testing.assert_close(found.values(), run(x).values())


def test_what_all_entries_hold_is_counted():
    (found,) = fsc.explain(FeedForward(), jagged()).peaks
    assert found.held["linear_1"] == sum(LENGTHS) * 512 * 4


def test_dense_sites_beside_them_stay_sites():
    ragged, dense = FeedForward(), FeedForward()

    def run(x, y):
        return ragged(x), dense(y)

    told = fsc.explain(run, jagged(), torch.randn(2, 33, 64))
    kinds = {site.kind for site in told.sites if site.lowering is not None}
    assert "feed_forward" in kinds


def test_dense_weights_that_read_them_are_factored():
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    x = jagged()
    found = torch.compile(model, backend="flashsvd", options={"keep": 0.5})(x)
    expected = torch.compile(model, backend="flashsvd", options={"keep": 0.5})(x.values())
    torch.testing.assert_close(found.values(), expected)
