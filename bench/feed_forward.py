"""Low-rank feed-forward: streamed and in blocks of rows, beside what torch does unaided.

    python -m bench.feed_forward --device cuda
    python -m bench.feed_forward --device cpu
    python -m bench.feed_forward --device cuda --shapes crossover
    python -m bench.feed_forward --device cuda --shapes whole

Each shape is timed in one run, contestants interleaved; before that every low-rank contestant must
be as close to float64 as the unfused eager expression is. A shape of kind `latent` goes from
latents to latent; a `chain` also has the outer factors, hidden size in and out: there
`streamed_whole` takes them in, the others leave them to library matmuls. `dense` is the pair
(triple when gated) of full-width linears of the same hidden and intermediate size, compiled; it
computes another function and passes no gate. Gate and up have latents of their own. Results go to
``bench/results``.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels import lifted_activation_tiles
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.feed_forward_blocks import row_blocks_feed_forward
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.feed_forward_tiles import default_tile
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

from bench.contest import contest
from bench.measure import write_results
from bench.targets import Target
from bench.work import Work

GATE_ROWS = 256


@dataclass(frozen=True)
class Shape:
    name: str
    kind: str  # "latent" or "chain"
    rows: int
    hidden_size: int
    intermediate_size: int
    rank: int
    activation: str = "gelu"
    gated: bool = False
    dtype: str = "bfloat16"
    bias: bool = True
    block_rows: int | None = None  # of the row blocks; None takes the default


def _bert(rank: int) -> Shape:
    return Shape(f"bert r{rank}", "latent", 65536, 768, 3072, rank)


def _swiglu(rows: int, hidden_size: int, intermediate_size: int, rank: int) -> Shape:
    return Shape(
        f"swiglu r{rank}", "latent", rows, hidden_size, intermediate_size, rank, "silu", True,
        bias=False,
    )  # fmt: skip


def _over_inductor(ours: str, speedup: float, bytes_share: float) -> Target:
    return Target(ours, ("unfused Inductor",), speedup, bytes_share)


# By name of a shape. A share of 0.03 and 0.2: what streaming and row blocks leave of the bytes.
TARGETS: dict[str, list[Target]] = {
    "bert r64": [_over_inductor("streamed", 1.7, 0.03)],
    "bert r128": [_over_inductor("streamed", 1.5, 0.03)],
    "bert r240": [_over_inductor("streamed", 1.2, 0.03)],
    "bert r256": [_over_inductor("streamed", 1.2, 0.03)],
    "swiglu r96": [_over_inductor("streamed", 1.8, 0.03)],
    "swiglu r384": [_over_inductor("row_blocks", 1.15, 0.03)],
    "chain r64": [_over_inductor("streamed_whole", 1.2, 0.03)],
    "swiglu r1024": [_over_inductor("row_blocks", 1.0, 0.2)],
    "swiglu r1490": [_over_inductor("row_blocks", 1.0, 0.2)],
}

SHAPES: dict[str, dict[str, list[Shape]]] = {
    "cuda": {
        "main": [
            *(_bert(rank) for rank in (64, 128, 240, 256)),
            *(_swiglu(16384, 768, 3072, rank) for rank in (96, 384)),
            _swiglu(32768, 4096, 11008, 1024),
            _swiglu(16384, 4096, 14336, 1490),
            Shape("chain r64", "chain", 16384, 768, 3072, 64),
        ],
        "blocks": [
            replace(shape, name=f"{shape.name} {block_rows} rows a block", block_rows=block_rows)
            for shape in (
                _swiglu(16384, 768, 3072, 384),
                replace(_bert(384), rows=16384),
                _swiglu(32768, 4096, 11008, 1024),
            )
            for block_rows in (2112, 4224, 8448, 16896)
        ],
        "whole": [
            Shape(f"chain {act} r{rank} {rows} rows", "chain", rows, 768, 3072, rank, act, gated)
            for act, gated in (("gelu", False), ("silu", True))
            for rank in (32, 64, 96, 128, 240)
            for rows in (256, 4096, 16384, 65536)
        ],
        "crossover": [
            Shape(f"{act} r{rank}", "latent", 65536, 768, 3072, rank, act, gated, bias=not gated)
            for act, gated in (("gelu", False), ("silu", True))
            for rank in (32, 96, 192, 256)
        ],
    },
    "cpu": {
        "main": [
            Shape(f"bert r64 {kind}", kind, 4096, 768, 3072, 64, dtype="float32", bias=bias)
            for kind in ("chain", "latent")
            for bias in (False, True)
        ],
        "blocks": [
            Shape(
                f"r{rank} {block_rows} rows a block",
                "latent",
                4096,
                768,
                width,
                rank,
                dtype="float32",
                block_rows=block_rows,
            )
            for width, rank in ((3072, 64), (1536, 153))
            for block_rows in (128, 256, 512, 1024)
        ],
        "crossover": [
            Shape(f"{rows} rows r{rank}", "latent", rows, 768, width, rank, dtype="float32")
            for width, rank in ((3072, 64), (1536, 153))
            for rows in (256, 512, 1024, 2048, 4096)
        ],
    },
}


@dataclass(frozen=True)
class Problem:
    """Inputs of one shape, its weights, and the contestants as functions of the inputs."""

    inputs: tuple[Tensor, ...]
    weights: dict[str, Tensor]
    contestants: dict[str, Callable[..., Tensor]]
    exact: Callable[..., Tensor]


def build(shape: Shape, device: str) -> Problem:
    """Fresh random operands: latents (up, and gate), or what a chain's own factors read."""
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    rank, width, hidden = shape.rank, shape.intermediate_size, shape.hidden_size
    latents = ("up", "gate") if shape.gated else ("up",)
    core = {
        **{f"{name}_factor": normal(width, rank, scale=rank**-0.5) for name in latents},
        "down_factor": normal(rank, width, scale=width**-0.5),
    }
    if shape.bias:
        core |= {"up_bias": normal(width), "down_bias": normal(rank)}
    outer: dict[str, Tensor] = {}
    if shape.kind == "chain":
        outer = {name: normal(rank, hidden, scale=hidden**-0.5) for name in latents}
        outer["last"] = normal(hidden, rank, scale=rank**-0.5)

    def through(run: Callable[..., Tensor], *inputs: Tensor, exact: bool = False) -> Tensor:
        inner, around = (
            {name: weight.double() if exact else weight for name, weight in weights.items()}
            for weights in (core, outer)
        )
        if around:
            inputs = tuple(F.linear(inputs[0], around[name]) for name in latents)
        operands = dict(zip(latents, inputs, strict=True)) | inner
        out = run(FeedForwardOperands(**operands, activation=shape.activation))
        return F.linear(out, around["last"]) if around else out

    eager = partial(through, unfused_feed_forward)
    row_blocks = partial(
        row_blocks_feed_forward, block_rows=shape.block_rows, tile=_lift_tile(shape, device)
    )
    contestants: dict[str, Callable[..., Tensor]] = {
        "row_blocks": partial(through, row_blocks),
        "unfused eager": eager,
        "unfused Inductor": torch.compile(eager, dynamic=False),
        "dense Inductor": torch.compile(_dense(shape, normal), dynamic=False),
    }
    if device == "cuda":
        from flashsvd_compile.kernels.feed_forward import streamed_feed_forward

        tile = tile_of(shape)
        if tile is not None:
            streamed = partial(through, partial(streamed_feed_forward, tile=tile))
            contestants = {"streamed": streamed, **contestants}
        if outer:
            whole = partial(_whole, shape, core, outer)
            contestants = {"streamed_whole": whole, **contestants}
    inputs = (
        (normal(shape.rows, hidden),) if outer else tuple(normal(shape.rows, rank) for _ in latents)
    )
    return Problem(inputs, core | outer, contestants, partial(eager, exact=True))


