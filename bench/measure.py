"""How every bench here measures: interleaved times, peak bytes of one call, the environment.

``median_ms`` runs the candidates in turns: see ``flashsvd_compile/tuning/timing.py``.

``peak_transient_bytes`` is what one call allocates beyond what was live before it, at its worst
moment, its outputs included: on CUDA the allocator's own peak, on CPU the profiler's record of
each allocation and release. Weights and inputs are live before and do not count.
"""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flashsvd_compile.memory.measured import measured_peak
from flashsvd_compile.tuning.timing import captured as captured
from flashsvd_compile.tuning.timing import median_ms as median_ms

# Read at the first profile: without it, torch announces each one on stderr.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")

RESULTS = Path(__file__).parent / "results"


def peak_transient_bytes(fn: Callable[[], Any], device: torch.device | str = "cuda") -> int:
    """Most bytes that one call of ``fn`` holds at once beyond what was live before it."""
    return measured_peak(fn, device).total_bytes


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
