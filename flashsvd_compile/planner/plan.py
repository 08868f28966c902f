"""For each site the cheapest legal lowering. ``unfused`` always competes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import sympy
from torch import fx

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainEnds,
    ChainSite,
    FeedForwardSite,
    Outer,
    Site,
)
from flashsvd_compile.kernels import (
    attention_tiles,
    chain_tiles,
    feed_forward_blocks,
    feed_forward_tiles,
    feed_forward_whole_tiles,
    lifted_activation_tiles,
)
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.tiling import Tiling, only_tile, tiling_of
from flashsvd_compile.reason import Code, Reason, reason_at


@dataclass(frozen=True)
class Plan:
    """How a site will run.

    ``site`` may differ from the one found: arms that are cheaper lifted are dense in it.
    ``tile`` (the fields of a kernel's tile) or ``block_rows`` where the lowering has them;
    ``tiling`` holds the tiles that could be taken instead. ``transient_bytes`` is what the site
    will hold at full width, ``unfused_bytes`` what it held; formulas of the graph's symbols.
    """

    site: Site
    lowering: str
    reason: Reason
    transient_bytes: Size = sympy.S.Zero
    unfused_bytes: Size = sympy.S.Zero
    tiling: Tiling | None = None
    block_rows: int = 0

    @property
    def tile(self) -> tuple[int, ...]:
        return () if self.tiling is None else self.tiling.tile

    @property
    def sram_bytes(self) -> int:
        return 0 if self.tiling is None else self.tiling.sram_bytes

    @property
    def node(self) -> fx.Node:
        """The node that the lowering takes the place of."""
        return self._outer.exit.node if self._outer else self.site.node

    @property
    def region(self) -> frozenset[fx.Node]:
        """All nodes whose work the lowering does."""
        site = self.site
        if isinstance(site, ChainSite) and isinstance(site.ends, ChainEnds):
            return site.region | site.ends.entry.region
        return self._outer.region if self._outer else site.region

    @property
    def _outer(self) -> Outer | None:
        site, is_whole = self.site, self.lowering == "streamed_whole"
        found = site.outer if is_whole and isinstance(site, FeedForwardSite) else None
        return found if isinstance(found, Outer) else None


def plan_site(site: Site, device: Device, options: Options, hints: Mapping[Size, int]) -> Plan:
    """The plan of one site; ``hints`` are example values of symbolic sizes."""
    if isinstance(site, AttentionSite):
        return _plan_attention(site, device, options, hints)
    if isinstance(site, FeedForwardSite):
        return _plan_feed_forward(site, device, options, hints)
    assert isinstance(site, ChainSite)
    return _plan_chain(site, device, options, hints)


def drop_taken(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans without those of chains that became a part of a larger site."""
    taken = {plan.node for plan in plans if plan.lowering == "streamed_whole"}
    return tuple(
        plan for plan in plans if not (isinstance(plan.site, ChainSite) and plan.node in taken)
    )


# ---- attention ----------------------------------------------------------------------------------


def _plan_attention(
    site: AttentionSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """Each operand may be absorbed or lifted before: every combination competes with SDPA."""
    unfused = _all_dense(site)
    lifts = {
        name: cost.lift_cost(arm, site, device, hints)
        for name, arm in site.arms.items()
        if arm.factor is not None
    }
    base = cost.attention_cost(unfused, device, hints)
    best = Plan(site, "unfused", _lost(site, "rank_space"), unfused_bytes=base.transient_bytes)
    best_seconds = base.seconds + sum(lifts.values())
    if options.attention == "unfused":
        return replace(best, reason=reason_at(site.node, Code.FORCED, "attention='unfused'"))
    if device.type == "cuda" and site.dtype.itemsize == 4 and options.attention == "auto":
        return replace(best, reason=_not_measured(site))
    if options.attention == "rank_space":
        best_seconds = float("inf")
    why_not: Reason | None = None
    for names in _subsets(list(lifts)):
        candidate = _dense_but(site, names)
        tiling = _attention_tiling(candidate, device, options)
        if isinstance(tiling, Reason):
            why_not = tiling
            continue
        found = cost.attention_cost(candidate, device, hints)
        seconds = found.seconds + sum(s for name, s in lifts.items() if name not in names)
        if seconds < best_seconds:
            best_seconds = seconds
            reason = reason_at(site.node, Code.PLANNED, f"{', '.join(names)} stay latents")
            best = Plan(candidate, "rank_space", reason, found.transient_bytes,
                        base.transient_bytes, tiling)  # fmt: skip
    if best.lowering == "unfused" and why_not is not None:
        return replace(best, reason=why_not)
    return best


def _subsets(names: list[str]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names), 0, -1) for c in combinations(names, size)]


