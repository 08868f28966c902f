"""Attention sites: which of q, k and v stay latents, against SDPA on all of them lifted."""

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations

import torch

from flashsvd_compile.analysis.axes import Size, volume
from flashsvd_compile.analysis.site_records import AttentionSite
from flashsvd_compile.kernels import attention_extents, attention_tiles
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.plan import Plan, Rival, check_dtype, lost, slower_rival, sram_limit
from flashsvd_compile.planner.tiling import Tiling, tiling_of
from flashsvd_compile.reason import Code, Reason, reason_at


def plan_attention(
    site: AttentionSite, device: Device, options: Options, hints: Mapping[Size, int]
) -> Plan:
    """Each operand may be absorbed or lifted before: every combination competes with SDPA."""
    if site.unturned is not None and _leaves_turned_queries(device, options):
        return plan_attention(site.unturned, device, options, hints)
    lifts = _lifts(site, device, hints)
    base = cost.attention_cost(_all_dense(site), device, hints)
    unfused_seconds = base.seconds + sum(lifts.values())
    stays = Plan(
        site, "unfused", lost(site, "rank_space"), unfused_bytes=base.transient_bytes,
        seconds=unfused_seconds,
    )  # fmt: skip
    rank_space, seconds, why_not = _in_rank_space(site, device, options, hints, lifts)
    if site.unturned is not None and any("q" in lift.arms for lift in site.shared):
        # The other arms of that lift may be latents without the queries.
        lifts = _lifts(site.unturned, device, hints)
        found = _in_rank_space(site.unturned, device, options, hints, lifts)
        of_queries = unfused_seconds - base.seconds - sum(lifts.values())
        if found[1] + of_queries < seconds:
            rank_space, seconds, why_not = found[0], found[1] + of_queries, found[2]
    why = why_not or stays.reason
    rivals = (Rival("rank_space", None, why),)
    if rank_space is not None:
        why = stays.reason
        rivals = (slower_rival(site, "rank_space", seconds, unfused_seconds),)
    if options.attention == "unfused":
        why = reason_at(site.node, Code.FORCED, "attention='unfused'")
    elif rank_space is not None:
        slower = _slower_than_told(site, device)
        if options.attention == "auto" and slower is not None:
            why = slower
        elif options.attention == "rank_space" or seconds < unfused_seconds:
            rival = slower_rival(site, "unfused", unfused_seconds, seconds)
            return replace(rank_space, unfused_bytes=base.transient_bytes, rivals=(rival,))
    return replace(stays, reason=why, rivals=rivals)


def _lifts(
    site: AttentionSite, device: Device, hints: Mapping[Size, int]
) -> dict[frozenset[str], float]:
    """Seconds that lifts before the site take, by the arms that they make.

    Those of a lift that others read are what it takes longer than what stays of it without them.
    """
    found = {s.arms: cost.shared_lift_cost(s, site, device, hints) for s in site.shared}
    for name, arm in site.arms.items():
        if arm.factor is not None and not any(name in names for names in found):
            found[frozenset({name})] = cost.lift_cost(arm, site, device, hints)
        if arm.rotation is not None:
            of = next(names for names in found if name in names)
            found[of] += cost.turn_cost(arm, site, device, hints)
    return found


def _in_rank_space(
    site: AttentionSite,
    device: Device,
    options: Options,
    hints: Mapping[Size, int],
    lifts: Mapping[frozenset[str], float],
) -> tuple[Plan | None, float, Reason | None]:
    """The fastest choice of arms that stay latents and its seconds, or why there is none.

    ``lifts``: seconds to lift arms before the site; those of one lift stay latents together.
    """
    best, best_seconds, why_not = None, math.inf, None
    for names in _subsets(sorted(name for arms in lifts for name in arms)):
        if any(0 < len(arms & set(names)) < len(arms) for arms in lifts):
            continue
        candidate = _dense_but(site, names)
        tiling = _attention_tiling(candidate, device, options)
        if isinstance(tiling, Reason):
            why_not = tiling
            continue
        found = cost.attention_cost(candidate, device, hints)
        seconds = found.seconds + sum(s for arms, s in lifts.items() if not arms <= set(names))
        seconds += device.efficiency.operator_s
        if seconds < best_seconds:
            best_seconds = seconds
            reason = reason_at(site.node, Code.PLANNED, f"{', '.join(names)} stay latents")
            best = Plan(candidate, "rank_space", reason, found.transient_bytes, tiling=tiling,
                        seconds=seconds)  # fmt: skip
    return best, best_seconds, why_not


