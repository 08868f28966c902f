"""The tile of a planned kernel, where it came from, and what could be taken in its place."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import TypeVar

from flashsvd_compile.kernels.tile_tables import Candidates
from flashsvd_compile.kernels.tiles import TileConfig

Tile = TypeVar("Tile", bound=TileConfig)

# Candidates that are timed, at most. Each costs its compile, seconds to tens of them, before a
# first run: the bound is a choice of patience.
MAX_TIMED = 8


@dataclass(frozen=True)
class Tiling:
    """A choice among ``candidates``: tiles as the fields of the kernel's tile class, best first,
    each with the shared memory that it takes at most.

    ``source``: ``"table sm_90"``, ``"portable list"``, ``"measured now"``, ``"measured before"``.
    ``is_measured``: whether it was measured on a GPU of the device's generation.
    ``sram_limit``: bytes of shared memory that a block may take.
    """

    tile: tuple[int, ...]
    candidates: tuple[tuple[tuple[int, ...], int], ...]
    source: str
    is_measured: bool
    sram_limit: int

    @property
    def sram_bytes(self) -> int:
        return dict(self.candidates)[self.tile]

    @property
    def timed(self) -> tuple[tuple[int, ...], ...]:
        """What a measurement times."""
        return tuple(tile for tile, _ in self.candidates[:MAX_TIMED])

    def measured(self, tile: tuple[int, ...], source: str) -> "Tiling":
        """The same with ``tile``, which was measured to be the fastest of `timed`."""
        return replace(self, tile=tile, source=source, is_measured=True)


def tiling_of(
    found: Candidates[Tile], sram_bytes_of: Callable[[Tile], int], sram_limit: int
) -> Tiling | None:
    """The first of ``found``, or None where there is none."""
    if found.first is None:
        return None
    sized = tuple((astuple(tile), sram_bytes_of(tile)) for tile in found.tiles)
    return Tiling(sized[0][0], sized, found.source, found.is_measured, sram_limit)


def only_tile(tile: TileConfig, sram_bytes: int, sram_limit: int) -> Tiling:
    """Of a kernel whose tiles are not timed while a model is compiled."""
    fields = astuple(tile)
    return Tiling(fields, ((fields, sram_bytes),), "the kernel's list", True, sram_limit)
