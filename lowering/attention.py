"""Attention sites → ``flashsvd::rank_space_attention``.

    before   q = view(linear(pq, vq, bq)); k = ..; v = ..; sdpa(q, k, v, mask)
    after    rank_space_attention(pq, pk, pv, vq, bq, vk, vv, bv, mask)

pq, pk, pv are the latents as they stand in the graph, seen as [B, H_x, rows, rank]; the lifts that
nothing reads any more disappear. An operand that the plan keeps dense is passed as it is; with the
latent of queries that RoPE turns go its tables. In blocks of the batch and of heads, latents do not
stand in the graph either:

    before   pq = linear(x, uq); ..
    after    rank_space_attention_blocks(x, x, x, vq, .., uq, .., block_batch=8, block_heads=12)
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import sympy
import torch
from flashsvd_compile.lowering import ops
from flashsvd_compile.lowering.builder import Builder
from torch import fx

from flashsvd_compile.analysis.attention_facts import ScoreMask
from flashsvd_compile.analysis.axes import Atom, Dim, same, volume
from flashsvd_compile.analysis.calls import aten, value
from flashsvd_compile.analysis.factored import Labelled
from flashsvd_compile.analysis.masks import Mask, MaskTerm, analyse_mask
from flashsvd_compile.analysis.site_records import Angles, Arm, AttentionBlocks, AttentionSite
from flashsvd_compile.analysis.symbolic_values import SymbolicValues


def lower_attention(
    site: AttentionSite,
    builder: Builder,
    tile: Sequence[int],
    sram_budget: int,
    values: SymbolicValues,
    blocks: AttentionBlocks | None = None,
) -> fx.Node:
    """Write the site in rank space; returns the node that stands for ``site.node``.

    ``values`` of the graph's tensors are shared between the sites: most read the same masks.
    """
    query, key, val = site.query, site.key, site.value
    mask = _mask(site, builder, values)
    sink = _sink(site, builder)
    # b_k shifts all scores of a query: softmax drops that, but not from within tanh or by a sink.
    counts = site.softcap or sink is not None or torch.is_grad_enabled()
    k_bias = _bias(site, builder, key) if counts else None
    numbers: dict[str, Any] = {
        "num_heads": site.num_heads,
        **mask.bounds,
        "scale": site.scale * query.scale * key.scale,
        "tile": list(tile),
        "sram_budget": sram_budget,
        "softcap": site.softcap,
    }
    norm = None if query.rotation is None else query.rotation.norm
    beside = k_bias, sink, *_tables(site, builder), None if norm is None else norm.weight
    if norm is not None:
        numbers["q_norm_eps"] = norm.eps
    if query.rotation is not None:
        numbers |= {"rotary_dim": query.rotation.rotary_dim, "rotary_pair": query.rotation.pair}
    lifts = (
        _factor(site, builder, query),
        _bias(site, builder, query),
        _factor(site, builder, key),
        _factor(site, builder, val),
        _bias(site, builder, val),
        mask.tensor,
    )
    if blocks is None:
        latents = (_latent(site, builder, arm) for arm in (query, key, val))
        result = builder.call(ops.rank_space_attention, *latents, *lifts, *beside, **numbers)
    else:
        result = _write_blocks(site, builder, blocks, lifts, beside, numbers)
    result = builder.times(result, val.scale)
    labelled = Labelled((result,), (site.batch, site.heads, site.rows, site.width))
    return builder.arrange(labelled, site.out_dims)


def _write_blocks(
    site: AttentionSite,
    builder: Builder,
    blocks: AttentionBlocks,
    lifts: Sequence[fx.Node | None],
    beside: Sequence[fx.Node | None],
    numbers: dict[str, Any],
) -> fx.Node:
    inputs: list[fx.Node] = []
    products: list[fx.Node | None] = []
    heads = []
    for name, arm in site.arms.items():
        own_heads = _heads(builder, arm, arm.latent)
        heads.append(int(volume(own_heads)))
        if (entry := blocks.entries.get(name)) is None:
            inputs.append(_latent(site, builder, arm))
            products += [None, None]
            continue
        x = builder.arrange(entry.x, [arm.batch, arm.rows, entry.hidden])
        inputs.append(builder.cast(x, site.dtype))
        u = builder.arrange(entry.factor, [own_heads + arm.rank, entry.hidden])
        products += [
            builder.cast(u, site.dtype),
            builder.bias(entry.biases, own_heads + arm.rank, site.dtype),
        ]
    return builder.call(
        ops.rank_space_attention_blocks,
        *inputs,
        *lifts,
        *products,
        *beside,
        heads=heads,
        block_batch=blocks.batch,
        block_heads=blocks.heads,
        **numbers,
    )


def _heads(builder: Builder, arm: Arm, tensor: Labelled) -> Dim:
    """The leading heads along which ``tensor`` varies."""
    atoms = set(tensor.atoms(builder.space))
    return tuple(atom for atom in arm.heads if atom in atoms)


def _latent(site: AttentionSite, builder: Builder, arm: Arm) -> fx.Node:
    heads = _heads(builder, arm, arm.latent)
    node = builder.arrange(arm.latent, [arm.batch, heads, arm.rows, arm.rank])
    return builder.cast(node, site.dtype)


def _factor(site: AttentionSite, builder: Builder, arm: Arm) -> fx.Node | None:
    if arm.factor is None:
        return None
    heads = _heads(builder, arm, arm.factor)
    factor = builder.arrange(arm.factor, [heads, arm.lifted_width, arm.rank])
    return builder.cast(factor, site.dtype)


def _bias(site: AttentionSite, builder: Builder, arm: Arm) -> fx.Node | None:
    """The sum of biases, relative to the arm's scale (which the site's scale has taken in)."""
    terms = []
    for bias in arm.biases:
        heads = _heads(builder, arm, bias.tensor)
        node = builder.cast(builder.arrange(bias.tensor, [heads, arm.lifted_width]), site.dtype)
        terms.append(builder.times(node, bias.scale / arm.scale))
    return builder.fold(aten.add.Tensor, terms)


def _sink(site: AttentionSite, builder: Builder) -> fx.Node | None:
    """One logit for each head, or for each leading part of the heads."""
    if site.sink is None:
        return None
    atoms = set(site.sink.atoms(builder.space))
    heads = tuple(atom for atom in site.heads if atom in atoms)
    return builder.arrange(site.sink, [heads])


def _tables(site: AttentionSite, builder: Builder) -> tuple[fx.Node | None, fx.Node | None]:
    """Cosines and sines that queries are turned by, [B|1, M|1, entries] each."""
    rotation = site.query.rotation
    if rotation is None:
        return None, None
    return _angles(site, builder, rotation.cos), _angles(site, builder, rotation.sin)


def _angles(site: AttentionSite, builder: Builder, angles: Angles) -> fx.Node:
    table = angles.table
    if angles.is_complex:
        parts = builder.call(aten.view_as_real.default, table.node)
        table = replace(table, nodes=(parts,))
    groups = (site.query.batch, site.query.rows)
    present = _present(builder, set(table.atoms(builder.space)), groups)
    node = builder.arrange(table, [*present, angles.features])
    stop = angles.start + angles.step * (angles.count - 1) + 1
    if (angles.start, angles.step, stop) != (0, 1, value(node).shape[2]):
        node = builder.call(aten.slice.Tensor, node, 2, angles.start, stop, angles.step)
    return builder.times(node, -1) if angles.negated else node


# ---- masks --------------------------------------------------------------------------------------


class _Masks(NamedTuple):
    """The site's masks as at most one tensor, and bounds: numbers, nodes or None."""

    tensor: fx.Node | None
    ahead: Any
    behind: Any

    @property
    def bounds(self) -> dict[str, Any]:
        is_causal = self.ahead is not None
        return {
            "is_causal": is_causal,
            "ahead": self.ahead if is_causal else 0,
            "behind": self.behind,
        }


