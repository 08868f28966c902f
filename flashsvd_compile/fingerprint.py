"""A hash of this package's sources and of the options, for the caches of the compiler below.

Inductor's and AOTAutograd's caches key on the graph; a graph names our operators but not what is
inside them, so that after a change of a kernel or of a gradient a stale entry would still hit.
"""

import hashlib
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import flashsvd_compile
from flashsvd_compile.options import Options


def fingerprint(options: Options) -> str:
    """Changes with any file of the package that counts, and any option that shapes the graph."""
    shaping = (options.compiler, options.attention, options.feed_forward, options.chain,
               options.siblings, options.sram_budget, options.keep,
               options.weight_budget)  # fmt: skip
    return hashlib.sha256(f"{_sources()} {shaping!r}".encode()).hexdigest()


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    for name, path in _files():
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _files() -> Iterator[tuple[str, Path]]:
    """The package's own files; in a source tree kernels/ and lowering/ stand beside it."""
    package = Path(flashsvd_compile.__file__).parent
    rooms = [Path(place) for name in ("kernels", "lowering")
             for place in import_module(f"flashsvd_compile.{name}").__path__]  # fmt: skip
    for room in [package, *(room for room in rooms if package not in room.parents)]:
        for path in sorted(p for kind in ("*.py", "*.json") for p in room.rglob(kind)):
            yield str(path.relative_to(room.parent)), path
