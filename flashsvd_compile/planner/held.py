"""What a planned site reads and holds, for the walk that predicts memory."""

from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of, size_of, volume
from flashsvd_compile.analysis.calls import arguments, value
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainEnds,
    ChainSite,
    FeedForwardSite,
    Outer,
)
from flashsvd_compile.kernels.attention_extents import BAND_QUERIES, BLOCK_QUERIES
from flashsvd_compile.memory.cpu_attention import flash_scratch_bytes, mask_scratch_bytes
from flashsvd_compile.memory.view import Lowered
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan


def lowered_by(plan: Plan, device: Device, operator: fx.Node | None = None) -> Lowered:
    """The plan as one operator: that in the rewritten graph, or the one that it would become.

    Kernels that the compiler launches itself write into an allocation that it may put before what
    they read; operators that it calls allocate as they run.
    """
    on_gpu = device.type == "cuda"
    is_early = on_gpu and _is_one_launch(plan)
    if operator is None:
        return Lowered(tuple(_reads(plan)), _scratch(plan, on_gpu, _NO_MASK), is_early)
    of_mask = _NO_MASK if on_gpu else _mask_scratch(plan, operator)
    return Lowered(tuple(operator.all_input_nodes), _scratch(plan, on_gpu, of_mask), is_early)


def remainders_by(plan: Plan) -> dict[fx.Node, Lowered]:
    """Those who read other rows of a lift than attention, as products of their own; a product that
    some share is counted in parts."""
    shared = plan.site.shared if isinstance(plan.site, AttentionSite) else ()
    return {
        reader.node: Lowered(remainder.fact.latent.nodes)
        for lift in shared
        for remainder in lift.remainders
        for reader in remainder.readers
    }


class _MaskScratch(NamedTuple):
    """Bytes while attention runs on library operators, and right behind, when it is asked which
    rows see no key."""

    attending: Size
    asking: Size


_NO_MASK = _MaskScratch(sympy.S.Zero, sympy.S.Zero)


def _mask_scratch(plan: Plan, operator: fx.Node) -> _MaskScratch:
    site, named = plan.site, arguments(operator)
    if not isinstance(site, AttentionSite):
        return _NO_MASK
    mask = None if named["mask"] is None else value(named["mask"])
    behind, is_causal = named["behind"], named["is_causal"]
    if mask is None and behind is None and named["ahead"] == 0:
        return _NO_MASK
    rows, keys = volume(site.rows), volume(site.keys)
    is_bounded = is_causal or behind is not None
    gathered: Size = sympy.S.Zero
    if behind is not None:  # in blocks (``kernels/attention_band.py``), whose results are joined
        width = max(site.key.rank_size, site.value.rank_size)
        gathered = volume(site.batch) * site.num_heads * rows * width * site.dtype.itemsize
        ahead = _size_in(named["ahead"]) if is_causal else keys
        rows, keys = (
            sympy.Min(rows, BAND_QUERIES),
            sympy.Min(keys, BAND_QUERIES + _size_in(behind) + ahead),
        )
    attending = mask_scratch_bytes(mask, rows, keys, is_bounded, site.dtype) + gathered
    asking: Size = sympy.S.Zero
    if mask is not None and mask.dtype != torch.bool and site.value.biases:
        # Rows that see no key must not get the bias: which of the numbers are -inf?
        asking = sympy.prod(shape_of(mask))
    return _MaskScratch(attending, asking)


def _size_in(argument: Any) -> Size:
    return size_of(value(argument) if isinstance(argument, fx.Node) else argument)


def _is_one_launch(plan: Plan) -> bool:
    return plan.lowering != "row_blocks" and plan.blocks is None


def _reads(plan: Plan) -> list[fx.Node]:
    site = plan.site
    if isinstance(site, AttentionSite):
        entries = {} if plan.blocks is None else plan.blocks.entries
        # Masks are narrowed to what they depend on, or known whole: mostly nothing is left of them.
        nodes: list[fx.Node] = []
        for name, arm in site.arms.items():
            nodes += [entries[name].x.node] if name in entries else arm.latent.nodes
            if arm.rotation is not None:
                nodes += [arm.rotation.cos.table.node, arm.rotation.sin.table.node]
        return nodes
    if isinstance(site, FeedForwardSite):
        if plan.lowering == "streamed_whole" and isinstance(site.outer, Outer):
            ends = [site.outer.up, site.outer.gate]
            return [entry.x.node for entry in ends if entry is not None]
        return [node for arm in (site.up, site.gate) if arm for node in arm.latent.nodes]
    assert isinstance(site, ChainSite)
    assert isinstance(site.ends, ChainEnds)
    return [site.ends.entry.x.node]


