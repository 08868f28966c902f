"""Feed-forward sites → ``streamed_``, ``streamed_whole_`` or ``row_blocks_feed_forward``.

    before   h = gelu(linear(p, v1, b1));  s = linear(h, u2)
    after    s = streamed_feed_forward(p, v1, u2, b1, activation="gelu")

The latent p goes in as [T, rank], the result comes out as [T, rank of u2]: h never exists. Whole, p
and s do not exist either:

    before   p = linear(x, u1);  ...;  y = linear(s, v2, b2)
    after    y = streamed_whole_feed_forward(x, u1, v1, u2, v2, None, b1, .., b2, ..)
"""

from typing import Any

import torch
from flashsvd_compile.lowering import ops
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.factored import Labelled
from flashsvd_compile.analysis.site_records import Arm, Entry, FeedForwardSite, Outer


def lower_streamed(site: FeedForwardSite, builder: Builder, tile: list[int]) -> fx.Node:
    """Stream the site on chip; returns the node that stands for ``site.node``."""
    return _write(site, builder, ops.streamed_feed_forward, tile=tile)


def lower_row_blocks(
    site: FeedForwardSite, builder: Builder, block_rows: int, tile: list[int]
) -> fx.Node:
    """Run the site ``block_rows`` tokens at a time; ``tile``: of the kernel that lifts, if any."""
    target = ops.row_blocks_feed_forward_op
    return _write(site, builder, target, block_rows=block_rows, tile=tile)


def lower_streamed_whole(site: FeedForwardSite, builder: Builder, tile: list[int]) -> fx.Node:
    """Stream the site with its outer factors; the node stands for ``site.outer.exit.node``."""
    outer, gate, dtype = site.outer, site.gate, site.dtype
    assert isinstance(outer, Outer)
    exit_, gate_from = outer.exit, site.gate_from
    x, u, latent_bias = _entry(outer.up, builder, dtype)
    gate_x = gate_u = gate_latent_bias = None
    if outer.gate is not None and gate_from in ("x", "own"):
        gate_x, gate_u, gate_latent_bias = _entry(outer.gate, builder, dtype)
    result = builder.call(
        ops.streamed_whole_feed_forward,
        x,
        u,
        _factor(site, builder, site.up),
        builder.cast(builder.arrange(site.down, [site.out, site.width]), dtype),
        builder.cast(builder.arrange(exit_.factor, [exit_.width, site.out]), dtype),
        latent_bias,
        builder.bias(site.up.biases, site.up.width, dtype),
        gate_x if gate_from == "own" else None,
        gate_u,
        None if gate is None else _factor(site, builder, gate),
        gate_latent_bias,
        None if gate is None else builder.bias(gate.biases, gate.width, dtype),
        builder.bias(exit_.latent_biases, site.out, dtype),
        builder.bias(exit_.biases, exit_.width, dtype),
        activation=site.activation,
        tile=tile,
    )
    return builder.arrange(Labelled((result,), (site.tokens, exit_.width)), exit_.out_dims)


def _entry(
    entry: Entry, builder: Builder, dtype: torch.dtype
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """x [T, hidden], the factor [rank, hidden] and the latent's bias."""
    return (
        builder.cast(builder.arrange(entry.x, [entry.rows, entry.hidden]), dtype),
        builder.cast(builder.arrange(entry.factor, [entry.rank, entry.hidden]), dtype),
        builder.bias(entry.biases, entry.rank, dtype),
    )


def _write(site: FeedForwardSite, builder: Builder, target: Any, **choice: Any) -> fx.Node:
    gate = site.gate
    down = builder.arrange(site.down, [site.out, site.width])
    result = builder.call(
        target,
        _latent(site, builder, site.up),
        _factor(site, builder, site.up),
        builder.cast(down, site.dtype),
        builder.bias(site.up.biases, site.up.width, site.dtype),
        None if gate is None else _latent(site, builder, gate),
        None if gate is None else _factor(site, builder, gate),
        None if gate is None else builder.bias(gate.biases, gate.width, site.dtype),
        _down_bias(site, builder),
        activation=site.activation,
        **choice,
    )
    return builder.arrange(Labelled((result,), (site.tokens, site.out)), site.out_dims)


def _latent(site: FeedForwardSite, builder: Builder, arm: Arm) -> fx.Node:
    return builder.cast(builder.arrange(arm.latent, [arm.rows, arm.rank]), site.dtype)


def _factor(site: FeedForwardSite, builder: Builder, arm: Arm) -> fx.Node:
    assert arm.factor is not None
    return builder.cast(builder.arrange(arm.factor, [arm.width, arm.rank]), site.dtype)


def _down_bias(site: FeedForwardSite, builder: Builder) -> fx.Node | None:
    if site.down_bias is None:
        return None
    return builder.cast(builder.arrange(site.down_bias, [site.out]), site.dtype)
