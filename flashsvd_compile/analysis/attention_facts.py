"""Facts on the way of attention written by hand: scores, then probabilities.

    matmul(q, kᵀ)            Scores(q, k)
    · number, / number       the same scores, another scale
    tanh                     capped scores: a number times them is their cap from there on
    + tensor, masked_fill    the same scores, one more mask
    cat with one column      SinkScores: softmax has one more term
    softmax over keys        Probabilities; beside a sink, once its column is cut off
    dropout that is off, casts, views    the same facts, laid out otherwise

The product of probabilities and v is then an attention site, as scaled_dot_product_attention is.
"""

from dataclasses import dataclass, replace

from torch import fx

from flashsvd_compile.analysis.axes import Dim, Dims
from flashsvd_compile.analysis.factored import Labelled


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
class Sink:
    """A logit beside those of the keys: ``column`` is joined to the scores, and ``tensor`` what it
    was before it was repeated, its dimensions named by the scores' atoms."""

    column: fx.Node
    tensor: Labelled


@dataclass(frozen=True)
class Scores:
    """``scale · left · right`` with masks; either operand may turn out to be the queries.

    ``softcap`` c, if not 0: scores are c · tanh(scale / c · left · right) before the masks. Any
    number times the tanh of any other times the product is that, for some c > 0.
    """

    node: fx.Node
    left: Operand
    right: Operand
    batch: Dim
    left_rows: Dim
    right_rows: Dim
    scale: float = 1.0
    masks: tuple[ScoreMask, ...] = ()
    softcap: float = 0.0

    def scaled(self, factor: float) -> "Scores":
        # c · tanh(s / c · x) times f is |f| c · tanh(f s / (|f| c) · x).
        return replace(self, scale=self.scale * factor, softcap=self.softcap * abs(factor))

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
    softcap: float = 0.0
    sink: Sink | None = None


@dataclass(frozen=True)
class SinkScores:
    """Scores with one more column behind the keys, ``sink``; or, ``is_softmax``, their softmax.

    ``columns``: the dimension of keys and sink together; ``keys``: that of the keys alone.
    """

    scores: Scores
    sink: Sink
    keys: Dim
    columns: Dim
    is_softmax: bool = False
