"""What a call cannot do without, counted from its shape."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, bytes that cross the device's memory, exponentials."""

    matmul_flops: float
    memory_bytes: float
    exponentials: float
