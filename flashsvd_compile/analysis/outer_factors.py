"""The products at either end of a latent: what made it, and what lifts the result.

    p = linear(x, u1, a);  h = gelu(linear(p, v1));  s = linear(h, u2);  y = linear(s, v2, b)

    entry of p    x [rows, hidden] · u1 [rank, hidden] + a
    exit of s     s [rows, rank] · v2 [hidden, rank] + b

A lowering may take x in and give y out only where nobody else reads p or s, where all of it runs
under one autocast and grad mode, and where nothing rounds to another dtype in between.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import sympy
import torch
from torch import fx

from flashsvd_compile.analysis.axes import Dim, volume
from flashsvd_compile.analysis.calls import is_tensor, value
from flashsvd_compile.analysis.factored import Factored, Labelled
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.regions import between, other_user
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainEnds,
    Entry,
    Exit,
    Outer,
)
from flashsvd_compile.reason import Code, Reason, reason_at

_PARTS = "one token a row"


def chain_ends(facts: Facts, lift: fx.Node) -> ChainEnds | Reason:
    """Entry and exit of the latent that ``lift`` lifts."""
    fact = facts.factored[lift]
    rank = facts.space.leaves(fact.rank)
    tokens = tuple(atom for atom in fact.latent.atoms(facts.space) if atom not in rank)
    entry = read_entry(facts, fact.latent, tokens, rank)
    if isinstance(entry, Reason):
        return entry
    exit_ = read_exit(facts, lift, tokens, rank)
    if isinstance(exit_, Reason):
        return exit_
    problem = check_private(facts, entry.region, lift, [entry.x.node, *entry.region, lift])
    return problem or ChainEnds(entry, exit_)


def outer_factors(
    facts: Facts,
    down: fx.Node,
    region: frozenset[fx.Node],
    latents: Iterable[tuple[Labelled, Dim, Dim]],
    tokens: Dim,
    out: Dim,
    lifts: Sequence[fx.Node],
) -> Outer | Reason:
    """What stands around a feed-forward that ``region`` computes, ending in the product ``down``.

    ``latents``: of up and then of the gate, each with its atoms of tokens and ranks. ``lifts``: of
    what ``down`` makes.
    """
    entries = []
    for latent, rows, rank in latents:
        entry = read_entry(facts, latent, rows, rank)
        if isinstance(entry, Reason):
            return entry
        entries.append(entry)
    if not lifts:
        observed = f"{down.name} is lifted by no factor"
        return reason_at(down, Code.NO_LOW_RANK_OPERAND, observed, "a down projection of two")
    exit_ = read_exit(facts, lifts[0], tokens, out)
    if isinstance(exit_, Reason):
        return exit_
    latent_side = frozenset().union(*(entry.region for entry in entries))
    result_side = between(facts, [facts.factored[lifts[0]].latent.node], {*down.all_input_nodes})
    inside = latent_side | region | result_side
    everything = [*(entry.x.node for entry in entries), *inside, lifts[0]]
    problem = check_private(facts, inside, lifts[0], everything)
    return problem or Outer(
        entries[0], entries[1] if len(entries) > 1 else None, exit_, inside | {lifts[0]}
    )


def attention_entries(facts: Facts, site: AttentionSite) -> dict[str, Entry]:
    """By arm the products that make the latents which ``site`` alone reads, each one of its own."""
    entries: dict[str, Entry] = {}
    # What stays of a lift that others read takes its latents from the graph.
    shared = {name for lift in site.shared for name in lift.arms}
    latents = [arm.latent.node for arm in site.arms.values()]
    for name, arm in site.arms.items():
        if (
            arm.factor is None
            or name in shared
            or latents.count(arm.latent.node) > 1
            or any(atom.broadcast for atom in (*arm.batch, *arm.rows))
        ):
            continue
        atoms = set(arm.latent.atoms(facts.space))
        heads = tuple(atom for atom in arm.heads if atom in atoms)
        entry = read_entry(facts, arm.latent, arm.batch + arm.rows, heads + arm.rank)
        if isinstance(entry, Entry) and not _check_taken(facts, entry, site):
            entries[name] = entry
    return entries


def _check_taken(facts: Facts, entry: Entry, site: AttentionSite) -> Reason | None:
    """Why the latent that ``entry`` makes has to stand in the graph."""
    everything = entry.region | site.region
    if shared := other_user(entry.region, everything):
        return shared
    if any(facts.regions[node] != facts.regions[site.node] for node in entry.region):
        return reason_at(site.node, Code.REGION_CROSSED, "autocast or grad mode changes inside")
    if value(entry.x.node).dtype != site.dtype:
        return reason_at(entry.x.node, Code.DTYPE, str(value(entry.x.node).dtype), str(site.dtype))
    return None


def check_private(
    facts: Facts, inside: frozenset[fx.Node], end: fx.Node, everything: Iterable[fx.Node]
) -> Reason | None:
    """Why ``inside``, which only ``end`` may read, cannot be left out of memory."""
    if shared := other_user(inside, inside | {end}):
        return replace(shared, code=Code.LATENT_HAS_OTHER_USER)
    if any(facts.regions[node] != facts.regions[end] for node in inside):
        return reason_at(end, Code.REGION_CROSSED, "autocast or grad mode changes inside")
    dtype: torch.dtype = value(end).dtype
    for node in everything:
        if is_tensor(node) and value(node).dtype != dtype:
            observed = f"{node.name} is {value(node).dtype}"
            return reason_at(node, Code.DTYPE, observed, f"{dtype}, as of the result")
    return None


def read_entry(facts: Facts, latent: Labelled, rows: Dim, rank: Dim) -> Entry | Reason:
    """The product that made ``latent`` [rows, rank], in the latent's own atoms."""
    space, node = facts.space, latent.node
    if len(latent.nodes) > 1 or latent.cuts:
        return reason_at(node, Code.BAD_LAYOUT, "a part of a latent, or several", "a whole one")
    fact = facts.factored.get(node)
    if fact is None:
        observed = f"{node.name} is no product with a factor"
        return reason_at(node, Code.NO_LOW_RANK_OPERAND, observed, "x times a factor")
    hidden = space.leaves(fact.rank)
    rank = space.leaves(rank)
    sizes = volume(hidden), volume(rank)
    if not all(isinstance(size, sympy.Integer) for size in sizes) or sizes[0] <= sizes[1]:
        observed = f"a factor from {sizes[0]} to {sizes[1]}"
        return reason_at(node, Code.NO_LOW_RANK_OPERAND, observed, "a rank under the width of x")
    if problem := _check_parts(facts, fact, set(rows), set(rank), node):
        return problem
    region = between(facts, [node], {*fact.latent.nodes, *fact.factor.nodes})
    return Entry(fact.latent, fact.factor, fact.biases, space.leaves(rows), rank, hidden, region)


