"""What was measured, kept on disk: one small JSON file for each key.

    DIRECTORY/<hash of the key>.json     {"key": {..}, "tile": [64, 64, 4, 3, 0], "ms": {..}}
                                         {"key": {..}, "rates": {"macs_per_s": {..}, ..}}

The key names all that the answer depends on, in words, and lies in the file beside the answer: a
file that is cut off, from elsewhere or of another key is no answer, and is written anew. A file is
written beside its place and then put there in one step, so that processes may write at once and a
reader finds a whole file or none. What cannot be read or written costs a warning, nothing else.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

Tile = tuple[int, ...]
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


def kept_record(
    directory: Path, key: Mapping[str, Any], name: str, parsed: Callable[[Any], Answer]
) -> Answer | None:
    """What is kept for ``key`` under ``name``, or None.

    ``parsed`` makes an answer of it, and raises ValueError, KeyError or TypeError where it is none.
    """
    path = path_of(directory, key)
    try:
        record = json.loads(path.read_text())
        if record["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of another key")
        return parsed(record[name])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        log.warning("%s holds nothing measured and will be written anew: %s", path, error)
        return None


def keep_record(directory: Path, key: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
    """Write ``answer`` for ``key``; a warning where that cannot be done."""
    path = path_of(directory, key)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, unfinished = tempfile.mkstemp(prefix=".kept_", dir=directory)
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps({"key": key, **answer}, indent=1) + "\n")
        Path(unfinished).replace(path)
    except OSError as error:
        log.warning("what was measured could not be kept in %s: %s", path, error)


def path_of(directory: Path, key: Mapping[str, Any]) -> Path:
    """The file of ``key``."""
    text = json.dumps(key, sort_keys=True)
    return directory / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


class TileCache:
    """Fastest tiles in ``directory``, made at the first that is kept, and in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[Path, Tile] = {}

    def get(self, key: Mapping[str, Any], allowed: Sequence[Tile]) -> Tile | None:
        """The tile kept for ``key``, if it is one of those allowed."""
        tile = self._known.get(path_of(self._directory, key))
        if tile is None:
            tile = kept_record(self._directory, key, "tile", _tile)
        return tile if tile in allowed else None

    def put(self, key: Mapping[str, Any], tile: Tile, ms: Mapping[str, float]) -> None:
        """Keep ``tile``; ``ms`` are the times of all that were measured, for who reads the file."""
        self._known[path_of(self._directory, key)] = tile
        keep_record(self._directory, key, {"tile": tile, "ms": ms})


@cache
def cache_in(directory: Path) -> TileCache:
    """The one of this process for ``directory``."""
    return TileCache(directory)


def _tile(kept: Any) -> Tile:
    tile = tuple(kept)
    if not all(type(number) is int for number in tile):
        raise ValueError(f"tile is {tile}")
    return tile
