"""Sites: places that compute attention, a feed-forward or a chain, in mathematical terms.

A site names latents, factors and biases by atoms, in the canonical order of the lowerings:

    attention      latent [B, H_x, rows, rank]   factor [H_x, head_dim, rank]   bias [H_x, head_dim]
    feed_forward   latent [T, rank]              factor [F, rank]               bias [F]

where H_x is a leading part of the heads (all of them, one for each group, or none). How the model
laid the heads out no longer shows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import sympy
import torch
from torch import fx

from flashsvd_compile.analysis.attention_facts import Operand, ScoreMask
from flashsvd_compile.analysis.axes import Atom, Dim, Dims, volume
from flashsvd_compile.analysis.calls import is_tensor, value
from flashsvd_compile.analysis.factored import Bias, Factored, Labelled
from flashsvd_compile.analysis.facts import (
    AttentionCandidate,
    Facts,
    FeedForwardCandidate,
)
from flashsvd_compile.analysis.pointwise import name_activation
from flashsvd_compile.reason import Code, Reason, module_path, reason_at


@dataclass(frozen=True)
class Arm:
    """One input of a site: a latent with the factor that would lift it, or a dense tensor.

    ``batch``, ``heads``, ``rows``, ``width``: this tensor's own atoms for the canonical
    dimensions (an atom is ``broadcast`` where the tensor does not vary). ``rank`` is the last
    dimension of ``latent``; for a dense tensor that is ``width`` and there is no factor.
    ``lifted`` is the full-width tensor and ``region`` the nodes from the lift to there.
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

    def as_dense(self, why: Reason) -> "Arm":
        """The same input read at full width: lifted before the site, for the reason ``why``."""
        return replace(
            self, latent=self.lifted, rank=self.width, factor=None, biases=(), scale=1.0,
            region=frozenset(), why_dense=why,
        )  # fmt: skip

    @property
    def rank_size(self) -> int:
        return int(volume(self.rank))

    @property
    def width_size(self) -> int:
        return int(volume(self.width))


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
    """softmax(scale · q kᵀ + masks) v, with ``batch``, ``heads``, ``rows``, ``keys``, ``width``
    the output's and the masks' atoms."""

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

    @property
    def num_heads(self) -> int:
        return int(volume(self.heads))

    @property
    def arms(self) -> dict[str, Arm]:
        return {"q": self.query, "k": self.key, "v": self.value}


@dataclass(frozen=True)
class FeedForwardSite(Site):
    """act(gate) · up, or act(up), times the down factor: [T, rank] → [T, out]."""

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


@dataclass(frozen=True)
class ChainSite(Site):
    """(x · u) · v that belongs to no larger site."""

    kind: ClassVar[str] = "chain"

    factored: Factored
    rank: int


@dataclass(frozen=True)
class Skip:
    """A site in all but one respect."""

    kind: str
    node: fx.Node
    where: str
    reason: Reason


def find_sites(facts: Facts, graph: fx.Graph) -> tuple[list[Site], list[Skip]]:
    """Sites in graph order, and near-misses with what stood in the way."""
    sites: list[Site] = []
    skips = [Skip(m.kind, m.node, module_path(m.node), m.reason) for m in facts.misses]
    latents = _latents(facts)
    for candidate in facts.candidates:
        found: Site | Reason | None
        if isinstance(candidate, AttentionCandidate):
            kind, node, found = "attention", candidate.node, _attention(facts, candidate)
        else:
            kind, node = "feed_forward", candidate.down.node
            found = _feed_forward(facts, candidate, latents)
        if isinstance(found, Reason):
            skips.append(Skip(kind, node, module_path(node), found))
        elif found is not None:
            sites.append(found)
    taken = frozenset().union(*(site.region for site in sites))
    for node, fact in facts.factored.items():
        chained = fact.latent.node in facts.factored
        if node is fact.lift and node not in taken and chained and is_low_rank(facts, fact):
            rank = int(fact.rank_size(facts.space))
            sites.append(ChainSite(node, module_path(node), frozenset({node}), fact, rank))
    order = {node: index for index, node in enumerate(graph.nodes)}
    return sorted(sites, key=lambda s: order[s.node]), sorted(skips, key=lambda s: order[s.node])


