"""RoPE: pairs of features of a query, turned by an angle of its position. Plain torch.

    y[c] = x[c] cos[c] − x[c + pair] sin[c]     y[c + pair] = x[c + pair] cos[..] + x[c] sin[..]

for the first ``rotary_dim`` features; the rest pass. Pairs are ``pair`` apart within runs of twice
that: halves of all features where ``pair`` is half of ``rotary_dim``, neighbours where it is 1.
Tables [B|1, M|1, T] hold an angle for each feature (T = ``rotary_dim``) or for each pair (half of
that); those of a feature need not be the same for both of a pair.
"""

import torch
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int, pair: int) -> Tensor:
    """``x`` [B, H, M, D] turned; differentiable. Computes in float32 at least, rounds once."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, cos.dtype), torch.float32)
    turning = x[..., :rotary_dim].to(dtype).unflatten(-1, (-1, 2, pair))
    first, second = turning.unbind(-2)
    (cos_first, cos_second), (sin_first, sin_second) = (
        _by_pair(table.to(dtype), rotary_dim, pair) for table in (cos, sin)
    )
    turned = torch.stack(
        (first * cos_first - second * sin_first, second * cos_second + first * sin_second), -2
    )
    turned = turned.flatten(-3).to(x.dtype)
    if rotary_dim == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., rotary_dim:]), -1)


def _by_pair(table: Tensor, rotary_dim: int, pair: int) -> tuple[Tensor, ...]:
    """What the first and what the second of each pair read, [B|1, 1, M|1, runs, pair] each."""
    table = table[:, None]
    if table.shape[-1] == rotary_dim:
        return table.unflatten(-1, (-1, 2, pair)).unbind(-2)
    table = table.unflatten(-1, (-1, pair))
    return table, table


def check_rotation(
    cos: Tensor | None, sin: Tensor | None, rotary_dim: int, pair: int, rows: tuple[int, int, int]
) -> None:
    """Raises ValueError where tables and numbers do not fit queries of ``rows`` [B, M, D]."""
    if cos is None or sin is None:
        if cos is not sin or rotary_dim or pair:
            raise ValueError("a rotation has cos, sin, rotary_dim and rotary_pair, or none of them")
        return
    batch, queries, width = rows
    if pair < 1 or rotary_dim < 1 or rotary_dim % (2 * pair) or rotary_dim > width:
        raise ValueError(
            f"rotary_dim {rotary_dim} must be a multiple of 2 · rotary_pair {pair}, "
            f"and at most {width}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        fits = (
            table.dim() == 3
            and table.shape[0] in (1, batch)
            and table.shape[1] in (1, queries)
            and table.shape[2] in (rotary_dim, rotary_dim // 2)
            and table.shape[2] == cos.shape[2]
        )
        if not fits:
            raise ValueError(
                f"{name} must be [1 or {batch}, 1 or {queries}, {rotary_dim} or half of it, as "
                f"cos], got {list(table.shape)}"
            )
        if not table.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating, got {table.dtype}")
