"""What every Triton kernel here shares: one matmul, one way to launch."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

# Triton's interpreter computes ``tl.dot`` of bfloat16 wrongly (seen in 3.9), so interpreted
# kernels multiply in float32; and it truncates to bfloat16, so they err more than compiled ones.
# Fixed at import, as is Triton's own choice to interpret.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` accumulated in float32; ``acc`` may be None.

    ``PRECISION`` is ``"ieee"`` or ``"tf32"`` and matters for float32 operands alone.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


def launch(
    kernel: Any,
    grid: tuple[int | torch.SymInt, ...],
    tile: TileConfig,
    operands: Sequence[Any],
    **constants: Any,
) -> None:
    """Run ``kernel`` on ``operands``, the first of which is a tensor; or record that it runs.

    Tensors that a compiler traces make the launch a node of its graph, so that it costs what the
    compiler's own launches do. There a cap on registers does not count: Inductor drops it.
    """
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "INTERPRETED": INTERPRETED}
    constants |= {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if is_traced(operands[0]):
        kernel = torch.library.wrap_triton(kernel)
    else:
        constants["maxnreg"] = tile.max_registers or None
    kernel[grid](*operands, **constants)


@functools.cache
def sram_bytes_of_device(device: torch.device, otherwise: int) -> int:
    """Shared memory that a block may ask for; ``otherwise`` where kernels are interpreted."""
    if device.type != "cuda":
        return otherwise
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def is_traced(tensor: Tensor) -> bool:
    """Whether a compiler traces it, so that it has a shape but no memory."""
    return isinstance(tensor, (FunctionalTensor, FakeTensor))


def is_empty(tensor: Tensor) -> bool:
    """Whether it has no elements; never a guard, where sizes are symbols."""
    return statically_known_true(tensor.numel() == 0)


def is_multiple(size: int | torch.SymInt, of: int) -> bool:
    """Whether ``of`` divides ``size``; False, and never a guard, where that is not known."""
    return statically_known_true(size % of == 0)


def row_alignment(operand: Tensor | None) -> int:
    """The largest power of two up to 16 bytes that all rows of ``operand`` begin at multiples of.

    1 where its last dimension is not the contiguous one. Triton itself sees this only of strides
    that are multiples of 16, and loads a row of rank 40 element by element.
    """
    if operand is None or not statically_known_true(operand.stride(-1) == 1):
        return 1
    size = operand.element_size()
    # Whole storages are aligned; a traced tensor has no address yet.
    start = operand.storage_offset() * size if is_traced(operand) else operand.data_ptr()
    steps = [start, *(stride * size for stride in operand.stride()[:-1])]
    return next(n for n in (16, 8, 4, 2, 1) if all(is_multiple(step, n) for step in steps))
