"""What is known of each operator that takes a ``tile``, beyond its schema, to measure tiles.

An operator enters itself in `TILED` by the name it has in ``torch.ops.flashsvd``.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """An axis of independent results: of the first n of them no operand but ``operands`` matters,
    and of those only the first n along the dimension named here.

    ``dim`` of the output; ``checked``: how many results are enough to compare.
    """

    dim: int
    operands: Mapping[str, int]
    checked: int


@dataclass(frozen=True)
class TiledOperator:
    """One operator: tensors by position, numbers by keyword, among them ``tile``.

    ``tensors``: the tensors' names. ``plain(tensors, numbers)``: the same result on library
    operators, in any dtype; ``numbers`` are without ``tile``. ``cuts``: the first one is what may
    be cut to save memory. ``sizes``: of tensors that grow with the input, how many leading
    dimensions are sizes rather than ranks.
    """

    tensors: tuple[str, ...]
    plain: Callable[[Sequence[Tensor | None], dict[str, Any]], Tensor]
    cuts: tuple[Cut, ...]
    sizes: Mapping[str, int]


TILED: dict[str, TiledOperator] = {}
