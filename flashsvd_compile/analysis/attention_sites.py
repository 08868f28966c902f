"""From a candidate to an attention site: q, k and v as latents where they can be, else dense.

Queries that RoPE has turned are read as the latent of what was turned: see ``rotations.py``.

The operands' atoms are aligned with the output's; those along which a factor varies are heads, the
others batch, but for those that a mask tells apart.
"""

from collections.abc import Mapping
from dataclasses import replace

import sympy
from torch import fx

from flashsvd_compile.analysis.attention_facts import Operand
from flashsvd_compile.analysis.axes import Atom, Dim, volume
from flashsvd_compile.analysis.factored import Factored, Labelled
from flashsvd_compile.analysis.facts import AttentionCandidate, Facts
from flashsvd_compile.analysis.low_rank import is_low_rank, lost_in_earnest
from flashsvd_compile.analysis.regions import between, common_path, lift_region, other_user
from flashsvd_compile.analysis.repeats import unrepeated
from flashsvd_compile.analysis.rotations import RotatedLift, rotated_lift
from flashsvd_compile.analysis.shared_lifts import share_lifts, shared_lift
from flashsvd_compile.analysis.site_records import Arm, AttentionSite, Rotation
from flashsvd_compile.reason import Code, Reason, reason_at


def attention_site(facts: Facts, found: AttentionCandidate) -> AttentionSite | Reason | None:
    """The site with turned queries as a latent, where they are one and all that this needs holds;
    else as it is with them at full width."""
    plain = _site(facts, found, None)
    turned = rotated_lift(facts, found.query.node)
    if turned is None or found.query.feature != (len(facts.axes[turned.node]) - 1,):
        return plain
    site = _site(facts, found, turned)
    if not isinstance(site, AttentionSite) or site.query.rotation is None or site.key.factor:
        return plain
    return replace(site, unturned=plain if isinstance(plain, AttentionSite) else None)


def _site(
    facts: Facts, found: AttentionCandidate, turned: RotatedLift | None
) -> AttentionSite | Reason | None:
    """``turned``: the queries, where they are to be read as the latent of that lift."""
    space = facts.space
    operands = (found.query, found.key, found.value)
    lifted = [operand.node for operand in operands]
    lift_facts = {node: facts.factored[node] for node in lifted if node in facts.factored}
    if turned is not None:
        lifted[0] = turned.lifted
        lift_facts[turned.node] = turned.fact
    if not any(o.node in lift_facts or lost_in_earnest(facts, o.node) for o in operands):
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
    stacked = _stacked_heads(facts, found, lift_facts.get(found.query.node), rows[0])
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

    beside = {m.node for m in found.masks}
    if found.sink is not None:
        beside |= {found.sink.column, found.sink.tensor.node}
    core = between(facts, [found.node], {*(o.node for o in operands), *beside})
    regions = [lift_region(facts, operand.node) for operand in operands]
    if turned is not None:
        regions[0] = turned.region
    allowed = core.union(*(r for r in regions if r))
    whys = [
        _why_dense(facts, operand.node, lift_facts.get(operand.node), {name: node}, region, allowed)
        for name, operand, node, region in zip("qkv", operands, lifted, regions, strict=True)
    ]
    if all(whys):
        return next((w for w in whys if w and w.code is not Code.NO_LOW_RANK_OPERAND), None)
    if shared := other_user(core - {found.node}, core):
        return shared
    if any(facts.regions[n] != facts.regions[found.node] for n in allowed):
        return reason_at(found.node, Code.REGION_CROSSED, "autocast or grad mode changes inside")

    positions = [space.leaves(own) for own in [*batch, output]]
    low_rank = [lift_facts[o.node] for o, why in zip(operands, whys, strict=True) if not why]
    in_heads = [
        any(atoms[i] in _factor_atoms(facts, fact) for fact in low_rank for atoms in positions[:3])
        or any(atoms[i].broadcast for atoms in positions[1:3])
        for i in range(len(positions[0]))
    ]
    if found.sink is not None:
        of_sink = set(found.sink.tensor.atoms(space))
        in_heads = [h or a in of_sink for h, a in zip(in_heads, positions[3], strict=True)]
    if not any(in_heads):
        in_heads = _as_masks_vary(facts, found, positions[3])
    split = [
        (tuple(a for a, h in zip(atoms, in_heads, strict=True) if not h),
         tuple(a for a, h in zip(atoms, in_heads, strict=True) if h))
        for atoms in positions
    ]  # fmt: skip
    if not isinstance(volume(split[3][1]), sympy.Integer):
        return reason_at(found.node, Code.BAD_LAYOUT, "a symbolic number of heads", "a number")
    if found.sink is not None and not _is_leading(split[3][1], set(found.sink.tensor.atoms(space))):
        return reason_at(found.sink.column, Code.BAD_LAYOUT, "a sink of some heads of each group")
    arms: list[Arm] = []
    rotations = [None if turned is None else turned.rotation, None, None]
    for operand, own_rows, region, why, (own_batch, own_heads), rotation in zip(
        operands, rows, regions, whys, split[:3], rotations, strict=True
    ):
        dense = _dense_arm(facts, found.node, operand, own_batch, own_heads, own_rows)
        if isinstance(dense, Reason):
            return dense
        if why is None:
            why = _why_apart(facts, dense, lift_facts[operand.node], rotation)
        if why is None:
            fact = lift_facts[operand.node]
            arms.append(dense.as_latent(space.leaves(fact.rank), fact, region, rotation))
        else:
            arms.append(replace(dense, why_dense=why))
    arms, lifts = share_lifts(facts, arms, lifted, core, allowed)
    if all(arm.factor is None for arm in arms):
        return arms[0].why_dense
    region = core.union(*(arm.region for arm in arms), *(lift.region for lift in lifts))
    return AttentionSite(
        found.node,
        common_path([found.node, *(n for arm in arms for n in arm.region)]),
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
        shared=lifts,
        softcap=found.softcap,
        sink=None if found.sink is None else found.sink.tensor,
    )


