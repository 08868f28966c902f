"""What every Triton kernel here shares: one matmul, one way to load a tile, one to launch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor, fx
from torch._higher_order_ops import triton_kernel_wrap
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from triton.tools.tensor_descriptor import TensorDescriptor

# Triton's interpreter computes ``tl.dot`` of bfloat16 wrongly (seen in 3.9), so interpreted
# kernels multiply in float32; and it truncates to bfloat16, so they err more than compiled ones.
# Fixed at import, as is Triton's own choice to interpret.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# What kernels compute in float32 and multiply on tensor cores, or exactly.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# What an interpreted launch pretends to have: an H100's, so that tiles are chosen as there.
INTERPRETED_SRAM_BYTES = 227 * 1024

# Bytes that a tensor descriptor's address and strides have to be multiples of.
DESCRIPTOR_ALIGNMENT = 16


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """``acc + a @ b`` accumulated in float32; ``acc`` may be None.

    ``PRECISION`` is ``"ieee"`` or ``"tf32"`` and matters for float32 operands alone.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@dataclass(frozen=True)
class Described:
    """An operand that a kernel gets as a tensor descriptor, to read tiles of ``block_shape``.

    Tensor memory accelerators take it where its last dimension is contiguous and all rows begin at
    multiples of 16 bytes; beyond ``tensor`` they read zeros.
    """

    tensor: Tensor
    block_shape: tuple[int, ...]

    def descriptor(self) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(self.tensor, list(self.block_shape))


def is_describable(operand: Tensor) -> bool:
    """Whether a `Described` operand may be made of it."""
    return row_alignment(operand) == DESCRIPTOR_ALIGNMENT and all(
        statically_known_true(stride > 0) for stride in operand.stride()
    )


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
    options: dict[str, Any] = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if not is_traced(operands[0]):
        options["maxnreg"] = tile.max_registers or None
        operands = [x.descriptor() if isinstance(x, Described) else x for x in operands]
    elif any(isinstance(x, Described) for x in operands):
        arguments = dict(zip(kernel.arg_names, operands, strict=False)) | constants
        _record(kernel, grid, options, arguments)
        return
    else:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*operands, **constants, **options)


def _record(
    kernel: Any,
    grid: tuple[int | torch.SymInt, ...],
    options: dict[str, Any],
    arguments: dict[str, Any],
) -> None:
    """Make a launch with tensor descriptors a node of the graph that is being traced.

    As ``torch.library.wrap_triton`` makes it of the others; torch 2.11 to 2.13 have the node but
    leave descriptors in it to Dynamo. They find out what a kernel writes by the number of the
    argument, and count a descriptor as one where the compiled kernel has several: a kernel whose
    descriptors do not come last would seem to write nothing, and be left out.
    """
    described = {name: x for name, x in arguments.items() if isinstance(x, Described)}
    tensors = [x for x in arguments.values() if isinstance(x, (Tensor, Described))]
    assert all(isinstance(x, Described) for x in tensors[-len(described) :])
    arguments = arguments | {name: x.tensor for name, x in described.items()}
    traced = {name: x for name, x in arguments.items() if isinstance(x, fx.node.base_types)}
    constants = {name: x for name, x in arguments.items() if name not in traced}
    tuned = triton.autotune(configs=[triton.Config({}, **options)], key=[])(kernel)
    triton_kernel_wrap.triton_kernel_wrapper_mutation(
        kernel_idx=triton_kernel_wrap.kernel_side_table.add_kernel(tuned),
        constant_args_idx=triton_kernel_wrap.kernel_side_table.add_constant_args(constants),
        grid=[(*grid, 1, 1)[:3]],  # Inductor's launchers take all three axes
        tma_descriptor_metadata={
            name: triton_kernel_wrap.create_tma_stable_metadata(list(x.block_shape))
            for name, x in described.items()
        },
        kwargs=traced,
    )


def pointer_and_strides(operand: Tensor | None, stand_in: Tensor, ndim: int) -> tuple:
    """Kernel arguments of an operand; an absent one is never read, whatever stands in for it."""
    if operand is None:
        return (stand_in, *[0] * ndim)
    return (operand, *operand.stride())


def absent_operand(of: Tensor) -> Tensor:
    """What stands in for operands that are not there, beside ``of``, which is.

    A compiler copies a tensor that does not lie in memory yet for each argument that it is: seven
    absent operands cost ViT-B/16's shape, batch 128, 222 of 402 MiB and 0.8 of 10.2 ms (bfloat16,
    H100 80GB HBM3, torch 2.11.0, 2026-11-27). What is not traced is not copied.
    """
    return of.new_empty(1) if is_traced(of) else of


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
