"""Shared memory is foreseen: never less than a kernel takes, and hardly more.

A few calls of each kernel, compiled ahead of time; a large grid runs where there is a GPU and many
cores (tests/gpu/test_sram.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flashsvd_compile.kernels.shared_memory import Buffer, Matmuls, packed_bytes

ROOT = Path(__file__).parents[2]
MOST = 1.25

# Of kernels that take a few KiB: barriers, reductions and conversions of vectors, which are not
# told apart, are as large as a tile.
SLACK_BYTES = 1024


def foreseen(count: int, *arguments: str, jobs: int = 1) -> list[dict[str, Any]]:
    """What `bench.sram` found, in a process of its own, where Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench.sram", str(count), *arguments, "--jobs", str(jobs)]
    done = subprocess.run(
        [*command, "--out", "/dev/stdout"],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def is_foreseen(found: dict[str, Any]) -> bool:
    taken = found["taken_bytes"]
    return taken <= found["foreseen_bytes"] <= MOST * taken + SLACK_BYTES


def test_a_few_calls_of_every_kernel():
    found = foreseen(2)
    assert len({case["kernel"] for case in found}) == 6
    assert [case for case in found if not is_foreseen(case)] == []


def test_buffers_that_do_not_meet_share_their_place():
    assert packed_bytes([]) == 0
    assert packed_bytes([Buffer(64, 0, 2), Buffer(32, 2, 4)]) == 64
    assert packed_bytes([Buffer(64, 0, 3), Buffer(32, 2, 4)]) == 96


@pytest.mark.parametrize(
    ("generation", "element_bytes", "rows", "tiles"),
    [("sm_90", 2, 64, 3), ("sm_90", 2, 32, 2), ("sm_90", 4, 64, 2), ("sm_80", 2, 128, 2)],
)
def test_tiles_ahead(generation, element_bytes, rows, tiles):
    assert Matmuls(generation, element_bytes, rows, 4).tiles_ahead(3) == tiles
    assert Matmuls(generation, element_bytes, rows, 4).tiles_ahead(1) == 0
