"""For each site the cheapest legal lowering. ``unfused`` always competes."""

from collections.abc import Mapping, Sequence

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainSite,
    FeedForwardSite,
    SiblingsSite,
    Site,
)
from flashsvd_compile.options import Options
from flashsvd_compile.planner.attention import plan_attention
from flashsvd_compile.planner.chains import plan_chain
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.feed_forward import plan_feed_forward
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.planner.siblings import plan_siblings


def plan_site(site: Site, device: Device, options: Options, hints: Mapping[Size, int]) -> Plan:
    """The plan of one site; ``hints`` are example values of symbolic sizes."""
    if isinstance(site, AttentionSite):
        return plan_attention(site, device, options, hints)
    if isinstance(site, FeedForwardSite):
        return plan_feed_forward(site, device, options, hints)
    if isinstance(site, SiblingsSite):
        return plan_siblings(site, device, options, hints)
    assert isinstance(site, ChainSite)
    return plan_chain(site, device, options, hints)


def drop_taken(plans: Sequence[Plan]) -> tuple[Plan, ...]:
    """The plans without those of chains that became a part of a larger site."""
    taken = {plan.node for plan in plans if plan.lowering == "streamed_whole"}
    for plan in plans:
        if isinstance(plan.site, AttentionSite) and plan.lowering != "unfused":
            taken |= {lift.lift for lift in plan.site.shared}
            if plan.site.query.rotation is not None:
                taken.add(plan.site.query.rotation.lift)
    return tuple(
        plan for plan in plans if not (isinstance(plan.site, ChainSite) and plan.node in taken)
    )