def _lift_tile(shape: Shape, device: str) -> TileConfig | None:
    """Of the kernel that lifts row blocks, as the planner takes it."""
    if device != "cuda":
        return None
    return lifted_activation_tiles.default_tile(
        [shape.rank],
        width=shape.intermediate_size,
        element_bytes=getattr(torch, shape.dtype).itemsize,
        generation=generation_of(torch.device("cuda")),
        sram_bytes=sram_bytes_of_device(torch.device("cuda"), 0),
    )


def _whole(shape: Shape, core: dict[str, Tensor], outer: dict[str, Tensor], x: Tensor) -> Tensor:
    from flashsvd_compile.kernels.feed_forward_whole import streamed_whole_feed_forward

    gate = {"gate_u": outer["gate"], "gate_v": core["gate_factor"]} if shape.gated else {}
    of = WholeFeedForwardOperands(
        x, outer["up"], core["up_factor"], core["down_factor"], outer["last"],
        activation=shape.activation, up_bias=core.get("up_bias"),
        down_latent_bias=core.get("down_bias"), **gate,
    )  # fmt: skip
    return streamed_whole_feed_forward(of)


def tile_of(shape: Shape) -> TileConfig | None:
    return default_tile(
        rank_up=shape.rank,
        rank_gate=shape.rank if shape.gated else None,
        rank_down=shape.rank,
        intermediate_size=shape.intermediate_size,
        element_bytes=getattr(torch, shape.dtype).itemsize,
        sram_bytes=sram_bytes_of_device(torch.device("cuda"), 0),
        generation=generation_of(torch.device("cuda")),
    )


