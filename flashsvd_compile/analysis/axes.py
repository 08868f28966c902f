"""Axes: every dimension of a tensor as a product of atoms.

An *atom* is one indivisible index of the model: batch, position, head, feature. A dimension is an
ordered tuple of atoms, outermost first; a dimension of size 1 has none:

    x                      [B, M, H·D]        (b,) (m,) (f,)
    x.view(B, M, H, D)     [B, M, H, D]       (b,) (m,) (h,) (d,)      f was split into h, d
    .transpose(1, 2)       [B, H, M, D]       (b,) (h,) (m,) (d,)
    .reshape(B * H, M, D)  [B·H, M, D]        (b, h) (m,) (d,)

so a head layout is derived, however the model spells it. Splitting an atom is a fact about the
atom, not about one tensor: the space remembers it, and every tensor that carries the atom is read
in its finest known parts (:meth:`AxisSpace.leaves`).
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

Size = Any  # a sympy expression: int-like, but its operators are typed too loosely to check
Dim = tuple["Atom", ...]
Dims = tuple[Dim, ...]


@dataclass(frozen=True, eq=False)
class Atom:
    """One index. Atoms are equal only if they are the same object.

    ``broadcast``: the tensor does not vary along it (made by ``expand``).
    """

    size: Size
    broadcast: bool = False
    serial: int = field(default_factory=itertools.count().__next__)

    def __repr__(self) -> str:
        return f"{'*' if self.broadcast else ''}a{self.serial}[{self.size}]"


def size_of(value: int | torch.SymInt) -> Size:
    """A torch size as a sympy expression; asks for no guard.

    What ``view(b, -1, h, d)`` leaves, ``(s0**2)//s0``, is written as the ``s0`` that it is.
    """
    if isinstance(value, int):
        return sympy.Integer(value)
    return _simplified(sympy.sympify(value.node.expr))


@lru_cache(maxsize=1024)  # many tensors of a graph share few sizes
def _simplified(expression: Size) -> Size:
    return expression.replace(FloorDiv, lambda a, b: q if (q := quotient(a, b)) else FloorDiv(a, b))


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size_of(size) for size in tensor.shape)


def same(left: Size, right: Size) -> bool:
    """Provably equal for every value of the symbols."""
    if left == right or (left.is_Integer and right.is_Integer):
        return bool(left == right)
    return sympy.expand(left - right) == 0


def quotient(size: Size, divisor: Size) -> Size | None:
    """``size / divisor`` if that is provably a whole number, else None."""
    if divisor == 0:
        return None
    result = sympy.cancel(size / divisor)
    return result if sympy.fraction(result)[1] == 1 and result.is_integer else None


def volume(atoms: Iterable[Atom]) -> Size:
    return sympy.Mul(*(atom.size for atom in atoms))


class AxisSpace:
    """The atoms of one graph and how they have been split and narrowed."""

    def __init__(self) -> None:
        self._parts: dict[Atom, tuple[Atom, Atom]] = {}
        self._narrowed: dict[tuple[Atom, Size, Size], Atom] = {}
        self._origins: dict[Atom, tuple[Atom, Size]] = {}

    def fresh(self, shape: Sequence[Size]) -> Dims:
        """New atoms, one for each dimension that is not of size 1."""
        return tuple(() if size == 1 else (Atom(size),) for size in shape)

    def varying(self, dim: Dim, size: Size) -> Dim:
        """``dim`` for a tensor that may vary along all of it; new where ``dim`` does not serve."""
        known = self.leaves(dim)
        usable = known and same(volume(known), size) and not any(a.broadcast for a in known)
        return dim if usable else self.fresh((size,))[0]

    def leaves(self, dim: Dim) -> Dim:
        """The finest known parts of ``dim``, outermost first."""
        found: list[Atom] = []
        stack = list(reversed(dim))
        while stack:
            atom = stack.pop()
            if atom in self._parts:
                stack.extend(reversed(self._parts[atom]))
            else:
                found.append(atom)
        return tuple(found)

    def refine(self, dims: Dims) -> Dims:
        return tuple(self.leaves(dim) for dim in dims)

    def parts(self, atom: Atom) -> tuple[Atom, Atom] | None:
        """The two parts that ``atom`` was split into, if it was."""
        return self._parts.get(atom)

    def narrow(self, atom: Atom, start: Size, length: Size) -> Atom:
        """The atom of ``atom[start : start + length]``; the same cut gives the same atom."""
        key = (atom, start, length)
        if key not in self._narrowed:
            self._narrowed[key] = Atom(length, broadcast=atom.broadcast)
            self._origins[self._narrowed[key]] = (atom, start)
        return self._narrowed[key]

    def origin(self, atom: Atom) -> tuple[Atom, Size] | None:
        """The atom that ``atom`` was narrowed from, and where it starts there."""
        return self._origins.get(atom)

    def regroup(self, dims: Dims, shape: Sequence[Size]) -> Dims | None:
        """The same row-major elements seen in another shape, or None if atoms do not divide."""
        atoms = [atom for dim in self.refine(dims) for atom in dim]
        atoms.reverse()
        grouped: list[Dim] = []
        for size in shape:
            group = self._take(atoms, size)
            if group is None:
                return None
            grouped.append(group)
        return None if atoms else tuple(grouped)

    def _take(self, atoms: list[Atom], size: Size) -> Dim | None:
        """Pop from the end of ``atoms`` exactly ``size`` elements, splitting the last if needed."""
        taken: list[Atom] = []
        missing = size
        while missing != 1:
            if not atoms:
                return None
            atom = atoms.pop()
            rest = quotient(missing, atom.size)
            if rest is None:
                inner = quotient(atom.size, missing)
                if inner is None:
                    return None
                atom, remaining = self._split(atom, missing, inner)
                atoms.append(remaining)
                rest = sympy.Integer(1)
            taken.append(atom)
            missing = rest
        return tuple(taken)

    def _split(self, atom: Atom, outer: Size, inner: Size) -> tuple[Atom, Atom]:
        parts = (Atom(outer, atom.broadcast), Atom(inner, atom.broadcast))
        self._parts[atom] = parts
        return parts

    def align(self, left: Dim, right: Dim) -> bool:
        """Split both until they have the same sizes part by part; False if they cannot be."""
        pending_left, pending_right = (list(reversed(self.leaves(d))) for d in (left, right))
        while pending_left and pending_right:
            a, b = pending_left.pop(), pending_right.pop()
            if same(a.size, b.size):
                continue
            if (inner := quotient(a.size, b.size)) is not None:
                pending_left.append(self._split(a, b.size, inner)[1])
            elif (inner := quotient(b.size, a.size)) is not None:
                pending_right.append(self._split(b, a.size, inner)[1])
            else:
                return False
        return not pending_left and not pending_right
