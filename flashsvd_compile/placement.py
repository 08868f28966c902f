"""Plans into their graph: what each lowering writes, and where it is read from then on."""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from flashsvd_compile.analysis.calls import pin_floats, value
from flashsvd_compile.analysis.facts import Facts
from flashsvd_compile.analysis.known_sizes import KnownSizes
from flashsvd_compile.analysis.shared_lift_records import SharedLift
from flashsvd_compile.analysis.site_records import (
    AttentionSite,
    ChainSite,
    FeedForwardSite,
    SiblingsSite,
)
from flashsvd_compile.analysis.symbolic_values import SymbolicValues
from flashsvd_compile.lowering.attention import lower_attention
from flashsvd_compile.lowering.builder import Builder
from flashsvd_compile.lowering.chain import lower_chain
from flashsvd_compile.lowering.feed_forward import (
    lower_row_blocks,
    lower_streamed,
    lower_streamed_whole,
)
from flashsvd_compile.lowering.shared_lifts import lower_remainder
from flashsvd_compile.lowering.siblings import lower_siblings
from flashsvd_compile.planner.plan import Plan


@dataclass(frozen=True)
class Placement:
    """What the lowerings of one graph share.

    ``instead``: nodes that are gone, each with the one in its place: later sites were found
    reading them.
    """

    facts: Facts
    values: SymbolicValues
    sizes: KnownSizes = field(default_factory=KnownSizes)
    instead: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def written(self, plan: Plan) -> dict[fx.Node, fx.Node]:
        """Write the plan's lowering; returns what is to be read in place of which node, the result
        of the site first.

        The graph computes what it did: nothing reads the new nodes yet. Empty where it stays.
        """
        if plan.lowering == "unfused":
            return {}
        site = plan.site
        pin_floats(plan.region)
        if isinstance(site, SiblingsSite):
            results = lower_siblings(site, plan.tile, self.sizes)
            nodes = [member.node for member in site.members]
            return dict(zip(nodes, results, strict=True))
        results = {plan.node: self._result(plan, self._builder(plan.node))}
        if isinstance(site, AttentionSite):
            for lift in site.shared:
                results |= self._remainders(lift)
        return results

    def _builder(self, anchor: fx.Node) -> Builder:
        return Builder(anchor, self.facts.space, self.instead, self.sizes)

    def _remainders(self, lift: SharedLift) -> dict[fx.Node, fx.Node]:
        """What stands for those who read other rows of ``lift`` than attention did."""
        results: dict[fx.Node, fx.Node] = {}
        for remainder in lift.remainders:
            # Another site that shares the lift may have replaced some.
            readers = tuple(r for r in remainder.readers if r.node not in self.instead)
            if readers:
                builder = self._builder(min(reader.node for reader in readers))
                results |= lower_remainder(replace(remainder, readers=readers), builder)
        return results

    def put(self, plan: Plan) -> dict[fx.Node, Any]:
        """Write the plan's lowering and have it read; returns its results with the old values."""
        replaced = {}
        for node, result in self.written(plan).items():
            replaced[result] = value(node)
            node.replace_all_uses_with(result)
            node.graph.erase_node(node)
            self.instead[node] = result
        return replaced

    def _result(self, plan: Plan, builder: Builder) -> fx.Node:
        site = plan.site
        if isinstance(site, AttentionSite):
            sram_budget = 0 if plan.tiling is None else plan.tiling.sram_limit
            return lower_attention(
                site, builder, plan.tile, sram_budget, self.values, plan.blocks
            )  # fmt: skip
        if isinstance(site, FeedForwardSite) and plan.lowering == "streamed":
            return lower_streamed(site, builder, list(plan.tile))
        if isinstance(site, FeedForwardSite) and plan.lowering == "streamed_whole":
            return lower_streamed_whole(site, builder, list(plan.tile))
        if isinstance(site, FeedForwardSite):
            return lower_row_blocks(site, builder, plan.block_rows, list(plan.tile))
        if isinstance(site, ChainSite):
            return lower_chain(site, builder, list(plan.tile))
        raise AssertionError(f"no lowering {plan.lowering} for a {site.kind}")
