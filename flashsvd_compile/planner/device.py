"""What the planner knows about a device: on-chip memory and a few measured rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from flashsvd_compile.kernels.devices import (
    generation_of,
    multiprocessors_of_device,
    sram_bytes_of_device,
)
from flashsvd_compile.planner.efficiency import CPU, GPU, Efficiency


@dataclass(frozen=True)
class Device:
    """Rates are what large library operators reach, not what a datasheet promises.

    ``sram_bytes``: shared memory that one block may use (0 where no kernel is launched).
    ``generation``: as tables of tiles name it, ``"sm_90"``; empty where no kernel is launched.
    ``macs_per_s``: multiply-adds a second of a large matmul, by bytes an element.
    ``efficiency``: what operators and kernels reach of these rates.
    ``exps_per_s``: softmax elements a second. ``bytes_per_s``: copy, read plus written.
    ``launch_s``: the least time of one operator. ``multiprocessors``: blocks that run at once.
    """

    name: str
    type: str
    sram_bytes: int
    macs_per_s: dict[int, float]
    exps_per_s: float
    bytes_per_s: float
    launch_s: float
    generation: str = ""
    multiprocessors: int = 0
    efficiency: Efficiency = GPU


# One H100 80GB HBM3 (132 SMs): bf16 8192³ matmul 798 TFLOP/s and copy 3.0 TB/s measured. 16
# exponentials a clock and SM at 1.7 GHz.
_HOPPER_MACS = {2: 4.0e14, 4: 2.5e13}
_HOPPER_MULTIPROCESSORS = 132
_HOPPER_BYTES = 3.0e12
_HOPPER_EXPS = 16 * _HOPPER_MULTIPROCESSORS * 1.7e9
_GPU_LAUNCH_S = 4e-6

# Two cores of a Xeon with AVX-512, torch 2.13: fp32 1024³ matmul, exp and copy through L3.
_CPU_MACS = {2: 4.0e10, 4: 5.0e10}


@cache
def device_for(device: torch.device) -> Device:
    """The rates of ``device``; an unknown kind of GPU is scaled by its multiprocessors."""
    if device.type != "cuda":
        cores = torch.get_num_threads() / 2
        macs = {size: rate * cores for size, rate in _CPU_MACS.items()}
        return Device("cpu", device.type, 0, macs, 4.0e8 * cores, 1.5e10, 5e-6, efficiency=CPU)
    multiprocessors = multiprocessors_of_device(device, 0)
    share = multiprocessors / _HOPPER_MULTIPROCESSORS
    return gpu(
        torch.cuda.get_device_name(device),
        generation_of(device),
        multiprocessors,
        sram_bytes_of_device(device, 0),
        macs=dict.fromkeys(_HOPPER_MACS, share),
        exps=share,
        bytes_=share,
    )


def gpu(
    name: str,
    generation: str,
    multiprocessors: int,
    sram_bytes: int,
    *,
    macs: Mapping[int, float],
    exps: float,
    bytes_: float,
) -> Device:
    """A GPU whose rates are these multiples of an H100's; ``macs`` by bytes an element."""
    return Device(
        name,
        "cuda",
        sram_bytes,
        {size: rate * macs[size] for size, rate in _HOPPER_MACS.items()},
        _HOPPER_EXPS * exps,
        _HOPPER_BYTES * bytes_,
        _GPU_LAUNCH_S,
        generation=generation,
        multiprocessors=multiprocessors,
    )
