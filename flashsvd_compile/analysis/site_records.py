"""Sites: places that compute attention, a feed-forward or a chain, in mathematical terms.

A site names latents, factors and biases by atoms, in the canonical order of the lowerings:

    attention      latent [B, H_x, rows, rank]   factor [H_x, head_dim, rank]   bias [H_x, head_dim]
    feed_forward   latent [T, rank]              factor [F, rank]               bias [F]

where H_x is a leading part of the heads (all of them, one for each group, or none). How the model
laid the heads out no longer shows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from flashsvd_compile.analysis.attention_facts import ScoreMask
from flashsvd_compile.analysis.axes import Dim, Dims, Size, volume
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.factored import Bias, Factored, Labelled
from flashsvd_compile.analysis.shared_lift_records import SharedLift
from flashsvd_compile.analysis.turned import Norm
from flashsvd_compile.reason import Reason


@dataclass(frozen=True)
class Angles:
    """Entries of ``table`` from ``start`` on, every ``step``-th; ``count`` of them: one for each
    feature that turns, or one for each pair. ``features``: the atoms that name its entries.

    ``is_complex``: the table is, and its entries are re and im in turn; ``negated``: each is to be
    multiplied by -1.
    """

    table: Labelled
    features: Dim
    start: int
    step: int
    count: int
    is_complex: bool = False
    negated: bool = False

    @property
    def entry_bytes(self) -> int:
        size = value(self.table.node).dtype.itemsize
        return size // 2 if self.is_complex else size


@dataclass(frozen=True)
class Rotation:
    """RoPE between ``lift`` and what attention reads: of the first ``rotary_dim`` features those
    that are ``pair`` apart turn (see ``kernels/rotation.py``).

    ``width``: the lift's own atoms for head_dim. ``norm``: what is done to the lift before.
    """

    lift: fx.Node
    cos: Angles
    sin: Angles
    rotary_dim: int
    pair: int
    width: Dim
    norm: Norm | None = None

    @property
    def table_bytes(self) -> int:
        """Of an entry of the wider table."""
        return max(angles.entry_bytes for angles in (self.cos, self.sin))


@dataclass(frozen=True)
class Arm:
    """One input of a site: a latent with the factor that would lift it, or a dense tensor.

    ``batch``, ``heads``, ``rows``, ``width``: this tensor's own atoms for the canonical
    dimensions (an atom is ``broadcast`` where the tensor does not vary). ``rank`` is the last
    dimension of ``latent``; for a dense tensor that is ``width`` and there is no factor.
    ``lifted`` is the full-width tensor and ``region`` the nodes from the lift to there. What the
    factor lifts is turned by ``rotation`` to be that, where there is one.
    """

    lifted: Labelled
    latent: Labelled
    rank: Dim
    batch: Dim
    heads: Dim
    rows: Dim
    width: Dim
    factor: Labelled | None = None
    biases: tuple[Bias, ...] = ()
    scale: float = 1.0
    region: frozenset[fx.Node] = frozenset()
    why_dense: Reason | None = None
    rotation: Rotation | None = None

    def as_latent(
        self, rank: Dim, fact: Factored, region: frozenset[fx.Node], rotation: Rotation | None
    ) -> "Arm":
        """The same input, read from the latent of ``fact``."""
        return replace(
            self, latent=fact.latent, rank=rank, factor=fact.factor, biases=fact.biases,
            scale=fact.scale, region=region, rotation=rotation,
        )  # fmt: skip

    def as_dense(self, why: Reason) -> "Arm":
        """The same input read at full width: lifted before the site, for the reason ``why``."""
        return replace(
            self, latent=self.lifted, rank=self.width, factor=None, biases=(), scale=1.0,
            region=frozenset(), why_dense=why, rotation=None,
        )  # fmt: skip

    @property
    def rank_size(self) -> int:
        return int(volume(self.rank))

    @property
    def lifted_width(self) -> Dim:
        """The factor's own atoms for ``width``."""
        return self.width if self.rotation is None else self.rotation.width

    @property
    def width_size(self) -> int:
        return int(volume(self.width))

    @property
    def own_heads(self) -> int:
        """Heads that the tensor varies along."""
        return int(volume(atom for atom in self.heads if not atom.broadcast))


@dataclass(frozen=True)
class Site:
    """What every kind of site has. ``node`` computes its result; ``where`` is the module path."""

    kind: ClassVar[str]

    node: fx.Node
    where: str
    region: frozenset[fx.Node]

    @property
    def dtype(self) -> torch.dtype:
        return value(self.node).dtype

    @property
    def device(self) -> torch.device:
        return value(self.node).device


