"""Rank-space attention over blocks of the batch and of the heads, latents included.

    for each block:   P_q, P_k, P_v = x U_qᵀ + c_q, x U_kᵀ + c_k, x U_vᵀ + c_v
                      output[block] = attention of these (attention_operands.py)

Latents exist for one block at a time; the output is written where it belongs. Library matmuls make
the latents. An operand that is no product (or whose latent exists anyway) is sliced as it is. Takes
as long as attention does, plus the launches of each block. No autograd.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from torch import Tensor

# Writes the attention of a block into the whole output, from that batch and head on.
Attend = Callable[[AttentionOperands, Tensor, tuple[int, int]], object]


@dataclass(frozen=True)
class LatentSource:
    """A latent [B, heads, rows, R] that is not computed yet: x [B, rows, hidden] · uᵀ + bias.

    ``u`` [heads · R, hidden], heads outermost; ``bias`` [heads · R] or None.
    """

    x: Tensor
    u: Tensor
    bias: Tensor | None
    heads: int

    def block(self, batch: slice, heads: slice) -> Tensor:
        rank = self.u.shape[0] // self.heads
        rows = slice(heads.start * rank, heads.stop * rank)
        bias = None if self.bias is None else self.bias[rows]
        latent = F.linear(self.x[batch], self.u[rows], bias)
        return latent.unflatten(-1, (heads.stop - heads.start, rank)).transpose(1, 2)


@dataclass(frozen=True)
class BlockedAttention:
    """``of``: the operands, where a latent that has a source is an empty stand-in."""

    of: AttentionOperands
    sources: dict[str, LatentSource]

    def run(self, out: Tensor, attend: Attend, block_batch: int, block_heads: int) -> Tensor:
        """``out`` [B, H, M, D_v]; ``attend`` writes a block's attention where it belongs.

        Raises ValueError where ``block_heads`` cuts a group of heads that share an operand's head.
        """
        batch, num_heads = out.shape[:2]
        if min(block_batch, block_heads) < 1:
            raise ValueError(f"blocks of {block_batch} × {block_heads}: each must be at least 1")
        for heads in _steps(num_heads, block_heads):
            parts = self._of_heads(heads)
            for rows in _steps(batch, block_batch):
                attend(self._block(parts, rows, heads), out, (rows.start, heads.start))
        return out

    def _of_heads(self, heads: slice) -> AttentionOperands:
        """The operands that have no batch, for those heads."""
        of = self.of
        factors = ("q_factor", "q_bias", "k_factor", "v_factor", "v_bias", "k_bias", "sink")
        cut = {
            name: None if x is None else x[self._own_heads(x.shape[0], heads)]
            for name, x in ((name, getattr(of, name)) for name in factors)
        }
        return replace(of, num_heads=heads.stop - heads.start, **cut)

    def _block(self, parts: AttentionOperands, batch: slice, heads: slice) -> AttentionOperands:
        latents = {}
        for name in ("q", "k", "v"):
            latent, source = getattr(self.of, name), self.sources.get(name)
            if source is not None:
                latents[name] = source.block(batch, self._own_heads(source.heads, heads))
            else:
                latents[name] = latent[batch, self._own_heads(latent.shape[1], heads)]
        mask, whole = self.of.mask, slice(None)
        if mask is not None:
            mask = mask[
                batch if mask.shape[0] > 1 else whole, heads if mask.shape[1] > 1 else whole
            ]
        cos, sin = (
            table if table is None or table.shape[0] == 1 else table[batch]
            for table in (self.of.cos, self.of.sin)
        )
        return replace(parts, mask=mask, cos=cos, sin=sin, **latents)

    def _own_heads(self, count: int, heads: slice) -> slice:
        """Of ``count`` heads, those that ``heads`` of all read."""
        group = self.of.num_heads // count
        first, last = heads.start // group, (heads.stop - 1) // group
        if first != last and (heads.start % group or heads.stop % group):
            raise ValueError(
                f"heads {heads.start} to {heads.stop} cut a group of {group} that shares one head"
            )
        return slice(first, last + 1)


def _steps(extent: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, extent)) for start in range(0, extent, step))


@torch.no_grad()
def blocked_attention(
    blocked: BlockedAttention,
    attend: Attend,
    *,
    queries: Tensor,
    block_batch: int,
    block_heads: int,
) -> Tensor:
    """A new [B, H, M, D_v], in memory laid out [B, M, H, D_v], block after block.

    ``queries``: what q is or is made of; its first dimension is B, its last but one M.
    """
    of = blocked.of
    width = of.v.shape[-1] if of.v_factor is None else of.v_factor.shape[-2]
    rows = (queries.shape[0], queries.shape[-2], of.num_heads, width)
    out = queries.new_empty(rows).transpose(1, 2)
    return blocked.run(out, attend, block_batch, block_heads)
