"""Facts on the way of attention written by hand: scores, then probabilities.

    matmul(q, kᵀ)            Scores(q, k)
    · number, / number       the same scores, another scale
    + tensor, masked_fill    the same scores, one more mask
    softmax over keys        Probabilities
    dropout that is off, casts, views    the same facts, laid out otherwise

The product of probabilities and v is then an attention site, as scaled_dot_product_attention is.
"""

from dataclasses import dataclass, replace

from torch import fx

from flashsvd_compile.analysis.axes import Dim, Dims


@dataclass(frozen=True)
class Operand:
    """q, k or v as attention uses it: which of the node's dimensions play which part.

    ``batch``: dimensions shared with the other operand of the product that reads this one, in
    the order of its result's ``shared`` dimensions (an index may be -1 where this operand
    broadcasts); ``rows``: queries or keys; ``feature``: head_dim.
    """

    node: fx.Node
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    feature: tuple[int, ...]
    shared: Dims


@dataclass(frozen=True)
class ScoreMask:
    """A tensor that masks scores; ``dims`` names its dimensions by the scores' atoms.

    ``fill`` None: added to the scores. Else scores become ``fill`` where the tensor is
    ``fill_where``.
    """

    node: fx.Node
    dims: Dims
    fill: float | None = None
    fill_where: bool = True


@dataclass(frozen=True)
class Scores:
    """``scale · left · right`` with masks; either operand may turn out to be the queries."""

    node: fx.Node
    left: Operand
    right: Operand
    batch: Dim
    left_rows: Dim
    right_rows: Dim
    scale: float = 1.0
    masks: tuple[ScoreMask, ...] = ()

    def scaled(self, factor: float) -> "Scores":
        return replace(self, scale=self.scale * factor)

    def masked(self, mask: ScoreMask) -> "Scores":
        return replace(self, masks=(*self.masks, mask))


@dataclass(frozen=True)
class Probabilities:
    """softmax of scores over the keys."""

    query: Operand
    key: Operand
    batch: Dim
    query_rows: Dim
    key_rows: Dim
    scale: float
    masks: tuple[ScoreMask, ...]
