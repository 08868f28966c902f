"""The low-rank feed-forward streamed over the intermediate axis: [T, F] never reaches memory.

    h = act(P_u V_uᵀ + b_u)            or, gated,   h = act(P_g V_gᵀ + b_g) · (P_u V_uᵀ + b_u)
    S = h U_dᵀ + b_d

Notation (operands: ``feed_forward_operands.py``):
    T rows, F intermediate size; R_U, R_G, R_D the ranks of up, gate and down
    BLOCK_M rows of one program; BLOCK_N columns of h per step
    CHUNK_U, CHUNK_G  ranks multiplied at once, powers of two; one chunk holds a whole padded rank
                      up to ``MAX_RESIDENT_RANK``, then its latent tile stays on chip for all of F
    PADDED_D          R_D padded to a power of two, the width of the accumulator

One program owns BLOCK_M rows: for each BLOCK_N columns it lifts the latents (fp32 accumulation),
adds the biases and activates in fp32, rounds h to the dtype, and adds h U_dᵀ to a
[BLOCK_M, PADDED_D] fp32 accumulator. S is rounded once, after the bias.

Bytes of memory: each latent read once (F / BLOCK_N times, from L2, above MAX_RESIDENT_RANK), S
written once, the factors read by every program, mostly from L2. On chip only: h, pre-activations.
float32 multiplies exactly ("ieee") unless ``torch.backends.cuda.matmul.allow_tf32``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.feed_forward_operands import FeedForwardOperands
from flashsvd_compile.kernels.feed_forward_stream import load_latent, stream_intermediate
from flashsvd_compile.kernels.feed_forward_tiles import (
    Run,
    default_tile,
    rank_chunk,
    rank_padded,
    sram_bytes_of,
)
from flashsvd_compile.kernels.primitives import (
    INTERPRETED_SRAM_BYTES,
    KERNEL_DTYPES,
    absent_operand,
    is_empty,
    launch,
    pointer_and_strides,
)
from flashsvd_compile.kernels.tile_loads import load_bias
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor


@triton.jit
def _feed_forward_kernel(
    up_ptr, up_stride_t, up_stride_r,
    up_factor_ptr, up_factor_stride_f, up_factor_stride_r, up_bias_ptr, up_bias_stride,
    gate_ptr, gate_stride_t, gate_stride_r,
    gate_factor_ptr, gate_factor_stride_f, gate_factor_stride_r, gate_bias_ptr, gate_bias_stride,
    down_factor_ptr, down_factor_stride_d, down_factor_stride_f, down_bias_ptr, down_bias_stride,
    out_ptr,
    T,
    F: tl.constexpr, R_U: tl.constexpr, R_G: tl.constexpr, R_D: tl.constexpr,
    CHUNK_U: tl.constexpr, CHUNK_G: tl.constexpr, PADDED_D: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
    SHORT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # 64 bits before the product with a stride: a tensor may hold more than 2³¹ elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks_d = tl.arange(0, PADDED_D)

    up = None
    gate = None
    if R_U <= CHUNK_U:
        up = load_latent(up_ptr, up_stride_t, up_stride_r, rows, T, 0, R_U, CHUNK_U)
    if GATED and R_G <= CHUNK_G:
        gate = load_latent(gate_ptr, gate_stride_t, gate_stride_r, rows, T, 0, R_G, CHUNK_G)

    acc = stream_intermediate(
        up, up_ptr, up_stride_t, up_stride_r,
        up_factor_ptr, up_factor_stride_f, up_factor_stride_r, up_bias_ptr, up_bias_stride,
        gate, gate_ptr, gate_stride_t, gate_stride_r,
        gate_factor_ptr, gate_factor_stride_f, gate_factor_stride_r, gate_bias_ptr,
        gate_bias_stride, down_factor_ptr, down_factor_stride_d, down_factor_stride_f,
        rows, T, F, R_U, R_G, R_D, CHUNK_U, CHUNK_G, PADDED_D, ACTIVATION, GATED,
        HAS_UP_BIAS, HAS_GATE_BIAS, SHORT, 1, 1, 1, PRECISION, INTERPRETED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if HAS_DOWN_BIAS:
        bias = load_bias(down_bias_ptr, ranks_d.to(tl.int64), down_bias_stride, R_D, False)
        acc += bias[None, :]
    out_ptrs = out_ptr + rows[:, None] * R_D + ranks_d[None, :]
    inside = (rows[:, None] < T) & (ranks_d[None, :] < R_D)
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside)


def streamed_feed_forward(
    of: FeedForwardOperands,
    *,
    tile: TileConfig | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """S [T, R_d], contiguous. Operands of any strides; ``tile`` defaults to `default_tile`.

    Where factors lie in memory otherwise than ``tile`` was chosen for, another may be taken.
    """
    up, rank_gate = of.up, of.rank_gate
    if up.dtype not in KERNEL_DTYPES:
        raise ValueError(f"a streamed feed-forward takes {KERNEL_DTYPES}, not {up.dtype}")
    out = of.allocate_output(out)
    if is_empty(out):
        return out
    tile = _tile_that_fits(tile, of)

    absent = absent_operand(up)
    operands = (
        *pointer_and_strides(up, absent, 2),
        *pointer_and_strides(of.up_factor, absent, 2),
        *pointer_and_strides(of.up_bias, absent, 1),
        *pointer_and_strides(of.gate, absent, 2),
        *pointer_and_strides(of.gate_factor, absent, 2),
        *pointer_and_strides(of.gate_bias, absent, 1),
        *pointer_and_strides(of.down_factor, absent, 2),
        *pointer_and_strides(of.down_bias, absent, 1),
        out,
        of.rows,
    )
    launch(
        _feed_forward_kernel,
        (triton.cdiv(of.rows, tile.block_m),),
        tile,
        operands,
        F=of.intermediate_size,
        R_U=of.rank_up,
        R_G=rank_gate or 0,
        R_D=of.rank_down,
        CHUNK_U=rank_chunk(of.rank_up),
        CHUNK_G=rank_chunk(rank_gate or 0),
        PADDED_D=rank_padded(of.rank_down),
        ACTIVATION=of.activation,
        GATED=of.gate is not None,
        HAS_UP_BIAS=of.up_bias is not None,
        HAS_GATE_BIAS=of.gate_bias is not None,
        HAS_DOWN_BIAS=of.down_bias is not None,
        SHORT=up.element_size() == 2,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
    )
    return out


# An intermediate size that is a symbol: wider than any tile, and a row of it can be copied.
UNKNOWN_SIZE = 1 << 16


def _tile_that_fits(tile: TileConfig | None, of: FeedForwardOperands) -> TileConfig:
    """``tile``, which may have been chosen before it was known how factors lie, or the default."""
    factors = (of.up_factor, of.gate_factor, of.down_factor)
    are_contiguous = all(x is None or x.is_contiguous() for x in factors)
    if tile is not None and are_contiguous:
        return tile
    shape: dict[str, Any] = {
        "rank_up": int(of.rank_up),
        "rank_gate": None if of.rank_gate is None else int(of.rank_gate),
        "rank_down": int(of.rank_down),
        "intermediate_size": _known(of.intermediate_size, UNKNOWN_SIZE),
        "element_bytes": of.up.element_size(),
        "generation": generation_of(of.up.device),
    }
    runs = None if are_contiguous else tuple(map(_run_of, factors))
    sram_bytes = sram_bytes_of_device(of.up.device, INTERPRETED_SRAM_BYTES)
    if tile is not None and sram_bytes_of(tile, **shape, runs=runs) <= sram_bytes:
        return tile
    tile = default_tile(**shape, runs=runs, sram_bytes=sram_bytes)
    if tile is None:
        raise ValueError(
            f"no tile of a streamed feed-forward fits {sram_bytes} bytes of shared memory at ranks "
            f"up {of.rank_up}, gate {of.rank_gate}, down {of.rank_down} in {of.up.dtype}; use row "
            "blocks"
        )
    return tile


def _known(size: Any, otherwise: int) -> int:
    """``size`` where it is a number; symbols of a trace are none."""
    return size if isinstance(size, int) else otherwise


def _run_of(factor: Tensor | None) -> Run:
    """Where strides are not known, one that can be copied."""
    if factor is None:
        return Run(0, 0)
    along = 1 if factor.stride(1) == 1 else 0
    if factor.stride(along) != 1:
        return Run(1, 1)
    return Run(_known(factor.shape[along], 16), _known(factor.stride(1 - along), 16))
