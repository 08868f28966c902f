"""Records of a lift that attention needs no more, and of what stays of it for its other readers.

y = linear(p, w)  [.., 3·F];   q, k, v = y.chunk(3, -1)      v stays a latent, q and k do not
stays: linear(p, w[: 2·F]), of which q and k are parts
"""

from dataclasses import dataclass

from torch import fx

from flashsvd_compile.analysis.axes import Dim, Dims, Size
from flashsvd_compile.analysis.factored import Factored
from flashsvd_compile.analysis.layout import Cut


@dataclass(frozen=True)
class ProductShape:
    """``groups`` products of [rows, depth] · [depth, columns]."""

    groups: int
    rows: Size
    columns: int
    depth: int

    @property
    def macs(self) -> Size:
        return self.rows * (self.groups * self.columns * self.depth)


@dataclass(frozen=True)
class Reader:
    """``node``, [dims], holds nothing but rows of a lift: ``cut`` of a product of them, or all."""

    node: fx.Node
    dims: Dims
    cut: Cut | None = None


@dataclass(frozen=True)
class Remainder:
    """A product of its own for ``readers``: ``fact``, written as [groups,] tokens, width.

    ``latent_has_groups``: each group has its latent; else all read the same.
    """

    readers: tuple[Reader, ...]
    fact: Factored
    groups: Dim
    tokens: Dim
    width: Dim
    rank: Dim
    latent_has_groups: bool
    shape: ProductShape


@dataclass(frozen=True)
class SharedLift:
    """``lift`` makes the inputs ``arms`` of an attention, and more that others read.

    With all of ``arms`` as latents ``remainders`` take its place. ``region``: the nodes from the
    lift to the other readers, these included. ``whole``: what the lift computes as it is.
    """

    lift: fx.Node
    arms: frozenset[str]
    remainders: tuple[Remainder, ...]
    region: frozenset[fx.Node]
    whole: ProductShape
