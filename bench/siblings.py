"""Down-projections of the same activations: one launch, beside a library matmul for each.

    python -m bench.siblings
    python -m bench.siblings --tiles

Each shape is timed in one run, contestants interleaved; before that every one must be as close to
float64 as separate eager matmuls are. ``concatenated`` is one library matmul with all weights in
one matrix, made ahead: what merging could save at most, if weights did not have to stay where they
are. ``--tiles`` times every tile that fits instead, to order `default_tile`'s preferences. Results
go to ``bench/results``.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.siblings import sibling_linears
from flashsvd_compile.kernels.siblings_operands import SiblingOperands, separate_linears
from flashsvd_compile.kernels.siblings_tiles import (
    TILES,
    TILES_FEW_ROWS,
    MatmulTile,
    default_tile,
    sram_bytes_of,
)
from torch import Tensor

from bench.contest import contest
from bench.measure import captured, median_ms, write_results
from bench.targets import Target
from bench.work import Work
from flashsvd_compile.planner.device import device_for
from flashsvd_compile.planner.siblings_cost import (
    SiblingsShape,
    merged_seconds,
    separate_seconds,
)

DTYPE = torch.bfloat16
ROWS = (1, 16, 256, 4096, 16384)
GATE_ROWS = 256
# Beside those that `default_tile` prefers.
MORE_TILES = (
    MatmulTile(128, 256, 8, 3, block_k=64),
    MatmulTile(256, 128, 8, 3, block_k=64),
    MatmulTile(128, 128, 8, 3, block_k=64),
    MatmulTile(128, 128, 4, 4, block_k=64),
    MatmulTile(128, 128, 8, 3, block_k=128),
    MatmulTile(128, 64, 8, 4, block_k=64),
    MatmulTile(64, 128, 4, 4, block_k=64),
    MatmulTile(64, 64, 4, 3, block_k=128),
    MatmulTile(64, 32, 4, 4, block_k=128),
    MatmulTile(16, 32, 4, 4, block_k=256),
    MatmulTile(16, 16, 2, 4, block_k=256),
    MatmulTile(16, 16, 8, 4, block_k=256),
    MatmulTile(16, 16, 4, 3, block_k=512),
)


@dataclass(frozen=True)
class Shape:
    """``widths`` of products of [rows, in_features]; weights stored [width, in] or transposed."""

    rows: int
    in_features: int
    widths: tuple[int, ...]
    is_transposed: bool = False

    @property
    def targets(self) -> list[Target]:
        """No slower than separate products wherever the planner merges them; else left alone."""
        device = device_for(torch.device("cuda"))
        of = SiblingsShape(self.rows, self.in_features, self.widths, 2)
        if merged_seconds(of, device) >= separate_seconds(of, device):
            return []
        return [Target("merged", ("separate eager", "separate Inductor"), 1.0)]

    @property
    def name(self) -> str:
        stored = " stored [in, width]" if self.is_transposed else ""
        return f"{self.rows} rows, {self.in_features} → {self.widths}{stored}"


SHAPES = [
    shape
    for rows in ROWS
    for shape in (
        Shape(rows, 768, (480,) * 3),
        Shape(rows, 768, (12 * 40,) * 3, is_transposed=True),
        Shape(rows, 4096, (1024,) * 3),
        Shape(rows, 4096, (1490,) * 2),
    )
]


def operands_of(shape: Shape, device: str, dtype: torch.dtype = DTYPE) -> SiblingOperands:
    def normal(*size: int) -> Tensor:
        return torch.randn(*size, device=device).to(dtype)

    scale = shape.in_features**-0.5
    sizes = [(width, shape.in_features) for width in shape.widths]
    weights = tuple(
        (normal(*size[::-1]) * scale).t() if shape.is_transposed else normal(*size) * scale
        for size in sizes
    )
    return SiblingOperands(normal(shape.rows, shape.in_features), weights, (None,) * len(weights))


def contestants(of: SiblingOperands) -> dict[str, Callable[[], Any]]:
    """Each computes all products; ``concatenated`` leaves them side by side in one tensor."""

    def separate(x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(F.linear(x, weight) for weight in weights)

    joined = torch.cat(of.weights)
    return {
        "merged": partial(sibling_linears, of),
        "separate eager": partial(separate_linears, of),
        "separate Inductor": partial(torch.compile(separate, dynamic=False), of.x, of.weights),
        "concatenated": lambda: F.linear(of.x, joined),
    }


def check(of: SiblingOperands, calls: dict[str, Callable[[], Any]]) -> None:
    """Raise unless each contestant is as close to float64 as separate eager matmuls are."""

    def few(products: Tensor | Sequence[Tensor]) -> Tensor:
        joined = products if isinstance(products, Tensor) else torch.cat(list(products), 1)
        return joined[:GATE_ROWS].double()

    x, weights = of.x[:GATE_ROWS].double(), [weight.double() for weight in of.weights]
    exact = torch.cat([F.linear(x, weight) for weight in weights], 1)
    eager_error = (few(calls["separate eager"]()) - exact).norm()
    budget = 1.1 * eager_error + 2 * torch.finfo(of.x.dtype).eps * exact.norm()
    for name, call in calls.items():
        error = (few(call()) - exact).norm()
        if not error <= budget:
            raise AssertionError(f"{name}: error {error:.3e} over the budget {budget:.3e}")


def work_of(shape: Shape, dtype: torch.dtype = DTYPE) -> Work:
    """The least work of a call: each operand read once, each product written once."""
    width, rows, features = sum(shape.widths), shape.rows, shape.in_features
    elements = rows * features + width * features + rows * width
    return Work(2 * rows * features * width, elements * dtype.itemsize, 0)


def chosen_tile(shape: Shape) -> MatmulTile | None:
    return default_tile(
        rows=shape.rows, widths=shape.widths, element_bytes=2, sram_bytes=_sram_bytes(),
        generation=generation_of(torch.device("cuda")),
    )  # fmt: skip


def _sram_bytes() -> int:
    return sram_bytes_of_device(torch.device("cuda"), 0)


def measure_shape(shape: Shape, rounds: int) -> dict[str, Any]:
    torch._dynamo.reset()
    of = operands_of(shape, "cuda")
    calls = contestants(of)
    tile = chosen_tile(shape)
    print(f"\n{shape.name}; {tile}{'' if shape.targets else '; left alone'}", flush=True)
    with torch.inference_mode():
        check(of, calls)
        row = contest(
            calls, "cuda", dtype=DTYPE, work=work_of(shape), targets=shape.targets, rounds=rounds
        )
    return {"shape": asdict(shape), "tile": vars(tile) if tile else None, **row}


def measure_tiles(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    of = operands_of(shape, "cuda")
    few = shape.rows <= 16
    fitting = [
        tile
        for tile in (*TILES, *TILES_FEW_ROWS, *MORE_TILES)
        if (tile.block_m == 16) == few
        and sram_bytes_of(tile, 2, generation_of(torch.device("cuda"))) <= _sram_bytes()
    ]
    calls = {str(tile): partial(sibling_linears, of, tile=tile) for tile in fitting}
    times = median_ms({name: captured(call) for name, call in calls.items()}, rounds=rounds)
    print(f"\n{shape.name}; default {chosen_tile(shape)}")
    for tile in sorted(fitting, key=lambda tile: times[str(tile)]):
        print(f"  {times[str(tile)]:7.4f} ms {tile}", flush=True)
    return [
        {"shape": asdict(shape), "tile": vars(tile), "median_ms": times[str(tile)]}
        for tile in fitting
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiles", action="store_true", help="time every tile that fits")
    parser.add_argument("--rounds", type=int, default=25)
    arguments = parser.parse_args()
    if arguments.tiles:
        swept = [row for shape in SHAPES for row in measure_tiles(shape, arguments.rounds)]
        print(write_results("siblings_tiles", swept))
        return
    print(write_results("siblings", [measure_shape(s, arguments.rounds) for s in SHAPES]))


if __name__ == "__main__":
    main()
