"""Where the elements of a tensor lie, by its atoms: a start, and a stride for each atom.

    w      [144, r]  (f,)(r,)                    start 0     f: r, r: 1
    split  f into h, p, d                        start 0     h: 36·r, p: 12·r, d: r, r: 1
    cut    p to its index 1                      start 12·r  h: 36·r, d: r, r: 1

so that it can be told what a cut reads, and what of it can be seen as one dimension.
"""

from dataclasses import dataclass

import sympy

from flashsvd_compile.analysis.axes import Atom, AxisSpace, Dim, Size, same, size_of, volume
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.factored import Labelled, expose

_Parts = list[tuple[Atom, Size]]


@dataclass(frozen=True)
class Strided:
    """Elements at ``start`` plus, for each of ``atoms``, its index times its stride."""

    start: Size
    atoms: Dim
    strides: tuple[Size, ...]

    def without(self, atoms: set[Atom]) -> "Strided":
        kept = [(a, s) for a, s in zip(self.atoms, self.strides, strict=True) if a not in atoms]
        return Strided(self.start, tuple(a for a, _ in kept), tuple(s for _, s in kept))

    def is_one_dimension(self, atoms: Dim) -> bool:
        """Can ``atoms``, in this order, be viewed as one dimension?"""
        strides = [self.strides[self.atoms.index(atom)] for atom in atoms]
        return all(
            same(outer, inner * atom.size)
            for outer, inner, atom in zip(strides, strides[1:], atoms[1:], strict=False)
        )

    def innermost_stride(self, atoms: Dim) -> Size:
        return self.strides[self.atoms.index(atoms[-1])] if atoms else sympy.Integer(1)

    @property
    def is_known(self) -> bool:
        """Are all sizes and strides numbers?"""
        sizes = (self.start, *self.strides, *(atom.size for atom in self.atoms))
        return all(isinstance(size, sympy.Integer) for size in sizes)

    def places(self) -> frozenset[int]:
        """All of them; sizes and strides have to be numbers."""
        found = [int(self.start)]
        for atom, stride in zip(self.atoms, self.strides, strict=True):
            found = [at + int(stride) * i for at in found for i in range(int(atom.size))]
        return frozenset(found)


def strided(space: AxisSpace, tensor: Labelled) -> Strided:
    """``tensor``, a single node's, as cut.

    Along atoms that it does not vary along, the first element stands.
    """
    parts: _Parts = []
    for dim, stride in zip(tensor.dims, value(tensor.node).stride(), strict=True):
        parts += _apart(dim, size_of(stride))
    start: Size = sympy.Integer(0)
    for cut in tensor.cuts:
        exposed = [(expose(space, (atom,), cut.atom), stride) for atom, stride in parts]
        parts = []
        for atom, stride in (part for dim, outer in exposed for part in _apart(dim, outer)):
            if atom is not cut.atom:
                parts.append((atom, stride))
                continue
            start = start + cut.start * stride
            parts += [] if cut.kept is None else [(cut.kept, stride)]
    leaves = (_apart(space.leaves((atom,)), stride) for atom, stride in parts)
    parts = [part for dim in leaves for part in dim if not part[0].broadcast]
    return Strided(start, tuple(a for a, _ in parts), tuple(s for _, s in parts))


def _apart(dim: Dim, stride: Size) -> _Parts:
    """The atoms of one dimension, each with its own stride."""
    return [(atom, stride * volume(dim[i + 1 :])) for i, atom in enumerate(dim)]
