"""Feed-forwards streamed whole and chains, compiled for a GPU: tiles, roundings, addresses."""

import copy
import re

import pytest
import torch
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.chain import chain_kernel, streamed_chain
from flashsvd_compile.kernels.chain_operands import ChainOperands, unfused_chain
from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.kernels.chain_tiles import sram_bytes_of as chain_sram_bytes_of
from flashsvd_compile.kernels.devices import generation_of
from flashsvd_compile.kernels.feed_forward_whole import (
    streamed_whole_feed_forward,
    whole_feed_forward_kernel,
)
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_reference import unfused_whole_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_tiles import (
    TILES_NARROW,
    TILES_WIDE,
    WholeExtents,
    WholeTile,
    sram_bytes_of,
)
from torch import nn
from torch._inductor.utils import run_and_get_code

from flashsvd_compile import explain
from tests.rounding import assert_as_exact_as_eager, longest_sum
from tests.spelled import NormReaders

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DEVICE = torch.device("cuda:0")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GATES = ["none", "latent", "x", "own"]


def normal(*shape, dtype, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def factor(outputs, inputs, dtype):
    return normal(outputs, inputs, dtype=dtype, scale=inputs**-0.5)


def whole_operands(
    rows, rank_up, rank_down, dtype, *, gate="none", rank_gate=48, hidden=200, intermediate=333,
    out=210, biases=True,
):  # fmt: skip
    operands = {
        "x": normal(rows, hidden, dtype=dtype),
        "up_u": factor(rank_up, hidden, dtype),
        "up_v": factor(intermediate, rank_up, dtype),
        "down_u": factor(rank_down, intermediate, dtype),
        "down_v": factor(out, rank_down, dtype),
    }
    sizes = {"up_latent_bias": rank_up, "up_bias": intermediate, "down_latent_bias": rank_down}
    sizes["down_bias"] = out
    if gate != "none":
        operands["gate_v"] = factor(intermediate, rank_up if gate == "latent" else rank_gate, dtype)
        sizes["gate_bias"] = intermediate
    if gate in ("x", "own"):
        gate_hidden = hidden if gate == "x" else hidden + 24
        operands["gate_u"] = factor(rank_gate, gate_hidden, dtype)
        sizes["gate_latent_bias"] = rank_gate
        if gate == "own":
            operands["gate_x"] = normal(rows, gate_hidden, dtype=dtype)
    if biases:
        operands |= {name: normal(size, dtype=dtype) for name, size in sizes.items()}
    return operands


def chain_operands(rows, hidden, rank, out, dtype, biases=True):
    operands = {
        "x": normal(rows, hidden, dtype=dtype),
        "u": factor(rank, hidden, dtype),
        "v": factor(out, rank, dtype),
    }
    if biases:
        operands |= {"latent_bias": normal(rank, dtype=dtype), "bias": normal(out, dtype=dtype)}
    return operands


def assert_right(launch, plain, record, operands, slack=None, **how):
    of = record(**operands)
    out = of.x.new_full((of.rows, of.out_size), float("nan"))
    assert launch(of, out=out, **how) is out
    assert_as_exact_as_eager(
        out,
        eager=plain(of),
        exact=plain(record(**{name: double(operand) for name, operand in operands.items()})),
        bias=operands.get("down_bias", operands.get("bias")),
        longest=longest_sum(operands),
        slack=slack,
    )


def double(operand):
    return operand.double() if isinstance(operand, torch.Tensor) else operand


def assert_whole_is_right(operands, activation="gelu", **how):
    assert_right(
        streamed_whole_feed_forward, unfused_whole_feed_forward, WholeFeedForwardOperands,
        {**operands, "activation": activation}, **how,
    )  # fmt: skip


def assert_chain_is_right(operands, **how):
    assert_right(streamed_chain, unfused_chain, ChainOperands, operands, **how)


# ---- feed-forwards ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_gates(activation, gate, dtype):
    assert_whole_is_right(whole_operands(300, 64, 48, dtype, gate=gate), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    assert_whole_is_right(whole_operands(130, 32, 48, torch.bfloat16, gate="x"), activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("rank_up", "rank_down"),
    [(16, 16), (15, 16), (16, 37), (37, 96), (40, 40), (64, 64), (128, 240), (240, 240), (256, 64)],
)
def test_ranks(rank_up, rank_down, dtype):
    assert_whole_is_right(whole_operands(193, rank_up, rank_down, dtype))


@pytest.mark.parametrize("gate", ["none", "x"])
def test_bert_sizes(gate):
    sizes = {"hidden": 768, "intermediate": 3072, "out": 768}
    operands = whole_operands(1000, 64, 64, torch.bfloat16, gate=gate, rank_gate=64, **sizes)
    assert_whole_is_right(operands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", sorted({*TILES_NARROW, *TILES_WIDE}, key=str), ids=str)
def test_every_default_tile(tile, dtype):
    """With ragged rows and sizes."""
    assert_whole_is_right(whole_operands(331, 60, 50, dtype, gate="x"), "silu", tile=tile)


@pytest.mark.parametrize("rows", [0, 1, 63, 4097])
def test_row_counts(rows):
    assert_whole_is_right(whole_operands(rows, 64, 64, torch.bfloat16))


@pytest.mark.parametrize("gate", ["none", "x"])
def test_without_biases(gate):
    assert_whole_is_right(whole_operands(129, 64, 64, torch.bfloat16, gate=gate, biases=False))


@pytest.mark.parametrize("gate", ["none", "own"])
def test_any_strides(gate):
    operands = whole_operands(200, 64, 48, torch.float16, gate=gate)
    for name, operand in operands.items():
        if operand.dim() == 2:
            operands[name] = operand.t().contiguous().t()
        else:
            operands[name] = operand.repeat_interleave(3)[::3]
    assert_whole_is_right(operands)


def test_offsets_beyond_int32():
    """More than 2³¹ elements in x and in y."""
    rows, hidden = 2**25 + 5, 64
    operands = whole_operands(1, 16, 16, torch.bfloat16, hidden=hidden, intermediate=32, out=hidden)
    operands["x"] = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    assert (rows - 1) * hidden > 2**31
    out = operands["x"].new_full((rows, hidden), float("nan"))
    of = WholeFeedForwardOperands(**operands, activation="relu")
    streamed_whole_feed_forward(of, out=out)
    for part in (slice(0, 70), slice(2**24, 2**24 + 70), slice(rows - 70, rows)):
        few = {**operands, "x": operands["x"][part].clone()}
        exact = unfused_whole_feed_forward(
            WholeFeedForwardOperands(**{k: v.double() for k, v in few.items()}, activation="relu")
        )
        assert (out[part] - exact).norm() <= 2**-6 * exact.norm()
    assert not out.isnan().any()


# ---- chains -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300, 5000])
@pytest.mark.parametrize("rank", [1, 40, 64, 240])
def test_chains(rank, rows, dtype):
    assert_chain_is_right(chain_operands(rows, 768, rank, 770, dtype))


@pytest.mark.parametrize("columns", [64, 128, 192, 768])
def test_shares_of_columns(columns):
    tile = ChainTile(16, 64, 4, 3, block_k=128, columns=columns)
    assert_chain_is_right(chain_operands(37, 520, 64, 700, torch.bfloat16), tile=tile)


def test_a_chain_of_any_strides():
    operands = chain_operands(200, 96, 24, 130, torch.float16)
    for name, operand in operands.items():
        if operand.dim() == 2:
            operands[name] = operand.t().contiguous().t()
    assert_chain_is_right(operands)


# ---- shared memory ------------------------------------------------------------------------------


def newly_compiled(kernel, call) -> list[int]:
    """Shared memory of each kernel that ``call`` makes Triton compile."""
    cache = kernel.device_caches[torch.cuda.current_device()][0]
    cache.clear()
    call()
    return [compiled.metadata.shared for compiled in cache.values()]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    "tile",
    [WholeTile(64, 32, 4, 3), WholeTile(16, 16, 4, 1, block_k=16, block_o=16)],
    ids=str,
)
def test_shared_memory_of_a_feed_forward_is_foreseen(tile, gate):
    operands = whole_operands(64, 37, 64, torch.bfloat16, gate=gate, rank_gate=48)
    of = WholeFeedForwardOperands(**operands, activation="relu")
    extents = WholeExtents(
        37,
        of.rank_gate,
        64,
        of.intermediate_size,
        of.gate_from,
        2,
        generation_of(DEVICE),
    )  # fmt: skip
    compiled = newly_compiled(
        whole_feed_forward_kernel, lambda: streamed_whole_feed_forward(of, tile=tile)
    )
    assert compiled
    assert max(compiled) <= sram_bytes_of(tile, extents)


@pytest.mark.parametrize("rank", [16, 64, 240])
@pytest.mark.parametrize("tile", [ChainTile(64, 64, 4, 3), ChainTile(16, 64, 4, 2)], ids=str)
def test_shared_memory_of_a_chain_is_foreseen(tile, rank):
    of = ChainOperands(**chain_operands(64, 300, rank, 200, torch.bfloat16))
    compiled = newly_compiled(chain_kernel, lambda: streamed_chain(of, tile=tile))
    assert compiled
    assert max(compiled) <= chain_sram_bytes_of(
        tile, rank=rank, element_bytes=2, generation=generation_of(DEVICE)
    )


# ---- the public door ----------------------------------------------------------------------------


def low_rank(inputs: int, outputs: int, rank: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs))


class Layer(nn.Module):
    """A feed-forward, gated or not, on a residual stream, then a chain."""

    def __init__(self, gated: bool) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(192), low_rank(192, 100, 40)
        self.up, self.down = low_rank(192, 520, 48), low_rank(520, 192, 40)
        self.gate = low_rank(192, 520, 48) if gated else None

    def forward(self, x):
        normed = self.norm(x)
        hidden = self.up(normed)
        if self.gate is None:
            hidden = nn.functional.gelu(hidden)
        else:
            hidden = nn.functional.silu(self.gate(normed)) * hidden
        return self.last(self.norm(x + self.down(hidden)))


FORCED = {"feed_forward": "streamed_whole", "chain": "streamed"}
ROUTE = [("feed_forward", "streamed_whole"), ("chain", "streamed")]


def assert_as_good_as_eager(model, compiled, x):
    exact = copy.deepcopy(model).double()(x.double())
    eager, ours = model(x), compiled(x)
    budget = 1.1 * (eager - exact).norm() + 4 * torch.finfo(x.dtype).eps * exact.norm()
    assert (ours - exact).norm() <= budget


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_layer_is_right_in_every_dtype(dtype, gated):
    torch._dynamo.reset()
    model = Layer(gated).cuda().to(dtype)
    x = normal(3, 77, 192, dtype=dtype)
    assert [(s.kind, s.lowering) for s in explain(model, x, options=FORCED).sites] == ROUTE
    compiled = torch.compile(model, backend="flashsvd", options={**FORCED, "compiler": "eager"})
    assert_as_good_as_eager(model, compiled, x)


@torch.no_grad()
def test_a_layer_under_inductor_serves_many_lengths_from_one_graph():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Layer(gated=True).cuda().bfloat16()
    options = {**FORCED, "shape_padding": False}
    compiled = torch.compile(model, backend="flashsvd", options=options, dynamic=True)
    for batch, length in ((2, 64), (3, 129), (5, 17)):
        assert_as_good_as_eager(model, compiled, normal(batch, length, 192, dtype=torch.bfloat16))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_inductor_writes_the_launches_itself():
    torch._dynamo.reset()
    model = Layer(gated=False).cuda().bfloat16()
    x = normal(2, 64, 192, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="flashsvd", options=FORCED)
    _, (code,) = run_and_get_code(lambda: compiled(x))
    assert "whole_feed_forward_kernel" in code
    assert "chain_kernel" in code
    assert "torch.ops.flashsvd" not in code


@pytest.mark.parametrize(("count", "library"), [(1, 0), (2, 0), (1, 1)])
@torch.no_grad()
def test_what_launches_read_is_written_once(count, library):
    """However many arguments it is, or stands in for: absent biases and gates are arguments too."""
    torch._dynamo.reset()
    model = NormReaders(count, library).cuda().bfloat16()
    x = normal(4, 300, 32, dtype=torch.bfloat16)
    compiled = torch.compile(model, backend="flashsvd", options=FORCED)
    results, (code,) = run_and_get_code(lambda: compiled(x))
    assert code.count("whole_feed_forward_kernel_0.run(") == count
    assert re.findall(r"native_layer_norm.*?'num_store': (\d+)", code) == ["1"]
    for result, expected in zip(results, model(x), strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_gradients(gated):
    torch._dynamo.reset()
    model = Layer(gated).cuda()
    x = normal(2, 33, 192, dtype=torch.float32)
    compiled = torch.compile(model, backend="flashsvd", options=FORCED)
    compiled(x).square().mean().backward()
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(x).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)
