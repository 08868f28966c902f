"""Plans of all sites that keep a memory budget, and lose the least time by it.

A walk over the graph with the plans in place finds the moment that holds most. While that is
beyond the budget, the sites at work then are given another way to run: the one that takes the least
longer among those that keep the budget while they are at work, or, where none does, the one that
holds the least then. Sites alike are changed together.
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import fx

from flashsvd_compile.analysis.axes import Size, shape_of
from flashsvd_compile.analysis.calls import value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.site_records import AttentionSite
from flashsvd_compile.memory.liveness import MemoryProfile, Moment, walk
from flashsvd_compile.memory.peak import mib, peak_of
from flashsvd_compile.memory.view import GraphView, Lowered
from flashsvd_compile.options import Options
from flashsvd_compile.planner import cost
from flashsvd_compile.planner.alternatives import Alternative, alternatives
from flashsvd_compile.planner.device import Device
from flashsvd_compile.planner.held import lowered_by, remainders_by
from flashsvd_compile.planner.plan import Plan
from flashsvd_compile.planner.sites import drop_taken

ViewOf = Callable[[Mapping[fx.Node, Lowered]], GraphView]


class BudgetError(RuntimeError):
    """No choice of lowerings keeps the memory budget.

    ``least_bytes``: the budget at which the same call would run; 0 where none is known. ``held``:
    what holds them.
    """

    def __init__(self, message: str, least_bytes: int = 0, held: str = "") -> None:
        super().__init__(message)
        self.least_bytes, self.held = least_bytes, held

    @classmethod
    def of(cls, budget: int, least_bytes: int, held: str) -> "BudgetError":
        """For a ``budget`` that even the choice which holds the least goes beyond."""
        return cls(
            f"memory_budget is {mib(budget)}, and the least that any choice of lowerings holds is "
            f"{held}. It would run within "
            f'memory_budget="{-(-least_bytes // 2**20)}MiB"',
            least_bytes,
            held,
        )


def plan_within_budget(
    plans: Sequence[Plan],
    view_of: ViewOf,
    facts: Facts,
    device_of: Callable[..., Device],
    options: Options,
    sizes: Mapping[Size, int],
    unseen_bytes: int = 0,
) -> tuple[Plan, ...]:
    """Plans whose predicted peak of transient bytes is at most ``options.memory_budget``.

    ``view_of``: the graph with these of our operators in it.
    ``sizes``: of the graph's symbols, the largest that the plans have to hold for.
    ``unseen_bytes``: what the rewritten graph was seen to hold beyond a prediction from plans.
    Raises BudgetError, with the least possible bytes and what holds them, where there are none.
    """
    assert options.memory_budget is not None
    budget = options.memory_budget - unseen_bytes
    if torch.is_grad_enabled():
        raise BudgetError(
            "memory_budget plans inference, and this graph is traced for gradients, which keep "
            "activations: call the model under torch.no_grad() or torch.inference_mode()"
        )
    if profile_of(view_of, plans, device_of).peak(lambda size: cost.at(size, sizes))[1] <= budget:
        return tuple(plans)
    ways = [
        alternatives(plan, facts, device_of(plan.site.device), options, sizes) for plan in plans
    ]
    # Sites that look alike may still differ in what else they could run as.
    kinds = [(_kind(plan), len(own)) for plan, own in zip(plans, ways, strict=True)]
    search = _Search(view_of, ways, kinds, device_of, sizes)
    choice = [0] * len(plans)
    moment, peak = search.peak(choice)
    while peak > budget:
        better = search.best_change(choice, moment, budget)
        if better is None:
            profile = profile_of(view_of, search.plans(choice), device_of)
            least = peak_of(profile, lambda size: cost.at(size, sizes))
            masks = f" and masks of {mib(unseen_bytes)}" if unseen_bytes else ""
            raise BudgetError.of(
                options.memory_budget, least.transient_bytes + unseen_bytes, f"{least}{masks}"
            )
        choice = better
        moment, peak = search.peak(choice)
    return search.plans(choice)


def profile_of(
    view_of: ViewOf, plans: Sequence[Plan], device_of: Callable[..., Device]
) -> MemoryProfile:
    """What a graph will hold with ``plans`` in the places of their sites."""
    lowered: dict[fx.Node, Lowered] = {}
    for plan in plans:
        if plan.lowering != "unfused":
            lowered[plan.node] = lowered_by(plan, device_of(plan.site.device))
            lowered |= remainders_by(plan)
    return walk(view_of(lowered))


@dataclass
class _Search:
    view_of: ViewOf
    ways: Sequence[Sequence[Alternative]]
    kinds: Sequence[object]
    device_of: Callable[..., Device]
    sizes: Mapping[Size, int]

    def plans(self, choice: Sequence[int]) -> tuple[Plan, ...]:
        chosen = (ways[index].plan for ways, index in zip(self.ways, choice, strict=True))
        return drop_taken(tuple(chosen))

    def peak(
        self, choice: Sequence[int], among: Container[fx.Node] | None = None
    ) -> tuple[Moment | None, int]:
        profile = profile_of(self.view_of, self.plans(choice), self.device_of)
        return profile.peak(lambda size: cost.at(size, self.sizes), among)

    def best_change(
        self, choice: Sequence[int], moment: Moment | None, budget: int
    ) -> list[int] | None:
        """The choice with the sites of one kind changed that serves best; None where none helps.

        Judged by what is held while those sites are at work: another kind may hold more.
        """
        tried: list[tuple[tuple[int, float], list[int]]] = []
        at_work = {kind for i, kind in enumerate(self.kinds) if self._works(i, moment)}
        for kind in at_work:
            alike = [i for i, own in enumerate(self.kinds) if own == kind]
            nodes = frozenset().union(*(self._nodes[i] for i in alike))
            now = self.peak(choice, nodes)[1]
            for position in range(len(self.ways[alike[0]])):
                changed = [position if i in alike else own for i, own in enumerate(choice)]
                reached = self.peak(changed, nodes)[1]
                if reached < now:
                    seconds = sum(self.ways[i][position].seconds for i in alike)
                    tried.append(((max(reached, budget), seconds), changed))
        return min(tried, key=lambda one: one[0])[1] if tried else None

    def _works(self, index: int, moment: Moment | None) -> bool:
        """Is the site at work, or is all of a lift held for those who read it beside the site?"""
        if moment is None or moment.node in self._nodes[index]:
            return moment is not None
        site = self.ways[index][0].plan.site
        is_shared = isinstance(site, AttentionSite) and bool(site.shared)
        return is_shared and not site.region.isdisjoint(moment.held)

    @cached_property
    def _nodes(self) -> list[frozenset[fx.Node]]:
        """Of each site, the nodes at which one way or another to run it computes something."""
        return [
            frozenset().union(*(self._computes(way.plan) for way in ways)) for ways in self.ways
        ]

    @staticmethod
    def _computes(plan: Plan) -> frozenset[fx.Node]:
        taken = frozenset() if plan.blocks is None else plan.blocks.region
        return frozenset({plan.node}) | plan.region | taken


def _kind(plan: Plan) -> object:
    """Equal for sites that are alike in all that decides how they may run."""
    site = plan.site
    shapes = tuple(
        shape_of(value(source))
        for source in plan.node.all_input_nodes
        if hasattr(value(source), "shape")
    )
    return site.kind, plan.lowering, site.dtype, shape_of(value(site.node)), shapes, plan.tile
