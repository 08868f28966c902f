"""Times every tile that fits a feed-forward streamed whole, or a streamed chain.

    python -m bench.outer_tiles whole
    python -m bench.outer_tiles chain

To order the preferences of ``feed_forward_whole_tiles.py`` and ``chain_tiles.py``; bfloat16, GELU
with biases and gated SiLU without. Results go to ``bench/results``.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context

import torch
from flashsvd_compile.kernels import chain_tiles, feed_forward_whole_tiles
from flashsvd_compile.kernels.chain import streamed_chain
from flashsvd_compile.kernels.chain_operands import ChainOperands
from flashsvd_compile.kernels.chain_tiles import ChainTile
from flashsvd_compile.kernels.devices import (
    generation_of,
    multiprocessors_of_device,
    sram_bytes_of_device,
)
from flashsvd_compile.kernels.feed_forward_whole import streamed_whole_feed_forward
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_tiles import WholeExtents, WholeTile
from flashsvd_compile.kernels.tiles import TileConfig

from bench.measure import captured, median_ms, write_results

ROUNDS = 10
COMPILERS = 12
SHOWN = 12
HIDDEN, INTERMEDIATE = 768, 3072
DEVICE = torch.device("cuda:0")


def normal(*size: int) -> torch.Tensor:
    return torch.randn(*size, device="cuda", dtype=torch.bfloat16)


@dataclass(frozen=True)
class Whole:
    """A feed-forward of one rank throughout."""

    rows: int
    rank: int
    gated: bool

    def run(self, rows: int) -> Callable[[TileConfig], torch.Tensor]:
        rank = self.rank
        rest = {"gate_u": normal(rank, HIDDEN), "gate_v": normal(INTERMEDIATE, rank)}
        if not self.gated:
            rest = {"up_bias": normal(INTERMEDIATE), "down_bias": normal(HIDDEN)}
        of = WholeFeedForwardOperands(
            normal(rows, HIDDEN), normal(rank, HIDDEN), normal(INTERMEDIATE, rank),
            normal(rank, INTERMEDIATE), normal(HIDDEN, rank),
            activation="silu" if self.gated else "gelu", **rest,
        )  # fmt: skip
        return lambda tile: streamed_whole_feed_forward(of, tile=tile)

    @property
    def _extents(self) -> WholeExtents:
        gate = self.rank if self.gated else None
        gate_from = "x" if self.gated else "none"
        return WholeExtents(
            self.rank, gate, self.rank, INTERMEDIATE, gate_from, 2, generation_of(DEVICE)
        )

    def tiles(self, sram_bytes: int, multiprocessors: int) -> Iterator[TileConfig]:
        del multiprocessors
        extents = self._extents
        for m, n, stages, k, o in itertools.product(
            (64, 128), (32, 64, 128), (2, 3, 4), (32, 64, 128), (64, 128)
        ):
            tile = WholeTile(m, n, m // 16, stages, block_k=k, block_o=o)
            registers = feed_forward_whole_tiles.registers_of(tile, extents)
            sram = feed_forward_whole_tiles.sram_bytes_of(tile, extents)
            if registers <= feed_forward_whole_tiles.MAX_REGISTERS_16_BIT and sram <= sram_bytes:
                yield tile

    def default(self, sram_bytes: int, multiprocessors: int) -> TileConfig | None:
        del multiprocessors
        return feed_forward_whole_tiles.default_tile(self._extents, sram_bytes)


@dataclass(frozen=True)
class Chain:
    """A chain with as many columns out as in."""

    rows: int
    rank: int
    width: int

    def run(self, rows: int) -> Callable[[TileConfig], torch.Tensor]:
        factors = normal(self.rank, self.width), normal(self.width, self.rank)
        of = ChainOperands(normal(rows, self.width), *factors, bias=normal(self.width))
        return lambda tile: streamed_chain(of, tile=tile)

    def tiles(self, sram_bytes: int, multiprocessors: int) -> Iterator[TileConfig]:
        rows_of_tile = (16,) if self.rows <= 16 else (16, 64) if self.rows <= 256 else (64, 128)
        for m, n, stages, k in itertools.product(
            rows_of_tile, (32, 64, 128), (2, 3, 4), (64, 128, 256)
        ):
            tile = ChainTile(m, n, 8 if m == 128 else 4, stages, block_k=k)
            registers = chain_tiles.registers_of(tile, rank=self.rank, element_bytes=2)
            if registers > chain_tiles.MAX_REGISTERS_16_BIT:
                continue
            # Half of, all and twice the multiprocessors at work.
            shares = {
                chain_tiles.shared_out(tile, self.rows, self.width, programs).columns
                for programs in (multiprocessors // 2, multiprocessors, 2 * multiprocessors)
            }
            for columns in sorted(shares):
                shared = replace(tile, columns=columns)
                sram = chain_tiles.sram_bytes_of(
                    shared, rank=self.rank, element_bytes=2, generation=generation_of(DEVICE)
                )
                if sram <= sram_bytes:
                    yield shared

    def default(self, sram_bytes: int, multiprocessors: int) -> TileConfig | None:
        return chain_tiles.default_tile(
            rows=self.rows, rank=self.rank, out_size=self.width, element_bytes=2,
            sram_bytes=sram_bytes, multiprocessors=multiprocessors,
            generation=generation_of(DEVICE),
        )  # fmt: skip


Case = Whole | Chain
CASES: dict[str, list[Case]] = {
    "whole": [
        *(Whole(16384, rank, False) for rank in (64, 128, 240)),
        *(Whole(16384, rank, True) for rank in (64, 96)),
    ],
    "chain": [Chain(rows, rank, 768) for rank in (64, 240) for rows in (1, 16, 256, 4096, 65536)],
}


def compile_tile(job: tuple[Case, TileConfig]) -> None:
    """Leaves the kernel in Triton's cache on disk, where the timing process finds it."""
    case, tile = job
    case.run(min(case.rows, 64))(tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=sorted(CASES))
    kind = parser.parse_args().kind
    limits = sram_bytes_of_device(DEVICE, 0), multiprocessors_of_device(DEVICE, 0)
    fitting = {case: list(case.tiles(*limits)) for case in CASES[kind]}
    jobs = [(case, tile) for case, tiles in fitting.items() for tile in tiles]
    print(f"{len(jobs)} kernels", flush=True)
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_tile, jobs, chunksize=4))
    results = []
    for case, tiles in fitting.items():
        run = case.run(case.rows)
        times = median_ms({str(t): captured(partial(run, t)) for t in tiles}, rounds=ROUNDS)
        print(f"\n{case}, {len(tiles)} tiles; default {case.default(*limits)}")
        for index, tile in enumerate(sorted(tiles, key=lambda tile: times[str(tile)])):
            ms = times[str(tile)]
            if index < SHOWN or tile == case.default(*limits):
                print(f"  {ms:7.4f} ms {tile}", flush=True)
            results.append({"case": vars(case), "tile": vars(tile), "median_ms": ms})
    print(write_results(f"{kind}_tiles", results))


if __name__ == "__main__":
    main()
