"""Tensors of a graph, made again: real, random, as large, and at like places in memory.

Sizes that are symbols take their example values. An operand lies in memory as that of the graph
does, as far as addresses modulo 16 bytes go.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What rows are aligned to at best, in bytes.
ALIGNED_BYTES = 16


@dataclass(frozen=True)
class Operand:
    """A tensor that is not there yet."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Of memory from the first to the last."""
        steps = zip(self.shape, self.strides, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps)

    @property
    def alignment(self) -> int:
        """Bytes that all rows begin at multiples of, up to `ALIGNED_BYTES`; 0 where the last
        dimension is not contiguous."""
        if self.strides and self.strides[-1] != 1:
            return 0
        elements = math.gcd(self.offset, *self.strides[:-1], ALIGNED_BYTES // self.dtype.itemsize)
        return elements * self.dtype.itemsize

    def shortened(self, dim: int, count: int) -> "Operand":
        shape = list(self.shape)
        shape[dim] = min(shape[dim], count)
        return replace(self, shape=tuple(shape))

    def allocate(self, scale: float, generator: torch.Generator) -> Tensor:
        device = generator.device
        size = self.offset + self.elements
        if self.dtype == torch.bool:
            memory = torch.ones(size, dtype=self.dtype, device=device)
        elif scale == 0 or not self.dtype.is_floating_point:
            memory = torch.zeros(size, dtype=self.dtype, device=device)
        else:
            memory = torch.empty(size, dtype=self.dtype, device=device)
            memory.normal_(0, scale, generator=generator)
        return memory.as_strided(self.shape, self.strides, self.offset)


def operand_like(tensor: Tensor) -> Operand | None:
    """None where it is empty, or a size has no example value."""
    shape, strides = numbers_of(tensor.shape), numbers_of(tensor.stride())
    offset = numbers_of([tensor.storage_offset()])
    if shape is None or strides is None or offset is None or 0 in shape:
        return None
    offset_kept = offset[0] % (ALIGNED_BYTES // min(ALIGNED_BYTES, tensor.dtype.itemsize))
    return Operand(shape, strides, offset_kept, tensor.dtype)


def numbers_of(sizes: Iterable[int | torch.SymInt]) -> tuple[int, ...] | None:
    """Example values; None where one has none."""
    found = []
    for size in sizes:
        known = size.node.hint if isinstance(size, torch.SymInt) else size
        if known is None:
            return None
        found.append(int(known))
    return tuple(found)
