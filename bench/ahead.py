"""Compiles launches ahead of time, for GPUs that need not be there.

A kernel is compiled where its launcher would run it. As far as LLVM's IR, where Triton has decided
how much shared memory a program takes, or all the way to machine code, which takes twice as long.
"""

import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import triton
from flashsvd_compile.kernels.primitives import Described
from flashsvd_compile.kernels.tiles import TileConfig
from triton.backends.compiler import GPUTarget

# What each generation lets a block have, in KiB.
SRAM_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_120": 99}

Compiled = tuple[TileConfig, Any]


class Driver:
    """What Triton asks of a driver in order to compile."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # so that each target has kernels of its own

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(
    module: types.ModuleType, generation: str, launch: Callable[[], object]
) -> list[Compiled]:
    """The kernels that ``launch`` would run through ``module``, and with which tiles."""
    triton.runtime.driver.set_active(Driver(int(generation.removeprefix("sm_"))))
    found: list[Compiled] = []

    def compile_only(kernel: Any, grid: Any, tile: TileConfig, operands: Any, **constants: Any):
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "INTERPRETED": False}
        constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
        constants["maxnreg"] = tile.max_registers or None
        operands = [x.descriptor() if isinstance(x, Described) else x for x in operands]
        found.append((tile, kernel.warmup(*operands, grid=grid, **constants)))

    launcher, module.launch = module.launch, compile_only  # type: ignore[attr-defined]
    try:
        launch()
    finally:
        module.launch = launcher  # type: ignore[attr-defined]
    return found


@contextmanager
def without_machine_code() -> Iterator[None]:
    """Leaves out ptxas. Such kernels stay out of the cache that programs share."""

    def leave_out(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
        if stages is None:  # asked for a key of what it does, by Triton from 3.7 on
            return "without machine code", "without machine code"
        stages["ptx"] = lambda module, metadata: metadata.update(name="kernel") or ""
        stages["cubin"] = lambda module, metadata: b""
        return None

    knobs = triton.knobs
    with tempfile.TemporaryDirectory() as cache, knobs.runtime.scope(), knobs.cache.scope():
        knobs.cache.dir = cache
        knobs.runtime.add_stages_inspection_hook = leave_out
        yield
