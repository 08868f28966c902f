"""What torch's flash attention on a CPU takes for itself while it runs.

Each thread has a tile of scores, their maxima and sums, and a tile of the output, in the type that
sums are made in; operands of two bytes have the probabilities a second time, rounded. The sums of
each row are a second output, which only gradients read. From torch 2.13's
``aten/src/ATen/native/cpu/FlashAttentionKernel.cpp``, without what it packs for AMX units; equal to
the allocations of torch 2.13 with AVX2, for float32, bfloat16 and float16.
"""

import sympy
import torch

from flashsvd_compile.analysis.axes import Size, shape_of

_KEYS_OF_A_TILE = 512


def flash_scratch_bytes(
    batch: Size, heads: Size, rows: Size, keys: Size, width: Size, dtype: torch.dtype
) -> Size:
    """For q [batch, heads, rows, width] and ``keys`` keys, beyond operands and output."""
    of_sums = max(dtype.itemsize, 4)
    tile_rows, tile_keys = _rows_of_a_tile(rows), sympy.Min(_KEYS_OF_A_TILE, keys)
    of_a_thread = (tile_keys + 2 + width) * of_sums
    if dtype.itemsize < of_sums:
        of_a_thread += tile_keys * dtype.itemsize
    return torch.get_num_threads() * tile_rows * of_a_thread + batch * heads * rows * of_sums


def mask_scratch_bytes(
    mask: torch.Tensor | None, rows: Size, keys: Size, is_bounded: bool, dtype: torch.dtype
) -> Size:
    """What becomes of ``mask``, which broadcasts to [batch, heads, rows, keys], beside q of
    ``dtype``: a boolean one is added as numbers of that dtype, and bounds are put into it before
    (``kernels/attention_band.py``), at the size of the scores. None: bounds alone are its mask."""
    own = torch.bool if mask is None else mask.dtype
    leading = sympy.S.One if mask is None else sympy.prod(shape_of(mask)[:-2])
    elements = leading * rows * keys
    if mask is not None and not is_bounded:
        elements = sympy.prod(shape_of(mask))
    added = elements * dtype.itemsize if own != dtype else 0
    bounded = elements * own.itemsize if is_bounded else 0
    return added + bounded


def _rows_of_a_tile(rows: Size) -> Size:
    return sympy.Piecewise((256, rows >= 768), (64, rows >= 192), (sympy.Min(32, rows), True))
