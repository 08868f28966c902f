"""The compiler's table of contents: from Dynamo's graph to the rewritten one."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from flashsvd_compile.analysis.axes import Size
from flashsvd_compile.analysis.siblings import find_siblings
from flashsvd_compile.analysis.site_records import Site, Skip
from flashsvd_compile.analysis.sites import find_sites
from flashsvd_compile.analysis.sweep import sweep
from flashsvd_compile.analysis.symbolic_values import SymbolicValues
from flashsvd_compile.clock import Clock
from flashsvd_compile.contest import Contest
from flashsvd_compile.factoring.feed import Feed
from flashsvd_compile.factoring.planned_factors import factor_weights
from flashsvd_compile.factoring.records import Factoring
from flashsvd_compile.fingerprint import fingerprint
from flashsvd_compile.lowering.dead_code import erase_dead
from flashsvd_compile.lowering.einsum import split_einsums
from flashsvd_compile.lowering.idle_casts import drop_idle_casts
from flashsvd_compile.lowering.in_place import free_in_place
from flashsvd_compile.lowering.strides import settle_strides
from flashsvd_compile.lowering.written_once import sums_of_sums, write_once
from flashsvd_compile.memory.liveness import MemoryProfile, walk
from flashsvd_compile.memory.peak import Peak, peak_of
from flashsvd_compile.memory.timeline import Timelines, steps_of
from flashsvd_compile.memory.view import GraphView, Lowered
from flashsvd_compile.normalize import normalize
from flashsvd_compile.options import Options, cache_directory
from flashsvd_compile.placement import Placement
from flashsvd_compile.planner.budget import BudgetError, plan_within_budget, profile_of
from flashsvd_compile.planner.cost import at, size_hints
from flashsvd_compile.planner.device import Device, device_for
from flashsvd_compile.planner.held import lowered_by
from flashsvd_compile.planner.largest_sizes import hold_at_most, largest_sizes
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.planner.sites import drop_taken, plan_site
from flashsvd_compile.tuning.cache import cache_in
from flashsvd_compile.tuning.fastest import fastest_tile, launch_behind
from flashsvd_compile.tuning.race import Compile, Race
from flashsvd_compile.tuning.rates import rates_of


@dataclass(frozen=True)
class Rewritten:
    """A rewritten graph and the story of how it came about.

    ``found``: by its node, each site as it was before a plan chose which of its arms to lift.
    ``launches``: by our operators in the graph, the kind of their site. ``untouched``: what the
    graph would hold as it was, None where that was not asked.
    ``factoring``: what became of its dense weights, None where that was not asked. ``feed``: what
    makes the factors that it takes as inputs behind the given ones, None where it takes none.
    ``planned_bytes``: the peak of transient bytes that plans told, 0 where there is no budget.
    """

    module: fx.GraphModule
    before: str
    after: str
    plans: tuple[Plan, ...]
    skips: tuple[Skip, ...]
    seconds: dict[str, float]
    lowered: Mapping[fx.Node, Lowered]
    sizes: Mapping[Size, int]
    found: Mapping[fx.Node, Site]
    launches: Mapping[fx.Node, str]
    untouched: MemoryProfile | None = None
    factoring: Factoring | None = None
    feed: Feed | None = None
    planned_bytes: int = 0

    @cached_property
    def peak(self) -> Peak:
        """The most that the rewritten graph will hold, at the sizes that were planned for."""
        return peak_of(self.memory, self.at)

    @cached_property
    def timelines(self) -> Timelines:
        """What is held over the graph before and after; only where the former was asked for."""
        assert self.untouched is not None
        stays = [plan for plan in self.plans if plan.lowering == "unfused"]
        return Timelines(
            steps_of(self.untouched, self.at, _kinds(self.plans)),
            steps_of(self.memory, self.at, {**_kinds(stays), **self.launches}),
        )

    def at(self, size: Size) -> float:
        """``size`` at the sizes that were planned for."""
        return at(size, self.sizes)

    @cached_property
    def memory(self) -> MemoryProfile:
        """What the rewritten graph will hold while it runs, as predicted."""
        return walk(GraphView(self.module.graph, self.lowered))


def rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    compiled: Compile | None = None,
    device: Device | None = None,
    walk_untouched: bool = False,
) -> Rewritten:
    """Normalise, analyse, plan and rewrite. ``gm`` itself is left as it was.

    ``compiled``: compiles what is timed on the device, where options ask for that; without it
    nothing is timed now, and what was before counts.
    ``device``: what to plan for in place of the tensors' own devices; nothing timed counts then.
    ``walk_untouched``: whether to tell what the graph would hold as it was, too.
    Raises BudgetError where no choice of lowerings keeps the budget.
    """
    once = partial(
        _rewrite, gm, example_inputs, compiled=compiled, device=device,
        walk_untouched=walk_untouched,
    )  # fmt: skip
    try:
        return _within_budget(once, options)
    except BudgetError as error:
        least = error
    tried: set[int] = set()
    while least.least_bytes and least.least_bytes not in tried:  # what it names has to be enough
        tried.add(least.least_bytes)
        try:
            _within_budget(once, replace(options, memory_budget=least.least_bytes))
        except BudgetError as error:
            least = error
        else:
            assert options.memory_budget is not None
            raise BudgetError.of(options.memory_budget, least.least_bytes, least.held)
    raise least


def _within_budget(once: Callable[..., Rewritten], options: Options) -> Rewritten:
    """The graph rewritten anew, until it holds what the budget leaves: plans do not tell all."""
    found, unseen_bytes = once(options), 0
    while options.memory_budget is not None:
        over = found.peak.transient_bytes - options.memory_budget
        if over <= 0:
            break
        # These plans hold this much beyond what they tell, others perhaps less: half the way there
        # lets those be found, and all of it is gone in a few steps.
        untold = found.peak.transient_bytes - found.planned_bytes - unseen_bytes
        unseen_bytes += max(over, untold // 2)
        found = once(options, unseen_bytes=unseen_bytes)
    return found


def _rewrite(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    *,
    compiled: Compile | None,
    device: Device | None,
    walk_untouched: bool,
    unseen_bytes: int = 0,
) -> Rewritten:
    """See `rewrite`; ``unseen_bytes``: what a memory budget has to leave for what plans do not
    tell, such as masks."""
    clock = Clock()
    may_measure = compiled is not None
    may_measure = may_measure and not any(isinstance(x, FakeTensor) for x in example_inputs)
    race, tiled = None, _as_planned
    if device is None:
        race = _race(options, compiled, may_measure)
        tiled = partial(_with_fastest_tile, options=options, may_measure=may_measure)
    device_of = cache(partial(_device, named=device, options=options, may_measure=may_measure))
    module = normalize(gm, example_inputs)
    drop_idle_casts(module.graph)
    free_in_place(module.graph)
    split_einsums(module.graph)
    erase_dead(module.graph)
    before = _code(module)
    clock.lap("normalize")
    untouched = None
    if walk_untouched:
        untouched = walk(GraphView(module.graph, {}))
        clock.lap("walk")

    factoring, feed = None, None
    if options.factors_weights:
        factoring, feed = factor_weights(
            module.graph,
            example_inputs,
            keep=options.keep,
            weight_budget=options.weight_budget,
        )
        erase_dead(module.graph)
        clock.lap("factoring")

    facts = sweep(module.graph)
    sites, skips = find_sites(facts, module.graph)
    clock.lap("analysis")

    hints = size_hints([node.meta.get("val") for node in module.graph.nodes])
    placement = Placement(facts, SymbolicValues(module.graph))

    def plan_of(site: Site, options: Options) -> Plan:
        return plan_site(site, device_of(site.device), options, hints)

    def plans_of(sites: Sequence[Site]) -> list[Plan]:
        """Lowerings are timed against each other where that is asked, in the graph as it is now."""
        found = [plan_of(site, options) for site in sites]
        clock.lap("plan")
        if race is not None:
            contest = Contest(options, plan_of, placement, tiled, race)
            found = [contest.winner(*pair) for pair in zip(found, sites, strict=True)]
        clock.lap("measure")
        return found

    plans = drop_taken(plans_of(sites))
    largest = largest_sizes(module.graph, options, hints)
    planned_bytes = 0
    if options.memory_budget is not None:
        written = sums_of_sums(module.graph, facts.mutated)
        view_of = partial(GraphView, module.graph, written=written)
        plans = plan_within_budget(plans, view_of, facts, device_of, options, largest, unseen_bytes)
        planned = profile_of(view_of, plans, device_of)
        planned_bytes = planned.peak(lambda size: at(size, largest))[1]
        hold_at_most(module.graph, largest)
    clock.lap("plan")

    replaced: dict[fx.Node, Any] = {}
    results: list[fx.Node | None] = []
    for plan in plans:
        put = placement.put(plan)
        replaced |= put
        results.append(next(iter(put), None))
    clock.lap("rewrite")

    plans = tuple(
        plan if result is None else tiled(plan, result)
        for plan, result in zip(plans, results, strict=True)
    )
    clock.lap("measure")

    erase_dead(module.graph)
    # Latents that no site computes itself stand alone in the graph now.
    siblings, missed = find_siblings(facts, module.graph)
    placement = Placement(facts, placement.values)  # sizes that it knew may be among the erased
    merges = plans_of(siblings)
    launches: dict[fx.Node, str] = {}
    for plan in merges:
        merged = placement.put(plan)
        launches |= {launch_behind(result): plan.site.kind for result in merged}
        replaced |= merged
    settle_strides(module.graph, replaced, facts.mutated)
    if (replaced or options.memory_budget is not None) and not torch.is_grad_enabled():
        write_once(module.graph, facts.mutated)
    erase_dead(module.graph)
    module.graph.lint()
    module.recompile()
    clock.lap("rewrite")
    told = (*plans, *merges), (*skips, *missed)
    lowered = _lowered(plans, results, device_of)
    launches |= {
        launch_behind(result): plan.site.kind
        for plan, result in zip(plans, results, strict=True)
        if result is not None
    }
    return Rewritten(
        module, before, module.code, *told, clock.laps, lowered, largest,
        {site.node: site for site in (*sites, *siblings)}, launches, untouched, factoring, feed,
        planned_bytes,
    )  # fmt: skip


def _kinds(plans: Sequence[Plan]) -> dict[fx.Node, str]:
    """The kind of the site that each node belongs to; the first of several."""
    return {
        node: plan.site.kind
        for plan in reversed(plans)
        for node in plan.region | (plan.blocks.region if plan.blocks else frozenset())
    }


def _device(
    device: torch.device, named: Device | None, options: Options, may_measure: bool
) -> Device:
    """``named`` in its place, or else with rates of its own, where they are known or may be
    measured."""
    if named is not None:
        return named
    assumed = device_for(device)
    if options.autotune is False:
        return assumed
    found = rates_of(device, cache_directory() / "rates", may_measure)
    if found is None:
        return assumed
    return replace(
        assumed,
        macs_per_s=dict(found.macs_per_s),
        bytes_per_s=found.bytes_per_s,
        exps_per_s=found.exps_per_s or assumed.exps_per_s,
    )


def _lowered(
    plans: Sequence[Plan], results: Sequence[fx.Node | None], device_of: Callable[..., Device]
) -> dict[fx.Node, Lowered]:
    """Our operators in the rewritten graph, and what each holds."""
    found = {}
    for plan, result in zip(plans, results, strict=True):
        if result is not None:
            node = launch_behind(result)
            found[node] = lowered_by(plan, device_of(plan.site.device), node)
    return found


def _race(options: Options, compiled: Compile | None, may_measure: bool) -> Race | None:
    """None where no lowerings are timed; in training nothing was made for that."""
    if not options.times_lowerings or torch.is_grad_enabled():
        return None
    setting = f"{fingerprint(options)} {sorted(options.inductor.items())}"
    return Race(compiled, setting, cache_directory() / "lowerings", may_measure)


def _as_planned(plan: Plan, result: fx.Node) -> Plan:
    return plan


def _with_fastest_tile(plan: Plan, result: fx.Node, options: Options, may_measure: bool) -> Plan:
    """The plan and its node with the tile that was measured to be fastest, where that is asked."""
    tiling = plan.tiling
    if tiling is None or len(tiling.candidates) < 2 or plan.blocks is not None:
        return plan
    if not options.times_tiles(tiling.is_measured):
        return plan
    launch = launch_behind(result)
    found = fastest_tile(launch, tiling.timed, cache_in(cache_directory()), may_measure)
    if found is None:
        return plan
    tile, source = found
    launch.update_kwarg("tile", list(tile))
    return replace(plan, tiling=tiling.measured(tile, source))


def _code(module: fx.GraphModule) -> str:
    return module.graph.python_code("self").src
