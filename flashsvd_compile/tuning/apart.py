"""Measuring beside a model that is being compiled: on a real device, apart from what goes on."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import _disable_current_modes


def is_there(device: torch.device) -> bool:
    """Whether something can be run on it now, and timed."""
    if device.type != "cuda":
        return device.type == "cpu"
    return torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing()


def device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


@contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Real tensors on ``device``, no gradients, no casts, whatever is going on around."""
    with (
        _disable_current_modes(),
        torch.cuda.device(device.index if device.type == "cuda" else -1),
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        yield
