"""Which keys a query may see by its place alone, beside any mask. Plain torch.

    query m sees key n   iff   m - behind <= n <= m + ahead

either bound may be missing: ``ahead`` counts where a call ``is_causal``, and is 0 for SDPA's own
flag; ``behind`` is None without a window. Each query sees as many keys as the window is long, so
blocks of queries read blocks of keys, and the rest of the scores is never computed.
"""

from collections.abc import Iterator

import torch
from flashsvd_compile.kernels.attention_extents import BAND_QUERIES
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from torch import Tensor

Block = tuple[slice, slice]


def blocks_of(of: AttentionOperands) -> Iterator[Block]:
    """Queries, and the keys that these may see: disjoint blocks of all queries, in order.

    One block where there is no window, or where a window leaves little out.
    """
    shape = of.shape
    if of.behind is None or of.behind + BAND_QUERIES >= shape.keys:
        yield slice(0, shape.queries), slice(0, shape.keys)
        return
    for first in range(0, shape.queries, BAND_QUERIES):
        stop = min(first + BAND_QUERIES, shape.queries)
        end = stop + of.ahead if of.is_causal else shape.keys
        begin = min(max(first - of.behind, 0), shape.keys)
        yield slice(first, stop), slice(begin, max(begin, min(end, shape.keys)))


def mask_of(of: AttentionOperands, block: Block) -> Tensor | None:
    """The mask of a block as SDPA takes it, bounds and all; None where there is none.

    None, too, for what SDPA's own ``is_causal`` says of one block of everything.
    """
    queries, keys = block
    mask = None if of.mask is None else _of_block(of.mask, block)
    if not of.is_banded and (mask is None or not of.is_causal):
        return _as_sdpa_takes(mask, of)
    device = of.q.device
    rows = torch.arange(queries.start, queries.stop, device=device)[None, None, :, None]
    columns = torch.arange(keys.start, keys.stop, device=device)
    shown = torch.ones((), dtype=torch.bool, device=device)
    if of.is_causal:
        shown = columns <= rows + of.ahead
    if of.behind is not None:
        shown = shown & (columns >= rows - of.behind)
    if mask is None:
        return shown
    if mask.dtype == torch.bool:
        return mask & shown
    return _as_sdpa_takes(mask.masked_fill(~shown, float("-inf")), of)


def _of_block(mask: Tensor, block: Block) -> Tensor:
    for dim, part in zip((2, 3), block, strict=True):
        if mask.shape[dim] != 1:
            mask = mask.narrow(dim, part.start, part.stop - part.start)
    return mask


def _as_sdpa_takes(mask: Tensor | None, of: AttentionOperands) -> Tensor | None:
    """In a dtype that goes with the operands'."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask.to(torch.promote_types(mask.dtype, of.q.dtype))
