"""The feed-forward streamed from x to y: against float64, on awkward sizes, and what it refuses."""

import pytest
import torch
from flashsvd_compile.kernels.activations import ACTIVATIONS
from flashsvd_compile.kernels.feed_forward_whole import streamed_whole_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_reference import unfused_whole_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeTile
from flashsvd_compile.kernels.primitives import INTERPRETED

from tests.rounding import assert_as_exact_as_eager

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SMALL_TILE = WholeTile(16, 32, 4, 2, block_k=16, block_o=16)
GATES = ["none", "latent", "x", "own"]

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED and DEVICE == "cpu", reason="needs Triton's interpreter or a CUDA device"
)


def random_operands(
    rows, rank_up, rank_down, dtype=torch.float32, *, gate="none", rank_gate=11, hidden=24,
    intermediate=45, out=19, biases=True,
):  # fmt: skip
    """Fresh operands whose values stay of order 1."""

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=DEVICE) * scale).to(dtype)

    def factor(outputs, inputs):
        return normal(outputs, inputs, scale=inputs**-0.5)

    operands = {
        "x": normal(rows, hidden),
        "up_u": factor(rank_up, hidden),
        "up_v": factor(intermediate, rank_up),
        "down_u": factor(rank_down, intermediate),
        "down_v": factor(out, rank_down),
    }
    if gate == "latent":
        operands["gate_v"] = factor(intermediate, rank_up)
    elif gate != "none":
        gate_hidden = hidden if gate == "x" else hidden + 9
        operands["gate_u"] = factor(rank_gate, gate_hidden)
        operands["gate_v"] = factor(intermediate, rank_gate)
        if gate == "own":
            operands["gate_x"] = normal(rows, gate_hidden)
    if biases:
        sizes = {"up_latent_bias": rank_up, "up_bias": intermediate, "down_latent_bias": rank_down}
        sizes["down_bias"] = out
        if gate != "none":
            sizes["gate_bias"] = intermediate
        if gate in ("x", "own"):
            sizes["gate_latent_bias"] = rank_gate
        operands |= {name: normal(size) for name, size in sizes.items()}
    return operands


def assert_right(operands, activation="gelu", tile=SMALL_TILE):
    of = WholeFeedForwardOperands(**operands, activation=activation)
    out = of.x.new_full((of.rows, of.out_size), float("nan"))
    assert streamed_whole_feed_forward(of, out=out, tile=tile) is out
    double = {name: operand.double() for name, operand in operands.items()}
    assert_as_exact_as_eager(
        out,
        eager=unfused_whole_feed_forward(of),
        exact=unfused_whole_feed_forward(WholeFeedForwardOperands(**double, activation=activation)),
        bias=of.down_bias,
    )


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_against_float64(gate, dtype):
    assert_right(random_operands(20, 8, 15, dtype, gate=gate), "silu")


@needs_interpreter
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    assert_right(random_operands(17, 8, 8, torch.float16, gate="x"), activation)


@needs_interpreter
@pytest.mark.parametrize(
    ("rows", "rank_up", "rank_down", "sizes"),
    [
        pytest.param(1, 1, 1, {"hidden": 1, "intermediate": 1, "out": 1}, id="ones"),
        pytest.param(16, 16, 16, {"hidden": 32, "intermediate": 64, "out": 32}, id="whole tiles"),
        pytest.param(33, 17, 31, {"hidden": 17, "intermediate": 65, "out": 33}, id="one over"),
        pytest.param(3, 240, 256, {"hidden": 30, "intermediate": 33, "out": 30}, id="bert's rank"),
        pytest.param(0, 8, 8, {}, id="no rows"),
    ],
)
@pytest.mark.parametrize("gate", ["none", "x"])
def test_sizes(rows, rank_up, rank_down, sizes, gate):
    assert_right(random_operands(rows, rank_up, rank_down, gate=gate, **sizes))


