"""Which of a few tiles runs a call fastest, measured on the device that the graph is compiled for.

    before   rank_space_attention(pq, pk, .., tile=[64, 64, 4, 3, 0])      first of an ordered list
    after    rank_space_attention(pq, pk, .., tile=[128, 32, 8, 3, 0])     fastest on this GPU

Each tile runs once on memory that was filled with NaN. One that cannot be launched, leaves a NaN
or errs more against float32 library operators than those operators do in the call's own dtype is
dropped, as is one that disagrees with the first that passed; the others are timed in turns. The
answer is kept (``cache.py``). Bounded in tiles by the caller, here in seconds and in memory.
Nothing of the model is read or run, and no random state of the user's moves.
"""

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from flashsvd_compile.tuning.apart import apart, is_there
from flashsvd_compile.tuning.cache import TileCache
from flashsvd_compile.tuning.circumstances import circumstances
from flashsvd_compile.tuning.example_call import ExampleCall, example_of
from flashsvd_compile.tuning.timing import FLUSHED_BYTES, cuda_timer

log = logging.getLogger(__name__)

Tile = tuple[int, ...]

# Patience, not measurements. A compile takes seconds, and the last one begun is waited for.
MAX_SECONDS = 60.0
ROUNDS = 15

# What operands may take of the free memory; what is larger is cut along its first axis.
MAX_SHARE_OF_FREE_MEMORY = 0.25

# A right result errs, relative to the exact one, at most by this many times what library operators
# in its dtype do, plus this many roundings. Generous: what is wrong is wrong by far more.
ERROR_SLACK = 2.0
ROUNDINGS = 4


def launch_behind(result: fx.Node) -> fx.Node:
    """The operator with a tile whose result, rearranged, ``result`` is."""
    while "tile" not in result.kwargs:
        result = result.all_input_nodes[0]
    return result


def fastest_tile(
    node: fx.Node, tiles: Sequence[Tile], kept: TileCache, may_measure: bool
) -> tuple[Tile, str] | None:
    """The fastest of ``tiles`` for the call at ``node``, and ``"measured now"`` or ``".. before"``.

    None where it is not known and cannot or may not be measured.
    """
    call = example_of(node)
    if call is None or not _can_be_timed(call.device):
        return None
    with apart(call.device):
        key = call.key() | circumstances(call.device) | {"tiles": [list(tile) for tile in tiles]}
        if (known := kept.get(key, tiles)) is not None:
            return known, "measured before"
        if not may_measure:
            return None
        start = time.perf_counter()
        times = measure(call, tiles)
        torch.cuda.empty_cache()  # what was taken for it shall not stay with the process
    if not times:
        log.warning("no tile of %s could be measured; the first stays", call.name)
        return None
    best = min(times, key=times.__getitem__)
    kept.put(key, best, {str(list(tile)): ms for tile, ms in times.items()})
    log.info("%s: %s takes %.3f ms, best of %d tiles measured in %.1f s",
             call.name, best, times[best], len(times), time.perf_counter() - start)  # fmt: skip
    return best, "measured now"


def measure(call: ExampleCall, tiles: Sequence[Tile]) -> dict[Tile, float]:
    """Median milliseconds of each of ``tiles`` that runs and is right; empty where none is."""
    deadline = time.perf_counter() + MAX_SECONDS
    try:
        call = _within_memory(call)
        runs = dict(_right_ones(call, tiles, deadline))
        return _timed(runs, call.device, deadline) if runs else {}
    except torch.OutOfMemoryError as error:
        log.info("%s was not measured: %s", call.name, error)
        return {}


def _right_ones(
    call: ExampleCall, tiles: Sequence[Tile], deadline: float
) -> Iterator[tuple[Tile, Callable[[], Tensor]]]:
    """The tiles that run and are right, each with what runs it."""
    tensors = call.allocate()
    exact, budget = _reference(call, tensors)
    first: Tensor | None = None
    for tile in tiles:
        if first is not None and time.perf_counter() > deadline:
            log.info("%s: %s and later tiles were left out: time is up", call.name, tile)
            return
        run = partial(call.target, *tensors, **call.numbers, tile=list(tile))
        try:
            with _nan_in_new_memory():
                out = run()
            is_right = bool(out.isfinite().all())
            is_right = is_right and _distance(call.first_results(out), exact) <= budget
            is_right = is_right and (first is None or _distance(out, first) <= 2 * budget)
        except torch.OutOfMemoryError:
            raise
        except Exception as problem:  # whatever a compiler or a launch has to say
            log.info("%s: tile %s does not run here: %s", call.name, tile, problem)
            continue
        if not is_right:
            log.warning("%s: tile %s is wrong here and was dropped", call.name, tile)
            continue
        first = out if first is None else first
        yield tile, run


def _reference(call: ExampleCall, tensors: Sequence[Tensor | None]) -> tuple[Tensor, float]:
    """The first results, exact, and how far from them others may be."""
    few = call.first_operands(tensors)
    dtype = next(x.dtype for x in few if x is not None)
    precise = torch.float64 if dtype == torch.float32 else torch.float32
    wide = [x.to(precise) if x is not None and x.is_floating_point() else x for x in few]
    exact = call.operator.plain(wide, dict(call.numbers))
    plain = call.operator.plain(few, dict(call.numbers))
    return exact, ERROR_SLACK * _distance(plain, exact) + ROUNDINGS * torch.finfo(dtype).eps


def _distance(found: Tensor, exact: Tensor) -> float:
    """The norm of their difference, relative to that of ``exact``."""
    return float((found.to(exact.dtype) - exact).norm() / exact.norm())


def _timed(
    runs: Mapping[Tile, Callable[[], Tensor]], device: torch.device, deadline: float
) -> dict[Tile, float]:
    """Median milliseconds, taken in turns."""
    flushed = min(FLUSHED_BYTES, int(_free_bytes(device) * MAX_SHARE_OF_FREE_MEMORY))
    timed = cuda_timer(device, flushed)
    samples: dict[Tile, list[float]] = {tile: [] for tile in runs}
    for done in range(ROUNDS):
        if done and time.perf_counter() > deadline:
            break
        for tile, run in runs.items():
            samples[tile].append(timed(run))
    return {tile: statistics.median(values) for tile, values in samples.items()}


def _within_memory(call: ExampleCall) -> ExampleCall:
    """The call, or as many of its first results as there is room to compute."""
    room = _free_bytes(call.device) * MAX_SHARE_OF_FREE_MEMORY
    cut = call.operator.cuts[0]
    count = call.results(cut)
    while call.memory_bytes > room and count > 1:
        count = max(1, count // 2)
        call = call.cut(cut, count)
    if call.memory_bytes > room:
        raise torch.OutOfMemoryError(f"{call.memory_bytes} bytes of operands, room for {room:.0f}")
    return call


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _can_be_timed(device: torch.device) -> bool:
    return device.type == "cuda" and is_there(device)


@contextmanager
def _nan_in_new_memory() -> Iterator[None]:
    """Memory that is asked for and not written reads as NaN."""
    settings: Any = torch.utils.deterministic
    is_on = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=warns)
        settings.fill_uninitialized_memory = fills
