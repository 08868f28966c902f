"""A plan: how one site will run, with what it was chosen by."""

from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.analysis.site_records import (
    AttentionBlocks,
    ChainEnds,
    ChainSite,
    FeedForwardSite,
    Outer,
    Site,
)
from flashsvd_compile.options import Options
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.tiling import Tiling
from flashsvd_compile.reason import Code, Reason, reason_at


@dataclass(frozen=True)
class Rival:
    """Another way to run a site: how long it would take, None where it cannot, and why it lost."""

    lowering: str
    seconds: float | None
    reason: Reason


@dataclass(frozen=True)
class Plan:
    """How a site will run.

    ``site`` may differ from the one found: arms that are cheaper lifted are dense in it.
    ``tile`` (the fields of a kernel's tile), ``block_rows`` or ``blocks`` where the lowering has
    them; ``tiling`` holds the tiles that could be taken instead. ``transient_bytes`` is what the
    site will hold at full width, ``unfused_bytes`` what it held; formulas of the graph's symbols.
    ``seconds`` at the example sizes, None where nothing is known of them; ``rivals``: the other
    lowerings, the fastest first. ``known_from``: where the seconds are from, ``"predicted"``,
    ``"measured now"`` or ``"measured before"``.
    """

    site: Site
    lowering: str
    reason: Reason
    transient_bytes: Size = sympy.S.Zero
    unfused_bytes: Size = sympy.S.Zero
    tiling: Tiling | None = None
    block_rows: int = 0
    blocks: AttentionBlocks | None = None
    seconds: float | None = None
    rivals: tuple[Rival, ...] = ()
    known_from: str = "predicted"

    @property
    def tile(self) -> tuple[int, ...]:
        return () if self.tiling is None else self.tiling.tile

    @property
    def sram_bytes(self) -> int:
        return 0 if self.tiling is None else self.tiling.sram_bytes

    @property
    def node(self) -> fx.Node:
        """The node that the lowering takes the place of."""
        return self._outer.exit.node if self._outer else self.site.node

    @property
    def region(self) -> frozenset[fx.Node]:
        """All nodes whose work the lowering does."""
        site = self.site
        if isinstance(site, ChainSite) and isinstance(site.ends, ChainEnds):
            return site.region | site.ends.entry.region
        return self._outer.region if self._outer else site.region

    @property
    def _outer(self) -> Outer | None:
        site, is_whole = self.site, self.lowering == "streamed_whole"
        found = site.outer if is_whole and isinstance(site, FeedForwardSite) else None
        return found if isinstance(found, Outer) else None


def lost(site: Site, rivals: str) -> Reason:
    return reason_at(site.node, Code.NOT_PROFITABLE, f"{rivals} would be slower here")


def check_dtype(site: Site) -> Reason | None:
    """Kernels accumulate in float32, which is no more than float64 is rounded to."""
    if site.dtype.itemsize <= 4:
        return None
    return reason_at(site.node, Code.DTYPE, f"{site.dtype} on a GPU", "at most 32 bits")


def sram_limit(device: Device, options: Options) -> int:
    """Bytes of shared memory that a block may take."""
    return min(options.sram_budget or device.sram_bytes, device.sram_bytes)


def slower_rival(
    site: Site, lowering: str, seconds: float, best_seconds: float, known_from: str = "predicted"
) -> Rival:
    """One that could have run."""
    ratio = f"{seconds / best_seconds:.2f} times as long" if best_seconds else "longer"
    reason = reason_at(site.node, Code.NOT_PROFITABLE, f"{ratio}, {known_from}")
    return Rival(lowering, seconds, reason)