def _mask(site: AttentionSite, builder: Builder, values: SymbolicValues) -> _Masks:
    found, bounds = [], Mask((), ahead=sympy.S.Zero if site.is_causal else None)
    for mask in site.masks:
        analysed = _analysed(site, builder, mask, values)
        together = _together(bounds, analysed)
        if together is None or not _are_computed(builder, together):
            analysed = _analysed(site, builder, mask, values, with_bounds=False)
        else:
            bounds = together
        found.append(analysed)
    ahead, behind = (None if x is None else builder.size(x) for x in (bounds.ahead, bounds.behind))
    terms = [(term, _narrowed(builder, term)) for mask in found for term in mask.terms]
    attends = [node for term, node in terms if not term.additive]
    added = [node for term, node in terms if term.additive]
    allowed = builder.fold(aten.logical_and.default, attends)
    total = builder.fold(aten.add.Tensor, added)
    if allowed is not None and total is not None:
        total = builder.call(aten.where.ScalarOther, allowed, total, -math.inf)
        allowed = None
    return _Masks(allowed or total, ahead, behind)


def _together(one: Mask, other: Mask) -> Mask | None:
    """Bounds of both, None where they have the same one otherwise."""
    pairs = ((one.ahead, other.ahead), (one.behind, other.behind))
    if any(a is not None and b is not None and not same(a, b) for a, b in pairs):
        return None
    ahead, behind = (b if a is None else a for a, b in pairs)
    return Mask((), ahead, behind)