def is_low_rank(facts: Facts, fact: Factored) -> bool:
    """Is the latent narrower than what it came from and what it becomes?

    It must itself be a product with a factor (then it is narrower than that product's input), or
    an input of the graph.
    """
    rank, width = fact.rank_size(facts.space), volume(fact.lifted_atoms(facts.space))
    if not isinstance(rank, sympy.Integer) or not isinstance(width, sympy.Integer):
        return False
    if fact.latent.node in facts.inputs:
        return bool(rank < width)
    inner = facts.factored.get(fact.latent.node)
    return inner is not None and bool(rank < inner.rank_size(facts.space)) and bool(rank <= width)


def _latents(facts: Facts) -> set[fx.Node]:
    """Nodes that are lifted: their own lift, or a layout of it, is the latent of a wider one."""
    found = set()
    for fact in facts.factored.values():
        inner = facts.factored.get(fact.latent.node)
        if inner is not None and is_low_rank(facts, fact):
            found.add(inner.lift)
    return found


# ---- attention ----------------------------------------------------------------------------------


def _attention(facts: Facts, found: AttentionCandidate) -> AttentionSite | Reason | None:
    space = facts.space
    operands = (found.query, found.key, found.value)
    if not any(o.node in facts.factored or _lost_in_earnest(facts, o.node) for o in operands):
        return None
    batch = [_operand_batch(facts, operand) for operand in operands]
    output = tuple(a for dim in found.batch for a in dim)
    for own in batch:
        if not space.align(own, output):
            return reason_at(found.node, Code.BAD_LAYOUT, "q, k, v do not share batch and heads")
    if not space.align(facts.atoms(found.query.node, found.query.rows), found.rows):
        return reason_at(found.node, Code.BAD_LAYOUT, "the output's rows are not the queries'")
    for own in batch:  # a later operand may have split what an earlier one was aligned to
        space.align(own, output)
    rows = [facts.atoms(o.node, o.rows) for o in operands]
    out_rows = space.leaves(found.rows)
    stacked = _stacked_heads(facts, found, rows[0])
    if stacked:
        batch[0] += tuple(rows[0][i] for i in stacked)
        batch[1:] = [(*own, *(Atom(rows[0][i].size, True) for i in stacked)) for own in batch[1:]]
        output += tuple(out_rows[i] for i in stacked)
        rows[0], out_rows = (
            tuple(a for i, a in enumerate(atoms) if i not in stacked)
            for atoms in (rows[0], out_rows)
        )
    q_width, k_width = (facts.atoms(o.node, o.feature) for o in operands[:2])
    space.align(q_width, k_width)

    core = between(
        facts, [found.node], {*(o.node for o in operands), *(m.node for m in found.masks)}
    )
    regions = [_lift_region(facts, operand.node) for operand in operands]
    allowed = core.union(*(r for r in regions if r))
    whys = [
        _why_dense(facts, operand, region, allowed)
        for operand, region in zip(operands, regions, strict=True)
    ]
    if all(whys):
        return next((w for w in whys if w and w.code is not Code.NO_LOW_RANK_OPERAND), None)
    if shared := _other_user(core - {found.node}, core):
        return shared
    if any(facts.regions[n] != facts.regions[found.node] for n in allowed):
        return reason_at(found.node, Code.REGION_CROSSED, "autocast or grad mode changes inside")

    positions = [space.leaves(own) for own in [*batch, output]]
    low_rank = [facts.factored[o.node] for o, why in zip(operands, whys, strict=True) if not why]
    in_heads = [
        any(atoms[i] in _factor_atoms(facts, fact) for fact in low_rank for atoms in positions[:3])
        or any(atoms[i].broadcast for atoms in positions[1:3])
        for i in range(len(positions[0]))
    ]
    split = [
        (tuple(a for a, h in zip(atoms, in_heads, strict=True) if not h),
         tuple(a for a, h in zip(atoms, in_heads, strict=True) if h))
        for atoms in positions
    ]  # fmt: skip
    if not isinstance(volume(split[3][1]), sympy.Integer):
        return reason_at(found.node, Code.BAD_LAYOUT, "a symbolic number of heads", "a number")
    arms: list[Arm] = []
    for operand, own_rows, region, why, (own_batch, own_heads) in zip(
        operands, rows, regions, whys, split, strict=False
    ):
        arm = _arm(facts, operand, own_batch, own_heads, own_rows, region, why)
        if isinstance(arm, Reason):
            arm = _arm(facts, operand, own_batch, own_heads, own_rows, None, arm)
        if isinstance(arm, Reason):
            return arm
        arms.append(arm)
    if all(arm.factor is None for arm in arms):
        return arms[0].why_dense
    region = core.union(*(arm.region for arm in arms))
    return AttentionSite(
        found.node,
        _common_path([found.node, *(n for arm in arms for n in arm.region)]),
        region,
        query=arms[0],
        key=arms[1],
        value=arms[2],
        batch=split[3][0],
        heads=split[3][1],
        rows=out_rows,
        keys=space.leaves(found.key_rows),
        width=space.leaves(found.feature),
        out_dims=facts.axes[found.node],
        scale=found.scale,
        is_causal=found.is_causal,
        masks=found.masks,
    )