def _dense_but(site: AttentionSite, names: tuple[str, ...]) -> AttentionSite:
    """The site with only the named arms absorbed; the others are lifted before it."""
    why = reason_at(site.node, Code.NOT_PROFITABLE, "cheaper lifted before", "a smaller rank")
    arms = {
        name: arm if name in names or arm.factor is None else arm.as_dense(why)
        for name, arm in site.arms.items()
    }
    return replace(site, query=arms["q"], key=arms["k"], value=arms["v"])


def _all_dense(site: AttentionSite) -> AttentionSite:
    return _dense_but(site, ())


def _attention_tiling(
    site: AttentionSite, device: Device, options: Options
) -> Tiling | Reason | None:
    """None where no kernel is launched."""
    if device.type != "cuda":
        return None
    if (problem := _check_dtype(site)) is not None:
        return problem
    query, key, value = site.query, site.key, site.value
    extents = attention_tiles.AttentionExtents(
        head_dim_qk=query.width_size,
        head_dim_v=value.width_size,
        rank_q=query.rank_size,
        rank_k=key.rank_size,
        rank_v=value.rank_size,
        q_lifted=query.factor is not None,
        v_lifted=value.factor is not None,
        element_bytes=site.dtype.itemsize,
        mask_bytes=attention_tiles.MASK_BYTES if site.masks else 0,
        is_causal=site.is_causal,
        generation=device.generation,
    )
    sram = _sram(device, options)
    found = attention_tiles.candidate_tiles(extents, sram)
    tiling = tiling_of(found, lambda tile: attention_tiles.sram_bytes_of(tile, extents), sram)
    # How operands will lie in memory is not known yet: the launcher must find a tile in any case.
    if (
        tiling is None
        or attention_tiles.last_resort(attention_tiles.widened(extents), sram) is None
    ):
        ranks = f"ranks {query.rank_size}, {key.rank_size}, {value.rank_size}"
        return reason_at(site.node, Code.SRAM, f"no tile for {ranks}", f"{sram} bytes")
    return tiling


# ---- feed-forward -------------------------------------------------------------------------------