def _as_masks_vary(facts: Facts, found: AttentionCandidate, output: Dim) -> list[bool]:
    """As heads all atoms that masks vary along otherwise than along the first, which is batch.

    Where no factor tells heads apart (narrowed heads have none), a mask for all heads does: it
    would have to be repeated for each of them, if they were batch.
    """
    leaves = facts.space.leaves
    masks = [{a for dim in mask.dims for a in leaves(dim)} for mask in found.masks]
    varies = [[atom in mask for mask in masks] for atom in output]
    return [
        along != varies[0] and isinstance(atom.size, sympy.Integer)
        for atom, along in zip(output, varies, strict=True)
    ]


def _stacked_heads(
    facts: Facts, found: AttentionCandidate, fact: Factored | None, rows: Dim
) -> list[int]:
    """Which of the queries' row atoms are heads: the query's factor varies along them.

    Grouped queries may be spelled as more rows of one head of keys.
    """
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


def _why_dense(
    facts: Facts,
    node: fx.Node,
    fact: Factored | None,
    lifted: Mapping[str, fx.Node],
    region: frozenset[fx.Node],
    allowed: frozenset[fx.Node],
) -> Reason | None:
    """Why an operand cannot be read from its latent; None if it can. ``lifted``: by arm."""
    if fact is None and (lost := lost_in_earnest(facts, node)):
        return lost
    if fact is None or not is_low_rank(facts, fact):
        return reason_at(node, Code.NO_LOW_RANK_OPERAND, "a dense tensor", "latent × factor")
    if other_user(region, allowed) is None:
        return None
    is_turned = node not in facts.factored
    left = shared_lift(facts, lifted, allowed, region if is_turned else frozenset())
    return left if isinstance(left, Reason) else None


def _dense_arm(
    facts: Facts, result: fx.Node, operand: Operand, batch: Dim, heads: Dim, rows: Dim
) -> Arm | Reason:
    """The operand in canonical terms, at full width."""
    space, node = facts.space, operand.node
    width = facts.atoms(node, operand.feature)
    if not isinstance(volume(width), sympy.Integer):
        return reason_at(node, Code.BAD_LAYOUT, "a symbolic head_dim", "a number")
    held = unrepeated(facts, node, facts.regions[result])
    dense = Labelled((held,), facts.axes[held])
    if not _is_leading(heads, set(dense.atoms(space))):
        return reason_at(node, Code.BAD_LAYOUT, "heads repeated over the outer dimension")
    return Arm(dense, dense, width, batch, heads, rows, width)


def _why_apart(facts: Facts, arm: Arm, fact: Factored, rotation: Rotation | None) -> Reason | None:
    """Why latent, factor and tables do not part by batch, head, row and feature; None if so."""
    space, node, heads = facts.space, arm.lifted.node, arm.heads
    width = arm.width if rotation is None else rotation.width
    rank = space.leaves(fact.rank)
    latent, factor = (set(t.atoms(space)) for t in (fact.latent, fact.factor))
    vary = {atom for atom in (*arm.batch, *arm.rows) if not atom.broadcast}
    extra = {a for b in fact.biases for a in b.tensor.atoms(space)} - set(heads) - set(width)
    fits = (
        vary <= latent
        and not vary & factor
        and set(width) <= factor
        and not set(width) & latent
        and factor <= {*heads, *width, *rank}
        and latent <= {*arm.batch, *heads, *arm.rows, *rank}
        and not extra
        and _is_leading(heads, latent)
        and _is_leading(heads, factor)
        and all(_is_leading(heads, set(b.tensor.atoms(space))) for b in fact.biases)
        and all(set(width) <= set(b.tensor.atoms(space)) for b in fact.biases)
    )
    if fits and rotation is not None:
        places = {*arm.batch, *arm.rows}
        fits = all(
            set(angles.table.atoms(space)) - set(angles.features) <= places
            for angles in (rotation.cos, rotation.sin)
        )
    if fits:
        return None
    return reason_at(node, Code.BAD_LAYOUT, "latent and factor do not part by head and row")


def _is_leading(heads: Dim, atoms: set[Atom]) -> bool:
    """Does the tensor vary along a leading part of the heads, and not along the rest?"""
    present = [atom in atoms for atom in heads]
    return present == sorted(present, reverse=True)