def read_exit(facts: Facts, lift: fx.Node, tokens: Dim, rank: Dim) -> Exit | Reason:
    """The lift of a latent [tokens, rank] to the last width, with the biases on the latent."""
    space, fact = facts.space, facts.factored[lift]
    tokens, rank = space.leaves(tokens), space.leaves(rank)
    width = fact.lifted_atoms(space)
    latent_fact = facts.factored[fact.latent.node]
    if set(space.leaves(fact.rank)) != set(rank):
        return reason_at(lift, Code.BAD_LAYOUT, "a lift of a part of the latent", "of all of it")
    if problem := _check_parts(facts, fact, set(tokens), set(width), lift):
        return problem
    dims = facts.axes[lift]
    if set(space.leaves(tuple(atom for dim in dims for atom in dim))) != {*tokens, *width}:
        return reason_at(lift, Code.BAD_LAYOUT, "a result that varies otherwise", _PARTS)
    if latent_fact.scale != 1 or any(set(b.tensor.atoms(space)) != set(rank)
                                     for b in latent_fact.biases):  # fmt: skip
        observed = "a latent that is scaled, or whose bias varies over tokens"
        return reason_at(lift, Code.OP_NOT_CARRIED, observed, "a product and a bias")
    return Exit(lift, fact.factor, fact.biases, latent_fact.biases, tokens, rank, width, dims)


def _check_parts(
    facts: Facts, fact: Factored, rows: set, made: set, node: fx.Node
) -> Reason | None:
    """Is ``fact`` plainly [rows, contracted] · [made, contracted] + bias [made]?"""
    space = facts.space
    contracted = set(space.leaves(fact.rank))
    tensors = [fact.latent, fact.factor, *(bias.tensor for bias in fact.biases)]
    whole = all(len(tensor.nodes) == 1 for tensor in tensors) and not fact.latent.cuts
    parts = (
        set(fact.latent.atoms(space)) == rows | contracted
        and set(fact.factor.atoms(space)) == made | contracted
        and all(set(bias.tensor.atoms(space)) == made for bias in fact.biases)
    )
    if not (whole and parts):
        return reason_at(node, Code.BAD_LAYOUT, "factor and latent do not part by token", _PARTS)
    if fact.scale != 1:
        return reason_at(node, Code.OP_NOT_CARRIED, "a scaled product", "alpha = 1")
    return None
