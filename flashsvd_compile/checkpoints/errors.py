"""What is wrong with a checkpoint, and how errors name what is nearest to right."""

import difflib
from collections.abc import Iterable
from importlib import import_module
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a model that cannot be written, and why."""


def nearest(name: str, known: Iterable[str]) -> str:
    """``"; the nearest is 'x'"`` for an error, empty where nothing is known."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0)
    return f"; the nearest is {matches[0]!r}" if matches else ""


def listed(names: Iterable[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def optional_module(name: str) -> Any:
    """Import an optional package, or raise `ImportError` with what to install."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        package = name.split(".")[0]
        if error.name is None or error.name.split(".")[0] != package:
            raise  # the package is there: something within it is missing
        raise ImportError(
            f'checkpoints need {package}: pip install "flashsvd_compile[checkpoints]"'
        ) from error
