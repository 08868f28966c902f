"""A lift that attention needs no more → products of their own for those who read other rows of it.

    before   y = linear(p, w);  q = y[.., :F];  k = y[.., F : 2·F];  v = y[.., 2·F :]
    after    s = linear(p, w[: 2·F]);  q = s[.., :F];  k = s[.., F:]

Where the rows lie side by side for each head only, one batched product makes those of all heads.
"""

import torch
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.axes import volume
from flashsvd_compile.analysis.calls import aten, value
from flashsvd_compile.analysis.factored import Labelled
from flashsvd_compile.analysis.shared_lift_records import Remainder


def lower_remainder(remainder: Remainder, builder: Builder) -> dict[fx.Node, fx.Node]:
    """What stands for each of its readers."""
    readers = remainder.readers
    product = _batched(remainder, builder) if remainder.groups else _plain(remainder, builder)
    rows = [product if r.cut is None else product.cut(builder.space, r.cut) for r in readers]
    return {r.node: builder.arrange(own, r.dims) for r, own in zip(readers, rows, strict=True)}


def _plain(remainder: Remainder, builder: Builder) -> Labelled:
    fact, dtype, width = remainder.fact, _dtype(remainder), remainder.width
    latent = builder.arrange(fact.latent, [remainder.tokens, remainder.rank])
    weight = builder.arrange(fact.factor, [width, remainder.rank])
    operands = builder.cast(latent, dtype), builder.cast(weight, dtype)
    bias = builder.bias(fact.biases, width, dtype)
    if fact.scale == 1:
        result = builder.call(aten.linear.default, *operands, bias)
    else:
        result = builder.times(builder.call(aten.linear.default, *operands), fact.scale)
        result = result if bias is None else builder.call(aten.add.Tensor, result, bias)
    return Labelled((result,), (remainder.tokens, width))


def _batched(remainder: Remainder, builder: Builder) -> Labelled:
    fact, dtype = remainder.fact, _dtype(remainder)
    groups, tokens, width, rank = (
        remainder.groups, remainder.tokens, remainder.width, remainder.rank,
    )  # fmt: skip
    if remainder.latent_has_groups:
        latent = builder.arrange(fact.latent, [groups, tokens, rank])
    else:  # one for all, not a copy for each
        latent = builder.arrange(fact.latent, [tokens, rank])
        latent = builder.call(aten.expand.default, latent, [int(volume(groups)), -1, -1])
    weight = builder.arrange(fact.factor, [groups, rank, width])
    operands = builder.cast(latent, dtype), builder.cast(weight, dtype)
    result = builder.times(builder.call(aten.bmm.default, *operands), fact.scale)
    if (bias := builder.bias(fact.biases, groups + width, dtype)) is not None:
        bias = builder.reshape(bias, [volume(groups), volume(()), volume(width)])
        result = builder.call(aten.add.Tensor, result, bias)
    return Labelled((result,), (groups, tokens, width))


def _dtype(remainder: Remainder) -> torch.dtype:
    dtype: torch.dtype = value(remainder.fact.lift).dtype
    return dtype
