"""How every kernel here reads a tile and a bias: 64-bit offsets, zero beyond an operand's end."""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    base,
    rows,
    columns,
    stride_row,
    stride_column,
    row_limit,
    column_limit,
    CHECK_ROWS: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    ALIGNED_ROWS: tl.constexpr = 1,
    ALIGNED_COLUMNS: tl.constexpr = 1,
):
    """A 2-D tile at int64 ``rows`` [I, 1] and ``columns`` [1, J]; zero beyond the limits.

    Along a dimension that is contiguous in memory each run of it begins at a multiple of
    ALIGNED_… bytes; 1 leaves it to the compiler, which a hint of 1 would make forget what it knows.
    """
    pointers = base + (rows * stride_row + columns * stride_column)
    if ALIGNED_ROWS * ALIGNED_COLUMNS > 1:
        pointers = tl.multiple_of(pointers, (ALIGNED_ROWS, ALIGNED_COLUMNS))
    if CHECK_ROWS and CHECK_COLUMNS:
        tile = tl.load(pointers, mask=(rows < row_limit) & (columns < column_limit), other=0.0)
    elif CHECK_ROWS:
        tile = tl.load(pointers, mask=rows < row_limit, other=0.0)
    elif CHECK_COLUMNS:
        tile = tl.load(pointers, mask=columns < column_limit, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_bias(base, columns, stride, limit, FIT: tl.constexpr):
    """A bias at int64 ``columns``, in float32; zero beyond the limit."""
    if FIT:
        vector = tl.load(base + columns * stride)
    else:
        vector = tl.load(base + columns * stride, mask=columns < limit, other=0.0)
    return vector.to(tl.float32)
