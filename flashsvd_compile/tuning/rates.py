"""What a device reaches, measured once: a large matmul, a copy, and on a CPU exponentials.

Kept on disk as tiles are (``cache.py``), under a key of the device, the number of threads and the
version of torch. The best of a few runs counts: a neighbour can only slow them down. A tenth of a
second on a GPU, half of one on a CPU.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashsvd_compile.tuning.apart import apart, device_name, is_there
from flashsvd_compile.tuning.cache import keep_record, kept_record

log = logging.getLogger(__name__)

# By bytes an element: a matmul of this many rows, columns and depth. 16 bits may be emulated on a
# CPU, a hundred times slower than float32 is.
MATMULS = {
    "cuda": {2: (torch.bfloat16, 8192), 4: (torch.float32, 4096)},
    "cpu": {2: (torch.bfloat16, 192), 4: (torch.float32, 1024)},
}

# Of a copy: more than the second-level cache of any GPU, and than what a CPU's core has.
COPIED_BYTES = {"cuda": 256 * 2**20, "cpu": 64 * 2**20}
EXPONENTIALS = 2**22
RUNS = 6


@dataclass(frozen=True)
class Rates:
    """``macs_per_s`` of a large matmul, by bytes an element; ``bytes_per_s`` of a copy, read plus
    written; ``exps_per_s``, 0 where it was not measured."""

    macs_per_s: Mapping[int, float]
    bytes_per_s: float
    exps_per_s: float = 0.0


def rates_of(device: torch.device, directory: Path, may_measure: bool) -> Rates | None:
    """Measured now or before; None where they are not known and cannot or may not be measured."""
    if device.type not in MATMULS or not is_there(device):
        return None
    with apart(device):
        key = {
            "device": device_name(device),
            "threads": torch.get_num_threads() if device.type == "cpu" else 0,
            "torch": torch.__version__,
        }
        if (known := kept_record(directory, key, "rates", _parsed)) is not None:
            return known
        if not may_measure:
            return None
        try:
            rates = measured(device)
        except RuntimeError as error:  # out of memory, or no kernel for a dtype
            log.info("the rates of %s were not measured: %s", device, error)
            return None
    keep_record(directory, key, {"rates": asdict(rates)})
    return rates


def measured(device: torch.device) -> Rates:
    kind = device.type
    macs = {
        size: extent**3 / _best_seconds(device, _matmul(dtype, extent, device))
        for size, (dtype, extent) in MATMULS[kind].items()
    }
    source = torch.ones(COPIED_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.nbytes / _best_seconds(device, lambda: target.copy_(source))
    exps = 0.0
    if kind == "cpu":
        x = torch.linspace(-8, 0, EXPONENTIALS)
        exps = EXPONENTIALS / _best_seconds(device, lambda: torch.exp(x, out=x))
    return Rates(macs, copied, exps)


def _matmul(dtype: torch.dtype, extent: int, device: torch.device) -> Callable[[], Tensor]:
    a, b = (torch.ones(extent, extent, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def _best_seconds(device: torch.device, run: Callable[[], Any]) -> float:
    run()
    found = math.inf
    for _ in range(RUNS):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        found = min(found, time.perf_counter() - start)
    return found


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _parsed(kept: Any) -> Rates:
    """Raises ValueError, KeyError or TypeError for what is no record of rates."""
    macs = {int(size): float(rate) for size, rate in kept["macs_per_s"].items()}
    rates = Rates(macs, float(kept["bytes_per_s"]), float(kept["exps_per_s"]))
    numbers = (*macs.values(), rates.bytes_per_s)
    if set(macs) != {2, 4} or not all(0 < x < math.inf for x in numbers):
        raise ValueError(f"rates are {kept}")
    return rates
