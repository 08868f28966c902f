"""The middle of a low-rank feed-forward on chip: latents in, S in the accumulator, nothing wide.

Notation as in ``feed_forward.py``. Of an operand whose rank is contiguous in memory each row begins
at a multiple of ALIGNED_… bytes; 1 where nothing is known.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.activations_triton import activate
from flashsvd_compile.kernels.primitives import dot
from flashsvd_compile.kernels.tile_loads import load_bias, load_tile


@triton.jit
def load_latent(ptr, stride_t, stride_r, rows, T, start, RANK: tl.constexpr, CHUNK: tl.constexpr):
    """CHUNK ranks of a latent from ``start`` on, of the int64 ``rows``."""
    ranks = (start + tl.arange(0, CHUNK)).to(tl.int64)
    return load_tile(
        ptr, rows[:, None], ranks[None, :], stride_t, stride_r, T, RANK, True, RANK % CHUNK != 0
    )


@triton.jit
def _lift(
    latent, latent_ptr, latent_stride_t, latent_stride_r,
    factor_ptr, factor_stride_f, factor_stride_r,
    rows, T, columns,
    F: tl.constexpr, RANK: tl.constexpr, CHUNK: tl.constexpr, F_FIT: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """P Vᵀ of one tile of rows × columns, in float32; ``latent`` is P where RANK is one chunk."""
    CHECK_RANK: tl.constexpr = RANK % CHUNK != 0
    ranks = tl.arange(0, CHUNK)
    columns = columns.to(tl.int64)[None, :]
    if RANK <= CHUNK:
        factor = load_tile(
            factor_ptr, ranks.to(tl.int64)[:, None], columns, factor_stride_r, factor_stride_f,
            RANK, F, CHECK_RANK, not F_FIT, ALIGNED, 1,
        )  # fmt: skip
        lifted = dot(latent, factor, None, PRECISION, INTERPRETED)
    else:
        lifted = tl.zeros([rows.shape[0], columns.shape[1]], tl.float32)
        for start in tl.range(0, RANK, CHUNK):
            chunk = load_latent(latent_ptr, latent_stride_t, latent_stride_r, rows, T,
                                start, RANK, CHUNK)  # fmt: skip
            factor = load_tile(
                factor_ptr, (start + ranks).to(tl.int64)[:, None], columns,
                factor_stride_r, factor_stride_f, RANK, F, CHECK_RANK, not F_FIT, ALIGNED, 1,
            )  # fmt: skip
            lifted = dot(chunk, factor, lifted, PRECISION, INTERPRETED)
    return lifted


@triton.jit
def stream_intermediate(
    up, up_ptr, up_stride_t, up_stride_r,
    up_factor_ptr, up_factor_stride_f, up_factor_stride_r, up_bias_ptr, up_bias_stride,
    gate, gate_ptr, gate_stride_t, gate_stride_r,
    gate_factor_ptr, gate_factor_stride_f, gate_factor_stride_r, gate_bias_ptr, gate_bias_stride,
    down_factor_ptr, down_factor_stride_d, down_factor_stride_f,
    rows, T,
    F: tl.constexpr, R_U: tl.constexpr, R_G: tl.constexpr, R_D: tl.constexpr,
    CHUNK_U: tl.constexpr, CHUNK_G: tl.constexpr, PADDED_D: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, SHORT: tl.constexpr,
    ALIGNED_U: tl.constexpr, ALIGNED_G: tl.constexpr, ALIGNED_D: tl.constexpr,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """h U_dᵀ [BLOCK_M, PADDED_D] of one tile of rows, in float32, before its bias.

    ``up`` and ``gate`` are the tiles of the latents. Where a rank is more than one chunk its tile
    is read again from the pointer at every step instead.
    """
    F_FIT: tl.constexpr = F % BLOCK_N == 0
    ranks_d = tl.arange(0, PADDED_D).to(tl.int64)

    # The pipeliner leaves loads as small as a bias alone: each is asked for one step ahead, or its
    # latency would stand before every lift.
    up_bias = tl.zeros([BLOCK_N], tl.float32)
    gate_bias = tl.zeros([BLOCK_N], tl.float32)
    first = tl.arange(0, BLOCK_N).to(tl.int64)
    if HAS_UP_BIAS:
        up_bias = load_bias(up_bias_ptr, first, up_bias_stride, F, False)
    if HAS_GATE_BIAS:
        gate_bias = load_bias(gate_bias_ptr, first, gate_bias_stride, F, False)

    acc = tl.zeros([BLOCK_M, PADDED_D], tl.float32)
    for start in tl.range(0, F, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        following = (columns + BLOCK_N).to(tl.int64)
        hidden = _lift(
            up, up_ptr, up_stride_t, up_stride_r,
            up_factor_ptr, up_factor_stride_f, up_factor_stride_r,
            rows, T, columns, F, R_U, CHUNK_U, F_FIT, ALIGNED_U, PRECISION, INTERPRETED,
        )  # fmt: skip
        if HAS_UP_BIAS:
            hidden += up_bias[None, :]
            up_bias = load_bias(up_bias_ptr, following, up_bias_stride, F, False)
        if GATED:
            gated = _lift(
                gate, gate_ptr, gate_stride_t, gate_stride_r,
                gate_factor_ptr, gate_factor_stride_f, gate_factor_stride_r,
                rows, T, columns, F, R_G, CHUNK_G, F_FIT, ALIGNED_G, PRECISION, INTERPRETED,
            )  # fmt: skip
            if HAS_GATE_BIAS:
                gated += gate_bias[None, :]
                gate_bias = load_bias(gate_bias_ptr, following, gate_bias_stride, F, False)
            hidden = activate(gated, ACTIVATION, SHORT) * hidden
        else:
            hidden = activate(hidden, ACTIVATION, SHORT)
        # Beyond F the factor is 0, so what the activation makes of a padded column is dropped.
        down_factor = load_tile(
            down_factor_ptr, columns.to(tl.int64)[:, None], ranks_d[None, :],
            down_factor_stride_f, down_factor_stride_d, F, R_D, not F_FIT, R_D != PADDED_D,
            ALIGNED_D, 1,
        )  # fmt: skip
        acc = dot(hidden.to(down_factor.dtype), down_factor, acc, PRECISION, INTERPRETED)
    return acc
