"""What is chosen for a GPU compiles for it within its shared memory, as foreseen, and registers.

Compiled ahead of time for GPUs that need not be there. The whole grid takes minutes of many cores,
so that it runs with the tests for a GPU; a part of it runs everywhere.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("compiled_launches.py")

# What each generation lets a block have, in KiB.
SRAM_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}
BUDGETS_KIB = (48, 64, 99, 164, 227)

# Bytes of local memory of a thread: a third of its registers. Most tiles spill none; a few that
# live across a loop may be spilled by the fastest of all: 64 bytes by a gated feed-forward of
# rank 240 on sm_90. What must not be is a tile that lives there.
MAX_LOCAL_BYTES = 320


def attention(generation: str, sram_kib: int, ranks: Any, **others: Any) -> dict[str, Any]:
    ranks = [ranks] * 3 if isinstance(ranks, int) else ranks
    case = {"kernel": "attention", "dtype": "bfloat16", "head_dims": [64, 64], "ranks": ranks}
    return case | {"generation": generation, "sram_kib": sram_kib} | others


def rotated(generation: str, sram_kib: int, rank: int, head_dim: int, **others: Any):
    """Lifted queries turned by tables, and dense keys."""
    return attention(
        generation, sram_kib, [rank, head_dim, min(rank, head_dim)], head_dims=[head_dim, head_dim],
        **{"tables": "bfloat16"} | others,
    )  # fmt: skip


def feed_forward(generation: str, sram_kib: int, rank: int, gated: bool, dtype: str = "bfloat16"):
    ranks = [rank, rank if gated else None, rank]
    return {"kernel": "feed_forward", "generation": generation, "sram_kib": sram_kib,
            "dtype": dtype, "ranks": ranks}  # fmt: skip


SOME = [
    *(attention(g, SRAM_KIB[g], 40, mask="scanned") for g in ("sm_80", "sm_89", "sm_90")),
    feed_forward("sm_90", 227, 64, False),
    attention("sm_86", 64, 128, dtype="float16"),
    attention("sm_89", 99, 101),
    attention("sm_120", 48, 64, mask="added", is_causal=True),
    attention("sm_90", 227, [200, 200, 64], head_dims=[256, 256]),
    attention("sm_90", 227, 64),  # described
    attention("sm_90", 227, 128, mask="added", is_causal=True, is_capped=True, has_sink=True),
    attention("sm_80", 163, 64, mask="added", is_capped=True),
    rotated("sm_90", 227, 64, 128, is_causal=True),
    rotated("sm_86", 99, 40, 64, tables="float32", is_causal=True),
    attention("sm_86", 99, 32, dtype="float32"),
    feed_forward("sm_86", 64, 240, False),
    feed_forward("sm_120", 99, 101, True),
    feed_forward("sm_80", 48, 128, True),
    feed_forward("sm_89", 99, 64, False, "float32"),
]

GRID = [
    case
    for generation, most in SRAM_KIB.items()
    for kib in sorted({min(budget, most) for budget in BUDGETS_KIB})
    for case in (
        *(attention(generation, kib, rank) for rank in (16, 37, 64, 101, 128, 200, 255)),
        attention(generation, kib, 8, head_dims=[32, 32], mask="rows"),
        attention(generation, kib, [24, 40, 64], mask="scanned", is_causal=True),
        attention(generation, kib, 96, head_dims=[128, 128], mask="added", is_causal=True),
        attention(generation, kib, [201, 201, 101], head_dims=[256, 256], mask="added"),
        attention(generation, kib, [64, 64, 200], head_dims=[128, 256], dtype="float16"),
        attention(generation, kib, [257, 257, 1], head_dims=[256, 256], mask="added"),
        *(
            attention(generation, kib, rank, mask=mask, is_capped=capped, has_sink=True)
            for rank, mask in ((40, "scanned"), (64, "rows"), (128, "added"))
            for capped in (False, True)
        ),
        *(
            rotated(generation, kib, rank, head_dim, tables=tables, is_causal=True)
            for rank, head_dim in ((40, 64), (64, 80), (64, 128), (1024, 128), (128, 256))
            for tables in ("bfloat16", "float32")
        ),
        *(attention(generation, kib, rank, dtype="float32") for rank in (16, 40, 96)),
        *(
            feed_forward(generation, kib, rank, gated)
            for rank in (16, 37, 64, 101, 128, 240, 300)
            for gated in (False, True)
        ),
        feed_forward(generation, kib, 128, False, "float16"),
        *(feed_forward(generation, kib, rank, True, "float32") for rank in (40, 128)),
    )
]


def compiled(cases: list[dict[str, Any]], jobs: int) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(jobs)],
        input=json.dumps(cases),
        env=environment | {"PYTHONPATH": str(SCRIPT.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def broken_promises(result: dict[str, Any]) -> list[str]:
    if result["tile"] is None:
        return []
    promises = {
        "the planner's tile runs": result["tile"] == result["planned"],
        "within the budget": result["sram_bytes"] <= result["sram_kib"] * 1024,
        "as foreseen": result["sram_bytes"] <= result["foreseen_bytes"],
        "in registers": result["local_bytes"] <= MAX_LOCAL_BYTES,
    }
    return [promise for promise, is_kept in promises.items() if not is_kept]


def test_some():
    results = compiled(SOME, jobs=2)
    assert all(result["tile"] is not None for result in results)
    assert [(r, broken_promises(r)) for r in results if broken_promises(r)] == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where many cores do")
def test_the_grid():
    results = compiled(GRID, jobs=os.cpu_count() or 1)
    assert [(r, broken_promises(r)) for r in results if broken_promises(r)] == []
    for kernel in ("attention", "feed_forward"):
        ran = [r["tile"] is not None for r in results if r["kernel"] == kernel]
        assert sum(ran) > 0.7 * len(ran)


def test_ranks_that_no_registers_hold_are_refused():
    """257 is padded to 512: every tile spilled."""
    cases = [attention(g, kib, [257, 257, 1], head_dims=[256, 256], mask="added", is_causal=True)
             for g, kib in SRAM_KIB.items()]  # fmt: skip
    assert [result["tile"] for result in compiled(cases, jobs=1)] == [None] * len(cases)
