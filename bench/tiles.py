"""Times a kernel's tiles on the GPU at hand, and writes the tables of its generation.

    python -m bench.tiles attention
    python -m bench.tiles feed_forward --write

Every shape belongs to the table of ``sm_90`` that holds for it; every sensible tile that fits the
device is timed on it, in turns, from cold caches, in bfloat16. A table's order is that of the
geometric mean of times over its shapes' best; behind the tiles that come within SLOWEST of it
stands the portable list, which ends with the smallest ones. ``--write`` puts the tables beside
the kernels, as ``kernels/KERNEL_tiles.GENERATION.json``; times go to ``bench/results``.
"""

import argparse
import datetime
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from typing import Any

import torch
from flashsvd_compile.kernels import attention_extents, attention_tiles, feed_forward_tiles
from flashsvd_compile.kernels.attention import rank_space_attention
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.feed_forward import streamed_feed_forward
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.tile_tables import PORTABLE, TileTable, path_of, tables_of
from flashsvd_compile.kernels.tiles import TileConfig

from bench import attention
from bench.measure import captured, median_ms, write_results

ROUNDS = 10
MAX_COMPILERS = 12
TILES = [
    TileConfig(*fields)
    for fields in itertools.product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4))
]

# Slower than this, times the best, a tile does not lead a table: a choice.
SLOWEST = 1.5

# The generation whose tables say what is told apart.
TEMPLATE = "sm_90"


@dataclass(frozen=True)
class Attention:
    """One shape of the attention kernel."""

    shape: attention.Shape
    kernel = attention_tiles.KERNEL

    @property
    def extents(self) -> attention_extents.AttentionExtents:
        shape, (rank_q, rank_k, rank_v) = self.shape, self.shape.ranks
        return attention_extents.AttentionExtents(
            head_dim_qk=shape.head_dim,
            head_dim_v=shape.head_dim,
            rank_q=rank_q,
            rank_k=rank_k,
            rank_v=rank_v,
            q_lifted=True,
            v_lifted=True,
            element_bytes=2,
            is_causal=shape.is_causal,
            generation=generation_of(torch.device("cuda")),
        )

    def traits(self) -> dict[str, Any]:
        return attention_tiles.traits_of(self.extents)

    def can_run(self, tile: TileConfig, sram_bytes: int) -> bool:
        return attention_tiles.can_run(tile, self.extents, sram_bytes)

    def launch(self) -> Callable[..., Any]:
        latents, keywords = attention.operands(self.shape, "cuda")
        return partial(rank_space_attention, AttentionOperands(*latents, **keywords))


@dataclass(frozen=True)
class FeedForward:
    """Latent to latent: GELU with biases, and gated SiLU without."""

    rank: int
    gated: bool
    rows: int = 65536
    intermediate_size: int = 3072
    kernel = feed_forward_tiles.KERNEL

    @property
    def extents(self) -> dict[str, Any]:
        return {
            "rank_up": self.rank,
            "rank_gate": self.rank if self.gated else None,
            "rank_down": self.rank,
            "intermediate_size": self.intermediate_size,
            "element_bytes": 2,
        }

    def traits(self) -> dict[str, Any]:
        return feed_forward_tiles.traits_of(**self.extents)

    def can_run(self, tile: TileConfig, sram_bytes: int) -> bool:
        generation = generation_of(torch.device("cuda"))
        return feed_forward_tiles.can_run(
            tile, sram_bytes=sram_bytes, generation=generation, **self.extents
        )

    def launch(self) -> Callable[..., Any]:
        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        rank, width = self.rank, self.intermediate_size
        given = {
            "up": normal(self.rows, rank),
            "up_factor": normal(width, rank),
            "down_factor": normal(rank, width),
        }
        if self.gated:
            given |= {"gate": normal(self.rows, rank), "gate_factor": normal(width, rank)}
        else:
            given |= {"up_bias": normal(width), "down_bias": normal(rank)}
        activation = "silu" if self.gated else "gelu"
        return partial(streamed_feed_forward, FeedForwardOperands(**given, activation=activation))


Case = Attention | FeedForward

CASES: dict[str, list[Case]] = {
    "attention": [
        Attention(replace(shape, is_causal=is_causal))
        for is_causal in (False, True)
        for shape in (
            *(attention.Shape(32, 12, 512, 64, (rank,) * 3) for rank in (16, 32, 40, 64)),
            *(attention.Shape(8, 12, 2048, 64, (rank,) * 3) for rank in (32, 64)),
            *(attention.Shape(2, 32, 4096, 128, (rank,) * 3) for rank in (64, 96, 128)),
        )
    ],
    "feed_forward": [
        FeedForward(rank, gated) for rank in (64, 128, 240) for gated in (False, True)
    ],
}


