"""Feed-forward sites → ``streamed_feed_forward`` or ``row_blocks_feed_forward``.

    before   h = gelu(linear(p, v1, b1));  s = linear(h, u2)
    after    s = streamed_feed_forward(p, v1, u2, b1, activation="gelu")

The latent p goes in as [T, rank], the result comes out as [T, rank of u2]: h never exists.
"""

from typing import Any

from flashsvd_compile.lowering import ops
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.calls import aten
from flashsvd_compile.analysis.factored import Labelled
from flashsvd_compile.analysis.site_records import Arm, FeedForwardSite


def lower_streamed(site: FeedForwardSite, builder: Builder, tile: list[int]) -> fx.Node:
    """Stream the site on chip; returns the node that stands for ``site.node``."""
    return _write(site, builder, ops.streamed_feed_forward, tile=tile)


def lower_row_blocks(
    site: FeedForwardSite, builder: Builder, block_rows: int, tile: list[int]
) -> fx.Node:
    """Run the site ``block_rows`` tokens at a time; ``tile``: of the kernel that lifts, if any."""
    target = ops.row_blocks_feed_forward_op
    return _write(site, builder, target, block_rows=block_rows, tile=tile)


def _write(site: FeedForwardSite, builder: Builder, target: Any, **choice: Any) -> fx.Node:
    gate = site.gate
    down = builder.arrange(site.down, [site.out, site.width])
    result = builder.call(
        target,
        _latent(site, builder, site.up),
        _factor(site, builder, site.up),
        builder.cast(down, site.dtype),
        _bias(site, builder, site.up),
        None if gate is None else _latent(site, builder, gate),
        None if gate is None else _factor(site, builder, gate),
        None if gate is None else _bias(site, builder, gate),
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


def _bias(site: FeedForwardSite, builder: Builder, arm: Arm) -> fx.Node | None:
    terms = []
    for bias in arm.biases:
        node = builder.cast(builder.arrange(bias.tensor, [arm.width]), site.dtype)
        terms.append(builder.times(node, bias.scale))
    return builder.fold(aten.add.Tensor, terms)


def _down_bias(site: FeedForwardSite, builder: Builder) -> fx.Node | None:
    if site.down_bias is None:
        return None
    return builder.cast(builder.arrange(site.down_bias, [site.out]), site.dtype)
