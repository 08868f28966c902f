"""A directory that is written whole or not at all."""

import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(directory: Path, is_written: Callable[[str], bool]) -> Iterator[Path]:
    """A new directory to write into, which takes the place of ``directory`` at the end.

    It lies beside it until then. Where writing fails it is removed, and ``directory`` is as it was.
    What else is in there (a tokenizer) is copied along; the old contents, files for whose names
    ``is_written`` holds, are not. The change itself is two renames: a process that is killed
    between them leaves the old directory whole, but beside the place: see `interrupted`.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    mark = secrets.token_hex(4)
    new = directory.parent / f".{directory.name}.{mark}.new"
    old = directory.parent / f".{directory.name}.{mark}.old"
    new.mkdir()
    try:
        if directory.exists():
            shutil.copymode(directory, new)
        yield new
        for kept in directory.iterdir() if directory.exists() else ():
            if not is_written(kept.name):
                _copy(kept, new / kept.name)
        _settle(new)
        _swap(directory, new, old)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def interrupted(directory: Path) -> Path | None:
    """Where the contents of ``directory`` are, if a process was killed while it replaced it."""
    if directory.exists():
        return None
    found = directory.parent.glob(f".{glob.escape(directory.name)}.*.old")
    return max(found, key=lambda old: old.stat().st_ctime, default=None)


def _copy(kept: Path, to: Path) -> None:
    """A file, a link as a link, or a directory."""
    if kept.is_dir() and not kept.is_symlink():
        shutil.copytree(kept, to, symlinks=True)
    else:
        shutil.copy2(kept, to, follow_symlinks=False)


def _settle(new: Path) -> None:
    """Wait until the files are on the disk: a machine that loses power may have done the rename
    before them."""
    for file in new.rglob("*"):
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as written:
                os.fsync(written.fileno())


def _swap(directory: Path, new: Path, old: Path) -> None:
    if not directory.exists():
        new.rename(directory)
        return
    directory.rename(old)
    try:
        new.rename(directory)
    except BaseException:
        old.rename(directory)
        raise
