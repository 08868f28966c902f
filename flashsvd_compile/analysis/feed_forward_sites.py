"""From a candidate to a feed-forward site: lifts, an activation (gated or not), a down product."""

from collections.abc import Mapping, Sequence

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Dims, volume
from flashsvd_compile.analysis.factored import Factored, Labelled
from flashsvd_compile.analysis.facts import Facts, FeedForwardCandidate
from flashsvd_compile.analysis.low_rank import is_low_rank
from flashsvd_compile.analysis.outer_factors import outer_factors
from flashsvd_compile.analysis.pointwise import is_nonlinear, name_activation
from flashsvd_compile.analysis.regions import between, common_path, lift_region, other_user
from flashsvd_compile.analysis.site_records import Arm, FeedForwardSite
from flashsvd_compile.reason import Code, Reason, reason_at


def feed_forward_site(
    facts: Facts, found: FeedForwardCandidate, lifts_of: Mapping[fx.Node, Sequence[fx.Node]]
) -> FeedForwardSite | Reason | None:
    """The candidate's site, or why there is none; None where nobody would expect one.

    ``lifts_of``: see ``lifts_of_latents``.
    """
    made = _read_site(facts, found, lifts_of)
    if isinstance(made, Reason) and not _is_intermediate(facts, found):
        return None
    return made


def _is_intermediate(facts: Facts, found: FeedForwardCandidate) -> bool:
    """Is the wide tensor the middle of a feed-forward, or merely a layer's output?

    An activation or a gate between the lift and the product makes it the middle of one. A linear
    function of the lifts that is then projected, most often by several (q, k and v of the next
    layer), is none. An operator that was lost on the way may be an activation or a norm: there it
    is an intermediate if it is for this product alone.
    """
    bent = is_nonlinear(found.region)
    if bent or (bent is False and found.lost is None):
        return bent
    lifts = [facts.factored[source] for source in found.region.sources]
    ends = {node for lift in lifts for node in (*lift.latent.nodes, *lift.factor.nodes)}
    inside = between(facts, [found.down.left], ends)
    return other_user(inside, inside | {found.down.node}) is None


def _read_site(
    facts: Facts, found: FeedForwardCandidate, lifts_of: Mapping[fx.Node, Sequence[fx.Node]]
) -> FeedForwardSite | Reason | None:
    space, product = facts.space, found.down
    lifts = [facts.factored[source] for source in found.region.sources]
    lifted = any(is_low_rank(facts, lift) for lift in lifts)
    if not lifted and (product.node not in lifts_of or found.lost or not found.region.nodes):
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
    if shared := other_user(inside, inside | {product.node}):
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
    up, gate = arms[activated if other is None else other], None
    if other is not None:
        gate = arms[activated]
    rows, region = facts.atoms(wide, tuple(tokens)), inside | {product.node}
    inputs = [(arm.latent, arm.rows, arm.rank) for arm in (up, gate) if arm is not None]
    exits = lifts_of.get(product.node, ())
    return FeedForwardSite(
        product.node,
        common_path([product.node, *inside]),
        region,
        up=up,
        gate=gate,
        activation=activation,
        down=down.factor,
        down_bias=down.biases[0].tensor if down.biases else None,
        tokens=rows,
        width=width,
        out=out,
        out_dims=facts.axes[product.node],
        outer=outer_factors(facts, product.node, region, inputs, rows, out, exits),
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
    region = lift_region(facts, source)
    lifted = Labelled((source,), facts.axes[source])
    return Arm(
        lifted, lift.latent, rank, (), (), rows, width, lift.factor, lift.biases, region=region
    )
