"""Masks that bound how far a query sees: no tensor of every pair is left for the kernel to read."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.spelled import check, low_rank

HEADS, HEAD_DIM = 2, 16
HIDDEN = HEADS * HEAD_DIM
BATCH, M, N = 2, 11, 19


class Windowed(nn.Module):
    """M queries after N - M other keys, with the mask that ``mask_of`` makes of places."""

    def __init__(self, mask_of) -> None:
        super().__init__()
        self.q, self.k, self.v = (low_rank(HIDDEN, HIDDEN, rank=4) for _ in "qkv")
        self.mask_of = mask_of

    def forward(self, x, y, pad=None):
        q, k, v = (
            z.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)
            for z in (self.q(x), self.k(y), self.v(y))
        )
        rows, columns = (torch.arange(z.shape[1], device=z.device) for z in (x, y))
        mask = self.mask_of(rows[:, None], columns, x.shape[1], y.shape[1])
        if pad is not None:
            mask = mask & pad[:, None, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return out.transpose(1, 2).flatten(-2)


def call(queries=M, keys=N, padded=False):
    given = torch.randn(BATCH, queries, HIDDEN), torch.randn(BATCH, keys, HIDDEN)
    if not padded:
        return given
    return (*given, torch.arange(keys) >= torch.arange(BATCH)[:, None])


def causal(m, n, queries, keys):
    return n <= m


def continued(m, n, queries, keys):
    return n <= m + (keys - queries)


def windowed(m, n, queries, keys):
    return (n <= m + (keys - queries)) & (n > m + (keys - queries) - 6)


def both_ways(m, n, queries, keys):
    return (n - m <= 4) & (m - n <= 4)


def strided(m, n, queries, keys):
    return (n <= m) & (n % 2 == 0)


# What the operator is told, and whether it reads a mask beside.
SPELLED = {
    "causal": (causal, {"is_causal": "True", "behind": "None"}, False),
    "continued": (continued, {"is_causal": "True", "ahead": str(N - M), "behind": "None"}, False),
    "windowed": (windowed, {"is_causal": "True", "ahead": str(N - M)}, False),
    "both_ways": (both_ways, {"is_causal": "True", "ahead": "4", "behind": "4"}, False),
    "strided": (strided, {"is_causal": "True", "ahead": "0", "behind": "None"}, True),
}

pytestmark = pytest.mark.usefixtures("fresh_inference")


def told(directory):
    """Numbers of the one attention of the rewritten graph, and the name of its mask."""
    (text,) = (path.read_text() for path in directory.glob("graph_0*/after.py"))
    (line,) = (x for x in text.splitlines() if "flashsvd.rank_space_attention.default(" in x)
    arguments = line.partition("default(")[2].split(", ")
    tensors = [x for x in arguments if " = " not in x]
    return dict(re.findall(r"(\w+) = ([\w.-]+)", line)), tensors[8]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spelling", SPELLED)
def test_spellings(spelling, padded, tmp_path):
    mask_of, numbers, is_read = SPELLED[spelling]
    check(Windowed(mask_of), call(padded=padded), into=tmp_path, found=["attention rank_space"])
    found, mask = told(tmp_path)
    assert {name: found[name] for name in numbers} == numbers
    assert (mask != "None") == (is_read or padded)


@pytest.mark.parametrize("spelling", ["continued", "windowed", "both_ways"])
def test_sizes_that_change(spelling, tmp_path):
    """One graph for all: bounds are computed from sizes."""
    calls = [call(), call(7, 30), call(12, 13), call(600, 700)]
    check(
        Windowed(SPELLED[spelling][0]), *calls, into=tmp_path, found=["attention rank_space"],
        dynamic=True,
    )  # fmt: skip
    found, mask = told(tmp_path)
    assert found["is_causal"] == "True"
    assert mask == "None"


def test_a_window_that_data_sets_stays_a_tensor(tmp_path):
    class OfData(Windowed):
        def forward(self, x, y, lengths):
            self.mask_of = lambda m, n, *_: (m - n < lengths[:, None, None, None]) & (n <= m)
            return super().forward(x, y)

    given = (*call(), torch.tensor([3, 5]))
    check(OfData(None), given, into=tmp_path, found=["attention rank_space"])
    found, mask = told(tmp_path)
    assert (found["ahead"], found["behind"]) == ("0", "None")
    assert mask != "None"