def table_of(case: Case) -> TileTable:
    return next(t for t in tables_of(case.kernel, TEMPLATE) if t.holds_for(case.traits()))


def compile_tile(case: Case, tile: TileConfig) -> None:
    """Leaves the kernel in Triton's cache on disk, where the timing process finds it."""
    case.launch()(tile=tile)


def timed(case: Case, tiles: Iterable[TileConfig]) -> dict[TileConfig, float]:
    """Median milliseconds of each tile, fastest first."""
    launch = case.launch()
    calls = {str(tile): captured(partial(launch, tile=tile)) for tile in tiles}
    times = median_ms(calls, rounds=ROUNDS)
    print(f"\n{case}", flush=True)
    found = sorted(tiles, key=lambda tile: times[str(tile)])
    for tile in found:
        print(f"  {times[str(tile)]:7.3f} ms {astuple(tile)}", flush=True)
    return {tile: times[str(tile)] for tile in found}


def order(times: list[dict[TileConfig, float]]) -> tuple[list[TileConfig], str]:
    """Tiles by how near to its best they bring the shapes that they fit, and what they reach."""
    ratios = [
        {tile: ms / min(of_case.values()) for tile, ms in of_case.items()} for of_case in times
    ]
    slowdown = {}
    for tile in {tile for of_case in ratios for tile in of_case}:
        found = [of_case[tile] for of_case in ratios if tile in of_case]
        slowdown[tile] = math.prod(found) ** (1 / len(found))
    by_speed = sorted(slowdown, key=slowdown.__getitem__)
    reached = max((next(c[t] for t in by_speed if t in c) for c in ratios), default=1.0)
    return [tile for tile in by_speed if slowdown[tile] <= SLOWEST], (
        f"of {len(slowdown)} tiles, on {len(times)} shapes in bfloat16 from cold caches, the first "
        f"that fits took at most {reached:.2f} times the best"
    )


def written(kernel: str, times: dict[Case, dict[TileConfig, float]]) -> str:
    """The tables as text."""
    rows = []
    for template in tables_of(kernel, TEMPLATE):
        of_table = [t for case, t in times.items() if table_of(case) == template]
        best, found = order(of_table)
        rest = next(
            t for t in tables_of(kernel, PORTABLE) if t.holds_for({"element_bytes": 2})
        ).tiles
        fields = [astuple(tile)[: 5 if tile.max_registers else 4] for tile in best]
        measured = {
            "gpu": torch.cuda.get_device_name(),
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": f"python -m bench.tiles {kernel} --write",
            "torch": torch.__version__.partition("+")[0],
            "triton": version("triton"),
            "found": found,
        }
        lines = [
            f'   "when": {json.dumps(template.when)}',
            f'   "tiles": {json.dumps(list(dict.fromkeys([*fields, *rest])))}',
            f'   "measured": {json.dumps(measured)}',
        ]
        rows.append("  {\n" + ",\n".join(lines) + "\n  }")
    generation = generation_of(torch.device("cuda"))
    head = f' "kernel": "{kernel}",\n "generation": "{generation}",\n "tables": [\n'
    return "{\n" + head + ",\n".join(rows) + "\n ]\n}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kernel", choices=sorted(CASES))
    parser.add_argument("--write", action="store_true", help="write the tables of this generation")
    arguments = parser.parse_args()
    sram_bytes = sram_bytes_of_device(torch.device("cuda:0"), 0)
    tiles = {
        case: [tile for tile in TILES if case.can_run(tile, sram_bytes)]
        for case in CASES[arguments.kernel]
    }
    tiles = {case: fitting for case, fitting in tiles.items() if fitting}
    jobs = [(case, tile) for case, fitting in tiles.items() for tile in fitting]
    compilers = min(MAX_COMPILERS, os.cpu_count() or 1)
    with ProcessPoolExecutor(compilers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_tile, *zip(*jobs, strict=True)))
    times = {case: timed(case, fitting) for case, fitting in tiles.items()}
    rows = [
        {"case": str(case), "tile": astuple(tile), "median_ms": ms}
        for case, of_case in times.items()
        for tile, ms in of_case.items()
    ]
    print(write_results(f"{arguments.kernel}_tiles", rows))
    if arguments.write:
        path = path_of(arguments.kernel, generation_of(torch.device("cuda")))
        path.write_text(written(arguments.kernel, times))
        print(path)


if __name__ == "__main__":
    main()
