"""What a measured answer depends on beside what was measured."""

import hashlib
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from flashsvd_compile.tuning.apart import device_name


def circumstances(device: torch.device) -> dict[str, Any]:
    """Device, versions and a hash of all kernels' sources."""
    return {
        "device": device_name(device),
        "kernels": _sources(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


@cache
def _sources() -> str:
    digest = hashlib.sha256()
    (room,) = import_module("flashsvd_compile.kernels").__path__
    for path in sorted(Path(room).glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
