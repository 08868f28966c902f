"""Rank-space attention on Triton: operands as ``attention_operands.py`` has them, one launch."""

import torch
import triton
from flashsvd_compile.kernels.attention_extents import (
    SWIZZLE_BYTES,
    AttentionExtents,
    common_width,
    lift_chunk,
    output_chunk,
    power_of_two_in,
    rank_padded,
    widened,
)
from flashsvd_compile.kernels.attention_kernel import rank_space_attention_kernel
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from flashsvd_compile.kernels.attention_tiles import default_tile, last_resort, sram_bytes_of
from flashsvd_compile.kernels.checks import validate_output
from flashsvd_compile.kernels.devices import generation_of, sram_bytes_of_device
from flashsvd_compile.kernels.primitives import (
    KERNEL_DTYPES,
    Described,
    absent_operand,
    is_describable,
    is_empty,
    is_multiple,
    launch,
    row_alignment,
)
from flashsvd_compile.kernels.tiles import TileConfig
from torch import Tensor

# Of the second and third axis of a CUDA grid.
MAX_GRID_EXTENT = 65535

# Beyond every key, and with a tile's extent added still 32 bits.
MAX_DISTANCE = 2**30

# Shared memory that the interpreter's tiles are chosen for, so that they are those of a GPU.
INTERPRETER_SRAM_BYTES = 99 * 1024


