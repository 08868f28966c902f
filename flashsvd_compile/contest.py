"""Lowerings of one site, measured against each other in place of predicted.

Each is written into the graph, cut out together with all that any of them would do, and taken out
of the graph again; the fastest is the plan.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import fx

from flashsvd_compile.analysis.site_records import Site
from flashsvd_compile.options import Options
from flashsvd_compile.placement import Placement
from flashsvd_compile.planner.plan import Plan, slower_rival
from flashsvd_compile.reason import Code, Reason, reason_at
from flashsvd_compile.tuning.fragment import Fragment, fragment_of
from flashsvd_compile.tuning.race import Race

# What is predicted to take longer than this many times the best is not tried: of 84 sites on an
# H100 the worst choice took 1.2 times as long as the best (bench/choices.py), with room to spare.
MAX_TIMES_AS_LONG = 2.5
MAX_CONTENDERS = 3

# What was planned stays unless it takes longer than this many times the fastest: two runs of a
# bench agree within 3%, and a choice that follows noise would change from machine to machine.
WITHIN_NOISE = 1.03


@dataclass(frozen=True)
class Contest:
    """``plan_of``: the plan of a site under options; ``tiled``: a plan with the best tile of its
    operator's call, which it sets."""

    options: Options
    plan_of: Callable[[Site, Options], Plan]
    placement: Placement
    tiled: Callable[[Plan, fx.Node], Plan]
    race: Race

    def winner(self, plan: Plan, found: Site) -> Plan:
        """The plan of the lowering that was measured to be the fastest; ``plan`` where none was.

        ``found``: the site before the plan chose which of its arms to lift. The graph is as before
        when this returns.
        """
        if plan.seconds is None or getattr(self.options, found.kind) != "auto":
            return plan
        most = MAX_TIMES_AS_LONG * plan.seconds
        near = [r.lowering for r in plan.rivals if r.seconds is not None and r.seconds <= most]
        forced = (self.options.forcing(found.kind, name) for name in near[: MAX_CONTENDERS - 1])
        plans = {p.lowering: p for p in (plan, *(self.plan_of(found, o) for o in forced))}
        region = frozenset().union(*(p.region for p in plans.values()))
        targets = sorted(n for n in region if any(user not in region for user in n.users))
        fragments = {}
        for name, contender in plans.items():
            if (fragment := self._fragment(contender, region, targets)) is None:
                return plan
            fragments[name] = fragment
        times = self.race.times(fragments) if len(fragments) > 1 else None
        return plan if times is None else _decided(plan, plans, *times)

    def _fragment(
        self, plan: Plan, region: frozenset[fx.Node], targets: list[fx.Node]
    ) -> Fragment | None:
        graph = plan.node.graph
        before = set(graph.nodes)
        # Sizes and nodes in others' places are this trial's own: they go with it.
        trial = Placement(self.placement.facts, self.placement.values)
        try:
            results = trial.written(plan)
            for result in list(results.values())[:1]:
                self.tiled(plan, result)
            return fragment_of(targets, region | (set(graph.nodes) - before), results)
        finally:
            for node in reversed(graph.nodes):
                if node not in before:
                    graph.erase_node(node)


def _decided(plan: Plan, plans: dict[str, Plan], ms: dict[str, float], known_from: str) -> Plan:
    order = sorted(ms, key=lambda name: ms[name])
    name = order[0]
    if plan.lowering in ms and ms[plan.lowering] <= WITHIN_NOISE * ms[name]:
        name = plan.lowering
    others = [other for other in order if other != name]
    seconds = {lowering: spent / 1e3 for lowering, spent in ms.items()}
    site = plan.site
    rivals = tuple(
        slower_rival(site, other, seconds[other], seconds[name], known_from) for other in others
    )
    return replace(
        plans[name],
        reason=_reason(plan, name, rivals[0].reason if rivals else None, len(ms)),
        unfused_bytes=plan.unfused_bytes,
        seconds=seconds[name],
        rivals=rivals
        + tuple(r for r in plan.rivals if r.lowering not in ms and r.lowering != name),
        known_from=known_from,
    )


def _reason(plan: Plan, name: str, runner_up: Reason | None, count: int) -> Reason:
    if name == plan.lowering:
        return plan.reason
    node = plan.site.node
    if name == "unfused":
        why = "no other lowering ran here" if runner_up is None else runner_up.observed
        return reason_at(node, Code.NOT_PROFITABLE, why)
    return reason_at(node, Code.PLANNED, f"the fastest of {count} that were measured")
