"""FLOPs of a site as it will run and unfused: 2 × the multiply-adds of its products.

    attention      unfused      lifts of q, k and v;  M · N · D for scores and for values
                   rank_space   lift of q (twice if RoPE turns it), absorption of k and lift of
                                the result, M · D · r each;
                                M · N · r for scores and for values
    feed_forward   all          T · F · (r_up + r_gate + r_down)
    chain          all          rows · r · (in + out)
    siblings       all          rows · in · Σ widths

for M queries and N keys of each head, D wide, T tokens, ranks r. What makes the latents counts
where the lowering does that, too, and then in both numbers. Masks hide no work here, and padding to
tiles adds none; library operators on a CPU may do less, and multiply the factors of q and k ahead.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Dim, Size, shape_of, volume
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.site_records import (
    Arm,
    AttentionSite,
    ChainEnds,
    ChainSite,
    Entry,
    FeedForwardSite,
    Outer,
    SiblingsSite,
    Site,
)
from flashsvd_compile.planner.plan import Plan


@dataclass(frozen=True)
class Flops:
    """Of one site or several, formulas of the graph's symbols."""

    planned: Size
    unfused: Size


def flops_of(plan: Plan, found: Site, besides: Iterable[fx.Node] = ()) -> Flops:
    """Of one site; ``found``: the site before the plan chose which of its arms to lift.

    ``besides``: nodes whose work has been counted; siblings leave those of theirs out, and a lift
    that attention shares with others counts there.
    """
    site = plan.site
    if isinstance(site, AttentionSite):
        assert isinstance(found, AttentionSite)
        outside = sympy.Add(*map(_entry, plan.blocks.entries.values() if plan.blocks else ()))
        unfused = _unfused_attention(found) + outside
        planned = unfused
        if plan.lowering == "rank_space":
            planned = _rank_space_attention(site, found) + outside
        return Flops(2 * planned, 2 * unfused)
    if isinstance(site, FeedForwardSite):
        macs = _feed_forward(site)
        if plan.lowering == "streamed_whole":
            macs += _outer(site)
    elif isinstance(site, ChainSite):
        macs = _chain(site, is_lift_counted=plan.node in set(besides))
    else:
        assert isinstance(site, SiblingsSite)
        counted = frozenset(besides)
        members = [member for member in site.members if member.node not in counted]
        macs = sympy.Add(*(site.rows * m.in_features * m.width for m in members))
    return Flops(2 * macs, 2 * macs)


def flops_of_all(plans: Iterable[tuple[Plan, Site]]) -> Flops:
    """Of all sites of one graph, as planned and as found; no product counts twice."""
    total = Flops(sympy.S.Zero, sympy.S.Zero)
    counted: set[fx.Node] = set()
    # A lift that attention shares with others may be a chain, too: it counts with attention.
    for plan, found in sorted(plans, key=lambda pair: pair[1].kind != "attention"):
        flops = flops_of(plan, found, besides=counted)
        total = Flops(total.planned + flops.planned, total.unfused + flops.unfused)
        counted |= plan.region
    return total


def _unfused_attention(site: AttentionSite) -> Size:
    widths = site.key.width_size + site.value.width_size
    return _pairs(site) * widths + sympy.Add(*_lifts(site).values())


def _rank_space_attention(site: AttentionSite, found: AttentionSite) -> Size:
    query, key, val = site.query, site.key, site.value
    results = volume(site.batch) * site.num_heads * volume(site.rows)
    macs = _pairs(site) * (key.rank_size + val.rank_size)
    for arm in (query, key, val):
        if arm.factor is not None:
            lifted = 1 if arm.rotation is None else 2  # each feature's partner, too
            macs += results * arm.width_size * arm.rank_size * lifted
    absorbed = {name for name, arm in site.arms.items() if arm.factor is not None}
    before = (lift for names, lift in _lifts(found).items() if not names & absorbed)
    return macs + sympy.Add(*before, *(r.shape.macs for s in site.shared for r in s.remainders))


def _lifts(site: AttentionSite) -> dict[frozenset[str], Size]:
    """What it takes to lift arms, by the arms that one lift makes; all of it where others read it,
    too."""
    found = {shared.arms: shared.whole.macs for shared in site.shared}
    for name, arm in site.arms.items():
        if arm.factor is not None and not any(name in names for names in found):
            found[frozenset({name})] = _lift(arm)
    return found


def _pairs(site: AttentionSite) -> Size:
    """Scores."""
    rows, keys = volume(site.rows), volume(site.keys)
    return volume(site.batch) * site.num_heads * rows * keys


def _lift(arm: Arm) -> Size:
    """As the model does it: along what the arm varies along."""
    own = _varying(arm.batch) * arm.own_heads * _varying(arm.rows)
    return own * arm.width_size * arm.rank_size


def _varying(dim: Dim) -> Size:
    return volume(atom for atom in dim if not atom.broadcast)


def _feed_forward(site: FeedForwardSite) -> Size:
    arms = [site.up] if site.gate is None else [site.up, site.gate]
    ranks = sum(arm.rank_size for arm in arms) + volume(site.out)
    return volume(site.tokens) * volume(site.width) * ranks


def _outer(site: FeedForwardSite) -> Size:
    outer = site.outer
    assert isinstance(outer, Outer)
    macs = _entry(outer.up) + volume(site.tokens) * volume(site.out) * volume(outer.exit.width)
    if outer.gate is not None and site.gate_from in ("x", "own"):
        macs += _entry(outer.gate)
    return macs


def _entry(entry: Entry) -> Size:
    return volume(entry.rows) * volume(entry.hidden) * volume(entry.rank)


def _chain(site: ChainSite, is_lift_counted: bool) -> Size:
    """The first product belongs to a chain where nobody else reads the latent."""
    rows = sympy.Mul(*shape_of(value(site.node))) / site.out_width
    widths = 0 if is_lift_counted else site.out_width
    widths += site.in_width if isinstance(site.ends, ChainEnds) else 0
    return rows * site.rank * widths
