"""The low-rank feed-forward from x to y in one kernel: not even latents reach memory.

    P_u = x U_uᵀ + a_u                 and, gated,   P_g = x_g U_gᵀ + a_g
    h = act(P_u V_uᵀ + b_u)            or, gated,    h = act(P_g V_gᵀ + b_g) · (P_u V_uᵀ + b_u)
    S = h U_dᵀ + a_d
    y = S V_dᵀ + b_d

Notation (operands: ``feed_forward_whole_operands.py``):
    T rows, K hidden size in (K_G the gate's), F intermediate size, OUT hidden size out
    R_U, R_G, R_D the ranks; PADDED_… padded to powers of two, each one tile
    BLOCK_M rows of one program; BLOCK_K columns of x, BLOCK_N of h, BLOCK_O of y per step
    GATE "none", or what P_g is: "latent" (P_u itself), "x" (of the same x), "own" (of another)

One program owns BLOCK_M rows and runs three loops: over K, latents in float32 accumulators, rounded
to the dtype in registers; over F, as ``feed_forward_stream.py`` has it; over OUT, S rounded, lifted
and stored. It rounds where the unfused expression does, but for h, which is rounded once.

Bytes of memory: x read once, y written once, the factors read by every program, mostly from L2. On
chip only: both latents, h, pre-activations. No loop can be skipped: their bounds are constants.
float32 multiplies exactly ("ieee") unless ``torch.backends.cuda.matmul.allow_tf32``.
"""

import torch
import triton
import triton.language as tl
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.feed_forward_stream import stream_intermediate
from flashsvd_compile.kernels.feed_forward_whole_operands import WholeFeedForwardOperands
from flashsvd_compile.kernels.feed_forward_whole_tiles import (
    WholeExtents,
    WholeTile,
    default_tile,
    rank_padded,
)
from flashsvd_compile.kernels.outer_products import latent_tile, latent_tiles, lift_and_store
from flashsvd_compile.kernels.primitives import (
    INTERPRETED_SRAM_BYTES,
    KERNEL_DTYPES,
    absent_operand,
    is_empty,
    launch,
    pointer_and_strides,
    row_alignment,
)
from flashsvd_compile.kernels.tile_loads import load_bias
from torch import Tensor


