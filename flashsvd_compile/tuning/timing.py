"""Median times of calls, taken in turns, so that a clock that drifts drifts for all of them alike.

On CUDA each call lies between two events, behind a pass over a buffer that is larger than the
second-level cache: it starts cold, and the host is ahead of the device, so that launches count only
where a candidate is bound by them.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# Five times the 50 MiB second-level cache of an H100.
FLUSHED_BYTES = 256 * 2**20


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as the replay of a CUDA graph: the device is timed, not the host."""
    for _ in range(2):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_ms(
    fns: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cuda",
    *,
    warmup: int = 3,
    rounds: int = 20,
) -> dict[str, float]:
    """Median time of a call of each candidate, in milliseconds, taken in turns.

    Raises ValueError for less than one round.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup 0, got {rounds} and {warmup}")
    timed = cuda_timer(device) if torch.device(device).type == "cuda" else _host_ms
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            samples[name].append(timed(fn))
    return {name: statistics.median(values) for name, values in samples.items()}


def _host_ms(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def cuda_timer(
    device: torch.device | str, flushed_bytes: int = FLUSHED_BYTES
) -> Callable[[Callable[[], Any]], float]:
    """What times one call in milliseconds, behind a pass over a buffer of ``flushed_bytes``."""
    flush = torch.empty(flushed_bytes, dtype=torch.int8, device=device)

    def timed(fn: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed
