"""A chain in one kernel: y = (x Uᵀ + a) Vᵀ + b, whose latent never reaches memory.

Notation (operands: ``chain_operands.py``):
    T rows, K columns of x, OUT columns of y; RANK the latent's, PADDED to a power of two
    BLOCK_M rows of one program; BLOCK_K columns of x and BLOCK_N of y per step
    COLUMNS of y that one program writes

A program makes the latent of its rows over all of K (float32 accumulation, rounded to the dtype, as
the unfused expression does), then lifts and stores its COLUMNS. Where they are fewer than OUT the
latent of a row is made by several programs: see ``chain_tiles.py``.

Bytes of memory: x read and y written once, U and V read by every program, mostly from L2. float32
multiplies exactly ("ieee") unless ``torch.backends.cuda.matmul.allow_tf32``.
"""

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.chain_operands import ChainOperands
from flashsvd_compile.kernels.chain_tiles import ChainTile, default_tile
from flashsvd_compile.kernels.devices import (
    generation_of,
    multiprocessors_of_device,
    sram_bytes_of_device,
)
from flashsvd_compile.kernels.feed_forward_tiles import rank_padded
from flashsvd_compile.kernels.outer_products import latent_tile, lift_and_store
from flashsvd_compile.kernels.primitives import (
    INTERPRETED_SRAM_BYTES,
    KERNEL_DTYPES,
    absent_operand,
    is_empty,
    launch,
    pointer_and_strides,
    row_alignment,
)
from torch import Tensor

# As many as an H100 has, whose shared memory an interpreted launch pretends to have as well.
INTERPRETED_MULTIPROCESSORS = 132


@triton.jit
def chain_kernel(
    x_ptr, x_stride_t, x_stride_k, u_ptr, u_stride_r, u_stride_k,
    v_ptr, v_stride_o, v_stride_r, latent_bias_ptr, latent_bias_stride, bias_ptr, bias_stride,
    out_ptr,
    T,
    K: tl.constexpr, OUT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    HAS_LATENT_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIGNED_X: tl.constexpr, ALIGNED_U: tl.constexpr, ALIGNED_V: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # 64 bits before the product with a stride: a tensor may hold more than 2³¹ elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    latent = latent_tile(
        x_ptr, x_stride_t, x_stride_k, u_ptr, u_stride_r, u_stride_k,
        latent_bias_ptr, latent_bias_stride, rows, T, K, RANK, PADDED, HAS_LATENT_BIAS,
        ALIGNED_X, ALIGNED_U, PRECISION, INTERPRETED, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    lift_and_store(
        latent, v_ptr, v_stride_o, v_stride_r, bias_ptr, bias_stride, out_ptr, rows, T,
        tl.program_id(1) * COLUMNS, COLUMNS, OUT, RANK, PADDED, HAS_BIAS, ALIGNED_V,
        PRECISION, INTERPRETED, BLOCK_N,
    )  # fmt: skip


def streamed_chain(
    of: ChainOperands,
    *,
    tile: ChainTile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [T, OUT], contiguous. Operands of any strides; ``tile`` defaults to `default_tile`."""
    x = of.x
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"a streamed chain takes {KERNEL_DTYPES}, not {x.dtype}")
    out = of.allocate_output(out)
    if tile is None:
        tile = _default_tile(of)
    if is_empty(out):
        return out
    absent = absent_operand(x)
    operands = (
        *pointer_and_strides(x, absent, 2),
        *pointer_and_strides(of.u, absent, 2),
        *pointer_and_strides(of.v, absent, 2),
        *pointer_and_strides(of.latent_bias, absent, 1),
        *pointer_and_strides(of.bias, absent, 1),
        out,
        of.rows,
    )
    launch(
        chain_kernel,
        (triton.cdiv(of.rows, tile.block_m), triton.cdiv(of.out_size, tile.columns)),
        tile,
        operands,
        K=of.in_size,
        OUT=of.out_size,
        RANK=of.rank,
        PADDED=rank_padded(of.rank),
        HAS_LATENT_BIAS=of.latent_bias is not None,
        HAS_BIAS=of.bias is not None,
        ALIGNED_X=row_alignment(x),
        ALIGNED_U=row_alignment(of.u),
        ALIGNED_V=row_alignment(of.v),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        BLOCK_K=tile.block_k,
        COLUMNS=tile.columns,
    )
    return out


def _default_tile(of: ChainOperands) -> ChainTile:
    device = of.x.device
    sram_bytes = sram_bytes_of_device(device, INTERPRETED_SRAM_BYTES)
    tile = default_tile(
        rows=of.rows,
        rank=of.rank,
        out_size=of.out_size,
        element_bytes=of.x.element_size(),
        sram_bytes=sram_bytes,
        multiprocessors=multiprocessors_of_device(device, INTERPRETED_MULTIPROCESSORS),
        generation=generation_of(device),
    )
    if tile is None:
        raise ValueError(
            f"no tile of a streamed chain fits {sram_bytes} bytes of shared memory at rank "
            f"{of.rank} in {of.x.dtype}"
        )
    return tile