def _subsets(names: list[str]) -> list[tuple[str, ...]]:
    return [c for size in range(len(names), 0, -1) for c in combinations(names, size)]


def _dense_but(site: AttentionSite, names: tuple[str, ...]) -> AttentionSite:
    """The site with only the named arms absorbed; the others are lifted before it."""
    why = reason_at(site.node, Code.NOT_PROFITABLE, "cheaper lifted before", "a smaller rank")
    arms = {
        name: arm if name in names or arm.factor is None else arm.as_dense(why)
        for name, arm in site.arms.items()
    }
    shared = tuple(lift for lift in site.shared if lift.arms <= set(names))
    return replace(site, query=arms["q"], key=arms["k"], value=arms["v"], shared=shared)


def _all_dense(site: AttentionSite) -> AttentionSite:
    return _dense_but(site, ())


def _attention_tiling(
    site: AttentionSite, device: Device, options: Options
) -> Tiling | Reason | None:
    """None where no kernel is launched."""
    if device.type != "cuda":
        return None
    if (problem := check_dtype(site)) is not None:
        return problem
    query, key, value, keys = site.query, site.key, site.value, volume(site.keys)
    extents = attention_extents.AttentionExtents(
        head_dim_qk=query.width_size,
        head_dim_v=value.width_size,
        rank_q=query.rank_size,
        rank_k=key.rank_size,
        rank_v=value.rank_size,
        q_lifted=query.factor is not None,
        v_lifted=value.factor is not None,
        element_bytes=site.dtype.itemsize,
        k_lifted=key.factor is not None,
        is_float16=site.dtype == torch.float16,
        mask="any" if site.masks else "none",  # of what kind is seen when it is lowered
        is_causal=site.is_causal,
        is_capped=site.softcap > 0,
        table_bytes=0 if query.rotation is None else query.rotation.table_bytes,
        is_normed=query.rotation is not None and query.rotation.norm is not None,
        keys_multiple=attention_extents.power_of_two_in(int(keys)) if keys.is_number else None,
        generation=device.generation,
    )
    sram = sram_limit(device, options)
    found = attention_tiles.candidate_tiles(extents, sram)
    tiling = tiling_of(found, lambda tile: attention_tiles.sram_bytes_of(tile, extents), sram)
    # How operands will lie in memory is not known yet: the launcher must find a tile in any case.
    if (
        tiling is None
        or attention_tiles.last_resort(attention_extents.widened(extents), sram) is None
    ):
        ranks = f"ranks {query.rank_size}, {key.rank_size}, {value.rank_size}"
        return reason_at(site.node, Code.SRAM, f"no tile for {ranks}", f"{sram} bytes")
    return tiling


def _leaves_turned_queries(device: Device, options: Options) -> bool:
    """Whether ``auto`` has queries lifted and turned before the site, whatever the costs say.

    As latents they took 1.04 to 1.07 times as long as unfused there, in 17 MiB instead of 24: batch
    4, 8 heads of 64, 512 tokens, rank 128, float32, Xeon 2.5 GHz, one thread, torch 2.13.0,
    2026-11-28.
    """
    return device.type != "cuda" and options.attention == "auto"


def _slower_than_told(site: AttentionSite, device: Device) -> Reason | None:
    """Why ``auto`` leaves a site to unfused, whatever the costs say, or None."""
    if device.type == "cuda" and site.dtype.itemsize == 4:
        # Exact float32 has no tensor cores; library kernels stay until measured otherwise.
        return reason_at(site.node, Code.NOT_PROFITABLE, "float32 on a GPU", "bfloat16 or float16")
    if device.type != "cuda" and (site.softcap or site.sink is not None):
        # SDPA has neither, and scores in blocks of queries took 1.7 to 2.0 times as long as
        # Inductor on the model's own expression: two layers of Gemma-2's kind (8 heads of 64, 512
        # and 1024 tokens), Xeon 2.5 GHz, one thread, torch 2.13.0, 2026-11-28.
        what = "a soft-cap" if site.softcap else "a sink"
        return reason_at(site.node, Code.NOT_PROFITABLE, f"{what} on a CPU", "a GPU")
    if device.type != "cuda" and site.query.rotation is not None:
        return reason_at(site.node, Code.NOT_PROFITABLE, "turned queries on a CPU", "a GPU")
    return None
