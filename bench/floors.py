"""The least time that a kernel could take on this device, from rates measured on it.

A kernel's work is counted by its author: operations of matrix products, bytes that have to cross
the device's memory, exponentials. Each over its measured rate is a time, and as the three pipes
run side by side, the longest of them is the floor.
"""

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from bench.measure import median_ms
from bench.work import Work

_MATMUL_SIZE = 8192  # 1.1 TFLOP: a library GEMM is at its best there
_COPY_BYTES = 2**30  # twenty times a 50 MiB second-level cache
_EXPONENTIALS = 2048  # of each thread, so that starting it does not count
_PROGRAMS_A_PROCESSOR = 8
_THREADS = 256


@dataclass(frozen=True)
class Rates:
    """Measured, a second."""

    matmul_flops: float
    memory_bytes: float
    exponentials: float

    def floor_ms(self, work: Work) -> tuple[float, str]:
        """The least time of ``work`` in milliseconds, and the pipe that sets it."""
        times = {
            "matmul": work.matmul_flops / self.matmul_flops,
            "memory": work.memory_bytes / self.memory_bytes,
            "exponentials": work.exponentials / self.exponentials,
        }
        pipe = max(times, key=times.__getitem__)
        return times[pipe] * 1e3, pipe


@cache
def measured_rates(dtype: torch.dtype) -> Rates:
    """Rates of the current CUDA device: a library GEMM in ``dtype``, a copy, exp2 on registers."""
    a, b = (torch.randn(_MATMUL_SIZE, _MATMUL_SIZE, device="cuda").to(dtype) for _ in "ab")
    product = torch.empty_like(a)
    source = torch.empty(_COPY_BYTES // 2, dtype=torch.int8, device="cuda")
    copy = torch.empty_like(source)
    processors = torch.cuda.get_device_properties("cuda").multi_processor_count
    programs = processors * _PROGRAMS_A_PROCESSOR
    seeds = torch.rand(programs * _THREADS, device="cuda")
    times = median_ms(
        {
            "matmul": lambda: torch.mm(a, b, out=product),
            "copy": lambda: copy.copy_(source),
            "exponentials": lambda: chained_exp2[(programs,)](
                seeds, _EXPONENTIALS, _THREADS, num_warps=_THREADS // 32
            ),
        }
    )
    return Rates(
        matmul_flops=2 * _MATMUL_SIZE**3 / times["matmul"] * 1e3,
        memory_bytes=_COPY_BYTES / times["copy"] * 1e3,  # read and written
        exponentials=seeds.numel() * _EXPONENTIALS / times["exponentials"] * 1e3,
    )


@triton.jit
def chained_exp2(Values, count, BLOCK: tl.constexpr):
    """x ← 2^(−x), ``count`` times: stays in [½, 1], and no step can start before the last ended."""
    at = Values + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(at)
    for _ in range(count):
        x = tl.exp2(-x)
    tl.store(at, x)
