"""The products at either end of a chain, on chip: a tile of latents from x, and their lift stored.

    latent   P = x Uᵀ + a     x [T, K], u [R, K], a [R]     rounded to the dtype, as in memory
    lift     y = P Vᵀ + b     v [OUT, R], b [OUT]           rounded once, where it is stored

R is padded to a power of two, PADDED. Loops walk K in BLOCK_K and output columns in BLOCK_O; their
bounds are constants, so that no branch can skip them (see tests/gpu/test_machine_code.py). Rows of
x, u and v that are contiguous in memory begin at multiples of ALIGNED_… bytes; 1 where nothing is
known.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.primitives import dot
from flashsvd_compile.kernels.tile_loads import load_bias, load_tile


@triton.jit
def _factor_chunk(
    u_ptr, stride_r, stride_k, columns,
    K: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, BLOCK_K: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Uᵀ [BLOCK_K, PADDED] at int64 ``columns`` of x."""
    ranks = tl.arange(0, PADDED).to(tl.int64)
    return load_tile(
        u_ptr, columns[:, None], ranks[None, :], stride_k, stride_r, K, RANK,
        K % BLOCK_K != 0, RANK != PADDED, ALIGNED, 1,
    )  # fmt: skip


@triton.jit
def _as_latent(acc, bias_ptr, bias_stride, dtype, RANK: tl.constexpr, PADDED: tl.constexpr,
               HAS_BIAS: tl.constexpr):  # fmt: skip
    if HAS_BIAS:
        ranks = tl.arange(0, PADDED).to(tl.int64)
        acc += load_bias(bias_ptr, ranks, bias_stride, RANK, RANK == PADDED)[None, :]
    return acc.to(dtype)


@triton.jit
def latent_tile(
    x_ptr, x_stride_t, x_stride_k, u_ptr, u_stride_r, u_stride_k, bias_ptr, bias_stride, rows, T,
    K: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    ALIGNED_X: tl.constexpr, ALIGNED_FACTOR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """P [BLOCK_M, PADDED] of the int64 ``rows``."""
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        x = load_tile(x_ptr, rows[:, None], columns[None, :], x_stride_t, x_stride_k, T, K,
                      True, K % BLOCK_K != 0, 1, ALIGNED_X)  # fmt: skip
        factor = _factor_chunk(u_ptr, u_stride_r, u_stride_k, columns, K, RANK, PADDED, BLOCK_K,
                               ALIGNED_FACTOR)  # fmt: skip
        acc = dot(x, factor, acc, PRECISION, INTERPRETED)
    return _as_latent(acc, bias_ptr, bias_stride, x_ptr.dtype.element_ty, RANK, PADDED, HAS_BIAS)


@triton.jit
def latent_tiles(
    x_ptr, x_stride_t, x_stride_k,
    u_ptr, u_stride_r, u_stride_k, bias_ptr, bias_stride,
    other_u_ptr, other_u_stride_r, other_u_stride_k, other_bias_ptr, other_bias_stride, rows, T,
    K: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr, HAS_BIAS: tl.constexpr,
    OTHER_RANK: tl.constexpr, OTHER_PADDED: tl.constexpr, HAS_OTHER_BIAS: tl.constexpr,
    ALIGNED_X: tl.constexpr, ALIGNED_FACTOR: tl.constexpr, ALIGNED_OTHER: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Two latents of one x, which is read once."""
    acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
    other_acc = tl.zeros([BLOCK_M, OTHER_PADDED], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        columns = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        x = load_tile(x_ptr, rows[:, None], columns[None, :], x_stride_t, x_stride_k, T, K,
                      True, K % BLOCK_K != 0, 1, ALIGNED_X)  # fmt: skip
        factor = _factor_chunk(u_ptr, u_stride_r, u_stride_k, columns, K, RANK, PADDED, BLOCK_K,
                               ALIGNED_FACTOR)  # fmt: skip
        acc = dot(x, factor, acc, PRECISION, INTERPRETED)
        other = _factor_chunk(other_u_ptr, other_u_stride_r, other_u_stride_k, columns, K,
                              OTHER_RANK, OTHER_PADDED, BLOCK_K, ALIGNED_OTHER)  # fmt: skip
        other_acc = dot(x, other, other_acc, PRECISION, INTERPRETED)
    dtype = x_ptr.dtype.element_ty
    latent = _as_latent(acc, bias_ptr, bias_stride, dtype, RANK, PADDED, HAS_BIAS)
    other_latent = _as_latent(
        other_acc, other_bias_ptr, other_bias_stride, dtype, OTHER_RANK, OTHER_PADDED,
        HAS_OTHER_BIAS,
    )  # fmt: skip
    return latent, other_latent


@triton.jit
def lift_and_store(
    latent, v_ptr, v_stride_o, v_stride_r, bias_ptr, bias_stride, out_ptr, rows, T, first,
    COLUMNS: tl.constexpr, OUT: tl.constexpr, RANK: tl.constexpr, PADDED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ALIGNED_FACTOR: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Columns ``first`` to ``first`` + COLUMNS of y, those there are, into out [T, OUT]."""
    FIT: tl.constexpr = OUT % BLOCK_O == 0 and OUT % COLUMNS == 0
    ranks = tl.arange(0, PADDED).to(tl.int64)
    bias = tl.zeros([BLOCK_O], tl.float32)
    if HAS_BIAS:  # one step ahead: the pipeliner leaves loads as small as this alone
        columns = (first + tl.arange(0, BLOCK_O)).to(tl.int64)
        bias = load_bias(bias_ptr, columns, bias_stride, OUT, False)
    for start in tl.range(0, COLUMNS, BLOCK_O):
        columns = (first + start + tl.arange(0, BLOCK_O)).to(tl.int64)
        factor = load_tile(
            v_ptr, ranks[:, None], columns[None, :], v_stride_r, v_stride_o, RANK, OUT,
            RANK != PADDED, not FIT, ALIGNED_FACTOR, 1,
        )  # fmt: skip
        lifted = dot(latent, factor, None, PRECISION, INTERPRETED)
        if HAS_BIAS:
            lifted += bias[None, :]
            bias = load_bias(bias_ptr, columns + BLOCK_O, bias_stride, OUT, False)
        inside = rows[:, None] < T
        if not FIT:
            inside = inside & (columns[None, :] < OUT)
        out_ptrs = out_ptr + rows[:, None] * OUT + columns[None, :]
        tl.store(out_ptrs, lifted.to(out_ptr.dtype.element_ty), mask=inside)
