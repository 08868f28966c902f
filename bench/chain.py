"""Chains in one kernel, from one row to many, beside what torch does unaided.

    python -m bench.chain

y = (x Uᵀ) Vᵀ + b in bfloat16. Each shape is timed in one run, contestants interleaved; before that
ours must be as close to float64 as the unfused eager expression is. `dense` is one full-width
linear, compiled; it computes another function and passes no gate. Results go to ``bench/results``.
"""

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.chain import streamed_chain
from flashsvd_compile.kernels.chain_operands import ChainOperands, unfused_chain
from flashsvd_compile.kernels.chain_tiles import default_tile
from torch import Tensor

from bench.contest import contest
from bench.measure import write_results
from bench.targets import Target
from bench.work import Work
from flashsvd_compile.planner.chain_cost import ChainShape, streamed_seconds, unfused_seconds
from flashsvd_compile.planner.device import device_for

GATE_ROWS = 256
ROWS = (1, 16, 256, 4096, 65536)
# (in, rank, out); a rank beyond a tile is not run.
SIZES = ((768, 64, 768), (768, 240, 768), (4096, 64, 4096), (4096, 256, 4096))


@dataclass(frozen=True)
class Shape:
    rows: int
    in_size: int
    rank: int
    out_size: int

    @property
    def targets(self) -> list[Target]:
        """No slower than unaided wherever the planner streams the chain; else it is left alone."""
        device = device_for(torch.device("cuda"))
        of = ChainShape(self.rows, self.in_size, self.rank, self.out_size, 2)
        tile = default_tile(
            rows=self.rows, rank=self.rank, out_size=self.out_size, element_bytes=2,
            sram_bytes=device.sram_bytes, multiprocessors=device.multiprocessors,
            generation=device.generation,
        )  # fmt: skip
        if tile is None or streamed_seconds(of, device, tile) >= unfused_seconds(of, device):
            return []
        return [Target("streamed", ("unfused eager", "unfused Inductor"), 1.0)]

    def __str__(self) -> str:
        return f"{self.rows} rows, {self.in_size} → {self.rank} → {self.out_size}"


def build(shape: Shape) -> tuple[Tensor, dict[str, Callable[[Tensor], Tensor]], Any]:
    """x, the contestants as functions of it, and the function in float64."""

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*size, device="cuda") * scale).bfloat16()

    u = normal(shape.rank, shape.in_size, scale=shape.in_size**-0.5)
    v = normal(shape.out_size, shape.rank, scale=shape.rank**-0.5)
    bias = normal(shape.out_size)
    weight = normal(shape.out_size, shape.in_size, scale=shape.in_size**-0.5)

    def through(run: Callable[[ChainOperands], Tensor], x: Tensor) -> Tensor:
        return run(ChainOperands(x, u, v, bias=bias))

    eager = partial(through, unfused_chain)
    contestants: dict[str, Callable[[Tensor], Tensor]] = {
        "streamed": partial(through, streamed_chain),
        "unfused eager": eager,
        "unfused Inductor": torch.compile(eager, dynamic=False),
        "dense Inductor": torch.compile(lambda x: F.linear(x, weight, bias), dynamic=False),
    }

    def exact(x: Tensor) -> Tensor:
        given = (tensor.double() for tensor in (x, u, v))
        return unfused_chain(ChainOperands(*given, bias=bias.double()))

    return normal(shape.rows, shape.in_size), contestants, exact


def check(
    x: Tensor, contestants: dict[str, Callable[[Tensor], Tensor]], exact: Callable[[Tensor], Tensor]
) -> None:
    """Raise unless each low-rank contestant is as close to float64 as unfused eager is."""
    want = exact(x[:GATE_ROWS])
    eager_error = (contestants["unfused eager"](x)[:GATE_ROWS] - want).norm()
    budget = 1.1 * eager_error + 2 * torch.finfo(x.dtype).eps * want.norm()
    for name in ("streamed", "unfused Inductor"):
        error = (contestants[name](x)[:GATE_ROWS] - want).norm()
        if not error <= budget:
            raise AssertionError(f"{name}: error {error:.3e} over the budget {budget:.3e}")


def work_of(shape: Shape) -> Work:
    """The least work of a call."""
    widths = shape.in_size + shape.out_size
    elements = (shape.rows + shape.rank) * widths
    return Work(2 * shape.rows * shape.rank * widths, 2 * elements, 0)


def measure_shape(shape: Shape, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    x, contestants, exact = build(shape)
    print(f"\n{shape}{'' if shape.targets else ', left alone'}", flush=True)
    with torch.inference_mode():
        check(x, contestants, exact)
        row = contest(
            {name: partial(call, x) for name, call in contestants.items()},
            "cuda",
            dtype=torch.bfloat16,
            work=work_of(shape),
            targets=shape.targets,
            rounds=rounds,
        )
    return {"shape": asdict(shape), **row}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    rounds = parser.parse_args().rounds
    shapes = [Shape(rows, *sizes) for sizes in SIZES for rows in ROWS]
    print(write_results("chain", [measure_shape(shape, rounds) for shape in shapes]))


if __name__ == "__main__":
    main()