def _dense(shape: Shape, normal: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    dense_input = normal(shape.rows, hidden)
    operands = {
        "up_factor": normal(width, hidden, scale=hidden**-0.5),
        "down_factor": normal(hidden, width, scale=width**-0.5),
    }
    if shape.bias:
        operands |= {"up_bias": normal(width), "down_bias": normal(hidden)}
    if shape.gated:
        operands |= {"gate": dense_input, "gate_factor": normal(width, hidden, scale=hidden**-0.5)}
    return lambda *_: unfused_feed_forward(
        FeedForwardOperands(dense_input, **operands, activation=shape.activation)
    )


def check(problem: Problem) -> None:
    """Raise unless each low-rank contestant is as close to float64 as unfused eager is."""
    few = [x[:GATE_ROWS] for x in problem.inputs]
    exact = problem.exact(*(x.double() for x in few))
    eager_error = (problem.contestants["unfused eager"](*few) - exact).norm()
    budget = 1.1 * eager_error + 2 * torch.finfo(few[0].dtype).eps * exact.norm()
    for name, contestant in problem.contestants.items():
        if name == "dense Inductor":
            continue
        error = (contestant(*problem.inputs)[:GATE_ROWS] - exact).norm()
        if not error <= budget:
            raise AssertionError(f"{name}: error {error:.3e} over the budget {budget:.3e}")


def work_of(shape: Shape, problem: Problem) -> Work:
    """The least work of a call; an activation costs at least one exponential an element."""
    elements = shape.rows * shape.intermediate_size
    products = elements * shape.rank * (3 if shape.gated else 2)
    if shape.kind == "chain":
        products += shape.rows * shape.hidden_size * shape.rank * (3 if shape.gated else 2)
    read = sum(x.nbytes for x in (*problem.inputs, *problem.weights.values()))
    width = shape.hidden_size if shape.kind == "chain" else shape.rank
    written = shape.rows * width * getattr(torch, shape.dtype).itemsize
    return Work(2 * products, read + written, elements)


def measure_shape(shape: Shape, device: str, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    problem = build(shape, device)
    calls = {name: partial(call, *problem.inputs) for name, call in problem.contestants.items()}
    print(f"\n{shape.name}: {shape}", flush=True)
    with torch.inference_mode():
        check(problem)
        row = contest(
            calls,
            device,
            dtype=getattr(torch, shape.dtype),
            work=work_of(shape, problem),
            targets=TARGETS.get(shape.name, ()) if device == "cuda" else (),
            rounds=rounds,
        )
    tile = tile_of(shape) if device == "cuda" else None
    return {"shape": asdict(shape), "tile": vars(tile) if tile else None, **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=sorted(SHAPES), default=device)
    parser.add_argument("--shapes", default="main", help="a named set of shapes of the device")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    if arguments.shapes not in SHAPES[arguments.device]:
        parser.error(f"--shapes must be one of {', '.join(SHAPES[arguments.device])}")
    shapes = SHAPES[arguments.device][arguments.shapes]
    measured = [measure_shape(shape, arguments.device, arguments.rounds) for shape in shapes]
    print(write_results(f"feed_forward_{arguments.device}_{arguments.shapes}", measured,
                        arguments.device))  # fmt: skip


if __name__ == "__main__":
    main()