def _plan_feed_forward(
    site: FeedForwardSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    base = cost.feed_forward_bytes(site)
    unfused = Plan(site, "unfused", _lost(site, "streamed and row_blocks"), base, base)
    streamed = _streamed(site, device, options)
    row_blocks = _row_blocks(site, device, options)
    whole = _streamed_whole(site, device, options)
    legal = {"row_blocks": row_blocks, "unfused": unfused}
    for name, found in (("streamed", streamed), ("streamed_whole", whole)):
        if isinstance(found, Plan):
            legal[name] = found
    if (forced := options.feed_forward) == "auto":
        tiles = {name: plan.tile for name, plan in legal.items()}
        fastest = cost.cheapest_feed_forward(site, device, hints, tiles, row_blocks.block_rows)
        plan = legal[fastest]
        reason = plan.reason
    elif forced in legal:
        plan, reason = legal[forced], reason_at(site.node, Code.FORCED, f"feed_forward={forced!r}")
    else:
        problem = whole if forced == "streamed_whole" else streamed
        assert isinstance(problem, Reason)
        plan, reason = unfused, problem
    return replace(plan, reason=reason, unfused_bytes=base)


def _streamed(site: FeedForwardSite, device: Device, options: Options) -> Plan | Reason:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if (problem := _check_dtype(site)) is not None:
        return problem
    shape: dict[str, Any] = {
        "rank_up": site.up.rank_size,
        "rank_gate": site.gate.rank_size if site.gate else None,
        "rank_down": int(volume(site.out)),
        "element_bytes": site.dtype.itemsize,
    }
    sram = _sram(device, options)
    width = int(volume(site.width))
    found = feed_forward_tiles.candidate_tiles(
        **shape, intermediate_size=width, sram_bytes=sram, generation=device.generation
    )
    tiling = tiling_of(found, lambda tile: feed_forward_tiles.sram_bytes_of(tile, **shape), sram)
    if tiling is None:
        ranks = f"ranks {shape['rank_up']} in, {shape['rank_down']} out"
        return reason_at(site.node, Code.SRAM, f"no tile for {ranks}", f"{sram} bytes")
    reason = reason_at(site.node, Code.PLANNED, "the intermediate stays on chip")
    return Plan(site, "streamed", reason, tiling=tiling)


def _streamed_whole(site: FeedForwardSite, device: Device, options: Options) -> Plan | Reason:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if isinstance(site.outer, Reason):
        return site.outer
    extents = feed_forward_whole_tiles.WholeExtents(
        rank_up=site.up.rank_size,
        rank_gate=site.gate.rank_size if site.gate else None,
        rank_down=int(volume(site.out)),
        intermediate_size=int(volume(site.width)),
        gate_from=site.gate_from,
        element_bytes=site.dtype.itemsize,
    )
    sram = _sram(device, options)
    tile = feed_forward_whole_tiles.default_tile(extents, sram)
    if tile is None:
        ranks = f"ranks {extents.rank_up} in, {extents.rank_down} out"
        return reason_at(site.node, Code.SRAM, f"no tile for {ranks}", f"{sram} bytes")
    reason = reason_at(site.node, Code.PLANNED, "neither latents nor the intermediate leave chip")
    used = feed_forward_whole_tiles.sram_bytes_of(tile, extents)
    return Plan(site, "streamed_whole", reason, tiling=only_tile(tile, used, sram))


def _row_blocks(site: FeedForwardSite, device: Device, options: Options) -> Plan:
    width, element = int(volume(site.width)), site.dtype.itemsize
    arms = [site.up] if site.gate is None else [site.up, site.gate]
    tile = lifted_activation_tiles.default_tile(
        [arm.rank_size for arm in arms],
        element_bytes=element,
        generation=device.generation,
        sram_bytes=(sram := _sram(device, options)),
    )
    rows = feed_forward_blocks.default_block_rows(
        rank_down=int(volume(site.out)), device=site.device, at_once=tile is not None
    )
    buffers = len(arms) if tile is None else 1
    held = sympy.Min(rows, volume(site.tokens)) * width * element * buffers
    reason = reason_at(site.node, Code.PLANNED, f"blocks of {rows} rows")
    tiling = None
    if tile is not None:
        tiling = only_tile(tile, lifted_activation_tiles.sram_bytes_of(tile), sram)
    return Plan(site, "row_blocks", reason, held, tiling=tiling, block_rows=rows)


# ---- chain --------------------------------------------------------------------------------------


def _plan_chain(
    site: ChainSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    unfused = Plan(site, "unfused", _why_chain_stays(site))
    if options.chain == "unfused":
        return replace(unfused, reason=reason_at(site.node, Code.FORCED, "chain='unfused'"))
    streamed = _streamed_chain(site, device, options, hints)
    if options.chain == "streamed":
        if isinstance(streamed, Reason):
            return replace(unfused, reason=streamed)
        return replace(streamed, reason=reason_at(site.node, Code.FORCED, "chain='streamed'"))
    widest = max(site.in_width, site.out_width)
    is_measured = (
        site.rank <= chain_tiles.STREAMED_FASTEST_UP_TO_RANK
        and widest <= chain_tiles.STREAMED_FASTEST_UP_TO_WIDTH
    )
    if isinstance(streamed, Plan) and is_measured and site.dtype.itemsize == 2:
        return streamed
    return unfused


def _streamed_chain(
    site: ChainSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan | Reason:
    if device.type != "cuda":
        return reason_at(site.node, Code.UNSUPPORTED_DEVICE, device.type, "cuda")
    if not isinstance(site.ends, ChainEnds):
        return site.ends
    if (why := _why_chain_stays(site)).code is Code.RANK_TOO_LARGE:
        return why
    rows, element = volume(site.ends.entry.rows), site.dtype.itemsize
    sram = _sram(device, options)
    tile = chain_tiles.default_tile(
        rows=round(cost.at(rows, hints)),
        rank=site.rank,
        out_size=site.out_width,
        element_bytes=element,
        sram_bytes=sram,
        multiprocessors=device.multiprocessors,
    )
    if tile is None:
        return reason_at(site.node, Code.SRAM, f"no tile for rank {site.rank}", f"{sram} bytes")
    reason = reason_at(site.node, Code.PLANNED, "the latent stays on chip")
    used = chain_tiles.sram_bytes_of(tile, rank=site.rank, element_bytes=element)
    return Plan(site, "streamed", reason, unfused_bytes=rows * site.rank * element,
                tiling=only_tile(tile, used, sram))  # fmt: skip


def _not_measured(site: Site) -> Reason:
    """Exact float32 has no tensor cores; library kernels stay until measured otherwise."""
    return reason_at(site.node, Code.NOT_PROFITABLE, "float32 on a GPU", "bfloat16 or float16")


def _why_chain_stays(site: ChainSite) -> Reason:
    """Beyond rank mn / (m + n) two factors of an m × n matrix do more work than the matrix."""
    m, n = site.in_width, site.out_width
    if site.rank * (m + n) >= m * n:
        observed = f"rank {site.rank} of a {m} × {n} matrix, whose factors cost more than it does"
        least = -(-m * n // (m + n))
        required = f"a rank under {least}, or the matrix itself: flashsvd_compile.merge_"
        return reason_at(site.node, Code.RANK_TOO_LARGE, observed, required)
    observed = "library matmuls keep the latent small"
    return reason_at(site.node, Code.NO_FUSED_LOWERING, observed)


def _lost(site: Site, rivals: str) -> Reason:
    return reason_at(site.node, Code.NOT_PROFITABLE, f"{rivals} would be slower here")


def _check_dtype(site: Site) -> Reason | None:
    """Kernels accumulate in float32, which is no more than float64 is rounded to."""
    if site.dtype.itemsize <= 4:
        return None
    return reason_at(site.node, Code.DTYPE, f"{site.dtype} on a GPU", "at most 32 bits")


def _sram(device: Device, options: Options) -> int:
    return min(options.sram_budget or device.sram_bytes, device.sram_bytes)