def rank_space_attention(
    of: AttentionOperands,
    *,
    tile: TileConfig | None = None,
    out: Tensor | None = None,
    place: tuple[int, int] | None = None,
    sram_budget: int = 0,
) -> Tensor:
    """[B, H, M, D_v], a view of memory laid out [B, M, H, D_v] unless ``out`` gives the buffer.

    ``place``: the batch and head at which the result begins in an ``out`` that is larger.

    Where operands lie in memory otherwise than ``tile`` was chosen for, another may be taken, of at
    most ``sram_budget`` bytes of shared memory if that is given.
    """
    shape, num_heads = of.shape, of.num_heads
    q, k, v, mask = of.q, of.k, of.v, of.mask
    if q.dtype not in KERNEL_DTYPES:
        supported = ", ".join(str(dtype) for dtype in KERNEL_DTYPES)
        raise ValueError(f"the kernel runs {supported}, q is {q.dtype}")
    out_shape = (shape.batch, num_heads, shape.queries, shape.head_dim_v)
    if out is None:
        rows = (shape.batch, shape.queries, num_heads, shape.head_dim_v)
        out = torch.empty(rows, dtype=q.dtype, device=q.device).transpose(1, 2)
    else:
        validate_output(out if place is None else _part(out, place, out_shape), out_shape, q)
    if is_empty(out):
        return out
    if is_empty(k):  # no query sees a key
        (out if place is None else _part(out, place, out_shape)).zero_()
        return out
    k, v = _rank_innermost(k), _rank_innermost(v)
    width = common_width(shape.rank_q, shape.rank_k, shape.rank_v, q.element_size())
    is_widened = not all(map(_is_rank_contiguous, (q, k, v, of.q_factor, of.k_factor, of.v_factor)))
    if is_widened:
        width = SWIZZLE_BYTES // q.element_size()
    can_be_described = all(
        is_describable(x) and x.shape[-1] == rank_padded(x.shape[-1], width) for x in (k, v)
    )
    if tile is None or is_widened or tile.is_described > can_be_described:
        extents = AttentionExtents(
            head_dim_qk=shape.head_dim_qk,
            head_dim_v=shape.head_dim_v,
            rank_q=shape.rank_q,
            rank_k=shape.rank_k,
            rank_v=shape.rank_v,
            q_lifted=of.q_factor is not None,
            v_lifted=of.v_factor is not None,
            element_bytes=q.element_size(),
            k_lifted=of.k_factor is not None,
            is_float16=q.dtype == torch.float16,
            mask=_kind_of(mask),
            is_causal=of.is_causal or of.behind is not None,
            keys_multiple=power_of_two_in(shape.keys) if isinstance(shape.keys, int) else None,
            generation=generation_of(q.device),
            is_describable=can_be_described,
            is_capped=of.softcap > 0,
            table_bytes=of.table_bytes,
            is_normed=of.q_norm_eps > 0,
        )
        sram_bytes = sram_bytes_of_device(q.device, INTERPRETER_SRAM_BYTES)
        sram_bytes = min(sram_bytes, sram_budget or sram_bytes)
        if is_widened:
            extents = widened(extents)
        tile = _tile_that_fits(tile, extents, sram_bytes)
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    # By axis: a division by the number of tiles would stand at the start of every program.
    batches = 1 if shape.batch <= MAX_GRID_EXTENT else -(-shape.batch // MAX_GRID_EXTENT)
    tiles = triton.cdiv(shape.queries, tile.block_m)
    grid = (tiles, num_heads * batches, triton.cdiv(shape.batch, batches))
    # Dense keys have theirs in them.
    k_bias = None if of.k_factor is None else of.counted_k_bias
    optional = (
        of.q_factor, of.q_bias, of.k_factor, of.v_factor, of.v_bias, k_bias, of.sink,
        of.cos, of.sin, mask,
    )  # fmt: skip
    # An absent operand has strides of 0 and is never read.
    absent = absent_operand(q)
    operands = (
        q, k, v,
        *(absent if x is None else x for x in optional),
        out, absent if of.q_norm is None else of.q_norm.contiguous(),
        *((_described(x, tile) for x in (k, v)) if tile.is_described else (absent, absent)),
        *q.stride(), *k.stride(), *v.stride(),
        *_strides(of.q_factor, 3), *_strides(of.q_bias, 2),
        *_strides(of.k_factor, 3), *_strides(of.v_factor, 3), *_strides(of.v_bias, 2),
        *_strides(k_bias, 2), *_strides(of.sink, 1),
        *_table_strides(of.cos, 3), *_table_strides(of.sin, 3), *_table_strides(mask, 4),
        *out.stride(),
        of.scale, shape.batch, shape.queries, shape.keys, *(place or (0, 0)),
        _within_32_bits(of.ahead), _within_32_bits(0 if of.behind is None else of.behind),
    )  # fmt: skip
    launch(
        rank_space_attention_kernel, grid, tile, operands,
        BATCHES=batches,
        H=num_heads, H_Q=q.shape[1], H_K=k.shape[1], H_V=v.shape[1],
        H_FQ=_heads(of.q_factor), H_BQ=_heads(of.q_bias), H_FK=_heads(of.k_factor),
        H_FV=_heads(of.v_factor), H_BV=_heads(of.v_bias),
        H_BK=_heads(k_bias), H_S=_heads(of.sink),
        D=shape.head_dim_qk, D_V=shape.head_dim_v,
        R_Q=shape.rank_q, R_K=shape.rank_k, R_V=shape.rank_v,
        HAS_Q_FACTOR=of.q_factor is not None, HAS_Q_BIAS=of.q_bias is not None,
        HAS_K_FACTOR=of.k_factor is not None,
        HAS_V_FACTOR=of.v_factor is not None, HAS_V_BIAS=of.v_bias is not None,
        HAS_K_BIAS=k_bias is not None, HAS_SINK=of.sink is not None, SOFTCAP=float(of.softcap),
        ROTARY_DIM=of.rotary_dim, ROTARY_PAIR=of.rotary_pair,
        HAS_Q_NORM=of.q_norm is not None, NORM_EPS=float(of.q_norm_eps),
        ONE_ANGLE=of.cos is not None and of.cos.shape[-1] != of.rotary_dim,
        MASK=_kind_of(mask), IS_CAUSAL=of.is_causal,
        HAS_AHEAD=of.is_shifted, HAS_BEHIND=of.behind is not None,
        QUERIES_FIT=is_multiple(shape.queries, tile.block_m),
        KEYS_FIT=is_multiple(shape.keys, tile.block_n),
        BLOCK_D=lift_chunk(shape.head_dim_qk, width), BLOCK_RQ=lift_chunk(shape.rank_q, width),
        BLOCK_DV=output_chunk(shape.head_dim_v, width, is_widened),
        R_K_PADDED=rank_padded(shape.rank_k, width), R_V_PADDED=rank_padded(shape.rank_v, width),
        DESCRIBED=bool(tile.is_described),
        ALIGNED_Q=row_alignment(q), ALIGNED_K=row_alignment(k), ALIGNED_V=row_alignment(v),
        ALIGNED_FQ=row_alignment(of.q_factor), ALIGNED_FK=row_alignment(of.k_factor),
        ALIGNED_FV=row_alignment(of.v_factor),
        PRECISION="tf32" if tf32 else "ieee",
    )  # fmt: skip
    return out


def _part(out: Tensor, place: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    batch, head = place
    return out[batch : batch + shape[0], head : head + shape[1]]


def _described(latent: Tensor, tile: TileConfig) -> Described:
    return Described(latent, (1, 1, tile.block_n, latent.shape[-1]))


def _heads(operand: Tensor | None) -> int:
    return 1 if operand is None else operand.shape[0]


def _strides(operand: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if operand is None else operand.stride()


def _rank_innermost(latent: Tensor) -> Tensor:
    """``latent``, copied where another dimension runs fastest in memory.

    Its tiles would then swizzle by BLOCK_N, unlike the others: see `common_width`.
    """
    return latent if latent.stride(-1) == 1 or latent.shape[-1] == 1 else latent.contiguous()


def _is_rank_contiguous(operand: Tensor | None) -> bool:
    """Whether a tile of it lies in shared memory with its rank innermost."""
    return operand is None or (operand.stride(-1) == 1 and operand.shape[-1] > 1)


def _kind_of(mask: Tensor | None) -> str:
    """A boolean mask that is alike for all queries is scanned ahead of the loop over keys."""
    if mask is None:
        return "none"
    if mask.dtype != torch.bool:
        return "added"
    return "rows" if mask.shape[2] != 1 else "scanned"


def _table_strides(table: Tensor | None, dims: int) -> tuple[int, ...]:
    """A dimension of size 1 is read again and again: its stride is 0, whatever it says."""
    if table is None:
        return (0,) * dims
    return tuple(0 if n == 1 else s for n, s in zip(table.shape, table.stride(), strict=True))


def _within_32_bits(distance: int) -> int:
    """As far as any key is from any query; a traced size is as it is."""
    if isinstance(distance, torch.SymInt):
        return distance
    return max(-MAX_DISTANCE, min(distance, MAX_DISTANCE))


def _tile_that_fits(
    tile: TileConfig | None, extents: AttentionExtents, sram_bytes: int
) -> TileConfig:
    """``tile``, which may have been chosen before it was known how operands lie, or the default;
    or, rather than none, one that spills registers."""
    is_legal = tile is not None and extents.can_be_described >= tile.is_described
    if tile is not None and is_legal and sram_bytes_of(tile, extents) <= sram_bytes:
        return tile
    tile = default_tile(extents, sram_bytes) or last_resort(extents, sram_bytes)
    if tile is None:
        raise ValueError(
            f"no attention tile of ranks {extents.rank_q}, {extents.rank_k}, {extents.rank_v} (q, "
            f"k, v, as wide as they lie in memory) fits {sram_bytes} bytes of shared memory"
        )
    return tile
