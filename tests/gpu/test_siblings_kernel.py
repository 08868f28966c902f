"""Sibling linears compiled for a GPU: real tiles, real roundings, and the route under Inductor."""

import pytest
import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.siblings import sibling_linears
from flashsvd_compile.kernels.siblings_operands import SiblingOperands, separate_linears
from flashsvd_compile.kernels.siblings_tiles import TILES, TILES_32_BIT, TILES_FEW_ROWS
from torch import nn
from torch._inductor.utils import run_and_get_code

import flashsvd_compile as fsc
from tests.rounding import assert_as_exact_as_eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def _poisoned():
    """Memory that torch hands out is full of NaN."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def operands(rows, features, widths, dtype, biased=(), transposed=()):
    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    weights = [
        normal(features, width, scale=features**-0.5).t()
        if index in transposed
        else normal(width, features, scale=features**-0.5)
        for index, width in enumerate(widths)
    ]
    biases = [normal(width) if index in biased else None for index, width in enumerate(widths)]
    return SiblingOperands(normal(rows, features), tuple(weights), tuple(biases))


def assert_right(of, slack=None, **how):
    biases = tuple(None if b is None else b.double() for b in of.biases)
    doubled = SiblingOperands(of.x.double(), tuple(w.double() for w in of.weights), biases)
    outs = sibling_linears(of, **how)
    expected = zip(separate_linears(of), separate_linears(doubled), of.biases, strict=True)
    for out, (eager, exact, bias) in zip(outs, expected, strict=True):
        assert_as_exact_as_eager(out, eager, exact, bias=bias, longest=of.in_features, slack=slack)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("transposed", [(), (0, 1, 2), (1,)], ids=["", "transposed", "mixed"])
@pytest.mark.parametrize("tile", [*TILES, *TILES_FEW_ROWS], ids=str)
def test_every_tile(tile, transposed, dtype):
    assert_right(operands(331, 200, (100, 37, 256), dtype, (1,), transposed), tile=tile)


@pytest.mark.parametrize("tile", TILES_32_BIT, ids=str)
def test_every_exact_tile(tile):
    assert_right(operands(331, 200, (100, 37, 256), torch.float32, (0, 2)), tile=tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 257, 4097])
@pytest.mark.parametrize(
    ("features", "widths"),
    [
        (768, (480,) * 3),
        (4096, (1490, 1490)),
        (333, (1, 40, 129, 8, 64, 17, 31, 250)),
        (64, (100,)),
    ],
    ids=str,
)
def test_sizes(features, widths, rows, dtype):
    assert_right(operands(rows, features, widths, dtype, biased=(0,)))


def test_any_strides():
    of = operands(200, 96, (40, 33), torch.float16, biased=(0, 1))
    spread = SiblingOperands(
        of.x.repeat_interleave(2, dim=1)[:, ::2],
        (of.weights[0].repeat_interleave(3, dim=1)[:, ::3], of.weights[1][::2]),
        (of.biases[0].repeat_interleave(2)[::2], of.biases[1][::2]),
    )
    assert_right(spread)


def test_tf32_when_allowed(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", True)
    # Triton leaves the rounding to tf32 to the tensor cores, which cut; cuBLAS rounds to nearest.
    assert_right(operands(200, 96, (40, 33), torch.float32), slack=4)


def test_offsets_beyond_int32():
    """More than 2³¹ elements in x, in an output and, by its strides, in a weight."""
    rows, features, width = 2**25 + 5, 64, 64
    few = operands(1, features, (width, 3), torch.bfloat16)
    x = torch.randn(rows, features, device="cuda", dtype=torch.bfloat16)
    far_apart = torch.empty(2 * 2**31 + features, device="cuda", dtype=torch.bfloat16)
    weight = far_apart.as_strided((3, features), (2**31, 1)).copy_(few.weights[1])
    outs = sibling_linears(SiblingOperands(x, (few.weights[0], weight), (None, None)))
    for part in (slice(0, 70), slice(2**24, 2**24 + 70), slice(rows - 70, rows)):
        for out, w in zip(outs, (few.weights[0], weight), strict=True):
            exact = F.linear(x[part].double(), w.double())
            eager = F.linear(x[part], w.contiguous()).double()  # cuBLAS counts strides in 32 bits
            budget = 1.1 * (eager - exact).norm() + 2**-7 * exact.norm()
            assert (out[part] - exact).norm() <= budget


class Projections(nn.Module):
    """Per-head factors as the package makes them, and two plain ones."""

    def __init__(self) -> None:
        super().__init__()
        self.by_head = nn.Parameter(torch.randn(4, 10, 256) / 16)
        self.inputs_first = nn.Parameter(torch.randn(256, 4, 10) / 16)
        self.plain = nn.Linear(256, 72)

    def forward(self, x):
        first = F.linear(x, self.by_head.flatten(0, 1))
        return first.sin(), self.plain(x).cos(), torch.einsum("bmd,dhr->bhmr", x, self.inputs_first)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_inductor(dtype, training):
    """Weights that lie alike share a launch that Inductor writes itself; nothing is copied."""
    model = Projections().cuda().to(dtype)
    x = torch.randn(3, 77, 256, device="cuda", dtype=dtype)
    options = {"siblings": "merged"}
    told = [s for s in fsc.explain(model, x, options=options).sites if s.kind == "siblings"]
    assert [s.lowering for s in told] == ["merged", None]
    compiled = torch.compile(model, backend="flashsvd", options=options)
    exact = Projections().cuda().double()
    exact.load_state_dict(model.state_dict())

    def run(of, forward, x):
        of.zero_grad()
        with torch.set_grad_enabled(training):
            outs = forward(x)
            if training:
                sum(out.float().square().sum() for out in outs).backward()
        return [*outs, *(p.grad.clone() for p in of.parameters() if training)]

    got, code = run_and_get_code(lambda: run(model, compiled, x))
    assert "sibling_linears_kernel" in code[0]
    assert "torch.ops.flashsvd" not in code[0]
    truth = run(exact, exact, x.double())
    for have, want, true in zip(got, run(model, model, x), truth, strict=True):
        budget = 1.5 * (want - true).norm() + 4 * torch.finfo(dtype).eps * true.norm()
        assert (have - true).norm() <= budget


def test_one_graph_serves_many_sizes():
    model = Projections().cuda().bfloat16()
    torch._dynamo.utils.counters.clear()
    options = {"siblings": "merged", "shape_padding": False}
    compiled = torch.compile(model, backend="flashsvd", options=options, dynamic=True)
    with torch.no_grad():
        for batch, rows in ((2, 64), (3, 129), (5, 17), (4, 300)):
            x = torch.randn(batch, rows, 256, device="cuda", dtype=torch.bfloat16)
            for have, want in zip(compiled(x), model(x), strict=True):
                torch.testing.assert_close(have, want, rtol=0.05, atol=0.05)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_attention_reads_the_latents_of_one_launch_inside_cuda_graphs():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Linear(256, 64, bias=False), nn.Linear(64, 256)) for _ in "qkv"
            )

        def forward(self, x):
            heads = [m(x).unflatten(-1, (4, 64)).transpose(1, 2) for m in self.layers]
            return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    model = Block().cuda().bfloat16()
    options = {"siblings": "merged", "attention": "rank_space", "triton.cudagraphs": True}
    with torch.no_grad():
        x = torch.randn(2, 100, 256, device="cuda", dtype=torch.bfloat16)
        told = {(s.kind, s.lowering) for s in fsc.explain(model, x, options=options).sites}
        assert {("siblings", "merged"), ("attention", "rank_space")} <= told
        compiled = torch.compile(model, backend="flashsvd", options=options)
        for _ in range(3):  # CUDA graphs record on the second call and replay on the third
            x = torch.randn(2, 100, 256, device="cuda", dtype=torch.bfloat16)
            torch.testing.assert_close(compiled(x), model(x), rtol=0.05, atol=0.02)