def _stacked_heads(facts: Facts, found: AttentionCandidate, rows: Dim) -> list[int]:
    """Which of the queries' row atoms are heads: the query's factor varies along them.

    Grouped queries may be spelled as more rows of one head of keys.
    """
    fact = facts.factored.get(found.query.node)
    if fact is None or found.is_causal:
        return []
    in_factor = _factor_atoms(facts, fact)
    return [i for i, atom in enumerate(rows) if atom in in_factor]


def _operand_batch(facts: Facts, operand: Operand) -> Dim:
    """The operand's own atoms for the dimensions it shares; broadcast where it has none.

    With grouped heads (``enable_gqa``) the operand's head dimension is a part of the output's.
    """
    own: list[Atom] = []
    for index, out in zip(operand.batch, operand.shared, strict=True):
        atoms = () if index < 0 else facts.atoms(operand.node, (index,))
        missing = sympy.cancel(volume(out) / volume(atoms))
        own.extend(atoms)
        if missing != 1:
            own.append(Atom(missing, broadcast=True))
    return tuple(own)


def _factor_atoms(facts: Facts, fact: Factored) -> set[Atom]:
    return set(fact.factor.atoms(facts.space)) - set(facts.space.leaves(fact.rank))


def _lost_in_earnest(facts: Facts, node: fx.Node) -> Reason | None:
    """Where ``node`` stopped being low-rank, if it once was."""
    lost = facts.lost.get(node)
    if lost is None or not any(is_low_rank(facts, facts.factored[s]) for s in lost.sources):
        return None
    return lost.reason


def _why_dense(
    facts: Facts, operand: Operand, region: frozenset[fx.Node], allowed: frozenset[fx.Node]
) -> Reason | None:
    """Why an operand cannot be read from its latent; None if it can."""
    node = operand.node
    fact = facts.factored.get(node)
    if fact is None and (lost := _lost_in_earnest(facts, node)):
        return lost
    if fact is None or not is_low_rank(facts, fact):
        return reason_at(node, Code.NO_LOW_RANK_OPERAND, "a dense tensor", "latent × factor")
    return _other_user(region, allowed)


