"""Which of a few fragments that compute the same runs fastest, compiled as a graph would be.

Fragments are compiled and run on random tensors, in turns; on CUDA as replays of CUDA graphs, so
that the device is timed and not the host. One that disagrees with ``"unfused"`` is dropped. Times
are kept (``cache.py``) under a key of what the
fragments compute, the device and the versions. Nothing of the model is read or run.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from flashsvd_compile.tuning.apart import apart, is_there
from flashsvd_compile.tuning.cache import keep_record, kept_record, path_of
from flashsvd_compile.tuning.circumstances import circumstances
from flashsvd_compile.tuning.fragment import Fragment
from flashsvd_compile.tuning.timing import captured, median_ms

log = logging.getLogger(__name__)

Compile = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]

ROUNDS = 15

# What inputs may take of a GPU's free memory: the rest is for what fragments hold, several times
# their inputs, and for what the model holds next.
MAX_SHARE_OF_FREE_MEMORY = 0.1

# A right result is off from that of the lowering that fuses nothing by the roundings of both, which
# in TF32 are larger than the dtype's own: at most by this many times the root of one of those.
# Generous: what is wrong is wrong by far more.
ROOTS_OF_A_ROUNDING = 4.0

_known: dict[Path, dict[str, float]] = {}


@dataclass(frozen=True)
class Race:
    """``compiled`` makes a fragment run; ``setting`` names what that depends on; ``directory``
    keeps what was measured. Nothing is measured now where ``may_measure`` is false."""

    compiled: Compile | None
    setting: str
    directory: Path
    may_measure: bool = True

    def times(self, fragments: Mapping[str, Fragment]) -> tuple[dict[str, float], str] | None:
        """Milliseconds of those that ran, and ``"measured now"`` or ``".. before"``.

        None where they are not known and cannot or may not be measured.
        """
        (device, *others) = {fragment.device for fragment in fragments.values()}
        if others or not is_there(device):
            return None
        texts = {name: fragment.text for name, fragment in fragments.items()}
        with apart(device):
            threads = torch.get_num_threads() if device.type == "cpu" else 0
            key = {"fragments": texts, "setting": self.setting, "threads": threads}
            key |= circumstances(device)
            path = path_of(self.directory, key)
            known = _known.get(path) or kept_record(self.directory, key, "ms", _parsed)
            if known is not None:
                _known[path] = known
                return known, "measured before"
            if not self.may_measure or self.compiled is None:
                return None
            start = time.perf_counter()
            with torch._guards.tracing(None):
                found = _measured(fragments, device, self.compiled)
        if not found:
            return None
        _known[path] = found
        keep_record(self.directory, key, {"ms": found})
        log.info("%s measured in %.1f s", found, time.perf_counter() - start)
        return found, "measured now"


def _measured(
    fragments: Mapping[str, Fragment], device: torch.device, compiled: Compile
) -> dict[str, float]:
    runs: dict[str, Callable[[], Any]] = {}
    results: dict[str, Sequence[Tensor]] = {}
    try:
        for name, fragment in fragments.items():
            _check_room(fragment)
            inputs = fragment.allocate()
            try:
                run = partial(compiled(fragment.module, inputs), *inputs)
                results[name] = run()
                runs[name] = captured(run) if device.type == "cuda" else run
            except torch.OutOfMemoryError:
                raise
            except Exception as problem:  # whatever a compiler or a launch has to say
                log.info("%s does not run here: %s", name, problem)
        for name in list(runs):
            if not _agree(results[name], results.get("unfused", results[name])):
                log.warning("%s is wrong here and was dropped", name)
                del runs[name]
        return median_ms(runs, device, rounds=ROUNDS) if runs else {}
    except torch.OutOfMemoryError as error:
        log.info("%s were not measured: %s", ", ".join(fragments), error)
        return {}
    finally:
        runs.clear()
        results.clear()
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what was taken for it shall not stay with the process


def _check_room(fragment: Fragment) -> None:
    if fragment.device.type != "cuda":
        return
    room = torch.cuda.mem_get_info(fragment.device)[0] * MAX_SHARE_OF_FREE_MEMORY
    if fragment.input_bytes > room:
        raise torch.OutOfMemoryError(f"{fragment.input_bytes} bytes of inputs, room for {room:.0f}")


def _agree(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    for one, other in zip(found, expected, strict=True):
        most = ROOTS_OF_A_ROUNDING * torch.finfo(other.dtype).eps ** 0.5
        off = (one.float() - other.float()).norm()
        if not off <= most * other.float().norm():  # what is NaN is not
            return False
    return True


def _parsed(kept: Any) -> dict[str, float]:
    """Raises ValueError or AttributeError for what are no times."""
    times = {str(name): float(ms) for name, ms in kept.items()}
    if not times or not all(0 < ms < float("inf") for ms in times.values()):
        raise ValueError(f"times are {kept}")
    return times
