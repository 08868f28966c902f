"""The intermediate of a feed-forward, lifted and activated in one Triton kernel.

    h = act(P_u V_uᵀ + b_u)            or, gated,    h = act(P_g V_gᵀ + b_g) · (P_u V_uᵀ + b_u)

Operands as ``feed_forward_operands.py`` has them: latents P [T, R], factors V [F, R], biases [F].
A program computes a tile of h, BLOCK_M × BLOCK_N, over the ranks in steps of BLOCK_K: first up's
side, which it puts where h will stand, then the gate's, in the same accumulators.

Bytes from memory: the operands, from the second-level cache once a row (or column) of tiles, and
h; gated, h is written twice and read once there. Never written: what is activated, which library
matmuls write and a second pass reads again. Rounds up's side, the activated gate and h, as unfused;
the rest is float32.

Tiles are read through tensor descriptors, so every row has to begin at a multiple of 16 bytes.
"""

import triton
import triton.language as tl
from flashsvd_compile.kernels.activations_triton import activate
from flashsvd_compile.kernels.lifted_activation_tiles import BLOCK_K, group_rows
from flashsvd_compile.kernels.primitives import (
    Described,
    absent_operand,
    dot,
    is_empty,
    launch,
)
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor


@triton.jit
def _lifted(
    latent, factor, bias, row, column, columns, F,
    R: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """A tile of P Vᵀ + b from ``row`` and ``column`` on, in float32."""
    lifted = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if HAS_BIAS:  # first, where registers are free
        loaded = tl.load(bias + columns, mask=columns < F, other=0.0)
        lifted += loaded.to(tl.float32)[None, :]
    for rank in tl.range(0, R, BLOCK_K):
        latent_tile = latent.load([row, rank])
        factor_tile = factor.load([column, rank]).T
        lifted = dot(latent_tile, factor_tile, lifted, "ieee", INTERPRETED)
    return lifted


@triton.jit
def _lifted_activation_kernel(
    out, stride_om, T, F, up_bias, gate_bias, up, up_factor, gate, gate_factor,
    R_U: tl.constexpr, R_G: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    HAS_UP_BIAS: tl.constexpr, HAS_GATE_BIAS: tl.constexpr, GROUP_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    row_tiles = tl.cdiv(T, BLOCK_M)
    column_tiles = tl.cdiv(F, BLOCK_N)
    program = tl.program_id(0)
    group = program // (GROUP_ROWS * column_tiles)
    group_rows = tl.minimum(row_tiles - group * GROUP_ROWS, GROUP_ROWS)
    within = program % (GROUP_ROWS * column_tiles)
    row = (group * GROUP_ROWS + within % group_rows) * BLOCK_M
    column = (within // group_rows) * BLOCK_N
    columns = column + tl.arange(0, BLOCK_N)
    inside = (row + tl.arange(0, BLOCK_M) < T)[:, None] & (columns < F)[None, :]
    # One pointer and offsets of 32 bits: pointers for each element would cost the registers that
    # let a second program run beside this one, which computes while this one stores.
    first = out + row.to(tl.int64) * stride_om + column
    offsets = tl.arange(0, BLOCK_M)[:, None] * stride_om + tl.arange(0, BLOCK_N)[None, :]
    DTYPE: tl.constexpr = out.dtype.element_ty

    hidden = _lifted(
        up, up_factor, up_bias, row, column, columns, F, R_U, HAS_UP_BIAS,
        BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED,
    )  # fmt: skip
    if GATED:
        # In registers it would take what a second program needs. It comes back from the
        # second-level cache.
        tl.store(first + offsets, hidden.to(DTYPE), mask=inside)
        tl.debug_barrier()
        gated = _lifted(
            gate, gate_factor, gate_bias, row, column, columns, F, R_G, HAS_GATE_BIAS,
            BLOCK_M, BLOCK_N, BLOCK_K, INTERPRETED,
        )  # fmt: skip
        # Rounded, so that 16 bits an element change places to be where the others come back.
        activated = activate(gated, ACTIVATION, True).to(DTYPE).to(tl.float32)
        hidden = activated * tl.load(first + offsets, mask=inside, other=0.0).to(tl.float32)
    else:
        hidden = activate(hidden, ACTIVATION, True)
    tl.store(first + offsets, hidden.to(DTYPE), mask=inside)


def lift_and_activate(
    out: Tensor,
    up: Tensor,
    up_factor: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_factor: Tensor | None,
    gate_bias: Tensor | None,
    activation: str,
    *,
    tile: TileConfig,
) -> Tensor:
    """h [T, F] into ``out``, contiguous as biases are; latents and factors `is_describable`, all of
    16 bits an element."""
    if is_empty(out):
        return out
    (rows, rank_up), width = up.shape, up_factor.shape[0]
    gate = up if gate is None else gate
    is_gated = gate_factor is not None
    gate_factor = up_factor if gate_factor is None else gate_factor

    def described(x: Tensor, block_rows: int) -> Described:
        return Described(x, (block_rows, BLOCK_K))

    absent = absent_operand(out)
    operands = (
        out, out.stride(0), rows, width,
        absent if up_bias is None else up_bias, absent if gate_bias is None else gate_bias,
        described(up, tile.block_m), described(up_factor, tile.block_n),
        described(gate, tile.block_m), described(gate_factor, tile.block_n),
    )  # fmt: skip
    launch(
        _lifted_activation_kernel,
        (triton.cdiv(rows, tile.block_m) * triton.cdiv(width, tile.block_n),),
        tile,
        operands,
        R_U=rank_up,
        R_G=gate.shape[1],
        ACTIVATION=activation,
        GATED=is_gated,
        HAS_UP_BIAS=up_bias is not None,
        HAS_GATE_BIAS=gate_bias is not None,
        GROUP_ROWS=group_rows((rank_up, gate.shape[1])),
        BLOCK_K=BLOCK_K,
    )
    return out