def _arm(
    facts: Facts,
    operand: Operand,
    batch: Dim,
    heads: Dim,
    rows: Dim,
    region: frozenset[fx.Node] | None,
    why: Reason | None,
) -> Arm | Reason:
    """The operand in canonical terms; dense if there is a reason ``why``."""
    space, node = facts.space, operand.node
    width = facts.atoms(node, operand.feature)
    if not isinstance(volume(width), sympy.Integer):
        return reason_at(node, Code.BAD_LAYOUT, "a symbolic head_dim", "a number")
    dense = Labelled((node,), facts.axes[node])
    if not _is_leading(heads, set(dense.atoms(space))):
        return reason_at(node, Code.BAD_LAYOUT, "heads repeated over the outer dimension")
    if why is not None or region is None:
        return Arm(dense, dense, width, batch, heads, rows, width, why_dense=why)
    fact = facts.factored[node]
    latent, factor = (set(t.atoms(space)) for t in (fact.latent, fact.factor))
    rank = space.leaves(fact.rank)
    vary = {atom for atom in (*batch, *rows) if not atom.broadcast}
    extra = {a for b in fact.biases for a in b.tensor.atoms(space)} - set(heads) - set(width)
    fits = (
        vary <= latent
        and not vary & factor
        and set(width) <= factor
        and not set(width) & latent
        and factor <= {*heads, *width, *rank}
        and latent <= {*batch, *heads, *rows, *rank}
        and not extra
        and _is_leading(heads, latent)
        and _is_leading(heads, factor)
        and all(_is_leading(heads, set(b.tensor.atoms(space))) for b in fact.biases)
        and all(set(width) <= set(b.tensor.atoms(space)) for b in fact.biases)
    )
    if not fits:
        return reason_at(node, Code.BAD_LAYOUT, "latent and factor do not part by head and row")
    return Arm(
        dense, fact.latent, rank, batch, heads, rows, width, fact.factor, fact.biases, fact.scale,
        region,
    )  # fmt: skip


def _is_leading(heads: Dim, atoms: set[Atom]) -> bool:
    """Does the tensor vary along a leading part of the heads, and not along the rest?"""
    present = [atom in atoms for atom in heads]
    return present == sorted(present, reverse=True)


# ---- feed-forward -------------------------------------------------------------------------------


def _feed_forward(
    facts: Facts, found: FeedForwardCandidate, latents: set[fx.Node]
) -> FeedForwardSite | Reason | None:
    space, product = facts.space, found.down
    lifts = [facts.factored[source] for source in found.region.sources]
    lifted = any(is_low_rank(facts, lift) for lift in lifts)
    if not lifted and (product.node not in latents or not found.region.nodes):
        return None
    wide = product.left
    contracted = [i for i, c in enumerate(product.left_letters) if c in product.contracted]
    tokens = [i for i in range(len(product.left_letters)) if i not in contracted]
    width = facts.atoms(wide, tuple(contracted))
    made = [i for i, c in enumerate(product.out_letters) if c not in product.left_letters]
    sizes = [volume(width), volume(facts.atoms(product.node, tuple(made)))]
    sizes += [lift.rank_size(space) for lift in lifts]
    if not all(isinstance(size, sympy.Integer) for size in sizes) or sizes[0] <= max(sizes[1:]):
        return None  # nothing wide stands between: a chain, not a feed-forward
    if found.lost is not None:
        return found.lost
    down = facts.factored.get(product.node)
    if down is None:
        return None
    out = tuple(a for a in down.factor.atoms(space) if a not in space.leaves(down.rank))
    if down.scale != 1:
        return reason_at(product.node, Code.OP_NOT_CARRIED, "a scaled product", "alpha = 1")
    arms: dict[fx.Node, Arm] = {}
    for (source, dims), lift in zip(found.region.sources.items(), lifts, strict=True):
        arm = _wide_arm(facts, source, lift, dims, tokens, contracted)
        if isinstance(arm, Reason):
            return arm
        arms[source] = arm
    inside = frozenset(found.region.nodes).union(*(arm.region for arm in arms.values()))
    if shared := _other_user(inside, inside | {product.node}):
        return shared
    if any(facts.regions[n] != facts.regions[product.node] for n in inside):
        return reason_at(product.node, Code.REGION_CROSSED, "autocast or grad mode changes inside")
    named = ("identity", wide, None) if not found.region.nodes else (
        name_activation(found.region, wide)
    )  # fmt: skip
    if named is None:
        ops = ", ".join(dict.fromkeys(str(n.target) for n in found.region.nodes))
        return reason_at(wide, Code.ACTIVATION_UNKNOWN, ops, "a known activation, gated or not")
    activation, activated, other = named
    batch = {a for i in tokens for a in space.leaves(facts.axes[wide][i])}
    if batch & set(down.factor.atoms(space)):
        return reason_at(product.node, Code.BAD_LAYOUT, "the down factor varies over tokens")
    return FeedForwardSite(
        product.node,
        _common_path([product.node, *inside]),
        inside | {product.node},
        up=arms[activated if other is None else other],
        gate=None if other is None else arms[activated],
        activation=activation,
        down=down.factor,
        down_bias=down.biases[0].tensor if down.biases else None,
        tokens=facts.atoms(wide, tuple(tokens)),
        width=width,
        out=out,
        out_dims=facts.axes[product.node],
    )


