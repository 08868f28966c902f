"""The factored fact: this tensor is latent × factor (+ bias), times a number.

    P = linear(x, u)          [B, M, R]       (b,) (m,) (r,)
    Q = linear(P, v, bias)    [B, M, H·D]     (b,) (m,) (o,)     latent P(b, m, r) · factor v(o, r)
    Q.view(..).transpose(..)  [B, H, M, D]    (b,) (h,) (m,) (d,)    the same fact: o is now h, d

The fact speaks of atoms, so views, transposes and cuts change how the tensor is laid out and not
what it is made of. Sums with a bias and products with a number are kept; other operators drop it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import fx

from flashsvd_compile.analysis.axes import Atom, AxisSpace, Dim, Dims, Size, same, volume
from flashsvd_compile.analysis.layout import Cut


@dataclass(frozen=True)
class Labelled:
    """A tensor of the graph, its dimensions named by atoms, then cut.

    ``nodes``: one node, or several of the same shape that stand for their stack along a new first
    dimension. ``dims`` name the dimensions of that node or stack; ``cuts`` are applied in order.
    """

    nodes: tuple[fx.Node, ...]
    dims: Dims
    cuts: tuple[Cut, ...] = ()

    @property
    def node(self) -> fx.Node:
        return self.nodes[0]

    def cut(self, space: AxisSpace, cut: Cut) -> "Labelled":
        """The same tensor cut along ``cut.atom``, if it has that atom."""
        return replace(self, cuts=(*self.cuts, cut)) if self.has(space, cut.atom) else self

    def has(self, space: AxisSpace, atom: Atom) -> bool:
        wanted = set(space.leaves((atom,)))
        return bool(wanted & set(self.atoms(space)))

    def atoms(self, space: AxisSpace) -> Dim:
        """The finest atoms that are left after the cuts; broadcast ones are no part of it."""
        atoms = tuple(atom for dim in self.dims for atom in dim)
        for cut in self.cuts:
            atoms = apply_cut(space, atoms, cut)
        return tuple(atom for atom in space.leaves(atoms) if not atom.broadcast)


def apply_cut(space: AxisSpace, atoms: Dim, cut: Cut) -> Dim:
    """``atoms`` with ``cut.atom`` exposed and replaced by what the cut keeps."""
    exposed = expose(space, atoms, cut.atom)
    kept = () if cut.kept is None else (cut.kept,)
    return tuple(a for atom in exposed for a in (kept if atom is cut.atom else (atom,)))


def expose(space: AxisSpace, atoms: Dim, target: Atom) -> Dim:
    """Split ``atoms`` no further than needed for ``target`` to stand on its own."""
    while target not in atoms:
        for index, atom in enumerate(atoms):
            parts = space.parts(atom)
            if parts and set(space.leaves((target,))) <= set(space.leaves((atom,))):
                atoms = (*atoms[:index], *parts, *atoms[index + 1 :])
                break
        else:
            return atoms
    return atoms


@dataclass(frozen=True)
class Bias:
    """A tensor added to the lifted one, times ``scale``."""

    tensor: Labelled
    scale: float


@dataclass(frozen=True)
class Factored:
    """``scale · (latent · factor) + Σ bias.scale · bias``, contracted over ``rank``.

    ``lift`` is the matmul that made it. It is low-rank in earnest only if the latent is narrower
    than what it came from and what it becomes: see ``low_rank``.
    """

    lift: fx.Node
    latent: Labelled
    factor: Labelled
    rank: Dim
    biases: tuple[Bias, ...] = ()
    scale: float = 1.0

    def cut(self, space: AxisSpace, cut: Cut) -> "Factored":
        biases = tuple(replace(b, tensor=b.tensor.cut(space, cut)) for b in self.biases)
        return replace(
            self,
            latent=self.latent.cut(space, cut),
            factor=self.factor.cut(space, cut),
            biases=biases,
        )

    def scaled(self, factor: float) -> "Factored":
        biases = tuple(replace(b, scale=b.scale * factor) for b in self.biases)
        return replace(self, scale=self.scale * factor, biases=biases)

    def plus(self, bias: Labelled, scale: float = 1.0) -> "Factored":
        return replace(self, biases=(*self.biases, Bias(bias, scale)))

    def rank_size(self, space: AxisSpace) -> Size:
        return volume(space.leaves(self.rank))

    def lifted_atoms(self, space: AxisSpace) -> Dim:
        """Atoms that only the factor brings: the width that the lift makes."""
        shared = set(self.latent.atoms(space))
        return tuple(atom for atom in self.factor.atoms(space) if atom not in shared)


def uncut(fact: Factored) -> Factored:
    """``fact`` of all that its factor, its latent and its biases were cut from."""
    return replace(
        fact,
        latent=replace(fact.latent, cuts=()),
        factor=replace(fact.factor, cuts=()),
        biases=tuple(replace(b, tensor=replace(b.tensor, cuts=())) for b in fact.biases),
    )


def label_like(space: AxisSpace, dims: Dims, shape: Sequence[Size]) -> Dims | None:
    """Names for the dimensions of an operand that broadcasts against a tensor with ``dims``."""
    if len(shape) > len(dims):
        return None
    labels: list[Dim] = []
    for dim, size in zip(dims[len(dims) - len(shape) :], shape, strict=True):
        if size == 1:
            labels.append(())
        elif same(volume(space.leaves(dim)), size):
            labels.append(dim)
        else:
            return None
    return tuple(labels)