@dataclass(frozen=True)
class AttentionSite(Site):
    """softmax(scale · q kᵀ + masks) v, or softmax(softcap · tanh(scale / softcap · q kᵀ) + masks) v
    where ``softcap`` is not 0, with ``batch``, ``heads``, ``rows``, ``keys``, ``width``
    the output's and the masks' atoms.

    ``sink``: a logit of each head [H_t] that softmax weighs beside the keys. ``shared``: the lifts
    of arms that others read, too. ``unturned``: the same site with turned queries at full width,
    where it is one.
    """

    kind: ClassVar[str] = "attention"

    query: Arm
    key: Arm
    value: Arm
    batch: Dim
    heads: Dim
    rows: Dim
    keys: Dim
    width: Dim
    out_dims: Dims
    scale: float
    is_causal: bool
    masks: tuple[ScoreMask, ...]
    shared: tuple[SharedLift, ...] = ()
    softcap: float = 0.0
    sink: Labelled | None = None
    unturned: "AttentionSite | None" = None

    @property
    def num_heads(self) -> int:
        return int(volume(self.heads))

    @property
    def arms(self) -> dict[str, Arm]:
        return {"q": self.query, "k": self.key, "v": self.value}


@dataclass(frozen=True)
class Entry:
    """The product that made a latent: x [rows, hidden] · factor [rank, hidden] + biases [rank].

    ``region``: the nodes from that product to the latent.
    """

    x: Labelled
    factor: Labelled
    biases: tuple[Bias, ...]
    rows: Dim
    rank: Dim
    hidden: Dim
    region: frozenset[fx.Node]


@dataclass(frozen=True)
class AttentionBlocks:
    """An attention site in blocks of ``batch`` × ``heads``, the latents of which it computes.

    ``entries``: by arm, ``"q"``, ``"k"`` or ``"v"``, the products that make the latents; the others
    are read as they stand in the graph.
    """

    batch: int
    heads: int
    entries: Mapping[str, Entry]

    @property
    def region(self) -> frozenset[fx.Node]:
        return frozenset().union(*(entry.region for entry in self.entries.values()))


@dataclass(frozen=True)
class Exit:
    """``node`` lifts a latent [tokens, rank] by factor [width, rank], and adds ``biases`` [width].

    ``latent_biases`` [rank]: all that was added to the latent before.
    """

    node: fx.Node
    factor: Labelled
    biases: tuple[Bias, ...]
    latent_biases: tuple[Bias, ...]
    tokens: Dim
    rank: Dim
    width: Dim
    out_dims: Dims


@dataclass(frozen=True)
class Outer:
    """The outer factors of a feed-forward; ``region`` is all from x, not included, to y."""

    up: Entry
    gate: Entry | None
    exit: Exit
    region: frozenset[fx.Node]


@dataclass(frozen=True)
class ChainEnds:
    """Both products of a chain whose latent nobody else reads."""

    entry: Entry
    exit: Exit


@dataclass(frozen=True)
class FeedForwardSite(Site):
    """act(gate) · up, or act(up), times the down factor: [T, rank] → [T, out].

    ``outer``: the factors before and after it, or why they cannot be taken in.
    """

    kind: ClassVar[str] = "feed_forward"

    up: Arm
    gate: Arm | None
    activation: str
    down: Labelled
    down_bias: Labelled | None
    tokens: Dim
    width: Dim
    out: Dim
    out_dims: Dims
    outer: Outer | Reason

    @property
    def gate_from(self) -> str:
        """What the gate's latent comes from: "none", up's ("latent"), up's "x", or its "own"."""
        if self.gate is None:
            return "none"
        mine, its = ((arm.latent, arm.rank, arm.rows) for arm in (self.up, self.gate))
        if mine == its:
            return "latent"
        outer = self.outer
        if isinstance(outer, Outer) and outer.gate is not None:
            up, gate = outer.up, outer.gate
            if (up.x, up.rows, up.hidden) == (gate.x, gate.rows, gate.hidden):
                return "x"
        return "own"


@dataclass(frozen=True)
class ChainSite(Site):
    """(x · u) · v that belongs to no larger site.

    u is [in_width, rank] and v [rank, out_width]; of every group where they are stacked.
    ``ends``: the two products, or why they cannot be one.
    """

    kind: ClassVar[str] = "chain"

    factored: Factored
    rank: int
    in_width: int
    out_width: int
    ends: ChainEnds | Reason


@dataclass(frozen=True)
class Sibling:
    """One of several products that read the same activations: ``node`` = x · weight (+ bias).

    ``x`` is [.., in_features], ``weight`` has ``width`` columns along all its dimensions but
    ``contracted``, ``bias`` one number for each. ``order`` permutes [.., columns] of the product,
    the leading dimensions of x and then those of the weight, into the dimensions of ``node``.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    contracted: int
    width: int
    in_features: int
    order: tuple[int, ...]


@dataclass(frozen=True)
class SiblingsSite(Site):
    """Down-projections of the same [rows, in_features] that may run as one launch.

    ``node`` is the first of them, and ``hoisted`` the views of weights that have to move ahead of
    it, in graph order.
    """

    kind: ClassVar[str] = "siblings"

    members: tuple[Sibling, ...]
    hoisted: tuple[fx.Node, ...]
    rows: Size

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(member.width for member in self.members)


@dataclass(frozen=True)
class Skip:
    """A site in all but one respect."""

    kind: str
    node: fx.Node
    where: str
    reason: Reason