@needs_interpreter
@pytest.mark.parametrize(
    "absent",
    ["up_latent_bias", "up_bias", "gate_latent_bias", "gate_bias", "down_latent_bias", "down_bias"],
)
def test_each_bias_may_be_absent(absent):
    operands = random_operands(18, 8, 8, gate="own")
    del operands[absent]
    assert_right(operands)


@needs_interpreter
def test_without_biases():
    assert_right(random_operands(18, 8, 8, biases=False))


@needs_interpreter
@pytest.mark.parametrize("gate", ["x", "own"])
def test_any_strides(gate):
    operands = random_operands(18, 8, 12, gate=gate)
    for name, operand in operands.items():
        columns_first = operand.t().contiguous().t() if operand.dim() == 2 else operand
        operands[name] = columns_first.repeat_interleave(2, dim=0)[::2]
        assert not operands[name].is_contiguous()
    operands["x"] = operands["x"][:1].expand(18, -1)
    assert_right(operands)


@pytest.mark.parametrize("gate", GATES)
def test_reference_is_differentiable(gate):
    operands = random_operands(4, 3, 2, torch.float64, gate=gate, hidden=5, intermediate=6, out=4)
    names = list(operands)

    def function(*values):
        given = dict(zip(names, values, strict=True))
        return unfused_whole_feed_forward(WholeFeedForwardOperands(**given, activation="gelu"))

    assert torch.autograd.gradcheck(function, [o.requires_grad_() for o in operands.values()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "swish"}, "unknown activation 'swish'"),
        ({"gate_u": None}, "gate_x needs gate_u"),
        ({"gate_v": None}, "gate_u needs gate_v"),
        ({"x": torch.zeros(2, 5, 4)}, r"x must be 2-D, is \[2, 5, 4\]"),
        ({"up_u": torch.zeros(8, 23)}, r"up_u must be \[8, 24\] .* is \[8, 23\]"),
        ({"up_v": torch.zeros(45, 9)}, r"up_v must be \[45, 8\] .* is \[45, 9\]"),
        ({"gate_x": torch.zeros(6, 33)}, r"gate_x must be \[5, 33\] .* is \[6, 33\]"),
        ({"gate_bias": torch.zeros(1)}, r"gate_bias must be \[45\] .* is \[1\]"),
        ({"down_u": torch.zeros(9, 44)}, r"down_u must be \[9, 45\] .* is \[9, 44\]"),
        ({"down_v": torch.zeros(19, 8)}, r"down_v must be \[19, 9\] .* is \[19, 8\]"),
        ({"down_bias": torch.zeros(19).half()}, "down_bias is torch.float16"),
        ({"x": torch.zeros(5, 24, dtype=torch.int32)}, "x is torch.int32"),
    ],
)
def test_refuses(changes, message):
    operands = {
        name: operand.cpu() for name, operand in random_operands(5, 8, 9, gate="own").items()
    }
    with pytest.raises(ValueError, match=message):
        WholeFeedForwardOperands(**(operands | {"activation": "gelu"} | changes))


def test_refuses_an_unfit_out():
    of = WholeFeedForwardOperands(**random_operands(5, 8, 9), activation="gelu")
    with pytest.raises(ValueError, match=r"out must be \[5, 19\]"):
        streamed_whole_feed_forward(of, out=torch.empty(5, 3, device=DEVICE))
    with pytest.raises(ValueError, match="out must be contiguous"):
        streamed_whole_feed_forward(of, out=torch.empty(19, 5, device=DEVICE).t())


def test_says_what_does_not_fit():
    of = WholeFeedForwardOperands(**random_operands(5, 8, 257), activation="gelu")
    with pytest.raises(ValueError, match=r"no tile .* up 8, gate None, down 257"):
        streamed_whole_feed_forward(of)


def test_refuses_float64():
    of = WholeFeedForwardOperands(**random_operands(5, 8, 9, torch.float64), activation="gelu")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        streamed_whole_feed_forward(of)
