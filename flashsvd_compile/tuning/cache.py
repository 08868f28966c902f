"""Fastest tiles that were measured, kept on disk: one small JSON file for each kind of call.

    DIRECTORY/<hash of the key>.json     {"key": {..}, "tile": [64, 64, 4, 3, 0], "ms": {..}}

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
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

Tile = tuple[int, ...]

log = logging.getLogger(__name__)


class TileCache:
    """Answers in ``directory``, which is made at the first that is kept, and in this process."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._known: dict[str, Tile] = {}

    def get(self, key: Mapping[str, Any], allowed: Sequence[Tile]) -> Tile | None:
        """The tile kept for ``key``, if it is one of those allowed."""
        path = self.path_of(key)
        tile = self._known.get(path.name)
        if tile is None:
            tile = _read(path, key)
        return tile if tile in allowed else None

    def put(self, key: Mapping[str, Any], tile: Tile, ms: Mapping[str, float]) -> None:
        """Keep ``tile``; ``ms`` are the times of all that were measured, for who reads the file."""
        path = self.path_of(key)
        self._known[path.name] = tile
        record = {"key": key, "tile": tile, "ms": ms}
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            handle, unfinished = tempfile.mkstemp(prefix=".tile_", dir=self._directory)
            with os.fdopen(handle, "w") as file:
                file.write(json.dumps(record, indent=1) + "\n")
            Path(unfinished).replace(path)
        except OSError as error:
            log.warning("a measured tile could not be kept in %s: %s", path, error)

    def path_of(self, key: Mapping[str, Any]) -> Path:
        """The file of ``key``."""
        text = json.dumps(key, sort_keys=True)
        return self._directory / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.json"


@cache
def cache_in(directory: Path) -> TileCache:
    """The one of this process for ``directory``."""
    return TileCache(directory)


def _read(path: Path, key: Mapping[str, Any]) -> Tile | None:
    try:
        record = json.loads(path.read_text())
        if record["key"] != json.loads(json.dumps(key)):
            raise ValueError("it is of another key")
        tile = tuple(record["tile"])
        if not all(type(number) is int for number in tile):
            raise ValueError(f"tile is {tile}")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        log.warning("%s holds no measured tile and will be written anew: %s", path, error)
        return None
    return tile
