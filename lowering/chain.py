"""Chains → ``streamed_chain``.

before   p = linear(x, u, a);  y = linear(p, v, b)
after    y = streamed_chain(x, u, v, a, b)
"""

from flashsvd_compile.lowering import ops
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.factored import Labelled
from flashsvd_compile.analysis.site_records import ChainEnds, ChainSite


def lower_chain(site: ChainSite, builder: Builder, tile: list[int]) -> fx.Node:
    """Run both products in one kernel; returns the node that stands for ``site.node``."""
    ends, dtype = site.ends, site.dtype
    assert isinstance(ends, ChainEnds)
    entry, exit_ = ends.entry, ends.exit
    result = builder.call(
        ops.streamed_chain,
        builder.cast(builder.arrange(entry.x, [entry.rows, entry.hidden]), dtype),
        builder.cast(builder.arrange(entry.factor, [entry.rank, entry.hidden]), dtype),
        builder.cast(builder.arrange(exit_.factor, [exit_.width, entry.rank]), dtype),
        builder.bias(entry.biases, entry.rank, dtype),
        builder.bias(exit_.biases, exit_.width, dtype),
        tile=tile,
    )
    return builder.arrange(Labelled((result,), (entry.rows, exit_.width)), exit_.out_dims)
