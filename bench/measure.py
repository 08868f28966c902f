"""How every bench here measures: interleaved times, peak bytes of one call, the environment.

``median_ms`` runs the candidates in turns, round after round, so that a clock that drifts drifts
for all of them alike. On CUDA each call lies between two events, behind a pass over a buffer that
is larger than the second-level cache: it starts cold, and the host is ahead of the device, so
that launches count only where a candidate is bound by them.

``peak_transient_bytes`` is what one call allocates beyond what was live before it, at its worst
moment, its outputs included: on CUDA the allocator's own peak, on CPU the profiler's record of
each allocation and release. Weights and inputs are live before and do not count.
"""

import datetime
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile

# Read at the first profile: without it, torch announces each one on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

RESULTS = Path(__file__).parent / "results"

_FLUSH_BYTES = 256 * 2**20  # five times the 50 MiB second-level cache of an H100


def median_ms(
    fns: Mapping[str, Callable[[], Any]],
    device: torch.device | str = "cuda",
    *,
    warmup: int = 3,
    rounds: int = 20,
) -> dict[str, float]:
    """Median time of a call of each candidate, in milliseconds, taken in turns."""
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup 0, got {rounds} and {warmup}")
    timed = _cuda_timer(device) if torch.device(device).type == "cuda" else _host_ms
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    samples: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            samples[name].append(timed(fn))
    return {name: statistics.median(values) for name, values in samples.items()}


def captured(call: Callable[[], Any]) -> Callable[[], None]:
    """``call`` as the replay of a CUDA graph: the device is timed, not the host."""
    for _ in range(2):
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_transient_bytes(fn: Callable[[], Any], device: torch.device | str = "cuda") -> int:
    """Most bytes that one call of ``fn`` holds at once beyond what was live before it.

    One call goes ahead unmeasured: it compiles, and makes the workspaces that libraries keep. What
    the CUDA allocator keeps of earlier work is given back first: it would hand out blocks of that
    up to 1 MiB larger than asked, and count them whole.
    """
    fn()
    if torch.device(device).type != "cuda":
        return _cpu_peak_bytes(fn)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = fn()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


def environment(device: torch.device | str = "cuda") -> dict[str, str | None]:
    """What a number was measured on: hardware, versions, commit and day."""
    on_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def write_results(
    name: str, rows: Iterable[Mapping[str, Any]], device: torch.device | str = "cuda"
) -> Path:
    """Write rows and their environment to ``bench/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(device), "rows": [dict(row) for row in rows]}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _host_ms(fn: Callable[[], Any]) -> float:
    start = time.perf_counter()
    fn()
    return (time.perf_counter() - start) * 1e3


def _cuda_timer(device: torch.device | str) -> Callable[[Callable[[], Any]], float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def timed(fn: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return timed


def _cpu_peak_bytes(fn: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = fn()
    del kept
    held: dict[int, int] = {}
    live = peak = 0
    for address, size in _allocations(recorded):
        if size > 0:
            held[address] = size
            live += size
            peak = max(peak, live)
        else:  # what was allocated before the call is no part of it when it goes
            live -= held.pop(address, 0)
    return peak


def _allocations(recorded: Any) -> list[tuple[int, int]]:
    """(address, size) of each allocation on CPU in time order; a release has a negative size."""
    pending = list(reversed(recorded.profiler.kineto_results.experimental_event_tree()))
    found = []
    while pending:
        event = pending.pop()
        pending.extend(reversed(event.children))
        fields = event.extra_fields
        if isinstance(fields, _ExtraFields_Allocation) and fields.device.type == "cpu":
            found.append((event.start_time_ns, fields.ptr, fields.alloc_size))
    found.sort(key=lambda allocation: allocation[0])
    return [(address, size) for _, address, size in found]


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of the tree, marked ``-dirty`` where files differ; None outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
