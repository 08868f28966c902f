"""Plans of all sites that keep a memory budget, and lose the least time by it.

A walk over the graph with the plans in place finds the moment that holds most. While that is
beyond the budget, the sites at work then are given another way to run: the one that takes the least
longer among those that bring the peak within the budget, or, where none does, the one that brings
it down the furthest. Sites alike are changed together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.memory.liveness import MemoryProfile, Moment, walk
from flashsvd_compile.memory.peak import Peak, mib, peak_of
from flashsvd_compile.memory.view import GraphView
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.alternatives import Alternative, alternatives
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.held import lowered_by
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.planner.sites import drop_taken


class BudgetError(RuntimeError):
    """No choice of lowerings keeps the memory budget."""


def plan_within_budget(
    plans: Sequence[Plan],
    graph: fx.Graph,
    facts: Facts,
    device_of: Callable[..., Device],
    options: Options,
    sizes: Mapping[Size, int],
) -> tuple[Plan, ...]:
    """Plans whose predicted peak of transient bytes is at most ``options.memory_budget``.

    ``sizes``: of the graph's symbols, the largest that the plans have to hold for. Raises
    BudgetError, with the least possible bytes and what holds them, where there are none.
    """
    assert options.memory_budget is not None
    if torch.is_grad_enabled():
        raise BudgetError(
            "memory_budget plans inference, and this graph is traced for gradients, which keep "
            "activations: call the model under torch.no_grad() or torch.inference_mode()"
        )
    ways = [
        alternatives(plan, facts, device_of(plan.site.device), options, sizes) for plan in plans
    ]
    search = _Search(graph, ways, [_kind(plan) for plan in plans], device_of, sizes)
    choice = [0] * len(plans)
    moment, peak = search.peak(choice)
    while peak > options.memory_budget:
        better = search.best_change(choice, moment, peak, options.memory_budget)
        if better is None:
            profile = profile_of(graph, search.plans(choice), device_of)
            least = peak_of(profile, lambda size: cost.at(size, sizes))
            raise BudgetError(_least(options.memory_budget, least))
        choice = better
        moment, peak = search.peak(choice)
    return search.plans(choice)


def profile_of(
    graph: fx.Graph, plans: Sequence[Plan], device_of: Callable[..., Device]
) -> MemoryProfile:
    """What ``graph`` will hold with ``plans`` in the places of their sites."""
    lowered = {
        plan.node: lowered_by(plan, device_of(plan.site.device))
        for plan in plans
        if plan.lowering != "unfused"
    }
    return walk(GraphView(graph, lowered))


@dataclass
class _Search:
    graph: fx.Graph
    ways: Sequence[Sequence[Alternative]]
    kinds: Sequence[object]
    device_of: Callable[..., Device]
    sizes: Mapping[Size, int]

    def plans(self, choice: Sequence[int]) -> tuple[Plan, ...]:
        chosen = (ways[index].plan for ways, index in zip(self.ways, choice, strict=True))
        return drop_taken(tuple(chosen))

    def peak(self, choice: Sequence[int]) -> tuple[Moment | None, int]:
        profile = profile_of(self.graph, self.plans(choice), self.device_of)
        return profile.peak(lambda size: cost.at(size, self.sizes))

    def best_change(
        self, choice: Sequence[int], moment: Moment | None, peak: int, budget: int
    ) -> list[int] | None:
        """The choice with one kind of site changed that serves best; None where none helps."""
        tried = []
        for kind in {self.kinds[i] for i in range(len(choice)) if self._works(choice, i, moment)}:
            alike = [i for i, own in enumerate(self.kinds) if own == kind]
            for position in range(len(self.ways[alike[0]])):
                if position == choice[alike[0]]:
                    continue
                changed = list(choice)
                for i in alike:
                    changed[i] = position
                reached = self.peak(changed)[1]
                seconds = sum(
                    self.ways[i][position].seconds - self.ways[i][choice[i]].seconds for i in alike
                )
                if reached < peak:
                    tried.append((max(reached, budget), seconds, changed))
        return min(tried, key=lambda one: one[:2])[2] if tried else None

    def _works(self, choice: Sequence[int], index: int, moment: Moment | None) -> bool:
        """Whether another way to run the site could change what is held at ``moment``."""
        if moment is None:
            return False
        of_site = {moment.node, *moment.held}
        return any(
            way.plan.node in of_site
            or of_site & way.plan.region
            or (way.plan.blocks is not None and of_site & way.plan.blocks.region)
            for way in self.ways[index]
        )


def _kind(plan: Plan) -> object:
    """Equal for sites that are alike in all that decides how they may run."""
    site = plan.site
    shapes = tuple(
        shape_of(value(source))
        for source in plan.node.all_input_nodes
        if hasattr(value(source), "shape")
    )
    return site.kind, plan.lowering, site.dtype, shape_of(value(site.node)), shapes, plan.tile


def _least(budget: int, peak: Peak) -> str:
    return (
        f"memory_budget is {mib(budget)}, and the least that any choice of lowerings holds is "
        f"{peak}. It would run within "
        f'memory_budget="{-(-peak.transient_bytes // 2**20)}MiB"'
    )
