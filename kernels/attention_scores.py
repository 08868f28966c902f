"""Attention by scores in memory, in blocks of queries: for what SDPA has no word for.

    s      = scale · (q kᵀ + shift)                 c · tanh(s / c) under a soft-cap c
    e      = exp(s + mask − m)                      m: the row's maximum, the sink among it
    output = e v / (Σ e + exp(sink − m)),   weight = Σ e / (Σ e + exp(sink − m))

``weight`` is what a bias of v counts for: 1 without a sink, less with one, 0 for a query that sees
no key, whose output is 0, too. Plain differentiable torch; scores are float32 at least, [B, H,
block, N] of one block of queries at a time. Rounds to the operands' dtype: the weights e / Σ e.
"""

import torch
from flashsvd_compile.kernels.attention_extents import BLOCK_QUERIES
from flashsvd_compile.kernels.attention_operands import AttentionOperands
from torch import Tensor


def attend_by_scores(
    of: AttentionOperands,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shift: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The output [B, H, M, D_v] and its weight [B, H, M, 1].

    ``queries`` [B, H, M, D], ``keys`` [B, H, N, D], ``values`` [B, H, N, D_v] of all heads;
    ``shift`` [B, H, M, 1] is added to the scores before they are scaled. Of ``of`` the scale, the
    soft-cap, the sink and causality are read; ``mask`` has causality in it already, if it is there.
    """
    count = queries.shape[2]
    if torch.is_grad_enabled() or not isinstance(count, int) or count <= BLOCK_QUERIES:
        return _attend(of, queries, keys, values, shift, mask, 0)
    parts = []
    for start in range(0, count, BLOCK_QUERIES):
        rows = slice(start, start + BLOCK_QUERIES)
        parts.append(
            _attend(
                of,
                queries[:, :, rows],
                keys,
                values,
                None if shift is None else shift[:, :, rows],
                mask if mask is None or mask.shape[2] == 1 else mask[:, :, rows],
                start,
            )
        )
    outputs, weights = zip(*parts, strict=True)
    return torch.cat(outputs, 2), torch.cat(weights, 2)


def _attend(
    of: AttentionOperands,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    shift: Tensor | None,
    mask: Tensor | None,
    first_query: int,
) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(queries.dtype, torch.float32)
    scores = (queries @ keys.transpose(-1, -2)).to(dtype)
    if shift is not None:
        scores = scores + shift.to(dtype)
    scores = scores * of.scale
    if of.softcap:
        scores = torch.tanh(scores / of.softcap) * of.softcap
    if mask is None and of.is_causal:
        rows = torch.arange(queries.shape[2], device=queries.device)[:, None] + first_query
        mask = torch.arange(keys.shape[2], device=queries.device)[None, :] <= rows
    if mask is not None:
        is_bool = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, float("-inf")) if is_bool else scores + mask
    # softmax is the same whatever is subtracted: no gradient goes through it.
    none = scores.new_full((), float("-inf"))
    sink = none if of.sink is None else _by_head(of.sink, of.num_heads).to(dtype)
    highest = sink.detach()
    if keys.shape[2]:
        highest = torch.maximum(scores.detach().amax(-1, keepdim=True), highest)
    highest = torch.where(highest == none, 0.0, highest)
    exponentials = torch.exp(scores - highest)
    seen = exponentials.sum(-1, keepdim=True)
    total = seen + torch.exp(sink - highest)
    total = torch.where(total == 0, 1.0, total)
    weights = (exponentials / total).to(values.dtype)
    return weights @ values, (seen / total).to(values.dtype)


def _by_head(sink: Tensor, num_heads: int) -> Tensor:
    return sink.repeat_interleave(num_heads // sink.shape[0])[None, :, None, None]
