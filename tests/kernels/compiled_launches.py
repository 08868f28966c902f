"""Compiles kernels for GPUs that need not be there, with the tile that is chosen for each.

Run by tests in a process of its own, where Triton compiles instead of interpreting:

    python compiled_launches.py JOBS < cases.json > results.json

A case names a kernel, a generation, a budget of shared memory and a call; its result tells the
tile (null where none fits), the shared memory foreseen and taken, and the bytes of local memory a
thread, where registers go that do not fit.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from flashsvd_compile.kernels import (
    attention,
    attention_extents,
    attention_tiles,
    feed_forward,
    feed_forward_tiles,
)
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

from bench.ahead import compiled as compiled_by

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def launch_attention(case: dict[str, Any], sram_bytes: int) -> tuple[TileConfig | None, int]:
    """Launches with the planner's tile; returns it and the shared memory that it foresees."""
    dtype = getattr(torch, case["dtype"])
    rows, mask = case.get("rows", 200), case.get("mask", "none")
    ranks, (head_dim, head_dim_v) = case["ranks"], case["head_dims"]
    tables = getattr(torch, case["tables"]) if case.get("tables") else None
    of = attention_extents.AttentionExtents(
        head_dim, head_dim_v, *ranks, True, True, dtype.itemsize, k_lifted=tables is None,
        is_float16=case["dtype"] == "float16", mask="none" if mask == "none" else "any",
        is_causal=case.get("is_causal", False), generation=case["generation"],
        keys_multiple=attention_extents.power_of_two_in(rows),
        is_capped=case.get("is_capped", False), table_bytes=tables.itemsize if tables else 0,
    )  # fmt: skip
    tile = attention_tiles.default_tile(of, sram_bytes)
    if tile is None:
        return None, 0
    q, k, v = (empty(1, rows, 2, rank, dtype=dtype).transpose(1, 2) for rank in ranks)
    masks = {
        "none": None,
        "scanned": empty(1, 1, 1, rows, dtype=torch.bool),
        "rows": empty(1, 1, rows, rows, dtype=torch.bool),
        "added": empty(1, 1, rows, rows, dtype=torch.float32),
    }
    turned: dict[str, Any] = {}
    if tables is not None:
        turned = {name: empty(1, rows, head_dim, dtype=tables) for name in ("cos", "sin")}
        turned |= {"rotary_dim": head_dim, "rotary_pair": head_dim // 2}
    operands = AttentionOperands(
        q, k, v, num_heads=2, scale=0.1, is_causal=of.is_causal, mask=masks[mask],
        q_factor=empty(2, head_dim, ranks[0], dtype=dtype),
        k_factor=empty(2, head_dim, ranks[1], dtype=dtype) if tables is None else None,
        v_factor=empty(2, head_dim_v, ranks[2], dtype=dtype),
        q_bias=empty(2, head_dim, dtype=dtype), v_bias=empty(2, head_dim_v, dtype=dtype),
        softcap=50.0 if case.get("is_capped") else 0.0,
        k_bias=empty(2, head_dim, dtype=dtype),
        sink=empty(2, dtype=dtype) if case.get("has_sink") else None, **turned,
    )  # fmt: skip
    attention.rank_space_attention(operands, tile=tile, sram_budget=sram_bytes)
    return tile, attention_tiles.sram_bytes_of(tile, of)


def launch_feed_forward(case: dict[str, Any], sram_bytes: int) -> tuple[TileConfig | None, int]:
    dtype = getattr(torch, case["dtype"])
    rank, gate, rank_down = case["ranks"]
    width, rows = case.get("intermediate_size", 400), case.get("rows", 200)
    shape = {
        "rank_up": rank, "rank_gate": gate, "rank_down": rank_down, "intermediate_size": width,
        "element_bytes": dtype.itemsize, "generation": case["generation"],
    }  # fmt: skip
    tile = feed_forward_tiles.default_tile(**shape, sram_bytes=sram_bytes)
    if tile is None:
        return None, 0
    gated = {}
    if gate is not None:
        gated = {
            "gate": empty(rows, gate, dtype=dtype),
            "gate_factor": empty(width, gate, dtype=dtype),
        }
    operands = FeedForwardOperands(
        empty(rows, rank, dtype=dtype), empty(width, rank, dtype=dtype),
        empty(rank_down, width, dtype=dtype), up_bias=empty(width, dtype=dtype),
        activation=case.get("activation", "gelu"), **gated,
    )  # fmt: skip
    feed_forward.streamed_feed_forward(operands, tile=tile)
    return tile, feed_forward_tiles.sram_bytes_of(tile, **shape)


LAUNCHES = {
    "attention": (attention, launch_attention),
    "feed_forward": (feed_forward, launch_feed_forward),
}


def compiled(case: dict[str, Any]) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    sram_bytes = case["sram_kib"] * 1024
    module, launch = LAUNCHES[case["kernel"]]
    module.sram_bytes_of_device = lambda device, otherwise: sram_bytes  # type: ignore
    module.generation_of = lambda device: case["generation"]  # type: ignore[attr-defined]
    planned, foreseen = None, 0

    def run() -> None:
        nonlocal planned, foreseen
        planned, foreseen = launch(case, sram_bytes)

    found = compiled_by(module, case["generation"], run)
    if not found:
        return case | {"tile": None}
    ((tile, kernel),) = found
    return case | {
        "planned": astuple(planned),
        "tile": astuple(tile),
        "foreseen_bytes": foreseen,
        "sram_bytes": kernel.metadata.shared,
        "local_bytes": local_bytes_of(kernel.asm["cubin"]),
    }


def local_bytes_of(cubin: bytes) -> int:
    """Of one thread: its stack, which holds the registers that were spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [DUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    (stack,) = re.findall(r"\bSTACK:(\d+)", usage)
    return int(stack)


def main() -> None:
    cases = json.load(sys.stdin)
    with ProcessPoolExecutor(int(sys.argv[1]), mp_context=get_context("fork")) as pool:
        print(json.dumps(list(pool.map(compiled, cases))))


if __name__ == "__main__":
    main()
