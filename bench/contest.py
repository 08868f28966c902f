"""One row of a bench: its contestants timed in turns, with their bytes, targets and floor."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from tabulate import tabulate
from torch.utils._pytree import tree_leaves

from bench.measure import captured, median_ms, peak_transient_bytes
from bench.targets import AGREEMENT, Target, print_verdicts, verdicts
from bench.work import Work


def contest(
    calls: Mapping[str, Callable[[], Any]],
    device: str,
    *,
    dtype: torch.dtype,
    work: Work,
    targets: Sequence[Target] = (),
    rounds: int = 30,
) -> dict[str, Any]:
    """Time ``calls`` twice, print a table and the verdicts, and return the row for the results.

    Milliseconds are medians of interleaved calls, on CUDA of replayed graphs: the device is timed
    and not the host. ``work`` is the least that any low-rank contestant does. Transient bytes are
    the peak of a call without its outputs.
    """
    transient = {
        name: peak_transient_bytes(call, device) - sum(x.nbytes for x in tree_leaves(call()))
        for name, call in calls.items()
    }
    timed = calls if device == "cpu" else {name: captured(call) for name, call in calls.items()}
    times, apart = timed_twice(timed, device, rounds=rounds)
    row: dict[str, Any] = {"ms": times, "two_runs": apart, "transient_bytes": transient}
    floor_ms = None
    if device == "cuda":
        from bench.floors import measured_rates

        floor_ms, pipe = measured_rates(dtype).floor_ms(work)
        row |= {"work": asdict(work), "floor_ms": floor_ms, "floor_of": pipe}
        print(f"  floor {floor_ms:.4f} ms ({pipe})")
    table = {
        "contestant": list(calls),
        "ms": [f"{ms:.4f}" for ms in times.values()],
        "transient MiB": [f"{size / 2**20:.1f}" for size in transient.values()],
        "two runs": two_runs(apart),
    }
    if floor_ms is not None:
        table["over the floor"] = [f"{ms / floor_ms:.2f}" for ms in times.values()]
    print(tabulate(table, headers="keys", disable_numparse=True), flush=True)
    return row | {"verdicts": print_verdicts(verdicts(targets, times, transient, apart))}


def compare(
    title: object,
    calls: Mapping[str, Callable[[], Any]],
    device: str,
    *,
    errors: Mapping[str, float],
    targets: Sequence[Target] = (),
) -> dict[str, Any]:
    """Time whole models twice, host and device, print a table under ``title`` and the verdicts, and
    return what goes into the results.

    ``errors``: of those of ``calls`` that have any. Peak bytes are those of a call, its outputs
    included.
    """
    peaks = {name: peak_transient_bytes(call, device) for name, call in calls.items()}
    few = {"warmup": 3, "rounds": 20} if device == "cuda" else {"warmup": 1, "rounds": 3}
    times, apart = timed_twice(calls, device, **few)
    table = {
        "": list(calls),
        "median ms": [f"{times[name]:.3f}" for name in calls],
        "speedup of ours": [f"{times[name] / times['ours']:.2f}" for name in calls],
        "two runs": two_runs(apart),
        "peak MiB": [f"{peaks[name] / 2**20:.0f}" for name in calls],
        "error": [f"{errors[name]:.2e}" if name in errors else "" for name in calls],
    }
    print(f"\n{title}\n{tabulate(table, headers='keys', disable_numparse=True)}", flush=True)
    asked = targets if device == "cuda" else ()
    return {
        "ms": times,
        "two_runs": apart,
        "peak_bytes": peaks,
        "error": dict(errors),
        "verdicts": print_verdicts(verdicts(asked, times, peaks, apart)),
    }


def timed_twice(
    calls: Mapping[str, Callable[[], Any]], device: str, *, rounds: int, warmup: int = 3
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of each, the mean of two runs' medians, and how far those are apart."""
    runs = [median_ms(calls, device, warmup=warmup, rounds=rounds) for _ in range(2)]
    times = {name: sum(run[name] for run in runs) / 2 for name in calls}
    apart = {name: max(r[name] for r in runs) / min(r[name] for r in runs) for name in calls}
    return times, apart


def two_runs(apart: Mapping[str, float]) -> list[str]:
    """A column of how far two runs were apart."""
    return [f"{x:.3f}{' DISTURBED' * (x > AGREEMENT)}" for x in apart.values()]