def _wide_arm(
    facts: Facts,
    source: fx.Node,
    lift: Factored,
    dims: Dims,
    tokens: Sequence[int],
    contracted: Sequence[int],
) -> Arm | Reason:
    """A lifted source as [tokens, rank] · [F, rank], in its own atoms."""
    space = facts.space
    rows = space.leaves(tuple(a for i in tokens for a in dims[i]))
    width = space.leaves(tuple(a for i in contracted for a in dims[i]))
    rank = space.leaves(lift.rank)
    fits = (
        set(lift.factor.atoms(space)) == {*width, *rank}
        and set(lift.latent.atoms(space)) == {*rows, *rank}
        and all(set(b.tensor.atoms(space)) == set(width) for b in lift.biases)
    )
    if not fits:
        return reason_at(source, Code.BAD_LAYOUT, "latent and factor do not part by token")
    region = _lift_region(facts, source)
    lifted = Labelled((source,), facts.axes[source])
    return Arm(
        lifted, lift.latent, rank, (), (), rows, width, lift.factor, lift.biases, region=region
    )


# ---- regions ------------------------------------------------------------------------------------


def between(facts: Facts, ends: Iterable[fx.Node], stop: set[fx.Node]) -> frozenset[fx.Node]:
    """Nodes from ``ends`` back to, and not including, ``stop``, weights and graph inputs."""
    found: set[fx.Node] = set()
    pending = [node for node in ends if node not in stop]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        for above in node.all_input_nodes:
            computed = above.op == "call_function" and above not in facts.weights
            if computed and above not in stop and _holds_tensors(above):
                pending.append(above)
    return frozenset(found)


def _lift_region(facts: Facts, node: fx.Node) -> frozenset[fx.Node]:
    """Full-width nodes from the lift to ``node``; empty if ``node`` is not lifted."""
    fact = facts.factored.get(node)
    if fact is None:
        return frozenset()
    return between(facts, [node], {*fact.latent.nodes, *fact.factor.nodes})


def _other_user(inside: Iterable[fx.Node], allowed: frozenset[fx.Node]) -> Reason | None:
    """A reason if a node of ``inside`` is read by anyone but ``allowed``."""
    for node in inside:
        for user in node.users:
            reads = user.op == "output" or _holds_tensors(user)
            if reads and user not in allowed:
                observed = f"{node.name} is also read by {user.name}"
                return reason_at(node, Code.WIDE_HAS_OTHER_USER, observed, "no reader outside")
    return None


def _holds_tensors(node: fx.Node) -> bool:
    return is_tensor(node) or isinstance(value(node), (list, tuple))


def _common_path(nodes: Iterable[fx.Node]) -> str:
    paths = [path.split(".") for node in nodes if (path := module_path(node))]
    common: list[str] = []
    for names in zip(*paths, strict=False):
        if len(set(names)) != 1:
            break
        common.append(names[0])
    return ".".join(common)
