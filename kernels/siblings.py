"""Sibling linears in one Triton launch: products that read the same activations.

    P_i = x U_iᵀ + b_i          i = 0 … COUNT - 1

Operands: ``siblings_operands.py``. M rows of x, K features of it, R_i the width of P_i. The
columns of all P_i, each padded to whole tiles of BLOCK_N, stand side by side: a program owns
BLOCK_M rows of one such tile. It picks the pointers, strides and widths of its sibling first, as
scalars, and runs one loop over K after: there is no branch around a matmul.

Programs walk GROUP_M tiles of rows before the next tile of columns, so that a weight's tile is
read from the second-level cache by all but the first.

Bytes of memory: x and each U_i read once (again from the second-level cache for each tile across),
each P_i written once. Nothing is copied, and weights stay where they are. Sums are float32; a
bias is added before the one rounding. float32 multiplies exactly ("ieee") unless
``torch.backends.cuda.matmul.allow_tf32``. The rows of X begin at multiples of ALIGNED_X bytes.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.primitives import (
    INTERPRETED_SRAM_BYTES,
    KERNEL_DTYPES,
    absent_operand,
    dot,
    is_empty,
    is_multiple,
    launch,
    row_alignment,
)
from flashsvd_compile.kernels.siblings_operands import SiblingOperands
from flashsvd_compile.kernels.siblings_tiles import GROUP_M, MAX_SIBLINGS, MatmulTile, default_tile
from flashsvd_compile.kernels.tile_loads import load_bias, load_tile
from torch import Tensor


@triton.jit
def _pick(index, COUNT: tl.constexpr, a0, a1, a2, a3, a4, a5, a6, a7):
    """The ``index``-th of the first COUNT scalars."""
    picked = a0
    if COUNT > 1:
        picked = tl.where(index == 1, a1, picked)
    if COUNT > 2:
        picked = tl.where(index == 2, a2, picked)
    if COUNT > 3:
        picked = tl.where(index == 3, a3, picked)
    if COUNT > 4:
        picked = tl.where(index == 4, a4, picked)
    if COUNT > 5:
        picked = tl.where(index == 5, a5, picked)
    if COUNT > 6:
        picked = tl.where(index == 6, a6, picked)
    if COUNT > 7:
        picked = tl.where(index == 7, a7, picked)
    return picked


@triton.jit
def _pick_wide(
    index, COUNT: tl.constexpr,
    A0: tl.constexpr, A1: tl.constexpr, A2: tl.constexpr, A3: tl.constexpr,
    A4: tl.constexpr, A5: tl.constexpr, A6: tl.constexpr, A7: tl.constexpr,
):  # fmt: skip
    """`_pick` of numbers that may not fit 32 bits; it is 64 bits wide if one does not."""
    LIMIT: tl.constexpr = 2**31
    if max(A0, A1, A2, A3, A4, A5, A6, A7) < LIMIT:
        picked = _pick(index, COUNT, A0, A1, A2, A3, A4, A5, A6, A7)
    else:
        picked = _pick(
            index, COUNT,
            tl.full([], A0, tl.int64), tl.full([], A1, tl.int64),
            tl.full([], A2, tl.int64), tl.full([], A3, tl.int64),
            tl.full([], A4, tl.int64), tl.full([], A5, tl.int64),
            tl.full([], A6, tl.int64), tl.full([], A7, tl.int64),
        )  # fmt: skip
    return picked


@triton.jit
def sibling_linears_kernel(
    x, u0, u1, u2, u3, u4, u5, u6, u7, b0, b1, b2, b3, b4, b5, b6, b7,
    out0, out1, out2, out3, out4, out5, out6, out7,
    stride_xm, stride_xk, M,
    K: tl.constexpr,
    # widths, then where each sibling's tiles of columns begin, strides, and widths of biases
    R0: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, R3: tl.constexpr,
    R4: tl.constexpr, R5: tl.constexpr, R6: tl.constexpr, R7: tl.constexpr,
    T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr, T3: tl.constexpr,
    T4: tl.constexpr, T5: tl.constexpr, T6: tl.constexpr, T7: tl.constexpr,
    STRIDE_R0: tl.constexpr, STRIDE_R1: tl.constexpr, STRIDE_R2: tl.constexpr,
    STRIDE_R3: tl.constexpr, STRIDE_R4: tl.constexpr, STRIDE_R5: tl.constexpr,
    STRIDE_R6: tl.constexpr, STRIDE_R7: tl.constexpr,
    STRIDE_K0: tl.constexpr, STRIDE_K1: tl.constexpr, STRIDE_K2: tl.constexpr,
    STRIDE_K3: tl.constexpr, STRIDE_K4: tl.constexpr, STRIDE_K5: tl.constexpr,
    STRIDE_K6: tl.constexpr, STRIDE_K7: tl.constexpr,
    B0: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, B3: tl.constexpr,
    B4: tl.constexpr, B5: tl.constexpr, B6: tl.constexpr, B7: tl.constexpr,
    COUNT: tl.constexpr, TILES_N: tl.constexpr, GROUP_M: tl.constexpr,
    HAS_BIAS: tl.constexpr, ROWS_FIT: tl.constexpr, COLUMNS_FIT: tl.constexpr,
    ALIGNED_X: tl.constexpr, ALIGNED_UK: tl.constexpr, ALIGNED_UR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    group_rows = program // (GROUP_M * TILES_N) * GROUP_M
    rows_here = tl.minimum(tl.cdiv(M, BLOCK_M) - group_rows, GROUP_M)
    within = program % (GROUP_M * TILES_N)
    tile_m = group_rows + within % rows_here
    tile_n = within // rows_here

    index = 0  # siblings that are not there begin at TILES_N
    if COUNT > 1:
        index = (tile_n >= T1).to(tl.int32) + (tile_n >= T2).to(tl.int32)
        index += (tile_n >= T3).to(tl.int32) + (tile_n >= T4).to(tl.int32)
        index += (tile_n >= T5).to(tl.int32) + (tile_n >= T6).to(tl.int32)
        index += (tile_n >= T7).to(tl.int32)
    u = _pick(index, COUNT, u0, u1, u2, u3, u4, u5, u6, u7)
    width = _pick(index, COUNT, R0, R1, R2, R3, R4, R5, R6, R7)
    first_tile = _pick(index, COUNT, T0, T1, T2, T3, T4, T5, T6, T7)
    stride_r = _pick_wide(index, COUNT, STRIDE_R0, STRIDE_R1, STRIDE_R2, STRIDE_R3, STRIDE_R4,
                          STRIDE_R5, STRIDE_R6, STRIDE_R7)  # fmt: skip
    stride_k = _pick_wide(index, COUNT, STRIDE_K0, STRIDE_K1, STRIDE_K2, STRIDE_K3, STRIDE_K4,
                          STRIDE_K5, STRIDE_K6, STRIDE_K7)  # fmt: skip

    # Not by _pick: across a call a compiler takes all outputs to be written, absent ones too.
    out = out0
    if COUNT > 1:
        out = tl.where(index == 1, out1, out)
    if COUNT > 2:
        out = tl.where(index == 2, out2, out)
    if COUNT > 3:
        out = tl.where(index == 3, out3, out)
    if COUNT > 4:
        out = tl.where(index == 4, out4, out)
    if COUNT > 5:
        out = tl.where(index == 5, out5, out)
    if COUNT > 6:
        out = tl.where(index == 6, out6, out)
    if COUNT > 7:
        out = tl.where(index == 7, out7, out)

    # 64 bits before the product with a stride: a tensor may hold more than 2³¹ elements.
    rows = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tile_n - first_tile).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_K).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, BLOCK_K):  # never empty
        at = tl.cast(start, tl.int64)
        x_tile = load_tile(
            x + at * stride_xk, rows[:, None], features[None, :],
            stride_xm, stride_xk, M, K - start, not ROWS_FIT, K % BLOCK_K != 0, 1, ALIGNED_X,
        )  # fmt: skip
        u_tile = load_tile(
            u + at * stride_k, features[:, None], columns[None, :],
            stride_k, stride_r, K - start, width, K % BLOCK_K != 0, not COLUMNS_FIT,
            ALIGNED_UK, ALIGNED_UR,
        )  # fmt: skip
        acc = dot(x_tile, u_tile, acc, PRECISION, INTERPRETED)

    if HAS_BIAS:
        bias = _pick(index, COUNT, b0, b1, b2, b3, b4, b5, b6, b7)
        bias_width = _pick(index, COUNT, B0, B1, B2, B3, B4, B5, B6, B7)
        acc += load_bias(bias, columns, 1, bias_width, False)[None, :]
    inside = (rows[:, None] < M) & (columns[None, :] < width)
    tl.store(out + (rows[:, None] * width + columns[None, :]), acc.to(out.dtype.element_ty), inside)


def sibling_linears(of: SiblingOperands, *, tile: MatmulTile | None = None) -> list[Tensor]:
    """Each P_i [M, R_i], a contiguous tensor of its own; ``tile`` defaults to `default_tile`.

    Raises ValueError for more than MAX_SIBLINGS, for no features, for a dtype that is not in
    KERNEL_DTYPES and where no tile fits.
    """
    x, widths, count = of.x, of.widths, len(of.weights)
    if count > MAX_SIBLINGS or of.in_features == 0:
        raise ValueError(f"one launch takes 1 to {MAX_SIBLINGS} siblings of at least one feature, "
                         f"not {count} of {of.in_features}")  # fmt: skip
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"sibling linears take {KERNEL_DTYPES}, not {x.dtype}")
    if tile is None:
        tile = _default_tile(of)
    outs = [x.new_empty((of.rows, width)) for width in widths]
    if is_empty(x) or sum(widths) == 0:
        return outs
    biases = [None if bias is None else bias.contiguous() for bias in of.biases]
    tiles = [triton.cdiv(width, tile.block_n) for width in widths]
    begins = [0, *itertools.accumulate(tiles)]
    constants = {
        **_numbered("R", widths, 0),
        **_numbered("T", begins[:-1], begins[-1]),
        **_numbered("STRIDE_R", [weight.stride(0) for weight in of.weights], 0),
        **_numbered("STRIDE_K", [weight.stride(1) for weight in of.weights], 0),
        **_numbered("B", [0 if b is None else b.shape[0] for b in biases], 0),
    }
    absent = absent_operand(x)
    launch(
        sibling_linears_kernel,
        (triton.cdiv(of.rows, tile.block_m) * begins[-1],),
        tile,
        (
            x,
            *_filled(of.weights, absent),
            *_filled(biases, absent),
            *_filled(outs, absent),
            *x.stride(),
            of.rows,
        ),
        **constants,
        K=of.in_features,
        COUNT=count,
        TILES_N=begins[-1],
        GROUP_M=GROUP_M,
        HAS_BIAS=any(bias is not None for bias in biases),
        ROWS_FIT=is_multiple(of.rows, tile.block_m),
        COLUMNS_FIT=all(width % tile.block_n == 0 for width in widths),
        ALIGNED_X=row_alignment(x),
        ALIGNED_UK=min(row_alignment(weight) for weight in of.weights),
        ALIGNED_UR=min(row_alignment(weight.t()) for weight in of.weights),
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        BLOCK_K=tile.block_k,
    )
    return outs


def _numbered(name: str, values: Sequence[Any], otherwise: int) -> dict[str, Any]:
    """``{"R0": …, "R1": …}`` for every sibling that there may be."""
    filled = [*values, *[otherwise] * (MAX_SIBLINGS - len(values))]
    return {f"{name}{index}": value for index, value in enumerate(filled)}


def _filled(tensors: Sequence[Tensor | None], stand_in: Tensor) -> list[Tensor]:
    given = [stand_in if tensor is None else tensor for tensor in tensors]
    return [*given, *[stand_in] * (MAX_SIBLINGS - len(given))]


def _default_tile(of: SiblingOperands) -> MatmulTile:
    sram_bytes = sram_bytes_of_device(of.x.device, INTERPRETED_SRAM_BYTES)
    tile = default_tile(
        rows=of.rows,
        widths=of.widths,
        element_bytes=of.x.element_size(),
        sram_bytes=sram_bytes,
        generation=generation_of(of.x.device),
    )
    if tile is None:
        raise ValueError(f"no tile of sibling linears fits {sram_bytes} bytes of shared memory")
    return tile
