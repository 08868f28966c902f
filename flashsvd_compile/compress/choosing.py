"""Which linear layers of a model are factored, as which matrices, and why the others are not."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from flashsvd_compile.compress.heads import find_head_layouts
from flashsvd_compile.compress.linears import Linear, find_linears, select
from flashsvd_compile.compress.matrices import Matrices


@dataclass(frozen=True)
class Chosen:
    """All ``linears`` in the model's order; those to factor as ``matrices``, by path, and by path
    why the others stay as they are (``reasons``, empty for those to factor)."""

    linears: Sequence[Linear]
    matrices: Mapping[str, Matrices]
    reasons: Mapping[str, str]

    @property
    def out_features(self) -> dict[str, int]:
        """Of the linears that can be factored, by path."""
        return {x.path: x.weight.shape[0] for x in self.linears if x.weight is not None}


def choose(
    model: nn.Module, include: Iterable[str] | None, exclude: Iterable[str] | None
) -> Chosen:
    """The plain linears of ``model`` that patterns do not leave out.

    Raises ValueError for a model without linears, one that is a linear, and patterns that match
    nothing, and TypeError for patterns that are none.
    """
    linears = find_linears(model)
    if not linears:
        raise ValueError(f"{type(model).__name__} holds no nn.Linear or Conv1D to compress")
    if linears[0].path == "":
        raise ValueError("the model itself is a linear layer; pass the module that holds it")
    left_out = select(linears, include, exclude)
    reasons = {x.path: left_out.get(x.path) or x.obstacle for x in linears}
    chosen = Chosen(linears, {}, reasons)
    layouts = find_head_layouts(model, chosen.out_features)
    matrices = {
        x.path: Matrices(x, x.weight, layouts.get(x.path))
        for x in linears
        if not reasons[x.path] and x.weight is not None
    }
    return Chosen(linears, matrices, reasons)


def weight_bytes(matrices: Mapping[str, Matrices]) -> int:
    """Of all that is to be factored, as it is."""
    return sum(one.linear.weight_bytes for one in matrices.values())
