"""The turned fact: each feature of this tensor is a sum of features of one lift, times numbers and
entries of tables.

    q = lift                              [.., D]      factored
    q[..., :D/2], q[..., D/2:]            [.., D/2]    factored, cut
    cat((-q[.., D/2:], q[.., :D/2]), -1)  [.., D]      feature c: −q[c + D/2], or q[c − D/2]
    q * cos + cat(..) * sin               [.., D]      cos[c] q[c] − sin[c] q[c + D/2], ..

so that RoPE is one fact, however it is spelled. Features are told apart by where the row of the
factor begins in memory that makes them: a place is the same feature in whatever order it was cut.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import AxisSpace, Dim, Dims, volume
from flashsvd_compile.analysis.factored import Factored, Labelled, expose, uncut
from flashsvd_compile.analysis.layout import Cut
from flashsvd_compile.analysis.strided import strided

# No kernel attends to wider heads at full width; a feed-forward's intermediate is none.
MAX_FEATURES = 256


@dataclass(frozen=True)
class Table:
    """A tensor that lifted ones are multiplied by: ``dims`` by their atoms, but for ``features``,
    those of its dimensions that vary with the feature. Complex: entries are re and im in turn."""

    node: fx.Node
    dims: Dims
    features: tuple[int, ...]
    is_complex: bool = False


class Term(NamedTuple):
    """``number`` times the feature at ``place``, times entry number ``entry`` of ``table``."""

    place: int
    number: float = 1.0
    table: Table | None = None
    entry: int = 0

    def times(self, number: float) -> "Term":
        return self._replace(number=self.number * number)

    def of(self, table: Table, entry: int) -> "Term":
        return self._replace(table=table, entry=entry)


Sum = tuple[Term, ...]


@dataclass(frozen=True)
class Norm:
    """Divided by the root of the mean square of the features at ``places``, plus ``eps``; then
    times ``weight``, an entry for each place."""

    places: tuple[int, ...]
    eps: float
    weight: fx.Node | None = None


@dataclass(frozen=True)
class Turned:
    """``sums``: the features of a tensor, row-major over its atoms ``features``; those that vary
    in ``whole``, the lift as it was before any cut. ``latent``: its latent, cut as the tensor is.

    ``norm``: what was done to the lift before. ``is_complex``: the tensor's last dimension has
    pairs of features, re and im, as elements.
    """

    whole: Factored
    latent: Labelled
    features: Dim
    sums: tuple[Sum, ...]
    norm: Norm | None = None
    is_complex: bool = False

    @property
    def places(self) -> tuple[int, ...]:
        """Of the first term of each feature."""
        return tuple(s[0].place for s in self.sums)

    def scaled(self, number: float) -> "Turned":
        return replace(self, sums=tuple(tuple(t.times(number) for t in s) for s in self.sums))

    def is_of(self, other: "Turned") -> bool:
        """Is it made of the same lift, normalised alike?"""
        mine, its = ((one.whole, one.latent, one.norm) for one in (self, other))
        return mine == its

    def plus(self, other: "Turned") -> "Turned":
        pairs = zip(self.sums, other.sums, strict=True)
        return replace(self, sums=tuple(mine + its for mine, its in pairs))

    def cut(self, space: AxisSpace, cut: Cut) -> "Turned | None":
        """The features that the cut keeps; None where it is of heads."""
        features = expose(space, self.features, cut.atom)
        if cut.atom not in features:
            heads = self.whole.factor.has(space, cut.atom)
            return None if heads else replace(self, latent=self.latent.cut(space, cut))
        axis = features.index(cut.atom)
        sizes = _sizes(features)
        length = 1 if cut.kept is None else cut.kept.size
        if sizes is None or not (cut.start.is_Integer and sympy.sympify(length).is_Integer):
            return None
        wanted = range(int(cut.start), int(cut.start) + int(length))
        sums = tuple(
            self.sums[number]
            for number, at in enumerate(itertools.product(*map(range, sizes)))
            if at[axis] in wanted
        )
        kept = () if cut.kept is None else (cut.kept,)
        return replace(self, features=(*features[:axis], *kept, *features[axis + 1 :]), sums=sums)

    def laid_out(self, space: AxisSpace, dims: Dims) -> "Turned | None":
        """In the order that the features have in ``dims``; None where some are not there."""
        now = space.leaves(self.features)
        wanted = tuple(a for dim in dims for a in space.leaves(dim) if a in set(now))
        if self.is_complex:
            wanted += (now[-1],)
        sizes = _sizes(now)
        if sizes is None or len(wanted) != len(now):
            return None
        if wanted == now:
            return replace(self, features=now)
        of_atom = {atom: axis for axis, atom in enumerate(now)}
        numbers = {at: n for n, at in enumerate(itertools.product(*map(range, sizes)))}
        order = [of_atom[atom] for atom in wanted]
        sums = []
        for at in itertools.product(*(range(sizes[axis]) for axis in order)):
            place = dict(zip(order, at, strict=True))
            sums.append(self.sums[numbers[tuple(place[axis] for axis in range(len(now)))]])
        return replace(self, features=wanted, sums=tuple(sums))


@dataclass(frozen=True)
class MeanSquare:
    """On the way from the lift ``of``, a tensor with ``dims``, to the inverse root of its mean
    square: ``stage`` is "square", "mean", "shifted" (by ``eps``) or "inverse"."""

    of: Turned
    dims: Dims
    stage: str = "square"
    eps: float = 0.0


def turned_by_nothing(space: AxisSpace, fact: Factored, dims: Dims) -> Turned | None:
    """A lift with ``dims`` whose last one is features, no more than `MAX_FEATURES`."""
    places = places_of_last(space, fact, dims)
    if places is None:
        return None
    whole = again = uncut(fact)
    for cut in dict.fromkeys((*fact.factor.cuts, *fact.latent.cuts)):
        again = again.cut(space, cut)
    if again != fact:  # a bias that was added behind a cut
        return None
    features = space.leaves(dims[-1])
    return Turned(whole, fact.latent, features, tuple((Term(place),) for place in places))


def places_of_last(space: AxisSpace, fact: Factored, dims: Dims) -> tuple[int, ...] | None:
    """Where the rows of the factor begin that make the last of ``dims``, of the first head."""
    features = space.leaves(dims[-1]) if dims else ()
    size = volume(features)
    if not features or not size.is_Integer or size > MAX_FEATURES or len(fact.factor.nodes) > 1:
        return None
    made = strided(space, fact.factor)
    of_rank, of_latent = set(space.leaves(fact.rank)), set(fact.latent.atoms(space))
    own = set(made.atoms) - of_rank - of_latent
    if not set(features) <= own or not made.without(of_rank | of_latent).is_known:
        return None
    start, strides = int(made.start), dict(zip(made.atoms, made.strides, strict=True))
    steps = [int(strides[atom]) for atom in features]
    return tuple(
        start + sum(step * i for step, i in zip(steps, at, strict=True))
        for at in _positions(features)
    )


def _positions(features: Dim) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(int(atom.size)) for atom in features))


def _sizes(features: Dim) -> tuple[int, ...] | None:
    known = all(isinstance(atom.size, sympy.Integer) for atom in features)
    return tuple(int(atom.size) for atom in features) if known else None
