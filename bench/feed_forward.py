"""Low-rank feed-forward: streamed and in blocks of rows, beside what torch does unaided.

    python -m bench.feed_forward --device cuda
    python -m bench.feed_forward --device cpu
    python -m bench.feed_forward --device cuda --shapes crossover

Each shape is timed in one run, contestants interleaved; before that every low-rank contestant must
be as close to float64 as the unfused eager expression is. A shape of kind `latent` goes from
latents to latent; a `chain` also has the outer factors, hidden size in and out. `dense` is the pair
(triple when gated) of full-width linears of the same hidden and intermediate size, compiled; it
computes another function and passes no gate. On CUDA each contestant is replayed from a graph, so
that the device is timed and not the host. Bytes are the peak of one call, its output included.
Results go to ``bench/results``.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.feed_forward_blocks import row_blocks_feed_forward
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_reference import unfused_feed_forward
from flashsvd_compile.kernels.feed_forward_tiles import default_tile
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

from bench.measure import captured, median_ms, peak_transient_bytes, write_results

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


SHAPES: dict[str, dict[str, list[Shape]]] = {
    "cuda": {
        "main": [
            Shape("bert r64", "latent", 65536, 768, 3072, 64),
            Shape("bert r128", "latent", 65536, 768, 3072, 128),
            Shape("bert r240", "latent", 65536, 768, 3072, 240),
            Shape("llama r128", "latent", 32768, 4096, 11008, 128, "silu", True, bias=False),
            Shape("llama r1024", "latent", 32768, 4096, 11008, 1024, "silu", True, bias=False),
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
    """Operands of one shape, and the contestants as functions of one input."""

    input: Tensor
    contestants: dict[str, Callable[[Tensor], Tensor]]
    exact: Callable[[Tensor], Tensor]


def build(shape: Shape, device: str) -> Problem:
    torch.manual_seed(0)
    dtype = getattr(torch, shape.dtype)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device=device) * scale).to(dtype)

    rank, width, hidden = shape.rank, shape.intermediate_size, shape.hidden_size
    chain = shape.kind == "chain"
    x = normal(shape.rows, hidden if chain else rank)
    weights = {
        "up_factor": normal(width, rank, scale=rank**-0.5),
        "down_factor": normal(rank, width, scale=width**-0.5),
    }
    if shape.bias:
        weights |= {"up_bias": normal(width), "down_bias": normal(rank)}
    if shape.gated:
        weights["gate_factor"] = normal(width, rank, scale=rank**-0.5)
    if chain:
        weights |= {
            "first": normal(rank, hidden, scale=hidden**-0.5),
            "last": normal(hidden, rank, scale=rank**-0.5),
        }

    def through(core: Callable[..., Tensor], weights: dict[str, Tensor], x: Tensor) -> Tensor:
        inner = {name: w for name, w in weights.items() if name not in ("first", "last")}
        latent = F.linear(x, weights["first"]) if chain else x
        if shape.gated:
            # A second latent of the same values: what is timed does not depend on them.
            inner["gate"] = latent
        out = core(FeedForwardOperands(latent, **inner, activation=shape.activation))
        return F.linear(out, weights["last"]) if chain else out

    eager = partial(through, unfused_feed_forward, weights)
    contestants: dict[str, Callable[[Tensor], Tensor]] = {
        "row_blocks": partial(
            through, partial(row_blocks_feed_forward, block_rows=shape.block_rows), weights
        ),
        "unfused eager": eager,
        "unfused inductor": torch.compile(eager, dynamic=False),
        "dense inductor": torch.compile(_dense(shape, normal), dynamic=False),
    }
    if device == "cuda":
        from flashsvd_compile.kernels.feed_forward import streamed_feed_forward

        tile = tile_of(shape)
        if tile is not None:
            streamed = partial(through, partial(streamed_feed_forward, tile=tile), weights)
            contestants = {"streamed": streamed, **contestants}
    doubled = {name: weight.double() for name, weight in weights.items()}
    exact = partial(through, unfused_feed_forward, doubled)
    return Problem(x, contestants, lambda x: exact(x.double()))


def tile_of(shape: Shape) -> TileConfig | None:
    properties = torch.cuda.get_device_properties("cuda")
    return default_tile(
        rank_up=shape.rank,
        rank_gate=shape.rank if shape.gated else None,
        rank_down=shape.rank,
        intermediate_size=shape.intermediate_size,
        element_bytes=getattr(torch, shape.dtype).itemsize,
        sram_bytes=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
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
    return lambda _: unfused_feed_forward(
        FeedForwardOperands(dense_input, **operands, activation=shape.activation)
    )


def check(problem: Problem) -> None:
    """Raise unless each low-rank contestant is as close to float64 as unfused eager is."""
    few = problem.input[:GATE_ROWS]
    exact = problem.exact(few)
    eager_error = (problem.contestants["unfused eager"](few) - exact).norm()
    budget = 1.1 * eager_error + 2 * torch.finfo(few.dtype).eps * exact.norm()
    for name, contestant in problem.contestants.items():
        if name == "dense inductor":
            continue
        error = (contestant(problem.input)[:GATE_ROWS] - exact).norm()
        if not error <= budget:
            raise AssertionError(f"{name}: error {error:.3e} over the budget {budget:.3e}")


def measure_shape(shape: Shape, device: str, rounds: int) -> dict:
    problem = build(shape, device)
    calls = {name: partial(call, problem.input) for name, call in problem.contestants.items()}
    with torch.inference_mode():
        check(problem)
        if device == "cuda":
            replays = {name: captured(call) for name, call in calls.items()}
            milliseconds = median_ms(replays, device, rounds=rounds)
        else:
            milliseconds = median_ms(calls, device, rounds=rounds)
        held = {name: peak_transient_bytes(call, device) for name, call in calls.items()}
    operations = 2 * shape.rows * shape.intermediate_size * shape.rank * (3 if shape.gated else 2)
    if shape.kind == "chain":
        operations += 4 * shape.rows * shape.hidden_size * shape.rank
    rows: dict[str, dict] = {}
    print(f"\n{shape.name}: {shape}")
    for name, ms in milliseconds.items():
        rows[name] = {"median_ms": ms, "peak_transient_bytes": held[name]}
        line = f"  {name:17} {ms:9.3f} ms {held[name] / 2**20:9.1f} MiB"
        if name != "dense inductor":
            rows[name]["tflops"] = operations / ms / 1e9
            line += f" {rows[name]['tflops']:8.2f} TFLOP/s"
        print(line, flush=True)
    if "streamed" in rows:
        rows["streamed"]["tile"] = vars(tile_of(shape))
    return {"shape": asdict(shape), "contestants": rows}


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
