"""Time and bytes of attention, from counted operations and a device's rates; sizes as examples.

Library operators and streaming kernels are judged by the same formula, so that what differs is
what they do: how wide the attention runs, what is lifted where, and what reaches memory.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import sympy
import torch

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.calls import stored
from flashsvd_compile.analysis.shared_lift_records import ProductShape, SharedLift
from flashsvd_compile.analysis.site_records import Arm, AttentionSite, FeedForwardSite
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.roofline import GEMM_TILE, macs_per_s

# The size that an unbounded symbol is judged at when no example size is known.
UNKNOWN_SIZE = 4096


@dataclass(frozen=True)
class Cost:
    """``seconds`` at the example sizes; ``transient_bytes`` a formula of the graph's symbols."""

    seconds: float
    transient_bytes: Size


def attention_cost(site: AttentionSite, device: Device, hints: Mapping[Size, int]) -> Cost:
    """The site with each arm as it stands: absorbed where it has a factor, else lifted before.

    An attention over all-dense arms is the unfused one: SDPA.
    """
    heads, element = site.num_heads, site.dtype.itemsize
    batch, rows, keys = (volume(g) for g in (site.batch, site.rows, site.keys))
    query, key, value = site.query, site.key, site.value
    pairs = batch * heads * rows * keys
    macs = pairs * (_padded(key, device) + _padded(value, device))
    rate = _macs_per_s(site, device)
    seconds = at(macs, hints) / rate
    seconds += at(pairs, hints) / device.exps_per_s
    transient: Size = sympy.Integer(0)
    for arm, count in ((query, rows), (key, keys), (value, keys)):
        lifted = batch * heads * count * arm.width_size
        if arm.factor is not None and arm is not key:
            work = lifted * arm.rank_size
            if arm.rotation is not None:  # each feature's partner, too
                work *= 2
            seconds += at(work, hints) / rate
        if arm is query and key.factor is not None:
            work = batch * heads * rows * key.width_size * key.rank_size
            seconds += at(work, hints) / rate
        if arm.factor is None:
            seconds += 2 * at(lifted, hints) * element / device.bytes_per_s
            transient += lifted * element
    return Cost(seconds + device.launch_s, transient)


def lift_cost(arm: Arm, site: AttentionSite, device: Device, hints: Mapping[Size, int]) -> float:
    """Seconds to lift an arm before the site: the matmul; its traffic is the dense arm's."""
    count = volume(site.batch) * volume(arm.rows) * site.num_heads * arm.width_size
    return at(count * arm.rank_size, hints) / _macs_per_s(site, device) + device.launch_s


def turn_cost(arm: Arm, site: AttentionSite, device: Device, hints: Mapping[Size, int]) -> float:
    """Seconds to turn an arm before the site: it is read once, and written; tables have no heads
    and count little."""
    count = volume(site.batch) * volume(arm.rows) * site.num_heads * arm.width_size
    return 2 * at(count, hints) * site.dtype.itemsize / device.bytes_per_s + device.launch_s


def shared_lift_cost(
    lift: SharedLift, site: AttentionSite, device: Device, hints: Mapping[Size, int]
) -> float:
    """Seconds that the whole lift takes longer than what stays of it; below 0 where that is
    slower, in many products or in narrow ones."""
    left = sum(_product_cost(r.shape, site, device, hints) for r in lift.remainders)
    return _product_cost(lift.whole, site, device, hints) - left


def _product_cost(
    shape: ProductShape, site: AttentionSite, device: Device, hints: Mapping[Size, int]
) -> float:
    """As `lift_cost`. A GPU's library makes columns a tile at a time, of each group on its own."""
    columns = shape.columns
    if device.type == "cuda":
        columns = -(-columns // GEMM_TILE) * GEMM_TILE
    macs = replace(shape, columns=columns).macs
    return at(macs, hints) / _macs_per_s(site, device) + device.launch_s


def feed_forward_bytes(site: FeedForwardSite) -> Size:
    """What the unfused feed-forward holds: the intermediate before and after its activation."""
    copies = 2 if site.gate is None else 3
    return volume(site.tokens) * volume(site.width) * site.dtype.itemsize * copies


def _padded(arm: Arm, device: Device) -> int:
    """The width that attention runs an arm at; kernels run ranks in pieces of at least 16."""
    return arm.rank_size if device.type == "cpu" else max(16, -(-arm.rank_size // 16) * 16)


def _macs_per_s(site: AttentionSite, device: Device) -> float:
    return macs_per_s(device, site.dtype.itemsize) * device.efficiency.attention


def at(size: Size, hints: Mapping[Size, int]) -> float:
    """``size`` at the example sizes."""
    size = sympy.sympify(size)
    return float(size.subs({s: hints.get(s, UNKNOWN_SIZE) for s in size.free_symbols}))


def size_hints(values: list[object]) -> dict[Size, int]:
    """Example values of the symbols in traced sizes; reads hints, asks for no guard.

    The ragged size of nested tensors has no value; how much all their entries hold has one.
    """
    hints: dict[Size, int] = {}
    for value in values:
        sizes: Iterable[object] = (value,)
        if isinstance(value, torch.Tensor) and value.is_nested:
            sizes = stored(value).shape
        for size in sizes:
            if not isinstance(size, torch.SymInt):
                continue
            hint = size.node.hint
            if hint is not None and not isinstance(hint, torch.SymInt):
                hints[size.node.expr] = int(hint)
    return hints