@triton.jit
def whole_feed_forward_kernel(
    x_ptr, x_stride_t, x_stride_k,
    up_u_ptr, up_u_stride_r, up_u_stride_k, up_latent_bias_ptr, up_latent_bias_stride,
    up_v_ptr, up_v_stride_f, up_v_stride_r, up_bias_ptr, up_bias_stride,
    gate_x_ptr, gate_x_stride_t, gate_x_stride_k,
    gate_u_ptr, gate_u_stride_r, gate_u_stride_k, gate_latent_bias_ptr, gate_latent_bias_stride,
    gate_v_ptr, gate_v_stride_f, gate_v_stride_r, gate_bias_ptr, gate_bias_stride,
    down_u_ptr, down_u_stride_d, down_u_stride_f, down_latent_bias_ptr, down_latent_bias_stride,
    down_v_ptr, down_v_stride_o, down_v_stride_d, down_bias_ptr, down_bias_stride,
    out_ptr,
    T,
    K: tl.constexpr, K_G: tl.constexpr, F: tl.constexpr, OUT: tl.constexpr,
    R_U: tl.constexpr, R_G: tl.constexpr, R_D: tl.constexpr,
    PADDED_U: tl.constexpr, PADDED_G: tl.constexpr, PADDED_D: tl.constexpr,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr,
    HAS_UP_LATENT_BIAS: tl.constexpr, HAS_UP_BIAS: tl.constexpr,
    HAS_GATE_LATENT_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr,
    HAS_DOWN_LATENT_BIAS: tl.constexpr, HAS_DOWN_BIAS: tl.constexpr,
    ALIGNED_X: tl.constexpr, ALIGNED_UP_U: tl.constexpr, ALIGNED_UP_V: tl.constexpr,
    ALIGNED_GATE_X: tl.constexpr, ALIGNED_GATE_U: tl.constexpr, ALIGNED_GATE_V: tl.constexpr,
    ALIGNED_DOWN_U: tl.constexpr, ALIGNED_DOWN_V: tl.constexpr,
    SHORT: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    # 64 bits before the product with a stride: a tensor may hold more than 2³¹ elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)

    if GATE == "x":
        up, gate = latent_tiles(
            x_ptr, x_stride_t, x_stride_k,
            up_u_ptr, up_u_stride_r, up_u_stride_k, up_latent_bias_ptr, up_latent_bias_stride,
            gate_u_ptr, gate_u_stride_r, gate_u_stride_k,
            gate_latent_bias_ptr, gate_latent_bias_stride, rows, T,
            K, R_U, PADDED_U, HAS_UP_LATENT_BIAS, R_G, PADDED_G, HAS_GATE_LATENT_BIAS,
            ALIGNED_X, ALIGNED_UP_U, ALIGNED_GATE_U, PRECISION, INTERPRETED, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        up = latent_tile(
            x_ptr, x_stride_t, x_stride_k, up_u_ptr, up_u_stride_r, up_u_stride_k,
            up_latent_bias_ptr, up_latent_bias_stride, rows, T, K, R_U, PADDED_U,
            HAS_UP_LATENT_BIAS, ALIGNED_X, ALIGNED_UP_U, PRECISION, INTERPRETED, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        gate = up
        if GATE == "own":
            gate = latent_tile(
                gate_x_ptr, gate_x_stride_t, gate_x_stride_k,
                gate_u_ptr, gate_u_stride_r, gate_u_stride_k,
                gate_latent_bias_ptr, gate_latent_bias_stride, rows, T, K_G, R_G, PADDED_G,
                HAS_GATE_LATENT_BIAS, ALIGNED_GATE_X, ALIGNED_GATE_U, PRECISION, INTERPRETED,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip

    acc = stream_intermediate(
        up, None, 0, 0, up_v_ptr, up_v_stride_f, up_v_stride_r, up_bias_ptr, up_bias_stride,
        gate, None, 0, 0, gate_v_ptr, gate_v_stride_f, gate_v_stride_r, gate_bias_ptr,
        gate_bias_stride, down_u_ptr, down_u_stride_d, down_u_stride_f,
        rows, T, F, R_U, R_G, R_D, PADDED_U, PADDED_G, PADDED_D, ACTIVATION, GATE != "none",
        HAS_UP_BIAS, HAS_GATE_BIAS, SHORT, ALIGNED_UP_V, ALIGNED_GATE_V, ALIGNED_DOWN_U,
        PRECISION, INTERPRETED, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if HAS_DOWN_LATENT_BIAS:
        ranks = tl.arange(0, PADDED_D).to(tl.int64)
        bias = load_bias(down_latent_bias_ptr, ranks, down_latent_bias_stride, R_D, False)
        acc += bias[None, :]

    lift_and_store(
        acc.to(x_ptr.dtype.element_ty), down_v_ptr, down_v_stride_o, down_v_stride_d,
        down_bias_ptr, down_bias_stride, out_ptr, rows, T, 0, OUT, OUT, R_D, PADDED_D,
        HAS_DOWN_BIAS, ALIGNED_DOWN_V, PRECISION, INTERPRETED, BLOCK_O,
    )  # fmt: skip


def streamed_whole_feed_forward(
    of: WholeFeedForwardOperands,
    *,
    tile: WholeTile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """y [T, OUT], contiguous. Operands of any strides; ``tile`` defaults to `default_tile`."""
    x = of.x
    if x.dtype not in KERNEL_DTYPES:
        raise ValueError(f"a streamed feed-forward takes {KERNEL_DTYPES}, not {x.dtype}")
    out = of.allocate_output(out)
    if tile is None:
        tile = _default_tile(of)
    if is_empty(out):
        return out

    absent = absent_operand(x)
    operands = (
        *pointer_and_strides(x, absent, 2),
        *pointer_and_strides(of.up_u, absent, 2),
        *pointer_and_strides(of.up_latent_bias, absent, 1),
        *pointer_and_strides(of.up_v, absent, 2),
        *pointer_and_strides(of.up_bias, absent, 1),
        *pointer_and_strides(of.gate_x, absent, 2),
        *pointer_and_strides(of.gate_u, absent, 2),
        *pointer_and_strides(of.gate_latent_bias, absent, 1),
        *pointer_and_strides(of.gate_v, absent, 2),
        *pointer_and_strides(of.gate_bias, absent, 1),
        *pointer_and_strides(of.down_u, absent, 2),
        *pointer_and_strides(of.down_latent_bias, absent, 1),
        *pointer_and_strides(of.down_v, absent, 2),
        *pointer_and_strides(of.down_bias, absent, 1),
        out,
        of.rows,
    )
    rank_gate = of.rank_gate or 0
    launch(
        whole_feed_forward_kernel,
        (triton.cdiv(of.rows, tile.block_m),),
        tile,
        operands,
        K=of.hidden_size,
        K_G=0 if of.gate_x is None else of.gate_x.shape[1],
        F=of.intermediate_size,
        OUT=of.out_size,
        R_U=of.rank_up,
        R_G=rank_gate,
        R_D=of.rank_down,
        PADDED_U=rank_padded(of.rank_up),
        PADDED_G=rank_padded(rank_gate),
        PADDED_D=rank_padded(of.rank_down),
        ACTIVATION=of.activation,
        GATE=of.gate_from,
        HAS_UP_LATENT_BIAS=of.up_latent_bias is not None,
        HAS_UP_BIAS=of.up_bias is not None,
        HAS_GATE_LATENT_BIAS=of.gate_latent_bias is not None,
        HAS_GATE_BIAS=of.gate_bias is not None,
        HAS_DOWN_LATENT_BIAS=of.down_latent_bias is not None,
        HAS_DOWN_BIAS=of.down_bias is not None,
        ALIGNED_X=row_alignment(x),
        ALIGNED_UP_U=row_alignment(of.up_u),
        ALIGNED_UP_V=row_alignment(of.up_v),
        ALIGNED_GATE_X=row_alignment(of.gate_x),
        ALIGNED_GATE_U=row_alignment(of.gate_u),
        ALIGNED_GATE_V=row_alignment(of.gate_v),
        ALIGNED_DOWN_U=row_alignment(of.down_u),
        ALIGNED_DOWN_V=row_alignment(of.down_v),
        SHORT=x.element_size() == 2,
        PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
        BLOCK_K=tile.block_k,
        BLOCK_O=tile.block_o,
    )
    return out


def _default_tile(of: WholeFeedForwardOperands) -> WholeTile:
    sram_bytes = sram_bytes_of_device(of.x.device, INTERPRETED_SRAM_BYTES)
    extents = WholeExtents(
        rank_up=of.rank_up,
        rank_gate=of.rank_gate,
        rank_down=of.rank_down,
        intermediate_size=of.intermediate_size,
        gate_from=of.gate_from,
        element_bytes=of.x.element_size(),
        generation=generation_of(of.x.device),
    )
    tile = default_tile(extents, sram_bytes)
    if tile is None:
        raise ValueError(
            f"no tile of a feed-forward streamed whole fits {sram_bytes} bytes of shared memory at "
            f"ranks up {of.rank_up}, gate {of.rank_gate}, down {of.rank_down} in {of.x.dtype}"
        )
    return tile