def _are_computed(builder: Builder, bounds: Mask) -> bool:
    """Whether sizes of the graph lead to them."""
    try:
        for bound in (bounds.ahead, bounds.behind):
            if bound is not None:
                builder.size(bound)
    except LookupError:
        return False
    return True


def _analysed(
    site: AttentionSite,
    builder: Builder,
    mask: ScoreMask,
    values: SymbolicValues,
    *,
    with_bounds: bool = True,
) -> Mask:
    groups = (site.batch, site.heads, site.rows, site.keys)
    node = _as_attention_mask(site, builder, mask)
    labels = tuple(builder.space.leaves(dim) for dim in mask.dims)
    expected = groups[4 - len(labels) :] if len(labels) <= 4 else ()
    if len(labels) > 4 or any(a not in ((), e) for a, e in zip(labels, expected, strict=True)):
        atoms = {a for dim in mask.dims for a in builder.space.leaves(dim)}
        node = builder.arrange(Labelled((node,), mask.dims), _present(builder, atoms, groups))
    sizes = [builder.traced_size(volume(group)) for group in groups]
    return analyse_mask(node, sizes, values, with_bounds=with_bounds)


def _present(builder: Builder, atoms: set[Atom], groups: Sequence[Dim]) -> list[Dim]:
    """Of each group all atoms if any of them is among ``atoms`` (missing ones repeated), else
    none."""
    leaves = [builder.space.leaves(group) for group in groups]
    return [
        tuple(a if a in atoms else Atom(a.size, broadcast=True) for a in group)
        if atoms & set(group)
        else ()
        for group in leaves
    ]


def _as_attention_mask(site: AttentionSite, builder: Builder, mask: ScoreMask) -> fx.Node:
    """As scaled_dot_product_attention takes it: True attends, or floating and added."""
    if mask.fill is None:
        return mask.node
    attends = mask.node
    if value(attends).dtype != torch.bool:
        attends = builder.cast(attends, torch.bool)
    if mask.fill_where:
        attends = builder.call(aten.logical_not.default, attends)
    if mask.fill == -math.inf:
        return attends
    # A finite fill makes a fully masked row a plain average: added instead, absorbing any score.
    zero = builder.call(
        aten.full.default, [], 0.0, dtype=site.dtype, device=site.device, pin_memory=False
    )
    lowest = torch.finfo(site.dtype).min
    return builder.call(aten.where.ScalarOther, attends, zero, lowest)


def _narrowed(builder: Builder, term: MaskTerm) -> fx.Node:
    """The term as a 4-D tensor, of length 1 along what it does not depend on."""
    node = term.node
    missing = 4 - value(node).dim()
    for axis, keeps in enumerate(term.keeps[missing:]):
        if not keeps and value(node).shape[axis] != 1:
            node = builder.call(aten.slice.Tensor, node, axis, 0, 1)
    for _ in range(missing):
        node = builder.call(aten.unsqueeze.default, node, 0)
    return node if term.additive else builder.cast(node, torch.bool)
