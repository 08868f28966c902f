"""The most bytes that a call was seen to hold: by the CUDA allocator, or by the profiler on a CPU.

What was live before the call, weights and inputs, does not count.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _ExtraFields_Allocation
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class MeasuredPeak:
    """The most bytes at once beyond what was live before a call.

    ``total_bytes``: its outputs included. ``transient_bytes``: without them, which may be at
    another moment; memory in which an output ends up is an output's all along. ``is_least``: only
    the allocator's peak is known, so that ``transient_bytes`` is what it is at least, if all
    outputs were held then.
    """

    total_bytes: int
    transient_bytes: int
    is_least: bool


def measured_peak(fn: Callable[[], Any], device: torch.device | str = "cuda") -> MeasuredPeak:
    """What one call of ``fn`` holds at most.

    One call goes ahead unmeasured: it compiles, and makes the workspaces that libraries keep. What
    the CUDA allocator keeps of earlier work is given back first: it would hand out blocks of that
    up to 1 MiB larger than asked, and count them whole.
    """
    fn()
    if torch.device(device).type != "cuda":
        return _on_cpu(fn)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    outputs = torch.cuda.memory_allocated(device) - before
    del kept
    return MeasuredPeak(peak, max(0, peak - outputs), is_least=outputs > 0)


def _on_cpu(fn: Callable[[], Any]) -> MeasuredPeak:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        kept = fn()
    outputs = {
        leaf.untyped_storage().data_ptr()
        for leaf in pytree.tree_leaves(kept)
        if isinstance(leaf, torch.Tensor)
    }
    del kept
    allocations = _allocations(recorded)
    # An address is used again and again: the outputs are what was put there last.
    last = {address: index for index, (address, size) in enumerate(allocations) if size > 0}
    returned = {index for address, index in last.items() if address in outputs}
    transient = [one for index, one in enumerate(allocations) if index not in returned]
    return MeasuredPeak(_peak(allocations), _peak(transient), is_least=False)


def _peak(allocations: list[tuple[int, int]]) -> int:
    held: dict[int, int] = {}
    live = peak = 0
    for address, size in allocations:
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