def _scratch(plan: Plan, on_gpu: bool, of_mask: _MaskScratch) -> Size:
    site = plan.site
    if plan.lowering == "row_blocks":
        return plan.transient_bytes
    if not isinstance(site, AttentionSite):
        return sympy.S.Zero
    batch, heads = volume(site.batch), sympy.Integer(site.num_heads)
    scratch: Size = sympy.S.Zero
    if plan.blocks is not None:
        batch = sympy.Min(batch, plan.blocks.batch)
        share = sympy.Rational(min(plan.blocks.heads, site.num_heads), site.num_heads)
        for name in plan.blocks.entries:
            arm = site.arms[name]
            scratch += batch * arm.own_heads * share * volume(arm.rows) * arm.rank_size
        heads *= share
    scratch *= site.dtype.itemsize
    if not on_gpu:
        scratch += _library_scratch(site, batch, heads, of_mask, plan.blocks is not None)
    return scratch


def _scores_scratch(site: AttentionSite, heads: Size, rows: Size, keys: Size) -> Size:
    """Of ``kernels/attention_scores.py``: keys and values of all heads, and of a block of queries
    the scores as they come, before and behind an operator, and the weights."""
    queries = sympy.Min(rows, BLOCK_QUERIES)
    repeated = keys * (site.key.rank_size + site.value.rank_size) * site.dtype.itemsize
    of_scores = 2 * max(site.dtype.itemsize, 4) + 2 * site.dtype.itemsize
    return heads * (repeated + queries * keys * of_scores)


def _library_scratch(
    site: AttentionSite, batch: Size, heads: Size, of_mask: _MaskScratch, in_blocks: bool
) -> Size:
    """What ``kernels/attention_library.py`` holds at most beside latents and its result, or a block
    of them.

    While it attends: the queries in rank space, operands padded to the wider of two ranks, the
    latent output, and torch's own. Then queries, latent output and two full-width outputs: as the
    lift lays it out, and as the result is. That, outside of blocks, is allocated only then, but
    counted all along. One head is laid out as the result is.
    """
    rows, keys = volume(site.rows), volume(site.keys)
    rank_k, rank_v = site.key.rank_size, site.value.rank_size
    width = max(rank_k, rank_v)
    is_made = site.query.factor is not None or site.key.factor is not None
    queries = rows * rank_k if is_made else sympy.S.Zero
    padding = keys * width if rank_k != rank_v else sympy.S.Zero
    padding += rows * width if rank_k < rank_v else 0
    latent, output = rows * width, rows * site.value.width_size
    is_copied = heads != 1 or bool(site.masks and site.value.biases)
    outputs = int(is_copied) + int(site.value.factor is not None)
    element = batch * heads * site.dtype.itemsize
    attending = element * (queries + padding + latent - (0 if in_blocks else output))
    attending += flash_scratch_bytes(batch, heads, rows, keys, width, site.dtype)
    attending += of_mask.attending
    if site.softcap or site.sink is not None:
        attending += _scores_scratch(site, batch * heads, rows, keys)
    lifting = element * (queries + latent + output * (outputs if in_blocks else outputs - 1))
    asking = element * (queries + padding + latent - (0 if in_blocks else output)) + of_mask.asking
    turning = batch * heads * _turning_scratch(site) - (0 if in_blocks else element * output)
    return sympy.Max(attending, lifting, asking, turning)


def _turning_scratch(site: AttentionSite) -> Size:
    """Of ``kernels/rotation.py``, for one head: queries as they are lifted, and as float32 if they
    are narrower; both features of all pairs beside each other, and what they are made of."""
    if site.query.rotation is None:
        return sympy.S.Zero
    size = site.dtype.itemsize
    wide = max(size, 4)
    copied = wide if wide > size else 0
    return volume(site.rows) * site.query.width_size * (size + copied + 2 * wide)
