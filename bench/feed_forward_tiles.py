"""Times every tile that fits a streamed feed-forward, to order `default_tile`'s preferences.

    python -m bench.feed_forward_tiles

Latent to latent, bfloat16: GELU with biases, and gated SiLU without. Results go to
``bench/results``.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from flashsvd_compile.kernels.feed_forward import streamed_feed_forward
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_tiles import (
    MAX_ACCUMULATORS_16_BIT,
    accumulators_of,
    default_tile,
    sram_bytes_of,
)
from flashsvd_compile.kernels.tiles import TileConfig

from bench.measure import captured, median_ms, write_results

ROWS = 65536
INTERMEDIATE_SIZE = 3072
RANKS = (64, 128, 240)
ROUNDS = 10
COMPILERS = 12


def tiles(rank: int, gated: bool, sram_bytes: int) -> list[TileConfig]:
    """Every sensible tile that fits shared memory and registers."""
    ranks = {"rank_up": rank, "rank_gate": rank if gated else None, "rank_down": rank}
    found = []
    for choice in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
        tile = TileConfig(*choice)
        registers = accumulators_of(tile, gated=gated, rank_down=rank)
        sram = sram_bytes_of(tile, element_bytes=2, **ranks)
        if registers <= MAX_ACCUMULATORS_16_BIT and sram <= sram_bytes:
            found.append(tile)
    return found


def operands(rows: int, rank: int, gated: bool) -> FeedForwardOperands:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    given = {
        "up": normal(rows, rank),
        "up_factor": normal(INTERMEDIATE_SIZE, rank),
        "down_factor": normal(rank, INTERMEDIATE_SIZE),
    }
    if gated:
        given |= {"gate": normal(rows, rank), "gate_factor": normal(INTERMEDIATE_SIZE, rank)}
    else:
        given |= {"up_bias": normal(INTERMEDIATE_SIZE), "down_bias": normal(rank)}
    return FeedForwardOperands(**given, activation="silu" if gated else "gelu")


def compile_tile(case: tuple[int, bool, TileConfig]) -> None:
    """Leaves the kernel in Triton's cache on disk, where the timing process finds it."""
    rank, gated, tile = case
    streamed_feed_forward(operands(tile.block_m, rank, gated), tile=tile)


def main() -> None:
    properties = torch.cuda.get_device_properties(0)
    sram_bytes = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    cases = {
        (rank, gated): tiles(rank, gated, sram_bytes) for rank in RANKS for gated in (False, True)
    }
    jobs = [(*case, tile) for case, fitting in cases.items() for tile in fitting]
    with ProcessPoolExecutor(COMPILERS, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_tile, jobs))
    results = []
    for (rank, gated), fitting in cases.items():
        given = operands(ROWS, rank, gated)
        times = median_ms(
            {
                str(tile): captured(partial(streamed_feed_forward, given, tile=tile))
                for tile in fitting
            },
            rounds=ROUNDS,
        )
        chosen = default_tile(
            rank_up=rank,
            rank_gate=rank if gated else None,
            rank_down=rank,
            intermediate_size=INTERMEDIATE_SIZE,
            element_bytes=2,
            sram_bytes=sram_bytes,
        )
        print(f"\nrank {rank}{' gated' if gated else ''}, {len(fitting)} tiles; default {chosen}")
        for tile in sorted(fitting, key=lambda tile: times[str(tile)]):
            ms = times[str(tile)]
            print(f"  {ms:7.3f} ms {tile}")
            results.append({"rank": rank, "gated": gated, "tile": vars(tile), "median_ms": ms})
    print(write_results("feed_forward_tiles", results))


if __name__ == "__main__":
    main()
