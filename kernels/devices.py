"""What a launcher and the planner ask of a device."""

from functools import cache

import torch


@cache
def generation_of(device: torch.device) -> str:
    """The name of a device's generation; empty for all but NVIDIA's GPUs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return ""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


@cache
def sram_bytes_of_device(device: torch.device, otherwise: int) -> int:
    """Shared memory that a block may ask for; ``otherwise`` where kernels are interpreted."""
    if device.type != "cuda":
        return otherwise
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


@cache
def multiprocessors_of_device(device: torch.device, otherwise: int) -> int:
    """How many blocks run at once, one on each; ``otherwise`` where there is no GPU."""
    if device.type != "cuda":
        return otherwise
    return torch.cuda.get_device_properties(device).multi_processor_count
