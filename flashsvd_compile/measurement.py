"""What calls of a model were measured to take, eager and compiled in turns."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from flashsvd_compile.memory.measured import MeasuredPeak, measured_peak
from flashsvd_compile.tuning.timing import median_ms

ROUNDS = 5


@dataclass(frozen=True)
class Run:
    """The most bytes of a call, and the median of its ``milliseconds``."""

    peak: MeasuredPeak
    milliseconds: float


@dataclass(frozen=True)
class Measurement:
    """Of the untouched model in eager, and of the compiled one, on ``device``."""

    device: str
    eager: Run
    compiled: Run


def measure_calls(
    eager: Callable[[], Any], compiled: Callable[[], Any], device: torch.device
) -> Measurement:
    """Calls both: each for its peak, after one that compiles, then in turns for their times."""
    calls = {"eager": eager, "compiled": compiled}
    peaks = {name: measured_peak(call, device) for name, call in calls.items()}
    times = median_ms(calls, device, warmup=1, rounds=ROUNDS)
    runs = {name: Run(peaks[name], times[name]) for name in calls}
    return Measurement(str(device), **runs)
