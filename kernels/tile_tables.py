"""Which tiles a kernel should try, and in which order: data, one file a kernel and GPU generation.

``KERNEL_tiles.GENERATION.json`` holds tables that were measured on one generation of GPUs, as
``"sm_90"``; ``KERNEL_tiles.portable.json`` an order for all others, which is no measurement. A
table says for which calls it is, the tiles, best first, and where they come from:

    {"when": {"element_bytes": 2, "max_rank": 32},
     "tiles": [[128, 32, 8, 4], [64, 64, 4, 3]],
     "measured": {"gpu": .., "date": .., "command": .., "torch": .., "triton": .., "found": ..}}

``when`` names traits of a call, as each kernel defines them: ``max_X`` bounds trait X, any other
must be equal. The first table whose conditions all hold is taken. Whether a tile fits a device is
never read from here: that rule stands beside each kernel's tables, and always applies.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from flashsvd_compile.kernels.tiles import TileConfig

# The generation that stands for those without a table.
PORTABLE = "portable"

Tile = TypeVar("Tile", bound=TileConfig)


@dataclass(frozen=True)
class TileTable:
    """One table of a file; ``tiles`` are fields of the kernel's tile class, in order."""

    when: Mapping[str, Any]
    tiles: tuple[tuple[int, ...], ...]
    measured: Mapping[str, str]

    def holds_for(self, traits: Mapping[str, Any]) -> bool:
        return all(
            traits[key[len("max_") :]] <= value if key.startswith("max_") else traits[key] == value
            for key, value in self.when.items()
        )


@dataclass(frozen=True)
class Candidates(Generic[Tile]):
    """Tiles of one call that fit, best first, and whose order that is (``"table sm_90"``).

    ``is_measured``: whether the order was measured on a GPU of the device's generation.
    """

    tiles: tuple[Tile, ...]
    source: str
    is_measured: bool

    @property
    def first(self) -> Tile | None:
        return self.tiles[0] if self.tiles else None


def candidates(
    kernel: str,
    generation: str,
    traits: Mapping[str, Any],
    can_run: Callable[[Tile], bool],
    kind: type[Tile] = TileConfig,
) -> Candidates[Tile]:
    """The tiles of the table for ``generation``, or else of the portable one, that ``can_run``."""
    for name in dict.fromkeys((generation, PORTABLE)):
        for table in tables_of(kernel, name):
            if table.holds_for(traits):
                tiles = tuple(tile for fields in table.tiles if can_run(tile := kind(*fields)))
                is_measured = name != PORTABLE
                source = f"table {name}" if is_measured else "portable list"
                return Candidates(tiles, source, is_measured)
    raise LookupError(f"no table of {kernel} for {generation or 'any GPU'} holds for {traits}")


def path_of(kernel: str, generation: str) -> Path:
    """Where the tables of a kernel for a generation are, or would be."""
    return Path(__file__).with_name(f"{kernel}_tiles.{generation}.json")


@cache
def tables_of(kernel: str, generation: str) -> tuple[TileTable, ...]:
    """The tables of one file; none where there is no file."""
    path = path_of(kernel, generation)
    if not path.is_file():
        return ()
    return tuple(
        TileTable(table["when"], tuple(map(tuple, table["tiles"])), table["measured"])
        for table in json.loads(path.read_text())["tables"]
    )
