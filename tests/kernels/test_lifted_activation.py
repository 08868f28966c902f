"""The intermediate lifted and activated at once: against float64, and nothing beside it written."""

import pytest
import torch
from flashsvd_compile.kernels import lifted_activation
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.feed_forward_blocks import (
    are_lifted_at_once,
    one_block_feed_forward,
    row_blocks_feed_forward,
)
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.lifted_activation import lift_and_activate
from flashsvd_compile.kernels.lifted_activation_tiles import TILE as DEFAULT_TILE
from flashsvd_compile.kernels.lifted_activation_tiles import default_tile
from flashsvd_compile.kernels.primitives import INTERPRETED, launch
from flashsvd_compile.kernels.tiles import TileConfig

from tests.rounding import assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TILE = TileConfig(block_m=32, block_n=64, num_warps=4, num_stages=2)

pytestmark = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter or a CUDA device"
)


def eager(up, up_factor, up_bias, gate, gate_factor, gate_bias, activation):
    def lifted(latent, factor, bias):
        return torch.nn.functional.linear(latent, factor, bias)

    act, hidden = ACTIVATIONS[activation].function, lifted(up, up_factor, up_bias)
    return act(hidden) if gate is None else act(lifted(gate, gate_factor, gate_bias)) * hidden


def operands(rows, width, rank, rank_gate, dtype, bias=True):
    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

    lifts = []
    for r in (rank, rank_gate):
        if r is None:
            lifts += [None, None, None]
        else:
            factor = normal(width, r, scale=r**-0.5)
            lifts += [normal(rows, r), factor, normal(width) if bias else None]
    return lifts


def assert_right(lifts, activation):
    rows, width, dtype = lifts[0].shape[0], lifts[1].shape[0], lifts[0].dtype
    memory = torch.full((rows + 2, width), float("nan"), dtype=dtype, device=DEVICE)
    out = memory[1:-1]
    assert lift_and_activate(out, *lifts, activation, tile=TILE) is out
    exact = eager(*(None if x is None else x.double() for x in lifts), activation)
    assert_as_exact_as_eager(out, eager(*lifts, activation), exact)
    assert memory[0].isnan().all()
    assert memory[-1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank_gate", [None, 72], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_float64(activation, rank_gate, dtype):
    assert_right(operands(41, 72, 136, rank_gate, dtype), activation)


@pytest.mark.parametrize("rank_gate", [None, 8, 200])
@pytest.mark.parametrize(
    ("rows", "width", "rank"), [(1, 1, 8), (32, 64, 64), (33, 65, 72), (700, 130, 16), (5, 40, 8)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_sizes(rows, width, rank, rank_gate, bias):
    assert_right(operands(rows, width, rank, rank_gate, torch.float16, bias), "silu")


def test_rows_that_lie_apart():
    """Latents that are parts of one tensor, whose rows begin at multiples of 16 bytes."""
    up, up_factor, up_bias, gate, gate_factor, gate_bias = operands(50, 70, 24, 40, torch.float16)
    fused = torch.cat([up, gate], 1)
    lifts = [fused[:, :24], up_factor, up_bias, fused[:, 24:], gate_factor, gate_bias]
    assert_right(lifts, "gelu")


@pytest.mark.parametrize("rank_gate", [None, 24])
def test_no_rows(rank_gate):
    out = torch.empty(0, 72, dtype=torch.float16, device=DEVICE)
    lifts = operands(0, 72, 16, rank_gate, torch.float16)
    assert lift_and_activate(out, *lifts, "silu", tile=TILE).shape == (0, 72)


def padded_rows(x):
    """The same numbers, in rows that no descriptor can step over."""
    return torch.nn.functional.pad(x, (0, 1))[:, :-1]


RESPELLED = {
    "as_they_are": ({}, True),
    "factor_by_rank": ({"up_factor": lambda x: x.t().contiguous().t()}, False),
    "gate_factor_by_rank": ({"gate_factor": lambda x: x.t().contiguous().t()}, False),
    "rows_of_odd_bytes": ({"up": padded_rows}, False),
    "one_row_for_all": ({"gate": lambda x: x[:1].expand_as(x)}, False),
    "strided_bias": ({"up_bias": lambda x: torch.stack((x, x), 1)[:, 0]}, False),
    "float32": (dict.fromkeys(("up", "up_factor", "up_bias", "gate", "gate_factor", "gate_bias",
                               "down_factor"), lambda x: x.float()), False),
}  # fmt: skip


@pytest.mark.parametrize("block_rows", [20, 64])
@pytest.mark.parametrize("spelling", RESPELLED)
def test_who_lifts(spelling, block_rows, monkeypatch):
    """What the kernel cannot read libraries lift, in blocks as in one; the result is the same."""
    names = ("up", "up_factor", "up_bias", "gate", "gate_factor", "gate_bias")
    given = dict(zip(names, operands(41, 72, 16, 24, torch.float16), strict=True))
    given["down_factor"] = (torch.randn(40, 72, device=DEVICE) / 8).half()
    change, is_taken = RESPELLED[spelling]
    given |= {name: respell(given[name]) for name, respell in change.items()}
    launched = []
    monkeypatch.setattr(
        lifted_activation, "launch", lambda *a, **k: (launched.append(a), launch(*a, **k))
    )
    of = FeedForwardOperands(**given, activation="silu")
    assert are_lifted_at_once(of) == is_taken
    got = row_blocks_feed_forward(of, block_rows=block_rows, tile=TILE)
    assert bool(launched) == is_taken
    exact = unfused_feed_forward(
        FeedForwardOperands(**{n: x.double() for n, x in given.items()}, activation="silu")
    )
    assert_as_exact_as_eager(got, unfused_feed_forward(of), exact)
    if is_taken:
        one = one_block_feed_forward(of, TILE)
        assert_as_exact_as_eager(one, unfused_feed_forward(of), exact)


def test_where_libraries_lift():
    """Beyond the ranks that it was measured at, and where the kernel could not store at once."""
    case = {"width": 3072, "element_bytes": 2, "generation": "sm_90", "sram_bytes": 227 * 1024}
    assert default_tile([384, 1024], **case) == DEFAULT_TILE
    assert default_tile([384, 1025], **case) is None
    for change in (
        {"width": 3080}, {"element_bytes": 4}, {"generation": "sm_80"}, {"sram_bytes": 96 * 1024},
    ):  # fmt: skip
        assert default_tile([384], **case | change) is None
